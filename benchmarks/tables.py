"""Writes the tables of README.md and benchmarks/README.md from benchmarks/results: `python benchmarks/tables.py`
(`--check` only compares).

A table stands between `<!-- table:NAME -->` and `<!-- end -->`.
"""

import functools
import json
import re
import sys
from pathlib import Path

from grassland.train.compare import report
from grassland.train.compare.presets import PRESETS
from grassland.train.compare.results import done
from grassland.train.env import hardware, on_gpu

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NONE = "None has been run."


def read(name):
    """The records of a file; its name says on which device, where they do not."""
    device = "cpu" if "-cpu" in name else "cuda"
    return [{"device": device, **json.loads(line)} for line in (RESULTS / name).read_text().splitlines()]


def footnote(records):
    r = records[0]
    when = "".join(f", {name} {r[name]}" for name in ("date", "commit") if r.get(name))
    return f"{hardware(r)}, {r['dtype']}, torch {r['torch']}{when}."


def kernel_table(name):
    """Rivals against settings: the time over ours, in each setting's last mode."""
    records = read(f"{name}.jsonl")
    settings = {r["setting"]: r["mode"] for r in records if "mode" in r}
    heads = [f"{setting}, {mode}" for setting, mode in settings.items()]
    lines = [f"| time / grassland | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    absent = {}
    for rival in dict.fromkeys(r["rival"] for r in records):
        own = [r for r in records if r["rival"] == rival]
        if len(reasons := {r.get("error") for r in own}) == 1 and None not in reasons:
            absent.setdefault(reasons.pop(), []).append(rival)
            continue
        cells = [next((cell(r) for r in own if shown(r, *item)), "") for item in settings.items()]
        lines.append(f"| {rival} | {' | '.join(cells)} |")
    notes = [f"Not run: {', '.join(rivals)} ({why})." for why, rivals in absent.items()]
    return "\n".join([*lines, "", " ".join([*notes, footnote(records)])])


def shown(record, setting, mode):
    return record["setting"] == setting and ("error" in record or record["mode"] == mode)


def cell(record):
    if "error" in record:
        return f"not run: {record['error']}"
    return f"{figure(record['ms'])} ms" if record["rival"] == "grassland" else f"{record['ratio']:.2f}"


def figure(number):
    """One decimal, or three digits of what is small."""
    return f"{number:.1f}" if number >= 10 else f"{number:.3g}"


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
    where = ", ".join(record["gpus"]) if on_gpu(record) else f"{record['cpu']} ({record['cpu_capability']})"
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


def kernel_tables(device):
    """All kernel benchmarks of one kind of device, a section a file; a sentence if there are none."""
    paths = [path for op in OPS for path in sorted(RESULTS.glob(f"{op}-*.jsonl")) if path.stem.split("-")[1] == device]
    plain = [path.stem for path in paths if not path.stem.endswith("-scaling")]
    parts = [f"#### {stem}\n\n{kernel_details(stem)}{picture(stem)}" for stem in plain]
    return "\n\n".join(parts) or NONE


def picture(stem):
    return f"\n\n![{stem}](results/{stem}.png)" if (RESULTS / f"{stem}.png").exists() else ""


def kernel_details(stem):
    """Every rival in every setting and mode."""
    records = read(f"{stem}.jsonl")
    gpu = any("graph" in r for r in records)
    heads = ["setting", "mode", "rival", "ms", "time / grassland", "GFLOP/s", "saved MB", "peak MB"]
    heads += ["launched in ms"] if gpu else []
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in records:
        if "error" in r:
            cells = [r["setting"], "", r["rival"], f"not run: {r['error']}"]
            lines.append(f"| {' | '.join(cells + [''] * (len(heads) - len(cells)))} |")
            continue
        saved, peak = (f"{r[key] / 1e6:.1f}" if key in r else "" for key in ("saved_bytes", "peak_bytes"))
        cells = [r["setting"], r["mode"], r["rival"], milliseconds(r), f"{r['ratio']:.2f}", f"{r['gflops']:.1f}"]
        cells += [saved, peak] + ([f"{r['host_ms']:.2f}" if "host_ms" in r else ""] if gpu else [])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", footnote(records)])


def device_table():
    """A GPU's own time for a call of ours, the rates it comes to, and what launching takes from Python."""
    records = [r for op in OPS for r in read_if_there(f"{op}-cuda-{GPU_DTYPES[op]}.jsonl")]
    ours = [r for r in records if r["rival"].startswith("grassland") and "ms" in r]
    if not ours:
        return NONE
    lines = ["| op | setting | mode | | ms | TFLOP/s | GB/s | launched in ms |", "|---" * 8 + "|"]
    for r in ours:
        which = r["rival"].removeprefix("grassland").removeprefix(", ")
        rates = f"{r['gflops'] / 1e3:.0f} | {r['gbytes']:,.0f}"
        lines.append(
            f"| {r['bench']} | {r['setting']} | {r['mode']} | {which} | {figure(r['ms'])} | {rates} | "
            f"{figure(r['host_ms'])} |"
        )
    return "\n".join([*lines, "", footnote(ours)])


def training_table():
    """Steps of language models on a GPU: launched one kernel at a time, recorded as CUDA graphs, compiled."""
    records = read_if_there("training-cuda.jsonl")
    if not records:
        return NONE
    first = records[0]
    heads = ["model", *(f"`{rate['how']}`" if rate["how"] else "tokens/s" for rate in first["rates"])]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in records:
        lines.append(f"| {r['model']} | {' | '.join(format(rate['tokens_per_s'], ',.0f') for rate in r['rates'])} |")
    commits = ", ".join(f"{rate['date']} commit {rate['commit']}" for rate in first["rates"])
    sizes = f"Batches of {first['batch_size']} × {first['seq_len']} tokens."
    return "\n".join([*lines, "", f"{sizes} The code differs, too: {commits}. {footnote(records)}"])


def host_tables():
    """Microseconds of the host for a layer with next to nothing to compute, a table a machine: benchmarks/host.py."""
    return "\n\n".join(host_table(read(path.name)) for path in sorted(RESULTS.glob("host-*.jsonl"))) or NONE


def host_table(records):
    modes = list(records[0]["microseconds"])
    lines = [f"| µs | {' | '.join(modes)} |", "|---" * (len(modes) + 1) + "|"]
    for r in records:
        cells = [figure(r["microseconds"][mode]) for mode in modes]
        lines.append(f"| {r['slot']}: {r['layer']} | {' | '.join(cells)} |")
    size = " × ".join(map(str, records[0]["shape"]))
    return "\n".join([*lines, "", f"Inputs of {size} numbers. {footnote(records)}"])


def read_if_there(name):
    return read(name) if (RESULTS / name).exists() else []


def milliseconds(record):
    """Two decimals; three of what a GPU does, with a star where that could not be recorded as a graph."""
    if "graph" not in record:
        return f"{record['ms']:.2f}"
    return f"{record['ms']:.3f}" + ("" if record["graph"] else "*")


def scaling_tables():
    """Ours and every rival against the size that was varied, in milliseconds."""
    stems = [path.stem for path in sorted(RESULTS.glob("*-scaling.jsonl"))]
    parts = [f"#### {stem}\n\n{scaling_table(stem)}\n\n![{stem}](results/{stem}.png)" for stem in stems]
    return "\n\n".join(parts) or NONE


def scaling_table(stem):
    records = read(f"{stem}.jsonl")
    modes = {r["setting"]: r["mode"] for r in records if "mode" in r}
    heads = [f"{setting}, {mode}" for setting, mode in modes.items()]
    lines = [f"| ms | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for rival in dict.fromkeys(r["rival"] for r in records):
        own = {r["setting"]: r for r in records if r["rival"] == rival and r.get("mode") == modes.get(r["setting"])}
        cells = [f"{own[s]['ms']:.2f}" if s in own else reason(records, rival, s) for s in modes]
        lines.append(f"| {rival} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", footnote(records)])


def reason(records, rival, setting):
    """Why a rival has no time in a setting."""
    found = (r["error"] for r in records if "error" in r and (r["rival"], r["setting"]) == (rival, setting))
    return next((f"not run: {error}" for error in found), "")


def comparisons(preset):
    """The records of a preset of `train compare` by comparison, if its report.jsonl lies in results/compare."""
    path = RESULTS / "compare" / preset / report.FILE
    return report.by(report.read_records(path), "comparison") if path.exists() else {}


def compare_tables(*presets):
    """Everything that is known of the comparisons of some presets."""
    parts = []
    for preset in presets:
        for name, records in comparisons(preset).items():
            picture = f"![{name}](results/compare/{preset}/{name}.png)"
            parts.append(f"#### {records[0]['title']}\n\n{report.section(records)}\n\n{picture}")
    return "\n\n".join(parts) or NONE


def compare_summary(preset):
    """One row an arm: size, test metric, difference to the first arm."""
    parts, finished = [], []
    for records in comparisons(preset).values():
        finished += done(records)
        rows = report.arm_rows(records)
        kept = [place for place, head in enumerate(rows[0]) if head.startswith(SUMMARY)]
        heads, *cells = [[row[place] for place in kept] for row in rows]
        first = done(records)[0]
        parts.append(f"**{records[0]['title']}**, {first['steps']} steps\n\n{report.markdown(heads, cells)}")
    return "\n\n".join([*parts, report.footnote(finished)]) if parts else NONE


def profile_table():
    """Milliseconds of a training step by part, forward + backward."""
    records = [r for path in sorted(RESULTS.glob("profile-*.jsonl")) for r in read(path.name)]
    if not records:
        return NONE
    heads = ("data", "embedding", "mixer", "residual", "ffn", "head", "optimiser")
    lines = [f"| ms | {' | '.join(heads)} | step |", "|---|" + "---|" * (len(heads) + 1)]
    for r in records:
        cells = [profile_cell(r["seconds"], part) for part in heads]
        lines.append(f"| {r['model']} | {' | '.join(cells)} | {1e3 * sum(r['seconds'].values()):.0f} |")
    return "\n".join([*lines, "", f"Batches of {records[0]['batch_size']}. {footnote(records)}"])


def profile_cell(seconds, part):
    found = [seconds[key] for key in (part, f"{part} forward", f"{part} backward") if key in seconds]
    return " + ".join(f"{1e3 * value:.1f}" for value in found)


def without_rivals():
    """The benchmarks on a GPU that have figures of ours alone."""
    found = {path.name: {r["rival"] for r in read(path.name)} for path in sorted(RESULTS.glob("*-cuda-*.jsonl"))}
    return [name for name, rivals in found.items() if rivals and all(r.startswith("grassland") for r in rivals)]


def missing():
    """What the project set out to measure and has not, found by looking for its files."""
    wanted = {
        "kernels on a GPU": [f"{op}-cuda-{dtype}.jsonl" for op in OPS for dtype in ("float32", "bfloat16")],
        "kernels on a CPU in bfloat16": [f"{op}-cpu-bfloat16.jsonl" for op in OPS],
        "kernels against sequence length, streams, experts and classes": [
            f"{op}-cpu-float32-scaling.jsonl" for op in OPS
        ],
        "profile of a training step on a GPU": ["profile-cuda.jsonl"],
    }
    lines = []
    for what, files in wanted.items():
        absent = [name for name in files if not (RESULTS / name).exists()]
        if absent:
            lines.append(f"- {what}{'' if len(absent) == len(files) else ': ' + ', '.join(absent)}")
    for name in FULL:
        wanted_parts = [plan.name for plan in PRESETS[name]()]
        absent = [part for part in wanted_parts if part not in comparisons(name)]
        if absent:
            parts = "" if len(absent) == len(wanted_parts) else ": " + ", ".join(absent)
            lines.append(f"- comparison `{name}` in full{parts}")
    if alone := without_rivals():
        lines.insert(0, f"- rivals of the kernels on a GPU: {', '.join(alone)}")
    text = "Not run, or run and not kept here:\n\n" + "\n".join(lines) if lines else "Everything has been run."
    gpu = any(RESULTS.glob("*-cuda*.jsonl"))
    return text if gpu else f"Nothing on this page was measured on a GPU: none has been at hand.\n\n{text}"


SMALL = ("wikitext2-cpu", "cifar10-cpu", "smoke")
FULL = [name for name in PRESETS if name not in SMALL]
SUMMARY = ("arm", "parameters", "test", "p (Holm)")
BACKENDS = {"eager": "eager", "cpp": "C++ on CPU", "triton": "Triton", "cuda": "CUDA C++"}
OPS = ("plucker", "kronecker", "subspace", "moe", "cross_entropy")
TABLES = {op: functools.partial(kernel_table, f"{op}-cpu-float32") for op in OPS}
# Weights and steps on a manifold are float32 in training.
GPU_DTYPES = {op: "float32" if op == "subspace" else "bfloat16" for op in OPS}
TABLES |= {
    "support": support_table,
    "text": functools.partial(compare_summary, "wikitext2-cpu"),
    "images": functools.partial(compare_summary, "cifar10-cpu"),
    "paper": functools.partial(compare_summary, "wikitext2-paper"),
    "kernels_cpu": functools.partial(kernel_tables, "cpu"),
    "kernels_gpu": functools.partial(kernel_tables, "cuda"),
    "device": device_table,
    "training": training_table,
    "host": host_tables,
    "scaling": scaling_tables,
    "profile": profile_table,
    "compare_full": functools.partial(compare_tables, *FULL),
    **{f"compare_{name.replace('-', '_')}": functools.partial(compare_tables, name) for name in SMALL},
    "missing": missing,
}
PAGES = ("README.md", "benchmarks/README.md")


def render(text):
    def fill(match):
        return f"<!-- table:{match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table:(\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    stale = []
    for page in (ROOT / name for name in PAGES):
        before = page.read_text()
        fresh = render(before)
        if "--check" in sys.argv and fresh != before:
            stale.append(f"{page.relative_to(ROOT)}: its tables differ from benchmarks/results")
        elif fresh != before:
            page.write_text(fresh)
    sys.exit("\n".join(stale) or 0)
