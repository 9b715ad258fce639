"""What must hold on an accelerator too; marked ``gpu`` and skipped without one."""

import math

import pytest
import torch

from aligngym.alignment import DPO, TokenPreferences
from aligngym.alignment.log_probs import packed_log_probs, padded_log_probs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)

    def tokens(length):
        return torch.randint(1, 200, (length,), generator=generator)

    lengths = [(5, 1, 9), (30, 40, 2), (2, 7, 7), (17, 3, 60)]
    return TokenPreferences(*([tokens(row[column]) for row in lengths] for column in range(3)))


def test_packed_agrees_with_padded_and_with_the_processor(tiny_policy, pairs):
    policy = tiny_policy(dtype="float32")
    batch = pairs[torch.arange(4)].both()
    expected = policy(batch).log_probs
    policy.cuda()
    packed = packed_log_probs(policy.causal_model, batch.to("cuda"))
    padded, _ = padded_log_probs(policy.causal_model, batch.to("cuda"))
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_starts_at_ln_2_and_gets_better(tiny_policy, pairs, dtype):
    agent = DPO(tiny_policy(dtype=dtype, perturbed=False), pairs, batch_size=4, learning_rate=1e-2)
    assert next(agent.policy.parameters()).is_cuda
    assert agent.iterate()["loss"] == pytest.approx(math.log(2), abs=1e-6)
    agent.learn(20, progress=False)
    assert agent.evaluate(pairs)["accuracy"] == 1.0
