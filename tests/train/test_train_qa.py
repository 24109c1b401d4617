"""Extractive question answering: SQuAD's formats, windows, metrics, the task in the loop."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from grassland.archs import create_model, load_model, save_model
from grassland.train.__main__ import main
from grassland.train.answers import agreement, answer_metrics, best_spans, normalized
from grassland.train.data import save_tokenizer
from grassland.train.data.questions import Paragraph, Paragraphs, Question, Windows, load_questions
from grassland.train.data.tokenizer import load_tokenizer, special_tokens
from grassland.train.log import read_metrics
from grassland.train.start import run
from grassland.train.tasks.finetune import encoder_from
from grassland.train.tasks.qa import QAConfig, QuestionAnswering

NAMES, CITIES = ["Anna", "Ben", "Cleo", "Dan", "Eva", "Zoe"], ["Rome", "Paris", "Oslo", "Cairo", "Quito", "Lima"]
WORDS = ["where", "does", "live", "lives", "in", ".", "?", *map(str.lower, NAMES + CITIES)]


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def entry(name, context, question, *answers, **more):
    found = {"text": list(answers), "answer_start": [context.find(answer) for answer in answers]}
    return {"id": name, "context": context, "question": question, "answers": found, **more}


def corpus(count, unanswerable):
    """Where people live; of Zoe nobody tells."""
    draw, rows = random.Random(0), []
    for number in range(count):
        cities = draw.sample(CITIES, 5)
        lines = [f"{name} lives in {city}." for name, city in zip(NAMES, cities, strict=False)]
        context, one = " ".join(draw.sample(lines, 5)), draw.randrange(5)
        rows.append(entry(f"q{number}", context, f"Where does {NAMES[one]} live?", cities[one]))
        if unanswerable and number % 2:
            rows.append(entry(f"none{number}", context, "Where does Zoe live?"))
    return rows


def squad(rows):
    """Rows as SQuAD's authors publish them."""
    paragraphs = {}
    for row in rows:
        answers = [{"text": t, "answer_start": s} for t, s in zip(*row["answers"].values(), strict=True)]
        question = {"id": row["id"], "question": row["question"], "answers": answers, "is_impossible": not answers}
        paragraphs.setdefault(row["context"], []).append(question)
    articles = [{"title": "t", "paragraphs": [{"context": c, "qas": q}]} for c, q in paragraphs.items()]
    return {"version": "v2.0", "data": articles}


def write(folder, **splits):
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}-v2.0.json").write_text(json.dumps(squad(rows)))
    return str(folder)


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return load_tokenizer(str(path))


@pytest.fixture
def encoder(vocabulary, tmp_path):
    """A folder as `mlm` leaves one."""
    torch.manual_seed(0)
    sizes = {
        "norm": "pre",
        "dim": 32,
        "embed_dim": 32,
        "depth": 1,
        "ffn_dim": 64,
        "num_heads": 4,
        "dropout": 0.1,
        "max_len": 64,
    }
    folder = tmp_path / "encoder"
    save_model(create_model("mlm", vocab_size=vocabulary.get_vocab_size(), **sizes), folder)
    save_tokenizer(vocabulary, folder)
    return folder


@pytest.fixture
def config(encoder, tmp_path):
    """A run of a second in several windows a question, with everything random that a run can have."""
    rows = corpus(8, unanswerable=True)
    settings = {"model": str(encoder), "data": write(tmp_path / "data", train=rows, dev=rows[:7])}
    return QAConfig(
        **settings, out=str(tmp_path / "run"), seq_len=24, max_question_len=8, doc_stride=6, max_answer_len=3,
        batch_size=8, epochs=None, steps=9, warmup_epochs=None, eval_epochs=None, warmup=1, lr=1e-2, log_every=3,
        eval_every=3, save_every=3, device="cpu",
    )  # fmt: skip


# Data


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "hub"])
def test_every_format_is_the_same_data(tmp_path, monkeypatch, kind):
    rows = corpus(6, unanswerable=True)
    wanted = load_questions(write(tmp_path / "squad", train=rows, dev=rows[:3]))
    assert wanted.unanswerable and wanted.tested_on == "valid"
    assert {name: len(part.questions) for name, part in wanted.splits.items()} == {"train": 9, "valid": 3, "test": 3}
    first = wanted.splits["train"][0].questions[0]
    context = rows[0]["context"]
    assert first == ("q0", rows[0]["question"], tuple(rows[0]["answers"]["text"]), context.find(first.answers[0]))
    assert [question.start for question in wanted.splits["train"].questions if not question.answers] == [-1] * 3
    splits, source = {"train": rows, "validation": rows[:3]}, tmp_path / kind
    table = pytest.importorskip("datasets").Dataset.from_list
    if kind == "json":
        write(source, train=rows, validation=rows[:3])
    elif kind == "hub":
        published = {split: table(part) for split, part in splits.items()}
        monkeypatch.setattr("grassland.train.data.splits.load_hub", lambda name: published)
    else:
        source.mkdir()
        for name, part in splits.items():
            file = source / f"{name}-0.{kind}"
            table(part).to_parquet(file) if kind == "parquet" else table(part).to_json(file)
    assert load_questions("squad_v2" if kind == "hub" else str(source)).key == wanted.key


def test_whole_paragraphs_of_one_file_are_held_out(tmp_path):
    rows = [{**row, "id": f"{row['id']}-{i}"} for row in corpus(20, unanswerable=False) for i in range(2)]
    write(tmp_path / "all", train=rows)
    found = load_questions(str(tmp_path / "all" / "train-v2.0.json"))
    assert found.tested_on == "test" and not found.unanswerable
    assert {name: len(part.questions) for name, part in found.splits.items()} == {"train": 34, "valid": 4, "test": 2}
    contexts = [{paragraph.context for paragraph in part} for part in found.splits.values()]
    assert sum(map(len, contexts)) == len(set.union(*contexts)) == 20


CONTEXT = "Anna lives in Rome."
GOOD = entry("q1", CONTEXT, "Where?", "Rome")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answers": {"text": ["Rome"], "answer_start": [13]}}, ("'Rome' is not at answer_start 13", "' Rom'")),
        ({"answers": {"text": ["Rome"], "answer_start": [-5]}}, ("not at answer_start -5",)),
        ({"answers": {"text": ["Rome"], "answer_start": []}}, ("answers must each have text and answer_start",)),
        ({"answers": None}, ("answers must each have text and answer_start, got None",)),
        ({"answers": {"text": [" "], "answer_start": [4]}}, ("an answer must be text", "' '")),
        ({"context": " "}, ("context must be text that is not empty", "' '")),
        ({"question": None}, ("question must be text that is not empty, got None",)),
        ({"is_impossible": True}, ("is_impossible is True, but it has 1 answers",)),
        ({"is_impossible": False, "answers": {"text": [], "answer_start": []}}, ("is False, but it has 0 answers",)),
        ({"id": None}, ("a question needs an id",)),
    ],
)
def test_bad_questions_name_themselves_and_their_file(tmp_path, changes, words):
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ({**GOOD, "id": "q0"}, {**GOOD, **changes})))
    with pytest.raises(ValueError) as caught:
        load_questions(str(file))
    named = () if "id" in changes else ("question q1",)
    assert all(word in str(caught.value) for word in (str(file), *named, *words)), str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ('["a"]', "not SQuAD's format"),
        ('{"data": [{"paragraphs": [{"qas": [{"id": "q"}]}]}]}', "not SQuAD's format"),
        ('{"data": []}', "no questions"),
        (json.dumps(squad([GOOD, {**GOOD, "context": CONTEXT + " Yes."}])), "question q1 is there twice"),
    ],
)
def test_files_that_are_not_squads_name_themselves(tmp_path, content, words):
    file = tmp_path / "train-v1.1.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        load_questions(str(file))
    assert str(file) in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"dev\.json: no such file"):
        load_questions(str(tmp_path / "dev.json"))


# Windows


def windows(tokenizer, context, *questions, **lengths):
    lengths = {"seq_len": 64, "stride": 16, "question_len": 16, "name": "here", **lengths}
    return Windows(Paragraphs([Paragraph(context, list(questions))]), tokenizer, **lengths)


def test_windows_overlap_and_point_to_the_answer_or_to_cls(vocabulary):
    context = "Anna lives in Rome. Ben lives in Paris."  # ten tokens, the points too
    asked = Question("q", "Where does Ben live?", ("Paris", "in Paris"), context.find("Paris"))
    found = windows(vocabulary, context, asked, seq_len=14, stride=2, question_len=4)
    words = ["where", "does", "ben", "live"]
    parts = [
        ("anna lives in rome . ben lives", (0, 0)),
        ("in rome . ben lives in paris", (12, 12)),
        (". ben lives in paris .", (10, 10)),
    ]
    cls, sep = special_tokens(vocabulary)[1:3]
    batch = found.batch(np.array([0, 1, 2, -1]))
    for row, (part, span) in enumerate(parts):
        ids = [cls, *map(vocabulary.token_to_id, words), sep, *map(vocabulary.token_to_id, part.split()), sep]
        assert batch.ids[row][batch.mask[row]].tolist() == ids
        assert batch.types[row].tolist() == [0] * 6 + [1] * (len(ids) - 6) + [0] * (14 - len(ids))
        assert tuple(batch.spans[row].tolist()) == span
    assert batch.spans[3].tolist() == [-100, -100] and len(found) == 3
    assert found.text(1, 12, 12) == "Paris" and found.text(2, 7, 10) == "Ben lives in Paris"
    assert found.text(0, 8, 11) == "in Rome. Ben"


def test_a_stride_longer_than_a_window_leaves_nothing_out(vocabulary):
    context = " ".join(["Anna lives in Rome."] * 5)
    found = windows(vocabulary, context, Question("q", "Where?", (), -1), seq_len=12, stride=99)
    covered = [place for start, end in found.rows[:, 2:4] for place in range(start, end)]
    assert covered == list(range(25))
    assert not found.batch(np.arange(len(found))).spans.any()


TEXT = "Ünïcode  cafés (Zürich) cost $4,500 in São Paulo — naïve 東京 🙂 prices."


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
@pytest.mark.parametrize("answer", ["cafés", "Zürich", "$4,500", "São Paulo", "東京", "🙂 prices"])
def test_the_offsets_of_an_answer_give_it_back(request, kind, answer):
    if kind == "bpe":
        tokenizer = load_tokenizer("bpe:280", TEXT)
    else:
        folder = request.getfixturevalue("shared") / "data" / "bert-base-uncased"
        if not folder.is_dir():
            pytest.skip(f"no BERT vocabulary at {folder}")
        tokenizer = load_tokenizer(str(folder))
    found = windows(tokenizer, TEXT, Question("q", "?", (answer,), TEXT.find(answer)), seq_len=160)
    first, last = found.batch(np.array([0])).spans[0].tolist()
    assert len(found) == 1 and first > 0 and found.text(0, first, last) == answer


def test_what_the_tokenizer_leaves_nothing_of_is_named(vocabulary):
    with pytest.raises(ValueError, match="here: question q: the tokenizer makes no token of its context"):
        windows(vocabulary, "\x00", Question("q", "Where?", (), -1))
    with pytest.raises(ValueError, match="here: question q: the tokenizer makes no token of its answer"):
        windows(vocabulary, "Anna \x00 lives", Question("q", "Where?", ("\x00",), 5))


# The head


def test_the_span_loss_is_the_mean_of_two_cross_entropies(encoder):
    torch.manual_seed(0)
    model = encoder_from(encoder, {}, span_head=True)
    assert model.span_head.weight.shape == (2, 32) and not model.span_head.bias.any()
    assert model.span_head.weight.std().item() == pytest.approx(0.02, rel=0.3)
    ids, spans = torch.randint(5, 18, (3, 12)), torch.tensor([[2, 4], [0, 0], [-100, -100]])
    mask = torch.arange(12) < torch.tensor([12, 7, 12])[:, None]
    logits = model.eval().span_logits(ids, mask=mask)
    parts = [F.cross_entropy(logits[:2, :, end], spans[:2, end]) for end in (0, 1)]
    assert model(ids, spans=spans, mask=mask).item() == pytest.approx(torch.stack(parts).mean().item())
    assert logits[1, 7:].isneginf().all() and logits[1, :7].isfinite().all()
    torch.testing.assert_close(model.span_logits(ids[1:2, :7]), logits[1:2, :7])
    for wrong, message in ((spans[:2], r"spans must be \(3, 2\)"), (spans + 11, r"spans must be in \[0, 12\)")):
        with pytest.raises(ValueError, match=message):
            model(ids, spans=wrong)
    with pytest.raises(ValueError, match="span_head=True"):
        load_model(encoder)(ids, spans=spans)


def test_best_spans_are_those_of_a_search_over_all():
    torch.manual_seed(0)
    logits, types = torch.randn(4, 12, 2), torch.zeros(4, 12, dtype=torch.int64)
    ranges = [(3, 11), (5, 8), (2, 3), (4, 9)]  # the first fills its window
    for row, (start, end) in enumerate(ranges):
        types[row, start : end + 1] = 1  # with the [SEP]
        logits[row, end + 1 :] = -torch.inf
    for longest in (1, 3, 30):
        first, last, score, null = best_spans(logits, types, longest)
        for row, (start, end) in enumerate(ranges):
            spans = [(i, j) for i in range(start, end) for j in range(i, min(i + longest, end))]
            sums = [(logits[row, i, 0] + logits[row, j, 1]).item() for i, j in spans]
            assert (first[row], last[row]) == spans[int(np.argmax(sums))] and score[row] == max(sums)
            assert null[row] == logits[row, 0].sum()


# Metrics


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "f1"),
    [
        ("The  Cat's mat!", ["cats mat"], 1, 1),
        ("cat", ["the big cat", "dog"], 0, 2 / 3),
        ("a big red cat", ["big cat", "red"], 0, 4 / 5),
        ("the theatre and an anthem", ["theatre and anthem"], 1, 1),
        ("cat cat", ["cat"], 0, 2 / 3),
        ("cat", ["dog"], 0, 0),
        ("", ["cat"], 0, 0),
        ("", [], 1, 1),
        ("the", [], 1, 1),
        ("cat", [], 0, 0),
        ("cat", ["the", "cat"], 1, 1),
        ("a", ["the"], 1, 1),
    ],
)
def test_exact_match_and_f1(answer, gold, exact, f1):
    assert agreement(answer, gold) == (exact, pytest.approx(f1))


def test_normalization():
    assert normalized(' An  "A-team", the\tCafé\n(1,000)! ') == "ateam café 1000"
    assert normalized("theory a.the") == "theory athe"


def test_metrics_with_unanswerable_questions():
    answers, gold = ["cat", "red dog", "x", "y"], [["cat"], ["dog"], [], []]
    assert answer_metrics(answers[:2], gold[:2]) == {"exact_match": 0.5, "f1": pytest.approx(5 / 6)}
    # At 0 the third is answered, which has no answer, and the first is not, which has one.
    found = answer_metrics(answers, gold, np.array([1.0, -2.0, -1.0, 3.0]))
    assert found["exact_match"] == 0.25 and found["f1"] == pytest.approx((2 / 3 + 1) / 4)
    assert found["has_answer_exact_match"] == 0 and found["has_answer_f1"] == pytest.approx(1 / 3)
    assert found["no_answer_accuracy"] == 0.5
    # Up to -2: 2/3 + 2; up to -1: 2/3 + 1; up to 1: 1 + 2/3 + 1; without any: 2.
    assert found["best_f1"] == pytest.approx((2 + 2 / 3) / 4) and found["best_f1_threshold"] == -2
    assert found["best_exact_match"] == 0.5 and found["best_exact_match_threshold"] == -3
    # A threshold cannot part what is alike.
    tied = answer_metrics(["cat", "x"], [["cat"], []], np.zeros(2))
    assert tied["best_f1"] == 0.5 and tied["best_f1_threshold"] == -1


# The task


def test_the_best_of_all_windows_counts_and_each_question_once(config):
    task = QuestionAnswering(config, torch.device("cpu"))
    windows = task.windows["valid"]
    assert len(windows) > len(windows.questions) == 7
    found = task.evaluate(task.model, "valid")
    assert [question.id for question, _ in task.answers] == [question.id for question in windows.questions]
    model = task.model.eval()
    batch = windows.batch(np.arange(len(windows)))
    with torch.no_grad():
        logits = model.span_logits(batch.ids, mask=batch.mask, token_types=batch.types)
    for number, (_, answer) in enumerate(task.answers):
        own = np.flatnonzero(windows.rows[:, 0] == number)
        first, last, score, null = (part[own] for part in best_spans(logits, batch.types, 3))
        row = int(score.argmax())
        assert answer == windows.text(own[row], first[row], last[row])
        assert task.null_odds[number] == pytest.approx(float(null.min() - score.max()), abs=1e-5)
    both = [F.cross_entropy(logits[..., end], batch.spans[:, end]) for end in (0, 1)]
    assert found["loss"] == pytest.approx(torch.stack(both).mean().item(), rel=1e-5)
    assert found["error"] == 1 - found["f1"]


def test_a_validation_may_see_some_windows_and_a_test_sees_all(config, judged):
    task = QuestionAnswering(replace(config, valid_batches=1), torch.device("cpu"))
    for split in ("valid", "test"):
        task.evaluate(task.model, split)
    assert judged["valid"] == 1 < judged["test"] == -(-len(task.windows["test"]) // 8)
    assert len(task.answers) == 7


def test_all_that_is_trained_learns(config):
    task = QuestionAnswering(config, torch.device("cpu"))
    task.loss(task.model.train(), next(task.batches(0))).backward()
    # DDP waits for the gradients of all that is trained.
    assert all(p.grad is not None for p in task.model.parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in task.model.pooler.parameters())


@pytest.mark.parametrize("unanswerable", [False, True], ids=["squad", "squad_v2"])
def test_a_handful_of_questions_is_learnt_by_heart(encoder, tmp_path, unanswerable):
    rows = corpus(6, unanswerable)
    out, data = tmp_path / "run", write(tmp_path / "data", train=rows, dev=rows)
    command = ["qa", str(encoder), "--data", data, "--out", str(out), "--seq-len", "24", "--max-question-len", "8"]
    command += ["--doc-stride", "6", "--batch-size", "16", "--steps", "200", "--eval-every", "100"]
    assert main([*command, "--recipe", "squad", "--warmup", "10", "--optimizer", "muon", "--lr", "0.02"]) == 0
    events = {event["event"]: event for event in read_metrics(out)}
    counts = {"paragraphs": 6, "questions": len(rows), "windows": events["start"]["splits"]["train"]["windows"]}
    assert events["start"]["splits"] == dict.fromkeys(("train", "valid", "test"), counts)
    assert counts["windows"] > len(rows) and events["start"]["tested_on"] == "valid"
    assert events["test"]["exact_match"] == events["test"]["f1"] == 1
    given = json.loads((out / "predictions.json").read_text())
    assert given == {row["id"]: "".join(row["answers"]["text"]) for row in rows}
    assert (out / "null_odds.json").exists() == unanswerable == ("no_answer_accuracy" in events["test"])
    if unanswerable:
        odds = json.loads((out / "null_odds.json").read_text())
        assert {name for name, value in odds.items() if value > 0} == {n for n, text in given.items() if not text}
    assert events["end"]["samples"][0] == f"{rows[0]['question']}\n{given['q0']}"
    assert load_model(out).config.span_head
    # What answers questions may go on to classify, and the other way round.
    assert encoder_from(out, {}, num_classes=2).span_head is None


def test_an_interrupted_run_ends_with_the_very_numbers_of_a_straight_one(config, encoder, assert_resumes):
    straight, stopped = assert_resumes(QuestionAnswering, config, 4, gone=encoder)
    for name in ("predictions.json", "null_odds.json"):
        assert (stopped / name).read_bytes() == (straight / name).read_bytes()


def test_two_processes_give_the_evaluation_of_one(config, tmp_path, launch):
    quiet = replace(config, set=("dropout=0",), steps=4, eval_every=2)
    assert run(QuestionAnswering, replace(quiet, out=str(tmp_path / "one"))) == 0
    command = ["qa", "--model", quiet.model, "--data", quiet.data, "--out", tmp_path / "two", "--set", "dropout=0"]
    command += ["--seq-len", 24, "--max-question-len", 8, "--doc-stride", 6, "--max-answer-len", 3, "--batch-size", 8]
    command += ["--steps", 4, "--warmup", 1, "--lr", 1e-2, "--eval-every", 2, "--device", "cpu"]
    launch(2, *command)
    one, two = ({e["event"]: e for e in read_metrics(tmp_path / name)} for name in ("one", "two"))
    for event in ("valid", "test"):
        assert two[event].keys() == one[event].keys()
        names = [name for name in one[event] if name not in ("elapsed_s", "event")]
        assert [two[event][n] for n in names] == pytest.approx([one[event][n] for n in names], rel=1e-3)
    given = [(tmp_path / name / "predictions.json").read_text() for name in ("one", "two")]
    assert given[0] == given[1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "qa RUN --data DATA"),
        (["--seq-len", "65"], "seq_len must be at most the model's max_len=64, got 65"),
        (["--seq-len", "11"], "seq_len must be at least max_question_len + 4 = 12, got 11"),
        (["--doc-stride", "0"], "doc_stride must be positive, got 0"),
        (["--recipe", "squad2"], "unknown recipe 'squad2'; did you mean"),
    ],
)
def test_bad_settings_are_one_line_that_names_them(config, tmp_path, fail, arguments, named):
    command = [config.model, "--data", config.data, "--out", tmp_path / "out", "--max-question-len", 8, "--steps", 1]
    assert named in fail("qa", *([*command, "--seq-len", 24, *arguments] if arguments else []))
    assert not (tmp_path / "out").exists()
