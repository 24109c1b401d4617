"""Inputs that a layer cannot take are named, with what is wanted instead."""

import numpy as np
import pytest
import torch
from torch import nn

from grassland.archs import (
    MHC,
    MLP,
    BidirectionalAttention,
    CausalAttention,
    CausalConvolution,
    CausalGrassmannMixer,
    ClassifierHead,
    ConcatenationMixer,
    CosineHead,
    GrassmannHead,
    HadamardMixer,
    HyperConnection,
    KromHC,
    LinearHead,
    LocalAttention,
    PlainResidual,
    SharedMoE,
    TiedHead,
    create_model,
    swap,
)
from grassland.archs.mixers.window import WindowGrassmannMixer

HISTORY = [CausalConvolution, CausalGrassmannMixer, ConcatenationMixer, HadamardMixer, LocalAttention]
MIXERS = [*HISTORY, BidirectionalAttention, CausalAttention, WindowGrassmannMixer]
FFNS = [MLP, SharedMoE]
HEADS = [ClassifierHead, CosineHead, LinearHead, TiedHead]
RESIDUALS = [HyperConnection, KromHC, MHC, PlainResidual]


def layer(cls):
    """What is called with x of width 16."""
    if cls in MIXERS:
        return cls(16)
    if cls in FFNS:
        return cls(16, 8).eval()
    return cls(16, 5, nn.Embedding(5, 16))


@pytest.mark.parametrize("cls", [*MIXERS, *FFNS, *HEADS])
def test_a_wrong_width_is_named(cls):
    with pytest.raises(ValueError, match=r"x must be \(.*, 16\), got \(2, 7, 12\)"):
        layer(cls)(torch.randn(2, 7, 12))


@pytest.mark.parametrize("cls", MIXERS)
@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 7, 16)])
def test_a_mixer_takes_a_batch_of_sequences_alone(cls, shape):
    with pytest.raises(ValueError, match=r"x must be \(B, T, 16\)"):
        layer(cls)(torch.randn(shape))


@pytest.mark.parametrize("cls", [*MIXERS, *FFNS, *HEADS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_a_wrong_dtype_is_named(cls, dtype):
    with pytest.raises(TypeError, match=r"must (have the dtype|be a floating-point)"):
        layer(cls)(torch.ones(2, 7, 16, dtype=dtype))


def test_experts_of_another_dtype_are_no_fault_of_theirs():
    with pytest.raises(TypeError, match=r"x must have the dtype of .* torch\.float32, got torch\.bfloat16"):
        SharedMoE(16, 8)(torch.randn(3, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("cls", [*MIXERS, *FFNS, *HEADS, *RESIDUALS])
@pytest.mark.parametrize("wrong", [0, -4, "8", 8.0, True])
def test_a_wrong_size_is_named(cls, wrong):
    rest = () if cls in MIXERS else (8, nn.Embedding(8, 16)) if cls in HEADS else (8,)
    make = (lambda dim: cls(None, dim)) if cls in RESIDUALS else lambda dim: cls(dim, *rest)
    with pytest.raises(ValueError, match=f"dim must be a positive integer, got {wrong!r}"):
        make(wrong)
    if cls in FFNS:
        with pytest.raises(ValueError, match=f"hidden_dim must be a positive integer, got {wrong!r}"):
            cls(16, wrong)
    if cls in HEADS:
        with pytest.raises(ValueError, match=f"num_classes must be a positive integer, got {wrong!r}"):
            cls(16, wrong, nn.Embedding(8, 16))


@pytest.mark.parametrize("wrong", [None, "1e-6", -1.0, float("nan")])
def test_a_wrong_epsilon_is_named(wrong):
    with pytest.raises(ValueError, match=f"^eps must be positive and finite, got {wrong!r}$"):
        CausalGrassmannMixer(16, eps=wrong)
    for cls in RESIDUALS:
        with pytest.raises(ValueError, match=f"^norm_eps must be at least 0 and finite, got {wrong!r}$"):
            cls(torch.tanh, 16, norm_eps=wrong)


@pytest.mark.parametrize("cls", RESIDUALS)
@pytest.mark.parametrize("wrong", [None, [1.0], ()])
def test_a_branch_without_a_tensor_is_named(cls, wrong):
    residual = cls(lambda x: wrong, 16)
    with pytest.raises(TypeError, match=f"a branch must return a tensor.*got {type(wrong).__name__}"):
        residual(residual.expand(torch.randn(2, 16)))


@pytest.mark.parametrize("cls", [*MIXERS, *FFNS, *HEADS])
def test_autocast_chooses_the_dtype_itself(cls):
    with torch.autocast("cpu", torch.bfloat16):
        layer(cls)(torch.randn(2, 7, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("cls", [*HISTORY, BidirectionalAttention, CausalAttention])
def test_no_tokens_are_no_tokens(cls):
    assert layer(cls)(torch.randn(2, 0, 16)).shape == (2, 0, 16)


def test_a_replaced_projection_needs_no_weight():
    class Twice(nn.Module):
        def forward(self, x):
            return torch.cat([x, x], -1)

    mlp = MLP(4, 8)
    swap(mlp, {"up": lambda old: Twice()})
    assert mlp(torch.randn(3, 4)).shape == (3, 4)


@pytest.mark.parametrize("cls", HISTORY)
def test_offsets_beyond_the_state_are_refused(cls):
    mixer = cls(16, rank=4, offsets=(1, 2))
    state, x = mixer.init_state(3, 9), torch.randn(3, 2, 16)
    mixer(x, state)
    with pytest.raises(ValueError, match=r"offsets must be at most 2, the span of the state, got \(1, 5\)"):
        mixer(x, state, None, (1, 5))
    with pytest.raises(ValueError, match=r"offsets must be .* positive integers, got \(0, 1\)"):
        mixer(x, state, None, (0, 1))
    with pytest.raises(ValueError, match=r"offsets must be .* positive integers, got 3"):
        mixer.init_state(3, 9, offsets=3)
    assert state.extent == 2


@pytest.mark.parametrize(
    "given", [np.array([1, 2]), torch.tensor([1, 2]), {1, 2}, (np.int64(1), np.int64(2)), range(1, 3)]
)
def test_any_integers_are_offsets(given):
    mixer = CausalGrassmannMixer(16, rank=4, offsets=given)
    assert mixer.offsets == (1, 2) and all(type(delta) is int for delta in mixer.offsets)
    x = torch.randn(2, 5, 16)
    assert torch.equal(mixer(x, None, None, given), mixer(x))


@pytest.mark.parametrize(
    "wrong", ["12", [True], [1.0], torch.tensor([1.0]), np.array([[1, 2]]), [(1,), (2,)], [], None]
)
def test_what_is_no_offsets_is_named(wrong):
    with pytest.raises(ValueError, match="offsets must be one or more positive integers, got"):
        CausalGrassmannMixer(16, rank=4, offsets=wrong)


@pytest.mark.parametrize("cls", [*HISTORY, CausalAttention])
def test_a_state_of_another_batch_is_refused(cls):
    mixer = layer(cls)
    state = mixer.init_state(3, 9)
    with pytest.raises(ValueError, match="x must have the 3 rows of the state, got 1"):
        mixer(torch.randn(1, 2, 16), state)
    assert state.fresh


@pytest.mark.parametrize("cls", [*HISTORY, CausalAttention])
def test_a_state_that_is_reset_knows_nothing_of_what_was_before(cls):
    mixer, x = layer(cls), torch.randn(2, 6, 16)
    state = mixer.init_state(2, 9)
    mixer(torch.full((2, 5, 16), torch.nan), state)
    state.reset()
    lengths = torch.tensor([3, 0])
    mixer(x[:, :3], state, lengths)
    torch.testing.assert_close(mixer(x[:, 3:], state), torch.stack([mixer(x)[0, 3:], mixer(x[:, 3:])[1]]))


WRONG_LENGTHS = [
    ([2, 3], TypeError, r"lengths must be an int64 tensor \(2,\), got list"),
    (torch.tensor([2.0, 3.0]), TypeError, r"lengths must be .*, got torch\.float32"),
    (torch.tensor([2]), ValueError, r"lengths must be \(2,\), one a row, got \(1,\)"),
    (torch.tensor([2, 19]), ValueError, r"lengths must be in \[0, 4\], got values from 2 to 19"),
    (torch.tensor([-1, 4]), ValueError, r"lengths must be in \[0, 4\], got values from -1 to 4"),
]


@pytest.mark.parametrize(("lengths", "error", "message"), WRONG_LENGTHS)
def test_wrong_lengths_are_named(lengths, error, message):
    for cls in [*HISTORY, CausalAttention]:
        mixer = layer(cls)
        state = mixer.init_state(2, 9)
        with pytest.raises(error, match=message):
            mixer(torch.randn(2, 4, 16), state, lengths)
        assert state.fresh
    model = create_model("lm", vocab_size=5, dim=8, depth=1, ffn_dim=8)
    with pytest.raises(error, match=message):
        model.decode(torch.zeros(2, 4, dtype=torch.int64), model.init_state(2), lengths)


@pytest.mark.parametrize("cls", HEADS)
def test_labels_of_a_wrong_dtype_are_named(cls):
    with pytest.raises(TypeError, match=r"must be int64 classes.*, got torch\.int32"):
        layer(cls).loss(torch.randn(3, 16), torch.tensor([0, 1, 2], dtype=torch.int32))


@pytest.mark.parametrize("head", [*map(layer, HEADS), GrassmannHead(16, 5, 2)], ids=lambda head: type(head).__name__)
def test_a_heads_labels_are_named_as_it_calls_them(head):
    x, labels, soft = torch.randn(3, 16), torch.tensor([0, 4, -100]), torch.full((3, 5), 0.2)
    for wrong in (torch.tensor([0, 5, 1]), torch.tensor([0, -1, 1])):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 5\) or -100 \(ignored\), got (5|-1)"):
            head.loss(x, wrong)
    with pytest.raises(ValueError, match=r"labels must be \(3,\) .*, got \(2,\)"):
        head.loss(x, labels[:2])
    with pytest.raises(ValueError, match=r"labels must be \(3, 5\) .*, got \(3, 4\)"):
        head.loss(x, soft[:, :4])
    for targets in (labels, soft):
        with pytest.raises(ValueError, match=r"label_smoothing must be a number in \[0, 1\], got 2"):
            head.loss(x, targets, label_smoothing=2)
        with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'none'"):
            head.loss(x, targets, "none")


@pytest.mark.parametrize("cls", HEADS)
def test_a_head_is_called_for_its_logits(cls):
    head, x = layer(cls), torch.randn(2, 7, 16)
    assert head(x).shape == (2, 7, 5) and torch.equal(head(x), head.logits(x))


def test_a_wrong_dtype_of_a_models_input_is_named():
    sizes = {"dim": 8, "depth": 1, "ffn_dim": 8}
    ids, images = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 3, 8, 8)
    for model in (create_model("lm", vocab_size=5, **sizes), create_model("mlm", vocab_size=5, **sizes)):
        with pytest.raises(TypeError, match=r"input_ids must be int64, got torch\.float32"):
            model(ids.float())
        with pytest.raises(TypeError, match=r"labels must be int64, got torch\.float32"):
            model(ids, labels=ids.float())
    with pytest.raises(TypeError, match=r"labels must be int64 classes .*, got torch\.int32"):
        create_model("lm", vocab_size=5, **sizes)(ids, labels=ids.int())
    vision = create_model("vision", image_size=8, patch_size=4, num_classes=3, **sizes)
    with pytest.raises(TypeError, match=r"images must be floating-point, got torch\.uint8"):
        vision(images.byte())
