"""The loop with --compile."""

import pytest
import torch

from grassland.train.log import read_metrics
from grassland.train.start import run
from grassland.train.tasks import LanguageModeling


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_run_has_the_losses_of_a_plain_one(variant, tmp_path, monkeypatch, backend):
    compile, seen = torch.compile, []

    def compiled(model, **options):
        seen.append(type(model).__name__)
        return compile(model, backend=backend)

    monkeypatch.setattr(torch, "compile", compiled)
    small = ("dim=16", "depth=1", "ffn_dim=16", "rank=4", "offsets=1,2", "dropout=0")
    settings = {"set": small, "steps": 3, "eval_every": 0, "samples": 0}
    losses = []
    for choice in (False, True):
        folder = tmp_path / str(choice)
        assert run(LanguageModeling, variant(out=str(folder), compile=choice, **settings)) == 0
        events = read_metrics(folder)
        losses.append([e["loss"] for e in events if e["event"] in ("train", "valid", "test")])
    assert seen == ["LanguageModel"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
