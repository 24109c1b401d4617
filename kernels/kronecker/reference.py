"""KromHC as the paper writes it (arXiv 2601.21579, section 3): the matrices are built. Any dtype.

Streams X (N, n, C); n = i_1 … i_K; the projection has columns [pre n | post n | one group a factor], where a 2×2 factor
has one column, its logit difference c_1 - c_0, and a larger one has i! columns, a logit a permutation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..precision import clamped_norm


def group_sizes(factors: Sequence[int]) -> list[int]:
    """Columns of each factor."""
    return [1 if i == 2 else math.factorial(i) for i in factors]


def permutations(size: int, like: Tensor) -> Tensor:
    """All permutation matrices (size!, size, size) in lexicographic order, the identity first."""
    orders = list(itertools.permutations(range(size)))
    return torch.eye(size, dtype=like.dtype, device=like.device)[torch.tensor(orders, device=like.device)]


def factor_matrices(h: Tensor, factors: Sequence[int]) -> list[Tensor]:
    """U^k = sum_m a_m P_m (N, i_k, i_k) from coefficients h (N, 2n + S)."""
    start, matrices = 2 * math.prod(factors), []
    for size, columns in zip(factors, group_sizes(factors), strict=True):
        weights = h[:, start : start + columns]
        if size == 2:
            weights = torch.cat([1 - weights, weights], -1)
        matrices.append(torch.einsum("tm,mij->tij", weights, permutations(size, h)))
        start += columns
    return matrices


def mixing_matrix(h: Tensor, factors: Sequence[int]) -> Tensor:
    """H_res = U^1 (x) … (x) U^K, (N, n, n)."""
    product = h.new_ones(h.shape[0], 1, 1)
    for u in factor_matrices(h, factors):
        product = torch.einsum("tab,tij->taibj", product, u).flatten(3, 4).flatten(1, 2)
    return product


def coefficients(logits: Tensor, factors: Sequence[int]) -> Tensor:
    """Logits (N, 2n + S) to h_pre = sigmoid, h_post = 2 sigmoid, weights of a factor = softmax, of a pair sigmoid."""
    n = math.prod(factors)
    groups = logits.split([n, n, *group_sizes(factors)], -1)
    rest = [g.sigmoid() if i == 2 else g.softmax(-1) for i, g in zip(factors, groups[2:], strict=True)]
    return torch.cat([groups[0].sigmoid(), 2 * groups[1].sigmoid(), *rest], -1)


def inverses(size: int) -> list[int]:
    """Index of each permutation's inverse, in lexicographic order."""
    orders = list(itertools.permutations(range(size)))
    return [orders.index(tuple(sorted(range(size), key=order.__getitem__))) for order in orders]


def columns(logits: Tensor, factors: Sequence[int], transposed: bool) -> Tensor:
    """The kernels' columns (…, S') of a logit a permutation (…, S): of a pair, the second minus the first. Transposed,
    a permutation's column goes to its inverse."""
    groups = []
    for size, group in zip(factors, logits.split([math.factorial(i) for i in factors], -1), strict=True):
        if size == 2:
            groups.append(group[..., 1:] - group[..., :1])
        else:
            groups.append(group[..., inverses(size)] if transposed else group)
    return torch.cat(groups, -1)


def bias(static_alpha: Tensor, static_beta: Tensor, factors: Sequence[int], transposed: bool) -> Tensor:
    n = len(static_beta)
    return torch.cat([static_alpha[:n], static_beta, columns(static_alpha[n:], factors, transposed)])


def projection(
    alpha: Tensor, beta: Tensor, gamma: Tensor, pre: Tensor, post: Tensor, mixing: Tensor, static_alpha: Tensor,
    static_beta: Tensor, factors: Sequence[int], transposed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """weight = sqrt(nC) (1 + gamma) [alpha_pre W_pre | alpha_post W_post | alpha_res W_res]^T and the bias."""
    n = len(static_beta)
    groups = [pre * alpha[:, :n], post * beta, mixing * columns(alpha[:, n:], factors, transposed)]
    scale = math.sqrt(len(gamma)) * (1 + gamma)
    weight = (torch.cat(groups, -1) * scale[:, None]).T.contiguous()
    return weight, bias(static_alpha, static_beta, factors, transposed)


def pre(x: Tensor, weight: Tensor, bias: Tensor, factors: Sequence[int], eps: float) -> tuple[Tensor, Tensor]:
    """u = H_pre X and all coefficients h of the sublayer."""
    flat = x.flatten(1).to(weight.dtype)
    # 1. x' = vec X / max(|vec X|, eps); sqrt(nC), 1 + gamma and alpha are part of the weight
    normed = flat / clamped_norm(flat, eps)
    # 2. logits = x' W^T + b
    h = coefficients(normed @ weight.T + bias, factors)
    # 3. u = H_pre X
    h_pre = h[:, None, : x.shape[1]]
    return (h_pre @ x.to(weight.dtype)).squeeze(1).to(x.dtype), h


def post(x: Tensor, y: Tensor, h: Tensor, factors: Sequence[int]) -> Tensor:
    """X' = H_res X + H_post^T y."""
    n = x.shape[1]
    h_post = h[:, n : 2 * n, None]
    return (mixing_matrix(h, factors) @ x.to(h.dtype) + h_post @ y[:, None].to(h.dtype)).to(x.dtype)


def step(
    x: Tensor, y: Tensor, h: Tensor, weight: Tensor, bias: Tensor, factors: Sequence[int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Across the boundary of two sublayers: X' of the one, then u and h of the next."""
    following = post(x, y, h, factors)
    return (following, *pre(following, weight, bias, factors, eps))
