"""How well a language model predicts a text: token and word perplexity, bits per byte."""

import math
from dataclasses import replace

import torch
from torch import nn

from ..archs.modes import evaluating
from . import parallel
from .data import Split, evaluation_batches


@torch.no_grad()
def negative_log_likelihood(
    model: nn.Module, tokens: Split, seq_len: int, batch_size: int, device: torch.device | str = "cpu"
) -> tuple[float, int]:
    """The summed −log p (nats) of every token but the first, and their number.

    The text is cut into blocks of `seq_len` without overlap, the remainder included: a token sees what precedes it
    in its block. Evaluation mode for the time of the call. With several processes each takes its rows of every batch,
    and all get the sum.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    mine = parallel.rows(batch_size)
    with evaluating(model):
        for inputs, targets in evaluation_batches(tokens.tokens, seq_len, batch_size):
            total += model(inputs[mine].to(device), labels=targets[mine].to(device), reduction="sum").double()
    return float(parallel.total(total)), len(tokens.tokens) - 1


def text_metrics(nll: float, tokens: int, words: int, bytes: int) -> dict[str, float]:
    """Loss (nats a token), token perplexity, word perplexity and bits per byte from a summed −log p (nats).

    Words are whitespace-separated, bytes UTF-8; both are counted on the text before tokenisation, so that word
    perplexity and bits per byte compare models with different tokenisers.
    """
    return {
        "loss": nll / tokens,
        "perplexity": _exp(nll / tokens),
        "word_perplexity": _exp(nll / words),
        "bits_per_byte": nll / math.log(2) / bytes,
    }


def evaluate_text(
    model: nn.Module,
    split: Split,
    seq_len: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    batches: int | None = None,
) -> dict[str, float]:
    """`text_metrics` of a model on a split; of only its first `batches`, where words are not counted, loss and
    perplexity."""
    judged = split.tokens if batches is None else split.tokens[: batches * batch_size * seq_len + 1]
    nll, count = negative_log_likelihood(model, replace(split, tokens=judged), seq_len, batch_size, device)
    metrics = text_metrics(nll, count, split.words, split.bytes)
    if len(judged) == len(split.tokens):
        return metrics
    return {name: metrics[name] for name in ("loss", "perplexity")}


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
