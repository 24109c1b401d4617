"""grassland's models in Hugging Face transformers; importing this module registers them.

    import grassland.archs.interop.hf
    model = AutoModelForCausalLM.from_pretrained("runs/grassmann_lm_6l-wikitext")
    model.generate(input_ids, max_new_tokens=20)
    model.save_pretrained("out")        # grassland.archs.load_model("out") reads it, too

There is one folder format: `config.json` with a model_type beside grassland's own entries, and `model.safetensors` with
grassland's tensor names, so a run's folder needs no conversion, nor does what `save_pretrained` writes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.losses import IGNORE
from ..config import ModelConfig
from ..ffns import SharedMoE
from ..io import FORMAT, MODEL_TYPE, VERSION, CheckpointError
from ..lm import LMState, check_range
from ..registry import assembly_class

try:
    import transformers
    from transformers.modeling_outputs import (
        BaseModelOutputWithPooling,
        CausalLMOutputWithPast,
        ImageClassifierOutput,
    )
except ImportError as error:
    raise ImportError("grassland.archs.interop.hf needs transformers: pip install 'grassland[hf]'") from error

PREFIX = "model."


class GrasslandConfig(transformers.PreTrainedConfig):
    """`model`: the dict of a `ModelConfig` (`to_dict`), of any assembly; None for that of a default language model."""

    model_type = MODEL_TYPE
    model: dict | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        values = self.model or {}
        own = assembly_class(values.get("kind", ModelConfig.kind)).config_class.from_dict(values)
        self.model = own.to_dict()
        if hasattr(own, "num_classes") and self.id2label is None:
            kwargs.setdefault("num_labels", own.num_classes)
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, config: ModelConfig, **kwargs: Any) -> "GrasslandConfig":
        """The Hugging Face config of a model made by `create_model`: `GrasslandConfig.of(model.config)`."""
        return cls(model=config.to_dict(), **kwargs)

    def own(self) -> ModelConfig:
        """The `ModelConfig`."""
        values: dict[str, Any] = self.model or {}
        return assembly_class(values["kind"]).config_class.from_dict(values)

    @property
    def vocab_size(self) -> int:
        return self.own().vocab_size

    @property
    def hidden_size(self) -> int:
        return self.own().dim

    @property
    def num_hidden_layers(self) -> int:
        return self.own().depth

    @property
    def max_position_embeddings(self) -> int:
        return self.own().max_len

    @property
    def image_size(self) -> int | None:
        return getattr(self.own(), "image_size", None)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written: also what makes it a checkpoint of grassland's."""
        return {"format": FORMAT, "version": VERSION, **super().to_diff_dict(), "model": self.model}


class GrasslandCache(transformers.Cache):
    """The decoding state of a batch in the place of a key-value cache. It cannot be cropped."""

    def __init__(self, state: LMState) -> None:
        super().__init__(layers=[])
        self.state = state

    @property
    def is_linear(self) -> list[bool]:
        """False a layer: `generate` then feeds what the cache has not seen, where of no layers it feeds everything."""
        return [False] * len(self.state.layers)

    @property
    def is_croppable(self) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included."""
        return self.state.progress.extent

    def reset(self) -> None:
        for part in self._parts():
            part.reset()

    def _parts(self) -> list[Any]:
        return [*self.state.layers, self.state.progress]

    def select(self, rows: Tensor) -> None:
        """Replace the batch by some of its rows, by index."""
        for part in self._parts():
            for name, value in vars(part).items():
                if isinstance(value, Tensor):
                    setattr(part, name, value.index_select(0, rows.to(value.device)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        seen = self.state.progress.seen
        self.select(torch.arange(len(seen), device=seen.device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a decoding state cannot be cropped; assisted generation is not supported")


class GrasslandPreTrainedModel(transformers.PreTrainedModel):
    """A model of `create_model` as `self.model`, behind transformers' interface."""

    config_class = GrasslandConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    kinds: tuple[str, ...] = ()
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: GrasslandConfig) -> None:
        super().__init__(config)
        own = config.own()
        if own.kind not in self.kinds:
            raise ValueError(f"{type(self).__name__} is for kind {' or '.join(self.kinds)}, got {own.kind!r}")
        self.model: Any = assembly_class(own.kind)(own)
        self.register_load_state_dict_pre_hook(_add_prefix)
        self.post_init()

    @classmethod
    def wrap(cls, model: nn.Module) -> Any:
        """A model made by `create_model` or `load_model`, its weights shared, not copied."""
        own = getattr(model, "config", None)
        if not isinstance(own, ModelConfig):
            raise ValueError(f"model must have a ModelConfig as its .config, got {type(model).__name__} without one")
        with torch.device("meta"):
            made = cls(GrasslandConfig.of(own))
        made.model = model
        return made.train(model.training)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; CheckpointError for tensors that are missing or superfluous, or have another shape."""
        wanted = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, **kwargs, output_loading_info=True)
        model, info = loaded
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found := sorted(map(str, info[what])):
                raise CheckpointError(f"{args[0] if args else ''}: {what.replace('_', ' ')}: {', '.join(found[:3])}")
        return (model, info) if wanted else model

    def save_pretrained(
        self, save_directory: Any, *, state_dict: Mapping[str, Tensor] | None = None, **kw: Any
    ) -> None:
        """As in transformers, under grassland's own tensor names."""
        tensors = self.state_dict() if state_dict is None else state_dict
        super().save_pretrained(
            save_directory, state_dict={name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}, **kw
        )

    def _init_weights(self, module: nn.Module) -> None:
        """Zeroes the tally, which no checkpoint holds; the layers themselves draw the weights of a fresh model."""
        if isinstance(module, SharedMoE):
            module.tally.zero_()

    def get_input_embeddings(self) -> nn.Module:
        if not hasattr(self.model, "embed"):
            raise NotImplementedError(f"a model of kind {self.model.config.kind!r} has no token embeddings")
        return self.model.embed

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("the vocabulary is part of the model's config; make a model with another vocab_size instead")


class GrasslandModel(GrasslandPreTrainedModel):
    """Features without the head: last_hidden_state (B, T, dim) of texts, pooler_output (B, dim) of images."""

    kinds = ("lm", "mlm", "vision")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        if self.model.config.kind == "vision":
            pooled = self.model.features(_given(pixel_values, "pixel_values"))[0]
            output = BaseModelOutputWithPooling(pooler_output=pooled)
        elif self.model.config.kind == "mlm":
            mask = None if attention_mask is None else attention_mask.bool()
            ids = _given(input_ids, "input_ids")
            features = self.model.features(ids, mask=mask, token_types=token_type_ids)[0]
            output = BaseModelOutputWithPooling(last_hidden_state=features)
        else:
            features = _causal_features(self.model, _given(input_ids, "input_ids"), attention_mask, None)[0]
            output = BaseModelOutputWithPooling(last_hidden_state=features)
        return output.to_tuple() if return_dict is False else output


class GrasslandForCausalLM(GrasslandPreTrainedModel, transformers.GenerationMixin):
    """A causal language model. `generate` decodes with grassland's own state; batches may be padded on either side.

    In training with labels the logits are not materialised: the output's `logits` is None.
    """

    kinds = ("lm",)
    accepts_loss_kwargs = True
    # The state cannot go back to an earlier token.
    _is_stateful = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: GrasslandCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """input_ids (B, T); attention_mask (B, T), or (B, past + T) with a cache: 0 for padding, whose logits are those
        of the token before it.

        labels (B, T): input_ids again, −100 not counting; shifted here. The loss is the mean over the labels that
        count, or their sum over `num_items_in_batch`; in training the auxiliary losses are added, with the weight that
        these labels have among the items.
        """
        input_ids = _given(input_ids, "input_ids")
        use_cache = bool(self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = GrasslandCache(self.model.init_state(input_ids.shape[0]))
        if cache is not None and not isinstance(cache, GrasslandCache):
            raise ValueError(f"cache must be a GrasslandCache, got {type(cache).__name__}")
        x, auxiliary = _causal_features(self.model, input_ids, attention_mask, cache)
        loss = None if labels is None else self._loss(x, labels, auxiliary, num_items_in_batch)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = None if self.training and labels is not None else self.model.head.logits(x[:, keep])
        output = CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache if use_cache else None)
        return output.to_tuple() if return_dict is False else output

    def _loss(self, x: Tensor, labels: Tensor, auxiliary: list[Tensor], items: Tensor | int | None) -> Tensor:
        if labels.shape != x.shape[:2]:
            raise ValueError(f"labels must have input_ids' shape {tuple(x.shape[:2])}, got {tuple(labels.shape)}")
        check_range("labels", labels, self.model.config.vocab_size, ignore=IGNORE)
        labels = labels[:, 1:]
        loss = self.model.head.loss(x[:, :-1], labels, "mean" if items is None else "sum")
        if self.training and auxiliary:
            loss = loss + sum(auxiliary) * (1 if items is None else (labels != IGNORE).sum())
        return loss if items is None else loss / items

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


class GrasslandForImageClassification(GrasslandPreTrainedModel):
    """An image classifier: pixel_values (B, channels, S, S) → logits (B, num_classes)."""

    kinds = ("vision",)
    main_input_name = "pixel_values"

    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> Any:
        """labels (B,) int64, or probabilities (B, num_classes); in training the auxiliary losses are added."""
        x, auxiliary = self.model.features(_given(pixel_values, "pixel_values"))
        loss = None
        if labels is not None:
            loss = self.model.head.loss(x, labels)
            loss = loss + sum(auxiliary) if self.training and auxiliary else loss
        output = ImageClassifierOutput(loss=loss, logits=self.model.head.logits(x))
        return output.to_tuple() if return_dict is False else output


def register() -> None:
    """Make transformers' Auto classes know grassland's models; importing this module has done so."""
    transformers.AutoConfig.register(MODEL_TYPE, GrasslandConfig, exist_ok=True)
    transformers.AutoModel.register(GrasslandConfig, GrasslandModel, exist_ok=True)
    transformers.AutoModelForCausalLM.register(GrasslandConfig, GrasslandForCausalLM, exist_ok=True)
    auto = transformers.AutoModelForImageClassification
    auto.register(GrasslandConfig, GrasslandForImageClassification, exist_ok=True)
    fast = transformers.PreTrainedTokenizerFast
    transformers.AutoTokenizer.register(GrasslandConfig, fast_tokenizer_class=fast, exist_ok=True)


def _given(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"{name} must be given")
    return tensor


def _causal_features(
    model: Any, ids: Tensor, mask: Tensor | None, cache: GrasslandCache | None
) -> tuple[Tensor, list[Tensor]]:
    """Features (B, T, dim) and auxiliary losses. Padding is moved to the right end of its row, where a causal model
    does not see it, and back; it gets the features of the token before it, from where right-padded prompts go on, or 0.
    """
    state = None if cache is None else cache.state
    if mask is None:
        return model._features(ids, state)
    past = 0 if cache is None else cache.get_seq_length()
    if mask.shape != (wanted := (ids.shape[0], past + ids.shape[1])):
        tokens = f"{past} tokens in the cache and input_ids {tuple(ids.shape)}"
        raise ValueError(f"attention_mask must be {wanted} for {tokens}, got {tuple(mask.shape)}")
    mask = mask[:, past:].bool()
    # Asking the device takes less than moving nothing, and generation waits for it at every token anyway.
    if cache is not None and not torch.compiler.is_compiling() and bool(mask.all()):
        return model._features(ids, state)
    order = mask.int().argsort(dim=1, descending=True, stable=True)
    aligned = ids.gather(1, order).masked_fill(~mask.gather(1, order), 0)
    x, auxiliary = model._features(aligned, state, mask.sum(1))
    seen = mask.cumsum(1)[..., None]
    return x.gather(1, (seen - 1).clamp_min(0).expand_as(x)).masked_fill(seen == 0, 0), auxiliary


def _add_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Tensors under grassland's own names, as `save_pretrained` writes them, get the wrapper's."""
    for name in [name for name in state_dict if not name.startswith(prefix + PREFIX)]:
        if name.startswith(prefix):
            state_dict[prefix + PREFIX + name.removeprefix(prefix)] = state_dict.pop(name)


register()
