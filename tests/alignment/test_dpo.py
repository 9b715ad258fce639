"""The same class against exact optima: on a table, on a grid, and with an adapter on a language model."""

import math

import numpy as np
import pytest
import torch

from aligngym.agents import SoftValueIteration
from aligngym.alignment.dpo import DPO
from aligngym.alignment.preference_losses import LOSSES, PairScores
from aligngym.core import Decay, Preferences, TabularPolicy, Trajectories
from aligngym.core.statistics import wilson_interval
from aligngym.envs import GridWorld, TokenMDP, bradley_terry_preferences, enumerate_trajectories

LN2 = math.log(2)


def sample(size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def learn(policy, preferences, steps=300, learning_rate=0.1, **options):
    """Full-batch gradient descent to the minimum."""
    schedule = Decay(learning_rate, steps)
    agent = DPO(policy, preferences, batch_size=len(preferences), learning_rate=schedule, max_grad_norm=None, **options)
    return agent.learn(steps, progress=False)


def probabilities(policy, trajectories):
    """Of all trajectories: exactly what the policy would generate, so they sum to one."""
    found = policy(trajectories).log_probs.detach().double().sum(1).exp()
    assert found.sum() == pytest.approx(1.0, abs=1e-5)
    return found


def total_variation(one, other):
    return float((one - other).abs().sum() / 2)


def tilted(reference, rewards, beta):
    """π_ref(y) exp(R(y)/β) / Z."""
    return (reference.double().log() + rewards.double() / beta).softmax(0)


class TestOptimaOnTokens:
    """All 27 texts of three tokens, all pairs of them, weighted by the probability of each preference."""

    rewards = sample(27)
    problem = TokenMDP(rewards.numpy(), vocabulary_size=3, length=3)
    texts = problem.all_trajectories()
    preferences = bradley_terry_preferences(texts)

    def policy(self, uniform=False):
        shape = (self.problem.mdp.num_states, 3)
        return TabularPolicy(*shape, None if uniform else sample(shape, seed=1).double().softmax(1))

    def preferred(self):
        """[n, n], the probability that i is preferred to j."""
        return torch.sigmoid(self.rewards[:, None] - self.rewards[None, :])

    @pytest.mark.parametrize("uniform", [True, False])
    @pytest.mark.parametrize("beta", [0.5, 2.0])
    def test_sigmoid_reaches_the_optimum_of_regularised_reinforcement_learning(self, beta, uniform):
        policy = self.policy(uniform)
        reference = probabilities(policy, self.texts)
        expected = tilted(reference, self.rewards, beta)
        assert total_variation(reference, expected) > 0.1
        learn(policy, self.preferences, beta=beta)
        assert total_variation(probabilities(policy, self.texts), expected) < 1e-4

    def test_robust_recovers_the_clean_optimum_from_flipped_labels(self):
        flips = 0.2
        pairs, swapped = self.preferences, Preferences(self.preferences.rejected, self.preferences.chosen)
        swapped.weights = flips * pairs.weights
        kept = Preferences(pairs.chosen, pairs.rejected, (1 - flips) * pairs.weights)
        flipped = Preferences.concatenate([kept, swapped])
        policy, deceived = self.policy(), self.policy()
        expected = tilted(probabilities(policy, self.texts), self.rewards, 0.5)
        learn(policy, flipped, beta=0.5, loss="robust", label_smoothing=flips)
        learn(deceived, flipped, beta=0.5, loss="sigmoid")
        assert total_variation(probabilities(policy, self.texts), expected) < 1e-3
        assert total_variation(probabilities(deceived, self.texts), expected) > 0.05

    def test_ipo_regularises_the_probability_of_being_preferred(self):
        """π* ∝ π_ref exp(p(y ≻ μ)/β) with p against a random text: M. Azar et al., 2023, eq. 10 and theorem 2."""
        policy, beta = self.policy(), 0.2
        expected = tilted(probabilities(policy, self.texts), self.preferred().mean(1), beta)
        assert total_variation(expected, tilted(probabilities(policy, self.texts), self.rewards, beta)) > 0.05
        learn(policy, self.preferences, beta=beta, loss="ipo")
        assert total_variation(probabilities(policy, self.texts), expected) < 1e-4

    def test_simpo_reaches_the_tilted_uniform_distribution(self):
        """βm = R − R' for mean log-probabilities over three tokens: π* ∝ exp(3R/β), whatever the reference."""
        policy, beta = self.policy(), 4.0
        learn(policy, self.preferences, beta=beta, loss="simpo")
        expected = (3 * self.rewards.double() / beta).softmax(0)
        assert total_variation(probabilities(policy, self.texts), expected) < 1e-4

    def test_pieces_do_not_change_what_is_learned(self):
        whole = learn(self.policy(), self.preferences, steps=20)
        pieces = learn(self.policy(), self.preferences, steps=20, micro_batch_size=97)
        torch.testing.assert_close(pieces.policy.logits, whole.policy.logits, rtol=1e-4, atol=1e-5)


def two_texts(preferred, reference=(0.3, 0.7)):
    """A state, two actions, and the first preferred with a probability: h has its optimum in closed form."""
    rows = Trajectories(torch.zeros(2, 1).long(), torch.tensor([[0], [1]]), torch.ones(2, 1).bool())
    order = torch.tensor([0, 1])
    pairs = Preferences(rows[order], rows[order.flip(0)], torch.tensor([preferred, 1 - preferred]))
    return TabularPolicy(1, 2, [reference]), pairs


@pytest.mark.parametrize(
    ("loss", "options", "optimum"),
    [
        ("sigmoid", {}, lambda p, beta: math.log(p / (1 - p)) / beta),
        # Conservative: a share of the labels is believed to be wrong, so the preference is believed to be weaker.
        ("sigmoid", {"label_smoothing": 0.1}, lambda p, beta: math.log((0.1 + 0.8 * p) / (0.9 - 0.8 * p)) / beta),
        # Robust: the preference is believed to be stronger than it is seen.
        ("robust", {"label_smoothing": 0.1}, lambda p, beta: math.log((p - 0.1) / (0.9 - p)) / beta),
        ("ipo", {}, lambda p, beta: (2 * p - 1) / (2 * beta)),
        # Piecewise linear, with its minimum at the kink of the more frequent side.
        ("hinge", {}, lambda p, beta: 1 / beta),
    ],
)
def test_each_loss_has_its_own_optimum(loss, options, optimum):
    p, beta = 0.8, 0.7
    policy, pairs = two_texts(p)
    learn(policy, pairs, beta=beta, loss=loss, **options)
    log_ratio = policy.probabilities[0].log() - torch.tensor([0.3, 0.7]).log()
    assert float(log_ratio[0] - log_ratio[1]) == pytest.approx(optimum(p, beta), abs=2e-3)


def test_simpo_adds_its_target_margin_where_all_agree():
    """−p log σ(βm − γ) − (1−p) log σ(−βm − γ): the minimum is where the derivative is zero, found by bisection."""
    p, beta, gamma = 0.8, 1.5, 0.6
    policy, pairs = two_texts(p)
    learn(policy, pairs, beta=beta, loss="simpo", target_margin=gamma)
    low, high = -10.0, 10.0
    while high - low > 1e-9:
        m = (low + high) / 2
        slope = -p / (1 + math.exp(beta * m - gamma)) + (1 - p) / (1 + math.exp(-beta * m - gamma))
        low, high = (m, high) if slope < 0 else (low, m)
    log_probs = policy.probabilities[0].log()
    assert float(log_probs[0] - log_probs[1]) == pytest.approx(low, abs=2e-3)


@pytest.mark.parametrize("with_reference", [False, True])
def test_on_a_grid_it_reaches_the_optimum_of_soft_value_iteration(with_reference):
    """Paths of different lengths to two goals; the planner knows the model, DPO sees preferences between paths."""
    mdp = GridWorld("SG\nF.", step_reward=-0.3).mdp
    horizon, beta = 3, 0.5
    states, actions = mdp.unrolled(horizon).rewards.shape
    reference = sample((states, actions), seed=2).double().softmax(1).numpy() if with_reference else None
    planner = SoftValueIteration(mdp, discount=1.0, beta=beta, reference=reference, horizon=horizon)
    planner.learn(progress=False)
    paths = enumerate_trajectories(mdp, horizon)
    assert len(set(paths.lengths.tolist())) > 2

    def of(table):
        steps = np.where(paths.mask, np.asarray(table)[paths.observations, paths.actions.clamp(min=0)], 1.0)
        return torch.from_numpy(steps.prod(axis=1))

    policy = TabularPolicy(states, actions, reference)
    before, expected = probabilities(policy, paths), of(planner.policy)
    assert total_variation(before, expected) > 0.2
    torch.testing.assert_close(expected, tilted(before, paths.returns, beta), rtol=1e-4, atol=1e-6)
    # The pairs need not be uniform: any distribution over them has the same optimum.
    preferences = bradley_terry_preferences(paths, probabilities=before)
    learn(policy, preferences, beta=beta, steps=400, learning_rate=0.3)
    assert total_variation(probabilities(policy, paths), expected) < 1e-3


@pytest.mark.parametrize(("size", "packed"), [(2, True), (3, False)])
def test_an_adapter_on_a_language_model_reaches_the_exact_optimum(tiny_policy, size, packed):
    """A vocabulary of two or three tokens, so that all texts of two tokens are all that the model can write."""
    rewards = sample(size**2, seed=3)
    texts = TokenMDP(rewards.numpy(), size, length=2).all_trajectories()
    # A prompt takes the place of the states.
    rows = Trajectories(torch.tensor([[1, 0, 1]]).repeat(len(texts), 1), texts.actions, texts.mask, texts.rewards)
    policy = tiny_policy(vocab_size=size, perturbed=False, packed=packed)
    assert policy.packed == packed
    reference = probabilities(policy, rows)
    expected = tilted(reference, rewards, 0.5)
    assert total_variation(reference, expected) > 0.3
    learn(policy, bradley_terry_preferences(rows), beta=0.5, steps=120, learning_rate=0.02)
    assert total_variation(probabilities(policy, rows), expected) < 1e-3


def language_pairs(count=7):
    """Random pairs of unequal lengths, with weights."""
    generator = torch.Generator().manual_seed(4)
    sides = []
    prompts = torch.randint(1, 257, (count, 5), generator=generator)
    for longest in (4, 9):
        mask = torch.arange(longest) < torch.randint(1, longest + 1, (count, 1), generator=generator)
        actions = torch.randint(0, 257, (count, longest), generator=generator).where(mask, -1)
        sides.append(Trajectories(prompts, actions, mask))
    return Preferences(*sides, torch.rand(count, generator=generator) + 0.2)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 6])
def test_pieces_do_not_change_the_gradient_of_an_adapter(tiny_policy, micro_batch_size):
    def gradient(size):
        policy = tiny_policy()
        agent = DPO(policy, language_pairs(), batch_size=7, micro_batch_size=size)
        metrics = agent.backward(agent.next_batch())
        return metrics, torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])

    whole_metrics, whole = gradient(None)
    metrics, pieces = gradient(micro_batch_size)
    assert (pieces - whole).norm() <= 1e-5 * whole.norm()
    assert metrics == pytest.approx(whole_metrics, rel=1e-5)


@pytest.mark.parametrize(("steps_at_once", "pieces"), [(1000, 1), (40, 4), (1, 7)])
def test_nor_do_pieces_of_equal_numbers_of_tokens(tiny_policy, monkeypatch, steps_at_once, pieces):
    found = {}
    for size in (None, steps_at_once):
        policy = tiny_policy()
        monkeypatch.setattr(type(policy), "steps_at_once", size)
        agent = DPO(policy, language_pairs(), batch_size=7)
        batch = agent.next_batch()
        assert len(agent.pieces(batch)) == (1 if size is None else pieces)
        metrics = agent.backward(batch) | agent.evaluate(language_pairs(9))
        found[size] = metrics, torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
    assert (found[steps_at_once][1] - found[None][1]).norm() <= 2e-6 * found[None][1].norm()
    assert found[steps_at_once][0] == pytest.approx(found[None][0], rel=1e-5)


def test_policy_and_reference_see_the_same_rows_of_every_piece(tiny_policy, monkeypatch):
    """So that a piece is laid out once; in training, and where it is judged."""
    policy = tiny_policy()
    monkeypatch.setattr(type(policy), "steps_at_once", 40)
    seen = []
    for name in ("forward", "reference_log_probs"):
        method = getattr(policy, name)
        monkeypatch.setattr(policy, name, lambda rows, method=method, **_: seen.append(rows) or method(rows))
    agent = DPO(policy, language_pairs(), batch_size=7)
    for ask in (lambda: agent.backward(agent.next_batch()), lambda: agent.evaluate(language_pairs())):
        seen.clear()
        ask()
        assert len(seen) == 8
        assert all(one is other for one, other in zip(seen[::2], seen[1::2], strict=True))


def small_table():
    """Seven pairs of one-step trajectories in one state with four actions, and a table."""
    actions = torch.randint(0, 4, (2, 7, 1), generator=torch.Generator().manual_seed(0))
    sides = (Trajectories(torch.zeros_like(x), x, torch.ones_like(x).bool()) for x in actions)
    return TabularPolicy(1, 4, [[0.1, 0.2, 0.3, 0.4]]), Preferences(*sides)


@pytest.mark.parametrize("scale", ["table", "adapter"])
@pytest.mark.parametrize(
    ("loss", "beta", "first"),
    [("sigmoid", 0.1, LN2), ("robust", 3.0, LN2), ("hinge", 0.1, 1.0), ("ipo", 0.25, 4.0)],
)
def test_the_first_loss_is_that_of_no_preference(tiny_policy, scale, loss, beta, first):
    """The policy is its reference, so every log-ratio is exactly 0."""
    policy, pairs = small_table() if scale == "table" else (tiny_policy(perturbed=False), language_pairs())
    metrics = DPO(policy, pairs, beta=beta, loss=loss, batch_size=7).iterate()
    assert metrics["loss"] == pytest.approx(first, rel=2e-7)
    assert [metrics[f"rewards/{name}"] for name in ("chosen", "rejected", "margin", "accuracy")] == [0.0] * 4


class Counting(TabularPolicy):
    rows = 0

    def reference_log_probs(self, trajectories):
        self.rows += len(trajectories)
        return super().reference_log_probs(trajectories)


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_reference_is_asked_once_for_every_pair(tmp_path, loss, micro_batch_size):
    def agent():
        return DPO(Counting(1, 4), small_table()[1], loss=loss, batch_size=3, micro_batch_size=micro_batch_size)

    first = agent()
    first.learn(epochs=4, progress=False)
    assert first.iteration == 4 * 3
    assert first.policy.rows == (2 * 7 if LOSSES[loss].uses_reference else 0)
    first.save(tmp_path / "agent")
    resumed = agent().load(tmp_path / "agent")
    resumed.learn(epochs=1, progress=False)
    assert resumed.policy.rows == 0


@pytest.mark.parametrize("scale", ["table", "adapter"])
def test_training_resumes_exactly(tiny_policy, tmp_path, scale):
    def agent():
        if scale == "table":
            policy, pairs = small_table()
        else:
            policy, pairs = tiny_policy(perturbed=False, lora={"lora_dropout": 0.3}), language_pairs()
        return DPO(policy, pairs, batch_size=3, learning_rate=0.05, micro_batch_size=2)

    whole = agent().learn(5, progress=False)
    for interruption in (1, 2, 4):
        agent().learn(interruption, progress=False).save(tmp_path / "agent")
        resumed = agent().load(tmp_path / "agent").learn(5 - interruption, progress=False)
        for name, value in whole.policy.trainable_state().items():
            assert torch.equal(resumed.policy.trainable_state()[name], value), name


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_evaluation_by_hand(loss, weighted):
    policy, pairs = small_table()
    pairs.weights = torch.arange(1.0, 8.0) if weighted else None
    weights = pairs.pair_weights / pairs.pair_weights.sum()
    agent = DPO(policy, pairs, loss=loss, beta=0.3, batch_size=2)
    policy.logits.data = torch.tensor([[0.4, -1.0, 0.0, 2.0]])
    # [4] of the table, [7] of the pairs' chosen and rejected actions.
    log_pi, log_reference = policy.logits[0].detach().log_softmax(0), policy.reference_logits[0]
    chosen, rejected = pairs.chosen.actions[:, 0], pairs.rejected.actions[:, 0]
    uses_reference = LOSSES[loss].uses_reference
    score = log_pi - log_reference if uses_reference else log_pi
    reference_score = torch.zeros(4) if uses_reference else log_reference
    h, reference_h = score[chosen] - score[rejected], reference_score[chosen] - reference_score[rejected]
    assert (h == 0).any()

    def sides(values):
        return torch.stack([values[chosen], values[rejected]])

    expected = {}
    for prefix, difference, log_probs in (("", h, log_pi), ("reference_", reference_h, log_reference)):
        wins = (difference > 0).float() + (difference == 0).float() / 2
        means = {
            "loss": LOSSES[loss](PairScores(sides(log_probs), torch.ones(2, 7), sides(log_reference)), beta=0.3),
            "margin": 0.3 * difference,
            "accuracy": wins,
            "chosen": log_probs[chosen],
            "rejected": log_probs[rejected],
        }
        expected |= {f"{prefix}{name}": float((weights * values).sum()) for name, values in means.items()}
        interval = wilson_interval(7 * expected[f"{prefix}accuracy"], 7)
        expected |= {f"{prefix}accuracy_{side}": end for side, end in zip(("low", "high"), interval, strict=True)}
    assert agent.evaluate(pairs) == pytest.approx(expected, rel=1e-5)


def test_a_policy_that_is_its_reference_is_undecided(tiny_policy):
    result = DPO(tiny_policy(perturbed=False), language_pairs()).evaluate(language_pairs())
    assert (result["accuracy"], result["margin"]) == (0.5, 0.0)
    assert result["loss"] == pytest.approx(LN2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dpo"}, "unknown loss 'dpo': choose from sigmoid, robust, ipo, hinge, simpo"),
        ({"beta": 0.0}, "beta must be positive, not 0"),
        ({"beta": -1.0}, "beta must be positive"),
        ({"beta": math.nan}, "beta must be positive"),
        ({"label_smoothing": 0.5}, r"in \[0, 0.5\), not 0.5"),
        ({"label_smoothing": -0.1}, "not -0.1"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1 would be ignored: the loss 'ipo'"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "would be ignored"),
        ({"target_margin": 1.0}, "target_margin=1.0 would be ignored: the loss 'sigmoid'"),
        ({"batch_size": 0}, "at least one"),
        ({"micro_batch_size": 0}, "at least 1, not 0"),
        ({"learning_rate": -1.0}, "not negative"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DPO(*small_table(), **options)


def test_nothing_to_learn_and_no_end_are_refused():
    policy, pairs = small_table()
    with pytest.raises(ValueError, match="no preferences"):
        DPO(policy, pairs[:0])
    for length in ({}, {"iterations": 1, "epochs": 1}):
        with pytest.raises(ValueError, match="either iterations or epochs"):
            DPO(policy, pairs).learn(**length)
