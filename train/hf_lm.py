"""A causal language model of Hugging Face transformers in the place of one of grassland's."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ..archs.generate import Window, checked_lengths, stream
from ..archs.lm import check_range
from ..archs.modes import evaluating
from ..archs.sampling import Sampling
from ..kernels.losses import IGNORE


@dataclass(frozen=True)
class TextModelSpec:
    """What it takes to build a causal language model of transformers'.

    name: its model type. max_len: the most tokens it reads at once. options: the fields of its config that
    were given.
    """

    kind: ClassVar[str] = "hf"
    name: str
    vocab_size: int
    max_len: int
    options: Mapping[str, Any] = field(default_factory=dict)


class HuggingFaceLM(nn.Module):
    """A causal language model of transformers' with the interface of `archs.LanguageModel`; `config` is its spec.

    The state has a tied tensor once, under its first name.
    """

    def __init__(self, model: nn.Module, spec: TextModelSpec) -> None:
        super().__init__()
        self.model: Any = model
        self.config = spec
        self._caches = "cache" in inspect.signature(model.forward).parameters
        self.register_state_dict_post_hook(_drop_tied)
        self.register_load_state_dict_pre_hook(_add_tied)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
        """Logits (B, L, V) of input_ids (B, L) int64; with labels, their cross entropy in float32, a scalar, instead.

        labels (B, L) int64: labels[b, t] is the target of position t — the caller has shifted them — and −100 does
        not count. reduction: "mean" over the labels that count, or "sum". In training the balance loss of experts is
        added if the config asks for it (`output_router_logits=True`).

        Raises ValueError for more than `max_len` tokens, a wrong shape, or (on the CPU) ids outside the vocabulary.
        """
        self._check(input_ids, labels, reduction)
        output = self.model(input_ids=input_ids)
        if labels is None:
            return output.logits
        logits = output.logits.float().flatten(0, 1)
        loss = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction=reduction)
        balance = getattr(output, "aux_loss", None) if self.training else None
        return loss if balance is None else loss + self.model.config.router_aux_loss_coef * balance

    def _check(self, ids: Tensor, labels: Tensor | None, reduction: str) -> None:
        if ids.dim() != 2:
            raise ValueError(f"input_ids must be (B, L), got {tuple(ids.shape)}")
        longest, rows = self.config.max_len, self.config.vocab_size
        if ids.shape[1] > longest:
            raise ValueError(f"input_ids reach length {ids.shape[1]}, but the model has {longest} positions")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        check_range("input_ids", ids, rows)
        if labels is None:
            return
        if labels.shape != ids.shape:
            raise ValueError(f"labels must have input_ids' shape {tuple(ids.shape)}, got {tuple(labels.shape)}")
        check_range("labels", labels, rows, ignore=IGNORE)

    def init_state(self, batch_size: int) -> dict[str, Any]:
        """A decoding state: the model's own cache, or for an architecture without one the tokens so far."""
        return {}

    def decode(self, input_ids: Tensor, state: dict[str, Any], lengths: Tensor | None = None) -> Tensor:
        """Logits (B, V) after the last token of a chunk (B, T) that continues the sequences in `state`.

        lengths: the rows', which must be all the same.
        """
        if self._caches:
            output = self.model(input_ids=input_ids, cache=state.get("cache"), use_cache=True)
            state["cache"] = getattr(output, "cache", None)
            if state["cache"] is not None:
                return output.logits[:, -1]
            self._caches = False
        seen = state.get("tokens", input_ids[:, :0])
        state["tokens"] = torch.cat([seen, input_ids], dim=1)
        return self.model(input_ids=state["tokens"]).logits[:, -1]

    def generate_stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yield the tokens (B,) of every step, as `archs.LanguageModel.generate_stream` does, for prompts (B, T) of one
        length. Past `max_len` tokens a row goes on from the newest half of them, too."""
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be an integer of at least 0, got {max_new_tokens!r}")
        lengths = checked_lengths(input_ids, None)
        window = Window(input_ids, lengths, self.config.max_len, max_new_tokens, eos_id or 0)
        sampling = Sampling(temperature, top_k, top_p)
        return stream(cast(Any, self), window, max_new_tokens, sampling, eos_id, generator)

    def num_parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, seq_len: int, *, training: bool = False) -> float:
        """FLOPs a token at a sequence length (a multiply-add is two), counted by running one sequence.

        As in grassland's own models a query counts the keys that it sees, norms, activations and elementwise
        recurrences are left out, and training is three times the forward pass. An architecture that does not attend by
        PyTorch's `scaled_dot_product_attention` counts all keys.
        """
        ids = torch.zeros(1, seq_len, dtype=torch.int64, device=next(self.parameters()).device)
        experts = self.model.get_experts_implementation()
        # Torch's counter does not see the grouped product of experts; "eager" calls them one by one.
        self.model.set_experts_implementation("eager")
        try:
            with (
                torch.no_grad(),
                evaluating(self),
                FlopCounterMode(display=False) as counter,
                AttentionFlops() as attention,
            ):
                self(ids)
        finally:
            self.model.set_experts_implementation(experts)
        forward = (counter.get_total_flops() + attention.flops) / seq_len
        return 3 * forward if training else forward


def _tied(model: nn.Module) -> dict[str, str]:
    """The further names of tied parameters, each with the first one."""
    named = list(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(named)}
    return {name: first[id(parameter)] for name, parameter in named if first[id(parameter)] != name}


def _drop_tied(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in _tied(model):
        state.pop(prefix + name)


def _add_tied(model: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name, first in _tied(model).items():
        if prefix + first in state:
            state[prefix + name] = state[prefix + first]


class AttentionFlops(TorchFunctionMode):
    """Counts the pairs of a query and a key that it sees, in place of computing `scaled_dot_product_attention`.

    Torch's own counter takes all pairs, and none of the CPU's kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._count(*args, **(kwargs or {}))

    def _count(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
    ) -> Tensor:
        scores = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
        causal = rest[1] if len(rest) > 1 else options.get("is_causal", False)
        seen = scores.tril() if causal else scores
        if attn_mask is not None:
            smallest = False if attn_mask.dtype is torch.bool else torch.finfo(attn_mask.dtype).min / 2
            seen = seen & (attn_mask > smallest)
        pairs = int(seen.expand(*query.shape[:-1], key.shape[-2]).sum())
        self.flops += 2 * pairs * (query.shape[-1] + value.shape[-1])
        return query.new_zeros(*query.shape[:-1], value.shape[-1])
