import warnings

import pytest
import torch
from torch.distributions import Categorical

from aligngym.alignment import log_probs as engine
from aligngym.alignment.log_probs import TokenLogProbs, packed_log_probs, padded_log_probs
from aligngym.alignment.packing import Packing
from aligngym.core import PADDING, Trajectories

VOCABULARY = 257

#: Each group: the length of its prompt, and the lengths of its completions.
BATCHES = {
    "one row": [(5, [4])],
    "equal pairs": [(6, [4, 4]), (6, [4, 4])],
    "very unequal": [(3, [1, 40]), (30, [2, 17]), (1, [25, 1])],
    "one-token completions": [(4, [1, 1]), (9, [1, 1])],
    "groups of one, two and five": [(7, [3]), (2, [6, 2]), (5, [1, 9, 4, 4, 2])],
}


def make(layout, seed=0, side="right", holes=False, vocabulary=VOCABULARY):
    """Random rows; token 0, which ends and pads texts, among the others. Holes are tokens that somebody else wrote."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length):
        drawn = torch.randint(0, vocabulary, (length,), generator=generator)
        return drawn.where(torch.rand(length, generator=generator) > 0.2, 0)

    def padded(rows, side):
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING, padding_side=side)

    prompts = [(number, tokens(length), lengths) for number, (length, lengths) in enumerate(layout)]
    rows = [(number, prompt, tokens(length)) for number, prompt, lengths in prompts for length in lengths]
    groups, observations, actions = zip(*rows, strict=True)
    actions = padded(actions, "right")
    mask = actions != PADDING
    if holes:
        holed = mask & (torch.rand(mask.shape, generator=generator) > 0.4)
        mask = holed.where(holed.any(1, keepdim=True), mask)
    return Trajectories(padded(observations, side), actions, mask, group=torch.tensor(groups))


def plain_log_probs(model, rows):
    """Row by row, without padding or packing, by transformers' own eager attention."""
    causal = model.get_base_model()
    own_attention = causal.config._attn_implementation
    causal.set_attn_implementation("eager")
    result = torch.zeros(rows.mask.shape)
    for row in range(len(rows)):
        prompt, completion = (x[row][x[row] != PADDING] for x in (rows.observations, rows.actions))
        logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
        predictions = logits[len(prompt) - 1 : -1].log_softmax(-1)
        said = predictions.gather(1, completion[:, None])[:, 0]
        result[row, : len(completion)] = said * rows.mask[row, : len(completion)]
    causal.set_attn_implementation(own_attention)
    return result


def paths(policy):
    causal = policy.model.get_base_model()
    return {
        "packed": lambda rows: packed_log_probs(causal, rows),
        "left": lambda rows: padded_log_probs(causal, rows, padding_side="left")[0],
        "right": lambda rows: padded_log_probs(causal, rows, padding_side="right")[0],
    }


def gradients(policy, log_probs, seed=0):
    """Of a sum with random coefficients, by parameter of the adapter."""
    coefficients = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(seed))
    named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((coefficients * log_probs).sum(), list(named.values()), retain_graph=True)
    return dict(zip(named, found, strict=True))


def assert_same_gradients(one, other, tolerance):
    for name in one:
        scale = other[name].norm()
        assert scale > 0, name
        assert (one[name] - other[name]).norm() <= tolerance * scale, name


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("layout", BATCHES.values(), ids=BATCHES)
def test_packed_and_padded_paths_are_the_truth(tiny_policy, layout, holes):
    policy, rows = tiny_policy("llama"), make(layout, holes=holes)
    truth = plain_log_probs(policy.model, rows).detach()
    found = {name: path(rows) for name, path in paths(policy).items()}
    for log_probs in found.values():
        torch.testing.assert_close(log_probs.detach(), truth, rtol=1e-5, atol=1e-5)
        assert (log_probs[~rows.mask] == 0).all()
    by_path = {name: gradients(policy, log_probs) for name, log_probs in found.items()}
    for name in ("packed", "right"):
        assert_same_gradients(by_path[name], by_path["left"], 1e-5)


@pytest.mark.parametrize("architecture", ["llama-untied", "qwen2", "qwen3", "mistral", "gpt2"])
def test_other_architectures_are_packed_too(tiny_policy, architecture):
    policy = tiny_policy(architecture)
    assert policy.packed
    rows = make([(7, [3]), (2, [6, 2]), (5, [1, 9, 4, 4, 2])], holes=True)
    truth = plain_log_probs(policy.model, rows)
    for path in paths(policy).values():
        log_probs = path(rows)
        torch.testing.assert_close(log_probs, truth, rtol=1e-5, atol=1e-5)
        assert_same_gradients(gradients(policy, log_probs), gradients(policy, truth), 1e-5)


def test_gradients_in_double_precision(tiny_policy):
    """The paths differ by rounding only: what is left in float64 is the float32 of the log-softmax itself."""
    policy, rows = tiny_policy("llama", dtype="float64"), make(BATCHES["groups of one, two and five"], holes=True)
    packed, left, right = (path(rows) for path in paths(policy).values())
    torch.testing.assert_close(packed, left, rtol=0, atol=2e-6)
    assert_same_gradients(gradients(policy, packed), gradients(policy, left), 5e-7)
    assert_same_gradients(gradients(policy, right), gradients(policy, left), 5e-7)


def test_the_hidden_states_of_both_paths_are_equal_in_double_precision(tiny_policy):
    """Without the float32 log-softmax, what the model computes for a token does not depend on the packing at all."""
    policy, rows = tiny_policy("llama", dtype="float64"), make(BATCHES["groups of one, two and five"])
    causal = policy.model.get_base_model()
    seen = []
    hook = causal.base_model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    packed_log_probs(causal, rows)
    padded_log_probs(causal, rows, padding_side="right")
    hook.remove()
    packed, padded = seen
    packing = Packing.of(rows)
    prompts = (rows.observations != PADDING).sum(1)
    row, column = packing.places
    torch.testing.assert_close(
        packed[0, packing.predictors], padded[row, prompts[row] + column - 1], rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("path", ["packed", "left", "right"])
def test_the_padding_side_of_prompts_does_not_matter(tiny_policy, path):
    compute = paths(tiny_policy())[path]
    layout = BATCHES["groups of one, two and five"]
    assert torch.equal(compute(make(layout, side="left")), compute(make(layout, side="right")))


@pytest.mark.parametrize("path", ["packed", "left", "right"])
def test_a_row_does_not_depend_on_its_company(tiny_policy, path):
    """Neither on the order of rows, nor on interleaved groups, nor on which other rows are there."""
    compute, rows = paths(tiny_policy())[path], make(BATCHES["very unequal"] + BATCHES["groups of one, two and five"])
    together = compute(rows).detach()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(compute(rows[order]).detach(), together[order], rtol=1e-5, atol=1e-5)
    for row in range(len(rows)):
        alone = compute(rows[row : row + 1]).detach()
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-5, atol=1e-5)


def test_without_groups_every_row_stands_alone(tiny_policy):
    policy, rows = tiny_policy(), make(BATCHES["very unequal"])
    expected = policy(rows).log_probs
    rows.group = None
    torch.testing.assert_close(policy(rows).log_probs, expected, rtol=1e-5, atol=1e-5)


def test_end_tokens_inside_a_completion_count(tiny_policy):
    """Padding is no token, so an end-of-sequence token never vanishes with it."""
    policy = tiny_policy()
    actions = torch.tensor([[5, 0, 7, 0], [0, PADDING, PADDING, PADDING]])
    rows = Trajectories(torch.tensor([[0, 9, 0]]).repeat(2, 1), actions, actions != PADDING, group=torch.zeros(2))
    log_probs = policy(rows).log_probs
    assert ((log_probs < 0) == rows.mask).all()
    torch.testing.assert_close(log_probs, plain_log_probs(policy.model, rows), rtol=1e-5, atol=1e-5)


def test_a_packing_by_hand():
    actions = torch.tensor([[10, 11, 12], [20, PADDING, PADDING], [30, 31, PADDING]])
    prompts = torch.tensor([[1, 2], [PADDING, 3], [1, 2]])
    mask = torch.tensor([[True, False, True], [True, False, False], [True, True, False]])
    packing = Packing.of(Trajectories(prompts, actions, mask, group=torch.tensor([4, 0, 4])))
    # 1 2 | 10 11 | 30 ‖ 3 |: the last token of a completion predicts nothing.
    assert packing.input_ids.tolist() == [[1, 2, 10, 11, 30, 3]]
    assert packing.position_ids.tolist() == [[0, 1, 2, 3, 2, 0]]
    assert packing.groups == [(2, [2, 1]), (1, [0])]
    assert packing.predictors.tolist() == [1, 3, 1, 4, 5]
    assert packing.targets.tolist() == [10, 12, 30, 31, 20]
    assert packing.scatter(torch.arange(1.0, 6.0), mask.shape).tolist() == [[1, 0, 2], [5, 0, 0], [3, 4, 0]]


def beginning_alike(rows, shared):
    """The rows with ``shared`` equal tokens before every prompt."""
    start = torch.arange(1, shared + 1).repeat(len(rows), 1)
    # Padding may stand anywhere around a prompt, so also between its two parts.
    rows.observations = torch.cat([start, rows.observations], dim=1)
    return rows


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_what_all_prompts_begin_with_is_computed_once(tiny_policy, architecture):
    policy, layout = tiny_policy(architecture), BATCHES["groups of one, two and five"]
    alone, rows = make(layout), beginning_alike(make(layout), 9)
    packing = Packing.of(rows)
    assert packing.prefix >= 9
    assert packing.input_ids.shape[1] == Packing.of(alone).input_ids.shape[1] + 9
    truth = plain_log_probs(policy.model, rows)
    packed = packed_log_probs(policy.causal_model, rows)
    torch.testing.assert_close(packed, truth, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(policy, packed), gradients(policy, truth), 1e-5)


@pytest.mark.parametrize(
    ("prompts", "prefix"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),
        ([[1, 2], [1, 2, 3, 4]], 1),
        ([[1], [1, 2]], 0),
        ([[2, 1], [1, 1]], 0),
    ],
)
def test_the_shared_beginning_leaves_every_prompt_a_token(prompts, prefix):
    observations = [torch.tensor(prompt) for prompt in prompts]
    observations = torch.nn.utils.rnn.pad_sequence(observations, batch_first=True, padding_value=PADDING)
    actions = torch.tensor([[7, 8], [9, 10]])
    packing = Packing.of(Trajectories(observations, actions, actions > 0))
    assert packing.prefix == prefix
    first, second = map(len, prompts)
    assert packing.groups == [(first - prefix, [1]), (second - prefix, [1])]
    own = [*prompts[0], 7, *prompts[1][prefix:], 9]
    assert packing.input_ids.tolist() == [own]
    positions = [*range(first), first, *range(prefix, second), second]
    assert packing.position_ids.tolist() == [positions]
    assert packing.predictors.tolist() == [first - 1, first, first + second - prefix, first + second - prefix + 1]


@pytest.mark.parametrize("path", ["packed", "left"])
def test_rows_without_prompt_or_completion_are_refused(tiny_policy, path):
    compute = paths(tiny_policy())[path]
    rows = make(BATCHES["equal pairs"])
    rows.mask[2] = False
    with pytest.raises(ValueError, match="row 2 of the batch has an empty completion"):
        compute(rows)
    rows = make(BATCHES["equal pairs"])
    rows.observations[3] = PADDING
    with pytest.raises(ValueError, match="row 3 of the batch has an empty prompt"):
        compute(rows)
    rows = make(BATCHES["equal pairs"])
    rows.actions[1] = torch.tensor([5, PADDING, 6, 7])
    rows.mask[1] = rows.actions[1] != PADDING
    with pytest.raises(ValueError, match="row 1 of the batch has padding inside its completion"):
        compute(rows)


def test_different_prompts_in_a_group_are_refused(tiny_policy):
    rows = make(BATCHES["equal pairs"])
    rows.group[:] = 0
    with pytest.raises(ValueError, match="rows 0 and 2 are of one group and have different prompts"):
        tiny_policy()(rows)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows_per_chunk", [1, 3, 100])
def test_token_log_probs_and_their_gradient_are_those_of_a_log_softmax(monkeypatch, rows_per_chunk, with_bias):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 6, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(31, 6, dtype=torch.float64, generator=generator)
    bias = torch.randn(31, dtype=torch.float64, generator=generator) if with_bias else None
    targets = torch.randint(0, 31, (10,), generator=generator)
    coefficients = torch.randn(10, dtype=torch.float64, generator=generator)
    monkeypatch.setitem(engine.LOGITS_PER_CHUNK, "cpu", rows_per_chunk * 31)
    log_probs = TokenLogProbs.apply(hidden, weight, bias, targets)
    exact = torch.nn.functional.linear(hidden, weight, bias).log_softmax(1)[torch.arange(10), targets]
    torch.testing.assert_close(log_probs.double(), exact, rtol=0, atol=2e-6)
    (found,) = torch.autograd.grad((coefficients * log_probs).sum(), hidden)
    (expected,) = torch.autograd.grad((coefficients * exact).sum(), hidden)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    with torch.no_grad():
        assert torch.equal(TokenLogProbs.apply(hidden, weight, bias, targets), log_probs)


def test_token_log_probs_do_not_overflow():
    hidden, weight = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.0], [1e4], [-1e4]])
    for target, expected, slope in [(0, -1e4, -1e4), (1, 0.0, 0.0), (2, -2e4, -2e4)]:
        log_prob = TokenLogProbs.apply(hidden, weight, None, torch.tensor([target]))
        assert log_prob.item() == expected
        assert torch.autograd.grad(log_prob.sum(), hidden)[0].item() == slope


LORA = {"mamba": {"target_modules": ["in_proj", "x_proj"]}}


@pytest.mark.parametrize("architecture", ["gemma2", "mamba"])
def test_models_that_cannot_share_prompts_fall_back_with_one_warning(tiny_policy, architecture):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy = tiny_policy(architecture, lora=LORA.get(architecture))
        rows = make(BATCHES["groups of one, two and five"], holes=True)
        log_probs = policy(rows).log_probs
        policy(rows)
    assert not policy.packed
    assert [str(w.message) for w in caught if "share prompts" in str(w.message)] == [
        f"{type(policy.model.get_base_model()).__name__} cannot share prompts between completions; "
        "using padded rows, which is slower"
    ]
    truth = plain_log_probs(policy.model, rows)
    torch.testing.assert_close(log_probs, truth, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(policy, log_probs), gradients(policy, truth), 1e-5)


def test_rows_longer_than_a_sliding_window_are_right(tiny_policy):
    """A window of 16 is longer than the probe at the start, so only the batch can show that it matters."""
    policy, rows = tiny_policy("mistral"), make([(12, [3, 20]), (30, [2])])
    assert policy.packed
    with pytest.warns(UserWarning, match="over 31 tokens, more than the model's sliding window; using padded rows"):
        log_probs = policy(rows).log_probs
    torch.testing.assert_close(log_probs, plain_log_probs(policy.model, rows), rtol=1e-5, atol=1e-5)
    # The window does matter.
    policy.model.get_base_model().config.sliding_window = 1000
    assert (plain_log_probs(policy.model, rows) - log_probs).abs().max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_entropy_is_that_of_the_predictions(tiny_policy, side):
    policy, rows = tiny_policy(), make(BATCHES["very unequal"], holes=True)
    log_probs, entropy = padded_log_probs(policy.model.get_base_model(), rows, entropy=True, padding_side=side)
    for row in range(len(rows)):
        prompt, completion = (x[row][x[row] != PADDING] for x in (rows.observations, rows.actions))
        logits = policy.model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        expected = Categorical(logits=logits).entropy() * rows.mask[row, : len(completion)]
        torch.testing.assert_close(entropy[row, : len(completion)], expected, rtol=1e-4, atol=1e-5)
    said = policy(rows, entropy=True)
    torch.testing.assert_close(said.entropy, entropy)
    torch.testing.assert_close(said.log_probs, log_probs)
