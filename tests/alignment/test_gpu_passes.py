"""Packed rows on an accelerator: one attention kernel for all, and passes captured in graphs; marked ``gpu``."""

import pytest
import torch

from aligngym.alignment import captured_passes
from aligngym.core.trajectories import Trajectories

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]

#: Prompt and completions of each group: pairs, a large group, one-token completions.
BATCHES = {
    "pairs": [(5, [1, 9]), (20, [40, 2]), (2, [7, 7]), (4, [3, 59])],
    "groups": [(12, [20, 1, 33, 8, 8, 50, 2, 5]), (3, [1, 1, 1, 1, 1, 1, 1, 1])],
    "alone": [(4, [12]), (50, [1]), (11, [30])],
}


def make(groups, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(1, 200, (length,), generator=generator)

    sizes = [(prompt, size, number) for number, (prompt, lengths) in enumerate(groups) for size in lengths]
    prompts = [tokens(prompt) for prompt, _ in groups]
    observations = torch.full((len(sizes), max(prompt for prompt, *_ in sizes)), -1)
    actions = torch.full((len(sizes), max(size for _, size, _ in sizes)), -1)
    for row, (prompt, size, number) in enumerate(sizes):
        observations[row, -prompt:] = prompts[number]
        actions[row, :size] = tokens(size)
    group = torch.tensor([number for *_, number in sizes])
    return Trajectories(observations, actions, actions >= 0, group=group).to("cuda")


def evaluated(policy, rows):
    """Return log-probabilities, those of the reference, and the gradients of a weighted sum."""
    policy.zero_grad()
    reference = policy.reference_log_probs(rows)
    policy.train()
    log_probs = policy(rows).log_probs
    weights = torch.linspace(-1, 1, log_probs.numel(), device="cuda").view_as(log_probs)
    (log_probs * weights).sum().backward()
    gradients = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    return log_probs.detach(), reference, torch.cat([gradient.flatten() for gradient in gradients])


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
def test_one_kernel_for_all_sequences_agrees_with_float32(tiny_policy, batch, architecture):
    rows = make(BATCHES[batch])
    truth = evaluated(tiny_policy(architecture, dtype="float32").cuda(), rows)
    policy = tiny_policy(architecture, dtype="bfloat16").cuda()
    assert policy.packed
    packed = evaluated(policy, rows)
    policy.packed = False
    padded = evaluated(policy, rows)
    for number in range(3):
        # As far from the truth as padded rows in the same precision.
        assert relative(packed[number], truth[number]) < max(2 * relative(padded[number], truth[number]), 0.01)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
def test_captured_passes_give_the_same_numbers(tiny_policy, batch, compiled):
    policy = tiny_policy(dtype="bfloat16").cuda()
    if compiled:
        torch.compiler.reset()
        policy.compile_layers()
    rows = [make(BATCHES[batch], seed) for seed in range(4)]
    plain = [evaluated(policy, one) for one in rows]
    assert len(policy._evaluator.passes._passes) == 2, "a pass with gradients, and one without"
    again = [evaluated(policy, one) for one in rows]
    for one, other in zip(again, plain, strict=True):
        for number in range(3):
            assert relative(one[number], other[number]) < 1e-2
    # The weights are the policy's own, not those of the time of the capture.
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    captured = evaluated(policy, rows[0])
    policy._evaluator.passes.reset()
    fresh = evaluated(policy, rows[0])
    assert relative(captured[0], again[0][0]) > 1e-3
    for number in range(3):
        assert relative(captured[number], fresh[number]) < 1e-2


def test_passes_whose_gradients_are_still_wanted_are_not_overwritten(tiny_policy, monkeypatch):
    monkeypatch.setattr(captured_passes, "CAPTURED_AT", 1)
    policy = tiny_policy(dtype="bfloat16").cuda()
    first, second = make(BATCHES["pairs"], 1), make(BATCHES["pairs"], 2)
    wanted = evaluated(policy, first)[2]
    policy.zero_grad()
    policy.train()
    log_probs = policy(first).log_probs
    policy(second)  # A graph would put its activations where those of the first are.
    weights = torch.linspace(-1, 1, log_probs.numel(), device="cuda").view_as(log_probs)
    (log_probs * weights).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    assert relative(gradients, wanted) < 1e-2
