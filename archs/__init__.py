"""Models made of four slots — mixer, residual, ffn, head — and every layer on its own."""

from . import presets  # noqa: F401  (registers the paper's models)
from .config import ModelConfig
from .encoder import Encoder, EncoderConfig
from .ffns import MLP, SharedMoE
from .heads import ClassifierHead, CosineHead, GrassmannHead, LinearHead, TiedHead
from .heads.nli import PluckerNLIHead, TransformerNLIHead
from .interop.swap import SwapReport, swap
from .io import CheckpointError, MissingCheckpointError, atomic_write, load_model, read_config, save_model
from .lm import LanguageModel
from .mixers import (
    BidirectionalAttention,
    CausalAttention,
    CausalConvolution,
    CausalGrassmannMixer,
    ConcatenationMixer,
    HadamardMixer,
    LocalAttention,
)
from .registry import create_model, list_models, model_config, register_model, register_slot
from .residuals import (
    MHC,
    HyperConnection,
    KromHC,
    MHCLite,
    PlainResidual,
    StreamState,
    get_init_and_expand_reduce_stream_functions,
)
from .vision import VisionConfig, VisionModel, WideNet

__all__ = [
    "MHC",
    "MLP",
    "BidirectionalAttention",
    "CausalAttention",
    "CausalConvolution",
    "CausalGrassmannMixer",
    "CheckpointError",
    "ClassifierHead",
    "ConcatenationMixer",
    "CosineHead",
    "Encoder",
    "EncoderConfig",
    "GrassmannHead",
    "HadamardMixer",
    "HyperConnection",
    "KromHC",
    "LanguageModel",
    "LinearHead",
    "LocalAttention",
    "MHCLite",
    "MissingCheckpointError",
    "ModelConfig",
    "PlainResidual",
    "PluckerNLIHead",
    "SharedMoE",
    "StreamState",
    "SwapReport",
    "TiedHead",
    "TransformerNLIHead",
    "VisionConfig",
    "VisionModel",
    "WideNet",
    "atomic_write",
    "create_model",
    "get_init_and_expand_reduce_stream_functions",
    "list_models",
    "load_model",
    "model_config",
    "read_config",
    "register_model",
    "register_slot",
    "save_model",
    "swap",
]
