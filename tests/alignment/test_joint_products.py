"""Joint products against the layers' own ones."""

import copy

import pytest
import torch
from torch import nn

from aligngym.alignment.joint_products import computing_jointly, joint_products, lay_together, siblings

PROMPTS = [torch.tensor(tokens) for tokens in ([5, 6, 7, 8, 9, 10], [20], [30, 31, 32])]


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(6, 4, bias=False), nn.Linear(6, 5)

    def forward(self, x):
        return self.gate_proj(x), self.up_proj(x)


def test_every_layer_gets_its_own_part_of_one_product(monkeypatch):
    model, x = Gated(), torch.randn(2, 3, 6)
    lay_together(model)
    with torch.no_grad():
        expected = model(x)
        calls = []
        linear = nn.functional.linear
        monkeypatch.setattr(nn.functional, "linear", lambda *given: calls.append(given) or linear(*given))
        (product,) = joint_products(model)
        for y in (x, x + 1, x):
            with computing_jointly([product]):
                found = model(y)
            assert (y is x) == all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
        assert len(calls) == 3
        # Inputs that differ are not taken for the same.
        with computing_jointly([product]):
            up = model.up_proj(x + 1)
            gate = model.gate_proj(x)
            torch.testing.assert_close(model.up_proj(x + 1), up)
        torch.testing.assert_close(gate, expected[0])
        torch.testing.assert_close(up, model.up_proj(x + 1))
    assert type(model.gate_proj) is nn.Linear
    assert set(vars(model.gate_proj)) == set(vars(nn.Linear(6, 4)))


def test_weights_stay_the_same_and_are_moved_once():
    model = Gated()
    before = [parameter.clone() for parameter in model.parameters()]
    parameters = list(model.parameters())
    lay_together(model)
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(model.parameters(), parameters, before, strict=True))
    assert model.gate_proj.weight.data_ptr() + model.gate_proj.weight.nbytes == model.up_proj.weight.data_ptr()
    places = [parameter.data_ptr() for parameter in model.parameters()]
    lay_together(model)
    assert places == [parameter.data_ptr() for parameter in model.parameters()]
    # A change of one is seen by the product.
    with torch.no_grad(), computing_jointly(joint_products(model)):
        model.up_proj.weight.fill_(1.0)
        _, up = model(torch.ones(1, 6))
    torch.testing.assert_close(up, 6 + model.up_proj.bias[None])


def test_layers_that_cannot_be_joined_are_left_alone():
    model = Gated()
    assert joint_products(model) == []
    model.up_proj = nn.Linear(7, 5)
    lay_together(model)
    assert not list(siblings(model))
    model.up_proj = nn.Identity()
    assert not list(siblings(model))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gpt2"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_a_model_writes_the_same(tiny_policy, architecture, targets):
    if architecture == "gpt2" and targets != "all-linear":
        pytest.skip("GPT-2 has other names")
    policy = tiny_policy(architecture, lora={"target_modules": targets})
    rows = policy.generate(PROMPTS, completions=4, max_new_tokens=12, seed=1)
    if policy.packed:
        assert bool(policy._writer._joint) == (architecture != "gpt2")
        policy._writer._joint = []
    separate = policy.generate(PROMPTS, completions=4, max_new_tokens=12, seed=1)
    assert torch.equal(rows.actions, separate.actions)
    torch.testing.assert_close(rows.log_probs, separate.log_probs, rtol=1e-4, atol=1e-5)


def test_a_model_that_moved_is_joined_again(tiny_policy):
    policy = tiny_policy()
    count = len(joint_products(policy.model))
    assert count == 2 * policy.causal_model.config.num_hidden_layers
    policy.double()
    assert len(joint_products(policy.model)) == count
    # A copy's weights lie apart; it computes with its own.
    twin = copy.deepcopy(policy.float())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    rows = twin.generate(PROMPTS, completions=2, max_new_tokens=6)
    torch.testing.assert_close(rows.log_probs, twin(rows).log_probs.detach(), rtol=1e-4, atol=1e-4)
