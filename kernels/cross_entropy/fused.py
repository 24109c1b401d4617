"""Rows of logits to losses and gradients in Triton: two passes over a row, the second of which overwrites it.

A thread keeps the peak and the sum of its own columns to the end of the first pass. The columns that pad the matrix
are read and written, too, so that a mask never cuts through a thread's vector, whatever the size of the vocabulary.
"""

# Triton's constexpr parameters take plain values, and its language is not quite Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_its_device
from ..rounding import store

# Vectors of a program, and numbers in a vector.
VECTORS, EACH, WARPS = 512, 8, 8


@triton.jit
def load_logits(base, at, vocab, width):
    value = tl.load(base + at, mask=at < width, other=0.0).to(tl.float32)
    return tl.where(at < vocab, value, float("-inf"))


@triton.jit(do_not_specialize=["vocab"])
def rows_kernel(
    logits, labels, losses, vocab, width, stride, smoothing, ignore, larger,
    DIFFERENTIATE: tl.constexpr, SMOOTHED: tl.constexpr, VECTORS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    # loss = log sum exp(l) - (1 - s) l_target - s mean(l), dl = softmax(l) - (1 - s) onehot - s / V; 0 if ignored;
    # what is stored is `larger` times dl
    base = logits + tl.program_id(0).to(tl.int64) * stride
    label = tl.load(labels + tl.program_id(0))
    counted = label != ignore
    known = (label >= 0) & (label < vocab)
    target = tl.load(base + tl.where(known, label, 0)).to(tl.float32)
    at = tl.arange(0, VECTORS)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    # Finite, so that a row of -inf alone is NaN, as in PyTorch.
    peaks = tl.full((VECTORS,), -3e38, tl.float32)
    totals = tl.zeros((VECTORS,), tl.float32)
    sums = tl.zeros((VECTORS,), tl.float32)
    for start in range(0, width, VECTORS * EACH):
        value = load_logits(base, start + at, vocab, width)
        higher = tl.maximum(peaks, tl.max(value, 1))
        totals = totals * tl.exp(peaks - higher) + tl.sum(tl.exp(value - higher[:, None]), 1)
        peaks = higher
        if SMOOTHED:
            sums += tl.sum(tl.where(start + at < vocab, value, 0.0), 1)
    peak = tl.max(peaks, 0)
    total = tl.sum(totals * tl.exp(peaks - peak), 0)
    # a label that is no token: neither found nor ignored
    total = tl.where(known | (label == ignore), total, float("nan"))
    hit = target - peak
    if SMOOTHED:
        hit += smoothing * (tl.sum(sums, 0) / vocab - target)
    loss = tl.log(total) - hit
    tl.store(losses + tl.program_id(0), tl.where(counted, loss, 0.0))
    if DIFFERENTIATE:
        # Other threads may still have the target to read.
        tl.debug_barrier()
        scale = larger / total
        shift = larger * smoothing / vocab
        drop = shift + larger * (1 - smoothing)
        last = tl.where(counted, vocab, 0)
        for start in range(0, width, VECTORS * EACH):
            power = tl.exp(load_logits(base, start + at, vocab, width) - peak)
            slope = power * scale - tl.where(start + at == label, drop, shift)
            store(base + start + at, tl.where(start + at < last, slope, 0.0), mask=start + at < width)


@on_its_device
def row_losses(
    logits: Tensor, target: Tensor, vocab: int, smoothing: float, ignore_index: int, boost: float, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """See eager.row_losses; overwrites the logits, whatever their dtype, with their gradients."""
    losses = torch.empty(len(target), dtype=torch.float32, device=logits.device)
    if len(target):
        rows_kernel[(len(target),)](
            logits, target, losses, vocab, logits.shape[1], logits.stride(0), smoothing, ignore_index, boost,
            DIFFERENTIATE=differentiate, SMOOTHED=smoothing != 0, VECTORS=VECTORS, EACH=EACH, num_warps=WARPS,
        )  # fmt: skip
    return losses, logits
