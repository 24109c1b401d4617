"""Linear heads, with a weight of their own or the token embedding's."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...kernels.cross_entropy import linear_cross_entropy
from ...kernels.products import linear
from ..checks import check_input, check_positive, is_plain, project
from ..init import reset_layers
from ..registry import register_slot
from ..sharing import Reference
from .classifier import checked_labels, cross_entropy


@register_slot("head", "linear")
class LinearHead(nn.Module):
    """logits = W x with a weight (num_classes, dim) of its own and no bias."""

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
        self.proj = nn.Linear(dim, num_classes, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    reset_parameters = reset_layers

    @property
    def weight(self) -> Tensor:
        return self.proj.weight

    def forward(self, x: Tensor) -> Tensor:
        """As `logits`."""
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, num_classes)."""
        check_input(x, self.dim, self.proj)
        return project(self.proj, x)

    def loss(self, x: Tensor, labels: Tensor, reduction: str = "mean", *, label_smoothing: float = 0.0) -> Tensor:
        """Cross entropy of x (…, dim) against labels (…) int64, −100 ignored, without materialised logits, or against
        probabilities (…, num_classes).

        reduction: "mean" over the labels that count (NaN if none does, as in PyTorch) or "sum". A float32 scalar,
        float64 for float64 input.
        """
        if labels.is_floating_point() or not self._reads_weight():
            return cross_entropy(self.logits(x), labels, reduction, label_smoothing)
        labels = checked_labels(x, labels, len(self.weight), reduction, label_smoothing)
        return linear_cross_entropy(x, self.weight, labels, reduction=reduction, label_smoothing=label_smoothing)

    def _reads_weight(self) -> bool:
        return is_plain(self.proj)

    def flops_per_token(self) -> int:
        """Forward FLOPs a token."""
        return 2 * self.weight.numel()


@register_slot("head", "tied")
class TiedHead(LinearHead):
    """logits = W x with the token embedding's weight. ValueError without an embedding."""

    def __init__(
        self,
        dim: int,
        num_classes: int,
        embedding: nn.Embedding | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if embedding is None:
            raise ValueError("head='tied' needs a model with a token embedding; use head='linear'")
        check_positive(dim=dim, num_classes=num_classes)
        self.dim = dim
        self.tied = Reference(embedding, "weight")

    @property
    def weight(self) -> Tensor:
        return self.tied.module.weight

    def logits(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, num_classes)."""
        check_input(x, self.dim, self)
        return linear(x, self.weight)

    def _reads_weight(self) -> bool:
        # The embedding's own call looks rows up; nothing around it is a projection.
        return True
