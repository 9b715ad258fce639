from dataclasses import fields

import pytest
import torch

from aligngym.core import PADDING, Preferences, Trajectories


def make(rows, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(steps) < torch.randint(1, steps + 1, (rows, 1), generator=generator)
    observations, actions = torch.randint(0, 9, (2, rows, steps), generator=generator)
    rewards, log_probs, values = torch.randn(3, rows, steps, generator=generator) * mask
    return Trajectories(
        observations.where(mask, PADDING),
        actions.where(mask, PADDING),
        mask,
        rewards,
        log_probs,
        terminated=mask,
        truncated=~mask,
        values=values,
        group=torch.arange(rows) // 2,
    )


def assert_same(left, right):
    for field in fields(left):
        one, other = getattr(left, field.name), getattr(right, field.name)
        if isinstance(one, Trajectories):
            assert_same(one, other)
        else:
            assert (one is None and other is None) or torch.equal(one, other), field.name


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_split_and_concatenate_are_the_identity(size):
    rows = make(7, 5)
    pieces = list(rows.split(size))
    assert [len(piece) for piece in pieces] == [min(size, 7 - start) for start in range(0, 7, size)]
    assert_same(Trajectories.concatenate(pieces), rows)
    pairs = Preferences(rows, make(7, 5, seed=1), torch.arange(7.0))
    assert_same(Preferences.concatenate(list(pairs.split(size))), pairs)


def test_rows_are_chosen_by_slice_index_or_mask():
    rows = make(6, 4)
    assert_same(rows[2:4], rows[torch.tensor([2, 3])])
    assert_same(rows[torch.tensor([5, 1])], Trajectories.concatenate([rows[5:6], rows[1:2]]))
    assert_same(rows[rows.group == 1], rows[2:4])
    assert len(rows[rows.group == 9]) == 0


def test_shorter_rows_are_filled_up_on_the_right():
    short, long = make(2, 3), make(3, 5, seed=1)
    joined = Trajectories.concatenate([short, long])
    assert_same(joined[2:], long)
    for field in fields(short):
        value = getattr(joined, field.name)
        if value is None or value.dim() == 1:
            continue
        assert torch.equal(value[:2, :3], getattr(short, field.name))
        fill = PADDING if field.name in ("observations", "actions") else 0
        assert (value[:2, 3:] == fill).all()
        assert value.dtype == getattr(short, field.name).dtype
    assert torch.equal(joined.lengths, torch.cat([short.lengths, long.lengths]))


def test_vector_observations_are_filled_up_too():
    parts = [
        Trajectories(torch.rand(2, steps, 3), torch.zeros(2, steps).long(), torch.ones(2, steps).bool())
        for steps in (2, 4)
    ]
    joined = Trajectories.concatenate(parts)
    assert joined.observations.shape == (4, 4, 3)
    assert torch.equal(joined.observations[:2, :2], parts[0].observations)


def test_returns_sum_rewards_where_the_policy_acted():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rewards = torch.tensor([[1.0, 2.0, 100.0], [5.0, 0.0, 0.0]])
    rows = Trajectories(mask.long(), mask.long(), mask, rewards)
    assert rows.returns.tolist() == [3.0, 5.0]
    assert rows.lengths.tolist() == [2, 1]
    rows.rewards = None
    with pytest.raises(ValueError, match="no rewards"):
        _ = rows.returns


def test_both_sides_of_a_pair_share_a_group():
    chosen, rejected = make(3, 4), make(3, 6, seed=1)
    pairs = Preferences(chosen, rejected)
    rows = pairs.both()
    assert rows.group.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(rows.actions[:3, :4], chosen.actions)
    assert torch.equal(rows.actions[3:], rejected.actions)
    assert pairs.pair_weights.tolist() == [1.0, 1.0, 1.0]
    assert chosen.group.tolist() == [0, 0, 1]
