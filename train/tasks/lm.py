"""Causal language modelling on a tokenised text."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..config import LMConfig
from ..data import BlockOrder, Corpus, block_batch, load_corpus, load_tokenizer, num_blocks, save_tokenizer
from ..data.tokenizer import FILE as TOKENIZER_FILE
from ..evaluate import evaluate_text
from ..parallel import is_main
from ..sample import generate_text
from ..text_model import build_text_model
from .text import TextTask


class LanguageModeling(TextTask):
    """Next-token prediction in blocks of `config.seq_len` tokens.

    Raises ValueError for a text shorter than one block, and what `load_corpus` and `build_text_model` raise.
    """

    name, unit, metric = "lm", "tokens", "loss"
    recordable = True

    def __init__(self, config: LMConfig, device: torch.device) -> None:
        self.config = config
        self._read_corpus()
        _check_length(self.corpus, config)
        vocab_size = self.tokenizer.get_vocab_size()
        super().__init__(build_text_model(config.model, vocab_size, config.seq_len, config.overrides()), device)
        self.order = BlockOrder(num_blocks(len(self.corpus.train.tokens), config.seq_len), config.seed)

    def _read_corpus(self, *, marked: bool = False) -> None:
        """Set `corpus`, `key` and `tokenizer`, and `tokenizer_damaged` if the run's own vocabulary cannot be read."""
        config = self.config
        tokenizer, self.tokenizer_damaged = config.tokenizer, False
        if config.resume:
            # A resumed run reads the vocabulary it was trained with, whatever has become of the tokeniser's source.
            own = str(Path(config.resume) / TOKENIZER_FILE)
            try:
                load_tokenizer(own)
                tokenizer = own
            except (FileNotFoundError, ValueError) as error:
                # That it is the same again shows when the state is loaded: it belongs to one text and one vocabulary.
                print(f"{error}; made again from {tokenizer}", file=sys.stderr)
                self.tokenizer_damaged = True
        self.corpus = load_corpus(config.data, tokenizer, config.text_column, marked=marked)
        self.key, self.tokenizer = self.corpus.key, self.corpus.tokenizer

    @property
    def units_per_batch(self) -> int:
        return self.config.batch_size * self.config.seq_len

    @property
    def flops_per_unit(self) -> float:
        return 3 * self.model.flops_per_token(self.config.seq_len)  # type: ignore[operator]

    def batch(self, rows: NDArray[np.int64], place: int) -> Any:
        return block_batch(self.corpus.train.tokens, rows, self.config.seq_len)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return model(inputs, labels=targets)

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        config, part = self.config, self.corpus.splits[split]
        limit = config.valid_batches if split == "valid" else None
        return evaluate_text(model, part, config.seq_len, config.batch_size, self.device, limit)

    def counts(self) -> dict[str, Any]:
        return {
            name: {"tokens": len(part.tokens), "words": part.words, "bytes": part.bytes}
            for name, part in self.corpus.splits.items()
        }

    def load_state(self, state: dict[str, Any]) -> None:
        if self.tokenizer_damaged and is_main():
            save_tokenizer(self.tokenizer, Path(self.config.resume))

    def samples(self, model: nn.Module, count: int, seed: int) -> list[str]:
        """Continuations of the first words of evenly spaced blocks of the test text."""
        test = self.corpus.test.tokens
        starts = np.linspace(0, max(0, len(test) - 8), count + 2, dtype=np.int64)[1:-1]
        prompts = [self.tokenizer.decode(test[start : start + 8].tolist()) for start in starts]
        choice = {"tokens": 60, "temperature": 0.8, "top_p": 0.95}
        return [
            prompt + "".join(generate_text(model, self.tokenizer, prompt, seed=seed + index, **choice))
            for index, prompt in enumerate(prompts)
        ]


def _check_length(corpus: Corpus, config: LMConfig) -> None:
    least = {"train": config.seq_len + 1, "valid": 2, "test": 2}
    for name, split in corpus.splits.items():
        if (count := len(split.tokens)) < least[name]:
            wanted = f"one block of seq_len={config.seq_len} and its target" if name == "train" else "one prediction"
            raise ValueError(f"data {config.data}: the {name} text is too short: {count} tokens, too few for {wanted}")
