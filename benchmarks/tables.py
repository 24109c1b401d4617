"""Writes the tables of README.md and benchmarks/README.md from benchmarks/results: `python benchmarks/tables.py`
(`--check` only compares).

A table stands between `<!-- table:NAME -->` and `<!-- end -->`.
"""

import functools
import itertools
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


def kernel_files(pattern):
    """What benchmarks of kernels wrote: kernels/MACHINE/OP-DEVICE-DTYPE[-scaling].jsonl, in the machines' order."""
    return [path.relative_to(RESULTS).as_posix() for path in sorted(RESULTS.glob(f"kernels/*/{pattern}.jsonl"))]


def kernel_table(op):
    """Rivals against settings, in each setting's last mode: the time over ours, on one machine after the other."""
    machines = [read(name) for name in kernel_files(f"{op}-cpu-float32")]
    if not machines:
        return NONE
    settings = {r["setting"]: r["mode"] for r in machines[0] if "mode" in r}
    title = " · ".join(processor(records[0]) for records in machines)
    heads = [f"{setting}, {mode}" for setting, mode in settings.items()]
    lines = [f"| time / grassland on {title} | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    timed, notes = taking_part([r for records in machines for r in records])
    for rival in timed:
        cells = [of_rival(machines, rival, *item) for item in settings.items()]
        lines.append(f"| {rival} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", " ".join([*notes, *map(footnote, machines)])])


def taking_part(records):
    """The rivals that have a row, and sentences about those that ran nowhere, for one and the same reason."""
    timed, absent = [], {}
    for rival in dict.fromkeys(r["rival"] for r in records):
        reasons = {r.get("error") for r in records if r["rival"] == rival}
        if len(reasons) == 1 and None not in reasons:
            absent.setdefault(reasons.pop(), []).append(rival)
        else:
            timed.append(rival)
    return timed, [f"Not run: {', '.join(rivals)} ({why})." for why, rivals in absent.items()]


def headline_table():
    """An op a row: our time on the first machine, and over ours, on all, that of the closest rival and of what else one
    would take."""
    files = {name: read(name) for name in kernel_files("*-cpu-float32")}
    folders = {Path(name).parent: records[0] for name, records in files.items()}
    if not files:
        return NONE
    heads = ["forward + backward, or a step", f"grassland on {processor(next(iter(folders.values())))}"]
    heads += ["closest rival that computes the same", "best-known alternative"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, (op, setting, mode, same, other) in HEADLINE.items():
        machines = [files.get((folder / f"{op}-cpu-float32.jsonl").as_posix(), []) for folder in folders]
        near, known = (closest(machines, rivals, setting, mode) for rivals in (same, (other,)))
        if not near and not known:
            continue
        ours = cell([r for r in machines[0] if r["rival"] == "grassland"], setting, mode)
        lines.append(f"| {name}, {setting} | {ours or '–'} | {near} | {known} |")
    origin = "; ".join(map(hardware, folders.values()))
    return "\n".join([*lines, "", f"Times of rivals over grassland's, float32, the least and the most on: {origin}."])


def closest(machines, rivals, setting, mode):
    """The fastest of some rivals on each machine: their names, and the least and the most of their times over ours."""
    found = []
    for records in machines:
        timed = [r for r in records if (r["setting"], r.get("mode")) == (setting, mode) and r["rival"] in rivals]
        found += [min(timed, key=lambda r: r["ratio"])] if timed else []
    if not found:
        return ""
    ratios = sorted(r["ratio"] for r in found)
    names = " or ".join(dict.fromkeys(r["rival"] for r in found))
    return f"{names}: {' to '.join(dict.fromkeys(f'{ratio:.2f}' for ratio in (ratios[0], ratios[-1])))}"


def of_rival(machines, rival, setting, mode):
    """One rival's cells, machine by machine."""
    return joined([cell([r for r in records if r["rival"] == rival], setting, mode) for records in machines])


def joined(cells):
    """What the machines say, or nothing where none says anything."""
    return " · ".join(cell or "–" for cell in cells) if any(cells) else ""


def processor(record):
    """A processor's name without what every one of them has."""
    return re.sub(r"\((R|TM)\)| Processor", "", record["cpu"])


def cell(records, setting, mode):
    """Of one rival on one machine; empty for a setting that it is not for."""
    found = next((r for r in records if r["setting"] == setting and ("error" in r or r["mode"] == mode)), None)
    if found is None:
        return ""
    if "error" in found:
        return f"not run: {found['error']}"
    return figure_of(found)


def figure_of(record):
    """Our time, or that of a rival over it."""
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
    parts = []
    for op, dtype in itertools.product(OPS, ("float32", "bfloat16")):
        for name in kernel_files(f"{op}-{device}-{dtype}"):
            records = read(name)
            where = hardware(records[0]) if on_gpu(records[0]) else processor(records[0])
            parts.append(folded(f"{op}, {dtype}, {where}", f"{kernel_details(records)}{picture(name)}"))
    return "\n\n".join(parts) or NONE


def folded(title, text):
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def picture(name):
    path = Path(name).with_suffix(".png")
    return f"\n\n![{path.stem}](results/{path.as_posix()})" if (RESULTS / path).exists() else ""


def kernel_details(records):
    """Every rival in every setting and mode."""
    gpu = any("graph" in r for r in records)
    heads = ["setting", "mode", "rival", "ms", "time / grassland", "GFLOP/s", "saved MB", "peak MB"]
    heads += ["launched in ms"] if gpu else []
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in records:
        if "error" in r:
            cells = [r["setting"], "", r["rival"], f"not run: {r['error']}"]
            lines.append(f"| {' | '.join(cells + [''] * (len(heads) - len(cells)))} |")
            continue
        saved, peak = (f"{r[key] / 1e6:.1f}" if r.get(key) else "" for key in ("saved_bytes", "peak_bytes"))
        cells = [r["setting"], r["mode"], r["rival"], milliseconds(r), f"{r['ratio']:.2f}", f"{r['gflops']:.1f}"]
        cells += [saved, peak] + ([f"{r['host_ms']:.2f}" if "host_ms" in r else ""] if gpu else [])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", footnote(records)])


def device_table():
    """A GPU's own time for a call of ours, the rates it comes to, and what launching takes from Python."""
    names = [name for op in OPS for name in kernel_files(f"{op}-cuda-{GPU_DTYPES[op]}")]
    records = [r for name in names for r in read(name)]
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
    return "\n".join([*lines, "", " ".join(dict.fromkeys(footnote([r]) for r in ours))])


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


def decode_tables():
    """The next token after contexts of several lengths, a table a machine: benchmarks/decode.py."""
    return "\n\n".join(decode_table(read(path.name)) for path in sorted(RESULTS.glob("decode-*.jsonl"))) or NONE


def decode_table(records):
    places = list(dict.fromkeys((r["batch"], r["context"]) for r in records))
    heads = [f"B{batch}, {context:,} tokens" for batch, context in places]
    lines = [f"| ms · MiB a row | {' | '.join(heads)} |", "|---" * (len(places) + 1) + "|"]
    for model in dict.fromkeys(r["model"] for r in records):
        found = {(r["batch"], r["context"]): r for r in records if r["model"] == model}
        cells = [f"{figure(found[at]['ms'])} · {figure(found[at]['bytes'] / at[0] / 2**20)}" for at in places]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    r = records[0]
    return "\n".join([*lines, "", f"{r['layers']} layers of width {r['dim']}. {footnote(records)}"])


def read_if_there(name):
    return read(name) if (RESULTS / name).exists() else []


def milliseconds(record):
    """Two decimals; three of what a GPU does, with a star where that could not be recorded as a graph."""
    if "graph" not in record:
        return f"{record['ms']:.2f}"
    return f"{record['ms']:.3f}" + ("" if record["graph"] else "*")


def scaling_tables():
    """Ours and every rival against the size that was varied, in milliseconds."""
    parts = []
    for op in OPS:
        for name in kernel_files(f"{op}-cpu-float32-scaling"):
            records = read(name)
            parts.append(folded(f"{op}, {processor(records[0])}", f"{scaling_table(records)}{picture(name)}"))
    return "\n\n".join(parts) or NONE


def scaling_table(records):
    modes = {r["setting"]: r["mode"] for r in records if "mode" in r}
    heads = [f"{setting}, {mode}" for setting, mode in modes.items()]
    lines = [f"| ms | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    timed, notes = taking_part(records)
    for rival in timed:
        own = {r["setting"]: r for r in records if r["rival"] == rival and r.get("mode") == modes.get(r["setting"])}
        cells = [f"{own[s]['ms']:.2f}" if s in own else reason(records, rival, s) for s in modes]
        lines.append(f"| {rival} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", " ".join([*notes, footnote(records)])])


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
    """One row an arm: size, test metric, difference to the first arm, what else is told of the test."""
    parts = []
    for records in comparisons(preset).values():
        rows = report.arm_rows(records)
        if further := report.further_rows(records):
            rows = [[*row, *more[1:]] for row, more in zip(rows, further, strict=True)]
        kept = [place for place, head in enumerate(rows[0]) if head.startswith(SUMMARY)]
        heads, *cells = [[row[place] for place in kept] for row in rows]
        chosen = [record for record in done(records) if record["chosen"]]
        seeds = len({record["seed"] for record in chosen})
        size = f"{report.distinct(chosen, 'steps')} steps, {seeds} seed{'' if seeds == 1 else 's'}"
        # When and of which code is in the full table.
        origin = re.sub(r"(, [\d-]+, commit [\w+]+)+\.$", ".", report.footnote(chosen))
        parts.append(f"**{records[0]['title']}**, {size}\n\n{report.markdown(heads, cells)}\n\n{origin}")
    return "\n\n".join(parts) or NONE


def profile_tables():
    """Milliseconds of a training step by part, forward + backward, a table a machine."""
    return "\n\n".join(profile_table(read(path.name)) for path in sorted(RESULTS.glob("profile-*.jsonl"))) or NONE


def profile_table(records):
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
    names = [name for op in OPS for name in kernel_files(f"{op}-cuda-*")]
    found = {name: {r["rival"] for r in read(name)} for name in names}
    return [name for name, rivals in found.items() if rivals and all(r.startswith("grassland") for r in rivals)]


def lacking(plan, records):
    """A comparison's name if it has not been run, with the arms and learning rates that a narrower one has left out."""
    if not records:
        return plan.name
    arms, tried = report.by(records, "arm"), {r["lr"] for r in done(records)}
    rest = [arm for arm in plan.arms if not report.is_complete(arms.get(arm, ()))]
    rest += [f"lr {lr:g}" for lr in plan.lrs if lr not in tried]
    return f"{plan.name} ({', '.join(rest)})" if rest else ""


def missing():
    """What the project set out to measure and has not, found by looking for its files."""
    wanted = {
        "kernels on a GPU": [f"{op}-cuda-{dtype}" for op in OPS for dtype in ("float32", "bfloat16")],
        "kernels on a CPU in bfloat16": [f"{op}-cpu-bfloat16" for op in OPS],
        "kernels against sequence length, streams, experts and classes": [f"{op}-cpu-float32-scaling" for op in OPS],
        "profile of a training step on a GPU": ["profile-cuda"],
        "decoding and the host's time on a GPU": ["decode-cuda", "host-cuda"],
    }
    lines = []
    for what, files in wanted.items():
        absent = [name for name in files if not (kernel_files(name) or (RESULTS / f"{name}.jsonl").exists())]
        if absent:
            lines.append(f"- {what}{'' if len(absent) == len(files) else ': ' + ', '.join(absent)}")
    for name in FULL:
        plans, found = PRESETS[name](), comparisons(name)
        absent = [text for plan in plans if (text := lacking(plan, found.get(plan.name, ())))]
        if absent:
            whole = absent == [plan.name for plan in plans]
            lines.append(f"- comparison `{name}` in full{'' if whole else ': ' + ', '.join(absent)}")
    if alone := without_rivals():
        lines.insert(0, f"- rivals of the kernels on a GPU: {', '.join(alone)}")
    text = "Not run, or run and not kept here:\n\n" + "\n".join(lines) if lines else "Everything has been run."
    gpu = any(RESULTS.rglob("*-cuda*.jsonl"))
    return text if gpu else f"Nothing on this page was measured on a GPU: none has been at hand.\n\n{text}"


SMALL = ("wikitext2-cpu", "cifar10-cpu", "smoke")
FULL = [name for name in PRESETS if name not in SMALL]
SUMMARY = ("arm", "parameters", "test", "p (Holm)")
BACKENDS = {"eager": "eager", "cpp": "C++ on CPU", "triton": "Triton", "cuda": "CUDA C++"}
OPS = ("plucker", "kronecker", "subspace", "moe", "cross_entropy")
HEADLINE = {  # op, setting, mode, rivals that compute the same, what else one would take
    "Grassmann mixer": (
        "plucker",
        "B8 L256",
        "forward+backward",
        ("literal eager", "collapsed eager", "torch.compile, collapsed"),
        "causal SDPA sublayer",
    ),
    "KromHC sublayer": (
        "kronecker",
        "2x1024 C768",
        "forward+backward",
        ("official KromHC, eager", "official KromHC, torch.compile"),
        "mHC, torch.compile",
    ),
    "class head and loss": (
        "subspace",
        "head n=2048",
        "forward+backward",
        ("composed eager", "torch.compile, composed head"),
        "linear head",
    ),
    "its Riemannian step": (
        "subspace",
        "step n=2048",
        "step",
        ("composed eager", "torch.compile, composed step", "official SVD geodesic"),
        "momentum SGD, torch fused",
    ),
    "mixture of experts": (
        "moe",
        "T788 E4",
        "forward+backward",
        (
            "eager loop, separate experts",
            "eager loop, stacked experts",
            "F.grouped_mm",
            "F.grouped_mm + torch.compile",
            "padded baddbmm",
            "padded baddbmm + torch.compile",
            "one-hot einsum",
        ),
        "dense FFN, equal FLOPs",
    ),
    "language model's loss": (
        "cross_entropy",
        "T1024 V30522 C256",
        "forward+backward",
        ("whole logits, eager", "whole logits, torch.compile", "chunks, eager", "F.linear_cross_entropy, 512 rows"),
        "whole logits, eager",
    ),
}
TABLES = {op: functools.partial(kernel_table, op) for op in OPS}
# Weights and steps on a manifold are float32 in training.
GPU_DTYPES = {op: "float32" if op == "subspace" else "bfloat16" for op in OPS}
TABLES |= {
    "headline": headline_table,
    "support": support_table,
    "text": functools.partial(compare_summary, "wikitext2-cpu"),
    "images": functools.partial(compare_summary, "cifar10-cpu"),
    "paper": functools.partial(compare_summary, "wikitext2-paper"),
    "kernels_cpu": functools.partial(kernel_tables, "cpu"),
    "kernels_gpu": functools.partial(kernel_tables, "cuda"),
    "device": device_table,
    "training": training_table,
    "host": host_tables,
    "decode": decode_tables,
    "scaling": scaling_tables,
    "profile": profile_tables,
    "compare_full": functools.partial(compare_tables, *FULL),
    **{f"compare_{name.replace('-', '_')}": functools.partial(compare_tables, name) for name in SMALL},
    "missing": missing,
}
PAGES = ("README.md", "benchmarks/README.md")


PLACE = re.compile(r"<!-- table:(\w+) -->\n.*?<!-- end -->", flags=re.DOTALL)


def render(text):
    def fill(match):
        return f"<!-- table:{match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return PLACE.sub(fill, text)


def unplaced(texts):
    """The tables that have lost their place on the pages, where nobody would write or compare them."""
    placed = {match[1] for text in texts for match in PLACE.finditer(text)}
    return [name for name in TABLES if name not in placed]


if __name__ == "__main__":
    stale = [f"table {name} is on no page" for name in unplaced((ROOT / name).read_text() for name in PAGES)]
    for page in (ROOT / name for name in PAGES):
        before = page.read_text()
        fresh = render(before)
        if "--check" in sys.argv and fresh != before:
            stale.append(f"{page.relative_to(ROOT)}: its tables differ from benchmarks/results")
        elif fresh != before:
            page.write_text(fresh)
    sys.exit("\n".join(stale) or 0)
