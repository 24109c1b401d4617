"""The classifier of images: a linear layer with a bias; and the loss of logits that are all in memory."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_input, check_positive
from ..init import init_weights
from ..registry import register_slot


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str, label_smoothing: float) -> Tensor:
    """`F.cross_entropy`, in at least float32, of logits (…, C) against labels (…) int64 or probabilities (…, C).

    ValueError for labels of another shape, TypeError for those of another dtype.
    """
    if labels.dtype != torch.int64 and not labels.is_floating_point():
        raise TypeError(f"labels must be int64 classes or floating-point probabilities, got {labels.dtype}")
    wanted = logits.shape if labels.is_floating_point() else logits.shape[:-1]
    if labels.shape != wanted:
        raise ValueError(f"labels must be {labels.dtype} {tuple(wanted)}, got {tuple(labels.shape)}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, logits.shape[-1])
    labels = labels.reshape(-1, *labels.shape[logits.dim() - 1 :])
    return F.cross_entropy(wide, labels, reduction=reduction, label_smoothing=label_smoothing)


@register_slot("head", "classifier")
class ClassifierHead(nn.Module):
    """logits = W x + b, W (num_classes, dim)."""

    # The logits' weight is no hidden matrix.
    optim_groups: ClassVar[dict[str, str]] = {"proj.weight": "decay"}

    def __init__(
        self,
        dim: int,
        num_classes: int,
        embedding: nn.Embedding | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, num_classes=num_classes)
        self.dim = dim
        self.proj = nn.Linear(dim, num_classes, device=device, dtype=dtype)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """As `logits`."""
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, num_classes)."""
        check_input(x, self.dim, self.proj)
        return self.proj(x)

    def loss(self, x: Tensor, labels: Tensor, reduction: str = "mean", *, label_smoothing: float = 0.0) -> Tensor:
        """Cross entropy of x (…, dim) against labels (…) int64, −100 ignored, or probabilities (…, num_classes);
        at least float32."""
        return cross_entropy(self.logits(x), labels, reduction, label_smoothing)

    def flops_per_token(self) -> int:
        """Forward FLOPs of one image."""
        return 2 * self.proj.weight.numel()
