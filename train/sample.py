"""Text from a trained language model."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..archs import CheckpointError
from ..archs.lm import LanguageModel
from .data import load_tokenizer
from .data.corpus import encode
from .hf_lm import HuggingFaceLM
from .text_model import load_text_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def generate_text(
    model: nn.Module,
    tokenizer: "Tokenizer",
    prompt: str,
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Pieces of the continuation of `prompt` as they come: each ends where the text so far is whole characters.

    Raises ValueError if the prompt has no tokens.
    """
    ids = encode(tokenizer, prompt).tolist()  # line by line, as the training text
    if not ids:
        raise ValueError(f"prompt {prompt!r} has no tokens")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    steps = model.generate_stream(  # type: ignore[operator]
        torch.tensor([ids], device=device),
        max_new_tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
    )
    written = tokenizer.decode(ids)
    for token in steps:
        ids.append(int(token))
        text = tokenizer.decode(ids)
        # A character of several bytes is whole only with its last token; until then it decodes to U+FFFD.
        if not text.endswith("\ufffd"):
            yield text[len(written) :]
            written = text


def load_run(folder: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, "Tokenizer"]:
    """The model and tokeniser of a run's folder.

    Raises FileNotFoundError or CheckpointError that names the file, also if the model is no language model, or if the
    two have different vocabularies.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    model = load_text_model(folder, device)
    if not isinstance(model, LanguageModel | HuggingFaceLM):
        raise CheckpointError(f"{folder}: a model of kind {model.config.kind!r}, not a language model")
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    size, rows = tokenizer.get_vocab_size(), model.config.vocab_size
    # A vocabulary of transformers' may be padded.
    if size > rows or (size < rows and isinstance(model, LanguageModel)):
        raise CheckpointError(f"{folder}: tokenizer.json has {size} tokens, but the model has vocab_size={rows}")
    return model, tokenizer
