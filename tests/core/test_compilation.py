import os
import subprocess
import sys

import numpy as np
import pytest

from aligngym.core.compilation import compiled, interpreted

numba = pytest.importorskip("numba")


@compiled
def walk(steps, generator):
    place = 0.0
    for _ in range(steps):
        place += 1.0 if generator.random() < 0.5 else -1.0
    return place


def test_a_compiled_loop_draws_the_same_numbers_as_python():
    one, other = np.random.default_rng(3), np.random.default_rng(3)
    assert walk(1001, one) == interpreted(walk)(1001, other)
    assert one.random() == other.random()
    assert interpreted(walk) is not walk


def test_a_function_that_has_no_file_is_compiled_too():
    names = {"compiled": compiled}
    exec("@compiled\ndef double(x):\n    return 2 * x", names)
    assert names["double"](21) == 42
    assert interpreted(names["double"]) is not names["double"]


@pytest.mark.parametrize("switch", ["NUMBA_DISABLE_JIT=1", "without numba"])
def test_everything_runs_as_python_where_nothing_is_compiled(switch):
    program = (
        "import sys\n"
        + ("sys.modules['numba'] = None\n" if switch == "without numba" else "")
        + "from aligngym.agents import QLearning, GaussSeidelValueIteration\n"
        "from aligngym.envs import GridWorld\n"
        "grid = GridWorld('S.\\n.G', slip=0.2)\n"
        "agent = QLearning(grid, 0.9).learn(50, progress=False)\n"
        "exact = GaussSeidelValueIteration(grid, 0.9).learn(progress=False)\n"
        "print(agent.compiled, exact.converged, agent.action_values.tolist())"
    )
    environment = {**os.environ, **dict([switch.split("=")] if "=" in switch else [])}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    from aligngym.agents import QLearning
    from aligngym.envs import GridWorld

    agent = QLearning(GridWorld("S.\n.G", slip=0.2), 0.9).learn(50, progress=False)
    assert agent.compiled
    assert printed.strip() == f"False True {agent.action_values.tolist()}"
