import pytest
import torch

from aligngym.agents import EpisodeSampler
from aligngym.alignment import OnlineDPO, PromptSampler
from aligngym.alignment.online_dpo import best_and_worst
from aligngym.core import TabularPolicy, Trajectories
from aligngym.core.objectives import sigmoid_preference
from aligngym.envs import GridWorld

ROWS = [{"prompt": "x"}, {"prompt": "yz"}]


def letters(completions, **_):
    return [sum(character.isalpha() for character in text) / 4 for text in completions]


def sampler(**changes):
    return PromptSampler(ROWS, [letters], **{"group_size": 4, "prompts_per_sample": 2, "max_new_tokens": 4} | changes)


def test_the_best_of_each_group_is_paired_with_its_worst():
    rewards = torch.tensor([[2.0], [3.0], [1.0], [5.0], [5.0], [7.0], [0.0]])
    group = torch.tensor([4, 4, 4, 9, 9, 2, 2])
    rows = Trajectories(torch.arange(7)[:, None], torch.zeros(7, 1), torch.ones(7, 1).bool(), rewards, group=group)
    pairs = best_and_worst(rows)
    assert pairs.chosen.observations[:, 0].tolist() == [5, 1, 3]
    assert pairs.rejected.observations[:2, 0].tolist() == [6, 2]
    # A group whose returns are alike says nothing.
    assert pairs.weights.tolist() == [1.0, 1.0, 0.0]


def test_the_loss_is_that_of_dpo_on_the_pairs(tiny_policy):
    policy = tiny_policy()
    agent = OnlineDPO(policy, sampler(), beta=0.3)
    batch = agent.next_batch()
    losses, _ = agent.losses(batch)
    pairs = batch.preferences
    h = sum(
        sign * (policy(side).log_probs - policy.reference_log_probs(side)).sum(1)
        for sign, side in ((1, pairs.chosen), (-1, pairs.rejected))
    )
    torch.testing.assert_close(losses, sigmoid_preference(h, beta=0.3) * pairs.weights, rtol=1e-4, atol=1e-5)


def test_a_batch_without_a_pair_changes_nothing(tiny_policy):
    policy = tiny_policy()
    before = {name: value.clone() for name, value in policy.trainable_state().items()}
    agent = OnlineDPO(
        policy, PromptSampler(ROWS, [lambda completions, **_: [1.0] * len(completions)], max_new_tokens=3)
    )
    metrics = agent.iterate()
    assert metrics["loss"] == 0
    assert all(torch.equal(value, before[name]) for name, value in policy.trainable_state().items())


def test_a_language_model_writes_more_of_what_is_rewarded(tiny_policy):
    source = sampler(group_size=16)
    agent = OnlineDPO(tiny_policy(perturbed=False), source, learning_rate=0.01, beta=0.1)
    agent.learn(1, progress=False)
    before = source.metrics["return"]
    agent.learn(24, progress=False)
    assert source.metrics["return"] > before + 0.2


def test_the_same_class_walks_to_the_goal():
    env = GridWorld("S.\n.G", step_reward=-0.1)
    policy = TabularPolicy.for_env(env)
    source = EpisodeSampler(env, episodes=32, group_size=8, max_steps=12)
    OnlineDPO(policy, source, learning_rate=0.1, beta=0.1).learn(40, progress=False)
    assert float(policy.probability_table()[0].max()) > 0.45
    assert source.metrics["length"] < 2.3


def test_it_resumes_exactly(tiny_policy, tmp_path):
    def make():
        return OnlineDPO(tiny_policy(), sampler(), learning_rate=0.01)

    whole = make().learn(4, progress=False)
    make().learn(2, progress=False).save(tmp_path / "agent.safetensors")
    resumed = make().load(tmp_path / "agent.safetensors").learn(2, progress=False)
    for one, other in zip(
        whole.policy.trainable_state().values(), resumed.policy.trainable_state().values(), strict=True
    ):
        assert torch.equal(one, other)


def test_bad_input_is_refused(tiny_policy):
    with pytest.raises(ValueError, match="group 0 has a single trajectory: sample with a group_size of at least 2"):
        OnlineDPO(tiny_policy(), sampler(group_size=1)).iterate()
    with pytest.raises(ValueError, match="beta must be positive"):
        OnlineDPO(tiny_policy(), sampler(), beta=0.0)
    with pytest.raises(ValueError, match="pairs are made within groups"):
        best_and_worst(Trajectories(torch.zeros(2, 1), torch.zeros(2, 1), torch.ones(2, 1).bool(), torch.zeros(2, 1)))
