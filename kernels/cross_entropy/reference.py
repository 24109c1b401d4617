"""Cross entropy of a linear head, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import full_precision


def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, smoothing: float, ignore_index: int) -> Tensor:
    """Summed over the rows of x (N, D)."""
    # 1. l = W x      2. log p = l - log sum exp(l)      3. loss = -sum q log p, q = (1 - s) onehot + s / V
    logits = x @ weight.T
    logp = full_precision(logits).log_softmax(-1)
    counted = target != ignore_index
    hit = logp.gather(1, torch.where(counted, target, 0)[:, None])[:, 0]
    losses = -(1 - smoothing) * hit
    if smoothing:  # 0 times the mean would be NaN where a logit is -inf
        losses = losses - smoothing * logp.mean(-1)
    return torch.where(counted, losses, 0).sum()
