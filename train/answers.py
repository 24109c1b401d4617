"""How well questions are answered: exact match and F1 as SQuAD's programs count them (arXiv 1606.05250, 1806.03822)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SCORES = ("exact_match", "f1")
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def best_spans(logits: Tensor, types: Tensor, max_len: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each window the span of 1 to `max_len` tokens of the context whose two logits add up to most: its first and
    last token (B,) int64 and that sum (B,); and the sum at [CLS], the score of no answer, (B,).

    logits: (B, L, 2) as of `Encoder.span_logits`. types: (B, L), 1 for the context and the [SEP] that follows it.
    """
    # After the last token comes the first, which is no context.
    context = (types & types.roll(-1, 1)).bool()
    first, last = logits.masked_fill(~context[..., None], -torch.inf).unbind(-1)
    # (B, L, max_len): a span by its first token and its length.
    sums = first[..., None] + torch.nn.functional.pad(last, (0, max_len - 1), value=-torch.inf).unfold(1, max_len, 1)
    score, index = sums.flatten(1).max(1)
    start = index // max_len
    return start, start + index % max_len, score, logits[:, 0].sum(-1)


def normalized(text: str) -> str:
    """Lower case without punctuation, articles and further whitespace."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def agreement(answer: str, gold: Sequence[str]) -> tuple[float, float]:
    """Exact match (0 or 1) and F1 of the words, each with the gold answer that it is best with; without gold, and of
    gold that has no words, with the empty one."""
    words = normalized(answer).split()
    wanted = [found for found in (normalized(text).split() for text in gold) if found] or [[]]
    return max(float(words == other) for other in wanted), max(_f1(words, other) for other in wanted)


def _f1(words: list[str], wanted: list[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    return 2 * (Counter(words) & Counter(wanted)).total() / (len(words) + len(wanted))


def answer_metrics(
    answers: Sequence[str], gold: Sequence[Sequence[str]], odds: NDArray | None = None
) -> dict[str, float]:
    """exact_match and f1, means over the questions in [0, 1].

    odds: of each question the score of no answer minus the answer's, in SQuAD 2.0; above 0 there is none. Then also
    the same of the questions that have an answer, has_answer_…, the accuracy on those that have none, and what
    the thresholds would give that are best on these very questions, best_… and best_…_threshold.
    """
    found = np.array([agreement(*pair) for pair in zip(answers, gold, strict=True)])
    if odds is None:
        return _means(found)
    answerable = np.array([bool(texts) for texts in gold])
    none = np.array([agreement("", texts)[0] for texts in gold])
    chosen = np.where(odds[:, None] > 0, none[:, None], found)
    metrics = _means(chosen)
    if answerable.any():
        metrics |= _means(chosen[answerable], "has_answer_")
    if not answerable.all():
        metrics["no_answer_accuracy"] = float(chosen[~answerable, 0].mean())
    for name, column in zip(SCORES, found.T, strict=True):
        metrics[f"best_{name}"], metrics[f"best_{name}_threshold"] = _best_threshold(column, none, odds)
    return metrics


def _means(scores: NDArray, prefix: str = "") -> dict[str, float]:
    return {f"{prefix}{name}": float(mean) for name, mean in zip(SCORES, scores.mean(0), strict=True)}


def _best_threshold(found: NDArray, none: NDArray, odds: NDArray) -> tuple[float, float]:
    """The largest mean where questions with odds up to a threshold get what is `found`, the others `none`."""
    order = odds.argsort(kind="stable")
    thresholds = np.unique(odds)
    thresholds = np.append(thresholds[0] - 1, thresholds)
    gains = np.append(0.0, (found - none)[order].cumsum())
    means = (none.sum() + gains[np.searchsorted(odds[order], thresholds, side="right")]) / len(odds)
    return float(means.max()), float(thresholds[means.argmax()])
