"""Layers of this library in the shape that other libraries' models call; made for `swap`.

    swap(gpt2, {GPT2Attention: grassmann_attention(rank=16)})
    swap(encoder, {nn.MultiheadAttention: grassmann_multihead(rank=16)})
    swap(llama, {LlamaDecoderLayer: hyper_blocks(llama_branches, dim=64, depth=4)})
    swap(vit, {"blocks.*.mlp": moe_mlp(num_experts=4)})

Nothing here imports those libraries.
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ffns import SharedMoE
from ..mixers import CausalGrassmannMixer
from ..residuals import KromHC, StreamState

Branch = Callable[[Tensor], Tensor]
# A block and the keywords of its call → its two branches, norms included, without the residual connections.
Branches = Callable[[Any, dict[str, Any]], tuple[Branch, Branch]]

# What the branches below take in, and attributes of such layers that have no part in what they compute.
LLAMA_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
LLAMA_NOTES = {"hidden_size", "layer_idx", "config", "attention_type", "gradient_checkpointing"}
# The layer of transformers that has these parts and norms what comes out of its branches, not what goes in.
NORMED_AFTER = "ChameleonSwinDecoderLayer"
VIT_PARTS = {f"{part}{number}" for part in ("norm", "ls", "drop_path") for number in (1, 2)} | {"attn", "mlp"}


class GrassmannAttention(nn.Module):
    """`CausalGrassmannMixer` in the place of the self-attention of a Hugging Face decoder (GPT-2's, Llama's …).

    Returns what those expect, (hidden states (B, T, dim), None), and decodes with Hugging Face's dynamic cache, which
    holds the reduced vectors z in place of the keys: rank numbers a token and layer. The cache is the keyword argument
    that has a `get_seq_length`, whatever the decoder calls it.

    ValueError for padding before a token (right padding needs no mask, since the mixing is causal), for
    cross-attention, for a cache of fixed size, past the window of sliding attention, and for more than one positional
    argument, such as the residual stream that BLOOM's attention adds.
    """

    def __init__(self, dim: int, layer_idx: int, **options: Any) -> None:
        super().__init__()
        self.mixer = CausalGrassmannMixer(dim, **options)
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        *others: Any,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        **keywords: Any,
    ) -> tuple[Tensor, None]:
        if others:
            raise ValueError(f"hidden_states must be the only positional argument, got {len(others)} more")
        if encoder_hidden_states is not None:
            raise ValueError("encoder_hidden_states must be None: Grassmann mixing is no cross-attention")
        if attention_mask is not None:
            _check_padding(attention_mask)
        caches = [value for value in keywords.values() if hasattr(value, "get_seq_length")]
        state = self._state(hidden_states, *caches) if caches else None
        return self.mixer(hidden_states, state), None

    def _state(self, x: Tensor, cache: Any) -> Any:
        """The mixer's state before x; the cache gets x's reduced vectors."""
        cache = getattr(cache, "self_attention_cache", cache)  # beside one of cross-attention
        z = self.mixer.reduce(x)[:, None]
        history = cache.update(z, z[..., :0], self.layer_idx)[0][:, 0, : -x.shape[1]]
        if cache.get_seq_length(self.layer_idx) != history.shape[1] + x.shape[1]:
            raise ValueError("cache must be a DynamicCache that is not offloaded, got one of fixed size or window")
        state = self.mixer.init_state(x.shape[0], history.shape[1], x.device, z.dtype)
        if (seen := history.shape[1]) > 0:
            span = min(seen, state.z.shape[1])
            state.z[:, -span:] = history[:, -span:]
            state.advance(seen, None)
        return state


def _check_padding(mask: Tensor) -> None:
    # (B, T'): what the last token sees, of a mask (B, 1, T, T'); added to scores, 0 shows and −∞ hides.
    seen = mask if mask.dim() == 2 else mask[:, 0, -1]
    seen = seen == 0 if mask.dim() > 2 and mask.dtype != torch.bool else seen.bool()
    if not bool(seen[:, :1].all() & (seen[:, :-1] | ~seen[:, 1:]).all()):
        raise ValueError(
            "attention_mask must hide the end of a row alone: Grassmann mixing takes no left padding and no sliding "
            "window, and generates nothing after right padding"
        )


def grassmann_attention(**options: Any) -> Callable[[Any], GrassmannAttention]:
    """A factory for `swap`: a Hugging Face self-attention to `GrassmannAttention` with `CausalGrassmannMixer`'s
    options. ValueError for one that is not causal, such as BERT's, and for what is none."""

    def make(old: Any) -> GrassmannAttention:
        if not (hasattr(old, "config") and hasattr(old, "layer_idx") and getattr(old, "is_causal", True)):
            wanted = "the causal self-attention of a decoder of transformers"
            raise ValueError(f"grassmann_attention takes {wanted}, got {type(old).__name__}")
        return GrassmannAttention(old.config.hidden_size, old.layer_idx, **options)

    return make


class GrassmannMultihead(nn.Module):
    """`CausalGrassmannMixer` in the place of a causal `nn.MultiheadAttention`, such as that of a
    `TransformerEncoderLayer`: (query, key, value) → (mixed, None), whatever `need_weights` says.

    ValueError unless query, key and value are one tensor; unless the call is causal, by `is_causal` or an `attn_mask`
    that hides the later tokens and no other; and for a `key_padding_mask` that hides anything but the end of a row,
    which needs no mask, since the mixing is causal. Masks are looked at in eager calls.
    """

    # What torch asks of its own attention before it takes a path around `forward`: this one has none.
    in_proj_weight = in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, dim: int, *, batch_first: bool = False, **options: Any) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.mixer = CausalGrassmannMixer(dim, **options)

    @property
    def out_proj(self) -> nn.Module:
        """A layer with a weight and a bias, which torch's encoder looks at."""
        return self.mixer.gate

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if key is not query or value is not query:
            raise ValueError("query, key and value must be one tensor: Grassmann mixing is no cross-attention")
        if not (is_causal or (attn_mask is not None and _is_causal(attn_mask))):
            raise ValueError("attn_mask must be causal, or is_causal be True: Grassmann mixing sees the past alone")
        if key_padding_mask is not None and not _is_right_padding(key_padding_mask):
            raise ValueError(
                "key_padding_mask must hide the end of a row alone: Grassmann mixing pairs all that is before"
            )
        if self.batch_first:
            return self.mixer(query), None
        return self.mixer(query.transpose(0, 1)).transpose(0, 1), None


# In torch's masks, True hides; of those that are added to scores, 0 shows.


def _is_causal(mask: Tensor) -> bool:
    later = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    return torch.compiler.is_compiling() or bool((mask.bool() == later).all())


def _is_right_padding(mask: Tensor) -> bool:
    hidden = mask.bool()
    return torch.compiler.is_compiling() or not bool((hidden[..., :-1] & ~hidden[..., 1:]).any())


def grassmann_multihead(**options: Any) -> Callable[[Any], GrassmannMultihead]:
    """A factory for `swap`: a causal `nn.MultiheadAttention` to `GrassmannMultihead` with `CausalGrassmannMixer`'s
    options."""
    return lambda old: GrassmannMultihead(old.embed_dim, batch_first=old.batch_first, **options)


class HyperBlock(nn.Module):
    """A pre-norm block of two branches whose residual connections are hyper-connections.

    x (…, dim) goes into the first block and comes out of the last one; streams (…, n, dim) pass between them.
    `block` is the old block, whose parameters and norms go on serving. So does the checkpointing of activations that
    transformers has switched on for it.

    ValueError for `output_hidden_states`, since there are none between the blocks, and for a cache while activations
    are checkpointed, which would be written twice.
    """

    def __init__(self, block: nn.Module, branches: Branches, first: nn.Module, second: nn.Module, ends: str) -> None:
        super().__init__()
        self.branches, self.ends = branches, ends
        self.block: Any = block
        self.first: Any = first
        self.second: Any = second
        self.config = next((module.config for module in block.modules() if hasattr(module, "config")), None)

    def forward(self, hidden_states: Any, **keywords: Any) -> Tensor:
        if keywords.get("output_hidden_states") or getattr(self.config, "output_hidden_states", False):
            raise ValueError("output_hidden_states must be False: streams pass between blocks with hyper-connections")
        if not (getattr(self.block, "gradient_checkpointing", False) and self.training and torch.is_grad_enabled()):
            return self._forward(hidden_states, **keywords)
        if used := [key for key, value in keywords.items() if hasattr(value, "get_seq_length")]:
            raise ValueError(f"{used[0]} must be None while activations are checkpointed: set use_cache=False")
        return self.block._gradient_checkpointing_func(partial(self._forward, **keywords), hidden_states)

    def _forward(self, hidden_states: Any, **keywords: Any) -> Tensor:
        x = self.first.expand(hidden_states) if "first" in self.ends else hidden_states
        connections = (self.first, self.second)
        for connection, branch in zip(connections, self.branches(self.block, keywords), strict=True):
            u, join = connection(x)
            x = join(branch(u))
        if "last" in self.ends:
            return self.second.reduce(x)
        # Other libraries' hooks and checkpointing between blocks want a tensor.
        return x.tensor() if isinstance(x, StreamState) else x


def hyper_blocks(
    branches: Branches, dim: int, depth: int, kind: type[nn.Module] = KromHC, **options: Any
) -> Callable[[nn.Module, str], HyperBlock]:
    """A factory for `swap` that puts hyper-connections around the branches of all `depth` blocks of a model.

    branches: `llama_branches`, `vit_branches`, or one's own. kind, options: the hyper-connection and its arguments;
    with init="identity" the model computes at first what it did before. The number of a block is the last part of its
    qualified name; ValueError if that is none below `depth`.
    """

    def make(old: nn.Module, name: str) -> HyperBlock:
        index = name.rpartition(".")[2]
        if not index.isdigit() or int(index) >= depth:
            raise ValueError(f"{name} must end in the number of a block below depth={depth}")
        layer = 2 * int(index)
        first, second = (kind(None, dim, number, num_layers=2 * depth, **options) for number in (layer, layer + 1))
        ends = ("first " if layer == 0 else "") + ("last" if layer == 2 * depth - 2 else "")
        return HyperBlock(old, branches, first, second, ends)

    return make


def llama_branches(layer: Any, keywords: dict[str, Any]) -> tuple[Branch, Branch]:
    """Of a `LlamaDecoderLayer` and the many decoder layers of transformers with the same attributes.

    ValueError for a layer with others (Gemma 2's has norms after its branches, Granite's scales them), and for
    Chameleon's that has the same and norms after its branches.
    """
    _check_block(layer, LLAMA_PARTS, LLAMA_NOTES)
    if any(kind.__name__ == NORMED_AFTER for kind in type(layer).__mro__):
        raise ValueError(f"{NORMED_AFTER} norms what comes out of its branches, and must norm what goes into them")

    def attend(u: Tensor) -> Tensor:
        return layer.self_attn(hidden_states=layer.input_layernorm(u), **keywords)[0]

    return attend, lambda u: layer.mlp(layer.post_attention_layernorm(u))


def vit_branches(block: Any, keywords: dict[str, Any]) -> tuple[Branch, Branch]:
    """Of the `Block` of timm's vision transformers, layer scale and stochastic depth included.

    ValueError for a block with other attributes: SAM's cuts its tokens into windows.
    """
    _check_block(block, VIT_PARTS, set())

    def attend(u: Tensor) -> Tensor:
        return block.drop_path1(block.ls1(block.attn(block.norm1(u), **keywords)))

    return attend, lambda u: block.drop_path2(block.ls2(block.mlp(block.norm2(u))))


def _check_block(block: nn.Module, parts: set[str], notes: set[str]) -> None:
    """ValueError unless the block is made of `parts`: what else it holds, the branches would leave out.

    notes: names of attributes that have no part in what it computes.
    """
    # Libraries that place a model on several devices give its modules a `forward` of their own.
    held = {*vars(block), *block._modules, *block._parameters, *block._buffers} - notes - {"training", "forward"}
    other = {name for name in held if not name.startswith("_")} ^ parts
    if other:
        raise ValueError(
            f"{type(block).__name__} must be made of {', '.join(sorted(parts))} alone, but differs in "
            f"{', '.join(sorted(other))}: write the function that returns its two branches"
        )


class MoEMlp(nn.Module):
    """`SharedMoE` in the place of an MLP that returns a tensor; `balance_loss` collects what it cannot return."""

    def __init__(self, experts: SharedMoE) -> None:
        super().__init__()
        self.experts = experts
        self.balance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y, self.balance = self.experts(x)
        return y

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles get: a loss that belongs to a graph is neither."""
        return {**self.__dict__, "balance": None}


def moe_mlp(share: bool = False, **options: Any) -> Callable[[Any, nn.Module], MoEMlp]:
    """A factory for `swap`: an MLP with linear layers fc1 and fc2, such as timm's, to `SharedMoE` experts of its size;
    ValueError for any other.

    share: one router and one set of experts for all places of a model, as in WideNet. options: of `SharedMoE`.
    """
    shared: WeakKeyDictionary[nn.Module, SharedMoE] = WeakKeyDictionary()

    def make(old: Any, model: nn.Module) -> MoEMlp:
        experts = shared.get(model) if share else None
        if experts is None:
            if not all(isinstance(getattr(old, name, None), nn.Linear) for name in ("fc1", "fc2")):
                raise ValueError(
                    f"moe_mlp takes an MLP with linear layers fc1 and fc2, got {type(old).__name__}: give swap a "
                    "factory of your own, lambda old: MoEMlp(SharedMoE(dim, hidden_dim))"
                )
            experts = shared[model] = SharedMoE(old.fc1.in_features, old.fc1.out_features, **options)
        return MoEMlp(experts)

    return make


def balance_loss(model: nn.Module) -> Tensor:
    """The sum of the balance losses of the last forward pass, to be added to the training loss; forgets them.

    ValueError if no `MoEMlp` has run since the last call, or, with gradients enabled, if one in training has run
    without, as in checkpointing with use_reentrant=True.
    """
    layers = [module for module in model.modules() if isinstance(module, MoEMlp)]
    losses = {layer: layer.balance for layer in layers if layer.balance is not None}
    for layer in layers:
        layer.balance = None
    if not losses:
        raise ValueError(f"no MoEMlp of {type(model).__name__} has run since balance_loss was last called")
    if torch.is_grad_enabled() and any(
        layer.training and layer.experts.router.requires_grad and not loss.requires_grad
        for layer, loss in losses.items()
    ):
        raise ValueError(
            f"{type(model).__name__} has run without gradients, so its balance loss has none: checkpoint with "
            "use_reentrant=False, or call balance_loss under torch.no_grad"
        )
    return torch.stack(list(losses.values())).sum()
