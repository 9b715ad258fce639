import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from aligngym.core.storage import load_tree, replacing, save_tree


def assert_same(left, right):
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        for pair in zip(left, right, strict=True):
            assert_same(*pair)
    elif isinstance(left, (torch.Tensor, np.ndarray)):
        assert left.dtype == right.dtype
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else np.array_equal(left, right)
    else:
        assert left == right or left != left


def test_round_trip_of_everything_that_agents_keep(tmp_path):
    weight = torch.randn(3, 4)
    tree = {
        "tied": [weight, weight, weight[1:]],
        "strided": weight.t(),
        "numbers": {1: torch.tensor([1.5], dtype=torch.bfloat16), 0: torch.tensor([7]), "0": torch.tensor([True])},
        "empty": torch.zeros(0, 3),
        "arrays": [np.arange(6.0).reshape(2, 3), np.array([2**63], dtype=np.uint64), np.array([True, False])],
        "turned": np.arange(6)[::-1],
        "json": {"big": 2**127 + 1, "text": "π ≠ \n", "nothing": None, "yes": True, "nested": [[], {}, [1, [2.5]]]},
        "special": [float("inf"), float("nan"), 0.1 + 0.2],
    }
    save_tree(tmp_path / "new" / "tree.safetensors", tree)
    assert_same(load_tree(tmp_path / "new" / "tree.safetensors"), tree)


def test_scalars_stay_scalars(tmp_path):
    save_tree(tmp_path / "tree", {"step": torch.tensor(3.0), "array": np.array(2.0)})
    tree = load_tree(tmp_path / "tree")
    assert (tree["step"].shape, tree["array"].shape) == ((), ())
    assert (tree["step"].item(), tree["array"].item()) == (3.0, 2.0)


def test_tuples_come_back_as_lists(tmp_path):
    save_tree(tmp_path / "tree", {"betas": (0.9, 0.999)})
    assert load_tree(tmp_path / "tree") == {"betas": [0.9, 0.999]}


def test_an_optimiser_continues_exactly(tmp_path):
    def run(steps, state=None, start=None):
        parameter = torch.nn.Parameter(torch.ones(3) if start is None else start.clone())
        optimizer = torch.optim.AdamW([parameter], lr=0.1, amsgrad=True)
        if state is not None:
            optimizer.load_state_dict(state)
        for step in range(*steps):
            parameter.grad = torch.sin(torch.arange(3.0) + step)
            optimizer.step()
        return parameter.data, optimizer.state_dict()

    whole, _ = run((0, 10))
    half, state = run((0, 4))
    save_tree(tmp_path / "tree", {"half": half, "state": state})
    tree = load_tree(tmp_path / "tree")
    assert torch.equal(run((4, 10), tree["state"], tree["half"])[0], whole)


def test_generator_states_survive(tmp_path):
    generator = np.random.default_rng(5)
    save_tree(tmp_path / "tree", generator.bit_generator.state)
    expected = generator.random(3)
    other = np.random.default_rng(0)
    other.bit_generator.state = load_tree(tmp_path / "tree")
    assert (other.random(3) == expected).all()


def test_an_error_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_saved_leaves_the_old_file(tmp_path):
    path = tmp_path / "tree"
    save_tree(path, {"a": 1})
    with pytest.raises(TypeError):
        save_tree(path, {"a": torch.zeros(2), "b": object()})
    assert load_tree(path) == {"a": 1}


def test_files_of_others_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_tree(tmp_path / "nothing")
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not one that an agent saved"):
        load_tree(tmp_path / "foreign")

    class Malicious:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").touch, ())

    (tmp_path / "pickle").write_bytes(pickle.dumps(Malicious()))
    (tmp_path / "empty").touch()
    for name in ("pickle", "empty"):
        with pytest.raises(ValueError, match=name):
            load_tree(tmp_path / name)
    assert not (tmp_path / "executed").exists()
