"""The language model: embeddings, blocks of a mixer and an ffn in their residuals, a head."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.losses import IGNORE
from . import ffns, heads, mixers, residuals  # noqa: F401  (each registers its choices)
from .checks import first_rows
from .config import ModelConfig
from .generate import Window, checked_lengths, stream
from .init import reset_model
from .registry import build_slot, register_assembly, slot_class
from .sampling import Sampling
from .sharing import branches


class Block(nn.Module):
    """A mixer and an ffn, each in its residual: stream → (stream, the ffn's auxiliary loss or None)."""

    def __init__(self, mixer: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.mixer: Any = mixer
        self.ffn: Any = ffn

    def forward(
        self, x: Tensor, state: Any = None, lengths: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """mask (B, T) bool, False for padding, is for whichever of mixer and ffn takes one."""
        x = self.mixer(x, state, lengths, *_taken(mask, self.mixer))
        out = self.ffn(x, *_taken(mask, self.ffn))
        return out if isinstance(out, tuple) else (out, None)

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs a token of mixer, ffn and their residuals."""
        parts = (self.mixer, self.ffn)
        return sum(part.branch.flops_per_token(seq_len) + part.flops_per_token() for part in parts)


def _taken(mask: Tensor | None, residual: Any) -> tuple[Tensor, ...]:
    return (mask,) if mask is not None and getattr(residual.branch, "takes_mask", False) else ()


class LMState:
    """Decoding state of a batch: the mixers' states, layer by layer, and the number of tokens each row has seen."""

    def __init__(self, layers: list[Any], batch_size: int, device: torch.device) -> None:
        self.layers = layers
        self.progress = mixers.MixerState(batch_size, device)


@register_assembly("lm")
class LanguageModel(nn.Module):
    """A causal language model whose four slots `config` chooses. Learned absolute positions, a final LayerNorm.

    Weights start as N(0, 0.02), biases as zero. With device="meta" nothing is allocated; `to_empty` and
    `reset_parameters` follow.
    """

    config_class = ModelConfig

    def __init__(
        self, config: ModelConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if not is_causal(config):
            raise ValueError(f"mixer must be causal in a language model, got {config.mixer!r}")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim, **dd)
        self.positions = nn.Embedding(config.max_len, config.dim, **dd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks: Any = nn.ModuleList(build_blocks(config, dd))
        self.norm = nn.LayerNorm(config.dim, eps=config.options.get("norm_eps", 1e-5), **dd)
        self.head: Any = build_slot(
            "head", config.head, config.dim, config.vocab_size, self.embed, **config.options, **dd
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        reset_model(self)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
        """Logits (B, L, V) of input_ids (B, L) int64; with labels, their cross entropy as a scalar instead.

        labels (B, L) int64: labels[b, t] is the target of position t — the caller has shifted them — and −100 does
        not count. The logits are then never materialised. reduction: "mean" over the labels that count, or "sum". In
        training the ffns' auxiliary losses are added.

        Raises ValueError for more than `max_len` tokens, a wrong shape, or (on the CPU) ids outside the vocabulary, and
        TypeError for a wrong dtype.
        """
        x, auxiliary = self._features(input_ids)
        if labels is None:
            return self.head.logits(x)
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels must have input_ids' shape {tuple(input_ids.shape)}, got {tuple(labels.shape)}")
        check_range("labels", labels, self.config.vocab_size, ignore=IGNORE)
        loss = self.head.loss(x, labels, reduction)
        return loss + sum(auxiliary) if self.training and auxiliary else loss

    def _features(
        self, ids: Tensor, state: LMState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Features (B, T, dim) after the final norm, and the auxiliary losses of the layers that have one.

        lengths (B,): row b has so many tokens, then padding, which changes no token's features.
        """
        x = self._embed(ids, state)
        mixers.check_lengths(lengths, *ids.shape)
        mask = None if lengths is None else torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        auxiliary = []
        x = self.blocks[0].mixer.expand(x)
        for block, layer in zip(self.blocks, state.layers if state else [None] * len(self.blocks), strict=True):
            x, extra = block(x, layer, lengths, mask)
            auxiliary += [] if extra is None else [extra]
        if state is not None:
            state.progress.advance(ids.shape[1], lengths)
        return self.norm(self.blocks[-1].ffn.reduce(x)), auxiliary

    def _embed(self, ids: Tensor, state: LMState | None) -> Tensor:
        if ids.dim() != 2:
            raise ValueError(f"input_ids must be (B, L), got {tuple(ids.shape)}")
        end = ids.shape[1] + (state.progress.extent if state else 0)
        if end > self.config.max_len:
            raise ValueError(f"input_ids reach length {end}, but the model has max_len={self.config.max_len} positions")
        check_range("input_ids", ids, self.config.vocab_size)
        if state is None or state.progress.fresh:
            positions = first_rows(self.positions, ids.shape[1], ids.device)
        else:
            # Padding of a ragged chunk may lie past the last position; what it reads does not matter.
            positions = self.positions(state.progress.positions(ids.shape[1]).clamp_max(self.config.max_len - 1))
        return self.dropout(self.embed(ids) + positions)

    def init_state(self, batch_size: int) -> LMState:
        """A decoding state for `batch_size` sequences of up to `max_len` tokens."""
        weight = self.embed.weight
        layers = [
            block.mixer.branch.init_state(batch_size, self.config.max_len, weight.device, weight.dtype)
            for block in self.blocks
        ]
        return LMState(layers, batch_size, weight.device)

    def decode(self, input_ids: Tensor, state: LMState, lengths: Tensor | None = None) -> Tensor:
        """Logits (B, V) after each row's last token, for a chunk (B, T) that continues the sequences in `state`.

        The state is updated in place. lengths (B,): how many of the chunk's tokens row b has, at least 1, the rest
        being right padding; None for all.
        """
        x, _ = self._features(input_ids, state, lengths)
        last = x[:, -1] if lengths is None else x[torch.arange(x.shape[0], device=x.device), lengths - 1]
        return self.head.logits(last)

    def generate_stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_id: int | None = None,
        prompt_lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Like `generate`, but yields the tokens (B,) of every step as they come; the model is in evaluation mode
        until the iterator is exhausted or closed."""
        window = self._window(input_ids, prompt_lengths, max_new_tokens, eos_id or 0)
        sampling = Sampling(temperature, top_k, top_p)
        return stream(self, window, max_new_tokens, sampling, eos_id, generator)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_id: int | None = None,
        prompt_lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue the prompts input_ids (B, T) by at most `max_new_tokens` tokens: (B, T + new).

        Prompts of different length are right-padded, with `prompt_lengths` (B,); each row comes back as its prompt,
        its continuation, and padding (`eos_id`, or 0 without one), and is what it would be alone. temperature 0 is
        greedy; `top_k` and `top_p` filter first. A row that has produced `eos_id` is finished; generation stops when
        all are. Past `max_len` tokens a row goes on from the newest max_len // 2 of them, encoded again from
        position 0. Uses a decoding state: a token costs the same however long the text (Grassmann) or a pass over the
        KV cache (attention).
        """
        window = self._window(input_ids, prompt_lengths, max_new_tokens, eos_id or 0)
        steps = stream(self, window, max_new_tokens, Sampling(temperature, top_k, top_p), eos_id, generator)
        produced = sum(1 for _ in steps)
        return window.tokens[:, : input_ids.shape[1] + produced]

    def _window(self, prompt: Tensor, lengths: Tensor | None, steps: int, pad_id: int) -> Window:
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"max_new_tokens must be an integer of at least 0, got {steps!r}")
        if not 0 <= pad_id < self.config.vocab_size:
            raise ValueError(f"eos_id must be in [0, {self.config.vocab_size}), got {pad_id!r}")
        return Window(prompt, checked_lengths(prompt, lengths), self.config.max_len, steps, pad_id)

    def num_parameters(self) -> int:
        """Number of parameters; shared ones count once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: int, *, training: bool = False) -> int:
        """FLOPs a token at a sequence length (a multiply-add is two), counted from the modules, norms and activations
        left out. Training is taken as three times the forward pass."""
        layers = [
            part.branch.flops_per_token(seq_len) + part.flops_per_token()
            for block in self.blocks
            for part in (block.mixer, block.ffn)
        ]
        forward = sum(layers) + self.head.flops_per_token()
        return 3 * forward if training else forward


def is_causal(config: ModelConfig) -> bool:
    """Whether its mixer shows a token the earlier ones alone."""
    return getattr(slot_class("mixer", config.mixer), "causal", True)


def build_blocks(config: ModelConfig, dd: dict[str, Any], made: Iterator[Any] | None = None) -> Iterator[Block]:
    """The blocks of a model; sublayers count 0, 1, 2, … through mixers and ffns alternately.

    made: the ffns, one a block; None for those that the config chooses.
    """
    residual = partial(build_slot, "residual", config.residual, **_keywords(config, dd), **config.options)
    pairs = zip(build_branches("mixer", config, dd), made or build_branches("ffn", config, dd), strict=True)
    for layer, (mixer, ffn) in enumerate(pairs):
        quiet = {"dropout": 0.0} if getattr(ffn, "drops", False) else {}
        yield Block(residual(mixer, config.dim, 2 * layer), residual(ffn, config.dim, 2 * layer + 1, **quiet))


def build_branches(slot: str, config: ModelConfig, dd: dict[str, Any]) -> Iterator[Any]:
    """The mixers or the ffns of all blocks."""
    choice, shared = getattr(config, slot), slot in config.share
    sizes = (config.dim,) if slot == "mixer" else (config.dim, config.ffn_dim)
    build = partial(build_slot, slot, choice, *sizes, **_keywords(config, dd))
    return branches(slot, choice, config.options, config.depth, config.share_groups, shared, build)


def _keywords(config: ModelConfig, dd: dict[str, Any]) -> dict[str, Any]:
    return {"norm": config.norm, "dropout": config.dropout, "num_layers": 2 * config.depth, **dd}


def check_range(name: str, ids: Tensor, vocab_size: int, ignore: int | None = None) -> None:
    """TypeError unless ids are integers; on the CPU, ValueError unless they are in [0, vocab_size) or `ignore`."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64, got {ids.dtype}")
    # Looking at values on a GPU would wait for it, and under torch.compile would break the graph.
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ids = ids if ignore is None else ids[ids != ignore]
    if ids.numel() == 0:
        return
    low, high = ids.aminmax()
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{name} must be in [0, {vocab_size}), got values from {int(low)} to {int(high)}")
