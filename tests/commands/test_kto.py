"""``aligngym kto`` from outside, and its data: labelled completions, or preference pairs taken apart."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file

from aligngym.alignment.data import load_labelled, load_preferences
from aligngym.alignment.kto import KTO
from aligngym.commands.main import main

ROWS = [
    {"prompt": f"{a}+{b}=", "completion": str(a + b) if good else f"{a}{b}!", "label": good}
    for a in range(1, 7)
    for b in range(1, 4)
    for good in (True, False)
]
PAIRS = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": f"{a}{b}!"} for a in range(1, 4) for b in (1, 2)]
CHAT = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|end|>' }}{% endfor %}"


@pytest.fixture
def file(tmp_path):
    """``file(rows, name)``: a file of rows."""

    def write(rows=ROWS, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


@pytest.fixture
def arguments(model_folder, file, tmp_path):
    """A run of six steps with a tiny model."""
    flags = f"--model {model_folder()} --train {file()} --output {tmp_path / 'run'} --max-steps 6 --batch-size 4"
    return ["kto", *flags.split(), "--lora-r", "4", "--samples", "1", "--kl-samples", "2", "--max-new-tokens", "4"]


@pytest.fixture
def own_tokenizer(model_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder())


def refused(capsys, arguments):
    """Run, expect status 2 and one line of error, and return it."""
    status = main(arguments)
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert status == 2
    assert len(error) == 1
    return error[0]


def conversation(row):
    role = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": role[name], "content": text}] if name in role else text for name, text in row.items()}


def test_a_run_and_its_repetition(arguments, tmp_path, capsys):
    options = [*arguments, "--undesirable-weight", "1.5", "--gradient-accumulation", "2"]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert re.search(r"rows     28 to train on \(\d+ tokens each\), 8 to judge by \(held back\)", printed)
    assert "steps    6 of 4 rows" in printed
    assert "labels told apart [95 %]" in printed
    assert "before (greedy)" in printed
    run = tmp_path / "run"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, 7))
    # The policy is its reference: z₀ is 0, and every value is σ(0), halves of λ.
    assert {"rewards/margin", "kl"} <= set(metrics[0])
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    assert (recorded["undesirable_weight"], recorded["beta"]) == (1.5, 0.1)
    assert main(["kto", "--config", str(run / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    first, again = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_an_interrupted_run_resumes_to_the_same_bits(arguments, tmp_path, monkeypatch, capsys):
    assert main(arguments) == 0
    next_batch = KTO.next_batch

    def interrupted(agent):
        if agent.iteration == 4:
            raise KeyboardInterrupt
        return next_batch(agent)

    killed = [*arguments, "--output", str(tmp_path / "killed"), "--checkpoint-every", "3"]
    monkeypatch.setattr(KTO, "next_batch", interrupted)
    assert main(killed) == 130
    monkeypatch.setattr(KTO, "next_batch", next_batch)
    capsys.readouterr()
    assert main([*killed, "--resume"]) == 0
    assert "steps    6 of 4 rows, from step 3" in capsys.readouterr().out
    whole, resumed = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_batches_of_a_number_of_tokens(arguments, tmp_path, monkeypatch, capsys):
    """Their epochs, and a run of them that is interrupted."""
    for flag in ("--batch-size", "--max-steps"):
        place = arguments.index(flag)
        arguments = arguments[:place] + arguments[place + 2 :]
    arguments += ["--tokens-per-batch", "40", "--epochs", "1.5"]
    sizes, next_batch = [], KTO.next_batch

    def interrupted(agent):
        batch = next_batch(agent)
        sizes.append(int(batch.labelled.sizes()[:2].sum()))
        if "killed" in arguments[-1] and agent.iteration == 5:
            raise KeyboardInterrupt
        return batch

    monkeypatch.setattr(KTO, "next_batch", interrupted)
    assert main(arguments) == 0
    assert max(sizes) <= 40
    assert f"steps    {len(sizes)} of rows of at most 40 tokens together\n" in capsys.readouterr().out
    arguments += ["--checkpoint-every", "2", "--output", str(tmp_path / "killed")]
    assert main(arguments) == 130
    monkeypatch.setattr(KTO, "next_batch", next_batch)
    assert main([*arguments, "--resume"]) == 0
    assert "together, from step 4\n" in capsys.readouterr().out
    whole, resumed = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("rows", [ROWS, [conversation(row) for row in ROWS]], ids=["text", "messages"])
def test_tokens_are_those_of_trl(file, own_tokenizer, rows):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    own_tokenizer.chat_template = CHAT
    found = load_labelled(file(rows), own_tokenizer)
    trainer = object.__new__(trl.KTOTrainer)
    trainer._tokenizer = own_tokenizer
    trainer.calculate_KL = False
    config = trl.KTOConfig(output_dir="unused", report_to=[], bf16=False, use_cpu=True)
    theirs = trainer._prepare_dataset(datasets.Dataset.from_list(rows), own_tokenizer, config, "train")
    assert [tokens.tolist() for tokens in found.prompts] == theirs["prompt_ids"]
    assert [tokens.tolist() for tokens in found.completion] == theirs["completion_ids"]
    assert found.label == theirs["label"]


@pytest.mark.parametrize("rows", [PAIRS, [conversation(row) for row in PAIRS]], ids=["text", "messages"])
def test_pairs_are_taken_apart_as_trl_does(file, own_tokenizer, rows):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    own_tokenizer.chat_template = CHAT
    unpaired = trl.unpair_preference_dataset(datasets.Dataset.from_list(rows)).to_list()
    found, expected = (
        load_labelled(file(rows), own_tokenizer),
        load_labelled(file(unpaired, "unpaired.jsonl"), own_tokenizer),
    )
    assert found.label == expected.label == [True] * 6 + [False] * 6
    for field in ("prompts", "completion"):
        assert all(map(torch.equal, getattr(found, field), getattr(expected, field)))
    pairs = load_preferences(file(rows), own_tokenizer)
    assert all(map(torch.equal, found.completion, pairs.chosen + pairs.rejected))


def test_every_format_and_way_to_write_a_label(file, own_tokenizer, tmp_path):
    pandas = pytest.importorskip("pandas")
    expected = load_labelled(file(), own_tokenizer)
    frame = pandas.DataFrame(ROWS)
    frame.to_csv(tmp_path / "r.csv", index=False)
    frame.to_parquet(tmp_path / "r.parquet")
    numbers = file([{**row, "label": int(row["label"])} for row in ROWS], "numbers.jsonl")
    for name in (tmp_path / "r.csv", tmp_path / "r.parquet", numbers):
        found = load_labelled(name, own_tokenizer)
        assert found.label == expected.label
        assert all(map(torch.equal, found.completion, expected.completion))


def test_rows_left_out_take_their_labels_along(file, own_tokenizer):
    """A prompt that fills the limit, an empty completion, and a completion that is cut."""
    rows = [
        {**ROWS[1], "prompt": "x" * 30},
        {**ROWS[0], "completion": ""},
        *ROWS[:3],
        {**ROWS[3], "completion": "y" * 40},
    ]
    with pytest.warns(UserWarning, match="cannot be used") as warned:
        found = load_labelled(file(rows), own_tokenizer, max_length=20, drop_invalid=True)
    text = " ".join(str(warning.message) for warning in warned)
    assert "1 of 6 rows cannot be used (row 2: completion is empty)" in text
    assert "1 of 5 prompts fill --max-length 20 alone (row 1 has 30 tokens)" in text
    assert found.label == [True, False, True, False]
    assert [len(x) for x in found.completion] == [2, 4, 2, 16]
    expected = load_labelled(file(ROWS[:4], "kept.jsonl"), own_tokenizer)
    assert all(map(torch.equal, found.prompts, expected.prompts))
    batch = found[torch.tensor([3, 0])]
    assert batch.desirable.tolist() == [False, True]
    assert batch.trajectories.actions[1].tolist()[:2] == expected.completion[0].tolist()
    assert found.num_tokens == sum(map(len, found.prompts)) + 24


def test_held_back_rows_share_no_prompt_with_the_others(file, own_tokenizer):
    train, held_back = load_labelled(file(), own_tokenizer).hold_back(7, seed=0)
    prompts = [{tuple(prompt.tolist()) for prompt in part.prompts} for part in (train, held_back)]
    assert not prompts[0] & prompts[1]
    assert (len(train), len(held_back)) == (28, 8)
    assert held_back.label == [True, False] * 4


class TestRefuses:
    """Each bad input gets one line that names it, before anything is written."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"label": "good"}, "1 of 36 rows cannot be used (row 4: label is 'good', neither true nor false)"),
            ({"label": None}, "row 4: label is None, neither true nor false"),
            ({"completion": " "}, "row 4: completion is empty"),
            ({"prompt": 3}, "row 4: prompt is int, neither text nor messages"),
            ({"completion": [{"role": "assistant", "content": "a"}]}, "row 4: text and messages are mixed"),
        ],
    )
    def test_rows_that_say_nothing(self, arguments, capsys, file, change, message):
        rows = [*ROWS[:3], {**ROWS[3], **change}, *ROWS[4:]]
        assert message in refused(capsys, [*arguments, "--train", file(rows, "bad.jsonl")])

    def test_missing_columns(self, arguments, capsys, file):
        error = refused(capsys, [*arguments, "--train", file([{"prompt": "a", "completion": "b"}], "bad.jsonl")])
        assert "row 1: no column 'label' (it has 'prompt', 'completion')" in error

    def test_labels_that_are_all_the_same(self, arguments, capsys, file):
        error = refused(capsys, [*arguments, "--train", file(ROWS[::2], "good.jsonl")])
        assert "every row is desirable, and KTO learns from both kinds" in error
        error = refused(capsys, [*arguments, "--train", file(ROWS[1::2], "bad.jsonl")])
        assert "every row is undesirable" in error

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--batch-size", "1"], "at least two rows on each device"),
            (["--beta", "0"], "beta must be positive"),
            (["--desirable-weight", "-1"], "desirable_weight must be positive, not -1"),
            (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        ],
    )
    def test_options_that_make_no_sense(self, arguments, capsys, flags, message):
        assert message in refused(capsys, [*arguments, *flags])
