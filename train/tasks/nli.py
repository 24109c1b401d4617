"""Natural language inference: a head on an encoder's features of sentence pairs."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...archs import read_config
from ...archs.modes import evaluating
from ..classify import Tally
from ..config import RunConfig
from ..data import BlockOrder, load_tokenizer, save_tokenizer
from ..data.pairs import LABELS, MARKS, Pairs, PairTokens, load_pairs, marks
from ..data.tokenizer import FILE as TOKENIZER_FILE
from ..flops import flop_counter
from ..nli_config import NLIConfig
from ..nli_model import NLIModel, build_nli_model, load_encoder, load_nli_model, save_nli_model, stored_encoder
from ..parallel import rows as own_rows
from ..vision_model import num_parameters
from .base import Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class NaturalLanguageInference(Task):
    """One of `LABELS` for each pair of sentences.

    Raises what `load_pairs`, `load_tokenizer` and `load_encoder` raise.
    """

    name, unit, metric = "nli", "pairs", "error"
    model: NLIModel

    def __init__(self, config: NLIConfig, device: torch.device) -> None:
        self.config = config
        pairs = load_pairs(config.data)
        self.tokenizer = _tokenizer(config, pairs["train"])
        self.splits = {name: PairTokens(self.tokenizer, part, config.max_len) for name, part in pairs.items()}
        self.dropped = {name: part.dropped for name, part in pairs.items()}
        self.key = f"{pairs['test'].crc(pairs['valid'].crc(pairs['train'].crc())):08x}"
        encoder = _encoder(config, self.tokenizer)
        model = build_nli_model(config.model, config.overrides(), encoder, len(LABELS), not config.fine_tune)
        super().__init__(model, device)
        self.order = BlockOrder(len(self.splits["train"]), config.seed)

    @property
    def batches_per_epoch(self) -> float:
        return len(self.splits["train"]) / self.config.batch_size

    @cached_property
    def flops_per_unit(self) -> float:
        ids = torch.zeros(1, self.config.max_len, dtype=torch.int64, device=self.device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        with evaluating(self.model), flop_counter() as counter, torch.no_grad():
            self.model(ids, mask)
        total = counter.get_total_flops()
        fixed = counter.get_flop_counts().get("NLIModel.encoder", {}) if self.model.frozen else {}
        return 3.0 * total - 2.0 * sum(fixed.values())

    def batches(self, position: int) -> Iterator[tuple[Tensor, ...]]:
        size = self.config.batch_size
        while True:
            rows = self.order.at(position * size, size)[own_rows(size)]
            yield tuple(map(self.to_device, self.splits["train"].batch(rows)))
            position += 1

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        ids, mask, labels = batch
        return model(ids, mask, labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        tally, part = Tally(self.device), self.splits[split]
        size = self.config.batch_size
        with evaluating(model):
            for start in self.judged(range(0, len(part), size), split):
                rows = np.arange(start, start + size)
                # Row −1 does not count: all processes have rows in every batch.
                rows[rows >= len(part)] = -1
                ids, mask, labels = map(self.to_device, part.batch(rows[own_rows(size)]))
                tally.add(model(ids, mask), labels)
        found = tally.metrics()
        return {"loss": found["loss"], "error": found["error"], "accuracy": found["top1"], "ece": found["ece"]}

    def save(self, folder: Path, config: RunConfig) -> None:
        if not (folder / TOKENIZER_FILE).exists():
            save_tokenizer(self.tokenizer, folder)
        save_nli_model(self.model, folder, {"task": self.name, "labels": LABELS, "run": config.to_dict()})

    def best_model(self, folder: Path) -> nn.Module:
        return load_nli_model(folder, self.device)

    def identity(self) -> dict[str, Any]:
        return {"data": self.key, "vocab_size": self.tokenizer.get_vocab_size()}

    def describe(self) -> dict[str, Any]:
        counts = {name: {"pairs": len(part), "dropped": self.dropped[name]} for name, part in self.splits.items()}
        sizes = {"parameters": num_parameters(self.model), "head_parameters": num_parameters(self.model.head)}
        return {"data": self.config.data, **self.identity(), **sizes, "splits": counts}


def _tokenizer(config: NLIConfig, train: Pairs) -> "Tokenizer":
    # A resumed run reads the vocabulary it has been trained with, whatever has become of the tokeniser's source.
    if config.resume:
        return load_tokenizer(str(Path(config.resume) / TOKENIZER_FILE))
    spec = config.tokenizer or ("bpe:4096" if config.encoder == "random" else config.encoder)
    text = "\n".join([*train.premises, *train.hypotheses]) if spec.startswith("bpe:") else ""
    tokenizer = load_tokenizer(spec, text)
    if config.encoder == "random":
        # A vocabulary that nothing has been trained with may still get what it lacks.
        lacking = [names[0] for names in MARKS.values() if all(tokenizer.token_to_id(name) is None for name in names)]
        tokenizer.add_special_tokens(lacking)
    return tokenizer


def _encoder(config: NLIConfig, tokenizer: "Tokenizer") -> nn.Module:
    if config.resume:
        return stored_encoder(read_config(config.resume)["model"])
    return load_encoder(config.encoder, tokenizer.get_vocab_size(), marks(tokenizer)[2])
