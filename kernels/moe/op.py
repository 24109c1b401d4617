"""Registration of moe_ffn: the experts on sorted rows and the combination, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from . import eager

HALVES = (torch.bfloat16, torch.float16)
OP = dispatch.register("moe_ffn", cpp=(torch.float32, torch.bfloat16), triton=(torch.float32, *HALVES))


@torch.library.custom_op("grassland::moe_ffn", mutates_args=())
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
def _(
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
    pairs = order.shape[0]
    h = x.new_empty(pairs if save else 0, w_up.shape[1])
    return x.new_empty(x.shape), h, x.new_empty(pairs if save and gelu_out else 0, x.shape[1])


@torch.library.custom_op("grassland::moe_ffn_backward", mutates_args=())
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
    backend: str,
) -> list[Tensor]:
    """[dx, dgates, db_up, db_down, dw_up, dw_down]: one buffer for each stacked weight."""
    totals = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in (w_up, w_down)]
    small = _backward_into(
        grad, x, gates, slots, order, offsets, w_up, w_down, b_down, h, o, dropout, seed, gelu_out,
        totals, False, backend,
    )  # fmt: skip
    return [*small, *totals]


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
    h: Tensor,
    o: Tensor,
    dropout: float,
    seed: Tensor | None,
    gelu_out: bool,
    backend: str,
) -> list[Tensor]:
    shapes = [x.shape, gates.shape, w_up.shape[:2], b_down.shape, w_up.shape, w_down.shape]
    return [(gates if k == 1 else x).new_empty(shape) for k, shape in enumerate(shapes)]


@torch.library.custom_op("grassland::moe_ffn_backward_into", mutates_args=("total_up", "total_down"))
def moe_ffn_backward_into(
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
    total_up: Tensor,
    total_down: Tensor,
    accumulate: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dgates, db_up, db_down); the weights' gradients go to the totals, added to what is there if `accumulate`."""
    totals = [total_up, total_down]
    return _backward_into(
        grad, x, gates, slots, order, offsets, w_up, w_down, b_down, h, o, dropout, seed, gelu_out,
        totals, accumulate, backend,
    )  # fmt: skip


@moe_ffn_backward_into.register_fake
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
    h: Tensor,
    o: Tensor,
    dropout: float,
    seed: Tensor | None,
    gelu_out: bool,
    total_up: Tensor,
    total_down: Tensor,
    accumulate: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = [x.shape, gates.shape, w_up.shape[:2], b_down.shape]
    dx, dgates, db_up, db_down = ((gates if k == 1 else x).new_empty(shape) for k, shape in enumerate(shapes))
    return dx, dgates, db_up, db_down


def _backward_into(
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
    totals: Sequence[Tensor],
    accumulate: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        list(totals), accumulate,
    )  # fmt: skip
    return dx, dgates.to(gates.dtype), db_up.to(x.dtype), db_down.to(x.dtype)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, gates, slots, order, offsets, w_up, _, w_down, b_down = inputs[:9]
    ctx.dropout, seed, ctx.gelu_out, _, ctx.backend = inputs[9:]
    _, h, o = output
    ctx.mark_non_differentiable(h, o)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gates, slots, order, offsets, w_up, w_down, b_down, h, o, seed)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple:
    if grad is None:
        return (None,) * 14
    *tensors, seed = ctx.saved_tensors
    found = moe_ffn_backward(grad, *tensors, ctx.dropout, seed, ctx.gelu_out, ctx.backend)
    dx, dgates, db_up, db_down, dw_up, dw_down = found
    return dx, dgates, None, None, None, dw_up, db_up, dw_down, db_down, *(None,) * 5


moe_ffn.register_autograd(_backward, setup_context=_setup_context)
