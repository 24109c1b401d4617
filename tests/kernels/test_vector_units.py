"""The C++ kernels on vector units below the best of this machine, which PyTorch's own switch asks for."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grassland.kernels import dispatch

FILES = [str(Path(__file__).with_name(name)) for name in ("test_ops.py", "test_products.py", "test_linear.py")]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one vector unit on this processor")
@pytest.mark.skipif(dispatch.extension_error() is not None, reason="the extension is not built")
@pytest.mark.parametrize("unit", ["default", "avx2"])
def test_kernels_are_as_accurate_on_lesser_vector_units(unit):
    if unit.upper() == torch.backends.cpu.get_cpu_capability():
        pytest.skip("the best of this machine, which the other tests use")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "cpp_accuracy or test_accuracy", *FILES]
    ran = subprocess.run(
        command, env=os.environ | {"ATEN_CPU_CAPABILITY": unit, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "passed" in ran.stdout
