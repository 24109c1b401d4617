"""How ops are differentiated, and gradients that a forward computed already, on their way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(op._name, (torch.autograd.Function,), methods)

    def call(*inputs: Any) -> Any:
        return op(*inputs) if torch.compiler.is_compiling() else function.apply(*inputs)

    return call


def scaled(saved: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`saved` times the scalar `factor`, then as `dtype`; for the backward of an op that saved its gradients.

    An op with half inputs saves float32: the factor holds the loss scale and 1 / rows, without which a half gradient
    underflows. In place where autograd frees the graph afterwards, which spares a tensor of the weight's size: on a
    CPU, most of such a pass is the first touch of fresh memory. With `retain_graph` or `create_graph` the saved one
    stays as it is.
    """
    factor = factor.to(saved.dtype)
    # What traces a backward (torch.compile) has tensor types of its own, and does without the spare tensor anyway.
    if type(saved) is not Tensor or _C._autograd._get_current_graph_task_keep_graph():
        return (saved * factor).to(dtype)
    return saved.mul_(factor).to(dtype)


def once(name: str, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """`gradients` that raise where they are differentiated again, for the backward of an op that saved them.

    To autograd they are constants: a penalty on them would train on nothing.
    """
    found = [g for g in gradients if g is not None]
    if not torch.is_grad_enabled() or not found:
        return gradients
    stop = _C._functions.DelayedError(f"{name} cannot be differentiated twice".encode(), len(found))
    marked = stop(*(g.detach().requires_grad_() for g in found))
    rest = iter([marked] if len(found) == 1 else marked)
    return tuple(None if g is None else next(rest) for g in gradients)
