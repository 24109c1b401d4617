"""What a layer asks of its input, so that a wrong one is named before an inner module or a kernel refuses it."""

from torch import Tensor, nn

from ..kernels.launch import autocast_dtype


def check_input(x: Tensor, dim: int, layer: nn.Module | None = None, *, sequence: bool = False) -> None:
    """ValueError unless x is (…, dim), or (B, T, dim) for a sequence; TypeError unless it is floating-point and,
    without autocast, of the dtype of `layer.weight`. layer: the one that reads x first."""
    if x.dim() == 0 or x.shape[-1] != dim or (sequence and x.dim() != 3):
        raise ValueError(f"x must be ({'B, T' if sequence else '…'}, {dim}), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    # Whoever replaces a layer need not give the new one a weight, and one of single bytes is stored for another dtype.
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or x.dtype == weight.dtype or weight.dtype.itemsize == 1:
        return
    if autocast_dtype(x.device.type) is None:
        raise TypeError(f"x must have the dtype of the layer's weights, {weight.dtype}, got {x.dtype}")
