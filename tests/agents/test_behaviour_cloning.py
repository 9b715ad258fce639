"""Its optimum is a table of frequencies, whatever the batches, the pieces and the padding."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from aligngym.agents import PolicyIteration
from aligngym.agents.behaviour_cloning import BehaviourCloning
from aligngym.core import PADDING, Decay, Experience, NetworkPolicy, TabularPolicy, Trajectories
from aligngym.core.deterministic_policy import DeterministicPolicy
from aligngym.envs import GridWorld, enumerate_trajectories

STATES, ACTIONS, ROWS, STEPS = 4, 3, 40, 6
UNSEEN = STATES - 1


def demonstrations(seed=0, garbage=PADDING):
    """Rows of unequal lengths, in all states but the last; what stands in the padding is to be ignored."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(STEPS) < torch.randint(1, STEPS + 1, (ROWS, 1), generator=generator)
    states = torch.randint(0, STATES - 1, (ROWS, STEPS), generator=generator).where(mask, garbage)
    actions = torch.randint(0, ACTIONS, (ROWS, STEPS), generator=generator).where(mask, garbage)
    return Trajectories(states, actions, mask)


def frequencies(rows, weights=None):
    """[S, A], counted; NaN in a state that was never seen."""
    weights = torch.ones(rows.mask.shape) if weights is None else weights
    table = np.zeros((STATES, ACTIONS))
    np.add.at(table, (rows.observations[rows.mask], rows.actions[rows.mask]), weights[rows.mask].numpy())
    with np.errstate(invalid="ignore"):
        return table / table.sum(axis=1, keepdims=True)


def cloned(rows, steps=150, learning_rate=0.5, policy=None, **options):
    policy = policy or TabularPolicy(STATES, ACTIONS)
    options.setdefault("max_grad_norm", None)
    return BehaviourCloning(policy, rows, learning_rate=Decay(learning_rate, steps), **options).learn(
        steps, progress=False
    )


class TestOptimum:
    def test_it_is_the_frequency_of_each_action(self):
        rows = demonstrations()
        agent = cloned(rows)
        expected = frequencies(rows)
        np.testing.assert_allclose(agent.policy.probability_table()[:UNSEEN], expected[:UNSEEN], atol=2e-4)
        # The least loss is the entropy of the frequencies.
        visits = np.bincount(rows.observations[rows.mask], minlength=STATES)[:UNSEEN]
        entropy = -(expected * np.log(expected))[:UNSEEN].sum(axis=1)
        assert agent.evaluate(rows)["loss"] == pytest.approx(float(visits @ entropy / visits.sum()), abs=1e-6)

    def test_a_state_that_was_not_shown_stays_as_it_was(self):
        reference = np.full((STATES, ACTIONS), [0.5, 0.3, 0.2])
        agent = cloned(demonstrations(), policy=TabularPolicy(STATES, ACTIONS, reference))
        np.testing.assert_allclose(agent.policy.probability_table()[UNSEEN], [0.5, 0.3, 0.2], atol=1e-7)

    def test_weights_count_actions(self):
        rows = demonstrations()
        weights = torch.rand(ROWS, STEPS, generator=torch.Generator().manual_seed(1))
        weights[:10] = 0
        weights[:, 2] *= 5
        expected = frequencies(rows, weights)
        assert np.abs(expected - frequencies(rows))[:UNSEEN].max() > 0.05
        shown = Experience.of(rows, weights=weights)
        agent = cloned(shown)
        # Weights that stand in the padding are not counted.
        log_probs = np.log(expected[rows.observations[rows.mask], rows.actions[rows.mask]])
        loss = -np.average(log_probs, weights=weights[rows.mask])
        assert agent.evaluate(shown)["loss"] == pytest.approx(loss, rel=1e-5)
        np.testing.assert_allclose(agent.policy.probability_table()[:UNSEEN], expected[:UNSEEN], atol=2e-4)

    def test_small_batches_reach_it_on_average(self):
        rows = demonstrations()
        agent = cloned(rows, steps=600, learning_rate=0.1, batch_size=8)
        np.testing.assert_allclose(agent.policy.probability_table()[:UNSEEN], frequencies(rows)[:UNSEEN], atol=0.01)

    def test_a_network_reaches_it_too(self):
        """States are numbers, read one-hot: enough for any table."""
        rows = demonstrations()
        policy = NetworkPolicy(spaces.Discrete(STATES), spaces.Discrete(ACTIONS), hidden=(16,), critic=None)
        agent = cloned(rows, learning_rate=0.05, policy=policy)
        np.testing.assert_allclose(agent.policy.probability_table()[:UNSEEN], frequencies(rows)[:UNSEEN], atol=1e-3)

    @pytest.mark.parametrize("deterministic", [False, True])
    def test_with_real_numbers_it_is_a_regression(self, deterministic):
        """A linear mean's maximum likelihood is least squares, and the deviation's is the residuals'."""
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(50, 4, 2, generator=generator)
        actions = 0.3 * states @ torch.tensor([[1.0], [-0.5]]) + 0.1 * torch.randn(50, 4, 1, generator=generator) + 0.2
        mask = torch.rand(50, 4, generator=generator) < 0.7
        states[~mask], actions[~mask] = 99.0, -99.0
        box, force = spaces.Box(-9, 9, (2,)), spaces.Box(-1, 1, (1,))
        if deterministic:
            policy = DeterministicPolicy(box, force, hidden=(), squash=False)
        else:
            policy = NetworkPolicy(box, force, hidden=(), critic=None)
        agent = cloned(Trajectories(states, actions, mask), steps=400, learning_rate=0.05, policy=policy)
        inputs = torch.cat([states[mask], torch.ones(int(mask.sum()), 1)], dim=1)
        solution = torch.linalg.lstsq(inputs, actions[mask]).solution
        head = agent.policy.action_head
        torch.testing.assert_close(torch.cat([head.weight[0], head.bias]), solution[:, 0], atol=1e-4, rtol=1e-3)
        if not deterministic:
            residuals = (actions[mask] - inputs @ solution).square().mean().sqrt()
            assert float(policy.log_std.detach().exp()) == pytest.approx(float(residuals), rel=1e-3)


def test_an_expert_on_a_grid_is_found_again_with_its_return():
    """From all paths of a policy, weighted with their probabilities, comes the policy, where it goes: so its return."""
    mdp = GridWorld("S..\n.F.\n..G", step_reward=-0.1).mdp
    horizon, discount = 5, 0.9
    unrolled = mdp.unrolled(horizon)
    best = PolicyIteration(unrolled, discount).learn(progress=False).policy
    expert = 0.8 * best + 0.2 / mdp.num_actions
    paths = enumerate_trajectories(mdp, horizon)
    log_probs = TabularPolicy(*expert.shape, expert)(paths).log_probs.detach()
    weights = log_probs.sum(dim=1).exp()[:, None].expand_as(paths.mask)
    agent = cloned(Experience.of(paths, weights=weights), steps=300, policy=TabularPolicy(*expert.shape))
    learned, start, taught = (
        float(unrolled.initial @ unrolled.evaluate(np.asarray(policy), discount))
        for policy in (agent.policy.probability_table(), np.full_like(expert, 0.25), expert)
    )
    assert taught - start > 0.3
    assert learned == pytest.approx(taught, abs=1e-3)


def gradient(rows, policy=None, **options):
    policy = policy or TabularPolicy(STATES, ACTIONS, np.full((STATES, ACTIONS), [0.5, 0.3, 0.2]))
    agent = BehaviourCloning(policy, rows, **options)
    metrics = agent.backward(agent.next_batch())
    return metrics, torch.cat([p.grad.flatten() for p in agent.policy.parameters() if p.requires_grad])


class TestInvariance:
    @pytest.mark.parametrize("micro_batch_size", [1, 7, 39])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_to_pieces(self, micro_batch_size, weighted):
        rows = demonstrations()
        if weighted:
            rows = Experience.of(rows, weights=torch.rand(ROWS, STEPS, generator=torch.Generator().manual_seed(1)))
        whole_metrics, whole = gradient(rows)
        metrics, pieces = gradient(rows, micro_batch_size=micro_batch_size)
        torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-7)
        assert metrics == pytest.approx(whole_metrics, rel=1e-5)

    def test_to_padding_and_to_what_stands_in_it(self):
        rows = demonstrations()
        longer = Trajectories.concatenate([rows, demonstrations(1)[:0]])
        extra = torch.full((ROWS, 5), PADDING)
        for name in ("observations", "actions"):
            setattr(longer, name, torch.cat([getattr(rows, name), extra], dim=1))
        longer.mask = torch.cat([rows.mask, torch.zeros(ROWS, 5).bool()], dim=1)
        for other in (longer, demonstrations(garbage=2), rows.steps()):
            torch.testing.assert_close(gradient(other)[1], gradient(rows)[1], rtol=1e-5, atol=1e-7)

    def test_the_gradient_is_that_of_the_mean_log_probability(self):
        """∂/∂logits[s, a] of the loss is Σ_t 1{s_t = s} (π(a|s) − 1{a_t = a}) / n."""
        rows = demonstrations()
        states, actions = rows.observations[rows.mask], rows.actions[rows.mask]
        probabilities = torch.tensor([0.5, 0.3, 0.2]).expand(len(states), ACTIONS)
        expected = torch.zeros(STATES, ACTIONS).index_add(
            0, states, probabilities - torch.nn.functional.one_hot(actions, ACTIONS)
        )
        torch.testing.assert_close(gradient(rows)[1].view(STATES, ACTIONS), expected / len(states))

    def test_of_an_adapter_to_pieces(self, tiny_policy):
        """The same class on a language model: one token after the prompt or nine."""
        generator = torch.Generator().manual_seed(4)
        mask = torch.arange(9) < torch.randint(1, 10, (7, 1), generator=generator)
        prompts = torch.randint(1, 257, (7, 5), generator=generator)
        answers = torch.randint(0, 257, (7, 9), generator=generator).where(mask, PADDING)
        rows = Trajectories(prompts, answers, mask)
        whole_metrics, whole = gradient(rows, tiny_policy())
        metrics, pieces = gradient(rows, tiny_policy(), micro_batch_size=2)
        assert (pieces - whole).norm() <= 1e-5 * whole.norm()
        assert metrics == pytest.approx(whole_metrics, rel=1e-5)


def test_an_adapter_imitates_frequencies(tiny_policy):
    """One prompt, one token, shown 6, 3 and 1 times: the softmax over three tokens can say just that."""
    tokens = torch.tensor([0] * 6 + [1] * 3 + [2])[:, None]
    rows = Trajectories(torch.ones(10, 3).long(), tokens, torch.ones(10, 1).bool())
    agent = cloned(rows, steps=80, learning_rate=0.02, policy=tiny_policy(vocab_size=3, perturbed=False))
    shown = Trajectories(torch.ones(3, 3).long(), torch.arange(3)[:, None], torch.ones(3, 1).bool())
    probabilities = agent.policy(shown).log_probs.detach().exp()[:, 0]
    torch.testing.assert_close(probabilities, torch.tensor([0.6, 0.3, 0.1]), atol=5e-3, rtol=0)


@pytest.mark.parametrize("interruption", [1, 3, 6])
def test_training_resumes_exactly(tmp_path, interruption):
    def agent():
        policy = NetworkPolicy(spaces.Discrete(STATES), spaces.Discrete(ACTIONS), hidden=(8,), critic=None)
        return BehaviourCloning(policy, demonstrations(), batch_size=12, learning_rate=0.05, seed=3)

    whole = agent().learn(7, progress=False)
    agent().learn(interruption, progress=False).save(tmp_path / "agent")
    resumed = agent().load(tmp_path / "agent").learn(7 - interruption, progress=False)
    for name, value in whole.policy.trainable_state().items():
        assert torch.equal(resumed.policy.trainable_state()[name], value), name


def test_it_acts_as_its_policy():
    agent = cloned(demonstrations())
    greedy = agent.policy.probability_table().argmax(dim=1)
    assert agent.act(np.arange(STATES)).tolist() == greedy.tolist()


def test_demonstrations_without_weight_do_not_make_an_empty_batch():
    rows = demonstrations()
    weights = torch.zeros(ROWS, STEPS)
    weights[:3] = 1
    agent = cloned(Experience.of(rows, weights=weights), batch_size=1, steps=10)
    assert agent.order.steps_per_epoch == 3


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (demonstrations()[:0], {}, "0 demonstrations hold no action that counts"),
        (
            Trajectories(*(torch.zeros(2, 3).long(),) * 2, torch.zeros(2, 3).bool()),
            {},
            "2 demonstrations hold no action",
        ),
        (demonstrations(), {"batch_size": 41}, "batch_size=41 is more than the 40 demonstrations"),
        (demonstrations(), {"batch_size": 0}, "at least one"),
        (demonstrations(), {"micro_batch_size": 0}, "at least 1, not 0"),
        (Experience.of(demonstrations(), weights=torch.full((ROWS, STEPS), -1.0)), {}, "not negative, and one is -1"),
        (Experience.of(demonstrations(), weights=torch.full((ROWS, STEPS), math.nan)), {}, "finite.* one is nan"),
    ],
)
def test_bad_arguments_are_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        BehaviourCloning(TabularPolicy(STATES, ACTIONS), rows, **options)
