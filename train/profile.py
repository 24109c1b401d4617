"""Where the time of a training step goes: mixer, residual, ffn, head, embedding, optimiser and data."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..archs import create_model, list_models, model_config
from ..kernels.machine import about
from .config import VisionConfig
from .data import BlockOrder, block_batch, num_blocks
from .env import hardware
from .optim import build_optimizer
from .optional import optional
from .seeds import seed_everything
from .start import pick_device

NUMBERS, PICTURE = "profile.jsonl", "profile.png"
PARTS = ("data", "embedding", "mixer", "residual", "ffn", "head", "optimiser")
PASSES = ("forward", "backward")
WARM_UP = 2
MASKED = 0.15
Record = dict[str, Any]


@dataclass(frozen=True)
class ProfileOptions:
    """Where the time of a training step goes, for models of the four slots."""

    models: tuple[str, ...] = ("transformer_lm_6l", "grassmann_lm_6l", "kromhc_lm_6l", "widenet_cifar")
    """Presets of `grassland.archs.list_models()`; all takes every one."""
    out: Path = Path("runs/profile")
    """Folder for profile.jsonl and profile.png."""
    batch_size: int = 8
    """Sequences or images."""
    seq_len: int = 128
    """Tokens in a sequence, for models of text."""
    steps: int = 10
    """Steps that are timed; medians are reported."""
    optimizer: Literal["adamw", "lamb", "muon", "sgd"] = "adamw"
    """As in training."""
    dtype: Literal["bf16", "float32"] = "float32"
    """Precision of autocast."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def presets(self) -> tuple[str, ...]:
        """The names that `models` stands for."""
        return tuple(list_models()) if self.models == ("all",) else self.models


class Clock:
    """Time by (part, pass): from each `switch` to the next one it counts for what that one named.

    On a GPU the times are those of its own stream, so that nothing waits before the step is over.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[tuple[str, str], Any]] = []

    def switch(self, part: str, direction: str) -> None:
        """From now on it is `part`'s time, in "forward", "backward" or ""."""
        if self.device.type == "cuda":
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append(((part, direction), now))

    def take(self) -> dict[tuple[str, str], float]:
        """Seconds since the last call, which must end with a switch that names nothing."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds: dict[tuple[str, str], float] = {}
        for (key, start), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            elapsed = start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start
            seconds[key] = seconds.get(key, 0.0) + elapsed
        self.marks = []
        return seconds


class Boundary(torch.autograd.Function):
    """The identity, that switches the clock when the forward pass comes by, and when the backward pass does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, after: str, before: str) -> Tensor:
        ctx.clock, ctx.before = clock, before
        clock.switch(after, "forward")
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.clock.switch(ctx.before, "backward")
        return grads[0], None, None, None


def profile(options: ProfileOptions) -> list[Record]:
    """Profile every model; writes profile.jsonl, after each of them, and profile.png into `options.out`.

    A record has "seconds", {"data", "optimiser", "embedding forward", "embedding backward", "mixer forward", …}:
    medians over the steps. What lies between the branches, norms included, is the residual's; the final norm and the
    loss are the head's, the clipping of gradients the optimiser's. ValueError for an unknown model, before any timing.
    """
    device = pick_device(options.device)
    for name in options.presets:
        model_config(name)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {**asdict(options), "out": None, "models": None, "device": device.type}
    records = []
    for name in options.presets:
        seconds = profile_model(name, options, device)
        records.append({"model": name, "seconds": seconds, **settings, **about()})
        (options.out / NUMBERS).write_text("".join(json.dumps(record) + "\n" for record in records))
        print(f"{name}: {1e3 * sum(seconds.values()):.1f} ms a step", flush=True)
    plot(records, options.out / PICTURE)
    return records


def profile_model(name: str, options: ProfileOptions, device: torch.device) -> dict[str, float]:
    """Median seconds of each part in each pass of a step."""
    seed_everything(0)
    clock = Clock(device)
    model, batches, loss = _setup(name, options, device)
    optimizer = build_optimizer(model, options.optimizer, lr=1e-4)
    _mark(model, clock)
    model.train()
    steps = []
    for _ in range(WARM_UP + options.steps):
        clock.switch("data", "")
        batch = next(batches)
        clock.switch("embedding", "forward")
        with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bf16"):
            value = loss(model, batch)
        clock.switch("head", "backward")
        value.backward()
        clock.switch("optimiser", "")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.switch("", "")
        steps.append(clock.take())
    keys = {" ".join(filter(None, key)): key for step in steps for key in step}
    return {text: statistics.median(step.get(key, 0.0) for step in steps[WARM_UP:]) for text, key in keys.items()}


def plot(records: list[Record], path: Path) -> None:
    """One bar a model, of the shares of its step: a colour a part, its backward pass hatched."""
    size = (10, 1.6 + 0.45 * len(records))
    figure: Any = optional("matplotlib.figure", "train").Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    totals = [sum(record["seconds"].values()) for record in records]
    names = [f"{record['model']}, {1e3 * total:,.0f} ms" for record, total in zip(records, totals, strict=True)]
    lefts = [0.0] * len(records)
    cells = [(part, f"{part} {way}") for part in PARTS for way in PASSES] + [(part, part) for part in PARTS]
    for part, key in sorted(cells, key=lambda cell: PARTS.index(cell[0])):
        widths = [100 * r["seconds"].get(key, 0.0) / total for r, total in zip(records, totals, strict=True)]
        if any(widths):
            style = {"color": f"C{PARTS.index(part)}", "hatch": "///" if "backward" in key else None}
            axes.barh(names, widths, left=lefts, label=key, edgecolor="white", **style)
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    first = records[0]
    title = f"batch {first['batch_size']}, {first['optimizer']}, {first['dtype']}, {hardware(first)}"
    axes.set(xlabel="% of a training step", xlim=(0, 100), title=title)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    figure.legend(frameon=False, fontsize=8, ncols=6, loc="outside lower center")
    figure.savefig(path, dpi=120)


def _setup(
    name: str, options: ProfileOptions, device: torch.device
) -> tuple[nn.Module, Iterator[Any], Callable[[nn.Module, Any], Tensor]]:
    """Model, batches and loss: random text of the preset's own vocabulary, or digits at its own image size.

    A text encoder tells MASKED of the tokens.
    """
    kind = model_config(name).kind
    if kind == "vision":
        from .tasks.vision import ImageClassification

        size: Any = model_config(name)
        run = VisionConfig(model=name, steps=1, batch_size=options.batch_size, img_size=size.image_size)
        task = ImageClassification(run, device)
        return task.model, task.batches(0), task.loss
    model = create_model(name, device=device, max_len=max(options.seq_len, model_config(name).max_len))
    text = _random_text(model.config.vocab_size, options, device)
    return model, text, _masked_loss if kind == "mlm" else _text_loss


def _random_text(vocab_size: int, options: ProfileOptions, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    tokens = np.random.default_rng(0).integers(vocab_size, size=1 << 20, dtype=np.int32)
    order = BlockOrder(num_blocks(len(tokens), options.seq_len), 0)
    position = 0
    while True:
        inputs, targets = block_batch(tokens, order.at(position, options.batch_size), options.seq_len)
        yield inputs.to(device), targets.to(device)
        position += options.batch_size


def _text_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(batch[0], labels=batch[1])


def _masked_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    positions = torch.arange(0, inputs.shape[1], round(1 / MASKED), device=inputs.device).expand(len(inputs), -1)
    return model(inputs, labels=labels.gather(1, positions), positions=positions)


def _mark(model: Any, clock: Clock) -> None:
    """Switch the clock where the stream enters and leaves the blocks, and where it enters and leaves a branch."""

    def entering(part: str, before: str) -> Callable[..., Any]:
        return lambda module, args: (Boundary.apply(args[0], clock, part, before), *args[1:])

    def leaving(part: str, after: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            first, *rest = out if isinstance(out, tuple) else (out,)
            marked = Boundary.apply(first, clock, after, part)
            return (marked, *rest) if rest else marked

        return hook

    last = model.proj if hasattr(model, "proj") else model.dropout
    last.register_forward_hook(leaving("embedding", "residual"))
    model.norm.register_forward_pre_hook(entering("head", "residual"))
    for block in model.blocks:
        for part, residual in (("mixer", block.mixer), ("ffn", block.ffn)):
            # A branch shared across depth is a module in the first block only, where its hooks serve all.
            if isinstance(residual.branch, nn.Module):
                residual.branch.register_forward_pre_hook(entering(part, "residual"))
                residual.branch.register_forward_hook(leaving(part, "residual"))
