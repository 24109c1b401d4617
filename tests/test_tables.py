"""The tables of the pages say what the records in benchmarks/results say."""

import importlib
import json
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("tables")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def lend(folder, name, machine="machine"):
    """Where a machine's benchmark of kernels lies."""
    path = folder / "kernels" / machine / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def finished(arm, seed, perplexity):
    metrics = {"loss": math.log(perplexity), "perplexity": perplexity}
    about = {"comparison": "two-arms", "title": "Two arms", "note": "", "task": "lm", "differs": {"set": arm}}
    costs = {"parameters": 1000, "flops_per_unit": 3e6, "units_per_s": 50.0, "peak_bytes": 2**21, "unit": "token"}
    where = {"cpu": "c", "cpu_capability": "v", "threads": 1, "gpus": [], "device": "cpu", "dtype": "float32"}
    where |= {"torch": "2", "date": "2026-01-01", "commit": "abc", "data": "text", "steps": 7, "status": "done"}
    choice = {"arm": arm, "lr": 0.1, "seed": seed, "chosen": True, "edge": False}
    return about | costs | where | choice | {"valid": metrics, "test": metrics}


def test_comparisons_in_short_and_in_full(tables, tmp_path):
    assert tables.TABLES["text"]() == tables.TABLES["compare_full"]() == tables.NONE
    folder = tmp_path / "compare" / "wikitext2-cpu"
    folder.mkdir(parents=True)
    records = [finished("base", 0, 10.0), finished("base", 1, 12.0), finished("new", 0, 9.0), finished("new", 1, 10.0)]
    (folder / "report.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    lines = tables.TABLES["text"]().splitlines()
    assert lines[0] == "**Two arms**, 7 steps, 2 seeds"
    assert lines[2] == "| arm | parameters | test perplexity | test − first arm [95 %] | p (Holm) |"
    assert lines[4] == "| base | 1,000 | 11.00 ± 1.41 |  |  |"
    assert lines[5] == "| new | 1,000 | 9.50 ± 0.71 | -1.50 [-7.85, +4.85] | 0.205 |"
    assert lines[-1] == "Data: text. c (v), 1 thread, float32, torch 2."
    whole, picture = tables.TABLES["compare_wikitext2_cpu"](), "![two-arms](results/compare/wikitext2-cpu/two-arms.png)"
    assert whole.startswith("#### Two arms") and whole.endswith(picture)
    assert "c (v), 1 thread, float32, torch 2, 2026-01-01, commit abc." in whole
    assert tables.TABLES["compare_smoke"]() == tables.NONE
    for r in records:
        r["test"]["bits_per_byte"] = r["test"]["perplexity"] / 10
    (folder / "report.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    lines = tables.TABLES["text"]().splitlines()
    assert lines[2].endswith("| p (Holm) | test bits per byte |") and lines[4].endswith("|  |  | 1.100 ± 0.141 |")


def test_what_is_missing_is_found_by_its_files(tables, tmp_path):
    assert "comparison `imagenet-r50d` in full" in tables.missing() and "none has been at hand" in tables.missing()
    assert "`smoke`" not in tables.missing() and "`wikitext2-cpu`" not in tables.missing()
    for preset in ("heads", "wikitext2-paper"):
        plan = tables.PRESETS[preset]()[0]
        runs = [(arm, lr) for arm in plan.arms for lr in plan.lrs if preset == "heads" or lr == plan.lrs[0]]
        records = [finished(arm, 0, 10.0) | {"comparison": plan.name, "lr": lr} for arm, lr in runs]
        (tmp_path / "compare" / preset).mkdir(parents=True)
        (tmp_path / "compare" / preset / "report.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    lend(tmp_path, "moe-cuda-float32").write_text("")
    lacking = "wikitext2-6l (lr 0.0003, lr 0.001), wikitext2-12l"
    assert f"- comparison `wikitext2-paper` in full: {lacking}\n" in tables.missing()
    assert "comparison `heads` in full" not in tables.missing() and "none has been at hand" not in tables.missing()
    assert "moe-cuda-bfloat16" in tables.missing() and "moe-cuda-float32" not in tables.missing()


def test_an_arm_without_a_seed_of_its_own_is_missing(tables):
    plan = tables.PRESETS["heads"]()[0]
    records = [finished(arm, 0, 10.0) | {"lr": lr} for arm in list(plan.arms)[1:] for lr in plan.lrs]
    assert tables.lacking(plan, records) == "heads (softmax)" and tables.lacking(plan, []) == "heads"
    assert tables.lacking(plan, [*records, finished("softmax", 0, 1.0) | {"status": "failed"}]) == "heads (softmax)"
    assert tables.lacking(plan, [*records, finished("softmax", 0, 1.0)]) == ""


def test_what_a_gpu_was_seen_to_do(tables, tmp_path):
    assert tables.TABLES["device"]() == tables.TABLES["training"]() == tables.NONE
    where = {"gpus": ["a GPU"], "dtype": "bfloat16", "torch": "2", "date": "2026-01-01", "commit": "abc"}
    call = {"bench": "moe", "setting": "T1", "mode": "forward", "ms": 0.25, "gflops": 5000.0, "gbytes": 1234.0}
    ours = {"rival": "grassland", "graph": True, "host_ms": 12.0, "ratio": 1.0} | call | where
    path = lend(tmp_path, "moe-cuda-bfloat16")
    path.write_text(json.dumps(ours) + "\n")
    assert "| moe | T1 | forward |  | 0.25 | 5 | 1,234 | 12.0 |" in tables.TABLES["device"]()
    assert "rivals of the kernels on a GPU: kernels/machine/moe-cuda-bfloat16.jsonl" in tables.missing()
    path.write_text(json.dumps(ours) + "\n" + json.dumps(ours | {"rival": "other", "graph": False}) + "\n")
    assert "rivals of the kernels" not in tables.missing()
    details = tables.TABLES["kernels_gpu"]().splitlines()
    assert details[:2] == ["<details>", "<summary>moe, bfloat16, a GPU</summary>"]
    assert details[5] == "| T1 | forward | grassland | 0.250 | 1.00 | 5000.0 |  |  | 12.00 |"
    assert details[6].startswith("| T1 | forward | other | 0.250* |")
    rates = [("", 1000.0, "def"), ("--cuda-graph", 4000.0, "ghi")]
    rates = [{"how": how, "tokens_per_s": rate, "commit": c, "date": "2026-01-02"} for how, rate, c in rates]
    step = {"model": "m", "batch_size": 2, "seq_len": 3, "rates": rates} | where
    (tmp_path / "training-cuda.jsonl").write_text(json.dumps(step) + "\n")
    table = tables.TABLES["training"]()
    assert table.startswith("| model | tokens/s | `--cuda-graph` |") and "| m | 1,000 | 4,000 |" in table
    assert "2026-01-02 commit def, 2026-01-02 commit ghi" in table


def test_kernels_side_by_side_on_two_machines(tables, tmp_path):
    assert tables.TABLES["moe"]() == tables.TABLES["scaling"]() == tables.NONE
    where = {"cpu": "Maker(R) Fast Processor", "cpu_capability": "v", "threads": 2, "gpus": [], "dtype": "float32"}
    where |= {"bench": "moe", "setting": "T1", "mode": "forward", "torch": "2", "date": "2026-01-01", "commit": "abc"}
    slow = where | {"cpu": "Slow", "commit": "def"}
    absent = {"bench": "moe", "setting": "T1", "rival": "far", "error": "needs a GPU"}
    one = [{"rival": "grassland", "ms": 2.0, "ratio": 1.0}, {"rival": "other", "ms": 3.0, "ratio": 1.5}, absent]
    two = [{"rival": "grassland", "ms": 4.0, "ratio": 1.0}, {"rival": "third", "ms": 1.0, "ratio": 0.25}, absent]
    for machine, common, records in (("a", where, one), ("b", slow, two)):
        text = "".join(json.dumps(common | r) + "\n" for r in records)
        lend(tmp_path, "moe-cpu-float32", machine).write_text(text)
    lines = tables.TABLES["moe"]().splitlines()
    assert lines[0] == "| time / grassland on Maker Fast · Slow | T1, forward |"
    assert lines[2:5] == ["| grassland | 2 ms · 4 ms |", "| other | 1.50 · – |", "| third | – · 0.25 |"]
    assert lines[-1].startswith("Not run: far (needs a GPU). Maker(R) Fast Processor (v), 2 threads")
    assert lines[-1].endswith("commit abc. Slow (v), 2 threads, float32, torch 2, date 2026-01-01, commit def.")


def test_headline_names_the_closest_of_those_that_compute_the_same(tables, tmp_path):
    assert tables.TABLES["headline"]() == tables.NONE
    where = {"cpu_capability": "v", "threads": 2, "gpus": [], "dtype": "float32", "torch": "2"}
    _, setting, mode, same, other = tables.HEADLINE["mixture of experts"]
    where |= {"setting": setting, "mode": mode}
    ours = {"rival": "grassland", "ms": 2.0, "ratio": 1.0}
    one = [ours, *({"rival": name, "ratio": 3.0 + place} for place, name in enumerate(same))]
    two = [ours, {"rival": same[0], "ratio": 2.5}, {"rival": same[1], "ratio": 1.25}, {"rival": other, "ratio": 0.5}]
    two.append({"rival": same[2], "ratio": 1.0, "mode": "another"})
    for cpu, records in (("one", one), ("two", two)):
        text = "".join(json.dumps(where | {"cpu": cpu} | r) + "\n" for r in records)
        lend(tmp_path, "moe-cpu-float32", cpu).write_text(text)
    title, _, row, _, note = tables.TABLES["headline"]().splitlines()
    assert "| grassland on one |" in title
    # Not the same one on both machines: the closest of one alone would flatter us on the other.
    assert row.endswith(f"| 2 ms | {same[0]} or {same[1]}: 1.25 to 3.00 | {other}: 0.50 |")
    assert note.endswith("the least and the most on: one (v), 2 threads; two (v), 2 threads.")


def test_headline_finds_its_settings_and_rivals(monkeypatch):
    """In the benchmarks themselves: a renamed rival would leave its row out in silence."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for op, setting, mode, same, other in importlib.import_module("tables").HEADLINE.values():
        benchmark = importlib.import_module(f"grassland.kernels.bench.{op}").BENCHMARK
        assert setting in {s.id for s in benchmark.settings}, mode
        assert {*same, other} <= {rival.name for rival in benchmark.rivals}


def test_headline_names_a_rival_once_that_is_the_closest_everywhere(tables):
    def machine(*ratios):
        common = {"setting": "s", "mode": "m"}
        return [common | {"rival": name, "ratio": ratio} for name, ratio in zip("ab", ratios, strict=True)]

    assert tables.closest([machine(1.5, 2.0), [], machine(1.25, 1.5)], "ab", "s", "m") == "a: 1.25 to 1.50"
    assert tables.closest([machine(1.5, 2.0), [], machine(2.0, 0.5)], "ab", "s", "m") == "a or b: 0.50 to 1.50"
    assert tables.closest([machine(1.5, 2.0)], "ab", "s", "another") == ""


def test_a_table_that_lost_its_place_is_told(tables):
    pages = [(ROOT / name).read_text() for name in tables.PAGES]
    assert tables.unplaced(pages) == []
    assert tables.unplaced([page.replace("<!-- table:host -->", "<!-- table: host -->") for page in pages]) == ["host"]


def test_profiles_and_calls_are_each_of_their_own_machine(tables, tmp_path):
    assert tables.TABLES["profile"]() == tables.NONE
    where = {"cpu": "c", "cpu_capability": "v", "threads": 1, "gpus": ["g"], "torch": "2"}
    step = where | {"model": "m", "seconds": {"data": 0.5}, "batch_size": 2, "dtype": "float32"}
    (tmp_path / "profile-cpu.jsonl").write_text(json.dumps(step | {"device": "cpu"}) + "\n")
    (tmp_path / "profile-cuda.jsonl").write_text(json.dumps(step | {"device": "cuda", "batch_size": 32}) + "\n")
    first, second = tables.TABLES["profile"]().split("\n\n| ms |")
    assert first.endswith("Batches of 2. c (v), 1 thread, float32, torch 2.")
    assert second.endswith("Batches of 32. g, float32, torch 2.")
    call = {"rival": "grassland", "mode": "forward", "ms": 0.25, "gflops": 1.0, "gbytes": 1.0, "host_ms": 1.0}
    for op, dtype, commit in (("plucker", "bfloat16", "abc"), ("subspace", "float32", "def")):
        record = where | call | {"bench": op, "setting": "s", "dtype": dtype, "commit": commit}
        lend(tmp_path, f"{op}-cuda-{dtype}").write_text(json.dumps(record) + "\n")
    note = tables.TABLES["device"]().splitlines()[-1]
    assert note == "g, bfloat16, torch 2, commit abc. g, float32, torch 2, commit def."


def test_decoding_is_a_table_a_machine(tables, tmp_path):
    assert tables.TABLES["decode"]() == tables.NONE
    where = {"cpu": "c", "cpu_capability": "v", "threads": 1, "gpus": ["g"], "dtype": "float32", "torch": "2"}
    sizes = {"batch": 16, "dim": 8, "layers": 2, "device": "cpu"}
    rows = [("new", 128, 1.234, 2**24), ("old", 128, 2.5, 2**25), ("new", 1024, 1.3, 2**24), ("old", 1024, 20, 2**28)]
    records = [
        {"model": model, "context": context, "ms": ms, "bytes": size} | sizes | where
        for model, context, ms, size in rows
    ]
    (tmp_path / "decode-cpu.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert tables.TABLES["decode"]().splitlines() == [
        "| ms · MiB a row | B16, 128 tokens | B16, 1,024 tokens |",
        "|---|---|---|",
        "| new | 1.23 · 1 | 1.3 · 1 |",
        "| old | 2.5 · 2 | 20.0 · 16.0 |",
        "",
        "2 layers of width 8. c (v), 1 thread, float32, torch 2.",
    ]


def test_times_of_the_host_are_a_table_a_machine(tables, tmp_path):
    assert tables.TABLES["host"]() == tables.NONE
    where = {"cpu": "c", "cpu_capability": "v", "threads": 1, "gpus": ["g"], "dtype": "float32", "torch": "2"}
    times = {"forward": 12.34, "forward + backward": 5.678}
    record = {"slot": "mixer", "layer": "new", "shape": [1, 8], "microseconds": times}
    for device in ("cpu", "cuda"):
        (tmp_path / f"host-{device}.jsonl").write_text(json.dumps(record | where | {"device": device}) + "\n")
    first, second = (part.splitlines() for part in tables.TABLES["host"]().split("\n\n| µs"))
    assert first[0] == "| µs | forward | forward + backward |" and first[2] == "| mixer: new | 12.3 | 5.68 |"
    assert first[-1] == "Inputs of 1 × 8 numbers. c (v), 1 thread, float32, torch 2."
    assert second[2] == first[2] and second[-1] == "Inputs of 1 × 8 numbers. g, float32, torch 2."
