"""Activations that are computed again for their gradients."""

import pytest
import torch
from torch.utils import checkpoint

from aligngym.alignment import LanguagePolicy, activation_memory
from aligngym.alignment.activation_memory import MEASURED, TOKENS_AT_ONCE, ActivationMemory
from aligngym.core.trajectories import Trajectories


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 200, (2, 6), generator=generator).repeat_interleave(2, dim=0)
    actions = torch.randint(1, 200, (4, 9), generator=generator)
    return Trajectories(prompts, actions, actions > 0, group=torch.tensor([0, 0, 1, 1]))


def gradients(policy, rows, part):
    policy.train()
    policy.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of dropout
        found = getattr(policy(rows), part)
    (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("part", ["log_probs", "values"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_the_same_bit_for_bit(tiny_policy, rows, monkeypatch, part, dropout, dtype):
    """Also those of the critic, whose adapter is no longer at work when its layers are computed again."""
    base = tiny_policy(dtype=dtype, lora={"lora_dropout": dropout})
    policy = LanguagePolicy(base.model, base.tokenizer, critic=True)
    torch.nn.init.normal_(policy.value_head.weight)
    kept = gradients(policy, rows, part)
    calls = []
    monkeypatch.setattr(
        activation_memory, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint.checkpoint(*a, **k)
    )
    vars(policy._evaluator.passes.memory)["tokens"] = 20
    again = gradients(policy, rows, part)
    assert calls, "nothing was computed again"
    assert torch.equal(again, kept)
    vars(policy._evaluator.passes.memory)["tokens"] = 1000
    calls.clear()
    gradients(policy, rows, part)
    assert not calls, "activations that fit are kept"


def test_as_many_tokens_at_once_as_fit(tiny_policy):
    memory = ActivationMemory(tiny_policy().causal_model)
    assert memory.tokens == float("inf"), "a processor's memory is not measured"
    for tokens, at_once in ((1e9, TOKENS_AT_ONCE), (3000, 3000), (10, MEASURED)):
        vars(memory)["tokens"] = tokens
        assert memory.tokens_at_once == at_once
