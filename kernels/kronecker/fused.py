"""KromHC in Triton: a program owns a few tokens and goes over their channels twice.

The first pass has the reductions of a token (norm, projection; in the backward the gradients of h_pre), the second what
needs them (u, dX); its reads come out of the L2 cache. The n streams of a tile are a tuple of register tiles, on which
the mixing is a butterfly. Weight gradients are partial sums over fixed splits of the tokens, added up in order.
"""

# Triton's constexpr parameters take plain values, and its language is not quite Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs wanted in flight for the weight gradient: two for each multiprocessor of the largest chips.
SPLITS = 264
SIZES = ["tokens"]


@triton.jit
def load_tile(base, rows, cols, stride, dim, keep):
    mask = keep[:, None] & (cols < dim)[None, :]
    return tl.load(base + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_streams(x, rows, cols, dim, keep, N: tl.constexpr):
    tiles = ()
    for s in tl.static_range(N):
        tiles = tiles + (load_tile(x + s * dim, rows, cols, N * dim, dim, keep),)
    return tiles


@triton.jit
def store_streams(x, tiles, rows, cols, dim, keep, N: tl.constexpr):
    mask = keep[:, None] & (cols < dim)[None, :]
    for s in tl.static_range(N):
        tl.store(x + rows[:, None] * (N * dim) + s * dim + cols[None, :], tiles[s], mask=mask)


@triton.jit
def load_column(h, rows, keep, column: tl.constexpr, M: tl.constexpr):
    return tl.load(h + rows * M + column, mask=keep, other=0.0)


@triton.jit
def swap(tiles, q, HALF: tl.constexpr, N: tl.constexpr):
    # e = q (x_0 - x_1), x_0' = x_0 - e, x_1' = x_1 + e for the pairs HALF apart
    out = ()
    for s in tl.static_range(N):
        out = out + (tiles[s] + q[:, None] * (tiles[s ^ HALF] - tiles[s]),)
    return out


@triton.jit
def mix(tiles, h, rows, keep, N: tl.constexpr, K: tl.constexpr, M: tl.constexpr):
    for k in tl.static_range(K):
        tiles = swap(tiles, load_column(h, rows, keep, 2 * N + k, M), N >> (k + 1), N)
    return tiles


@triton.jit
def following(x, y, h, rows, cols, dim, keep, N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, DTYPE: tl.constexpr):
    # X' = H_res X + h_post (x) y, rounded as it is stored
    tiles = mix(load_streams(x, rows, cols, dim, keep, N), h, rows, keep, N, K, M)
    branch = load_tile(y, rows, cols, dim, dim, keep)
    out = ()
    for s in tl.static_range(N):
        post = load_column(h, rows, keep, N + s, M)
        out = out + ((tiles[s] + post[:, None] * branch).to(DTYPE).to(tl.float32),)
    return out


@triton.jit
def product(a, b, acc):
    # float32 stays float32 on the chip: no TF32
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit(do_not_specialize=SIZES)
def post_kernel(
    x, y, h, out, tokens, dim,
    N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, DTYPE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    keep = rows < tokens
    tiles = following(x, y, h, rows, cols, dim, keep, N, K, M, DTYPE)
    store_streams(out, tiles, rows, cols, dim, keep, N)


@triton.jit(do_not_specialize=SIZES)
def pre_kernel(
    x, y, h, weight, bias, out, u, after, saved, tokens, dim, eps,
    POST: tl.constexpr, N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, DTYPE: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    keep = rows < tokens
    j = tl.arange(0, MP)
    square = tl.zeros((BM,), tl.float32)
    z = tl.zeros((BM, MP), tl.float32)
    for start in range(0, dim, BC):
        cols = start + tl.arange(0, BC)
        if POST:
            tiles = following(x, y, h, rows, cols, dim, keep, N, K, M, DTYPE)
            store_streams(out, tiles, rows, cols, dim, keep, N)
        else:
            tiles = load_streams(x, rows, cols, dim, keep, N)
        for s in tl.static_range(N):
            square += tl.sum(tiles[s] * tiles[s], 1)
            mask = (cols < dim)[:, None] & (j < M)[None, :]
            w = tl.load(weight + j[None, :] * (N * dim) + s * dim + cols[:, None], mask=mask, other=0.0)
            z = product(tiles[s], w, z)
    r = 1.0 / tl.maximum(tl.sqrt(square), eps)
    z *= r[:, None]
    b = tl.load(bias + j, mask=j < M, other=0.0)
    top = tl.where((j >= N) & (j < 2 * N), 2.0, 1.0)
    coefficients = top[None, :] * tl.sigmoid(z + b[None, :])
    live = keep[:, None] & (j < M)[None, :]
    tl.store(after + rows[:, None] * M + j[None, :], coefficients, mask=live)
    tl.store(saved + rows[:, None] * (M + 1) + j[None, :], z, mask=live)
    tl.store(saved + rows * (M + 1) + M, r, mask=keep)
    for start in range(0, dim, BC):
        cols = start + tl.arange(0, BC)
        if POST:
            # Mixed again from the cache: reading `out` back would need a barrier.
            tiles = following(x, y, h, rows, cols, dim, keep, N, K, M, DTYPE)
        else:
            tiles = load_streams(x, rows, cols, dim, keep, N)
        total = tl.zeros((BM, BC), tl.float32)
        for s in tl.static_range(N):
            pre = tl.sum(tl.where((j == s)[None, :], coefficients, 0.0), 1)
            total += pre[:, None] * tiles[s]
        mask = keep[:, None] & (cols < dim)[None, :]
        tl.store(u + rows[:, None] * dim + cols[None, :], total, mask=mask)


@triton.jit
def mixing_backward(
    grads, x, y, h, dx, dy, sums, rows, cols, dim, keep,
    N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    # dx = H_res g, dy = h_post g; into `sums`: dh_post = <g, y> and dq_k = -sum (g_0 - g_1)(x_0 - x_1)
    j = tl.arange(0, MP)
    branch = load_tile(y, rows, cols, dim, dim, keep)
    total = tl.zeros_like(branch)
    for s in tl.static_range(N):
        total += load_column(h, rows, keep, N + s, M)[:, None] * grads[s]
        sums += tl.where((j == N + s)[None, :], tl.sum(grads[s] * branch, 1)[:, None], 0.0)
    mask = keep[:, None] & (cols < dim)[None, :]
    tl.store(dy + rows[:, None] * dim + cols[None, :], total, mask=mask)
    # The stages commute: x passes the stages before k, g those after it.
    streams = load_streams(x, rows, cols, dim, keep, N)
    entering = (streams,)
    for k in tl.static_range(K - 1):
        streams = swap(streams, load_column(h, rows, keep, 2 * N + k, M), N >> (k + 1), N)
        entering = entering + (streams,)
    # Stage K - 1 - i pairs streams 1 << i apart.
    for i in tl.static_range(K):
        dq = tl.zeros_like(tl.sum(branch, 1))
        for s in tl.static_range(N):
            if s & (1 << i) == 0:
                step = grads[s] - grads[s + (1 << i)]
                dq -= tl.sum(step * (entering[K - 1 - i][s] - entering[K - 1 - i][s + (1 << i)]), 1)
        sums += tl.where((j == 2 * N + K - 1 - i)[None, :], dq[:, None], 0.0)
        grads = swap(grads, load_column(h, rows, keep, 2 * N + K - 1 - i, M), 1 << i, N)
    store_streams(dx, grads, rows, cols, dim, keep, N)
    return sums


@triton.jit(do_not_specialize=SIZES)
def post_backward_kernel(
    grad, x, y, h, dx, dy, dh, tokens, dim,
    N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    keep = rows < tokens
    j = tl.arange(0, MP)
    sums = tl.zeros((BM, MP), tl.float32)
    for start in range(0, dim, BC):
        cols = start + tl.arange(0, BC)
        grads = load_streams(grad, rows, cols, dim, keep, N)
        sums = mixing_backward(grads, x, y, h, dx, dy, sums, rows, cols, dim, keep, N, K, M, MP)
    tl.store(dh + rows[:, None] * M + j[None, :], sums, mask=keep[:, None] & (j < M)[None, :])


@triton.jit(do_not_specialize=SIZES)
def pre_backward_kernel(
    dfollowing, du, dafter, x, y, h, weight, after, saved, dx, dy, dh, logits, tokens, dim, limit,
    POST: tl.constexpr, JOIN: tl.constexpr, N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    DTYPE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # dX' = h_pre du + r g W - r^2 <g, z> X' + what else flows in; then, with POST, through the mixing
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    keep = rows < tokens
    j = tl.arange(0, MP)
    live = keep[:, None] & (j < M)[None, :]
    dcoef = tl.load(dafter + rows[:, None] * M + j[None, :], mask=live, other=0.0)
    for start in range(0, dim, BC):
        cols = start + tl.arange(0, BC)
        if POST:
            tiles = following(x, y, h, rows, cols, dim, keep, N, K, M, DTYPE)
        else:
            tiles = load_streams(x, rows, cols, dim, keep, N)
        d = load_tile(du, rows, cols, dim, dim, keep)
        for s in tl.static_range(N):
            dcoef += tl.where((j == s)[None, :], tl.sum(d * tiles[s], 1)[:, None], 0.0)
    coefficients = tl.load(after + rows[:, None] * M + j[None, :], mask=live, other=0.0)
    z = tl.load(saved + rows[:, None] * (M + 1) + j[None, :], mask=live, other=0.0)
    r = tl.load(saved + rows * (M + 1) + M, mask=keep, other=0.0)
    top = tl.where((j >= N) & (j < 2 * N), 2.0, 1.0)
    g = dcoef * coefficients * (1.0 - coefficients / top[None, :])
    shrink = tl.where(r < limit, -r * r * tl.sum(g * z, 1), 0.0)
    tl.store(logits + rows[:, None] * M + j[None, :], g, mask=live)
    scaled = g * r[:, None]
    sums = tl.zeros((BM, MP), tl.float32)
    for start in range(0, dim, BC):
        cols = start + tl.arange(0, BC)
        if POST:
            tiles = following(x, y, h, rows, cols, dim, keep, N, K, M, DTYPE)
        else:
            tiles = load_streams(x, rows, cols, dim, keep, N)
        d = load_tile(du, rows, cols, dim, dim, keep)
        grads = ()
        for s in tl.static_range(N):
            mask = (j < M)[:, None] & (cols < dim)[None, :]
            w = tl.load(weight + j[:, None] * (N * dim) + s * dim + cols[None, :], mask=mask, other=0.0)
            pre = load_column(after, rows, keep, s, M)
            part = product(scaled, w, shrink[:, None] * tiles[s] + pre[:, None] * d)
            if JOIN:
                part += load_tile(dfollowing + s * dim, rows, cols, N * dim, dim, keep)
            grads = grads + (part,)
        if POST:
            sums = mixing_backward(grads, x, y, h, dx, dy, sums, rows, cols, dim, keep, N, K, M, MP)
        else:
            store_streams(dx, grads, rows, cols, dim, keep, N)
    if POST:
        tl.store(dh + rows[:, None] * M + j[None, :], sums, mask=live)


@triton.jit(do_not_specialize=SIZES)
def weight_gradient_kernel(
    logits, saved, x, y, h, partial, tokens, dim,
    POST: tl.constexpr, SPLIT: tl.constexpr, N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    DTYPE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # partial[split] = (r g)^T X' over every SPLIT-th block of tokens
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    split = tl.program_id(1)
    j = tl.arange(0, MP)
    sums = ()
    for _ in tl.static_range(N):
        sums = sums + (tl.zeros((MP, BC), tl.float32),)
    for start in range(split * BM, tokens, SPLIT * BM):
        rows = start + tl.arange(0, BM).to(tl.int64)
        keep = rows < tokens
        live = keep[None, :] & (j < M)[:, None]
        g = tl.load(logits + rows[None, :] * M + j[:, None], mask=live, other=0.0)
        g *= tl.load(saved + rows * (M + 1) + M, mask=keep, other=0.0)[None, :]
        if POST:
            tiles = following(x, y, h, rows, cols, dim, keep, N, K, M, DTYPE)
        else:
            tiles = load_streams(x, rows, cols, dim, keep, N)
        added = ()
        for s in tl.static_range(N):
            added = added + (product(g, tiles[s], sums[s]),)
        sums = added
    mask = (j < M)[:, None] & (cols < dim)[None, :]
    at = (split.to(tl.int64) * M + j[:, None]) * (N * dim) + cols[None, :]
    for s in tl.static_range(N):
        tl.store(partial + at + s * dim, sums[s], mask=mask)


@triton.jit
def reduce_kernel(partial, out, size, SPLIT: tl.constexpr, BC: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    total = tl.zeros((BC,), tl.float32)
    for split in range(SPLIT):
        total += tl.load(partial + split * size.to(tl.int64) + at, mask=at < size, other=0.0)
    tl.store(out + at, total, mask=at < size)


def shape(x: Tensor) -> dict[str, int]:
    n = x.shape[1]
    k = n.bit_length() - 1
    return {"N": n, "K": k, "M": 2 * n + k}


def padded(x: Tensor) -> dict[str, int]:
    return {"MP": max(16, triton.next_power_of_2(shape(x)["M"]))}


def stored(x: Tensor) -> tl.dtype:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype]


# Tokens, channels of all streams together, channels at most, and warps of a tile, by kernel.
TILES = {
    "pre": (16, 256, 64, 4),
    "post": (16, 256, 64, 4),
    # Wider ones spill on sm_100.
    "pre_backward": (16, 256, 16, 8),
    "post_backward": (16, 256, 32, 4),
    "weight_gradient": (16, 256, 16, 4),
}


def tile(x: Tensor, kernel: str) -> dict[str, int]:
    tokens, channels, most, warps = TILES[kernel]
    width = max(16, min(most, channels // x.shape[1], triton.next_power_of_2(x.shape[2])))
    return {"BM": tokens, "BC": width, "num_warps": warps}


def forward(
    x: Tensor, y: Tensor | None, h: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, _, dim = x.shape
    m = shape(x)["M"]
    out = x if y is None else torch.empty_like(x)
    u, after, saved = x.new_empty(tokens, dim), weight.new_empty(tokens, m), weight.new_empty(tokens, m + 1)
    if tokens:
        block = tile(x, "pre")
        pre_kernel[(triton.cdiv(tokens, block["BM"]),)](
            x, x if y is None else y, after if h is None else h, weight, bias, out, u, after, saved, tokens, dim, eps,
            POST=y is not None, DTYPE=stored(x), **shape(x), **padded(x), **block,
        )  # fmt: skip
    return out, u, after, saved


def backward(
    dx: Tensor | None, du: Tensor, dafter: Tensor, x: Tensor, y: Tensor | None, h: Tensor | None, weight: Tensor,
    after: Tensor, saved: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, n, dim = x.shape
    m, post = shape(x)["M"], y is not None
    grad, dy, dh = torch.empty_like(x), torch.empty_like(du), torch.empty_like(dafter)
    if tokens == 0:
        return grad, dy, dh, torch.zeros_like(weight), weight.new_zeros(m)
    logits = torch.empty_like(after)
    joined, branch, before = (x if dx is None else dx), (y if post else x), (h if post else after)
    common = {"POST": post, "DTYPE": stored(x), **shape(x), **padded(x)}
    block = tile(x, "pre_backward")
    pre_backward_kernel[(triton.cdiv(tokens, block["BM"]),)](
        joined, du, dafter, x, branch, before, weight, after, saved, grad, dy, dh, logits, tokens, dim, 1 / eps,
        JOIN=dx is not None, **common, **block,
    )  # fmt: skip
    block = tile(x, "weight_gradient")
    columns = triton.cdiv(dim, block["BC"])
    splits = max(1, min(SPLITS // columns, triton.cdiv(tokens, 256)))
    partial = weight.new_empty(splits, m, n * dim)
    weight_gradient_kernel[(columns, splits)](
        logits, saved, x, branch, before, partial, tokens, dim, SPLIT=splits, **common, **block
    )
    dweight = torch.empty_like(weight)
    reduce_kernel[(triton.cdiv(m * n * dim, 1024),)](partial, dweight, m * n * dim, SPLIT=splits, BC=1024)
    return grad, dy, dh, dweight, logits.sum(0)


def kronecker_pre(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return forward(x, None, None, weight, bias, eps)[1:]


def kronecker_step(
    x: Tensor, y: Tensor, h: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward(x, y, h, weight, bias, eps)


def kronecker_post(x: Tensor, y: Tensor, h: Tensor) -> Tensor:
    tokens, _, dim = x.shape
    out, block = torch.empty_like(x), tile(x, "post")
    if tokens:
        grid = (triton.cdiv(tokens, block["BM"]), triton.cdiv(dim, block["BC"]))
        post_kernel[grid](x, y, h, out, tokens, dim, DTYPE=stored(x), **shape(x), **block)
    return out


def kronecker_pre_backward(
    dx: Tensor | None, du: Tensor, dh: Tensor, x: Tensor, weight: Tensor, h: Tensor, saved: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dx, _, _, dweight, dbias = backward(dx, du, dh, x, None, None, weight, h, saved, eps)
    return dx, dweight, dbias


def kronecker_post_backward(grad: Tensor, x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, _, dim = x.shape
    dx, dy, dh, block = torch.empty_like(x), torch.empty_like(y), torch.empty_like(h), tile(x, "post_backward")
    if tokens:
        post_backward_kernel[(triton.cdiv(tokens, block["BM"]),)](
            grad, x, y, h, dx, dy, dh, tokens, dim, **shape(x), **padded(x), **block
        )
    return dx, dy, dh


def kronecker_step_backward(
    dx: Tensor, du: Tensor, dh: Tensor, x: Tensor, y: Tensor, h: Tensor, weight: Tensor, after: Tensor, saved: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(dx, du, dh, x, y, h, weight, after, saved, eps)
