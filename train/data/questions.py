"""Questions on texts in SQuAD's formats, and the windows of tokens in which an encoder looks for their answers."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.losses import IGNORE
from .masked import assemble
from .sources import SPLITS
from .splits import complete, load_splits, read_table
from .tokenizer import special_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SUFFIXES = (".json", ".jsonl", ".parquet")


class Question(NamedTuple):
    """answers: the gold ones, none of a question that cannot be answered. start: of the first one, its character."""

    id: str
    text: str
    answers: tuple[str, ...]
    start: int


class Paragraph(NamedTuple):
    """A context and the questions on it."""

    context: str
    questions: list[Question]


class Paragraphs(list[Paragraph]):
    """A split."""

    def part(self, rows: NDArray[np.int64]) -> "Paragraphs":
        """Some of the paragraphs."""
        return Paragraphs(self[row] for row in rows)

    @property
    def questions(self) -> list[Question]:
        """The questions on all of them."""
        return [question for paragraph in self for question in paragraph.questions]


@dataclass(frozen=True)
class QuestionData:
    """A data set. key: a hash of its content. tested_on: the split that "test" stands for. unanswerable: whether some
    questions have no answer, as in SQuAD 2.0."""

    key: str
    splits: dict[str, Paragraphs]
    tested_on: str
    unanswerable: bool


class WindowBatch(NamedTuple):
    """ids, types (B, L) int64; mask (B, L) bool, False for padding; spans (B, 2) int64, the first and the last token of
    the answer, 0 ([CLS]) where the window has none, −100 for an uncounted row."""

    ids: Tensor
    types: Tensor
    mask: Tensor
    spans: Tensor


def load_questions(source: str) -> QuestionData:
    """The paragraphs of each split ("train", "valid", "test") of a source.

    source: a json file as SQuAD's authors publish it (arXiv 1606.05250, 1806.03822), or a jsonl or parquet file with
    rows as on the hub: id, context, question, and answers with the lists text and answer_start; a folder with one or
    more a split; or a hub data set, "name" or "name:config". A question without answers is one that cannot be answered.

    Of missing splits, validation is held out of train: every tenth paragraph of a fixed permutation; test too if
    validation was missing, otherwise validation serves as test.

    Raises FileNotFoundError where nothing is found and ValueError for what is not as it should be, such as an answer
    that is not at its place or a question that is there twice; it names file (or split) and question.
    """
    splits = {}
    for split, rows in load_splits(source, SUFFIXES, _read).items():
        where = f"data {source}: {split}"
        # Tables of the hub do not say where their rows are from.
        splits[split] = _paragraphs(rows if isinstance(rows, list) else ((where, row) for row in rows))
        if not splits[split]:
            raise ValueError(f"{where}: no questions")
    splits = {split: part for split, part in splits.items() if split in SPLITS}
    tested_on = complete(splits, source)
    key = hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()[:24]
    unanswerable = any(not question.answers for part in splits.values() for question in part.questions)
    return QuestionData(key, splits, tested_on, unanswerable)


def _read(files: list[Path]) -> list[tuple[str, Any]]:
    """Questions as the hub has them, each with the file that it is from."""
    found: list[tuple[str, Any]] = []
    for file in files:
        rows = _squad(file) if file.suffix.lower() == ".json" else read_table([file])
        found += [(f"data {file}", row) for row in rows]
    return found


def _squad(file: Path) -> Iterator[Any]:
    try:
        for article in json.loads(file.read_text(encoding="utf-8-sig"))["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield {"context": paragraph["context"], **question}
    except UnicodeDecodeError as error:
        raise ValueError(f"data {file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"data {file}: not JSON ({error})") from error
    except (KeyError, TypeError) as error:
        wanted = "data, a list of articles with paragraphs, each of them with a context and qas"
        raise ValueError(f"data {file}: not SQuAD's format, which has {wanted} ({error!r})") from error


def _paragraphs(rows: Iterable[tuple[str, Any]]) -> Paragraphs:
    grouped: dict[str, list[Question]] = {}
    ids: set[str] = set()
    for where, row in rows:
        context, question = _question(where, row)
        if question.id in ids:
            raise ValueError(f"{where}: question {question.id} is there twice")
        ids.add(question.id)
        grouped.setdefault(context, []).append(question)
    return Paragraphs(Paragraph(*entry) for entry in grouped.items())


def _question(where: str, row: Any) -> tuple[str, Question]:
    name = row.get("id") if isinstance(row, Mapping) else None
    if not isinstance(name, str):
        raise ValueError(f"{where}: a question needs an id that is text, got {row!r:.80}")
    where = f"{where}: question {name}"
    for field in ("context", "question"):
        if not isinstance(text := row.get(field), str) or not text.strip():
            raise ValueError(f"{where}: {field} must be text that is not empty, got {text!r:.80}")
    context, answers = row["context"], _answers(where, row.get("answers"))
    for answer, start in answers:
        if start < 0 or not context.startswith(answer, start):
            found = f"which has {context[max(start, 0) :][: len(answer)]!r:.80} there"
            raise ValueError(f"{where}: answer {answer!r} is not at answer_start {start} of the context, {found}")
    impossible = row.get("is_impossible")
    if impossible is not None and bool(impossible) == bool(answers):
        raise ValueError(f"{where}: is_impossible is {impossible}, but it has {len(answers)} answers")
    start = answers[0][1] if answers else -1
    return context, Question(name, row["question"], tuple(answer for answer, _ in answers), start)


def _answers(where: str, given: Any) -> list[tuple[str, int]]:
    try:
        if isinstance(given, Mapping):
            pairs = list(zip(given["text"], given["answer_start"], strict=True))
        else:
            pairs = [(answer["text"], answer["answer_start"]) for answer in given]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: answers must each have text and answer_start, got {given!r:.80}") from error
    for text, start in pairs:
        if not isinstance(text, str) or not text.strip() or not isinstance(start, int):
            raise ValueError(f"{where}: an answer must be text and a character's number, got {text!r:.80}, {start!r}")
    return pairs


class Windows:
    """[CLS] question [SEP] part of the context [SEP] of `seq_len` tokens: of a context that does not fit, parts that
    begin `stride` tokens after one another (arXiv 1810.04805). A question keeps its first `question_len` tokens.

    name: of the data, for errors. ValueError for an answer, or a context, of which the tokeniser makes no token.
    """

    def __init__(
        self, paragraphs: Paragraphs, tokenizer: "Tokenizer", *, seq_len: int, stride: int, question_len: int, name: str
    ) -> None:
        self.special, self.seq_len = special_tokens(tokenizer), seq_len
        self.questions, self.contexts = paragraphs.questions, [paragraph.context for paragraph in paragraphs]
        asked = tokenizer.encode_batch([question.text for question in self.questions], add_special_tokens=False)
        self.asked = [np.array(e.ids[:question_len], np.int32) for e in asked]
        texts = tokenizer.encode_batch(self.contexts, add_special_tokens=False)
        self.tokens = [np.array(e.ids, np.int32) for e in texts]
        self.offsets = [np.array(e.offsets, np.int32).reshape(-1, 2) for e in texts]
        owners = [number for number, paragraph in enumerate(paragraphs) for _ in paragraph.questions]
        rows = []
        for number, (question, owner) in enumerate(zip(self.questions, owners, strict=True)):
            first, last = self._answer(question, owner, name)
            before, count = len(self.asked[number]) + 2, len(self.tokens[owner])
            room = seq_len - 1 - before
            step = min(stride, room)
            for start in range(0, max(count - room, 0) + step, step):
                inside = start <= first and last < start + room
                span = (before + first - start, before + last - start) if inside else (0, 0)
                rows.append((number, owner, start, min(start + room, count), *span))
        # Question, context, first token of the context and the one after the last, span.
        self.rows = np.array(rows, np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: NDArray[np.int64]) -> WindowBatch:
        """The windows `rows` (B,); −1 for one that does not count."""
        parts = []
        for question, context, start, end in self.rows[rows, :4]:
            segments = [self.asked[question], self.tokens[context][start:end]]
            parts.append(assemble(segments, self.special, self.seq_len))
        ids, types, mask = (torch.from_numpy(np.stack(part)) for part in zip(*parts, strict=True))
        spans = np.where((rows < 0)[:, None], IGNORE, self.rows[rows, 4:])
        return WindowBatch(ids, types, mask, torch.from_numpy(spans))

    def text(self, row: int, first: int, last: int) -> str:
        """What the context has from the token `first` to the token `last` of a window."""
        question, context, start = self.rows[row, :3]
        place = start - len(self.asked[question]) - 2
        offsets = self.offsets[context]
        return self.contexts[context][offsets[place + first, 0] : offsets[place + last, 1]].strip()

    def _answer(self, question: Question, context: int, name: str) -> tuple[int, int]:
        """The first and the last token of the context that have something of the first gold answer; −1 without one."""
        where, (starts, ends) = f"{name}: question {question.id}", self.offsets[context].T
        if not len(starts):
            raise ValueError(f"{where}: the tokenizer makes no token of its context")
        if not question.answers:
            return -1, -1
        first = int(np.searchsorted(ends, question.start, side="right"))
        last = int(np.searchsorted(starts, question.start + len(question.answers[0]))) - 1
        if first > last:
            raise ValueError(f"{where}: the tokenizer makes no token of its answer {question.answers[0]!r}")
        return first, last
