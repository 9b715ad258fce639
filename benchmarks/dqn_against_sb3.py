"""DQN until it plays well: ours beside Stable-Baselines3's, on one core.

    python benchmarks/dqn_against_sb3.py [--seeds 5] [--environment FrozenLake-v1 GridWorld-7x7 CartPole-v1]
        [--settings default tuned] [--sides sb3 ours] [--csv FILE]

The tasks, the clock, what counts as a good policy and the tables are those of ``ppo_against_sb3.py``; the policy here
is the greedy one. It is judged every hundred steps on the small tasks and every thousand on CartPole. ``default`` is
what either side does if nothing is said. ``tuned`` looks at eight transitions for every step on the small tasks, on
either side; ours takes fewer and larger batches, a table on the lake, and double three-step targets on the grid. On
CartPole Stable-Baselines3 has rl-zoo3's settings, 32 transitions for every step, and so has ours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ppo_against_sb3 import Run, Task, judge_after_updates, run_benchmark

from aligngym.agents import DQN, EnvironmentSampler
from aligngym.core import Decay, QNetwork

#: Environment steps after which a run is given up; exploration falls over these.
LIMITS = {"FrozenLake-v1": 100_000, "GridWorld-7x7": 50_000, "CartPole-v1": 50_000}

#: What Stable-Baselines3 is given; where nothing is given, its defaults count.
SMALL = {
    "n_envs": 8,
    "learning_rate": 3e-3,
    "batch_size": 128,
    "train_freq": 4,
    "gradient_steps": 2,
    "learning_starts": 500,
    "target_update_interval": 320,
    "max_grad_norm": 10.0,
}
SB3_SETTINGS: dict[str, dict[str, Any]] = {
    "FrozenLake-v1": SMALL | {"exploration_fraction": 0.05},
    "GridWorld-7x7": SMALL | {"exploration_fraction": 0.1},
    # rl-zoo3, hyperparams/dqn.yml
    "CartPole-v1": {
        "learning_rate": 2.3e-3,
        "batch_size": 64,
        "buffer_size": 100_000,
        "learning_starts": 1000,
        "gamma": 0.99,
        "target_update_interval": 10,
        "train_freq": 256,
        "gradient_steps": 128,
        "exploration_fraction": 0.16,
        "exploration_final_eps": 0.04,
        "policy_kwargs": {"net_arch": [256, 256]},
    },
}


def sb3(algorithm: str, task: Task, settings: str, seed: int, run: Run) -> None:
    """Learn with Stable-Baselines3 until the run is over."""
    from stable_baselines3 import DQN
    from stable_baselines3.common.vec_env import DummyVecEnv

    given = dict(SB3_SETTINGS.get(task.name, {})) if settings == "tuned" else {}
    copies = given.pop("n_envs", 1)
    # Its Monitor would cost time and is not needed here.
    env = DummyVecEnv([task.make] * copies)
    model = DQN("MlpPolicy", env, seed=seed, device="cpu", **given)

    def policy(observations: NDArray[Any]) -> NDArray[Any]:
        with torch.no_grad():
            values = model.q_net(torch.as_tensor(observations)).numpy()
        return np.eye(values.shape[1])[values.argmax(axis=1)]

    model.learn(LIMITS[task.name], callback=judge_after_updates(run, policy))
    env.close()


#: What ours is given; ``num_envs`` and ``steps`` go to the sampler, ``hidden`` to the network.
OUR_SMALL = {"num_envs": 8, "steps": 8, "learning_starts": 512, "epsilon_steps": 5000}
OUR_SETTINGS: dict[str, dict[str, Any]] = {
    "FrozenLake-v1": OUR_SMALL
    | {"hidden": (), "learning_rate": 0.05, "batch_size": 512, "gradient_steps": 1, "target_every": 5},
    "GridWorld-7x7": OUR_SMALL
    | {
        "learning_rate": 3e-3,
        "batch_size": 256,
        "gradient_steps": 2,
        "target_every": 10,
        "double": True,
        "n": 3,
        "final_epsilon": 0.15,
    },
    "CartPole-v1": {
        "num_envs": 8,
        "steps": 8,
        "hidden": (128, 128),
        "learning_rate": Decay(2.5e-3, 782),
        "batch_size": 128,
        "gradient_steps": 16,
        "target_every": 1,
        "target_rate": 0.01,
        "double": True,
        "n": 3,
        "epsilon_steps": 8000,
        "final_epsilon": 0.04,
    },
}


def ours(algorithm: str, task: Task, settings: str, seed: int, run: Run) -> None:
    """Learn with the agent of this project until ``run.check(steps, policy)`` is true after an update."""
    given = dict(OUR_SETTINGS[task.name]) if settings == "tuned" else {"num_envs": 1, "steps": 4}
    sampler = EnvironmentSampler(task.copies, num_envs=given.pop("num_envs"), steps=given.pop("steps"))
    network = QNetwork.for_env(sampler.env, hidden=given.pop("hidden", (64, 64)), seed=seed)
    agent = DQN(network, sampler, seed=seed, **given)

    def policy(observations: NDArray[Any]) -> NDArray[Any]:
        with torch.no_grad():
            values = network.outputs(torch.as_tensor(observations)).numpy()
        return np.eye(values.shape[1])[values.argmax(axis=1)]

    over = False
    while not over:
        agent.learn(1, progress=False)
        over = run.check(agent.environment_steps, policy)


def main() -> None:
    """Compare on every task and print the tables."""
    limits = {("DQN", name): limit for name, limit in LIMITS.items()}
    run_benchmark(__doc__.splitlines()[0], {"sb3": sb3, "ours": ours}, limits, kinds=("greedy",), every=100)


if __name__ == "__main__":
    main()
