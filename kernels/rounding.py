"""PyTorch's dtypes in Triton, and storing in half precision."""

# Triton's constexpr parameters take plain values, and its language is not quite Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import dispatch

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# The interpreter converts to bfloat16 by cutting bits off.
ROUND = tl.constexpr(dispatch.interpreted())


@triton.jit
def store(pointer, value, mask):
    """tl.store of a float32 value, rounded to the pointer's type in the interpreter, too."""
    if ROUND:  # noqa: SIM102 (each condition is decided when the kernel is compiled)
        if pointer.dtype.element_ty == tl.bfloat16:
            bits = value.to(tl.int32, bitcast=True)
            value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    tl.store(pointer, value, mask=mask)
