"""Comparisons: what is run, what is skipped, how a learning rate is chosen, and the report."""

import json
import math
import multiprocessing.connection
import os
import signal
import statistics
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from grassland.archs.io import FORMAT, VERSION
from grassland.train.__main__ import main
from grassland.train.checkpoint import load_state
from grassland.train.compare import Comparison, figure
from grassland.train.compare.execute import Runner, in_short
from grassland.train.compare.figure import plot
from grassland.train.compare.options import CompareOptions
from grassland.train.compare.presets import PRESETS, load_comparisons
from grassland.train.compare.report import arm_table, footnote, is_complete, read_records, section, write_report
from grassland.train.compare.results import is_diverged, select
from grassland.train.compare.statistics import holm, paired, spread
from grassland.train.config import LMConfig
from grassland.train.env import hardware
from grassland.train.log import UNTIMED_STEPS, MetricsLog, read_metrics
from grassland.train.loop import Trainer
from grassland.train.tasks.lm import LanguageModeling
from grassland.train.watch import MAX_SKIPS

HOLD = """
import pathlib, time
from grassland.train.lock import held
folder = pathlib.Path({folder!r})
with held(folder):
    (folder / "held").touch()
    time.sleep(600)
"""


def written(config, folder, **changes):
    """A comparison of two mixers as a JSON file, at the size of `config`."""
    settings = {**config.to_dict(), "model": "lm", "samples": 0, "set": ["dim=16", "depth=1", "ffn_dim=32"]}
    content = {
        "name": "tiny",
        "title": "Two tiny mixers",
        "task": "lm",
        "settings": {name: value for name, value in settings.items() if name not in ("out", "resume", "lr", "seed")},
        "arms": {"attention": {"set": ["mixer=attention"]}, "grassmann": {"set": ["rank=4"]}},
        "lrs": [0.01],
        "seeds": [0, 1],
    }
    path = folder / "tiny.json"
    path.write_text(json.dumps(content | changes))
    return path


def run(path, out, *arguments):
    return main(["compare", str(path), "--out", str(out), *arguments])


def store(folder, config, loss, rates=(50.0,), **facts):
    """The folder of a finished run that nobody has made."""
    folder.mkdir(parents=True)
    content = {"format": FORMAT, "version": VERSION, "model": {}, "run": config.to_dict()}
    (folder / "config.json").write_text(json.dumps(content))
    metrics = {"loss": loss, "perplexity": math.exp(loss)}
    machine = {"cpu": "Xeon", "cpu_capability": "AVX2", "threads": 2, "gpus": []}
    start = {"parameters": 1000, "commit": "c", "date": "d", "machine": machine, "versions": {"torch": "2"}, **facts}
    log = MetricsLog(folder)
    log.write("start", 0, config=config.to_dict(), **start)
    for rate in rates:
        log.write("train", 12, loss=loss, tokens_per_s=rate)
    log.write("valid", 12, **metrics, best=True, elapsed_s=1.0)
    log.write("test", 12, **metrics)
    log.write("end", 12, best_step=12, flops_per_unit=3e6, tokens_per_s=50.0, peak_bytes=2**21, elapsed_s=1.0)
    log.close()


@pytest.fixture
def plan(config):
    """A comparison of two arms at one learning rate."""
    return Comparison("tiny", "Tiny", {"a": config, "b": replace(config, clip=0.5)}, (0.01,))


def store_run(plan, out, arm, lr, seed, loss, **facts):
    store(out / arm / f"lr{lr:g}-seed{seed}", plan.config(arm, lr, seed), loss, **facts)


def test_grid_then_seeds_then_nothing_is_run_twice(config, tmp_path, capsys):
    path, out = written(config, tmp_path, lrs=[1e-5, 0.01]), tmp_path / "out"
    assert run(path, out, "--widen", "0") == 0
    records = read_records(out / "report.jsonl")
    runs = [(r["arm"], r["lr"], r["seed"]) for r in records]
    grid = [(arm, lr, 0) for lr in (1e-5, 0.01) for arm in ("attention", "grassmann")]
    assert runs == [*grid, ("attention", 0.01, 1), ("grassmann", 0.01, 1)]
    assert [r["chosen"] for r in records] == [False, False, True, True, True, True]
    assert (out / "tiny.png").stat().st_size > 10_000
    for record in records:
        events = read_metrics(out / "tiny" / record["arm"] / f"lr{record['lr']:g}-seed{record['seed']}")
        best = min((e for e in events if e["event"] == "valid"), key=lambda e: e["loss"])
        assert record["valid"]["perplexity"] == best["perplexity"] and record["curve"]["step"] == [4, 8, 12]
        assert record["curve"]["units"] == [256, 512, 768] and record["peak_bytes"] > 2**20
        assert record["flops_per_unit"] == 3 * LanguageModeling(
            replace(config, set=record["differs"]["set"]), torch.device("cpu")
        ).model.flops_per_token(16)
        (start, *_) = events
        words = {split: counts["words"] for split, counts in start["splits"].items()}
        assert (record["tokenizer"], record["vocab_size"], record["words"]) == ("bpe:280", start["vocab_size"], words)
    report = (out / "report.md").read_text()
    assert "| attention | 0.01* |" in report and section(records) in report
    text, test = records[-1], [r["test"]["bits_per_byte"] for r in records if r["chosen"] and r["arm"] == "grassmann"]
    assert f"{text['words']['train']:,} + {text['words']['valid']:,} + {text['words']['test']:,} words" in report
    assert f"Tokeniser: bpe:280 of {text['vocab_size']} tokens (hash with the text {start['data'][:8]})." in report
    assert "| arm | valid word perplexity | test word perplexity | valid bits per byte | test bits per byte |" in report
    assert f"| {statistics.mean(test):.3f} ± {statistics.stdev(test):.3f} |\n\nWords are" in report

    logs = {log: log.stat().st_mtime_ns for log in out.glob("tiny/*/*.log")}
    assert run(path, out, "--widen", "0") == 0
    assert read_records(out / "report.jsonl") == records
    assert {log: log.stat().st_mtime_ns for log in out.glob("tiny/*/*.log")} == logs
    capsys.readouterr()
    assert run(path, out, "--settings", "batch_size=2") == 2
    assert "a run with other settings is there: batch_size=4 (now 2)" in capsys.readouterr().err


def test_a_grid_is_widened_where_an_arm_is_best_at_its_end(config, tmp_path):
    path, out = written(config, tmp_path, lrs=[0.001, 0.01], seeds=[0]), tmp_path / "out"
    assert run(path, out, "--widen", "1") == 0
    records = read_records(out / "report.jsonl")
    best = select(records[:4], 0)
    wider = [(arm, best[arm].beyond, 0) for arm in ("attention", "grassmann")]
    assert [(r["arm"], r["lr"], r["seed"]) for r in records[4:]] == wider  # of two rates the best one is always an end
    lrs = {lr for _, lr, _ in wider}
    assert lrs <= {0.1, 0.0001} and all(f"lr {lr:g}" in (out / "report.md").read_text() for lr in lrs)
    with pytest.raises(ValueError, match="widen must be at least 0, got -1"):
        CompareOptions("x", widen=-1)


def test_a_report_alone_takes_no_rate_as_tried_that_was_not_run(config, tmp_path):
    path, out = written(config, tmp_path, lrs=[0.001, 0.01], seeds=[0]), tmp_path / "out"
    assert run(path, out, "--widen", "0") == 0
    narrow = read_records(out / "report.jsonl")
    assert run(path, out, "--report-only") == 0
    assert read_records(out / "report.jsonl") == narrow and sum(r["edge"] for r in narrow) == 2
    assert run(path, out, "--widen", "1") == 0
    wide = read_records(out / "report.jsonl")
    assert run(path, out, "--report-only") == 0
    assert read_records(out / "report.jsonl") == wide and len(wide) == len(narrow) + 2


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_rate_that_diverges_has_been_tried(variant, tmp_path, on_nan):
    path, out = written(variant(on_nan=on_nan), tmp_path, lrs=[0.001, 0.01, 1e30], seeds=[0]), tmp_path / "out"
    for options, told in (["--widen", "0"], "loss nan"), (["--widen", "0", "--report-only"], "diverged"):
        assert run(path, out, *options) == 0
        records = read_records(out / "report.jsonl")
        assert all(r["diverged"] and told in r["error"] for r in records if r["lr"] == 1e30)
        assert not any(r["edge"] for r in records) and {r["lr"] for r in records if r["chosen"]} == {0.01}


def test_a_rate_without_a_result_was_of_the_grid_all_the_same(plan, tmp_path):
    for arm in ("a", "b"):
        store_run(plan, tmp_path, arm, 0.01, 0, 2.0)
    records = Runner(replace(plan, lrs=(0.01, 0.02), seeds=(0,)), tmp_path, None).records()
    assert "; the learning rate is the best of the grid" in section(records)


def test_steps_that_were_skipped_are_no_divergence(config, tmp_path):
    """Not enough of them in a row, or a run that went on after them."""
    for name, skipped, more, expected in (
        ("few", range(1, MAX_SKIPS), (), False),
        ("apart", (1, *range(3, MAX_SKIPS + 2)), (), False),
        ("many", range(3, MAX_SKIPS + 3), (), True),
        ("past", range(3, MAX_SKIPS + 3), ("resume",), False),
    ):
        (tmp_path / name).mkdir()
        log = MetricsLog(tmp_path / name)
        for step in skipped:
            log.write("skip", step)
        for event in more:
            log.write(event, 20)
        log.close()
        assert is_diverged(tmp_path / name) is expected


def test_runs_at_a_time_come_to_the_same(config, tmp_path, monkeypatch):
    path, wait, together = written(config, tmp_path), multiprocessing.connection.wait, []

    def counting(sentinels, *timeout):
        if not timeout:  # with one it is a process that is joined
            together.append(len(sentinels))
        return wait(sentinels, *timeout)

    monkeypatch.setattr(multiprocessing.connection, "wait", counting)
    assert run(path, tmp_path / "one") == 0
    assert max(together) == 1
    assert run(path, tmp_path / "three", "--jobs", "3") == 0
    assert max(together) == 3
    one, three = (read_records(tmp_path / name / "report.jsonl") for name in ("one", "three"))
    assert [(r["arm"], r["seed"]) for r in three] == [(arm, s) for s in (0, 1) for arm in ("attention", "grassmann")]
    assert [(r["valid"], r["test"]) for r in one] == [(r["valid"], r["test"]) for r in three]
    # What shared the machine is timed once more by itself.
    assert not any("alone" in r for r in one) and all(r["alone"]["steps"] == 70 for r in three)
    report = (tmp_path / "three" / "report.md").read_text()
    threads, rate = three[0]["alone"]["threads"], three[0]["alone"]["units_per_s"]
    assert f"Throughput: 70 steps of each arm alone with {threads} threads." in report and f"| {rate:,.0f} |" in report
    for again in (["--report-only"], []):
        assert run(path, tmp_path / "three", *again) == 0
        assert read_records(tmp_path / "three" / "report.jsonl") == three
    with pytest.raises(ValueError, match="jobs must be positive, got 0"):
        CompareOptions("x", jobs=0)


def test_a_rate_alone_is_of_the_chosen_learning_rate_and_says_where_it_is_from(plan, tmp_path):
    plan = replace(plan, seeds=(0,))
    for arm in ("a", "b"):
        store_run(plan, tmp_path, arm, 0.01, 0, 2.0)
    short = in_short(plan.config("a", 0.01, 0), str(tmp_path / "a" / "alone-lr0.01"))
    store(tmp_path / "a" / "alone-lr0.01", short, 0.0, (9000.0, 40.0, 60.0, 50.0), commit="e", date="later")
    store(tmp_path / "b" / "alone-lr0.02", short, 0.0, (1.0, 2.0))
    records = Runner(plan, tmp_path, None).records()
    rate = {"units_per_s": 50.0, "steps": 12, "commit": "e", "date": "later", "torch": "2", "device": "cpu"}
    assert records[0]["alone"] == rate | {"cpu": "Xeon", "cpu_capability": "AVX2", "threads": 2, "gpus": []}
    assert "alone" not in records[1]
    assert "d, commit c, later, commit e." in section(records)
    assert "12 steps of each arm alone with 2 threads." in section(records)
    elsewhere = records[0]["alone"] | {"cpu": "EPYC", "cpu_capability": "AVX512"}
    first, *others = records
    assert "12 steps of each arm alone on EPYC (AVX512), 2 threads." in section([first | {"alone": elsewhere}, *others])
    other = Comparison("x", "x", {"a": replace(plan.arms["a"], batch_size=8)}, (0.01,), (3,))
    store_run(other, tmp_path, "a", 0.01, 3, 2.0)
    with pytest.raises(ValueError, match=r"alone-lr0\.01: a run with other settings is there: batch_size=4 \(now 8\)"):
        Runner(other, tmp_path, None).records()


def test_throughput_of_runs_that_shared_the_device_is_never_taken_for_their_own(config, tmp_path, monkeypatch):
    """The comparison was killed before the arms were timed alone, and goes on with one run at a time, or not at all."""
    path, out = written(config, tmp_path), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Runner, "_alone", lambda *_: None)
        assert run(path, out, "--jobs", "2") == 0
    assert run(path, out, "--report-only") == 0
    told = "Throughput of attention, grassmann: of the runs, which shared the device."
    assert told in (out / "report.md").read_text()
    assert run(path, out) == 0
    assert all(r["alone"]["steps"] == 70 for r in read_records(out / "report.jsonl"))
    report = (out / "report.md").read_text()
    assert "Throughput: 70 steps of each arm alone" in report and told not in report


def test_runs_at_a_time_share_the_threads(config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert run(written(config, tmp_path), tmp_path / "out", "--jobs", "2") == 0
    assert {r["threads"] for r in read_records(tmp_path / "out" / "report.jsonl")} == {3}


def test_an_arm_that_lacks_a_seed_says_so(plan, tmp_path):
    for arm, seeds in (("a", (0, 1, 2)), ("b", (0, 2))):
        for seed in seeds:
            store_run(plan, tmp_path, arm, 0.01, seed, 2.0 + seed / 8)
    report = arm_table(Runner(plan, tmp_path, None).records())
    assert "| a | 0.01 |" in report and "| b (2 of 3 seeds) | 0.01 |" in report


def test_a_table_names_every_code_precision_and_length_that_it_is_of(plan, tmp_path):
    arms = {"a": plan.arms["a"], "b": replace(plan.arms["b"], dtype="bf16")}
    plan = Comparison("tiny", "Tiny", arms, (0.01,), (0,))
    store_run(plan, tmp_path, "a", 0.01, 0, 2.0)
    store_run(plan, tmp_path, "b", 0.01, 0, 2.0, versions={"torch": "3"}, commit="e")
    folder = tmp_path / "a" / "lr0.01-seed0"
    first, *rest = (folder / "metrics.jsonl").read_text().splitlines()
    machine = {"cpu": "EPYC", "cpu_capability": "AVX512", "threads": 1, "gpus": [], "requested_backend": "eager"}
    later = {"event": "resume", "step": 4, "commit": "f", "date": "later", "machine": machine}
    lines = [first, json.dumps(later | {"versions": {"torch": "4"}}), *rest]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    records = Runner(plan, tmp_path, None).records()
    said = "Xeon (AVX2), 2 threads; EPYC (AVX512), 1 thread, backend eager, float32, bf16, torch 2, 4, 3"
    assert footnote(records) == f"Data: text.txt. {said}, d, commit c, d, commit e, later, commit f."
    records[1]["steps"] = 24
    assert "12, 24 steps, seeds 0; one learning rate." in section(records)


def test_windows_of_a_rate_alone_are_of_one_size(config):
    short = in_short(config, "x")
    assert short.steps % short.log_every == 0 and short.log_every > UNTIMED_STEPS


def test_a_failed_arm_is_named_and_the_rest_kept_and_it_is_tried_again(config, tmp_path, capsys):
    arms = {"attention": {"set": ["mixer=attention"]}, "broken": {"set": ["rank=1"]}}
    path, out = written(config, tmp_path, arms=arms, seeds=[0]), tmp_path / "out"
    assert run(path, out) == 1
    assert "without a result: tiny/broken lr 0.01 seed 0" in capsys.readouterr().out
    report = (out / "report.md").read_text()
    assert "| broken | no run finished |" in report and "rank must be an integer of at least 2, got 1" in report
    assert [r["status"] for r in read_records(out / "report.jsonl")] == ["done", "failed"]
    assert run(written(config, tmp_path, arms=arms | {"broken": {"set": ["rank=4"]}}, seeds=[0]), out) == 0


def test_without_a_grid_an_arm_needs_no_run_of_the_first_seed(plan, tmp_path):
    for seed in (1, 2):
        store_run(plan, tmp_path, "a", 0.01, seed, 2.0 + seed / 8)
    records = Runner(plan, tmp_path, None).records()
    assert write_report(records, tmp_path) == 1
    assert [r["chosen"] for r in records if r["arm"] == "a"] == [True] * 3
    report = (tmp_path / "report.md").read_text()
    assert "| a (2 of 3 seeds) | 0.01 | 1,000 |" in report and "| b | no run finished |" in report
    assert "seeds 1, 2; one learning rate." in report and "best of the grid" not in report
    assert "![Tiny](tiny.png)" in report and (tmp_path / "tiny.png").exists()


def test_without_a_chosen_run_there_is_no_picture(plan, tmp_path):
    store_run(plan, tmp_path, "a", 0.01, 1, 2.0)
    records = Runner(replace(plan, lrs=(0.01, 0.02), seeds=(1,)), tmp_path, None).records()
    assert plot([r | {"chosen": False} for r in records], tmp_path / "x.png") is False
    assert not (tmp_path / "x.png").exists()


def test_wall_time_is_that_of_the_arms_alone_where_it_was_measured(plan, tmp_path, monkeypatch):
    drawn, draw = {}, figure._curve

    def watched(axes, runs, key, *rest):
        drawn.setdefault(key, runs)
        draw(axes, runs, key, *rest)

    monkeypatch.setattr(figure, "_curve", watched)
    for arm in ("a", "b"):
        store_run(plan, tmp_path, arm, 0.01, 1, 2.0)
    records = Runner(replace(plan, seeds=(1,)), tmp_path, None).records()
    assert plot(records, tmp_path / "x.png")
    shared = drawn["seconds"][0]["curve"]
    for measured in (records[:1], records):
        drawn.clear()
        for record in measured:
            record["alone"] = {"units_per_s": 4.0}
        assert plot(records, tmp_path / "x.png")
        curve = drawn["seconds"][0]["curve"]
        own = shared["seconds"] if len(measured) == 1 else [units / 4 for units in shared["units"]]
        assert curve["seconds"] == own and curve["units"] == shared["units"]


def test_an_interrupted_run_is_resumed_to_the_same_numbers(config, tmp_path):
    path, out = written(config, tmp_path, seeds=[0]), tmp_path / "out"
    assert run(path, tmp_path / "whole") == 0
    planned = load_comparisons(str(path))[0].config("grassmann", 0.01, 0)
    folder = out / "tiny" / "grassmann" / "lr0.01-seed0"
    torch.manual_seed(0)
    trainer = Trainer(LanguageModeling(planned, torch.device("cpu")), replace(planned, out=str(folder)), folder)
    for _ in range(5):
        trainer.advance()
    trainer.save()
    trainer.log.close()
    # Killed so early that there is nothing to resume.
    (out / "tiny" / "attention" / "lr0.01-seed0").mkdir(parents=True)
    (out / "tiny" / "attention" / "lr0.01-seed0" / "metrics.jsonl").write_text("{")
    assert run(path, out, "--report-only") == 1
    assert [r["error"] for r in read_records(out / "report.jsonl")] == ["not run", "interrupted"]
    assert run(path, out) == 0
    resumed, whole = (read_records(folder / "report.jsonl") for folder in (out, tmp_path / "whole"))
    assert [r["test"] for r in resumed] == [r["test"] for r in whole]
    assert any(e["event"] == "resume" for e in read_metrics(folder))


def test_a_run_ends_with_the_comparison_that_was_killed(variant, tmp_path, start, until):
    path, out = written(variant(steps=100_000, log_every=1), tmp_path, seeds=[0]), tmp_path / "out"
    killed, _ = start(["compare", path, "--out", out])
    folder = out / "tiny" / "attention" / "lr0.01-seed0"
    until(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text().count("\n") > 3)
    os.kill(killed.pid, signal.SIGKILL)
    log = folder.with_name("lr0.01-seed0.log")
    until(lambda: "stopped by SIGTERM, saved at step" in log.read_text())
    assert load_state(folder)["step"] > 1


def test_nothing_is_run_beside_a_run_that_goes_on(config, tmp_path, start, capsys, until):
    path, out = written(config, tmp_path, seeds=[0]), tmp_path / "out"
    folder = out / "tiny" / "grassmann" / "lr0.01-seed0"
    holder, _ = start([], before=HOLD.format(folder=str(folder)))
    until(lambda: (folder / "held").exists())
    assert run(path, out) == 2
    assert f"error: {folder}: another process is at work there (process {holder.pid} on " in capsys.readouterr().err
    assert not (out / "tiny" / "attention").exists()
    assert run(path, out, "--report-only") == 1
    holder.kill()
    holder.join()
    (folder / "held").unlink()
    assert run(path, out) == 0


def test_every_smoke_arm_runs(tmp_path):
    """The whole preset, one step an arm: minutes in full are for `compare smoke` itself."""
    for package in ("timm", "torchvision", "sklearn"):
        pytest.importorskip(package)
    short = ["--settings", "steps=1", "eval_every=0", "--lrs", "1e-3", "--seeds", "0"]
    assert main(["compare", "smoke", "--out", str(tmp_path), *short]) == 0
    records = read_records(tmp_path / "report.jsonl")
    assert {(r["comparison"], r["arm"]) for r in records} == {(p.name, a) for p in PRESETS["smoke"]() for a in p.arms}
    assert all(math.isfinite(r["train_loss"]) and r["flops_per_unit"] > 0 for r in records)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole(name):
    for plan in load_comparisons(name):
        assert len(plan.arms) >= 2 and len(plan.seeds) >= 3 and plan.describe()
        allowed = {"model", "set", "head", "subspace_dim", "head_lr", "head_dropout", "loss", "bce_threshold"}
        assert all(differs.keys() <= allowed for differs in plan.differing().values())


class Process:
    """Stands in for one of multiprocessing's, for `Runner`; it never ends. seen: what has been called."""

    seen: ClassVar[list[str]] = []

    def __init__(self, target, args):
        self.name, self.exitcode = f"{args[0].lr:g}", 1
        self.sentinel, self.other = os.pipe()

    def start(self):
        self.seen.append(f"start {self.name}")
        if self.name == "0.02":
            raise OSError("no more processes")

    def terminate(self):
        self.seen.append(f"terminate {self.name}")

    def join(self):
        self.seen.append(f"join {self.name}")


@pytest.fixture
def context(monkeypatch):
    monkeypatch.setattr(Process, "seen", [])
    return SimpleNamespace(Process=Process)


@pytest.mark.parametrize("name", ["lr0.02-seed0", "lr0.01-seed2", "alone-lr0.02"])
def test_other_settings_are_told_before_anything_is_run(plan, tmp_path, context, name):
    plan = replace(plan, lrs=(0.01, 0.02))
    config = replace(plan.config("b", 0.02 if "0.02" in name else 0.01, 2 if "seed2" in name else 0), batch_size=3)
    store(tmp_path / "b" / name, in_short(config, "x") if "alone" in name else config, 2.0)
    with pytest.raises(ValueError, match=rf"{name}: a run with other settings is there: batch_size=3 \(now 4\)"):
        Runner(plan, tmp_path, context, jobs=2).records()
    assert not context.Process.seen


def test_runs_are_ended_where_the_next_one_fails_to_start(plan, tmp_path, context):
    plan = replace(plan, lrs=(0.01, 0.02), arms={"a": plan.arms["a"]})
    with pytest.raises(OSError, match="no more processes"):
        Runner(plan, tmp_path, context, jobs=2).records()
    assert context.Process.seen == ["start 0.01", "start 0.02", "terminate 0.01", "join 0.01"]


def test_options_narrow_and_change(config, tmp_path):
    plans = load_comparisons(str(written(config, tmp_path)))
    options = {"arms": ("grassmann",), "lrs": (0.5,), "seeds": (7,), "settings": ("epochs=2", "clip=0.5")}
    (plan,) = CompareOptions("x", **options).applied_to(plans)
    chosen = plan.config("grassmann", 0.5, 7)
    assert list(plan.arms) == ["grassmann"] and (plan.lrs, plan.seeds) == ((0.5,), (7,))
    assert (chosen.epochs, chosen.clip, chosen.lr, chosen.seed) == (2, 0.5, 0.5, 7)
    (shorter,) = CompareOptions("x", settings=("steps=3",)).applied_to([plan])
    assert shorter.arms["grassmann"].epochs is None
    # Checkpoints are no part of what is compared.
    validated = replace(plan, arms={"grassmann": replace(plan.arms["grassmann"], eval_epochs=5.0)})
    (saved,) = CompareOptions("x", settings=("save_every=500",)).applied_to([validated])
    assert (saved.arms["grassmann"].eval_epochs, saved.arms["grassmann"].save_every) == (5.0, 500)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ("gassmann",)}, "unknown arm 'gassmann'; did you mean 'grassmann'"),
        ({"only": ("huge",)}, "unknown comparison 'huge'"),
        ({"settings": ("stepz=3",)}, "unknown setting 'stepz'; did you mean 'steps'"),
        ({"settings": ("lr=3",)}, "unknown setting 'lr'"),
        ({"settings": ("steps=-3",)}, "steps must be positive, got -3"),
        ({"settings": ("steps=abc",)}, "steps must be an integer or None, got 'abc'"),
        ({"settings": ("log_every=none",)}, "log_every must be an integer, got 'none'"),
        ({"settings": ("batch_size=1.5",)}, "batch_size must be an integer, got 1.5"),
        ({"settings": ("epochs=true",)}, "epochs must be a number or None, got True"),
        ({"settings": ("betas=0.9",)}, "betas must be 2 values, each a number, got 0.9"),
        ({"settings": ("dtype=int8",)}, r"dtype must be one of \('bf16', 'float32'\), got 'int8'"),
        ({"lrs": (0.1, 0.1)}, "lrs must differ from each other"),
        ({"lrs": (0.1, 0.10000001)}, "lrs must differ from each other"),
        ({"seeds": (-1,)}, "seeds must be integers of at least 0"),
    ],
)
def test_bad_options_name_themselves(config, tmp_path, options, message):
    plans = load_comparisons(str(written(config, tmp_path)))
    with pytest.raises(ValueError, match=message):
        CompareOptions("x", **options).applied_to(plans)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "vison"}, "task must be one of"),
        ({"lr": [1]}, "a comparison has no lr"),
        ({"lrs": [0]}, "lrs must be positive"),
        ({"arms": {"../up": {}}}, "names a folder"),
        ({"arms": {"a": {"stepz": 1}}}, "unknown setting stepz"),
        ({"arms": {}}, "needs at least one arm"),
    ],
)
def test_bad_files_name_themselves(config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"tiny\.json: .*{message}"):
        load_comparisons(str(written(config, tmp_path, **changes)))


def test_comparisons_of_one_file_have_names_of_their_own(config, tmp_path):
    path = written(config, tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps([content, content | {"name": "other"}]))
    assert [plan.name for plan in load_comparisons(str(path))] == ["tiny", "other"]
    path.write_text(json.dumps([content, content | {"title": "Another"}]))
    with pytest.raises(ValueError, match=r"tiny\.json: more than one comparison is named tiny"):
        load_comparisons(str(path))


def test_unknown_preset_is_named():
    with pytest.raises(ValueError, match="unknown preset 'wikitext2'; did you mean"):
        load_comparisons("wikitext2")


def record(arm, lr, seed, loss, **more):
    return {"arm": arm, "lr": lr, "seed": seed, "task": "lm", "status": "done", "valid": {"loss": loss}, **more}


def test_the_learning_rate_is_the_best_of_the_first_seed_and_its_edge_is_marked():
    records = [record("a", 0.1, 0, 3.0), record("a", 0.2, 0, 2.0), record("a", 0.4, 0, math.nan)]
    records += [record("b", 0.1, 0, 1.0), record("b", 0.2, 0, 2.0), record("b", 0.2, 1, 0.0)]
    chosen = select(records, 0)
    assert (chosen["a"].lr, chosen["a"].edge, chosen["b"].lr, chosen["b"].edge) == (0.2, False, 0.1, True)
    assert chosen["a"].beyond is None and chosen["b"].beyond == 0.05
    # A rate at which the run diverged has been tried too; one at which it failed for another reason has not.
    for diverged in (True, False):
        failed = {**record("c", 0.4, 0, 9.0), "status": "failed", "diverged": diverged}
        found = select([record("c", 0.1, 0, 2.0), record("c", 0.2, 0, 1.0), failed], 0)["c"]
        assert (found.edge, found.beyond) == ((False, None) if diverged else (True, 0.4))
    alone = select([record("c", 0.2, 0, 1.0), failed], 0)["c"]
    assert (alone.edge, alone.beyond) == (True, None)
    assert select([record("d", 3e-3, 0, 2.0), record("d", 1e-2, 0, 1.0)], 0)["d"].beyond == 0.033
    assert select([record("e", 0.1, 0, 2.0), record("e", 0.1001, 0, 1.0)], 0)["e"].beyond is None  # 0.1 again


def test_a_learning_rate_that_diverges_does_not_fail_its_arm():
    diverged = {"status": "failed", "error": "loss nan", "chosen": False}
    assert is_complete([diverged, {"status": "done", "chosen": True}])
    assert not is_complete([{"status": "done", "chosen": True}, diverged | {"chosen": True}])
    assert not is_complete([diverged])


def test_statistics_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    arm, base = {0: 3.0, 1: 4.5, 2: 3.5, 9: 1.0}, {0: 2.0, 1: 2.5, 2: 3.25}
    found = paired(arm, base)
    expected = stats.ttest_rel([3.0, 4.5, 3.5], [2.0, 2.5, 3.25])
    assert found.seeds == 3 and found.p == pytest.approx(expected.pvalue, rel=1e-12)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-9)
    assert paired({0: 1.0}, base).interval is None and paired({5: 1.0}, base) is None
    assert paired({0: 3.0, 1: 3.5}, base).p is None  # the same difference twice: no deviation to test against
    assert spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5)) and spread([4.0]) == (4.0, None)
    assert holm([0.01, None, 0.04, 0.03, 0.9]) == pytest.approx([0.04, None, 0.09, 0.09, 0.9])


def test_equal_differences_are_equal_whatever_their_rounding():
    """Accuracies are fractions of the images, and equal gaps of them differ in the last bit: p was 3e-28."""
    arm, base = ({seed: 100 * (right + seed) / 360 for seed in (0, 1, 3)} for right in (300, 301))
    gaps = [arm[seed] - base[seed] for seed in arm]
    assert len(set(gaps)) > 1
    found = paired(arm, base)
    assert found.mean == pytest.approx(-100 / 360) and (found.interval, found.p, found.seeds) == (None, None, 3)
    one_more = paired(arm, base | {3: base[3] + 100 / 360})
    assert one_more.p == pytest.approx(0.0572, abs=1e-4)


@pytest.mark.parametrize("odd", [math.inf, math.nan])
def test_a_metric_that_is_not_finite_has_no_deviation_and_no_test(odd):
    middle, deviation = spread([1.0, odd, 2.0])
    assert not math.isfinite(middle) and deviation is None
    assert math.isnan(spread([math.inf, -math.inf])[0])
    found = paired({0: 1.0, 1: odd}, {0: 2.0, 1: 3.0})
    assert not math.isfinite(found.mean) and (found.interval, found.p, found.seeds) == (None, None, 2)


def test_a_report_is_written_of_metrics_that_are_not_finite(plan, tmp_path):
    for seed, (loss, other) in enumerate([(2.0, math.inf), (math.inf, 3.0), (math.nan, 2.0)]):
        store_run(plan, tmp_path, "a", 0.01, seed, loss)
        store_run(plan, tmp_path, "b", 0.01, seed, other)
    records = Runner(plan, tmp_path, None).records()
    assert write_report(records, tmp_path) == 0
    report = (tmp_path / "report.md").read_text()
    assert report.count("| nan | nan |") == 2 and "| nan | nan | +nan |  |  |" in report
    assert (tmp_path / "tiny.png").exists()
    stored = (tmp_path / "report.jsonl").read_text()
    assert "null" in stored and not any(word in stored for word in ("NaN", "Infinity"))
    again = read_records(tmp_path / "report.jsonl")
    assert section(again) == section(records)
    assert [r["curve"]["metric"][0] for r in again[:2]] == pytest.approx([math.exp(2), math.nan], nan_ok=True)


def test_table_says_what_the_records_say():
    def finished(arm, seed, ppl):
        metrics = {"loss": math.log(ppl), "perplexity": ppl}
        costs = {"parameters": 1000, "flops_per_unit": 3e6, "units_per_s": 50.0, "peak_bytes": 2**21, "unit": "token"}
        return record(arm, 0.1, seed, 0.0, chosen=True, edge=False, **costs) | {"valid": metrics, "test": metrics}

    records = [finished("base", 0, 10.0), finished("base", 1, 12.0), finished("new", 0, 9.0), finished("new", 1, 10.0)]
    table = arm_table([r | {"task": "lm"} for r in records]).splitlines()
    assert table[2] == "| base | 0.1 | 1,000 | 3e+06 | 50 | 2 MiB | 11.00 ± 1.41 | 11.00 ± 1.41 |  |  |  |"
    assert table[3].startswith("| new | 0.1 |") and "| -1.50 [-7.85, +4.85] | 0.205 | 0.205 |" in table[3]


def test_what_only_some_records_have_is_told_of_these(plan, tmp_path):
    words = {"word_perplexity": 1234.56, "bits_per_byte": 1.5}
    store_run(plan, tmp_path, "a", 0.01, 0, 2.0)
    store_run(plan, tmp_path, "b", 0.01, 0, 2.0)
    records = Runner(replace(plan, seeds=(0,)), tmp_path, None).records()
    assert "Tokeniser" not in section(records) and "word perplexity" not in section(records)
    records[1]["test"] |= words
    records[1] |= {"tokenizer": "bert/vocab.txt", "vocab_size": 30522, "key": "0123456789", "words": {"train": 2000}}
    told = section(records)
    assert (
        "| arm | test word perplexity | test bits per byte |\n|---|---|---|\n| a |  |  |\n| b | 1,234.6 | 1.500 |"
        in told
    )
    assert "Data: text.txt, text.txt (2,000 words in train). Tokeniser: bert/vocab.txt of 30,522 tokens (hash" in told


def test_a_test_on_the_validation_split_is_told(plan, tmp_path):
    store_run(plan, tmp_path, "a", 0.01, 0, 2.0, tested_on="valid")
    store_run(plan, tmp_path, "b", 0.01, 0, 3.0)
    records = Runner(replace(plan, seeds=(0,)), tmp_path, None).records()
    assert [r["tested_on"] for r in records] == ["valid", "test"]
    assert "it has no test split, test is the validation split" in section(records)
    assert "test split" not in section(records[1:])


@pytest.mark.parametrize("device, gpu", [("cpu", False), ("auto", True), ("cuda", True)])
def test_the_machine_is_named_by_the_device_in_use(device, gpu):
    machine = {"cpu": "Xeon", "cpu_capability": "AVX2", "threads": 2, "gpus": ["NVIDIA H100"], "device": device}
    name = "NVIDIA H100" if gpu else "Xeon (AVX2), 2 threads"
    assert hardware(machine) == name
    about = {"data": "d", "dtype": "float32", "torch": "2", "date": "d", "commit": "c"}
    assert footnote([machine | about]).startswith(f"Data: d. {name}, float32")
    assert hardware(machine | {"requested_backend": None, "extension": True}) == name
    assert hardware(machine | {"requested_backend": "eager", "extension": True}) == f"{name}, backend eager"
    assert hardware(machine | {"extension": False}) == f"{name}, without the extension"


def test_a_comparison_is_of_one_task(config):
    from grassland.train.recipes import default_vision

    with pytest.raises(ValueError, match="arms must be of one task"):
        Comparison("x", "x", {"a": config, "b": default_vision()}, (0.1,))
    assert Comparison("x", "x", {"a": LMConfig(steps=1)}, (0.1,)).task == "lm"
