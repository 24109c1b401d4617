"""What this machine and installation offer: versions, devices, which backend each op takes and why."""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..kernels.machine import machine, version, versions

EXTRAS = {
    "train": ("datasets", "tokenizers", "tyro", "tqdm", "matplotlib", "scipy", "tensorboard"),
    "vision": ("timm", "torchvision", "scikit-learn"),
    "hf": ("transformers",),
    "eval": ("lm-eval",),
    "flash": ("flash-attn",),
}
# Dense tensor-core peaks in bf16 and of float32 (TF32 off), FLOP/s, from NVIDIA's data sheets.
PEAKS = {
    "H200": (989e12, 67e12),
    "H100": (989e12, 67e12),
    "B200": (2250e12, 80e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "RTX 4090": (165e12, 82.6e12),
}


def on_gpu(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a GPU: its device may be "auto", which takes one where there is one."""
    return bool(record["gpus"]) and record["device"] != "cpu"


def hardware(record: Mapping[str, Any]) -> str:
    """What a record was measured on: the machine's GPUs, or its processor and the threads in use; and without which
    kernels."""
    # Older records say neither, and had all.
    backend = f", backend {record['requested_backend']}" if record.get("requested_backend") else ""
    without = backend + ("" if record.get("extension", True) else ", without the extension")
    if on_gpu(record):
        return ", ".join(record["gpus"]) + without
    plural = "" if record["threads"] == 1 else "s"
    return f"{record['cpu']} ({record['cpu_capability']}), {record['threads']} thread{plural}{without}"


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """The peak of a known GPU in FLOP/s for "bf16" or "float32"; None for other devices."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = next((peaks for key, peaks in PEAKS.items() if key in name), None)
    return None if found is None else found[0 if dtype == "bf16" else 1]


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process so far: what torch has allocated on a GPU, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: there a process starts from the peak of the one that started it.
        peak = next((line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if peak is not None:
            return int(peak) * 1024
    resource = importlib.import_module("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report() -> str:
    """The text of `python -m grassland.train env`."""
    facts = {name: value or "not installed" for name, value in versions().items()} | machine()
    for extra, packages in EXTRAS.items():
        facts[f"[{extra}]"] = ", ".join(f"{name} {version(name) or 'missing'}" for name in packages)
    facts |= _kernels()
    width = max(map(len, facts)) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in facts.items())


def newer_sources(kernels: Path) -> str | None:
    """In a checkout of the sources, one of them that the extension in `kernels` is older than."""
    built = max((path.stat().st_mtime for path in kernels.glob("_C.*")), default=None)
    sources = sorted((kernels.parent / "csrc").glob("*"))
    if built is None or not sources:
        return None
    newest = max(sources, key=lambda path: path.stat().st_mtime)
    return f"csrc/{newest.name}" if newest.stat().st_mtime > built else None


def _kernels() -> dict[str, str]:
    from ..kernels import dispatch

    state = dispatch.extension_error() or "grassland.kernels._C is built and loads"
    if (newer := newer_sources(Path(dispatch.__file__).parent)) is not None:
        state += f"; {newer} has changed since it was built: install again"
    choices = {
        op: "; ".join(f"{device}: {choice}" for device, choice in devices.items())
        for op, devices in dispatch.describe().items()
    }
    return {"extension": state, **choices}
