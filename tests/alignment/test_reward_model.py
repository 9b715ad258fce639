"""Reward models: scores that depend on the text alone, one base for several models, and what the data say of them."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from aligngym.alignment.data import load_preferences
from aligngym.alignment.reward_model import RewardModel
from aligngym.alignment.reward_training import (
    RewardTraining,
    calibration,
    judge,
    margins,
    most_wrong,
    pair_calibration,
)
from aligngym.alignment.scoring_head import last_token_scores
from aligngym.core.callbacks import History
from aligngym.core.objectives import bradley_terry

PROMPTS = ["What is 2+2? ", "Say hi: ", "1+1=", "A"]
COMPLETIONS = ["It is 4.", "hi", "a rather longer answer", "B"]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|end|>' }}{% endfor %}"
#: A rule that a tiny model can learn: the answer with an "x" is the worse one.
PAIRS = [
    {"prompt": f"{a}{b}?", "chosen": f"{b}{a}", "rejected": f"{b}x" + "." * (a % 3)}
    for a in range(1, 7)
    for b in range(1, 6)
]


def lora(**changes):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear"} | changes)


@pytest.fixture(scope="module")
def reward_model(model_folder, perturb):
    """``reward_model(architecture)``: an adapter and a head whose weights matter."""

    def make(architecture="llama", perturbed=True, **options):
        model = RewardModel.for_training(model_folder(architecture), lora=lora(), dtype="float32", **options)
        if perturbed:
            perturb(model.classifier)
        return model

    return make


@pytest.fixture(scope="module")
def saved(reward_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "adapter"
    reward_model().save(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tokenizer, tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return load_preferences(file, tokenizer)


class TestScores:
    @pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
    def test_are_the_heads_output_at_the_end_token(self, reward_model, architecture, tokenizer):
        model = reward_model(architecture)
        scores = model.score(PROMPTS, COMPLETIONS)
        inner = model.classifier.get_base_model()
        for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            ids = torch.tensor([[*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]])
            hidden = inner.base_model(input_ids=ids).last_hidden_state[0, -1]
            expected = inner.score.modules_to_save["default"].weight[0] @ hidden
            assert scores[row].item() == pytest.approx(expected.item(), abs=1e-5)

    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    def test_do_not_depend_on_the_batch(self, reward_model, architecture):
        model = reward_model(architecture)
        together = model.score(PROMPTS, COMPLETIONS)
        for size, order in ((1, [0, 1, 2, 3]), (2, [3, 1, 0, 2]), (3, [2, 0, 1, 3])):
            model.batch_size = size
            again = model.score([PROMPTS[row] for row in order], [COMPLETIONS[row] for row in order])
            torch.testing.assert_close(again, together[order], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    def test_do_not_depend_on_the_side_or_the_token_of_padding(self, reward_model, architecture):
        inner = reward_model(architecture).classifier.get_base_model()
        rows = [torch.tensor([5, 9, 3, 0]), torch.tensor([7, 0])]
        scores = []
        for side in ("right", "left"):
            for token in (0, 3):  # 0 is the end of a sequence, with which both rows end
                ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=token, padding_side=side)
                mask = torch.nn.utils.rnn.pad_sequence(
                    [torch.ones_like(row) for row in rows], batch_first=True, padding_side=side
                )
                scores.append(last_token_scores(inner.base_model, inner.score, ids, mask))
        for other in scores[1:]:
            torch.testing.assert_close(other, scores[0], rtol=1e-5, atol=1e-5)

    def test_of_a_conversation_are_those_of_its_template(self, reward_model):
        model = reward_model()
        model.tokenizer = copy.deepcopy(model.tokenizer)
        model.tokenizer.chat_template = TEMPLATE
        talk = model([[{"role": "user", "content": "Hi"}]], [[{"role": "assistant", "content": "Ho"}]])
        assert talk == model(["user:Hi<|end|>assistant:Ho"], [""])

    def test_take_the_tokens_that_training_takes(self, reward_model, pairs):
        model = reward_model()
        rows = PAIRS[:3]
        tokens = [model.tokens(row["prompt"], row["chosen"]) for row in rows]
        for row, found in enumerate(tokens):
            assert torch.equal(found, torch.cat([pairs.prompts[row], pairs.chosen[row]]))

    def test_are_a_list_of_numbers_for_trl(self, reward_model):
        model = reward_model(label="judge")
        rewards = model(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[[1]] * 4, answer=["4"] * 4)
        assert rewards == pytest.approx(model.score(PROMPTS, COMPLETIONS).tolist())
        assert all(isinstance(reward, float) for reward in rewards)
        assert model.__name__ == "judge"

    def test_leave_the_mode_as_it_was(self, reward_model):
        model = reward_model()
        model.classifier.train()
        model.score(PROMPTS, COMPLETIONS)
        assert model.classifier.training

    def test_are_random_only_in_training(self, model_folder, perturb):
        model = RewardModel.for_training(model_folder(), lora=lora(lora_dropout=0.5), dtype="float32")
        perturb(model.classifier)
        model.classifier.train()
        torch.testing.assert_close(model.score(PROMPTS, COMPLETIONS), model.score(PROMPTS, COMPLETIONS))


class TestLoading:
    def test_what_was_saved_scores_the_same(self, reward_model, saved):
        again = RewardModel.from_pretrained(saved, dtype="float32")
        torch.testing.assert_close(
            again.score(PROMPTS, COMPLETIONS), reward_model().score(PROMPTS, COMPLETIONS), rtol=0, atol=0
        )
        assert again.__name__ == "adapter"
        assert not any(parameter.requires_grad for parameter in again.classifier.parameters())
        assert {path.suffix for path in saved.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}

    def test_plain_peft_reads_it(self, reward_model, saved, model_folder, tokenizer):
        from peft import PeftModel

        plain = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=1, dtype=torch.float32)
        plain = PeftModel.from_pretrained(plain, saved).eval()
        # One row has no padding, and transformers takes its last token if padding is another one.
        plain.config.pad_token_id = 1
        ids = torch.tensor([[*tokenizer(PROMPTS[0] + COMPLETIONS[0])["input_ids"], tokenizer.eos_token_id]])
        expected = plain(input_ids=ids).logits[0, 0].item()
        assert reward_model().score(PROMPTS[:1], COMPLETIONS[:1]).item() == pytest.approx(expected, abs=1e-5)

    def test_a_classification_checkpoint(self, model_folder, tokenizer, tmp_path):
        checkpoint = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=1)
        checkpoint.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        scores = RewardModel.from_pretrained(tmp_path, dtype="float32").score(PROMPTS[:1], COMPLETIONS[:1])
        checkpoint.config.pad_token_id = 1
        ids = torch.tensor([[*tokenizer(PROMPTS[0] + COMPLETIONS[0])["input_ids"], tokenizer.eos_token_id]])
        assert scores.item() == pytest.approx(checkpoint(input_ids=ids).logits.item(), abs=1e-5)

    def test_an_encoder_keeps_its_own_head(self, tokenizer, tmp_path):
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=1, **sizes)).eval()
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        scores = RewardModel.from_pretrained(tmp_path, dtype="float32").score(PROMPTS, COMPLETIONS)
        for row in range(len(PROMPTS)):
            ids = torch.tensor([[*tokenizer(PROMPTS[row] + COMPLETIONS[row])["input_ids"], tokenizer.eos_token_id]])
            assert scores[row].item() == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-5)

    def test_a_new_head_scores_with_a_variance_of_about_one(self, model_folder):
        weights = [
            RewardModel.for_training(model_folder(), lora=lora(), dtype="float32", seed=seed)
            .classifier.get_base_model()
            .score.modules_to_save["default"]
            .weight
            for seed in (0, 0, 1)
        ]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])
        # 32 normal numbers with variance 1/33: their sum of squares is between 0.4 and 1.8 with probability 0.999.
        assert 0.4 < (weights[0] ** 2).sum() < 1.8


class TestSharing:
    @pytest.mark.parametrize("perturbed", [False, True])
    def test_scores_are_those_of_the_model_on_its_own(self, saved, tiny_policy, reward_model, perturbed):
        policy = tiny_policy(perturbed=perturbed)
        shared = RewardModel.sharing(policy, saved)
        expected = RewardModel.from_pretrained(saved, dtype="float32").score(PROMPTS, COMPLETIONS)
        torch.testing.assert_close(shared.score(PROMPTS, COMPLETIONS), expected, rtol=1e-5, atol=1e-5)

    def test_adds_no_second_base(self, saved, tiny_policy):
        policy = tiny_policy()
        before = {id(parameter): parameter.numel() for parameter in policy.parameters()}
        shared = RewardModel.sharing(policy, saved)
        after = {id(p): p.numel() for p in [*policy.parameters(), *shared.classifier.parameters()]}
        new = sum(size for key, size in after.items() if key not in before)
        adapter = sum(p.numel() for name, p in policy.named_parameters() if ".reward." in name)
        assert before.keys() <= after.keys()
        assert new == adapter + policy.causal_model.config.hidden_size

    def test_leaves_the_policy_and_what_of_it_is_trained_as_they_were(self, saved, tiny_policy, tokenizer):
        policy = tiny_policy()
        rows = policy.generate([torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS], max_new_tokens=5)
        policy.train()

        def facts():
            return policy(rows).log_probs.detach(), policy.reference_log_probs(rows)

        # Whoever froze a part of the adapter, or trains more than it, wants that to stay so.
        frozen, trained = policy.model.lm_head.weight, next(p for p in policy.parameters() if p.requires_grad)
        frozen.requires_grad_(True)
        trained.requires_grad_(False)
        before, names = facts(), set(policy.trainable_state())
        shared = RewardModel.sharing(policy, saved)
        shared.score(PROMPTS, COMPLETIONS)
        assert set(policy.trainable_state()) == names
        for old, new in zip(before, facts(), strict=True):
            assert torch.equal(old, new)
        assert policy.training

    def test_training_the_policy_does_not_change_the_scores(self, saved, tiny_policy, perturb):
        policy = tiny_policy()
        shared = RewardModel.sharing(policy, saved)
        before = shared.score(PROMPTS, COMPLETIONS)
        perturb(policy, scale=1.0, seed=5)
        assert torch.equal(shared.score(PROMPTS, COMPLETIONS), before)

    def test_the_policy_saves_only_its_own_adapter(self, saved, tiny_policy, tmp_path):
        policy = tiny_policy()
        RewardModel.sharing(policy, saved)
        policy.save(tmp_path)
        assert not list(tmp_path.glob("reward*"))
        assert "reward" not in json.dumps(sorted(_names(tmp_path / "adapter_model.safetensors")))

    def test_refuses_another_base(self, saved, tiny_policy, model_folder):
        with pytest.raises(ValueError, match=r"belongs to .*llama0, and the policy to .*llama-untied"):
            RewardModel.sharing(tiny_policy("llama-untied"), saved)

    def test_refuses_another_tokenizer(self, saved, tiny_policy, tmp_path):
        import shutil

        shutil.copytree(saved, tmp_path / "other")
        other = AutoTokenizer.from_pretrained(saved)
        other.add_tokens(["<new>"])
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match=r"other is not that of the policy's .*llama.*1 entries \('<new>'"):
            RewardModel.sharing(tiny_policy(), tmp_path / "other")

    def test_refuses_a_second_one(self, saved, tiny_policy):
        policy = tiny_policy()
        RewardModel.sharing(policy, saved)
        with pytest.raises(ValueError, match="carries a reward model already"):
            RewardModel.sharing(policy, saved)


class TestRefuses:
    def test_what_is_no_reward_model(self, model_folder, tiny_policy, tmp_path):
        with pytest.raises(ValueError, match=r"is no reward model: it has no score.weight"):
            RewardModel.from_pretrained(model_folder(), dtype="float32")
        with pytest.raises(FileNotFoundError, match="no such folder"):
            RewardModel.from_pretrained("./nowhere")
        tiny_policy().save(tmp_path / "policy")
        with pytest.raises(ValueError, match="of type CAUSAL_LM; a reward model's is SEQ_CLS"):
            RewardModel.from_pretrained(tmp_path / "policy")
        with pytest.raises(FileNotFoundError, match=r"no adapter_config.json"):
            RewardModel.sharing(tiny_policy(), tmp_path / "nothing")

    def test_several_labels(self, model_folder, tokenizer, tmp_path):
        AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=2).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="has 2 labels; a reward model has one"):
            RewardModel.from_pretrained(tmp_path, dtype="float32")

    def test_weights_that_are_pickled(self, saved, tmp_path):
        import shutil

        shutil.copytree(saved, tmp_path / "pickled")
        (tmp_path / "pickled" / "adapter_model.safetensors").rename(tmp_path / "pickled" / "adapter_model.bin")
        with pytest.raises(FileNotFoundError, match="other formats are not read"):
            RewardModel.from_pretrained(tmp_path / "pickled")

    def test_prompts_that_do_not_fit(self, reward_model):
        model = reward_model()
        with pytest.raises(ValueError, match="4 prompts and 1 completions"):
            model.score(PROMPTS, ["a"])
        with pytest.raises(TypeError, match="prompt and completion are list and str"):
            model.score([[{"role": "user", "content": "a"}]], ["b"])
        with pytest.raises(ValueError, match="no chat template"):
            model.score([[{"role": "user", "content": "a"}]], [[{"role": "assistant", "content": "b"}]])


class TestTraining:
    def test_the_loss_and_its_gradient_are_bradley_terry(self, reward_model, pairs):
        model = reward_model()
        agent = RewardTraining(model, pairs, batch_size=10, learning_rate=1e-3)
        batch = pairs.subset(agent.order(0).tolist())
        expected = bradley_terry(margins(model, batch)).mean().item()
        history = History()
        agent.learn(1, progress=False, callbacks=[history])
        assert history["loss"][0] == pytest.approx(expected, rel=1e-5)
        assert set(history.records[0]) == {"loss", "accuracy", "margin", "gradient_norm", "learning_rate"}
        assert history["learning_rate"] == [1e-3]

    def test_trls_own_trainer_has_the_same_loss_where_padding_is_no_end(self, reward_model, pairs, tmp_path):
        model = reward_model()
        dataset = RewardTraining(model, pairs, batch_size=10).dataset.select(range(10))
        tokenizer = copy.deepcopy(model.tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(200)
        args = RewardConfig(
            output_dir=str(tmp_path), report_to=[], bf16=False, use_cpu=True, gradient_checkpointing=False
        )
        trainer = RewardTrainer(model.classifier, args, train_dataset=dataset, processing_class=tokenizer)
        inner = model.classifier.get_base_model()
        ours = vars(inner).pop("forward")  # leaves transformers' own way to find the last token
        inputs = trainer.data_collator([dataset[row] for row in range(10)])
        theirs = trainer.compute_loss(model.classifier.eval(), inputs).item()
        inner.forward = ours
        assert bradley_terry(margins(model, pairs.subset(range(10)))).mean().item() == pytest.approx(theirs, rel=1e-5)

    def test_learns_a_rule(self, reward_model, pairs):
        model = reward_model(perturbed=False)
        train, held_back = pairs.hold_back(6, seed=0)
        agent = RewardTraining(model, train, batch_size=8, learning_rate=1e-2)
        agent.learn(epochs=8, progress=False)
        judged = agent.evaluate(held_back)
        assert judged["accuracy"] == 1.0
        assert judged["loss"] < 0.2

    def test_micro_batches_do_not_change_the_step(self, reward_model, pairs):
        states = []
        for size in (10, 5, 1):
            model = reward_model()
            # 25 pairs: the last batch of the epoch is shorter, and is one that still divides.
            agent = RewardTraining(model, pairs.subset(range(25)), batch_size=10, micro_batch_size=size)
            agent.learn(2, progress=False)
            states.append(agent.state_dict()["model"])
        for other in states[1:]:
            for name, value in states[0].items():
                torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)

    def test_resumed_training_ends_with_the_same_bits(self, model_folder, pairs, tmp_path):
        def agent():
            model = RewardModel.for_training(model_folder(), lora=lora(lora_dropout=0.3), dtype="float32")
            return RewardTraining(model, pairs, batch_size=8, micro_batch_size=4)

        whole = agent().learn(7, progress=False).state_dict()["model"]
        agent().learn(3, progress=False).save(tmp_path / "state.safetensors")
        torch.rand(5)  # what happens in between must not matter
        resumed = agent().load(tmp_path / "state.safetensors").learn(4, progress=False)
        assert resumed.iteration == 7
        state = resumed.state_dict()["model"]
        assert all(torch.equal(whole[name], state[name]) for name in whole)

    def test_continues_an_adapter(self, saved, model_folder, reward_model):
        again = RewardModel.for_training(model_folder(), adapter=saved, dtype="float32")
        assert torch.equal(again.score(PROMPTS, COMPLETIONS), reward_model().score(PROMPTS, COMPLETIONS))
        names = {name for name, p in again.classifier.named_parameters() if p.requires_grad}
        assert names == {name for name, p in reward_model().classifier.named_parameters() if p.requires_grad}
        assert any("score" in name for name in names)

    def test_disturbs_no_generator_and_leaves_no_file(self, reward_model, pairs, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        before = generators()
        RewardTraining(reward_model(), pairs).learn(1, progress=False)
        assert generators() == before
        assert not list(tmp_path.iterdir())

    def test_refuses(self, reward_model, pairs, saved, tiny_policy):
        with pytest.raises(ValueError, match="a batch of 8 rows cannot be computed 3 at a time"):
            RewardTraining(reward_model(), pairs, micro_batch_size=3)
        with pytest.raises(TypeError, match="is not to be trained"):
            RewardTraining(RewardModel.sharing(tiny_policy(), saved), pairs)
        with pytest.raises(ValueError, match="either iterations or epochs"):
            RewardTraining(reward_model(), pairs).learn()


class TestJudging:
    MARGIN = torch.tensor([2.0, 0.5, -1.0, 0.0, 3.0])

    def test_numbers_computed_by_hand(self):
        judged = judge(self.MARGIN)
        sigma = [1 / (1 + math.exp(-m)) for m in self.MARGIN.tolist()]
        assert judged["accuracy"] == pytest.approx(3.5 / 5)
        # Wilson, 1927, with z = 1.959964: centre (0.7 + z²/10)/(1 + z²/5), half z/(1 + z²/5) √(0.7·0.3/5 + z²/100)
        assert judged["accuracy_low"] == pytest.approx(0.29878, abs=1e-4)
        assert judged["accuracy_high"] == pytest.approx(0.92742, abs=1e-4)
        assert judged["margin"] == pytest.approx(0.9)
        assert judged["brier"] == pytest.approx(sum((1 - s) ** 2 for s in sigma) / 5, rel=1e-5)
        assert judged["loss"] == pytest.approx(-sum(map(math.log, sigma)) / 5, rel=1e-5)

    def test_calibration_error_by_hand(self):
        table = calibration(torch.tensor([0.05, 0.15, 0.15, 0.95]), torch.tensor([0.0, 1.0, 0.0, 1.0]))
        assert [(one.count, round(one.predicted, 4), one.observed) for one in table.bins] == [
            (1, 0.05, 0.0),
            (2, 0.15, 0.5),
            (1, 0.95, 1.0),
        ]
        assert table.error == pytest.approx((1 * 0.05 + 2 * 0.35 + 1 * 0.05) / 4)
        assert table.rows[1] == ["0.10 – 0.20", "2", "0.150", "0.500"]

    def test_what_is_said_with_probability_one_is_in_the_last_bin(self):
        table = calibration(torch.tensor([1.0, 0.5]), torch.tensor([1.0, 1.0]), lowest=0.5, bins=5)
        assert [(round(one.low, 2), round(one.high, 2), one.count) for one in table.bins] == [
            (0.5, 0.6, 1),
            (0.9, 1.0, 1),
        ]

    def test_a_model_whose_margins_are_true_is_calibrated(self):
        generator = torch.Generator().manual_seed(0)
        margin = 2 * torch.randn(40_000, generator=generator)
        truth = torch.rand(40_000, generator=generator) < margin.sigmoid()
        signed = torch.where(truth, margin, -margin)
        # The error of a bin of n pairs is about ½/√n; ten bins of 1000 to 9000 pairs stay below 0.01 together.
        assert pair_calibration(signed).error < 0.01
        assert pair_calibration(3 * signed).error > 0.05

    def test_the_surest_mistakes_come_first(self):
        assert most_wrong(torch.tensor([1.0, -0.5, 2.0, -3.0, 0.0]), 3) == [3, 1]

    def test_margins_are_differences_of_scores(self, reward_model, pairs):
        model = reward_model()
        scores = [
            model.score([row["prompt"] for row in PAIRS], [row[s] for row in PAIRS]) for s in ("chosen", "rejected")
        ]
        torch.testing.assert_close(margins(model, pairs), scores[0] - scores[1], rtol=1e-5, atol=1e-5)
        assert float(F.logsigmoid(torch.tensor(0.0))) == pytest.approx(-math.log(2))


def generators():
    """The state of every global generator."""
    numpy = np.random.get_state()[1].tolist()  # noqa: NPY002
    return random.getstate(), numpy, torch.get_rng_state().tolist()


def _names(file):
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())
