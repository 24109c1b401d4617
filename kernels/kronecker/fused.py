"""KromHC in Triton: a program owns a few tokens and goes over their channels twice.

The first pass has the reductions of a token (norm, projection; in the backward the gradients of h_pre), the second what
needs them (u, dX); its reads come out of the L2 cache. The n streams of a tile are a tuple of register tiles, on which
the mixing is a butterfly. Weight gradients are partial sums over fixed splits of the tokens, added up in order.

The projection is float32, so the tensor cores take w = w_0 + w_1 + w_2, three bfloat16 numbers of 8 bits each, stored
as the rows [w_0 | w_1 | w_2] of one thin matrix, and streams x = x_0 + x_1 + x_2 if they are float32. r g, which goes
back through that matrix and into the weight gradient, is three numbers too, but float32 streams get float32 arithmetic
in the latter. Every program reads the whole matrix: the forward, with little else to hold, takes many tokens at once.
The second pass goes backwards, from what the L2 cache saw last. The channels are a constant of a compilation:
addresses are offsets.
"""

# Triton's constexpr parameters take plain values, and its language is not quite Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from ..launch import cdiv, next_power_of_2, on_its_device
from ..rounding import DTYPES
from .fused_tiles import (
    add_branch,
    apart,
    fold,
    following,
    load_columns,
    load_streams,
    load_tile,
    pieces,
    product,
    sigmoid,
    stages,
    store_streams,
    stream_pieces,
    swap,
    zeros,
)

# Programs wanted in flight for the weight gradient: four for each multiprocessor of the largest chips.
SPLITS = 528
SIZES = ["tokens"]


@triton.jit(do_not_specialize=SIZES)
def post_kernel(
    x, y, h, out, tokens, dim: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, DTYPE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    keep = rows < tokens
    post, q = load_columns(h, rows, keep, N, N, M), load_columns(h, rows, keep, 2 * N, K, M)
    store_streams(out, following(x, y, post, q, rows, cols, dim, keep, N, K, DTYPE), rows, cols, dim, keep, N)


@triton.jit(do_not_specialize=SIZES)
def pre_kernel(
    x, y, h, weight, bias, out, u, after, saved, tokens, dim: tl.constexpr, eps,
    POST: tl.constexpr, N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    keep = rows < tokens
    i, j = tl.arange(0, RP), tl.arange(0, MP)
    LAST: tl.constexpr = (dim - 1) // BC * BC
    if POST:
        post, q = load_columns(h, rows, keep, N, N, M), load_columns(h, rows, keep, 2 * N, K, M)
    # Without a mixing the streams are one long row.
    L: tl.constexpr = 1 if POST else N
    square = tl.zeros((BM, L * BC // 8), tl.float32)
    z = tl.zeros((BM, RP), tl.float32)
    for start in range(0, L * dim, L * BC):
        cols = start + tl.arange(0, L * BC)
        if POST:
            tiles = following(x, y, post, q, rows, cols, dim, keep, N, K, DTYPE)
            store_streams(out, tiles, rows, cols, dim, keep, N)
        else:
            tiles = load_streams(x, rows, cols, N * dim, keep, 1)
        # Added up tile by tile: the error grows with the tiles, not with the channels.
        part = tl.zeros((BM, RP), tl.float32)
        for s in tl.static_range(N // L):
            wide = tiles[s].to(tl.float32)
            square += fold(wide * wide)
            w = load_tile(weight + s * dim, i, cols, N * dim, L * dim, i < ROWS).trans()
            part += product(stream_pieces(tiles[s]), (w,), tl.zeros((BM, RP), tl.float32))
        z += part
    if ROWS > M:
        # z_0 + z_1 + z_2
        parts = z
        z = tl.zeros((BM, MP), tl.float32)
        for p in tl.static_range(ROWS // M):
            z += tl.gather(parts, tl.broadcast_to(((j + p * M) % RP)[None, :], (BM, MP)), 1)
    r = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(tl.sum(square, 1)), eps))
    z *= r[:, None]
    b = tl.load(bias + j, mask=j < M, other=0.0)
    top = tl.where((j >= N) & (j < 2 * N), 2.0, 1.0)
    coefficients = top[None, :] * sigmoid(z + b[None, :])
    live = keep[:, None] & (j < M)[None, :]
    tl.store(after + rows[:, None] * M + j[None, :], coefficients, mask=live)
    tl.store(saved + rows[:, None] * (M + 1) + j[None, :], z, mask=live)
    tl.store(saved + rows * (M + 1) + M, r, mask=keep)
    # What other threads of the program stored is read back.
    tl.debug_barrier()
    pre = load_columns(after, rows, keep, 0, N, M)
    for start in tl.range(0, dim, BC, num_stages=3):
        cols = LAST - start + tl.arange(0, BC)
        tiles = load_streams(out, rows, cols, dim, keep, N)
        total = tl.zeros((BM, BC), tl.float32)
        for s in tl.static_range(N):
            total += pre[s] * tiles[s].to(tl.float32)
        mask = keep[:, None] & (cols < dim)[None, :]
        tl.store(u + rows[:, None] * dim + cols[None, :], total, mask=mask)


@triton.jit
def mixing_backward(
    grads, entering, branch, post, q, dpost, dq, dx, dy, rows, cols, dim, keep, N: tl.constexpr, K: tl.constexpr
):
    # dx = H_res g, dy = h_post g; dpost += <g, y> and dq_k -= sum (g_0 - g_1)(x_0 - x_1), folded
    # The stages commute: x passes the stages before k, g those after it.
    branch = branch.to(tl.float32)
    total = tl.zeros_like(branch)
    sums = ()
    for s in tl.static_range(N):
        total += post[s] * grads[s]
        sums = sums + (dpost[s] + fold(grads[s] * branch),)
    mask = keep[:, None] & (cols < dim)[None, :]
    tl.store(dy + rows[:, None] * dim + cols[None, :], total, mask=mask)
    last = ()
    # Stage K - 1 - i pairs streams 1 << i apart.
    for i in tl.static_range(K):
        step = tl.zeros_like(branch)
        for s in tl.static_range(N):
            if s & (1 << i) == 0:
                before = entering[K - 1 - i][s] - entering[K - 1 - i][s + (1 << i)]
                step += (grads[s] - grads[s + (1 << i)]) * before
        last = (dq[K - 1 - i] - fold(step),) + last
        grads = swap(grads, q[K - 1 - i], 1 << i, N)
    store_streams(dx, grads, rows, cols, dim, keep, N)
    return sums, last


@triton.jit
def place(into, sums, FIRST: tl.constexpr, COUNT: tl.constexpr, MP: tl.constexpr):
    j = tl.arange(0, MP)
    for c in tl.static_range(COUNT):
        into += tl.where((j == FIRST + c)[None, :], tl.sum(sums[c], 1)[:, None], 0.0)
    return into


@triton.jit(do_not_specialize=SIZES)
def post_backward_kernel(
    grad, x, y, h, dx, dy, dh, tokens, dim: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    keep = rows < tokens
    j = tl.arange(0, MP)
    post, q = load_columns(h, rows, keep, N, N, M), load_columns(h, rows, keep, 2 * N, K, M)
    dpost, dq = zeros(BM, BC // 8, N), zeros(BM, BC // 8, K)
    for start in range(0, dim, BC):
        cols = start + tl.arange(0, BC)
        grads = stages(load_streams(grad, rows, cols, dim, keep, N), q, N, 0)[0]
        tiles = load_streams(x, rows, cols, dim, keep, N)
        branch = load_tile(y, rows, cols, dim, dim, keep)
        entering = stages(tiles, q, N, K - 1)
        dpost, dq = mixing_backward(
            grads, entering, branch, post, q, dpost, dq, dx, dy, rows, cols, dim, keep, N, K
        )  # fmt: skip
    sums = place(place(tl.zeros((BM, MP), tl.float32), dpost, N, N, MP), dq, 2 * N, K, MP)
    tl.store(dh + rows[:, None] * M + j[None, :], sums, mask=keep[:, None] & (j < M)[None, :])


@triton.jit(do_not_specialize=SIZES)
def pre_backward_kernel(
    dfollowing, du, dafter, x, y, h, weight, after, saved, dx, dy, dh, logits, tokens, dim: tl.constexpr, eps,
    POST: tl.constexpr, JOIN: tl.constexpr, N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # dX' = h_pre du + r g W - r^2 <g, z> X' + what else flows in; then, with POST, through the mixing
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    keep = rows < tokens
    i, j = tl.arange(0, RP), tl.arange(0, MP)
    LAST: tl.constexpr = (dim - 1) // BC * BC
    live = keep[:, None] & (j < M)[None, :]
    if POST:
        post, q = load_columns(h, rows, keep, N, N, M), load_columns(h, rows, keep, 2 * N, K, M)
    dpre = zeros(BM, BC // 8, N)
    for start in tl.range(0, dim, BC, num_stages=3):
        cols = start + tl.arange(0, BC)
        d = load_tile(du, rows, cols, dim, dim, keep).to(tl.float32)
        if POST:
            tiles = following(x, y, post, q, rows, cols, dim, keep, N, K, DTYPE)
        else:
            tiles = load_streams(x, rows, cols, dim, keep, N)
        added = ()
        for s in tl.static_range(N):
            added = added + (dpre[s] + fold(d * tiles[s].to(tl.float32)),)
        dpre = added
    dcoef = tl.load(dafter + rows[:, None] * M + j[None, :], mask=live, other=0.0)
    dcoef = place(dcoef, dpre, 0, N, MP)
    coefficients = tl.load(after + rows[:, None] * M + j[None, :], mask=live, other=0.0)
    z = tl.load(saved + rows[:, None] * (M + 1) + j[None, :], mask=live, other=0.0)
    r = tl.load(saved + rows * (M + 1) + M, mask=keep, other=0.0)
    half = tl.where((j >= N) & (j < 2 * N), 0.5, 1.0)
    g = dcoef * coefficients * (1.0 - coefficients * half[None, :])
    # the limit as pre_kernel rounds it
    shrink = tl.where(r < tl.div_rn(1.0, eps), -r * r * tl.sum(g * z, 1), 0.0)[:, None]
    tl.store(logits + rows[:, None] * M + j[None, :], g, mask=live)
    # [r g | r g | r g] times [w_0 | w_1 | w_2]; what other threads of the program stored is read back.
    tl.debug_barrier()
    again = tl.load(logits + rows[:, None] * M + (i % M)[None, :], mask=keep[:, None], other=0.0)
    scaled = pieces(again * r[:, None], 3)
    pre = load_columns(after, rows, keep, 0, N, M)
    dpost, dq = zeros(BM, BC // 8, N), zeros(BM, BC // 8, K)
    for start in range(0, dim, BC):
        cols = LAST - start + tl.arange(0, BC)
        tiles = load_streams(x, rows, cols, dim, keep, N)
        d = load_tile(du, rows, cols, dim, dim, keep).to(tl.float32)
        if POST:
            branch = load_tile(y, rows, cols, dim, dim, keep)
            entering = stages(tiles, q, N, K)
            tiles = add_branch(entering[K], branch, post, N, DTYPE)
        grads = ()
        for s in tl.static_range(N):
            w = load_tile(weight + s * dim, i, cols, N * dim, dim, i < ROWS)
            part = apart(product(scaled, (w,), tl.zeros((BM, BC), tl.float32)))
            part += shrink * tiles[s].to(tl.float32) + pre[s] * d
            if JOIN:
                part += load_tile(dfollowing + s * dim, rows, cols, N * dim, dim, keep).to(tl.float32)
            grads = grads + (part,)
        if POST:
            dpost, dq = mixing_backward(
                grads, entering, branch, post, q, dpost, dq, dx, dy, rows, cols, dim, keep, N, K
            )  # fmt: skip
        else:
            store_streams(dx, grads, rows, cols, dim, keep, N)
    if POST:
        sums = place(place(tl.zeros((BM, MP), tl.float32), dpost, N, N, MP), dq, 2 * N, K, MP)
        tl.store(dh + rows[:, None] * M + j[None, :], sums, mask=live)


@triton.jit(do_not_specialize=SIZES)
def weight_gradient_kernel(
    logits, saved, x, y, h, partial, biases, tokens, dim: tl.constexpr,
    POST: tl.constexpr, SPLIT: tl.constexpr, N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    DTYPE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # partial[split] = (r g)^T X' over every SPLIT-th block of tokens, biases[split] = sum g
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    split = tl.program_id(1)
    j = tl.arange(0, MP)
    sums = zeros(MP, BC, N)
    total = tl.zeros((MP, BM), tl.float32)
    for start in range(split * BM, tokens, SPLIT * BM):
        rows = start + tl.arange(0, BM).to(tl.int64)
        keep = rows < tokens
        live = keep[None, :] & (j < M)[:, None]
        g = tl.load(logits + rows[None, :] * M + j[:, None], mask=live, other=0.0)
        total += g
        g *= tl.load(saved + rows * (M + 1) + M, mask=keep, other=0.0)[None, :]
        if POST:
            post, q = load_columns(h, rows, keep, N, N, M), load_columns(h, rows, keep, 2 * N, K, M)
            tiles = following(x, y, post, q, rows, cols, dim, keep, N, K, DTYPE)
        else:
            tiles = load_streams(x, rows, cols, dim, keep, N)
        left = pieces(g, 3) if tiles[0].dtype != tl.float32 else (g,)
        added = ()
        for s in tl.static_range(N):
            right = stream_pieces(tiles[s]) if tiles[0].dtype != tl.float32 else (tiles[s],)
            added = added + (sums[s] + product(left, right, tl.zeros((MP, BC), tl.float32)),)
        sums = added
    mask = (j < M)[:, None] & (cols < dim)[None, :]
    at = (split.to(tl.int64) * M + j[:, None]) * (N * dim) + cols[None, :]
    for s in tl.static_range(N):
        tl.store(partial + at + s * dim, sums[s], mask=mask)
    tl.store(biases + split * M + j, tl.sum(total, 1), mask=(j < M) & (tl.program_id(0) == 0))


@triton.jit
def add_splits(partial, out, at, size, SPLIT: tl.constexpr):
    s = tl.arange(0, 16)
    total = tl.zeros((16, at.shape[0]), tl.float32)
    for start in range(0, SPLIT, 16):
        mask = (start + s < SPLIT)[:, None] & (at < size)[None, :]
        total += tl.load(partial + (start + s).to(tl.int64)[:, None] * size + at[None, :], mask=mask, other=0.0)
    tl.store(out + at, tl.sum(total, 0), mask=at < size)


@triton.jit
def reduce_kernel(partial, biases, dweight, dbias, size, M: tl.constexpr, SPLIT: tl.constexpr, BC: tl.constexpr):
    # The last program has the bias.
    block = tl.program_id(0)
    at = tl.arange(0, BC)
    if block * BC < size:
        add_splits(partial, dweight, block * BC + at, size, SPLIT)
    else:
        add_splits(biases, dbias, at, M, SPLIT)


@triton.jit
def split_kernel(weight, out, size, BC: tl.constexpr):
    at = tl.program_id(0) * BC + tl.arange(0, BC)
    w = pieces(tl.load(weight + at, mask=at < size, other=0.0), 3)
    for k in tl.static_range(3):
        tl.store(out + k * size + at, w[k], mask=at < size)


def shape(x: Tensor) -> dict[str, int]:
    n = x.shape[1]
    k = n.bit_length() - 1
    return {"N": n, "K": k, "M": 2 * n + k}


def at_least_16(size: int) -> int:
    return max(16, next_power_of_2(size))


def padded(x: Tensor) -> dict[str, int]:
    return {"MP": at_least_16(shape(x)["M"])}


def stacked(x: Tensor) -> dict[str, int]:
    """Rows of the matrix that `split` returns, and that number padded."""
    rows = 3 * shape(x)["M"]
    return {"ROWS": rows, "RP": at_least_16(rows)}


def split(weight: Tensor) -> Tensor:
    """[w_0 | w_1 | w_2] in bfloat16."""
    out, size = weight.new_empty(3 * weight.shape[0], weight.shape[1], dtype=torch.bfloat16), weight.numel()
    split_kernel[(cdiv(size, 256),)](weight, out, size, BC=256)
    return out


# Tokens, channels of all streams together, channels at most, and warps of a tile, by kernel. "pre" takes the most
# shared memory: on an A100 eight streams do not fit its tile, on chips with 99 KiB (sm_86, 89 and 120) not even four.
TILES = {
    "pre": (64, 256, 64, 8),
    "post": (16, 512, 128, 8),
    "pre_backward": (16, 256, 64, 4),
    "step_backward": (16, 256, 64, 8),
    "post_backward": (16, 512, 128, 8),
    "weight_gradient": (16, 256, 64, 4),
}


# The tile of "pre" by the bytes of shared memory that it needs.
PRE = {225 << 10: TILES["pre"], 160 << 10: (32, 256, 64, 8), 0: (32, 128, 64, 8)}


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may use; those of an H200 in the interpreter, and for compilation without a GPU."""
    if device.type != "cuda":
        return 227 << 10
    return driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def tile(x: Tensor, kernel: str) -> dict[str, int]:
    if kernel == "pre":
        tokens, channels, most, warps = next(size for needed, size in PRE.items() if shared_memory(x.device) >= needed)
    else:
        tokens, channels, most, warps = TILES[kernel]
    width = max(16, min(most, channels // x.shape[1], next_power_of_2(x.shape[2])))
    # Half as many of float32.
    tokens = max(16, 2 * tokens // x.element_size())
    return {"BM": tokens, "BC": width, "num_warps": warps}


@on_its_device
def forward(
    x: Tensor, y: Tensor | None, h: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, _, dim = x.shape
    m = shape(x)["M"]
    out = x if y is None else torch.empty_like(x)
    u, after, saved = x.new_empty(tokens, dim), weight.new_empty(tokens, m), weight.new_empty(tokens, m + 1)
    if tokens:
        block = tile(x, "pre")
        pre_kernel[(cdiv(tokens, block["BM"]),)](
            x, x if y is None else y, after if h is None else h, split(weight), bias, out, u, after, saved, tokens,
            dim, eps, POST=y is not None, DTYPE=DTYPES[x.dtype], **shape(x), **padded(x), **stacked(x), **block,
        )  # fmt: skip
    return out, u, after, saved


@on_its_device
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
    common = {"POST": post, "DTYPE": DTYPES[x.dtype], **shape(x), **padded(x)}
    block = stacked(x) | tile(x, "step_backward" if post else "pre_backward")
    pre_backward_kernel[(cdiv(tokens, block["BM"]),)](
        joined, du, dafter, x, branch, before, split(weight), after, saved, grad, dy, dh, logits, tokens, dim,
        eps, JOIN=dx is not None, **common, **block,
    )  # fmt: skip
    block = tile(x, "weight_gradient")
    columns = cdiv(dim, block["BC"])
    splits = max(1, min(SPLITS // columns, cdiv(tokens, 256)))
    partial, biases = weight.new_empty(splits, m, n * dim), weight.new_empty(splits, m)
    weight_gradient_kernel[(columns, splits)](
        logits, saved, x, branch, before, partial, biases, tokens, dim, SPLIT=splits, **common, **block
    )
    dweight, dbias, size = torch.empty_like(weight), weight.new_empty(m), m * n * dim
    reduce_kernel[(cdiv(size, 128) + 1,)](partial, biases, dweight, dbias, size, M=m, SPLIT=splits, BC=128)
    return grad, dy, dh, dweight, dbias


def kronecker_pre(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return forward(x, None, None, weight, bias, eps)[1:]


def kronecker_step(
    x: Tensor, y: Tensor, h: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward(x, y, h, weight, bias, eps)


@on_its_device
def kronecker_post(x: Tensor, y: Tensor, h: Tensor) -> Tensor:
    tokens, _, dim = x.shape
    out, block = torch.empty_like(x), tile(x, "post")
    if tokens:
        grid = (cdiv(tokens, block["BM"]), cdiv(dim, block["BC"]))
        post_kernel[grid](x, y, h, out, tokens, dim, DTYPE=DTYPES[x.dtype], **shape(x), **block)
    return out


def kronecker_pre_backward(
    dx: Tensor | None, du: Tensor, dh: Tensor, x: Tensor, weight: Tensor, h: Tensor, saved: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dx, _, _, dweight, dbias = backward(dx, du, dh, x, None, None, weight, h, saved, eps)
    return dx, dweight, dbias


@on_its_device
def kronecker_post_backward(grad: Tensor, x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, _, dim = x.shape
    dx, dy, dh, block = torch.empty_like(x), torch.empty_like(y), torch.empty_like(h), tile(x, "post_backward")
    if tokens:
        post_backward_kernel[(cdiv(tokens, block["BM"]),)](
            grad, x, y, h, dx, dy, dh, tokens, dim, **shape(x), **padded(x), **block
        )
    return dx, dy, dh


def kronecker_step_backward(
    dx: Tensor, du: Tensor, dh: Tensor, x: Tensor, y: Tensor, h: Tensor, weight: Tensor, after: Tensor, saved: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(dx, du, dh, x, y, h, weight, after, saved, eps)
