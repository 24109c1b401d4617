"""Masked language modelling, with sentence order if wanted."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ...archs import create_model, model_config
from ...archs.modes import evaluating
from ...archs.registry import unknown
from ...kernels.losses import IGNORE
from ..config import LMConfig
from ..data import BlockOrder
from ..data.masked import MaskedBatch, MaskedText
from ..parallel import rows, total
from ..parallel import size as processes
from ..text_model import check_sizes
from .base import Task
from .lm import LanguageModeling


@dataclass(frozen=True, kw_only=True)
class MLMConfig(LMConfig):
    """A text encoder that learns to tell hidden words.

    Without --model and --recipe: a small WideNet on the embedded corpus, about a minute on two CPU cores.
    """

    model: str = "widenet_albert_4e"
    """A text encoder of `grassland.archs.list_models()` (widenet_albert_4e, albert_base …) or the assembly "mlm"."""
    recipe: str | None = None
    """Published settings to start from (albert); other options count over them."""
    mask_rate: float = 0.15
    """Share of the tokens that are to be told, whole words at a time."""
    sentence_order: bool = False
    """Also tell whether two segments are exchanged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"mask_rate must lie in (0, 1), got {self.mask_rate}")
        if self.seq_len < 8:
            raise ValueError(f"seq_len must be at least 8 for special tokens and words, got {self.seq_len}")


class MaskedLanguageModeling(LanguageModeling):
    """Masked words, and with `config.sentence_order` the order of two segments, as in ALBERT.

    Raises ValueError for a text without a sequence and for a model that is no text encoder, and what `load_corpus` and
    `create_model` raise.
    """

    name = "mlm"
    recordable = False  # batches have parts that may be missing
    config: MLMConfig

    def __init__(self, config: MLMConfig, device: torch.device) -> None:
        self.config = config
        self._read_corpus(marked=True)
        shape = {"seq_len": config.seq_len, "mask_rate": config.mask_rate, "sentence_order": config.sentence_order}
        self.texts = {
            name: MaskedText(part, self.tokenizer, **shape, name=f"data {config.data}: {name}")
            for name, part in self.corpus.splits.items()
        }
        Task.__init__(self, self._model(), device)
        self.order = BlockOrder(len(self.texts["train"]), config.seed)

    def _model(self) -> nn.Module:
        config, overrides = self.config, self.config.overrides()
        check_encoder(config.model)
        sizes = {"vocab_size": self.tokenizer.get_vocab_size(), "num_classes": 2 if config.sentence_order else 0}
        model = create_model(config.model, **{**sizes, **overrides})
        check_sizes(model, sizes["vocab_size"], config.seq_len)
        if not config.sentence_order and model.pooler is not None:
            # It learns nothing here, and must not look to DDP as if it did.
            model.pooler.requires_grad_(False)
        return model

    @property
    def flops_per_unit(self) -> float:
        model: Any = self.model
        head = model.head.flops_per_token() * (1 - self.texts["train"].most_told / self.config.seq_len)
        return 3 * (model.flops_per_token(self.config.seq_len) - head)

    def batch(self, rows: NDArray[np.int64], place: int) -> MaskedBatch:
        return self.texts["train"].training(rows, place, self.config.seed)

    def step_batches(self, stream: Iterator[MaskedBatch], count: int) -> Iterator[MaskedBatch]:
        batches = list(islice(stream, count))
        return iter(batches if count * processes() == 1 else _weighted(batches))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        told = {"labels": batch.labels, "label_weight": batch.weight}
        return model(batch.ids, **told, classes=batch.order, **_inputs(batch))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        encoder: Any = model
        words, order = Hits(self.device), Hits(self.device)
        size = self.config.batch_size
        with evaluating(model):
            for batch in map(self.moved, self.judged(self.texts[split].evaluation(size, rows(size)), split)):
                told, exchanged = encoder.predict(batch.ids, **_inputs(batch))
                words.add(told, batch.labels)
                if batch.order is not None:
                    order.add(exchanged, batch.order)
        loss, accuracy = words.means()
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": accuracy}
        return {**found, **({"order_accuracy": order.means()[1]} if self.config.sentence_order else {})}

    def counts(self) -> dict[str, Any]:
        return {
            name: {"tokens": len(text.tokens), "words": len(text.words), "sequences": len(text)}
            for name, text in self.texts.items()
        }

    @torch.no_grad()
    def samples(self, model: nn.Module, count: int, seed: int) -> list[str]:
        """The first sequences of the test text with what is hidden, and what the model puts there."""
        batch = self.moved(next(self.texts["test"].evaluation(max(count, 1))))
        encoder: Any = model
        guesses = encoder.predict(batch.ids, **_inputs(batch))[0].argmax(-1)
        told = batch.ids.scatter(1, batch.positions, guesses.where(batch.labels != IGNORE, batch.ids[:, :1]))
        return [
            f"{self._decoded(before[mask])}\n{self._decoded(after[mask])}"
            for before, after, mask in list(zip(batch.ids, told, batch.mask, strict=True))[:count]
        ]

    def _decoded(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def _inputs(batch: MaskedBatch) -> dict[str, Tensor]:
    return {"mask": batch.mask, "token_types": batch.types, "positions": batch.positions}


def _weighted(batches: list[MaskedBatch]) -> list[MaskedBatch]:
    """The batches with such weights that the mean over them and all processes, which have not equally many words to
    tell, is the mean over all words."""
    told = torch.stack([(batch.labels != IGNORE).sum() for batch in batches]).float()
    weights = told * len(batches) * processes() / total(told.sum()).clamp_min(1)
    return [batch._replace(weight=weight) for batch, weight in zip(batches, weights, strict=True)]


class Hits:
    """The cross entropy (nats) and the accuracy of a classification, summed on the device."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # counted, −log p, right

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """logits (…, K); targets (…) int64, −100 where nothing counts."""
        logits, targets = logits.flatten(0, -2).float(), targets.flatten()
        nll = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        self.sums += torch.stack([(targets != IGNORE).sum(), nll, (logits.argmax(-1) == targets).sum()])

    def means(self) -> tuple[float, float]:
        """Cross entropy and accuracy a target, of all processes."""
        count, nll, right = total(self.sums).tolist()
        return nll / count, right / count


def check_encoder(name: str) -> None:
    """ValueError if the model of that name is no text encoder."""
    if (kind := model_config(name).kind) != "mlm":
        raise ValueError(f"model {name!r} is of kind {kind!r}, not a text encoder")


def default_mlm() -> MLMConfig:
    """A small WideNet on the embedded corpus: about a minute on two CPU cores."""
    return MLMConfig(
        set=("dim=128", "depth=4", "ffn_dim=256", "embed_dim=64", "num_heads=4"),
        lr=2e-3,
        batch_size=16,
        steps=300,
        warmup=30,
        eval_every=100,
        save_every=100,
    )


def named_mlm() -> MLMConfig:
    """A model that the user names, with AdamW at a rate that post-norm models bear."""
    return MLMConfig(steps=1000)


def albert() -> MLMConfig:
    """ALBERT's pre-training (arXiv 1909.11942, section 4.1): LAMB, batches of 4096, 125,000 steps, sentence order.

    The masks are whole words rather than n-grams. WideNet's paper trains its encoders by this recipe's data, but does
    not publish its own settings.
    """
    return MLMConfig(
        model="albert_base",
        optimizer="lamb",
        betas=(0.9, 0.999),
        lr=1.76e-3,
        schedule="linear",
        floor=0.0,
        warmup=3125,
        steps=125_000,
        batch_size=4096,
        seq_len=512,
        sentence_order=True,
        dtype="bf16",
        eval_every=5000,
        save_every=5000,
    )


RECIPES: dict[str, Callable[[], MLMConfig]] = {"albert": albert}


def mlm_settings(recipe: str | None, model: str | None) -> MLMConfig:
    """What a run starts from; ValueError with the nearest names for an unknown recipe."""
    if recipe is None:
        return default_mlm() if model is None else named_mlm()
    if recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    return RECIPES[recipe]()
