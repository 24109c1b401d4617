"""What goes wrong on real machines loses nothing but the unsaved steps, and says what to do."""

import errno
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import get_worker_info

from grassland.archs import CheckpointError, load_model
from grassland.train.__main__ import main
from grassland.train.checkpoint import PREVIOUS_FILE, STATE_FILE, load_state
from grassland.train.data.errors import obituary
from grassland.train.data.images import Arrays
from grassland.train.log import MetricsLog, read_metrics
from grassland.train.loop import Trainer, TrainingError
from grassland.train.start import run
from grassland.train.tasks import LanguageModeling
from grassland.train.tasks.vision import ImageClassification
from grassland.train.watch import MAX_SKIPS

VOLATILE = {"elapsed_s", "tokens_per_s", "images_per_s"}


def numbers(folder):
    chosen = [event for event in read_metrics(folder) if event["event"] in ("train", "valid", "test", "skip")]
    return [{key: value for key, value in event.items() if key not in VOLATILE} for event in chosen]


@pytest.fixture
def straight(variant, tmp_path):
    """A run that nothing happens to."""
    folder = tmp_path / "straight"
    assert run(LanguageModeling, variant(out=str(folder), samples=0)) == 0
    return folder


@pytest.fixture
def again(variant, tmp_path):
    """Starts or continues a run of the same settings in this process."""
    return lambda **changes: run(
        LanguageModeling, variant(**{"out": str(tmp_path / "run"), "resume": "auto", "samples": 0, **changes})
    )


def assert_finished_like(folder, straight):
    assert numbers(folder) == numbers(straight)
    for name in ("model.safetensors", STATE_FILE):
        assert len((folder / name).read_bytes()) > 0
    ours, theirs = load_state(folder), load_state(straight)
    assert all(torch.equal(ours["model"][name], tensor) for name, tensor in theirs["model"].items())
    assert not list(folder.glob(".*.tmp"))


KILL_IN_TIME = """
import os, signal, threading
from grassland.train.loop import Trainer
start = Trainer.__init__
def start_and_die(self, *args):
    threading.Timer({delay}, os.kill, (os.getpid(), signal.SIGKILL)).start()
    start(self, *args)
Trainer.__init__ = start_and_die
"""

KILL_AT_CALL = """
import os, signal, pathlib
left = [{call}]
def dying(function):
    def call(*args, **keywords):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **keywords)
    return call
os.fsync = dying(os.fsync)
for name in ("replace", "hardlink_to", "open"):
    setattr(pathlib.Path, name, dying(getattr(pathlib.Path, name)))
"""


@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_with_the_numbers_of_one(variant, arguments, start, tmp_path, kills):
    settings = variant(steps=60, log_every=5, eval_every=10, save_every=3, samples=0)
    assert run(LanguageModeling, variant(**vars(settings) | {"out": str(tmp_path / "straight")})) == 0
    words = arguments(settings, out=tmp_path / "run", resume="auto")
    draw, killed = random.Random(kills), 0
    for _ in range(kills):
        process, output = start(words, before=KILL_IN_TIME.format(delay=draw.uniform(0, 1.0)))
        process.join(600)
        assert process.exitcode in (0, -signal.SIGKILL), output.read_text()
        killed += process.exitcode != 0
    assert killed > 0
    process, output = start(words)
    process.join(600)
    assert process.exitcode == 0, output.read_text()
    assert_finished_like(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("calls", [(3, 10, 15, 17), pytest.param(range(1, 40), marks=pytest.mark.slow)])
def test_a_kill_at_a_call_of_writing_leaves_a_state(variant, arguments, start, straight, tmp_path, calls):
    for call in calls:
        folder = tmp_path / f"run-{call}"
        words = arguments(variant(samples=0), out=folder, resume="auto")
        process, output = start(words, before=KILL_AT_CALL.format(call=call))
        process.join(600)
        assert process.exitcode == -signal.SIGKILL, output.read_text()
        assert run(LanguageModeling, variant(out=str(folder), resume="auto", samples=0)) == 0
        assert_finished_like(folder, straight)


@pytest.mark.parametrize("calls", [(2, 9, 14, 20), pytest.param(range(1, 40), marks=pytest.mark.slow)])
def test_a_disk_that_is_full_at_a_call_of_writing_leaves_a_state(again, straight, tmp_path, monkeypatch, calls):
    for call in calls:
        left = [call]
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", lambda descriptor, left=left: _full_after(left))
            for name in ("replace", "mkdir"):
                patch.setattr(Path, name, _filling(getattr(Path, name), left))
            with pytest.raises((TrainingError, OSError), match="No space left"):
                again()
        assert again() == 0
        assert_finished_like(tmp_path / "run", straight)
        shutil.rmtree(tmp_path / "run")


def _full_after(left):
    left[0] -= 1
    # A disk that is full stays full.
    if left[0] <= 0:
        raise OSError(errno.ENOSPC, "No space left on device")


def _filling(function, left):
    def call(*args, **keywords):
        _full_after(left)
        return function(*args, **keywords)

    return call


LIMIT_FILES = """
import os, resource
from grassland.train.loop import Trainer
advance = Trainer.advance
def advance_and_limit(self):
    advance(self)
    if self.step == 6:
        limit = os.path.getsize(self.folder / "metrics.jsonl") + {more}
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
Trainer.advance = advance_and_limit
"""


@pytest.mark.parametrize("more", [20, 10_000], ids=["log", "state"])
def test_a_file_that_cannot_grow_stops_the_run_with_advice(variant, arguments, start, again, straight, tmp_path, more):
    words = arguments(variant(samples=0), out=tmp_path / "run")
    process, output = start(words, before=LIMIT_FILES.format(more=more))
    process.join(600)
    said = output.read_text()
    assert process.exitcode == 2 and "Traceback" not in said
    assert "File too large at step" in said
    assert "the checkpoint of step 4 is intact: continue with: python -m grassland.train lm --resume" in said
    assert again() == 0
    assert_finished_like(tmp_path / "run", straight)


def damage(path, kind):
    content = path.read_bytes()
    path.unlink()
    if kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(random.Random(0).randbytes(len(content)))


@pytest.mark.parametrize("name", [STATE_FILE, "config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl"])
@pytest.mark.parametrize("kind", ["cut", "gone", "empty", "noise"])
def test_any_one_file_of_a_run_can_be_damaged(variant, straight, tmp_path, capsys, stop_at, name, kind):
    folder = tmp_path / "run"
    with stop_at(10):
        run(LanguageModeling, variant(out=str(folder), samples=0))
    damage(folder / name, kind)
    capsys.readouterr()
    assert main(["lm", "--resume", str(folder)]) == 0
    captured = capsys.readouterr()
    if name != "metrics.jsonl":
        assert name in captured.err + captured.out
        events = [event for event in numbers(folder) if event["event"] != "valid"]
        assert events == [event for event in numbers(straight) if event["event"] != "valid"]
    ours, theirs = load_state(folder), load_state(straight)
    assert ours["step"] == 12
    assert all(torch.equal(ours["model"][key], tensor) for key, tensor in theirs["model"].items())
    load_model(folder)
    assert json.loads((folder / "config.json").read_text())["run"]["steps"] == 12


def test_damage_to_both_states_is_one_line_that_says_what_to_do(straight, capsys):
    for name in (STATE_FILE, PREVIOUS_FILE):
        damage(straight / name, "cut")
    assert main(["lm", "--resume", str(straight)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{STATE_FILE}: corrupt or truncated" in error and "start anew" in error


def test_what_is_not_finite_is_null_in_the_log_and_metrics_are_read_back_as_nan(tmp_path):
    log = MetricsLog(tmp_path)
    log.write("train", 1, loss=None, expert_load=[0.5, math.nan])
    log.write("valid", 1, loss=math.nan, perplexity=math.inf, top1=0.5, best=False)
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["loss"] for line in lines] == [None, None]
    train, valid = read_metrics(tmp_path)
    assert (train["loss"], train["expert_load"]) == (None, [0.5, None])
    assert math.isnan(valid["loss"]) and math.isnan(valid["perplexity"])
    assert (valid["top1"], valid["best"]) == (0.5, False)


def poisoned(monkeypatch, calls, value=float("nan")):
    """The losses of these micro-batches are not finite, and a buffer notices."""
    loss, count = LanguageModeling.loss, iter(range(1000))
    monkeypatch.setattr(LanguageModeling, "loss", lambda *a: loss(*a) * (value if next(count) in calls else 1.0))


def test_a_step_that_is_not_finite_is_skipped_without_a_trace(variant, tmp_path, monkeypatch):
    folder, states = tmp_path / "run", []
    poisoned(monkeypatch, {10, 11, 12})  # micro-batches 0 … 23, two a step: steps 6 and 7
    advance = Trainer.advance

    def looking(self):
        advance(self)
        state = {**self.task.model.state_dict(), **_flat(self.optimizer.state_dict())}
        states.append({key: value.clone() for key, value in state.items()})

    monkeypatch.setattr(Trainer, "advance", looking)
    assert run(LanguageModeling, variant(out=str(folder), on_nan="skip", grad_accum=2, log_every=4, samples=0)) == 0
    same = [all(torch.equal(b[key], a[key]) for key in a) for a, b in itertools.pairwise(states)]
    assert [step for step, unchanged in enumerate(same, 2) if unchanged] == [6, 7]
    events = read_metrics(folder)
    skips = [event for event in events if event["event"] == "skip"]
    assert [(event["step"], event["position"], event["loss"]) for event in skips] == [(6, 10, "nan"), (7, 12, "nan")]
    assert [event["skipped_steps"] for event in events if event["event"] == "train"] == [0, 2, 0]
    assert all(event["loss"] > 0 for event in events if event["event"] == "train")


def _flat(state):
    found = {}
    for index, entry in state["state"].items():
        found |= {f"{index}.{name}": value for name, value in entry.items() if isinstance(value, torch.Tensor)}
    return found


def test_skipped_images_leave_running_statistics_and_averages_alone(vision, tmp_path, monkeypatch):
    settings = vision(out=str(tmp_path / "run"), on_nan="skip", steps=3)
    loss, calls = ImageClassification.loss, iter(range(100))

    def poisoned_loss(self, model, batch):
        factor = float("nan") if next(calls) == 1 else 1.0
        return loss(self, model, batch._replace(images=batch.images * factor))

    monkeypatch.setattr(ImageClassification, "loss", poisoned_loss)
    seen = []
    advance = Trainer.advance

    def looking(self):
        advance(self)
        average = self.task.average
        state = {**self.task.model.state_dict(), **{f"ema.{k}": v for k, v in average.model.state_dict().items()}}
        seen.append(({key: value.clone() for key, value in state.items()}, average.updates))

    monkeypatch.setattr(Trainer, "advance", looking)
    assert run(ImageClassification, settings) == 0
    assert all(torch.equal(seen[1][0][key], value) for key, value in seen[0][0].items())
    assert [updates for _, updates in seen] == [1, 1, 2]


def test_too_many_skips_in_a_row_stop_the_run(variant, tmp_path, monkeypatch):
    poisoned(monkeypatch, set(range(5, 40)), float("inf"))
    match = rf"step {4 + MAX_SKIPS + 1} .*{MAX_SKIPS} steps in a row skipped; .* step 12 is intact.* lower --lr"
    with pytest.raises(TrainingError, match=match):
        run(LanguageModeling, variant(out=str(tmp_path / "run"), on_nan="skip", steps=40))


def test_a_run_that_stopped_at_a_nan_can_go_on_skipping(variant, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        poisoned(patch, {6})
        with pytest.raises(TrainingError, match=r"step 7 \(micro-batch 6, .*step 4 is intact: .* --on-nan skip"):
            run(LanguageModeling, variant(out=str(folder), samples=0))
    assert [(e["step"], e["position"]) for e in read_metrics(folder) if e["event"] == "nan"] == [(7, 6)]
    poisoned(monkeypatch, {2})
    assert main(["lm", "--resume", str(folder), "--on-nan", "skip"]) == 0
    assert [event["step"] for event in read_metrics(folder) if event["event"] == "skip"] == [7]


def test_a_data_worker_that_dies_stops_the_run_with_advice(vision, tmp_path, monkeypatch):
    folder, opened = tmp_path / "run", Arrays.open

    def dying(self, index):
        info = get_worker_info()
        if info is not None and (folder / PREVIOUS_FILE).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return opened(self, index)

    settings = vision(out=str(folder), workers=1, steps=16, save_every=2, eval_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(Arrays, "open", dying)
        with pytest.raises(TrainingError, match=r"has died .*fewer --workers.*; the checkpoint of step \d+ is intact"):
            run(ImageClassification, settings)
    assert main(["vision", "--resume", str(folder), "--workers", "0"]) == 0


def test_the_death_of_a_data_worker_is_known_wherever_it_is_told(variant, tmp_path, monkeypatch):
    def told(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with monkeypatch.context() as patch:
        patch.setattr("grassland.train.data.errors.time.sleep", told)
        assert "pid 7" in str(obituary())
    monkeypatch.setattr("grassland.train.data.errors.GRACE", 0.0)
    assert obituary() is None
    monkeypatch.setattr(LanguageModeling, "after_step", told)
    with pytest.raises(TrainingError, match=r"has died \(DataLoader worker \(pid 7\).*fewer --workers"):
        run(LanguageModeling, variant(out=str(tmp_path / "run")))


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a checkpoint has executed code')",)


@pytest.mark.parametrize("name", [STATE_FILE, "config.json", "model.safetensors", "tokenizer.json"])
def test_a_pickle_in_the_place_of_a_file_is_refused(straight, capsys, name):
    (straight / PREVIOUS_FILE).unlink()
    (straight / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SystemExit, match="executed"):
        pickle.loads((straight / name).read_bytes())
    if name == STATE_FILE:
        with pytest.raises(CheckpointError, match=name):
            load_state(straight)
        return
    assert main(["sample", str(straight)]) == 2
    assert name in capsys.readouterr().err


def test_loading_unpickles_nothing(straight, variant, monkeypatch, tmp_path):
    def refuse(*args, **keywords):
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setitem(sys.modules, "_pickle", None)
    load_state(straight)
    load_model(straight)


def test_auto_needs_a_folder_and_leaves_strangers_alone(variant, tmp_path):
    with pytest.raises(ValueError, match="resume 'auto' needs --out"):
        run(LanguageModeling, variant(resume="auto"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        run(LanguageModeling, variant(resume="auto", out=str(tmp_path / "full")))


def test_auto_on_the_command_line_starts_and_continues(variant, arguments, tmp_path, capsys):
    words = arguments(variant(steps=4, schedule="constant", samples=0), out=tmp_path / "run", resume="auto")
    assert main(words) == 0
    longer = arguments(variant(steps=6, schedule="constant", samples=0), out=tmp_path / "run", resume="auto")
    assert main(longer) == 0
    assert [event["event"] for event in read_metrics(tmp_path / "run")].count("resume") == 1
    other = arguments(variant(steps=6, lr=0.5, schedule="constant"), out=tmp_path / "run", resume="auto")
    assert main(other) == 2
    assert "keeps its lr" in capsys.readouterr().err
