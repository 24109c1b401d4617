"""Language models by name, those of Hugging Face transformers and grassland's own: build, save, load."""

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from ..archs import CheckpointError, create_model, load_model, model_config, read_config, save_model
from ..archs.modes import evaluating
from ..archs.registry import unknown
from .foreign import load_foreign, save_foreign
from .hf_lm import HuggingFaceLM, TextModelSpec
from .optional import optional

HF = "hf/"
# Before the names that tensors have in transformers.
INNER = "model."
LENGTH = "max_position_embeddings"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def build_text_model(name: str, vocab_size: int, max_len: int, overrides: Mapping[str, Any]) -> Any:
    """A causal language model for `vocab_size` tokens and texts of `max_len`, with fresh weights: what `create_model`
    makes of the name and the overrides, or for hf/TYPE the architecture of transformers' with that model type.

    overrides: then fields of its config. There are no special tokens unless given: the vocabulary is the data's.

    Raises ValueError for an unknown type or field, with the nearest names, for values that the architecture does not
    take, for a model that is not causal, and if transformers is not installed.
    """
    if not name.startswith(HF):
        if (kind := model_config(name).kind) != "lm":
            raise ValueError(f"model {name!r} is of kind {kind!r}, not a causal language model")
        made = create_model(name, **{"vocab_size": vocab_size, "max_len": max_len, **overrides})
        check_sizes(made, vocab_size, max_len)
        return made
    spec = TextModelSpec(name.removeprefix(HF), vocab_size, max_len, {key: _lists(v) for key, v in overrides.items()})
    model = _assemble(spec)
    check_sizes(model, vocab_size)
    _try_out(model, max_len)
    return model


def check_sizes(model: Any, vocab_size: int, length: int = 0) -> None:
    """ValueError if the model has fewer tokens than the data, or fewer positions than its texts."""
    if (found := getattr(model.config, "vocab_size", vocab_size)) < vocab_size:
        raise ValueError(f"vocab_size must be at least the data's {vocab_size}, got {found}")
    if length > (limit := getattr(model.config, "max_len", length)):
        raise ValueError(f"seq_len must be at most the model's max_len={limit}, got {length}")


def save_text_model(model: nn.Module, folder: Path, extra: Mapping[str, Any]) -> None:
    """`archs.save_model` for models of transformers', too, whose tensors keep the names they have there."""
    if not isinstance(model, HuggingFaceLM):
        save_model(model, folder, extra=extra)
        return
    tensors = {name.removeprefix(INNER): tensor for name, tensor in model.state_dict().items()}
    save_foreign(folder, {"kind": model.config.kind, **asdict(model.config)}, tensors, extra)


def load_text_model(folder: Path, device: torch.device | str = "cpu") -> Any:
    """The model that `save_text_model` wrote, in evaluation mode.

    Raises CheckpointError that names the file, and ValueError if it takes transformers and that is not installed.
    """
    values = dict(read_config(folder)["model"])
    kind = values.pop("kind", None)
    if kind == "timm":
        raise CheckpointError(f"{folder}: an image model of timm's, not a language model")
    if kind != TextModelSpec.kind:
        return load_model(folder, device=device)
    optional("transformers", "hf")
    return load_foreign(folder, lambda: _assemble(TextModelSpec(**values)), device, INNER)


def _assemble(spec: TextModelSpec) -> HuggingFaceLM:
    """The model of `spec` with the architecture's own initialisation."""
    transformers = optional("transformers", "hf")
    types = importlib.import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if spec.name not in types:
        raise unknown("model", HF + spec.name, [HF + name for name in types])
    kind = transformers.CONFIG_MAPPING[spec.name]
    options = _options(kind, spec)
    try:
        config = kind(**options)
        model = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever an architecture raises for sizes that do not fit
        raise ValueError(f"model {HF}{spec.name}: {error}") from error
    for embedding in _embeddings(model):
        # Every id is a token of the data's: none is padding whose embedding would not learn.
        embedding.padding_idx = None
    length = _canonical(kind, LENGTH)
    sizes = {"vocab_size": config.vocab_size, "max_len": getattr(config, length) if length in options else spec.max_len}
    return HuggingFaceLM(model, dataclasses.replace(spec, **sizes))


def _options(kind: Any, spec: TextModelSpec) -> dict[str, Any]:
    """Keywords of the config class `kind`: what the spec says over what fits the data."""
    common = {entry.name for entry in dataclasses.fields(optional("transformers", "hf").PreTrainedConfig)}
    fields = {entry.name: entry for entry in dataclasses.fields(kind) if entry.init and entry.name not in common}
    if _canonical(kind, "vocab_size") not in fields:
        raise ValueError(f"model {HF}{spec.name} is not one for text alone: its config has no vocab_size")
    given = {_canonical(kind, name): value for name, value in spec.options.items()}
    for name in spec.options:
        if _canonical(kind, name) not in fields:
            raise unknown(f"field of {HF}{spec.name}'s config", name, [*fields, *kind.attribute_map])
    # Encoders such as BERT are causal as decoders. Generation alone asks for the cache.
    fitting = {"vocab_size": spec.vocab_size, LENGTH: spec.max_len, "is_decoder": True, "use_cache": False}
    own = {_canonical(kind, name): value for name, value in fitting.items()}
    for name in fields.keys() & set(SPECIAL_IDS):
        own[name] = None if type(None) in get_args(fields[name].type) else 0
    return {**{name: value for name, value in own.items() if name in fields}, **given}


def _canonical(kind: Any, name: str) -> str:
    return kind.attribute_map.get(name, name)


def _try_out(model: HuggingFaceLM, length: int) -> None:
    """One text through the model: whether it runs, and sees no later token, shows before anything is written."""
    name, spec = f"model {HF}{model.config.name}", model.config
    one = torch.arange(length)[None] % spec.vocab_size
    other = one.clone()
    other[:, -1] = (one[:, -1] + 1) % spec.vocab_size
    try:
        with torch.no_grad(), evaluating(model):
            logits, changed = (model(ids) for ids in (one, other))
    except Exception as error:  # whatever an architecture raises for sizes that do not fit
        raise ValueError(f"{name}: {error}") from error
    if logits.shape != (1, length, spec.vocab_size):
        raise ValueError(f"{name} gives {tuple(logits.shape)}, not logits {(1, length, spec.vocab_size)}")
    if not torch.allclose(logits[:, :-1], changed[:, :-1], rtol=0, atol=1e-5 * float(logits.abs().max())):
        raise ValueError(f"{name} is not causal: its logits depend on later tokens")


def _embeddings(model: nn.Module) -> list[nn.Embedding]:
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]


def _lists(value: Any) -> Any:
    return [_lists(entry) for entry in value] if isinstance(value, tuple) else value
