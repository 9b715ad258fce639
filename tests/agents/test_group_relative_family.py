"""What distinguishes the members of GRPO's family, by hand and by adding up all groups."""

import dataclasses
import itertools
import math

import gymnasium
import pytest
import torch
from torch import nn

from aligngym.agents import GRPO, PPO, RLOO, EpisodeSampler
from aligngym.agents.group_relative import CISPO, DAPO, GSPO
from aligngym.agents.reinforce_plus_plus import ReinforcePlusPlus
from aligngym.agents.rejection_sampling import RejectionSampling
from aligngym.core import Evaluation, Policy, Sampler, TabularPolicy, Trajectories
from aligngym.core.advantages import gae, group_normalised
from aligngym.core.randomness import seeded
from aligngym.envs import GridWorld

STATES, ACTIONS = 6, 3
FAMILY = {
    "grpo": GRPO,
    "dr grpo": lambda *a, **k: GRPO(*a, scale=False, normalise="trajectories", **k),
    "dapo": DAPO,
    "cispo": CISPO,
    "gspo": GSPO,
    "reinforce++": ReinforcePlusPlus,
    "reinforce++ baseline": lambda *a, **k: ReinforcePlusPlus(*a, group_baseline=True, **k),
    "rejection": RejectionSampling,
}


class Given(Sampler):
    def __init__(self, rows):
        self.rows, self.metrics = rows, {}

    def sample(self, policy, seed):
        return dataclasses.replace(self.rows)


def policy_of(seed=0, markov=True, **options):
    policy = TabularPolicy(STATES, ACTIONS, **options).double()
    policy.logits.data = torch.randn(STATES, ACTIONS, generator=torch.Generator().manual_seed(seed)).double()
    policy.markov = markov
    return policy


def rows_of(groups=3, size=4, length=3, shift=0.15):
    """Random rows of unequal lengths, whose probabilities were others when they were drawn."""
    generator = torch.Generator().manual_seed(5)
    count = groups * size
    mask = torch.arange(length) < torch.randint(1, length + 1, (count, 1), generator=generator)
    observations = torch.randint(0, STATES, (count, length), generator=generator).where(mask, -1)
    actions = torch.randint(0, ACTIONS, (count, length), generator=generator).where(mask, -1)
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    rows = Trajectories(observations, actions, mask, terminated=last, truncated=torch.zeros_like(mask))
    rows.rewards = torch.randn(count, length, generator=generator).double() * last
    rows.group = torch.arange(groups).repeat_interleave(size)
    noise = torch.randn(count, length, generator=generator).double() * shift
    rows.log_probs = (policy_of()(rows).log_probs.detach() + noise) * mask
    return rows


def gradient(agent, batch=None):
    agent.policy.zero_grad()
    (minibatch,) = agent.minibatches(agent.judge(agent.sampler.rows) if batch is None else batch)
    losses, _ = agent.losses(minibatch)
    (losses.sum() / agent.weight(minibatch)).backward()
    return -agent.policy.logits.grad


def by_hand(objective):
    """Return the gradient of a function of the log-probabilities."""
    policy = policy_of()
    objective(policy(rows_of()).log_probs).backward()
    return policy.logits.grad


def standardised_returns(rows):
    returns = rows.returns.view(3, 4)
    return ((returns - returns.mean(1, keepdim=True)) / (returns.std(1, keepdim=True) + 1e-4)).view(-1, 1)


@pytest.mark.parametrize("markov", [True, False])
def test_gspo_has_one_ratio_for_a_trajectory(markov):
    rows = rows_of()
    advantages = standardised_returns(rows)[:, 0]
    clipped = []

    def objective(log_probs):
        total = 0
        for row in range(len(rows)):
            taken = rows.mask[row]
            s = (log_probs[row][taken] - rows.log_probs[row][taken]).mean().exp()
            clipped.append(not 1 - 0.03 <= float(s.detach()) <= 1 + 0.05)
            total = total + torch.minimum(s * advantages[row], s.clamp(1 - 0.03, 1 + 0.05) * advantages[row])
        return total / len(rows)

    expected = by_hand(objective)
    assert 2 <= sum(clipped) <= 10
    agent = GSPO(policy_of(markov=markov), Given(rows), clip=0.03, clip_high=0.05)
    torch.testing.assert_close(gradient(agent), expected)
    agent.normalise = "actions"
    share = sum(float(rows.lengths[row]) for row in range(len(rows)) if clipped[row]) / float(rows.mask.sum())
    assert agent.backward(next(agent.minibatches(agent.judge(rows))))["clip_fraction"] == pytest.approx(share)


def test_the_sequence_weight_of_gspo_is_that_of_its_ratio():
    rows = rows_of()
    agent = GSPO(policy_of(), Given(rows), importance_cap=1.02)
    found = agent.importance(agent.judge(rows))
    log_ratio = policy_of()(rows).log_probs.detach() - rows.log_probs
    expected = (log_ratio.sum(1) / rows.lengths).exp().clamp(max=1.02)
    torch.testing.assert_close(found, expected[:, None].expand_as(found))


def test_minibatches_of_a_sequence_method_are_trajectories():
    agent = GSPO(policy_of(), Given(rows_of()), minibatch_size=5)
    sizes = [len(part) for part in agent.minibatches(agent.judge(rows_of()))]
    assert sizes == [4, 4, 4]
    agent = GSPO(policy_of(), Given(rows_of()), minibatch_size=13)
    with pytest.raises(ValueError, match="minibatch_size=13 is more than the 12 trajectories"):
        agent.iterate()


def test_cispo_bounds_the_weight_and_not_the_gradient():
    rows = rows_of(shift=0.6)
    advantages = standardised_returns(rows)
    ratio = (policy_of()(rows).log_probs.detach() - rows.log_probs).exp()
    assert (ratio[rows.mask] > 1.3).sum() >= 3
    expected = by_hand(lambda log_probs: (ratio.clamp(max=1.3) * advantages * log_probs).sum() / rows.mask.sum())
    agent = CISPO(policy_of(), Given(rows), max_ratio=1.3)
    torch.testing.assert_close(gradient(agent), expected)
    metrics = agent.backward(next(agent.minibatches(agent.judge(rows))))
    assert metrics["clip_fraction"] == pytest.approx(float((ratio[rows.mask] > 1.3).double().mean()))


def test_dapo_clips_higher_and_counts_actions():
    rows = rows_of(shift=0.4)
    advantages, old = standardised_returns(rows), rows.log_probs

    def objective(log_probs):
        ratio = (log_probs - old).exp()
        return torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages).sum() / rows.mask.sum()

    torch.testing.assert_close(gradient(DAPO(policy_of(), Given(rows))), by_hand(objective))


@pytest.mark.parametrize("group_baseline", [False, True])
def test_reinforce_plus_plus_standardises_over_the_batch(group_baseline):
    rows = rows_of()
    rows.rewards = torch.randn(rows.mask.shape, generator=torch.Generator().manual_seed(1)).double() * rows.mask
    agent = ReinforcePlusPlus(policy_of(), Given(rows), group_baseline=group_baseline)
    to_go = rows.rewards.flip(1).cumsum(1).flip(1)
    if group_baseline:
        to_go = to_go - rows.returns.view(3, 4).mean(1).repeat_interleave(4)[:, None]
    chosen = to_go[rows.mask]
    expected = torch.where(rows.mask, (to_go - chosen.mean()) / chosen.std(), 0.0)
    torch.testing.assert_close(agent.judge(rows).advantages, expected)


def test_rejection_sampling_climbs_the_likelihood_of_the_best_of_n():
    """P(y is the best of G) = F(y)^G − F(y−)^G where rewards differ; summed over all groups of three."""
    policy, size = policy_of(), 3
    rewards = torch.tensor([0.5, -1.0, 2.0]).double()
    p = policy.logits.detach()[0].softmax(0)
    total = 0
    for group in itertools.product(range(ACTIONS), repeat=size):
        actions = torch.tensor(group)[:, None]
        rows = Trajectories(torch.zeros_like(actions), actions, actions >= 0, rewards[actions], terminated=actions >= 0)
        rows.truncated, rows.group = ~rows.mask, torch.zeros(size).long()
        agent = RejectionSampling(policy, Given(rows), threshold=-0.5)
        total = total + p[list(group)].prod() * gradient(agent)[0]
    best = torch.stack([p[rewards <= r].sum() ** size - p[rewards < r].sum() ** size for r in rewards])
    best = best * (rewards > -0.5)
    torch.testing.assert_close(total, (best - best.sum() * p) / size)


def test_one_of_equals_is_chosen():
    rows = rows_of()
    rows.rewards = torch.ones_like(rows.rewards) * rows.terminated
    agent = RejectionSampling(policy_of(), Given(rows))
    assert agent.judge(rows).advantages[:, 0].tolist() == [1, 0, 0, 0] * 3
    agent.threshold = 1.0
    assert not agent.judge(rows).advantages.any()


class TestSilentRows:
    def rows(self, silent):
        rows = rows_of()
        for group in silent:
            rows.rewards[rows.group == group] = 0.1 * rows.terminated[rows.group == group].double()
        return rows

    def iterate(self, monkeypatch, agent):
        evaluated = []
        forward = TabularPolicy.forward
        monkeypatch.setattr(TabularPolicy, "forward", lambda *a, **k: evaluated.append(len(a[1])) or forward(*a, **k))
        metrics = agent.iterate()
        monkeypatch.undo()
        return evaluated, metrics

    @pytest.mark.parametrize("name", ["grpo", "dr grpo", "dapo", "cispo", "gspo", "rejection"])
    @pytest.mark.parametrize("silent", [(1,), (0, 2), (0, 1, 2)])
    @pytest.mark.parametrize("micro_batch_size", [None, 3])
    def test_they_are_left_out_of_the_same_step(self, monkeypatch, name, silent, micro_batch_size):
        options = {"threshold": 0.1} if name == "rejection" else {}
        steps = {}
        for markov in (True, False):
            policy = policy_of(markov=markov)
            agent = FAMILY[name](
                policy,
                Given(self.rows(silent)),
                optimizer=torch.optim.SGD(policy.parameters(), lr=1.0),
                learning_rate=1.0,
                max_grad_norm=None,
                micro_batch_size=micro_batch_size,
                **options,
            )
            evaluated, metrics = self.iterate(monkeypatch, agent)
            steps[markov] = policy.logits.detach(), metrics["loss"]
        # A table goes on evaluating all, and is the truth here.
        torch.testing.assert_close(steps[False], steps[True], rtol=1e-6, atol=1e-9)
        heard = int((agent.judge(self.rows(silent)).advantages != 0).any(1).sum())
        assert sum(evaluated) == max(1, heard)
        if name != "rejection":
            assert heard == 12 - 4 * len(silent)
            assert metrics["silent_groups"] == pytest.approx(len(silent) / 3)

    @pytest.mark.parametrize("options", [{"entropy_coefficient": 0.1}, {"beta": 0.1, "kl": "k3"}])
    def test_they_stay_where_the_loss_has_other_terms(self, monkeypatch, options):
        agent = GRPO(policy_of(markov=False), Given(self.rows((0, 2))), **options)
        evaluated, _ = self.iterate(monkeypatch, agent)
        assert evaluated == [12]

    def test_a_penalty_in_the_reward_makes_them_heard(self, monkeypatch):
        agent = GRPO(policy_of(markov=False), Given(self.rows((0, 2))), beta=0.1)
        evaluated, metrics = self.iterate(monkeypatch, agent)
        assert evaluated == [12]
        assert metrics["silent_groups"] == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equal_returns_have_advantages_of_exactly_zero(self, dtype):
        for size in range(2, 20):
            returns = torch.tensor([0.1, 0.7, 1 / 3, -5.3]).to(dtype).repeat_interleave(size)
            assert not group_normalised(returns, torch.arange(4).repeat_interleave(size)).any()


@pytest.mark.parametrize("name", ["grpo", "dapo", "cispo", "gspo", "reinforce++ baseline", "rejection"])
def test_a_group_of_one_is_refused(name):
    rows = rows_of()[:5]
    with pytest.raises(ValueError, match=r"group 1 is a single episode.*at least two members.*group_size of 2"):
        FAMILY[name](policy_of(), Given(rows)).iterate()


def test_rows_of_a_minibatch_keep_their_group_and_order_where_trajectories_stay_whole():
    agent = RLOO(policy_of(markov=False), Given(rows_of()), minibatch_size=6, learning_rate=1.0)
    for part in agent.minibatches(agent.judge(rows_of())):
        assert part.group.tolist() == sorted(part.group.tolist())
        assert len(part) == 6


def test_values_are_carried_over_what_the_environment_says():
    """Two turns of a conversation, worked out by hand: γ and λ count the policy's own actions."""
    mask = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 1, 1]]).bool()
    values = torch.tensor([[1.0, 2.0, 0.0, 0.0, 4.0, 0.0], [0.0, 3.0, 0.0, 5.0, 6.0, 7.0]])
    rows = Trajectories(torch.zeros(2, 3).long(), torch.zeros(2, 6).long(), mask)
    following = Policy.next_values(policy_of(), rows, values)
    assert following[mask].tolist() == [2.0, 4.0, 0.0, 5.0, 6.0, 7.0, 0.0]
    rewards = torch.tensor([[0.0, 0.5, 0.0, 0.0, 1.0, 0.0]])
    terminated = torch.tensor([[0, 0, 0, 0, 1, 0]]).bool()
    found = gae(rewards, values[:1], following[:1], terminated, ~mask[:1] & False, 0.9, 0.8, mask[:1])
    last = 1.0 - 4.0
    middle = 0.5 + 0.9 * 4.0 - 2.0 + 0.72 * last
    first = 0.9 * 2.0 - 1.0 + 0.72 * middle
    torch.testing.assert_close(found, torch.tensor([[first, middle, 0.0, 0.0, last, 0.0]]))


def test_rewards_are_whitened_around_their_mean():
    rows = rows_of()
    rows.rewards = torch.randn(rows.mask.shape, generator=torch.Generator().manual_seed(1)).double() * rows.mask
    given = rows.rewards[rows.mask]
    white = dataclasses.replace(rows)
    white.rewards = torch.where(rows.mask, (rows.rewards - given.mean()) / given.std() + given.mean(), 0.0)
    found, expected = (
        PPO(policy_of(critic=True), Given(batch), minibatch_size=None, whiten_rewards=option).judge(batch)
        for batch, option in ((rows, True), (white, False))
    )
    torch.testing.assert_close(found.advantages, expected.advantages)
    torch.testing.assert_close(found.targets, expected.targets)
    torch.testing.assert_close(found.returns, rows.returns)


class WithDropout(Policy):
    """Logits of the next action from a network that forgets half of what it knows."""

    def __init__(self):
        super().__init__()
        with seeded(7):
            self.layers = nn.Sequential(nn.Embedding(STATES, 8), nn.Dropout(0.5), nn.Linear(8, ACTIONS))
        self.drawn = []

    def forward(self, trajectories, *, entropy=False):
        table = self.layers(trajectories.observations.clamp(min=0)).log_softmax(-1)
        log_probs = table.gather(-1, trajectories.actions.clamp(min=0)[..., None])[..., 0] * trajectories.mask
        if self.training:
            self.drawn.append(float(log_probs.detach().sum()))
        return Evaluation(log_probs)

    def reference_log_probs(self, trajectories):
        raise NotImplementedError

    def act(self, observations, *, greedy=False, generator=None):
        raise NotImplementedError

    def save(self, path):
        raise NotImplementedError


def with_dropout(learning_rate=0.05):
    rows = rows_of()
    rows.log_probs = rows.log_probs.float()
    rows.rewards = rows.rewards.float()
    return GRPO(WithDropout(), Given(rows), epochs=4, learning_rate=learning_rate, seed=2)


def test_every_gradient_step_of_an_iteration_has_a_dropout_of_its_own():
    agent = with_dropout(learning_rate=0.0)
    agent.learn(2, progress=False)
    assert len(set(agent.policy.drawn)) == 8


def test_dropout_resumes_to_the_same_bits(tmp_path):
    whole = with_dropout().learn(4, progress=False)
    with_dropout().learn(2, progress=False).save(tmp_path / "agent")
    # Whoever loads has been in the middle of an iteration of the same number.
    resumed = with_dropout().learn(2, progress=False)
    resumed.step(next(resumed.minibatches(resumed.next_batch())))
    resumed.load(tmp_path / "agent").learn(2, progress=False)
    for one, other in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", FAMILY)
def test_a_resumed_run_comes_to_the_same_bits(name, tmp_path):
    env = gymnasium.wrappers.TimeLimit(GridWorld("S..\n.#.\n..G", slip=0.2, step_reward=-0.05), 20)

    def agent():
        sampler = EpisodeSampler(env, episodes=8, group_size=4)
        return FAMILY[name](TabularPolicy.for_env(env), sampler, epochs=2, minibatch_size=8, beta=0.01)

    whole = agent().learn(3, progress=False)
    agent().learn(2, progress=False).save(tmp_path / "agent")
    resumed = agent().load(tmp_path / "agent").learn(1, progress=False)
    for one, other in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_impossible_numbers_are_refused():
    for kind, options, message in (
        (CISPO, {"max_ratio": 0.9}, "max_ratio is the largest weight of an action, at least 1, not 0.9"),
        (GSPO, {"clip": 0.0}, "clip is ε in"),
        (DAPO, {"clip_high": -1.0}, "clip_high is positive"),
        (RejectionSampling, {"threshold": math.nan}, "threshold is a return"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(policy_of(), Given(rows_of()), **options)
