"""Where a step's time goes: the parts add up to the step, and each is charged for what it does."""

import json
import time

import pytest
import torch
from torch import nn

from grassland.archs import create_model, list_models
from grassland.train import profile as module
from grassland.train.__main__ import main
from grassland.train.profile import PARTS, Clock, ProfileOptions, profile_model

SMALL = {"dim": 16, "depth": 2, "ffn_dim": 32, "vocab_size": 64, "max_len": 16}
OPTIONS = ProfileOptions(batch_size=2, seq_len=8, steps=3, device="cpu")


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.seconds = backward
        time.sleep(forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.seconds)
        return grad, None, None


def small(monkeypatch, **overrides):
    model = create_model("lm", **SMALL, rank=4, **overrides)
    setup = lambda name, options, device: (model, module._random_text(64, options, device), module._text_loss)  # noqa: E731
    monkeypatch.setattr(module, "_setup", setup)
    return model


@pytest.mark.parametrize("residual", ["plain", "kromhc", "mhc"])
@pytest.mark.parametrize("share", [(), ("mixer", "ffn")])
def test_what_is_slow_is_charged(monkeypatch, residual, share):
    model = small(monkeypatch, residual=residual, norm="pre", share=share, ffn="shared_moe")
    calls = {"mixer": (0.02, 0.03), "ffn": (0.03, 0.02)}
    for block in model.blocks:
        for part, (forward, backward) in calls.items():
            branch = getattr(block, part).branch
            if isinstance(branch, nn.Module):
                inner = branch.forward
                branch.forward = lambda x, *a, f=inner, s=(forward, backward): f(Slow.apply(x, *s), *a)
    start = time.perf_counter()
    seconds = profile_model("any", OPTIONS, torch.device("cpu"))
    assert {key.split()[0] for key in seconds} == set(PARTS)
    for part, sleeps in calls.items():
        for way, sleep in zip(("forward", "backward"), sleeps, strict=True):
            assert 2 * sleep <= seconds[f"{part} {way}"]
    assert seconds["residual forward"] > 0 and seconds["residual backward"] > 0
    assert 3 * sum(seconds.values()) <= 1.5 * (time.perf_counter() - start)


def test_a_clock_gives_all_time_to_somebody(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 6.0, 7.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    for part in ("a", "b", "a", "b", ""):
        clock.switch(part, "forward")
    assert clock.take() == {("a", "forward"): 3.0, ("b", "forward"): 4.0}
    assert clock.take() == {}


def test_command_writes_numbers_and_a_picture(monkeypatch, tmp_path, capsys):
    small(monkeypatch)
    sizes = ["--batch-size", "2", "--seq-len", "8", "--steps", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["profile", "--models", "grassmann_lm_6l", "transformer_lm_6l", *sizes]) == 0
    records = [json.loads(line) for line in (tmp_path / "profile.jsonl").read_text().splitlines()]
    assert [r["model"] for r in records] == ["grassmann_lm_6l", "transformer_lm_6l"]
    assert {"cpu", "commit", "torch", "threads"} <= records[0].keys() and records[0]["seq_len"] == 8
    assert (tmp_path / "profile.png").stat().st_size > 5000
    monkeypatch.undo()
    assert main(["profile", "--models", "grassmann", *sizes]) == 2
    assert "unknown model 'grassmann'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        ProfileOptions(steps=0)


def test_names_are_known_before_anything_is_timed_and_what_is_timed_is_kept(monkeypatch, tmp_path):
    timed = []

    def fake(name, options, device):
        timed.append(name)
        if name == "kromhc_lm_6l":
            raise RuntimeError("out of memory")
        return {"data": 1.0}

    monkeypatch.setattr(module, "profile_model", fake)
    with pytest.raises(ValueError, match="unknown model 'grassmann'"):
        module.profile(ProfileOptions(("transformer_lm_6l", "grassmann"), tmp_path / "unknown", device="cpu"))
    assert not timed and not (tmp_path / "unknown").exists()
    with pytest.raises(RuntimeError, match="out of memory"):
        module.profile(ProfileOptions(("transformer_lm_6l", "kromhc_lm_6l"), tmp_path, device="cpu"))
    (line,) = (tmp_path / "profile.jsonl").read_text().splitlines()
    assert json.loads(line)["model"] == "transformer_lm_6l"


def test_models_of_images_and_text_encoders_too(tmp_path):
    for package in ("torchvision", "sklearn"):
        pytest.importorskip(package)
    sizes = ["--batch-size", "1", "--seq-len", "8", "--steps", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["profile", "--models", "albert_base", "widenet_cifar", *sizes]) == 0
    records = [json.loads(line) for line in (tmp_path / "profile.jsonl").read_text().splitlines()]
    for record in records:
        assert {key.split()[0] for key, value in record["seconds"].items() if value > 0} == set(PARTS)
    assert ProfileOptions(models=("all",)).presets == tuple(list_models())
