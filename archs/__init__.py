"""Models made of four slots — mixer, residual, ffn, head — and every layer on its own."""

from . import presets  # noqa: F401  (registers the paper's models)
from .config import ModelConfig
from .encoder import Encoder, EncoderConfig
from .ffns import MLP, SharedMoE
from .heads import ClassifierHead, LinearHead, TiedHead
from .heads.cross_entropy import linear_cross_entropy
from .io import CheckpointError, MissingCheckpointError, atomic_write, load_model, read_config, save_model
from .lm import LanguageModel
from .mixers import BidirectionalAttention, CausalAttention, CausalGrassmannMixer
from .registry import create_model, list_models, model_config, register_model, register_slot
from .residuals import PlainResidual
from .vision import VisionConfig, VisionModel, WideNet

__all__ = [
    "MLP",
    "BidirectionalAttention",
    "CausalAttention",
    "CausalGrassmannMixer",
    "CheckpointError",
    "ClassifierHead",
    "Encoder",
    "EncoderConfig",
    "LanguageModel",
    "LinearHead",
    "MissingCheckpointError",
    "ModelConfig",
    "PlainResidual",
    "SharedMoE",
    "TiedHead",
    "VisionConfig",
    "VisionModel",
    "WideNet",
    "atomic_write",
    "create_model",
    "linear_cross_entropy",
    "list_models",
    "load_model",
    "model_config",
    "read_config",
    "register_model",
    "register_slot",
    "save_model",
]
