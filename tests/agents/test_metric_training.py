from itertools import product

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from scipy import optimize, stats
from torch.nn import functional as F

from aligngym.agents.metric_training import (
    LabelSampler,
    MetricTraining,
    SurrogateTraining,
    accuracy,
    cross_entropy,
    f1,
    linear_dichotomies,
    outlying_clusters,
    soft_f1,
)
from aligngym.core import NetworkPolicy

FEATURES = torch.tensor([[0.5, -1.0], [1.5, 0.3], [-0.7, 0.8], [0.1, 0.2], [-1.2, -0.4]])
LABELS = torch.tensor([0, 1, 1, 0, 1])


def linear_policy(weights=None):
    policy = NetworkPolicy(Box(-np.inf, np.inf, (2,)), Discrete(2), hidden=(), critic=None)
    if weights is not None:
        with torch.no_grad():
            policy.action_head.weight.copy_(torch.tensor(weights))
    return policy


def log_table(policy, features=FEATURES):
    """``[N, 2]``, log π(class | example), differentiable."""
    return policy.outputs(features).log_softmax(dim=1)


def gradient(agent):
    """The gradient of the loss of the agent's next batch, as one vector."""
    agent.policy.zero_grad()
    batch = agent.next_batch()
    if isinstance(agent, MetricTraining):
        (batch,) = agent.minibatches(batch)
    agent.backward(batch)
    return torch.cat([parameter.grad.flatten() for parameter in agent.policy.parameters() if parameter.requires_grad])


class TestMetrics:
    def test_against_precision_and_recall(self):
        generator = torch.Generator().manual_seed(0)
        labels, predicted = (torch.randint(0, 2, shape, generator=generator) for shape in ((40,), (3, 40)))
        for row, found, share in zip(predicted, f1(predicted, labels), accuracy(predicted, labels), strict=True):
            hits = int((row & labels).sum())
            precision, recall = hits / int(row.sum()), hits / int(labels.sum())
            assert float(found) == pytest.approx(2 / (1 / precision + 1 / recall))
            assert float(share) == pytest.approx(np.mean(row.numpy() == labels.numpy()))

    def test_f1_where_there_is_nothing_to_find(self):
        nothing = torch.zeros(3, dtype=torch.int64)
        assert f1(torch.tensor([[0, 0, 0], [0, 1, 0]]), nothing).tolist() == [1, 0]

    def test_soft_f1_of_certain_labels_is_f1(self):
        for predicted in product((0, 1), repeat=4):
            labels = torch.tensor([1, 0, 1, 0])
            certain = torch.where(torch.tensor(predicted) == labels, 0.0, -np.inf)
            assert float(soft_f1(certain, labels)) == pytest.approx(1 - float(f1(torch.tensor(predicted), labels)))

    def test_soft_f1_by_hand(self):
        """Probabilities of class 1: 0.8, 0.4, 0.3; TP = 1.2, FP = 0.3, FN = 0.8."""
        right = torch.tensor([0.8, 0.4, 0.7]).log()
        assert float(soft_f1(right, torch.tensor([1, 1, 0]))) == pytest.approx(1 - 2.4 / (2.4 + 0.3 + 0.8))

    def test_cross_entropy_is_torchs(self):
        logits = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
        right = logits.log_softmax(dim=1)[torch.arange(5), LABELS]
        torch.testing.assert_close(cross_entropy(right, LABELS), F.cross_entropy(logits, LABELS))


class TestLinearDichotomies:
    @pytest.mark.parametrize("number", [2, 3, 4, 7, 12])
    def test_their_number_is_covers(self, number):
        points = np.random.default_rng(number).normal(size=(number, 2))
        assert linear_dichotomies(points).shape == (number**2 - number + 2, number)

    def test_they_are_the_labels_that_a_linear_programme_can_separate(self):
        points = np.random.default_rng(0).normal(size=(6, 2))
        rows = np.c_[points, np.ones(6)]
        separable = set()
        for labels in product((0, 1), repeat=6):
            signs = 2 * np.array(labels)[:, None] - 1
            answer = optimize.linprog(np.zeros(3), A_ub=-signs * rows, b_ub=-np.ones(6), bounds=(None, None))
            if answer.status == 0:
                separable.add(labels)
        assert {tuple(row) for row in linear_dichotomies(points).tolist()} == separable

    @pytest.mark.parametrize(
        ("points", "message"),
        [
            ([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]], "three of the points are on one line"),
            ([[0.0, 1.0], [0.0, 1.0]], "two are equal"),
            ([[0.0, 1.0]], "two or more points"),
            (np.zeros((3, 3)), r"shape \(3, 3\)"),
        ],
    )
    def test_what_it_cannot_divide_is_refused(self, points, message):
        with pytest.raises(ValueError, match=message):
            linear_dichotomies(points)


class TestLabelSampler:
    def test_a_label_vector_is_a_trajectory_whose_return_is_its_metric(self):
        policy = linear_policy([[1.0, -0.5], [-0.3, 0.9]])
        sampler = LabelSampler(FEATURES, LABELS, f1, samples=6)
        batch = sampler.sample(policy, seed=3)
        torch.testing.assert_close(batch.returns, f1(batch.actions, LABELS).float())
        assert (batch.rewards[:, :-1] == 0).all()
        assert batch.mask.all()
        assert batch.terminated.sum(dim=0).tolist() == [0, 0, 0, 0, 6]
        assert not batch.truncated.any()
        assert (batch.group == 0).all()
        torch.testing.assert_close(batch.log_probs, policy(batch).log_probs.detach())
        assert sampler.metrics["return"] == pytest.approx(float(batch.returns.mean()))
        assert torch.equal(sampler.sample(policy, seed=3).actions, batch.actions)
        assert not torch.equal(sampler.sample(policy, seed=4).actions, batch.actions)

    def test_labels_are_as_frequent_as_the_policy_says(self):
        policy = linear_policy([[1.0, -0.5], [-0.3, 0.9]])
        batch = LabelSampler(FEATURES, LABELS, f1, samples=20_000).sample(policy, seed=0)
        for count, probability in zip(batch.actions.sum(dim=0), log_table(policy)[:, 1].exp().tolist(), strict=True):
            assert stats.binomtest(int(count), 20_000, probability).pvalue > 1e-3


class TestGradient:
    @pytest.mark.parametrize("metric", [accuracy, f1])
    def test_it_is_that_of_the_expected_metric(self, metric):
        """Against the sum over all 32 label vectors: every component within 4 standard errors."""
        policy = linear_policy([[0.6, -0.5], [-0.3, 0.9]])
        vectors = torch.tensor(list(product((0, 1), repeat=5)))
        log_probs = log_table(policy)[torch.arange(5), vectors].sum(dim=1)
        expected = -(log_probs.exp() * metric(vectors, LABELS).float()).sum()
        exact = torch.cat([x.flatten() for x in torch.autograd.grad(expected, list(policy.action_head.parameters()))])
        agent = MetricTraining(policy, FEATURES, LABELS, metric, samples=32)
        estimates = []
        for agent.iteration in range(250):
            estimates.append(gradient(agent))
        mean, error = torch.stack(estimates).mean(dim=0), torch.stack(estimates).std(dim=0) / 250**0.5
        assert ((mean - exact).abs() < 4 * error).all()
        assert error.norm() < 0.06 * exact.norm()

    def test_pieces_do_not_change_it(self):
        weights = [[0.6, -0.5], [-0.3, 0.9]]
        whole, pieces = (
            gradient(MetricTraining(linear_policy(weights), FEATURES, LABELS, micro_batch_size=size))
            for size in (None, 5)
        )
        torch.testing.assert_close(pieces, whole)

    @pytest.mark.parametrize("surrogate", [cross_entropy, soft_f1])
    def test_of_a_surrogate(self, surrogate):
        policy = linear_policy([[0.6, -0.5], [-0.3, 0.9]])
        loss = surrogate(log_table(policy)[torch.arange(5), LABELS], LABELS)
        exact = torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(policy.action_head.parameters()))])
        torch.testing.assert_close(gradient(SurrogateTraining(policy, FEATURES, LABELS, surrogate)), exact)


def least_cross_entropy(features, labels):
    """The labels that the exact optimum of cross-entropy predicts: a convex problem, solved by Newton's method."""
    rows = np.c_[features.double().numpy(), np.ones(len(labels))]
    weights, targets = np.zeros(3), labels.numpy()
    for _ in range(50):
        share = 1 / (1 + np.exp(-rows @ weights))
        slope, hessian = rows.T @ (share - targets), (rows * (share * (1 - share))[:, None]).T @ rows
        weights -= np.linalg.solve(hessian, slope)
    # A vanishing gradient and a positive definite Hessian: the only minimum.
    assert np.abs(slope).max() < 1e-10
    assert np.linalg.eigvalsh(hessian).min() > 0.1
    return torch.from_numpy((rows @ weights > 0).astype(int))


class TestTraining:
    @pytest.mark.parametrize("seed", [1, 2, 3])
    def test_reward_comes_near_the_best_line_and_cross_entropy_cannot(self, seed):
        features, labels = outlying_clusters(seed)
        best = float(f1(linear_dichotomies(features), labels).max())
        optimum = float(f1(least_cross_entropy(features, labels), labels))
        assert optimum < best - 0.2
        rewarded = MetricTraining(linear_policy(), features, labels, f1, learning_rate=0.05, seed=seed)
        found = rewarded.learn(150, progress=False).evaluate()["f1"]
        assert best - 0.03 <= found <= best

    def test_accuracy_by_reward(self):
        features, labels = outlying_clusters(3)
        best = float(accuracy(linear_dichotomies(features), labels).max())
        assert float(accuracy(least_cross_entropy(features, labels), labels)) < best - 0.2
        # Not every seed gets there: some stop where cross-entropy does.
        agent = MetricTraining(linear_policy(), features, labels, accuracy, learning_rate=0.05, seed=2)
        assert best - 0.03 <= agent.learn(150, progress=False).evaluate()["accuracy"] <= best

    def test_the_surrogate_reaches_its_own_optimum(self):
        features, labels = outlying_clusters(3)
        agent = SurrogateTraining(linear_policy(), features, labels, learning_rate=0.05, max_grad_norm=None)
        agent.learn(150, progress=False)
        expected = least_cross_entropy(features, labels)
        assert float((agent.act(features) == expected).double().mean()) >= 0.99
        soft = SurrogateTraining(linear_policy(), features, labels, soft_f1, learning_rate=0.05)
        best = float(f1(linear_dichotomies(features), labels).max())
        assert best - 0.03 <= soft.learn(150, progress=False).evaluate()["f1"] <= best

    @pytest.mark.parametrize("kind", [MetricTraining, SurrogateTraining])
    def test_a_saved_run_continues_to_the_same_bits(self, kind, tmp_path):
        whole = kind(linear_policy(), FEATURES, LABELS, seed=5).learn(12, progress=False)
        kind(linear_policy(), FEATURES, LABELS, seed=5).learn(7, progress=False).save(tmp_path / "agent.safetensors")
        resumed = kind(linear_policy([[9.0, 9.0], [9.0, 9.0]]), FEATURES, LABELS, seed=5)
        resumed.load(tmp_path / "agent.safetensors").learn(5, progress=False)
        for name, value in whole.policy.trainable_state().items():
            assert torch.equal(resumed.policy.trainable_state()[name], value), name

    def test_the_metric_that_is_logged_is_the_mean_of_the_batch(self):
        agent = MetricTraining(linear_policy(), FEATURES, LABELS, f1, samples=8)
        batch = agent.next_batch()
        agent.iteration = 0
        assert agent.iterate()["return"] == pytest.approx(float(f1(batch.actions, LABELS).mean()))

    def test_it_is_judged_on_the_examples_it_is_given(self):
        agent = SurrogateTraining(linear_policy([[1.0, 0.0], [-1.0, 0.0]]), FEATURES, LABELS)
        # It names class 1 where the first coordinate is negative.
        assert agent.act(FEATURES).tolist() == [0, 0, 1, 0, 1]
        assert agent.evaluate() == pytest.approx({"accuracy": 0.8, "f1": 0.8})
        assert agent.evaluate([[-1.0, 0.0], [2.0, 0.0]], [1, 1]) == pytest.approx({"accuracy": 0.5, "f1": 2 / 3})


@pytest.mark.parametrize(
    ("features", "labels", "options", "message"),
    [
        (FEATURES, LABELS[:4], {}, r"features of shape \(5, 2\) and labels of shape \(4,\)"),
        (FEATURES[:0], LABELS[:0], {}, "at least one"),
        (FEATURES, LABELS.float(), {}, "integers from 0"),
        (FEATURES, LABELS - 1, {}, "integers from 0"),
        (FEATURES.index_fill(0, torch.tensor([2]), np.nan), LABELS, {}, "features of example 2 are not finite"),
        (FEATURES, LABELS, {"samples": 1}, "samples=1: each label vector is compared with the others"),
    ],
)
def test_bad_input_is_named(features, labels, options, message):
    with pytest.raises(ValueError, match=message):
        MetricTraining(linear_policy(), features, labels, **options)


def test_half_of_a_test_set_is_refused():
    with pytest.raises(ValueError, match="both features and labels"):
        SurrogateTraining(linear_policy(), FEATURES, LABELS).evaluate(FEATURES)
