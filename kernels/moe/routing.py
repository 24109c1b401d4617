"""Registration of moe_route: probabilities, choice, counting sort and balance loss in one opaque op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..autograd import differentiable
from ..precision import HALVES, accumulation
from . import eager

OP = dispatch.register("moe_route", cpp=(torch.float32, torch.bfloat16), triton=(torch.float32, *HALVES))

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dispatch.opaque("moe_route")
def moe_route(
    logits: Tensor, mask: Tensor | None, top_k: int, capacity: int, renormalize: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Routing` in their order, then the probabilities (T, E); capacity < 0 drops nothing."""
    backend = dispatch.pick(OP, logits, backend)
    if backend == "eager":
        r, probabilities = eager.route(logits, mask, top_k, capacity, renormalize)
        return r.gates, r.balance, r.experts, r.slots, r.order, r.offsets, r.counts, probabilities
    logits = logits.float().contiguous()
    mask = None if mask is None else mask.contiguous()
    if backend == "triton":
        from . import fused

        return fused.route(logits, mask, top_k, capacity, renormalize)
    return torch.ops.grassland_cpp.moe_route(logits, mask, top_k, capacity, renormalize)


@moe_route.register_fake
def _(logits: Tensor, mask: Tensor | None, top_k: int, capacity: int, renormalize: bool, backend: str) -> Parts:
    tokens, experts = logits.shape
    wide = accumulation(logits.dtype)
    return (
        logits.new_empty(tokens, top_k, dtype=wide),
        logits.new_empty((), dtype=wide),
        logits.new_empty(tokens, top_k, dtype=torch.int64),
        logits.new_empty(tokens, top_k, dtype=torch.int64),
        logits.new_empty(tokens * top_k, dtype=torch.int64),
        logits.new_empty(experts + 1, dtype=torch.int64),
        logits.new_empty(experts, dtype=torch.int64),
        logits.new_empty(tokens, experts, dtype=wide),
    )


@dispatch.opaque("moe_route_backward")
def moe_route_backward(
    grad_gates: Tensor,
    grad_balance: Tensor,
    probabilities: Tensor,
    experts: Tensor,
    counts: Tensor,
    mask: Tensor | None,
    renormalize: bool,
    backend: str,
) -> Tensor:
    """dlogits (T, E) in the dtype of the probabilities."""
    backend = dispatch.pick(OP, probabilities, backend)
    mask = None if mask is None else mask.contiguous()
    arguments = grad_gates.contiguous(), grad_balance, probabilities, experts, counts, mask, renormalize
    if backend == "eager":
        return eager.route_backward(*arguments)
    if backend == "triton":
        from . import fused

        return fused.route_backward(*arguments)
    return torch.ops.grassland_cpp.moe_route_backward(*arguments)


@moe_route_backward.register_fake
def _(
    grad_gates: Tensor,
    grad_balance: Tensor,
    probabilities: Tensor,
    experts: Tensor,
    counts: Tensor,
    mask: Tensor | None,
    renormalize: bool,
    backend: str,
) -> Tensor:
    return torch.empty_like(probabilities)


def _setup_context(ctx: Any, inputs: tuple, output: Parts) -> None:
    logits, mask, _, _, ctx.renormalize, ctx.backend = inputs
    ctx.dtype = logits.dtype
    ctx.mark_non_differentiable(*output[2:])
    # Else autograd would write zeros for each of those.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[7], output[2], output[6], mask)


def _backward(ctx: Any, grad_gates: Tensor | None, grad_balance: Tensor | None, *_: Tensor | None) -> tuple:
    probabilities, experts, counts, mask = ctx.saved_tensors
    if grad_gates is None:
        grad_gates = probabilities.new_zeros(experts.shape)
    if grad_balance is None:
        grad_balance = probabilities.new_zeros(())
    found = moe_route_backward(
        grad_gates, grad_balance, probabilities, experts, counts, mask, ctx.renormalize, ctx.backend
    )
    return found.to(ctx.dtype), None, None, None, None, None


route = differentiable(moe_route, _backward, _setup_context)
