"""Fine-tuning on text classification: tables, pairs, metrics, the task in the loop."""

import csv
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from grassland.archs import create_model, load_model, save_model
from grassland.train.__main__ import main
from grassland.train.data.labelled import LabelledText, encode_labelled, load_labelled
from grassland.train.data.tokenizer import load_tokenizer, special_tokens
from grassland.train.log import read_metrics
from grassland.train.start import run
from grassland.train.tasks.finetune import (
    Confusion,
    FinetuneConfig,
    TextClassification,
    encoder_from,
    finetune_settings,
)
from grassland.train.tasks.mlm import MaskedLanguageModeling

pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def rows():
    draw = random.Random(0)
    labels = [draw.randrange(2) for _ in range(90)]
    return [{"text": f"the {draw.choice(['cat', 'bird'])} {('likes', 'sees')[y]} nothing", "label": y} for y in labels]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".json", ".jsonl"):
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.fixture
def encoder(mlm, tmp_path):
    """A trained encoder with a classifier of its own, for sentence order."""
    folder = tmp_path / "encoder"
    assert run(MaskedLanguageModeling, mlm(out=str(folder), steps=2, eval_every=0, save_every=0, samples=0)) == 0
    return folder


@pytest.fixture
def config(encoder, rows, tmp_path):
    """A run of a second, with everything random that a run can have."""
    settings = {"model": str(encoder), "data": write(tmp_path / "data.jsonl", rows), "out": str(tmp_path / "run")}
    return FinetuneConfig(
        **settings, seq_len=16, batch_size=8, epochs=None, steps=9, warmup_epochs=None, eval_epochs=None,
        warmup=1, lr=1e-2, log_every=3, eval_every=3, save_every=3, device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_tables_of_every_kind_are_the_same_data(tmp_path, rows, suffix):
    found = load_labelled(write(tmp_path / f"data{suffix}", rows))
    assert found.classes == ("0", "1") and found.tested_on == "test"
    assert {name: len(part.texts) for name, part in found.splits.items()} == {"train": 73, "valid": 9, "test": 8}
    texts = sorted(
        (text, int(y)) for part in found.splits.values() for (text,), y in zip(part.texts, part.classes, strict=True)
    )
    assert texts == sorted((row["text"], row["label"]) for row in rows)


def test_splits_columns_and_names_of_classes(tmp_path):
    pairs = [{"premise": f"p {i}", "hypothesis": f"h {i}", "label": ("no", "yes", "maybe")[i % 3]} for i in range(9)]
    write(tmp_path / "train.jsonl", pairs)
    write(tmp_path / "dev.jsonl", pairs[:4])
    found = load_labelled(str(tmp_path))
    assert found.classes == ("maybe", "no", "yes") and found.tested_on == "valid"
    assert found.splits["train"].texts[1] == ("p 1", "h 1") and found.splits["train"].classes[:3].tolist() == [1, 2, 0]
    assert found.splits["test"] is found.splits["valid"] and len(found.splits["valid"].texts) == 4
    single = load_labelled(str(tmp_path), text_column="hypothesis")
    assert single.splits["train"].texts[1] == ("h 1",) and single.key != found.key


NAMES = {
    ".tsv": ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"),
    ".parquet": ("train-0.parquet", "validation_matched-0.parquet", "validation_mismatched-0.parquet"),
}


@pytest.mark.parametrize("names", [*NAMES.values(), None], ids=[*NAMES, "hub"])
def test_the_second_validation_split_of_mnli_is_one_of_its_own(config, rows, tmp_path, monkeypatch, names):
    parts = rows[:60], rows[60:70], rows[70:74]
    if names is None:
        splits = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
        secret = [{**row, "label": -1} for row in rows[:3]]
        table = pytest.importorskip("datasets").Dataset.from_list
        published = {name: table(part) for name, part in zip(splits, (*parts, secret, secret), strict=True)}
        monkeypatch.setattr("grassland.train.data.splits.load_hub", lambda source: published)
        data = "someone/glue:mnli"
    else:
        data = str(tmp_path / "mnli")
        for name, part in zip(names, parts, strict=True):
            write(tmp_path / "mnli" / name, part)
    found = load_labelled(data)
    wanted = dict(zip(("train", "valid", "mismatched"), parts, strict=True))
    assert found.tested_on == "valid" and found.splits["test"] is found.splits["valid"]
    assert {name: [text for (text,) in found.splits[name].texts] for name in wanted} == {
        name: [row["text"] for row in part] for name, part in wanted.items()
    }
    assert run(TextClassification, replace(config, data=data, steps=2, eval_every=2)) == 0
    events = {event["event"]: event for event in read_metrics(tmp_path / "run")}
    assert events["start"]["splits"] == {"train": 60, "valid": 10, "test": 10, "mismatched": 4}
    assert events["test"]["accuracy"] == events["valid"]["accuracy"] and "mismatched_accuracy" not in events["valid"]
    model, task = load_model(tmp_path / "run"), TextClassification(replace(config, data=data), torch.device("cpu"))
    batch = task.rows["mismatched"]
    right = model.classify(batch.ids, mask=batch.mask, token_types=batch.types).argmax(-1) == batch.classes
    assert events["test"]["mismatched_accuracy"] == pytest.approx(right.double().mean().item())


LINES = ['"an open quotation mark\t1', "null\t0", "None\t1", 'a "word" in it\t0', '"\t1', "an end\t0"]


def test_quotation_marks_in_a_tsv_file_are_text_as_in_glue(tmp_path):
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *LINES]) + "\n")
    (tmp_path / "dev.tsv").write_bytes("\r\n".join(["\ufeffsentence\tlabel", *LINES]).encode())
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tits labels are a secret\n")
    found = load_labelled(str(tmp_path))
    assert found.tested_on == "valid" and found.splits["test"] is found.splits["valid"]
    for part in (found.splits["train"], found.splits["valid"]):
        assert [f"{text}\t{label}" for (text,), label in zip(part.texts, part.classes, strict=True)] == LINES


def test_no_word_of_a_csv_file_is_a_missing_value(tmp_path):
    rows = [{"text": text, "label": ("None", "NA")[i % 2]} for i, text in enumerate(["null", "None", "nan", 'a, "b"'])]
    write(tmp_path / "train.csv", rows)
    write(tmp_path / "dev.csv", rows[:1])
    found = load_labelled(str(tmp_path))
    assert found.classes == ("NA", "None") and found.splits["train"].classes.tolist() == [1, 0, 1, 0]
    assert found.splits["train"].texts == [("null",), ("None",), ("nan",), ('a, "b"',)]
    write(tmp_path / "train.csv", [*rows, {"text": "c", "label": ""}])
    with pytest.raises(ValueError, match="row 4 of train has no label"):
        load_labelled(str(tmp_path))


def test_a_split_without_the_texts_and_files_that_do_not_go_together_are_named(tmp_path, rows):
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", [{"body": "a", "label": 0}])
    with pytest.raises(ValueError, match=rf"data {tmp_path}: test: no column 'text'; it has body, label"):
        load_labelled(str(tmp_path))
    write(tmp_path / "other" / "train-0.csv", rows)
    write(tmp_path / "other" / "train-1.tsv", rows)
    with pytest.raises(ValueError, match=r"train-1.tsv: of another kind than train-0.csv"):
        load_labelled(str(tmp_path / "other"))
    (tmp_path / "data.txt").write_text("text")
    with pytest.raises(ValueError, match=r"data.txt: not one of .json, "):
        load_labelled(str(tmp_path / "data.txt"))


def test_classes_that_splits_number_differently_are_told_by_their_names(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def table(names, labels):
        kinds = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=names))
        return datasets.Dataset.from_dict({"text": ["a"] * len(labels), "label": labels}, features=kinds)

    published = {"train_extra": table(["no", "yes"], [1]), "train": table(["no", "yes"], [0, 1, 1])}
    published["validation"] = table(["yes", "no"], [0, 1])
    monkeypatch.setattr("grassland.train.data.splits.load_hub", lambda source: published)
    found = load_labelled("someone/texts").splits
    assert found["train"].classes.tolist() == [0, 1, 1] and found["valid"].classes.tolist() == [1, 0]
    write(tmp_path / "train.jsonl", [{"text": "a", "label": name} for name in ("1", "2", "2")])
    write(tmp_path / "dev.csv", [{"text": "a", "label": number} for number in (1, 2)])
    assert load_labelled(str(tmp_path)).splits["valid"].classes.tolist() == [0, 1]


def test_a_test_split_of_secret_labels_is_none(tmp_path, rows):
    for name, part in (("train", rows), ("validation", rows[:9]), ("test", [{**row, "label": -1} for row in rows])):
        write(tmp_path / f"{name}.jsonl", part)
    found = load_labelled(str(tmp_path))
    assert found.tested_on == "valid" and len(found.splits["test"].texts) == 9


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"label": 0, "body": "a"}], ("which column", "body")),
        ([{"text": "a"}], ("'label'", "text")),
        ([{"text": "a", "label": 0}] * 9, ("two classes", "0")),
        ([{"text": "a", "label": 0.5}] * 9, ("0.5", "integers or names")),
        ([{"text": "a", "label": 1}, {"text": None, "label": 0}], ("text", "row 1")),
        ([{"text": "a", "label": 1}, {"text": "b", "label": -1}], ("label -1", "row 1")),
        ([{"text": "a", "label": 1}, {"text": "b", "label": 0}], ("2 rows", "too few")),
    ],
)
def test_bad_tables_name_themselves(tmp_path, rows, words):
    source = write(tmp_path / "data.jsonl", rows)
    with pytest.raises(ValueError) as caught:
        load_labelled(source)
    assert all(word in str(caught.value) for word in (source, *words)), str(caught.value)


def test_files_that_are_missing_or_broken_name_themselves(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv: no such file"):
        load_labelled("nowhere.csv")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"broken.parquet: not a readable table"):
        load_labelled(str(tmp_path / "broken.parquet"))
    with pytest.raises(FileNotFoundError, match="no train file"):
        (tmp_path / "empty").mkdir()
        load_labelled(str(tmp_path / "empty"))


def test_pairs_are_segments_and_the_longer_text_is_cut():
    tokenizer = load_tokenizer("bpe:256", "a b")
    cls, sep = special_tokens(tokenizer)[1:3]
    a, b = (tokenizer.token_to_id(letter) for letter in "ab")
    texts = [("aaa", "bb"), ("a" * 20, "bb"), ("aa", "b" * 20), ("a" * 20, "b" * 20)]
    batch = encode_labelled(LabelledText(texts, np.arange(4)), tokenizer, 10)
    rows = [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    for row, (first, second) in zip(rows, [(3, 2), (5, 2), (2, 5), (4, 3)], strict=True):
        assert row == [cls, *[a] * first, sep, *[b] * second, sep]
    assert batch.types[0].tolist() == [0] * 5 + [1] * 3 + [0] * 2 and batch.mask[0].sum() == 8
    single = encode_labelled(LabelledText([("a" * 20,)], np.zeros(1, np.int64)), tokenizer, 10)
    assert single.ids[0].tolist() == [cls, *[a] * 8, sep] and not single.types.any()


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_are_those_of_scikit_learn(classes):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(classes)
    logits, truth = torch.randn(60, classes, generator=generator), torch.randint(classes, (60,), generator=generator)
    confusion = Confusion(classes)
    for start in range(0, 60, 25):
        part = torch.cat([truth[start : start + 25], torch.full((3,), -100)])
        confusion.add(torch.cat([logits[start : start + 25], torch.randn(3, classes)]), part)
    found, guess = confusion.metrics(), logits.argmax(-1)
    average = "binary" if classes == 2 else "macro"
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, guess)) == 1 - found["error"]
    assert found["f1"] == pytest.approx(metrics.f1_score(truth, guess, average=average))
    assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(truth, guess))
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, truth).item(), rel=1e-5)
    confusion.add(torch.full((2, classes), math.nan), torch.tensor([-100, -100]))
    assert confusion.metrics() == found
    confusion.add(torch.full((1, classes), math.nan), torch.tensor([0]))
    assert all(map(math.isnan, confusion.metrics().values()))
    constant = Confusion(2)
    constant.add(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([0, 1, 1]))
    assert constant.metrics()["matthews"] == 0


def test_the_encoder_is_taken_over_and_the_classifier_is_fresh(encoder):
    trained, model = load_model(encoder), encoder_from(encoder, {"dropout": 0.3}, num_classes=2)
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]) != name.startswith("classifier."), name
    assert model.config.dropout == 0.3 and encoder_from(encoder, {}, num_classes=5).classifier.out_features == 5
    with pytest.raises(ValueError, match=r"dim.*does not fit the weights"):
        encoder_from(encoder, {"dim": 32}, num_classes=2)


@pytest.mark.parametrize("head", ["linear", "grassmann"])
def test_what_has_no_part_in_classifying_is_not_trained(config, mlm, tmp_path, head):
    folder = tmp_path / head
    options = ("subspace_dim=2",) if head == "grassmann" else ()
    sizes = (*mlm().set, f"head={head}", *options)
    run(MaskedLanguageModeling, mlm(out=str(folder), set=sizes, steps=1, eval_every=0, save_every=0, samples=0))
    task = TextClassification(replace(config, model=str(folder)), torch.device("cpu"))
    task.loss(task.model.train(), next(task.batches(0))).backward()
    # DDP waits for the gradients of all that is trained.
    trained = {name: parameter.grad for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    assert [name for name, grad in trained.items() if grad is None] == []
    assert trained.keys() == {name for name, _ in task.model.named_parameters() if not name.startswith("head.")}


def test_an_interrupted_run_ends_with_the_very_numbers_of_a_straight_one(config, encoder, assert_resumes):
    assert_resumes(TextClassification, config, 4, gone=encoder)


def test_the_command_learns_and_says_how_well(encoder, rows, tmp_path):
    out, data = tmp_path / "run", write(tmp_path / "data.csv", rows)
    command = ["finetune", str(encoder), "--data", data, "--out", str(out), "--seq-len", "16", "--batch-size", "8"]
    assert main([*command, "--lr", "0.01", "--epochs", "6", "--set", "capacity_factor=2.0", "dropout=0"]) == 0
    events = read_metrics(out)
    assert events[0]["classes"] == ["0", "1"] and events[0]["splits"] == {"train": 73, "valid": 9, "test": 8}
    test = next(event for event in events if event["event"] == "test")
    assert test["accuracy"] > 0.9 and {"f1", "matthews", "loss"} < test.keys()
    assert any("expert_share" in event for event in events)
    assert load_model(out).config.options["capacity_factor"] == 2.0


def test_recipes_are_the_papers():
    sst2, mnli = (finetune_settings(name, "run", "data") for name in ("sst2", "mnli"))
    assert (sst2.lr, sst2.batch_size) == (4e-5, 128) and (mnli.lr, mnli.batch_size) == (3e-5, 128)
    with pytest.raises(ValueError, match="unknown recipe 'sst'; did you mean 'sst2'"):
        finetune_settings("sst", "run", "data")


def test_batches_of_an_evaluation_have_one_size(config):
    task = TextClassification(config, torch.device("cpu"))
    batches = list(task.judged_rows(11, "test"))
    assert [rows.tolist() for rows in batches] == [[*range(8)], [8, 9, 10, *[-1] * 5]]
    some, classes = task.rows["train"].chosen(batches[1]), task.data.splits["train"].classes
    assert some.ids.shape == (8, 16) and some.classes.tolist() == [*classes[8:11], *[-100] * 5]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "finetune RUN --data DATA"),
        (["--seq-len", "33"], "seq_len must be at most the model's max_len=32, got 33"),
        (["--text-column", "body"], "no column 'body'; it has text, label"),
        (["--recipe", "sst"], "unknown recipe 'sst'"),
    ],
    ids=["nothing", "seq-len", "column", "recipe"],
)
def test_bad_settings_are_one_line_that_names_them(config, tmp_path, capsys, arguments, named):
    command = [config.model, "--data", config.data, "--out", str(tmp_path / "out"), *arguments]
    assert main(["finetune", *(command if arguments else [])]) == 2
    error = capsys.readouterr().err  # after the progress of reading a table
    assert named in error and error.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_language_model_is_no_encoder(rows, tmp_path, capsys):
    save_model(create_model("lm", dim=8, depth=1, ffn_dim=8, vocab_size=9, rank=4), tmp_path / "lm")
    assert main(["finetune", str(tmp_path / "lm"), "--data", write(tmp_path / "d.jsonl", rows)]) == 2
    assert "a model of kind 'lm', not a text encoder" in capsys.readouterr().err


def test_a_validation_may_see_some_batches_and_a_test_sees_all(config, judged):
    task = TextClassification(replace(config, valid_batches=1, batch_size=4), torch.device("cpu"))
    for split in ("valid", "test"):
        task.evaluate(task.model, split)
    assert judged == {"valid": 1, "test": 2}
