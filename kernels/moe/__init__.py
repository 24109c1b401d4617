"""Mixture of experts: routing and grouped feed-forward experts (arXiv 2107.11817)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..launch import autocast_dtype, without_autocast
from ..precision import accumulation
from . import eager, op, reference, routing, shared
from .reference import Routing

__all__ = ["Routing", "expert_capacity", "moe_ffn", "moe_route"]


def expert_capacity(tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Places of each expert: int(tokens · factor · top_k // num_experts) (arXiv 2107.11817, section 3.2)."""
    return torch.sym_int(tokens * factor * top_k // num_experts)  # int, but for a size that torch.export leaves open


def moe_route(
    logits: Tensor,
    *,
    top_k: int = 2,
    capacity: int | None = None,
    renormalize: bool = False,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Routing:
    """Softmax over all experts, top-k, places first come first served, and the balance loss E sum_e m_e P_e.

    m_e is the share of the assignments that chose expert e (before dropping), P_e its mean probability, both over
    unmasked tokens. Equal logits go to the expert of the lower number. A stable counting sort orders the kept pairs by
    expert, then token, without atomics and without a look at the device from the host. Source: arXiv 2107.11817,
    sections 3.1 to 3.3.

    Args:
        logits: (T, E); float32, bfloat16, float16 or float64, any layout. Probabilities are float32 or wider.
        top_k: experts a token, 1 <= top_k <= E.
        capacity: places an expert, >= 1; None drops nothing.
        renormalize: divide the gates of a token by their sum. The paper does not.
        mask: (T,) bool, False for padding, which is neither routed nor counted.
        backend: "reference", "eager", "cpp" or "triton"; None picks by $GRASSLAND_BACKEND, then by device.

    Returns:
        `Routing`; its gates and balance are differentiable, the latter through the probabilities alone.

    Raises:
        ValueError, TypeError: naming the argument that is wrong, what it was and what is allowed.
        grassland.kernels.dispatch.BackendError: when a requested backend is not there.
    """
    _check_route(logits, top_k, capacity, mask)
    chosen = dispatch.requested(backend)
    if chosen == "reference":
        with without_autocast(logits.device.type):
            if dispatch.transformed():  # vmap has no single tokens to queue
                return eager.route(logits, mask, top_k, -1 if capacity is None else capacity, renormalize)[0]
            return reference.route(logits, mask, top_k, capacity, renormalize)
    found = routing.route(logits, mask, top_k, -1 if capacity is None else capacity, renormalize, chosen)
    return Routing(*found[:7])


def moe_ffn(
    x: Tensor,
    gates: Tensor,
    slots: Tensor,
    order: Tensor,
    offsets: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    gelu_out: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y_t = sum_k g_tk E_{e_tk}(x_t) over the kept pairs, E_e(x) = Drop(W_down Drop(GELU(W_up x + b_up)) + b_down).

    GELU is the tanh form. The sum over k runs in a fixed order. The backward keeps x, the weights, the rows before
    their GELU, and nothing of the experts' outputs (except with `gelu_out`). However many calls share w_up and w_down,
    one backward sums their gradients in one float32 buffer each (under torch.compile, autograd in a copy a call). A
    second derivative is that of the eager form. Source: arXiv 2107.11817, section 3.1.

    Args:
        x: (T, H); float32, bfloat16, float16 or float64, any layout.
        gates: (T, K), the dtype of x or float32 (float64 for float64 x). slots (T, K), order (T K,), offsets (E + 1,):
            int64, as `moe_route` makes them.
        w_up: (E, I, H), b_up: (E, I), w_down: (E, H, I), b_down: (E, H), of the dtype of x. Under autocast, all five
            are cast to its dtype.
        dropout: probability in [0, 1) of a zero, behind the GELU and behind W_down.
        seed: (1,) int64 on the device of x, the number that fixes the dropped elements; None for no dropout.
        gelu_out: a second GELU on the experts' outputs, as in the official program.
        backend: "reference", "eager", "cpp" or "triton"; None picks by $GRASSLAND_BACKEND, then by device.

    Returns:
        (T, H) in the dtype of x. A token without kept pairs gets exactly 0.

    Raises:
        ValueError, TypeError: naming the argument that is wrong, what it was and what is allowed.
        grassland.kernels.dispatch.BackendError: when a requested backend is not there.
    """
    _check_ffn(x, gates, slots, order, offsets, dropout, seed)
    _check_weights(x, {"w_up": w_up, "b_up": b_up, "w_down": w_down, "b_down": b_down}, offsets)
    inputs = (x, gates, w_up, b_up, w_down, b_down)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    dtype = autocast(x)
    if dtype is not None:
        x, b_up, b_down = (t.to(dtype) for t in (x, b_up, b_down))
    seed = None if dropout == 0 else seed
    chosen = dispatch.requested(backend)
    if save and chosen != "reference" and not torch.compiler.is_compiling():
        weights = (w_up, b_up, w_down, b_down)
        return shared.moe_ffn(x, gates, slots, order, offsets, *weights, float(dropout), seed, gelu_out, chosen)
    w_up, w_down = w_up.to(x.dtype), w_down.to(x.dtype)
    if chosen == "reference":
        with without_autocast(x.device.type):
            return reference.moe_ffn(x, gates, slots, offsets, w_up, b_up, w_down, b_down, dropout, seed, gelu_out)
    return op.moe_ffn(
        x, gates, slots, order, offsets, w_up, b_up, w_down, b_down, float(dropout), seed, gelu_out, save, chosen
    )[0]


def autocast(x: Tensor) -> torch.dtype | None:
    return None if x.dtype == torch.float64 else autocast_dtype(x.device.type)


def _check_route(logits: Tensor, top_k: int, capacity: int | None, mask: Tensor | None) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (T, E) with E >= 1, got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k must be an integer from 1 to E = {logits.shape[1]}, got {top_k!r}")
    integer = isinstance(capacity, int | torch.SymInt) and not isinstance(capacity, bool)
    if capacity is not None and (not integer or capacity < 1):
        raise ValueError(f"capacity must be a positive integer or None, got {capacity!r}")
    if mask is not None:
        if mask.shape != logits.shape[:1] or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool ({logits.shape[0]},), got {mask.dtype} {tuple(mask.shape)}")
        if mask.device != logits.device:
            raise ValueError(f"mask must be on the device of logits ({logits.device}), got {mask.device}")


def _check_ffn(
    x: Tensor, gates: Tensor, slots: Tensor, order: Tensor, offsets: Tensor, dropout: float, seed: Tensor | None
) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be (T, H), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if gates.dim() != 2 or gates.shape[0] != x.shape[0]:
        raise ValueError(f"gates must be ({x.shape[0]}, K), got {tuple(gates.shape)}")
    if gates.dtype not in (x.dtype, accumulation(x.dtype)):
        raise TypeError(f"gates must have the dtype of x ({x.dtype}) or be float32 beside it, got {gates.dtype}")
    shapes = {"slots": (slots, tuple(gates.shape)), "order": (order, (gates.numel(),))}
    for name, (tensor, shape) in (shapes | {"offsets": (offsets, (offsets.numel(),))}).items():
        if tuple(tensor.shape) != shape or tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64 {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x ({x.device}), got {tensor.device}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if seed is not None and (seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != x.device):
        found = f"{seed.dtype} {tuple(seed.shape)} on {seed.device}"
        raise ValueError(f"seed must be int64 (1,) on {x.device}, got {found}")


def _check_weights(x: Tensor, weights: dict[str, Tensor], offsets: Tensor) -> None:
    experts, dim = offsets.numel() - 1, x.shape[1]
    w_up = weights["w_up"]
    if w_up.dim() != 3 or w_up.shape[0] != experts or w_up.shape[2] != dim:
        raise ValueError(f"w_up must be ({experts}, I, {dim}), got {tuple(w_up.shape)}")
    inner = w_up.shape[1]
    shapes = {"w_up": w_up.shape, "b_up": (experts, inner), "w_down": (experts, dim, inner), "b_down": (experts, dim)}
    for name, tensor in weights.items():
        if tensor.shape != shapes[name]:
            raise ValueError(f"{name} must be {tuple(shapes[name])}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype and autocast(x) is None:
            raise TypeError(f"{name} must have the dtype of x ({x.dtype}), got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x ({x.device}), got {tensor.device}")
