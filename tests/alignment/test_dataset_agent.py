"""Batches of a number of tokens: what they hold, that steps alone decide it, and that runs with them resume."""

import pytest
import torch

from aligngym.alignment.dataset_agent import TokenOrder, batch_order
from aligngym.alignment.dpo import DPO
from aligngym.alignment.kto import KTO
from aligngym.alignment.token_rows import TokenLabelled, TokenPreferences
from aligngym.core import EpochOrder, Preferences, TabularPolicy, Trajectories

LENGTHS = torch.randint(5, 60, (200,), generator=torch.Generator().manual_seed(0)).tolist()


def order(tokens=300, seed=0):
    return TokenOrder(LENGTHS, tokens, seed)


def epoch_of(order, epoch):
    return range(order.steps(epoch), order.steps(epoch + 1))


@pytest.mark.parametrize("tokens", [59, 80, 300, 1000, 10**6])
def test_an_epoch_has_every_row_once_in_as_few_batches_as_hold_its_order(tokens):
    found = order(tokens)
    for epoch in range(3):
        batches = [found(step).tolist() for step in epoch_of(found, epoch)]
        rows = [row for batch in batches for row in batch]
        assert sorted(rows) == list(range(200))
        assert rows == found.permutation(epoch).tolist()
        sizes = [sum(LENGTHS[row] for row in batch) for batch in batches]
        assert max(sizes) <= tokens
        # Filled in turn, which no other way beats.
        filled, count = tokens + 1, 0
        for row in rows:
            filled += LENGTHS[row]
            if filled > tokens:
                filled, count = LENGTHS[row], count + 1
        assert len(batches) == count


def test_batches_are_even():
    """The last of an epoch too; a batch of 300 tokens is cut to within a row of their mean."""
    found = order()
    for epoch in range(5):
        sizes = [sum(LENGTHS[row] for row in found(step)) for step in epoch_of(found, epoch)]
        mean = sum(sizes) / len(sizes)
        assert max(sizes) < mean + max(LENGTHS)
        assert min(sizes) > mean - 2 * max(LENGTHS)


def test_it_is_a_function_of_the_step():
    steps = [50, 0, 170, 50, 3]
    found = order(seed=9)
    assert [found(step).tolist() for step in steps] == [order(seed=9)(step).tolist() for step in steps]
    assert found(0).tolist() != found(order().steps(1)).tolist() != order()(0).tolist()


def test_epochs_in_steps_add_up_from_anywhere():
    found = order(130)
    counts = [len(epoch_of(found, epoch)) for epoch in range(6)]
    assert len(set(counts)) > 1
    assert [found.steps(epochs) for epochs in range(7)] == [sum(counts[:epochs]) for epochs in range(7)]
    assert found.steps(2.5) == sum(counts[:2]) + round(counts[2] / 2)
    for done in (0, 1, counts[0], counts[0] + 7):
        halfway = done + found.steps(1, done)
        assert abs(halfway + found.steps(1, halfway) - done - found.steps(2, done)) <= 1
    assert found.steps(1, sum(counts[:2])) == counts[2]


def tokens(length, seed):
    return torch.randint(1, 257, (length,), generator=torch.Generator().manual_seed(seed))


def pairs(count=12):
    prompts, chosen, rejected = ([tokens(1 + (k * row) % 7, row) for row in range(count)] for k in (3, 5, 4))
    return TokenPreferences(prompts, chosen, rejected)


def labelled(count=12):
    own = pairs(count)
    return TokenLabelled(own.prompts, own.chosen, [row % 3 > 0 for row in range(count)])


def test_tokens_count_every_prompt_once():
    own = pairs()
    expected = [sum(map(len, row)) for row in zip(own.prompts, own.chosen, own.rejected, strict=True)]
    assert sum(expected) == own.num_tokens
    assert batch_order(own, 8, 30, 0).lengths == expected
    assert batch_order(own[torch.arange(12)], 8, 30, 0).lengths == expected
    expected = [sum(map(len, row)) for row in zip(own.prompts, own.chosen, strict=True)]
    assert batch_order(labelled(), 8, 30, 0).lengths == expected
    assert type(batch_order(own, 8, None, 0)) is EpochOrder


AGENTS = {"dpo": (DPO, pairs), "kto": (KTO, labelled)}


@pytest.mark.parametrize("name", AGENTS)
def test_the_loss_is_the_mean_over_the_rows_of_a_step(tiny_policy, name):
    kind, data = AGENTS[name]
    agent = kind(tiny_policy(), data(), tokens_per_batch=40, seed=3)
    rows = agent.order(0)
    assert 2 < len(rows) < 8
    metrics = agent.backward(agent.next_batch())
    alone = kind(tiny_policy(), data().subset(sorted(rows.tolist())), batch_size=len(rows))
    # The same rows in the same order, as a dataset of their own.
    alone.order = lambda step: rows.argsort().argsort()
    alone.order.share = lambda step, process, processes: alone.order(step)
    assert metrics == pytest.approx(alone.backward(alone.next_batch()), rel=1e-4)


@pytest.mark.parametrize("name", AGENTS)
def test_training_resumes_exactly_over_epochs(tiny_policy, tmp_path, monkeypatch, name):
    kind, data = AGENTS[name]

    def agent():
        policy = tiny_policy(perturbed=False, lora={"lora_dropout": 0.3})
        monkeypatch.setattr(type(policy), "steps_at_once", 25)
        return kind(policy, data(), tokens_per_batch=60, learning_rate=0.05)

    whole = agent().learn(epochs=2, progress=False)
    steps = whole.iteration
    assert steps == whole.order.steps(2) > whole.order.steps_per_epoch
    assert max(len(whole.pieces(whole.data[whole.order(step)])) for step in range(steps)) > 1
    for interruption in (1, whole.order.steps(1), steps - 1):
        agent().learn(interruption, progress=False).save(tmp_path / "agent")
        resumed = agent().load(tmp_path / "agent").learn(steps - interruption, progress=False)
        for parameter, value in whole.policy.trainable_state().items():
            assert torch.equal(resumed.policy.trainable_state()[parameter], value), parameter


def test_an_epoch_after_an_epoch_is_two():
    """Also where the second has another number of batches."""
    actions, generator = torch.zeros(40, 9).long(), torch.Generator().manual_seed(0)
    sides = [
        Trajectories(actions[:, :1], actions.where(mask, -1), mask)
        for mask in (torch.arange(9) < torch.randint(1, 10, (40, 1), generator=generator) for _ in range(2))
    ]
    agent = DPO(TabularPolicy(1, 2), Preferences(*sides), tokens_per_batch=25, seed=1)
    first, both = agent.order.steps(1), agent.order.steps(2)
    assert first != both - first
    agent.learn(epochs=1, progress=False)
    assert agent.iteration == first
    agent.learn(epochs=1, progress=False)
    assert agent.iteration == both


def test_rows_larger_than_a_batch_are_refused():
    policy, data = TabularPolicy(1, 2), pairs()
    lengths = batch_order(data, 8, 100, 0).lengths
    row = lengths.index(max(lengths))
    message = f"row {row + 1} of 12 has {max(lengths)} tokens, more than tokens_per_batch={max(lengths) - 1}: allow so"
    with pytest.raises(ValueError, match=message):
        DPO(policy, data, tokens_per_batch=max(lengths) - 1)
    for tokens_per_batch in (0, -3):
        with pytest.raises(ValueError, match=f"at least 1, not {tokens_per_batch}"):
            DPO(policy, data, tokens_per_batch=tokens_per_batch)
    with pytest.raises(ValueError, match="at least two rows"):
        KTO(policy, labelled(1), tokens_per_batch=100)


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_a_whole_dataset_is_never_judged_at_once(tiny_policy, architecture, monkeypatch):
    """Neither by packed nor by padded rows, with or without a number of rows that are computed at once."""
    policy = tiny_policy(architecture, **({} if architecture == "llama" else {"lora": {"target_modules": ["in_proj"]}}))
    generator = torch.Generator().manual_seed(0)
    tokens = [[torch.randint(1, 200, (40,), generator=generator) for _ in range(70)] for _ in range(3)]
    seen, own = [], type(policy).forward
    monkeypatch.setattr(
        type(policy), "forward", lambda self, rows, **o: seen.append(rows.sizes()) or own(self, rows, **o)
    )
    for options, most in (({}, 8192), ({"micro_batch_size": 2}, 2 * 120)):
        seen.clear()
        DPO(policy, TokenPreferences(*tokens), batch_size=4, **options).evaluate(TokenPreferences(*tokens))
        # Every pair's prompt counts once.
        counts = [int(sizes[0].sum() / 2 + sizes[1].sum()) for sizes in seen]
        assert sum(counts) == 70 * 120
        assert max(counts) <= most
