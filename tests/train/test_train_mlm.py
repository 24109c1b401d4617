"""Masked language modelling: what is hidden, segments, the task in the loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from grassland.archs import load_model
from grassland.train.__main__ import main
from grassland.train.data.corpus import LINE, WORD, load_corpus
from grassland.train.data.masked import MaskedText
from grassland.train.data.tokenizer import special_tokens
from grassland.train.log import read_metrics
from grassland.train.start import run
from grassland.train.tasks.mlm import MaskedLanguageModeling, mlm_settings

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "!", "the", "cat", "dog", "see", "##s", "##ing", "run"]


@pytest.fixture
def wordpiece(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY))
    return str(path)


def corpus(text, tokenizer="bpe:280"):
    return load_corpus(str(text), tokenizer, marked=True)


def masked(found, seq_len=24, mask_rate=0.15, sentence_order=False):
    shape = {"seq_len": seq_len, "mask_rate": mask_rate, "sentence_order": sentence_order}
    return MaskedText(found.train, found.tokenizer, **shape, name="train")


def originals(batch):
    """The ids before hiding."""
    told = batch.labels != -100
    rows = torch.arange(len(batch.ids))[:, None].expand_as(told)
    ids = batch.ids.clone()
    ids[rows[told], batch.positions[told]] = batch.labels[told]
    return ids


def tensors(batch):
    return [part for part in batch if part is not None]


def test_marks_are_the_words_and_lines_of_the_tokeniser(tmp_path, wordpiece):
    path = tmp_path / "t.txt"
    path.write_text("The cat sees.\ndogs running\n" * 60)
    found = corpus(path, wordpiece)
    ids = [found.tokenizer.id_to_token(t) for t in found.train.tokens[:9]]
    assert ids == ["the", "cat", "see", "##s", ".", "dog", "##s", "[UNK]", "the"]
    assert found.train.marks[:9].tolist() == [WORD + LINE, WORD, WORD, 0, WORD, WORD + LINE, 0, WORD, WORD + LINE]


def test_special_tokens_of_a_vocabulary_are_used_and_missing_ones_added(text_file, wordpiece):
    assert special_tokens(corpus(text_file, wordpiece).tokenizer) == (0, 2, 3, 4)
    plain = load_corpus(str(text_file), "bpe:280").tokenizer
    size = plain.get_vocab_size()
    tokenizer = corpus(text_file).tokenizer
    assert special_tokens(tokenizer) == (size, size + 1, size + 2, size + 3)
    assert tokenizer.get_vocab_size() == size + 4
    # Text that reads like one is text.
    assert size + 3 not in tokenizer.encode("[MASK] [SEP]").ids


@pytest.mark.parametrize("tokenizer", ["bpe:280", "wordpiece"])
def test_whole_words_are_told_and_hidden_in_the_known_shares(text_file, wordpiece, tokenizer):
    found = corpus(text_file, wordpiece if tokenizer == "wordpiece" else tokenizer)
    text = masked(found, seq_len=64)
    special = text.special
    kinds, told_share = np.zeros(3), []
    for epoch in range(40):
        order = np.arange(len(text))
        batch = text.training(order, epoch * len(text), seed=0)
        before = originals(batch)
        for row in range(len(text)):
            start, end = text.spans[row]
            assert before[row, 1 : 1 + end - start].tolist() == found.train.tokens[start:end].tolist()
            told = np.zeros(end - start, bool)
            places = batch.positions[row][batch.labels[row] != -100] - 1
            told[places] = True
            assert len(places) == told.sum(), "a place is told twice"
            words = np.cumsum((found.train.marks[start:end] & WORD) != 0)
            for word in np.unique(words[told]):
                assert told[words == word].all(), "a word is told in part"
            told_share.append([told.sum(), max(1, round(0.15 * (end - start)))])
        counted = batch.labels != -100
        now = batch.ids.gather(1, batch.positions)
        hidden, same = now == special.mask, now == batch.labels
        kinds += [(k & counted).sum().item() for k in (hidden, ~hidden & ~same, ~hidden & same)]
        assert not torch.isin(now[counted & ~hidden], torch.tensor(special)).any()
    told_share = np.array(told_share)
    # All that is asked for is told wherever words fit; short texts of long words may miss it by a token or two.
    assert 0.93 < told_share[:, 0].sum() / told_share[:, 1].sum() <= 1.05
    assert kinds / kinds.sum() == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_hidden_words_follow_from_seed_and_place_and_change_every_epoch(text_file):
    text = masked(corpus(text_file), sentence_order=True)
    rows = np.arange(6)
    same = [text.training(rows, 12, seed=3) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*map(tensors, same), strict=True))
    part = text.training(rows[2:4], 14, seed=3)
    assert all(torch.equal(a[2:4], b) for a, b in zip(*map(tensors, (same[0], part)), strict=True)), (
        "it depends on the batch"
    )
    for start, seed in ((12 + len(text), 3), (12, 4)):
        other = text.training(rows, start, seed)
        assert not torch.equal(other.ids, same[0].ids)
    first, second = (list(text.evaluation(4)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_sequences_cover_the_text_once_and_end_with_sentences(text_file):
    found = corpus(text_file)
    text = masked(found, seq_len=64)
    assert text.spans[0, 0] == 0 and text.spans[-1, 1] == len(found.train.tokens)
    assert (text.spans[1:, 0] == text.spans[:-1, 1]).all() and (np.diff(text.spans).ravel() <= 62).all()
    ends = [found.tokenizer.decode([found.train.tokens[end - 1]]).strip(" ") for _, end in text.spans[:-1]]
    assert set(ends) <= {".", "\n", ".\n", "\n\n"}
    sequences = 0
    for batch in text.evaluation(4):
        assert batch.ids.shape == (4, 64) and batch.order is None
        told = (batch.labels != -100).any(1)
        sequences += int(told.sum())
        assert torch.equal(batch.mask[told], batch.ids[told] != text.special.pad)
        lengths = batch.mask.sum(1)
        assert (batch.ids[told, 0] == text.special.cls).all() and (lengths[~told] == 1).all()
        assert (batch.ids[told, lengths[told] - 1] == text.special.sep).all() and not batch.types.any()
    assert sequences == len(text)


def test_segments_are_exchanged_half_of_the_time_at_a_sentence(text_file):
    found = corpus(text_file)
    text = masked(found, seq_len=64, sentence_order=True)
    orders = []
    for start in range(0, 20 * len(text), len(text)):
        batch = text.training(np.arange(len(text)), start, seed=0)
        before = originals(batch)
        orders += batch.order.tolist()
        for row, (begin, end) in enumerate(text.spans):
            first, second = (before[row][(batch.types[row] == kind) & batch.mask[row]].tolist() for kind in (0, 1))
            assert first[0] == text.special.cls and first[-1] == second[-1] == text.special.sep
            parts = [first[1:-1], second[:-1]]
            cut = len(parts[batch.order[row]])
            parts = parts[::-1] if batch.order[row] else parts
            assert parts[0] + parts[1] == found.train.tokens[begin:end].tolist()
            inner = text.sentences[(text.sentences > begin) & (text.sentences < end)]
            assert begin + cut in (inner if len(inner) else text.words)
    assert np.mean(orders) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("changes", [{"grad_accum": 2}, {"sentence_order": False, "dtype": "bf16"}], ids=str)
def test_an_interrupted_run_ends_with_the_very_numbers_of_a_straight_one(mlm, changes, assert_resumes):
    assert_resumes(MaskedLanguageModeling, mlm(**changes), 6)


def test_the_log_has_what_is_asked_for(mlm, tmp_path):
    folder = tmp_path / "run"
    run(MaskedLanguageModeling, mlm(out=str(folder), grad_accum=2))
    events = read_metrics(folder)
    train = [event for event in events if event["event"] == "train"]
    for event in train:
        (shares,) = event["expert_share"]
        assert len(shares) == 4 and sum(shares) == pytest.approx(1) and 0 <= event["expert_dropped"] < 1
    judged = [event for event in events if event["event"] in ("valid", "test")]
    assert all({"loss", "perplexity", "accuracy", "order_accuracy"} < event.keys() for event in judged)
    assert all(0 <= event["order_accuracy"] <= 1 for event in judged)
    assert "[CLS]" in events[-1]["samples"][0]
    assert load_model(folder).config.num_classes == 2


def test_evaluation_is_the_mean_over_what_is_told(mlm):
    task = MaskedLanguageModeling(mlm(batch_size=3), torch.device("cpu"))
    model = task.model.eval()
    nll = hits = right = count = sequences = 0
    for batch in task.texts["valid"].evaluation(1):
        logits = model(batch.ids, mask=batch.mask, token_types=batch.types)
        places, labels = (t[batch.labels != -100] for t in (batch.positions, batch.labels))
        nll += F.cross_entropy(logits[0, places], labels, reduction="sum").item()
        hits += (logits[0, places].argmax(-1) == labels).sum().item()
        guess = model.classify(batch.ids, mask=batch.mask, token_types=batch.types).argmax(-1)
        right, count, sequences = right + int(guess == batch.order), count + len(labels), sequences + 1
    found = task.evaluate(model, "valid")
    assert found["loss"] == pytest.approx(nll / count, rel=1e-5)
    assert (found["accuracy"], found["order_accuracy"]) == pytest.approx((hits / count, right / sequences))


def test_loss_is_masked_words_and_order_and_balance(mlm):
    task = MaskedLanguageModeling(mlm(set=(*mlm().set, "noise=False", "dropout=0.0")), torch.device("cpu"))
    batch = next(task.batches(0))
    model = task.model.train()
    inputs = {"mask": batch.mask, "token_types": batch.types}
    _, balance = model.features(batch.ids, **inputs)
    assert len(balance) == 2 and all(part > 0 for part in balance)
    told, exchanged = model.predict(batch.ids, positions=batch.positions, **inputs)
    words = F.cross_entropy(told.flatten(0, 1), batch.labels.flatten())
    order = F.cross_entropy(exchanged, batch.order)
    torch.testing.assert_close(task.loss(model, batch), words + order + sum(balance))


def test_micro_batches_make_the_step_of_one_batch(mlm, tmp_path):
    """The words of all of them count alike, however many of them each has."""
    exact = ("dropout=0", "noise=False", "capacity_factor=None", "balance_weight=0.0")
    settings = mlm(set=(*mlm().set, *exact), steps=4, log_every=1, samples=0)
    task = MaskedLanguageModeling(replace(settings, batch_size=2), torch.device("cpu"))
    counts = {(batch.labels != -100).sum().item() for _, batch in zip(range(4), task.batches(0), strict=False)}
    assert len(counts) > 1
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(MaskedLanguageModeling, replace(settings, batch_size=8, out=str(whole))) == 0
    assert run(MaskedLanguageModeling, replace(settings, batch_size=2, grad_accum=4, out=str(parts))) == 0
    steps = [[e for e in read_metrics(folder) if e["event"] == "train"] for folder in (whole, parts)]
    for one, several in zip(*steps, strict=True):
        for name in ("loss", "grad_norm"):
            assert several[name] == pytest.approx(one[name], rel=1e-4), name


def test_training_learns(mlm, tmp_path):
    folder = tmp_path / "run"
    run(MaskedLanguageModeling, mlm(out=str(folder), steps=80, eval_every=40, log_every=40, samples=0))
    first, *_, last = [event for event in read_metrics(folder) if event["event"] == "valid"]
    assert last["loss"] < first["loss"] < 6


def test_the_command_trains_on_a_wordpiece_vocabulary(text_file, wordpiece, tmp_path, capsys, fail):
    small = ["--set", "dim=8", "depth=1", "ffn_dim=8", "embed_dim=4", "num_heads=2"]
    size = ["--seq-len", "16", "--batch-size", "2", "--steps", "2"]
    where = ["--data", str(text_file), "--tokenizer", wordpiece, "--out", str(tmp_path / "run")]
    assert main(["mlm", "--model", "albert_base", *small, *size, *where]) == 0
    assert load_model(tmp_path / "run").config.vocab_size == len(VOCABULARY)
    assert main(["mlm", "--resume", str(tmp_path / "run"), "--steps", "3"]) == 0
    capsys.readouterr()
    assert "a model of kind 'mlm', not a language model" in fail("sample", tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "grassmann_lm_6l"], "'grassmann_lm_6l' is of kind 'lm', not a text encoder"),
        (["--seq-len", "513"], "seq_len must be at most the model's max_len=512, got 513"),
        (["--recipe", "bert"], "unknown recipe 'bert'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_settings_are_one_line_that_names_them_and_write_nothing(text_file, tmp_path, fail, arguments, named):
    out = ["--data", text_file, "--tokenizer", "bpe:280", "--out", tmp_path / "out"]
    assert named in fail("mlm", "--model", "albert_base", *out, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "named"), [({"mask_rate": 1.0}, "mask_rate .* 1.0"), ({"seq_len": 7}, "seq_len .* 7")]
)
def test_settings_out_of_range_name_themselves(mlm, changes, named):
    with pytest.raises(ValueError, match=named):
        mlm(**changes)


def test_a_text_without_two_words_has_no_order(tmp_path):
    (tmp_path / "train.txt").write_text("word")
    (tmp_path / "valid.txt").write_text("a word")
    (tmp_path / "test.txt").write_text("a word")
    found = load_corpus(str(tmp_path), "bpe:256", marked=True)
    with pytest.raises(ValueError, match="not one sequence of 2 words"):
        masked(found, sentence_order=True)


def test_alberts_recipe():
    config = mlm_settings("albert", None)
    assert (config.optimizer, config.lr, config.batch_size, config.steps) == ("lamb", 1.76e-3, 4096, 125_000)
    assert config.sentence_order and config.seq_len == 512


def test_bert_vocabulary_on_real_text(shared, tmp_path):
    path = tmp_path / "t.txt"
    lines = (shared / "data/wikitext-2/wiki.valid.tokens").read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:200]), encoding="utf-8")
    found = load_corpus(str(path), str(shared / "data/bert-base-uncased/vocab.txt"), marked=True)
    text = masked(found, seq_len=128, sentence_order=True)
    assert special_tokens(found.tokenizer) == (0, 101, 102, 103)
    batch = text.training(np.arange(16), 0, seed=0)
    told = (batch.labels != -100).sum(1) / (batch.mask.sum(1) - 3)
    assert told.mean().item() == pytest.approx(0.15, abs=0.005)


def test_a_validation_may_see_some_batches_and_a_test_sees_all(mlm, judged):
    task = MaskedLanguageModeling(mlm(valid_batches=2, batch_size=2), torch.device("cpu"))
    for split in ("valid", "test"):
        task.evaluate(task.model, split)
    assert len(task.texts["valid"]) > 4 and judged == {"valid": 2, "test": -(-len(task.texts["test"]) // 2)}
