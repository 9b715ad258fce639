import numpy as np
import pytest
import torch
from scipy.special import softmax

from aligngym.agents import PolicyIteration, SoftValueIteration
from aligngym.agents.exact_gradients import (
    advantages,
    discounted_visitation,
    expected_return,
    fisher_information,
    natural_gradient,
    penalised,
    policy_gradient,
)
from aligngym.core import TabularPolicy
from aligngym.envs import GridWorld, ShortCorridor, TabularMDP, TokenMDP, enumerate_trajectories


def random_model(seed=0, states=6, actions=3, *, endless=False):
    """A model in which every state leads to every other, the last one terminal unless it is endless."""
    generator = np.random.default_rng(seed)
    transitions = generator.dirichlet(np.full(states, 0.5), size=(states, actions))
    rewards = generator.normal(size=(states, actions))
    terminal = np.arange(states) == (-1 if endless else states - 1)
    return TabularMDP.from_arrays(transitions, rewards, generator.dirichlet(np.ones(states)), terminal)


MODELS = {
    "random": random_model,
    "endless": lambda: random_model(1, endless=True),
    # An episode can begin where it ends: nothing is decided in it.
    "grid": lambda: GridWorld("S.F\n.#.\n.SG", slip=0.3, step_reward=-0.1).mdp,
    "corridor": lambda: ShortCorridor().mdp,
    "token": lambda: TokenMDP(np.random.default_rng(1).normal(size=9), 3, 2).mdp,
}
DISCOUNTS = [
    (name, discount) for name in MODELS for discount in (0.0, 0.7, 0.95, 1.0) if (name, discount) != ("endless", 1)
]


def random_logits(mdp, seed=3):
    return np.random.default_rng(seed).normal(size=(mdp.num_states, mdp.num_actions))


def case(name, seed=3):
    mdp = MODELS[name]()
    logits = random_logits(mdp, seed)
    return mdp, logits, softmax(logits, axis=1)


def difference(function, logits, width=1e-5):
    """Central finite differences of a function of a table, in float64."""
    gradient = np.zeros_like(logits)
    for index in np.ndindex(*logits.shape):
        step = np.zeros_like(logits)
        step[index] = width
        gradient[index] = (function(logits + step) - function(logits - step)) / (2 * width)
    return gradient


def differentiable_return(mdp, logits, discount, beta=0.0, reference=None):
    """J by a dense solve in torch, and its gradient by autograd."""
    logits = torch.tensor(logits, requires_grad=True)
    policy = logits.softmax(dim=1)
    rewards = (
        torch.tensor(mdp.rewards) - beta * (policy / (1.0 if reference is None else torch.tensor(reference))).log()
    )
    live = torch.tensor(~mdp.terminal)
    table = torch.tensor(mdp.transitions.toarray().reshape(*mdp.rewards.shape, -1))
    chain = torch.einsum("sa,sat->st", policy, table)[live][:, live]
    values = torch.linalg.solve(torch.eye(len(chain)).double() - discount * chain, (policy * rewards).sum(dim=1)[live])
    total = torch.tensor(mdp.initial)[live] @ values
    (gradient,) = torch.autograd.grad(total, logits)
    return total.item(), gradient.numpy()


@pytest.mark.parametrize(("name", "discount"), DISCOUNTS)
def test_the_gradient_is_that_of_the_return(name, discount):
    mdp, logits, policy = case(name)
    exact = policy_gradient(mdp, policy, discount)
    scale = max(1.0, np.abs(exact).max())
    numeric = difference(lambda theta: mdp.initial @ mdp.evaluate(softmax(theta, axis=1), discount), logits)
    np.testing.assert_allclose(exact, numeric, rtol=0, atol=2e-8 * scale)
    total, gradient = differentiable_return(mdp, logits, discount)
    np.testing.assert_allclose(exact, gradient, rtol=0, atol=1e-12 * scale)
    assert expected_return(mdp, policy, discount) == pytest.approx(total, rel=1e-12)
    # A softmax does not see a constant, and nothing is decided after the end.
    np.testing.assert_allclose(exact.sum(axis=1), 0, atol=1e-13 * scale)
    assert (exact[mdp.terminal] == 0).all()
    # The first reward alone is the same for every first token, and for every step in the corridor.
    assert (np.abs(exact).max() > 0.01) == (discount > 0 or name not in ("token", "corridor"))


@pytest.mark.parametrize(("name", "discount"), DISCOUNTS)
def test_advantages_and_visitation_fit_together(name, discount):
    mdp, _, policy = case(name)
    other = softmax(random_logits(mdp, seed=4), axis=1)
    table = advantages(mdp, policy, discount)
    np.testing.assert_allclose((policy * table).sum(axis=1), 0, atol=1e-11)
    assert (table[mdp.terminal] == 0).all()
    # The performance difference lemma, S. Kakade and J. Langford, 2002, lemma 6.1, is exact for any two policies.
    gain = expected_return(mdp, other, discount) - expected_return(mdp, policy, discount)
    visits = discounted_visitation(mdp, other, discount)
    assert visits @ (other * table).sum(axis=1) == pytest.approx(gain, rel=1e-9, abs=1e-11)
    # And rewards are earned where decisions are made.
    earned = visits @ (other * mdp.rewards).sum(axis=1)
    assert earned == pytest.approx(expected_return(mdp, other, discount), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(("name", "discount"), DISCOUNTS)
def test_visits_are_the_discounted_sum_of_the_distributions_over_time(name, discount):
    mdp, _, policy = case(name)
    chain = np.einsum("sa,sat->st", policy, mdp.transitions.toarray().reshape(*policy.shape, -1))
    expected, now, factor = np.zeros(mdp.num_states), mdp.initial * ~mdp.terminal, 1.0
    for _ in range(5000):
        expected += factor * now
        now, factor = (now @ chain) * ~mdp.terminal, factor * discount
    visits = discounted_visitation(mdp, policy, discount)
    np.testing.assert_allclose(visits, expected, rtol=1e-9, atol=1e-12)
    assert (visits[mdp.terminal] == 0).all()
    if name == "endless":
        assert visits.sum() == pytest.approx(1 / (1 - discount), rel=1e-12)


def test_known_visits():
    # Left or right with 1/2: from the start it takes 12 steps, (2p − 4) / (p (1 − p)) = −12 at p = 1/2.
    mdp = ShortCorridor().mdp
    visits = discounted_visitation(mdp, np.full((4, 2), 0.5), 1.0)
    assert visits.sum() == pytest.approx(12)
    # v = (12, 10, 6) steps; state 2 is left for the goal half of the time, so it is visited twice.
    np.testing.assert_allclose(visits, [6, 4, 2, 0])
    # Half of the episodes are over before they begin.
    both = TabularMDP.from_arrays(mdp.transitions, mdp.rewards, [0.5, 0, 0, 0.5], mdp.terminal)
    np.testing.assert_allclose(discounted_visitation(both, np.full((4, 2), 0.5), 1.0), [3, 2, 1, 0])
    assert expected_return(both, np.full((4, 2), 0.5), 1.0) == pytest.approx(-6)


@pytest.mark.parametrize("discount", [0.8, 1.0])
@pytest.mark.parametrize("horizon", [3, 5])
def test_sums_over_all_trajectories_give_the_same(horizon, discount):
    base = GridWorld("S.\nFG", step_reward=-0.25).mdp
    mdp, paths = base.unrolled(horizon), enumerate_trajectories(base, horizon)
    logits = random_logits(mdp)
    policy = softmax(logits, axis=1)
    mask = paths.mask.numpy()
    states, actions = np.where(mask, paths.observations, 0), np.where(mask, paths.actions, 0)
    probabilities = np.where(mask, policy[states, actions], 1.0).prod(axis=1)
    assert probabilities.sum() == pytest.approx(1)
    factors = np.where(mask, discount ** np.arange(horizon), 0.0)
    rewards = paths.rewards.double().numpy() * factors
    visits = np.bincount(states.ravel(), (probabilities[:, None] * factors).ravel(), mdp.num_states)
    np.testing.assert_allclose(discounted_visitation(mdp, policy, discount), visits, atol=1e-13)
    # REINFORCE without sampling: E[Σ_t (Σ_{k ≥ t} γ^k r_k) ∇ ln π(a_t | s_t)].
    to_go = rewards[:, ::-1].cumsum(axis=1)[:, ::-1] * probabilities[:, None] * mask
    expected = np.zeros_like(policy)
    np.add.at(expected, (states, actions), to_go)
    expected -= policy * np.bincount(states.ravel(), to_go.ravel(), mdp.num_states)[:, None]
    np.testing.assert_allclose(policy_gradient(mdp, policy, discount), expected, atol=1e-13)
    # The Fisher matrix of the trajectories' distribution: with γ = 1 the same as that of the visited states.
    if discount == 1:
        scores = np.zeros((len(paths), *policy.shape))
        for time in range(horizon):
            row = np.flatnonzero(mask[:, time])
            scores[row, states[row, time]] -= policy[states[row, time]]
            scores[row, states[row, time], actions[row, time]] += 1
        scores = scores.reshape(len(paths), -1)
        fisher = (scores * probabilities[:, None]).T @ scores
        np.testing.assert_allclose(fisher_information(mdp, policy, 1.0), fisher, atol=1e-13)


@pytest.mark.parametrize(("name", "discount"), DISCOUNTS)
def test_the_natural_gradient_solves_the_fisher_equations(name, discount):
    mdp, _, policy = case(name)
    fisher, gradient = fisher_information(mdp, policy, discount), policy_gradient(mdp, policy, discount).ravel()
    np.testing.assert_array_equal(fisher, fisher.T)
    natural = natural_gradient(mdp, policy, discount)
    solved = np.linalg.pinv(fisher, rcond=1e-12, hermitian=True) @ gradient
    scale = max(1.0, np.abs(natural).max())
    np.testing.assert_allclose(natural.ravel(), solved, atol=1e-8 * scale)
    np.testing.assert_allclose(fisher @ natural.ravel(), gradient, atol=1e-12 * max(1.0, np.abs(gradient).max()))
    # Kakade: it is the advantage, up to a constant in each state.
    visited = discounted_visitation(mdp, policy, discount) > 0
    apart = (natural - advantages(mdp, policy, discount))[visited]
    np.testing.assert_allclose(apart - apart[:, :1], 0, atol=1e-11 * scale)
    np.testing.assert_allclose(natural.sum(axis=1), 0, atol=1e-11 * scale)
    assert (natural[~visited] == 0).all()


def test_compatible_features_lose_nothing():
    # R. Sutton et al., Policy gradient methods with function approximation, 2000, theorem 2; Kakade 2001, theorem 1:
    # the advantages' projection on ψ = ∇ ln π has the natural gradient as its weights, and the gradient is the same.
    mdp, discount = random_model(5), 0.9
    features = np.random.default_rng(6).normal(size=(mdp.num_states, mdp.num_actions, 4))
    policy = softmax(features @ np.array([0.5, -1.0, 0.3, 0.8]), axis=1)
    psi = (features - np.einsum("sa,sak->sk", policy, features)[:, None]).reshape(-1, 4)
    weights = (discounted_visitation(mdp, policy, discount)[:, None] * policy).ravel()
    target = np.sqrt(weights) * advantages(mdp, policy, discount).ravel()
    solution, *_ = np.linalg.lstsq(np.sqrt(weights)[:, None] * psi, target, rcond=None)
    # By the chain rule, gradient and Fisher matrix for the weights of the features follow from those of the table.
    features = features.reshape(-1, 4)
    gradient = features.T @ policy_gradient(mdp, policy, discount).ravel()
    fisher = features.T @ fisher_information(mdp, policy, discount) @ features
    np.testing.assert_allclose(solution, np.linalg.solve(fisher, gradient), rtol=1e-9)
    np.testing.assert_allclose(psi.T @ (weights * (psi @ solution)), gradient, rtol=1e-9)


def test_actions_and_states_that_never_happen_have_no_gradient():
    # The cells below the upper row are never entered, and from them this policy would never find an end.
    mdp = GridWorld("S.G\n#.#\n...", boundary_reward=0.0).mdp
    policy = np.zeros((mdp.num_states, 4))
    policy[:] = [0, 0, 0, 1]
    policy[0], policy[1] = [0, 0.7, 0.3, 0], [0, 1, 0, 0]
    visits = discounted_visitation(mdp, policy, 1.0)
    np.testing.assert_allclose(visits, [1 / 0.7, 1, 0, 0, 0, 0, 0])
    for discount in (0.9, 1.0):
        gradient, natural = policy_gradient(mdp, policy, discount), natural_gradient(mdp, policy, discount)
        fisher = fisher_information(mdp, policy, discount)
        np.testing.assert_allclose(
            natural.ravel(), np.linalg.pinv(fisher, rcond=1e-12, hermitian=True) @ gradient.ravel(), atol=1e-12
        )
        assert (natural[1:] == 0).all()
        assert (gradient[1:] == 0).all()
        assert (natural[0, [0, 3]] == 0).all()
        # Without a discount, it does not matter how long it takes.
        assert (natural[0, 1] > 0.001) == (discount < 1)


@pytest.mark.parametrize("discount", [0.9, 1.0])
@pytest.mark.parametrize("reference", [None, "random"])
def test_the_gradient_of_a_penalised_objective(reference, discount):
    mdp, logits, policy = case("grid")
    if reference is not None:
        reference = softmax(random_logits(mdp, seed=8), axis=1)
    total, gradient = differentiable_return(mdp, logits, discount, beta=0.3, reference=reference)
    model = penalised(mdp, policy, 0.3, reference)
    assert expected_return(model, policy, discount) == pytest.approx(total, rel=1e-11)
    np.testing.assert_allclose(policy_gradient(model, policy, discount), gradient, atol=1e-11)

    def objective(theta):
        other = softmax(theta, axis=1)
        return expected_return(penalised(mdp, other, 0.3, reference), other, discount)

    np.testing.assert_allclose(difference(objective, logits), gradient, atol=1e-7)
    assert np.abs(gradient - policy_gradient(mdp, policy, discount)).max() > 0.01


def test_the_penalised_gradient_vanishes_at_the_optimum_of_soft_value_iteration():
    mdp = MODELS["grid"]()
    reference = softmax(random_logits(mdp, seed=8), axis=1)
    best = SoftValueIteration(mdp, 0.9, 0.3, reference, tolerance=1e-12).learn(progress=False)
    model = penalised(mdp, best.policy, 0.3, reference)
    assert np.abs(policy_gradient(model, best.policy, 0.9)).max() < 1e-11
    assert expected_return(model, best.policy, 0.9) == pytest.approx(mdp.initial @ best.values, abs=1e-11)
    # So it does for an entropy bonus without terminal states, where it is a uniform reference and a constant.
    endless = MODELS["endless"]()
    best = SoftValueIteration(endless, 0.9, 0.3, tolerance=1e-12).learn(progress=False)
    model = penalised(endless, best.policy, 0.3)
    assert np.abs(policy_gradient(model, best.policy, 0.9)).max() < 1e-11
    assert expected_return(model, best.policy, 0.9) == pytest.approx(
        endless.initial @ best.values + 0.3 * np.log(endless.num_actions) / 0.1, rel=1e-11
    )
    # Absent actions leave their logarithm out.
    greedy = np.eye(endless.num_actions)[best.policy.argmax(axis=1)]
    np.testing.assert_allclose(penalised(endless, greedy, 0.3).rewards, endless.rewards, rtol=1e-15)


def test_natural_ascent_is_soft_policy_iteration():
    mdp, discount = GridWorld("S..\n.#.\n..G", slip=0.2).mdp, 0.9
    logits = random_logits(mdp)
    # One huge step makes the policy greedy.
    policy = softmax(logits, axis=1)
    greedy = softmax(logits + 1e6 * natural_gradient(mdp, policy, discount), axis=1)
    best = advantages(mdp, policy, discount).argmax(axis=1)
    np.testing.assert_allclose(greedy[~mdp.terminal], np.eye(4)[best[~mdp.terminal]], atol=1e-12)
    # Steps of any size improve on the policy in every state, and lead to the optimum.
    optimum = PolicyIteration(mdp, discount).learn(progress=False).values
    before = mdp.evaluate(policy, discount)
    for step in [0.1, 1.0, *[10.0] * 60]:
        logits = logits + step * natural_gradient(mdp, softmax(logits, axis=1), discount)
        now = mdp.evaluate(softmax(logits, axis=1), discount)
        assert (now >= before - 1e-14).all()
        before = now
    np.testing.assert_allclose(before, optimum, atol=1e-6)


def test_a_tabular_policy_is_taken_in_double_precision():
    mdp, logits, _ = case("grid")
    policy = TabularPolicy(mdp.num_states, mdp.num_actions)
    policy.logits.data = torch.tensor(logits, dtype=torch.float32)
    table = softmax(logits.astype(np.float32).astype(np.float64), axis=1)
    for function in (discounted_visitation, advantages, policy_gradient, natural_gradient, fisher_information):
        np.testing.assert_array_equal(function(mdp, policy, 0.9), function(mdp, table, 0.9))
    assert expected_return(mdp, policy, 0.9) == expected_return(mdp, table, 0.9)
    np.testing.assert_array_equal(penalised(mdp, policy, 1.0).rewards, penalised(mdp, table, 1.0).rewards)


@pytest.mark.parametrize(
    "function",
    [expected_return, advantages, discounted_visitation, policy_gradient, fisher_information, natural_gradient],
)
def test_bad_policies_and_discounts_are_refused(function):
    mdp, _, policy = case("grid")
    for table, discount, message in [
        (policy, 1.5, "the discount is between 0 and 1, not 1.5"),
        (policy, -0.1, "the discount is between 0 and 1, not -0.1"),
        (policy, np.nan, "the discount is between 0 and 1, not nan"),
        (policy[:-1], 0.9, r"policy has shape \(7, 4\)"),
        (2 * policy, 0.9, "policy, state 7: .* is no distribution"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(mdp, table, discount)


def test_sums_without_an_end_are_refused():
    mdp = MODELS["endless"]()
    policy = np.full(mdp.rewards.shape, 1 / 3)
    with pytest.raises(ValueError, match="episodes reach state 0 and never end there"):
        discounted_visitation(mdp, policy, 1.0)
    with pytest.raises(ValueError, match="not finite with a discount of 1"):
        advantages(mdp, policy, 1.0)
    large = GridWorld("\n".join([49 * "." + "G"] * 50)).mdp
    with pytest.raises(ValueError, match="10000² entries"):
        fisher_information(large, np.full((2500, 4), 0.25), 0.9)


def test_bad_penalties_are_refused():
    mdp, _, policy = case("grid")
    for beta in (-1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match=f"beta is finite and at least 0, not {beta}"):
            penalised(mdp, policy, beta)
    reference = np.tile([0.5, 0.5, 0, 0], (len(policy), 1))
    with pytest.raises(ValueError, match="state 0, action 2: the reference is 0"):
        penalised(mdp, policy, 1.0, reference)
    with pytest.raises(ValueError, match=r"reference has shape \(1, 4\)"):
        penalised(mdp, policy, 1.0, reference[:1])
    np.testing.assert_allclose(penalised(mdp, policy, 0.0, reference).rewards, mdp.rewards, rtol=1e-15)
