"""PPO and A2C until they play well: ours beside Stable-Baselines3's, on one core with eight copies of an environment.

    python benchmarks/ppo_against_sb3.py [--seeds 5] [--environment FrozenLake-v1 GridWorld-7x7 CartPole-v1]
        [--algorithms PPO A2C] [--settings default tuned] [--sides sb3 ours] [--csv FILE]

Stable-Baselines3 has to be there: ``pip install -c constraints.txt stable-baselines3``.

A run plays and learns until its policy is good enough, or its steps or a minute are spent. After every update the
clock is stopped and the policy is judged. On FrozenLake (4 × 4, slippery) and on a 7 × 7 grid that is done exactly:
π(a | s) of every state goes into the model, and the policy is good if its expected return with γ = 0.99 from the first
state, without a time limit, is at least 95 % of the best one, known from policy iteration. Both the policy that draws
its actions, as it plays while it learns, and the greedy one, which takes the likeliest, have to get there. CartPole has
no such model: there the greedy policy plays 20 episodes every thousand steps and has to reach a mean return of 475.

Reported are environment steps per second of the whole run, learning included, and steps and seconds to a good policy:
the median of the seeds, with the least and the most. Seconds are those of the processor, since other programs may use
the machine; wall-clock time stands beside them. They begin before the environments are made. The sides take turns,
seed by seed, after a short run of each that imports and compiles what is needed. ``default`` is what either
side does if nothing is said; ``tuned`` are the settings below: for CartPole Stable-Baselines3 has those of rl-zoo3, on
the grid the fastest of some two dozens that were tried, on FrozenLake of a dozen. Without settings of its own,
``tuned`` is ``default``. Ours by default plays in Gymnasium's simulators, as Stable-Baselines3 does; tuned, it draws
the steps of the two small tasks from their models (``ModelSampler``), which it can and the other cannot.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

import aligngym.envs  # noqa: F401 (registers the grid)
from aligngym.agents import A2C, PPO, EnvironmentSampler, ModelSampler, PolicyIteration
from aligngym.core import Decay, MarkovPolicy, NetworkPolicy, TabularPolicy
from aligngym.envs import TabularMDP

COPIES, DISCOUNT, SHARE = 8, 0.99, 0.95
CARTPOLE_GOAL, CARTPOLE_EPISODES = 475.0, 20
#: Seconds of the processor after which a run is given up.
PATIENCE = 60.0
GRID = "S......\n..#.##.\n..#..#.\n.##....\n....##.\n.##....\n...#..G"

#: π: observations ``[N, …]`` to the probabilities of the actions, ``[N, A]``; both sides show their policy so.
Policy = Callable[[NDArray[Any]], NDArray[Any]]

#: A side learns: algorithm, task, settings ("default" or "tuned"), seed, run.
Side = Callable[[str, "Task", str, int, "Run"], None]


class Task:
    """An environment whose model is known: what a good policy is, exactly.

    Attributes:
        name: as ``--environment`` has it.
        make: makes one copy, with its time limit.
        every: least steps from one judgement to the next; 0 judges after every update.
    """

    every = 0

    def __init__(self, name: str, identifier: str, **arguments: Any) -> None:
        self.name = name
        #: What our sampler makes copies of: the same environment, or its authors' vectorised form.
        self.copies = identifier if not arguments else gymnasium.make(identifier, **arguments)
        self.make = partial(gymnasium.make, identifier, disable_env_checker=True, **arguments)

    @cached_property
    def mdp(self) -> TabularMDP:
        return TabularMDP.from_env(self.make())

    @cached_property
    def best(self) -> float:
        """The expected return of an optimal policy."""
        planner = PolicyIteration(self.mdp, DISCOUNT).learn(progress=False)
        return float(planner.values @ self.mdp.initial)

    @property
    def goals(self) -> dict[str, float]:
        """What the policy has to be worth if it draws its actions, and if it takes the likeliest."""
        return {"drawn": SHARE * self.best, "greedy": SHARE * self.best}

    def score(self, policy: Policy) -> dict[str, float]:
        """Return Σ_s p₀(s) V_π(s), exactly, for the policy that draws its actions and for the greedy one."""
        probabilities = np.asarray(policy(np.arange(self.mdp.num_states)), dtype=np.float64)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        greedy = np.eye(self.mdp.num_actions)[probabilities.argmax(axis=1)]
        kinds = {"drawn": probabilities, "greedy": greedy}
        return {kind: float(self.mdp.evaluate(each, DISCOUNT) @ self.mdp.initial) for kind, each in kinds.items()}


class CartPole(Task):
    """CartPole-v1, judged by the mean return of greedy episodes."""

    every = 1000
    goals = {"greedy": CARTPOLE_GOAL}  # noqa: RUF012

    def score(self, policy: Policy) -> dict[str, float]:
        """Return the mean of 20 episodes with random numbers of their own."""
        env = gymnasium.make_vec("CartPole-v1", CARTPOLE_EPISODES, vectorization_mode="vector_entry_point")
        observations, _ = env.reset(seed=12345)
        returns, running = np.zeros(CARTPOLE_EPISODES), np.ones(CARTPOLE_EPISODES, dtype=bool)
        while running.any():
            actions = np.asarray(policy(observations)).argmax(axis=1)
            observations, rewards, terminated, truncated, _ = env.step(actions)
            returns += rewards * running
            running &= ~(terminated | truncated)
        return {"greedy": float(returns.mean())}


TASKS = {
    task.name: task
    for task in (
        Task("FrozenLake-v1", "FrozenLake-v1"),
        Task(
            "GridWorld-7x7",
            "aligngym/GridWorld-v0",
            map=GRID,
            step_reward=-0.01,
            boundary_reward=-0.01,
            max_episode_steps=100,
        ),
        CartPole("CartPole-v1", "CartPole-v1"),
    )
}


@dataclass
class Run:
    """One learning run: its clock, which stands still while the policy is judged, and what was reached when.

    Attributes:
        task: what is learnt.
        goals: what the policy has to be worth, by the way it acts, "drawn" or "greedy".
        limit: environment steps after which the run is given up; it also is after :data:`PATIENCE` seconds.
        every: least steps from one judgement to the next.
        steps: environment steps so far, of all copies together.
        seconds: of the processor.
        wall: seconds on the wall.
        curve: steps, seconds and scores at every judgement.
        reached: for each goal steps, seconds and wall-clock seconds when it was first reached; infinite before.
    """

    task: Task
    goals: dict[str, float]
    limit: int
    every: int = 0
    steps: int = 0
    seconds: float = 0.0
    wall: float = 0.0

    def __post_init__(self) -> None:
        self.curve: list[tuple[int, float, dict[str, float]]] = []
        self.reached = {kind: (float("inf"),) * 3 for kind in self.goals}

    def start(self) -> None:
        """Start the clock or let it go on."""
        self._since = time.process_time(), time.perf_counter()

    def check(self, steps: int, policy: Policy) -> bool:
        """Stop the clock, judge the policy after so many steps, let the clock go on; return whether the run is over."""
        self.seconds += time.process_time() - self._since[0]
        self.wall += time.perf_counter() - self._since[1]
        self.steps = steps
        if not self.curve or steps - self.curve[-1][0] >= self.every:
            scores = self.task.score(policy)
            self.curve.append((steps, self.seconds, scores))
            for kind, goal in self.goals.items():
                if scores[kind] >= goal and np.isinf(self.reached[kind][0]):
                    self.reached[kind] = (steps, self.seconds, self.wall)
        self.start()
        return self.over

    @property
    def over(self) -> bool:
        """Whether every goal is reached, or steps or patience are spent."""
        done = all(np.isfinite(steps) for steps, *_ in self.reached.values())
        return done or self.steps >= self.limit or self.seconds >= PATIENCE

    @property
    def rate(self) -> float:
        """Steps per second of the processor."""
        return self.steps / self.seconds


def linear(start: float) -> Callable[[float], float]:
    """Return the schedule from ``start`` down to 0 that rl-zoo3 calls ``lin_…``."""
    return lambda remaining: start * remaining


#: Environment steps after which a run is given up; where a schedule falls, it falls over these.
LIMITS = {
    ("PPO", "FrozenLake-v1"): 500_000,
    ("PPO", "GridWorld-7x7"): 200_000,
    ("PPO", "CartPole-v1"): 100_000,
    ("A2C", "FrozenLake-v1"): 200_000,
    ("A2C", "GridWorld-7x7"): 200_000,
    ("A2C", "CartPole-v1"): 500_000,
}

#: What Stable-Baselines3 is given; where nothing is given, its defaults count.
SB3_SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("PPO", "FrozenLake-v1"): {
        "n_steps": 256,
        "batch_size": 2048,
        "n_epochs": 8,
        "learning_rate": 0.1,
        "gamma": 0.98,
        "gae_lambda": 0.98,
        "vf_coef": 1.0,
        "policy_kwargs": {"net_arch": []},
    },
    ("PPO", "GridWorld-7x7"): {
        "n_steps": 64,
        "batch_size": 128,
        "n_epochs": 4,
        "learning_rate": 0.03,
        "ent_coef": 0.01,
        "gamma": 0.95,
        "gae_lambda": 0.98,
        "max_grad_norm": 5.0,
        "policy_kwargs": {"net_arch": []},
    },
    # rl-zoo3, hyperparams/ppo.yml
    ("PPO", "CartPole-v1"): {
        "n_steps": 32,
        "batch_size": 256,
        "n_epochs": 20,
        "gae_lambda": 0.8,
        "gamma": 0.98,
        "ent_coef": 0.0,
        "learning_rate": linear(0.001),
        "clip_range": linear(0.2),
    },
    # rl-zoo3, hyperparams/a2c.yml: eight copies and 5e5 steps
    ("A2C", "CartPole-v1"): {"ent_coef": 0.0},
}


def sb3(algorithm: str, task: Task, settings: str, seed: int, run: Run) -> None:
    """Learn with Stable-Baselines3 until the run is over."""
    import stable_baselines3
    from stable_baselines3.common.vec_env import DummyVecEnv

    given = SB3_SETTINGS.get((algorithm, task.name), {}) if settings == "tuned" else {}
    # Its Monitor would cost time and is not needed here.
    env = DummyVecEnv([task.make] * COPIES)
    model = getattr(stable_baselines3, algorithm)("MlpPolicy", env, seed=seed, device="cpu", **given)

    def policy(observations: NDArray[Any]) -> NDArray[Any]:
        with torch.no_grad():
            return model.policy.get_distribution(torch.as_tensor(observations)).distribution.probs.numpy()

    model.learn(LIMITS[algorithm, task.name], callback=judge_after_updates(run, policy))
    env.close()


def judge_after_updates(run: Run, policy: Policy) -> Any:
    """Return a callback that judges whenever a rollout begins, which is after each update, and ends a run that is over.

    The clock stops for good when the run is over; the one step that is still made before learning ends is not counted.
    """
    from stable_baselines3.common.callbacks import BaseCallback

    class Judge(BaseCallback):
        def _on_rollout_start(self) -> None:
            if not run.over and self.num_timesteps:
                run.check(self.num_timesteps, policy)

        def _on_step(self) -> bool:
            return not run.over

        def _on_training_end(self) -> None:
            if not run.over:
                run.check(self.num_timesteps, policy)

    return Judge()


#: What ours is given. ``sampler`` and ``steps`` go to the sampler, ``hidden`` to the network (none: a table).
OUR_SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("PPO", "FrozenLake-v1"): {
        "sampler": ModelSampler,
        "steps": 512,
        "hidden": None,
        "learning_rate": 0.1,
        "epochs": 4,
        "minibatch_size": None,
        "discount": 0.99,
        "trace": 0.9,
        "max_grad_norm": None,
        "entropy_coefficient": Decay(0.05, 60),
    },
    ("PPO", "GridWorld-7x7"): {
        "sampler": ModelSampler,
        "steps": 256,
        "hidden": None,
        "learning_rate": 0.1,
        "epochs": 4,
        "minibatch_size": None,
        "discount": 0.95,
        "trace": 0.95,
        "max_grad_norm": None,
    },
    ("PPO", "CartPole-v1"): {
        "steps": 32,
        "learning_rate": 2e-3,
        "epochs": 20,
        "minibatch_size": None,
        "discount": 0.98,
        "trace": 0.8,
    },
}


def ours(algorithm: str, task: Task, settings: str, seed: int, run: Run) -> None:
    """Learn with the agent of this project until ``run.check(steps, policy)`` is true after an update."""
    given = dict(OUR_SETTINGS.get((algorithm, task.name), {})) if settings == "tuned" else {}
    env, source = task.make(), given.pop("sampler", EnvironmentSampler)
    steps = {"steps": given.pop("steps")} if "steps" in given else {"steps": 5} if algorithm == "A2C" else {}
    sampler = source(env if source is ModelSampler else task.copies, num_envs=COPIES, **steps)
    hidden = given.pop("hidden", (64, 64))
    network: MarkovPolicy
    if hidden is None:
        network = TabularPolicy.for_env(env, critic=True)
    else:
        network = NetworkPolicy.for_env(env, hidden=hidden, seed=seed)
    agent = {"PPO": PPO, "A2C": A2C}[algorithm](network, sampler, seed=seed, **given)

    def policy(observations: NDArray[Any]) -> NDArray[Any]:
        with torch.no_grad():
            return network.outputs(torch.as_tensor(observations)).softmax(dim=1).numpy()

    over = False
    while not over:
        agent.learn(1, progress=False)
        over = run.check(agent.iteration * COPIES * sampler.steps, policy)


def measure(side: Side, algorithm: str, settings: str, seed: int, run: Run) -> Run:
    """Do one run and return it."""
    gc.collect()
    run.start()
    side(algorithm, run.task, settings, seed, run)
    return run


def report(title: str, runs: dict[str, list[Run]]) -> None:
    """Print one table: for each side and settings a line for each goal."""
    print(f"\n{title:24}{'steps/s':>9}{'wall':>8}{'steps':>11}{'least–most':>17}", end="")
    print(f"{'seconds':>10}{'least–most':>15}{'wall':>8}{'reached':>9}")
    for name, each in runs.items():
        rates = statistics.median(run.rate for run in each), statistics.median(run.steps / run.wall for run in each)
        for kind in each[0].goals:
            steps, seconds, wall = zip(*(run.reached[kind] for run in each), strict=True)
            label = f"  {name}, {kind}"
            print(
                f"{label:24}{rates[0]:9,.0f}{rates[1]:8,.0f}{shown(statistics.median(steps)):>11}{spread(steps):>17}"
                f"{shown(statistics.median(seconds), 2):>10}{spread(seconds, 2):>15}"
                f"{shown(statistics.median(wall), 2):>8}{np.isfinite(steps).sum():5} / {len(each)}",
                flush=True,
            )


def ratios(runs: dict[str, list[Run]]) -> None:
    """Print how many times better ours is than Stable-Baselines3 with the same kind of settings, by the medians."""
    for settings in dict.fromkeys(name.split()[1] for name in runs):
        both = [runs.get(f"{side} {settings}", []) for side in ("sb3", "ours")]
        if not all(both):
            continue
        theirs, mine = (statistics.median(run.rate for run in each) for each in both)
        print(f"  ours, {settings}: {mine / theirs:.1f}× the steps/s", end="")
        for kind in both[0][0].goals:
            theirs, mine = (np.median([run.reached[kind] for run in each], axis=0) for each in both)
            steps, seconds = theirs[:2] / mine[:2]
            print(f"; {kind}: sb3 needs {steps:.2f}× the steps and {seconds:.2f}× the seconds", end="")
        print(flush=True)


def shown(number: float, decimals: int = 0) -> str:
    """Return the number, or a dash for one that was never reached."""
    return f"{number:,.{decimals}f}" if np.isfinite(number) else "–"


def spread(numbers: Any, decimals: int = 0) -> str:
    """Return the least and the most."""
    return f"{shown(min(numbers), decimals)}–{shown(max(numbers), decimals)}"


def rows(title: str, runs: dict[str, list[Run]]) -> Iterator[list[Any]]:
    """Return every judgement of every run, for ``--csv``."""
    for name, each in runs.items():
        for seed, run in enumerate(each):
            for steps, seconds, scores in run.curve:
                yield [title, name, seed, steps, f"{seconds:.4f}", scores.get("drawn", ""), scores["greedy"]]


def run_benchmark(
    description: str,
    sides: dict[str, Side],
    limits: dict[tuple[str, str], int],
    kinds: tuple[str, ...] = ("drawn", "greedy"),
    every: int = 0,
) -> None:
    """Read the command line, compare on every task and print the tables.

    Args:
        description: for ``--help``.
        sides: what learns, by its name.
        limits: environment steps after which a run is given up, by algorithm and task.
        kinds: the ways of acting that are judged.
        every: least steps from one judgement to the next; 0 judges after every update.
    """
    parser = argparse.ArgumentParser(description=description)
    algorithms = list(dict.fromkeys(algorithm for algorithm, _ in limits))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--environment", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--algorithms", nargs="*", choices=algorithms, default=algorithms)
    parser.add_argument("--settings", nargs="*", choices=["default", "tuned"], default=["default", "tuned"])
    parser.add_argument("--sides", nargs="*", choices=sides, default=list(sides))
    parser.add_argument("--csv", help="a file for every learning curve")
    options = parser.parse_args()
    torch.set_num_threads(1)
    curves: list[list[Any]] = [["task", "side", "seed", "steps", "seconds", "drawn", "greedy"]]
    for name, algorithm in itertools.product(options.environment, options.algorithms):
        if (algorithm, name) not in limits:
            continue
        task, limit, title = TASKS[name], limits[algorithm, name], f"{algorithm}, {name}"
        goals = {kind: goal for kind, goal in task.goals.items() if kind in kinds}
        entrants = {f"{side} {given}": (side, given) for side in options.sides for given in options.settings}
        for side, given in entrants.values():
            measure(sides[side], algorithm, given, 10**6, Run(task, goals, limit=1))
        runs: dict[str, list[Run]] = {entrant: [] for entrant in entrants}
        for seed, (entrant, (side, given)) in itertools.product(range(options.seeds), entrants.items()):
            run = Run(task, goals, limit, max(every, task.every))
            runs[entrant].append(measure(sides[side], algorithm, given, seed, run))
            reached = ", ".join(f"{kind} at {shown(steps)}" for kind, (steps, *_) in run.reached.items())
            print(f"{title}, {entrant}, seed {seed}: {run.seconds:.1f} s, {reached}", file=sys.stderr)
        report(title, runs)
        ratios(runs)
        curves += rows(title, runs)
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(curves)


if __name__ == "__main__":
    run_benchmark(__doc__.splitlines()[0], {"sb3": sb3, "ours": ours}, LIMITS)
