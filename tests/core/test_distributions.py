"""Against torch.distributions, and against what was drawn."""

import math

import pytest
import torch
from torch import distributions

from aligngym.core.distributions import Categorical, DiagonalGaussian


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def categorical(seed=0, allowed=None):
    """Ours and torch's, for 2 × 3 observations and 5 actions, of very different logits."""
    logits = 2 * normal(2, 3, 5, seed=seed)
    masked = logits if allowed is None else logits.masked_fill(~allowed, -math.inf)
    return Categorical(logits, allowed), distributions.Categorical(logits=masked)


def gaussian(seed=0):
    """Ours and torch's, for 2 × 3 observations and 4 numbers, of different deviations."""
    mean, log_std = normal(2, 3, 4, seed=seed), normal(4, seed=seed + 100)
    theirs = distributions.Independent(distributions.Normal(mean, log_std.exp().expand_as(mean)), 1)
    return DiagonalGaussian(mean, log_std), theirs


KINDS = {"categorical": categorical, "gaussian": gaussian}
ALLOWED = torch.tensor([1, 0, 1, 1, 0]).bool() | torch.zeros(2, 3, 5).bool()


@pytest.mark.parametrize("kind", KINDS)
class TestAgainstTorch:
    def test_log_probabilities_and_entropy(self, kind):
        ours, theirs = KINDS[kind]()
        actions = theirs.sample()
        assert ours.log_prob(actions).shape == ours.entropy().shape == (2, 3)
        torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions))
        torch.testing.assert_close(ours.entropy(), theirs.entropy())

    def test_divergence(self, kind):
        (ours, theirs), (other, their_other) = KINDS[kind](0), KINDS[kind](1)
        forward, backward = ours.divergence(other), other.divergence(ours)
        torch.testing.assert_close(forward, distributions.kl_divergence(theirs, their_other))
        torch.testing.assert_close(backward, distributions.kl_divergence(their_other, theirs))
        assert (forward - backward).abs().min() > 0.01
        torch.testing.assert_close(ours.divergence(ours), torch.zeros(2, 3).double())

    def test_gradients(self, kind):
        """Of log-probabilities, entropies and divergences, with respect to logits, or to means and deviations."""
        first, second, actions = normal(2, 3, 5).requires_grad_(), normal(5, seed=9).requires_grad_(), normal(2, 3, 5)
        if kind == "categorical":
            parameters, actions = [first], actions.argmax(-1)
            ours, theirs = Categorical(first), distributions.Categorical(logits=first)
        else:
            parameters, ours = [first, second], DiagonalGaussian(first, second)
            theirs = distributions.Independent(distributions.Normal(first, second.exp().expand_as(first)), 1)
        for mine, reference in (
            (ours.log_prob(actions), theirs.log_prob(actions)),
            (ours.entropy(), theirs.entropy()),
        ):
            for parameter in parameters:
                gradients = [
                    torch.autograd.grad(
                        x.sum(), parameter, retain_graph=True, allow_unused=True, materialize_grads=True
                    )
                    for x in (mine, reference)
                ]
                torch.testing.assert_close(gradients[0], gradients[1])
        # A divergence from oneself is at its minimum.
        for parameter in parameters:
            (slope,) = torch.autograd.grad(ours.divergence(ours.detach()).sum(), parameter, retain_graph=True)
            torch.testing.assert_close(slope, torch.zeros_like(slope))

    def test_without_gradients_it_is_the_same(self, kind):
        ours, _ = KINDS[kind]()
        leaf = normal(2, 3, 5).requires_grad_()
        tracked = Categorical(leaf) if kind == "categorical" else DiagonalGaussian(leaf, leaf[0, 0])
        assert tracked.entropy().requires_grad
        assert not tracked.detach().entropy().requires_grad
        actions = ours.mode()
        torch.testing.assert_close(ours.detach().log_prob(actions), ours.log_prob(actions))

    def test_a_seed_repeats_a_draw_and_the_global_generator_is_left_alone(self, kind):
        ours, _ = KINDS[kind]()
        before = torch.get_rng_state()
        draws = [ours.sample(torch.Generator().manual_seed(seed)) for seed in (0, 0, *range(1, 20))]
        assert torch.equal(draws[0], draws[1])
        assert not all(torch.equal(draws[0], draw) for draw in draws[2:])
        assert torch.equal(torch.get_rng_state(), before)


def test_categorical_draws_are_as_frequent_as_they_are_probable():
    """Pearson's χ² of 20,000 draws, with 4 degrees of freedom at each of 6 observations: 30 has p < 5e-6."""
    ours, theirs = categorical()
    generator = torch.Generator().manual_seed(1)
    draws = Categorical(ours.log_probs.expand(20_000, 2, 3, 5)).sample(generator)
    assert draws.shape == (20_000, 2, 3)
    counts = torch.nn.functional.one_hot(draws, 5).sum(0)
    expected = 20_000 * theirs.probs
    assert expected.min() > 1
    assert (((counts - expected) ** 2 / expected).sum(-1) < 30).all()


def test_gaussian_draws_have_the_mean_and_the_covariance():
    ours, _ = gaussian()
    count = 20_000
    many = DiagonalGaussian(ours.mean.expand(count, 2, 3, 4), ours.log_std[0, 0])
    standardised = (many.sample(torch.Generator().manual_seed(1)) - ours.mean) / ours.log_std.exp()
    # Five standard errors of a mean, and of a variance; covariances of different numbers are zero.
    assert standardised.mean(0).abs().max() < 5 / count**0.5
    covariance = torch.einsum("nbti,nbtj->btij", standardised, standardised) / count
    assert (covariance - torch.eye(4)).abs().max() < 5 * (2 / count) ** 0.5


def test_modes():
    ours, theirs = categorical()
    assert torch.equal(ours.mode(), theirs.probs.argmax(-1))
    ours, theirs = gaussian()
    assert torch.equal(ours.mode(), theirs.mean)


class TestMasks:
    """Some actions are not allowed: torch gives them logits of −∞, and renormalises as we do."""

    def test_what_is_left_is_renormalised(self):
        ours, theirs = categorical(allowed=ALLOWED)
        torch.testing.assert_close(ours.probabilities, theirs.probs)
        assert (ours.probabilities[~ALLOWED] == 0).all()
        torch.testing.assert_close(ours.log_prob(torch.full((2, 3), 2)), theirs.log_prob(torch.full((2, 3), 2)))
        assert (ours.log_prob(torch.full((2, 3), 1)) < -1e9).all()

    def test_entropy_and_divergence_are_those_of_what_is_left(self):
        kept = ALLOWED[0, 0]
        one, other = categorical(0, ALLOWED)[0], categorical(1, ALLOWED)[0]
        few = [Categorical(2 * normal(2, 3, 5, seed=seed)[..., kept]) for seed in (0, 1)]
        torch.testing.assert_close(one.entropy(), few[0].entropy())
        torch.testing.assert_close(one.divergence(other), few[0].divergence(few[1]))

    def test_gradients_are_finite_and_none_flows_to_what_is_not_allowed(self):
        logits = normal(2, 3, 5).requires_grad_()
        made = Categorical(logits, ALLOWED)
        (made.entropy() + made.log_prob(torch.full((2, 3), 2)) + made.divergence(made.detach())).sum().backward()
        assert torch.isfinite(logits.grad).all()
        assert (logits.grad[~ALLOWED] == 0).all()
        assert (logits.grad[ALLOWED] != 0).any()

    def test_only_allowed_actions_are_drawn_and_chosen(self):
        ours, _ = categorical(allowed=ALLOWED)
        many = Categorical(ours.log_probs.expand(1000, 2, 3, 5))
        assert set(many.sample(torch.Generator().manual_seed(0)).unique().tolist()) == {0, 2, 3}
        worst = Categorical(torch.tensor([[9.0, 0.0, -9.0]]), torch.tensor([[False, False, True]]))
        assert worst.mode().tolist() == [2]
        assert worst.sample().tolist() == [2]
        assert float(worst.entropy()) == 0.0

    def test_single_precision_too(self):
        """The finite stand-in for −∞ must not overflow when logits are subtracted from it."""
        made = Categorical(torch.tensor([[50.0, -50.0, 0.0]]), torch.tensor([[True, True, False]]))
        assert torch.isfinite(made.entropy()).all()
        assert made.probabilities.tolist() == [[1.0, pytest.approx(0.0, abs=1e-30), 0.0]]
