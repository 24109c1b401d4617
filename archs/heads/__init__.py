"""Heads: features to logits.

A head is constructed as `Head(dim, num_classes, embedding=None, *, options…, device, dtype)`, where `embedding` is the
model's token embedding if it has one, and has `logits(x)` (…, dim) → (…, num_classes), `loss(x, labels, reduction, *,
label_smoothing)` without materialised logits, and `flops_per_token()`.
"""

from .classifier import ClassifierHead
from .cosine import CosineHead
from .grassmann import GrassmannHead, grassmann_heads, reproject_
from .linear import LinearHead, TiedHead

__all__ = ["ClassifierHead", "CosineHead", "GrassmannHead", "LinearHead", "TiedHead", "grassmann_heads", "reproject_"]
