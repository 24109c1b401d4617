"""Shapes and inputs of plucker_mix for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..testing import Case, Spec, Tensors, normal
from . import blend as gate
from . import gated_blend, op, plucker_mix

PAPER_OFFSETS = (1, 2, 4, 8, 12, 16)


def make(batch: int, length: int, rank: int, dim: int, bias: bool = True) -> Tensors:
    pairs = rank * (rank - 1) // 2
    tensors = {"z": normal(batch, length, rank), "weight": normal(dim, pairs, seed=1) / pairs**0.5}
    return tensors | ({"bias": normal(dim, seed=2)} if bias else {})


def degenerate() -> Tensors:
    """Repeated tokens, a multiple of the token before, a zero token and a tiny one."""
    tensors = make(2, 9, 6, 5)
    z = tensors["z"]
    z[:, 3], z[:, 4], z[:, 5], z[:, 7] = z[:, 2], z[:, 2] * 2, 0, z[:, 7] * 1e-5
    return tensors


def strided() -> Tensors:
    """Every input non-contiguous."""
    tensors = make(2, 10, 8, 6)
    tensors["z"] = tensors["z"].mT.contiguous().mT
    tensors["weight"] = tensors["weight"].mT.contiguous().mT
    tensors["bias"] = normal(12, seed=2)[::2]
    return tensors


CASES = [
    Case("small", lambda: make(2, 7, 4, 3), {"offsets": [1, 2]}),
    Case("one-token", lambda: make(3, 1, 4, 3), {"offsets": [1]}),
    Case("empty-batch", lambda: make(0, 5, 4, 3), {"offsets": [1]}),
    Case("no-width", lambda: make(2, 5, 4, 0), {"offsets": [1]}),
    Case("offset-beyond-length", lambda: make(2, 5, 6, 4), {"offsets": [2, 50]}),
    Case("offset-repeated", lambda: make(1, 12, 6, 4), {"offsets": [3, 3, 1]}),
    Case("no-bias", lambda: make(2, 9, 5, 7, bias=False), {"offsets": [1, 4]}),
    Case("rank-2", lambda: make(2, 9, 2, 24), {"offsets": [1, 3]}),
    Case("odd-sizes", lambda: make(3, 19, 17, 13), {"offsets": [1, 3, 5]}),
    Case("large-eps", lambda: make(2, 8, 4, 3), {"offsets": [1, 2], "eps": 2.0}),
    Case("degenerate", degenerate, {"offsets": [1, 2]}),
    Case("strided", strided, {"offsets": [1, 2]}),
    Case("context", lambda: make(3, 9, 6, 5), {"offsets": [1, 4], "context": 3}),
    Case("context-before-a-partner", lambda: make(2, 9, 6, 5), {"offsets": [4, 5], "context": 2}),
    Case("context-alone", lambda: make(2, 5, 6, 5), {"offsets": [1], "context": 5}),
    Case("one-after-context", lambda: make(5, 17, 32, 48), {"offsets": list(PAPER_OFFSETS), "context": 16}),
    Case("paper-rank", lambda: make(2, 40, 32, 48), {"offsets": list(PAPER_OFFSETS)}),
]


def registered(tensors: Tensors, options: dict[str, Any], backend: str) -> list[tuple[Any, tuple]]:
    z, weight, bias = tensors["z"], tensors["weight"], tensors.get("bias")
    offsets, eps, context = options["offsets"], options.get("eps", 1e-6), options.get("context", 0)
    grad = torch.ones(*z.shape[:2], weight.shape[0], dtype=weight.dtype, device=weight.device)
    plain = [t.detach() for t in (grad, z, weight)]
    return [
        (op.plucker_mix, (z, weight, bias, offsets, eps, context, backend)),
        (op.plucker_mix_backward, (*plain, offsets, eps, [True, True, False], backend)),
    ]


def blend(rows: tuple[int, ...], dim: int) -> Tensors:
    x, g = normal(*rows, dim), normal(*rows, dim, seed=1)
    return {"x": x, "g": g, "weight": normal(dim, 2 * dim, seed=2) / dim**0.5, "bias": normal(dim, seed=3)}


def blend_strided() -> Tensors:
    tensors = blend((2, 6), 5)
    return tensors | {name: tensors[name].mT.contiguous().mT for name in ("x", "g", "weight")}


BLEND_CASES = [
    Case("small", lambda: blend((2, 5), 4)),
    Case("one-row", lambda: blend((1,), 3)),
    Case("no-leading", lambda: blend((), 5)),
    Case("no-width", lambda: blend((3,), 0)),
    Case("empty-batch", lambda: blend((0, 3), 4)),
    Case("odd-sizes", lambda: blend((2, 3, 7), 13)),
    Case("saturated", lambda: {name: t * 30 for name, t in blend((4, 9), 6).items()}),
    Case("strided", blend_strided),
]


def blend_registered(tensors: Tensors, options: dict[str, Any], backend: str) -> list[tuple[Any, tuple]]:
    x, g, weight, bias = tensors.values()
    plain = [t.detach() for t in (torch.ones_like(x), x, g, weight, torch.sigmoid(g))]
    return [
        (gate.gated_blend, (x, g, weight, bias, backend)),
        (gate.gated_blend_backward, (*plain, backend)),
    ]


SPECS = [
    Spec(
        "plucker_mix",
        plucker_mix,
        CASES,
        registered,
        representative=Case("paper", lambda: make(2, 256, 32, 256), {"offsets": list(PAPER_OFFSETS)}),
        backends=("cpp", "triton", "cuda"),
        gemm=False,
    ),
    Spec(
        "gated_blend",
        gated_blend,
        BLEND_CASES,
        blend_registered,
        representative=Case("paper", lambda: blend((2, 256), 256)),
        backends=("cpp", "triton"),
        gemm=False,
    ),
]
