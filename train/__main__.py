"""python -m grassland.train COMMAND: train, compare, evaluate, sample and inspect."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from .config import EPOCHS, LMConfig, RunConfig, VisionConfig, default_lm, named_lm
from .optional import optional
from .recipes import default_vision, named_vision, recipe

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class SampleOptions:
    """Continue a prompt with a trained language model."""

    folder: Path
    """Folder of the run."""
    prompt: str = "\n"
    """Text to continue."""
    tokens: int = 200
    """How many tokens to add."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Choose among the k likeliest tokens."""
    top_p: float | None = None
    """Choose among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the choice."""


@dataclass(frozen=True)
class PlotOptions:
    """Curves of one run or several in one picture."""

    folders: tuple[Path, ...]
    """Folders of the runs."""
    out: Path = Path("curves.png")
    """The PNG to write."""


@dataclass(frozen=True)
class InspectOptions:
    """How far the residual mixing of trained models is from doubly stochastic, layer by layer."""

    folders: tuple[Path, ...]
    """Folders of the runs, which come side by side on one picture."""
    out: Path | None = None
    """Folder for inspect.png and inspect.json, or inspect-RUN.json of several runs; if not given, the run's own folder,
    for several the current one."""


def lm(arguments: list[str]) -> int:
    """train a causal language model on text"""
    settings = default_lm() if _argument(arguments, "--model") is None else named_lm()
    config = read_run_config(LMConfig, settings, arguments, "lm")
    from .start import run
    from .tasks.lm import LanguageModeling

    return run(LanguageModeling, config)


def mlm(arguments: list[str]) -> int:
    """pre-train a text encoder by hidden words"""
    from .start import run
    from .tasks.mlm import MaskedLanguageModeling, MLMConfig, mlm_settings

    settings = mlm_settings(_argument(arguments, "--recipe"), _argument(arguments, "--model"))
    return run(MaskedLanguageModeling, read_run_config(MLMConfig, settings, arguments, "mlm"))


def finetune(arguments: list[str]) -> int:
    """train a text classifier from an encoder: finetune RUN --data DATA"""
    from .tasks.finetune import FinetuneConfig, TextClassification, finetune_settings

    return _tune(TextClassification, FinetuneConfig, finetune_settings, arguments, "finetune")


def qa(arguments: list[str]) -> int:
    """train an encoder to answer questions by a span of a text: qa RUN --data DATA"""
    from .tasks.qa import QAConfig, QuestionAnswering, qa_settings

    return _tune(QuestionAnswering, QAConfig, qa_settings, arguments, "qa")


def vision(arguments: list[str]) -> int:
    """train an image classifier"""
    config = read_run_config(VisionConfig, _vision_recipe(arguments), arguments, "vision")
    from .start import run
    from .tasks.vision import ImageClassification

    return run(ImageClassification, config)


def nli(arguments: list[str]) -> int:
    """train a head for sentence pairs on an encoder's features"""
    from .start import run
    from .tasks.nli import NaturalLanguageInference, NLIConfig

    return run(NaturalLanguageInference, read_run_config(NLIConfig, NLIConfig(), arguments, "nli"))


def transfer(arguments: list[str]) -> int:
    """judge a trained image model's features on other images"""
    import json

    from .transfer import TransferOptions
    from .transfer import transfer as judge

    options = read_options(TransferOptions, arguments, "transfer")
    from .start import pick_device

    print(json.dumps(judge(options, pick_device(options.device))))
    return 0


def sample(arguments: list[str]) -> int:
    """continue a prompt with a trained language model"""
    options = read_options(SampleOptions, arguments, "sample")
    from .sample import generate_text, load_run

    model, tokenizer = load_run(options.folder)
    choice = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    pieces = generate_text(model, tokenizer, options.prompt, tokens=options.tokens, seed=options.seed, **choice)
    print(options.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def eval_(arguments: list[str]) -> int:
    """evaluate a trained language model with EleutherAI's lm-eval"""
    from .eval_options import EvalOptions

    options = read_options(EvalOptions, arguments, "eval")
    try:
        from .harness import FILE, evaluate_run, table
    except ImportError as error:
        raise ValueError(str(error)) from error
    from .start import pick_device

    print(table(evaluate_run(options, pick_device(options.device))))
    print(options.out or options.folder / FILE)
    return 0


def plot(arguments: list[str]) -> int:
    """curves of one run or several in one picture"""
    options = read_options(PlotOptions, arguments, "plot")
    from .plot import plot_runs

    plot_runs(options.folders, options.out)
    print(options.out)
    return 0


def inspect(arguments: list[str]) -> int:
    """the residual mixing of trained models: double stochasticity, stream norms, eigenvalues"""
    options = read_options(InspectOptions, arguments, "inspect")
    from .inspect import PICTURE, compare

    out = options.out or (options.folders[0] if len(options.folders) == 1 else Path())
    for run, layers in compare(options.folders, out).items():
        worst = max(layer["product_deviation"] for layer in layers)
        print(f"{run}: {len(layers)} sublayers; product of the mixing matrices off by {worst:.1e} at most")
    print(out / PICTURE)
    return 0


def compare(arguments: list[str]) -> int:
    """arms x learning rates x seeds on one data set, and a report"""
    from .compare import CompareOptions
    from .compare import compare as run_all

    return run_all(read_options(CompareOptions, arguments, "compare"))


def profile(arguments: list[str]) -> int:
    """where the time of a training step goes, slot by slot"""
    from .profile import PICTURE, ProfileOptions
    from .profile import profile as measure

    options = read_options(ProfileOptions, arguments, "profile")
    measure(options)
    print(options.out / PICTURE)
    return 0


def env(arguments: list[str]) -> int:
    """versions, devices, what was built, and the backend that each op takes"""
    if arguments in (["-h"], ["--help"]):
        print(f"usage: python -m grassland.train env\n\n{env.__doc__}")
        return 0
    if arguments:
        raise ValueError(f"env takes no arguments, got {' '.join(arguments)}")
    from .env import report

    print(report())
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    command.__name__.rstrip("_"): command
    for command in (lm, mlm, finetune, qa, nli, vision, transfer, compare, sample, eval_, plot, inspect, profile, env)
}


def main(arguments: list[str]) -> int:
    """Run a command; the process's exit code. What the user can mend is one line on stderr, and 2."""
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        # A RuntimeError of torch's own is a defect to be seen in full; those of grassland are messages to the user.
        if os.environ.get("GRASSLAND_DEBUG") == "1" or _is_defect(error):
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        return 2


def describe(error: Exception) -> str:
    """The error in one line that names the file, if it is about one."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def read_options(kind: type[Any], arguments: list[str], command: str) -> Any:
    """A dataclass from command-line arguments; fields without a default are positional."""
    return _parse(kind, arguments, command, config=(optional("tyro", "train").conf.PositionalRequiredArgs,))


def read_run_config(kind: type[C], default: C, arguments: list[str], command: str) -> C:
    """The settings of a run from command-line arguments over `default`, or over those of the run to be resumed.

    Raises ValueError if a resumed run is to change what must stay, CheckpointError if it cannot be read.
    """
    folder, out = _argument(arguments, "--resume"), _argument(arguments, "--out")
    if folder == "auto":
        folder = _started_run(out)
    stored = None if folder is None else _stored_config(kind, Path(folder), command)
    if stored is not None and folder is not None:
        if out is not None and Path(out).resolve() != Path(folder).resolve():
            raise ValueError(f"{folder}: a resumed run goes on in its own folder, got --out {out}")
        default = replace(stored, resume=folder)
    config: C = _parse(kind, _with_one_set(arguments), command, _lengths(default, arguments))
    if stored is not None and (changed := stored.changed(config)):
        raise ValueError(f"{folder}: a resumed run keeps its {', '.join(changed)}; start a new one with --out instead")
    return config


def _parse(kind: type[Any], arguments: list[str], command: str, default: Any = None, **options: Any) -> Any:
    """What tyro reads, built without its own checks first: their errors are one line, not the box that tyro draws."""
    unchecked: Any = type(kind.__name__, (kind,), {"__doc__": kind.__doc__, "__post_init__": lambda self: None})
    values: Callable[[Any], dict[str, Any]] = lambda c: {f.name: getattr(c, f.name) for f in fields(kind)}  # noqa: E731
    if default is not None:
        options["default"] = unchecked(**values(default))
    program = f"python -m grassland.train {command}"
    return kind(**values(optional("tyro", "train").cli(unchecked, args=arguments, prog=program, **options)))


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}; known: {', '.join(COMMANDS)}")
    return COMMANDS[name](rest)


def _usage() -> str:
    commands = "\n".join(f"  {name:<10}{command.__doc__}" for name, command in COMMANDS.items())
    return f"usage: python -m grassland.train COMMAND [--help | options]\n\n{commands}"


def _started_run(out: str | None) -> str | None:
    from .checkpoint import has_state

    return out if out is not None and has_state(Path(out)) else None


def _stored_config(kind: type[C], folder: Path, command: str) -> C:
    from ..archs import CheckpointError
    from .checkpoint import stored_settings

    try:
        return kind.from_dict(stored_settings(folder, command))
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def _tune(task: Any, kind: Any, settings: Callable[..., Any], arguments: list[str], command: str) -> int:
    """A run on an encoder, whose folder may stand first."""
    from .start import run

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model", *arguments]
    named, model, data = (_argument(arguments, name) for name in ("--recipe", "--model", "--data"))
    config = read_run_config(kind, settings(named, model or "", data or ""), arguments, command)
    if not config.model or not config.data:
        raise ValueError(f"{command} takes the folder of a trained encoder and data: {command} RUN --data DATA")
    return run(task, config)


def _vision_recipe(arguments: list[str]) -> VisionConfig:
    name = _argument(arguments, "--recipe")
    if name is not None:
        head = _argument(arguments, "--head")
        return recipe(name) if head is None else recipe(name, head=head)
    model = _argument(arguments, "--model")
    return default_vision() if model is None else named_vision(model)


def _lengths(chosen: C, arguments: list[str]) -> C:
    """A length given in steps counts over one in epochs, of a recipe or a run to be resumed."""
    dropped: dict[str, Any] = {
        epochs: None for steps, epochs in EPOCHS.items() if _argument(arguments, f"--{steps.replace('_', '-')}")
    }
    return replace(chosen, steps=chosen.steps or 1, **dropped)


def _argument(arguments: list[str], name: str) -> str | None:
    """The value of an option; the last one of an option that is repeated, as the parser has it."""
    last = None
    for argument, following in zip_longest(arguments, arguments[1:]):
        option, equals, value = argument.partition("=")
        if option.replace("_", "-") == name:
            last = value if equals else following
    return last


def _with_one_set(arguments: list[str]) -> list[str]:
    """The arguments with the values of every --set after one: of several the parser would take the last alone."""
    others: list[str] = []
    given: list[str] = []
    chosen = others
    for argument in arguments:
        if argument.startswith("--"):
            chosen = given if argument.partition("=")[0] == "--set" else others
        chosen.append(argument)
    values = [argument.removeprefix("--set=") for argument in given if argument != "--set"]
    return [*others, "--set", *values] if given else others


def _is_defect(error: Exception) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    return not type(error).__module__.startswith(__package__.rpartition(".")[0] if __package__ else "grassland")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
