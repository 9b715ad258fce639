"""Steps a grid world, and trains PPO in it, in torch tensors: how many environment steps a second one device does.

    python benchmarks/grid_on_a_gpu.py [--device cuda]

The policy's exact value is computed from the model after every few iterations, off the clock: steps that teach nothing
would be worth nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from aligngym.agents import PPO, PolicyIteration
from aligngym.agents.model_sampler import ModelSampler
from aligngym.core import NetworkPolicy, TabularPolicy
from aligngym.core.markov_policy import MarkovPolicy
from aligngym.envs import GridWorld
from aligngym.envs.tensor_tabular_env import TensorTabularEnv

MAP = """
S....#...
.##..#.#.
.#...#.#.
.#.###.#.
.......#G
"""
DISCOUNT, LIMIT = 0.99, 100


def clock(work: Callable[[], object], device: str) -> float:
    """Return the seconds that ``work`` takes, all of it that the device has still to do included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def env_steps(num_envs: int, slip: float, device: str, steps: int = 200) -> float:
    """Return environment steps a second with random actions."""
    env = TensorTabularEnv(GridWorld(MAP, slip=slip), num_envs, max_episode_steps=LIMIT, device=device)
    generator = torch.Generator(device).manual_seed(0)

    def walk() -> None:
        env.reset(generator)
        for _ in range(steps):
            env.step(torch.randint(4, (num_envs,), generator=generator, device=device), generator)

    clock(walk, device)
    return max(num_envs * steps / clock(walk, device) for _ in range(3))


def train(
    make: Callable[[GridWorld], MarkovPolicy], num_envs: int, device: str, slip: float
) -> tuple[float, float, str]:
    """Return training steps a second, seconds to 95 % of the optimum, and the policy's value beside it."""
    world = GridWorld(MAP, slip=slip, step_reward=-0.02, boundary_reward=-0.02)
    exact = PolicyIteration(world, discount=DISCOUNT).learn(progress=False)
    mdp, best = exact.mdp, float(exact.mdp.initial @ exact.values)
    seconds = steps = 0.0
    reached = float("nan")
    # The first agent warms the device up; the second is measured.
    for measured in (False, True):
        policy = make(world).to(device)
        sampler = ModelSampler(world, num_envs=num_envs, steps=16, max_episode_steps=LIMIT, device=device)
        agent = PPO(policy, sampler, learning_rate=0.02, epochs=2, minibatch_size=num_envs * 16 // 4)
        for _ in range(100 if measured else 2):
            passed = clock(lambda agent=agent: agent.learn(2, progress=False), device)
            if measured:
                seconds, steps = seconds + passed, steps + 2 * num_envs * 16
                value = float(mdp.initial @ mdp.evaluate(policy.probability_table().cpu().numpy(), DISCOUNT))
                if reached != reached and value >= 0.95 * best:
                    reached = seconds
    return steps / seconds, reached, f"{value:.4f} of {best:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    sizes = [2**12, 2**16, 2**20] if device == "cuda" else [2**10, 2**14]
    print(torch.cuda.get_device_name() if device == "cuda" else "CPU", f"torch {torch.__version__}")
    print(f"{'random actions':<28}" + "".join(f"{size:>16,}" for size in sizes) + "  copies")
    for slip in (0.0, 0.2):
        rates = [env_steps(size, slip, device) for size in sizes]
        print(f"{f'slip {slip}: M steps/s':<28}" + "".join(f"{rate / 1e6:>16.1f}" for rate in rates))
    print(f"\n{'PPO, 16 steps a copy':<28}{'copies':>12}{'M steps/s':>12}{'s to 95 %':>12}   value at the end")
    for name, make in (("table", lambda w: TabularPolicy.for_env(w, critic=True)), ("network", NetworkPolicy.for_env)):
        for size in sizes[:2] if device == "cuda" else sizes[:1]:
            rate, reached, value = train(make, size, device, slip=0.2)
            print(f"{name:<28}{size:>12,}{rate / 1e6:>12.2f}{reached:>12.2f}   {value}", flush=True)


if __name__ == "__main__":
    main()
