"""``aligngym reward`` from outside, for pairs and for steps: what it writes, what it refuses, repeated and resumed."""

import json
import random

import pytest
import torch
import yaml
from safetensors.torch import load_file

from aligngym.alignment.process_reward_model import ProcessRewardModel
from aligngym.alignment.reward_model import RewardModel
from aligngym.alignment.step_labels import load_step_labels
from aligngym.commands import main as command_line

PAIRS = [
    {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": f"{a}{b}!"} for a in range(1, 7) for b in range(1, 6)
]
_draw = random.Random(0)
_LABELS = [[_draw.random() < 0.5 for _ in range(3)] for _ in range(30)]
STEPS = [
    {"prompt": f"{number}:", "completions": [f"a{'' if label else '!'}" for label in labels], "labels": labels}
    for number, labels in enumerate(_LABELS)
]


@pytest.fixture
def rows(tmp_path):
    """``rows(rows, name)``: a file of rows."""

    def write(rows, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


@pytest.fixture
def arguments(model_folder, rows, tmp_path):
    """``arguments(rows)``: a run of six steps with a tiny model."""

    def make(made=PAIRS):
        flags = f"--model {model_folder()} --train {rows(made)} --output {tmp_path / 'run'} --max-steps 6"
        extra = "--batch-size 4 --lora-r 4 --dtype float32 --learning-rate 0.01"
        return ["reward", *flags.split(), *extra.split()]

    return make


def refused(capsys, arguments):
    """Run, expect status 2 and one line of error, and return it."""
    status = command_line.main(arguments)
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert status == 2
    assert len(error) == 1
    return error[0]


def tables(text):
    """The tables of a report, each as its lines."""
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return [block for block in blocks if len(block) > 1 and set(block[1]) == {"─"}]


def test_a_run_on_pairs_leaves_everything_a_user_expects(arguments, tmp_path, capsys, model_folder, rows):
    held_back = [
        {"prompt": "7+7=", "chosen": "14", "rejected": "77!"},
        {"prompt": "8+1=", "chosen": "!", "rejected": "9"},
    ]
    assert command_line.main([*arguments(), "--eval", rows(held_back, "eval.jsonl")]) == 0
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "adapter",
        "checkpoint.safetensors",
        "config.yaml",
        "metrics.jsonl",
        "report.txt",
        "tensorboard",
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert {"loss", "accuracy", "margin", "gradient_norm", "learning_rate"} <= set(lines[0])
    text = (run / "report.txt").read_text()
    assert text.strip() in capsys.readouterr().out
    comparison, reliability = tables(text)
    for table in (comparison, reliability):
        assert len({len(line) for line in table}) == 1
    assert comparison[0].split()[:3] == ["2", "held-back", "pairs"]

    # What the table says is what the saved model says.
    model = RewardModel.from_pretrained(run / "adapter", dtype="float32")
    prompts = [row["prompt"] for row in held_back]
    chosen, rejected = (model.score(prompts, [row[side] for row in held_back]) for side in ("chosen", "rejected"))
    margin = chosen - rejected
    accuracy, loss = comparison[2], comparison[3]
    assert f" {(margin > 0).float().mean():.3f} [" in accuracy
    assert loss.split()[-1] == f"{-torch.nn.functional.logsigmoid(margin).mean():.4f}"
    for row in (margin < 0).nonzero().flatten().tolist():
        assert f"margin {margin[row]:.2f}" in text
        assert f"people   {held_back[row]['chosen']}" in text


def test_a_run_on_steps(arguments, tmp_path, capsys):
    assert command_line.main([*arguments(STEPS), "--max-steps", "4", "--separator", ";"]) == 0
    run = tmp_path / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["process"] is True
    for table in tables((run / "report.txt").read_text()):
        assert len({len(line) for line in table}) == 1
    model = ProcessRewardModel.from_pretrained(run / "adapter", dtype="float32")
    assert model.separator == ";"
    _, held_back = load_step_labels(STEPS, model).hold_back(6, 0)
    comparison, _ = tables((run / "report.txt").read_text())
    assert comparison[0].startswith(f"{len(held_back)} held-back solutions, {held_back.num_steps} steps")
    with torch.no_grad():
        batch = held_back[torch.arange(len(held_back))]
        right = ((model.classifier(batch) > 0) == (batch.labels > 0))[batch.mask].float().mean()
    assert comparison[3].split()[-1] == f"{right:.3f}"


@pytest.mark.parametrize("made", [PAIRS, STEPS], ids=["pairs", "steps"])
def test_the_recorded_configuration_repeats_the_run(arguments, tmp_path, made):
    assert command_line.main(arguments(made)) == 0
    again = ["reward", "--config", str(tmp_path / "run/config.yaml"), "--output", str(tmp_path / "again")]
    assert command_line.main([*again, "--gradient-accumulation", "1"]) == 0
    first, second = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("made", [PAIRS, STEPS], ids=["pairs", "steps"])
def test_resumes_to_the_same_bits(arguments, tmp_path, made, monkeypatch):
    assert command_line.main(arguments(made)) == 0
    from aligngym.core.callbacks import Checkpoints

    save = Checkpoints.on_iteration

    def interrupted(callback, agent, metrics):
        save(callback, agent, metrics)
        if agent.iteration == 3:
            raise KeyboardInterrupt

    killed = [*arguments(made), "--output", str(tmp_path / "killed"), "--checkpoint-every", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "on_iteration", interrupted)
        assert command_line.main(killed) == 130
    assert command_line.main([*killed, "--resume"]) == 0
    first, second = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_continues_an_adapter(arguments, tmp_path):
    assert command_line.main(arguments()) == 0
    again = [*arguments(), "--adapter", str(tmp_path / "run/adapter"), "--output", str(tmp_path / "more")]
    assert command_line.main([*again, "--max-steps", "0"]) == 0
    first, second = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "more"))
    assert all(torch.equal(first[name], second[name]) for name in first)


class TestRefuses:
    """Each bad input gets one line that names it, before anything is written."""

    @pytest.fixture(autouse=True)
    def _nothing_written(self, tmp_path):
        yield
        assert not list((tmp_path / "run").glob("*"))

    @pytest.mark.parametrize(
        ("made", "message"),
        [
            ([], "no rows"),
            ([{"prompt": "a", "chosen": "b", "worse": "c"}], "row 1: no column 'rejected'"),
            ([*PAIRS, PAIRS[0] | {"rejected": "2"}], "row 31: chosen equals rejected"),
            ([*STEPS, {"prompt": "a", "completions": ["b"]}], "row 31: no column 'labels'"),
            ([*STEPS, STEPS[0] | {"labels": [True]}], "row 31: 3 steps and labels [True]: one label a step is needed"),
            ([PAIRS[0]], "leaves none to train on"),
        ],
    )
    def test_rows(self, arguments, capsys, made, message):
        assert message in refused(capsys, arguments(made))

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--train", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
            (["--eval", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
            (["--process"], "row 1: no column 'completions'"),
            (["--batch-size", "0"], "--batch-size must be at least 1"),
            (["--trackers", "nothing"], "unknown tracker 'nothing'"),
            (["--model", "./nowhere"], "./nowhere: no such file or folder"),
            (["--adapter", "./nowhere"], "nowhere: no adapter_config.json there"),
            (["--resume"], "no run in"),
        ],
    )
    def test_options(self, arguments, capsys, flags, message):
        assert message in refused(capsys, [*arguments(), *flags])


def test_refuses_a_folder_that_holds_another_run(arguments, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: x\n")
    assert "already holds a run" in refused(capsys, arguments())
    assert (tmp_path / "run" / "config.yaml").read_text() == "model: x\n"
