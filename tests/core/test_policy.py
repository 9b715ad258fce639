import gymnasium
import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Categorical

from aligngym.core import PADDING, TabularPolicy, Trajectories


@pytest.fixture
def policy():
    table = TabularPolicy(5, 3, torch.rand(5, 3, generator=torch.Generator().manual_seed(1)).softmax(1))
    table.logits.data = torch.randn(5, 3, generator=torch.Generator().manual_seed(2)) * 2
    return table


@pytest.fixture
def rows():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]]).bool()
    observations = torch.tensor([[0, 1, 2, 3], [4, 4, 0, 0], [3, 0, 2, 0]]).where(mask, PADDING)
    actions = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 0], [1, 0, 0, 0]]).where(mask, PADDING)
    return Trajectories(observations, actions, mask)


def test_log_probs_and_entropy_are_those_of_torch(policy, rows):
    said = policy(rows, entropy=True)
    distribution = Categorical(logits=policy.logits[rows.observations.clamp(min=0)])
    expected = distribution.log_prob(rows.actions.clamp(min=0)) * rows.mask
    torch.testing.assert_close(said.log_probs, expected)
    torch.testing.assert_close(said.entropy, distribution.entropy() * rows.mask)
    assert policy(rows).entropy is None
    reference = Categorical(logits=policy.reference_logits[rows.observations.clamp(min=0)])
    expected = reference.log_prob(rows.actions.clamp(min=0)) * rows.mask
    torch.testing.assert_close(policy.reference_log_probs(rows), expected)


def test_gradients_are_those_of_torch_and_skip_padding(policy, rows):
    policy(rows, entropy=True).log_probs.sum().backward()
    gradient, policy.logits.grad = policy.logits.grad, None
    for state, action in zip(rows.observations[rows.mask], rows.actions[rows.mask], strict=True):
        Categorical(logits=policy.logits[state]).log_prob(action).backward()
    torch.testing.assert_close(gradient, policy.logits.grad)


def test_padding_is_never_looked_up(policy, rows):
    """Whatever stands where the policy did not act, numbers and gradients are the same."""
    results = []
    for filler in (PADDING, 0, 4, 10**6):
        policy.zero_grad()
        other = Trajectories(
            rows.observations.where(rows.mask, filler), rows.actions.where(rows.mask, filler), rows.mask
        )
        said = policy(other, entropy=True)
        (said.log_probs + said.entropy).sum().backward()
        results.append((said.log_probs, said.entropy, policy.logits.grad, policy.reference_log_probs(other)))
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_a_new_policy_is_its_reference(rows):
    reference = np.array([[0.2, 0.3, 0.5]] * 5)
    policy = TabularPolicy(5, 3, reference)
    np.testing.assert_allclose(policy.probabilities, reference, rtol=1e-6)
    assert torch.equal(policy(rows).log_probs, policy.reference_log_probs(rows))
    np.testing.assert_allclose(TabularPolicy(2, 4).probabilities, np.full((2, 4), 0.25), rtol=1e-6)
    policy.logits.data += torch.randn(5, 3)
    np.testing.assert_allclose(policy.reference_log_probs(rows[:1])[0].exp(), [0.2, 0.3, 0.5, 0.2], rtol=1e-6)


def test_actions_have_the_probabilities_of_the_table(policy):
    """A χ² test in every state; with a fixed seed it passes or fails for good, a right policy fails one in 10⁴."""
    count = 20_000
    states = torch.arange(5).repeat(count)
    actions, log_probs = policy.act(states, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(log_probs, policy.logits.log_softmax(1)[states, actions])
    for state in range(5):
        observed = torch.bincount(actions[states == state], minlength=3)
        expected = policy.probabilities[state].double()
        assert stats.chisquare(observed, count * expected / expected.sum()).pvalue > 1e-4 / 5


def test_acting_repeats_with_the_generator_and_is_greedy_on_demand(policy):
    states = torch.arange(5).repeat(20)
    one, other, third = (policy.act(states, generator=torch.Generator().manual_seed(s))[0] for s in (4, 4, 5))
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
    assert torch.equal(policy.act(states, greedy=True)[0], policy.logits.argmax(1)[states])
    assert policy.act(np.array([[0, 1], [2, 3]]))[0].shape == (2, 2)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ([[0.5, 0.5]], r"shape \(1, 2\), not \(2, 2\)"),
        ([[0.5, 0.5], [1.0, 0.0]], "positive"),
        ([[0.5, 0.5], [0.5, 0.6]], "sum to one"),
        ([[0.5, 0.5], [1.5, -0.5]], "positive"),
        ([[0.5, 0.5], [float("nan"), 0.5]], "positive"),
    ],
)
def test_what_is_no_reference_is_refused(reference, message):
    with pytest.raises(ValueError, match=message):
        TabularPolicy(2, 2, reference)


def test_a_table_fits_an_environment():
    policy = TabularPolicy.for_env(gymnasium.make("FrozenLake-v1"))
    assert policy.logits.shape == (16, 4)
    with pytest.raises(TypeError, match="Box"):
        TabularPolicy.for_env(gymnasium.make("CartPole-v1"))


def test_saved_and_loaded(policy, rows, tmp_path):
    policy.save(tmp_path / "table.safetensors")
    loaded = TabularPolicy.load(tmp_path / "table.safetensors")
    assert torch.equal(loaded(rows).log_probs, policy(rows).log_probs)
    assert torch.equal(loaded.reference_log_probs(rows), policy.reference_log_probs(rows))
    assert [name for name, _ in loaded.named_parameters()] == ["logits"]


def test_trainable_state_of_another_shape_is_refused(policy):
    state = {name: value.clone() for name, value in policy.trainable_state().items()}
    assert list(state) == ["logits"]
    policy.logits.data.zero_()
    policy.load_trainable_state(state)
    assert torch.equal(policy.logits, state["logits"])
    with pytest.raises(ValueError, match="not those of this policy"):
        TabularPolicy(4, 3).load_trainable_state(state)
