"""The classifier of images: a linear layer with a bias."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_input
from ..init import init_weights
from ..registry import register_slot


@register_slot("head", "classifier")
class ClassifierHead(nn.Module):
    """logits = W x + b, W (num_classes, dim)."""

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
        self.dim = dim
        self.proj = nn.Linear(dim, num_classes, device=device, dtype=dtype)
        self.apply(init_weights)

    def logits(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, num_classes)."""
        check_input(x, self.dim, self.proj)
        return self.proj(x)

    def loss(self, x: Tensor, labels: Tensor, reduction: str = "mean", *, label_smoothing: float = 0.0) -> Tensor:
        """Cross entropy of x (B, dim) against labels (B,) int64, −100 ignored, or probabilities (B, num_classes);
        at least float32."""
        logits = self.logits(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)

    def flops_per_token(self) -> int:
        """Forward FLOPs of one image."""
        return 2 * self.proj.weight.numel()
