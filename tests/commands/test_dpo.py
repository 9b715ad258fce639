"""``aligngym dpo`` from outside: what it writes, what it refuses, and that a killed run continues to the same bits."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from aligngym.alignment import DPO, LanguagePolicy, load_preferences
from aligngym.alignment.preference_losses import LOSSES
from aligngym.commands.dpo import LOSS_NAMES
from aligngym.commands.main import main
from aligngym.core import Trajectories

PAIRS = [
    {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": f"{a}{b}!"} for a in range(1, 7) for b in range(1, 6)
]
CHAT = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|end|>' }}{% endfor %}"


@pytest.fixture
def pairs(tmp_path):
    """``pairs(rows, name)``: a file of rows."""

    def write(rows=PAIRS, name="pairs.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


@pytest.fixture
def arguments(model_folder, pairs, tmp_path):
    """A run of eight steps with a tiny model."""
    flags = f"--model {model_folder()} --train {pairs()} --output {tmp_path / 'run'} --max-steps 8 --batch-size 4"
    return ["dpo", *flags.split(), "--lora-r", "4", "--samples", "1", "--kl-samples", "2", "--max-new-tokens", "4"]


def refused(capsys, arguments):
    """Run, expect status 2 and one line of error, and return it."""
    status = main(arguments)
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert status == 2
    assert len(error) == 1
    return error[0]


def test_a_run_leaves_everything_a_user_expects(arguments, tmp_path, capsys, model_folder, pairs):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "implicit-reward accuracy" in printed
    assert "before (greedy)" in printed
    run = tmp_path / "run"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))
    assert next((run / "tensorboard").glob("events*"))
    assert (run / "adapter" / "tokenizer_config.json").exists()
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    assert recorded["beta"] == 0.1
    assert recorded["dtype"] in ("float32", "bfloat16")

    # Plain peft on the plain model says what our policy says.
    plain = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=getattr(torch, recorded["dtype"]))
    plain = peft.PeftModel.from_pretrained(plain, run / "adapter").eval()
    policy = LanguagePolicy.from_pretrained(model_folder(), adapter=run / "adapter", dtype=recorded["dtype"])
    batch = load_preferences(pairs(), policy.tokenizer)[torch.arange(3)].chosen
    ours = policy(batch).log_probs
    for row in range(3):
        prompt = batch.observations[row][batch.observations[row] >= 0]
        tokens = batch.actions[row][batch.mask[row]]
        logits = plain(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        tolerance = 1e-5 if recorded["dtype"] == "float32" else 5e-2
        torch.testing.assert_close(ours[row][batch.mask[row]], expected, rtol=tolerance, atol=tolerance)


def test_the_help_names_every_loss():
    assert set(LOSS_NAMES) == set(LOSSES)


def test_a_mix_of_losses_is_recorded_and_taken_up_again(arguments, tmp_path, capsys):
    mix = "sigmoid:0.8,bco_pair:0.2,nll:1"
    assert main([*arguments, "--loss", mix]) == 0
    run = tmp_path / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["loss"] == mix
    # log 2 of each comparison with the reference, 0.8 + 2 · 0.2 of them, and the likelihood.
    loss = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert main([*arguments, "--loss", "nll", "--output", str(tmp_path / "nll")]) == 0
    likelihood = json.loads((tmp_path / "nll" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert loss - likelihood == pytest.approx(1.2 * math.log(2), rel=1e-3)
    assert main(["dpo", "--output", str(run), "--resume"]) == 0


def test_a_record_of_unknown_options_is_refused(arguments, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("bata: 0.5\n")
    error = refused(capsys, ["dpo", "--output", str(tmp_path / "run"), "--resume"])
    assert "unknown option 'bata': did you mean beta?" in error


def test_the_recorded_configuration_repeats_the_run(arguments, tmp_path):
    assert main(arguments) == 0
    assert main(["dpo", "--config", str(tmp_path / "run/config.yaml"), "--output", str(tmp_path / "again")]) == 0
    first, again = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_gradient_accumulation_does_not_change_the_adapter(arguments, tmp_path):
    assert main(arguments) == 0
    assert main([*arguments, "--output", str(tmp_path / "pieces"), "--gradient-accumulation", "4"]) == 0
    first, pieces = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "pieces"))
    for name in first:
        torch.testing.assert_close(first[name], pieces[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kill_after", [3, 5])
def test_a_killed_run_resumes_to_the_same_bits(arguments, tmp_path, capsys, kill_after):
    assert main(arguments) == 0
    killed = [*arguments, "--output", str(tmp_path / "killed"), "--checkpoint-every", "2", "--lora-dropout", "0.0"]
    metrics = tmp_path / "killed" / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *killed], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < kill_after):
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "adapter").exists()
    capsys.readouterr()
    assert main([*killed, "--resume"]) == 0
    # It goes on where the last checkpoint was: a run from the start would come to the same bits too.
    continued = int(re.search(r"steps .*, from step (\d+)", capsys.readouterr().out)[1])
    assert kill_after - 1 <= continued < 8
    assert continued % 2 == 0
    whole, resumed = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 9))


class TestTokensPerBatch:
    """Pairs of 10 or 11 tokens: prompts, both completions and their ends."""

    @pytest.fixture
    def arguments(self, arguments):
        """A run of two epochs."""
        for flag in ("--batch-size", "--max-steps"):
            place = arguments.index(flag)
            arguments = arguments[:place] + arguments[place + 2 :]
        return [*arguments, "--tokens-per-batch", "50", "--epochs", "2"]

    def test_an_interrupted_run_and_its_repetition_come_to_the_same_bits(
        self, arguments, tmp_path, capsys, monkeypatch
    ):
        sizes = []
        next_batch = DPO.next_batch

        def watched(agent):
            batch = next_batch(agent)
            sizes.append(int(batch.preferences.sizes()[:2].sum()))
            return batch

        monkeypatch.setattr(DPO, "next_batch", watched)
        assert main(arguments) == 0
        run = tmp_path / "run"
        recorded = yaml.safe_load((run / "config.yaml").read_text())
        assert recorded["tokens_per_batch"] == 50
        assert max(sizes) <= 50
        found = re.search(r"pairs +(\d+) to train on \((\d+) tokens each\)", printed := capsys.readouterr().out)
        assert f"steps    {len(sizes)} of pairs of at most 50 tokens together\n" in printed
        # Two epochs, in batches that lack less than a pair.
        assert sum(sizes) / 2 == pytest.approx(int(found[1]) * int(found[2]), rel=0.05)
        assert sum(sizes) / 50 <= len(sizes) <= sum(sizes) / 38 + 2
        assert (run / "metrics.jsonl").read_text().count("\n") == len(sizes)

        def interrupted(agent):
            if agent.iteration == len(sizes) // 2 + 2:
                raise KeyboardInterrupt
            return next_batch(agent)

        killed = [*arguments, "--output", str(tmp_path / "killed"), "--checkpoint-every", "3"]
        monkeypatch.setattr(DPO, "next_batch", interrupted)
        assert main(killed) == 130
        monkeypatch.setattr(DPO, "next_batch", next_batch)
        assert main([*killed, "--resume"]) == 0
        assert "together, from step " in capsys.readouterr().out
        assert main(["dpo", "--config", str(run / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
        whole, *others = (
            load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "killed", "again")
        )
        assert all(torch.equal(whole[name], other[name]) for name in whole for other in others)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--tokens-per-batch", "0"], "--tokens-per-batch must be at least 1, not 0"),
            (["--batch-size", "4"], "--tokens-per-batch says how many rows a step has, and so does --batch-size 4"),
            (["--gradient-accumulation", "2"], "and so does --gradient-accumulation 2: leave one out"),
            (["--tokens-per-batch", "10"], "has 11 tokens, more than tokens_per_batch=10: allow so many"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, arguments, capsys, tmp_path, flags, message):
        error = refused(capsys, [*arguments, *flags])
        assert message in error
        assert not (tmp_path / "run").exists()


#: The command with a pause before every step, so that there is a moment to kill it in.
SLOWLY = """
import sys, time
import torch
torch.set_num_threads(2)
from aligngym.alignment import DPO
from aligngym.commands.main import main
next_batch = DPO.next_batch
def slow(agent):
    time.sleep(0.4)
    return next_batch(agent)
DPO.next_batch = slow
sys.exit(main(sys.argv[1:]))
"""


class TestRefuses:
    """Each bad input gets one line that names it, before anything is written."""

    @pytest.fixture(autouse=True)
    def _nothing_written(self, tmp_path):
        yield
        written = {path.name: path.read_text() for path in (tmp_path / "run").glob("*")}
        recorded = written.pop("config.yaml", "beta: 0.5\n").splitlines()
        assert not written
        # What a test has put there itself.
        assert recorded in (["beta: 0.5"], ["beta: 0.5", f"output: {tmp_path / 'run'}"])

    def with_train(self, arguments, file):
        return [*arguments, "--train", file]

    def test_a_missing_file(self, arguments, capsys):
        assert "nowhere.jsonl: no such file" in refused(capsys, self.with_train(arguments, "nowhere.jsonl"))

    def test_a_missing_column(self, arguments, capsys, pairs):
        rows = [{"prompt": "a", "chosen": "b", "worse": "c"}]
        assert "row 1: no column 'rejected'" in refused(capsys, self.with_train(arguments, pairs(rows)))

    def test_a_column_missing_in_one_row(self, arguments, capsys, pairs):
        rows = [*PAIRS, {"prompt": "a", "rejected": "c"}]
        assert "row 31: no column 'chosen'" in refused(capsys, self.with_train(arguments, pairs(rows)))

    def test_an_empty_dataset(self, arguments, capsys, pairs):
        assert "no rows" in refused(capsys, self.with_train(arguments, pairs([])))

    def test_broken_json(self, arguments, capsys, tmp_path):
        (tmp_path / "broken.jsonl").write_text(json.dumps(PAIRS[0]) + '\n{"prompt": \n')
        assert "line 2: not JSON" in refused(capsys, self.with_train(arguments, str(tmp_path / "broken.jsonl")))

    def test_rows_that_say_nothing_until_told_to_drop_them(self, arguments, capsys, pairs, tmp_path):
        same = {"prompt": "a", "chosen": "b", "rejected": "b"}
        file = pairs([PAIRS[0], same, {**PAIRS[1], "rejected": "  "}, {**PAIRS[2], "chosen": ""}, *PAIRS, same])
        error = refused(capsys, self.with_train(arguments, file))
        assert "4 of 35 rows cannot be used" in error
        assert "row 2: chosen equals rejected; row 3: rejected is empty; row 4: chosen is empty; …" in error
        assert "--drop-invalid" in error
        with pytest.warns(UserWarning, match="4 of 35"):
            load = load_preferences(file, _tokenizer(arguments), drop_invalid=True)
        assert len(load) == 31

    def test_prompts_longer_than_the_limit(self, arguments, capsys, pairs):
        rows = [*PAIRS, {"prompt": "x" * 50, "chosen": "abcd", "rejected": "abce"}]
        error = refused(capsys, [*self.with_train(arguments, pairs(rows)), "--max-length", "20"])
        assert "1 of 31 prompts fill --max-length 20 alone (row 31 has 50 tokens)" in error
        # 30 rows of 4+2 or so characters and their ends are kept; the long row's 2 × 5 tokens are lost.
        kept = sum(len(row["chosen"]) + len(row["rejected"]) + 2 for row in PAIRS)
        assert f"{10 / (kept + 10):.1%} of all completion tokens would be lost" in error

    def test_conversations_without_a_chat_template(self, arguments, capsys, pairs):
        error = refused(capsys, self.with_train(arguments, pairs([conversation(row) for row in PAIRS])))
        assert "no chat template" in error

    def test_completions_that_never_end(self, arguments, capsys, pairs):
        tokenizer = _tokenizer(arguments)
        tokenizer.chat_template = CHAT.replace("<|end|>", " ")
        with pytest.raises(ValueError, match="would never learn to stop"):
            load_preferences(pairs([conversation(row) for row in PAIRS]), tokenizer)

    def test_an_unknown_model(self, arguments, capsys):
        error = refused(capsys, [*arguments, "--model", "nobody/such-a-model"])
        assert "cannot load the model 'nobody/such-a-model'" in error
        assert "./nowhere: no such file or folder" in refused(capsys, [*arguments, "--model", "./nowhere"])

    def test_a_folder_that_holds_another_run(self, arguments, capsys, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text("beta: 0.5\n")
        assert "already holds a run" in refused(capsys, arguments)
        assert (tmp_path / "run" / "config.yaml").read_text() == "beta: 0.5\n"

    def test_resuming_without_a_run(self, arguments, capsys):
        assert "no run in" in refused(capsys, [*arguments, "--resume"])

    def test_resuming_with_other_options(self, arguments, capsys, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text(f"beta: 0.5\noutput: {tmp_path / 'run'}\n")
        error = refused(capsys, ["dpo", "--output", str(tmp_path / "run"), "--resume", "--beta", "0.25"])
        assert "--resume continues with beta=0.5, and 0.25 was given: leave it out" in error

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--loss", "ipo", "--label-smoothing", "0.1"], "label_smoothing=0.1 would be ignored"),
            (["--beta", "0"], "beta must be positive"),
            (["--loss", "dpo"], "unknown loss 'dpo': choose from sigmoid"),
            (["--loss", "sigmoid:0.8,nll:-1"], "the weight of the loss 'nll' must be positive, not -1"),
            (["--batch-size", "0"], "--batch-size must be at least 1"),
            (["--trackers", "nothing"], "unknown tracker 'nothing'"),
            (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        ],
    )
    def test_options_that_make_no_sense(self, arguments, capsys, flags, message):
        assert message in refused(capsys, [*arguments, *flags])

    def test_unknown_options_in_a_file_with_a_hint(self, arguments, capsys, tmp_path):
        (tmp_path / "options.yaml").write_text("learning_rat: 1e-4\n")
        error = refused(capsys, [*arguments, "--config", str(tmp_path / "options.yaml")])
        assert "unknown option 'learning_rat': did you mean learning_rate?" in error


def test_every_format_gives_the_same_tokens(pairs, tmp_path, arguments):
    pandas = pytest.importorskip("pandas")
    tokenizer = _tokenizer(arguments)
    frame = pandas.DataFrame(PAIRS)
    frame.to_csv(tmp_path / "p.csv", index=False)
    frame.to_parquet(tmp_path / "p.parquet")
    (tmp_path / "p.json").write_text(json.dumps(PAIRS))
    implicit = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in PAIRS]
    expected = load_preferences(pairs(), tokenizer)
    files = [str(tmp_path / name) for name in ("p.csv", "p.parquet", "p.json")]
    for file in files:
        found = load_preferences(file, tokenizer)
        for side in ("prompts", "chosen", "rejected"):
            assert all(map(torch.equal, getattr(found, side), getattr(expected, side)))
    # Without a prompt column, trl takes the longest common beginning for it; the sequences stay the same.
    found = load_preferences(pairs(implicit, "implicit.jsonl"), tokenizer)
    for side in ("chosen", "rejected"):
        whole = [[*map(torch.cat, zip(x.prompts, getattr(x, side), strict=True))] for x in (found, expected)]
        assert all(map(torch.equal, *whole))


def test_tokens_are_those_of_trl(pairs, arguments):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    tokenizer = _tokenizer(arguments)
    tokenizer.chat_template = CHAT
    for rows in (PAIRS, [conversation(row) for row in PAIRS]):
        found = load_preferences(pairs(rows), tokenizer)
        trainer = object.__new__(trl.DPOTrainer)
        trainer._tokenizer = tokenizer
        config = trl.DPOConfig(output_dir="unused", report_to=[], bf16=False, use_cpu=True)
        theirs = trainer._prepare_dataset(datasets.Dataset.from_list(rows), tokenizer, config, "train")
        for ours, name in (
            (found.prompts, "prompt_ids"),
            (found.chosen, "chosen_ids"),
            (found.rejected, "rejected_ids"),
        ):
            assert [tokens.tolist() for tokens in ours] == theirs[name]


def test_held_back_pairs_share_no_prompt_with_the_others(pairs, arguments):
    rows = PAIRS * 3
    random.Random(0).shuffle(rows)
    train, held_back = load_preferences(pairs(rows), _tokenizer(arguments)).hold_back(15, seed=0)
    prompts = [{tuple(prompt.tolist()) for prompt in part.prompts} for part in (train, held_back)]
    assert not prompts[0] & prompts[1]
    assert len(train) + len(held_back) == 90
    assert 15 <= len(held_back) <= 17


def conversation(row):
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
    }


def _tokenizer(arguments):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(arguments[arguments.index("--model") + 1])


def test_left_padding_is_what_batches_of_prompts_get(pairs, arguments):
    batch: Trajectories = load_preferences(pairs(), _tokenizer(arguments))[torch.arange(30)].chosen
    assert (batch.observations[:, -1] >= 0).all()
    assert (batch.actions[:, 0] >= 0).all()
