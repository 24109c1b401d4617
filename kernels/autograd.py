"""How ops are differentiated, and gradients that a forward computed already, on their way out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import batched

_C: Any = torch._C


def differentiable(op: Any, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> Callable[..., Any]:
    """Gives the custom op a derivative, and returns what to call it by, with positional arguments.

    What traces meets the registered derivative. Eager calls go through a Function around the opaque op, which leaves a
    GPU's host half the work that torch.library's generated one does.
    """
    op.register_autograd(backward, setup_context=setup_context)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = op(*inputs)
        setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(first_order(op.name, backward))}
    function: Any = type(op.name, (torch.autograd.Function,), methods)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return op(*inputs)
        return function.apply(*inputs)

    return call


def first_order(name: str, backward: Callable[..., Any]) -> Callable[..., tuple]:
    """A Function's backward whose gradients raise where they are differentiated again."""

    def marked(ctx: Any, *grads: Any) -> tuple:
        found = backward(ctx, *grads)
        if torch.is_grad_enabled():
            found = once(name, found, tuple(t for t in (*grads, *ctx.saved_tensors) if t is not None))
        return tuple(found)

    return marked


def differentiable_loss(op: Any, name: str) -> Callable[..., Any]:
    """`differentiable` for a loss that computes its gradients by its first two inputs in the forward: its outputs are
    the loss and these, in whatever dtype does not lose by it and times the op's fourth argument, the factor that the
    backward will most likely be asked for. `name` is what a second derivative's error calls it."""

    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        # Without this, autograd would write zeros of the weight's size for the two outputs that nobody uses.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])
        # Not among the saved ones: their values, which may change before the backward, do not matter to it.
        ctx.sources, ctx.share = inputs[:2], inputs[3]

    def backward(ctx: Any, grad: Tensor | None, *_: object) -> tuple:
        found: list[Tensor | None] = [None, None]
        if grad is not None:
            saved = zip(ctx.saved_tensors, ctx.sources, ctx.needs_input_grad[:2], strict=True)
            factor = grad if ctx.share == 1 else grad / ctx.share
            found = [scaled(gradient, factor, source.dtype) if needed else None for gradient, source, needed in saved]
            if torch.is_grad_enabled():
                found = once(name, found, (grad, *ctx.sources))
            if not _C._autograd._get_current_graph_task_keep_graph():
                ctx.sources = None
        return (*found, *[None] * (len(ctx.needs_input_grad) - 2))

    return differentiable(op, backward, setup_context)


def scaled(saved: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`saved` times the scalar `factor`, then as `dtype`; for the backward of an op that saved its gradients.

    An op with float16 inputs saves float32: the factor holds the loss scale and 1 / rows, without which a float16
    gradient underflows. The factor is not rounded to bfloat16: a CPU, where gradients are saved in it, multiplies by a
    float32 scalar. In place where autograd frees the graph afterwards, which spares a tensor of the weight's size: on a
    CPU, most of such a pass is the first touch of fresh memory; and not at all where a CPU's factor is 1. With
    `retain_graph` or `create_graph` the saved one stays as it is.
    """
    factor = factor.to(torch.promote_types(saved.dtype, torch.float32))
    wide = torch.promote_types(saved.dtype, dtype)
    if wide != saved.dtype:
        return (saved.to(wide) * factor).to(dtype)
    # What traces a backward (torch.compile) has tensor types of its own, and does without the spare tensor anyway. A
    # vectorised Jacobian has many factors in one.
    traced, many = type(saved) is not Tensor, batched(factor)
    if traced or many or _C._autograd._get_current_graph_task_keep_graph():
        return (saved * factor).to(dtype)
    if factor.device.type != "cpu" or factor.item() != 1:
        saved.mul_(factor)
    return saved.to(dtype)


def once(name: str, gradients: Sequence[Tensor | None], sources: tuple[Tensor, ...]) -> list[Tensor | None]:
    """`gradients` that raise where they are differentiated again.

    sources: what they depend on. Gradients that an op has saved would be constants to autograd, and a penalty on them
    would train on nothing.
    """
    marked = iter(_Once.apply(name, *(g for g in gradients if g is not None), *sources))
    return [None if g is None else next(marked) for g in gradients]


class _Once(torch.autograd.Function):
    """All tensors; backward, an error."""

    @staticmethod
    def forward(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple:
        raise RuntimeError(f"{ctx.name} cannot be differentiated twice: backend='reference' can")
