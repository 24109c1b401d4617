"""How well a classifier does: top-1 and top-5 accuracy, cross entropy, expected calibration error."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..archs.modes import evaluating
from ..kernels.losses import IGNORE
from . import parallel
from .data.image_batches import ImageBatch

BINS = 15
ToImages = Callable[[Tensor], Tensor]


@torch.no_grad()
def evaluate_classifier(
    model: nn.Module, batches: Iterable[ImageBatch], to_images: ToImages, device: torch.device
) -> dict[str, float]:
    """`Tally` of a model on batches, in evaluation mode for the time of the call."""
    tally, skipped = Tally(device), 0
    with evaluating(model):
        for batch in batches:
            skipped += batch.skipped
            tally.add(model(to_images(batch.images)), batch.targets.to(device))
    skipped = sum(parallel.gather(skipped))
    return {**tally.metrics(), **({"skipped": skipped} if skipped else {})}


class Tally:
    """Sums over images, kept on the device.

    The calibration error is Σ_b n_b / n · |accuracy_b − confidence_b| over 15 bins of equal width of the largest
    probability, each without its lower edge (arXiv 1706.04599, eq. 3).
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, −log p, top 1, top 5
        self.bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)  # images, top 1, confidence

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """logits (B, K); targets (B,) int64, −100 for rows that do not count. Of logits that give no probabilities, as
        NaN, no metric is a number."""
        counted = targets != IGNORE
        targets = targets.clamp_min(0)
        # Selecting rows would wait for the device; weights do not.
        log_p = logits.float().masked_fill(~counted[:, None], 0.0).log_softmax(-1)
        confidence, guess = log_p.exp().max(-1)
        weight = counted.double().masked_fill(confidence.isnan(), torch.nan)
        hit = (guess == targets) * weight
        nll = -log_p.gather(-1, targets[:, None]).squeeze(-1)
        best = log_p.topk(min(5, logits.shape[-1]), -1).indices
        hit5 = (best == targets[:, None]).any(-1) * weight
        self.sums += torch.stack([weight.sum(), (nll * weight).sum(), hit.sum(), hit5.sum()])
        place = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
        # A product, since index_add_ adds in any order on a GPU.
        self.bins += torch.stack([weight, hit, confidence * weight]) @ nn.functional.one_hot(place, BINS).double()

    def metrics(self) -> dict[str, float]:
        """loss (nats), error (1 − top1), top1, top5, ece, of all processes. ValueError if nothing has been counted."""
        sums, bins = parallel.total(self.sums), parallel.total(self.bins)
        images, nll, hits, hits5 = sums.tolist()
        if not images:
            raise ValueError("there is no readable image to evaluate on")
        ece = float((bins[1] - bins[2]).abs().sum()) / images
        top1 = hits / images
        return {"loss": nll / images, "error": 1 - top1, "top1": top1, "top5": hits5 / images, "ece": ece}
