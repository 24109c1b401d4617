"""Heads for natural language inference on an encoder's token features: Grassmann mixing, and attention as baseline.

arXiv 2512.19428, §4.2, says of the Grassmann–Plücker head: Grassmann mixing over projected features, then a
feed-forward classifier; d_proj 64, windows of 8 tokens with stride 8, d_model 256, 2 mixing layers, 4 mixing heads
"for grouping pairs", d_ff 512, dropout 0.1; and of its rival: a 2-layer Transformer-style classifier of comparable
size. The rest is interpretation: the heads split d_proj into groups that are wedged each on its own; a token is paired
with all others of its window, before and after it, since nothing is predicted from left to right here; layers are the
paper's post-norm layers of §3.2; the features of all tokens are averaged before the classifier, which has one hidden
layer. The paper limits each sentence to 48 tokens and does not say how the two meet; here premise and hypothesis come
as one sequence, encoded together ([CLS] premise [SEP] hypothesis [SEP]).
"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_dropout, check_input, check_positive, project
from ..ffns import MLP
from ..init import init_weights, reset_layers
from ..mixers import BidirectionalAttention
from ..mixers.window import WindowGrassmannMixer
from ..residuals import PlainResidual


class NLIHead(nn.Module):
    """Linear(in_features, d_model), layers of a mixer and an MLP, the mean over tokens, a classifier.

    Subclasses choose the mixer. features (B, T, in_features) and mask (B, T) → logits (B, num_classes).
    """

    # The logits' weight is no hidden matrix.
    optim_groups: ClassVar[dict[str, str]] = {"classifier.weight": "decay"}

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        d_model: int,
        num_layers: int,
        d_ff: int,
        dropout: float,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "num_classes": num_classes, "d_model": d_model, "d_ff": d_ff}
        check_positive(**sizes, num_layers=num_layers)
        check_dropout(dropout)
        self.in_features, self.num_classes = in_features, num_classes
        self.proj = nn.Linear(in_features, d_model, **dd)
        residual: dict[str, Any] = {"norm": "post", "dropout": dropout, **dd}
        self.mixers = nn.ModuleList(PlainResidual(self.mixer(dd), d_model, **residual) for _ in range(num_layers))
        self.ffns = nn.ModuleList(PlainResidual(MLP(d_model, d_ff, **dd), d_model, **residual) for _ in self.mixers)
        self.hidden = nn.Linear(d_model, d_model, **dd)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(d_model, num_classes, **dd)
        for part in (self.proj, self.hidden, self.classifier):
            part.apply(init_weights)

    reset_parameters = reset_layers

    @abstractmethod
    def mixer(self, dd: dict[str, Any]) -> nn.Module:
        """One layer's mixer."""

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes) of token features (B, T, in_features).

        mask (B, T): bool or 0 and 1, False for padding, whose content and amount after the last token change nothing;
        None if there is none. ValueError for other shapes, and for a row without a token (seen on the CPU only);
        TypeError for another dtype than the weights'.
        """
        check_input(features, self.in_features, self.proj, sequence=True, name="features")
        mask = _checked(mask, features)
        # Not a product: what stands in padding may be infinite or NaN.
        x = project(self.proj, torch.where(mask[..., None], features, 0))
        for mixer, ffn in zip(self.mixers, self.ffns, strict=True):
            x = ffn(mixer(x, None, None, mask))
        weight = mask.to(x.dtype)
        pooled = torch.einsum("btd,bt->bd", x, weight) / weight.sum(1, keepdim=True)
        return project(self.classifier, self.dropout(F.gelu(project(self.hidden, pooled))))


class PluckerNLIHead(NLIHead):
    """The Grassmann–Plücker head (arXiv 2512.19428, §4.2): features (B, T, in_features) → logits (B, num_classes).

    in_features: width of the encoder (768: DistilBERT). d_proj: reduced dimension of all mixing heads together.
    window, stride: of the windows whose tokens are paired. The defaults are the paper's; see the module's text for
    what the paper leaves open. ValueError names a bad argument.
    """

    def __init__(
        self,
        in_features: int = 768,
        num_classes: int = 3,
        *,
        d_proj: int = 64,
        window: int = 8,
        stride: int = 8,
        d_model: int = 256,
        num_layers: int = 2,
        num_heads: int = 4,
        d_ff: int = 512,
        dropout: float = 0.1,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        mixing = {"rank": d_proj, "num_heads": num_heads, "window": window, "stride": stride, "backend": backend}
        self._mixing: dict[str, Any] = {"dim": d_model, **mixing}
        dd = {"device": device, "dtype": dtype}
        super().__init__(in_features, num_classes, d_model, num_layers, d_ff, dropout, dd)

    def mixer(self, dd: dict[str, Any]) -> nn.Module:
        return WindowGrassmannMixer(**self._mixing, **dd)


class TransformerNLIHead(NLIHead):
    """The baseline: self-attention over all tokens in place of Grassmann mixing, all else as in `PluckerNLIHead`."""

    def __init__(
        self,
        in_features: int = 768,
        num_classes: int = 3,
        *,
        d_model: int = 256,
        num_layers: int = 2,
        num_heads: int = 4,
        d_ff: int = 512,
        dropout: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._attention: dict[str, Any] = {"dim": d_model, "num_heads": num_heads}
        dd = {"device": device, "dtype": dtype}
        super().__init__(in_features, num_classes, d_model, num_layers, d_ff, dropout, dd)

    def mixer(self, dd: dict[str, Any]) -> nn.Module:
        return BidirectionalAttention(**self._attention, **dd)


def _checked(mask: Tensor | None, features: Tensor) -> Tensor:
    if mask is None:
        if features.shape[1] == 0:
            raise ValueError(f"features must have at least one token, got {tuple(features.shape)}")
        return torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    if mask.shape != features.shape[:2] or mask.is_floating_point():
        wanted = f"bool or integer {tuple(features.shape[:2])}"
        raise ValueError(f"mask must be {wanted}, got {mask.dtype} {tuple(mask.shape)}")
    mask = mask.bool()
    # Looking at values on a GPU would wait for it, and under torch.compile would break the graph.
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(mask.any(-1).all()):
        raise ValueError(f"mask must leave each row a token, row {int((~mask.any(-1)).nonzero()[0])} has none")
    return mask
