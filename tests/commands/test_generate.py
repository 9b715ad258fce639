"""``aligngym generate`` from outside: what it prints, writes and refuses, and that sft reads what it wrote."""

import argparse
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligngym.alignment import LanguagePolicy
from aligngym.alignment.demonstrations import load_demonstrations
from aligngym.alignment.prompts import prompt_tokens
from aligngym.commands.language_model_options import add_decoding_arguments, decoding_options
from aligngym.commands.main import main

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(2, 4) for b in range(2)]


@pytest.fixture(scope="module")
def adapter(model_folder, tmp_path_factory, perturb):
    """The folder of a run with an adapter that changes what the model says."""
    run = tmp_path_factory.mktemp("run")
    policy = LanguagePolicy.from_pretrained(model_folder(), dtype="float32")
    perturb(policy)
    policy.save(run / "adapter")
    (run / "config.yaml").write_text(f"model: {model_folder()}\nadapter: null\nbeta: 0.1\n")
    return run


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture(scope="module")
def chat_folder(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(model_folder()).save_pretrained(folder)
    return str(folder)


def refused(capsys, arguments):
    """Run, expect status 2 and one line of error, and return it."""
    status = main(arguments)
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert status == 2
    assert len(error) == 1
    return error[0]


def test_rows_are_written_with_what_was_drawn(adapter, prompts, tmp_path, capsys, model_folder):
    output = tmp_path / "new" / "completions.jsonl"
    flags = f"--samples 9 --temperature 1.5 --top-k 250 --max-new-tokens 40 --dtype float32 --seed 4 --output {output}"
    assert main(["generate", "--adapter", str(adapter), "--prompts", prompts, *flags.split()]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    policy = LanguagePolicy.from_pretrained(
        model_folder(), adapter=adapter / "adapter", dtype="float32", temperature=1.5
    )
    tokens = [prompt_tokens(row, policy.tokenizer) for row in ROWS]
    drawn = policy.generate(tokens, completions=9, top_k=250, max_new_tokens=40, seed=4)
    assert len(rows) == 36
    for number, row in enumerate(rows):
        assert row["prompt"] == ROWS[number // 9]["prompt"]
        assert row["answer"] == ROWS[number // 9]["answer"]
        ids = drawn.actions[number][drawn.mask[number]]
        assert row["completion"] == policy.tokenizer.decode(ids, skip_special_tokens=True)
        assert row["tokens"] == len(ids)
        assert row["log_prob"] == pytest.approx(float(drawn.log_probs[number].sum()), rel=1e-5)
        assert row["finished"] == (int(ids[-1]) == policy.tokenizer.eos_token_id)
    unfinished = sum(not row["finished"] for row in rows)
    assert 0 < unfinished < 36
    assert f"36 completions in {output}, {unfinished} of them not finished" in capsys.readouterr().out

    # What was written can be trained on.
    demonstrations = load_demonstrations(output, policy.tokenizer)
    for number in range(36):
        text = policy.tokenizer.decode(demonstrations.tokens[number][demonstrations.learned[number]])
        assert text.removesuffix("<|end|>") == rows[number]["completion"]
        assert torch.equal(demonstrations.prompts[number], tokens[number // 9])


def test_conversations_stay_conversations(chat_folder, tmp_path, capsys):
    path, output = tmp_path / "chat.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps({"prompt": [{"role": "user", "content": "2+2?"}]}) + "\n")
    flags = ["--model", chat_folder, "--max-new-tokens", "5", "--dtype", "float32", "--system-prompt", "Be brief."]
    assert main(["generate", "--prompts", str(path), "--output", str(output), *flags]) == 0
    (row,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert [message["role"] for message in row["completion"]] == ["assistant"]
    policy = LanguagePolicy.from_pretrained(chat_folder, dtype="float32")
    load_demonstrations(output, policy.tokenizer)
    # A prompt on the command line is a message as well.
    capsys.readouterr()
    assert main(["generate", "2+2?", *flags]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("▸ 2+2?\n\n  ")
    text = row["completion"][0]["content"]
    assert "".join(text.split()) in "".join(printed.split())


def test_what_is_printed_fits_and_says_it_all(adapter, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    words = " ".join(["word"] * 20)
    options = ["--max-new-tokens", "9", "--samples", "2", "--dtype", "float32"]
    assert main(["generate", words, "short", "--adapter", str(adapter / "adapter"), *options]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 50  # the line of facts is not wrapped
    assert max(len(line) for line in lines if "word" in line) <= 40
    assert lines[0].startswith("▸ word")
    assert lines[1].startswith("  word")
    assert printed.count("word") == 20
    assert printed.count("▸") == 2
    assert printed.count("log-probability") == 4
    assert [line[:2] for line in lines if line[:2] in ("1 ", "2 ")] == ["1 ", "2 "] * 2


def test_greedily_by_default_and_until_a_stop(adapter, model_folder, tmp_path):
    def written(*flags):
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        base = ["generate", "2+2=", "--adapter", str(adapter), "--max-new-tokens", "20", "--dtype", "float32"]
        assert main([*base, *flags, "--output", str(output)]) == 0
        return json.loads(output.read_text())

    policy = LanguagePolicy.from_pretrained(model_folder(), adapter=adapter / "adapter", dtype="float32")
    prompt = prompt_tokens({"prompt": "2+2="}, policy.tokenizer)
    greedy = policy.generate([prompt], greedy=True, max_new_tokens=20)
    text = policy.tokenizer.decode(greedy.actions[0][greedy.mask[0]], skip_special_tokens=True)
    assert written()["completion"] == written("--seed", "7")["completion"] == text
    assert written("--no-greedy")["completion"] != text
    assert written("--no-greedy", "--seed", "1")["completion"] != written("--no-greedy", "--seed", "2")["completion"]
    stopped = written("--stop", "@@@", "--stop", text[3])
    assert stopped["completion"] == text[: text.index(text[3]) + 1]
    assert stopped["finished"]
    # The model alone says something else.
    base = policy.generate([prompt], greedy=True, max_new_tokens=20, reference=False)
    assert torch.equal(base.actions, greedy.actions)
    assert written("--model", str(model_folder()))["completion"] == text


def test_the_batch_size_changes_nothing(adapter, prompts, tmp_path):
    for size in ("1", "64"):
        flags = f"--samples 2 --max-new-tokens 6 --dtype float32 --batch-size {size} --output {tmp_path / size}.jsonl"
        assert main(["generate", "--adapter", str(adapter), "--prompts", prompts, *flags.split()]) == 0
    one, all_at_once = ([json.loads(line) for line in (tmp_path / f"{x}.jsonl").open()] for x in ("1", "64"))
    assert [row["completion"] for row in one] == [row["completion"] for row in all_at_once]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give either prompts on the command line or --prompts FILE"),
        ("hello --prompts {prompts}", "give either prompts"),
        ("--prompts nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("hello --output out.csv", "--output out.csv: a .jsonl file is written"),
        ("hello --output {taken}", "exists already: choose another"),
        ("hello --samples 0", "--samples is at least 1, not 0"),
        ("hello --batch-size 0", "--batch-size is at least 1, not 0"),
        ("hello --seed -1", "--seed is at least 0, not -1"),
        ("hello --samples 2 --greedy", "--samples 2: greedy completions are all alike"),
        ("hello --temperature 0.5", "--temperature 0.5 is of samples: add --no-greedy"),
        ("hello --temperature 0 --no-greedy", "temperature is positive, not 0.0"),
        ("hello --top-p 2", "top_p is a probability"),
        ("hello --max-new-tokens 0", "max_new_tokens is at least 1"),
        ("hello --max-new-tokens 999", "leaves no room for a completion of 999"),
        ("hello --system-prompt Hi", "has no chat template"),
        ("--prompts {prompts} --system-prompt Hi", "row 1: a system prompt goes before messages"),
        ("hello --adapter {prompts}", "is no adapter in peft's format, and no finished run that has one"),
        ("hello --adapter {reward}", "is an adapter for SEQ_CLS; one for CAUSAL_LM writes text"),
    ],
)
def test_bad_input_is_refused(flags, message, model_folder, prompts, tmp_path, capsys):
    taken, reward = tmp_path / "taken.jsonl", tmp_path / "reward"
    taken.write_text("kept")
    reward.mkdir()
    (reward / "adapter_config.json").write_text(json.dumps({"task_type": "SEQ_CLS"}))
    words = flags.format(prompts=prompts, taken=taken, reward=reward).split()
    assert message in refused(capsys, ["generate", "--model", str(model_folder()), *words])
    assert taken.read_text() == "kept"


def test_ends_of_lines_can_be_written_on_a_command_line():
    parser = argparse.ArgumentParser()
    add_decoding_arguments(parser)
    assert decoding_options(parser.parse_args(["--stop", r"\n\nQ:", "--stop", "a"]))["stop"] == ("\n\nQ:", "a")


def test_an_empty_prompt_is_refused(model_folder, capsys):
    assert "the prompt is empty" in refused(capsys, ["generate", " ", "--model", str(model_folder())])
