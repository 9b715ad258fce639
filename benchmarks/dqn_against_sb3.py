"""DQN until it plays well: ours beside Stable-Baselines3's, on one core.

    python benchmarks/dqn_against_sb3.py [--seeds 5] [--environment FrozenLake-v1 GridWorld-7x7 CartPole-v1]
        [--settings default tuned] [--sides sb3 ours] [--csv FILE]

The tasks, the clock, what counts as a good policy and the tables are those of ``ppo_against_sb3.py``; the policy here
is the greedy one. It is judged every hundred steps on the small tasks and every thousand on CartPole. Equal settings
mean equal work: an update on as many transitions as often as the other side. ``default`` are the settings of
Stable-Baselines3; ``tuned`` are for CartPole those of rl-zoo3, and elsewhere still to be found.

Stable-Baselines3 plays with its own number of copies: one by default, which is also what rl-zoo3 takes for CartPole.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ppo_against_sb3 import Run, Task, judge_after_updates, run_benchmark

#: Environment steps after which a run is given up; exploration falls over these.
LIMITS = {"FrozenLake-v1": 100_000, "GridWorld-7x7": 50_000, "CartPole-v1": 50_000}

#: What Stable-Baselines3 is given; where nothing is given, its defaults count.
SB3_SETTINGS: dict[str, dict[str, Any]] = {
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


def ours(algorithm: str, task: Task, settings: str, seed: int, run: Run) -> None:
    """Learn with the agent of this project until ``run.check(steps, policy)`` is true after an update."""
    raise SystemExit("to be written")


def main() -> None:
    """Compare on every task and print the tables."""
    limits = {("DQN", name): limit for name, limit in LIMITS.items()}
    run_benchmark(__doc__.splitlines()[0], {"sb3": sb3, "ours": ours}, limits, kinds=("greedy",), every=100)


if __name__ == "__main__":
    main()
