"""What a layer asks of its input and of its inner modules before it hands them to a kernel."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..kernels.launch import autocast_dtype
from ..kernels.products import linear


def check_input(
    x: Tensor, dim: int, layer: nn.Module | Tensor | None = None, *, sequence: bool = False, name: str = "x"
) -> None:
    """ValueError unless x is (…, dim), or (B, T, dim) for a sequence; TypeError unless it is floating-point and,
    without autocast, of the dtype of `layer.weight`. layer: the one that reads x first, or its weight. name: what
    the caller calls x."""
    if x.dim() == 0 or x.shape[-1] != dim or (sequence and x.dim() != 3):
        raise ValueError(f"{name} must be ({'B, T' if sequence else '…'}, {dim}), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
    # Whoever replaces a layer need not give the new one a weight, and one of single bytes is stored for another dtype.
    weight = layer if isinstance(layer, Tensor) else getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or x.dtype == weight.dtype or weight.dtype.itemsize == 1:
        return
    if autocast_dtype(x.device.type) is None:
        raise TypeError(f"{name} must have the dtype of the layer's weights, {weight.dtype}, got {x.dtype}")


def check_eps(norm_eps: float) -> None:
    """ValueError unless a LayerNorm can add it to a variance."""
    if not (isinstance(norm_eps, Real) and 0 <= norm_eps < math.inf):
        raise ValueError(f"norm_eps must be at least 0 and finite, got {norm_eps!r}")


def check_dropout(dropout: float) -> None:
    """ValueError unless it is a rate that leaves something."""
    if not (isinstance(dropout, Real) and 0 <= dropout < 1):
        raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")


def check_positive(**values: Any) -> None:
    """ValueError unless all are positive integers."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def branch_output(out: Any) -> Tensor:
    """What joins the stream of what a branch returns, which is a tensor or a tuple that begins with one; TypeError for
    anything else."""
    y = out[0] if isinstance(out, tuple) and out else out
    if not isinstance(y, Tensor):
        raise TypeError(f"a branch must return a tensor, or a tuple whose first entry is one, got {type(y).__name__}")
    return y


def is_plain(layer: nn.Module) -> bool:
    """Whether `layer` is torch's own Linear or Embedding and calling it does no more than read its weight and bias.

    A kernel may then take these in its place. An adapter around it, a quantised one or one with hooks must be called.
    """
    return (
        type(layer) in (nn.Linear, nn.Embedding)
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and "forward" not in layer.__dict__
    )


def project(layer: Any, x: Tensor) -> Tensor:
    """layer(x), of a plain Linear by the product that is fastest."""
    if is_plain(layer) and not _has_any_global_hook():
        return linear(x, layer.weight, layer.bias)
    return layer(x)


def first_rows(embedding: Any, length: int, device: torch.device) -> Tensor:
    """What `embedding` gives for the ids 0 … length − 1, (length, dim)."""
    if is_plain(embedding):
        return embedding.weight[:length]
    return embedding(torch.arange(length, device=device))
