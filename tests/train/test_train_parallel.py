"""Many processes make the numbers of one."""

import shutil
import signal
import subprocess
import sys

import pytest

from grassland.train.__main__ import main
from grassland.train.config import LMConfig
from grassland.train.log import read_metrics
from grassland.train.parallel import checked_mode
from grassland.train.start import run
from grassland.train.tasks import LanguageModeling
from grassland.train.tasks.mlm import MaskedLanguageModeling
from grassland.train.tasks.vision import ImageClassification

SMALL = ("dim=16", "depth=2", "ffn_dim=32", "rank=4", "offsets=1,2")
MOE = ("dim=16", "depth=2", "ffn_dim=32", "mixer=attention", "num_heads=2", "ffn=shared_moe", "num_experts=4")
QUIET = ("capacity_factor=None", "noise=False", "balance_weight=0.5")
# Nothing random that depends on the process: no dropout, no drop path.
DIGITS = {
    "set": ("channels=4,8,8,8", "stem_width=4", "norm_layer=groupnorm1"),
    "erase": 0.0,
    "auto_augment": None,
    "optimizer": "sgd",
    "head": "grassmann",
    "subspace_dim": 2,
    "clip": 1.0,
}


def curves(folder, *keys):
    """The numbers of training and evaluation, event by event."""
    chosen = [event for event in read_metrics(folder) if event["event"] in ("train", "valid", "test")]
    names = {"loss", "grad_norm", "perplexity", "top1", "ece", *keys}
    return [{key: value for key, value in event.items() if key in names} for event in chosen]


def assert_same(folder, expected, *keys, rel=1e-4):
    found, wanted = curves(folder, *keys), curves(expected, *keys)
    assert len(found) == len(wanted) > 0
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=rel)


@pytest.mark.parametrize(
    "processes, mode, changes",
    [
        (2, "ddp", {"grad_accum": 2, "optimizer": "muon"}),
        (2, "fsdp", {"grad_accum": 2, "optimizer": "muon", "set": (*SMALL, "residual=kromhc", "num_streams=4")}),
        pytest.param(4, "fsdp", {"optimizer": "sgd"}, marks=pytest.mark.slow),
        (2, "ddp", {"set": (*MOE, *QUIET)}),
        pytest.param(4, "ddp", {}, marks=pytest.mark.slow),
        pytest.param(2, "fsdp", {"set": (*MOE, *QUIET)}, marks=pytest.mark.slow),
        pytest.param(4, "fsdp", {"set": (*SMALL, "share=mixer,ffn"), "optimizer": "muon"}, marks=pytest.mark.slow),
        pytest.param(2, "fsdp", {"optimizer": "lamb"}, marks=pytest.mark.slow),
        pytest.param(2, "fsdp", {"set": (*SMALL, "head=grassmann", "subspace_dim=2")}, marks=pytest.mark.slow),
        pytest.param(2, "ddp", {"set": (*SMALL, "residual=mhc")}, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(map(str, value.values())).replace("'", "") if isinstance(value, dict) else str(value),
)
def test_text_processes_have_the_losses_of_one(variant, arguments, launch, tmp_path, processes, mode, changes):
    settings = variant(**{"set": SMALL, "batch_size": 8, "steps": 6, "eval_every": 3, "samples": 0, **changes})
    run(LanguageModeling, variant(**vars(settings) | {"out": str(tmp_path / "one")}))
    launch(processes, *arguments(settings, out=tmp_path / "many", parallel=mode))
    assert_same(tmp_path / "many", tmp_path / "one")


@pytest.mark.parametrize(
    "mode, changes",
    [("ddp", {}), pytest.param("fsdp", {"channels_last": True}, marks=pytest.mark.slow)],
)
def test_image_processes_have_the_losses_of_one(vision, arguments, launch, tmp_path, mode, changes):
    settings = vision(**{**DIGITS, "steps": 4, **changes})
    run(ImageClassification, vision(**vars(settings) | {"out": str(tmp_path / "one")}))
    launch(2, *arguments(settings, out=tmp_path / "many", parallel=mode))
    assert_same(tmp_path / "many", tmp_path / "one", rel=1e-3)


@pytest.mark.parametrize(
    "mode, parts",
    [("ddp", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("fsdp", 1), ("ddp", 2), ("fsdp", 2)))],
)
def test_masked_text_processes_have_the_losses_of_one(mlm, arguments, launch, tmp_path, mode, parts):
    shape = ("dim=16", "depth=2", "ffn_dim=24", "embed_dim=8", "num_heads=2", "max_len=32", "dropout=0")
    # Rows have not equally many masked words; the order of sentences and the balance of experts do not count by them,
    # and the balance is that of a micro-batch.
    balance = ("balance_weight=0.0",) if parts > 1 else ()
    settings = mlm(set=(*shape, *QUIET, *balance), sentence_order=True, batch_size=8, steps=4, log_every=1, samples=0)
    run(MaskedLanguageModeling, mlm(**vars(settings) | {"out": str(tmp_path / "one")}))
    several = {"batch_size": 8 // parts, "grad_accum": parts, "parallel": mode}
    launch(2, *arguments(settings, out=tmp_path / "many", **several))
    assert_same(tmp_path / "many", tmp_path / "one", "accuracy", "order_accuracy", rel=1e-3)
    shares = [[e["expert_share"] for e in read_metrics(tmp_path / f) if "expert_share" in e] for f in ("one", "many")]
    assert shares[0] == shares[1] and len(shares[0]) == 4


def losses(folder):
    return [event["loss"] for event in read_metrics(folder) if event["event"] == "train"]


def test_a_state_saved_by_two_goes_on_with_one_and_with_four(variant, arguments, launch, tmp_path):
    settings = variant(set=SMALL, batch_size=8, steps=4, schedule="constant", samples=0, optimizer="muon", eval_every=0)
    run(LanguageModeling, variant(**vars(settings) | {"out": str(tmp_path / "straight"), "steps": 6}))
    launch(2, *arguments(settings, out=tmp_path / "two", parallel="fsdp"))
    assert list((tmp_path / "two").glob("state-*/*.safetensors"))
    for processes, mode in ((1, "none"), (4, "fsdp")):
        folder = tmp_path / str(processes)
        shutil.copytree(tmp_path / "two", folder)
        again = [str(word) for word in ("lm", "--resume", folder, "--steps", 6)]
        assert main(again) == 0 if processes == 1 else launch(processes, *again, "--parallel", mode)
        assert len(losses(folder)) == 6
        assert losses(folder) == pytest.approx(losses(tmp_path / "straight"), rel=1e-4)
        assert curves(folder)[-1] == pytest.approx(curves(tmp_path / "straight")[-1], rel=1e-4)


@pytest.mark.slow
def test_a_state_of_one_goes_on_in_shards(variant, arguments, launch, tmp_path):
    settings = variant(set=SMALL, batch_size=8, steps=4, schedule="constant", samples=0)
    run(LanguageModeling, variant(**vars(settings) | {"out": str(tmp_path / "straight"), "steps": 6}))
    run(LanguageModeling, variant(**vars(settings) | {"out": str(tmp_path / "run")}))
    launch(2, "lm", "--resume", tmp_path / "run", "--steps", 6, "--parallel", "fsdp")
    assert curves(tmp_path / "run")[-1] == pytest.approx(curves(tmp_path / "straight")[-1], rel=1e-4)


@pytest.mark.slow
def test_processes_with_dropout_resume_to_the_very_numbers(variant, arguments, launch, tmp_path):
    settings = variant(batch_size=8, steps=4, schedule="constant", samples=0, eval_every=0)
    launch(2, *arguments(settings, out=tmp_path / "straight", steps=6))
    launch(2, *arguments(settings, out=tmp_path / "run"))
    launch(2, "lm", "--resume", tmp_path / "run", "--steps", 6)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


STOP_ONE = """
import os, signal
from grassland.train.loop import Trainer
advance = Trainer.advance
def advance_and_signal(self):
    advance(self)
    if self.step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
Trainer.advance = advance_and_signal
import sys
real = os._exit
os._exit = lambda code: real(0 if code == 143 else 1)
"""


def test_a_signal_to_one_process_stops_all_at_the_same_step(variant, arguments, launch, tmp_path):
    settings = variant(set=SMALL, batch_size=8, samples=0)
    said = launch(2, *arguments(settings, out=tmp_path / "run"), before=STOP_ONE)
    assert "stopped by SIGTERM, saved at step 4: continue with: torchrun --nproc-per-node 2 -m grassland.train" in said


def test_gradients_are_exchanged_once_a_step(variant, arguments, launch, tmp_path):
    count = """
from torch.nn.parallel import DistributedDataParallel as DDP
forward, synced = DDP.forward, []
def counting(self, *args, **keywords):
    synced.append(self.require_backward_grad_sync)
    return forward(self, *args, **keywords)
DDP.forward = counting
import atexit, os
real = os._exit
os._exit = lambda code: (print("synced", synced[:6], flush=True), real(code))
"""
    settings = variant(set=SMALL, batch_size=8, grad_accum=3, steps=2, samples=0)
    said = launch(2, *arguments(settings, out=tmp_path / "run"), before=count)
    assert "synced [False, False, True, False, False, True]" in said


@pytest.mark.parametrize(
    "environment, mode, batch_size, message",
    [
        ({}, "ddp", 4, "torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "none", 4, "2 times the same"),
        ({"RANK": "0", "WORLD_SIZE": "3"}, None, 4, "multiple of 3, got 4"),
    ],
)
def test_what_cannot_be_spread_is_said(monkeypatch, environment, mode, batch_size, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        checked_mode(mode, batch_size)


def test_the_mode_follows_the_launcher_and_is_no_setting_of_the_run(monkeypatch, config):
    assert checked_mode(None, 3) == "none"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert checked_mode(None, 4) == "ddp" and checked_mode("fsdp", 4) == "fsdp"
    assert LMConfig.from_dict({**config.to_dict(), "parallel": "fsdp"}).to_dict()["parallel"] is None
    with pytest.raises(ValueError, match="parallel must be one of"):
        LMConfig(steps=1, parallel="tensor")  # type: ignore[arg-type]


DIE_ONCE = """
import os, signal
from grassland.train.loop import Trainer
advance = Trainer.advance
def advance_and_die(self):
    advance(self)
    if self.step == 6 and os.environ["RANK"] == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)
Trainer.advance = advance_and_die
"""


@pytest.mark.slow
def test_torchrun_starts_again_after_a_kill(variant, arguments, tmp_path):
    settings = variant(set=SMALL, batch_size=8, steps=8, samples=0, save_every=2)
    run(LanguageModeling, variant(**vars(settings) | {"out": str(tmp_path / "straight")}))
    script = tmp_path / "script.py"
    main_call = "import sys; from grassland.train.__main__ import main; sys.exit(main(sys.argv[1:]))"
    script.write_text(f"{DIE_ONCE}\n{main_call}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [str(word) for word in arguments(settings, out=tmp_path / "run", resume="auto", parallel="fsdp")]
    command = [*torchrun, "--max-restarts", "1", str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", tmp_path / "straight")
    assert [event["event"] for event in read_metrics(tmp_path / "run")].count("resume") == 1


def test_a_process_that_has_lost_another_says_so(variant, arguments, start_all, tmp_path):
    words = arguments(variant(set=SMALL, batch_size=8, samples=0, log_every=100), out=tmp_path / "run")
    (first, said), (second, _) = start_all(2, words, DIE_ONCE)
    second.join(600)
    first.join(600)
    assert second.exitcode == -signal.SIGKILL and first.exitcode == 2, said.read_text()
    assert "another process of the run is gone" in said.read_text()
    assert "the checkpoint of step 4 is intact: continue with: torchrun" in said.read_text()


@pytest.mark.parametrize("wrong", ["data", "mixing"])
def test_a_mistake_in_the_settings_is_one_line_of_every_process(variant, vision, arguments, start_all, tmp_path, wrong):
    missing = tmp_path / "missing.txt"
    settings, message = {
        "data": (variant(data=str(missing)), f"error: data {missing}: no such file or folder\n"),
        # Three rows a process cannot be mixed in pairs.
        "mixing": (
            vision(batch_size=6),
            "error: batch_size must be a multiple of twice the 2 processes for mixup and cutmix, got 6\n",
        ),
    }[wrong]
    for process, said in start_all(2, arguments(settings, out=tmp_path / "run")):
        process.join(600)
        assert (process.exitcode, said.read_text()) == (2, message)
    assert not (tmp_path / "run").exists()
