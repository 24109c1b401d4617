"""Writes the tables of README.md from benchmarks/results: `python benchmarks/tables.py` (`--check` only compares).

A table stands between `<!-- table:NAME -->` and `<!-- end -->`.
"""

import functools
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def read(name):
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def footnote(records):
    r = records[0]
    where = ", ".join(r["gpus"]) or f"{r['cpu']} ({r['cpu_capability']}), {r['threads']} threads"
    when = "".join(f", {name} {r[name]}" for name in ("date", "commit") if r.get(name))
    return f"{where}, {r['dtype']}, torch {r['torch']}{when}."


def kernel_table(name):
    """Rivals against settings: the time over ours, in each setting's last mode."""
    records = read(f"{name}.jsonl")
    settings = {r["setting"]: r["mode"] for r in records if "mode" in r}
    heads = [f"{setting}, {mode}" for setting, mode in settings.items()]
    lines = [f"| time / grassland | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for rival in dict.fromkeys(r["rival"] for r in records):
        own = [r for r in records if r["rival"] == rival]
        cells = [next((cell(r) for r in own if "error" in r or shown(r, *item)), "") for item in settings.items()]
        lines.append(f"| {rival} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", footnote(records)])


def shown(record, setting, mode):
    return record["setting"] == setting and record["mode"] == mode


def cell(record):
    if "error" in record:
        return f"not run: {record['error']}"
    return f"{record['ms']:.1f} ms" if record["rival"] == "grassland" else f"{record['ratio']:.2f}"


def lm_table(name):
    """One line a training run, from the metrics.jsonl files that were copied to results/NAME."""
    runs = [summary(path) for path in sorted((RESULTS / name).glob("*.jsonl"))]
    lines = [
        "| model | parameters | steps | valid ppl | test ppl | test word ppl | test bits per byte | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        quality = f"{r['valid_perplexity']:.1f} | {r['test_perplexity']:.1f} | {r['word_perplexity']:.0f}"
        cost = f"{r['bits_per_byte']:.3f} | {r['tokens_per_s']:.0f}"
        lines.append(f"| {r['model']} | {r['parameters']:,} | {r['steps']} | {quality} | {cost} |")
    return "\n".join([*lines, "", footnote(runs)])


def vision_table(name):
    """One line a training run of an image model."""
    runs = [vision_summary(path) for path in sorted((RESULTS / name).glob("*.jsonl"))]
    lines = [
        "| head | parameters | epochs | valid top-1 | test top-1 | test top-5 | test ECE |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        quality = " | ".join(f"{100 * r[key]:.1f} %" for key in ("valid_top1", "top1", "top5"))
        lines.append(f"| {r['head']} | {r['parameters']:,} | {r['epochs']:g} | {quality} | {r['ece']:.3f} |")
    return "\n".join([*lines, "", footnote(runs)])


def about(path):
    """The events of a run, and what a table's footnote says of it."""
    events = read(path)
    start = next(e for e in events if e["event"] == "start")
    facts = {"torch": start["versions"]["torch"], "date": start.get("date"), "commit": start.get("commit")}
    return events, start, {**start["machine"], **facts, "dtype": start["config"]["dtype"]}


def summary(path):
    """What a table says of a language model's run: its settings, its results, and the median of its throughput."""
    events, start, facts = about(path)
    test = next(e for e in events if e["event"] == "test")
    return facts | {
        "model": start["config"]["model"],
        "steps": start["config"]["steps"],
        "parameters": start["parameters"],
        "valid_perplexity": min(e["perplexity"] for e in events if e["event"] == "valid"),
        "test_perplexity": test["perplexity"],
        "word_perplexity": test["word_perplexity"],
        "bits_per_byte": test["bits_per_byte"],
        "tokens_per_s": statistics.median(e["tokens_per_s"] for e in events if e["event"] == "train"),
    }


def vision_summary(path):
    """The same for an image model."""
    events, start, facts = about(path)
    config, test = start["config"], next(e for e in events if e["event"] == "test")
    head = f"Grassmann, k = {config['subspace_dim']}" if config["head"] == "grassmann" else config["head"]
    return facts | {
        "head": head,
        "epochs": config["epochs"],
        "parameters": start["parameters"],
        "valid_top1": max(e["top1"] for e in events if e["event"] == "valid"),
        **{key: test[key] for key in ("top1", "top5", "ece")},
    }


def support_table():
    """Ops against backends: how far the tests of each have got, from what `pytest --support FILE` wrote."""
    records = [r for path in sorted(RESULTS.glob("support-*.jsonl")) for r in read(path.name)]
    ops = list(dict.fromkeys(r["op"] for r in records))
    lines = [f"| op | {' | '.join(BACKENDS.values())} |", "|---|" + "---|" * len(BACKENDS)]
    for op in ops:
        cells = [support_cell([r for r in records if (r["op"], r["backend"]) == (op, name)]) for name in BACKENDS]
        lines.append(f"| `{op}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *dict.fromkeys(map(tested_on, records))])


def tested_on(record):
    where = ", ".join(record["gpus"]) or f"{record['cpu']} ({record['cpu_capability']})"
    what = ", ".join(f"{name} {record[name]}" for name in ("torch", "triton", "date", "commit"))
    return f"{where}, {what}."


def support_cell(records):
    """One state for all dtypes that share it: "tested (float32, bfloat16)"."""
    states = {}
    for dtype in dict.fromkeys(r["dtype"] for r in records):
        states.setdefault(support_state([r for r in records if r["dtype"] == dtype]), []).append(dtype)
    return "; ".join(f"{state} ({', '.join(dtypes)})" for state, dtypes in states.items()) or "none"


def support_state(records):
    """The furthest that one op, backend and dtype has got; a failure counts over everything."""
    if any(r["failed"] for r in records):
        return "failed"
    done = {r["how"] for r in records}
    return "tested" if "run" in done else "compiled, not yet run" if "compiled" in done else "interpreted, not yet run"


BACKENDS = {"eager": "eager", "cpp": "C++ on CPU", "triton": "Triton", "cuda": "CUDA C++"}
OPS = ("plucker", "kronecker", "subspace", "moe")
TABLES = {op: functools.partial(kernel_table, f"{op}-cpu-float32") for op in OPS}
TABLES |= {
    "support": support_table,
    "lm": functools.partial(lm_table, "wikitext-2"),
    "vision": functools.partial(vision_table, "cifar-10"),
}


def render(text):
    def fill(match):
        return f"<!-- table:{match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table:(\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    page = ROOT / "README.md"
    fresh = render(page.read_text())
    if "--check" in sys.argv:
        sys.exit(0 if fresh == page.read_text() else "README.md: its tables differ from benchmarks/results")
    page.write_text(fresh)
