"""Every loss of pairs beside its formula in plain arithmetic, and the optimum of that formula on two texts."""

import math

import pytest
import torch

from aligngym.alignment.dpo import DPO
from aligngym.alignment.preference_losses import LOSSES, PairScores, loss_weights
from aligngym.core import Decay, Preferences, TabularPolicy, Trajectories

BETA, SMOOTHING, GAMMA = 0.7, 0.1, 0.4


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_odds(log_p):
    return math.log(math.exp(log_p) / (1 - math.exp(log_p)))


#: Of the chosen and the rejected side: log-ratios r and s, mean log-probabilities p and q, and their sums a and b.
FORMULAS = {
    "sigmoid": lambda r, s, p, q, a, b: -log_sigmoid(BETA * (r - s)),
    "robust": lambda r, s, p, q, a, b: -log_sigmoid(BETA * (r - s)),
    "ipo": lambda r, s, p, q, a, b: (r - s - 1 / (2 * BETA)) ** 2,
    "hinge": lambda r, s, p, q, a, b: max(0.0, 1 - BETA * (r - s)),
    "simpo": lambda r, s, p, q, a, b: -log_sigmoid(BETA * (p - q) - GAMMA),
    "cpo": lambda r, s, p, q, a, b: -log_sigmoid(BETA * (a - b)) - p,
    "orpo": lambda r, s, p, q, a, b: -BETA * log_sigmoid(log_odds(p) - log_odds(q)) - p,
    "apo_zero": lambda r, s, p, q, a, b: 1 - sigmoid(BETA * r) + sigmoid(BETA * s),
    "apo_down": lambda r, s, p, q, a, b: sigmoid(BETA * r) + 1 - sigmoid(BETA * (r - s)),
    "bco_pair": lambda r, s, p, q, a, b: -log_sigmoid(BETA * r) - log_sigmoid(-BETA * s),
    "nca_pair": lambda r, s, p, q, a, b: -log_sigmoid(BETA * r) - (log_sigmoid(-BETA * r) + log_sigmoid(-BETA * s)) / 2,
    "nll": lambda r, s, p, q, a, b: -p,
}
OPTIONS = {"simpo": {"target_margin": GAMMA}}


def by_hand(loss, chosen, rejected, lengths, reference):
    return FORMULAS[loss](
        chosen - reference[0], rejected - reference[1], chosen / lengths[0], rejected / lengths[1], chosen, rejected
    )


def test_there_is_a_formula_for_every_loss():
    assert set(FORMULAS) == set(LOSSES)


@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradient_by_hand(loss):
    """The gradient beside central differences of the formula."""
    lengths, reference = (4, 7), (-6.0, -9.5)
    sums = [(-5.0, -8.0), (-7.5, -9.0), (-3.0, -20.0), (-12.0, -2.5)]
    log_probs = torch.tensor(sums, dtype=torch.float64).T.requires_grad_()
    ones = torch.ones(2, len(sums), dtype=torch.float64)
    scores = PairScores(log_probs, ones * torch.tensor([lengths]).T, ones * torch.tensor([reference]).T)
    losses = LOSSES[loss](scores, beta=BETA, **OPTIONS.get(loss, {}))
    assert losses.tolist() == pytest.approx([by_hand(loss, *pair, lengths, reference) for pair in sums], rel=1e-9)
    (gradient,) = torch.autograd.grad(losses.sum(), log_probs)
    step = 1e-5
    for column, (a, b) in enumerate(sums):
        for side, (da, db) in enumerate([(step, 0.0), (0.0, step)]):
            above, below = (by_hand(loss, a + x * da, b + x * db, lengths, reference) for x in (1, -1))
            assert gradient[side, column].item() == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "simpo", "cpo"])
def test_label_smoothing_mixes_the_loss_with_that_of_swapped_sides(loss):
    log_probs = torch.tensor([[-2.0, -4.0], [-3.0, -1.0]])
    scores, swapped = (
        PairScores(x, torch.full((2, 2), 2.0), torch.zeros(2, 2)) for x in (log_probs, log_probs.flip(0))
    )
    found = LOSSES[loss](scores, beta=BETA, label_smoothing=SMOOTHING)
    likelihood = LOSSES["nll"](scores, beta=BETA) if loss == "cpo" else 0.0
    kept = LOSSES[loss](scores, beta=BETA, label_smoothing=0.0) - likelihood
    flipped = LOSSES[loss](swapped, beta=BETA, label_smoothing=0.0)
    flipped = flipped - LOSSES["nll"](swapped, beta=BETA) if loss == "cpo" else flipped
    if loss == "robust":
        expected = ((1 - SMOOTHING) * kept - SMOOTHING * flipped) / (1 - 2 * SMOOTHING)
    else:
        expected = (1 - SMOOTHING) * kept + SMOOTHING * flipped
    torch.testing.assert_close(found, expected + likelihood)


def two_texts(preferred, reference=(0.3, 0.7)):
    """A state and two actions, of which the first is preferred with a probability; both orders, with their weights."""
    rows = Trajectories(torch.zeros(2, 1).long(), torch.tensor([[0], [1]]), torch.ones(2, 1).bool())
    order = torch.tensor([0, 1])
    pairs = Preferences(rows[order], rows[order.flip(0)], torch.tensor([preferred, 1 - preferred]))
    return TabularPolicy(1, 2, [reference]), pairs


def learned(preferred, loss, steps=150, kind=DPO, **options):
    """Return log π(first)/π(second) after full-batch gradient descent to the minimum."""
    policy, pairs = two_texts(preferred)
    schedule = Decay(0.2, steps)
    agent = kind(
        policy, pairs, loss=loss, beta=BETA, batch_size=2, learning_rate=schedule, max_grad_norm=None, **options
    )
    agent.learn(steps, progress=False)
    first, second = policy.probabilities[0].detach().log()
    return float(first - second)


def expected_loss(mix, preferred, logit):
    """The mean of the formulas over both orders of two texts whose log-odds are ``logit``."""
    first, second = log_sigmoid(logit), log_sigmoid(-logit)
    reference = (math.log(0.3), math.log(0.7))
    return sum(
        weight
        * (
            preferred * by_hand(loss, first, second, (1, 1), reference)
            + (1 - preferred) * by_hand(loss, second, first, (1, 1), reference[::-1])
        )
        for loss, weight in mix.items()
    )


def minimum(function, low=-12.0, high=12.0):
    """The minimum of a function with one valley, by thirds."""
    while high - low > 1e-7:
        one, two = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, two) if function(one) < function(two) else (one, high)
    return low


def root(function, low=-12.0, high=12.0):
    """The zero of an increasing function, by bisection."""
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return low


@pytest.mark.parametrize("preferred", [0.6, 0.8])
@pytest.mark.parametrize(
    "mix",
    [
        *({loss: 1.0} for loss in ("cpo", "orpo", "bco_pair", "nca_pair", "nll")),
        # RPO, MPO, and one whose losses compare different things.
        {"sigmoid": 1.0, "nll": 1.0},
        {"sigmoid": 0.8, "bco_pair": 0.2, "nll": 1.0},
        {"orpo": 0.5, "ipo": 2.0},
        {"apo_zero": 1.0, "nll": 1.0},
        {"apo_down": 1.0, "nll": 1.0},
    ],
    ids=lambda mix: "+".join(mix),
)
def test_each_loss_reaches_the_minimum_of_its_formula(mix, preferred):
    expected = minimum(lambda logit: expected_loss(mix, preferred, logit))
    assert abs(expected) < 11
    assert learned(preferred, mix) == pytest.approx(expected, abs=3e-3)


@pytest.mark.parametrize("p", [0.6, 0.8])
def test_optima_without_a_reference_in_closed_form(p):
    """With L = log π(first)/π(second): likelihood wants σ(L) = p, CPO also σ(βL) = p, and ORPO's odds σ(2L) = p."""
    assert learned(p, "nll") == pytest.approx(math.log(p / (1 - p)), abs=2e-3)
    cpo = root(lambda x: sigmoid(x) - p + BETA * (sigmoid(BETA * x) - p))
    assert learned(p, "cpo") == pytest.approx(cpo, abs=2e-3)
    orpo = root(lambda x: sigmoid(x) - p + 2 * BETA * (sigmoid(2 * x) - p))
    assert learned(p, "orpo") == pytest.approx(orpo, abs=2e-3)
    # Neither is DPO's optimum, log-odds p/(1−p) over β above those of the reference.
    for other in (cpo, orpo):
        assert abs(other - (math.log(p / (1 - p)) / BETA + math.log(0.3 / 0.7))) > 0.1


def test_apo_zero_goes_to_what_the_majority_prefers():
    """Its loss goes on falling: the less frequent preference is given up, which DPO keeps in proportion."""
    losses = [expected_loss({"apo_zero": 1.0}, 0.6, logit) for logit in (-5.0, -1.0, 0.0, 1.0, 5.0, 10.0)]
    assert losses == sorted(losses, reverse=True)
    assert learned(0.6, "apo_zero") > 4
    assert learned(0.6, "sigmoid") == pytest.approx(math.log(0.6 / 0.4) / BETA + math.log(0.3 / 0.7), abs=2e-3)


def test_apo_down_lowers_a_chosen_side_that_apo_zero_raises():
    def slope(loss):
        log_probs = torch.tensor([[-3.0], [-2.0]], requires_grad=True)
        LOSSES[loss](PairScores(log_probs, torch.ones(2, 1), torch.full((2, 1), -2.5)), beta=1.0).sum().backward()
        return log_probs.grad[:, 0].tolist()

    chosen, rejected = slope("apo_zero")
    assert chosen < 0 < rejected
    # A pair that is told apart: both fall, as a step against the gradient does.
    log_probs = torch.tensor([[3.0], [-3.0]], requires_grad=True)
    LOSSES["apo_down"](PairScores(log_probs, torch.ones(2, 1), torch.zeros(2, 1)), beta=1.0).sum().backward()
    assert (log_probs.grad > 0).all()


def test_odds_of_a_certain_side_are_finite():
    log_probs = torch.tensor([[0.0, -40.0, 0.0, -1e-9], [-2.0, -2.0, 0.0, -300.0]], requires_grad=True)
    losses = LOSSES["orpo"](PairScores(log_probs, torch.ones(2, 4)), beta=1.0)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert log_probs.grad.isfinite().all()


def test_a_mix_is_a_weighted_sum_however_it_is_written():
    policy, pairs = two_texts(0.8)
    policy.logits.data += torch.tensor([[0.7, -0.4]])

    def gradient(loss, **options):
        agent = DPO(policy, pairs, loss=loss, beta=BETA, batch_size=2, **options)
        metrics = agent.backward(agent.next_batch())
        found, policy.logits.grad = policy.logits.grad, None
        return torch.cat([found.flatten(), torch.tensor([metrics["loss"]])])

    # Label smoothing is for the losses that have it.
    smooth = {"label_smoothing": 0.2}
    expected = 0.3 * gradient("sigmoid", **smooth) + 2 * gradient("apo_zero") + 0.5 * gradient("orpo")
    for mix in ({"sigmoid": 0.3, "apo_zero": 2, "orpo": 0.5}, "sigmoid:0.3, apo_zero:2,orpo:0.5"):
        torch.testing.assert_close(gradient(mix, **smooth), expected)
    assert loss_weights("ipo") == {"ipo": 1.0}
    assert loss_weights("ipo,nll:.5") == {"ipo": 1.0, "nll": 0.5}


@pytest.mark.parametrize("loss", ["cpo", {"nll": 1.0, "simpo": 1.0}, {"nll": 0.1, "sigmoid": 1.0}])
def test_implicit_rewards_are_made_of_what_the_loss_compares(loss):
    """Sums for CPO, means for SimPO and the likelihood, log-ratios where a loss of the mix has a reference."""
    rows = Trajectories(
        torch.zeros(2, 3).long(), torch.tensor([[0, 1, 1], [1, 0, -1]]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    )
    policy = TabularPolicy(1, 2, [[0.25, 0.75]])
    policy.logits.data = torch.tensor([[0.4, 0.6]]).log()
    agent = DPO(policy, Preferences(rows[:1], rows[1:]), loss=loss, beta=BETA, batch_size=1)
    _, metrics = agent.losses(agent.next_batch())
    log_pi, log_reference = torch.tensor([0.4, 0.6]).log(), torch.tensor([0.25, 0.75]).log()
    compared = {"cpo": log_pi, "nll+simpo": log_pi, "nll+sigmoid": log_pi - log_reference}["+".join(loss_weights(loss))]
    chosen, rejected = compared[0] + 2 * compared[1], compared[0] + compared[1]
    if "simpo" in loss:
        chosen, rejected = chosen / 3, rejected / 2
    assert metrics["rewards/chosen"].item() == pytest.approx(BETA * chosen.item(), rel=1e-5)
    assert metrics["rewards/rejected"].item() == pytest.approx(BETA * rejected.item(), rel=1e-5)


def test_a_loss_of_ones_own_unpacks_the_two_sides():
    """Boosting's loss, exp(−βh): its minimum is half of DPO's log-odds."""

    class ExponentialDPO(DPO):
        def preference_losses(self, scores):
            chosen, rejected = scores
            return torch.exp(-self.beta * (chosen - rejected))

    expected = math.log(0.8 / 0.2) / (2 * BETA) + math.log(0.3 / 0.7)
    assert learned(0.8, "sigmoid", kind=ExponentialDPO) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("dpo", "unknown loss 'dpo': choose from sigmoid, "),
        ("sigmoid:0.8,nul:1", "unknown loss 'nul'"),
        ({"sft": 1.0}, "unknown loss 'sft'"),
        ("sigmoid:much", "the weight of the loss 'sigmoid' is 'much', and should be a number"),
        ("sigmoid:", "the weight of the loss 'sigmoid' is ''"),
        ("sigmoid:0", "the weight of the loss 'sigmoid' must be positive, not 0"),
        ({"nll": -0.5}, "the weight of the loss 'nll' must be positive, not -0.5"),
        ({"nll": math.nan}, "must be positive, not nan"),
        ({"nll": math.inf}, "must be positive, not inf"),
        ("nll:1,nll:2", "the loss 'nll' is in the mix 'nll:1,nll:2' twice"),
        ({}, "a mix needs at least one loss"),
        ("", "unknown loss ''"),
    ],
)
def test_bad_mixes_are_refused(loss, message):
    policy, pairs = two_texts(0.8)
    with pytest.raises(ValueError, match=message):
        DPO(policy, pairs, loss=loss)


def test_options_that_no_loss_of_a_mix_has_are_refused():
    policy, pairs = two_texts(0.8)
    with pytest.raises(ValueError, match=r"target_margin=1.0 would be ignored: the loss 'ipo,nll:2' has no such"):
        DPO(policy, pairs, loss="ipo,nll:2", target_margin=1.0)
    DPO(policy, pairs, loss="ipo,simpo:2", target_margin=1.0)


def test_log_ratios_without_a_reference_are_refused():
    with pytest.raises(ValueError, match="no reference"):
        LOSSES["sigmoid"](PairScores(torch.zeros(2, 1), torch.ones(2, 1)), beta=1.0)
