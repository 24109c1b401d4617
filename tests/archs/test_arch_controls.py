"""The controls of Grassmann mixing against their equations, and their number of parameters; the cosine head.

Causality, decoding and ragged batches of the controls are tested with the other mixers in test_arch_lm.py.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from grassland.archs import CosineHead, create_model
from grassland.archs.mixers import (
    CausalConvolution,
    CausalGrassmannMixer,
    ConcatenationMixer,
    HadamardMixer,
    LocalAttention,
)

CONTROLS = [CausalConvolution, HadamardMixer, ConcatenationMixer, LocalAttention]
OFFSETS = (1, 2, 4)


def randomised(cls, **options):
    torch.manual_seed(0)
    mixer = cls(6, rank=4, offsets=OFFSETS, dtype=torch.float64, **options)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixer


def convolution(mixer, x, t):
    u = mixer.reduce(x)
    shifted = [tap * u[t - d] for tap, d in zip(mixer.taps, OFFSETS, strict=True) if d <= t]
    return mixer.project(sum(shifted, torch.zeros_like(u[0])))


def hadamard(mixer, x, t):
    z = mixer.reduce(x)
    products = [z[t] * z[t - d] for d in OFFSETS if d <= t]
    return mixer.project(torch.stack([p / p.norm() for p in products])).mean(0)


def concatenation(mixer, x, t):
    z = mixer.reduce(x)
    weight = torch.cat([mixer.hidden.weight, mixer.hidden_past.weight], dim=1)
    pairs = [F.gelu(weight @ torch.cat([z[t], z[t - d]]) + mixer.hidden.bias) for d in OFFSETS if d <= t]
    return torch.stack([mixer.project(p) for p in pairs]).mean(0)


def local_attention(mixer, x, t):
    q, k, v = mixer.qkv(x).split(mixer.width, dim=-1)
    seen = slice(max(0, t - max(OFFSETS)), t + 1)
    heads = zip(*(a.chunk(mixer.num_heads, dim=-1) for a in (q[t], k[seen], v[seen])), strict=True)
    return mixer.project(torch.cat([(hk @ hq / len(hq) ** 0.5).softmax(0) @ hv for hq, hk, hv in heads]))


LITERAL = dict(zip(CONTROLS, [convolution, hadamard, concatenation, local_attention], strict=True))


@pytest.mark.parametrize("cls", CONTROLS)
@pytest.mark.parametrize("length", [1, 3, 9])
def test_mixer_is_its_equation(cls, length):
    mixer = randomised(cls)
    x = torch.randn(2, length, 6, dtype=torch.float64)
    out = mixer(x)
    for b, t in ((b, t) for b in range(2) for t in range(length)):
        unpaired = t == 0 and cls in (HadamardMixer, ConcatenationMixer)
        g = mixer.out_proj(torch.zeros(6, dtype=torch.float64) if unpaired else LITERAL[cls](mixer, x[b], t))
        alpha = torch.sigmoid(mixer.gate(torch.cat([x[b, t], g])))
        torch.testing.assert_close(out[b, t], alpha * x[b, t] + (1 - alpha) * g, atol=1e-12, rtol=0)


@pytest.mark.parametrize("cls", CONTROLS)
@pytest.mark.parametrize(("dim", "rank"), [(256, 32), (64, 16)])
def test_parameters_are_those_of_the_grassmann_mixer_to_half_a_unit(cls, dim, rank):
    options = {"rank": rank, "offsets": (1, 2, 4), "device": "meta"}
    count = lambda mixer: sum(p.numel() for p in mixer.parameters())  # noqa: E731
    mixer, wanted = cls(dim, **options), count(CausalGrassmannMixer(dim, **options))
    step = count(cls(dim, width=mixer.width + mixer.unit, **options)) - count(mixer)
    assert abs(count(mixer) - wanted) <= step / 2
    assert count(mixer) == pytest.approx(wanted, rel=0.03 if dim < 256 else 0.002)


@pytest.mark.parametrize("name", ["convolution", "hadamard", "concatenation", "local_attention"])
def test_presets_models_differ_in_nothing_but_the_pairing(name):
    model = create_model("grassmann_lm_6l", mixer=name, device="meta")
    assert model.num_parameters() == pytest.approx(13_001_920, rel=1e-3)
    assert [block.mixer.branch.offsets for block in model.blocks] == [(d,) for d in (1, 2, 4, 8, 12, 16)]


@pytest.mark.parametrize("cls", CONTROLS)
def test_flops_count_the_matrices_and_the_offsets_within_the_length(cls):
    mixer = cls(16, rank=4, offsets=(1, 9), device="meta")
    matrices = 2 * sum(m.weight.numel() for m in mixer.modules() if isinstance(m, nn.Linear))
    assert mixer.flops_per_token(64) > mixer.flops_per_token(8) > mixer.flops_per_token(1) >= matrices


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (HadamardMixer, {"rank": 1}, "rank must be an integer of at least 2, got 1"),
        (CausalConvolution, {"width": 0}, "width must be an integer of at least 1, got 0"),
        (ConcatenationMixer, {"offsets": ()}, "offsets must be one or more positive integers"),
        (LocalAttention, {"num_heads": 0}, "num_heads must be a positive integer, got 0"),
        (LocalAttention, {"num_heads": 4, "width": 6}, "width must be a multiple of num_heads=4, got 6"),
    ],
)
def test_bad_options_name_themselves(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(8, **options)


def test_options_of_other_mixers_are_refused_by_name():
    with pytest.raises(ValueError, match="option 'eps' belongs to mixer='grassmann', which is not chosen"):
        create_model("lm", mixer="hadamard", eps=1e-3)


def test_a_shared_convolution_needs_as_many_offsets_in_every_layer():
    sizes = {"vocab_size": 11, "max_len": 8, "dim": 8, "depth": 2, "ffn_dim": 8, "rank": 3}
    model = create_model("lm", mixer="convolution", share=("mixer",), offsets=((1,), (2, 3)), **sizes)
    with pytest.raises(ValueError, match=r"offsets must be 1, as many as the convolution has taps, got \(2, 3\)"):
        model(torch.zeros(1, 8, dtype=torch.long))


def test_cosine_head_is_the_scaled_cosine_and_its_loss_the_cross_entropy():
    torch.manual_seed(0)
    head, x = CosineHead(6, 4, scale=10.0, dtype=torch.float64), torch.randn(3, 5, 6, dtype=torch.float64)
    logits = head(x)
    torch.testing.assert_close(logits, 10 * torch.cosine_similarity(x[..., None, :], head.weight, dim=-1))
    labels = torch.tensor([[0, 1, 2, 3, -100]] * 3)
    torch.testing.assert_close(head.loss(x, labels), F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    soft = torch.rand(3, 4, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(head.loss(x[:, 0], soft), F.cross_entropy(logits[:, 0], soft))
    with pytest.raises(ValueError, match="scale must be a finite number > 0, got 0"):
        CosineHead(6, 4, scale=0)


def test_cosine_head_on_a_timm_model_survives_a_new_number_of_classes():
    timm = pytest.importorskip("timm")
    from grassland.archs.interop.timm import put_cosine_head

    model = put_cosine_head(timm.create_model("test_resnet", num_classes=7), scale=5.0)
    images = torch.randn(2, 3, 32, 32)
    assert model(images).shape == (2, 7) and model(images).abs().max() <= 5
    model.reset_classifier(3)
    assert isinstance(model.get_classifier(), CosineHead) and model(images).shape == (2, 3)


def test_local_attention_runs_in_torchs_fused_kernel():
    # What is not, Inductor of torch 2.14 fails on.
    mixer, x = randomised(LocalAttention, num_heads=2), torch.randn(2, 11, 6, dtype=torch.float64)
    expected = mixer(x)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.testing.assert_close(mixer(x), expected)
