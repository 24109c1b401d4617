import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from grassland.train.data import BlockOrder, block_batch, load_corpus, load_text, load_tokenizer
from grassland.train.data.corpus import _build, encode
from grassland.train.data.sources import files_below, pydoc_text
from grassland.train.data.tokenizer import train_bpe
from grassland.train.sample import generate_text


def test_bpe_reproduces_the_text_to_the_byte(text):
    tricky = text + "\r\n\ttabs,  two  spaces, \u2028 naïve 漢字 🙂\n\n\nend"
    tokenizer = train_bpe(text, 300)
    assert tokenizer.get_vocab_size() == 300
    tokens = encode(tokenizer, tricky)
    assert tokens.dtype == np.uint16
    assert tokenizer.decode(tokens.tolist()) == tricky


def test_corpus_holds_the_tokens_and_counts_of_the_text(text_file, text):
    corpus = load_corpus(str(text_file), "bpe:300")
    texts = load_text(str(text_file))
    for split in ("train", "valid", "test"):
        part = getattr(corpus, split)
        assert isinstance(part.tokens, np.memmap)
        assert corpus.tokenizer.decode(part.tokens.tolist()) == texts[split]
        assert part.words == len(texts[split].split())
        assert part.bytes == len(texts[split].encode())


def test_held_out_text_is_not_in_the_training_text():
    texts = load_text("pydoc")
    lengths = {split: len(text) for split, text in texts.items()}
    assert sum(lengths.values()) > 200_000
    assert 0.02 < lengths["valid"] / lengths["train"] < 0.1 and 0.02 < lengths["test"] / lengths["train"] < 0.1
    train = set(texts["train"].split("\n\n"))
    assert not train & {paragraph for paragraph in texts["test"].split("\n\n") if paragraph}
    assert texts == load_text("pydoc")
    assert sum(map(len, texts.values())) == pytest.approx(len(pydoc_text()), rel=0.01)


@pytest.mark.parametrize("text", ["春眠" * 9000, ("春眠" * 50 + "\n") * 200, ">chr1 human\n" + "acgt" * 5000])
def test_a_text_with_few_spaces_gives_up_its_last_twentieth(tmp_path, text):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    texts = load_text(str(tmp_path / "text.txt"))
    assert texts["train"] + texts["test"] + texts["valid"] == text
    assert 0.85 < len(texts["train"]) / len(text) < 0.91


def test_a_second_load_reads_the_cache_and_a_changed_text_does_not(text_file, monkeypatch):
    first = load_corpus(str(text_file), "bpe:300")
    with monkeypatch.context() as patch:
        patch.setattr("grassland.train.data.corpus.encode", None)
        second = load_corpus(str(text_file), "bpe:300")
    assert first.key == second.key and np.array_equal(first.train.tokens, second.train.tokens)
    text_file.write_text(text_file.read_text() + " one more word")
    assert load_corpus(str(text_file), "bpe:300").key != first.key


def test_an_entry_that_another_process_has_built_in_the_meantime_stays(text_file, cache):
    first = load_corpus(str(text_file), "bpe:300")
    entry = cache / "tokens" / first.key
    before = (entry / "header.json").stat().st_ino
    _build(entry, load_text(str(text_file)), first.tokenizer, ["train", "valid", "test"])
    assert (entry / "header.json").stat().st_ino == before and list(entry.parent.iterdir()) == [entry]


@pytest.mark.parametrize("damage", ["flip", "cut", "header", "missing", "tokenizer"])
def test_a_damaged_cache_is_noticed_and_rebuilt(text_file, cache, capsys, damage):
    first = load_corpus(str(text_file), "bpe:300")
    tokens = np.array(first.train.tokens)
    entry = cache / "tokens" / first.key
    content = (entry / "train.npy").read_bytes()
    if damage == "flip":
        (entry / "train.npy").write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif damage == "cut":
        (entry / "train.npy").write_bytes(content[: len(content) // 2])
    elif damage == "header":
        (entry / "header.json").write_text(json.dumps({"train": {}}))
    elif damage == "missing":
        (entry / "test.npy").unlink()
    else:
        next((cache / "tokenizers").rglob("tokenizer.json")).write_text('{"version": "1.0", "mod')
    again = load_corpus(str(text_file), "bpe:300")
    assert np.array_equal(again.train.tokens, tokens) and again.key == first.key
    assert ("is damaged" in capsys.readouterr().err) == (damage != "tokenizer")
    assert sorted(path.name for path in entry.iterdir()) == ["header.json", "test.npy", "train.npy", "valid.npy"]


def test_splits_are_found_by_their_names(tmp_path):
    for name, words in {"wiki.train.tokens": "a b", "wiki.valid.tokens": "c d", "wiki.test.tokens": "e f"}.items():
        (tmp_path / "wiki").mkdir(exist_ok=True)
        (tmp_path / "wiki" / name).write_text(words)
    assert load_text(str(tmp_path / "wiki")) == {"train": "a b", "valid": "c d", "test": "e f"}
    for name, words in {"train": "a b", "dev": "c d", "test": "e f"}.items():
        (tmp_path / "folders" / name).mkdir(parents=True)
        (tmp_path / "folders" / name / "part.txt").write_text(words)
    assert load_text(str(tmp_path / "folders")) == {"train": "a b", "valid": "c d", "test": "e f"}


def test_parquet_files_join_their_rows(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    for split, rows in {"train-00000-of-00001": ["a", "b\n", None], "validation-0": ["c"], "test-0": ["d"]}.items():
        parquet.write_table(arrow.table({"text": rows, "id": range(len(rows))}), tmp_path / f"{split}.parquet")
    assert load_text(str(tmp_path)) == {"train": "a\nb\n", "valid": "c\n", "test": "d\n"}
    with pytest.raises(ValueError, match="no column 'body'; it has text, id"):
        load_text(str(tmp_path), "body")


def test_wikitext_with_the_bert_vocabulary_has_its_published_size(shared):
    folder, vocab = shared / "data/wikitext-2", shared / "data/bert-base-uncased/vocab.txt"
    if not folder.is_dir() or not vocab.is_file():
        pytest.skip(f"no wikitext-2 or vocab.txt in {shared}")
    corpus = load_corpus(str(folder), str(vocab))
    assert corpus.tokenizer.get_vocab_size() == 30_522
    assert len(corpus.train.tokens) == 2_392_641
    assert corpus.train.bytes == (folder / "wiki.train.tokens").stat().st_size
    # The official count takes the end of each line as a word.
    lines = (folder / "wiki.train.tokens").read_text().count("\n")
    assert corpus.train.words + lines == 2_088_628


def test_wordpiece_lowers_and_splits_like_bert(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "play", "##ing", "cafe", ",", "!"]))
    tokenizer = load_tokenizer(str(tmp_path / "vocab.txt"))
    assert tokenizer.encode("Playing,  Café! zzz").tokens == ["play", "##ing", ",", "cafe", "!", "[UNK]"]


def test_a_saved_tokenizer_is_the_same_tokenizer(text_file, text, cache):
    corpus = load_corpus(str(text_file), "bpe:300")
    saved = next((cache / "tokenizers").rglob("tokenizer.json"))
    for spec in (str(saved), str(saved.parent)):
        assert load_corpus(str(text_file), spec).key == corpus.key


@pytest.mark.parametrize("blocks, batch", [(10, 4), (3, 8), (7, 7)])
def test_blocks_come_without_replacement_wherever_one_starts(blocks, batch):
    order = BlockOrder(blocks, seed=3)
    stream = np.concatenate([order.at(index * batch, batch) for index in range(6 * blocks)])
    for epoch in range(5):
        assert sorted(stream[epoch * blocks : (epoch + 1) * blocks]) == list(range(blocks))
    assert len({tuple(stream[epoch * blocks : (epoch + 1) * blocks]) for epoch in range(5)}) > 1
    for start in (0, 1, blocks - 1, 2 * blocks + 1):
        assert np.array_equal(BlockOrder(blocks, seed=3).at(start, batch), stream[start : start + batch])
    assert not np.array_equal(BlockOrder(blocks, seed=4).at(0, 3 * blocks), stream[: 3 * blocks])


def test_targets_are_the_next_tokens():
    inputs, targets = block_batch(np.arange(100, dtype=np.uint16), np.array([2, 0]), 8)
    assert inputs.tolist() == [list(range(16, 24)), list(range(8))]
    assert (targets == inputs + 1).all()


def test_padding_and_truncation_that_a_tokenizer_file_asks_for_are_left_out(tmp_path, text_file, text):
    tokenizer = train_bpe(text, 280)
    tokenizer.save(str(tmp_path / "plain.json"))
    tokenizer.enable_padding(length=64, pad_token="!")
    tokenizer.enable_truncation(8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found, plain = (load_corpus(str(text_file), str(tmp_path / name)) for name in ("tokenizer.json", "plain.json"))
    assert found.key == plain.key and np.array_equal(found.train.tokens, plain.train.tokens)


def test_lines_of_a_vocabulary_are_its_ids(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes("\ufeff[PAD]\r\n[UNK]\r\n\u2028\r\n\x85\r\nplay\r\n".encode())
    tokenizer = load_tokenizer(str(path))
    assert [tokenizer.token_to_id(word) for word in ("[PAD]", "[UNK]", "play")] == [0, 1, 4]
    path.write_text("[UNK]\nplay\nplay\n")
    with pytest.raises(ValueError, match=r"vocab.txt: 'play' is on lines 2 and 3"):
        load_tokenizer(str(path))
    path.write_bytes(b"[UNK]\n\xff\n")
    with pytest.raises(ValueError, match=r"vocab.txt: not UTF-8 text"):
        load_tokenizer(str(path))


def test_ids_that_leave_some_out_are_named(tmp_path, text_file):
    library = pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    library.Tokenizer(library.models.WordLevel({"a": 0, "b": 2}, "a")).save(str(path))
    with pytest.raises(ValueError, match=r"tokenizer.json: it has 2 tokens, but one of them is number 2"):
        load_corpus(str(text_file), str(path))


def test_a_prompt_is_tokenised_as_the_training_text():
    # Its tokens go beyond the ends of lines.
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE({"a": 0, "\n": 1, "\na": 2}, [("\n", "a")]))
    prompts = []

    class Model(torch.nn.Linear):
        def generate_stream(self, ids, **choice):
            prompts.append(ids[0].tolist())
            return iter(())

    assert not list(generate_text(Model(1, 1), tokenizer, "a\na", tokens=1))
    assert prompts == [encode(tokenizer, "a\na").tolist()] == [[0, 1, 0]]


@pytest.mark.parametrize("rows", [[1, 2], [["a"], ["b"]]])
def test_a_column_of_no_text_is_named(tmp_path, rows):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"n": rows}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t.parquet: column 'n': row 0 is no text, but"):
        load_text(str(tmp_path / "t.parquet"), "n")


def test_files_of_a_split_share_no_line(tmp_path):
    contents = {"train-0": "a b", "train-1": "", "train-2": "c\n", "train-3": "d", "dev": "e", "test": "f"}
    for name, content in contents.items():
        (tmp_path / f"{name}.txt").write_text(content)
    assert load_text(str(tmp_path)) == {"train": "a b\nc\nd", "valid": "e", "test": "f"}


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_text("a b")
    (tmp_path / "more").mkdir()
    scandir = os.scandir

    def refusing(folder):
        if Path(folder).name == "more":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="more"):
        load_text(str(tmp_path))


def test_hidden_files_are_no_data(tmp_path):
    for name in ("train.txt", "dev.TXT", "test.txt", ".train.txt", ".ipynb_checkpoints/train-checkpoint.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert load_text(str(tmp_path)) == {"train": "train.txt", "valid": "dev.TXT", "test": "test.txt"}


def test_linked_folders_are_read_and_loops_are_not(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere" / "deep" / "a.txt").write_text("a")
    (tmp_path / "data" / "train").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to("..")
    (tmp_path / "elsewhere" / "back").symlink_to("../data")
    assert files_below(tmp_path / "data", {".txt"}) == [tmp_path / "data/train/deep/a.txt"]
