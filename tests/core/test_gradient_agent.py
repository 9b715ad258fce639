import json
import math
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from aligngym.core import Constant, Decay, EpochOrder, Evaluation, GradientAgent, Policy, TabularPolicy, Trajectories
from aligngym.core.randomness import derived_seed, seeded

STATES, ACTIONS, ROWS, STEPS = 6, 4, 11, 3


def data(seed=0):
    """Rows of unequal lengths, whose first reward is the row's weight."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(STEPS) < torch.randint(1, STEPS + 1, (ROWS, 1), generator=generator)
    observations = torch.randint(0, STATES, (ROWS, STEPS), generator=generator)
    actions = torch.randint(0, ACTIONS, (ROWS, STEPS), generator=generator)
    return Trajectories(observations, actions, mask, rewards=torch.rand(ROWS, STEPS, generator=generator) + 0.1)


class NetworkWithDropout(Policy):
    def __init__(self):
        super().__init__()
        with seeded(7):
            self.layers = nn.Sequential(
                nn.Embedding(STATES, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, ACTIONS)
            )

    def forward(self, trajectories, *, entropy=False):
        log_table = self.layers(trajectories.observations).log_softmax(-1)
        return Evaluation(log_table.gather(-1, trajectories.actions[..., None])[..., 0] * trajectories.mask)

    def reference_log_probs(self, trajectories):
        raise NotImplementedError

    def act(self, observations, *, greedy=False, generator=None):
        raise NotImplementedError

    def save(self, path):
        raise NotImplementedError


class Imitation(GradientAgent[Trajectories]):
    """Weighted maximum likelihood of the actions in the data."""

    def __init__(self, policy, *, batch_size=4, learning_rate=0.1, **options):
        super().__init__(policy, learning_rate=learning_rate, **options)
        self.data = data()
        self.order = EpochOrder(ROWS, batch_size, self.seed)

    def next_batch(self):
        return self.data[self.order(self.iteration)]

    def losses(self, batch):
        weights = batch.rewards[:, 0].to(torch.float64)
        losses = -self.model(batch).log_probs.sum(1) * weights
        return losses, {"length": batch.lengths * weights}

    def weight(self, batch):
        return float(batch.rewards[:, 0].sum())

    def act(self, observations, *, greedy=True):
        raise NotImplementedError

    def evaluate(self):
        raise NotImplementedError


def learn(agent, iterations):
    return agent.learn(iterations, progress=False)


def table():
    return TabularPolicy(STATES, ACTIONS).double()


class TestStep:
    batch = data()

    def exact(self):
        """The weighted mean loss of the batch and its gradient, without the agent."""
        policy = table()
        weights = self.batch.rewards[:, 0].double()
        loss = -(weights * policy(self.batch).log_probs.sum(1)).sum() / weights.sum()
        return float(loss.detach()), torch.autograd.grad(loss, policy.logits)[0]

    @pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 3, 7, 10, 11, 100])
    def test_the_gradient_is_that_of_the_whole_batch_in_any_pieces(self, micro_batch_size):
        agent = Imitation(table(), micro_batch_size=micro_batch_size)
        metrics = agent.backward(self.batch)
        loss, gradient = self.exact()
        torch.testing.assert_close(agent.policy.logits.grad, gradient, rtol=1e-6, atol=1e-9)
        weights = self.batch.rewards[:, 0]
        length = float((self.batch.lengths * weights).sum() / weights.sum())
        assert metrics == pytest.approx({"loss": loss, "length": length}, rel=1e-6)

    @pytest.mark.parametrize(("steps_at_once", "pieces"), [(None, 1), (1000, 1), (30, None), (12, None), (1, ROWS)])
    def test_nor_do_pieces_of_equal_numbers_of_steps_change_it(self, steps_at_once, pieces, monkeypatch):
        policy = table()
        monkeypatch.setattr(type(policy), "steps_at_once", steps_at_once)
        agent = Imitation(policy)
        found = agent.pieces(self.batch)
        assert 1 < len(found) < ROWS if pieces is None else len(found) == pieces
        metrics = agent.backward(self.batch)
        loss, gradient = self.exact()
        torch.testing.assert_close(policy.logits.grad, gradient, rtol=1e-6, atol=1e-9)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-6)

    def test_a_number_of_rows_comes_before_one_of_steps(self, monkeypatch):
        agent = Imitation(table(), micro_batch_size=5)
        monkeypatch.setattr(type(agent.policy), "steps_at_once", 1)
        assert [len(piece) for piece in agent.pieces(self.batch)] == [5, 5, 1]

    @pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
    def test_processes_that_share_parameters_have_as_many_pieces(self, kind, monkeypatch):
        agent = Imitation(table())
        monkeypatch.setattr(type(agent.policy), "steps_at_once", 1)
        agent.accelerator = SimpleNamespace(distributed_type=kind)
        assert agent.pieces(self.batch) == [self.batch]

    @pytest.mark.parametrize("micro_batch_size", [None, 1, 4])
    def test_a_step_shortens_the_gradient_of_the_whole_batch(self, micro_batch_size):
        policy = table()
        optimizer = torch.optim.SGD(policy.parameters(), lr=123.0)
        agent = Imitation(
            policy, optimizer=optimizer, learning_rate=0.5, max_grad_norm=0.01, micro_batch_size=micro_batch_size
        )
        metrics = agent.step(self.batch)
        _, gradient = self.exact()
        moved = policy.logits.detach() - table().logits.detach()
        torch.testing.assert_close(moved, -0.5 * 0.01 * gradient / gradient.norm(), rtol=1e-4, atol=1e-9)
        assert metrics["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-6)
        assert metrics["learning_rate"] == 0.5

    def test_without_a_limit_the_gradient_keeps_its_length(self):
        policy = table()
        agent = Imitation(
            policy, optimizer=torch.optim.SGD(policy.parameters()), learning_rate=30.0, max_grad_norm=None
        )
        agent.step(self.batch)
        torch.testing.assert_close(policy.logits.detach() - table().logits.detach(), -30.0 * self.exact()[1])

    @pytest.mark.parametrize("micro_batch_size", [None, 3])
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite_changes_nothing(self, bad, micro_batch_size):
        agent = learn(Imitation(table(), micro_batch_size=micro_batch_size), 2)
        before = agent.policy.logits.detach().clone()
        poisoned = data()
        poisoned.rewards[1, 0] = bad
        with pytest.raises(FloatingPointError, match=r"iteration 2: the (loss|gradient_norm) is nan; nothing changed"):
            agent.step(poisoned)
        assert torch.equal(agent.policy.logits, before)
        # Whoever catches the error goes on as if the batch had not been there.
        twin = learn(Imitation(table(), micro_batch_size=micro_batch_size), 3)
        assert torch.equal(learn(agent, 1).policy.logits, twin.policy.logits)

    def test_an_error_in_the_middle_of_a_batch_leaves_no_gradient_behind(self):
        class Failing(Imitation):
            failed = False

            def losses(self, batch):
                if self.iteration == 2 and len(batch) == 1 and not self.failed:
                    self.failed = True
                    raise KeyboardInterrupt
                return super().losses(batch)

        agent = Failing(table(), micro_batch_size=2)
        with pytest.raises(KeyboardInterrupt):
            learn(agent, 5)
        assert agent.iteration == 2
        twin = learn(Imitation(table(), micro_batch_size=2), 3)
        assert torch.equal(learn(agent, 1).policy.logits, twin.policy.logits)


def same_state(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left["policy"].keys() == right["policy"].keys()
    assert all(torch.equal(left["policy"][name], right["policy"][name]) for name in left["policy"])
    torch.testing.assert_close(left["optimizer"], right["optimizer"], rtol=0, atol=0)


@pytest.mark.parametrize("policy", [table, NetworkWithDropout])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_training_resumes_exactly_after_any_step(tmp_path, policy, micro_batch_size):
    def agent():
        return Imitation(policy(), learning_rate=Decay(0.1, 7, warmup=2), micro_batch_size=micro_batch_size, seed=3)

    whole = learn(agent(), 7)
    for interruption in range(8):
        learn(agent(), interruption).save(tmp_path / "agent")
        torch.manual_seed(interruption)
        resumed = agent().load(tmp_path / "agent")
        assert resumed.iteration == interruption
        same_state(learn(resumed, 7 - interruption), whole)


def test_dropout_follows_from_seed_and_iteration():
    """Global generators neither change a step nor are changed by it; seed, iteration and piece all do."""

    def losses(seed, pieces=None):
        torch.manual_seed(int(torch.randint(10**6, ())))
        agent = Imitation(NetworkWithDropout(), batch_size=ROWS, learning_rate=0.0, seed=seed, micro_batch_size=pieces)
        found = []
        for _ in range(2):
            before = torch.get_rng_state()
            found.append(agent.step(data())["loss"])
            assert torch.equal(torch.get_rng_state(), before)
            agent.iteration += 1
        return found

    assert losses(0) == losses(0)
    assert len({*losses(0), *losses(1)}) == 4
    same_rows = data()[torch.zeros(4, dtype=torch.long)]
    drawn = []

    class Recording(Imitation):
        def losses(self, batch):
            result = super().losses(batch)
            drawn.append(float(result[0].detach().sum()))
            return result

    Recording(NetworkWithDropout(), micro_batch_size=1).step(same_rows)
    assert len(set(drawn)) > 1


def test_the_learning_rate_is_the_schedules():
    policy = TabularPolicy(STATES, ACTIONS)
    agent = Imitation(policy, learning_rate=Decay(0.4, 4))
    seen = []
    for _ in range(4):
        seen.append(agent.iterate()["learning_rate"])
        assert agent.optimizer.param_groups[0]["lr"] == seen[-1]
        agent.iteration += 1
    assert seen == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_what_cannot_be_trained_is_refused():
    frozen = table()
    frozen.logits.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        Imitation(frozen)
    with pytest.raises(ValueError, match="not 0"):
        Imitation(table(), micro_batch_size=0)
    with pytest.raises(ValueError, match="accumulation steps at 1"):
        Imitation(table(), accelerator=Accelerator(gradient_accumulation_steps=2))


def test_a_checkpoint_of_another_policy_is_refused(tmp_path):
    learn(Imitation(table()), 1).save(tmp_path / "agent")
    other = Imitation(TabularPolicy(STATES, ACTIONS + 1))
    with pytest.raises(ValueError, match="not those of this policy"):
        other.load(tmp_path / "agent")
    assert other.iteration == 0


class TestEpochOrder:
    @pytest.mark.parametrize(("size", "batch_size"), [(10, 3), (10, 5), (3, 8), (1, 1)])
    def test_an_epoch_has_every_row_once(self, size, batch_size):
        order = EpochOrder(size, batch_size, seed=0)
        steps = order.steps_per_epoch
        assert steps == math.ceil(size / batch_size)
        for epoch in range(3):
            batches = [order(epoch * steps + batch).tolist() for batch in range(steps)]
            assert sorted(row for batch in batches for row in batch) == list(range(size))
            assert all(len(batch) == batch_size for batch in batches[:-1])

    def test_it_is_a_function_of_the_step(self):
        steps = [5, 0, 17, 5, 3]
        order = EpochOrder(20, 4, seed=9)
        assert [order(s).tolist() for s in steps] == [EpochOrder(20, 4, seed=9)(s).tolist() for s in steps]

    def test_epochs_and_seeds_have_orders_of_their_own(self):
        """Among them the next seed: runs that are averaged over seeds must not see each other's orders."""
        orders = {tuple(EpochOrder(20, 20, seed)(epoch).tolist()) for seed in range(5) for epoch in range(5)}
        assert len(orders) == 25

    def test_orders_are_uniform(self):
        """Each row is in the first batch of a quarter of the epochs, within 4 standard errors."""
        epochs = 2000
        order = EpochOrder(8, 2, seed=0)
        first = torch.stack([torch.bincount(order(4 * epoch), minlength=8) for epoch in range(epochs)]).sum(0)
        assert ((first / epochs - 0.25).abs() < 4 * math.sqrt(0.25 * 0.75 / epochs)).all()

    def test_processes_share_a_batch(self):
        order = EpochOrder(11, 8, seed=1)
        rows = order(0).tolist()
        shares = [order.share(0, process, 3).tolist() for process in range(3)]
        assert sorted(row for share in shares for row in share) == sorted(rows[:6])
        # The last batch has three rows; every one of four processes takes part in it.
        shares = [order.share(1, process, 4).tolist() for process in range(4)]
        assert [len(share) for share in shares] == [1] * 4
        assert {row for share in shares for row in share} == {*order(1).tolist()}

    def test_epochs_in_steps(self):
        order = EpochOrder(10, 3, seed=0)
        assert [order.steps(epochs) for epochs in (0, 0.5, 1, 2.25)] == [0, 2, 4, 9]

    def test_bad_sizes_are_refused(self):
        for size, batch_size in [(0, 1), (1, 0)]:
            with pytest.raises(ValueError, match="at least one"):
                EpochOrder(size, batch_size, seed=0)


def test_seeds_are_derived_and_generators_restored():
    seeds = {derived_seed(*numbers) for numbers in [(0,), (0, 1), (1, 0), (0, 0, 1), (1,)]}
    assert len(seeds) == 5
    before = torch.get_rng_state()
    draws = []
    for numbers in [(1, 2), (1, 2), (2, 1)]:
        with seeded(*numbers):
            draws.append(torch.rand(2).tolist())
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_are_learning_rates():
    assert Imitation(table(), learning_rate=0.25).schedule == Constant(0.25)


#: One of two processes with rows of their own, and so with pieces of their own: the first has many, the other one.
PROCESS = """
import sys, torch
from datetime import timedelta
from accelerate import Accelerator, InitProcessGroupKwargs
from aligngym.core import GradientAgent, TabularPolicy, Trajectories

class Imitation(GradientAgent):
    def next_batch(self):
        return rows[:7] if self.accelerator.is_main_process else rows[7:]
    def losses(self, batch):
        return -self.model(batch).log_probs.sum(1), {}
    act = evaluate = None

Imitation.__abstractmethods__ = frozenset()
limit = InitProcessGroupKwargs(timeout=timedelta(seconds=30))
numbers = torch.arange(24).view(8, 3)
rows = Trajectories(numbers % 5, numbers % 3, numbers >= 0)
policy = TabularPolicy(5, 3)
TabularPolicy.steps_at_once = 6
agent = Imitation(policy, learning_rate=0.1, accelerator=Accelerator(cpu=True, kwargs_handlers=[limit]))
assert agent.accelerator.num_processes == 2
print(len(agent.pieces(agent.next_batch())))
agent.learn(5, progress=False)
print(policy.logits.tolist())
"""


def test_processes_may_have_different_numbers_of_pieces():
    """They wait for one another in the last piece alone, and take the step of all rows together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **environment, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", PROCESS]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=90)[0].splitlines() for process in processes]
    assert [lines[0] for lines in outputs] == ["7", "1"]
    assert outputs[0][1] == outputs[1][1]

    class Alone(Imitation):
        def next_batch(self):
            return Trajectories(numbers % 5, numbers % 3, numbers >= 0)

        def losses(self, batch):
            return -self.model(batch).log_probs.sum(1), {}

        def weight(self, batch):
            return float(len(batch))

    numbers = torch.arange(24).view(8, 3)
    alone = learn(Alone(TabularPolicy(5, 3)), 5)
    torch.testing.assert_close(torch.tensor(json.loads(outputs[0][1])), alone.policy.logits.detach())
