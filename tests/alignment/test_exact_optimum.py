"""The classes that train tables reach the exact optimum of KL-regularised reinforcement learning with an adapter."""

import copy
import itertools

import pytest
import torch

from aligngym.agents import GRPO, PPO, RLOO
from aligngym.alignment.language_policy import LanguagePolicy, default_lora
from aligngym.alignment.prompt_sampler import PromptSampler
from aligngym.core import Decay, Trajectories

VOCABULARY, LENGTH, BETA = 4, 2, 0.5
TEXTS = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
REWARDS = torch.rand(len(TEXTS), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
#: Different tokens: after several equal ones alone, attention cannot tell how many there were.
PROMPT, PROMPT_TOKENS = '!"#', [1, 2, 3]


def reward(completion_ids, **_):
    return [float(REWARDS[(torch.tensor(ids) == TEXTS).all(1)]) for ids in completion_ids]


@pytest.fixture
def make_policy(model_folder):
    def make(critic):
        folder = model_folder("llama", vocab_size=VOCABULARY, eos_token_id=None, pad_token_id=None)
        policy = LanguagePolicy.from_pretrained(folder, lora=default_lora(8), dtype="float32", critic=critic)
        # Texts of a fixed length: no token ends them.
        policy.tokenizer = copy.deepcopy(policy.tokenizer)
        policy.tokenizer.eos_token = None
        assert policy.end_tokens == []
        return policy

    return make


def objective(policy):
    """J = E[R] − β KL(π‖π_ref) of the policy and of its reference, and the largest J, by summing over all texts."""
    rows = torch.ones_like(TEXTS)
    every = Trajectories(torch.tensor([PROMPT_TOKENS] * len(TEXTS)), TEXTS, rows.bool(), group=rows[:, 0])
    with torch.no_grad():
        own, reference = (x.double().sum(1) for x in (policy(every).log_probs, policy.reference_log_probs(every)))
    assert own.exp().sum() == pytest.approx(1, abs=1e-5)
    best = BETA * (reference + REWARDS / BETA).logsumexp(0)
    return float(own.exp() @ (REWARDS - BETA * (own - reference))), float(reference.exp() @ REWARDS), float(best)


AGENTS = {
    "PPO": (PPO, {"discount": 1.0, "minibatch_size": None, "normalise_advantages": None, "epochs": 1}),
    "RLOO": (RLOO, {}),
    "Dr. GRPO": (GRPO, {"scale": False, "normalise": "trajectories"}),
    # With the penalty in the reward, advantages vanish at the same optimum whatever they are divided by.
    "GRPO": (GRPO, {}),
}


@pytest.mark.parametrize("name", AGENTS)
def test_an_adapter_reaches_the_regularised_optimum(make_policy, name):
    kind, options = AGENTS[name]
    policy = make_policy(critic=kind is PPO)
    source = PromptSampler([{"prompt": PROMPT}], [reward], group_size=64, prompts_per_sample=1, max_new_tokens=LENGTH)
    start, reference, best = objective(policy)
    assert start == pytest.approx(reference, abs=1e-6)
    steps = 80
    agent = kind(policy, source, beta=BETA, learning_rate=Decay(0.01, steps, 10, "cosine"), **options)
    agent.learn(steps, progress=False)
    reached, _, _ = objective(policy)
    assert (best - reached) / (best - reference) < 0.03, (best - reached) / (best - reference)
