"""Rows of logits to losses and gradients in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import full_precision


def row_losses(
    logits: Tensor, target: Tensor, vocab: int, smoothing: float, ignore_index: int, boost: float, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """Losses (n,) of logits (n, W), of whose columns the first `vocab` count and the others are zero.

    Also `boost` times dl = softmax(l) - (1 - s) onehot - s / V in the dtype of the logits, zero in the other columns
    and in ignored rows; without `differentiate`, anything. Overwrites the logits where they are float32 or wider.
    """
    whole = full_precision(logits)
    wide, counted = whole[:, :vocab], target != ignore_index
    known = (target >= 0) & (target < vocab)
    aimed = torch.where(known, target, 0)[:, None]
    normaliser = wide.logsumexp(-1, keepdim=True)
    # a class that there is not: nobody has looked on a GPU
    normaliser = normaliser.masked_fill((counted & ~known)[:, None], torch.nan)
    hit = wide.gather(1, aimed)
    if smoothing:
        hit = hit.lerp(wide.mean(-1, keepdim=True), smoothing)
    losses = torch.where(counted, (normaliser - hit)[:, 0], 0)
    if differentiate:
        wide.sub_(normaliser).exp_()
        if smoothing:
            wide.sub_(smoothing / vocab)
        wide.scatter_(1, aimed, wide.gather(1, aimed) - (1 - smoothing))
        # not by a product: an ignored row may be NaN
        whole.masked_fill_(~counted[:, None], 0)
        if boost != 1:
            wide.mul_(boost)
    return losses, whole.to(logits.dtype)
