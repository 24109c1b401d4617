"""Masked language models from the same slots: ALBERT, BERT with factorised embeddings, WideNet."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.losses import IGNORE
from ..kernels.products import linear
from . import ffns, heads, mixers, residuals  # noqa: F401  (each registers its choices)
from .checks import first_rows, project
from .config import ModelConfig
from .init import reset_model
from .lm import build_blocks, check_range, is_causal
from .registry import build_slot, register_assembly, slot_class
from .sharing import is_schedule


@dataclass(frozen=True)
class EncoderConfig(ModelConfig):
    """A `ModelConfig` for bidirectional text encoders.

    embed_dim: width of the factorised token embedding. num_types: token types. pooler: whether there is a Linear and
    tanh on the first token, which needs a mixer that is not causal. num_classes: of a linear classifier on the pooler
    (for sentence order, or for fine-tuning); 0 for none. span_head: whether a Linear(dim, 2) scores every token as the
    first and as the last one of an answer. share_norms: the LayerNorms too are shared across depth (of a group), as in
    ALBERT; needs share=("mixer", "ffn").
    """

    kind: str = "mlm"
    vocab_size: int = 30000
    max_len: int = 512
    dim: int = 768
    depth: int = 12
    ffn_dim: int = 3072
    mixer: str = "bidirectional"
    embed_dim: int = 128
    num_types: int = 2
    pooler: bool = True
    num_classes: int = 0
    span_head: bool = False
    share_norms: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("embed_dim", "num_types"):
            self._check_size(name)
        if not isinstance(self.num_classes, int) or isinstance(self.num_classes, bool) or self.num_classes < 0:
            raise ValueError(f"num_classes must be an integer of at least 0, got {self.num_classes!r}")
        if self.num_classes and not self.pooler:
            raise ValueError(f"num_classes={self.num_classes} needs pooler=True")
        if self.pooler and is_causal(self):
            reason = "the first token, which it reads, would see no other"
            raise ValueError(f"pooler must be False with the causal mixer {self.mixer!r}, got True: {reason}")
        if self.share_norms and set(self.share) != {"mixer", "ffn"}:
            raise ValueError(f"share_norms=True needs share=('mixer', 'ffn'), got share={self.share!r}")
        for name in getattr(slot_class("mixer", self.mixer), "layer_options", ()) if self.share_norms else ():
            value: Any = self.options.get(name)
            if is_schedule(value) and len(set(value)) > 1:
                raise ValueError(f"{name} must be the same in all layers with share_norms=True, got {value!r}")


@register_assembly("mlm")
class Encoder(nn.Module):
    """A bidirectional encoder with a masked-token loss through the transposed embedding, so without weights of its own.

    Token (V, e), position and type embeddings of width e, LayerNorm, Linear(e, dim), blocks, pooler (arXiv 1909.11942).
    A final LayerNorm follows the blocks, unless they end in one: with norm="post" and residual="plain". With
    `num_classes`, a linear classifier follows the pooler; with `span_head`, two logits of every token the last norm.
    """

    config_class = EncoderConfig
    # What runs the model as forward does: a sharded one must be gathered for it.
    forward_methods = ("predict", "classify", "span_logits")
    # The logits' weights are no hidden matrices.
    optim_groups: ClassVar[dict[str, str]] = {"classifier.weight": "decay", "span_head.weight": "decay"}

    def __init__(
        self, config: EncoderConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.config = config
        eps = config.options.get("norm_eps", 1e-5)
        self.embed = nn.Embedding(config.vocab_size, config.embed_dim, **dd)
        self.positions = nn.Embedding(config.max_len, config.embed_dim, **dd)
        self.types = nn.Embedding(config.num_types, config.embed_dim, **dd)
        self.embed_norm = nn.LayerNorm(config.embed_dim, eps=eps, **dd)
        self.dropout = nn.Dropout(config.dropout)
        self.proj = nn.Linear(config.embed_dim, config.dim, **dd)
        # Blocks that share their norms too are one block, applied as often as its group is deep.
        built = config.override(depth=config.share_groups) if config.share_norms else config
        self.blocks: Any = nn.ModuleList(build_blocks(built, dd))
        # Streams are never normalised, so of all residuals the plain one alone can end in a norm.
        normed = config.residual == "plain" and config.norm == "post"
        self.norm = nn.Identity() if normed else nn.LayerNorm(config.dim, eps=eps, **dd)
        self.pooler = nn.Linear(config.dim, config.dim, **dd) if config.pooler else None
        self.classifier = nn.Linear(config.dim, config.num_classes, **dd) if config.num_classes else None
        self.span_head = nn.Linear(config.dim, 2, **dd) if config.span_head else None
        self.head: Any = build_slot(
            "head", config.head, config.embed_dim, config.vocab_size, self.embed, **config.options, **dd
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        reset_model(self)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        token_types: Tensor | None = None,
        positions: Tensor | None = None,
        classes: Tensor | None = None,
        spans: Tensor | None = None,
        reduction: str = "mean",
        label_weight: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, L, V) of input_ids (B, L) int64; with labels (B, L), −100 not counting, the cross entropy instead.

        mask (B, L) bool: False for padding. token_types (B, L) int64, zeros by default. positions (B, P) int64: the
        only places that the head looks at; logits are then (B, P, V) and labels (B, P). classes (B,) int64, −100 not
        counting: the loss is the classifier's cross entropy, or the sum of both with labels. spans (B, 2) int64, −100
        not counting: the first and last token of each answer; the loss is the mean of their cross entropies over the
        tokens, added likewise. label_weight: a scalar that the labels' cross entropy alone is multiplied by. In
        training the ffns' auxiliary losses are added to the loss. ValueError for wrong shapes, too many tokens, ids
        outside the vocabulary, classes without a classifier or spans without a span head; TypeError for wrong dtypes.
        """
        x, auxiliary = self.features(input_ids, mask=mask, token_types=token_types)
        losses = []
        if labels is not None or (classes is None and spans is None):
            places = self._places(x, positions)
            if labels is None:
                return self.head.logits(places)
            if (shape := places.shape[:-1]) != labels.shape:
                owner = "input_ids'" if positions is None else "positions'"
                raise ValueError(f"labels must have {owner} shape {tuple(shape)}, got {tuple(labels.shape)}")
            check_range("labels", labels, self.config.vocab_size, ignore=IGNORE)
            words = self.head.loss(places, labels, reduction)
            losses.append(words if label_weight is None else words * label_weight)
        if classes is not None:
            logits = self._class_logits(x)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if classes.shape != logits.shape[:1]:
                raise ValueError(f"classes must be ({len(logits)},), got {tuple(classes.shape)}")
            check_range("classes", classes, self.config.num_classes, ignore=IGNORE)
            losses.append(F.cross_entropy(logits, classes, reduction=reduction))
        if spans is not None:
            logits = self._span_logits(x, mask)
            if spans.shape != (len(logits), 2):
                raise ValueError(f"spans must be ({len(logits)}, 2), got {tuple(spans.shape)}")
            check_range("spans", spans, logits.shape[1], ignore=IGNORE)
            losses.append(F.cross_entropy(logits, spans, reduction=reduction))
        return sum(losses + auxiliary) if self.training else sum(losses)  # type: ignore[return-value]

    def predict(
        self,
        input_ids: Tensor,
        *,
        mask: Tensor | None = None,
        token_types: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """In one pass the tokens' logits, (B, L, V) or (B, P, V) at positions, and the classifier's if there is one."""
        x, _ = self.features(input_ids, mask=mask, token_types=token_types)
        classes = None if self.classifier is None else self._class_logits(x)
        return self.head.logits(self._places(x, positions)), classes

    def classify(self, input_ids: Tensor, *, mask: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """The classifier's logits (B, num_classes); ValueError for a model without."""
        return self._class_logits(self.features(input_ids, mask=mask, token_types=token_types)[0])

    def span_logits(
        self, input_ids: Tensor, *, mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """Logits (B, L, 2) float of every token as the first and as the last one of an answer, −∞ for padding;
        ValueError for a model without a span head."""
        return self._span_logits(self.features(input_ids, mask=mask, token_types=token_types)[0], mask)

    def _span_logits(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.span_head is None:
            raise ValueError("spans need a model with span_head=True")
        logits = project(self.span_head, x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if mask is None else logits.masked_fill(~mask[..., None], -torch.inf)

    def _class_logits(self, x: Tensor) -> Tensor:
        if self.classifier is None:
            raise ValueError("classes need a model with num_classes > 0")
        return project(self.classifier, self._pool(x))

    def features(
        self, input_ids: Tensor, *, mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Features (B, L, dim) after the last block, and the auxiliary losses of the layers that have one.

        ValueError for a mask that the mixer does not take.
        """
        if mask is not None and not getattr(self.blocks[0].mixer.branch, "takes_mask", False):
            raise ValueError(f"mixer {self.config.mixer!r} takes no mask")
        x = self.blocks[0].mixer.expand(self._embed(input_ids, token_types))
        auxiliary = []
        for layer in range(self.config.depth):
            x, extra = self._block(layer)(x, mask=mask)
            auxiliary += [] if extra is None else [extra]
        return self.norm(self.blocks[-1].ffn.reduce(x)), auxiliary

    def pooled(
        self, input_ids: Tensor, *, mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """tanh(Linear(first token)) (B, dim), to classify by, and the auxiliary losses; ValueError without pooler."""
        x, auxiliary = self.features(input_ids, mask=mask, token_types=token_types)
        return self._pool(x), auxiliary

    def _pool(self, x: Tensor) -> Tensor:
        if self.pooler is None:
            raise ValueError("pooled needs a model with pooler=True")
        return torch.tanh(project(self.pooler, x[:, 0]))

    def _block(self, layer: int) -> Any:
        return self.blocks[layer * len(self.blocks) // self.config.depth]

    def _places(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """What the head reads, (B, L, embed_dim), or (B, P, embed_dim) at positions."""
        if positions is not None:
            if positions.dim() != 2 or positions.shape[0] != x.shape[0]:
                raise ValueError(f"positions must be ({x.shape[0]}, P), got {tuple(positions.shape)}")
            check_range("positions", positions, x.shape[1])
            x = x.gather(1, positions[..., None].expand(-1, -1, x.shape[2]))
        return linear(x, self._transposed(x))

    def _transposed(self, x: Tensor) -> Tensor:
        """The matrix of `proj` transposed, (embed_dim, dim), for features x."""
        # Hooks of the projection see it where it is called, which this is not.
        if type(self.proj) is nn.Linear:
            return self.proj.weight.T
        # What an adapter or a quantised projection adds to its weight shows in what it makes of unit vectors.
        unit = torch.eye(self.config.embed_dim + 1, self.config.embed_dim, device=x.device, dtype=x.dtype)
        rows = self.proj(unit)
        return rows[:-1] - rows[-1]

    def _embed(self, ids: Tensor, types: Tensor | None) -> Tensor:
        config = self.config
        if ids.dim() != 2:
            raise ValueError(f"input_ids must be (B, L), got {tuple(ids.shape)}")
        if ids.shape[1] > config.max_len:
            raise ValueError(f"input_ids reach length {ids.shape[1]}, but the model has max_len={config.max_len}")
        check_range("input_ids", ids, config.vocab_size)
        if types is None:
            kinds = first_rows(self.types, 1, ids.device)[0]
        elif types.shape != ids.shape:
            raise ValueError(f"token_types must have input_ids' shape {tuple(ids.shape)}, got {tuple(types.shape)}")
        else:
            check_range("token_types", types, config.num_types)
            kinds = self.types(types)
        x = self.embed(ids) + first_rows(self.positions, ids.shape[1], ids.device) + kinds
        return project(self.proj, self.dropout(self.embed_norm(x)))

    def num_parameters(self) -> int:
        """Number of parameters; shared ones count once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: int, *, training: bool = False) -> int:
        """FLOPs a token (a multiply-add is two), norms and activations left out; training is three forward passes."""
        blocks = [self._block(layer) for layer in range(self.config.depth)]
        parts = [
            part.branch.flops_per_token(seq_len) + part.flops_per_token()
            for block in blocks
            for part in (block.mixer, block.ffn)
        ]
        forward = sum(parts) + 4 * self.proj.weight.numel() + self.head.flops_per_token()
        return 3 * forward if training else forward
