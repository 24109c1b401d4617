"""Shapes and inputs of the subspace ops for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..testing import Case, Spec, Tensors, normal
from . import grassmann_step, op, subspace_cross_entropy, subspace_logits

SCALE = 25.0


def orthonormal(classes: int, k: int, n: int, seed: int = 0) -> Tensor:
    """Rows (K k, n) of random subspaces."""
    return torch.linalg.qr(normal(classes, n, k, seed=seed))[0].mT.reshape(classes * k, n)


def head(rows: tuple[int, ...], classes: int, k: int, n: int) -> Tensors:
    return {"x": normal(*rows, n, seed=1), "weight": orthonormal(classes, k, n)}


def degenerate() -> Tensors:
    """A zero feature, one inside a subspace, one orthogonal to it, tiny and huge ones."""
    tensors = head((6,), 5, 3, 12)
    x, w = tensors["x"], tensors["weight"]
    x[0], x[1], x[3], x[4] = 0, w[0] - 2 * w[1], x[3] * 1e-5, x[4] * 1e5
    x[2] -= (x[2] @ w[3:6].T) @ w[3:6]
    return tensors


def strided() -> Tensors:
    return {name: t.mT.contiguous().mT for name, t in head((7,), 4, 2, 10).items()}


def labelled(rows: tuple[int, ...], classes: int, k: int, n: int, ignored: int = 0) -> Tensors:
    labels = torch.randint(classes, rows, generator=torch.Generator().manual_seed(2))
    if labels.numel():
        labels.view(-1)[:ignored] = -100
    return head(rows, classes, k, n) | {"target": labels}


HEAD_CASES = [
    Case("small", lambda: head((3,), 4, 2, 6), {"k": 2, "scale": 4.0}),
    Case("leading-dimensions", lambda: head((2, 3), 5, 3, 7), {"k": 3, "scale": SCALE}),
    Case("empty-batch", lambda: head((0,), 4, 2, 6), {"k": 2, "scale": SCALE}),
    Case("one-class", lambda: head((4,), 1, 8, 16), {"k": 8, "scale": SCALE}),
    Case("lines", lambda: head((5,), 37, 1, 9), {"k": 1, "scale": SCALE}),
    Case("whole-space", lambda: head((5,), 3, 8, 8), {"k": 8, "scale": SCALE}),
    Case("degenerate", degenerate, {"k": 3, "scale": SCALE}),
    Case("strided", strided, {"k": 2, "scale": SCALE}),
    Case("wide", lambda: head((9,), 19, 16, 40), {"k": 16, "scale": SCALE}),
    Case("paper", lambda: head((6,), 131, 8, 96), {"k": 8, "scale": SCALE}),
]

LOSS_CASES = [
    Case("small", lambda: labelled((4,), 3, 2, 6, ignored=1), {"k": 2, "scale": 4.0, "label_smoothing": 0.1}),
    Case("small-soft", lambda: labelled((4,), 3, 2, 6), {"k": 2, "scale": 4.0, "soft": True}),
    Case("soft-smoothed", lambda: labelled((2, 3), 5, 4, 9), {"k": 4, "soft": True, "label_smoothing": 0.2}),
    Case("sum", lambda: labelled((5,), 37, 1, 9), {"k": 1, "reduction": "sum"}),
    Case("ignored", lambda: labelled((3, 4), 11, 3, 9, ignored=5), {"k": 3}),
    Case("one-class", lambda: labelled((4,), 1, 8, 16), {"k": 8}),
    Case("empty-batch", lambda: labelled((0,), 4, 2, 6), {"k": 2, "reduction": "sum"}),
    Case("degenerate", lambda: degenerate() | {"target": torch.arange(6) % 5}, {"k": 3}),
    Case("strided", lambda: strided() | {"target": torch.arange(14)[::2] % 4}, {"k": 2}),
    Case("wide", lambda: labelled((7,), 19, 32, 40), {"k": 32, "label_smoothing": 0.1}),
    Case("paper", lambda: labelled((6,), 131, 8, 96), {"k": 8, "label_smoothing": 0.1}),
]


def cross_entropy(x: Tensor, weight: Tensor, target: Tensor, soft: bool = False, **options: Any) -> Tensor:
    """With `soft`, mixup: every row is also a little of the next class."""
    if soft:
        classes = weight.shape[0] // options["k"]
        one_hot = torch.nn.functional.one_hot(target, classes).to(x.dtype)
        target = 0.75 * one_hot + 0.25 * one_hot.roll(1, dims=-1)
    return subspace_cross_entropy(x, weight, target, **options)


def motion(classes: int, k: int, n: int, angle: float = 0.5) -> Tensors:
    """A weight, a momentum and a gradient; with lr = 1 the momentum turns a subspace by about `angle`."""
    scale = angle / n**0.5
    tensors = {"buffer": normal(classes * k, n, seed=3), "grad": 0.3 * normal(classes * k, n, seed=4)}
    return {"weight": orthonormal(classes, k, n)} | {name: t * scale for name, t in tensors.items()}


def radial(ratio: float, classes: int = 5, k: int = 4, n: int = 24) -> Tensors:
    """A momentum that lies in the subspace, but for one part in `ratio`."""
    tensors = motion(classes, k, n)
    w = tensors["weight"].view(classes, k, n)
    tensors["buffer"] += ratio * 0.1 * (normal(classes, k, k, seed=5) @ w).view(classes * k, n)
    return tensors


def at_rest() -> Tensors:
    """Class 0 has neither momentum nor gradient."""
    tensors = motion(3, 4, 17)
    tensors["buffer"][:4] = tensors["grad"][:4] = 0
    return tensors


def moving(mode: str = "official", lr: float = 1.0, **options: Any) -> dict[str, Any]:
    return {"lr": lr, "momentum": 0.9, "mode": mode, **options}


STEP_CASES = [
    Case("small", lambda: motion(2, 2, 5), moving(k=2)),
    *[Case(f"{mode}-8", lambda: motion(7, 8, 70), moving(mode, k=8)) for mode in op.MODES],
    *[Case(f"{mode}-large-angle", lambda: motion(3, 4, 24, 12.0), moving(mode, k=4)) for mode in op.MODES],
    *[Case(f"{mode}-radial", lambda: radial(50.0), moving(mode, k=4)) for mode in op.MODES],
    Case("lines", lambda: motion(19, 1, 9), moving(k=1)),
    Case("three", lambda: motion(5, 3, 33), moving("transport", k=3)),
    Case("sixteen", lambda: motion(3, 16, 130), moving("project", k=16)),
    Case("thirty-two", lambda: motion(2, 32, 65), moving(k=32)),
    # More columns than the C++ kernel has in the first cache at a time.
    Case("wide", lambda: motion(2, 32, 300), moving("transport", k=32)),
    Case("wide-radial", lambda: radial(50.0, 2, 32, 300), moving(k=32)),
    Case("whole-space", lambda: motion(3, 4, 4), moving(k=4)),
    Case("no-step", lambda: motion(3, 4, 17), moving("transport", lr=0.0, k=4)),
    Case("at-rest", at_rest, moving(k=4)),
    Case("strided", lambda: {name: t.mT.contiguous().mT for name, t in motion(3, 2, 9).items()}, moving(k=2)),
]


def logits_registered(tensors: Tensors, options: dict[str, Any], backend: str) -> list[tuple[Any, tuple]]:
    x, weight, settings = tensors["x"], tensors["weight"], (options["k"], options["scale"])
    grad = torch.ones(x.shape[0], weight.shape[0] // options["k"], dtype=x.dtype, device=x.device)
    return [
        (op.subspace_logits, (x, weight, *settings, backend)),
        (op.subspace_logits_backward, (grad, x.detach(), weight.detach(), *settings, [True, True], backend)),
    ]


def loss_registered(tensors: Tensors, options: dict[str, Any], backend: str) -> list[tuple[Any, tuple]]:
    scale, smoothing = options.get("scale", SCALE), options.get("label_smoothing", 0.0)
    settings = (1.0, options["k"], scale, smoothing, -100, [True, True], backend)
    return [(op.subspace_cross_entropy, (tensors["x"], tensors["weight"], tensors["target"], *settings))]


def step_registered(tensors: Tensors, options: dict[str, Any], backend: str) -> list[tuple[Any, tuple]]:
    plain = [tensors[name].detach() for name in ("weight", "buffer", "grad")]
    settings = (options["k"], options["lr"], options["momentum"], options["mode"], backend)
    return [(op.grassmann_step, (*plain, *settings)), (op.grassmann_step_, (*plain, *settings))]


SPECS = [
    Spec(
        "subspace_logits",
        subspace_logits,
        HEAD_CASES,
        logits_registered,
        representative=Case("imagenet", lambda: head((64,), 1000, 8, 384), {"k": 8, "scale": SCALE}),
        backends=("cpp", "triton"),
        gemm=False,
    ),
    Spec(
        "subspace_cross_entropy",
        cross_entropy,
        LOSS_CASES,
        loss_registered,
        representative=Case(
            "imagenet", lambda: labelled((64,), 1000, 8, 384), {"k": 8, "scale": SCALE, "label_smoothing": 0.1}
        ),
        backends=("cpp", "triton"),
        gemm=False,
    ),
    Spec(
        "grassmann_step",
        grassmann_step,
        STEP_CASES,
        step_registered,
        representative=Case("imagenet", lambda: motion(100, 8, 2048), moving(k=8)),
        backends=("cpp", "triton"),
        gemm=False,
        differentiable=False,
    ),
]
