"""Natural language inference: a head on an encoder's features of sentence pairs."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...archs import read_config
from ...archs.modes import evaluating
from ..classify import Tally
from ..config import RunConfig
from ..data import BlockOrder, load_tokenizer
from ..data.pairs import LABELS, MARKS, Pairs, PairTokens, load_pairs, marks
from ..data.tokenizer import FILE as TOKENIZER_FILE
from ..flops import flop_counter
from ..nli_model import NLIModel, build_nli_model, load_encoder, load_nli_model, save_nli_model, stored_encoder
from ..vision_model import num_parameters
from .text import TextTask

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class NLIConfig(RunConfig):
    """Natural language inference: a head on an encoder's token features (arXiv 2512.19428, section 4.2)."""

    model: Literal["plucker", "transformer"] = "plucker"
    """The head: Grassmann-Plücker mixing, or its self-attention baseline. `--set` takes its sizes: d_proj=64 …"""
    data: str = "snli"
    """A folder with train, dev and test JSON-lines files in SNLI's format, one such file, or a hub name[:config]."""
    encoder: str = "distilbert-base-uncased"
    """What makes the features: a hub name, a local folder, or random (a tiny DistilBERT, to try things out)."""
    tokenizer: str | None = None
    """By default the encoder's own (random: bpe:4096); as for lm: bpe:SIZE, a file, a folder or a hub name."""
    fine_tune: bool = False
    """Train the encoder too, at the same learning rate; otherwise it is a fixed feature extractor."""
    max_len: int = 48
    """Tokens of a pair, [CLS] and both [SEP] included; the longer sentence gives way."""
    epochs: float | None = 20
    """Passes over the training data; counts in place of --steps."""
    eval_epochs: float | None = 1
    """Passes between validations; counts in place of --eval-every, and for checkpoints if --save-every is not given."""
    lr: float = 3e-4
    """Peak learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_len < 5:
            raise ValueError(f"max_len must be at least 5, one token a sentence and three marks, got {self.max_len}")


class NaturalLanguageInference(TextTask):
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

    @cached_property
    def flops_per_unit(self) -> float:
        ids = torch.zeros(1, self.config.max_len, dtype=torch.int64, device=self.device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        with evaluating(self.model), flop_counter() as counter, torch.no_grad():
            self.model(ids, mask)
        total = counter.get_total_flops()
        fixed = counter.get_flop_counts().get("NLIModel.encoder", {}) if self.model.frozen else {}
        return 3.0 * total - 2.0 * sum(fixed.values())

    def batch(self, rows: NDArray[np.int64], place: int) -> tuple[Tensor, ...]:
        return self.splits["train"].batch(rows)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        ids, mask, labels = batch
        return model(ids, mask, labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        tally, part = Tally(self.device), self.splits[split]
        with evaluating(model):
            for rows in self.judged_rows(len(part), split):
                ids, mask, labels = self.moved(part.batch(rows))
                tally.add(model(ids, mask), labels)
        found = tally.metrics()
        return {"loss": found["loss"], "error": found["error"], "accuracy": found["top1"], "ece": found["ece"]}

    def save_model(self, folder: Path, extra: dict[str, Any]) -> None:
        save_nli_model(self.model, folder, {**extra, "labels": LABELS})

    def best_model(self, folder: Path) -> nn.Module:
        return load_nli_model(folder, self.device)

    def counts(self) -> dict[str, Any]:
        return {name: {"pairs": len(part), "dropped": self.dropped[name]} for name, part in self.splits.items()}

    def sizes(self) -> dict[str, int]:
        return {"parameters": num_parameters(self.model), "head_parameters": num_parameters(self.model.head)}


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
