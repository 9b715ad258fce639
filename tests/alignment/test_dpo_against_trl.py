"""Loss, gradient and metrics of one batch, beside those of trl's trainers with the same weights."""

import os
from functools import partial

# trl keeps these trainers where it warns of changes to come.
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import datasets
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from aligngym.alignment.dpo import DPO
from aligngym.alignment.kto import KTO
from aligngym.alignment.language_policy import LanguagePolicy
from aligngym.alignment.token_rows import Labelled, pad_tokens
from aligngym.core import PADDING, Preferences, Trajectories

UNEQUAL = [("ab", "cd", "xyz! and so on"), ("hello ", "you", "q"), ("1+1=", "2", "11, I think")]
EQUAL = [("ab", "cde", "xyz"), ("hello ", "you", "qqq"), ("1+1=", "two", "ten")]


def trainer_of(kind, model, tokenizer, texts, config, peft_config=None):
    """Return trl's trainer of a model on a batch of texts, one gradient away from a step."""
    columns = ("prompt", "completion", "label") if kind is KTOTrainer else ("prompt", "chosen", "rejected")
    rows = [dict(zip(columns, text, strict=True)) for text in texts]
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


def as_trajectories(batch):
    """What trl's collator made, as ours: rows of tokens and a mask of the completions."""

    def pick(where):
        rows = [row[mask] for row, mask in zip(batch["input_ids"], where, strict=True)]
        return pad_tokens(rows)

    attends, completes = batch["attention_mask"].bool(), batch["completion_mask"].bool()
    actions = pick(completes)
    return Trajectories(pick(attends & ~completes), actions, actions != PADDING)


def as_preferences(batch):
    """The same for pairs, of which trl puts all chosen rows first."""
    rows = as_trajectories(batch)
    half = len(rows) // 2
    return Preferences(rows[:half], rows[half:])


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


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("sigmoid", {}),
        ("robust", {"label_smoothing": 0.1}),
        ("hinge", {}),
        ("apo_zero", {}),
        ("apo_down", {}),
        ("bco_pair", {}),
        ("nca_pair", {}),
    ],
)
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


def test_a_mix_with_a_likelihood_term(compare):
    """MPO's, on completions of equal length: trl averages the likelihood over the tokens of a batch."""
    mix = {"sigmoid": 0.8, "bco_pair": 0.2, "nll": 1.5}
    options = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": list(mix.values())}
    trainer, policy, batch = compare(DPOTrainer, DPOConfig, EQUAL, beta=0.3, **options)
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    metrics = backward(policy, as_preferences(batch), beta=0.3, loss=mix)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(policy, trainer.model)


def from_columns(batch):
    """What the collator of trl's older trainers made, as ours; its labels may cover the prompt."""

    def tokens(name):
        return [
            ids[attends.bool()]
            for ids, attends in zip(batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"], strict=True)
        ]

    prompts = tokens("prompt")
    sides = []
    for side in ("chosen", "rejected"):
        completions = [whole[len(prompt) :] for prompt, whole in zip(prompts, tokens(side), strict=True)]
        actions = pad_tokens(completions)
        sides.append(Trajectories(pad_tokens(prompts), actions, actions != PADDING))
    return Preferences(*sides)


@pytest.mark.parametrize(
    ("loss", "texts", "theirs", "ours"),
    [
        ("simpo", UNEQUAL, {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7}, {"target_margin": 0.7}),
        # trl averages the likelihood over the tokens of a batch.
        ("cpo", EQUAL, {"loss_type": "sigmoid", "cpo_alpha": 1.0}, {}),
        ("cpo", EQUAL, {"loss_type": "sigmoid", "cpo_alpha": 1.0, "label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    ],
)
def test_losses_without_a_reference(compare, loss, texts, theirs, ours):
    trainer, policy, batch = compare(CPOTrainer, CPOConfig, texts, beta=2.0, max_length=64, **theirs)
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    metrics = backward(policy, from_columns(batch), beta=2.0, loss=loss, **ours)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(policy, trainer.model)


def test_orpo(compare):
    """Its odds ratio by trl; the likelihood is that of the completion, while trl's covers the prompt as well."""
    trainer, policy, batch = compare(ORPOTrainer, ORPOConfig, UNEQUAL, beta=0.4, max_length=64)
    chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, batch)
    log_sigmoid, *_ = trainer.odds_ratio_loss(chosen, rejected)
    expected = -log_sigmoid.mean() - chosen.mean()
    expected.backward()
    metrics = backward(policy, from_columns(batch), beta=0.4, loss="orpo")
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["rewards/chosen"] == pytest.approx(0.4 * chosen.mean().item(), rel=1e-4)
    assert_same_gradients(policy, trainer.model)


@pytest.mark.parametrize("seed", [9, 10])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_kto(compare, perturb, seed, micro_batch_size):
    """With a reference point above 0, and with one that is held at 0."""
    texts = [("ab", "cd", True), ("hello ", "you", False), ("1+1=", "11, I think", False), ("xy", "z", True)]
    options = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    trainer, policy, batch = compare(KTOTrainer, KTOConfig, texts, beta=0.3, **options)
    perturb(policy, seed=seed)
    give_weights(trainer.model, policy)
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    labelled = Labelled(as_trajectories(batch), torch.as_tensor(batch["label"]).bool())
    agent = KTO(policy, labelled, beta=0.3, batch_size=4, micro_batch_size=micro_batch_size, **options)
    # trl's order, in which it has mismatched the rows.
    agent.next_rows = lambda: torch.arange(4)
    metrics = agent.backward(agent.next_batch())
    shown = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert (shown["kl"] > 0.1) == (seed == 9)
    assert metrics["kl"] == pytest.approx(shown["kl"], rel=1e-4)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["rewards/margin"] == pytest.approx(shown["rewards/margins"], rel=1e-4, abs=1e-5)
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
