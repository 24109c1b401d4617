"""What a measurement ran on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from . import dispatch

CPU_INFO = Path("/proc/cpuinfo")
PACKAGES = ("grassland", "torch", "triton", "numpy", "safetensors", "einops")


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of python and of what grassland always needs."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def about() -> dict[str, Any]:
    """What a record of results says of where it comes from: date, commit, machine, versions."""
    return {"date": datetime.date.today().isoformat(), "commit": commit(), **machine(), **versions()}


def machine() -> dict[str, Any]:
    """Processor, threads and GPUs, and with which kernels they are used."""
    return {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "driver": driver(),
        "cuda": torch.version.cuda,
        "requested_backend": os.environ.get(dispatch.ENVIRONMENT) or None,
        "extension": dispatch.extension_error() is None,
    }


def cpu_name() -> str:
    """The processor, with its family and model where they are known: in virtual machines many have one name."""
    lines = CPU_INFO.read_text().partition("\n\n")[0].splitlines() if CPU_INFO.exists() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = told.get("model name") or platform.processor() or platform.machine()
    return f"{name}, family {told['cpu family']} model {told['model']}" if "cpu family" in told else name


def driver() -> str | None:
    """The NVIDIA driver's version, where there is a GPU."""
    if not torch.cuda.is_available():
        return None
    return answer(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def commit() -> str | None:
    """$GRASSLAND_COMMIT, which a copy of the source tree needs, or the commit of the tree, with "+" if it has changes;
    None outside a repository."""
    if named := os.environ.get("GRASSLAND_COMMIT"):
        return named
    folder = str(Path(__file__).parent)
    found = answer(["git", "-C", folder, "rev-parse", "--short", "HEAD"])
    return found and found + ("+" if answer(["git", "-C", folder, "status", "--porcelain", "-uno"]) else "")


def answer(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
