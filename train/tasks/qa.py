"""Extractive question answering by a pre-trained encoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ...archs import atomic_write
from ...archs.modes import evaluating
from ...archs.registry import unknown
from ...kernels.losses import IGNORE
from .. import parallel
from ..answers import answer_metrics, best_spans
from ..data import BlockOrder
from ..data.questions import Paragraphs, Question, WindowBatch, Windows, load_questions
from ..log import to_json
from .finetune import Finetuning, TuningConfig

PREDICTIONS, NULL_ODDS = "predictions.json", "null_odds.json"


@dataclass(frozen=True, kw_only=True)
class QAConfig(TuningConfig):
    """Answers to questions as spans of a text, from an encoder that `mlm` has trained.

    The defaults are SQuAD's: learning rate and batch of arXiv 2107.11817; windows of arXiv 1810.04805; the length of
    training of arXiv 1909.11942. --recipe squad and squad_v2 have ALBERT's steps.
    """

    data: str
    """SQuAD's json files, jsonl or parquet files with rows as on the hub, a folder with train/dev files, or a hub
    name[:config] (squad, squad_v2)."""
    recipe: str | None = None
    """Settings for a task to start from (squad, squad_v2); other options count over them."""
    seq_len: int = 384
    """Tokens of a window: question, part of the text and three special ones."""
    doc_stride: int = 128
    """Tokens from the beginning of a window's part of the text to that of the next window's."""
    max_question_len: int = 64
    """Tokens of a question that are kept."""
    max_answer_len: int = 30
    """Tokens of the longest answer that is given."""
    lr: float = 5e-5
    """Peak learning rate."""
    batch_size: int = 48
    """Windows in a micro-batch."""
    epochs: float | None = 2.0
    """Passes over the training data; counts in place of --steps."""
    warmup_epochs: float | None = 0.2
    """Warm-up in passes over the training data; counts in place of --warmup."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("doc_stride", "max_question_len", "max_answer_len"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.seq_len < (least := self.max_question_len + 4):
            raise ValueError(f"seq_len must be at least max_question_len + 4 = {least}, got {self.seq_len}")


class QuestionAnswering(Finetuning):
    """For each question a span of its text, or none where some questions have none.

    Raises what `load_questions`, `Windows` and `load_model` raise, and ValueError for a run that is no text encoder's.
    """

    name, unit = "qa", "windows"
    config: QAConfig

    def __init__(self, config: QAConfig, device: torch.device) -> None:
        self.data = load_questions(config.data)
        super().__init__(config, device, span_head=True)
        own = {name: part for name, part in self.data.splits.items() if name in ("train", "valid", self.data.tested_on)}
        self.windows = {name: self._windows(name, part) for name, part in own.items()}
        self.windows["test"] = self.windows[self.data.tested_on]
        self.order = BlockOrder(len(self.windows["train"]), config.seed)
        self.answers: list[tuple[Question, str]] = []
        self.null_odds: NDArray | None = None

    def _windows(self, name: str, part: Paragraphs) -> Windows:
        config, where = self.config, f"data {self.config.data}: {name}"
        lengths = {"seq_len": config.seq_len, "stride": config.doc_stride, "question_len": config.max_question_len}
        return Windows(part, self.tokenizer, **lengths, name=where)

    def batch(self, rows: NDArray[np.int64], place: int) -> WindowBatch:
        return self.windows["train"].batch(rows)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch.ids, spans=batch.spans, mask=batch.mask, token_types=batch.types)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """loss (nats a window), error (1 − F1) and `answer_metrics`; over the questions of which windows are judged."""
        encoder: Any = model
        windows = self.windows[split]
        nll, found = torch.zeros(2, dtype=torch.float64, device=self.device), []
        with evaluating(model):
            for rows in self.judged_rows(len(windows), split):
                batch = self.moved(windows.batch(rows))
                logits = encoder.span_logits(batch.ids, mask=batch.mask, token_types=batch.types)
                total = F.cross_entropy(logits, batch.spans, ignore_index=IGNORE, reduction="sum") / 2
                nll += torch.stack([total.double(), (batch.spans[:, 0] != IGNORE).sum()])
                best = best_spans(logits, batch.types, self.config.max_answer_len)
                found.append(torch.stack([part.double() for part in (self.to_device(torch.from_numpy(rows)), *best)]))
        judged = np.concatenate(parallel.gather(torch.cat(found, 1).cpu().numpy()), axis=1).T
        self._answer(windows, judged[judged[:, 0] >= 0])
        gold = [question.answers for question, _ in self.answers]
        metrics = answer_metrics([answer for _, answer in self.answers], gold, self.null_odds)
        total, count = parallel.total(nll).tolist()
        return {"loss": total / count, "error": 1 - metrics["f1"], **metrics}

    def _answer(self, windows: Windows, judged: NDArray[np.float64]) -> None:
        """Keep of each question the best of its windows (N, 5): number, first and last token, score, that of none."""
        questions = windows.rows[judged[:, 0].astype(np.int64), 0]
        order = np.lexsort((judged[:, 0], -judged[:, 3], questions))
        numbers, firsts = np.unique(questions[order], return_index=True)
        best = judged[order][firsts]
        texts = [windows.text(*row) for row in best[:, :3].astype(np.int64)]
        self.answers = [(windows.questions[number], text) for number, text in zip(numbers, texts, strict=True)]
        if self.data.unanswerable:
            self.null_odds = np.minimum.reduceat(judged[order, 4], firsts) - best[:, 3]

    def _given(self) -> list[str]:
        """The answers, nothing where none is more likely."""
        odds = np.full(len(self.answers), -np.inf) if self.null_odds is None else self.null_odds
        return ["" if null > 0 else answer for (_, answer), null in zip(self.answers, odds, strict=True)]

    def write_results(self, folder: Path) -> None:
        """The answers by the questions' ids, as SQuAD's programs read them, and the odds of there being none."""
        ids = [question.id for question, _ in self.answers]
        _write(folder / PREDICTIONS, dict(zip(ids, self._given(), strict=True)))
        if self.null_odds is not None:
            _write(folder / NULL_ODDS, dict(zip(ids, self.null_odds.tolist(), strict=True)))

    def samples(self, model: nn.Module, count: int, seed: int) -> list[str]:
        """The first questions of the test and the answers to them."""
        asked = [question.text for question, _ in self.answers[:count]]
        return [f"{text}\n{answer}" for text, answer in zip(asked, self._given(), strict=False)]

    def counts(self) -> dict[str, Any]:
        return {
            name: {"paragraphs": len(part), "questions": len(part.questions), "windows": len(self.windows[name])}
            for name, part in self.data.splits.items()
        }


def _write(path: Path, content: dict[str, Any]) -> None:
    atomic_write(path, (to_json(content, ensure_ascii=False, indent=1) + "\n").encode())


# Learning rate and batch: arXiv 2107.11817. What it does not publish is ALBERT's: arXiv 1909.11942, table 14.
RECIPES: dict[str, dict[str, Any]] = {
    name: {"lr": 5e-5, "batch_size": 48, "set": ("dropout=0",), "epochs": None, "warmup_epochs": None, **steps}
    for name, steps in (
        ("squad", {"steps": 3649, "warmup": 365, "seq_len": 384}),
        ("squad_v2", {"steps": 8144, "warmup": 814, "seq_len": 512}),
    )
}


def qa_settings(recipe: str | None, model: str, data: str) -> QAConfig:
    """What a run starts from; ValueError with the nearest names for an unknown recipe."""
    if recipe is not None and recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    return QAConfig(model=model, data=data, recipe=recipe, **(RECIPES[recipe] if recipe else {}))
