"""``aligngym sft`` from outside: what it writes, what it refuses, and that it can be repeated and resumed."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from aligngym.alignment.demonstrations import load_demonstrations
from aligngym.alignment.language_policy import LanguagePolicy
from aligngym.alignment.supervised import evaluate_demonstrations
from aligngym.commands import main as command_line

ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(1, 7) for b in range(1, 6)]


@pytest.fixture
def rows(tmp_path):
    """``rows(rows, name)``: a file of rows."""

    def write(rows=ROWS, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


@pytest.fixture
def arguments(model_folder, rows, tmp_path):
    """A run of six steps with a tiny model."""
    flags = f"--model {model_folder()} --train {rows()} --output {tmp_path / 'run'} --max-steps 6 --batch-size 4"
    extra = "--lora-r 4 --samples 1 --kl-samples 2 --max-new-tokens 4 --dtype float32 --learning-rate 0.01"
    return ["sft", *flags.split(), *extra.split()]


def refused(capsys, arguments):
    """Run, expect status 2 and one line of error, and return it."""
    status = command_line.main(arguments)
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert status == 2
    assert len(error) == 1
    return error[0]


def test_a_run_leaves_everything_a_user_expects(arguments, tmp_path, capsys, model_folder, rows):
    assert command_line.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "before (greedy)" in printed
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert {"loss", "gradient_norm", "learning_rate", "token_accuracy", "seconds"} <= set(lines[0])
    assert next((run / "tensorboard").glob("events*"))
    assert yaml.safe_load((run / "config.yaml").read_text())["dtype"] == "float32"
    # Nothing that would be unpickled, and nothing that transformers leaves behind.
    assert {path.name for path in run.iterdir()} == {
        "adapter",
        "checkpoint.safetensors",
        "config.yaml",
        "metrics.jsonl",
        "report.txt",
        "tensorboard",
    }
    assert {path.suffix for path in (run / "adapter").iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}

    # The table is what the saved adapter says of the rows that were held back.
    policy = LanguagePolicy.from_pretrained(model_folder(), adapter=run / "adapter", dtype="float32")
    _, held_back = load_demonstrations(rows(), policy.tokenizer).hold_back(6, 0)
    result = evaluate_demonstrations(policy, held_back)
    plain = LanguagePolicy.from_pretrained(model_folder(), dtype="float32")
    table = (run / "report.txt").read_text().splitlines()
    (loss,) = [line.split()[-2:] for line in table if line.startswith("loss")]
    assert loss == [f"{evaluate_demonstrations(plain, held_back)['loss']:.4f}", f"{result['loss']:.4f}"]
    header, rule, *body = [line for line in table if line][:5]
    assert len({len(line) for line in (header, rule, *body)}) == 1


def test_the_recorded_configuration_repeats_the_run(arguments, tmp_path):
    assert command_line.main(arguments) == 0
    again = ["sft", "--config", str(tmp_path / "run/config.yaml"), "--output", str(tmp_path / "again")]
    assert command_line.main(again) == 0
    first, second = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_interrupted_run_resumes_to_the_same_bits(arguments, tmp_path, monkeypatch):
    assert command_line.main(arguments) == 0
    killed = [*arguments, "--output", str(tmp_path / "killed"), "--checkpoint-every", "2"]
    from aligngym.alignment.supervised import SupervisedFineTuning

    batches = SupervisedFineTuning._batches

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedFineTuning, "_batches", Interrupting(batches))
        assert command_line.main(killed) == 130
    assert not (tmp_path / "killed" / "adapter").exists()
    assert command_line.main([*killed, "--resume"]) == 0
    first, second = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 7))


class Interrupting:
    """Batches of which the sixth does not come."""

    def __init__(self, batches):
        self.batches = batches

    def __get__(self, agent, kind):
        def made(steps, collate):
            loader = self.batches(agent, steps, collate)
            collate = loader.collate_fn
            calls = []

            def stops(rows):
                calls.append(rows)
                if len(calls) == 6:
                    raise KeyboardInterrupt
                return collate(rows)

            loader.collate_fn = stops
            return loader

        return made


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
            ([{"question": "a"}], "row 1: columns prompt and completion, or messages, or text are needed"),
            ([*ROWS, {"prompt": "a"}], "row 31: no column 'completion'"),
            ([*ROWS, {"prompt": "a", "completion": " "}], "1 of 31 rows cannot be used (row 31: completion is empty)"),
            ([{"messages": [{"role": "assistant", "content": "a"}]}], "no chat template"),
            ([ROWS[0]], "leaves none to train on"),
        ],
    )
    def test_rows(self, arguments, capsys, rows, made, message):
        assert message in refused(capsys, [*arguments, "--train", rows(made, "bad.jsonl")])

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--train", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
            (["--batch-size", "0"], "--batch-size must be at least 1"),
            (["--batch-size", "8", "--gradient-accumulation", "3"], "cannot be computed 3 at a time in equal pieces"),
            (["--trackers", "nothing"], "unknown tracker 'nothing'"),
            (["--max-length", "4"], "prompts fill --max-length 4 alone"),
            (["--model", "./nowhere"], "./nowhere: no such file or folder"),
            (["--resume"], "no run in"),
        ],
    )
    def test_options(self, arguments, capsys, flags, message):
        assert message in refused(capsys, [*arguments, *flags])

    def test_broken_json(self, arguments, capsys, tmp_path):
        (tmp_path / "broken.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"prompt": \n')
        assert "line 2: not JSON" in refused(capsys, [*arguments, "--train", str(tmp_path / "broken.jsonl")])


def test_refuses_a_folder_that_holds_another_run(arguments, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: x\n")
    assert "already holds a run" in refused(capsys, arguments)
    assert (tmp_path / "run" / "config.yaml").read_text() == "model: x\n"
