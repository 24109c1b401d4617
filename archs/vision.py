"""Image classifiers from the same slots: WideNet, ViT, ViT-MoE and whatever else a choice for each slot makes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from . import ffns, heads, mixers, residuals  # noqa: F401  (each registers its choices)
from .checks import first_rows, project
from .config import ModelConfig
from .hints import fits
from .init import reset_model
from .lm import Block, build_blocks, build_branches, is_causal
from .registry import build_slot, model_config, register_assembly

POOLING = ("mean", "cls")


@dataclass(frozen=True)
class VisionConfig(ModelConfig):
    """A `ModelConfig` for square images; `vocab_size` and `max_len` are not used.

    image_size, patch_size: pixels a side, the second dividing the first. channels, num_classes: of images and logits.
    pooling: "mean" over all tokens or "cls", which needs a mixer that is not causal. pre_logits: whether
    Linear(dim, dim) and tanh stand before the head.
    moe_blocks: how many of the last blocks have `shared_moe` of width moe_dim instead of `ffn`, unshared (ViT-MoE); its
    options are then options of the model.
    """

    kind: str = "vision"
    dim: int = 768
    depth: int = 12
    ffn_dim: int = 3072
    norm: str = "pre"
    mixer: str = "bidirectional"
    head: str = "classifier"
    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    num_classes: int = 1000
    pooling: str = "mean"
    pre_logits: bool = True
    moe_blocks: int = 0
    moe_dim: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_size", "patch_size", "channels", "num_classes", "moe_dim"):
            self._check_size(name)
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size must divide image_size={self.image_size}, got {self.patch_size}")
        if self.pooling not in POOLING:
            raise ValueError(f"pooling must be one of {POOLING}, got {self.pooling!r}")
        if self.pooling == "cls" and is_causal(self):
            reason = "the class token comes first and would see no image"
            raise ValueError(f"pooling must be 'mean' with the causal mixer {self.mixer!r}, got 'cls': {reason}")
        if not fits(self.moe_blocks, int) or not 0 <= self.moe_blocks < self.depth:
            raise ValueError(f"moe_blocks must be an integer in [0, depth={self.depth}), got {self.moe_blocks!r}")
        if self.moe_blocks and (self.share or self.share_groups > 1):
            sharing = f"share={self.share!r}, share_groups={self.share_groups}"
            raise ValueError(f"moe_blocks={self.moe_blocks} needs blocks that share nothing, got {sharing}")

    def _slots(self, changed: Mapping[str, Any]) -> list[tuple[str, str]]:
        slots = super()._slots(changed)
        return [*slots, ("ffn", "shared_moe")] if changed.get("moe_blocks", self.moe_blocks) else slots


@register_assembly("vision")
class VisionModel(nn.Module):
    """Patches by a convolution, an all-zero class token, learned positions, blocks, a final LayerNorm, pooling, head.

    Source: arXiv 2107.11817, section 4, and arXiv 2010.11929. With device="meta" nothing is allocated; `to_empty` and
    `reset_parameters` follow.
    """

    config_class = VisionConfig

    def __init__(
        self, config: VisionConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.config = config
        self.patches = nn.Conv2d(config.channels, config.dim, config.patch_size, config.patch_size, **dd)
        self.positions = nn.Embedding(self.num_tokens, config.dim, **dd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks: Any = nn.ModuleList(_blocks(config, dd))
        self.norm = nn.LayerNorm(config.dim, eps=config.options.get("norm_eps", 1e-5), **dd)
        self.pre_logits = nn.Linear(config.dim, config.dim, **dd) if config.pre_logits else None
        self.head: Any = build_slot("head", config.head, config.dim, config.num_classes, None, **config.options, **dd)
        self.reset_parameters()

    @property
    def num_tokens(self) -> int:
        """Patches and the class token."""
        return (self.config.image_size // self.config.patch_size) ** 2 + 1

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        reset_model(self)

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Logits (B, num_classes) of images (B, channels, S, S); with labels, their cross entropy as a scalar instead.

        labels: (B,) int64, −100 ignored, or probabilities (B, num_classes). criterion: another loss of the logits, in
        at least float32, and the labels; reduction and label_smoothing are not for it. In training the ffns' auxiliary
        losses are added. ValueError for images that the patches don't divide, and for other wrong shapes; TypeError for
        images of integers.
        """
        x, auxiliary = self.features(images)
        if labels is None:
            return self.head.logits(x)
        if labels.shape not in ((len(images),), (len(images), self.config.num_classes)):
            shapes = f"({len(images)},) or ({len(images)}, {self.config.num_classes})"
            raise ValueError(f"labels must be {shapes}, got {tuple(labels.shape)}")
        if criterion is None:
            loss = self.head.loss(x, labels, reduction, label_smoothing=label_smoothing)
        else:
            logits = self.head.logits(x)
            loss = criterion(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
        return loss + sum(auxiliary) if self.training and auxiliary else loss

    def features(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the head gets, (B, dim), and the auxiliary losses of the layers that have one."""
        x = self.blocks[0].mixer.expand(self._embed(images))
        auxiliary = []
        for block in self.blocks:
            x, extra = block(x)
            auxiliary += [] if extra is None else [extra]
        x = self.norm(self.blocks[-1].ffn.reduce(x))
        x = x.mean(1) if self.config.pooling == "mean" else x[:, 0]
        return x if self.pre_logits is None else torch.tanh(project(self.pre_logits, x)), auxiliary

    def _embed(self, images: Tensor) -> Tensor:
        config = self.config
        if images.dim() == 4 and (images.shape[2] % config.patch_size or images.shape[3] % config.patch_size):
            size = f"{images.shape[2]} × {images.shape[3]}"
            raise ValueError(f"images of {size} pixels are not divisible by patch_size={config.patch_size}")
        if images.shape[1:] != (config.channels, config.image_size, config.image_size):
            wanted = f"(B, {config.channels}, {config.image_size}, {config.image_size})"
            raise ValueError(f"images must be {wanted}, got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images must be floating-point, got {images.dtype}")
        patches = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([patches.new_zeros(len(images), 1, config.dim), patches], dim=1)
        return self.dropout(x + first_rows(self.positions, self.num_tokens, x.device))

    def num_parameters(self) -> int:
        """Number of parameters; shared ones count once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_image(self, *, training: bool = False) -> int:
        """FLOPs an image (a multiply-add is two), norms and activations left out; training is three forward passes."""
        tokens = self.num_tokens
        dense = self.head.flops_per_token() + (0 if self.pre_logits is None else 2 * self.pre_logits.weight.numel())
        blocks = sum(block.flops_per_token(tokens) for block in self.blocks)
        forward = blocks * tokens + 2 * self.patches.weight.numel() * (tokens - 1) + dense
        return 3 * forward if training else forward


class WideNet(VisionModel):
    """WideNet (arXiv 2107.11817) for images: one attention, one router and one set of experts serve every block.

    Keywords override the preset `widenet_b16`: sizes (`dim=192, depth=12, image_size=32, patch_size=4, …`) or options
    of the slots (`num_experts=8`, `top_k=1`, …). The same as `create_model("widenet_b16", …)`.
    """

    def __init__(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **overrides: Any
    ) -> None:
        config: Any = model_config("widenet_b16", **overrides)
        super().__init__(config, device=device, dtype=dtype)


def _blocks(config: VisionConfig, dd: dict[str, Any]) -> Iterator[Block]:
    if not config.moe_blocks:
        return build_blocks(config, dd)
    dense = config.override(depth=config.depth - config.moe_blocks, moe_blocks=0)
    sparse = config.override(ffn="shared_moe", ffn_dim=config.moe_dim, depth=config.moe_blocks, moe_blocks=0)
    return build_blocks(config, dd, chain.from_iterable(build_branches("ffn", part, dd) for part in (dense, sparse)))
