"""Layers against their equations written out by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grassland.archs import (
    MLP,
    CausalAttention,
    CausalGrassmannMixer,
    ModelConfig,
    PlainResidual,
    create_model,
    register_slot,
)
from grassland.archs.registry import _CHOICES

FLOAT64 = {"dtype": torch.float64}
SIZES = {"vocab_size": 11, "max_len": 8, "dim": 6, "depth": 3, "ffn_dim": 9, "rank": 3}


def randomised(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def literal_mixer(mixer, h, offsets):
    """grassmann.md's table, one position and one pair at a time."""
    z = mixer.reduce(h)
    g = torch.zeros_like(h)
    for b in range(h.shape[0]):
        for t in range(h.shape[1]):
            terms = []
            for delta in (delta for delta in offsets if delta <= t):
                a, s = z[b, t], z[b, t - delta]
                p = torch.stack([a[i] * s[j] - a[j] * s[i] for i in range(len(a)) for j in range(i + 1, len(a))])
                terms.append(mixer.plucker.weight @ (p / p.norm().clamp_min(1e-6)) + mixer.plucker.bias)
            if terms:
                g[b, t] = torch.stack(terms).mean(0)
    if mixer.out_proj is not None:
        g = mixer.out_proj(g)
    alpha = torch.sigmoid(mixer.gate(torch.cat([h, g], dim=-1)))
    return alpha * h + (1 - alpha) * g


@pytest.mark.parametrize("out_proj", [True, False])
def test_grassmann_mixer_is_the_papers_table(out_proj):
    mixer = randomised(CausalGrassmannMixer(6, rank=4, offsets=(1, 2, 4), out_proj=out_proj, **FLOAT64))
    h = torch.randn(2, 7, 6, **FLOAT64)
    torch.testing.assert_close(mixer(h), literal_mixer(mixer, h, (1, 2, 4)), atol=1e-13, rtol=0)


def test_the_smallest_norm_that_a_grassmann_mixer_divides_by_is_a_millionth():
    mixer = randomised(CausalGrassmannMixer(6, rank=4, offsets=(1, 2), **FLOAT64))
    h = 5e-4 * torch.randn(2, 7, 6, **FLOAT64)
    mixer.reduce.bias = None
    z = mixer.reduce(h)
    areas = (z[0, :-1].square().sum(-1) * z[0, 1:].square().sum(-1) - (z[0, :-1] * z[0, 1:]).sum(-1) ** 2).sqrt()
    assert areas.min() < 1e-6 < areas.max(), "the bound must count for some of the pairs"
    torch.testing.assert_close(mixer(h), literal_mixer(mixer, h, (1, 2)), atol=1e-13, rtol=0)


def test_the_mixer_can_be_differentiated_twice_by_the_reference_alone():
    x = torch.randn(1, 5, 6, requires_grad=True, **FLOAT64)
    mixer = randomised(CausalGrassmannMixer(6, rank=3, offsets=(1, 2), backend="reference", **FLOAT64))
    assert torch.autograd.gradgradcheck(mixer, x)
    mixer.backend = None
    (slope,) = torch.autograd.grad(mixer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        slope.sum().backward()


def test_attention_is_softmax_over_the_past():
    mixer = randomised(CausalAttention(6, num_heads=2, **FLOAT64))
    x = torch.randn(2, 5, 6, **FLOAT64)
    q, k, v = (t.unflatten(-1, (2, 3)) for t in mixer.qkv(x).split(6, dim=-1))
    scores = torch.einsum("bthc,bshc->bhts", q, k) / 3**0.5
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    y = torch.einsum("bhts,bshc->bthc", scores.softmax(-1), v).flatten(2)
    torch.testing.assert_close(mixer(x), mixer.out_proj(y), atol=1e-13, rtol=0)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("blends", [True, False])
def test_residual_equations(norm, blends):
    mixer = CausalGrassmannMixer(6, rank=3, **FLOAT64) if blends else CausalAttention(6, num_heads=2, **FLOAT64)
    residual = randomised(PlainResidual(mixer, 6, norm=norm, **FLOAT64))
    x = torch.randn(2, 5, 6, **FLOAT64)
    ln = residual.norm
    expected = {
        ("pre", True): lambda: x + mixer(ln(x)),
        ("pre", False): lambda: x + mixer(ln(x)),
        ("post", True): lambda: ln(mixer(x)),
        ("post", False): lambda: ln(x + mixer(x)),
    }[norm, blends]()
    assert torch.equal(residual(x), expected)


@pytest.mark.parametrize(
    ("norm", "blends", "zeros"), [("pre", False, False), ("post", False, False), ("post", True, True)]
)
def test_residual_drops_where_the_paper_does(norm, blends, zeros):
    branch = MLP(64, 8)
    branch.carries_input = blends
    residual = PlainResidual(branch, 64, norm=norm, dropout=0.5).train()
    y = residual(torch.randn(8, 64))
    # Dropout(LN(·)) leaves exact zeros in the stream; dropping the branch before it joins does not.
    assert ((y == 0).float().mean() > 0.3) == zeros


def test_model_is_the_post_norm_paper_block_by_block():
    model = randomised(
        create_model("lm", vocab_size=11, max_len=6, dim=6, depth=2, ffn_dim=9, rank=3, offsets=((1,), (2,)), **FLOAT64)
    ).eval()
    ids = torch.randint(11, (2, 6))
    x = model.embed.weight[ids] + model.positions.weight[:6]
    for layer, block in enumerate(model.blocks):
        mixed = literal_mixer(block.mixer.branch, x, (layer + 1,))
        x = F.layer_norm(mixed, (6,), block.mixer.norm.weight, block.mixer.norm.bias)
        mlp = block.ffn.branch
        y = F.gelu(x @ mlp.up.weight.T + mlp.up.bias) @ mlp.down.weight.T + mlp.down.bias
        x = F.layer_norm(x + y, (6,), block.ffn.norm.weight, block.ffn.norm.bias)
    logits = F.layer_norm(x, (6,), model.norm.weight, model.norm.bias) @ model.embed.weight.T
    torch.testing.assert_close(model(ids), logits, atol=1e-12, rtol=0)


@pytest.fixture
def toy_choices():
    """Slot choices such as later files will bring: n streams in (…, n, C), an ffn with an auxiliary loss."""
    before = {slot: dict(choices) for slot, choices in _CHOICES.items()}

    @register_slot("residual", "toy_streams")
    class Streams(nn.Module):
        def __init__(self, branch, dim, layer_index=0, *, num_streams=2, norm="pre", device=None, dtype=None):
            super().__init__()
            self.branch, self.n = branch, num_streams
            self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

        def expand(self, x):
            return x[..., None, :].expand(*x.shape[:-1], self.n, x.shape[-1])

        def reduce(self, x):
            return x.mean(-2)

        def forward(self, x, *args):
            out = self.branch(self.norm(x.mean(-2)), *args)
            y, *rest = out if isinstance(out, tuple) else (out,)
            x = x + y[..., None, :]
            return (x, *rest) if rest else x

    @register_slot("ffn", "toy_aux")
    class Auxiliary(MLP):
        def __init__(self, dim, hidden_dim, *, weight=0.25, device=None, dtype=None):
            super().__init__(dim, hidden_dim, device=device, dtype=dtype)
            self.factor = weight

        def forward(self, x):
            return super().forward(x), x.new_tensor(self.factor)

    yield
    for slot, choices in before.items():
        _CHOICES[slot].clear()
        _CHOICES[slot].update(choices)


def test_streams_fit_the_slot(toy_choices):
    sizes = {**SIZES, **FLOAT64, "norm": "pre"}
    plain = randomised(create_model("lm", **sizes)).eval()
    streams = randomised(create_model("lm", residual="toy_streams", num_streams=3, **sizes)).eval()
    ids = torch.randint(11, (2, 8))
    torch.testing.assert_close(streams(ids), plain(ids), atol=1e-12, rtol=0)
    state = streams.init_state(2)
    streams.decode(ids[:, :5], state)
    torch.testing.assert_close(streams.decode(ids[:, 5:], state), plain(ids)[:, -1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("share", [(), ("ffn",)])
def test_auxiliary_losses_join_the_training_loss_only(toy_choices, share):
    model = create_model("lm", ffn="toy_aux", weight=0.5, share=share, **SIZES)
    ids = torch.randint(11, (2, 8))
    difference = model.train()(ids, labels=ids) - model.eval()(ids, labels=ids)
    assert difference.item() == pytest.approx(3 * 0.5, abs=1e-5)


def test_tied_head_needs_an_embedding():
    from grassland.archs import TiedHead

    with pytest.raises(ValueError, match="tied"):
        TiedHead(4, 8)


def test_config_defaults_are_the_papers_sizes():
    config = ModelConfig()
    assert (config.vocab_size, config.max_len, config.dim, config.depth, config.ffn_dim) == (30522, 128, 256, 6, 1024)
