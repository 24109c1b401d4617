import errno
import io
import random

import numpy as np
import pytest
import torch

import grassland.archs.io as archs_io
from grassland.archs import CheckpointError
from grassland.train.checkpoint import STATE_FILE, load_state, save_state
from grassland.train.seeds import rng_state, set_rng_state


@pytest.fixture
def state():
    weight = torch.randn(4, 3)
    return {
        "tied": [weight, weight],
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2).bfloat16()}}, "betas": (0.9, 0.95)},
        "empty": torch.empty(0, 2),
        "transposed": weight.t(),
        "best": float("inf"),
        "third": 1 / 3,
        "nothing": None,
        "counts": np.arange(5),
        "flag": True,
        "text": "naïve",
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_state_comes_back_with_its_types_and_bits(tmp_path, state):
    save_state(tmp_path, state)
    loaded = load_state(tmp_path)
    assert same(state, loaded)
    assert loaded["tied"][0] is loaded["tied"][1]
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_what_a_file_without_code_cannot_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match="function at"):
        save_state(tmp_path, {"a": {"b": lambda: 0}})


def test_random_generators_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(3).tolist()  # noqa: NPY002

    draw()
    save_state(tmp_path, rng_state())
    expected = draw()
    draw()
    set_rng_state(load_state(tmp_path))
    assert draw() == expected


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_state_is_an_error_that_names_it(tmp_path, state, keep):
    save_state(tmp_path, state)
    content = (tmp_path / STATE_FILE).read_bytes()
    (tmp_path / STATE_FILE).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CheckpointError, match=rf"{STATE_FILE}: corrupt or truncated .*start anew"):
        load_state(tmp_path)


def test_any_flipped_byte_is_an_error_that_names_the_file(tmp_path, state):
    save_state(tmp_path, state)
    content = (tmp_path / STATE_FILE).read_bytes()
    for place in [*random.Random(0).sample(range(len(content)), 60), len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 0x5A
        (tmp_path / STATE_FILE).write_bytes(damaged)
        try:
            assert same(load_state(tmp_path), state), f"byte {place}"  # padding of the header may change unnoticed
        except CheckpointError as error:
            assert STATE_FILE in str(error)


def test_a_missing_state_is_both_a_checkpoint_and_a_file_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{STATE_FILE}: no such file"):
        load_state(tmp_path)


def test_a_disk_that_fills_up_midway_leaves_the_state_before(tmp_path, state, monkeypatch):
    save_state(tmp_path, state)
    fill_disk(monkeypatch, after=100)
    with pytest.raises(OSError, match="No space left"):
        save_state(tmp_path, {"other": torch.zeros(1000)})
    monkeypatch.undo()
    assert same(load_state(tmp_path), state)
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def fill_disk(monkeypatch, after):
    """Every file that `atomic_write` opens takes `after` bytes and then finds the disk full."""

    class Full(io.FileIO):
        def write(self, data):
            super().write(bytes(data)[:after])
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path, mode="r", *args, **keywords):
        return Full(path, mode.replace("b", "")) if "x" in mode else original(path, mode, *args, **keywords)

    original = archs_io.Path.open
    monkeypatch.setattr(archs_io.Path, "open", opened)
