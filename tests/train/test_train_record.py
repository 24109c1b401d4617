"""The loop with --cuda-graph."""

import signal
from dataclasses import replace

import pytest
import torch

from grassland.train.log import read_metrics
from grassland.train.loop import Trainer
from grassland.train.start import run
from grassland.train.tasks import LanguageModeling
from grassland.train.tasks.mlm import MaskedLanguageModeling, MLMConfig
from grassland.train.tasks.vision import ImageClassification

SMALL = ("dim=16", "depth=2", "ffn_dim=16", "rank=4", "offsets=1,2", "dropout=0")
CHOICES = {
    "grassmann": SMALL,
    "attention": (*SMALL[:3], "mixer=attention", "num_heads=2", "dropout=0"),
    "streams": (*SMALL, "residual=kromhc"),
}


def losses(folder):
    events = read_metrics(folder)
    return [e["loss"] for e in events if e["event"] in ("train", "valid", "test")]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("grad_accum", [1, 2])
def test_a_recorded_run_has_the_losses_of_a_plain_one(variant, tmp_path, name, grad_accum):
    settings = {"set": CHOICES[name], "steps": 8, "log_every": 2, "eval_every": 4, "samples": 0, "device": "cuda"}
    found = []
    for choice in (False, True):
        folder = tmp_path / str(choice)
        chosen = variant(out=str(folder), cuda_graph=choice, grad_accum=grad_accum, **settings)
        assert run(LanguageModeling, chosen) == 0
        found.append(losses(folder))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.gpu
def test_a_recorded_run_that_is_resumed_goes_on_as_if_nothing_had_happened(variant, tmp_path, stop_at):
    small = (*SMALL[:-1], "dropout=0.1")
    settings = {"set": small, "steps": 8, "log_every": 1, "eval_every": 0, "save_every": 4, "samples": 0}
    folder = tmp_path / "stopped"
    whole = variant(out=str(tmp_path / "whole"), cuda_graph=True, device="cuda", **settings)
    assert run(LanguageModeling, whole) == 0
    with stop_at(4):
        assert run(LanguageModeling, replace(whole, out=str(folder))) == 128 + signal.SIGTERM
    assert run(LanguageModeling, replace(whole, out=str(folder), resume=str(folder))) == 0
    assert losses(folder) == losses(tmp_path / "whole")


def test_where_nothing_can_be_recorded(variant, vision, tmp_path):
    with pytest.raises(ValueError, match=r"cuda_graph is for one process with a GPU and train lm, not .* lm on cpu"):
        run(LanguageModeling, variant(out=str(tmp_path / "run"), cuda_graph=True, device="cpu"))
    with pytest.raises(ValueError, match=r"not for train vision on cpu"):
        run(ImageClassification, vision(out=str(tmp_path / "run"), cuda_graph=True, device="cpu"))
    masked = MLMConfig(data=variant().data, tokenizer="bpe:280", seq_len=24, steps=1, cuda_graph=True)
    task = MaskedLanguageModeling(masked, torch.device("cpu"))
    task.device = torch.device("cuda")
    with pytest.raises(ValueError, match=r"not for train mlm on cuda with 1 processes"):
        Trainer(task, masked, tmp_path / "run")
    assert not (tmp_path / "run").exists()
