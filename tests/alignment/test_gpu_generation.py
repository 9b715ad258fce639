"""Captured decoding against the same steps uncaptured; marked ``gpu`` and skipped without one."""

import pytest
import torch

from aligngym.alignment.captured_decoding import SMALLEST_GRAPH, CachedWriter
from aligngym.alignment.generation import Decoding, PlainWriter, complete
from aligngym.alignment.row_attention import attend_rows, has_row_kernel, masked_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]

PROMPTS = [torch.tensor(tokens) for tokens in ([5, 6, 7, 8, 9, 10], [20], [30, 31, 32], [5, 6, 7, 40])]


@pytest.fixture
def policy(tiny_policy):
    """``policy(dtype)``: on the device."""
    return lambda dtype: tiny_policy(dtype=dtype, head_dim=32).cuda()


def write(policy, writer, copies=8, seed=0, **decoding):
    how = Decoding(**{"max_new_tokens": 40, **decoding})
    generator = torch.Generator().manual_seed(seed)
    uniforms = 1 - torch.rand(len(PROMPTS) * copies, how.max_new_tokens, generator=generator)
    model = policy.causal_model
    options = {"end_tokens": policy.end_tokens, "uniforms": uniforms, "temperature": 0.5, "writer": writer}
    with policy._computing():
        return complete(model.eval(), policy.tokenizer, PROMPTS, copies, how, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("decoding", [{"greedy": True}, {}, {"top_k": 20, "top_p": 0.9}, {"stop": ("a", "b")}])
def test_captured_steps_write_what_uncaptured_ones_do(policy, dtype, decoding):
    policy = policy(dtype)
    captured, uncaptured = CachedWriter(policy.causal_model), CachedWriter(policy.causal_model)
    uncaptured.captures = False
    for seed in range(3):
        found, expected = (write(policy, writer, seed=seed, **decoding) for writer in (captured, uncaptured))
        if dtype == "float32":
            assert torch.equal(found.actions, expected.actions)
            torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)
        else:
            # Products of other numbers of rows are rounded otherwise, and a token that is drawn otherwise once is
            # followed by others.
            assert (found.actions == expected.actions).float().mean() > 0.5
            assert torch.equal(found.actions[:, 0], expected.actions[:, 0])
    assert captured.graphs
    assert captured.captures
    assert not uncaptured.graphs


def test_captured_steps_write_what_transformers_cache_does(policy):
    policy = policy("float32")
    captured = CachedWriter(policy.causal_model)
    for greedy in (True, False):
        found = write(policy, captured, greedy=greedy)
        expected = write(policy, PlainWriter(policy.causal_model), greedy=greedy)
        assert torch.equal(found.actions, expected.actions)
        torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_probs_are_those_of_the_policy(policy, dtype):
    policy = policy(dtype)
    for seed in range(2):
        rows = policy.generate(PROMPTS, completions=8, max_new_tokens=40, seed=seed)
        expected = policy(rows).log_probs.detach()
        if dtype == "float32":
            torch.testing.assert_close(rows.log_probs, expected, rtol=1e-3, atol=1e-3)
        else:
            assert (rows.log_probs - expected)[rows.mask].abs().mean() < 0.1


def test_a_second_rollout_captures_nothing_and_follows_the_adapter(policy):
    policy = policy("float32")
    policy.generate(PROMPTS, completions=8, max_new_tokens=40)
    writer = policy._writer
    graphs = dict(writer.graphs)
    assert len(graphs) >= 1
    first = policy.generate(PROMPTS, completions=8, max_new_tokens=40, greedy=True)
    greedy_graphs = dict(writer.graphs)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(-1.5)
    for reference in (False, True):
        rows = policy.generate(PROMPTS, completions=8, max_new_tokens=40, greedy=True, reference=reference)
        assert not torch.equal(rows.actions[:, :5], first.actions[:, :5])
        with policy.using_adapter(None) if reference else torch.no_grad():
            expected = policy(rows).log_probs.detach()
        torch.testing.assert_close(rows.log_probs, expected, rtol=1e-3, atol=1e-3)
    # Smaller numbers of slots may be reached for the first time; what was captured is used as it is.
    assert all(writer.graphs[program] is graph for program, graph in greedy_graphs.items())
    full = [program for program in writer.graphs if program[-1] == 32]
    assert len(full) == 2


def test_an_adapter_that_cannot_be_merged_is_followed_too(tiny_policy):
    policy = tiny_policy(lora={"target_modules": ["lm_head", "q_proj"]}, dtype="bfloat16", head_dim=32).cuda()
    for _ in range(3):
        rows = policy.generate(PROMPTS, completions=8, max_new_tokens=40)
        assert (rows.log_probs - policy(rows).log_probs.detach())[rows.mask].abs().mean() < 0.1
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(-1.3)
    assert policy._writer.graphs


def test_numbers_of_slots_shrink_by_halves(tiny_policy):
    policy = tiny_policy(vocab_size=9, head_dim=32).cuda()
    prompts = [prompt.clamp(max=8) for prompt in PROMPTS]
    rows = policy.generate(prompts, completions=16, max_new_tokens=120)
    expected = policy(rows).log_probs.detach()
    torch.testing.assert_close(rows.log_probs, expected, rtol=1e-3, atol=1e-3)
    sizes = {program[-1] for program in policy._writer.graphs}
    assert len(sizes) > 1
    assert sizes <= {64, 32, 16, SMALLEST_GRAPH}


def test_a_step_that_waits_for_the_device_runs_uncaptured(policy, monkeypatch):
    policy = policy("float32")
    expected = policy.generate(PROMPTS, completions=2, max_new_tokens=20)
    step = CachedWriter._step

    def waits(self, slots):
        step(self, slots)
        self.completions.column.item()

    monkeypatch.setattr(CachedWriter, "_step", waits)
    writer = CachedWriter(policy.causal_model)
    policy._writer = writer
    with pytest.warns(UserWarning, match="cannot be captured"):
        rows = policy.generate(PROMPTS, completions=2, max_new_tokens=20)
    assert torch.equal(rows.actions, expected.actions)
    assert not writer.captures


@pytest.mark.parametrize(
    ("heads", "key_heads", "size"), [(8, 2, 64), (4, 4, 32), (9, 3, 80), (32, 1, 128), (6, 2, 8), (4, 2, 256)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernel_for_rows_does_what_a_mask_does(heads, key_heads, size, dtype):
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    rows, capacity, used_rows = 7, 512, 5
    keys, values = draw(rows, capacity, key_heads, size), draw(rows, capacity, key_heads, size)
    query = draw(heads, used_rows, size).transpose(0, 1)
    assert has_row_kernel("cuda")
    seen = torch.tensor([1, 512, 127, 128, 300], dtype=torch.int32, device="cuda")
    clean = [x[:used_rows].double() for x in (keys, values)]
    # Nothing behind what a row sees matters.
    keys[0, 1:], values[0, 1:] = torch.nan, torch.nan
    mask = torch.arange(capacity, device="cuda") < seen[:, None]
    for scaling in (0.2, None):
        found = attend_rows(query, keys, values, seen, scaling)
        expected = masked_rows(query.double(), *clean, mask, scaling)
        error = float((found - expected).norm() / expected.norm())
        assert error < (1e-5 if dtype == torch.float32 else 5e-3)
