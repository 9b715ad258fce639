import pytest
from gymnasium.utils.env_checker import check_env

from aligngym.envs.prompt_env import PromptEnv

ROWS = [
    {"prompt": "2 + 2 = ", "answer": 4},
    {"prompt": "Wie heißt du?", "answer": 0},
    {"prompt": "3 + 4 = ", "answer": 7},
]


def correct(prompts, completions, answer, **columns):
    assert len(prompts) == len(completions) == len(answer) == 1
    return [float(text.strip() == str(number)) for text, number in zip(completions, answer, strict=True)]


def test_gymnasiums_checker_finds_nothing():
    check_env(PromptEnv(ROWS, correct))


@pytest.mark.parametrize(("row", "answer", "reward"), [(0, " 4", 1.0), (0, "7", 0.0), (2, "7", 1.0)])
def test_one_answer_is_paid_by_its_own_row_and_ends_the_episode(row, answer, reward):
    env = PromptEnv(ROWS, correct)
    assert env.reset(options={"row": row}) == (ROWS[row]["prompt"], {"row": row})
    assert env.step(answer) == ("", reward, True, False, {"row": row})


def test_prompts_are_drawn_by_the_seed_and_evenly():
    env = PromptEnv(ROWS, correct)
    drawn = [env.reset(seed=seed)[1]["row"] for seed in range(300)]
    assert drawn == [env.reset(seed=seed)[1]["row"] for seed in range(300)]
    # Five standard deviations of a binomial with p = 1/3.
    assert all(abs(drawn.count(row) - 100) < 41 for row in range(3))


@pytest.mark.parametrize("paid", [[], [1.0, 2.0], [None], [float("nan")]])
def test_a_verifier_that_pays_no_number_is_named_with_its_completion(paid):
    env = PromptEnv(ROWS, lambda **_: paid)
    env.reset(options={"row": 1})
    with pytest.raises(ValueError, match=r"row 1: .* 'Otto'"):
        env.step("Otto")


def test_bad_rows():
    with pytest.raises(ValueError, match="at least one row"):
        PromptEnv([], correct)
    for row in ({"question": "?"}, {"prompt": ""}, {"prompt": [{"role": "user", "content": "?"}]}):
        with pytest.raises(ValueError, match="row 2: the prompt is"):
            PromptEnv([ROWS[0], row], correct)
    with pytest.raises(ValueError, match="row 3 is not one of 0 … 2"):
        PromptEnv(ROWS, correct).reset(options={"row": 3})
