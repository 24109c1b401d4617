"""How weights start, in one place."""

from torch import nn

INIT_STD = 0.02


def init_weights(module: nn.Module) -> None:
    """For `Module.apply`: N(0, 0.02) for linear and embedding weights, zero biases, else the module's own rule.

    `apply` visits children first, so a module with a `reset_parameters` of its own has the last word on its subtree.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()
