"""What must hold on an accelerator too; marked ``gpu`` and skipped without one."""

import gymnasium
import numpy as np
import pytest
import torch

from aligngym.agents import DQN, GRPO, PPO, TRPO, EnvironmentSampler, EpisodeSampler, ModelSampler, PolicyIteration
from aligngym.core import NetworkPolicy, QNetwork, TabularPolicy
from aligngym.envs import GridWorld

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]

WORLD = GridWorld("S..\n.#.\n..G", slip=0.3, step_reward=-0.25)


def test_samples_on_a_gpu_follow_the_model():
    mdp = WORLD.mdp
    sampler = ModelSampler(WORLD, num_envs=20_000, steps=20, max_episode_steps=9, device="cuda")
    rows = sampler.sample(TabularPolicy.for_env(WORLD).to("cuda"), seed=0).to("cpu")
    counts = np.zeros((mdp.num_states * mdp.num_actions, mdp.num_states))
    pairs = (rows.observations * mdp.num_actions + rows.actions).flatten().numpy()
    np.add.at(counts, (pairs, rows.next_observations.flatten().numpy()), 1)
    visits, expected = counts.sum(axis=1, keepdims=True), mdp.transitions.toarray()
    error = np.sqrt(expected * (1 - expected) / np.maximum(visits, 1))
    assert (np.abs(counts / np.maximum(visits, 1) - expected) <= 5 * error + 1e-12)[visits[:, 0] > 0].all()
    assert torch.equal(rows.terminated, torch.as_tensor(mdp.terminal)[rows.next_observations])
    assert sampler.metrics["length"] <= 9


@pytest.mark.parametrize("kind", ["table", "network"])
def test_ppo_reaches_the_optimum_without_leaving_the_gpu(kind, tmp_path):
    exact = PolicyIteration(WORLD, discount=0.95).learn(progress=False)
    make = {"table": lambda: TabularPolicy.for_env(WORLD, critic=True), "network": lambda: NetworkPolicy.for_env(WORLD)}

    def agent():
        sampler = ModelSampler(WORLD, num_envs=1024, steps=16, max_episode_steps=50, device="cuda")
        return PPO(make[kind]().to("cuda"), sampler, discount=0.95, learning_rate=0.02, minibatch_size=4096)

    learned = agent().learn(60, progress=False)
    table = learned.policy.probability_table().cpu().numpy()
    best = float(exact.mdp.initial @ exact.values)
    assert exact.mdp.initial @ exact.mdp.evaluate(table, 0.95) > best - 0.03 * abs(best)
    learned.save(tmp_path / "agent.safetensors")
    other = agent().load(tmp_path / "agent.safetensors")
    np.testing.assert_array_equal(other.policy.probability_table().cpu().numpy(), table)
    one, two = learned.sampler.sample(learned.policy, 5), other.sampler.sample(other.policy, 5)
    assert torch.equal(one.next_observations, two.next_observations)


@pytest.mark.parametrize("kind", ["ppo", "trpo", "grpo", "dqn"])
def test_an_agent_on_a_gpu_sees_a_simulator_on_the_processor(kind):
    """Its first losses are those of the same agent on the processor."""

    def metrics(device):
        env = gymnasium.make("CartPole-v1")
        if kind == "dqn":
            policy = QNetwork.for_env(env, seed=1).to(device)
            agent = DQN(policy, EnvironmentSampler("CartPole-v1", steps=20), learning_starts=64, initial_epsilon=1.0)
        elif kind == "grpo":
            policy = NetworkPolicy.for_env(env, critic=None, seed=1).to(device)
            agent = GRPO(policy, EpisodeSampler("CartPole-v1", episodes=8, group_size=4))
        else:
            policy = NetworkPolicy.for_env(env, seed=1).to(device)
            agent = {"ppo": PPO, "trpo": TRPO}[kind](policy, EnvironmentSampler("CartPole-v1", steps=64))
        return agent.iterate(), agent

    found, agent = metrics("cuda")
    assert next(agent.policy.parameters()).is_cuda
    assert all(np.isfinite(value) for value in found.values())
    known, _ = metrics("cpu")
    assert known.keys() == found.keys()
