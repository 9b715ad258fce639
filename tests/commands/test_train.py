"""``aligngym train`` and ``evaluate``: what they reach, write and refuse, and that runs repeat and resume."""

import json
import re
import sys
from dataclasses import dataclass

import gymnasium
import numpy as np
import pytest
import torch
import yaml

from aligngym.agents import PPO, EnvironmentSampler, ModelSampler, PolicyIteration
from aligngym.commands import run_folder, train
from aligngym.commands.constructor_options import constructor_options
from aligngym.commands.experiment import ALGORITHMS, Experiment
from aligngym.commands.main import main
from aligngym.commands.run_folder import Settings, checked, load_run, options_of
from aligngym.core import Decay, NetworkPolicy, Power, Schedule, TabularPolicy
from aligngym.core.storage import load_tree
from aligngym.envs import GridWorld, TabularMDP

MAP = "S..\n.#.\n..G\n"
SMALL = "--segment-steps 8 --num-envs 4 --minibatch-size 16 --evaluation-episodes 3 --env-option max_episode_steps=30"


#: Makes long ways cost something where there is no discount.
COSTS = "--env-option step_reward=-0.1"


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "map.txt"
    path.write_text(MAP)
    return str(path)


@pytest.fixture
def arguments(grid, tmp_path):
    """A run of eight iterations in a grid."""
    command = ["train", "ppo", grid, "--config", "none", "--steps", "256", *SMALL.split()]
    return [*command, "--output", str(tmp_path / "run")]


def refused(capsys, arguments):
    """Run, expect status 2 and one line of error, and return it."""
    status = main(arguments)
    error = [line for line in capsys.readouterr().err.splitlines() if line]
    assert status == 2, error
    assert len(error) == 1, error
    assert error[0].startswith("aligngym: error: ")
    return error[0]


def weights(folder):
    return load_tree(folder / "policy.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# What a run reaches and leaves.


def test_a_run_leaves_everything_a_user_expects(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["env_steps"] for record in records] == list(range(32, 257, 32))
    assert next((run / "tensorboard").glob("events*"))
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    assert recorded["env_options"] == {"max_episode_steps": 30, "map": MAP.rstrip()}
    assert recorded["clip"] == 0.2

    # The exact values in the table are those of the weights.
    mdp = GridWorld(MAP).mdp
    best = mdp.initial @ PolicyIteration(mdp, 0.99).learn(progress=False).values
    table = TabularPolicy.load(run / "policy.safetensors").probability_table().numpy()
    exact = [mdp.initial @ mdp.evaluate(policy, 0.99) for policy in (np.eye(4)[table.argmax(axis=1)], table)]
    found = re.findall(r"exact return, discount 0.99.*?(-?\d+\.\d+) +(-?\d+\.\d+)\n", printed)
    assert found == [(f"{value:.6f}", f"{best:.6f}") for value in exact]
    assert (run / "report.txt").read_text().strip() in printed


@pytest.mark.parametrize(("simulator", "made_by"), [("environment", EnvironmentSampler), ("model", ModelSampler)])
def test_the_run_is_the_agent_that_a_program_makes(arguments, tmp_path, simulator, made_by):
    assert main([*arguments, "--learning-rate", "linear:0.1", "--seed", "3", "--simulator", simulator]) == 0
    env = gymnasium.make("aligngym/GridWorld-v0", map=MAP.rstrip(), max_episode_steps=30)
    policy = TabularPolicy.for_env(env, critic=True)
    sampler = made_by(env, num_envs=4, steps=8)
    PPO(policy, sampler, minibatch_size=16, learning_rate=Decay(0.1, 8), seed=3).learn(8, progress=False)
    assert torch.equal(weights(tmp_path / "run")["logits"], policy.logits)


@pytest.mark.parametrize(
    "words",
    [
        "ppo --steps 8000 --num-envs 16 --segment-steps 16 --minibatch-size 256 --learning-rate 0.1",
        "a2c --steps 8000 --num-envs 16 --segment-steps 16 --learning-rate 0.1",
        f"reinforce --steps 12000 --episodes 32 --learning-rate 0.1 --max-steps 30 {COSTS}",
        f"rloo --steps 12000 --episodes 32 --group-size 8 --learning-rate 0.1 --max-steps 30 {COSTS}",
        f"grpo --steps 12000 --episodes 32 --group-size 8 --learning-rate 0.1 --max-steps 30 {COSTS}",
        "q-learning --steps 12000",
    ],
)
def test_the_exact_optimum_of_a_grid_is_reached(grid, tmp_path, words):
    algorithm, *flags = words.split()
    output = tmp_path / "run"
    command = ["train", algorithm, grid, *flags, "--output", str(output), "--evaluation-episodes", "2"]
    assert main([*command, "--config", "none"]) == 0
    reached, best = (output / "report.txt").read_text().split("greedy policy ")[-1].split()[:2]
    assert reached == best


def test_masked_actions_are_left_out_of_play_and_of_exact_values():
    # An untrained table prefers no action; among the allowed ones it takes the first, and its chances are equal.
    from aligngym.commands.judgement import _tables, judge, player
    from aligngym.commands.play import play

    settings = Settings.complete("ppo", "Taxi-v4", {"simulator": "environment"})
    agent = settings.experiment().make_agent()
    env = gymnasium.make("Taxi-v4")
    act = player(agent, env.action_space)
    for seed in range(10):
        observation, info = env.reset(seed=seed)
        assert act(observation, info["action_mask"].astype(bool)) == info["action_mask"].argmax()
    tables = _tables(agent, env)
    for state in range(500):
        allowed = env.unwrapped.action_mask(state).astype(bool)
        assert tables["greedy"][state].argmax() == (allowed.argmax() if allowed.any() else 0)
        expected = allowed / allowed.sum() if allowed.any() else np.full(6, 1 / 6)
        np.testing.assert_allclose(tables["drawn"][state], expected, atol=1e-12)
    # Dropping off nobody costs 10, is what this policy likes best, and is not allowed.
    agent.policy.logits.data[:, 5] = 1.0
    assert judge(settings, agent, 2, seed=0).mean == -200
    drawn = gymnasium.make("Taxi-v4", render_mode="ansi")
    lines = [line for _, line in play(agent, drawn, 1, seed=0, greedy=True)]
    assert lines[-1].endswith("return -200, cut off")


def test_a_model_knows_no_masks_and_neither_does_the_judge():
    from aligngym.commands.judgement import _tables, judge, player

    settings = Settings.complete("ppo", "Taxi-v4", {"simulator": "model"})
    assert "action_masks" not in settings.values
    agent = settings.experiment().make_agent()
    env = gymnasium.make("Taxi-v4")
    # The first action, also where the environment does not allow it.
    assert player(agent, env.action_space)(0, np.array([False, True, True, True, True, True])) == 0
    np.testing.assert_allclose(_tables(agent, env)["drawn"], 1 / 6, atol=1e-12)
    agent.policy.logits.data[:, 5] = 1.0
    assert judge(settings, agent, 2, seed=0).mean == -2000


# Repeating and resuming.


def test_the_recorded_configuration_repeats_the_run(arguments, tmp_path):
    assert main([*arguments, "--learning-rate", "0.05"]) == 0
    again = ["--config", str(tmp_path / "run/config.yaml"), "--output", str(tmp_path / "again")]
    assert main(["train", "ppo", *again]) == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "again"))


@pytest.mark.parametrize(
    "words",
    [
        "ppo --steps 512 --num-envs 4 --segment-steps 16 --minibatch-size 16 --learning-rate linear:0.01",
        "a2c --steps 512 --num-envs 4 --segment-steps 16 --simulator model",
        "grpo --steps 2500 --episodes 8 --group-size 4 --max-steps 40",
        "q-learning --steps 600",
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(grid, tmp_path, capsys, monkeypatch, words):
    algorithm, *flags = words.split()
    command = ["train", algorithm, grid, *flags, "--config", "none", "--evaluation-episodes", "2"]
    command += ["--checkpoint-every", "2", "--env-option", "max_episode_steps=40"]
    assert main([*command, "--output", str(tmp_path / "whole")]) == 0
    broken = [*command, "--output", str(tmp_path / "broken")]
    kind = ALGORITHMS[algorithm].agent_class

    def interrupted(agent, iterate=kind.iterate):
        if agent.iteration == 5:
            raise KeyboardInterrupt
        return iterate(agent)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "iterate", interrupted)
        assert main(broken) == 130
    # What a run that is killed may leave of a line.
    metrics = tmp_path / "broken/metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 6, "cut sho')
    capsys.readouterr()
    assert "is not finished" in refused(capsys, ["evaluate", str(tmp_path / "broken")])
    assert main([*broken, "--resume"]) == 0
    assert re.search(r"steps .*, from \d+", capsys.readouterr().out)
    states = [load_tree(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "broken")]
    assert states[0]["iteration"] == states[1]["iteration"] > 6
    first, second = (load_run(tmp_path / name)[1] for name in ("whole", "broken"))
    if algorithm == "q-learning":
        np.testing.assert_array_equal(first.action_values, second.action_values)
    else:
        assert same(first.policy.state_dict(), second.policy.state_dict())
    records = [
        [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in file.open()]
        for file in (tmp_path / "whole/metrics.jsonl", metrics)
    ]
    assert records[0] == records[1]


def test_a_finished_run_resumes_to_its_report(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    before = weights(tmp_path / "run")
    assert main([*arguments, "--resume"]) == 0
    assert same(before, weights(tmp_path / "run"))
    error = refused(capsys, [*arguments, "--resume", "--learning-rate", "0.5"])
    assert "--resume continues with learning_rate=0.0003, and 0.5 was given: leave it out" in error
    error = refused(capsys, [*arguments, "--resume", "--env-option", "slip=0.5"])
    assert "--resume continues with slip=None, and 0.5 was given" in error
    assert "--resume continues with algorithm=ppo, and a2c" in refused(
        capsys, ["train", "a2c", "--output", str(tmp_path / "run"), "--resume", arguments[2]]
    )


# evaluate


def test_runs_are_summed_up_by_their_interquartile_mean(grid, tmp_path, capsys):
    folders, exact = [], []
    for seed in range(4):
        folders.append(str(tmp_path / f"run{seed}"))
        steps = ["--steps", str(800), "--learning-rate", "0.1", "--config", "none", "--epochs", "1"]
        assert main(["train", "ppo", grid, *SMALL.split(), *steps, "--seed", str(seed), "--output", folders[-1]]) == 0
        mdp = GridWorld(MAP).mdp
        table = TabularPolicy.load(f"{folders[-1]}/policy.safetensors").probability_table().numpy()
        exact.append(mdp.initial @ mdp.evaluate(np.eye(4)[table.argmax(axis=1)], 0.99))
        if seed == 0:
            # A policy that has learned the wrong thing.
            wrong = TabularPolicy(8, 4, critic=True)
            wrong.logits.data[:, 0] = 1.0
            wrong.save(f"{folders[0]}/policy.safetensors")
            exact[0] = mdp.initial @ mdp.evaluate(np.eye(4)[[0] * 8], 0.99)
    assert exact[0] < min(exact[1:])
    capsys.readouterr()
    assert main(["evaluate", *folders, "--episodes", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, folder, value in zip(lines[2:6], folders, exact, strict=True):
        assert line.startswith(folder)
        assert line.split()[-2] == f"{value:.6f}"
    assert "ppo, 4 runs: interquartile mean" in lines[6]
    # Of four scores, the middle two.
    assert lines[6].split()[-1] == f"{np.sort(exact)[1:3].mean():.6f}"
    assert lines[7].count("[") == 2


def test_evaluate_refuses_what_is_no_run(tmp_path, capsys, arguments):
    assert "no run in" in refused(capsys, ["evaluate", str(tmp_path / "nowhere")])
    assert "--episodes is at least 1" in refused(capsys, ["evaluate", str(tmp_path), "--episodes", "0"])
    assert main(arguments) == 0
    recorded = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(recorded.replace("policy: table", "policy: network"))
    assert "holds no network of this kind" in refused(capsys, ["evaluate", str(tmp_path / "run")])


# Bad input.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pppo CartPole-v1", "unknown algorithm 'pppo': did you mean ppo?"),
        ("xyz CartPole-v1", "unknown algorithm 'xyz': choose from reinforce, a2c"),
        ("ppo", "ENV is missing"),
        ("ppo CartPol-v1", "'CartPol-v1': did you mean CartPole-v1?"),
        ("ppo nowhere.txt", "nowhere.txt: no such file"),
        ("ppo FrozenLake-v1 --env-option slippery=no", "unexpected keyword argument 'slippery'"),
        ("ppo FrozenLake-v1 --env-option slippery", "--env-option slippery: KEY=VALUE is expected"),
        ("ppo FrozenLake-v1 --wrapper Nothing", "Nothing"),
        ("ppo CartPole-v1 --learning-rat 1", "unknown option --learning-rat: did you mean --learning-rate?"),
        ("ppo CartPole-v1 --learning-rate fast", "--learning-rate is 'fast': a number, or linear:NUMBER"),
        ("ppo CartPole-v1 --epochs 1.5", "--epochs is '1.5': a whole number is expected"),
        ("ppo CartPole-v1 --hidden 64,many", "--hidden is '64,many': whole numbers with commas between is expected"),
        ("ppo CartPole-v1 --epochs", "expected one argument"),
        (
            "ppo CartPole-v1 --config none --minibatch-size 5000",
            "--minibatch-size 5000 is more than the 1024 actions of a batch",
        ),
        ("ppo CartPole-v1 --clip 0", r"clip is ε in (0, 1), not 0.0"),
        ("ppo CartPole-v1 --steps 0", "--steps is at least 1, not 0"),
        ("ppo CartPole-v1 --policy tree", "--policy is 'table' or 'network', not 'tree'"),
        ("ppo CartPole-v1 --policy table", "a table needs discrete observations"),
        ("ppo FrozenLake-v1 --hidden 8", "--hidden is about networks, and here a table learns: add --policy network"),
        ("ppo CartPole-v1 --critic none", "PPO needs a critic"),
        ("ppo FrozenLake-v1 --simulator dream", "--simulator is 'environment' or 'model', not 'dream'"),
        ("ppo CartPole-v1 --simulator model", "shows no exact model"),
        ("ppo FrozenLake-v1 --simulator model --wrapper FlattenObservation", "a model knows nothing of wrappers"),
        ("ppo Taxi-v4 --simulator model --action-masks", "a model knows no action masks: add --no-action-masks"),
        ("q-learning Taxi-v4 --simulator model", "unknown option --simulator"),
        ("ppo CartPole-v1 --config nowhere.yaml", "nowhere.yaml: no such file"),
        ("ppo CartPole-v1 --resume", "no run in"),
        ("q-learning CartPole-v1", "a table needs discrete observations"),
        ("grpo CartPole-v1 --group-size 5 --episodes 16", "16 episodes do not divide into groups of 5"),
        ("grpo CartPole-v1 --learning-rate linear:0.1", "nobody knows how many whole episodes"),
        ("ppo test/ManyActions-v0", "this environment's are MultiDiscrete([2 2]): wrap it"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(gymnasium.registry, "test/ManyActions-v0", gymnasium.envs.registration.EnvSpec(
        "test/ManyActions-v0", entry_point=ManyActions, disable_env_checker=True
    ))  # fmt: skip
    assert message in refused(capsys, ["train", *words.split()])
    assert not list(tmp_path.iterdir())


class ManyActions(gymnasium.Env):
    observation_space = gymnasium.spaces.Discrete(3)
    action_space = gymnasium.spaces.MultiDiscrete([2, 2])


class Broken(gymnasium.Env):
    """Pays NaN in its third step."""

    observation_space = gymnasium.spaces.Discrete(3)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return 0, {}

    def step(self, action):
        self.steps += 1
        return 0, float("nan") if self.steps == 3 else 0.0, False, False, {}


def test_numbers_that_are_none_stop_the_run_and_say_where(tmp_path, monkeypatch, capsys):
    spec = gymnasium.envs.registration.EnvSpec("test/Broken-v0", entry_point=Broken, disable_env_checker=True)
    monkeypatch.setitem(gymnasium.registry, "test/Broken-v0", spec)
    command = ["train", "a2c", "test/Broken-v0", "--output", str(tmp_path / "run")]
    assert "copy 0 paid nan in step 3" in refused(capsys, command)


def test_an_output_that_is_taken_is_left_alone(arguments, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("mine")
    assert "already holds a run" in refused(capsys, arguments)
    assert (tmp_path / "run/config.yaml").read_text() == "mine"
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(capsys, [*arguments, "--output", str(tmp_path / "file")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3\n", "unknown option 'epoch': did you mean epochs?"),
        ("epochs: many\n", "epochs is 'many': a whole number is expected"),
        ("epochs: true\n", "epochs is True: a whole number is expected"),
        ("learning_rate: [1]\n", "learning_rate is [1]: a number, or linear:NUMBER"),
        ("env_options: 3\n", "env_options is 3: a dict is expected"),
        ("algorithm: a2c\n", "these are settings of a2c, and ppo is asked for"),
        ("- epochs\n", "a mapping of options is needed"),
    ],
)
def test_a_bad_file_is_one_line(arguments, tmp_path, capsys, text, message):
    (tmp_path / "c.yaml").write_text(text)
    error = refused(capsys, [*arguments, "--config", str(tmp_path / "c.yaml")])
    assert message in error
    assert "c.yaml" in error


def test_missing_minigrid_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "minigrid", None)
    monkeypatch.setitem(sys.modules, "minigrid.wrappers", None)
    assert "pip install 'aligngym[minigrid]'" in refused(capsys, ["train", "ppo", "MiniGrid-Empty-5x5-v0"])


# Options out of constructors.


class Base:
    """A base.

    Args:
        policy: no option.
        rate: see :class:`Nothing`.
        size: how large, as in
            A. Author et al., 1999. More of it. And still more.
    """

    def __init__(self, policy: object, *, rate: float | Schedule = 0.1, size: int | None = 3, hook: object = None):
        self.arguments = {"rate": rate, "size": size}


@dataclass(kw_only=True)
class _Unrelated:
    shape: int = 1


class Derived(Base):
    """Derived.

    Args:
        rate: of learning.
        options: of :class:`Base`.
    """

    def __init__(self, policy: object, *, rate: float | Schedule = Power(exponent=0.7), flag: bool = False, **options):  # noqa: B008
        super().__init__(policy, rate=rate, **options)


def test_options_are_those_of_the_constructors():
    found = {option.name: option for option in constructor_options(Derived, ["policy"], {"size": "other_size"})}
    assert list(found) == ["rate", "flag", "other_size"]
    assert found["rate"].default == "power:0.7"
    assert found["rate"].help == "of learning"
    assert found["other_size"].argument == "size"
    assert found["other_size"].help == "how large, as in A. Author et al., 1999"
    assert found["other_size"].read("none", "") is None
    assert found["rate"].read("1e-3", "") == 0.001
    # Not passed on: the base class's arguments are none of an unrelated class.
    assert [option.name for option in constructor_options(_Unrelated)] == ["shape"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_learns_with_its_defaults_and_is_judged(algorithm):
    from aligngym.commands.judgement import judge

    env = "Pendulum-v1" if algorithm == "dpg" else "FrozenLake-v1"
    settings = Settings.complete(algorithm, env, {"env_options": {"max_episode_steps": 20}})
    agent = settings.experiment().make_agent()
    train.refuse_large_minibatch(agent)
    metrics = agent.iterate()
    agent.iteration += 1
    assert train.steps_of(agent, metrics) >= 1
    judgement = judge(settings, agent, 2, seed=0)
    assert np.isfinite(judgement.mean)
    assert algorithm == "dpg" or 0 <= judgement.exact["greedy"] <= judgement.exact["best"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_option_has_help_and_a_default_that_it_reads(algorithm, capsys):
    for option in (option for options in options_of(algorithm).values() for option in options):
        assert option.help, option
        assert option.read(option.default, option.flag) == option.default or option.default is None
    with pytest.raises(SystemExit) as ended:
        main(["train", algorithm, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for part in options_of(algorithm):
        assert f"\n{train.HEADINGS[part]}:\n" in printed


# The tuned settings.

CONFIGS = sorted(run_folder.TUNED.glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_tuned_file_makes_an_agent_that_learns(path):
    settings = checked(yaml.safe_load(path.read_text()), path.name)
    assert path.stem == f"{settings['algorithm']}-{settings['env'].replace('/', '-')}"
    if settings["env"].startswith("MiniGrid"):
        pytest.importorskip("minigrid")
    assert path.read_text().startswith("# "), "measured steps and seconds are missing"
    agent = Settings.complete(settings["algorithm"], None, settings).experiment().make_agent()
    train.refuse_large_minibatch(agent)
    metrics = agent.iterate()
    assert all(np.isfinite(value) for value in metrics.values())


def test_the_tuned_settings_are_found_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "TUNED", tmp_path / "configs")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/ppo-aligngym-GridWorld-v0.yaml").write_text(
        "algorithm: ppo\nenv: aligngym/GridWorld-v0\nsteps: 64\nnum_envs: 4\nsegment_steps: 8\nminibatch_size: 16\n"
        "evaluation_episodes: 2\ndiscount: 0.9\nenv_options: {max_episode_steps: 30}\n"
    )
    (tmp_path / "map.txt").write_text(MAP)
    assert main(["train", "ppo", "aligngym/GridWorld-v0", "--discount", "0.8"]) == 0
    assert "ppo-aligngym-GridWorld-v0.yaml" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    recorded = Settings.read(folder)
    assert (recorded.values["num_envs"], recorded.values["discount"]) == (4, 0.8)
    # What was tuned for the default map says nothing about another one.
    assert main(["train", "ppo", "map.txt", "--steps", "64", "--output", "map", *SMALL.split()]) == 0
    assert "yaml" not in capsys.readouterr().out.splitlines()[0]
    plain = ["--config", "none", "--steps", "64", "--output", "other", *SMALL.split()]
    assert main(["train", "ppo", "map.txt", *plain]) == 0
    assert Settings.read("other").values["discount"] == 0.99


def test_a_network_and_its_wrappers_come_back_from_the_folder(tmp_path, capsys):
    command = ["train", "a2c", "CartPole-v1", "--steps", "40", "--hidden", "8", "--wrapper", "FlattenObservation"]
    command += ["--evaluation-episodes", "2", "--config", "none", "--output", str(tmp_path / "run")]
    assert main(command) == 0
    settings, agent = load_run(tmp_path / "run")
    assert isinstance(settings.experiment().make_env(), gymnasium.wrappers.FlattenObservation)
    fresh = settings.experiment().make_agent().policy
    assert isinstance(agent.policy, NetworkPolicy)
    assert not torch.equal(agent.policy.action_head.weight, fresh.action_head.weight)
    assert torch.equal(agent.policy.action_head.weight, weights(tmp_path / "run")["weights"]["action_head.weight"])
    first = capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run"), "--episodes", "2"]) == 0
    mean = re.search(r"95 %\] +([\d.]+) ±", first)[1]
    assert f" {mean} " in capsys.readouterr().out


def test_wrappers_come_from_two_modules_only():
    with pytest.raises(ValueError, match="wrapper"):
        Experiment("ppo", "CartPole-v1", wrappers=["os.system"]).make_env()
    mdp = TabularMDP.from_env(
        Experiment("ppo", "FrozenLake-v1", wrappers=[{"TimeLimit": {"max_episode_steps": 3}}]).make_env()
    )
    assert mdp.num_states == 16
