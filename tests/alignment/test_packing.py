"""The layout of packed rows, filled up or not, and the attention that takes all sequences at once."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from aligngym.alignment import captured_passes, packing
from aligngym.alignment.captured_passes import ROOM, CapturedPasses, Shape, blank, fill
from aligngym.alignment.log_probs import hidden_states, packed_log_probs, predicting_states
from aligngym.alignment.packing import Packing
from aligngym.core.trajectories import Trajectories

#: Prompt and completions of each group.
BATCHES = {
    "pairs": [(5, [1, 9]), (20, [40, 2]), (2, [7, 7])],
    "one large group": [(12, [20, 1, 33, 1, 8, 50, 2, 5])],
    "one-token completions": [(3, [1, 1, 1]), (7, [1])],
    "alone": [(4, [12]), (50, [1]), (11, [30])],
}


def make(groups, seed=0, beginning=0):
    generator = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(1, 200, (length,), generator=generator)

    same = tokens(beginning)
    sizes = [(beginning + prompt, size, number) for number, (prompt, lengths) in enumerate(groups) for size in lengths]
    prompts = [torch.cat([same, tokens(prompt)]) for prompt, _ in groups]
    observations = torch.full((len(sizes), max(prompt for prompt, *_ in sizes)), -1)
    actions = torch.full((len(sizes), max(size for _, size, _ in sizes)), -1)
    for row, (prompt, size, number) in enumerate(sizes):
        observations[row, -prompt:] = prompts[number]
        actions[row, :size] = tokens(size)
    return Trajectories(observations, actions, actions >= 0, group=torch.tensor([number for *_, number in sizes]))


class Unread(torch.autograd.Function):
    """What is past the last sequence is not read, and has whatever was there as its gradient."""

    @staticmethod
    def forward(ctx, x, end):
        ctx.end = end
        return torch.cat([x[:end], torch.full_like(x[end:], torch.nan)])

    @staticmethod
    def backward(ctx, gradient):
        return torch.cat([gradient[: ctx.end], torch.full_like(gradient[ctx.end :], torch.nan)]), None


def plain_varlen(query, key, value, query_starts, key_starts, longest, scaling=None):
    """The kernel for sequences of several lengths, one sequence after the other; it takes what the kernel takes."""
    assert query_starts[-1] == len(query), "every query is in a sequence, or its output is whatever was there"
    key, value = (Unread.apply(x, int(key_starts[-1])) for x in (key, value))
    outputs = []
    for number in range(len(query_starts) - 1):
        q, k, v = (
            x[starts[number] : starts[number + 1]].transpose(0, 1)
            for x, starts in ((query, query_starts), (key, key_starts), (value, key_starts))
        )
        own, seen = q.shape[1], k.shape[1]
        assert own <= seen <= longest
        if own:
            mask = torch.ones(own, seen, dtype=torch.bool).tril(seen - own)
            output = F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=True)
            outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(packing, "has_varlen", lambda query: True)
    monkeypatch.setattr(packing, "varlen_attention", plain_varlen)


def evaluated(policy, compute):
    """Return what ``compute`` does, and the gradients of a weighted sum of it."""
    policy.zero_grad()
    found = compute()
    (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
    gradients = [p.grad.flatten().clone() for p in policy.parameters() if p.grad is not None]
    return found.detach(), torch.cat(gradients)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("beginning", [0, 6])
def test_all_sequences_at_once_are_those_one_by_one(tiny_policy, batch, beginning, request):
    policy, rows = tiny_policy(), make(BATCHES[batch], beginning=beginning)
    one_by_one = evaluated(policy, lambda: packed_log_probs(policy.causal_model, rows))
    request.getfixturevalue("at_once")
    at_once = evaluated(policy, lambda: packed_log_probs(policy.causal_model, rows))
    for a, b in zip(at_once, one_by_one, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("before", BATCHES)
def test_a_filled_up_row_gives_the_same_states_and_gradients(tiny_policy, batch, before, at_once):
    """Whatever another batch has left in it."""
    policy = tiny_policy()
    own, others = (Packing.of(make(BATCHES[name], seed, 3)) for seed, name in enumerate((batch, before)))
    shape = Shape(*(max(sizes) for sizes in zip(Shape.of(own), Shape.of(others), strict=True)))
    place = blank(shape, own)
    fill(place, others)
    fill(place, own)

    def states(row):
        everything = hidden_states(policy.causal_model, row.input_ids, row.position_ids, row)
        return everything[own.predictors]

    for a, b in zip(evaluated(policy, lambda: states(place)), evaluated(policy, lambda: states(own)), strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_shapes_are_few_and_hardly_larger_than_what_they_hold():
    shapes = set()
    for length in range(2000, 8000, 7):
        row = Packing.of(make([(length // 3, [length // 3, length - 2 * (length // 3)])]))
        shape = Shape.of(row)
        shapes.add(shape)
        assert row.input_ids.shape[1] < shape.tokens <= row.input_ids.shape[1] * 17 / 16 + 1
        assert shape.keys >= row.keys.shape[0] + shape.tokens - row.input_ids.shape[1]
        assert shape.longest >= row.longest
        assert shape.sequences >= len(row.query_starts)
    assert len(shapes) < 40


class TestCapturing:
    """When a pass is captured, with stand-ins for the graphs."""

    @pytest.fixture
    def passes(self, tiny_policy, monkeypatch):
        made = []

        class Pass:
            def __init__(self, model, row, shape, parameters, pool):
                made.append((shape, bool(parameters)))
                self.parameters, self.pool = parameters, pool

            def forward(self, row):
                return torch.full((len(row.predictors), 32), 1.0)

            def backward(self, row, gradient):
                return [torch.zeros_like(parameter) for parameter in self.parameters]

        monkeypatch.setattr(captured_passes, "_Pass", Pass)
        monkeypatch.setattr(captured_passes, "runs_varlen", lambda device, dtype: True)
        monkeypatch.setattr(torch.cuda, "MemPool", lambda: SimpleNamespace(id=len(made)))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
        policy = tiny_policy()
        passes = CapturedPasses(policy.causal_model)
        passes.policy, passes.made = policy, made
        return passes

    def test_the_second_time_that_a_shape_comes_up(self, passes):
        first, same, larger = (Packing.of(make(BATCHES["pairs"][:n], seed)) for n, seed in ((2, 0), (2, 1), (3, 2)))
        larger = Packing.of(make([(90, [60, 60])]))
        passes(first)
        passes(larger)
        assert not passes.made
        passes(same)
        # One that is longer takes the memory.
        (longer, _), (shape, with_gradient) = passes.made
        assert with_gradient
        assert shape == Shape.of(first)
        assert shape.tokens <= longer.tokens <= ROOM * shape.tokens
        passes(same)
        assert len(passes.made) == 2

    def test_longer_rows_than_there_is_room_for_begin_anew(self, passes):
        short, medium, long = (Packing.of(make([(90, [length, length])])) for length in (200, 130, 400))
        for row in (short, short, medium, medium):
            passes(row).sum().backward()
        assert len(passes.made) == 3
        assert passes.made[0][0].tokens > Shape.of(short).tokens
        for row in (long, long, short):
            passes(row).sum().backward()
        assert [shape for shape, _ in passes.made[4:]] == [Shape.of(long), Shape.of(short)]
        assert passes.made[3][0].tokens >= Shape.of(long).tokens

    def test_where_memory_does_not_suffice_nothing_is_captured(self, passes, monkeypatch):
        def fails(*arguments):
            raise torch.OutOfMemoryError

        monkeypatch.setattr(captured_passes, "_Pass", fails)
        row = Packing.of(make(BATCHES["pairs"]))
        passes(row)
        with pytest.warns(UserWarning, match="cannot be captured"):
            states = passes(row)
        torch.testing.assert_close(states, predicting_states(passes.model, row))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for length in (3, 3, 300, 300):
                passes(Packing.of(make([(5, [length])])))

    def test_passes_without_gradients_and_those_of_the_reference_are_others(self, passes):
        row = Packing.of(make(BATCHES["pairs"]))
        for _ in range(3):
            passes(row).sum().backward()
            with torch.no_grad():
                passes(row)
                with passes.policy.using_adapter(None):
                    passes(row)
        assert [gradient for _, gradient in passes.made[::2]] == [True, False, False]

    def test_not_while_somebody_may_want_the_gradients_of_another(self, passes):
        row = Packing.of(make(BATCHES["pairs"]))
        passes(row)
        captured = passes(row)
        assert type(captured.grad_fn).__name__ == "_ReplayedBackward"
        assert type(passes(row).grad_fn).__name__ != "_ReplayedBackward"
        captured.sum().backward()
        again = passes(row)
        assert type(again.grad_fn).__name__ == "_ReplayedBackward"
        del again
        assert type(passes(row).grad_fn).__name__ == "_ReplayedBackward"
        with pytest.raises(RuntimeError, match="once only"):
            captured.sum().backward()

    def test_weights_that_have_moved_leave_their_graphs_behind(self, passes):
        row = Packing.of(make(BATCHES["pairs"]))
        for _ in range(3):
            passes(row)
        for parameter in passes.policy.parameters():
            parameter.data = parameter.data.clone()
        passes(row)
        assert len(passes.made) == 2
        passes(row)
        assert len(passes.made) == 4


def test_parameters_are_replaced_while_a_pass_is_captured(tiny_policy):
    """By others with the same storage, or by copies in the dtype that a LoRA layer would cast them to."""
    policy = tiny_policy(dtype="bfloat16")
    model = policy.causal_model
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made = object.__new__(captured_passes._Pass)
    made._model, made._copies = model, []
    with made._aliases(parameters) as aliases:
        assert {id(parameter) for parameter in model.parameters()} >= {id(alias) for alias in aliases}
        assert all(alias.dtype == torch.bfloat16 and alias.requires_grad for alias in aliases)
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in parameters]
    with torch.no_grad():
        parameters[0].fill_(3)
    copies, originals = zip(*made._copies, strict=True)
    torch._foreach_copy_(copies, originals)
    assert (aliases[0] == 3).all()
    with made._aliases([model.get_input_embeddings().weight]) as (alias,):
        assert alias.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_rows_are_laid_out_again_if_they_have_changed(tiny_policy, change):
    policy, rows = tiny_policy(), make(BATCHES["pairs"])
    before = policy(rows).log_probs
    assert policy._evaluator.layout(rows) is policy._evaluator.layout(rows)
    if change == "in place":
        rows.actions[0, 0] = 250
    else:
        rows.actions = rows.actions.where(rows.actions != rows.actions[0, 0], 250)
    fresh = make(BATCHES["pairs"])
    fresh.actions = rows.actions.clone()
    after = policy(rows).log_probs
    assert (after - before).abs().max() > 0.01
    assert torch.equal(after, policy(fresh).log_probs)
