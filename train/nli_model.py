"""A head for sentence pairs on an encoder of transformers: build, save, load."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..archs import CheckpointError, PluckerNLIHead, TransformerNLIHead, read_config
from ..archs.io import CONFIG_FILE
from .data.sources import first_line
from .foreign import load_foreign, save_foreign
from .optional import optional

HEADS: dict[str, type[nn.Module]] = {"plucker": PluckerNLIHead, "transformer": TransformerNLIHead}
KIND = "nli"


class NLIModel(nn.Module):
    """encoder: anything from transformers that gives `last_hidden_state` for input_ids and attention_mask. A frozen
    encoder gets no gradients and stays in evaluation mode."""

    def __init__(self, encoder: nn.Module, head: nn.Module, spec: Mapping[str, Any], frozen: bool) -> None:
        super().__init__()
        self.encoder, self.head, self.spec, self.frozen = encoder, head, dict(spec), frozen
        if frozen:
            encoder.requires_grad_(False)
            encoder.eval()
        elif isinstance(pooler := getattr(encoder, "pooler", None), nn.Module):
            # The hidden states do not come through it: it learns nothing, and must not look to DDP as if it did.
            pooler.requires_grad_(False)

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, 3) of ids (B, T) int64 and mask (B, T) bool; with labels (B,) their mean cross entropy."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        logits = self.head(features, mask)
        return logits if labels is None else F.cross_entropy(logits.float(), labels)

    def train(self, mode: bool = True) -> "NLIModel":
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self


def build_nli_model(
    head: str, options: Mapping[str, Any], encoder: nn.Module, num_classes: int, frozen: bool
) -> NLIModel:
    """A fresh head with keyword `options` on `encoder`. ValueError for an unknown or bad option."""
    config: Any = encoder.config
    try:
        made = HEADS[head](config.hidden_size, num_classes, **options)
    except TypeError as error:
        raise ValueError(f"head {head}: {error}") from error
    stored = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    spec = {"kind": KIND, "head": head, "options": stored, "num_classes": num_classes, "encoder": config.to_dict()}
    return NLIModel(encoder, made, spec, frozen)


def load_encoder(name: str, vocab_size: int, pad_id: int) -> nn.Module:
    """The encoder that `name` names: a hub name, a folder, or "random", a tiny DistilBERT for `vocab_size` tokens.

    Raises FileNotFoundError if it is not to be had, ValueError if it has fewer embeddings than `vocab_size`.
    """
    library = optional("transformers", "hf")
    if name == "random":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 512}
        return library.DistilBertModel(library.DistilBertConfig(vocab_size=vocab_size, pad_token_id=pad_id, **sizes))
    try:
        encoder = library.AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        hint = f"no such folder, and not to be had from the hub ({first_line(error)})"
        raise FileNotFoundError(f"encoder {name}: {hint}") from error
    rows = encoder.get_input_embeddings().weight.shape[0]
    if rows < vocab_size:
        raise ValueError(f"encoder {name} has {rows} token embeddings, but the tokenizer has {vocab_size} tokens")
    return encoder


def save_nli_model(model: NLIModel, folder: Path, extra: Mapping[str, Any]) -> None:
    """Write config.json and model.safetensors, encoder included: the folder is all that it takes."""
    save_foreign(folder, model.spec, model.state_dict(), extra)


def load_nli_model(folder: Path, device: torch.device | str = "cpu") -> NLIModel:
    """The model that `save_nli_model` wrote, in evaluation mode. Raises CheckpointError that names the file."""
    spec = read_config(folder)["model"]
    if spec.get("kind") != KIND:
        raise CheckpointError(f"{folder / CONFIG_FILE}: kind {spec.get('kind')!r}, not {KIND!r}")

    def build() -> NLIModel:
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in spec["options"].items()}
        return build_nli_model(spec["head"], options, stored_encoder(spec), spec["num_classes"], frozen=True)

    return load_foreign(folder, build, device)


def stored_encoder(spec: Mapping[str, Any]) -> nn.Module:
    """A fresh encoder of the kind and sizes that a saved model's config tells; nothing is downloaded."""
    library = optional("transformers", "hf")
    return library.AutoModel.from_config(library.AutoConfig.for_model(**spec["encoder"]))
