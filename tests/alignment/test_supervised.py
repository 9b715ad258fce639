"""Supervised fine-tuning: what is learned of a row, trl's loss against our own log-probabilities, and what stays."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from aligngym.alignment.demonstrations import Demonstrations, load_demonstrations
from aligngym.alignment.dpo import DPO
from aligngym.alignment.supervised import SupervisedFineTuning, evaluate_demonstrations, supervised_fine_tuning
from aligngym.core import Preferences
from aligngym.core.callbacks import History

ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(1, 7) for b in range(1, 6)]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
#: It drops what the assistant thought once more follows, as some models' templates do.
FORGETFUL = TEMPLATE.replace("m['content']", "(m['content'] if loop.last else m['content'][-1:])")


@pytest.fixture
def chat(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def message(role, content):
    return {"role": role, "content": content}


def conversation(row):
    return {"prompt": [message("user", row["prompt"])], "completion": [message("assistant", row["completion"])]}


def learned_text(found, tokenizer, row=0):
    return tokenizer.decode(found.tokens[row][found.learned[row]])


class TestWhatIsLearned:
    def test_a_completion_and_its_end(self, tokenizer):
        for completion in ("5", "5<|end|>"):
            found = load_demonstrations([{"prompt": "2+3=", "completion": completion}], tokenizer)
            assert tokenizer.decode(found.tokens[0]) == "2+3=5<|end|>"
            assert learned_text(found, tokenizer) == "5<|end|>"

    def test_the_assistants_answer_in_a_conversation(self, chat):
        found = load_demonstrations([conversation(ROWS[0])], chat)
        assert chat.decode(found.tokens[0]) == "user:1+1=<|end|>assistant:2<|end|>"
        assert learned_text(found, chat) == "2<|end|>"

    def test_every_turn_of_the_assistant(self, chat):
        talk = [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
        found = load_demonstrations([{"messages": talk}], chat)
        assert learned_text(found, chat) == "b<|end|>d<|end|>"

    def test_all_of_a_text_but_its_first_token(self, tokenizer):
        found = load_demonstrations([{"text": "abc"}], tokenizer)
        assert learned_text(found, tokenizer) == "bc<|end|>"

    def test_conversations_of_another_style(self, chat):
        talk = [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]
        assert learned_text(load_demonstrations([{"conversations": talk}], chat), chat) == "b<|end|>"

    def test_as_trl_would_have_it(self, chat, tiny_policy, tmp_path):
        for rows in (ROWS[:4], [conversation(row) for row in ROWS[:4]], [{"text": "abc"}, {"text": "de"}]):
            ours = load_demonstrations(rows, chat).as_dataset()
            args = SFTConfig(
                output_dir=str(tmp_path), report_to=[], bf16=False, use_cpu=True, gradient_checkpointing=False
            )
            trainer = SFTTrainer(
                tiny_policy().model, args, train_dataset=Dataset.from_list(rows), processing_class=copy.deepcopy(chat)
            )
            theirs = trainer.train_dataset
            assert ours["input_ids"][:] == theirs["input_ids"][:]
            # What trl counts as learned of the first token of a text is never predicted.
            assert [row[1:] for row in ours["labels"]] == [row[1:] for row in theirs["labels"]]

    def test_the_end_is_learned_although_it_is_the_padding_too(self, tokenizer, tiny_policy):
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
        policy = tiny_policy()
        found = load_demonstrations([*ROWS[:2], {"prompt": "1+1=", "completion": "two, I think"}], tokenizer)
        agent = SupervisedFineTuning(policy, found)
        collator = agent.trainer(agent._arguments(1, "/tmp/unused"), train_dataset=agent.dataset).data_collator
        labels = collator([agent.dataset[row] for row in range(3)])["labels"]
        assert labels[0].tolist()[4:6] == [*tokenizer("2")["input_ids"], tokenizer.eos_token_id]
        assert (labels[0][6:] == -100).all()
        assert (labels == tokenizer.eos_token_id).sum() == 3

    def test_a_batch_has_the_same_tokens_as_the_rows(self, chat):
        talk = [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
        found = load_demonstrations([{"messages": talk}, {"messages": talk[:2]}], chat)
        batch = found[torch.arange(2)]
        assert chat.decode(batch.observations[0]) == "user:a<|end|>assistant:"
        assert chat.decode(batch.actions[0][batch.mask[0]]) == "b<|end|>d<|end|>"
        assert batch.lengths.tolist() == [4, 2]
        assert found.num_learned == 6


class TestTraining:
    def test_trls_loss_is_our_log_probabilities(self, tiny_policy):
        policy = tiny_policy()
        data = load_demonstrations(ROWS, policy.tokenizer)
        agent = SupervisedFineTuning(policy, data, batch_size=10, learning_rate=1e-3)
        batch = data[agent.order(0)]
        log_probs = policy(batch).log_probs
        loss = -log_probs.sum() / batch.mask.sum()
        expected = torch.autograd.grad(loss, [p for p in policy.parameters() if p.requires_grad])
        norm = torch.cat([gradient.flatten() for gradient in expected]).norm().item()
        history = History()
        agent.learn(1, progress=False, callbacks=[history])
        assert history["loss"][0] == pytest.approx(loss.item(), rel=1e-5)
        assert history["gradient_norm"][0] == pytest.approx(norm, rel=1e-4)
        assert history["learning_rate"] == [1e-3]
        assert "token_accuracy" in history.records[0]

    def test_raises_the_probability_of_what_is_demonstrated(self, tiny_policy):
        # Its head is frozen, and with smaller weights could not be sure of any token.
        policy = tiny_policy("llama-untied", perturbed=False, initializer_range=0.5)
        rows = [{"prompt": f"{letter}:", "completion": letter} for letter in "abcdef"]
        supervised_fine_tuning(policy, rows, epochs=40, learning_rate=1e-2, batch_size=6, progress=False)
        data = load_demonstrations(rows, policy.tokenizer)
        result = evaluate_demonstrations(policy, data)
        assert result["loss"] < 0.1 < 3 < result["reference_loss"]
        written = policy.generate(data.prompts, max_new_tokens=4, greedy=True)
        texts = [policy.tokenizer.decode(row[mask]) for row, mask in zip(written.actions, written.mask, strict=True)]
        assert texts == [f"{letter}<|end|>" for letter in "abcdef"]

    def test_evaluation_is_the_mean_over_learned_tokens(self, tiny_policy):
        policy = tiny_policy()
        data = load_demonstrations(ROWS, policy.tokenizer)
        batch = data[torch.arange(30)]
        expected = -(policy(batch).log_probs.sum() / batch.mask.sum()).item()
        for size in (30, 7):
            result = evaluate_demonstrations(policy, data, size)
            assert result["loss"] == pytest.approx(expected, rel=1e-5)
            assert result["perplexity"] == pytest.approx(np.exp(expected), rel=1e-5)

    def test_micro_batches_do_not_change_the_step(self, tiny_policy):
        states = []
        for size in (10, 5, 1):
            policy = tiny_policy()
            data = load_demonstrations([*ROWS[:24], {"prompt": "a", "completion": "long " * 5}], policy.tokenizer)
            SupervisedFineTuning(policy, data, batch_size=10, micro_batch_size=size).learn(3, progress=False)
            states.append({name: value.clone() for name, value in policy.trainable_state().items()})
        for other in states[1:]:
            for name, value in states[0].items():
                torch.testing.assert_close(other[name], value, rtol=1e-2, atol=1e-4)

    def test_resumed_training_ends_with_the_same_bits(self, tiny_policy, tmp_path):
        def agent():
            policy = tiny_policy(perturbed=False, lora={"lora_dropout": 0.3})
            return SupervisedFineTuning(policy, load_demonstrations(ROWS, policy.tokenizer), micro_batch_size=4)

        whole = agent().learn(6, progress=False).policy.trainable_state()
        agent().learn(2, progress=False).save(tmp_path / "state.safetensors")
        torch.rand(3)
        resumed = agent().load(tmp_path / "state.safetensors").learn(4, progress=False).policy.trainable_state()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def test_every_row_is_seen_once_an_epoch(self, tiny_policy):
        policy = tiny_policy()
        agent = SupervisedFineTuning(policy, load_demonstrations(ROWS[:25], policy.tokenizer), batch_size=10)
        rows = [row for batch in agent._batches(3, None).batch_sampler for row in batch]
        assert sorted(rows) == list(range(25))
        assert agent.learn(epochs=2, progress=False).iteration == 6


class TestLeavesEverythingElse:
    def test_of_the_policy(self, tiny_policy):
        policy = tiny_policy()
        policy.train()
        causal, data = policy.causal_model, load_demonstrations(ROWS, policy.tokenizer)
        causal.generation_config.eos_token_id = [3, 5]
        causal.config.pad_token_id = None
        batch = data[torch.arange(4)]
        reference = policy.reference_log_probs(batch)
        frozen = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
        before, trained = set(vars(causal)), set(policy.trainable_state())
        supervised_fine_tuning(policy, data, epochs=1, progress=False)
        assert set(vars(causal)) == before
        assert causal.generation_config.eos_token_id == [3, 5]
        assert causal.config.pad_token_id is None
        assert policy.training
        assert policy.packed
        assert set(policy.trainable_state()) == trained
        assert torch.equal(policy.reference_log_probs(batch), reference)
        assert all(torch.equal(p, frozen[name]) for name, p in policy.named_parameters() if name in frozen)
        assert all(p.grad is None or not p.grad.any() for p in policy.parameters())
        policy.packed = False
        padded = policy(batch).log_probs
        policy.packed = True
        torch.testing.assert_close(policy(batch).log_probs, padded, rtol=1e-4, atol=1e-5)

    def test_of_the_process(self, tiny_policy, tmp_path, monkeypatch):
        def generators():
            numpy = np.random.get_state()[1].tolist()  # noqa: NPY002
            return random.getstate(), numpy, torch.get_rng_state().tolist()

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **_: pytest.fail("told somebody"))
        monkeypatch.delenv("CI", raising=False)
        policy, before = tiny_policy(), generators()
        supervised_fine_tuning(policy, ROWS, progress=False)
        assert generators() == before
        assert not list(tmp_path.iterdir())

    def test_so_that_another_agent_goes_on_before_and_after(self, tiny_policy):
        policy = tiny_policy()
        data = load_demonstrations(ROWS, policy.tokenizer)
        pairs = Preferences(data[torch.arange(8)], data[torch.arange(8, 16)])
        pairs.rejected.observations = pairs.chosen.observations
        agent = DPO(policy, pairs, batch_size=4)
        agent.learn(1, progress=False)
        supervised_fine_tuning(policy, data, epochs=1, progress=False)
        agent.learn(1, progress=False)
        supervised_fine_tuning(policy, data, epochs=1, progress=False)
        assert agent.iteration == 2


class TestRefuses:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"completion": ""}, "completion is empty"),
            ({"completion": 3}, "completion is int, not text"),
            ({"prompt": []}, "prompt is empty"),
            ({"prompt": [{"role": "user", "content": "a"}]}, "text and messages are mixed"),
            ({"prompt": ["a"], "completion": ["b"]}, "prompt is a list of something else than messages"),
        ],
    )
    def test_rows_that_cannot_be_used(self, tokenizer, row, message):
        with pytest.raises(ValueError, match=f"1 of 31 rows cannot be used .row 31: {message}"):
            load_demonstrations([*ROWS, ROWS[0] | row], tokenizer)
        with pytest.warns(UserWarning, match="left out"):
            assert len(load_demonstrations([*ROWS, ROWS[0] | row], tokenizer, drop_invalid=True)) == 30

    def test_a_conversation_without_the_assistant(self, chat):
        with pytest.raises(ValueError, match="no message is the assistant's"):
            load_demonstrations([{"messages": [message("user", "a")]}], chat)

    def test_a_template_that_changes_what_was_said(self, chat):
        chat.chat_template = FORGETFUL
        talk = [message("user", "a"), message("assistant", "b c"), message("user", "d"), message("assistant", "e")]
        with pytest.raises(ValueError, match="row 1: the chat template writes message 2 otherwise once more follows"):
            load_demonstrations([{"messages": talk}], chat)

    def test_completions_that_never_end(self, chat):
        chat.chat_template = TEMPLATE.replace("<|end|>", " ")
        with pytest.raises(ValueError, match="would never learn to stop"):
            load_demonstrations([conversation(ROWS[0])], chat)

    def test_conversations_without_a_template(self, tokenizer):
        with pytest.raises(ValueError, match="no chat template"):
            load_demonstrations([conversation(ROWS[0])], tokenizer)

    def test_other_columns(self, tokenizer, tmp_path):
        with pytest.raises(ValueError, match="row 1: columns prompt and completion, or messages, or text are needed"):
            load_demonstrations([{"question": "a"}], tokenizer)
        with pytest.raises(ValueError, match="row 2: no column 'completion'"):
            load_demonstrations([ROWS[0], {"prompt": "a"}], tokenizer)
        with pytest.raises(ValueError, match="no rows"):
            load_demonstrations([], tokenizer)
        with pytest.raises(FileNotFoundError, match="no such file"):
            load_demonstrations(tmp_path / "nowhere.jsonl", tokenizer)

    def test_what_is_cut_off_is_said(self, tokenizer, tmp_path):
        rows = [{"prompt": "ab", "completion": "cdefg"}, {"prompt": "a", "completion": "b"}]
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        # 6 + 2 learned tokens with their ends, of which 4 + 2 are left.
        with pytest.warns(UserWarning, match=r"rows.jsonl: --max-length 6 cuts off the end of 1 of 2 rows, 25.0% of"):
            found = load_demonstrations(file, tokenizer, max_length=6)
        assert [len(tokens) for tokens in found.tokens] == [6, 3]
        with pytest.raises(ValueError, match=r"1 of 2 prompts fill --max-length 2 alone .row 1 has 2 tokens."):
            load_demonstrations(rows, tokenizer, max_length=2)
        with pytest.warns(UserWarning, match="left out"):
            assert len(load_demonstrations(rows[:1] + rows[1:] * 2, tokenizer, max_length=2, drop_invalid=True)) == 2

    def test_options_that_do_not_fit(self, tiny_policy):
        policy = tiny_policy()
        data = load_demonstrations(ROWS, policy.tokenizer)
        with pytest.raises(ValueError, match="3 at a time in equal pieces"):
            SupervisedFineTuning(policy, data, micro_batch_size=3)
        with pytest.raises(ValueError, match="either iterations or epochs"):
            SupervisedFineTuning(policy, data).learn()
        with pytest.raises(ValueError, match="leaves none to train on"):
            Demonstrations(data.tokens[:1], data.learned[:1]).hold_back(1, 0)

    def test_a_loss_that_is_no_number(self, tiny_policy):
        policy = tiny_policy()
        next(p for p in policy.parameters() if p.requires_grad).data.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match=r"step 0: .* is nan"):
            supervised_fine_tuning(policy, ROWS, progress=False)
