import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grassland.archs import CheckpointError, load_model
from grassland.train.__main__ import main, read_run_config
from grassland.train.checkpoint import load_state
from grassland.train.config import LMConfig, default_lm
from grassland.train.log import read_metrics
from grassland.train.loop import Trainer, TrainingError
from grassland.train.start import run
from grassland.train.tasks import LanguageModeling


def resume(folder, **changes):
    stored = LMConfig.from_dict(json.loads((folder / "config.json").read_text())["run"])
    return run(LanguageModeling, replace(stored, resume=str(folder), **changes))


@pytest.mark.parametrize("given, saved", [({}, 10), ({"save_every": 3}, 3), ({"eval_epochs": None}, 200)])
def test_checkpoints_are_made_with_validations_or_as_often_as_told(variant, tmp_path, given, saved):
    config = variant(**{"eval_epochs": 0.5, "save_every": None, **given})
    task = LanguageModeling(config, torch.device("cpu"))
    task.order.blocks = 20 * config.batch_size
    trainer = Trainer(task, config, tmp_path)
    trainer.log.close()
    assert (trainer.save_every, trainer.eval_every) == (saved, config.eval_every if "eval_epochs" in given else 10)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw"},
        {"optimizer": "muon", "grad_accum": 2},
        {"optimizer": "sgd", "log_every": 4, "dtype": "bf16"},
        {"epochs": 0.7, "schedule": "wsd"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_an_interrupted_run_ends_with_the_very_numbers_of_a_straight_one(variant, changes, assert_resumes):
    assert_resumes(LanguageModeling, variant(**changes), 6)


def test_a_run_killed_after_a_save_repeats_the_lost_steps(variant, tmp_path, monkeypatch, numbers):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(LanguageModeling, variant(out=str(straight)))
    with monkeypatch.context() as patch:
        validate = Trainer.validate

        def die(self):
            validate(self)
            if self.step == 8:
                raise KeyboardInterrupt  # between the validation of step 8 and its save: the state is of step 4

        patch.setattr(Trainer, "validate", die)
        with pytest.raises(KeyboardInterrupt):
            run(LanguageModeling, variant(out=str(killed)))
    assert numbers(killed)[-1]["step"] == 8
    assert resume(killed) == 0
    assert numbers(killed) == numbers(straight)
    assert [event["event"] for event in read_metrics(killed)].count("resume") == 1


def test_a_finished_run_can_be_finished_again_and_made_longer(variant, tmp_path, capsys, numbers):
    folder = tmp_path / "run"
    run(LanguageModeling, variant(out=str(folder)))
    before, end = numbers(folder), read_metrics(folder)[-1]
    assert end["tokens_per_s"] > 0
    assert resume(folder) == 0
    assert numbers(folder) == before
    again = read_metrics(folder)[-1]
    assert (again["event"], again["tokens_per_s"]) == ("end", end["tokens_per_s"])
    assert again["peak_bytes"] >= end["peak_bytes"]
    assert main(["lm", "--resume", str(folder), "--steps", "14"]) == 0
    assert [event["step"] for event in numbers(folder, ("train",))] == list(range(1, 15))
    assert json.loads((folder / "config.json").read_text())["run"]["steps"] == 14
    assert main(["lm", "--resume", str(folder), "--steps", "3"]) == 0
    assert "the run has made 14 steps, more than 3: it is judged, not trained on" in capsys.readouterr().out


def test_metrics_say_what_they_should(variant, tmp_path):
    folder = tmp_path / "run"
    run(LanguageModeling, variant(out=str(folder), log_every=2, grad_accum=2))
    events = read_metrics(folder)
    assert [events[index]["event"] for index in (0, -2, -1)] == ["start", "test", "end"]
    start, end = events[0], events[-1]
    assert torch.__version__.startswith(start["versions"]["torch"]) and start["machine"]["cores"] == os.cpu_count()
    assert start["parameters"] == load_model(folder).num_parameters()
    train = [e for e in events if e["event"] == "train"]
    assert [e["step"] for e in train] == [2, 4, 6, 8, 10, 12]
    for event in train:
        assert {"loss", "lr", "grad_norm", "epoch", "tokens_per_s", "mfu", "elapsed_s"} < event.keys()
        assert event["grad_norm"] > 0 and event["mfu"] is None
    # The first three steps are not timed.
    assert train[0]["tokens_per_s"] is None and all(e["tokens_per_s"] > 0 for e in train[1:])
    blocks = (start["splits"]["train"]["tokens"] - 1) // 16
    assert train[-1]["epoch"] == pytest.approx(12 * 2 * 4 / blocks)
    assert [e["step"] for e in events if e["event"] == "valid"] == [4, 8, 12]
    assert [a["elapsed_s"] <= b["elapsed_s"] for a, b in itertools.pairwise(train)] == [True] * 5
    assert len(end["samples"]) == 1 and len(end["samples"][0]) > 10
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_grad_accumulation_equals_one_large_batch(variant, tmp_path, numbers):
    accumulated, large = tmp_path / "a", tmp_path / "b"
    plain = ("dim=16", "depth=2", "ffn_dim=32", "rank=4", "offsets=1,2")
    run(LanguageModeling, variant(out=str(accumulated), set=plain, batch_size=2, grad_accum=4))
    run(LanguageModeling, variant(out=str(large), set=plain, batch_size=8))
    losses = [[event["loss"] for event in numbers(folder, ("train",))] for folder in (accumulated, large)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_training_learns(variant, tmp_path, numbers):
    folder = tmp_path / "run"
    run(LanguageModeling, variant(out=str(folder), steps=60, log_every=20, eval_every=20))
    start, *_, end = [event["loss"] for event in numbers(folder, ("valid",))]
    assert end < start < 6
    best = min(event["loss"] for event in numbers(folder, ("valid",)))
    task = LanguageModeling(variant(steps=1), torch.device("cpu"))
    assert task.evaluate(load_model(folder), "valid")["loss"] == pytest.approx(best, rel=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(variant, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    loss = LanguageModeling.loss
    calls = iter(range(1000))
    monkeypatch.setattr(LanguageModeling, "loss", lambda *a: loss(*a) * (float("nan") if next(calls) == 13 else 1.0))
    with pytest.raises(TrainingError, match=r"loss nan.* at step 7 \(micro-batch 12, .*checkpoint of step 4 is intact"):
        run(LanguageModeling, variant(out=str(folder), grad_accum=2, log_every=8))
    assert load_state(folder)["step"] == 4
    monkeypatch.undo()
    monkeypatch.setenv("GRASSLAND_CACHE", str(tmp_path / "cache"))
    assert resume(folder) == 0


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(variant, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def full(*arguments):
        raise OSError(28, "No space left on device")

    def save_on_a_full_disk(self):
        with monkeypatch.context() as patch:
            if self.step == 8:
                patch.setattr("os.fsync", full)
            save(self)

    save = Trainer.save
    full_disk = "No space left on device at step 8; the checkpoint of step 4 is intact"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save_on_a_full_disk)
        with pytest.raises(TrainingError, match=full_disk):
            run(LanguageModeling, variant(out=str(folder)))
    assert load_state(folder)["step"] == 4
    load_model(folder)
    assert resume(folder) == 0


def test_other_data_and_other_settings_are_refused(variant, text_file, tmp_path):
    folder = tmp_path / "run"
    run(LanguageModeling, variant(out=str(folder)))
    with pytest.raises(ValueError, match="keeps its batch_size, lr;"):
        read_run_config(LMConfig, default_lm(), ["--resume", str(folder), "--batch-size", "2", "--lr", "1"], "lm")
    text_file.write_text(text_file.read_text() * 2)
    with pytest.raises(CheckpointError, match="saved for the data"):
        resume(folder)


def test_a_signal_to_the_process_saves_and_names_the_command_that_goes_on(variant, tmp_path, numbers):
    straight, folder = tmp_path / "straight", tmp_path / "run"
    settings = variant(steps=400, eval_every=0, save_every=0, log_every=1)
    script = (
        "import json, sys; from grassland.train.config import LMConfig; from grassland.train.start import run;"
        "from grassland.train.tasks import LanguageModeling;"
        "sys.exit(run(LanguageModeling, LMConfig.from_dict(json.loads(sys.argv[1]))))"
    )
    arguments = json.dumps(replace(settings, out=str(folder)).to_dict())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        lines = [process.stdout.readline() for _ in range(5)]
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait() == 143
    assert lines[4].startswith("step 5/400")
    step = load_state(folder)["step"]
    assert 5 <= step < 400
    assert f"stopped by SIGTERM, saved at step {step}: continue with: python -m grassland.train lm --resume" in rest
    stored = json.loads((folder / "config.json").read_text())["run"]
    assert stored["resume"] is None and stored["out"] == str(folder)
    # Both go a few steps on; their losses are those of one uninterrupted run.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(LanguageModeling, replace(settings, out=str(straight), steps=400))
        assert resume(folder) == 0
    finally:
        torch.set_num_threads(threads)
    assert numbers(folder) == numbers(straight)


def test_the_default_folder_is_fresh_each_time(variant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = variant(steps=1, samples=0)
    for _ in range(2):
        assert run(LanguageModeling, settings) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["lm-text.txt", "lm-text.txt-2"]
    assert json.loads(Path("runs/lm-text.txt-2/config.json").read_text())["run"]["out"] == "runs/lm-text.txt-2"


SLOW = """
import time
from grassland.train.tasks.lm import LanguageModeling
build = LanguageModeling.__init__
def build_and_wait(self, *args):
    build(self, *args)
    ready.touch()
    while not go.exists():
        time.sleep(0.01)
LanguageModeling.__init__ = build_and_wait
"""


def slow(tmp_path, number):
    """Code that has a run wait between its data and its folder; the files that tell when it does, and how long."""
    ready, go = tmp_path / f"ready-{number}", tmp_path / f"go-{number}"
    names = f"import pathlib\nready, go = map(pathlib.Path, ({str(ready)!r}, {str(go)!r}))\n"
    return names + SLOW, ready, go


def started(folder):
    return (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text().count("\n") > 2


def test_runs_that_start_together_get_folders_of_their_own(variant, arguments, tmp_path, start, until):
    words, begun, go = arguments(variant(steps=1, samples=0)), [], tmp_path / "go-0"
    for number in range(2):
        code, ready, _ = slow(tmp_path, number)
        code = code.replace(f"go-{number}", "go-0")
        begun.append((*start(words, before=f"import os\nos.chdir({str(tmp_path)!r})\n{code}"), ready))
    until(lambda: all(ready.exists() for *_, ready in begun))
    go.touch()
    for process, output, _ in begun:
        process.join(60)
        assert process.exitcode == 0, output.read_text()
    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name for folder in folders] == ["lm-text.txt", "lm-text.txt-2"]
    for folder in folders:
        events = read_metrics(folder)
        assert [event["event"] for event in events].count("start") == 1 and events[-1]["event"] == "end"
        assert events[0]["config"]["out"] == f"runs/{folder.name}"


def test_a_run_that_goes_on_is_no_other_processes(variant, arguments, tmp_path, start, capsys, until):
    folder = tmp_path / "run"
    long = variant(steps=100_000, eval_every=0, save_every=0, samples=0)
    process, _ = start(arguments(long, out=folder))
    until(lambda: started(folder))
    refused = f"error: {folder}: another process is at work there (process {process.pid} on "
    for words in (["lm", "--resume", folder], arguments(long, out=folder, resume="auto")):
        assert main([*map(str, words)]) == 2
        assert refused in capsys.readouterr().err
    assert main(arguments(long, out=folder)) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    process.kill()
    process.join()
    assert main(["lm", "--resume", str(folder), "--steps", "1"]) == 0


def test_a_folder_that_another_run_has_filled_since_is_left_alone(variant, arguments, tmp_path, start, until):
    folder = tmp_path / "run"
    code, ready, go = slow(tmp_path, 0)
    for resume_ in (None, "auto"):
        process, output = start(
            arguments(variant(samples=0), out=folder, resume=resume_ or variant().resume), before=code
        )
        until(ready.exists)
        assert run(LanguageModeling, variant(out=str(folder), samples=0)) == 0
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
        go.touch()
        process.join(60)
        assert process.exitcode == 2 and f"{folder} is not an empty folder" in output.read_text()
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"} == before
        shutil.rmtree(folder)
        ready.unlink()
        go.unlink()


def test_a_run_that_cannot_begin_leaves_no_folder(variant, tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        with pytest.raises(ValueError, match=r"cuda_graph is for one process .* on cpu with 1 processes"):
            run(LanguageModeling, variant(out=str(tmp_path / name), cuda_graph=True))
        assert not (tmp_path / name).exists()


def test_a_resumed_run_stays_in_its_folder(variant, tmp_path, capsys):
    folder = tmp_path / "run"
    run(LanguageModeling, variant(out=str(folder), steps=1, samples=0))
    assert main(["lm", "--resume", str(folder), "--out", str(tmp_path / "other")]) == 2
    assert (
        f"{folder}: a resumed run goes on in its own folder, got --out {tmp_path / 'other'}" in capsys.readouterr().err
    )
    assert main(["lm", "--resume", str(folder), "--out", f"{folder}/../run"]) == 0


def test_tensorboard_gets_the_same_numbers(variant, tmp_path, numbers):
    folder = tmp_path / "run"
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(LanguageModeling, variant(out=str(folder), tensorboard=True))
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    written = [(scalar.step, scalar.value) for scalar in events.Scalars("train/loss")]
    logged = [(event["step"], event["loss"]) for event in numbers(folder, ("train",))]
    assert [step for step, _ in written] == [step for step, _ in logged]
    assert [value for _, value in written] == pytest.approx([value for _, value in logged], rel=1e-6)
