"""Kronecker-product residual mixing of hyper-connections: KromHC (arXiv 2601.21579)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from ..launch import without_autocast
from ..precision import HALVES, accumulation
from . import eager, op, projection, reference

__all__ = [
    "kronecker_columns",
    "kronecker_factors",
    "kronecker_matrix",
    "kronecker_open",
    "kronecker_post",
    "kronecker_pre",
    "kronecker_projection",
    "kronecker_step",
]

EPS = 1e-12
LARGEST_FACTOR = 4


def kronecker_factors(streams: int, factors: Sequence[int] | None = None) -> tuple[int, ...]:
    """The factors of n streams, given or chosen: 2s, then a 3 where needed, largest index digit first.

    Raises:
        ValueError: when `streams` is not a positive integer, `factors` do not multiply to it or are not 2, 3 or 4, or
            `streams` has a prime factor above 3.
    """
    if isinstance(streams, bool) or not isinstance(streams, int) or streams < 1:
        raise ValueError(f"num_streams must be a positive integer, got {streams!r}")
    if factors is not None:
        found = tuple(factors)
        if any(i not in (2, 3, 4) for i in found) or math.prod(found) != streams:
            raise ValueError(f"factors must be 2, 3 or 4 and multiply to num_streams={streams}, got {factors!r}")
        return found
    rest, found = streams, []
    for prime in (2, 3):
        while rest % prime == 0:
            rest //= prime
            found.append(prime)
    if rest > 1:
        raise ValueError(f"num_streams must be a product of factors up to {LARGEST_FACTOR}, got {streams}")
    return tuple(found)


def kronecker_columns(factors: Sequence[int]) -> int:
    """Columns of the projection: n for pre, n for post, 1 a 2×2 factor, i! a larger one."""
    return 2 * math.prod(factors) + sum(reference.group_sizes(factors))


def kronecker_projection(
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    pre_scale: Tensor,
    post_scale: Tensor,
    mixing_scale: Tensor,
    static_alpha: Tensor,
    static_beta: Tensor,
    *,
    factors: Sequence[int] | None = None,
    transposed: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A sublayer's parameters, as the paper has them, to the matrix of its coefficients, as `kronecker_pre` takes it.

    weight = sqrt(nC) (1 + gamma) [pre_scale alpha_pre | post_scale beta | mixing_scale alpha_mixing]^T, where a 2×2
    factor's two logits become their difference; the same of the static ones is the bias. Source: arXiv 2601.21579, §3.

    Args:
        alpha: (n C, n + S), beta (n C, n): the projections to the logits of h_pre and H_res, and of h_post, of any
            floating dtype, used as float32 (float64 is); S is the sum of i! over the factors.
        gamma: (n C,) of the norm. pre_scale, post_scale, mixing_scale: one number each, of any shape.
        static_alpha: (n + S,), static_beta (n,). All of the dtype of alpha.
        factors: of n, as in `kronecker_pre`; compiled kernels take 2s alone.
        transposed: mix by the transpose of H_res.
        backend: as in `kronecker_pre`.

    Returns:
        weight (2n + S', n C) and bias (2n + S',) with S' = `kronecker_columns` - 2n; float32, or float64 for float64.

    Raises: as `kronecker_pre`.
    """
    if beta.dim() != 2 or beta.shape[1] < 2:
        raise ValueError(f"beta must be (n C, n) with n >= 2, got {tuple(beta.shape)}")
    sizes = kronecker_factors(beta.shape[1], factors)
    tensors = [alpha, beta, gamma, pre_scale, post_scale, mixing_scale, static_alpha, static_beta]
    _check_parameters(tensors, sizes)
    if max(t.dim() for t in tensors[3:6]) > 1:
        tensors[3:6] = [t.reshape(()) for t in tensors[3:6]]
    if alpha.dtype in HALVES:
        tensors = [t.float() for t in tensors]
    chosen = dispatch.requested(backend)
    if chosen != "reference" and eager.all_pairs(sizes):
        return projection.project(*tensors, chosen)
    if chosen != "reference":
        _only_eager("kronecker_projection", chosen, sizes)
    return reference.projection(*tensors, factors=sizes, transposed=transposed)


def kronecker_pre(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    factors: Sequence[int] | None = None,
    eps: float = EPS,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The coefficients of a sublayer and its branch's input, in one pass over the streams.

    logits = W vec(X) / max(|vec X|, eps) + b; h = [h_pre = sigmoid | h_post = 2 sigmoid | a factor's weights];
    u = h_pre X. RMSNorm's sqrt(nC), 1 + gamma and the alphas belong into `weight`. A 2×2 factor has one column, the
    difference c_1 - c_0 of its two logits, and the coefficient q = sigmoid of it: [[1 - q, q], [q, 1 - q]]; a larger
    one has i! logits and their softmax over the permutations in lexicographic order. Source: arXiv 2601.21579, §3.

    Args:
        x: streams (…, n, C); float32, bfloat16, float16 or float64, any layout.
        weight: (2n + S, n C), bias (2n + S,); any floating dtype, used as float32 (float64 beside a float64 x).
        factors: of n, each 2, 3 or 4; None for 2s and 3s. Compiled kernels take 2s alone, "cpp" up to n = 32 and
            "triton" up to n = 8; without a request for a backend, the rest runs eager.
        eps: smallest norm that is divided by, > 0.
        backend: "reference", "eager", "cpp" or "triton"; None picks by $GRASSLAND_BACKEND, then by device.

    Returns:
        u (…, C) in the dtype of x, and h (…, 2n + S) in float32 (float64 beside float64), under autocast too.

    Raises:
        ValueError, TypeError: naming the argument that is wrong, what it was and what is allowed.
        grassland.kernels.dispatch.BackendError: when a requested backend is not there.
    """
    sizes = _check_streams(x, factors)
    weight, bias = _check_projection(x, weight, bias, sizes, eps)
    flat, chosen = _tokens(x, 2), dispatch.requested(backend)
    with without_autocast(x.device.type):
        if chosen == "reference":
            u, h = reference.pre(flat, weight, bias, sizes, eps)
        elif eager.all_pairs(sizes):
            u, h, _ = op.pre(flat, weight, bias, float(eps), chosen)
        else:
            _only_eager("kronecker_pre", chosen, sizes)
            u, h, _ = eager.pre(flat, weight, bias, sizes, eps)
    return u.view(*x.shape[:-2], x.shape[-1]), h.view(*x.shape[:-2], h.shape[-1])


def kronecker_open(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    factors: Sequence[int] | None = None,
    eps: float = EPS,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kronecker_pre`, and the streams for `kronecker_post`: what flows back into them joins in one backward pass.

    Use it where the same streams are read and then mixed, as in a sublayer: it saves an addition of two gradients of
    the streams' size, 8C elements a token at n = 4. Arguments as in `kronecker_pre`.

    Returns:
        x, the same streams (…, n, C); u (…, C) and h (…, 2n + S).

    Raises: as `kronecker_pre`.
    """
    sizes, chosen = _check_streams(x, factors), dispatch.requested(backend)
    # A compiler has to see the addition to fuse it; autograd Functions that return their input it does not take.
    if chosen == "reference" or not eager.all_pairs(sizes) or torch.compiler.is_compiling():
        return x, *kronecker_pre(x, weight, bias, factors=sizes, eps=eps, backend=backend)
    weight, bias = _check_projection(x, weight, bias, sizes, eps)
    with without_autocast(x.device.type):
        flat, u, h = op.KroneckerOpen.apply(_tokens(x, 2), weight, bias, float(eps), chosen)
    return flat.view(x.shape), u.view(*x.shape[:-2], x.shape[-1]), h.view(*x.shape[:-2], h.shape[-1])


def kronecker_post(
    x: Tensor, y: Tensor, h: Tensor, *, factors: Sequence[int] | None = None, backend: str | None = None
) -> Tensor:
    """The streams after a sublayer: X' = H_res X + h_post (x) y, H_res = U^1 (x) … (x) U^K never built.

    Args:
        x: streams (…, n, C).
        y: the branch's output (…, C); the dtype of x, or a half dtype beside a float32 x.
        h: coefficients (…, 2n + S) of `kronecker_pre`.
        factors, backend: as in `kronecker_pre`.

    Returns:
        X' (…, n, C) in the dtype of x. Its sum over the streams is that of X plus (sum h_post) y, to an ulp.

    Raises: as `kronecker_pre`.
    """
    sizes = _check_streams(x, factors)
    y, h = _check_branch(x, y, h, sizes)
    tensors, chosen = (_tokens(x, 2), _tokens(y, 1), _tokens(h, 1)), dispatch.requested(backend)
    with without_autocast(x.device.type):
        if chosen == "reference":
            out = reference.post(*tensors, sizes)
        elif eager.all_pairs(sizes):
            out = op.post(*tensors, chosen)
        else:
            _only_eager("kronecker_post", chosen, sizes)
            out = eager.post(*tensors, sizes)
    return out.view(x.shape)


def kronecker_step(
    x: Tensor,
    y: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    factors: Sequence[int] | None = None,
    eps: float = EPS,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kronecker_post` of one sublayer and `kronecker_pre` of the next, in one pass: 10C elements a token at n = 4.

    Bitwise what the two calls give on the same backend. The backward computes X' again.

    Args:
        x, y, h: of the sublayer that ends, as in `kronecker_post`.
        weight, bias: of the sublayer that begins, as in `kronecker_pre`.
        factors, eps, backend: as in `kronecker_pre`.

    Returns:
        X' (…, n, C), u (…, C) and h (…, 2n + S) of the sublayer that begins.

    Raises: as `kronecker_pre`.
    """
    sizes = _check_streams(x, factors)
    y, h = _check_branch(x, y, h, sizes)
    weight, bias = _check_projection(x, weight, bias, sizes, eps)
    tensors, chosen = (_tokens(x, 2), _tokens(y, 1), _tokens(h, 1)), dispatch.requested(backend)
    with without_autocast(x.device.type):
        if chosen == "reference":
            following, u, h = reference.step(*tensors, weight, bias, sizes, eps)
        elif eager.all_pairs(sizes):
            following, u, h, _ = op.step(*tensors, weight, bias, float(eps), chosen)
        else:
            _only_eager("kronecker_step", chosen, sizes)
            following = eager.post(*tensors, sizes)
            u, h, _ = eager.pre(following, weight, bias, sizes, eps)
    return following.view(x.shape), u.view(*x.shape[:-2], x.shape[-1]), h.view(*x.shape[:-2], h.shape[-1])


def kronecker_matrix(h: Tensor, streams: int, *, factors: Sequence[int] | None = None) -> Tensor:
    """H_res (…, n, n) of coefficients h (…, 2n + S): for looking at it; no kernel builds it.

    Raises:
        ValueError: when `h` has not 2n + S columns.
    """
    sizes = kronecker_factors(streams, factors)
    if h.shape[-1] != kronecker_columns(sizes):
        raise ValueError(f"h must be (…, {kronecker_columns(sizes)}) for factors {sizes}, got {tuple(h.shape)}")
    with without_autocast(h.device.type):
        return reference.mixing_matrix(_tokens(h, 1), sizes).view(*h.shape[:-1], streams, streams)


def _tokens(x: Tensor, kept: int) -> Tensor:
    """All but the last `kept` dimensions as one."""
    return x.reshape(-1, *x.shape[x.dim() - kept :])


def _only_eager(name: str, backend: str, factors: tuple[int, ...]) -> None:
    if backend not in ("", "eager"):
        raise dispatch.BackendError(f"{name}: the {backend} backend takes factors of 2 alone, got {factors}")


def _check_streams(x: Tensor, factors: Sequence[int] | None) -> tuple[int, ...]:
    if x.dim() < 2 or x.shape[-2] < 2 or x.shape[-1] < 1:
        raise ValueError(f"x must be streams (…, n, C) with n >= 2 and C >= 1, got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64, *HALVES):
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    return kronecker_factors(x.shape[-2], factors)


def _check_projection(
    x: Tensor, weight: Tensor, bias: Tensor, factors: tuple[int, ...], eps: float
) -> tuple[Tensor, Tensor]:
    shape = (kronecker_columns(factors), x.shape[-2] * x.shape[-1])
    for name, tensor, wanted in (("weight", weight, shape), ("bias", bias, shape[:1])):
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name} must be {wanted} for factors {factors}, got {tuple(tensor.shape)}")
        _check_kind(name, tensor, x)
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    return weight.to(accumulation(x.dtype)), bias.to(accumulation(x.dtype))


def _check_parameters(tensors: Sequence[Tensor], factors: tuple[int, ...]) -> None:
    alpha, n = tensors[0], math.prod(factors)
    width, columns = alpha.shape[0] if alpha.dim() else 0, n + sum(map(math.factorial, factors))
    if width == 0 or width % n:
        raise ValueError(f"alpha must be (n C, {columns}) for factors {factors}, got {tuple(alpha.shape)}")
    if not alpha.is_floating_point():
        raise TypeError(f"alpha must be a floating-point tensor, got {alpha.dtype}")
    shapes = {"alpha": (width, columns), "beta": (width, n), "gamma": (width,), "pre_scale": None, "post_scale": None}
    shapes |= {"mixing_scale": None, "static_alpha": (columns,), "static_beta": (n,)}
    for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
        if tensor.numel() != 1 if shape is None else tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape or 'one number'} for factors {factors}, got {tuple(tensor.shape)}")
        if tensor.dtype != alpha.dtype:
            raise TypeError(f"{name} must have the dtype of alpha ({alpha.dtype}), got {tensor.dtype}")
        if tensor.device != alpha.device:
            raise ValueError(f"{name} must be on the device of alpha ({alpha.device}), got {tensor.device}")


def _check_branch(x: Tensor, y: Tensor, h: Tensor, factors: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    wanted = {"y": (*x.shape[:-2], x.shape[-1]), "h": (*x.shape[:-2], kronecker_columns(factors))}
    for name, tensor in (("y", y), ("h", h)):
        if tuple(tensor.shape) != wanted[name]:
            raise ValueError(f"{name} must be {wanted[name]} beside x {tuple(x.shape)}, got {tuple(tensor.shape)}")
        _check_kind(name, tensor, x)
    if y.dtype != x.dtype and not (x.dtype == torch.float32 and y.dtype in HALVES):
        raise TypeError(f"y must have the dtype of x ({x.dtype}) or be half beside float32, got {y.dtype}")
    return y.to(x.dtype), h.to(accumulation(x.dtype))


def _check_kind(name: str, tensor: Tensor, x: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the device of x ({x.device}), got {tensor.device}")
