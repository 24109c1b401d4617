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
        self.corpus, self.tokenizer_damaged = read_corpus(self.config, marked=marked)
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
        part = self.corpus.valid if split == "valid" else self.corpus.test
        limit = self.config.valid_batches if split == "valid" else None
        return evaluate_text(model, part, self.config.seq_len, self.config.batch_size, self.device, limit)

    def counts(self) -> dict[str, Any]:
        splits = {"train": self.corpus.train, "valid": self.corpus.valid, "test": self.corpus.test}
        return {name: {"tokens": len(s.tokens), "words": s.words, "bytes": s.bytes} for name, s in splits.items()}

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


def read_corpus(config: LMConfig, *, marked: bool = False) -> tuple[Corpus, bool]:
    """The corpus, `marked` or not, and whether the run's own vocabulary could not be read."""

    def load(tokenizer: str) -> Corpus:
        return load_corpus(config.data, tokenizer, config.text_column, marked=marked)

    if not config.resume:
        return load(config.tokenizer), False
    # A resumed run reads the vocabulary it has been trained with, whatever has become of the tokeniser's source.
    own = Path(config.resume) / TOKENIZER_FILE
    try:
        load_tokenizer(str(own))
    except (FileNotFoundError, ValueError) as error:
        # That it is the same again shows when the state is loaded: it belongs to one text and one vocabulary.
        print(f"{error}; made again from {config.tokenizer}", file=sys.stderr)
        return load(config.tokenizer), True
    return load(str(own)), False


def _check_length(corpus: Corpus, config: LMConfig) -> None:
    least = {"train": config.seq_len + 1, "valid": 2, "test": 2}
    for name, split in (("train", corpus.train), ("valid", corpus.valid), ("test", corpus.test)):
        if (count := len(split.tokens)) < least[name]:
            wanted = f"one block of seq_len={config.seq_len} and its target" if name == "train" else "one prediction"
            raise ValueError(f"data {config.data}: the {name} text is too short: {count} tokens, too few for {wanted}")
