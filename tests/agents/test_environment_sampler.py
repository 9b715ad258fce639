"""What samplers bring back, beside the same steps taken one by one, and the model."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from aligngym.agents import EnvironmentSampler, EpisodeSampler, ModelSampler, model_sampler
from aligngym.core import PADDING, NetworkPolicy, TabularPolicy
from aligngym.core.compilation import interpreted
from aligngym.core.markov_policy import MarkovPolicy
from aligngym.envs import GridWorld, TabularMDP, VectorTabularEnv, vectorize
from aligngym.envs.copies import Copies

MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]
WORLD = GridWorld("S..\n.#.\n..G", slip=0.3, step_reward=-0.25)
LIMIT = 7


class Scripted(MarkovPolicy):
    """Takes the actions of a script, one after the other."""

    def __init__(self, observation_space, action_space, script):
        super().__init__(observation_space, action_space)
        self.script = script
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def outputs(self, observations):
        return torch.zeros(len(observations), self.num_actions)

    reference_outputs = outputs

    def save(self, path):
        raise NotImplementedError

    def actor(self, seed):
        steps = iter(self.script)
        return lambda observations, allowed: next(steps)


def copies_of(make, n, mode):
    return SyncVectorEnv([make] * n, autoreset_mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["ours", "sync"])
def test_every_step_is_one_of_the_environment(mode, kind):
    """Each copy's real steps are those of a single environment with the same seed and actions, ends included."""
    n, steps = 3, 60
    if kind == "ours":
        env = VectorTabularEnv(WORLD, n, max_episode_steps=LIMIT, autoreset_mode=mode)
    else:
        env = copies_of(lambda: TimeLimit(GridWorld("S..\n.#.\n..G", slip=0.3, step_reward=-0.25), LIMIT), n, mode)
    script = np.random.default_rng(0).choice(4, size=(steps, n), p=[0.1, 0.4, 0.4, 0.1])
    policy = Scripted(spaces.Discrete(9), spaces.Discrete(4), script)
    rows = EnvironmentSampler(env, steps=steps).sample(policy, seed=5)
    assert rows.truncated.any()
    assert rows.terminated.any()
    assert rows.mask.all() == (mode is not AutoresetMode.NEXT_STEP)
    for copy in range(n):
        single = TimeLimit(GridWorld("S..\n.#.\n..G", slip=0.3, step_reward=-0.25), LIMIT)
        observation, _ = single.reset(seed=5 + copy)
        for t in range(steps):
            if not rows.mask[copy, t]:
                assert rows.observations[copy, t] == PADDING
                continue
            assert rows.observations[copy, t] == observation
            following, reward, terminated, truncated, _ = single.step(int(script[t, copy]))
            assert rows.next_observations[copy, t] == following
            assert rows.rewards[copy, t] == np.float32(reward)
            assert (bool(rows.terminated[copy, t]), bool(rows.truncated[copy, t])) == (terminated, truncated)
            observation = single.reset()[0] if terminated or truncated else following


@pytest.mark.parametrize("mode", MODES)
def test_box_observations_and_the_value_after_a_cut(mode):
    """CartPole under the three modes: next_values is V of what was shown, where an episode is cut and only there."""
    env = copies_of(lambda: TimeLimit(gymnasium.make("CartPole-v1").unwrapped, 9), 4, mode)
    policy = NetworkPolicy.for_env(env, seed=1)
    sampler = EnvironmentSampler(env, steps=25)
    rows = sampler.sample(policy, seed=0)
    values = policy(rows).values.detach()
    following = policy.next_values(rows, values)
    exact = policy.state_values(rows.next_observations.flatten(0, 1)).view(following.shape).detach()
    wanted = rows.mask & ~rows.terminated
    torch.testing.assert_close(following[wanted], exact[wanted])
    assert (rows.truncated & rows.mask).any()
    # Within an episode what is shown next is what is seen next.
    inside = (wanted & ~rows.truncated)[:, :-1] & rows.mask[:, 1:]
    torch.testing.assert_close(rows.next_observations[:, :-1][inside], rows.observations[:, 1:][inside])


def test_the_loop_is_the_same_compiled_and_interpreted(monkeypatch):
    policy, results = TabularPolicy.for_env(WORLD), []
    for roll in (model_sampler.roll, interpreted(model_sampler.roll)):
        monkeypatch.setattr(model_sampler, "roll", roll)
        sampler = ModelSampler(WORLD, num_envs=5, steps=40, max_episode_steps=LIMIT)
        results.append((sampler.sample(policy, 1), sampler.sample(policy, 2), sampler.metrics))
    for one, other in zip(*(result[:2] for result in results), strict=True):
        assert torch.equal(one.next_observations, other.next_observations)
        assert torch.equal(one.rewards, other.rewards)
    assert results[0][2] == results[1][2]


def test_metrics_are_those_of_gymnasium():
    env = RecordEpisodeStatistics(
        copies_of(lambda: TimeLimit(gymnasium.make("CartPole-v1").unwrapped, 20), 4, MODES[0])
    )
    sampler = EnvironmentSampler(env, steps=200)
    sampler.sample(NetworkPolicy.for_env(env), seed=0)
    assert sampler.metrics["return"] == pytest.approx(np.mean(env.return_queue))
    assert sampler.metrics["length"] == pytest.approx(np.mean(env.length_queue))


@pytest.mark.parametrize("env", [WORLD, "CartPole-v1", "FrozenLake-v1", "Pendulum-v1"], ids=str)
def test_a_sampler_comes_back_exactly(env):
    """Three samples, saved, and a fourth: the same from the one that went on and from one brought back."""

    def make():
        return EnvironmentSampler(env, num_envs=3, steps=30)

    one = make()
    policy = NetworkPolicy.for_env(one.env)
    for seed in range(3):
        one.sample(policy, seed)
    other = make()
    other.load_state_dict(one.state_dict())
    first, second = one.sample(policy, 7), other.sample(policy, 7)
    for name in ("observations", "actions", "rewards", "next_observations", "terminated", "truncated", "mask"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert one.metrics == other.metrics


def test_a_group_shares_its_start_and_its_luck():
    env = GridWorld("S.S\n.#.\n..G", slip=0.5)
    sampler = EpisodeSampler(env, episodes=12, group_size=3, max_steps=20)
    rows = sampler.sample(TabularPolicy.for_env(env), seed=1)
    starts = rows.observations[:, 0].view(4, 3)
    assert (starts == starts[:, :1]).all()
    assert len(starts[:, 0].unique()) == 2
    assert rows.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    # The same actions from the same start lead to the same places.
    still = Scripted(spaces.Discrete(9), spaces.Discrete(4), np.ones((20, 12), dtype=np.int64))
    same = sampler.sample(still, seed=1)
    assert torch.equal(same.next_observations[0], same.next_observations[1])
    again = sampler.sample(TabularPolicy.for_env(env), seed=1)
    assert torch.equal(again.actions, rows.actions)


@pytest.mark.parametrize("mode", MODES)
def test_episodes_are_whole(mode):
    env = VectorTabularEnv(WORLD, 8, max_episode_steps=12, autoreset_mode=mode)
    rows = EpisodeSampler(env, episodes=8).sample(TabularPolicy.for_env(WORLD), seed=0)
    ends = rows.terminated | rows.truncated
    last = rows.lengths - 1
    assert (ends.sum(1) == 1).all()
    assert ends[torch.arange(8), last].all()
    steps = torch.arange(rows.mask.shape[1])
    assert torch.equal(rows.mask, steps <= last[:, None])
    assert (rows.rewards[~rows.mask] == 0).all()
    assert int(rows.lengths.max()) == rows.mask.shape[1] <= 12
    short = EpisodeSampler(env, episodes=8, max_steps=3).sample(TabularPolicy.for_env(WORLD), seed=0)
    assert short.mask.shape[1] == 3
    assert (short.truncated[:, 2] | short.terminated.any(1)).all()


@pytest.mark.parametrize("path", ["loop", "interpreted", "tensors"])
def test_samples_follow_the_model(path, monkeypatch):
    """Frequencies of what follows each state and action, against their probabilities; ends where they belong."""
    if path == "tensors":
        monkeypatch.setattr(ModelSampler, "_in_a_loop", ModelSampler._in_tensors)
    elif path == "interpreted":
        monkeypatch.setattr(model_sampler, "roll", interpreted(model_sampler.roll))
    copies = 400 if path == "interpreted" else 4000
    mdp = TabularMDP.from_env(WORLD)
    sampler = ModelSampler(WORLD, num_envs=copies, steps=30, max_episode_steps=LIMIT)
    policy = TabularPolicy.for_env(WORLD)
    rows = sampler.sample(policy, seed=0)
    counts = np.zeros((mdp.num_states * mdp.num_actions, mdp.num_states))
    pairs = (rows.observations * mdp.num_actions + rows.actions).flatten().numpy()
    np.add.at(counts, (pairs, rows.next_observations.flatten().numpy()), 1)
    visits = counts.sum(axis=1, keepdims=True)
    expected = mdp.transitions.toarray()
    error = np.sqrt(expected * (1 - expected) / np.maximum(visits, 1))
    assert (np.abs(counts / np.maximum(visits, 1) - expected) <= 5 * error + 1e-12)[visits[:, 0] > 0].all()
    assert torch.equal(rows.terminated, torch.as_tensor(mdp.terminal)[rows.next_observations])
    over = rows.terminated | rows.truncated
    assert torch.equal(rows.observations[:, 1:][~over[:, :-1]], rows.next_observations[:, :-1][~over[:, :-1]])
    assert (rows.observations[:, 1:][over[:, :-1]] == int(mdp.initial.argmax())).all()
    lengths = torch.zeros(copies)
    for t in range(30):
        lengths += 1
        assert torch.equal(rows.truncated[:, t], (lengths == LIMIT) & ~rows.terminated[:, t])
        lengths[over[:, t]] = 0
    drawn = rows.actions.flatten().bincount(minlength=4) / rows.actions.numel()
    assert (drawn - 0.25).abs().max() < 5 * (0.25 * 0.75 / rows.actions.numel()) ** 0.5
    # It goes on from where it was, also when it is brought back.
    other = ModelSampler(WORLD, num_envs=copies, steps=30, max_episode_steps=LIMIT)
    other.load_state_dict(sampler.state_dict())
    first, second = sampler.sample(policy, 1), other.sample(policy, 1)
    assert torch.equal(first.next_observations, second.next_observations)
    assert sampler.metrics == other.metrics
    assert torch.equal(
        first.observations[:, 0] == int(mdp.initial.argmax()),
        over[:, -1] | (first.observations[:, 0] == int(mdp.initial.argmax())),
    )


class Odd(gymnasium.Env):
    """Shows and pays what a test wants it to, from a step on."""

    def __init__(self, reward=0.0, observation=0.0, after=3, space=None):
        self.observation_space = space or spaces.Box(-10, 10, (2,))
        self.action_space = spaces.Discrete(2)
        self.reward, self.observation, self.after = reward, observation, after

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.show(0.0), {}

    def show(self, value):
        return np.array([0.0, value], dtype=np.float32)

    def step(self, action):
        self.time += 1
        odd = self.time >= self.after
        return self.show(self.observation if odd else 0.0), self.reward if odd else 0.0, False, False, {}


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"reward": float("nan")}, "copy 0 paid nan in step 3 after its reset"),
        ({"reward": float("inf")}, "copy 0 paid inf in step 3"),
        ({"observation": float("nan")}, r"copy 0 showed nan at place \[1\] of its observation in step 3"),
        ({"observation": float("-inf")}, r"copy 0 showed -inf at place \[1\]"),
    ],
)
def test_what_is_not_finite_stops_the_run_and_says_where(odd, message):
    sampler = EnvironmentSampler(lambda: Odd(**odd), num_envs=2, steps=10)
    with pytest.raises(FloatingPointError, match=message):
        sampler.sample(NetworkPolicy.for_env(sampler.env), seed=0)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"reset": lambda self, **_: np.zeros(2, np.float32)}, r"reset of .* returned array\(\[0., 0.\].*, not \(obs"),
        ({"reset": lambda self, **_: (np.zeros(3, np.float32), {})}, r"reset of .* showed .* which is not in its Box"),
        ({"step": lambda self, a: (np.zeros(2), 0.0, False, {})}, r"step of .* not \(observation, reward, terminated"),
        ({"step": lambda self, a: (np.zeros(2), None, False, False, {})}, "paid None, which is no number"),
        ({"step": lambda self, a: (np.zeros(2), "1", False, False, {})}, "paid '1', which is no number"),
        ({"step": lambda self, a: (np.zeros(2), 0.0, "no", False, {})}, "terminated='no', truncated=False"),
        ({"step": lambda self, a: (np.zeros(2), 0.0, False, False, None)}, "None for an info"),
        ({"step": lambda self, a: (np.zeros(5), 0.0, False, False, {})}, "step of .* showed .* not in its Box"),
    ],
)
def test_an_environment_that_breaks_the_interface_is_refused(broken, message):
    with pytest.raises(ValueError, match=message):
        EnvironmentSampler(type("Broken", (Odd,), broken), num_envs=2)


def test_an_environment_without_spaces_is_refused():
    odd = Odd()
    odd.observation_space = None
    with pytest.raises(TypeError, match=r"observation_space of .* is None, which is no space"):
        EnvironmentSampler(odd)


class Dictionary(Odd):
    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Dict(
            {
                "where": spaces.Box(-1, 1, (2, 2)),
                "what": spaces.Discrete(3, start=1),
                "which": spaces.MultiDiscrete([2, 3]),
                "action_mask": spaces.MultiBinary(2),
            }
        )

    def show(self, value):
        return {
            "where": np.full((2, 2), self.time / 10, dtype=np.float32),
            "what": np.int64(1 + self.time % 3),
            "which": np.array([1, 2]),
            "action_mask": np.array([1, self.time % 2], dtype=np.int8),
        }


def test_dictionaries_become_vectors_and_masks():
    sampler = EnvironmentSampler(Dictionary, num_envs=2, steps=5)
    policy = NetworkPolicy.for_env(sampler.env)
    rows = sampler.sample(policy, seed=0)
    # In the order of the space's keys: what (one-hot), where (flat), which (one-hots); the mask is no observation.
    assert rows.observations.shape == (2, 5, 3 + 4 + 5)
    assert rows.observations[0, 2].tolist() == pytest.approx([0, 0, 1] + [0.2] * 4 + [0, 1, 0, 0, 1])
    assert rows.action_mask[0].tolist() == [[True, t % 2 == 1] for t in range(5)]
    assert rows.next_action_mask[0].tolist() == [[True, t % 2 == 0] for t in range(5)]
    assert (rows.actions[:, ::2] == 0).all()
    assert (policy(rows).log_probs[:, ::2] == 0).all()


@pytest.mark.parametrize("mode", MODES[1:])
def test_after_an_episode_nothing_is_forbidden(mode):
    """What the next episode begins with says nothing about the state that the last one ended in."""
    env = copies_of(lambda: TimeLimit(Dictionary(), 3), 2, mode)
    rows = EnvironmentSampler(env, steps=7).sample(NetworkPolicy.for_env(env), seed=0)
    assert rows.truncated[0].tolist() == [False, False, True] * 2 + [False]
    assert rows.next_action_mask[0, 2].all()
    assert rows.action_mask[0].tolist() == [[True, t % 3 == 1] for t in range(7)]


def test_continuous_actions_are_clipped_in_the_environment_alone():
    sampler = EnvironmentSampler("Pendulum-v1", num_envs=2, steps=20)
    policy = NetworkPolicy.for_env(sampler.env, log_std=2.0)
    rows = sampler.sample(policy, seed=0)
    assert rows.actions.abs().max() > 2
    known = policy.distribution(rows).log_prob(rows.actions)
    torch.testing.assert_close(policy(rows).log_probs, known)


def test_images_go_through_convolutions_as_bytes():
    space = spaces.Box(0, 255, (8, 8, 3), dtype=np.uint8)

    class Images(Odd):
        def show(self, value):
            return np.full((8, 8, 3), self.time * 20, dtype=np.uint8)

    sampler = EnvironmentSampler(lambda: Images(space=space), num_envs=2, steps=4)
    rows = sampler.sample(NetworkPolicy.for_env(sampler.env, critic="shared"), seed=0)
    assert rows.observations.dtype == torch.uint8
    assert rows.observations[0, :, 0, 0, 0].tolist() == [0, 20, 40, 60]


def test_what_cannot_be_sampled_is_refused():
    with pytest.raises(ValueError, match="steps is how many"):
        EnvironmentSampler(WORLD, steps=0)
    with pytest.raises(ValueError, match="do not divide into groups"):
        EpisodeSampler(WORLD, episodes=10, group_size=4)
    with pytest.raises(ValueError, match="need as many copies"):
        EpisodeSampler(VectorTabularEnv(WORLD, 4), episodes=8)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        vectorize(WORLD, 0)
    with pytest.raises(ValueError, match="given by name"):
        vectorize(WORLD, 2, slip=0.1)
    with pytest.raises(TypeError, match="an environment, its name"):
        vectorize(3)
    odd = Odd()
    odd.action_space = spaces.MultiDiscrete([2, 2])
    env = SyncVectorEnv([lambda: odd])
    with pytest.raises(TypeError, match=r"MultiDiscrete\(\[2 2\]\): wrap it"):
        Copies(env)
    with pytest.raises(TypeError, match=r"not in MultiBinary\(3\)"):
        NetworkPolicy(spaces.Discrete(3), spaces.MultiBinary(3))
    with pytest.raises(TypeError, match="cannot be made a vector of numbers"):
        NetworkPolicy(spaces.Text(5), spaces.Discrete(3))


def test_copies_of_a_modelled_environment_are_tables_and_of_others_what_they_are():
    made = gymnasium.make("aligngym/GridWorld-v0", max_episode_steps=9)
    assert isinstance(vectorize(made, 3), VectorTabularEnv)
    assert vectorize(made, 3).max_episode_steps == 9
    assert isinstance(vectorize("aligngym/CliffWalking-v0", 3), VectorTabularEnv)
    wrapped = gymnasium.wrappers.TransformReward(made, lambda reward: 2 * reward)
    assert isinstance(vectorize(wrapped, 3), SyncVectorEnv)
    assert isinstance(vectorize("FrozenLake-v1", 2), SyncVectorEnv)
    assert type(vectorize("CartPole-v1", 2)).__name__ == "CartPoleVectorEnv"
