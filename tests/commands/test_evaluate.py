"""``aligngym evaluate`` for language models: its tables, its numbers, and what it refuses. Runs: ``test_train.py``."""

import json
import re

import pytest
import torch
from peft import LoraConfig

from aligngym.alignment import LanguagePolicy
from aligngym.alignment.evaluation import evaluate_completions
from aligngym.alignment.multiple_choice import evaluate_choices, load_questions
from aligngym.alignment.reward_model import RewardModel
from aligngym.alignment.rewards import Rewards
from aligngym.commands.language_model_options import Chosen
from aligngym.commands.main import main

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(2, 7) for b in range(3)]
QUESTIONS = [{"question": f"Which is {c}?", "choices": ["x", "y", "z"], "answer": c} for c in "ABCABC"]
REWARDS = "def even(completion_ids, **_):\n    return [float(sum(ids) % 2 == 0) for ids in completion_ids]\n"


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory, perturb):
    """``trained(seed)``: the folder of a run with an adapter that changes what the model says."""

    def make(seed=3, adapter="null"):
        run = tmp_path_factory.mktemp("run")
        policy = LanguagePolicy.from_pretrained(model_folder(), dtype="float32")
        perturb(policy, scale=2.0, seed=seed)
        policy.save(run / "adapter")
        (run / "config.yaml").write_text(f"model: {model_folder()}\nadapter: {adapter}\nbeta: 0.1\n")
        return run

    return make


@pytest.fixture(scope="module")
def run_folder(trained):
    return trained()


@pytest.fixture
def file(tmp_path):
    """``file(name)``: prompts, choices or rewards."""

    def write(name):
        rows = {"prompts.jsonl": ROWS, "choices.jsonl": QUESTIONS}.get(name)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows) if rows else REWARDS)
        return str(tmp_path / name)

    return write


def refused(capsys, arguments):
    """Run, expect status 2 and one line of error, and return it."""
    status = main(arguments)
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert status == 2
    assert len(error) == 1
    return error[0]


def policy_of(run, model):
    """The policy whose reference is the model without the adapter."""
    policy = LanguagePolicy.from_pretrained(model, dtype="float32")
    saved = LanguagePolicy.from_pretrained(model, adapter=run / "adapter", dtype="float32")
    policy.load_trainable_state(saved.trainable_state())
    return policy


def lined_up(printed):
    """Split a table at two spaces or more, and check that its columns end where the title's do."""
    lines = printed.strip("\n").splitlines()
    assert set(lines[1]) == {"─"}
    assert len({len(line) for line in lines}) == 1
    return {line.split("  ")[0] or line.strip().split("  ")[0]: re.split(" {2,}", line.strip()) for line in lines}


COMPLETION_FLAGS = ["--dtype", "float32", "--max-new-tokens", "8"]


def test_completions_are_judged_beside_the_references(run_folder, file, model_folder, tmp_path, capsys):
    rewards = f"{file('r.py')}:even,length_penalty(per_token=0.1):0.5"
    output = tmp_path / "numbers.json"
    flags = ["--prompts", file("prompts.jsonl"), "--rewards", rewards, "--output", str(output), *COMPLETION_FLAGS]
    assert main(["evaluate", str(run_folder), *flags]) == 0
    table = lined_up(capsys.readouterr().out)
    expected = evaluate_completions(
        policy_of(run_folder, model_folder()), ROWS, Rewards.parse(rewards), max_new_tokens=8, rows_at_once=64
    )
    assert table["15 prompts, greedy [95 %]"][1:] == ["policy", "reference"]
    for label, name in (("reward", "reward"), ("even", "rewards/even"), ("length, tokens", "length")):
        for column, found in ((1, expected.policy[name]), (2, expected.reference[name])):
            numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", table[label][column])]
            assert numbers == pytest.approx(list(found), abs=0.06 if name == "length" else 6e-4)
    assert expected.policy["rewards/even"] != expected.reference["rewards/even"]
    assert table["win rate against the reference, ties half"][1].startswith(f"{expected.win_rate.value:.3f} [")
    assert table["KL to the reference, nats"][1] == f"{expected.kl:.2f} ± {expected.kl_standard_error:.2f}"
    assert expected.kl > 1
    numbers = json.loads(output.read_text())
    assert numbers == pytest.approx({n: None if v != v else v for n, v in expected.metrics.items()}, rel=1e-4)
    # The same by its parts.
    adapter = ["--adapter", str(run_folder / "adapter"), "--model", str(model_folder())]
    assert main(["evaluate", *adapter, *flags]) == 0
    assert lined_up(capsys.readouterr().out) == table


def test_several_completions(run_folder, file, capsys):
    flags = ["--prompts", file("prompts.jsonl"), "--rewards", f"{file('r.py')}:even", *COMPLETION_FLAGS]
    more = ["--samples", "4", "--no-reference", "--limit", "5", "--temperature", "1.5"]
    assert main(["evaluate", str(run_folder), *flags, *more]) == 0
    table = lined_up(capsys.readouterr().out)
    assert table["5 prompts, 4 drawn of each [95 %]"][1:] == ["policy"]
    assert "reward, even" in table  # a single reward has no line of its own
    assert "  even" not in table
    values = [float(table[name][1].split()[0]) for name in ("reward, even", "pass@2/even", "pass@4/even")]
    assert values == sorted(values)
    assert "KL to the reference, nats" not in table
    assert "distinct 2-grams, of one prompt" in table


def test_the_reference_of_a_continued_adapter_is_what_it_began_with(trained, model_folder, run_folder):
    continued = trained(seed=2, adapter=run_folder / "adapter")
    options = type("Arguments", (), {"dtype": "float32", "trust_remote_code": False, "temperature": 1.0})
    policy = Chosen.of(None, continued).load(options)
    prompts = [torch.tensor([5, 6, 7])]
    rows = policy.generate(prompts, max_new_tokens=6, completions=3)
    torch.testing.assert_close(rows.log_probs, policy_of(continued, model_folder())(rows).log_probs.detach())
    before = policy_of(run_folder, model_folder())
    torch.testing.assert_close(policy.reference_log_probs(rows), before(rows).log_probs.detach())
    assert not torch.allclose(policy.reference_log_probs(rows), before.reference_log_probs(rows))


@pytest.mark.parametrize("kind", ["sharing", "another"])
def test_a_reward_model_judges(run_folder, file, model_folder, tmp_path, perturb, capsys, kind, monkeypatch):
    base = model_folder("llama" if kind == "sharing" else "qwen2")
    lora = LoraConfig(r=4, target_modules="all-linear")
    model = RewardModel.for_training(base, lora=lora, dtype="float32")
    perturb(model.classifier)
    model.save(tmp_path / "judge")
    if kind == "sharing":
        monkeypatch.setattr(RewardModel, "from_pretrained", None)  # One base in memory is enough.
    output = tmp_path / "numbers.json"
    flags = ["--prompts", file("prompts.jsonl"), "--reward-model", str(tmp_path / "judge"), "--output", str(output)]
    assert main(["evaluate", str(run_folder), *flags, *COMPLETION_FLAGS, "--rewards", f"{file('r.py')}:even:2"]) == 0
    capsys.readouterr()
    policy = policy_of(run_folder, model_folder())
    expected = evaluate_completions(
        policy, ROWS, Rewards([model, Rewards.parse(f"{file('r.py')}:even").functions[0]], [1, 2]), max_new_tokens=8
    )
    numbers = json.loads(output.read_text())
    # In other batches, scores differ in the last digits, or in bfloat16 in the third.
    tolerance = 1e-4 if model.classifier.dtype == torch.float32 else 0.05
    assert numbers["reward"] == pytest.approx(expected.policy["reward"].value, abs=tolerance)
    assert numbers["reference_reward"] == pytest.approx(expected.reference["reward"].value, abs=tolerance)
    assert numbers["rewards/even"] == expected.policy["rewards/even"].value
    assert numbers["rewards/reward_model"] == pytest.approx(expected.policy["rewards/reward"].value, abs=tolerance)


@pytest.mark.parametrize("by_text", [True, False])
def test_choices(run_folder, file, model_folder, tmp_path, capsys, by_text):
    output, choices = tmp_path / "numbers.json", file("choices.jsonl")
    flags = ["--choices", choices, *COMPLETION_FLAGS, "--output", str(output), *(["--by-text"] if by_text else [])]
    assert main(["evaluate", str(run_folder), *flags]) == 0
    table = lined_up(capsys.readouterr().out)
    policy = policy_of(run_folder, model_folder())
    how = {"by": "text", "max_new_tokens": 8} if by_text else {}
    ours, theirs = (evaluate_choices(policy, load_questions(choices), reference=r, **how) for r in (False, True))
    assert by_text or ours.chosen != theirs.chosen
    title = f"6 questions, by {'text' if by_text else 'log-probability'} [95 %]"
    assert table[title][1:] == ["policy", "reference", "guessing"]
    for label, name, chance in (
        ("right in every order of the options", "circular_accuracy", "0.037"),
        ("right, mean of all orders", "accuracy", "0.333"),
    ):
        for column, found in ((1, ours), (2, theirs)):
            numbers = [float(number) for number in re.findall(r"\d+\.\d+", table[label][column])]
            assert numbers == pytest.approx(list(getattr(found, name)), abs=6e-4)
        assert table[label][3] == chance
    shares = [ours.chosen["B"] / 18, theirs.chosen["B"] / 18]
    row = next(values for values in table.values() if values[0] == "chosen B (right in 33.3%)")
    assert row[1:] == [f"{share:.1%}" for share in shares]
    expected = ours.metrics | {f"reference_{name}": value for name, value in theirs.metrics.items()}
    assert json.loads(output.read_text()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give the folder of a run, or a language model with --prompts FILE or --choices FILE"),
        ("--model {model}", "either --prompts FILE with --rewards, or --choices FILE"),
        ("{run}", "either --prompts FILE with --rewards, or --choices FILE"),
        ("{run} --prompts {prompts} --choices {choices}", "either --prompts FILE"),
        ("{run} --prompts {prompts}", "--rewards LIST or --reward-model FOLDER"),
        ("{run} --choices {choices} --rewards final_answer", "leave out --rewards"),
        ("{run} --choices {choices} --samples 2", "leave out --samples"),
        ("{run} {run} --choices {choices}", "one language model at a time"),
        ("{run} --adapter {run} --choices {choices}", "one language model at a time"),
        ("{run} --choices {choices} --limit 0", "--limit is at least 1, not 0"),
        ("{run} --choices {choices} --seed -1", "--seed is at least 0, not -1"),
        ("{run} --prompts {prompts} --rewards final_anser", "did you mean final_answer?"),
        ("{run} --prompts {prompts} --rewards exact_match(column=solution)", "needs a column 'solution'"),
        ("{run} --prompts {missing} --rewards final_answer", "missing.jsonl: no such file"),
        ("{run} --choices {missing}", "missing.jsonl: no such file"),
        ("{run} --choices {prompts}", "row 1: no column 'question' (it has 'prompt', 'answer')"),
        ("{run} --prompts {prompts} --reward-model ./nowhere", "reward model ./nowhere: no such folder"),
        ("{run} --prompts {prompts} --reward-model {run}/adapter", "a reward model's is SEQ_CLS"),
        ("nowhere --choices {choices}", "nowhere is no adapter in peft's format, and no finished run"),
        ("nowhere", "no run in nowhere"),
    ],
)
def test_bad_input_is_refused(flags, message, run_folder, model_folder, file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"prompts": file("prompts.jsonl"), "choices": file("choices.jsonl"), "missing": "missing.jsonl"}
    words = flags.format(run=run_folder, model=model_folder(), **names).split()
    assert message in refused(capsys, ["evaluate", *words])


def test_a_run_that_was_not_finished_has_no_adapter(tmp_path, model_folder, file, capsys):
    (tmp_path / "config.yaml").write_text(f"model: {model_folder()}\n")
    error = refused(capsys, ["evaluate", str(tmp_path), "--choices", file("choices.jsonl")])
    assert "no adapter in peft's format, and no finished run that has one" in error
