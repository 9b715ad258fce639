import json

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from aligngym.commands.main import main

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]


@pytest.fixture
def prompts(tmp_path):
    def write(rows=ROWS, name="sums.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def digits(tmp_path):
    """A reward for which a random model needs no luck: how many characters are digits."""
    path = tmp_path / "digits.py"
    path.write_text(
        "def digits(completions, **_):\n"
        "    return [sum(c.isdigit() for c in text) / 4 for text in completions]\n"
        "def broken(completions, **_):\n"
        "    return [float('nan') for _ in completions]\n"
        "def needs(completions, hint, **_):\n"
        "    return [0.0 for _ in completions]\n"
    )
    return path


@pytest.fixture
def arguments(model_folder, prompts, digits, tmp_path):
    def make(command="grpo", **changes):
        flags = {
            "model": model_folder(),
            "train": prompts(),
            "rewards": f"{digits}:digits",
            "output": tmp_path / "run",
            "max-steps": 3,
            "batch-size": 2,
            "max-new-tokens": 4,
            "lora-r": 4,
            "learning-rate": 0.01,
        }
        flags |= {"group-size": 3} if command == "grpo" else {}
        flags |= {name.replace("_", "-"): value for name, value in changes.items()}
        given = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
        return [command, *given]

    return make


@pytest.mark.parametrize("command", ["grpo", "ppo"])
def test_a_run_leaves_an_adapter_a_report_and_everything_to_read(arguments, tmp_path, capsys, model_folder, command):
    assert main(arguments(command)) == 0
    shown = capsys.readouterr().out
    run = tmp_path / "run"
    assert "13 to train on, 3 to judge by (held back)" in shown
    assert f"3 of 2 prompts × {3 if command == 'grpo' else 1} completions" in shown
    assert "3 prompts, greedy [95 %]" in shown
    assert "3 prompts, drawn [95 %]" in shown
    assert "win rate against the reference" in (run / "report.txt").read_text()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == [1, 2, 3]
    assert {"return", "rewards/digits", "kl_to_reference", "beta", "length", "unfinished"} <= metrics[0].keys()
    assert ("value_loss" in metrics[0]) == (command == "ppo")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["max_new_tokens"] == 4
    written = (run / "completions.jsonl").read_text().split("\n")[:-1]
    assert len(written) == (6 if command == "grpo" else 2)
    base = AutoModelForCausalLM.from_pretrained(model_folder())
    assert PeftModel.from_pretrained(base, run / "adapter").active_adapter == "default"


@pytest.mark.parametrize("algorithm", ["grpo", "dr-grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "best-of-n"])
def test_every_algorithm_runs(arguments, tmp_path, algorithm):
    assert main(arguments(algorithm=algorithm, max_steps=1, show_every=0)) == 0
    assert not (tmp_path / "run" / "completions.jsonl").exists()


@pytest.mark.parametrize("command", ["grpo", "ppo"])
def test_an_interrupted_run_is_continued_exactly(arguments, tmp_path, monkeypatch, command):
    further = {"checkpoint_every": 1, "beta": 0.1, "kl_target": 0.01, "kl_horizon": 100, "refills": 1}
    assert main(arguments(command, output=tmp_path / "whole", **further)) == 0
    from aligngym.agents import PolicyGradient

    iterate, done = PolicyGradient.iterate, []

    def killed(self):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return iterate(self)

    with monkeypatch.context() as patched:
        patched.setattr(PolicyGradient, "iterate", killed)
        assert main(arguments(command, output=tmp_path / "cut", **further)) == 130
    assert main([command, "--output", str(tmp_path / "cut"), "--resume"]) == 0
    whole, cut = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    texts = [(tmp_path / run / "completions.jsonl").read_text() for run in ("whole", "cut")]
    assert texts[0] == texts[1]
    betas = [
        [json.loads(line)["beta"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "cut")
    ]
    assert betas[0] == betas[1]
    assert len(set(betas[0])) == 3


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"train": None}, "--train is missing"),
            ({"train": "nowhere.jsonl"}, "--train nowhere.jsonl: no such file"),
            ({"rewards": None}, "nothing rewards the completions: give --rewards, --reward-model, or both"),
            ({"rewards": "final_anser"}, "final_answer"),
            ({"group_size": 1}, "--group-size 1: a completion is compared with others, so at least 2"),
            ({"kl_target": 5}, "--kl-target adapts a penalty that begins at --beta"),
            ({"algorithm": "rloo", "clip": 0.2}, "--clip would be ignored: rloo has no such clip"),
            ({"batch_size": 0}, "--batch-size must be at least 1"),
            ({"max_new_tokens": 500}, "leaves no room for a completion of 500: the model reads 256 in all"),
            ({"temperature": 0}, "temperature is positive"),
            ({"reward_model": "nowhere"}, "nowhere"),
        ],
    )
    def test_one_line_says_what_to_change(self, arguments, tmp_path, capsys, changes, message):
        assert main(arguments(**changes)) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("aligngym: error: ")
        assert message in error
        assert not (tmp_path / "run" / "adapter").exists()

    def test_a_column_that_a_reward_needs(self, arguments, digits, capsys):
        assert main(arguments(rewards=f"{digits}:needs")) == 2
        assert "reward 'needs' needs a column 'hint', and the data have 'prompt', 'answer'" in capsys.readouterr().err

    def test_a_reward_that_is_no_number_names_the_completion(self, arguments, digits, capsys):
        assert main(arguments(rewards=f"{digits}:broken")) == 2
        error = capsys.readouterr().err
        assert "broken" in error
        assert "nan" in error
        assert "+" in error

    def test_a_reward_model_with_another_tokenizer(self, arguments, model_folder, tmp_path, capsys):
        pairs = write_pairs(tmp_path / "pairs.jsonl", 6)
        other = str(tmp_path / "reward")
        words = ["--model", str(model_folder("llama", vocab_size=300)), "--train", pairs, "--output", other]
        assert main(["reward", *words, "--max-steps", "1", "--batch-size", "2", "--lora-r", "4"]) == 0
        capsys.readouterr()
        assert main(arguments("ppo", reward_model=f"{other}/adapter")) == 2
        error = capsys.readouterr().err
        assert "reward model" in error
        assert not (tmp_path / "run" / "adapter").exists()


def write_pairs(path, count):
    rows = [{"prompt": f"{number}", "chosen": "yes", "rejected": "no"} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_ppo_against_a_reward_model_that_shares_the_base(arguments, model_folder, tmp_path, capsys):
    pairs = write_pairs(tmp_path / "pairs.jsonl", 8)
    words = ["--model", str(model_folder()), "--train", pairs, "--output", str(tmp_path / "reward")]
    assert main(["reward", *words, "--max-steps", "2", "--batch-size", "2", "--lora-r", "4"]) == 0
    assert main(arguments("ppo", rewards=None, reward_model=tmp_path / "reward" / "adapter")) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("rewards/reward_model" in record for record in metrics)
