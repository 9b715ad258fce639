"""KTO by hand, its own fixed point on a table and with an adapter, and what must not change the gradient."""

import math

import pytest
import torch

from aligngym.alignment.kto import KTO
from aligngym.alignment.token_rows import Labelled, TokenLabelled
from aligngym.core import PADDING, Decay, TabularPolicy, Trajectories, objectives
from aligngym.core.statistics import wilson_interval
from aligngym.envs import TokenMDP


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_value_and_gradient_by_hand():
    beta, good_weight, bad_weight = 0.5, 1.5, 0.7
    ratios = torch.tensor([0.3, -2.0, 4.0, 0.3, -2.0], dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([True, True, True, False, False])
    kl = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    options = {"beta": beta, "desirable_weight": good_weight, "undesirable_weight": bad_weight}
    losses = objectives.kto(ratios, desirable, kl, **options)
    expected, slopes = [], []
    for r, good in zip(ratios.tolist(), desirable.tolist(), strict=True):
        value = sigmoid(beta * (r - 0.8)) if good else sigmoid(beta * (0.8 - r))
        weight = good_weight if good else bad_weight
        expected.append(weight - weight * value)
        slopes.append((-1 if good else 1) * weight * beta * value * (1 - value))
    assert losses.tolist() == pytest.approx(expected, rel=1e-9)
    losses.sum().backward()
    assert ratios.grad.tolist() == pytest.approx(slopes, rel=1e-9)
    assert kl.grad is None
    held = objectives.kto(ratios, desirable, torch.tensor(-3.0), **options)
    torch.testing.assert_close(held, objectives.kto(ratios, desirable, torch.tensor(0.0), **options))


def enumerated(rows, drawn, good):
    """Every trajectory with both labels, weighted by how often it is drawn and has the label."""
    twice = torch.arange(len(rows)).repeat(2)
    labels = torch.arange(2 * len(rows)) < len(rows)
    return Labelled(rows[twice], labels, torch.cat([drawn * good, drawn * (1 - good)]).float())


def fixed_point(reference, drawn, good, beta, good_weight=1.0, bad_weight=1.0):
    """π ∝ w, the pulls q(λ_D p − λ_U(1−p))σ'(β(r − z₀)), by damped iteration in plain float64; and z₀."""
    policy = reference.double().clone()
    for _ in range(4000):
        ratios = (policy / reference).log()
        kl = float((drawn * ratios).sum().clamp(min=0))
        slope = torch.sigmoid(beta * (ratios - kl)) * torch.sigmoid(-beta * (ratios - kl))
        pulls = drawn * (good_weight * good - bad_weight * (1 - good)) * slope
        policy = 0.9 * policy + 0.1 * pulls / pulls.sum()
    assert (policy - pulls / pulls.sum()).abs().max() < 1e-9
    return policy, kl


def learn(policy, labelled, steps=300, learning_rate=0.1, **options):
    schedule = Decay(learning_rate, steps)
    agent = KTO(policy, labelled, batch_size=len(labelled), learning_rate=schedule, max_grad_norm=None, **options)
    return agent.learn(steps, progress=False)


def bandit(reference, **options):
    actions = torch.arange(len(reference))[:, None]
    rows = Trajectories(torch.zeros_like(actions), actions, torch.ones_like(actions).bool())
    return TabularPolicy(1, len(reference), [reference], **options), rows


@pytest.mark.parametrize("weights", [{}, {"desirable_weight": 1.3, "undesirable_weight": 0.8}])
@pytest.mark.parametrize("drawn", [[0.4, 0.3, 0.2, 0.1], [0.15, 0.2, 0.3, 0.35]])
def test_its_fixed_point_on_a_table(drawn, weights):
    """All texts mostly liked, and β small enough for one such point: π ∝ w, not the tilted reference of DPO."""
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    drawn, good = torch.tensor(drawn, dtype=torch.float64), torch.tensor([0.6, 0.7, 0.8, 0.9], dtype=torch.float64)
    expected, kl = fixed_point(reference, drawn, good, 0.5, *weights.values())
    # Texts drawn from the reference have a mean log-ratio below 0; texts more like the policy's, one above.
    assert (kl > 0.1) == bool(drawn[0] < 0.2)
    policy, rows = bandit(reference.tolist())
    agent = learn(policy, enumerated(rows, drawn, good), steps=150, beta=0.5, **weights)
    torch.testing.assert_close(policy.probabilities[0].detach().double(), expected, rtol=0, atol=1e-3)
    assert float(agent.next_batch().kl[0]) == pytest.approx(kl, abs=5e-3)
    tilted = (reference.log() + (good / (1 - good)).log() / 0.5).softmax(0)
    assert (expected - tilted).abs().max() > 0.05


def test_what_the_majority_dislikes_dies_out():
    """Desirable to 45 of 100: pulled down at every log-ratio, until nothing is left of it."""
    policy, rows = bandit([0.25] * 4)
    good = torch.tensor([0.8, 0.7, 0.45, 0.2])
    learn(policy, enumerated(rows, torch.full((4,), 0.25), good), beta=0.5, learning_rate=0.3, steps=150)
    found = policy.probabilities[0].detach()
    assert found[2:].max() < 0.02
    assert found[:2].min() > 0.3


def test_the_reference_point_is_the_divergence_when_the_policy_writes_the_texts():
    texts = TokenMDP(torch.zeros(8).numpy(), 2, length=3).all_trajectories()
    policy = TabularPolicy(7, 2)
    policy.logits.data = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    probabilities = policy(texts).log_probs.detach().sum(1).exp()
    exact = float((probabilities * (probabilities * 8).log()).sum())
    rows = Labelled(texts, torch.arange(8) < 4, probabilities)
    batch = KTO(policy, rows, batch_size=8, micro_batch_size=3).next_batch()
    assert exact > 0.1
    assert batch.kl.tolist() == pytest.approx([exact] * 8, rel=1e-5)


def test_an_adapter_on_a_language_model_reaches_the_fixed_point(tiny_policy):
    """A vocabulary of two tokens, and all four texts of two tokens after one prompt."""
    texts = TokenMDP(torch.zeros(4).numpy(), 2, length=2).all_trajectories()
    rows = Trajectories(torch.tensor([[1, 0, 1]]).repeat(4, 1), texts.actions, texts.mask)
    policy = tiny_policy(vocab_size=2, perturbed=False)
    reference = policy(rows).log_probs.detach().double().sum(1).exp()
    good = torch.tensor([0.9, 0.6, 0.8, 0.7], dtype=torch.float64)
    drawn = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
    expected, _ = fixed_point(reference, drawn, good, beta=0.5)
    assert (expected - reference).abs().sum() / 2 > 0.2
    learn(policy, enumerated(rows, drawn, good), beta=0.5, steps=60, learning_rate=0.03)
    found = policy(rows).log_probs.detach().double().sum(1).exp()
    assert (found - expected).abs().sum() / 2 < 1e-2


def language_rows(count=7):
    """Prompts and completions of unequal lengths."""
    generator = torch.Generator().manual_seed(4)

    def tokens(longest):
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        return torch.randint(1, 257, (length,), generator=generator)

    return TokenLabelled(
        [tokens(6) for _ in range(count)], [tokens(9) for _ in range(count)], [row % 3 > 0 for row in range(count)]
    )


def test_prompts_are_paired_with_completions_of_other_rows(tiny_policy):
    """z₀ by hand: each completion after the next row's prompt, and in all exactly the completions of the batch."""
    policy, rows = tiny_policy(), language_rows()
    policy.eval()
    agent = KTO(policy, rows, batch_size=4, seed=1)
    batch = agent.next_batch()
    numbers = batch.rows.tolist()
    total = 0.0
    for number, other in zip(numbers, numbers[1:] + numbers[:1], strict=True):
        room = max(len(rows.prompts[x]) + len(rows.completion[x]) for x in (number, other)) - len(rows.prompts[other])
        pair = rows.completion[number][:room][None]
        pair = Trajectories(rows.prompts[other][None], pair, pair >= 0)
        total += float((policy(pair).log_probs - policy.reference_log_probs(pair)).sum())
    assert batch.kl.tolist() == pytest.approx([max(0.0, total / 4)] * 4, rel=1e-4, abs=1e-5)


def test_an_evaluation_pairs_as_a_batch_in_the_same_order_does(tiny_policy, perturb):
    policy, rows = tiny_policy(perturbed=False), language_rows()
    perturb(policy, seed=9)
    agent = KTO(policy, rows, batch_size=7)
    agent.next_rows = lambda: torch.arange(7)
    kl = float(agent.next_batch().kl[0])
    assert kl > 0
    assert agent.evaluate(rows)["kl"] == pytest.approx(kl, rel=1e-5)


def test_mismatched_rows_are_no_longer_than_the_rows_were():
    prompts = [torch.arange(1, 7), torch.tensor([1])]
    rows = TokenLabelled(prompts, [torch.tensor([7, 8]), torch.arange(10, 15)], [True, False])
    agent = KTO(_Whole(), rows, batch_size=2)
    own = rows[torch.tensor([0, 1])]
    found = agent.mismatched(own, rows[torch.tensor([1, 0])])
    assert [row[row != PADDING].tolist() for row in found.observations] == [[1], [1, 2, 3, 4, 5, 6]]
    # Rows of 8 and 6 tokens: five tokens after the prompt of six would make eleven.
    assert found.actions.tolist() == [[7, 8, -1, -1, -1], [10, 11, -1, -1, -1]]
    assert torch.equal(found.mask, found.actions != PADDING)


class _Whole(TabularPolicy):
    """A policy whose probabilities depend on everything before, as far as KTO is told."""

    markov = False

    def __init__(self):
        super().__init__(1, 2)


def test_a_last_batch_of_one_row_borrows_a_prompt(tiny_policy):
    agent = KTO(tiny_policy(), language_rows(7), batch_size=3)
    agent.iteration = 2
    batch = agent.next_batch()
    assert len(batch) == 1
    (row,) = batch.rows.tolist()
    seen = []
    agent.mismatched = lambda own, others: seen.append(others.trajectories) or own.trajectories
    agent.next_batch()
    expected = agent.data.prompts[(row + 1) % 7]
    assert torch.equal(seen[0].observations[0], expected)
    assert agent.iterate()["loss"] > 0


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 6])
def test_pieces_do_not_change_the_gradient(tiny_policy, perturb, micro_batch_size):
    """The reference point and the margin are those of the whole batch."""

    def gradient(size):
        policy = tiny_policy(perturbed=False)
        perturb(policy, seed=9)
        agent = KTO(policy, language_rows(), batch_size=7, micro_batch_size=size, undesirable_weight=1.4)
        metrics = agent.backward(agent.next_batch())
        return metrics, torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])

    whole_metrics, whole = gradient(None)
    metrics, pieces = gradient(micro_batch_size)
    assert whole_metrics["kl"] > 0
    assert (pieces - whole).norm() <= 1e-5 * whole.norm()
    assert metrics == pytest.approx(whole_metrics, rel=1e-4)


@pytest.mark.parametrize(("steps_at_once", "most"), [(1000, 1), (25, 6), (1, 7)])
def test_nor_do_pieces_of_equal_numbers_of_tokens(tiny_policy, perturb, monkeypatch, steps_at_once, most):
    """Neither the gradient nor the reference point, in training and where it is judged."""
    found = {}
    for size in (None, steps_at_once):
        policy = tiny_policy(perturbed=False)
        perturb(policy, seed=9)
        monkeypatch.setattr(type(policy), "steps_at_once", size)
        agent = KTO(policy, language_rows(), batch_size=7, undesirable_weight=1.4)
        batch = agent.next_batch()
        assert 1 <= len(agent.pieces(batch)) <= (1 if size is None else most)
        assert (len(agent.pieces(batch)) > 1) == (size is not None and size < 1000)
        metrics = agent.backward(batch) | {
            f"judged_{name}": value for name, value in agent.evaluate(language_rows(9)).items()
        }
        found[size] = metrics, torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
    assert found[None][0]["kl"] > 0
    assert (found[steps_at_once][1] - found[None][1]).norm() <= 2e-6 * found[None][1].norm()
    assert found[steps_at_once][0] == pytest.approx(found[None][0], rel=2e-5)


@pytest.mark.parametrize("scale", ["table", "adapter"])
def test_training_resumes_exactly(tiny_policy, tmp_path, scale):
    def agent():
        if scale == "table":
            policy, rows = bandit([0.1, 0.2, 0.3, 0.4])
            labelled = Labelled(rows[torch.arange(7) % 4], torch.arange(7) % 3 > 0)
        else:
            policy, labelled = tiny_policy(perturbed=False, lora={"lora_dropout": 0.3}), language_rows()
        return KTO(policy, labelled, batch_size=3, learning_rate=0.05, micro_batch_size=2)

    whole = agent().learn(5, progress=False)
    for interruption in (1, 2, 4):
        agent().learn(interruption, progress=False).save(tmp_path / "agent")
        resumed = agent().load(tmp_path / "agent").learn(5 - interruption, progress=False)
        for name, value in whole.policy.trainable_state().items():
            assert torch.equal(resumed.policy.trainable_state()[name], value), name


def test_evaluation_and_metrics_by_hand():
    policy, rows = bandit([0.1, 0.2, 0.3, 0.4])
    weights = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0])
    labelled = Labelled(rows[torch.tensor([0, 1, 2, 3, 0])], torch.tensor([True, False, True, False, False]), weights)
    policy.logits.data = torch.tensor([[0.5, 0.1, 0.2, 0.2]]).log()
    agent = KTO(policy, labelled, beta=0.3, batch_size=5, desirable_weight=2.0)
    log_pi = [math.log(x) for x in (0.5, 0.1, 0.2, 0.2, 0.5)]
    log_reference = [math.log(x) for x in (0.1, 0.2, 0.3, 0.4, 0.1)]
    good, w = [True, False, True, False, False], weights.tolist()
    expected = {}
    for prefix, log_probs in (("", log_pi), ("reference_", log_reference)):
        r = [a - b for a, b in zip(log_probs, log_reference, strict=True)]
        z = max(0.0, sum(x * y for x, y in zip(w, r, strict=True)) / 9)
        assert (z > 0) == (prefix == "")
        losses = [2 * sigmoid(0.3 * (z - x)) if g else sigmoid(0.3 * (x - z)) for x, g in zip(r, good, strict=True)]
        right = [0.5 if x == z else float((x > z) == g) for x, g in zip(r, good, strict=True)]
        means = {
            kind: [sum(x * y for x, y, g in zip(w, v, good, strict=True) if g == side) for v in (log_probs, r)]
            for kind, side in (("desirable", True), ("undesirable", False))
        }
        accuracy = sum(x * y for x, y in zip(w, right, strict=True)) / 9
        low, high = wilson_interval(5 * accuracy, 5)
        metrics = {
            "loss": sum(x * y for x, y in zip(w, losses, strict=True)) / 9,
            "accuracy": accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "desirable": means["desirable"][0] / 4,
            "undesirable": means["undesirable"][0] / 5,
            "margin": 0.3 * (means["desirable"][1] / 4 - means["undesirable"][1] / 5),
            "kl": z,
        }
        expected |= {f"{prefix}{name}": value for name, value in metrics.items()}
    assert agent.evaluate(labelled) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    shown = agent.backward(agent.next_batch())
    for name, judged in [("loss",) * 2, ("kl",) * 2, ("rewards/margin", "margin"), ("rewards/accuracy", "accuracy")]:
        assert shown[name] == pytest.approx(expected[judged], rel=1e-5), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be positive, not 0"),
        ({"beta": math.nan}, "beta must be positive, not nan"),
        ({"desirable_weight": 0.0}, "desirable_weight must be positive, not 0"),
        ({"undesirable_weight": -1.0}, "undesirable_weight must be positive, not -1"),
        ({"batch_size": 1}, "at least two rows on each device: batch_size is 1, with 4 rows"),
        ({"batch_size": 0}, "at least one"),
        ({"micro_batch_size": 0}, "at least 1, not 0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    policy, rows = bandit([0.25] * 4)
    with pytest.raises(ValueError, match=message):
        KTO(policy, Labelled(rows, torch.arange(4) < 2), **options)


def test_too_few_rows_and_other_data_are_refused(tmp_path):
    policy, rows = bandit([0.25] * 4)
    labelled = Labelled(rows, torch.arange(4) < 2)
    with pytest.raises(ValueError, match="there are no labelled rows to learn from"):
        KTO(policy, labelled[:0])
    with pytest.raises(ValueError, match="at least two rows on each device: batch_size is 16, with 1 rows"):
        KTO(policy, labelled[:1])
    KTO(policy, labelled).save(tmp_path / "agent")
    with pytest.raises(ValueError, match="the saved run had 4 labelled rows, and this one has 3"):
        KTO(policy, labelled[:3]).load(tmp_path / "agent")
