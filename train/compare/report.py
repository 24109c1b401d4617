"""The report of comparisons, made from their records alone: report.md, report.jsonl and a picture each."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..env import hardware, on_gpu
from ..log import nulls_as_nan, to_json
from .results import FURTHER, SHOWN, Record, done, shown_value
from .statistics import Difference, holm, paired, spread

FILE = "report.jsonl"


def write_report(records: Sequence[Record], out: Path) -> int:
    """Write the report into `out`; 1 if an arm lacks a result for one of the seeds, else 0.

    A learning rate of the grid at which an arm fails is named, but is not a failure of the arm.
    """
    from .figure import plot

    out.mkdir(parents=True, exist_ok=True)
    (out / FILE).write_text("".join(to_json(record) + "\n" for record in records))
    sections = []
    for name, part in by(records, "comparison").items():
        sections.append(f"## {part[0]['title']}\n\n{section(part)}\n")
        if plot(part, out / f"{name}.png"):
            sections.append(f"![{part[0]['title']}]({name}.png)\n")
    (out / "report.md").write_text("\n".join(["# Comparisons\n", *sections]))
    for record in records:
        if record["status"] != "done":
            print(f"without a result: {record['comparison']}/{record['arm']} lr {record['lr']:g} seed {record['seed']}")
    print(out / "report.md")
    arms = [arm for part in by(records, "comparison").values() for arm in by(part, "arm").values()]
    return 0 if all(is_complete(arm) for arm in arms) else 1


def is_complete(records: Sequence[Record]) -> bool:
    """Whether an arm has a learning rate, and a result for every seed that was run at it."""
    chosen = [record["status"] == "done" for record in records if record["chosen"]]
    return bool(chosen) and all(chosen)


def read_records(path: Path) -> list[Record]:
    """The records of a report.jsonl."""
    return [_restored(json.loads(line)) for line in path.read_text().splitlines()]


def _restored(record: Record) -> Record:
    """With NaN for metrics that were not finite."""
    record |= {split: nulls_as_nan(record[split]) for split in ("valid", "test") if split in record}
    if "curve" in record:
        record["curve"]["metric"] = [math.nan if value is None else value for value in record["curve"]["metric"]]
    return record


def section(records: Sequence[Record]) -> str:
    """Markdown of one comparison: note, table of arms, what else is told of them, grid of learning rates, what differs,
    what failed, footnote."""
    finished = done(records)
    note = [records[0]["note"]] if records[0]["note"] else []
    if not finished:
        return "\n\n".join([*note, *failures(records)])
    parts = [*note, arm_table(records), explanation(records), further_table(records), grid_table(records)]
    parts += [differing(records), *failures(records), footnote(finished)]
    return "\n\n".join(part for part in parts if part)


def arm_table(records: Sequence[Record]) -> str:
    """One row an arm, at its chosen learning rate, over the seeds."""
    heads, *rows = arm_rows(records)
    return markdown(heads, rows)


def arm_rows(records: Sequence[Record]) -> list[list[str]]:
    """The cells of `arm_table`, its heads first."""
    finished = done(records)
    unit, label = finished[0]["unit"], SHOWN[finished[0]["task"]].label
    heads = ["arm", "lr", "parameters", f"training FLOPs / {unit}", f"{unit}s/s", "peak memory"]
    heads += [f"valid {label}", f"test {label}", "test − first arm [95 %]", "p", "p (Holm)"]
    differences = {arm: difference(records, arm) for arm in by(records, "arm")}
    adjusted = dict(zip(differences, holm([d and d.p for d in differences.values()]), strict=True))
    return [heads, *(row(arm, part, differences[arm], adjusted[arm]) for arm, part in by(records, "arm").items())]


def row(arm: str, records: Sequence[Record], gap: Difference | None, adjusted: float | None) -> list[str]:
    runs = [record for record in records if record["chosen"]]
    chosen = done(runs)
    if len(chosen) < len(runs):
        arm += f" ({len(chosen)} of {len(runs)} seeds)"
    if not chosen:
        return [arm, "no run finished", *[""] * 9]
    first = chosen[0]
    rates = [rate for record in chosen if (rate := record.get("alone", record)["units_per_s"]) is not None]
    cells = [arm, f"{first['lr']:g}{'*' if first['edge'] else ''}", f"{first['parameters']:,}"]
    cells += [f"{first['flops_per_unit']:.3g}", f"{statistics.median(rates):,.0f}" if rates else ""]
    cells += [f"{max(record['peak_bytes'] for record in chosen) / 2**20:,.0f} MiB"]
    cells += [mean_text(values(chosen, split), SHOWN[first["task"]].form) for split in ("valid", "test")]
    return [*cells, gap_text(gap, first["task"]), p_text(gap and gap.p), p_text(adjusted)]


def further_table(records: Sequence[Record]) -> str:
    """The cells of `further_rows`, folded; nothing where there are none."""
    if not (rows := further_rows(records)):
        return ""
    names = " and ".join(name for _, _, name in FURTHER[records[0]["task"]]).capitalize()
    counted = "Words are separated by white space, bytes are UTF-8; both are counted on the text before tokenisation."
    return f"<details>\n<summary>{names}</summary>\n\n{markdown(rows[0], rows[1:])}\n\n{counted}\n\n</details>"


def further_rows(records: Sequence[Record]) -> list[list[str]]:
    """One row an arm, the heads first: what is told beside the metric that is compared, as far as the records have it,
    so that models with other tokenisers can be compared."""
    arms = {arm: [record for record in done(part) if record["chosen"]] for arm, part in by(records, "arm").items()}
    columns = [
        (split, key, form, name)
        for key, form, name in FURTHER.get(records[0]["task"], ())
        for split in ("valid", "test")
        if any(key in record[split] for chosen in arms.values() for record in chosen)
    ]
    if not columns:
        return []
    heads = ["arm", *(f"{split} {name}" for split, _, _, name in columns)]
    cells = {
        arm: [further_cell(chosen, split, key, form) for split, key, form, _ in columns] for arm, chosen in arms.items()
    }
    return [heads, *([arm, *found] for arm, found in cells.items())]


def further_cell(chosen: Sequence[Record], split: str, key: str, form: str) -> str:
    found = {record["seed"]: record[split][key] for record in chosen if key in record[split]}
    return mean_text(found, form) if found and len(found) == len(chosen) else ""


def difference(records: Sequence[Record], arm: str) -> Difference | None:
    """Of an arm's test metric to the first arm's, paired over seeds; None for the first arm itself."""
    first = records[0]["arm"]
    if arm == first:
        return None
    mine, base = ([r for r in done(records) if r["chosen"] and r["arm"] == name] for name in (arm, first))
    return paired(values(mine, "test"), values(base, "test"))


def values(records: Sequence[Record], split: str) -> dict[int, float]:
    """Seed → metric, as it is shown."""
    return {record["seed"]: shown_value(record, split) for record in records}


def grid_table(records: Sequence[Record]) -> str:
    """Validation of every learning rate with the first seed."""
    seed, task = records[0]["seed"], records[0]["task"]
    grid = [record for record in records if record["seed"] == seed]
    lrs = sorted({record["lr"] for record in grid})
    if len(lrs) < 2:
        return ""
    cells = {(r["arm"], r["lr"]): cell(r) for r in grid}
    rows = [[arm, *(cells.get((arm, lr), "") for lr in lrs)] for arm in by(grid, "arm")]
    title = f"Validation {SHOWN[task].label} over the grid, seed {seed}:"
    return f"{title}\n\n{markdown(['arm', *(f'lr {lr:g}' for lr in lrs)], rows)}"


def cell(record: Record) -> str:
    if record["status"] != "done":
        return "failed"
    text = f"{shown_value(record, 'valid'):{SHOWN[record['task']].form}}"
    return f"**{text}**" if record["chosen"] else text


def differing(records: Sequence[Record]) -> str:
    """What is not the same in all arms."""
    lines = []
    for arm, part in by(records, "arm").items():
        facts = ", ".join(f"{key} = {text(value)}" for key, value in part[0]["differs"].items())
        lines.append(f"- {arm}: {facts or 'nothing'}")
    return "The arms differ in these settings and no others:\n\n" + "\n".join(lines)


def failures(records: Sequence[Record]) -> list[str]:
    """A paragraph that lists the runs without a result, if there are any."""
    lines = [f"- {r['arm']}, lr {r['lr']:g}, seed {r['seed']}: {r['error']}" for r in records if r["status"] != "done"]
    return ["Without a result:\n\n" + "\n".join(lines)] if lines else []


def explanation(records: Sequence[Record]) -> str:
    """How to read the table of arms."""
    finished = done(records)
    chosen = [record for record in finished if record["chosen"]]
    seeds, first = sorted({record["seed"] for record in chosen}), finished[0]
    memory = "allocated on the GPU" if on_gpu(first) else "resident, all of the process"
    single = len(seeds) == 1
    tests = "One seed: no deviation and no test." if single else "± is the sample standard deviation over seeds."
    paired_text = (
        ""
        if single
        else " Interval and p: two-sided t-test, paired over seeds; p (Holm) is adjusted for the number of arms."
    )
    several = len({record["lr"] for record in records}) > 1
    rate = (
        "the learning rate is the best of the grid in validation with the first seed"
        if several
        else "one learning rate"
    )
    edge = " * at the end of the grid." if any(record["edge"] for record in chosen) else ""
    return (
        f"{distinct(chosen, 'steps')} steps, seeds {', '.join(map(str, seeds))}; {rate}.{edge} {tests}{paired_text} "
        f"FLOPs are counted from the modules, other libraries' by torch, norms and activations left out, training as "
        f"three forward passes."
        f"{speed_text(chosen)} Memory: {memory}."
    )


def speed_text(chosen: Sequence[Record]) -> str:
    """How throughput was measured, where it was apart from the runs or they disturbed each other."""
    apart = [record["alone"] for record in chosen if "alone" in record]
    # Older records do not say whether their run shared the device; they did where others were timed apart.
    rest = [r["arm"] for r in chosen if "alone" not in r and r.get("shared", bool(apart))]
    names = ", ".join(dict.fromkeys(rest))
    if not apart:
        return f" Throughput of {names}: of the runs, which shared the device." if rest else ""
    # An older one does not say where it is from.
    known = [rate for rate in apart if "cpu" in rate]
    places = dict.fromkeys(map(hardware, known))
    if len(places) > 1 or (known and set(map(processor, known)) != set(map(processor, chosen))):
        where = f" on {'; '.join(places)}"
    else:
        where = "" if on_gpu(chosen[0]) else f" with {apart[0]['threads']} threads"
    but = f" ({names}: of the runs, which shared the device)" if rest else ""
    return f" Throughput: {apart[0]['steps']} steps of each arm alone{where}{but}."


def processor(record: Record) -> str:
    """What a record was measured on, however many threads it had."""
    return ", ".join(record["gpus"]) if on_gpu(record) else record["cpu"]


def footnote(finished: Sequence[Record]) -> str:
    """Data, tokeniser, machine, versions. A table may be of runs of different machines, code and precision."""
    trained = [part for record in finished for part in (record, *record.get("resumed", ()))]
    # An older throughput of an arm alone has no date.
    parts = [part for part in (*trained, *(record.get("alone", {}) for record in finished)) if "date" in part]
    when = ", ".join(sorted({f"{part['date']}, commit {part['commit']}" for part in parts}))
    # Older records do not say.
    leak = any(record.get("tested_on", "test") != "test" for record in finished)
    tested = "; it has no test split, test is the validation split, which picked checkpoints and learning rates"
    data = f"{', '.join(dict.fromkeys(map(data_text, finished)))}{tested if leak else ''}."
    tokenisers = "; ".join(dict.fromkeys(tokenizer_text(record) for record in finished if "tokenizer" in record))
    data += f" Tokeniser: {tokenisers}." if tokenisers else ""
    machines = "; ".join(dict.fromkeys(map(hardware, trained)))
    return f"Data: {data} {machines}, {distinct(finished, 'dtype')}, torch {distinct(parts, 'torch')}, {when}."


def data_text(record: Record) -> str:
    """The data's name and, of a text, what tells its releases apart; older records do not say."""
    words = " + ".join(f"{count:,}" for count in record.get("words", {}).values())
    return f"{record['data']} ({words} words in {' + '.join(record['words'])})" if words else record["data"]


def tokenizer_text(record: Record) -> str:
    return f"{record['tokenizer']} of {record['vocab_size']:,} tokens (hash with the text {record['key'][:8]})"


def distinct(records: Sequence[Record], key: str) -> str:
    """The values of an entry, each once."""
    return ", ".join(dict.fromkeys(str(record[key]) for record in records))


def by(records: Sequence[Record], key: str) -> dict[Any, list[Record]]:
    """The records by one of their entries, in their order."""
    parts: dict[Any, list[Record]] = {}
    for record in records:
        parts.setdefault(record[key], []).append(record)
    return parts


def mean_text(found: dict[int, float], form: str) -> str:
    mean, deviation = spread(list(found.values()))
    return f"{mean:{form}}" + ("" if deviation is None else f" ± {deviation:{form}}")


def gap_text(gap: Difference | None, task: str) -> str:
    if gap is None:
        return ""
    form = f"+{SHOWN[task].form}"
    return f"{gap.mean:{form}}" + (f" [{gap.interval[0]:{form}}, {gap.interval[1]:{form}}]" if gap.interval else "")


def p_text(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])
