"""Training on sentence pairs: data, tokens, the loop, resuming, errors."""

import json
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from grassland.archs import CheckpointError
from grassland.train.data import load_tokenizer
from grassland.train.data.pairs import LABELS, PairTokens, load_pairs, marks
from grassland.train.log import read_metrics
from grassland.train.loop import Trainer
from grassland.train.nli_model import load_nli_model
from grassland.train.start import run
from grassland.train.tasks.nli import NaturalLanguageInference, NLIConfig

ANIMALS = ["dog", "cat", "bird", "horse", "cow"]


def entry(draw, label=None):
    animal, other = draw.sample(ANIMALS, 2)
    label = label or draw.choice(LABELS)
    hypothesis = {"entailment": f"a {animal} runs", "neutral": "it is warm", "contradiction": f"only a {other} sits"}
    return {"sentence1": f"the {animal} runs fast", "sentence2": hypothesis.get(label, "?"), "gold_label": label}


@pytest.fixture
def folder(tmp_path):
    draw, place = random.Random(0), tmp_path / "snli"
    place.mkdir()
    for split, count in (("train", 60), ("dev", 16), ("test", 14)):
        entries = [entry(draw) for _ in range(count)] + [entry(draw, "-")]
        (place / f"snli_1.0_{split}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    return place


@pytest.fixture
def nli(folder):
    settings = NLIConfig(
        data=str(folder), encoder="random", tokenizer="bpe:280", epochs=None, eval_epochs=None, steps=8, batch_size=8,
        set=("d_model=16", "d_proj=8", "num_heads=2", "d_ff=16"), warmup=2, lr=1e-2, log_every=1, eval_every=4,
        save_every=4, device="cpu",
    )  # fmt: skip
    return lambda **changes: replace(settings, **changes)


def test_pairs_without_a_label_are_dropped_and_splits_found(folder):
    splits = load_pairs(str(folder))
    assert [(len(splits[name]), splits[name].dropped) for name in ("train", "valid", "test")] == [
        (60, 1),
        (16, 1),
        (14, 1),
    ]
    one = load_pairs(str(folder / "snli_1.0_train.jsonl"))
    assert [len(one[name]) for name in ("train", "valid", "test")] == [54, 3, 3]
    texts = [set(map(tuple, zip(p.premises, p.hypotheses, strict=True))) for p in one.values()]
    assert sum(len(p) for p in one.values()) == 60 and texts[0]


def test_the_hubs_names_and_integer_labels_are_read(tmp_path):
    rows = [{"premise": "a b", "hypothesis": "c", "label": index % 4 - 1} for index in range(80)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = load_pairs(str(tmp_path / "x.jsonl"))
    assert sum(map(len, splits.values())) == 60 and set(splits["train"].labels) == {0, 1, 2}


def test_the_hubs_labels_are_told_by_their_names(monkeypatch):
    datasets = pytest.importorskip("datasets")
    names = ["contradiction", "entailment", "neutral"]
    text = datasets.Value("string")
    kinds = datasets.Features(premise=text, hypothesis=text, label=datasets.ClassLabel(names=names))
    rows = {"premise": ["a"] * 4, "hypothesis": ["b"] * 4, "label": [0, 1, 2, -1]}
    table = datasets.Dataset.from_dict(rows, features=kinds)
    published = dict.fromkeys(("train", "validation_matched", "validation_mismatched", "test"), table)
    monkeypatch.setattr("grassland.train.data.splits.load_hub", lambda source: published)
    found = load_pairs("someone/pairs")
    assert [LABELS[label] for label in found["test"].labels] == names and found["test"].dropped == 1
    assert len(found["valid"]) == 6 and found["valid"].dropped == 2


def test_the_pooler_of_a_fine_tuned_encoder_is_not_trained(nli, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(vocab_size=280, **sizes)).save_pretrained(tmp_path / "bert")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "runs", *ANIMALS]))
    settings = nli(encoder=str(tmp_path / "bert"), fine_tune=True, tokenizer=str(tmp_path / "vocab.txt"))
    task = NaturalLanguageInference(settings, torch.device("cpu"))
    task.loss(task.model.train(), next(task.batches(0))).backward()
    # DDP waits for the gradients of all that is trained.
    trained = {name: parameter.grad for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    assert [name for name, grad in trained.items() if grad is None] == []
    assert any(name.startswith("encoder.encoder.") for name in trained)


def test_tokens_are_marked_cut_and_padded(folder, shared):
    tokenizer = load_tokenizer(str(shared / "data" / "bert-base-uncased"))
    assert marks(tokenizer) == (101, 102, 0)
    pairs = load_pairs(str(folder))["train"]
    tokens = PairTokens(tokenizer, pairs, 12)
    ids, mask, labels = tokens.batch(np.array([3, 0]))
    assert ids.shape == mask.shape and ids.shape[1] in (8, 12, 16) and labels.tolist() == pairs.labels[[3, 0]].tolist()
    row = ids[0][mask[0]].tolist()
    middle = row.index(102)
    assert (
        tokenizer.decode(row[1:middle]) == pairs.premises[3]
        and tokenizer.decode(row[middle + 1 : -1]) == pairs.hypotheses[3]
    )
    assert row[0] == 101 and row[-1] == 102 and (ids[~mask] == 0).all()
    long = replace(pairs, premises=["dog " * 30] * 60, hypotheses=["cat " * 3] * 60)
    cut = PairTokens(tokenizer, long, 12).rows[0].tolist()
    assert (
        cut.count(tokenizer.token_to_id("dog")) == 6 and cut.count(tokenizer.token_to_id("cat")) == 3 and cut[-1] == 102
    )
    both = PairTokens(tokenizer, replace(long, hypotheses=["cat " * 30] * 60), 12).rows[0].tolist()
    assert [both.count(tokenizer.token_to_id(word)) for word in ("dog", "cat")] == [4, 5]


@pytest.mark.parametrize("head", ["plucker", "transformer"])
def test_it_trains_and_the_folder_is_all_that_the_model_takes(nli, tmp_path, head):
    out = tmp_path / "run"
    options = ("d_model=16", "num_heads=2", "d_ff=16") + (
        ("d_proj=8", "window=4", "stride=2") if head == "plucker" else ()
    )
    assert (
        run(NaturalLanguageInference, nli(model=head, set=options, out=str(out), steps=30, lr=3e-2, eval_every=15)) == 0
    )
    events = read_metrics(out)
    valid = [event for event in events if event["event"] == "valid"]
    assert max(event["accuracy"] for event in valid) > 0.5 and valid[-1]["error"] == pytest.approx(
        1 - valid[-1]["accuracy"]
    )
    start, test = events[0], next(event for event in events if event["event"] == "test")
    assert start["splits"]["train"] == {"pairs": 60, "dropped": 1} and start["parameters"] == start["head_parameters"]
    model = load_nli_model(out)
    tokens = PairTokens(load_tokenizer(str(out)), load_pairs(nli().data)["test"], 48)
    ids, mask, labels = tokens.batch(np.arange(14))
    assert (model(ids, mask).argmax(-1) == labels).double().mean() == pytest.approx(test["accuracy"])


def test_a_frozen_encoder_stays_and_a_tuned_one_moves(nli, tmp_path):
    device, flops = torch.device("cpu"), []
    for tuned in (False, True):
        torch.manual_seed(0)
        task = NaturalLanguageInference(nli(fine_tune=tuned), device)
        before = {name: p.detach().clone() for name, p in task.model.encoder.named_parameters()}
        Trainer(task, nli(fine_tune=tuned, steps=2), tmp_path / f"run-{tuned}").run()
        moved = [not torch.equal(p, before[name]) for name, p in task.model.encoder.named_parameters()]
        assert any(moved) == tuned and task.model.encoder.training == tuned
        flops.append(task.flops_per_unit)
    assert 0 < flops[0] < flops[1]


@pytest.mark.parametrize("tuned", [False, True])
def test_flops_include_attention(nli, tuned):
    counts = []
    for attention in ("sdpa", "eager"):  # the latter is plain products of matrices
        task = NaturalLanguageInference(nli(fine_tune=tuned), torch.device("cpu"))
        task.model.encoder.set_attn_implementation(attention)
        counts.append(task.flops_per_unit)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("tuned", [False, True])
def test_an_interrupted_run_ends_with_the_very_numbers_of_a_straight_one(nli, tuned, assert_resumes):
    assert_resumes(NaturalLanguageInference, nli(fine_tune=tuned), 5)


def test_an_encoder_from_a_folder_brings_its_tokenizer(nli, tmp_path, shared):
    import transformers

    source = tmp_path / "encoder"
    config = transformers.DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    transformers.DistilBertModel(config).save_pretrained(source)
    vocabulary = shared / "data" / "bert-base-uncased" / "vocab.txt"
    (source / "vocab.txt").write_bytes(vocabulary.read_bytes())
    out = tmp_path / "run"
    assert run(NaturalLanguageInference, nli(encoder=str(source), tokenizer=None, out=str(out), steps=2)) == 0
    found = load_nli_model(out)
    reference = transformers.DistilBertModel.from_pretrained(source)
    assert all(torch.equal(p, found.encoder.get_parameter(name)) for name, p in reference.named_parameters())


@pytest.fixture
def refused(fail, folder, tmp_path):
    """A command with a mistake, which writes nothing; the line that it ends with."""

    def refusing(*arguments):
        small = ["--data", folder, "--encoder", "random", "--tokenizer", "bpe:280", "--steps", 1]
        error = fail("nli", *small, "--out", tmp_path / "out", *arguments)
        assert not (tmp_path / "out").exists()
        return error

    return refusing


def test_settings_out_of_range_are_named(nli):
    with pytest.raises(ValueError, match="max_len must be at least 5"):
        nli(max_len=3)
    with pytest.raises(ValueError, match="model must be one of"):
        nli(model="mlp")


def test_bad_settings_are_one_line_that_names_them(refused, folder, tmp_path):
    assert "/nowhere: no such file or folder" in refused("--data", "/nowhere")
    assert "head plucker: " in refused("--set", "dproj=3")
    assert "num_heads must divide rank=64" in refused("--set", "num_heads=3")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\ndog")
    vocabulary = ("--tokenizer", tmp_path / "vocab.txt")
    assert "encoder /nowhere/x: no such folder" in refused("--encoder", "/nowhere/x", *vocabulary)
    assert "no mark for start" in refused("--encoder", "/nowhere/x", "--tokenizer", "bpe:280")
    (tmp_path / "none").mkdir()
    assert "no train file (*train*.jsonl)" in refused("--data", tmp_path / "none")


@pytest.mark.parametrize(
    "line, named",
    [
        ("{", "snli_1.0_dev.jsonl: not JSON lines"),
        ('{"sentence1": "a"}', "snli_1.0_dev.jsonl, line 1: needs sentence1, sentence2, gold_label"),
        ('{"sentence1": "a", "sentence2": 3, "gold_label": "neutral"}', "line 1: sentence1 and sentence2 must be text"),
        ('{"sentence1": "a", "sentence2": "b", "gold_label": "maybe"}', "label 'maybe' is none of entailment"),
        ('{"sentence1": "a", "sentence2": "b", "gold_label": "-"}', "no labelled pair in the valid split"),
    ],
)
def test_bad_data_is_one_line_that_names_file_and_line(refused, folder, line, named):
    (folder / "snli_1.0_dev.jsonl").write_text(line + "\n")
    assert named in refused()


def test_a_missing_split_and_a_missing_library_are_named(refused, folder, monkeypatch):
    (folder / "snli_1.0_dev.jsonl").rename(folder / "other.jsonl")
    assert "no valid split" in refused()
    (folder / "other.jsonl").rename(folder / "snli_1.0_dev.jsonl")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers is not installed: pip install 'grassland[hf]'" in refused()


def test_a_checkpoint_of_another_kind_is_refused(nli, tmp_path):
    out = tmp_path / "run"
    run(NaturalLanguageInference, nli(out=str(out), steps=1))
    content = json.loads((out / "config.json").read_text())
    for change, named in (({"kind": "lm"}, "kind 'lm'"), ({"head": "x"}, "'x'"), ({"encoder": {}}, "config.json")):
        (out / "config.json").write_text(json.dumps({**content, "model": {**content["model"], **change}}))
        with pytest.raises(CheckpointError, match=named):
            load_nli_model(out)


def test_a_validation_may_see_some_batches_and_a_test_sees_all(nli, judged):
    task = NaturalLanguageInference(nli(valid_batches=1), torch.device("cpu"))
    for split in ("valid", "test"):
        task.evaluate(task.model, split)
    assert judged == {"valid": 1, "test": 2}
