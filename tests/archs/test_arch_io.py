"""Checkpoints: exact, atomic, and clear about what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from grassland.archs import (
    MLP,
    CheckpointError,
    SharedMoE,
    atomic_write,
    create_model,
    load_model,
    read_config,
    save_model,
    swap,
)
from grassland.archs.registry import slot_choices

SIZES = {"vocab_size": 13, "max_len": 8, "dim": 8, "depth": 2, "ffn_dim": 12, "rank": 4}


@pytest.fixture
def model():
    return create_model("lm", offsets=((1,), (2, 3)), **SIZES).eval()


@pytest.fixture
def saved(model, tmp_path):
    save_model(model, tmp_path / "run", extra={"step": 7})
    return tmp_path / "run"


def test_round_trip_is_bitwise(model, saved):
    loaded = load_model(saved)
    assert loaded.config == model.config and not loaded.training
    ids = torch.randint(13, (2, 8))
    assert torch.equal(loaded(ids), model(ids))
    assert read_config(saved)["step"] == 7
    assert sorted(f.name for f in saved.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("share", [(), ("mixer", "ffn")])
def test_shared_tensors_are_stored_once(tmp_path, share):
    model = create_model("lm", share=share, **SIZES)
    save_model(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == model.num_parameters()
    loaded = load_model(tmp_path)
    assert loaded.head.weight is loaded.embed.weight


def test_dtype_is_kept_unless_asked_otherwise(tmp_path):
    save_model(create_model("lm", dtype=torch.bfloat16, **SIZES), tmp_path)
    assert load_model(tmp_path).embed.weight.dtype is torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float32).embed.weight.dtype is torch.float32


def test_every_tensor_keeps_its_own_dtype(tmp_path):
    model = create_model("lm", head="grassmann", subspace_dim=2, dtype=torch.bfloat16, **SIZES)
    model.head.float().reset_parameters()
    model.norm.double()
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    stored = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == stored
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.head.orthogonality_error() < 1e-6
    assert {tensor.dtype for tensor in load_model(tmp_path, dtype=torch.float64).parameters()} == {torch.float64}


def test_a_compiled_model_is_stored_under_its_own_names(model, tmp_path):
    ids = torch.randint(13, (2, 8))
    expected = model(ids)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    save_model(torch.compile(model, backend="eager"), tmp_path)
    assert torch.equal(load_model(tmp_path)(ids), expected)


def test_a_model_that_could_not_be_loaded_is_not_written(model, tmp_path):
    swap(model, {MLP: lambda old: SharedMoE(8, 12)})
    with pytest.raises(ValueError, match=r"not what its config builds.*8 tensors are missing: blocks.0.ffn"):
        save_model(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_head_tied_to_another_models_embedding_is_not_written(model, tmp_path):
    model.embed = nn.Embedding(13, 8)
    with pytest.raises(ValueError, match=r"^head\.tied refers to a module that is not the model's"):
        save_model(torch.compile(model, backend="eager"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    model.head.tied.module = model.embed
    save_model(model, tmp_path)
    ids = torch.randint(13, (2, 8))
    assert torch.equal(load_model(tmp_path)(ids), model(ids))


def test_a_branch_shared_with_a_block_that_lost_it_is_not_written(tmp_path):
    model = create_model("lm", share=("ffn",), **SIZES)
    model.blocks[0].ffn.branch = MLP(8, 12)
    with pytest.raises(ValueError, match=r"^blocks\.1\.ffn\.branch refers to a module"):
        save_model(model, tmp_path)


@pytest.mark.parametrize("slot", ["mixer", "residual", "ffn", "head"])
def test_saving_draws_no_random_numbers(slot, tmp_path):
    for choice in slot_choices(slot):
        kind = "mlm" if choice == "bidirectional" else "lm"
        options = {"subspace_dim": 2} if choice == "grassmann" and slot == "head" else {}
        sizes = {name: value for name, value in SIZES.items() if name != "rank"}
        model = create_model(kind, **{slot: choice}, **options, **sizes)
        random = torch.get_rng_state()
        save_model(model, tmp_path)
        assert torch.equal(torch.get_rng_state(), random), choice


def edit_config(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(file, keep):
    file.write_bytes(file.read_bytes()[:keep])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: truncate(d / "config.json", 20), ("config.json", "JSON")),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), ("config.json", "JSON")),
        (lambda d: (d / "config.json").write_text("[]"), ("config.json", "format")),
        (lambda d: edit_config(d, lambda c: c.update(version=9)), ("config.json", "version 9")),
        (lambda d: edit_config(d, lambda c: c.pop("model")), ("config.json", "model")),
        (lambda d: edit_config(d, lambda c: c["model"].update(mixer="grasmann")), ("config.json", "'grassmann'")),
        (lambda d: edit_config(d, lambda c: c["model"].update(kind="ml")), ("config.json", "'lm'")),
        (lambda d: edit_config(d, lambda c: c["model"].update(width=3)), ("config.json", "width")),
        (lambda d: edit_config(d, lambda c: c["model"].update(dim="x")), ("config.json", "dim", "'x'")),
        (lambda d: edit_config(d, lambda c: c["model"].update(options=3)), ("config.json", "options")),
        (lambda d: edit_config(d, lambda c: c["model"].update(vocab_size=14)), ("embed.weight", "(13, 8)", "(14, 8)")),
        (lambda d: truncate(d / "model.safetensors", 5), ("model.safetensors", "truncated")),
        (lambda d: truncate(d / "model.safetensors", 900), ("model.safetensors", "truncated")),
        (lambda d: truncate(d / "model.safetensors", -4), ("model.safetensors", "truncated")),
        (lambda d: edit_tensors(d, lambda t: t.pop("norm.bias")), ("model.safetensors", "missing", "norm.bias")),
        (lambda d: edit_tensors(d, lambda t: t.update(x=torch.ones(1))), ("model.safetensors", "unexpected", "x")),
        (lambda d: (d / "config.json").unlink(), ("config.json", "no such file")),
        (lambda d: (d / "model.safetensors").unlink(), ("model.safetensors", "no such file")),
    ],
)
def test_damage_is_named(saved, damage, words):
    damage(saved)
    with pytest.raises(CheckpointError) as caught:
        load_model(saved)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_checkpoint_is_also_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="file"):
        load_model(tmp_path / "file")


def test_extra_must_not_hide_the_header(model, tmp_path):
    with pytest.raises(ValueError, match="version"):
        save_model(model, tmp_path, extra={"version": 2})
    with pytest.raises(ValueError, match="Linear"):
        save_model(torch.nn.Linear(1, 1), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fail_at", ["content", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fail_at):
    target = tmp_path / "state.bin"
    atomic_write(target, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    def content(file):
        file.write(b"half of the n")
        if fail_at == "content":
            full()

    if fail_at == "fsync":
        monkeypatch.setattr("os.fsync", full)
    if fail_at == "replace":
        monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(target, content)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_save_leaves_the_last_good_checkpoint(model, saved, monkeypatch):
    ids = torch.randint(13, (1, 5))
    before = model(ids)
    other = create_model("lm", **SIZES)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save_model(other, saved)
    assert torch.equal(load_model(saved)(ids), before)


def test_atomic_write_honours_the_umask_of_open(tmp_path):
    (tmp_path / "plain").write_bytes(b"x")
    atomic_write(tmp_path / "atomic", b"x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode
