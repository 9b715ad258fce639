import copy
import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aligngym.agents import GRPO, PPO, AdaptiveKL
from aligngym.alignment.completions_log import CompletionsLog
from aligngym.alignment.language_policy import LanguagePolicy
from aligngym.alignment.prompt_sampler import PromptSampler
from aligngym.alignment.prompts import Problems, load_prompts
from aligngym.alignment.rewards import Rewards
from aligngym.core import PADDING, TabularPolicy

ROWS = [{"prompt": f"problem {number}:", "wanted": chr(ord("a") + number)} for number in range(5)]


def share(completions, wanted, **_):
    """Which share of a completion is the wanted letter."""
    return [text.count(letter) / max(1, len(text)) for text, letter in zip(completions, wanted, strict=True)]


def short(completion_ids, **_):
    """Applies to every other completion only."""
    return [None if number % 2 else -len(ids) / 10 for number, ids in enumerate(completion_ids)]


def sampler(**changes):
    options = {"group_size": 3, "prompts_per_sample": 2, "max_new_tokens": 6} | changes
    rewards = options.pop("rewards", Rewards([share, short], [1.0, 0.5]))
    return PromptSampler(options.pop("rows", ROWS), rewards, **options)


class TestSample:
    def test_every_row_is_a_completion_with_its_reward_on_the_last_token(self, tiny_policy):
        policy = tiny_policy(vocab_size=257)
        source = sampler(max_new_tokens=20)
        rows = source.sample(policy, seed=1)
        written = source.last
        assert len(rows) == 6
        assert rows.group.tolist() == [0, 0, 0, 1, 1, 1]
        assert len(set(written.prompts)) == 2
        for row in range(6):
            tokens = rows.actions[row][rows.mask[row]].tolist()
            text = policy.tokenizer.decode(tokens, skip_special_tokens=True)
            prompt = rows.observations[row][rows.observations[row] != PADDING].tolist()
            assert prompt == policy.tokenizer(written.rows[row]["prompt"])["input_ids"]
            assert written.prompts[row] == written.rows[row]["prompt"]
            assert written.texts[row] == text
            expected = share([text], [written.rows[row]["wanted"]])[0] + (0 if row % 2 else -len(tokens) / 20)
            assert rows.rewards[row].nonzero().tolist() in ([[len(tokens) - 1]], [])
            assert rows.returns[row] == pytest.approx(expected, abs=1e-6)
            assert (rows.terminated | rows.truncated)[row].nonzero().tolist() == [[len(tokens) - 1]]
        torch.testing.assert_close(rows.log_probs, policy(rows).log_probs.detach(), rtol=1e-4, atol=1e-4)

    def test_metrics_are_means_by_hand(self, tiny_policy):
        source = sampler()
        rows = source.sample(tiny_policy(), seed=1)
        wanted = [row["wanted"] for row in source.last.rows]
        assert source.metrics["return"] == pytest.approx(float(rows.returns.mean()), abs=1e-6)
        assert source.metrics["rewards/share"] == pytest.approx(sum(share(source.last.texts, wanted)) / 6)
        assert source.metrics["rewards/short"] == pytest.approx(-float(rows.lengths[::2].float().mean()) / 10)
        assert source.metrics["length"] == pytest.approx(float(rows.lengths.float().mean()))
        assert source.metrics["unfinished"] == pytest.approx(float(rows.truncated.any(1).float().mean()))

    def test_a_completion_without_an_end_costs_the_penalty(self, tiny_policy):
        policy = tiny_policy(vocab_size=257)
        free, penalised = (
            sampler(max_new_tokens=40, missing_end_penalty=penalty, group_size=40) for penalty in (0.0, 2.0)
        )
        before, after = (source.sample(policy, seed=1) for source in (free, penalised))
        unfinished = before.truncated.any(dim=1)
        assert 0 < unfinished.sum() < len(before)
        torch.testing.assert_close(after.returns, before.returns - 2.0 * unfinished)

    def test_an_epoch_sees_every_prompt_once_and_the_next_in_another_order(self, tiny_policy):
        policy, source = tiny_policy(), sampler(group_size=1, prompts_per_sample=5)
        epochs = []
        for seed in range(3):
            source.sample(policy, seed)
            epochs.append(source.last.prompts)
        assert all(sorted(epoch) == [row["prompt"] for row in ROWS] for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1

    def test_one_seed_repeats_a_sample_and_what_is_remembered_continues_it(self, tiny_policy):
        policy = tiny_policy()
        one, same = sampler(), sampler()
        one.sample(policy, seed=1)
        same.load_state_dict(one.state_dict())
        first, second = one.sample(policy, seed=2), same.sample(policy, seed=2)
        assert torch.equal(first.actions, second.actions)
        assert torch.equal(first.observations, second.observations)
        assert not torch.equal(first.actions, one.sample(policy, seed=3).actions)

    def test_another_writer_may_complete_the_prompts(self, tiny_policy):
        policy, asked = tiny_policy(), []

        def write(policy, prompts, **options):
            asked.append((len(prompts), options["completions"], options["max_new_tokens"]))
            return policy.generate(prompts, **options)

        rows = sampler(writer=write).sample(policy, seed=1)
        assert asked == [(2, 3, 6)]
        assert torch.equal(rows.actions, sampler().sample(policy, seed=1).actions)

    def test_it_evaluates_by_its_own_rewards(self, tiny_policy):
        policy = tiny_policy()
        agent = GRPO(policy, sampler(rewards=[share]))
        held_back = [{"prompt": "new", "wanted": "q"}, {"prompt": "newer", "wanted": "r"}]
        found = agent.evaluate(held_back, greedy=False, seed=3)
        assert {"reward", "reward_low", "reference_reward", "win_rate", "kl", "length"} <= found.keys()
        assert found["kl"] > 0
        assert agent.evaluate(held_back) == agent.evaluate(held_back)

    def test_tokens_are_those_of_the_policy_that_asks(self, tiny_policy):
        source, policy = sampler(), tiny_policy()
        first = source.prepare(policy)
        assert source.prepare(policy) is first
        policy.tokenizer = copy.deepcopy(policy.tokenizer)
        assert source.prepare(policy) is not first

    def test_pieces_say_the_same(self, tiny_policy):
        policy = tiny_policy()
        one, pieces = sampler().sample(policy, 1), sampler(rows_at_once=3).sample(policy, 1)
        assert torch.equal(one.actions, pieces.actions)
        assert torch.equal(one.rewards, pieces.rewards)

    def test_conversations_are_judged_as_messages(self, tiny_policy):
        policy = tiny_policy()
        tokenizer = policy.tokenizer
        template = tokenizer.chat_template
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
        )
        seen = {}

        def judge(prompts, completions, **_):
            seen.update(prompts=prompts, completions=completions)
            return [0.0, 1.0]

        try:
            rows = [{"prompt": [{"role": "user", "content": "hello"}]}]
            source = PromptSampler(rows, [judge], group_size=2, prompts_per_sample=1, max_new_tokens=4)
            sample = source.sample(policy, 0)
        finally:
            tokenizer.chat_template = template
        assert tokenizer.decode(sample.observations[0]) == "uhelloa"
        assert seen["prompts"] == [rows[0]["prompt"]] * 2
        assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in source.last.texts]
        assert source.last.prompts == ["hello"] * 2


class TestRefills:
    """Prompts 0 and 1 teach nothing, because all their completions are worth the same."""

    @staticmethod
    def judge(completion_ids, wanted, **_):
        return [0.0 if letter in "ab" else float(sum(ids)) for ids, letter in zip(completion_ids, wanted, strict=True)]

    def test_silent_groups_are_replaced(self, tiny_policy):
        policy = tiny_policy()
        for seed in range(4):
            source = sampler(rewards=[self.judge], refills=3, prompts_per_sample=3, seed=seed)
            rows = source.sample(policy, seed=1)
            groups = source.last.rewards.view(3, 3)
            assert (groups != groups[:, :1]).any(1).all()
            assert rows.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
            assert not {ROWS[0]["prompt"], ROWS[1]["prompt"]} & set(source.last.prompts)
            torch.testing.assert_close(rows.returns, source.last.rewards)
            assert source.metrics["groups_drawn"] <= 12

    def test_where_further_prompts_do_not_help_the_batch_is_filled_up_with_silent_ones(self, tiny_policy):
        source = sampler(rewards=[self.judge], refills=2, rows=ROWS[:2])
        rows = source.sample(tiny_policy(), seed=1)
        assert len(rows) == 6
        assert source.metrics["groups_drawn"] == 6
        assert source.metrics["silent_groups_drawn"] == 1.0

    def test_without_them_no_prompt_is_drawn_twice(self, tiny_policy):
        source = sampler(rewards=[self.judge], rows=ROWS[:2])
        source.sample(tiny_policy(), seed=1)
        assert source.metrics["groups_drawn"] == 2


class TestTraining:
    """The very classes that train tables."""

    @pytest.mark.parametrize("kind", [GRPO, PPO])
    def test_what_is_rewarded_becomes_more_frequent(self, model_folder, kind):
        folder = model_folder("llama", vocab_size=257)
        policy = LanguagePolicy.from_pretrained(folder, dtype="float32", critic=kind is PPO)
        rows = [{"prompt": "x"}]

        def letters(completions, **_):
            return [sum(character.isalpha() for character in text) / 4 for text in completions]

        source = PromptSampler(rows, [letters], group_size=32, prompts_per_sample=1, max_new_tokens=4)
        options = (
            {"minibatch_size": None, "discount": 1.0, "value_coefficient": 0.1, "epochs": 2} if kind is PPO else {}
        )
        agent = kind(policy, source, learning_rate=0.02, **options)
        agent.learn(1, progress=False)
        before = source.metrics["return"]
        agent.learn(24, progress=False)
        assert source.metrics["return"] > before + 0.3

    @pytest.mark.parametrize("kind", ["GRPO", "PPO"])
    def test_it_resumes_exactly(self, model_folder, tmp_path, kind):
        def make():
            policy = LanguagePolicy.from_pretrained(model_folder("llama"), dtype="float32", critic=kind == "PPO")
            source = sampler(refills=1)
            options = {"learning_rate": 0.01, "beta": AdaptiveKL(0.1, 0.02, 100)}
            if kind == "PPO":
                return PPO(policy, source, minibatch_size=3, epochs=2, **options)
            return GRPO(policy, source, **options)

        whole = make().learn(4, progress=False)
        first = make().learn(2, progress=False)
        first.save(tmp_path / "agent.safetensors")
        resumed = make().load(tmp_path / "agent.safetensors").learn(2, progress=False)
        assert whole.beta == resumed.beta != 0.1
        for one, other in zip(
            whole.policy.trainable_state().values(), resumed.policy.trainable_state().values(), strict=True
        ):
            assert torch.equal(one, other)

    def test_microbatches_do_not_change_the_step(self, tiny_policy):
        found = []
        for size in (None, 4, 1):
            policy = tiny_policy()
            GRPO(policy, sampler(), learning_rate=0.01, micro_batch_size=size).learn(1, progress=False)
            found.append(policy.trainable_state())
        for other in found[1:]:
            for name, value in found[0].items():
                torch.testing.assert_close(value, other[name], rtol=1e-3, atol=2e-5)


class TestBadInput:
    def test_a_missing_column_is_named_before_anything_is_written(self):
        with pytest.raises(
            ValueError, match="'share' needs a column 'wanted', and the data have 'prompt', 'wants': did you mean"
        ):
            PromptSampler([{"prompt": "x", "wants": "a"}], [share])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"group_size": 0}, "group_size is at least 1, not 0"),
            ({"prompts_per_sample": 0}, "prompts_per_sample is at least 1"),
            ({"refills": -1}, "neither can be negative"),
            ({"rows": []}, "there are no prompts"),
            ({"max_new_tokens": 0}, "max_new_tokens is at least 1"),
        ],
    )
    def test_numbers_out_of_range(self, changes, message):
        with pytest.raises(ValueError, match=message):
            sampler(**changes)

    def test_a_prompt_that_leaves_no_room(self, tiny_policy):
        source = sampler(rows=[*ROWS, {"prompt": "x" * 300, "wanted": "a"}], max_new_tokens=20)
        with pytest.raises(
            ValueError, match="row 6 has 300 tokens and leaves no room for a completion of 20: the model"
        ):
            source.prepare(tiny_policy())

    def test_a_policy_that_writes_nothing(self):
        with pytest.raises(TypeError, match="prompts need a policy that writes, not TabularPolicy"):
            sampler().sample(TabularPolicy(3, 2), 0)

    def test_a_group_of_one(self, tiny_policy):
        with pytest.raises(ValueError, match="group_size"):
            GRPO(tiny_policy(), sampler(group_size=1)).learn(1, progress=False)

    def test_conversations_without_a_template(self, tokenizer):
        with pytest.raises(ValueError, match="no chat template"):
            Problems.of([{"prompt": [{"role": "user", "content": "x"}]}], tokenizer, 5)

    @pytest.mark.parametrize(
        ("rows", "options", "message"),
        [
            ([], {}, "no rows"),
            (
                [{"prompt": "x"}, {"question": "y"}],
                {},
                "row 2: a prompt is needed, text or messages, and it has 'question'",
            ),
            ([{"prompt": ""}], {}, "row 1: a prompt is needed"),
            ([{"prompt": "x"}], {"system_prompt": "be kind"}, "row 1: a system prompt goes before messages"),
            (
                [{"prompt": [{"role": "system", "content": "x"}]}],
                {"system_prompt": "be kind"},
                "row 1: the conversation has a system prompt already",
            ),
        ],
    )
    def test_rows_without_a_prompt(self, tmp_path, rows, options, message):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ValueError, match=message):
            load_prompts(path, **options)

    def test_a_system_prompt_goes_first(self, tmp_path):
        path = tmp_path / "prompts.jsonl"
        path.write_text(json.dumps({"prompt": [{"role": "user", "content": "x"}], "answer": "1"}))
        messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "x"}]
        assert load_prompts(path, system_prompt="be kind") == [{"prompt": messages, "answer": "1"}]


class TestCompletionsLog:
    def test_completions_can_be_read_in_the_terminal_a_file_and_tensorboard(self, tiny_policy, tmp_path, capsys):
        source = sampler()
        agent = GRPO(tiny_policy(), source, learning_rate=0.01)
        log = CompletionsLog(source, every=2, count=2, folder=tmp_path)
        agent.learn(3, callbacks=[log], progress=False)
        shown = capsys.readouterr().out + capsys.readouterr().err
        assert "iteration 1: 2 of 6 completions" in shown
        assert "iteration 2" not in shown
        assert "iteration 3" in shown
        best = source.last.rewards.argmax()
        assert f"  reward {float(source.last.rewards[best]):.3g}" in shown
        assert "(share 0, short -0" in shown
        records = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().split("\n")[:-1]]
        # The epoch ends with a single prompt.
        assert [record["step"] for record in records] == [1] * 6 + [3] * 3
        assert [record["completion"] for record in records[6:]] == source.last.texts
        assert [record["short"] for record in records[6::2]] == (source.last.components["short"][::2].tolist())
        assert "short" not in records[7]
        events = EventAccumulator(str(tmp_path / "completions")).Reload()
        texts = events.Tensors("completions/text_summary")
        assert [event.step for event in texts] == [1, 3]
        assert b"| prompt | completion | reward |" in texts[-1].tensor_proto.string_val[0]

    def test_a_resumed_run_drops_what_a_killed_one_wrote_too_much(self, tiny_policy, tmp_path):
        path = tmp_path / "completions.jsonl"
        path.write_text('{"step": 1}\n{"step": 5}\n{"step": 7, "pro')
        source = sampler()
        agent = GRPO(tiny_policy(), source)
        agent.iteration = 4
        agent.learn(1, callbacks=[CompletionsLog(source, every=4, folder=tmp_path, terminal=False)], progress=False)
        assert [json.loads(line)["step"] for line in path.read_text().split("\n")[:-1]] == [1] + [5] * 6
