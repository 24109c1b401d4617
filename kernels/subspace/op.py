"""Registration of the subspace ops: opaque, with the backend as an argument; backwards are ops of their own.

`grassmann_step_` writes its first two arguments, as an optimiser must: new tensors of the weight's size would cost more
than the step itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..autograd import differentiable, differentiable_loss
from ..losses import check_labels
from ..precision import HALVES, accumulation
from ..products import multiplies_halves
from . import chunked, eager

CPP = (torch.float32, torch.bfloat16)
TRITON = (torch.float32, *HALVES)
LOGITS = dispatch.register("subspace_logits", cpp=CPP, triton=TRITON)
CROSS_ENTROPY = dispatch.register("subspace_cross_entropy", cpp=CPP, triton=TRITON)
STEP = dispatch.register("grassmann_step", cpp=CPP, triton=TRITON)


def plain(*tensors: Tensor) -> list[Tensor]:
    """What the C++ kernels take: contiguous float32."""
    return [t.float().contiguous() for t in tensors]


def narrow(x: Tensor, weight: Tensor) -> bool:
    """Whether the head's C++ kernels multiply in bfloat16: if both are and the processor does."""
    return x.dtype == weight.dtype == torch.bfloat16 and multiplies_halves()


def operands(x: Tensor, weight: Tensor) -> list[Tensor]:
    """What the head's C++ kernels take: contiguous bfloat16 or float32."""
    return [x.contiguous(), weight.contiguous()] if narrow(x, weight) else plain(x, weight)


def rows_of(backend: str) -> Any:
    """The module with the row functions of `chunked.Rows`."""
    if backend == "eager":
        return eager
    from . import fused

    return fused


@dispatch.opaque("subspace_logits")
def subspace_logits(x: Tensor, weight: Tensor, k: int, scale: float, backend: str) -> Tensor:
    backend = dispatch.pick(LOGITS, weight, backend)
    if backend == "cpp":
        return torch.ops.grassland_cpp.subspace_logits(*operands(x, weight), k, scale)
    return chunked.logits(rows_of(backend), x, weight, k, scale)


@subspace_logits.register_fake
def _(x: Tensor, weight: Tensor, k: int, scale: float, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // k, dtype=accumulation(x.dtype))


@dispatch.opaque("subspace_logits_backward")
def subspace_logits_backward(
    grad: Tensor, x: Tensor, weight: Tensor, k: int, scale: float, mask: list[bool], backend: str
) -> tuple[Tensor, Tensor]:
    """dx and dweight; empty (0,) where `mask` says that it is not needed."""
    backend = dispatch.pick(LOGITS, weight, backend)
    if backend == "cpp":
        arguments = (*plain(grad), *operands(x, weight))
        found = torch.ops.grassland_cpp.subspace_logits_backward(*arguments, k, scale, *mask)
        return found[0].to(x.dtype), found[1].to(weight.dtype)
    return chunked.logits_backward(rows_of(backend), grad, x, weight, k, scale, mask)


@subspace_logits_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, k: int, scale: float, mask: list[bool], backend: str
) -> tuple[Tensor, Tensor]:
    return _like(x, mask[0]), _like(weight, mask[1])


def _like(tensor: Tensor, needed: bool) -> Tensor:
    return tensor.new_empty(tensor.shape if needed else (0,))


def _setup_logits(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, ctx.k, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _backward_logits(ctx: Any, grad: Tensor) -> tuple:
    mask = list(ctx.needs_input_grad[:2])
    dx, dweight = subspace_logits_backward(grad, *ctx.saved_tensors, ctx.k, ctx.scale, mask, ctx.backend)
    return dx if mask[0] else None, dweight if mask[1] else None, None, None, None


logits = differentiable(subspace_logits, _backward_logits, _setup_logits)


@dispatch.opaque("subspace_cross_entropy")
def subspace_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    share: float,
    k: int,
    scale: float,
    smoothing: float,
    ignore_index: int,
    mask: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, and its gradients by x and weight times `share`: float32 or wider, but for the weight's where
    C++ multiplies in bfloat16; (0,) where `mask` says that they are not needed."""
    backend = dispatch.pick(CROSS_ENTROPY, weight, backend)
    check_labels(target, weight.shape[0] // k, ignore_index)
    if backend != "cpp":
        settings = chunked.Loss(scale, smoothing, ignore_index)
        return chunked.cross_entropy(rows_of(backend), x, weight, target, share, k, settings, mask)
    target = target.float().contiguous() if target.is_floating_point() else target.contiguous()
    return torch.ops.grassland_cpp.subspace_cross_entropy(
        *operands(x, weight), target, share, k, scale, smoothing, ignore_index, *mask
    )


@subspace_cross_entropy.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    share: float,
    k: int,
    scale: float,
    smoothing: float,
    ignore_index: int,
    mask: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulation(x.dtype)
    half = narrow(x, weight) and dispatch.pick(CROSS_ENTROPY, weight, backend) == "cpp"
    dweight = _like(weight, mask[1])
    return x.new_empty((), dtype=wide), _like(x, mask[0]).to(wide), dweight if half else dweight.to(wide)


cross_entropy = differentiable_loss(subspace_cross_entropy, "subspace_cross_entropy")


@dispatch.opaque("grassmann_step")
def grassmann_step(
    weight: Tensor, buffer: Tensor, grad: Tensor, k: int, lr: float, momentum: float, carry: str, backend: str
) -> tuple[Tensor, Tensor]:
    """The next weight and momentum buffer."""
    backend = dispatch.pick(STEP, weight, backend)
    if backend == "eager":
        moved, stored = eager.grassmann_step(weight, buffer, grad, k, lr, momentum, carry)
        return moved.contiguous(), stored.contiguous()
    weight, buffer = (t.clone(memory_format=torch.contiguous_format) for t in (weight, buffer))
    _step(weight, buffer, grad, k, lr, momentum, carry, backend)
    return weight, buffer


@grassmann_step.register_fake
def _(
    weight: Tensor, buffer: Tensor, grad: Tensor, k: int, lr: float, momentum: float, carry: str, backend: str
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), buffer.new_empty(buffer.shape)


@dispatch.opaque("grassmann_step_", ("weight", "buffer"))
def grassmann_step_(
    weight: Tensor, buffer: Tensor, grad: Tensor, k: int, lr: float, momentum: float, carry: str, backend: str
) -> None:
    _step(weight, buffer, grad, k, lr, momentum, carry, dispatch.pick(STEP, weight, backend))


@grassmann_step_.register_fake
def _(
    weight: Tensor, buffer: Tensor, grad: Tensor, k: int, lr: float, momentum: float, carry: str, backend: str
) -> None:
    return None


def _step(
    weight: Tensor, buffer: Tensor, grad: Tensor, k: int, lr: float, momentum: float, carry: str, backend: str
) -> None:
    """Overwrites weight and buffer."""
    if backend == "triton":
        from . import fused_step

        return fused_step.grassmann_step_(weight, buffer, grad, k, lr, momentum, carry)
    if backend == "eager":
        moved, stored = eager.grassmann_step(weight, buffer, grad, k, lr, momentum, carry)
    else:
        moved, stored, grad = plain(weight, buffer, grad)
        torch.ops.grassland_cpp.grassmann_step_(moved, stored, grad, k, lr, momentum, MODES.index(carry))
    for tensor, result in ((weight, moved), (buffer, stored)):
        # `plain` hands over the very tensor where it is float32 and contiguous.
        if result.data_ptr() != tensor.data_ptr():
            tensor.copy_(result)
    return None


MODES = ("official", "project", "transport")
