"""Products of half matrices whose results must not lose what a half dtype cannot hold."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, of half operands in float32 where cuBLAS can write it; of float16 in float32 in any case."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    if widens(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float() if a.dtype == torch.float16 else a @ b


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
