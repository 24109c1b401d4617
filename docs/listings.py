"""The lists of the documentation, as Markdown, from what they list: presets, recipes, slot choices, options.

A page asks for one by `<!-- table:NAME -->` and `<!-- end -->`, as README.md does for its tables.
"""

import contextlib
import dataclasses
import functools
import inspect
import io
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import griffe

from grassland.archs import create_model, list_models, model_config
from grassland.archs.registry import CONTEXT, SLOTS, slot_choices, slot_class
from grassland.kernels.bench.command import parse as parse_bench
from grassland.train import __main__ as program
from grassland.train.compare.presets import PRESETS
from grassland.train.config import RunConfig
from grassland.train.recipes import RECIPES
from grassland.train.tasks import finetune, mlm, qa


class Asked(Exception):
    """What a command asked the option parser for: the dataclass, its defaults, and what the arguments made of it."""

    def __init__(self, kind: type, default: Any, found: Any) -> None:
        self.kind, self.default, self.found = kind, default, found


def ask(command: str, arguments: Sequence[str] = ("--help",)) -> Asked | None:
    """Run `command` up to the point where its options are parsed; None if it takes none.

    With `--help` nothing is parsed. SystemExit, as the command line has it, for an option that does not exist.
    """

    parse = program._parse

    def stop(kind: type, given: list[str], command: str, default: Any = None, **rest: Any) -> None:
        raise Asked(kind, default, None if "--help" in given else parse(kind, given, command, default, **rest))

    # A run to be resumed is not there: any settings do.
    stored = mock.patch.object(program, "_stored_config", lambda kind, folder, command: kind(steps=1))
    with mock.patch.object(program, "_parse", stop), stored:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                program.COMMANDS[command](list(arguments))
        except Asked as asked:
            return asked
    return None


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def first_line(function: Any) -> str:
    return (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")


def presets() -> str:
    """Every registered model with its number of parameters, counted."""
    rows = []
    for name in list_models():
        config = model_config(name)
        size = sum(p.numel() for p in create_model(name, device="meta").parameters())
        slots = ", ".join(config.choices.values())
        shared = " and ".join(config.share) or "nothing"
        rows.append([f"`{name}`", f"{config.kind}: {slots}", shared, f"{size:,}"])
    return table(["preset", "assembly: mixer, residual, ffn, head", "shared across depth", "parameters"], rows)


def recipes() -> str:
    """Every registered recipe, by the command that takes it."""
    tasks: list[tuple[str, dict[str, Any]]] = [
        ("vision", {name: (first_line(make), make()) for name, make in RECIPES.items()}),
        ("mlm", {name: (first_line(make), make()) for name, make in mlm.RECIPES.items()}),
        ("finetune", {name: ("", finetune.finetune_settings(name, "RUN", "DATA")) for name in finetune.RECIPES}),
        ("qa", {name: ("", qa.qa_settings(name, "RUN", "DATA")) for name in qa.RECIPES}),
    ]
    rows = []
    for task, found in tasks:
        for name, (about, config) in found.items():
            length = f"{config.epochs:g} epochs" if config.epochs else f"{config.steps:,} steps"
            optimiser = f"{config.optimizer}, lr {config.lr:g}, batch {config.batch_size}"
            rows.append([f"`{task} --recipe {name}`", about, f"`{config.model}`", length, optimiser])
    return table(["recipe", "what", "model", "length", "optimiser"], rows)


def comparisons() -> str:
    """Every preset of `compare`."""
    rows = []
    for name, make in PRESETS.items():
        for plan in make():
            grid = f"{len(plan.lrs)} × {len(plan.seeds)}"
            rows.append([f"`{name}`", plan.title, ", ".join(plan.arms), grid])
    return table(["preset", "what", "arms", "learning rates × seeds"], rows)


def choices(slot: str) -> str:
    """What can be chosen for one slot, with the options each choice takes."""
    rows = []
    for name in slot_choices(slot):
        cls = slot_class(slot, name)
        parameters = inspect.signature(cls).parameters.values()
        own = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in CONTEXT]
        options = ", ".join(f"`{p.name}={p.default!r}`" for p in own) or "none"
        rows.append([f"`{name}`", f"`{cls.__name__}`", options])
    return table([slot, "class", "options and defaults"], rows)


def commands() -> str:
    """One line a command."""
    rows = [[f"[`{name}`](#{name})", command.__doc__ or ""] for name, command in program.COMMANDS.items()]
    return table(["command", "what it does"], rows)


def options() -> str:
    """A section for each command, with its own options; what all training commands share has a section of its own."""
    parts = [f"## Options of every training {{#training}}\n\n{rows_of(RunConfig, {})}"]
    for name in program.COMMANDS:
        parts.append(f"## `{name}` {{#{name}}}\n\n{section(name)}")
    return "\n\n".join(parts)


def section(name: str) -> str:
    asked = ask(name)
    if asked is None:
        return f"Takes no options.\n\n    python -m grassland.train {name}"
    about = inspect.getdoc(asked.kind) or ""
    if not issubclass(asked.kind, RunConfig):
        return f"{about}\n\n{rows_of(asked.kind, {})}"
    shared = {f.name: f.default for f in dataclasses.fields(RunConfig)}
    text = f"{about} The [options of every training](#training), and:\n\n{rows_of(asked.kind, shared)}"
    changed = differences(asked.default, asked.kind)
    return f"{text}\n\nWithout further options: {changed}." if changed else text


def differences(default: Any, kind: type) -> str:
    """What a bare command sets otherwise than the dataclass does."""
    if default is None:
        return ""
    names = [f.name for f in dataclasses.fields(kind) if getattr(default, f.name) != f.default]
    # Where a length is given in epochs, that in steps is no more than a placeholder.
    names = [name for name in names if name != "steps" or default.epochs is None]
    return ", ".join(f"`{flag(name)} {shown(getattr(default, name))}`" for name in names)


def rows_of(kind: type, known: dict[str, Any]) -> str:
    """The fields of an options dataclass as a table, without those of `known` that keep their default."""
    hints, rows = typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        if field.name in known and known[field.name] == field.default:
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = field.default_factory() if callable(field.default_factory) else field.default
        positional = required and not issubclass(kind, RunConfig)
        name = field.name.upper() if positional else flag(field.name)
        cell = "required" if required else f"`{shown(default)}`"
        rows.append([f"`{name}`", f"{values(hints[field.name])}", cell, meaning(kind, field.name)])
    return table(["option", "value", "default", "meaning"], rows)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(shown, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    return "a line break" if value == "\n" else f"{value}"


def values(hint: Any) -> str:
    """A type in words: `int`, `adamw | lamb`, `path …`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(f"`{argument}`" for argument in arguments)
    if origin is tuple:
        return f"{values(arguments[0])} …" if Ellipsis in arguments else " ".join(map(values, arguments))
    if arguments:
        return " | ".join(values(argument) for argument in arguments if argument is not type(None))
    names = {bool: "flag", str: "text", Path: "path", float: "number", int: "integer"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def meaning(kind: type, name: str) -> str:
    """The docstring under a field, of the class that declares it."""
    for cls in kind.__mro__:
        member = source(cls.__module__).members.get(cls.__name__)
        found = member and member.members.get(name)
        if found and found.docstring:
            return " ".join(found.docstring.value.split())
    raise ValueError(f"{kind.__name__}.{name} has no docstring")


@functools.cache
def source(module: str) -> griffe.Module:
    path = Path(str(sys.modules[module].__file__))
    return griffe.visit(module, path, path.read_text())


def bench_help() -> str:
    """What `python -m grassland.kernels.bench --help` prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        parse_bench(["--help"])
    return f"```text\n{text.getvalue().strip()}\n```"


def listings() -> Iterator[tuple[str, Callable[[], str]]]:
    for slot in SLOTS:
        yield f"choices_{slot}", functools.partial(choices, slot)
    for function in (presets, recipes, comparisons, commands, options, bench_help):
        yield function.__name__, function


LISTINGS = dict(listings())
