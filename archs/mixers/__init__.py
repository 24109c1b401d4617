"""Mixers: tokens to tokens, (B, T, dim) → (B, T, dim), causal unless `causal` is False.

A mixer is constructed as `Mixer(dim, *, options…, device, dtype)` and has

- `forward(x, state=None, lengths=None, **layer_options)`: with a state, x continues the sequences that the state has
  seen, and the state is updated in place. Rows may be of different length: row b's first `lengths[b]` tokens count,
  the rest is right padding whose outputs mean nothing.
- `init_state(batch_size, max_len, device=None, dtype=None, **layer_options)`: a fresh state.
- `flops_per_token(seq_len, **layer_options)`: forward FLOPs a token, averaged over a sequence.
- `carries_input`: True if the output already blends the input in, so that post-norm adds no residual.
- `outputs()`: the weights that it ends in, for models with `scaled_init`, which need them unless it carries its input.
- `layer_options`: names of options that a model may give as one entry a layer; the methods above take them too, which
  is how blocks with different options can share one mixer's weights.
- `causal`, True if absent. A mixer with causal=False has `forward(x, state=None, lengths=None, mask=None)`, mask (B, T)
  bool, False for padding, and no decoding state.
"""

from .attention import CausalAttention
from .bidirectional import BidirectionalAttention
from .controls import CausalConvolution, ConcatenationMixer, HadamardMixer
from .grassmann import CausalGrassmannMixer
from .local_attention import LocalAttention
from .state import MixerState, check_lengths

__all__ = [
    "BidirectionalAttention",
    "CausalAttention",
    "CausalConvolution",
    "CausalGrassmannMixer",
    "ConcatenationMixer",
    "HadamardMixer",
    "LocalAttention",
    "MixerState",
    "check_lengths",
]
