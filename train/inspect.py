"""How a trained model's residual streams behave, layer by layer: a picture and a JSON file, for any residual choice."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..archs import atomic_write
from ..archs.modes import evaluating
from .log import to_json
from .optional import optional
from .plot import labelled
from .text_model import load_text_model

PICTURE, NUMBERS = "inspect.png", "inspect.json"
PANELS = {
    "deviation": "largest |row or column sum − 1|, single matrices",
    "product_deviation": "the same, product over depth",
    "stream_norms": "root mean square of each stream",
    "eigenvalues": "moduli of H_res's eigenvalues",
}
Layer = dict[str, Any]


def inspect(folder: Path | str, out: Path | str | None = None, *, tokens: Tensor | None = None) -> list[Layer]:
    """Measure the residual mixing of the model in `folder` on a batch and plot it: `compare` for one run.

    Writes `inspect.png` and `inspect.json` into `out` (`folder` if None).
    """
    (layers,) = compare([folder], folder if out is None else out, tokens=tokens).values()
    return layers


def compare(folders: Sequence[Path | str], out: Path | str, *, tokens: Tensor | None = None) -> dict[str, list[Layer]]:
    """Measure the residual mixing of the models in `folders` and plot them side by side.

    Writes into `out` the picture `inspect.png` and the numbers of each run: `inspect.json` for one, `inspect-RUN.json`
    for several. tokens (B, T) int64: what the models read; None for random ones, which is enough to compare mixing
    matrices but says little about the text.

    Returns for each run, by its folder's name, and each sublayer, means over the tokens: "deviation", the largest |row
    or column sum of H_res - 1|; "product_deviation", the same for the product of the matrices so far; "negative", the
    size of the smallest negative entry; "stream_norms", the root mean square of each stream as the sublayer finds it;
    "eigenvalues", the sorted moduli. A plain residual has H_res = 1.

    Raises CheckpointError for a folder without a model, ValueError for no folders, folders that repeat, a model without
    residuals, or without matplotlib. Nothing is written before every model has been measured.
    """
    named = labelled(folders)
    if not named or len(named) < len(folders):
        raise ValueError(f"folders must be one or more different runs, got {[str(folder) for folder in folders]}")
    runs = {label: _measured(folder, tokens) for label, folder in named.items()}
    target = Path(out)
    for label, layers in runs.items():
        name = NUMBERS if len(runs) == 1 else f"{Path(NUMBERS).stem}-{label.replace(os.sep, '-')}.json"
        atomic_write(target / name, (to_json(layers, indent=1) + "\n").encode())
    plot(runs, target / PICTURE)
    return runs


def _measured(folder: Path, tokens: Tensor | None) -> list[Layer]:
    model = load_text_model(folder).float()
    return measure(model, _random_tokens(model) if tokens is None else tokens)


@torch.no_grad()
def measure(model: nn.Module, tokens: Tensor) -> list[Layer]:
    """The numbers of `compare` for a model in memory."""
    blocks: Any = getattr(model, "blocks", None)
    if blocks is None:
        raise ValueError(f"model must have blocks with residuals, got {type(model).__name__}")
    layers: list[Layer] = []
    product: Tensor | None = None

    def look(residual: nn.Module, inputs: tuple) -> None:
        nonlocal product
        streams, mixing = _streams_and_mixing(residual, inputs[0])
        # In float64, so that what is seen is the matrices' deviation and not the product's rounding.
        mixing = mixing.double()
        product = mixing if product is None else mixing @ product
        layers.append(_describe(len(layers), streams, mixing, product))

    residuals = [residual for block in blocks for residual in (block.mixer, block.ffn)]
    hooks = [residual.register_forward_pre_hook(look) for residual in residuals]
    try:
        with evaluating(model):
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return layers


def _streams_and_mixing(residual: Any, x: Any) -> tuple[Tensor, Tensor]:
    if hasattr(residual, "coefficients") and not residual.disabled:
        streams = torch.clone(x)
        return streams, residual.coefficients(streams)[2]
    return x.unsqueeze(-2), torch.ones(*x.shape[:-1], 1, 1)


def _describe(index: int, streams: Tensor, mixing: Tensor, product: Tensor) -> Layer:
    leading = tuple(range(streams.dim() - 2))
    eigenvalues = torch.linalg.eigvals(mixing).abs().sort(-1, descending=True)[0]
    return {
        "layer": index,
        "deviation": _deviation(mixing),
        "product_deviation": _deviation(product),
        "negative": max(0.0, -mixing.min().item()),
        "stream_norms": streams.float().square().mean((*leading, -1)).sqrt().tolist(),
        "eigenvalues": eigenvalues.mean(leading).tolist(),
    }


def _deviation(matrix: Tensor) -> float:
    sums = torch.cat([matrix.sum(-1), matrix.sum(-2)], -1)
    return (sums - 1).abs().amax(-1).mean().item()


def plot(runs: dict[str, list[Layer]], path: Path) -> None:
    """The picture of `compare`: a colour for each run, or for each stream of a single one. ValueError if matplotlib is
    not installed."""
    figure = optional("matplotlib.figure", "train").Figure(figsize=(18, 4.2), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for number, (run, layers) in enumerate(runs.items()):
            _draw(axes, layers, name, run, f"C{number}" if len(runs) > 1 else None)
        if name.endswith("deviation"):
            axes.set_yscale("log")
        axes.set(xlabel="sublayer", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw(axes: Any, layers: list[Layer], name: str, run: str, colour: str | None) -> None:
    """One quantity of one run: a line, or one for each stream, in `colour` or, if None, each in its own."""
    values = [layer[name] if isinstance(layer[name], list) else [layer[name]] for layer in layers]
    for number, line in enumerate(zip(*values, strict=True)):
        # An exact zero has no place on a logarithmic axis: it is drawn at float64's resolution.
        heights = [max(value, math.ulp(1.0)) for value in line] if name.endswith("deviation") else line
        alone = colour is None and len(values[0]) > 1
        label = f"{run}: {number}" if alone else run if number == 0 else None
        axes.plot(range(len(heights)), heights, "o-", ms=3, color=colour, label=label)


def _random_tokens(model: Any) -> Tensor:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (2, min(config.max_len, 64)), generator=generator)
