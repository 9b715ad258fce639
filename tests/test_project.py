"""Rules that hold for the whole project: imports go one way, and what is public is documented."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("core", "envs", "agents", "alignment", "commands")
MODULES = [f"aligngym.{room}.{module.name}" for room in ROOMS for module in pkgutil.iter_modules([str(ROOT / room)])]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    allowed = {f"aligngym.{below}" for below in ROOMS[: ROOMS.index(room) + 1]}
    for file in (ROOT / room).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert not (name or "").startswith("aligngym.") or ".".join(name.split(".")[:2]) in allowed, file


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_is_documented(name):
    """A method that overrides a documented one may leave its docstring out."""
    module = importlib.import_module(name)
    assert module.__doc__
    for kind in (value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == name):
        for member, value in vars(kind).items():
            if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                assert any(getattr(getattr(base, member, None), "__doc__", None) for base in kind.__mro__), (
                    f"{kind.__name__}.{member}"
                )


def test_planning_in_a_grid_needs_no_torch():
    """It takes seconds to import, and memory that a model of a million states would like to have."""
    program = (
        "import sys\n"
        "from aligngym.agents import PolicyIteration, QLearning\n"
        "from aligngym.envs import GridWorld\n"
        "PolicyIteration(GridWorld(), 0.9).learn(progress=False)\n"
        "QLearning(GridWorld(), 0.9).learn(1, progress=False)\n"
        "assert not {'torch', 'accelerate', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("room", ["core", "envs", "agents", "alignment"])
def test_every_public_name_is_there(room):
    package = importlib.import_module(f"aligngym.{room}")
    for name in package.__all__:
        assert getattr(package, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018
