"""Rung 5: the CUDA C++ in the extension, compiled by nvcc for chips that are not here."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from grassland.kernels import dispatch

triton = pytest.importorskip("triton")
EXPECTED = {"sm_80", "sm_90a", "sm_100"}


@pytest.fixture(scope="module")
def usage():
    """The resources of every CUDA kernel in the built extension, as cuobjdump prints them."""
    if torch.version.cuda is None or shutil.which("nvcc") is None:
        pytest.skip("no nvcc, or torch without CUDA: the extension has no CUDA kernels")
    if dispatch.extension_error():
        pytest.skip(dispatch.extension_error())
    from grassland.kernels import _C

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, "--dump-resource-usage", _C.__file__], capture_output=True, text=True).stdout


@pytest.mark.support(backend="cuda", how="compiled", op="plucker_mix", dtype="float32")
@pytest.mark.support(backend="cuda", how="compiled", op="plucker_mix", dtype="bfloat16")
def test_built_for_every_chip(usage):
    assert dispatch.has_cuda_kernels()
    assert set(re.findall(r"arch = (sm_\w+)", usage)) >= EXPECTED


def test_later_chips_have_code_to_compile(usage):
    """An sm_120 runs no code made for another generation."""
    from grassland.kernels import _C

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    listed = subprocess.run([tool, "--list-ptx", _C.__file__], capture_output=True, text=True).stdout
    assert "sm_80.ptx" in listed


def test_no_spills(usage):
    spilled = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(spilled) >= 7 * len(EXPECTED)
    assert [name for name, stack, local in spilled if int(stack) > 0 or int(local) > 0] == []
