import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from grassland.archs import create_model
from grassland.archs.modes import evaluating
from grassland.train.data import Split, evaluation_batches
from grassland.train.evaluate import evaluate_text, negative_log_likelihood, text_metrics
from grassland.train.log import read_metrics
from grassland.train.start import run
from grassland.train.tasks.lm import LanguageModeling


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "dim": 16, "depth": 2, "ffn_dim": 32, "max_len": 10, "rank": 4, "offsets": (1, 2)}
    return create_model("lm", dropout=0.3, **sizes)


def split(tokens):
    draw = np.random.default_rng(0).integers(0, 50, tokens)
    return Split(draw.astype(np.uint16), words=tokens // 2, bytes=3 * tokens)


def test_metrics_of_a_hand_calculation():
    # 4 tokens of 1 bit each, for 2 words in 8 bytes.
    metrics = text_metrics(nll=4 * math.log(2), tokens=4, words=2, bytes=8)
    assert metrics["loss"] == pytest.approx(math.log(2))
    assert metrics["perplexity"] == pytest.approx(2)
    assert metrics["word_perplexity"] == pytest.approx(4)
    assert metrics["bits_per_byte"] == pytest.approx(0.5)


@pytest.mark.parametrize("tokens", [2, 10, 11, 12, 57])
def test_perplexity_is_that_of_the_logits_block_by_block(model, tokens):
    part = split(tokens)
    ids = torch.from_numpy(part.tokens.astype(np.int64))
    model.eval()
    expected = 0.0
    for start in range(0, tokens - 1, 10):
        block = ids[start : start + 11]
        logits = model(block[None, :-1])[0].double()
        expected += F.cross_entropy(logits, block[1:], reduction="sum").item()
    nll, count = negative_log_likelihood(model, part, 10, 3)
    assert count == tokens - 1
    assert nll == pytest.approx(expected, rel=1e-5)
    assert evaluate_text(model, part, 10, 3)["perplexity"] == pytest.approx(math.exp(expected / count), rel=1e-4)


def test_batch_size_does_not_matter_and_the_mode_comes_back(model):
    part = split(123)
    model.train()
    results = [negative_log_likelihood(model, part, 10, size)[0] for size in (1, 2, 5, 64)]
    assert model.training
    assert results == pytest.approx([results[0]] * 4, rel=1e-6)


def test_every_token_but_the_first_is_a_target_once():
    tokens = np.arange(38, dtype=np.uint16)
    batches = list(evaluation_batches(tokens, seq_len=5, batch_size=3))
    assert {inputs.shape for inputs, _ in batches} == {(3, 5)}
    targets = torch.cat([targets.flatten() for _, targets in batches])
    assert targets[targets != -100].tolist() == list(range(1, 38))
    for inputs, targets in batches:
        assert torch.equal((inputs + 1)[targets != -100], targets[targets != -100])


def test_some_batches_are_the_beginning_of_the_text(model):
    part = split(57)
    whole, some = evaluate_text(model, part, 10, 2), evaluate_text(model, part, 10, 2, batches=2)
    beginning = evaluate_text(model, Split(part.tokens[:41], 1, 1), 10, 2)
    assert some == {name: beginning[name] for name in ("loss", "perplexity")} and some["loss"] != whole["loss"]
    assert evaluate_text(model, part, 10, 2, batches=3) == whole


def test_a_run_validates_on_some_batches_and_tests_on_all(config, tmp_path):
    folder = tmp_path / "run"
    assert run(LanguageModeling, replace(config, valid_batches=1, out=str(folder))) == 0
    task = LanguageModeling(config, torch.device("cpu"))
    best = task.best_model(folder)
    events = {event["event"]: event for event in read_metrics(folder)}
    first = Split(task.corpus.valid.tokens[: 4 * 16 + 1], 1, 1)
    kept = next(e for e in reversed(read_metrics(folder)) if e["event"] == "valid" and e["best"])
    assert kept["loss"] == pytest.approx(evaluate_text(best, first, 16, 4)["loss"], rel=1e-6)
    assert events["test"]["loss"] == pytest.approx(task.evaluate(best, "test")["loss"], rel=1e-6)
    assert "word_perplexity" in events["test"] and "word_perplexity" not in kept
    with pytest.raises(ValueError, match="valid_batches must be positive, got 0"):
        replace(config, valid_batches=0)


def test_frozen_modules_stay_in_evaluation_mode():
    """Whatever happens inside: a layer that a user has frozen does not begin to drop out."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()))
    model[1].eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == [True, True, False, False, False]
