"""The projection of KromHC's coefficients in Triton: a program owns some channels and all columns of them.

The backward's three scalars are sums over all channels: a program writes its share, and PyTorch adds those up in order.
"""

# Triton's constexpr parameters take plain values, and its language is not quite Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, on_its_device

# Channels of a program.
CHANNELS = 128


@triton.jit
def channels(gamma, width, BC: tl.constexpr):
    # sqrt(n C) and sqrt(n C) (1 + gamma)
    c = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    keep = c < width
    root = tl.sqrt(tl.full((), width, tl.float64))
    return c, keep, root, root * (1.0 + tl.load(gamma + c, mask=keep, other=0.0).to(tl.float64))


@triton.jit
def projection_kernel(
    alpha, beta, gamma, pre, post, mixing, static_alpha, static_beta, weight, bias, width,
    N: tl.constexpr, K: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # weight = root (1 + gamma) [pre alpha_k | post beta_k | mixing (alpha_n+2j+1 - alpha_n+2j)]
    c, keep, _, exact = channels(gamma, width, BC)
    scale = exact.to(tl.float32)
    first = tl.program_id(0) == 0
    a = alpha + c * (N + 2 * K)
    here, there, across = scale * tl.load(pre), scale * tl.load(post), scale * tl.load(mixing)
    for k in tl.static_range(N):
        tl.store(weight + k * width + c, here * tl.load(a + k, mask=keep, other=0.0), mask=keep)
        tl.store(weight + (N + k) * width + c, there * tl.load(beta + c * N + k, mask=keep, other=0.0), mask=keep)
        tl.store(bias + k, tl.load(static_alpha + k), mask=first)
        tl.store(bias + N + k, tl.load(static_beta + k), mask=first)
    for j in tl.static_range(K):
        kept, swapped = N + 2 * j, N + 2 * j + 1
        difference = tl.load(a + swapped, mask=keep, other=0.0) - tl.load(a + kept, mask=keep, other=0.0)
        tl.store(weight + (2 * N + j) * width + c, across * difference, mask=keep)
        tl.store(bias + 2 * N + j, tl.load(static_alpha + swapped) - tl.load(static_alpha + kept), mask=first)


@triton.jit
def projection_backward_kernel(
    dweight, dbias, alpha, beta, gamma, pre, post, mixing, dalpha, dbeta, dgamma, partial, dstatic_alpha, dstatic_beta,
    width, N: tl.constexpr, K: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    c, keep, root, exact = channels(gamma, width, BC)
    scale = exact.to(tl.float32)
    program = tl.program_id(0)
    first = program == 0
    a, da = alpha + c * (N + 2 * K), dalpha + c * (N + 2 * K)
    by_pre, by_post, by_mixing = tl.load(pre), tl.load(post), tl.load(mixing)
    # <dweight, columns of alpha or beta>, channel by channel; in float64, since the scalars' sums over all may cancel
    along_pre = tl.zeros((BC,), tl.float64)
    along_post = tl.zeros((BC,), tl.float64)
    along_mixing = tl.zeros((BC,), tl.float64)
    for k in tl.static_range(N):
        g = tl.load(dweight + k * width + c, mask=keep, other=0.0)
        along_pre += g.to(tl.float64) * tl.load(a + k, mask=keep, other=0.0)
        tl.store(da + k, by_pre * scale * g, mask=keep)
        g = tl.load(dweight + (N + k) * width + c, mask=keep, other=0.0)
        along_post += g.to(tl.float64) * tl.load(beta + c * N + k, mask=keep, other=0.0)
        tl.store(dbeta + c * N + k, by_post * scale * g, mask=keep)
        tl.store(dstatic_alpha + k, tl.load(dbias + k), mask=first)
        tl.store(dstatic_beta + k, tl.load(dbias + N + k), mask=first)
    for j in tl.static_range(K):
        kept, swapped = N + 2 * j, N + 2 * j + 1
        g = tl.load(dweight + (2 * N + j) * width + c, mask=keep, other=0.0)
        difference = tl.load(a + swapped, mask=keep, other=0.0) - tl.load(a + kept, mask=keep, other=0.0)
        along_mixing += g.to(tl.float64) * difference
        tl.store(da + swapped, by_mixing * scale * g, mask=keep)
        tl.store(da + kept, -by_mixing * scale * g, mask=keep)
        d = tl.load(dbias + 2 * N + j)
        tl.store(dstatic_alpha + swapped, d, mask=first)
        tl.store(dstatic_alpha + kept, -d, mask=first)
    tl.store(dgamma + c, root * (by_pre * along_pre + by_post * along_post + by_mixing * along_mixing), mask=keep)
    tl.store(partial + program * 3, tl.sum(exact * along_pre, 0))
    tl.store(partial + program * 3 + 1, tl.sum(exact * along_post, 0))
    tl.store(partial + program * 3 + 2, tl.sum(exact * along_mixing, 0))


def sizes(alpha: Tensor, beta: Tensor) -> tuple[tuple[int], int, dict[str, int]]:
    """Grid, n C and the constants."""
    width, n = beta.shape
    return (cdiv(width, CHANNELS),), width, {"N": n, "K": (alpha.shape[1] - n) // 2}


@on_its_device
def kronecker_projection(
    alpha: Tensor, beta: Tensor, gamma: Tensor, pre: Tensor, post: Tensor, mixing: Tensor, static_alpha: Tensor,
    static_beta: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grid, width, constants = sizes(alpha, beta)
    rows = 2 * constants["N"] + constants["K"]
    weight, bias = alpha.new_empty(rows, width), alpha.new_empty(rows)
    projection_kernel[grid](
        alpha, beta, gamma, pre, post, mixing, static_alpha, static_beta, weight, bias, width, **constants,
        BC=CHANNELS,
    )  # fmt: skip
    return weight, bias


@on_its_device
def kronecker_projection_backward(
    dweight: Tensor, dbias: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, pre: Tensor, post: Tensor,
    mixing: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grid, width, constants = sizes(alpha, beta)
    dalpha, dbeta, dgamma = (torch.empty_like(t) for t in (alpha, beta, gamma))
    dstatic_alpha, dstatic_beta = alpha.new_empty(alpha.shape[1]), alpha.new_empty(beta.shape[1])
    partial = alpha.new_empty(grid[0], 3, dtype=torch.float64)
    projection_backward_kernel[grid](
        dweight, dbias, alpha, beta, gamma, pre, post, mixing, dalpha, dbeta, dgamma, partial, dstatic_alpha,
        dstatic_beta, width, **constants, BC=CHANNELS,
    )  # fmt: skip
    return dalpha, dbeta, dgamma, partial.sum(0).to(alpha.dtype), dstatic_alpha, dstatic_beta
