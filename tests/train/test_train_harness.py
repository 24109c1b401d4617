"""lm-eval on a run's folder: agreement with our own perplexities, local tasks, errors."""

import json
import math
import random
import sys
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from grassland.train.__main__ import main
from grassland.train.data import Split
from grassland.train.data.corpus import encode
from grassland.train.evaluate import evaluate_text
from grassland.train.harness import GrasslandLM, simple_evaluate
from grassland.train.sample import load_run
from grassland.train.start import run
from grassland.train.tasks import LanguageModeling


@pytest.fixture
def folder(variant, tmp_path):
    place = tmp_path / "run"
    assert run(LanguageModeling, variant(out=str(place), steps=2, samples=0)) == 0
    return place


def requests(kind, *arguments):
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]


def sum_log_p(model, context, continuation):
    ids = torch.tensor([[*context, *continuation]])
    log_p = model(ids[:, :-1]).double().log_softmax(-1)[0, -len(continuation) :]
    total = log_p.gather(-1, ids[0, -len(continuation) :, None]).sum().item()
    return total, log_p.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_rolling_likelihood_agrees_with_our_perplexity(folder, text, blocks):
    model, tokenizer = load_run(folder)
    seq_len = model.config.max_len
    tokens = encode(tokenizer, text)[: blocks * seq_len + 1]
    piece = tokenizer.decode(tokens.tolist())
    assert np.array_equal(encode(tokenizer, piece), tokens)
    ours = evaluate_text(model, Split(tokens, len(piece.split()), len(piece.encode())), seq_len, 3)
    lm = GrasslandLM(model, tokenizer, batch_size=2)
    (total,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (piece,)))
    assert -total / (len(tokens) - 1) == pytest.approx(ours["loss"], rel=1e-6)
    assert math.exp(-total / len(piece.split())) == pytest.approx(ours["word_perplexity"], rel=1e-5)


def test_a_last_window_that_is_not_full_has_more_context(folder, text):
    model, tokenizer = load_run(folder)
    tokens = encode(tokenizer, text)[:21].tolist()
    lm = GrasslandLM(model, tokenizer)
    piece = tokenizer.decode(tokens)
    (total,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (piece,)))
    first, rest = sum_log_p(model, tokens[:1], tokens[1:17])[0], sum_log_p(model, tokens[4:17], tokens[17:])[0]
    assert total == pytest.approx(first + rest, rel=1e-6)


def test_likelihoods_are_the_models_whatever_the_batch(folder):
    model, tokenizer = load_run(folder)
    pairs = [("the cat", " sees the moon"), ("a", " dog"), ("one more garden." * 3, " nothing at all.")]
    found = [
        GrasslandLM(model, tokenizer, batch_size=size).loglikelihood(requests("loglikelihood", *pairs))
        for size in (1, 3)
    ]
    for (context, continuation), alone, together in zip(pairs, *found, strict=True):
        after = encode(tokenizer, context).tolist()
        both = encode(tokenizer, context + continuation).tolist()
        tail = both[len(after) :]
        value, greedy = sum_log_p(model, after[-(model.config.max_len + 1 - len(tail)) :], tail)
        assert alone == (pytest.approx(value, rel=1e-5), greedy)
        assert together == (pytest.approx(value, rel=1e-5), greedy)


def test_the_greedy_continuation_is_recognised_and_generation_stops(folder):
    model, tokenizer = load_run(folder)
    lm = GrasslandLM(model, tokenizer)
    prompt = encode(tokenizer, "the cat sees").tolist()
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=6, temperature=0)[0].tolist()
    assert lm._loglikelihood_tokens([(None, prompt, ids[len(prompt) :])])[0][1]
    wrong = [*ids[len(prompt) : -1], (ids[-1] + 1) % 280]
    assert not lm._loglikelihood_tokens([(None, prompt, wrong)])[0][1]
    whole = tokenizer.decode(ids)[len("the cat sees") :]
    options = {"until": [], "max_gen_toks": 6}
    (text,) = lm.generate_until(requests("generate_until", ("the cat sees", options)))
    assert whole.startswith(text) and len(text) >= len(whole) - 1
    stop = text[2:4]
    (cut,) = lm.generate_until(requests("generate_until", ("the cat sees", {**options, "until": [stop, "@@"]})))
    assert cut == text[: text.find(stop)]
    sampled = {**options, "do_sample": True, "temperature": 5.0, "top_k": 50}
    texts = [lm.generate_until(requests("generate_until", ("the cat sees", sampled)))[0] for _ in range(2)]
    assert texts[0] == texts[1] != text
    assert not model.training


def test_a_prefix_conditions_the_first_token(folder):
    model, tokenizer = load_run(folder)
    lm = GrasslandLM(model, tokenizer, prefix="a")
    token = tokenizer.token_to_id("a")
    tokens = encode(tokenizer, "the moon").tolist()
    expected = sum_log_p(model, [token], tokens)[0]
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("the moon",)))[0] == pytest.approx(expected)
    assert lm.loglikelihood(requests("loglikelihood", ("", "the moon")))[0][0] == pytest.approx(expected)
    bare = GrasslandLM(model, tokenizer)
    assert bare.loglikelihood_rolling(requests("loglikelihood_rolling", ("",), ("t",))) == [0.0, 0.0]
    with pytest.raises(ValueError, match="a request has an empty context"):
        bare.loglikelihood(requests("loglikelihood", ("", "the moon")))


@pytest.fixture
def tasks(tmp_path):
    """Three tasks as lm-eval users write them: a YAML file and JSON lines."""
    place = tmp_path / "tasks"
    place.mkdir()
    draw = random.Random(0)
    words = ["the cat sees the moon.", "a dog likes a river.", "every bird draws three stones."]
    rows = [{"text": " ".join(draw.sample(words, 2)), "label": draw.randrange(2)} for _ in range(6)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = (
        "dataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {place / 'rows.jsonl'}\ntest_split: test\nmetadata:\n  version: 1.0\n"
    )
    bodies = {
        "local_ppl": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n",
        "local_choice": 'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_target: label\n'
        'doc_to_choice: [" the moon", " a river"]\nmetric_list:\n  - metric: acc\n',
        "local_generate": 'output_type: generate_until\ndoc_to_text: "{{text}}"\ndoc_to_target: "x"\n'
        'generation_kwargs:\n  until: ["."]\n  max_gen_toks: 4\nmetric_list:\n  - metric: exact_match\n',
    }
    for name, body in bodies.items():
        (place / f"{name}.yaml").write_text(f"task: {name}\n{shared}{body}")
    return place, rows


def test_the_command_evaluates_local_tasks(folder, tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    place, rows = tasks
    names = ["local_ppl", "local_choice", "local_generate"]
    command = ["eval", str(folder), "--tasks", *names, "--include-path", str(place), "--batch-size", "3"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    stored = json.loads((folder / "eval.json").read_text())["results"]
    assert set(stored) == set(names) and all(name in printed for name in names) and "word_perplexity" in printed
    model, tokenizer = load_run(folder)
    texts = [row["text"] for row in rows]
    totals = GrasslandLM(model, tokenizer).loglikelihood_rolling(
        requests("loglikelihood_rolling", *((text,) for text in texts))
    )
    words = sum(len(text.split()) for text in texts)
    assert stored["local_ppl"]["word_perplexity,none"] == pytest.approx(math.exp(-sum(totals) / words), rel=1e-5)
    hits = 0
    for row in rows:
        lm = GrasslandLM(model, tokenizer)
        pairs = [(row["text"], choice) for choice in (" the moon", " a river")]
        scores = [score for score, _ in lm.loglikelihood(requests("loglikelihood", *pairs))]
        hits += int(np.argmax(scores) == row["label"])
    assert stored["local_choice"]["acc,none"] == pytest.approx(hits / len(rows))


@pytest.fixture
def fail(capsys, folder):
    def failing(*arguments):
        assert main(["eval", *map(str, arguments)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: "), error
        return error

    return failing


def test_bad_settings_are_one_line(fail, folder, tasks, monkeypatch):
    # lm-eval's own thousands of tasks take long to read.
    monkeypatch.setattr("grassland.train.harness.TaskManager", partial(TaskManager, include_defaults=False))
    local = ("--include-path", tasks[0])
    assert "name at least one task" in fail(folder)
    assert "unknown task 'local_pp'; did you mean 'local_ppl'" in fail(folder, "--tasks", "local_pp", *local)
    assert "/nowhere: no such folder" in fail(folder, "--tasks", "x", "--include-path", "/nowhere")
    assert "/nowhere: no such folder" in fail("/nowhere", "--tasks", "local_ppl", *local)
    monkeypatch.setattr("grassland.train.harness.simple_evaluate", lambda *a, **k: pytest.fail("evaluated"))
    (folder / "file").touch()
    evaluation = (folder, "--tasks", "local_ppl", *local, "--out")
    assert f"{folder}: is a folder, not the file to write" in fail(*evaluation, folder)
    assert f"{folder / 'file'}: " in fail(*evaluation, folder / "file" / "x.json")
    monkeypatch.setattr("grassland.train.harness.simple_evaluate", simple_evaluate)
    assert "prefix '[CLS]' is not a token" in fail(folder, "--tasks", "local_ppl", *local, "--prefix", "[CLS]")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "grassland.train.harness")
    assert "lm-eval is not installed: pip install 'grassland[eval]'" in fail(folder, "--tasks", "local_ppl", *local)


def test_what_a_model_cannot_do_is_named(folder):
    model, tokenizer = load_run(folder)
    lm = GrasslandLM(model, tokenizer)
    with pytest.raises(ValueError, match="a continuation has 200 tokens, and must have at most max_len=16"):
        lm._loglikelihood_tokens([(None, [1], [2] * 200)])
    with pytest.raises(ValueError, match="generation options num_beams are not supported"):
        lm.generate_until(requests("generate_until", ("the cat", {"until": ["."], "num_beams": 3})))
    with pytest.raises(ValueError, match=r"max_len must be in \[2, 16\], got 17"):
        GrasslandLM(model, tokenizer, max_len=17)
