"""Loss, gradient and metrics of one batch, beside those of trl's trainers with the same weights."""

from functools import partial

import datasets
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from aligngym.alignment.dpo import DPO
from aligngym.alignment.language_policy import LanguagePolicy
from aligngym.core import PADDING, Preferences, Trajectories

UNEQUAL = [("ab", "cd", "xyz! and so on"), ("hello ", "you", "q"), ("1+1=", "2", "11, I think")]
EQUAL = [("ab", "cde", "xyz"), ("hello ", "you", "qqq"), ("1+1=", "two", "ten")]


def trainer_of(kind, model, tokenizer, texts, config, peft_config=None):
    """Return trl's trainer of a model on a batch of texts, one gradient away from a step."""
    rows = [dict(zip(("prompt", "chosen", "rejected"), text, strict=True)) for text in texts]
    return kind(
        model,
        args=config(per_device_train_batch_size=len(texts), report_to=[], use_cpu=True, bf16=False),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def give_weights(model, policy):
    """Give trl's model the adapter of our policy."""
    own = dict(policy.model.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = own[name].data.clone()


@pytest.fixture
def compare(tiny_policy, model_folder, tokenizer, tmp_path):
    """``compare(trainer, config, texts)``: trl's trainer, our policy with its weights, and trl's first batch."""

    def make(kind, config, texts, **options):
        policy = tiny_policy()
        base = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
        config = partial(config, output_dir=tmp_path, **options)
        trainer = trainer_of(kind, base, tokenizer, texts, config, policy.model.peft_config["default"])
        give_weights(trainer.model, policy)
        return trainer, policy, next(iter(trainer.get_train_dataloader()))

    return make


def as_preferences(batch):
    """What trl's collator made, as ours: [chosen; rejected] token rows and a mask of the completions."""

    def rows(ids, attends, completes):
        def pick(where):
            chosen = [row[mask] for row, mask in zip(ids, where, strict=True)]
            return torch.nn.utils.rnn.pad_sequence(chosen, True, PADDING)

        actions = pick(completes)
        return Trajectories(pick(attends & ~completes), actions, actions != PADDING)

    ids, attends, completes = batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool()
    half = len(ids) // 2
    return Preferences(*(rows(ids[x], attends[x], completes[x]) for x in (slice(half), slice(half, None))))


def assert_same_gradients(policy, model, factor=1.0):
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            scale = expected[name].norm()
            assert scale > 0
            assert (parameter.grad - factor * expected[name]).norm() <= 2e-5 * factor * scale, name


def backward(policy, preferences, **options):
    agent = DPO(policy, preferences, batch_size=len(preferences), **options)
    return agent.backward(agent.next_batch())


@pytest.mark.parametrize(("loss", "options"), [("sigmoid", {}), ("robust", {"label_smoothing": 0.1}), ("hinge", {})])
def test_losses_with_a_reference(compare, loss, options):
    trainer, policy, batch = compare(DPOTrainer, DPOConfig, UNEQUAL, beta=0.3, loss_type=loss, **options)
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    metrics = backward(policy, as_preferences(batch), beta=0.3, loss=loss, **options)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert abs(metrics["rewards/margin"]) > 0.1
    shown = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    for ours, theirs in [("chosen", "chosen"), ("rejected", "rejected"), ("margin", "margins")]:
        assert metrics[f"rewards/{ours}"] == pytest.approx(shown[f"rewards/{theirs}"], rel=1e-4)
    assert metrics["rewards/accuracy"] == pytest.approx(shown["rewards/accuracies"])
    assert_same_gradients(policy, trainer.model)


def test_ipo_on_completions_of_equal_length(compare):
    """trl divides log-ratios by the length L, the paper does not: (h − L/2β)² = L² (h/L − 1/2β)²."""
    trainer, policy, batch = compare(DPOTrainer, DPOConfig, EQUAL, beta=0.3, loss_type="ipo")
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    preferences = as_preferences(batch)
    (length,) = set(preferences.both().lengths.tolist())
    assert length == 4
    metrics = backward(policy, preferences, beta=0.3 / length, loss="ipo")
    assert metrics["loss"] == pytest.approx(length**2 * expected.item(), rel=1e-5)
    assert_same_gradients(policy, trainer.model, length**2)


def test_simpo(compare):
    options = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7, "max_length": 64}
    trainer, policy, batch = compare(CPOTrainer, CPOConfig, UNEQUAL, beta=2.0, **options)
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    sides = []
    for side in ("chosen", "rejected"):
        actions = batch[f"{side}_labels"]
        rows = [row[row != -100] for row in actions]
        actions = torch.nn.utils.rnn.pad_sequence(rows, True, PADDING)
        prompts = batch["prompt_input_ids"].where(batch["prompt_attention_mask"].bool(), PADDING)
        sides.append(Trajectories(prompts, actions, actions != PADDING))
    metrics = backward(policy, Preferences(*sides), beta=2.0, loss="simpo", target_margin=0.7)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(policy, trainer.model)


def test_an_adapter_that_came_trained_has_itself_as_reference(tiny_policy, model_folder, tokenizer, perturb, tmp_path):
    """In trl too; both adapters are then moved by the same amount."""
    tiny_policy().save(tmp_path / "adapter")
    policy = LanguagePolicy.from_pretrained(model_folder("llama"), adapter=tmp_path / "adapter", dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    trainer = trainer_of(DPOTrainer, model, tokenizer, UNEQUAL, partial(DPOConfig, output_dir=tmp_path))
    perturb(policy, seed=5)
    give_weights(trainer.model, policy)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    metrics = backward(policy, as_preferences(batch), beta=0.1)
    assert abs(metrics["loss"] - 0.6931) > 0.01
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(policy, trainer.model)
