"""Shapes and inputs of the linear head's loss for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..testing import Case, Spec, Tensors, normal
from . import linear_cross_entropy, op


def head(rows: tuple[int, ...], vocab: int, dim: int, ignored: int = 0, scale: float = 3.0) -> Tensors:
    """Features, a weight whose logits have a standard deviation of `scale`, and classes, the first of them ignored."""
    target = torch.randint(vocab, rows, generator=torch.Generator().manual_seed(2))
    if target.numel():
        target.view(-1)[:ignored] = -100
    weight = normal(vocab, dim, seed=3, scale=scale * dim**-0.5)
    return {"x": normal(*rows, dim, seed=1), "weight": weight, "target": target}


def strided() -> Tensors:
    tensors = head((14,), 9, 10)
    return {
        "x": tensors["x"].mT.contiguous().mT[::2],
        "weight": tensors["weight"].mT.contiguous().mT,
        "target": tensors["target"][::2],
    }


def certain() -> Tensors:
    """Rows whose softmax is all but one class, the target's or another's."""
    tensors = head((8,), 11, 6)
    x, weight, target = tensors.values()
    x[:4] = 12 * weight[target[:4]]
    x[4:] = 12 * weight[(target[4:] + 1) % 11]
    return tensors


CASES = [
    Case("small", lambda: head((4,), 5, 3, ignored=1), {"label_smoothing": 0.1}),
    Case("leading-dimensions", lambda: head((2, 3), 7, 4)),
    Case("empty-batch", lambda: head((0,), 4, 6), {"reduction": "sum"}),
    Case("one-class", lambda: head((3,), 1, 4), {"label_smoothing": 0.1}),
    Case("one-row", lambda: head((1,), 33, 1), {"reduction": "sum"}),
    Case("ignored", lambda: head((3, 4), 17, 5, ignored=7)),
    Case("uniform", lambda: head((5,), 19, 8), {"label_smoothing": 1.0}),
    Case("strided", strided),
    Case("certain", certain),
    Case("blocks", lambda: head((3,), 9001, 8, ignored=1), {"label_smoothing": 0.1}),
    Case("wordpiece", lambda: head((4,), 30522, 16, ignored=1)),
]


def registered(tensors: Tensors, options: dict[str, Any], backend: str) -> list[tuple[Any, tuple]]:
    x, weight, target = (tensors[name] for name in ("x", "weight", "target"))
    settings = (1.0, options.get("label_smoothing", 0.0), -100, x.dtype, [True, True], backend)
    return [(op.linear_cross_entropy, (x, weight, target, *settings))]


SPECS = [
    Spec(
        "linear_cross_entropy",
        linear_cross_entropy,
        CASES,
        registered,
        representative=Case("wordpiece", lambda: head((64,), 30522, 64, ignored=3), {"label_smoothing": 0.1}),
        backends=("cpp", "triton"),
        gemm=False,
    )
]
