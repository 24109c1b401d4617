"""Gradients that a forward computed already, on their way out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_C: Any = torch._C


def scaled(saved: Tensor, factor: Tensor) -> Tensor:
    """`saved` times the scalar `factor`, in saved's dtype; for the backward of an op that saved its gradients.

    In place where autograd frees the graph afterwards, which spares a tensor of the weight's size: on a CPU, most of
    such a pass is the first touch of fresh memory. With `retain_graph` or `create_graph` the saved one stays as it is.
    """
    factor = factor.to(saved.dtype)
    # What traces a backward (torch.compile) has tensor types of its own, and does without the spare tensor anyway.
    if type(saved) is not Tensor or _C._autograd._get_current_graph_task_keep_graph():
        return saved * factor
    return saved.mul_(factor)
