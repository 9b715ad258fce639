import math

import pytest
import torch
from torch.nn import functional as F

from aligngym.core import objectives

LN2 = math.log(2)


def gradient(function, at):
    at = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(function(at).sum(), at)[0]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # Inside the clip range the gradient with respect to log π is −ρA.
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (0.9, -2.0, 1.8, 1.8),
        # A good action that is already much more probable, and a bad one much less: no further reward, no gradient.
        (1.5, 2.0, -2.4, 0.0),
        (0.5, -2.0, 1.6, 0.0),
        # Having gone the wrong way is never clipped.
        (0.5, 2.0, -1.0, -1.0),
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_clipped_surrogate_clips_the_side_that_would_go_too_far(ratio, advantage, loss, slope):
    old = torch.tensor([-1.3], dtype=torch.float64)
    advantages = torch.tensor([advantage], dtype=torch.float64)

    def surrogate(log_probs):
        return objectives.clipped_surrogate(log_probs, old, advantages, clip=0.2)

    at = [-1.3 + math.log(ratio)]
    assert surrogate(torch.tensor(at, dtype=torch.float64)).item() == pytest.approx(loss)
    assert gradient(surrogate, at).item() == pytest.approx(slope)


def test_the_upper_clip_may_be_wider():
    zero, one = torch.zeros(1), torch.ones(1)
    loss = objectives.clipped_surrogate(torch.tensor([LN2]), zero, one, clip=0.2, clip_high=0.5)
    assert loss.item() == pytest.approx(-1.5)
    loss = objectives.clipped_surrogate(torch.tensor([-LN2]), zero, -one, clip=0.2, clip_high=0.5)
    assert loss.item() == pytest.approx(0.8)


def test_value_regression_and_its_pessimistic_clip():
    values = torch.tensor([3.0, 3.0, 0.0])
    returns = torch.tensor([5.0, 2.0, 5.0])
    assert objectives.value_regression(values, returns).tolist() == [2.0, 0.5, 12.5]
    # V moved from 1 (or 1, or 4) to 3 (3, 0), of which ½ counts: the larger of the two errors is the loss.
    old = torch.tensor([1.0, 1.0, 4.0])
    clipped = objectives.value_regression(values, returns, old, clip=0.5)
    assert clipped.tolist() == [3.5**2 / 2, 0.5, 12.5]
    with pytest.raises(ValueError, match="old_values"):
        objectives.value_regression(values, returns, clip=0.5)


def test_score_function_gives_the_exact_policy_gradient_in_expectation():
    logits = torch.tensor([0.2, -0.4, 1.0], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    log_probs = logits.log_softmax(0)
    probabilities = log_probs.exp()
    loss = (probabilities.detach() * objectives.score_function(log_probs, reward - 7.0)).sum()
    expected = torch.autograd.grad((probabilities * reward).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], -expected)


class TestKL:
    """Expectations as exact sums over a categorical distribution of four actions."""

    logits = torch.tensor([0.1, 1.2, -0.7, 0.4], dtype=torch.float64)
    reference = torch.tensor([0.9, -0.3, 0.2, 0.0], dtype=torch.float64).log_softmax(0)

    def divergence(self, logits, *, forward):
        p, q = logits.log_softmax(0), self.reference
        return (q.exp() * (q - p)).sum() if forward else (p.exp() * (p - q)).sum()

    def expectation(self, logits, kind):
        """E over actions of π, itself held fixed, as a sampled batch would."""
        log_probs = logits.log_softmax(0)
        return (log_probs.exp().detach() * objectives.kl_estimate(log_probs, self.reference, kind)).sum()

    @pytest.mark.parametrize("kind", ["k1", "k3"])
    def test_k1_and_k3_are_unbiased(self, kind):
        exact = self.divergence(self.logits, forward=False)
        torch.testing.assert_close(self.expectation(self.logits, kind), exact)

    def test_k2_is_half_the_mean_square_and_biased(self):
        p = self.logits.log_softmax(0)
        expected = (p.exp() * (p - self.reference) ** 2).sum() / 2
        torch.testing.assert_close(self.expectation(self.logits, "k2"), expected)
        assert abs(expected - self.divergence(self.logits, forward=False)) > 0.01

    def test_gradients_as_losses_are_those_documented(self):
        def of(function, **options):
            return gradient(lambda x: function(x, **options), self.logits.tolist())

        reverse, forward = of(self.divergence, forward=False), of(self.divergence, forward=True)
        assert (reverse - forward).abs().max() > 0.05
        torch.testing.assert_close(of(self.expectation, kind="k1"), torch.zeros(4, dtype=torch.float64))
        torch.testing.assert_close(of(self.expectation, kind="k2"), reverse)
        torch.testing.assert_close(of(self.expectation, kind="k3"), forward)

    def test_values_of_single_actions(self):
        # r = π_ref/π = 2: k1 = −ln 2, k2 = ½ ln² 2, k3 = 1 − ln 2; k1 alone may be negative.
        log_probs, reference = torch.tensor([-2.0]), torch.tensor([-2.0 + LN2])
        values = [objectives.kl_estimate(log_probs, reference, kind).item() for kind in ("k1", "k2", "k3")]
        assert values == pytest.approx([-LN2, LN2**2 / 2, 1 - LN2], rel=1e-6)
        with pytest.raises(ValueError, match="'k4'"):
            objectives.kl_estimate(log_probs, reference, "k4")


MARGINS = torch.linspace(-3, 3, 13, dtype=torch.float64)


def test_bradley_terry_is_the_cross_entropy_of_the_preference_probability():
    for smoothing in (0.0, 0.2):
        target = torch.full_like(MARGINS, 1 - smoothing)
        expected = F.binary_cross_entropy_with_logits(MARGINS, target, reduction="none")
        torch.testing.assert_close(objectives.bradley_terry(MARGINS, smoothing), expected)
    # Finite where exp would overflow.
    assert objectives.bradley_terry(torch.tensor([-1000.0, 1000.0])).tolist() == [1000.0, 0.0]


@pytest.mark.parametrize("flips", [0.0, 0.1, 0.4])
def test_the_robust_loss_on_flipped_labels_is_the_clean_loss_in_expectation(flips):
    noisy = (1 - flips) * objectives.robust_bradley_terry(MARGINS, flips)
    noisy = noisy + flips * objectives.robust_bradley_terry(-MARGINS, flips)
    torch.testing.assert_close(noisy, objectives.bradley_terry(MARGINS))


def test_ipo_is_a_parabola_with_its_minimum_at_one_over_two_beta():
    beta = 0.4
    assert objectives.ipo_preference(torch.tensor([1.25]), beta=beta).item() == 0.0
    assert gradient(lambda h: objectives.ipo_preference(h, beta=beta), [1.25, 2.25, 0.25]).tolist() == [0, 2, -2]


def test_hinge_is_flat_beyond_the_margin():
    beta = 0.5
    h = [-1.0, 1.0, 3.0]
    assert objectives.hinge_preference(torch.tensor(h), beta=beta).tolist() == [1.5, 0.5, 0.0]
    assert gradient(lambda x: objectives.hinge_preference(x, beta=beta), h).tolist() == [-0.5, -0.5, 0.0]


def test_simpo_asks_for_a_margin():
    h = torch.tensor([2.0])
    loss = objectives.simpo_preference(h, beta=2.0, target_margin=1.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2.5)), rel=1e-6)


def test_the_preference_losses_scale_the_log_ratio_by_beta():
    h = torch.tensor([0.7])
    sigmoid = objectives.sigmoid_preference(h, beta=3.0)
    assert sigmoid.item() == pytest.approx(math.log1p(math.exp(-2.1)), rel=1e-6)
    robust = objectives.robust_preference(h, beta=3.0, label_smoothing=0.1)
    by_hand = (0.9 * math.log1p(math.exp(-2.1)) - 0.1 * math.log1p(math.exp(2.1))) / 0.8
    assert robust.item() == pytest.approx(by_hand, rel=1e-6)
