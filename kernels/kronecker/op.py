"""Registration of the KromHC ops for factors that are all 2×2: three forwards, and their backwards as ops of their own.

Streams x (N, n, C) float32, bfloat16, float16 or float64; h, weight, bias and the saved [z | r] are float32 (float64
beside float64), whatever the streams are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..autograd import differentiable, first_order
from ..precision import HALVES
from . import eager

DTYPES = {"cpp": (torch.float32, torch.bfloat16), "triton": (torch.float32, *HALVES)}
PRE = dispatch.register("kronecker_pre", **DTYPES)
POST = dispatch.register("kronecker_post", **DTYPES)
STEP = dispatch.register("kronecker_step", **DTYPES)
# Numbers of streams that the compiled kernels hold in registers, or on the CPU in the L1 cache.
FUSED_STREAMS = {"cpp": (2, 4, 8, 16, 32), "triton": (2, 4, 8)}


def _factors(x: Tensor) -> list[int]:
    return [2] * (x.shape[1].bit_length() - 1)


def _backend(op: dispatch.Op, x: Tensor, backend: str) -> str:
    chosen = dispatch.pick(op, x, backend)
    if chosen == "eager" or x.shape[1] in FUSED_STREAMS[chosen]:
        return chosen
    if backend:
        allowed = ", ".join(map(str, FUSED_STREAMS[chosen]))
        raise dispatch.BackendError(f"{op.name}: the {backend} backend takes {allowed} streams, got {x.shape[1]}")
    return "eager"


def _kernels(backend: str) -> Any:
    if backend == "cpp":
        return torch.ops.grassland_cpp
    from . import fused

    return fused


def _new(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty u, h and [z | r] for streams x; `h` is any tensor of the coefficients' dtype."""
    tokens, columns = x.shape[0], 2 * x.shape[1] + x.shape[1].bit_length() - 1
    return x.new_empty(tokens, x.shape[2]), h.new_empty(tokens, columns), h.new_empty(tokens, columns + 1)


@dispatch.opaque("kronecker_pre")
def kronecker_pre(x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(u, h, [z | r])."""
    backend = _backend(PRE, x, backend)
    if backend == "eager":
        return eager.pre(x, weight, bias, _factors(x), eps)
    return _kernels(backend).kronecker_pre(x.contiguous(), weight.contiguous(), bias.contiguous(), eps)


@kronecker_pre.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return _new(x, weight)


@dispatch.opaque("kronecker_pre_backward")
def kronecker_pre_backward(
    du: Tensor, dh: Tensor, x: Tensor, weight: Tensor, h: Tensor, saved: Tensor, eps: float, backend: str,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dweight, dbias); the dx that comes in is what else flows into the streams."""
    backend = _backend(PRE, x, backend)
    if backend == "eager":
        wide = None if dx is None else dx.to(weight.dtype)
        dx, dweight, dbias = eager.pre_backward(du, dh, x, weight, h, saved, eps, wide)
        return dx.to(x.dtype), dweight, dbias
    tensors = (t.contiguous() for t in (du, dh, x, weight, h, saved))
    return _kernels(backend).kronecker_pre_backward(None if dx is None else dx.contiguous(), *tensors, eps)


@kronecker_pre_backward.register_fake
def _(
    du: Tensor, dh: Tensor, x: Tensor, weight: Tensor, h: Tensor, saved: Tensor, eps: float, backend: str,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


@dispatch.opaque("kronecker_post")
def kronecker_post(x: Tensor, y: Tensor, h: Tensor, backend: str) -> Tensor:
    """X' = H_res X + h_post (x) y."""
    backend = _backend(POST, x, backend)
    if backend == "eager":
        return eager.post(x, y, h, _factors(x))
    return _kernels(backend).kronecker_post(x.contiguous(), y.contiguous(), h.contiguous())


@kronecker_post.register_fake
def _(x: Tensor, y: Tensor, h: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@dispatch.opaque("kronecker_post_backward")
def kronecker_post_backward(
    grad: Tensor, x: Tensor, y: Tensor, h: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, dh)."""
    backend = _backend(POST, x, backend)
    if backend == "eager":
        dx, dy, dh = eager.post_backward(grad, x, y, h)
        return dx.to(x.dtype), dy.to(y.dtype), dh
    return _kernels(backend).kronecker_post_backward(*(t.contiguous() for t in (grad, x, y, h)))


@kronecker_post_backward.register_fake
def _(grad: Tensor, x: Tensor, y: Tensor, h: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape), h.new_empty(h.shape)


@dispatch.opaque("kronecker_step")
def kronecker_step(
    x: Tensor, y: Tensor, h: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(X', u, h, [z | r]): post of one sublayer and pre of the next in one pass."""
    backend = _backend(STEP, x, backend)
    if backend == "eager":
        following = eager.post(x, y, h, _factors(x))
        return (following, *eager.pre(following, weight, bias, _factors(x), eps))
    return _kernels(backend).kronecker_step(*(t.contiguous() for t in (x, y, h, weight, bias)), eps)


@kronecker_step.register_fake
def _(
    x: Tensor, y: Tensor, h: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (x.new_empty(x.shape), *_new(x, weight))


@dispatch.opaque("kronecker_step_backward")
def kronecker_step_backward(
    dx: Tensor, du: Tensor, dh: Tensor, x: Tensor, y: Tensor, h: Tensor, weight: Tensor, following_h: Tensor,
    saved: Tensor, eps: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dy, dh, dweight, dbias); X' is computed again."""
    backend = _backend(STEP, x, backend)
    if backend == "eager":
        following = eager.post(x, y, h, _factors(x))
        wide = dx.to(weight.dtype)
        grad, dweight, dbias = eager.pre_backward(du, dh, following, weight, following_h, saved, eps, wide)
        dx, dy, dh = eager.post_backward(grad, x, y, h)
        return dx.to(x.dtype), dy.to(y.dtype), dh, dweight, dbias
    tensors = (t.contiguous() for t in (dx, du, dh, x, y, h, weight, following_h, saved))
    return _kernels(backend).kronecker_step_backward(*tensors, eps)


@kronecker_step_backward.register_fake
def _(
    dx: Tensor, du: Tensor, dh: Tensor, x: Tensor, y: Tensor, h: Tensor, weight: Tensor, following_h: Tensor,
    saved: Tensor, eps: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    streams = (x.new_empty(x.shape), y.new_empty(y.shape), h.new_empty(h.shape))
    return (*streams, weight.new_empty(weight.shape), weight.new_empty(weight.shape[0]))


def _setup_pre(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, _, ctx.eps, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1], output[2])


def _backward_pre(ctx: Any, du: Tensor | None, dh: Tensor | None, _: Any, dx: Tensor | None = None) -> tuple:
    x, weight, h, saved = ctx.saved_tensors
    du, dh = _filled(du, dh, x, h)
    return (*kronecker_pre_backward(du, dh, x, weight, h, saved, ctx.eps, ctx.backend, dx), None, None)


def _filled(du: Tensor | None, dh: Tensor | None, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros where nothing flows in."""
    du = x.new_zeros(x.shape[0], x.shape[2]) if du is None else du
    return du, torch.zeros_like(h) if dh is None else dh


def _setup_post(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward_post(ctx: Any, grad: Tensor) -> tuple:
    return (*kronecker_post_backward(grad, *ctx.saved_tensors, ctx.backend), None)


def _setup_step(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, y, h, weight, _, ctx.eps, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y, h, weight, output[2], output[3])


def _backward_step(ctx: Any, dx: Tensor | None, du: Tensor | None, dh: Tensor | None, _: Any) -> tuple:
    x, y, h, weight, after, saved = ctx.saved_tensors
    dx = torch.zeros_like(x) if dx is None else dx
    tensors = (dx, *_filled(du, dh, x, after), x, y, h, weight, after, saved)
    return (*kronecker_step_backward(*tensors, ctx.eps, ctx.backend), None, None)


pre = differentiable(kronecker_pre, _backward_pre, _setup_pre)
post = differentiable(kronecker_post, _backward_post, _setup_post)
step = differentiable(kronecker_step, _backward_step, _setup_step)
_backward_open = first_order("kronecker_open", _backward_pre)


class KroneckerOpen(torch.autograd.Function):
    """`kronecker_pre` that passes the streams on: (x, u, h). Their gradient comes back here and joins in the backward's
    own pass, where autograd would add two tensors of their size. (A custom op must not return its input.)"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        output = kronecker_pre(x, weight, bias, eps, backend)
        _setup_pre(ctx, (x, weight, bias, eps, backend), output)
        return x.view_as(x), *output[:2]

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, du: Tensor | None, dh: Tensor | None) -> tuple:
        return _backward_open(ctx, du, dh, None, dx)
