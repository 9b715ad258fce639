"""Sums against arithmetic, trl's own reward functions against being called directly, and every way to fail."""

import asyncio
import functools
import math
import textwrap

import numpy as np
import pytest
import torch
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

from aligngym.alignment.reward_specs import BUILT_IN, describe_rewards, read_rewards
from aligngym.alignment.rewards import RewardError, Rewards, completion_text

PROMPTS = ["one", "two", "three"]
COMPLETIONS = ["a", "bb", "ccc"]
TOKENS = [[1], [1, 2], [1, 2, 3]]


def judge(rewards, columns=None, **options):
    return rewards(PROMPTS, COMPLETIONS, TOKENS, columns or {}, **options)


def length(completions, **_):
    return [len(completion) for completion in completions]


def even_only(completions, **_):
    return [1.0 if len(completion) % 2 == 0 else None for completion in completions]


class TestSum:
    def test_weighted_sum_and_components(self):
        total, components = judge(Rewards([length, even_only], [0.5, -2.0]))
        # 0.5·1, 0.5·2 − 2·1, 0.5·3: None adds nothing.
        assert total.tolist() == [0.5, -1.0, 1.5]
        assert components["length"].tolist() == [1, 2, 3]
        assert torch.equal(components["even_only"].isnan(), torch.tensor([True, False, True]))
        assert total.dtype == components["length"].dtype == torch.float32

    def test_weights_are_one_by_default_and_zero_only_measures(self):
        assert judge(Rewards([length, length]))[0].tolist() == [2, 4, 6]
        total, components = judge(Rewards([length, length], [1, 0]))
        assert total.tolist() == [1, 2, 3]
        assert components["length_2"].tolist() == [1, 2, 3]

    def test_columns_and_what_was_generated_arrive_row_by_row(self):
        seen = {}

        def look(prompts, completions, completion_ids, answer, **columns):
            seen.update(locals())
            return [float(right) for right in answer]

        columns = {"answer": ["1", "2", "3"], "level": [7, 8, 9], "prompt": PROMPTS, "completion": PROMPTS}
        total, _ = judge(Rewards(look), columns, trainer_state="state")
        assert total.tolist() == [1, 2, 3]
        assert (seen["prompts"], seen["completions"], seen["completion_ids"]) == (PROMPTS, COMPLETIONS, TOKENS)
        assert seen["columns"]["level"] == [7, 8, 9]
        assert seen["columns"]["trainer_state"] == "state"
        # As in trl: no prompt, no completion, besides the prompts and completions.
        assert set(seen["columns"]) == {"level", "trainer_state", "log_extra", "log_metric"}

    def test_a_function_gets_only_what_it_names(self):
        def brief(completions, level=0):
            return [level[0]] * len(completions)

        assert judge(Rewards(brief), {"level": [5, 5, 5], "other": [0, 0, 0]})[0].tolist() == [5, 5, 5]

    def test_what_functions_log_reaches_the_caller(self):
        def talkative(completions, log_extra, log_metric, **_):
            log_extra("shout", [completion.upper() for completion in completions])
            log_metric("longest", 3.0)
            return [0] * len(completions)

        said = []
        judge(Rewards(talkative), log_extra=lambda *what: said.append(what), log_metric=lambda *what: said.append(what))
        assert said == [("shout", ["A", "BB", "CCC"]), ("longest", 3.0)]
        judge(Rewards(talkative))  # nobody listens

    @pytest.mark.parametrize(
        "values", [np.array([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0]), [np.float32(1), torch.tensor(2.0), 3], (1, 2, 3)]
    )
    def test_numbers_of_any_library(self, values):
        assert judge(Rewards(lambda **_: values))[0].tolist() == [1, 2, 3]

    def test_tokens_may_be_tensors(self):
        ids = [torch.tensor([5, 5, 5, 5, 5])]
        found, _ = Rewards(get_repetition_penalty_reward(ngram_size=2))(["p"], ["c"], ids, {})
        assert found.tolist() == [-0.75]

    def test_names_are_unique(self):
        class Judge:
            def __call__(self, completions, **_):
                return [0.0] * len(completions)

        def length_2(completions, **_):
            return [0.0] * len(completions)

        functions = [length, length, length_2, functools.partial(length), Judge(), Judge()]
        names = Rewards(functions).names
        assert names == ["length", "length_2", "length_2_2", "length_3", "Judge", "Judge_2"]
        assert list(judge(Rewards(functions))[1]) == names

    def test_asynchronous_functions_also_within_a_running_loop(self):
        async def slow(completions, **_):
            await asyncio.sleep(0)
            return [len(completion) for completion in completions]

        class Slow:
            async def __call__(self, completions, **_):
                return await slow(completions)

        rewards = Rewards([slow, Slow()])
        assert judge(rewards)[0].tolist() == [2, 4, 6]

        async def notebook():
            return judge(rewards)[0].tolist()

        assert asyncio.run(notebook()) == [2, 4, 6]

    def test_a_row_that_nothing_applies_to_counts_zero_and_is_told_of(self):
        with pytest.warns(UserWarning, match="no reward applies to some"):
            total, _ = judge(Rewards(even_only))
        assert total.tolist() == [0, 1, 0]


class TestTRL:
    """trl's functions give through Rewards what they give directly, on conversations as trl has them."""

    texts = ("<think>\nx\n</think>\ny", "<think>x y", "x </think> y")
    prompts = ([{"role": "user", "content": "?"}],) * 3
    completions = tuple([{"role": "assistant", "content": text}] for text in texts)
    ids = (list(range(85)), list(range(120)), [5] * 10)

    def test_the_same_numbers(self):
        functions = [
            think_format_reward,
            get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20),
            get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0),
        ]
        weights = [1.0, 2.0, 0.5]
        total, components = Rewards(functions, weights)(self.prompts, self.completions, self.ids, {})
        expected = [
            function(completions=self.completions, completion_ids=self.ids, prompts=self.prompts)
            for function in functions
        ]
        assert [component.tolist() for component in components.values()] == [
            pytest.approx(values) for values in expected
        ]
        assert total.tolist() == pytest.approx(
            [sum(map(np.multiply, weights, row)) for row in zip(*expected, strict=True)]
        )
        assert list(components) == [
            "think_format_reward",
            "soft_overlong_punishment_reward",
            "repetition_penalty_reward",
        ]

    def test_soft_overlong_is_equation_13_of_dapo(self):
        rewards = Rewards.parse("soft_overlong(max_completion_len=100,soft_punish_cache=20)")
        lengths = [0, 79, 80, 81, 90, 99, 100, 101]
        ids = [[1] * size for size in lengths]
        found, _ = rewards(["p"] * len(ids), ["c"] * len(ids), ids, {})
        assert found.tolist() == pytest.approx([0, 0, 0, -1 / 20, -0.5, -19 / 20, -1, -1])

    def test_accuracy_reward(self):
        pytest.importorskip("math_verify")
        from trl.rewards import accuracy_reward

        completions = [[{"role": "assistant", "content": rf"\boxed{{{text}}}"}] for text in (r"\frac{1}{3}", "5", "2")]
        solution = [r"$\frac{1}{3}$", "$4$", "$2$"]
        found, _ = Rewards(accuracy_reward)(self.prompts, completions, self.ids, {"solution": solution})
        assert found.tolist() == accuracy_reward(completions, solution) == [1, 0, 1]


class TestFailures:
    """A function that fails stops the run, with its name and the completion that it failed on."""

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, "1", [1.0], torch.tensor([1.0]), 1j])
    def test_what_is_no_reward(self, value):
        def faulty(completions, **_):
            return [value if completion == "bb" else 0.0 for completion in completions]

        with pytest.raises(RewardError, match=r"(?s)'faulty' returned .* row 1.*prompt: 'two'\ncompletion: 'bb'"):
            judge(Rewards([length, faulty]))

    def test_an_exception_is_traced_to_its_completion(self):
        def faulty(completions, answer, **_):
            return [
                1 / (len(completion) - 3) + 0 * int(right)
                for completion, right in zip(completions, answer, strict=True)
            ]

        with pytest.raises(
            RewardError, match=r"(?s)'faulty' raised ZeroDivisionError.*test_rewards.py.*'ccc'"
        ) as raised:
            judge(Rewards(faulty), {"answer": ["1", "2", "3"]})
        assert isinstance(raised.value.__cause__, ZeroDivisionError)
        with pytest.raises(RewardError, match=r"(?s)ValueError.*'x'.*prompt: 'two'"):
            judge(Rewards(faulty), {"answer": ["1", "x", "3"]})

    def test_an_exception_that_no_single_completion_reproduces(self):
        def crowded(completions, **_):
            if len(completions) > 1:
                raise RuntimeError("too many")
            return [0.0]

        with pytest.raises(RewardError, match=r"(?s)'crowded' raised RuntimeError: too many.*only all 3"):
            judge(Rewards(crowded))

    def test_an_exception_in_an_asynchronous_function(self):
        async def faulty(completions, **_):
            return [1 / (len(completion) - 2) for completion in completions]

        with pytest.raises(RewardError, match=r"(?s)'faulty' raised ZeroDivisionError.*completion: 'bb'"):
            judge(Rewards(faulty))

    def test_another_length_is_traced_to_the_completion_left_out(self):
        def forgetful(completions, **_):
            return [1.0 for completion in completions if completion != "bb"]

        with pytest.raises(RewardError, match=r"(?s)'forgetful' returned 2 rewards for 3.*completion: 'bb'"):
            judge(Rewards(forgetful))

    @pytest.mark.parametrize("value", [None, 1.0, torch.tensor(1.0), {"a": 1, "b": 2, "c": 3}, "abc"])
    def test_no_list(self, value):
        with pytest.raises(RewardError, match="instead of a list"):
            judge(Rewards(lambda **_: value))

    def test_nothing_applies(self):
        with pytest.raises(RewardError, match=r"(?s)no reward applies.*prompt: 'one'"):
            judge(Rewards([lambda completions, **_: [None] * 3] * 2))

    def test_quotes_show_how_long_texts_begin_and_end(self):
        with pytest.raises(RewardError) as raised:
            Rewards(lambda **_: [math.nan])(["p" * 9999], ["begin" + "x" * 9999 + "end"], [[1]], {})
        assert "begin" in str(raised.value)
        assert "end'" in str(raised.value)
        assert len(str(raised.value)) < 1000

    def test_a_search_for_the_culprit_logs_nothing(self):
        said = []

        def faulty(completions, log_metric, **_):
            log_metric("calls", 1)
            raise RuntimeError

        with pytest.raises(RewardError):
            judge(Rewards(faulty), log_metric=lambda *what: said.append(what))
        assert len(said) == 1

    def test_a_missing_library_is_no_completions_fault(self):
        def needy(**_):
            raise ImportError("pip install it")

        with pytest.raises(ImportError, match="pip install it"):
            judge(Rewards(needy))

    def test_lengths_of_columns(self):
        with pytest.raises(ValueError, match="3 completions, but 2 values of answer"):
            judge(Rewards(length), {"answer": [1, 2]})

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([],), "no reward functions"),
            (([length], [1.0, 2.0]), "one number for each of 1"),
            (([length], [math.nan]), "one number for each of 1"),
        ],
    )
    def test_construction(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Rewards(*arguments)

    def test_only_functions(self):
        class Judge:
            def __call__(self, **_):
                return []

        with pytest.raises(TypeError, match=r"give Judge\(…\)"):
            Rewards([Judge])
        with pytest.raises(TypeError, match="a function is needed"):
            Rewards([1])
        with pytest.raises(ValueError, match="names"):
            Rewards([length], names=["a", "b"])


class TestCheck:
    def test_a_column_that_the_data_lack(self):
        def graded(completions, answer, optional=None, *, log_metric, **_):
            return [0.0] * len(completions)

        rewards = Rewards([length, graded])
        rewards.check(["prompt", "answer"])
        with pytest.raises(
            ValueError, match=r"'graded' needs a column 'answer'.*'prompt', 'answers'.*did you mean answers"
        ):
            rewards.check(["prompt", "answers"])
        with pytest.raises(ValueError, match="'graded' needs a column 'answer'"):
            judge(rewards)

    def test_the_prompt_is_handed_on_in_the_plural(self):
        with pytest.raises(ValueError, match=r"'prompt'.*did you mean prompts"):
            Rewards(lambda prompt, **_: []).check(["prompt"])

    def test_columns_of_objects(self):
        class Judge:
            required_columns = ("gold",)

            def __call__(self, completions, **columns):
                return [0.0] * len(completions)

        with pytest.raises(ValueError, match="'Judge' needs a column 'gold', and the data have none"):
            Rewards(Judge()).check([])

    @pytest.mark.parametrize("column", ["prompts", "completions", "trainer_state", "log_extra"])
    def test_columns_that_would_hide_what_was_generated(self, column):
        with pytest.raises(ValueError, match=f"a column '{column}'.*rename it"):
            Rewards(length).check([column])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    source = """
        from __future__ import annotations
        from dataclasses import dataclass

        def brevity(completions, **_):
            return [-len(completion) for completion in completions]

        @dataclass
        class Judge:
            limit: int = 2
            name: str = "x"

            def __call__(self, completions, **_):
                return [float(len(completion) > self.limit) for completion in completions]

        number = 3
    """
    path.write_text(textwrap.dedent(source))
    return path


class TestSpecifications:
    def test_names_weights_files_and_modules(self, file):
        text = f"length_penalty(per_token=0.5, free=1):2 , {file}:brevity:-1e-1,{file}:Judge(1,name=word):.5"
        rewards = Rewards.parse(f"{text},{file}:Judge,trl.rewards:think_format_reward:0")
        assert rewards.names == ["length_penalty", "brevity", "Judge", "Judge_2", "think_format_reward"]
        assert rewards.weights == [2, -0.1, 0.5, 1, 0]
        assert rewards.functions[2].name == "word"
        conversations = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
        total, _ = Rewards(rewards.functions[:4], rewards.weights[:4])(PROMPTS, COMPLETIONS, TOKENS, {})
        # −0.5·max(0, n−1)·2 + 0.1·n + 0.5·[n > 1] + [n > 2]
        assert total.tolist() == pytest.approx([0.1, -1 + 0.2 + 0.5, -2 + 0.3 + 0.5 + 1])
        assert (
            Rewards.parse("trl.rewards:think_format_reward")(PROMPTS, conversations, TOKENS, {})[0].tolist() == [0] * 3
        )

    def test_the_readme_of_the_command_line(self, file):
        found = read_rewards(f"final_answer:1.0,think_format:0.2,{file}:brevity:0.5")
        assert [(name, weight) for name, _, weight in found] == [
            ("final_answer", 1.0),
            ("think_format", 0.2),
            ("brevity", 0.5),
        ]

    def test_every_built_in_reward_can_be_had_and_has_help(self):
        pytest.importorskip("sacrebleu")
        pytest.importorskip("rouge_score")
        texts = {"soft_overlong": "soft_overlong(max_completion_len=9,soft_punish_cache=3)"}
        rewards = Rewards.parse(",".join(texts.get(name, name) for name in BUILT_IN))
        assert rewards.names == list(BUILT_IN)
        columns = {"answer": ["B"] * 3}
        assert judge(rewards, columns)[0].shape == (3,)
        assert all(name in describe_rewards() for name in BUILT_IN)
        for name in BUILT_IN:
            if name in ("final_answer", "multiple_choice", "exact_match", "token_f1", "bleu", "rouge"):
                with pytest.raises(ValueError, match=f"'{name}' needs a column 'answer'"):
                    Rewards.parse(name).check(["prompt"])

    def test_a_metric_may_name_its_column(self):
        rewards = Rewards.parse("exact_match(column=reference)")
        assert judge(rewards, {"reference": ["a", "b", "CCC"]})[0].tolist() == [1, 0, 1]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("final_anser", "no reward has this name: did you mean final_answer"),
            ("final_answer:much", "the weight 'much' is no number"),
            ("final_answer:nan", "the weight 'nan' is no number"),
            ("final_answer,,think_format", "'' is no reward"),
            ("", "'' is no reward"),
            ("no_such_module:f", "neither a .py file nor a module"),
            ("trl.rewards:think_format", "did you mean think_format_reward"),
            ("soft_overlong", "max_completion_len=N"),
            ("length_penalty(per_token=-1)", "per_token=-1"),
            ("length_penalty(per_tokens=1)", "it takes per_token"),
            ("length_penalty(per_token=f())", "settings are written"),
            ("length_penalty(per_token", "no reward has this name|is no reward"),
            ("final_answer(1)", "it takes no settings"),
        ],
    )
    def test_what_cannot_be_had(self, text, message):
        with pytest.raises(ValueError, match=message):
            Rewards.parse(text)

    def test_files_that_do_not_serve(self, file, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere.py: no such file"):
            Rewards.parse("nowhere.py:f")
        with pytest.raises(ValueError, match="did you mean brevity"):
            Rewards.parse(f"{file}:brevty")
        with pytest.raises(ValueError, match="cannot be called"):
            Rewards.parse(f"{file}:number")
        (tmp_path / "broken.py").write_text("1 / 0")
        with pytest.raises(ValueError, match="cannot be run: ZeroDivisionError"):
            Rewards.parse(f"{tmp_path / 'broken.py'}:f")

    def test_settings_are_never_run(self):
        with pytest.raises(ValueError, match="settings are written"):
            Rewards.parse("length_penalty(per_token=__import__.x)")


def test_the_text_of_a_completion():
    assert completion_text("a") == "a"
    assert completion_text([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) == "b"
    assert completion_text([{"role": "assistant", "content": None}]) == completion_text([]) == ""
