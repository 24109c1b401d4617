"""How weights start, in one place."""

import math
from typing import Any

import torch
from torch import nn

INIT_STD = 0.02


def reset_model(model: Any) -> None:
    """Draw all weights of an assembly anew, as its config says."""
    for child in model.children():
        child.apply(init_weights)
    if model.config.scaled_init:
        _scale_outputs(model.blocks, 1 / math.sqrt(2 * model.config.depth))


@torch.no_grad()
def _scale_outputs(blocks: nn.Module, factor: float) -> None:
    for module in blocks.modules():
        outputs: Any = getattr(module, "outputs", list)
        for weight in outputs():
            weight.mul_(factor)


def reset_layers(module: nn.Module) -> None:
    """Draw all weights anew."""
    module.apply(init_weights)


def init_weights(module: nn.Module) -> None:
    """For `Module.apply`: N(0, 0.02) for linear and embedding weights, zero biases, else the module's own rule.

    `apply` visits children first, so a module with a `reset_parameters` of its own has the last word on its subtree.
    `reset_layers` is none: the layers inside have been drawn.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif getattr(type(module), "reset_parameters", reset_layers) is not reset_layers:
        reset: Any = module.reset_parameters
        reset()
