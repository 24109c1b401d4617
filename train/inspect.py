"""How a trained model's residual streams behave, layer by layer: a picture and a JSON file, for any residual choice."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..archs import atomic_write, load_model

PICTURE, NUMBERS = "inspect.png", "inspect.json"
Layer = dict[str, Any]


def inspect(folder: Path | str, out: Path | str | None = None, *, tokens: Tensor | None = None) -> list[Layer]:
    """Measure the residual mixing of the model in `folder` on a batch and plot it.

    Writes `inspect.png` and `inspect.json` into `out` (`folder` if None). tokens (B, T) int64: what the model reads;
    None for random ones, which is enough to compare mixing matrices but says little about the text.

    Returns for each sublayer, means over the tokens: "deviation", the largest |row or column sum of H_res - 1|;
    "product_deviation", the same for the product of the matrices so far; "negative", the size of the smallest negative
    entry; "stream_norms", the root mean square of each stream as the sublayer finds it; "eigenvalues", the sorted
    moduli. A plain residual has H_res = 1.

    Raises CheckpointError for a folder without a model, ValueError for a model without residuals or without matplotlib.
    """
    folder = Path(folder)
    target = folder if out is None else Path(out)
    model = load_model(folder, dtype=torch.float32)
    layers = measure(model, _random_tokens(model) if tokens is None else tokens)
    atomic_write(target / NUMBERS, (json.dumps(layers, indent=1) + "\n").encode())
    plot(layers, f"{folder.name}: {getattr(model.config, 'residual', '')}", target / PICTURE)
    return layers


@torch.no_grad()
def measure(model: nn.Module, tokens: Tensor) -> list[Layer]:
    """The numbers of `inspect` for a model in memory."""
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
    training = model.training
    model.eval()
    try:
        model(tokens)
    finally:
        model.train(training)
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


def plot(layers: list[Layer], title: str, path: Path) -> None:
    """The picture of `inspect`. ValueError if matplotlib is not installed."""
    try:
        figure_type: Any = importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ValueError("matplotlib is not installed: pip install 'grassland[train]'") from error
    figure = figure_type(figsize=(15, 4.2), layout="constrained")
    figure.suptitle(title)
    sums, norms, spectrum = figure.subplots(1, 3)
    depth = [layer["layer"] for layer in layers]
    # An exact zero has no place on a logarithmic axis: it is drawn at float64's resolution.
    floor = math.ulp(1.0)
    for name, label in (("deviation", "single"), ("product_deviation", "product over depth")):
        sums.semilogy(depth, [max(layer[name], floor) for layer in layers], "o-", ms=3, label=label)
    sums.set_ylabel("largest |row or column sum − 1|")
    for axes, name, label in ((norms, "stream_norms", "stream"), (spectrum, "eigenvalues", "eigenvalue")):
        for number in range(len(layers[0][name])):
            axes.plot(depth, [layer[name][number] for layer in layers], "o-", ms=3, label=f"{label} {number}")
    norms.set_ylabel("root mean square")
    spectrum.set_ylabel("modulus of H_res's eigenvalues")
    for axes in (sums, norms, spectrum):
        axes.set_xlabel("sublayer")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _random_tokens(model: Any) -> Tensor:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (2, min(config.max_len, 64)), generator=generator)
