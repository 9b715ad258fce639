import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from aligngym.core import NetworkPolicy, Trajectories

STATES, ACTIONS = spaces.Discrete(5), spaces.Discrete(3)


def rows_of(observations, actions):
    return Trajectories(observations, actions, torch.ones(observations.shape[:2], dtype=torch.bool))


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_every_state_once_or_every_row_by_itself(critic):
    """With more rows than states the network is asked about states; outputs and gradients are the same."""
    states = torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(0))
    actions = torch.randint(3, (4, 6), generator=torch.Generator().manual_seed(1))
    results = []
    for piece in (24, 4):
        policy = NetworkPolicy(STATES, ACTIONS, critic=critic, seed=2)
        policy.action_head.weight.data *= 100
        said = [policy(rows, entropy=True) for rows in rows_of(states.view(24, 1), actions.view(24, 1)).split(piece)]
        parts = [torch.cat([getattr(each, name) for each in said]) for name in ("log_probs", "entropy", "values")]
        sum(part.pow(2).sum() for part in parts).backward()
        gradients = [parameter.grad for parameter in policy.parameters() if parameter.requires_grad]
        results.append([*parts, *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_a_network_says_is_what_its_layers_say():
    policy = NetworkPolicy(spaces.Box(-1, 1, (3,)), ACTIONS, hidden=(7,), activation="relu", seed=3)
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    actions = torch.ones(2, 4, dtype=torch.long)
    layer, head = policy.actor_body.layers[0], policy.action_head
    logits = (x @ layer.weight.T + layer.bias).relu() @ head.weight.T + head.bias
    torch.testing.assert_close(policy(rows_of(x, actions)).log_probs, logits.log_softmax(-1)[..., 1])
    layer, head = policy.critic_body.layers[0], policy.value_head
    values = ((x @ layer.weight.T + layer.bias).relu() @ head.weight.T + head.bias)[..., 0]
    torch.testing.assert_close(policy(rows_of(x, actions)).values, values)


def test_weights_begin_orthogonal_with_their_gains():
    policy = NetworkPolicy(spaces.Box(-1, 1, (4,)), ACTIONS, hidden=(8, 8))
    inner = policy.actor_body.layers[2].weight
    torch.testing.assert_close(inner @ inner.T, 2 * torch.eye(8), atol=1e-5, rtol=0)
    head, value = policy.action_head.weight, policy.value_head.weight
    torch.testing.assert_close(head @ head.T, 1e-4 * torch.eye(3), atol=1e-8, rtol=0)
    torch.testing.assert_close(value @ value.T, torch.eye(1), atol=1e-5, rtol=0)
    assert all((layer.bias == 0).all() for layer in (policy.action_head, policy.value_head))
    plain = NetworkPolicy(spaces.Box(-1, 1, (4,)), ACTIONS, hidden=(8, 8), orthogonal=False).actor_body.layers[2].weight
    assert ((plain @ plain.T) - 2 * torch.eye(8)).abs().max() > 0.1


def test_the_same_seed_makes_the_same_network_and_leaves_torch_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, other, third = (NetworkPolicy(STATES, ACTIONS, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert not torch.equal(one.action_head.weight, third.action_head.weight)


def test_the_reference_is_the_network_as_it_was_made_and_is_not_trained(tmp_path):
    policy = NetworkPolicy(STATES, ACTIONS, seed=1)
    rows = rows_of(torch.arange(5)[None], torch.zeros(1, 5, dtype=torch.long))
    before = policy(rows).log_probs.detach()
    policy.action_head.bias.data += torch.tensor([1.0, 0.0, -1.0])
    torch.testing.assert_close(policy.reference_log_probs(rows), before)
    assert not any(name.startswith("reference") for name in policy.trainable_state())
    policy.save(tmp_path / "network.safetensors")
    other = NetworkPolicy(STATES, ACTIONS, seed=9).load(tmp_path / "network.safetensors")
    assert torch.equal(other(rows).log_probs, policy(rows).log_probs)
    assert torch.equal(other.reference_log_probs(rows), policy.reference_log_probs(rows))
    with pytest.raises(ValueError, match="another network"):
        NetworkPolicy(STATES, ACTIONS, hidden=(3,)).load(tmp_path / "network.safetensors")


def test_acting_follows_the_distribution_one_by_one_and_in_batches():
    policy = NetworkPolicy(STATES, ACTIONS, seed=1)
    policy.action_head.bias.data = torch.tensor([1.0, 0.0, -1.0])
    table = policy.probability_table()
    states = np.full(30_000, 2)
    act = policy.actor(seed=0)
    share = np.bincount(act(states, None), minlength=3) / len(states)
    np.testing.assert_allclose(share, table[2], atol=5 * 0.5 / len(states) ** 0.5)
    allowed = np.tile([True, False, True], (len(states), 1))
    share = np.bincount(act(states, allowed), minlength=3) / len(states)
    expected = table[2] * torch.tensor([1, 0, 1])
    np.testing.assert_allclose(share, expected / expected.sum(), atol=5 * 0.5 / len(states) ** 0.5)
    assert int(policy.act(3)[0]) in range(3)
    assert int(policy.act(3, greedy=True)[0]) == int(table[3].argmax())
    assert policy.act(np.array([0, 1]), action_mask=[[False, True, False]] * 2)[0].tolist() == [1, 1]


def test_a_gaussian_acts_around_its_mean():
    env = gymnasium.make("Pendulum-v1")
    policy = NetworkPolicy.for_env(env, log_std=-1.0, seed=1)
    observation, _ = env.reset(seed=0)
    mean, _ = policy.act(observation, greedy=True)
    drawn = policy.actor(seed=3)(np.tile(observation, (20_000, 1)), None)
    assert drawn.shape == (20_000, 1)
    assert abs(drawn.mean() - float(mean)) < 5 * np.exp(-1) / 20_000**0.5
    assert drawn.std() == pytest.approx(np.exp(-1), rel=0.03)


def test_images_large_and_small():
    for shape in ((84, 84, 4), (7, 7, 3)):
        space = spaces.Box(0, 255, shape, dtype=np.uint8)
        policy = NetworkPolicy(space, ACTIONS, critic="shared")
        image = np.random.default_rng(0).integers(0, 255, (2, *shape), dtype=np.uint8)
        bright = policy.actor_body(torch.from_numpy(image))
        scaled = policy.actor_body(torch.from_numpy(image).float() / 255)
        torch.testing.assert_close(bright, scaled)
        assert policy.act(image)[0].shape == (2,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic": "twin"}, "critic is 'separate'"),
        ({"activation": "sine"}, "activation is one of tanh"),
        ({"hidden": (8, 0)}, "at least one unit"),
    ],
)
def test_what_makes_no_network_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NetworkPolicy(STATES, ACTIONS, **options)
    with pytest.raises(TypeError, match="has no critic"):
        NetworkPolicy(STATES, ACTIONS, critic=None).state_values(torch.tensor([0]))
    with pytest.raises(TypeError, match="counted from 0"):
        NetworkPolicy(STATES, spaces.Discrete(3, start=1))
    with pytest.raises(TypeError, match="numbered states"):
        NetworkPolicy(spaces.Box(-1, 1, (2,)), ACTIONS).probability_table()
