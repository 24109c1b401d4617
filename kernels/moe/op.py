"""Registration of moe_ffn: the experts on sorted rows and the combination, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..precision import HALVES
from . import eager

Parts = tuple[Tensor, Tensor, Tensor]
OP = dispatch.register("moe_ffn", cpp=(torch.float32, torch.bfloat16), triton=(torch.float32, *HALVES))


@dispatch.opaque("moe_ffn")
def moe_ffn(
    x: Tensor,
    gates: Tensor,
    slots: Tensor,
    order: Tensor,
    offsets: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    dropout: float,
    seed: Tensor | None,
    gelu_out: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, o); h (P, I) and o (P, H), the rows before their GELU, are empty where the backward won't need them."""
    backend = dispatch.pick(OP, x, backend)
    x, gates, slots, order, offsets, w_up, b_up, w_down, b_down = (
        t.contiguous() for t in (x, gates, slots, order, offsets, w_up, b_up, w_down, b_down)
    )
    if backend == "eager":
        y, h, o = eager.moe_ffn(x, gates, slots, order, offsets, w_up, b_up, w_down, b_down, dropout, seed, gelu_out)
        return (y, h, o) if save else (y, h[:0].clone(), o[:0].clone())
    if backend == "triton":
        from . import fused

        call = fused.moe_ffn
    else:
        call = torch.ops.grassland_cpp.moe_ffn
    gates = gates.float()
    return call(x, gates, slots, order, offsets, w_up, b_up, w_down, b_down, dropout, seed, gelu_out, save)


@moe_ffn.register_fake
def _(x: Tensor, gates: Tensor, slots: Tensor, order: Tensor, offsets: Tensor, w_up: Tensor, *rest: Any) -> Parts:
    pairs, (gelu_out, save) = order.shape[0], rest[-3:-1]
    h = x.new_empty(pairs if save else 0, w_up.shape[1])
    return x.new_empty(x.shape), h, x.new_empty(pairs if save and gelu_out else 0, x.shape[1])


@dispatch.opaque("moe_ffn_backward", ("total_up", "total_down"))
def moe_ffn_backward(
    grad: Tensor,
    x: Tensor,
    gates: Tensor,
    slots: Tensor,
    order: Tensor,
    offsets: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    h: Tensor,
    o: Tensor,
    dropout: float,
    seed: Tensor | None,
    gelu_out: bool,
    total_up: Tensor | None,
    total_down: Tensor | None,
    accumulate: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dgates, db_up, db_down). The weights' gradients go to the totals, contiguous and of the dtype of x or wider,
    added to what is there if `accumulate`; without a total, that gradient is not computed."""
    backend = dispatch.pick(OP, x, backend)
    grad, x, gates, slots, order, offsets, w_up, w_down, b_down = (
        t.contiguous() for t in (grad, x, gates, slots, order, offsets, w_up, w_down, b_down)
    )
    if backend == "eager":
        call, wide = eager.moe_ffn_backward, gates
    elif backend == "triton":
        from . import fused

        call, wide = fused.moe_ffn_backward, gates.float()
    else:
        call, wide = torch.ops.grassland_cpp.moe_ffn_backward, gates.float()
    dx, dgates, db_up, db_down = call(
        grad, x, wide, slots, order, offsets, w_up, w_down, b_down, h, o, dropout, seed, gelu_out,
        total_up, total_down, accumulate,
    )  # fmt: skip
    return dx, dgates.to(gates.dtype), db_up.to(x.dtype), db_down.to(x.dtype)


@moe_ffn_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    gates: Tensor,
    slots: Tensor,
    order: Tensor,
    offsets: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gates.new_empty(gates.shape), x.new_empty(w_up.shape[:2]), x.new_empty(b_down.shape)


def setup_context(ctx: Any, inputs: tuple, output: Parts) -> None:
    *tensors, ctx.dropout, seed, ctx.gelu_out, _, ctx.backend = inputs
    _, h, o = output
    ctx.mark_non_differentiable(h, o)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, h, o, seed)


def backward(
    ctx: Any, grad: Tensor, total_up: Tensor | None, total_down: Tensor | None, accumulate: bool
) -> tuple[Tensor, ...]:
    """What `moe_ffn_backward` returns, from what `setup_context` has kept."""
    x, gates, slots, order, offsets, w_up, _, w_down, b_down, h, o, seed = ctx.saved_tensors
    return moe_ffn_backward(
        grad, x, gates, slots, order, offsets, w_up, w_down, b_down, h, o, ctx.dropout, seed, ctx.gelu_out,
        total_up, total_down, accumulate, ctx.backend,
    )  # fmt: skip


def plain_backward(ctx: Any, grad: Tensor, wanted: tuple[bool, ...]) -> tuple:
    """Gradients of the fourteen inputs; `wanted` says of each whether it needs one."""
    weights = (ctx.saved_tensors[5], wanted[5]), (ctx.saved_tensors[7], wanted[7])
    up, down = (torch.empty_like(w, memory_format=torch.contiguous_format) if needed else None for w, needed in weights)
    dx, dgates, db_up, db_down = backward(ctx, grad, up, down, False)
    return dx, dgates, None, None, None, up, db_up, down, db_down, *(None,) * 5


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple:
    return (None,) * 14 if grad is None else plain_backward(ctx, grad, ctx.needs_input_grad)


moe_ffn.register_autograd(_backward, setup_context=setup_context)
