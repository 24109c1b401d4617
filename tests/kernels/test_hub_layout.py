"""Kernels as the Hugging Face hub lays them out: under another package name, in a folder of their own, loaded twice."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
CALLS = """
import importlib, sys, torch
sys.path.insert(0, sys.argv[1])
import {first}
torch.manual_seed(0)
z, w = torch.randn(2, 9, 4, requires_grad=True), torch.randn(6, 6)
x, c = torch.randn(3, 4, 8), torch.randn(5 * 2, 8)
def run(name):
    get = lambda op: importlib.import_module(f"{{name}}.{{op}}")
    a = get("plucker").plucker_mix(z, w, offsets=(1, 2))
    z.grad = None
    a.square().sum().backward()
    b = get("subspace").subspace_logits(x.flatten(0, 1), c, 2, 25.0)
    get("kronecker").kronecker_factors(4)
    r = get("moe").moe_route(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), top_k=2, capacity=None)
    return a.detach(), z.grad.clone(), b, r.gates
one, two, again = run("{first}"), run("{second}"), run("{first}")
assert all(torch.allclose(i, j, atol=1e-5) for i, j in zip(one, two)), "the copies differ"
assert all(torch.equal(i, j) for i, j in zip(one, again)), "the first copy is not what it was"
import {first}.dispatch, {second}.dispatch
assert {first}.dispatch.OPS is not {second}.dispatch.OPS
print("same")
"""


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def copied(tmp_path):
    """build/torch-universal/NAME, twice, sources alone."""
    folder = tmp_path / "build" / "torch-universal"
    for name in ("grassland_kernels", "grassland_kernels_v2"):
        shutil.copytree(KERNELS, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


@pytest.mark.parametrize("second, absent", [("grassland_kernels_v2", "grassland"), ("grassland.kernels", "nothing")])
def test_copies_under_other_names_live_in_one_process(copied, second, absent):
    """Beside each other without grassland, and beside grassland's own."""
    code = CALLS.format(first="grassland_kernels", second=second)
    done = python(f"import sys; sys.modules[{absent!r}] = None\n{code}", copied)
    assert done.stdout.strip() == "same", done.stderr


def test_imports_inside_are_relative():
    absolute = re.compile(r"^\s*(from|import)\s+(grassland|kernels)\b", re.MULTILINE)
    for file in KERNELS.rglob("*.py"):
        assert not absolute.search(file.read_text()), file
