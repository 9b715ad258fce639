"""Action values and their ε-greedy policy: identities, and slow references for what is computed in one go."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from aligngym.core.distributions import Categorical
from aligngym.core.objectives import cross_entropy, huber_regression
from aligngym.core.q_network import CategoricalQNetwork, QNetwork, projection

STATES, ACTIONS = spaces.Discrete(5), spaces.Discrete(3)
VECTORS = spaces.Box(-1, 1, (4,))


def random_vectors(rows, seed=0):
    return torch.rand(rows, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_epsilon_greedy_probabilities(epsilon, masked):
    policy = QNetwork(STATES, ACTIONS, epsilon=epsilon)
    values = torch.tensor([[0.1, 3.0, 2.0], [1.0, 0.0, -1.0]])
    allowed = torch.tensor([[True, False, True], [True, True, True]]) if masked else None
    probabilities = policy.from_outputs(values, allowed).probabilities
    e = epsilon
    first = [e / 2, 0, 1 - e / 2] if masked else [e / 3, 1 - 2 * e / 3, e / 3]
    expected = torch.tensor([first, [1 - 2 * e / 3, e / 3, e / 3]])
    torch.testing.assert_close(probabilities, expected, atol=1e-6, rtol=0)


def test_a_greedy_policy_has_finite_log_probabilities_and_no_entropy():
    distribution = QNetwork(STATES, ACTIONS).from_outputs(torch.tensor([[0.0, 1.0, 2.0]]))
    assert isinstance(distribution, Categorical)
    assert distribution.log_probs.isfinite().all()
    assert float(distribution.entropy()) == 0


@pytest.mark.parametrize("space", [STATES, VECTORS])
@pytest.mark.parametrize("masked", [False, True])
def test_the_actor_draws_from_the_policy(space, masked):
    policy = QNetwork(space, ACTIONS, epsilon=0.4, seed=3)
    observations = np.arange(5) if space is STATES else random_vectors(5).numpy()
    allowed = np.array([[True, False, True], [True] * 3, [False, True, True], [False, False, True], [True] * 3])
    allowed = allowed if masked else None
    act, draws = policy.actor(seed=1), 4000
    repeated = np.tile(observations, (draws,) + (1,) * (observations.ndim - 1))
    actions = act(repeated, None if allowed is None else np.tile(allowed, (draws, 1))).reshape(draws, 5)
    frequencies = np.stack([(actions == action).mean(axis=0) for action in range(3)], axis=1)
    outputs = policy.outputs(torch.from_numpy(observations)).detach()
    said = policy.from_outputs(outputs, None if allowed is None else torch.from_numpy(allowed)).probabilities.numpy()
    # Five standard errors of a frequency, and exactly never where it is forbidden.
    assert (np.abs(frequencies - said) <= 5 * np.sqrt(said * (1 - said) / draws) + 1e-12).all()
    assert not masked or (frequencies[~allowed] == 0).all()


def test_acting_greedily_and_the_table_of_probabilities():
    policy = QNetwork(STATES, ACTIONS, epsilon=0.3, seed=2)
    best = policy.outputs(torch.arange(5)).argmax(dim=1)
    actions, log_probs = policy.act(np.arange(5), greedy=True)
    assert actions.tolist() == best.tolist()
    torch.testing.assert_close(log_probs.exp(), torch.full((5,), 0.8))
    table = policy.probability_table()
    assert table.dtype == torch.float64
    torch.testing.assert_close(table.sum(dim=1), torch.ones(5, dtype=torch.float64))
    assert table.argmax(dim=1).tolist() == best.tolist()
    forbidden = np.ones((5, 3), dtype=bool)
    forbidden[np.arange(5), best] = False
    assert (policy.act(np.arange(5), greedy=True, action_mask=forbidden)[0] != best).all()


def test_a_table_starts_at_zero_and_has_an_entry_for_every_pair():
    policy = QNetwork(STATES, ACTIONS, hidden=())
    (table,) = policy.network.parameters()
    assert table.numel() == 15
    assert (policy.outputs(torch.arange(5)) == 0).all()


def test_dueling_advantages_have_mean_zero_and_the_mean_is_the_state_value():
    policy = QNetwork(VECTORS, ACTIONS, dueling=True, seed=1)
    observations = random_vectors(7)
    q = policy.outputs(observations)
    features = policy.network.body(observations)
    torch.testing.assert_close(q.mean(dim=1), policy.network.values(features)[:, 0])
    raw = policy.network.advantages(features)
    torch.testing.assert_close(q - q.mean(dim=1, keepdim=True), raw - raw.mean(dim=1, keepdim=True))
    # One more on every advantage changes nothing, which is what the mean is subtracted for.
    with torch.no_grad():
        policy.network.advantages.bias += 1
    torch.testing.assert_close(policy.outputs(observations), q)


def test_a_distribution_has_one_mean_per_action_and_adds_up():
    policy = CategoricalQNetwork(VECTORS, ACTIONS, v_min=-1, v_max=2, atoms=7, dueling=True)
    outputs = policy.network(random_vectors(4))
    assert outputs.shape == (4, 3, 7)
    by_hand = (outputs.softmax(-1) * torch.linspace(-1, 2, 7)).sum(-1)
    torch.testing.assert_close(policy.outputs(random_vectors(4)), by_hand)


def slow_projection(probabilities, points, support):
    """Algorithm 1 of Bellemare et al., 2017, line by line."""
    low, high, step = support[0], support[-1], support[1] - support[0]
    projected = np.zeros((len(points), len(support)))
    for row in range(len(points)):
        for p, z in zip(probabilities[row], points[row], strict=True):
            b = (min(max(z, low), high) - low) / step
            lower, upper = int(np.floor(b)), int(np.ceil(b))
            if lower == upper:
                projected[row, lower] += p
            else:
                projected[row, lower] += p * (upper - b)
                projected[row, upper] += p * (b - lower)
    return projected


def test_projection_is_that_of_the_paper_and_keeps_mass_and_mean():
    generator = torch.Generator().manual_seed(0)
    support = torch.linspace(-2, 3, 11, dtype=torch.float64)
    probabilities = torch.rand(50, 11, generator=generator, dtype=torch.float64).softmax(dim=1)
    points = torch.rand(50, 11, generator=generator, dtype=torch.float64) * 9 - 4
    # Points on atoms, at the ends, and far outside.
    points[:4, :5] = torch.tensor([-2.0, 3.0, -100.0, 100.0, 0.5], dtype=torch.float64)
    projected = projection(probabilities, points, support)
    expected = slow_projection(probabilities.numpy(), points.numpy(), support.numpy())
    np.testing.assert_allclose(projected, expected, atol=1e-12)
    torch.testing.assert_close(projected.sum(dim=1), torch.ones(50, dtype=torch.float64))
    inside = points.clamp(-2, 3)
    torch.testing.assert_close(projected @ support, (probabilities * inside).sum(dim=1))
    # A distribution on the atoms is its own projection.
    torch.testing.assert_close(projection(probabilities, support.expand(50, 11), support), probabilities)


def test_a_categorical_target_is_the_moved_distribution():
    policy = CategoricalQNetwork(STATES, ACTIONS, v_min=0, v_max=4, atoms=5)
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 50.0]] * 3)
    targets = policy.bootstrap(torch.tensor([1.0, 0.5, 9.0]), torch.tensor([0.5, 0.0, 1.0]), logits)
    # 1 + 0.5·4 = 3; a terminated 0.5, half-way between atoms; and 9 + 4, taken for the last atom.
    expected = torch.tensor([[0.0, 0, 0, 1, 0], [0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 1]])
    torch.testing.assert_close(targets, expected, atol=1e-6, rtol=0)


def test_cross_entropy_less_the_targets_entropy_is_the_divergence():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 5, generator=generator, requires_grad=True)
    target = torch.randn(6, 5, generator=generator).softmax(-1)
    target[0] = torch.tensor([0.0, 1, 0, 0, 0])
    policy = CategoricalQNetwork(STATES, ACTIONS, v_min=0, v_max=4, atoms=5)
    divergence = torch.nn.functional.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1)
    torch.testing.assert_close(policy.surprise(logits, target), divergence)
    assert torch.allclose(policy.surprise(target[1:].log(), target[1:]), torch.zeros(5), atol=1e-6)
    cross_entropy(logits, target).sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - target)


def test_the_huber_loss_clips_the_error_in_the_gradient():
    errors = torch.tensor([-3.0, -0.5, 0.0, 0.2, 2.0], requires_grad=True)
    for threshold in (1.0, 0.3):
        losses = huber_regression(errors, torch.zeros(5), threshold)
        (gradient,) = torch.autograd.grad(losses.sum(), errors)
        torch.testing.assert_close(gradient, errors.detach().clamp(-threshold, threshold))
    policy = QNetwork(STATES, ACTIONS, huber=None)
    torch.testing.assert_close(policy.regression(errors, torch.zeros(5)), errors**2 / 2)
    torch.testing.assert_close(
        QNetwork(STATES, ACTIONS, huber=0.3).regression(errors, torch.zeros(5)),
        huber_regression(errors, torch.zeros(5), 0.3),
    )


def test_the_target_network_follows_only_when_told():
    policy = QNetwork(VECTORS, ACTIONS, seed=0)
    observations = random_vectors(3)
    before = policy.outputs(observations).detach()
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter += 0.5
    old = [parameter.clone() for parameter in policy.target.parameters()]
    torch.testing.assert_close(policy.reference_outputs(observations), before)
    policy.update_target(0.25)
    for parameter, new, was in zip(policy.target.parameters(), policy.network.parameters(), old, strict=True):
        torch.testing.assert_close(parameter, was + 0.25 * (new - was))
    policy.update_target()
    assert torch.equal(policy.reference_outputs(observations), policy.outputs(observations))
    assert not any(parameter.requires_grad for parameter in policy.target.parameters())


@pytest.mark.parametrize("kind", [QNetwork, CategoricalQNetwork])
def test_saved_and_loaded(kind, tmp_path):
    options = {"v_min": 0, "v_max": 1} if kind is CategoricalQNetwork else {}
    env = gymnasium.make("FrozenLake-v1")
    policy, other = kind.for_env(env, seed=1, **options), kind.for_env(env, seed=2, **options)
    policy.update_target()
    with torch.no_grad():
        next(policy.network.parameters()).add_(1)
    policy.save(tmp_path / "policy.safetensors")
    other.load(tmp_path / "policy.safetensors")
    states = torch.arange(16)
    assert torch.equal(other.outputs(states), policy.outputs(states))
    assert torch.equal(other.reference_outputs(states), policy.reference_outputs(states))
    with pytest.raises(ValueError, match="holds another network"):
        kind.for_env(env, hidden=(3,), **options).load(tmp_path / "policy.safetensors")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epsilon": 1.5}, ValueError, "epsilon is a probability, not 1.5"),
        ({"huber": 0.0}, ValueError, "huber is .* not 0.0"),
        ({"hidden": (0,)}, ValueError, "at least one unit"),
        ({"activation": "step"}, ValueError, "activation is one of"),
        ({"action_space": spaces.Box(-1, 1, (2,))}, TypeError, "best of the actions"),
    ],
)
def test_bad_arguments(arguments, error, message):
    spaces_given = {"observation_space": STATES, "action_space": ACTIONS}
    with pytest.raises(error, match=message):
        QNetwork(**spaces_given | arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"v_min": 1.0, "v_max": 1.0}, "1.0 is not below 1.0"),
        ({"v_min": 0.0, "v_max": float("inf")}, "not below inf"),
        ({"v_min": 0.0, "v_max": 1.0, "atoms": 1}, "at least 2 atoms, not 1"),
        ({"v_min": 0.0, "v_max": 1.0, "huber": 1.0}, "huber would be ignored"),
    ],
)
def test_bad_distributions(options, message):
    with pytest.raises(ValueError, match=message):
        CategoricalQNetwork(STATES, ACTIONS, **options)
