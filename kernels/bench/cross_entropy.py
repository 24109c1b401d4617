"""What the linear head's loss is measured against: `python -m grassland.kernels.bench cross_entropy`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..cross_entropy import linear_cross_entropy
from ..cross_entropy.op import OP
from ..testing import normal
from .rival import Benchmark, Builder, Rival, Setting, Step, Unavailable, Values, package, with_gradients

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

SETTINGS = [
    Setting("T4096 V4096 C128", {"tokens": 4096, "vocab": 4096, "dim": 128}),
    Setting("T1024 V30522 C256", {"tokens": 1024, "vocab": 30522, "dim": 256}),
    Setting("T512 V50257 C768", {"tokens": 512, "vocab": 50257, "dim": 768}),
]
GPU_SETTINGS = [
    Setting("T4096 V30522 C256", {"tokens": 4096, "vocab": 30522, "dim": 256}),
    Setting("T8192 V50257 C768", {"tokens": 8192, "vocab": 50257, "dim": 768}),
    Setting("T8192 V128256 C4096", {"tokens": 8192, "vocab": 128256, "dim": 4096}),
]


def inputs(v: Values, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    x = normal(v["tokens"], v["dim"], seed=1).to(device, dtype)
    weight = normal(v["vocab"], v["dim"], seed=2, scale=v["dim"] ** -0.5).to(device, dtype)
    generator = torch.Generator(device).manual_seed(3)
    return x, weight, torch.randint(v["vocab"], (v["tokens"],), generator=generator, device=device)


def rival(loss: Loss) -> Builder:
    """The modes of loss(x, weight, target), a mean."""

    def build(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
        x, weight, target = inputs(v, dtype, device)
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        one = torch.ones((), device=device)
        return with_gradients(lambda a, b: loss(a, b, target), leaves, grads=[one])

    return build


def whole(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """All logits in memory. PyTorch's softmax adds up halves in float32 by itself."""
    return F.cross_entropy(F.linear(x, weight), target)


def ours(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_cross_entropy(x, weight, target, backend=dispatch.fastest(OP, weight.device, weight.dtype))


def chunked(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_cross_entropy(x, weight, target, backend="eager")


def build_compiled(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    return rival(torch.compile(whole))(v, dtype, device)


def build_torch(v: Values, dtype: torch.dtype, device: torch.device, **options: Any) -> dict[str, Step]:
    """PyTorch's own, in chunks."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("needs torch >= 2.14")
    chunks = torch.nn.LinearCrossEntropyOptions(**options)
    return rival(lambda x, weight, target: F.linear_cross_entropy(x, weight, target, options=chunks))(v, dtype, device)


def build_liger(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    fused = package("liger_kernel.transformers", "liger-kernel", device).LigerFusedLinearCrossEntropyLoss()
    return rival(lambda x, weight, target: fused(weight, x, target))(v, dtype, device)


def build_cut(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """Apple's cut cross entropy, which recomputes the logits in the backward and skips gradients that vanish."""
    cut = package("cut_cross_entropy", "cut-cross-entropy", device).linear_cross_entropy
    return rival(lambda x, weight, target: cut(x, weight, target))(v, dtype, device)


def build_roof(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """The head's matrix products and nothing else."""
    x, weight, _ = inputs(v, dtype, device)
    z = x @ weight.T
    return {"forward": lambda: x @ weight.T, "forward+backward": lambda: (x @ weight.T, z @ weight, z.T @ x)}


def flops(v: Values, mode: str) -> float:
    return (2.0 if mode == "forward" else 6.0) * v["tokens"] * v["vocab"] * v["dim"]


def moved(v: Values, mode: str, itemsize: int) -> float:
    numbers = (v["tokens"] + v["vocab"]) * v["dim"]
    return float(itemsize * numbers * (1 if mode == "forward" else 2))


BENCHMARK = Benchmark(
    name="cross_entropy",
    title="Cross entropy of a linear head over a vocabulary",
    ours="grassland",
    settings=SETTINGS,
    gpu_settings=GPU_SETTINGS,
    rivals=[
        Rival("grassland", rival(ours)),
        Rival("whole logits, eager", rival(whole)),
        Rival("whole logits, torch.compile", build_compiled),
        Rival("chunks, eager", rival(chunked)),
        Rival("F.linear_cross_entropy", build_torch, foreign=True),
        Rival("F.linear_cross_entropy, 512 rows", partial(build_torch, batch_chunk_size=512), foreign=True),
        Rival("Liger fused linear cross entropy", build_liger, foreign=True),
        Rival("cut-cross-entropy", build_cut, foreign=True),
        Rival("GEMM roof", build_roof),
    ],
    flops=flops,
    moved=moved,
)
