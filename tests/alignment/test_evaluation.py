"""Completions judged beside the reference's: against closed forms, enumeration, and the core's own statistics."""

import itertools
import math

import numpy as np
import pytest
import torch

from aligngym.alignment.evaluation import evaluate_completions, mean_with_interval, pass_at_k, wins
from aligngym.alignment.prompt_sampler import Completions
from aligngym.alignment.report import kl_to_reference
from aligngym.alignment.rewards import Rewards
from aligngym.alignment.text_metrics import distinct_n
from aligngym.core import Trajectories
from aligngym.core.randomness import derived_seed
from aligngym.core.statistics import bootstrap_interval, probability_of_improvement, wilson_interval

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(2, 8) for b in range(3)]


def even(completion_ids, **_):
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def brief(completion_ids, **_):
    return [-0.1 * len(ids) for ids in completion_ids]


def sometimes(completions, prompts, **_):
    return [
        float(len(text)) if prompt.startswith("2") else None for text, prompt in zip(completions, prompts, strict=True)
    ]


# Estimators.


@pytest.mark.parametrize(("trials", "k"), [(1, 1), (5, 1), (5, 3), (6, 6), (200, 100)])
def test_pass_at_k_is_the_binomial_ratio(trials, k):
    successes = np.arange(trials + 1)
    exact = [1 - math.comb(trials - c, k) / math.comb(trials, k) for c in successes]
    np.testing.assert_allclose(pass_at_k(successes, trials, k), exact, rtol=1e-12, atol=1e-15)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    right = [1, 0, 0, 1, 0, 0]
    subsets = list(itertools.combinations(right, 3))
    assert float(pass_at_k(2, 6, 3)) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_unbiased():
    """E over c ~ Binomial(n, p) is 1 − (1 − p)ᵏ; that of 1 − (1 − c/n)ᵏ is not."""
    n, k, p = 6, 4, 0.3
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert weights @ pass_at_k(np.arange(n + 1), n, k) == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_refuses_what_it_cannot_estimate():
    with pytest.raises(ValueError, match="k=3: pass@k is estimated from at least k completions, and there are 2"):
        pass_at_k(1, 2, 3)
    with pytest.raises(ValueError, match="between 0 and 2 are right, not 3"):
        pass_at_k(3, 2, 1)


class TestIntervals:
    def test_accuracies_have_wilsons(self):
        assert mean_with_interval([1, 0, 1, 1]) == (0.75, *wilson_interval(3, 4))
        # Of completions that are all alike, there are as many observations as prompts.
        assert mean_with_interval([[1, 1], [0, 0]]) == (0.5, *wilson_interval(1, 2))
        assert mean_with_interval(np.zeros((9, 3))) == (0.0, *wilson_interval(0, 9))

    def test_everything_else_is_redrawn_by_prompts(self):
        table = np.random.default_rng(0).normal(size=(20, 1)) + 0.01 * np.random.default_rng(1).normal(size=(20, 50))
        estimate = mean_with_interval(table)
        assert (estimate.low, estimate.high) == pytest.approx(bootstrap_interval(table.mean(axis=1), np.mean))
        # A thousand completions of twenty prompts are twenty observations: the width of the normal interval says so.
        width = 2 * 1.96 * table.mean(axis=1).std() / 20**0.5
        assert estimate.high - estimate.low == pytest.approx(width, rel=0.1)

    def test_what_does_not_apply_is_left_out(self):
        nan = math.nan
        assert mean_with_interval([[1, nan], [nan, nan], [0, 0], [nan, 1]]) == (2 / 3, *wilson_interval(2, 3))
        assert all(map(math.isnan, mean_with_interval([nan, nan])))
        assert all(map(math.isnan, mean_with_interval([])))
        value, low, high = mean_with_interval([2.5])
        assert value == 2.5
        assert math.isnan(low)
        assert math.isnan(high)


def written(rewards, texts):
    nothing = torch.zeros(len(rewards), 1)
    return Completions(Trajectories(nothing, nothing, nothing > 0), [{}] * len(rewards), texts, torch.tensor(rewards))


def test_wins_are_those_of_all_pairs_of_a_prompt():
    ours, theirs = np.array([[1.0, 2, 2, 0], [0, 0, 5, 1]]), np.array([[2.0, 1, 0, 0], [5, 7, 7, 6]])
    a = written(ours.flatten().tolist(), list("abcdefgh"))
    b = written(theirs.flatten().tolist(), list("ijklmnop"))
    expected = [probability_of_improvement(ours[row], theirs[row]).value for row in range(2)]
    assert wins(a, b, 4) == pytest.approx(expected)
    # The same words are a tie, whatever a model makes of them in the last digits.
    assert wins(written([0.1], ["x"]), written([0.1000001], ["x"]), 1) == 0.5
    assert wins(written([0.1], ["x"]), written([0.1000001], ["y"]), 1) == 0.0


# The whole.


def test_the_numbers_are_those_of_the_completions(tiny_policy):
    policy = tiny_policy()
    rewards = Rewards([even, brief, sometimes], [1.0, 0.5, 0.0])
    stop = tuple("abcdefgh01234567")
    result = evaluate_completions(policy, ROWS, rewards, max_new_tokens=8, stop=stop)
    prompts = [torch.tensor(policy.tokenizer(row["prompt"])["input_ids"]) for row in ROWS]
    values = {}
    for name, reference in (("policy", False), ("reference", True)):
        rows = policy.generate(prompts, max_new_tokens=8, greedy=True, stop=stop, reference=reference)
        ids = [actions[mask].tolist() for actions, mask in zip(rows.actions, rows.mask, strict=True)]
        texts = policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
        total = np.array(even(ids)) + 0.5 * np.array(brief(ids))
        values[name] = total
        found = getattr(result, name)
        assert found["reward"].value == pytest.approx(total.mean())
        assert found["reward"][1:] == pytest.approx(bootstrap_interval(total, np.mean))
        right = sum(even(ids))
        assert found["rewards/even"] == pytest.approx((right / 18, *wilson_interval(right, 18)))
        assert found["rewards/sometimes"].value == pytest.approx(np.mean([len(text) for text in texts[:3]]))
        assert found["length"].value == pytest.approx(np.mean(list(map(len, ids))))
        unfinished = sum(each[-1] != 0 and text[-1:] not in stop for each, text in zip(ids, texts, strict=True))
        assert 0 < unfinished < 18
        assert found["unfinished"] == pytest.approx((unfinished / 18, *wilson_interval(unfinished, 18)))
        assert found["distinct_2"].value == distinct_n(ids, 2)
        assert not any(key.startswith("pass@") for key in found)
    tied = np.array([a == b for a, b in zip(result.completions.texts, result.reference_completions.texts, strict=True)])
    better = np.where(tied, 0.5, (1 + np.sign(values["policy"] - values["reference"])) / 2)
    assert result.win_rate.value == pytest.approx(better.mean())
    assert result.metrics["win_rate_low"] == result.win_rate.low
    assert result.metrics["reference_reward_high"] == result.reference["reward"].high
    assert result.metrics["rewards/even"] == result.policy["rewards/even"].value


def test_the_divergence_is_that_of_samples_whatever_is_judged(tiny_policy):
    policy = tiny_policy()
    options = {"max_new_tokens": 6, "seed": 5, "kl_prompts": 12, "rows_at_once": 5}
    greedy = evaluate_completions(policy, ROWS, [even], **options)
    drawn = evaluate_completions(policy, ROWS, [even], completions=2, greedy=False, top_k=2, **options)
    prompts = [torch.tensor(policy.tokenizer(row["prompt"])["input_ids"]) for row in ROWS][:12]
    expected = kl_to_reference(policy, prompts, max_new_tokens=6, seed=derived_seed(5, 2))
    for result in (greedy, drawn):
        assert (result.kl, result.kl_standard_error) == pytest.approx(expected, rel=1e-4)
        assert result.metrics["kl"] == result.kl
    stopped = evaluate_completions(policy, ROWS, [even], stop=tuple("abcdefgh01234567"), **options)
    assert stopped.kl < greedy.kl


def test_a_policy_that_is_its_reference_wins_half(tiny_policy):
    policy = tiny_policy(perturbed=False)
    result = evaluate_completions(policy, ROWS, [even], max_new_tokens=5)
    assert result.win_rate.value == 0.5
    assert result.kl == pytest.approx(0, abs=1e-6)
    for name, estimate in result.policy.items():
        assert estimate == pytest.approx(result.reference[name], nan_ok=True)
    # And draws other samples than its reference does.
    drawn = evaluate_completions(policy, ROWS, [even], max_new_tokens=5, completions=2, greedy=False)
    assert drawn.completions.texts != drawn.reference_completions.texts


def test_several_completions_of_each_prompt(tiny_policy):
    policy = tiny_policy()
    result = evaluate_completions(policy, ROWS, [even, brief], completions=6, greedy=False, max_new_tokens=5, seed=2)
    right = result.completions.components["even"].view(18, 6)
    assert [name for name in result.policy if name.startswith("pass")] == [f"pass@{k}/even" for k in (2, 4, 6)]
    counts = right.sum(dim=1).int().tolist()
    exact = np.mean([1 - math.comb(6 - c, 4) / math.comb(6, 4) for c in counts])
    assert result.policy["pass@4/even"].value == pytest.approx(exact)
    assert result.policy["pass@6/even"].value == right.any(dim=1).float().mean()
    assert result.policy["rewards/even"].value == pytest.approx(float(right.mean()))
    rows = result.completions.trajectories
    ids = [actions[mask].tolist() for actions, mask in zip(rows.actions, rows.mask, strict=True)]
    of_prompt = np.mean([distinct_n(ids[start : start + 6], 2) for start in range(0, 108, 6)])
    assert result.policy["distinct_2_of_prompt"].value == pytest.approx(of_prompt)
    assert result.policy["distinct_2"].value < of_prompt
    # The same again, and in other batches.
    options = {"completions": 6, "greedy": False, "max_new_tokens": 5, "seed": 2, "rows_at_once": 7}
    assert evaluate_completions(policy, ROWS, [even, brief], **options).completions.texts == result.completions.texts


def test_alone_there_is_nothing_to_compare(tiny_policy):
    result = evaluate_completions(tiny_policy(), ROWS, [even], against_reference=False, max_new_tokens=3)
    assert result.reference == {}
    assert result.win_rate is None
    assert not {"kl", "win_rate"} & result.metrics.keys()
    assert "reward_low" in result.metrics


def test_training_mode_and_adapter_stay(tiny_policy):
    policy = tiny_policy().train()
    before = {name: value.clone() for name, value in policy.trainable_state().items()}
    evaluate_completions(policy, ROWS[:2], [even], max_new_tokens=3)
    assert policy.training
    assert before.keys() == policy.trainable_state().keys()
    assert all(torch.equal(before[name], value) for name, value in policy.trainable_state().items())


def test_bad_input_is_met_at_the_door(tiny_policy):
    policy = tiny_policy()
    with pytest.raises(ValueError, match="4 greedy completions of a prompt are all alike"):
        evaluate_completions(policy, ROWS, [even], completions=4)
    with pytest.raises(ValueError, match="kl_prompts is at least 1, not 0"):
        evaluate_completions(policy, ROWS, [even], kl_prompts=0)
    with pytest.raises(ValueError, match="group_size is at least 1"):
        evaluate_completions(policy, ROWS, [even], completions=0)
    with pytest.raises(ValueError, match="there are no prompts"):
        evaluate_completions(policy, [], [even])

    def needs_solution(completions, solution, **_):
        return [0.0 for _ in completions]

    with pytest.raises(ValueError, match="needs a column 'solution', and the data have"):
        evaluate_completions(policy, ROWS, [needs_solution])
    with pytest.raises(ValueError, match="the prompt of row 1 has 4 tokens and leaves no room"):
        evaluate_completions(policy, ROWS, [even], max_new_tokens=300)
