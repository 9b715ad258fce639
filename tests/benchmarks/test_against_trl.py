"""The measurements beside trl, with a tiny model: both sides do the same, and the table says what was measured."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
MACHINE = {"name": "a machine", "dtype": "float32", "flops": 1e12, "bandwidth": 1e9, "versions": {"torch": "2"}}


@pytest.fixture
def scripts(monkeypatch):
    """Return the module that both share, and the two scripts."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import against_trl
    import dpo_against_trl
    import grpo_against_trl

    monkeypatch.setattr(against_trl, "VOCABULARY", 300)
    return against_trl, dpo_against_trl, grpo_against_trl


@pytest.fixture
def measure(scripts, tokenizer, tmp_path, monkeypatch, capsys):
    """``measure(script, flags, **machine)``: what a script prints and writes, with all sides in this process."""
    shared, *_ = scripts
    tokenizer.save_pretrained(tmp_path)

    def here(script, flags):
        given = ["--model=random-tiny", f"--tokenizer={tmp_path}", "--dtype=float32", *flags]

        def run(side, given, limit=None):
            if side == "machine":
                return MACHINE
            monkeypatch.setattr(shared, "in_a_process", None)
            script.main([*given, f"--side={side}"])
            monkeypatch.setattr(shared, "in_a_process", run)
            lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(shared.RESULT)]
            return json.loads(lines[0].removeprefix(shared.RESULT))

        monkeypatch.setattr(shared, "in_a_process", run)
        script.main([*given, f"--json={tmp_path / 'all.json'}"])
        return capsys.readouterr().out, json.loads((tmp_path / "all.json").read_text())

    return here


def test_dpo_sides_see_the_same_pairs_and_weights(scripts, measure):
    flags = ["--data=long", "--prompt-tokens=30", "--completion-tokens=8", "--steps=2", "--warm-up=1"]
    flags += ["--learning-rate=2e-3", "--micro-batch-size=2"]
    out, written = measure(scripts[1], [*flags, "--against", "trl", "trl-best"])
    sides = written["sides"]
    assert sides["ours"]["losses"][0] == pytest.approx(torch.tensor(0.5).log().neg())
    # After steps of 2e-3 the losses tell other pairs, another order and other weights apart.
    assert abs(sides["ours"]["losses"][2] - sides["ours"]["losses"][0]) > 3e-4
    for side in ("trl", "trl-best"):
        torch.testing.assert_close(sides[side]["losses"], sides["ours"]["losses"], rtol=0, atol=1e-5)
    assert sides["ours"]["tokens"] == [4 * (30 + 8 + 8)] * 3
    assert sides["ours"]["scored"] == [4 * (8 + 8)] * 3
    # The pass over the reference is part of the first epoch of trl's best flags, and no part of the later ones.
    best, precomputation = sides["trl-best"], sides["trl-best"]["precomputation"]
    assert precomputation > 0
    spread = [step - precomputation / 3 for step in best["seconds"][1:]]
    torch.testing.assert_close(spread, best["later"])
    table = [line for line in out.splitlines() if "×" in line]
    assert len(table) == 5
    assert len({len(line) for line in table}) == 1


def test_grpo_log_probs_agree(scripts, measure, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"{'x' * number} ="}) for number in range(1, 5)))
    flags = f"--prompts={prompts} --steps=1 --group-size=4 --new-tokens=5 --micro-batch-size=4".split()
    _, written = measure(scripts[2], [*flags, "--learning-rate=1e-2", "--against", "trl-no-checkpointing"])
    ours, theirs = written["sides"]["ours"], written["sides"]["trl-no-checkpointing"]
    assert theirs["disagreement"] < 1e-5
    for side in (ours, theirs):
        assert len(side["seconds"]) == len(side["sampling"]) == 2
        assert all(0 < sampling < step for sampling, step in zip(side["sampling"], side["seconds"], strict=True))
        # x, a space and = of the first prompt, …
        assert side["prompt_tokens"] == [3 + 4, 5 + 6]


def test_dpo_table(scripts):
    """Four steps of 3 and 2 weights, 1 and 2 s."""
    _, dpo, _ = scripts
    weights = {"linear": 3, "head": 2}
    common = {"tokens": [9, 10, 10], "scored": [9, 5, 5], "weights": weights, "startup": 9.0, "losses": [0.7, 0.5, 0.4]}
    ours = {**common, "seconds": [8.0, 1.0, 1.0], "later": [0.5, 0.5], "gib": 1.0}
    trl = {**common, "seconds": [7.0, 2.0, 4.0], "gib": 4.0, "losses": [0.7, 0.5, 0.45]}
    arguments = dpo.argparse.Namespace(warm_up=1, steps=2, batch_size=2)
    lines = dpo.report(arguments, {"flops": 1e3}, {"ours": ours, "trl": trl}).splitlines()
    cells = {line[: line.index("  ")]: line[line.index("  ") :].split() for line in lines[2:]}
    # 6 · (3 · 10 + 2 · 5) = 240 FLOPs a step; where the reference is known, 160, of which the first with 9 tokens 180.
    assert " ".join(cells["aligngym, first epoch"]) == "1 1 2 10 2.4e-10 24% 1.00 1.00× 1.00× 9.0 1 –"
    assert cells["aligngym, later epochs"][:4] == ["0.5", "0.5", "4", "19"]
    assert cells["aligngym, later epochs"][5] == "34%"
    assert cells["trl, its defaults"][6:] == ["4.00", "3.00×", "4.00×", "9.0", "4", "5.0e-02"]


def test_grpo_table(scripts):
    _, _, grpo = scripts
    weights = {"linear": 3, "head": 2, "bytes": 20}
    ours = {"seconds": [9.0, 3.0], "sampling": [1.0, 2.0], "weights": weights, "prompt_tokens": [5, 6]}
    ours |= {"startup": 9.0, "gib": 1.0}
    trl = {**ours, "seconds": [9.0, 12.0], "sampling": [1.0, 8.0], "disagreement": 1e-3}
    arguments = grpo.argparse.Namespace(warm_up=1, steps=1, prompts_per_step=1, group_size=2, new_tokens=4)
    lines = grpo.report(arguments, {"flops": 1e3, "bandwidth": 100.0}, {"ours": ours, "trl": trl}).splitlines()
    # 4 · (3 · (6 + 8) + 2 · 8) = 232 FLOPs in a second; a token takes half a second, copying its 20 bytes a fifth.
    assert " ".join(lines[2].split()[1:11]) == "3 3 2 1 500 2.5× 2.32e-10 23% 1.00 1.00×"
    assert " ".join(lines[3].split()[-8:]) == "1.00 4.00× 4.00× 4.00× 1.00× 9.0 12 1.0e-03"


def test_out_of_memory_is_a_result(scripts):
    shared, *_ = scripts

    def fails(error):
        raise error

    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")):
        assert shared.measured(fails, error) == {"failed": "out of memory"}
    with pytest.raises(RuntimeError, match="shapes"):
        shared.measured(fails, RuntimeError("shapes"))


def test_failed_sides_do_not_end_the_comparison(scripts, monkeypatch, capsys):
    shared, *_ = scripts
    outcomes = {"machine": MACHINE, "ours": {"value": 1}, "trl": {"failed": "an error"}, "best": {"value": 2}}
    monkeypatch.setattr(shared, "in_a_process", lambda side, *_: outcomes[side])
    sides = dict.fromkeys(("ours", "trl", "best"), "a side")
    arguments = shared.argparse.Namespace(side=None, timeout=None, json=None, against=["trl", "best"])
    with pytest.raises(SystemExit):
        shared.compare(arguments, [], sides, None, lambda _, machine, results: str([*results]))
    assert "['ours', 'best']" in capsys.readouterr().out
    outcomes["trl"] = {"failed": "out of memory"}
    shared.compare(arguments, [], sides, None, lambda _, machine, results: str([*results]))
    assert "a side: out of memory" in capsys.readouterr().out


def test_weights_counted_and_adapters_drawn(scripts, model_folder, tokenizer, tmp_path):
    shared, *_ = scripts
    tokenizer.save_pretrained(tmp_path)
    arguments = shared.argparse.Namespace(model="random-tiny", tokenizer=tmp_path, dtype="float32", compile=None)
    model, _ = shared.load(arguments)
    # q and o are 64 × 64, k and v 64 × 32, and the MLP has three of 64 × 128, in two layers.
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert shared.sizes(model) == {"linear": linear, "head": 300 * 64, "bytes": 4 * (linear + 300 * 64)}
    policies = [shared.our_policy(arguments, shared.load(arguments)[0], tokenizer) for _ in range(2)]
    first, second = (dict(policy.named_parameters()) for policy in policies)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, drawn in first.items():
        if "lora_A" in name:
            # peft's distribution: uniform within 1/√inputs.
            limit = drawn.shape[1] ** -0.5
            assert 0.95 * limit < drawn.abs().max() <= limit


def test_settings_that_do_not_fit_are_met_at_the_door(scripts):
    shared, *_ = scripts
    with pytest.raises(ValueError, match="--micro-batch-size 3 does not divide the 4 rows"):
        shared.trl_options(shared.argparse.Namespace(micro_batch_size=3), 4)


@pytest.fixture(autouse=True)
def own_modules():
    """The scripts are found beside each other, under names that nobody else should see."""
    yield
    for name in ("against_trl", "dpo_against_trl", "grpo_against_trl"):
        sys.modules.pop(name, None)
