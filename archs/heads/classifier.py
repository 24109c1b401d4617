"""The classifier of images: a linear layer with a bias; and the loss of logits that are all in memory."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.dispatch import transformed
from ...kernels.losses import IGNORE, check_labels, check_loss
from ..checks import check_input, check_positive, project
from ..init import reset_layers
from ..registry import register_slot


def checked_labels(
    x: Tensor, labels: Tensor, classes: int, reduction: str, label_smoothing: float, ignore_index: int = IGNORE
) -> Tensor:
    """The labels of x (…, n), by whose name the kernels do not know them; ValueError or TypeError for what they would
    refuse, in eager calls for a class that there is not, too."""
    check_loss(x, classes, labels, label_smoothing, reduction, soft=True, name="labels")
    if not (torch.compiler.is_compiling() or transformed()):
        check_labels(labels, classes, ignore_index, "labels")
    return labels


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str, label_smoothing: float) -> Tensor:
    """`F.cross_entropy`, in at least float32, of logits (…, C) against labels (…) int64 or probabilities (…, C); a
    gradient flows to these. Raises what `checked_labels` does."""
    checked_labels(logits, labels.detach(), logits.shape[-1], reduction, label_smoothing)
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
        self.reset_parameters()

    reset_parameters = reset_layers

    def forward(self, x: Tensor) -> Tensor:
        """As `logits`."""
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, num_classes)."""
        check_input(x, self.dim, self.proj)
        return project(self.proj, x)

    def loss(self, x: Tensor, labels: Tensor, reduction: str = "mean", *, label_smoothing: float = 0.0) -> Tensor:
        """Cross entropy of x (…, dim) against labels (…) int64, −100 ignored, or probabilities (…, num_classes);
        at least float32."""
        return cross_entropy(self.logits(x), labels, reduction, label_smoothing)

    def flops_per_token(self) -> int:
        """Forward FLOPs of one image."""
        return 2 * self.proj.weight.numel()
