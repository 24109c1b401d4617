"""The benchmark harness on a tiny problem, and the tables that are made from its files."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grassland.kernels import bench, dispatch
from grassland.kernels.bench import Rival, Setting, Unavailable

ROOT = Path(__file__).parents[1]
TINY = Setting("tiny", {"batch": 1, "length": 24, "dim": 64, "rank": 8, "offsets": [1, 2]})


def missing(*_):
    raise Unavailable("it is not installed")


@pytest.fixture
def tiny(monkeypatch):
    """The plucker benchmark on a tiny setting, without the rival that compiles for a minute, and with an absent one."""
    module = importlib.import_module("grassland.kernels.plucker.rivals")
    if dispatch.extension_error():
        pytest.skip(dispatch.extension_error())
    rivals = [r for r in module.BENCHMARK.rivals if "compile" not in r.name] + [Rival("absent", missing)]
    monkeypatch.setattr(module, "BENCHMARK", replace(module.BENCHMARK, settings=[TINY], rivals=rivals))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return module.BENCHMARK


def test_records_table_and_picture(tiny, tmp_path, capsys):
    records = bench.main(["plucker", "--repeats", "2", "--out", str(tmp_path)])
    timed = [r for r in records if "error" not in r]
    names = {r.name for r in tiny.rivals} - {"absent"}
    assert {(r["rival"], r["mode"]) for r in timed} == {(n, m) for n in names for m in ("forward", "forward+backward")}
    assert all(r["ratio"] == 1 for r in timed if r["rival"] == tiny.ours)
    both = {r["rival"]: r for r in timed if r["mode"] == "forward+backward"}
    assert both["literal eager"]["saved_bytes"] > both["grassland"]["saved_bytes"]
    assert "not run: it is not installed" in capsys.readouterr().out
    written = [json.loads(line) for line in (tmp_path / "plucker-cpu-float32.jsonl").read_text().splitlines()]
    assert len(written) == len(records) and {"cpu", "torch", "commit", "threads"} <= written[0].keys()
    assert (tmp_path / "plucker-cpu-float32.png").stat().st_size > 1000


def test_rivals_that_disagree_are_not_timed(tiny, monkeypatch):
    module = importlib.import_module("grassland.kernels.plucker.rivals")

    def wrong(v, dtype, device):
        steps = module.build_collapsed(v, dtype, device)
        return steps | {"check": lambda: [2 * t for t in steps["check"]()]}

    monkeypatch.setattr(module, "BENCHMARK", replace(tiny, rivals=[*tiny.rivals, Rival("wrong", wrong)]))
    with pytest.raises(SystemExit, match=r"wrong and grassland differ by 1\.0e\+00: nothing was timed"):
        bench.main(["plucker", "--repeats", "1"])


def test_unknown_setting_names_itself(tiny):
    with pytest.raises(SystemExit, match="--setting must be one of tiny, got huge"):
        bench.main(["plucker", "--setting", "huge"])


def test_readme_tables_are_those_of_the_results():
    done = subprocess.run([sys.executable, ROOT / "benchmarks/tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
