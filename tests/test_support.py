"""What --support writes, and the table that is made from it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHOICE = "test_eager_equals_reference_in_float64 and gated_blend-small"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks/tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("processes", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_marked_tests_are_recorded(tmp_path, processes):
    if processes:
        pytest.importorskip("xdist")
    out = tmp_path / "support.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *processes, "tests/kernels/test_ops.py"]
    done = subprocess.run([*command, "-k", CHOICE, "--support", out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    expected = {"op": "gated_blend", "backend": "eager", "dtype": "float64", "how": "run", "passed": 1, "failed": 0}
    assert expected.items() <= record.items()
    assert {"cpu", "gpus", "torch", "commit", "date"} <= record.keys()


def record(dtype, how, failed=0):
    return {"op": "op", "backend": "triton", "dtype": dtype, "how": how, "passed": 1, "failed": failed}


@pytest.mark.parametrize(
    "records, cell",
    [
        ([], "none"),
        ([record("float32", "run")], "tested (float32)"),
        ([record("float32", "run"), record("bfloat16", "run")], "tested (float32, bfloat16)"),
        ([record("float32", "interpreted"), record("float32", "compiled")], "compiled, not yet run (float32)"),
        ([record("float32", "interpreted")], "interpreted, not yet run (float32)"),
        ([record("float32", "run"), record("float32", "compiled", failed=1)], "failed (float32)"),
        ([record("float32", "run"), record("bfloat16", "run", 1)], "tested (float32); failed (bfloat16)"),
    ],
)
def test_the_furthest_that_a_backend_has_got(tables, records, cell):
    assert tables.support_cell(records) == cell
