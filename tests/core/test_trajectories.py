from dataclasses import fields
from itertools import combinations, pairwise

import pytest
import torch

from aligngym.agents.replay import Transitions
from aligngym.core import PADDING, Preferences, Trajectories
from aligngym.core.trajectories import even_cuts


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


def test_both_sides_are_the_same_object_until_the_pairs_are_others():
    pairs = Preferences(make(3, 4), make(3, 6, seed=1))
    rows = pairs.both()
    assert pairs.both() is rows
    for other in (pairs[:], pairs.to("cpu"), pairs[1:]):
        assert other.both() is not rows
        assert torch.equal(other.both().group, torch.arange(len(other)).repeat(2))
    assert pairs == Preferences(pairs.chosen, pairs.rejected)


@pytest.mark.parametrize("seed", range(30))
def test_cuts_against_all_ways_to_cut(seed):
    """As few parts as any way needs, and of all ways with so few the smallest largest part."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 12, (9,), generator=generator).tolist()
    limit = int(torch.randint(1, 50, (), generator=generator))
    cuts = even_cuts(sizes, limit)

    def parts(cuts):
        return [sizes[begin:end] for begin, end in pairwise(cuts)]

    def allowed(cuts, limit):
        return all(len(part) == 1 or sum(part) <= limit for part in parts(cuts))

    ways = [(0, *inner, 9) for count in range(9) for inner in combinations(range(1, 9), count)]
    fewest = [way for way in ways if allowed(way, limit)]
    fewest = [way for way in fewest if len(way) == len(fewest[0])]
    assert cuts[0] == 0
    assert cuts[-1] == 9
    assert allowed(cuts, limit)
    assert len(cuts) == len(fewest[0])
    assert max(map(sum, parts(cuts))) == min(max(map(sum, parts(way))) for way in fewest)


def groups_of(*groups):
    """Rows of a prompt's length and completions' lengths, one group for each tuple."""
    lengths = [(prompt, size, group) for group, (prompt, *sizes) in enumerate(groups) for size in sizes]
    prompts, actions = (
        torch.stack([torch.arange(20).where(torch.arange(20) < row[side], PADDING) for row in lengths])
        for side in (0, 1)
    )
    group = torch.tensor([row[2] for row in lengths])
    return Trajectories(prompts.flip(1), actions, actions != PADDING, group=group)


@pytest.mark.parametrize(
    ("at_once", "expected"),
    [
        (100, [9]),
        (29, [9]),
        (28, [3, 6]),  # 15 and 14 steps, better than 28 and 1
        (15, [3, 6]),
        (14, [2, 1, 6]),  # the first group is cut, 9 and 11 steps
        (9, [2, 1, 2, 4]),  # and so is the third, 5 + 2 and 5 + 2; the third row is larger, and alone
        (1, [1] * 9),
    ],
)
def test_pieces_of_groups_by_hand(at_once, expected):
    # 5 + 2 + 2 + 6 = 15 steps, 3 + 1 + 1 = 5, and 5 + 4 * 1 = 9: 29 in all.
    rows = groups_of((5, 2, 2, 6), (3, 1, 1), (5, 1, 1, 1, 1))
    assert rows.sizes().tolist()[:2] == [[5, 5, 5, 3, 3, 5, 5, 5, 5], [2, 2, 6, 1, 1, 1, 1, 1, 1]]
    pieces = rows.pieces(at_once)
    assert [len(piece) for piece in pieces] == expected
    assert_same(Trajectories.concatenate(pieces), rows)
    assert (pieces[0] is rows) == (len(pieces) == 1)


@pytest.mark.parametrize("at_once", [1, 7, 20, 40, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_pieces_keep_order_and_limit(at_once, seed):
    rows = make(40, 9, seed)
    rows.group = torch.randint(0, 2, (40,), generator=torch.Generator().manual_seed(seed)).cumsum(0)
    rows.observations = rows.observations[torch.searchsorted(rows.group, rows.group)]
    pieces = rows.pieces(at_once)
    assert_same(Trajectories.concatenate(pieces), rows)

    def steps(piece):
        observations, actions, groups = piece.sizes().tolist()
        return sum(actions) + sum(
            size for row, size in enumerate(observations) if row == 0 or groups[row] != groups[row - 1]
        )

    assert all(steps(piece) <= at_once or len(piece) == 1 for piece in pieces)
    # A group is cut only where it is larger than a piece.
    for before, after in pairwise(pieces):
        group = before.group[-1]
        assert after.group[0] != group or steps(rows[rows.group == group]) > at_once


def test_pairs_count_their_start_once_and_rows_without_groups_alone():
    chosen, rejected = groups_of((4, 3), (6, 1)), groups_of((4, 2), (6, 9))
    pairs = Preferences(chosen, rejected, torch.ones(2))
    assert pairs.sizes().tolist() == [[4, 6], [5, 10], [0, 1]]
    assert [len(piece) for piece in pairs.pieces(25)] == [2]
    assert [len(piece) for piece in pairs.pieces(24)] == [1, 1]
    chosen.group = None
    assert chosen.sizes().tolist() == [[4, 6], [3, 1], [0, 1]]
    assert len(chosen[:0].pieces(5)) == 1


def test_rows_without_steps_cannot_be_counted():
    rows = Transitions(*(torch.zeros(2) for _ in fields(Transitions)))
    with pytest.raises(TypeError, match="Transitions holds no trajectories"):
        rows.pieces(5)


class TestHost:
    """Rows remember what they were moved from. The device ``meta`` stands for one that would have to be waited for."""

    def test_rows_that_were_moved_are_known_on_the_processor(self):
        pairs = Preferences(make(3, 4), make(3, 4))
        there = pairs.to("meta")
        assert there.host is pairs
        assert there.chosen.host is pairs.chosen
        assert there.both().host is pairs.both()
        assert there.both().mask.device.type == "meta"
        assert pairs.host is pairs

    @pytest.mark.parametrize("change", ["in place", "replaced", "within"])
    def test_not_if_they_have_changed_since(self, change):
        pairs = Preferences(make(3, 4), make(3, 4), torch.ones(3))
        there = pairs.to("meta")
        if change == "in place":
            there.chosen.mask.logical_not_()
        elif change == "replaced":
            there.weights = torch.zeros(3, device="meta")
        else:
            there.chosen.group = torch.zeros(3, device="meta")
        assert there._origin[0] is pairs
        with pytest.raises(NotImplementedError, match="meta"):
            _ = there.host  # It would have to be fetched, and there is nothing to fetch.

    def test_others_keep_nothing_alive(self):
        assert make(2, 4).to("cpu")._origin is None
        assert make(2, 4).to("meta").to("meta")._origin is None
