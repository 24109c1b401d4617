"""Registration of kronecker_projection, from a sublayer's parameters to what the other ops take, for factors that are
all 2×2. All tensors float32 or float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..autograd import differentiable
from . import eager, reference

OP = dispatch.register("kronecker_projection", cpp=(torch.float32,), triton=(torch.float32,))


def _kernels(backend: str) -> Any:
    if backend == "cpp":
        return torch.ops.grassland_cpp
    from . import fused_projection

    return fused_projection


@dispatch.opaque("kronecker_projection")
def kronecker_projection(
    alpha: Tensor, beta: Tensor, gamma: Tensor, pre: Tensor, post: Tensor, mixing: Tensor, static_alpha: Tensor,
    static_beta: Tensor, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(weight, bias)."""
    backend = dispatch.pick(OP, alpha, backend)
    tensors = (alpha, beta, gamma, pre, post, mixing, static_alpha, static_beta)
    if backend == "eager":
        return reference.projection(*tensors, factors=_pairs(alpha, beta), transposed=False)
    return _kernels(backend).kronecker_projection(*(t.contiguous() for t in tensors))


def _pairs(alpha: Tensor, beta: Tensor) -> list[int]:
    return [2] * ((alpha.shape[1] - beta.shape[1]) // 2)


@kronecker_projection.register_fake
def _(
    alpha: Tensor, beta: Tensor, gamma: Tensor, pre: Tensor, post: Tensor, mixing: Tensor, static_alpha: Tensor,
    static_beta: Tensor, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = 2 * beta.shape[1] + (alpha.shape[1] - beta.shape[1]) // 2
    return alpha.new_empty(rows, alpha.shape[0]), alpha.new_empty(rows)


@dispatch.opaque("kronecker_projection_backward")
def kronecker_projection_backward(
    dweight: Tensor, dbias: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, pre: Tensor, post: Tensor,
    mixing: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dalpha, dbeta, dgamma, those of the three scalars in one, dstatic_alpha, dstatic_beta)."""
    backend = dispatch.pick(OP, alpha, backend)
    tensors = (dweight, dbias, alpha, beta, gamma, pre, post, mixing)
    if backend == "eager":
        return eager.projection_backward(*tensors)
    return _kernels(backend).kronecker_projection_backward(*(t.contiguous() for t in tensors))


@kronecker_projection_backward.register_fake
def _(
    dweight: Tensor, dbias: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, pre: Tensor, post: Tensor,
    mixing: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    matrices = (alpha.new_empty(alpha.shape), beta.new_empty(beta.shape), gamma.new_empty(gamma.shape))
    return *matrices, pre.new_empty(3), alpha.new_empty(alpha.shape[1]), beta.new_empty(beta.shape[1])


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, _, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dweight: Tensor, dbias: Tensor) -> tuple:
    tensors = ctx.saved_tensors
    *matrices, dscales, dstatic_alpha, dstatic_beta = kronecker_projection_backward(
        dweight, dbias, *tensors, ctx.backend
    )
    scales = (d.view(t.shape) for d, t in zip(dscales.split(1), tensors[3:], strict=True))
    return *matrices, *scales, dstatic_alpha, dstatic_beta, None


project = differentiable(kronecker_projection, _backward, _setup_context)
