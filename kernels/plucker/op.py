"""Registration of plucker_mix: one opaque op whose backend is an argument, and its backward as an op of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..autograd import differentiable
from ..precision import HALVES
from . import eager

OP = dispatch.register(
    "plucker_mix",
    cpp=(torch.float32, torch.bfloat16),
    triton=(torch.float32, *HALVES),
    cuda=(torch.float32, torch.bfloat16),
)


# What the CUDA C++ kernels hold in registers and in their arguments.
MAX_RANK, MAX_OFFSETS = 128, 64


def unfit(z: Tensor, offsets: list[int]) -> tuple[str, ...]:
    """Backends that cannot take these sizes."""
    return ("cuda",) if z.shape[-1] > MAX_RANK or len(offsets) > MAX_OFFSETS else ()


@dispatch.opaque("plucker_mix")
def plucker_mix(
    z: Tensor, weight: Tensor, bias: Tensor | None, offsets: list[int], eps: float, context: int, backend: str
) -> Tensor:
    backend = dispatch.pick(OP, weight, backend, unfit(z, offsets))
    if backend == "eager":
        return eager.plucker_mix(z, weight, bias, offsets, eps, context).contiguous()
    if backend == "triton":
        from . import fused

        return fused.plucker_mix(z, weight, bias, offsets, eps, context)
    z, weight = z.float().contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    if backend == "cuda":
        return torch.ops.grassland_cuda.plucker_mix(z, weight, bias, offsets, eps)[:, context:].contiguous()
    return torch.ops.grassland_cpp.plucker_mix(z, weight, bias, offsets, eps, context)


@plucker_mix.register_fake
def _(
    z: Tensor, weight: Tensor, bias: Tensor | None, offsets: list[int], eps: float, context: int, backend: str
) -> Tensor:
    return weight.new_empty(z.shape[0], z.shape[1] - context, weight.shape[0])


def bias_gradient(grad: Tensor, first: int) -> Tensor:
    """Sum (d,) of grad (B, L, d) on a GPU over the tokens from `first` on, in float32."""
    # PyTorch's sum took twice the time of Triton's.
    if dispatch.triton_error() is not None or grad.numel() == 0:
        return grad[:, first:].sum((0, 1), dtype=torch.float32)
    from . import fused

    return fused.column_sum(grad.flatten(0, 1), grad.shape[1], first)


@dispatch.opaque("plucker_mix_backward")
def plucker_mix_backward(
    grad: Tensor, z: Tensor, weight: Tensor, offsets: list[int], eps: float, mask: list[bool], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dweight, dbias); empty (0,) where `mask` says that it is not needed. No list: PyTorch could not make a
    vectorised Jacobian of it."""
    backend = dispatch.pick(OP, weight, backend, unfit(z, offsets))
    if backend == "eager":
        found = eager.plucker_mix_backward(grad, z, weight, offsets, eps, mask)
    elif backend == "triton":
        from . import fused

        found = fused.plucker_mix_backward(grad, z, weight, offsets, eps, mask)
    else:
        z32, grad, w = z.float().contiguous(), grad.contiguous(), weight.contiguous()
        if backend == "cuda":
            found = torch.ops.grassland_cuda.plucker_mix_backward(grad, z32, w, offsets, eps, *mask[:2])
            found = [*found, bias_gradient(grad, min(offsets)) if mask[2] else None]
        else:
            found = torch.ops.grassland_cpp.plucker_mix_backward(grad, z32, w, offsets, eps, *mask)
        dz, dweight, dbias = found
        found = [dz.to(z.dtype), dweight.to(weight.dtype), None if dbias is None else dbias.to(weight.dtype)]
    pairs = zip(found, mask, strict=True)
    dz, dweight, dbias = (g.contiguous() if needed and g is not None else z.new_empty(0) for g, needed in pairs)
    return dz, dweight, dbias


@plucker_mix_backward.register_fake
def _(
    grad: Tensor, z: Tensor, weight: Tensor, offsets: list[int], eps: float, mask: list[bool], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    full = [z.new_empty(z.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])]
    dz, dweight, dbias = (g if needed else z.new_empty(0) for g, needed in zip(full, mask, strict=True))
    return dz, dweight, dbias


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    z, weight, _, ctx.offsets, ctx.eps, ctx.context, ctx.backend = inputs
    ctx.save_for_backward(z, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    mask = list(ctx.needs_input_grad[:3])
    if ctx.context:
        grad = F.pad(grad, (0, 0, ctx.context, 0))
    found = plucker_mix_backward(grad, *ctx.saved_tensors, ctx.offsets, ctx.eps, mask, ctx.backend)
    dz, dweight, dbias = (g if needed else None for g, needed in zip(found, mask, strict=True))
    return dz, dweight, dbias, None, None, None, None


mix = differentiable(plucker_mix, _backward, _setup_context)
