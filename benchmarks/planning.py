"""Planners on a slippery grid, ours beside QuantEcon's ``DiscreteDP``: seconds to ‖V − V*‖∞ ≤ 1e-6, and memory.

The grid is N × N with 10 % of its cells walls, a target in the last corner and −1 for every step; a move goes where it
should with probability 0.8 and to either side with 0.1; γ = 0.99. Each side builds its model from the same arrays and
runs in a process of its own, and the sides take turns, so that both see the same noise of the machine. Compiling is
done on a small grid first and reported apart. Ours is certified; QuantEcon's values are compared with ours.

    python benchmarks/planning.py [--sizes 100 300] [--repeats 3] [--large 1000] [--quantecon PYTHON]

``--quantecon`` is a Python that has ``quantecon``, by default this one: it may live in an environment of its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

DISCOUNT, TOLERANCE = 0.99, 1e-6
OURS = {
    "modified policy iteration": ("modified_policy_iteration", "ModifiedPolicyIteration"),
    "Gauss-Seidel value iteration": ("gauss_seidel", "GaussSeidelValueIteration"),
    "value iteration": ("dynamic_programming", "ValueIteration"),
}
THEIRS = {
    "QuantEcon modified policy iteration": {"method": "modified_policy_iteration", "k": 20},
    "QuantEcon value iteration": {"method": "value_iteration"},
}
#: Planners that are left out where they take minutes.
SLOW = ("value iteration", "QuantEcon value iteration")


def slip_grid(size: int, seed: int = 0) -> np.ndarray:
    """Return ``[S, 4, 3]``, where each move leads: as meant, off to the left, off to the right. The last state ends."""
    walls = np.random.default_rng(seed).random((size, size)) < 0.1
    walls[0, 0] = walls[-1, -1] = False
    cells = np.argwhere(~walls).astype(np.int32)
    numbers = np.full((size + 2, size + 2), -1, dtype=np.int32)
    numbers[1:-1, 1:-1][~walls] = np.arange(len(cells))
    moves = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)], dtype=np.int32)
    landing = cells[:, None] + 1 + moves
    reached = numbers[landing[..., 0], landing[..., 1]]
    reached = np.where(reached < 0, np.arange(len(cells), dtype=np.int32)[:, None], reached)
    # Where the move that is meant, the one to its left and the one to its right lead.
    next_states = reached[:, [(0, 3, 1), (1, 0, 2), (2, 1, 3), (3, 2, 0)]]
    next_states[-1] = len(cells) - 1
    return next_states


def our_model(size: int) -> Any:
    from aligngym.envs import Outcomes, TabularMDP

    next_states = slip_grid(size)
    num_states = len(next_states)
    rows = np.repeat(np.arange(4 * num_states, dtype=np.int32), 3)
    probabilities = np.tile([0.8, 0.1, 0.1], 4 * num_states)
    outcomes = Outcomes(rows, next_states.reshape(-1), probabilities, np.broadcast_to(-1.0, rows.shape))
    start = np.arange(num_states) == 0
    return TabularMDP(outcomes, start, np.arange(num_states) == num_states - 1, num_actions=4)


def their_model(size: int) -> Any:
    from quantecon.markov import DiscreteDP
    from scipy.sparse import csr_matrix

    next_states = slip_grid(size)
    num_states = len(next_states)
    rewards = np.full((num_states, 4), -1.0)
    rewards[-1] = 0
    starts = np.arange(0, next_states.size + 1, 3)
    probabilities = np.tile([0.8, 0.1, 0.1], 4 * num_states)
    matrix = csr_matrix((probabilities, next_states.ravel(), starts), shape=(4 * num_states, num_states))
    matrix.sum_duplicates()
    states, actions = np.repeat(np.arange(num_states), 4), np.tile(np.arange(4), num_states)
    return DiscreteDP(rewards.ravel(), matrix, DISCOUNT, states, actions)


def solve(name: str, model: Any) -> tuple[np.ndarray, int, float]:
    """Return values, iterations and the certified bound (NaN where there is none)."""
    if name in THEIRS:
        # Half of epsilon is their bound of the error; the sweep limit has to be raised by hand.
        result = model.solve(epsilon=2 * TOLERANCE, max_iter=10**6, **THEIRS[name])
        return result.v, result.num_iter, float("nan")
    module, planner = OURS[name]
    agent = getattr(importlib.import_module(f"aligngym.agents.{module}"), planner)(model, DISCOUNT, TOLERANCE)
    agent.learn(progress=False)
    assert agent.converged
    return agent.values, agent.iteration, agent.error_bound


def run_side(name: str, size: int, output: str) -> None:
    """Build and solve once, after a small grid that compiles everything; print seconds and memory."""
    build = their_model if name in THEIRS else our_model
    importlib.import_module("quantecon" if name in THEIRS else "aligngym.agents")
    imported = peak_memory()
    began = time.perf_counter()
    solve(name, build(5))
    compiled = time.perf_counter()
    model = build(size)
    built = time.perf_counter()
    values, iterations, bound = solve(name, model)
    ended = time.perf_counter()
    np.save(output, values)
    report = {
        "compile": compiled - began,
        "build": built - compiled,
        "solve": ended - built,
        "iterations": int(iterations),
        "bound": bound,
        "imported": imported,
        "memory": peak_memory(),
        "states": len(values),
    }
    print(json.dumps(report))


def peak_memory() -> float:
    """Return the peak of resident memory in MB (10⁶ bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure(name: str, size: int, arguments: argparse.Namespace, repeats: int) -> list[dict[str, Any]]:
    """Run a side in processes of its own and return their reports with the values."""
    python = arguments.quantecon if name in THEIRS else sys.executable
    reports = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            output = str(Path(folder) / "values.npy")
            command = [python, __file__, "--side", name, "--sizes", str(size), "--output", output]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            reports.append(json.loads(printed.splitlines()[-1]) | {"values": np.load(output)})
    return reports


def compare(size: int, names: list[str], arguments: argparse.Namespace) -> None:
    """Print one table: the best of the repeats of each side, which take turns."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(arguments.repeats):
        for name in names:
            runs[name] += measure(name, size, arguments, 1)
    reference = runs[names[0]][0]["values"]
    best = {name: min(reports, key=lambda report: report["solve"]) for name, reports in runs.items()}
    print(f"\n{size} × {size}, {len(reference):,} states, best of {arguments.repeats}")
    print(f"{'':38}{'build s':>9}{'solve s':>9}{'iterations':>12}{'certified':>11}{'difference':>12}{'peak MB':>9}")
    for name, report in best.items():
        difference = np.abs(report["values"] - reference).max()
        print(
            f"{name:38}{report['build']:9.3f}{report['solve']:9.3f}{report['iterations']:12}{report['bound']:11.1e}"
            f"{difference:12.1e}{report['memory']:9.0f}"
        )
    theirs = [report for name, report in best.items() if name in THEIRS]
    if theirs:
        fastest = min(theirs, key=lambda report: report["solve"])
        ours = best[names[0]]
        ratios = sorted(
            min(runs[name][turn]["solve"] for name in names if name in THEIRS) / runs[names[0]][turn]["solve"]
            for turn in range(arguments.repeats)
        )
        whole = (fastest["build"] + fastest["solve"]) / (ours["build"] + ours["solve"])
        print(
            f"QuantEcon's best takes {fastest['solve'] / ours['solve']:.1f}× the time of ours to solve "
            f"({ratios[0]:.1f} to {ratios[-1]:.1f} turn by turn), {whole:.1f}× with building"
        )
    ours = runs[names[0]]
    seconds = [report["compile"] for report in runs[names[0]]]
    print(f"ours: {min(seconds):.2f} s to load what is compiled, {max(seconds):.2f} s if it had to be compiled first;")
    print(f"{best[names[0]]['imported']:.0f} MB are in use after the imports")


def bandwidth(size: int) -> None:
    """Print how near a sweep over the whole model comes to reading it as fast as memory allows."""
    from aligngym.agents.sweeps import rows_of, sweep

    rows = rows_of(our_model(size))
    values, updated = np.zeros(len(rows.rewards)), np.empty(len(rows.rewards))
    moved = sum(array.nbytes for array in (*rows, values, updated))
    block = np.ones(moved // 16)
    target = np.empty_like(block)
    np.copyto(target, block)
    copying = best_time(lambda: np.copyto(target, block), 7)
    sweeping = best_time(lambda: sweep(values, updated, rows, DISCOUNT), 7)
    print(
        f"\none sweep of {size} × {size}: {moved / 1e6:.0f} MB in {sweeping * 1e3:.1f} ms, "
        f"{moved / sweeping / 1e9:.1f} GB/s; "
        f"a copy moves {2 * block.nbytes / copying / 1e9:.1f} GB/s: {copying / sweeping:.0%} of the limit"
    )


def best_time(function: Any, repeats: int) -> float:
    """Return the seconds of the fastest call."""
    function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    """Compare all sizes and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[100, 300])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", type=int, default=1000, help="a size that only ours solves; 0 for none")
    parser.add_argument("--quantecon", default=sys.executable, help="a Python that has quantecon")
    parser.add_argument("--side", choices=[*OURS, *THEIRS], help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, arguments.sizes[0], arguments.output)
        return
    found = subprocess.run([arguments.quantecon, "-c", "import quantecon"], capture_output=True, check=False)
    theirs = list(THEIRS) if found.returncode == 0 else []
    if not theirs:
        print(f"{arguments.quantecon} has no quantecon: only ours is measured")
    for size in arguments.sizes:
        names = [name for name in [*OURS, *theirs] if size <= 150 or name not in SLOW]
        compare(size, names, arguments)
    if arguments.large:
        arguments.repeats = 1
        compare(arguments.large, [next(iter(OURS))], arguments)
        bandwidth(arguments.large)


if __name__ == "__main__":
    main()
