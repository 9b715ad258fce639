"""Five ways to the same values: how far each planner is from the optimum after every iteration, proved and in truth.

    python examples/planning.py [FOLDER]

All solve one slippery grid to a certified error of 10⁻⁶. An iteration is a sweep over all states; for policy iteration
it is an exact evaluation and an improvement, for modified policy iteration an improvement and ten sweeps of evaluation,
and for prioritised sweeping as many updates of single states as there are states.
"""

import sys
from pathlib import Path
from time import perf_counter

import numpy as np
from matplotlib.figure import Figure

from aligngym.agents import (
    GaussSeidelValueIteration,
    ModifiedPolicyIteration,
    PolicyIteration,
    PrioritizedSweeping,
    ValueIteration,
)
from aligngym.core import History
from aligngym.envs import GridWorld

SIZE, DISCOUNT, TOLERANCE = 30, 0.99, 1e-6
PLANNERS = (
    ValueIteration,
    GaussSeidelValueIteration,
    PrioritizedSweeping,
    ModifiedPolicyIteration,
    PolicyIteration,
)


def random_map(size: int, seed: int = 0) -> str:
    """Return a square map with a target in a corner and a wall in every tenth cell."""
    cells = np.where(np.random.default_rng(seed).random((size, size)) < 0.1, "#", ".")
    cells[0, 0], cells[-1, -1] = "S", "G"
    return "\n".join("".join(row) for row in cells)


def main(folder: Path) -> None:
    env = GridWorld(random_map(SIZE), slip=0.2, step_reward=-1.0, boundary_reward=-1.0, target_reward=-1.0)
    exact = PolicyIteration(env, DISCOUNT).learn(progress=False)
    # What is compiled is compiled before the clock starts.
    for kind in PLANNERS:
        kind(GridWorld("S.\n.G"), DISCOUNT).learn(progress=False)

    figure = Figure(figsize=(13, 5.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    print("                             iterations      ms   certified    in truth")
    for kind in PLANNERS:
        history, start = History(), perf_counter()
        agent = kind(env, DISCOUNT, TOLERANCE).learn(progress=False, callbacks=[history])
        milliseconds = 1e3 * (perf_counter() - start)
        error = np.abs(agent.values - exact.values).max()
        print(f"{kind.__name__:28} {agent.iteration:10} {milliseconds:7.1f} {agent.error_bound:11.1e} {error:11.1e}")
        left.loglog(np.arange(1, agent.iteration + 1), history["error_bound"], label=kind.__name__, marker=".")
    left.axhline(TOLERANCE, color="black", linestyle=":", label="asked for")
    left.set(title="certified bound of max |V − V*|", xlabel="iteration")
    left.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    right.imshow(np.where(env.map.numbers < 0, np.nan, exact.values[env.map.numbers]), cmap="YlGnBu_r")
    right.set(title=f"V* of the {SIZE} × {SIZE} grid, walls white", xticks=[], yticks=[])
    figure.colorbar(right.images[0], ax=right, shrink=0.9)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "planning.png")
    print(f"\ndrawn in {folder / 'planning.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/planning"))
