"""Matrix products: of half matrices, which must not lose what a half dtype cannot hold, and of linear layers."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .launch import autocast_dtype

# Numbers of a weight, and multiplications that autograd records, from which on the kernels' products make up for being
# called from Python.
LARGE, LARGE_PRODUCT = 1 << 15, 1 << 25


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, of half operands in float32 where cuBLAS can write it; of float16 in float32 in any case."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    if widens(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float() if a.dtype == torch.float16 else a @ b


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, with a large weight on a CPU by the products that the kernels are made of.

    Where no derivative is recorded these read it two to seven times as fast for the few rows of decoding. Elsewhere
    they multiply float32 on processors for which they are faster than PyTorch, those that Intel has not made.
    """
    if not (x.is_cpu and dispatch.untraced() and weight.numel() >= LARGE and _fits(x, weight, bias)):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _multiply(x, weight, bias)
    worthwhile = x.dtype == torch.float32 and x.numel() * weight.shape[0] >= LARGE_PRODUCT and _tiles_are_best()
    return _Linear.apply(x, weight, bias) if worthwhile else F.linear(x, weight, bias)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the C++ product takes these, and nobody asks for another; F.linear knows what to say of what is wrong."""
    dtype = x.dtype
    return (
        (dtype == torch.float32 or dtype == torch.bfloat16)
        and weight.dtype == dtype
        and x.dim() > 0
        and x.numel() > 0
        and weight.dim() == 2
        and weight.shape[1] == x.shape[-1]
        and (bias is None or (bias.dtype == dtype and bias.shape == weight.shape[:1] and bias.stride(0) == 1))
        and dispatch.bare((x, weight) if bias is None else (x, weight, bias))
        and dispatch.requested(None) in ("", "cpp")
        and autocast_dtype("cpu") is None
        and dispatch.extension_error() is None
    )


@functools.cache
def _tiles_are_best() -> bool:
    return torch.ops.grassland_cpp.tiles_are_best()


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.grassland_cpp.linear(_rows(x), weight, bias).view(*x.shape[:-1], weight.shape[0])


def _rows(x: Tensor) -> Tensor:
    """(…, k) as (n, k) whose rows lie side by side in themselves: others no tile reads."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


class _Linear(torch.autograd.Function):
    """`linear` with a derivative; where that is differentiated again, it is PyTorch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), needed = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled() or not (dispatch.untraced() and dispatch.bare((grad, x, weight))):
            multiply, outer = torch.matmul, lambda g, x: g.mT @ x
        else:
            multiply, outer = lambda g, w: _multiply(g, w.mT, None), torch.ops.grassland_cpp.linear_weight_backward
        rows = _rows(grad)
        dx = multiply(grad, weight) if needed[0] else None
        dweight = outer(rows.contiguous(), _rows(x).contiguous()) if needed[1] else None
        return dx, dweight, rows.sum(0) if needed[2] else None


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += product(a, b), float32 or wider; in one product, without a matrix beside it, where one can."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif widens(a):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += product(a, b)


def widens(a: Tensor) -> bool:
    """Whether there are products of half operands like `a` with a float32 result: cuBLAS has them."""
    return a.is_cuda and torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()


@functools.cache
def multiplies_halves() -> bool:
    """Whether the processor has products of bfloat16: without them those of float32 are faster."""
    return torch.cpu._is_avx512_bf16_supported()


def boost(dtype: torch.dtype, bound: float) -> float:
    """What to multiply numbers up to `bound` with before they are rounded to `dtype`: a power of two in float16, whose
    smallest number is 6e-8, else 1. A gradient that has no loss scale yet needs it."""
    return 2.0 ** math.floor(math.log2(2.0**15 / bound)) if dtype == torch.float16 else 1.0
