"""Rows of a cache against attention written out row by row, and what is written with it against transformers."""

import contextlib

import pytest
import torch
from torch import nn

from aligngym.alignment import row_attention
from aligngym.alignment.packing import Packing
from aligngym.alignment.row_cache import CAPACITY_STEP, Prefill, RowCache

PROMPTS = [[1, 2, 3, 4, 5], [1, 2, 6], [1, 2, 3, 7, 8, 9, 10, 11]]
HEADS, KEY_HEADS, SIZE = 6, 2, 8


def by_hand(query, keys, values, scaling):
    """What one query ``[heads, size]`` sees of keys ``[K, key_heads, size]``, head by head."""
    outputs = []
    for head, q in enumerate(query):
        k, v = (x[:, head // (len(query) // x.shape[1])] for x in (keys, values))
        outputs.append((scaling * (k @ q)).softmax(0) @ v)
    return torch.stack(outputs)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


class Rows:
    """A cache of two layers filled with random keys, and what every row of it should hold."""

    def __init__(self, draw, copies, rows=None):
        self.draw, self.layers = draw, [nn.Identity(), nn.Identity()]
        packing = Packing.of_prompts([torch.tensor(prompt) for prompt in PROMPTS], torch.device("cpu"))
        self.cache = RowCache(rows or copies * len(PROMPTS), 20, torch.device("cpu"))
        prefill = Prefill(packing, self.cache, copies, 12)
        self.expected = []
        for layer in self.layers:
            count = packing.input_ids.shape[1]
            query, key, value = (draw(1, heads, count, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
            output = prefill.attend(layer, query, key, value, 0.3)
            torch.testing.assert_close(output, packing.attend(layer, query, key, value, 0.3))
            seen = [packing.keys[a:b] for a, b in zip(packing.key_starts, packing.key_starts[1:], strict=False)]
            # A key belongs to one token at one place.
            assert [packing.input_ids[0, places].tolist() for places in seen] == PROMPTS
            key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)
            self.expected.append([(key[places], value[places]) for places in seen for _ in range(copies)])

    def step(self, slots):
        """One token more in the first slots; every layer's attention is compared."""
        places = self.cache.begin_step(slots)
        assert places.tolist() == [len(keys) for keys, _ in self.expected[0][:slots]]
        with self.cache.attached():
            for layer, rows in zip(self.layers, self.expected, strict=True):
                query, key, value = (self.draw(1, heads, slots, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
                output = self.cache.attend(layer, query, key, value, 0.3)
                for row in range(slots):
                    rows[row] = tuple(
                        torch.cat([old, new[:, :, row]]) for old, new in zip(rows[row], (key, value), strict=True)
                    )
                    torch.testing.assert_close(output[0, row], by_hand(query[0, :, row], *rows[row], 0.3))
        self.cache.end_step(slots)


@pytest.mark.parametrize("copies", [1, 3])
def test_every_row_sees_its_own_tokens_and_no_other(draw, copies):
    rows = Rows(draw, copies)
    for _ in range(4):
        rows.step(3 * copies)


def test_rows_that_moved_go_on_and_those_behind_are_left(draw):
    rows = Rows(draw, 2)
    rows.step(6)
    rows.cache.move(torch.tensor([4, 5]), torch.tensor([0, 2]))
    for expected in rows.expected:
        expected[0], expected[2] = expected[4], expected[5]
    before = [tensor[4:].clone() for tensors in rows.cache._layers.values() for tensor in tensors]
    for _ in range(2):
        rows.step(4)
    after = [tensor[4:] for tensors in rows.cache._layers.values() for tensor in tensors]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_cache_with_more_rows_than_needed(draw):
    rows = Rows(draw, 1, rows=5)
    assert rows.cache.lengths.tolist() == [5, 3, 8, 0, 0]
    rows.step(3)


def test_the_memory_of_one_batch_serves_the_next(draw):
    rows = Rows(draw, 2)
    rows.step(6)
    first = [[tensor.data_ptr() for tensor in tensors] for tensors in rows.cache._layers.values()]
    packing = Packing.of_prompts([torch.tensor([1, 2]), torch.tensor([4, 5, 6])], torch.device("cpu"))
    prefill = Prefill(packing, rows.cache, 3, 5)
    query, key = draw(1, HEADS, 5, SIZE), draw(1, KEY_HEADS, 5, SIZE)
    for layer in rows.layers:
        prefill.attend(layer, query, key, key, 0.3)
    assert first == [[tensor.data_ptr() for tensor in tensors] for tensors in rows.cache._layers.values()]
    assert rows.cache.lengths.tolist() == [2, 2, 2, 3, 3, 3]
    assert rows.cache.longest == 8
    # What the batch before left behind a prompt's end is not seen.
    one, other = key[0].transpose(0, 1).split([2, 3])
    rows.expected = [[(x, x) for x in (one, one, one, other, other, other)] for _ in rows.layers]
    rows.step(6)


def test_layers_have_the_tensors_only_while_attached(draw):
    rows = Rows(draw, 1)
    layer = rows.layers[0]
    with rows.cache.attached():
        assert layer.cached_keys.shape == (3, CAPACITY_STEP, KEY_HEADS, SIZE)
        assert not layer.state_dict()
    with pytest.raises(KeyError), rows.cache.attached():
        raise KeyError
    assert not hasattr(layer, "cached_keys")
    assert not hasattr(layer, "cached_values")


@pytest.mark.parametrize(("compiler", "expected"), [("gcc", True), ("clang", True), (None, False)])
def test_the_kernel_needs_a_compiler(monkeypatch, compiler, expected):
    monkeypatch.setattr(row_attention, "triton", object())
    monkeypatch.setattr(row_attention.shutil, "which", lambda name: name if name == compiler else None)
    monkeypatch.delenv("CC", raising=False)
    row_attention.has_row_kernel.cache_clear()
    with contextlib.nullcontext() if expected else pytest.warns(UserWarning, match="no C compiler"):
        assert row_attention.has_row_kernel("cuda") == expected
    assert not row_attention.has_row_kernel("cpu")
    row_attention.has_row_kernel.cache_clear()
