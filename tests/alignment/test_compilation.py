"""Which runs earn back the compilation of their model, on a clock that the test moves."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from aligngym.alignment import compilation
from aligngym.alignment.compilation import COST, SAVED, TIMED, Compilation, constant_numbers


class Policy:
    def __init__(self, device="cuda"):
        self.device, self.compiled, self.times = torch.device(device), False, 0

    def compile_layers(self):
        self.compiled, self.times = True, self.times + 1


def run(monkeypatch, policy, iterations, seconds, done=None):
    """Let iterations of so many seconds pass; return after which one the policy was compiled."""
    clock = [0.0]
    monkeypatch.setattr(compilation, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    callback, when = Compilation(policy), None
    callback.on_start(None, iterations)
    for number in range(done or iterations):
        clock[0] += seconds
        callback.on_iteration(None, {})
        when = number + 1 if policy.compiled and when is None else when
    assert policy.times <= 1
    return when


@pytest.mark.parametrize("seconds", [0.1, 2.0])
def test_what_is_left_of_a_run_must_save_more_than_compiling_costs(monkeypatch, seconds):
    enough = round(COST / SAVED / seconds)
    assert run(monkeypatch, Policy(), enough + TIMED - 1, seconds) is None
    assert run(monkeypatch, Policy(), enough + TIMED + 2, seconds) == TIMED


def test_a_run_without_an_end_is_long(monkeypatch):
    assert run(monkeypatch, Policy(), None, 1e-3, done=20) == TIMED


def test_a_slow_first_iteration_does_not_count(monkeypatch):
    policy, clock = Policy(), iter([0.0, 500.0, *(500.0 + 0.01 * n for n in range(1, 100))])
    monkeypatch.setattr(compilation, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    callback = Compilation(policy)
    callback.on_start(None, 50)
    for _ in range(50):
        callback.on_iteration(None, {})
    assert not policy.compiled


def test_nothing_is_compiled_for_a_processor(monkeypatch):
    assert run(monkeypatch, Policy("cpu"), 10_000, 10.0) is None


def test_agents_ask_their_policy_for_its_callbacks(tiny_policy):
    policy = tiny_policy()
    (callback,) = policy.callbacks
    assert isinstance(callback, Compilation)
    assert not policy.compiled


def test_with_constant_numbers_the_compiler_goes_through_a_layer_once():
    class Layer(nn.Module):
        scaling = 0.3

        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x, scale=self.scaling).sin()

    def calls(active):
        torch._dynamo.reset()
        counters.clear()
        layer = Layer()
        layer.compile(backend="aot_eager", dynamic=True)
        with constant_numbers(active):
            layer(torch.randn(1, 2, 3, 8))
        return counters["stats"]["calls_captured"]

    assert calls(True) == 2
    assert calls(False) > 2
