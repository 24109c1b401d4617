"""A task on a pre-trained encoder; text classification."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ...archs import CheckpointError
from ...archs.encoder import Encoder
from ...archs.modes import evaluating
from ...archs.registry import unknown
from ...kernels.losses import IGNORE
from .. import parallel
from ..config import RunConfig
from ..data import BlockOrder, load_tokenizer
from ..data.labelled import TextBatch, encode_labelled, load_labelled
from ..data.splits import FURTHER
from ..text_model import check_sizes, load_text_model
from .text import TextTask

# What the tensors of a task's own head are called.
HEADS = ("classifier.", "span_head.")


@dataclass(frozen=True, kw_only=True)
class TuningConfig(RunConfig):
    """The settings of every training on an encoder that `mlm` has trained."""

    model: str
    """Folder of a run of `mlm`; it may also stand first, without --model."""
    seq_len: int = 128
    """Tokens of a text or a pair, special ones included; what is too long is cut."""
    schedule: Literal["cosine", "linear", "step", "wsd", "constant"] = "linear"
    """Shape of the learning rate after the warm-up."""
    floor: float = 0.0
    """Where the schedule ends, as a fraction of the peak."""
    eval_epochs: float | None = 1.0
    """Passes between validations; counts in place of --eval-every, and for checkpoints if --save-every is not given."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moments; the first one is also the momentum of SGD."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seq_len < 8:
            raise ValueError(f"seq_len must be at least 8 for special tokens and words, got {self.seq_len}")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TuningConfig):
    """A text classifier from an encoder that `mlm` has trained.

    The defaults are arXiv 2107.11817's for SST-2; --recipe mnli has those for MNLI.
    """

    data: str
    """A json, jsonl, csv, tsv or parquet file, a folder with train/valid/test files, or a hub name[:config]."""
    recipe: str | None = None
    """The paper's settings for a task to start from (sst2, mnli); other options count over them."""
    text_column: str | None = None
    """Column of the text; by default text, sentence1, premise, question1, question or sentence."""
    pair_column: str | None = None
    """Column of the second text of a pair."""
    label_column: str = "label"
    """Column of the class: integers or names."""
    lr: float = 4e-5
    """Peak learning rate."""
    batch_size: int = 128
    """Texts in a micro-batch."""
    epochs: float | None = 3.0
    """Passes over the training data; counts in place of --steps."""
    warmup_epochs: float | None = 0.3
    """Warm-up in passes over the training data; counts in place of --warmup."""


class Finetuning(TextTask):
    """An encoder that `mlm` has trained, with a fresh head, on `data`, which a subclass reads.

    heads: as for `encoder_from`. Raises what `load_model` raises, and ValueError for a run that is no text encoder's.
    """

    metric = "error"
    data: Any

    def __init__(self, config: TuningConfig, device: torch.device, **heads: Any) -> None:
        self.config, self.key = config, self.data.key
        # A resumed run has the encoder's sizes and the vocabulary in its own folder.
        source = Path(config.resume or config.model)
        model = encoder_from(source, config.overrides(), **heads)
        # What learns nothing here must not look to DDP as if it did.
        model.head.requires_grad_(False)
        if model.pooler is not None and model.classifier is None:
            model.pooler.requires_grad_(False)
        self.tokenizer = load_tokenizer(str(source))
        check_sizes(model, self.tokenizer.get_vocab_size(), config.seq_len)
        super().__init__(model, device)

    @property
    def flops_per_unit(self) -> float:
        model: Any = self.model
        token = model.flops_per_token(self.config.seq_len) - model.head.flops_per_token()
        return 3 * self.config.seq_len * token

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "tested_on": self.data.tested_on}


class TextClassification(Finetuning):
    """A class for each text or pair of texts, from the encoder's pooled first token.

    Raises what `load_labelled` and `load_model` raise, and ValueError for a run that is no text encoder's.
    """

    name, unit = "finetune", "texts"

    def __init__(self, config: FinetuneConfig, device: torch.device) -> None:
        self.data = load_labelled(config.data, config.text_column, config.pair_column, config.label_column)
        super().__init__(config, device, num_classes=len(self.data.classes))
        self.rows = {
            name: encode_labelled(part, self.tokenizer, config.seq_len) for name, part in self.data.splits.items()
        }
        self.order = BlockOrder(len(self.rows["train"].ids), config.seed)

    def batch(self, rows: NDArray[np.int64], place: int) -> TextBatch:
        return self.rows["train"].chosen(rows)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch.ids, classes=batch.classes, mask=batch.mask, token_types=batch.types)

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        found = self._metrics(model, split)
        if split != "test" or FURTHER not in self.rows:
            return found
        return {**found, **{f"{FURTHER}_{name}": value for name, value in self._metrics(model, FURTHER).items()}}

    @torch.no_grad()
    def _metrics(self, model: nn.Module, split: str) -> dict[str, float]:
        classifier: Any = model
        confusion = Confusion(len(self.data.classes), self.device)
        with evaluating(model):
            for rows in self.judged_rows(len(self.data.splits[split]), split):
                batch = self.moved(self.rows[split].chosen(rows))
                confusion.add(classifier.classify(batch.ids, mask=batch.mask, token_types=batch.types), batch.classes)
        return confusion.metrics()

    def facts(self) -> dict[str, Any]:
        return {"classes": list(self.data.classes)}

    def counts(self) -> dict[str, Any]:
        return {name: len(part) for name, part in self.data.splits.items()}


class Confusion:
    """How often each class was taken for each, (K, K) on the device with the true classes as rows, and −log p."""

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.float64, device=device)
        self.nll = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, logits: Tensor, classes: Tensor) -> None:
        """logits (B, K); classes (B,) int64, −100 for rows that do not count."""
        size = self.counts.shape[0]
        counted = (classes != IGNORE).double()
        self.nll += F.cross_entropy(logits.float(), classes, ignore_index=IGNORE, reduction="sum")
        true, guess = (F.one_hot(c, size).double() for c in (classes.clamp_min(0), logits.argmax(-1)))
        self.counts += (true * counted[:, None]).T @ guess

    def metrics(self) -> dict[str, float]:
        """loss (nats), error, accuracy, f1 (of class 1 where there are two, otherwise the mean over the classes) and
        matthews, the correlation of guesses and truth (Gorodkin 2004; 0 where either is constant); of all processes."""
        counts, nll = parallel.total(self.counts).cpu(), float(parallel.total(self.nll))
        total, right = counts.sum(), counts.diagonal()
        true, guessed = counts.sum(1), counts.sum(0)
        f1 = 2 * right / (true + guessed).clamp_min(1)
        spread = (total**2 - true @ true) * (total**2 - guessed @ guessed)
        matthews = (right.sum() * total - true @ guessed) / spread.sqrt() if spread > 0 else 0.0
        accuracy = float(right.sum() / total)
        score = float(f1[1] if len(f1) == 2 else f1.mean())
        loss = {"loss": nll / float(total), "error": 1 - accuracy, "accuracy": accuracy}
        found = {**loss, "f1": score, "matthews": float(matthews)}
        # Of logits that give no probabilities, as NaN, the guesses are none.
        return dict.fromkeys(found, math.nan) if math.isnan(nll) else found


def encoder_from(folder: Path, overrides: dict[str, Any], *, num_classes: int = 0, span_head: bool = False) -> Encoder:
    """The encoder in `folder` with a fresh classifier or span head, without those that it has.

    overrides: as for `create_model`; ValueError if they change the shape of a weight. Raises CheckpointError for a
    folder without a text encoder.
    """
    trained = load_text_model(folder)
    if not isinstance(trained, Encoder):
        raise CheckpointError(f"{folder}: a model of kind {trained.config.kind!r}, not a text encoder")
    config: Any = trained.config.override(**{**overrides, "num_classes": num_classes, "span_head": span_head})
    model = Encoder(config)
    fresh = model.state_dict()
    kept = {name: weight for name, weight in trained.state_dict().items() if not name.startswith(HEADS)}
    for name in sorted(name for name in fresh.keys() | kept.keys() if not name.startswith(HEADS)):
        if name not in fresh or name not in kept or fresh[name].shape != kept[name].shape:
            raise ValueError(f"set {overrides}: does not fit the weights of {folder}: {name} would differ")
    model.load_state_dict({**fresh, **kept})
    return model


# arXiv 2107.11817, section 4: learning rate and batch of its classification tasks.
RECIPES: dict[str, dict[str, Any]] = {
    "sst2": {"lr": 4e-5, "batch_size": 128},
    "mnli": {"lr": 3e-5, "batch_size": 128},
}


def finetune_settings(recipe: str | None, model: str, data: str) -> FinetuneConfig:
    """What a run starts from; ValueError with the nearest names for an unknown recipe."""
    if recipe is not None and recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    return FinetuneConfig(model=model, data=data, recipe=recipe, **RECIPES[recipe or "sst2"])
