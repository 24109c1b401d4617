"""The paper's models by name."""

from .config import ModelConfig
from .registry import register_model


@register_model("grassmann_lm_6l")
def grassmann_lm_6l() -> ModelConfig:
    """arXiv 2512.19428, 6 layers, 128 tokens: 13,001,920 parameters."""
    return _grassmann(depth=6, schedule=(1, 2, 4, 8, 12, 16))


@register_model("grassmann_lm_12l")
def grassmann_lm_12l() -> ModelConfig:
    """arXiv 2512.19428, 12 layers: 18,156,928 parameters.

    The paper's counts are for 128 positions even here; its runs at 256 tokens need `max_len=256` (32,768 more).
    """
    return _grassmann(depth=12, schedule=(1, 1, 2, 2, 4, 4, 8, 8, 12, 12, 16, 16))


@register_model("transformer_lm_6l")
def transformer_lm_6l() -> ModelConfig:
    """The paper's baseline, 6 layers, 128 tokens: 12,585,472 parameters."""
    return ModelConfig(mixer="attention", depth=6, options={"num_heads": 4})


@register_model("transformer_lm_12l")
def transformer_lm_12l() -> ModelConfig:
    """The paper's baseline, 12 layers: 17,324,032 parameters; `max_len=256` as in `grassmann_lm_12l`."""
    return ModelConfig(mixer="attention", depth=12, options={"num_heads": 4})


@register_model("kromhc_lm_6l")
def kromhc_lm_6l() -> ModelConfig:
    """arXiv 2601.21579, D = 6, C = 384, n = 4: a causal Transformer with pre-norm branches and KromHC residuals."""
    return _kromhc(depth=6)


@register_model("kromhc_lm_12l")
def kromhc_lm_12l() -> ModelConfig:
    """arXiv 2601.21579, D = 12, C = 768, n = 4: 958,824 parameters of hyper-connections, the paper's 959K."""
    return _kromhc(depth=12)


def _kromhc(depth: int) -> ModelConfig:
    """nanochat's sizes: 64 channels a layer, heads of 128, four times as wide an ffn. `residual=` gives the rivals."""
    dim = 64 * depth
    return ModelConfig(
        vocab_size=32768, max_len=2048, dim=dim, depth=depth, ffn_dim=4 * dim, norm="pre", mixer="attention",
        residual="kromhc", options={"num_heads": dim // 128, "num_streams": 4},
    )  # fmt: skip


def _grassmann(depth: int, schedule: tuple[int, ...]) -> ModelConfig:
    """One offset a layer, in schedule order; the undescribed Linear(d, d) that the paper's counts show."""
    offsets = tuple((delta,) for delta in schedule)
    options = {"rank": 32, "offsets": offsets, "out_proj": True}
    return ModelConfig(mixer="grassmann", depth=depth, options=options)
