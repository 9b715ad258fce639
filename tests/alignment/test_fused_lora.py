import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from aligngym.alignment.fused_lora import FusedLora, fuse_lora


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3, bias=False)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def make(fused, **options):
    """The same net with the same adapter, whose two matrices are both random."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["first", "second"], **options})
    model = get_peft_model(Net().double(), config)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    if fused:
        fuse_lora(model)
    return model


@pytest.fixture
def calls(monkeypatch):
    """How often the fused function ran."""
    made, own = [], FusedLora.forward

    def forward(ctx, *args):
        made.append(args)
        return own(ctx, *args)

    monkeypatch.setattr(FusedLora, "forward", staticmethod(forward))
    return made


def outputs_and_gradients(model, x):
    """Of an uneven sum: with respect to the input and to the adapter."""
    x = x.clone().requires_grad_()
    output = model(x)
    coefficients = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    wanted = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    return [output, *torch.autograd.grad((coefficients * output).sum(), wanted)]


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_outputs_and_gradients_are_pefts(shape, calls):
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(
        outputs_and_gradients(make(True), x), outputs_and_gradients(make(False), x), rtol=1e-12, atol=1e-12
    )
    assert len(calls) == 2


def test_gradients_are_those_of_finite_differences():
    x, weight, bias, a, b = (
        torch.randn(shape, dtype=torch.float64, requires_grad=name in "xab")
        for name, shape in {"x": (3, 5), "w": (7, 5), "c": (7,), "a": (2, 5), "b": (7, 2)}.items()
    )
    assert torch.autograd.gradcheck(lambda x, a, b: FusedLora.apply(x, weight, bias, a, b, 1.5), (x, a, b))


@pytest.mark.parametrize(
    ("options", "fused_layers"),
    # The second layer has no bias to be trained.
    [({"lora_dropout": 0.5}, 0), ({"use_dora": True}, 0), ({"lora_bias": True}, 0), ({"bias": "all"}, 1)],
    ids=str,
)
def test_other_layers_stay_as_peft_has_them(options, fused_layers, calls):
    x = torch.randn(4, 5, dtype=torch.float64)
    fused, plain = make(True, **options), make(False, **options)
    torch.manual_seed(1)
    found = outputs_and_gradients(fused, x)
    torch.manual_seed(1)
    torch.testing.assert_close(found, outputs_and_gradients(plain, x), rtol=1e-12, atol=1e-12)
    assert len(calls) == fused_layers


def test_an_adapter_that_is_off_or_merged_stays_so(calls):
    x = torch.randn(4, 5, dtype=torch.float64)
    model = make(True)
    torch.manual_seed(0)
    net = Net().double()
    with model.disable_adapter():
        torch.testing.assert_close(model(x), net(x))
    assert not calls
    trained = model(x).detach()
    assert len(calls) == 2
    model.merge_adapter()
    torch.testing.assert_close(model(x), trained)
    assert len(calls) == 2


def test_lower_precision_computes_in_that_of_the_frozen_weights():
    """The adapter is float32 and the layer bfloat16, as in training: gradients come in the adapter's own precision."""
    x, weight, a, b = (torch.randn(shape) for shape in ((64, 32), (48, 32), (4, 32), (48, 4)))
    exact_leaves = [x.double().requires_grad_(), a.double().requires_grad_(), b.double().requires_grad_()]
    exact = exact_leaves[0] @ weight.double().T + 2 * exact_leaves[0] @ exact_leaves[1].T @ exact_leaves[2].T
    leaves = [x.bfloat16().requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    found = FusedLora.apply(leaves[0], weight.bfloat16(), None, leaves[1], leaves[2], 2.0)
    assert found.dtype == torch.bfloat16
    g = torch.randn(found.shape)
    gradients = torch.autograd.grad(found, leaves, g.bfloat16())
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    for one, other in zip(
        [found, *gradients], [exact, *torch.autograd.grad(exact, exact_leaves, g.double())], strict=True
    ):
        # bfloat16 has eight bits; each result is rounded a handful of times.
        assert (one.double() - other).norm() < 0.02 * other.norm()


def test_to_a_compiler_it_is_one_operation_for_all_layers_and_lengths():
    """The outputs and gradients stay, and another layer or length is not compiled again."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = make(True, target_modules=["second"]), make(True, target_modules=["second"])
    layers = [compiled.base_model.model.second, make(True, target_modules=["second"]).base_model.model.second]
    for layer in layers:
        layer.compile(dynamic=True, backend="aot_eager")
    for length in (4, 9, 6):
        x = torch.randn(length, 7, dtype=torch.float64)
        expected = outputs_and_gradients(plain.base_model.model.second, x)
        found = outputs_and_gradients(layers[0], x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        outputs_and_gradients(layers[1], x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.compiler.reset()
