"""Rows of logits to losses and gradients in Triton: two passes over a row, the second of which overwrites it."""

# Triton's constexpr parameters take plain values, and its language is not quite Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels.rounding import store

BLOCK = 4096


@triton.jit(do_not_specialize=["vocab"])
def rows_kernel(
    logits, labels, losses, vocab, stride, smoothing, ignore, larger, DIFFERENTIATE: tl.constexpr, BLOCK: tl.constexpr
):
    # loss = log sum exp(l) - (1 - s) l_target - s mean(l), dl = softmax(l) - (1 - s) onehot - s / V; 0 if ignored;
    # what is stored is `larger` times dl
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    label = tl.load(labels + row)
    peak = tl.full((), -3e38, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    mean = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(value, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(value - higher), 0)
        peak = higher
        mean += tl.sum(tl.where(at < vocab, value, 0.0), 0)
    counted = label != ignore
    known = (label >= 0) & (label < vocab)
    target = tl.load(base + tl.where(known, label, 0)).to(tl.float32)
    # a label that is no token: neither found nor ignored
    normaliser = tl.where(known | (label == ignore), peak + tl.log(total), float("nan"))
    loss = normaliser - (1 - smoothing) * target - smoothing * (mean / vocab)
    tl.store(losses + row, tl.where(counted, loss, 0.0))
    if DIFFERENTIATE:
        for start in range(0, vocab, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(base + at, mask=at < vocab, other=0.0).to(tl.float32)
            slope = tl.exp(value - normaliser) - smoothing / vocab - tl.where(at == label, 1 - smoothing, 0.0)
            store(base + at, tl.where(counted, larger * slope, 0.0), mask=at < vocab)


def row_losses(
    logits: Tensor, labels: Tensor, smoothing: float, ignore: int, larger: float, differentiate: bool
) -> Tensor:
    """Losses (n,) in float32 of logits (n, V); with `differentiate` the logits become `larger` times their gradient."""
    losses = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
    if len(labels):
        rows_kernel[(len(labels),)](
            logits, labels, losses, logits.shape[1], logits.stride(0), smoothing, ignore, larger,
            DIFFERENTIATE=differentiate, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return losses
