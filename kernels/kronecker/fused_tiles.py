"""What the KromHC kernels do with tiles: loading and storing streams, the butterfly, products of bfloat16 pieces."""

# Triton's constexpr parameters take plain values, and its language is not quite Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .. import dispatch

# The interpreter's half-precision dot is wrong.
WIDE = tl.constexpr(dispatch.interpreted())
LOG2E = tl.constexpr(1.4426950216293335)
LOG2E_REST = tl.constexpr(1.9259629911266175e-08)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(base, rows, cols, stride, dim, keep):
    return tl.load(base + rows[:, None] * stride + cols[None, :], mask=keep[:, None] & (cols < dim)[None, :], other=0.0)


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
def load_columns(h, rows, keep, FIRST: tl.constexpr, COUNT: tl.constexpr, M: tl.constexpr):
    # The sum over one number keeps the compiler from mixing a second time in the layout of a dot's operand.
    out = ()
    at = h + rows[:, None] * M + tl.arange(0, 1)[None, :]
    for c in tl.static_range(COUNT):
        out = out + (tl.sum(tl.load(at + FIRST + c, mask=keep[:, None], other=0.0), 1)[:, None],)
    return out


@triton.jit
def swap(tiles, q, HALF: tl.constexpr, N: tl.constexpr):
    # e = q (x_0 - x_1), x_0' = x_0 - e, x_1' = x_1 + e for the pairs HALF apart
    out = ()
    for s in tl.static_range(N):
        e = q * (tiles[s & ~HALF] - tiles[s | HALF])
        if s & HALF == 0:
            out = out + (tiles[s] - e,)
        else:
            out = out + (tiles[s] + e,)
    return out


@triton.jit
def stages(tiles, q, N: tl.constexpr, K: tl.constexpr):
    # The streams in float32 as they enter stage 0, 1, … and as they leave the last
    wide = ()
    for s in tl.static_range(N):
        wide = wide + (tiles[s].to(tl.float32),)
    out = (wide,)
    for k in tl.static_range(K):
        wide = swap(wide, q[k], N >> (k + 1), N)
        out = out + (wide,)
    return out


@triton.jit
def add_branch(mixed, branch, post, N: tl.constexpr, DTYPE: tl.constexpr):
    # X' = H_res X + h_post (x) y, rounded as it is stored
    out = ()
    for s in tl.static_range(N):
        out = out + ((mixed[s] + post[s] * branch.to(tl.float32)).to(DTYPE),)
    return out


@triton.jit
def following(x, y, post, q, rows, cols, dim, keep, N: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr):
    tiles = load_streams(x, rows, cols, dim, keep, N)
    branch = load_tile(y, rows, cols, dim, dim, keep)
    return add_branch(stages(tiles, q, N, K)[K], branch, post, N, DTYPE)


@triton.jit
def fold(tile):
    # Sums of 8 neighbours: a thread has them, so that only the end of a pass crosses threads.
    return tl.sum(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 8, 8)), 2)


@triton.jit
def zeros(BM: tl.constexpr, BC: tl.constexpr, COUNT: tl.constexpr):
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros((BM, BC), tl.float32),)
    return out


@triton.jit
def pieces(a, COUNT: tl.constexpr):
    # a = a_0 + a_1 + …, bfloat16: the first 8 bits, which one instruction cuts off, the next 8, …
    out = ()
    for _ in tl.static_range(COUNT - 1):
        high = (a.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        out = out + (high.to(tl.bfloat16),)
        a = a - high
    return out + (a.to(tl.bfloat16),)


@triton.jit
def apart(a):
    # The sum over one number keeps what comes before it, or after, out of the layout of a dot.
    return tl.sum(tl.reshape(a, (a.shape[0], a.shape[1], 1)), 2)


@triton.jit
def stream_pieces(tile):
    # 11 bits of float16 are two bfloat16 numbers, 24 bits of float32 three.
    if tile.dtype == tl.bfloat16:
        out = (tile,)
    else:
        out = pieces(apart(tile.to(tl.float32)), 2 if tile.dtype == tl.float16 else 3)
    return out


@triton.jit
def product(a, b, acc):
    # sum over the pieces of a and of b, the small ones of a first: the matrix unit truncates its sums.
    # float32 stays float32 on the chip: no TF32.
    for i in tl.static_range(len(a) - 1, -1, -1):
        for k in tl.static_range(len(b)):
            if WIDE:
                acc = tl.dot(a[i].to(tl.float32), b[k].to(tl.float32), acc, input_precision="ieee")
            else:
                acc = tl.dot(a[i], b[k], acc, input_precision="ieee")
    return acc


@triton.jit
def sigmoid(x):
    # a = exp(-|x|) = 2^t (1 + ln2 (exact - t)), t = -|x| log2(e) rounded; sigmoid = (1 or a) / (1 + a)
    v = -tl.abs(x)
    t = v * LOG2E
    rest = tl.fma(v, LOG2E, -t) + v * LOG2E_REST
    a = tl.exp2(t)
    a = tl.where(a > 0.0, tl.fma(a, rest * LN2, a), a)
    return tl.div_rn(tl.where(x >= 0.0, 1.0, a), 1.0 + a)
