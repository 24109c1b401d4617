"""The cosine classifier: normalised features against normalised class vectors."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.cross_entropy import linear_cross_entropy
from ...kernels.products import linear
from ..checks import check_input, check_positive
from ..registry import register_slot
from .classifier import checked_labels, cross_entropy


@register_slot("head", "cosine")
class CosineHead(nn.Module):
    """logits = γ cos(w_i, x), w_i the rows of `weight` (num_classes, dim), drawn from N(0, 1/dim).

    A baseline of arXiv 2308.01547: signed, where a Grassmann head of one-dimensional subspaces has γ |cos|.
    scale: γ > 0, a finite number; ValueError for others.
    """

    # The logits' weight is no hidden matrix.
    optim_groups: ClassVar[dict[str, str]] = {"weight": "decay"}

    def __init__(
        self,
        dim: int,
        num_classes: int,
        embedding: nn.Embedding | None = None,
        *,
        scale: float = 25.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, num_classes=num_classes)
        if isinstance(scale, bool) or not (isinstance(scale, int | float) and 0 < scale < math.inf):
            raise ValueError(f"scale must be a finite number > 0, got {scale!r}")
        self.in_features, self.out_features, self.scale = dim, num_classes, float(scale)
        # For models that compute their loss with `loss`: the classifier hands on what it is given.
        self.features_only = False
        self.weight = nn.Parameter(torch.empty(num_classes, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class vectors anew."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (…, num_classes) of x (…, dim), between −scale and scale; x itself while `features_only` is set."""
        if self.features_only:
            return x
        return linear(*self._normalised(x))

    def logits(self, x: Tensor) -> Tensor:
        """As `forward`; the head protocol's name."""
        return self(x)

    def loss(self, x: Tensor, labels: Tensor, reduction: str = "mean", *, label_smoothing: float = 0.0) -> Tensor:
        """Cross entropy of x (…, dim) against labels (…) int64, −100 ignored, without materialised logits, or against
        probabilities (…, num_classes); at least float32. reduction: "mean" or "sum"."""
        if labels.is_floating_point():
            return cross_entropy(self(x), labels, reduction, label_smoothing)
        labels = checked_labels(x, labels, self.out_features, reduction, label_smoothing)
        options: Any = {"reduction": reduction, "label_smoothing": label_smoothing}
        return linear_cross_entropy(*self._normalised(x), labels, **options)

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_input(x, self.in_features, self)
        return self.scale * F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1)

    def flops_per_token(self) -> int:
        """Forward FLOPs a token."""
        return 2 * self.weight.numel()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale:g}"
