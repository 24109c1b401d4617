"""Shapes and inputs of moe_route and moe_ffn for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..testing import Case, Spec, Tensors, normal
from . import moe_ffn, moe_route, op, reference, routing


def route(tokens: int, experts: int, top_k: int, capacity: int | None = None, skew: float = 0.0) -> reference.Routing:
    logits = normal(tokens, experts, seed=5)
    logits[:, 0] += skew
    return reference.route(logits, None, top_k, capacity, False)


def make(
    tokens: int,
    dim: int,
    inner: int,
    experts: int,
    top_k: int = 2,
    capacity: int | None = None,
    skew: float = 0.0,
    seed: int | None = None,
) -> Tensors:
    """Inputs of moe_ffn; `skew` favours expert 0, `seed` asks for dropout."""
    r = route(tokens, experts, top_k, capacity, skew)
    tensors = {
        "x": normal(tokens, dim),
        "gates": r.gates,
        "slots": r.slots,
        "order": r.order,
        "offsets": r.offsets,
        "w_up": normal(experts, inner, dim, seed=1) / dim**0.5,
        "b_up": normal(experts, inner, seed=2),
        "w_down": normal(experts, dim, inner, seed=3) / inner**0.5,
        "b_down": normal(experts, dim, seed=4),
    }
    return tensors if seed is None else tensors | {"seed": torch.tensor([seed])}


def strided() -> Tensors:
    """Every floating-point input non-contiguous."""
    tensors = make(9, 6, 5, 3)
    return {
        name: t.mT.contiguous().mT if t.is_floating_point() else t.repeat_interleave(2, 0)[::2]
        for name, t in tensors.items()
    }


CASES = [
    Case("small", lambda: make(7, 6, 9, 3)),
    Case("capacity", lambda: make(12, 4, 6, 3, capacity=5)),
    Case("everything-to-one", lambda: make(7, 4, 6, 4, top_k=1, skew=50)),
    Case("all-experts", lambda: make(5, 4, 6, 3, top_k=3)),
    Case("one-expert", lambda: make(5, 4, 6, 1, top_k=1)),
    Case("one-token", lambda: make(1, 24, 40, 4)),
    Case("empty-batch", lambda: make(0, 4, 6, 4)),
    Case("no-inner-width", lambda: make(7, 6, 0, 3)),
    Case("no-width", lambda: make(70, 0, 5, 1, top_k=1)),
    Case("odd-sizes", lambda: make(37, 19, 23, 5, capacity=14)),
    Case("dropout", lambda: make(12, 6, 8, 3, capacity=7, seed=123456789), {"dropout": 0.25}),
    Case("gelu-out", lambda: make(12, 6, 8, 3, capacity=7), {"gelu_out": True}),
    Case("gelu-out-dropout", lambda: make(12, 6, 8, 3, seed=7), {"gelu_out": True, "dropout": 0.5}),
    Case("strided", strided),
]


def registered(tensors: Tensors, options: dict[str, Any], backend: str) -> list[tuple[Any, tuple]]:
    values = [t.detach() for t in tensors.values()]
    settings = (options.get("dropout", 0.0), tensors.get("seed"), options.get("gelu_out", False))
    _, h, o = op.moe_ffn(*values[:9], *settings, True, backend)
    x, gates, slots, order, offsets, w_up, _, w_down, b_down = values[:9]
    saved = (torch.ones_like(x), x, gates, slots, order, offsets, w_up, w_down, b_down, h, o, *settings)
    return [
        (op.moe_ffn, (*list(tensors.values())[:9], *settings, True, backend)),
        (op.moe_ffn_backward, (*saved, torch.ones_like(w_up), torch.ones_like(w_down), True, backend)),
        (op.moe_ffn_backward, (*saved, None, torch.ones_like(w_down), False, backend)),
    ]


def differentiable(logits: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Gates of the kept pairs, and the balance loss."""
    r = moe_route(logits, **options)
    return torch.where(r.slots >= 0, r.gates, 0), r.balance[None]


def tied() -> Tensors:
    return {"logits": torch.tensor([[0.0, 0, 0], [1, 2, 2], [-1, -1, -3], [4, 0, 4]], dtype=torch.float64)}


def masked() -> Tensors:
    return {"logits": normal(7, 4), "mask": torch.tensor([True, False, True, True, False, True, True])}


def strided_mask() -> Tensors:
    """Every second byte of its storage is the mask's; the others are the opposite."""
    mask = masked()["mask"]
    return {"logits": normal(7, 4), "mask": torch.stack([mask, ~mask], 1)[:, 0]}


ROUTE_CASES = [
    Case("small", lambda: {"logits": normal(6, 4)}),
    Case("capacity", lambda: {"logits": normal(40, 4)}, {"capacity": 12}),
    Case("renormalize", lambda: {"logits": normal(9, 5)}, {"renormalize": True, "capacity": 3}),
    Case("ties", tied, {"capacity": 2}),
    Case("mask", masked, {"capacity": 2, "renormalize": True}),
    Case("strided-mask", strided_mask, {"capacity": 2}),
    Case("expanded-mask", lambda: {"logits": normal(64, 4), "mask": torch.tensor(True).expand(64)}),
    Case("one-expert", lambda: {"logits": normal(4, 1)}, {"top_k": 1}),
    Case("all-experts", lambda: {"logits": normal(5, 3)}, {"top_k": 3}),
    Case("one-token", lambda: {"logits": normal(1, 7)}),
    Case("empty-batch", lambda: {"logits": normal(0, 4)}),
    Case("many-blocks", lambda: {"logits": normal(300, 6)}, {"top_k": 3, "capacity": 100}),
    Case("many-experts", lambda: {"logits": normal(150, 200)}, {"top_k": 4, "capacity": 3}),
    Case("strided", lambda: {"logits": normal(5, 9).mT}),
]


def route_registered(tensors: Tensors, options: dict[str, Any], backend: str) -> list[tuple[Any, tuple]]:
    logits, mask = tensors["logits"], tensors.get("mask")
    settings = (mask, options.get("top_k", 2), options.get("capacity", -1), options.get("renormalize", False))
    found = routing.moe_route(logits.detach(), *settings, backend)
    gates, balance = torch.ones_like(found[0]), torch.ones_like(found[1])
    return [
        (routing.moe_route, (logits, *settings, backend)),
        (routing.moe_route_backward, (gates, balance, found[7], found[2], found[6], mask, settings[3], backend)),
    ]


SPECS = [
    Spec(
        "moe_route",
        differentiable,
        ROUTE_CASES,
        route_registered,
        representative=Case("vision", lambda: {"logits": normal(788, 4)}, {"capacity": 472}),
        backends=("cpp", "triton"),
        gemm=False,
    ),
    Spec(
        "moe_ffn",
        moe_ffn,
        CASES,
        registered,
        representative=Case("vision", lambda: make(197, 128, 256, 4, capacity=118)),
        backends=("cpp", "triton"),
    ),
]
