"""Registration of gated_blend, as op.py does it for plucker_mix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..autograd import differentiable
from ..precision import HALVES, accumulation
from . import eager


def triton_kernels() -> Any:
    """Imported on first use: Triton need not be there."""
    from . import fused

    return fused


def rows(t: Tensor) -> Tensor:
    """(…, d) as (tokens, d); -1 would not do for d = 0."""
    return t.view(math.prod(t.shape[:-1]), t.shape[-1])


OP = dispatch.register("gated_blend", cpp=(torch.float32, torch.bfloat16), triton=(torch.float32, *HALVES))


@dispatch.opaque("gated_blend")
def gated_blend(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """(out, alpha), contiguous."""
    backend = dispatch.pick(OP, g, backend)
    if backend == "eager":
        out, alpha = eager.gated_blend(x, g, weight, bias)
        return out.contiguous(), alpha.contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    xs, gs = rows(x.contiguous()), rows(g.contiguous())
    if backend == "triton":
        out, alpha = triton_kernels().gated_blend(xs, gs, weight, bias)
    else:
        out, alpha = torch.ops.grassland_cpp.gated_blend(xs, xs.to(g.dtype), gs, weight, bias)
    return out.view(x.shape), alpha.view(x.shape)


@gated_blend.register_fake
def _(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), g.new_empty(g.shape)


@dispatch.opaque("gated_blend_backward")
def gated_blend_backward(
    grad: Tensor, x: Tensor, g: Tensor, weight: Tensor, alpha: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dg, dweight, dbias)."""
    backend = dispatch.pick(OP, g, backend)
    dim, weight = weight.shape[0], weight.contiguous()
    grads, xs, gs, alphas = (rows(t.contiguous()) for t in (grad, x, g, alpha))
    if backend == "eager":
        dx, dg, dlogit = eager.gated_blend_backward(grads, xs, gs, weight, alphas)
    elif backend == "triton":
        dx, dg, dlogit = triton_kernels().gated_blend_backward(grads, xs, gs, weight, alphas)
    else:
        arguments = (grads, xs, xs.to(g.dtype), gs, weight, alphas)
        dx, dg, dlogit, dweight = torch.ops.grassland_cpp.gated_blend_backward(*arguments)
        if dx.dtype != dlogit.dtype:
            dx += dlogit @ weight[:, :dim]
    total = accumulation(g.dtype)
    dbias = triton_kernels().column_sum(dlogit) if backend == "triton" else dlogit.sum(0, dtype=total)
    if backend != "cpp":
        dweight = torch.empty_like(weight)
        torch.mm(dlogit.T, xs.to(g.dtype), out=dweight[:, :dim])
        torch.mm(dlogit.T, gs, out=dweight[:, dim:])
    return dx.view(x.shape), dg.view(g.shape), dweight, dbias.to(g.dtype)


@gated_blend_backward.register_fake
def _(
    grad: Tensor, x: Tensor, g: Tensor, weight: Tensor, alpha: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), g.new_empty(g.shape), weight.new_empty(weight.shape), g.new_empty(weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, g, weight, _, ctx.backend = inputs
    ctx.save_for_backward(x, g, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple:
    if grad is None:
        return None, None, None, None, None
    return *gated_blend_backward(grad, *ctx.saved_tensors, ctx.backend), None


blend = differentiable(gated_blend, _backward, _setup_context)
