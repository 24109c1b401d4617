"""The heads for natural language inference."""

import pytest
import torch

from grassland.archs import PluckerNLIHead, TransformerNLIHead
from grassland.archs.mixers.window import WindowGrassmannMixer

SMALL = {"d_model": 8, "d_ff": 12, "num_heads": 2, "num_layers": 2, "dropout": 0.0}
HEADS = [(PluckerNLIHead, {**SMALL, "d_proj": 6, "window": 4, "stride": 4}), (TransformerNLIHead, SMALL)]
KINDS = pytest.mark.parametrize("kind, options", HEADS, ids=["plucker", "transformer"])


def head(kind, options, features=5, **more):
    torch.manual_seed(0)
    made = kind(features, **{**options, **more}, dtype=torch.float64).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def mixer(**options):
    torch.manual_seed(0)
    made = WindowGrassmannMixer(6, **{"rank": 6, "num_heads": 2, "window": 4, "stride": 4, **options}).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def literal(layer, x, mask):
    """The mixer as its docstring writes it, window by window and pair by pair."""
    out = torch.zeros_like(x)
    length, size = x.shape[1], layer.reduce.out_features // layer.num_heads
    for b in range(x.shape[0]):
        z = layer.reduce(x[b]).view(length, layer.num_heads, size)
        for t in range(length):
            pairs = []
            for start in range(0, length, layer.stride):
                inside = [s for s in range(start, min(start + layer.window, length)) if mask[b, s]]
                if start <= t < start + layer.window:
                    pairs += [s for s in inside if s != t]
            g = torch.zeros_like(x[b, t])
            if pairs:
                means = []
                for h in range(layer.num_heads):
                    outer = [torch.outer(z[t, h], z[s, h]) for s in pairs]
                    upper = torch.triu_indices(size, size, 1)
                    wedges = [(o - o.T)[upper[0], upper[1]] for o in outer]
                    means.append(torch.stack([p / p.norm().clamp_min(layer.eps) for p in wedges]).mean(0))
                g = layer.plucker(torch.cat(means))
            alpha = layer.gate(torch.cat([x[b, t], g])).sigmoid()
            out[b, t] = alpha * x[b, t] + (1 - alpha) * g
    return out


@pytest.mark.parametrize("window, stride", [(4, 4), (4, 2), (5, 3), (3, 1), (16, 16)])
def test_the_mixer_is_what_it_says_pair_by_pair(window, stride):
    layer = mixer(window=window, stride=stride)
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    mask = torch.rand(2, 11) < 0.8
    out = layer(x, mask=mask)
    assert torch.allclose(out[mask], literal(layer, x, mask)[mask], rtol=0, atol=1e-12)


def test_the_mixers_gradients_are_right_and_finite_beside_zeros():
    layer = mixer()
    x = torch.randn(1, 6, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 5 + [False]])
    parameters = tuple(layer.parameters())

    def run(x, *parameters):
        names = [name for name, _ in layer.named_parameters()]
        out = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, None, None, mask))
        return out[mask]

    assert torch.autograd.gradcheck(run, (x, *parameters))
    layer.reduce.bias.data.zero_()
    zero = torch.zeros(1, 6, 6, dtype=torch.float64, requires_grad=True)
    layer(zero, mask=mask).sum().backward()
    assert all(t.grad.isfinite().all() for t in (zero, *layer.parameters()))


def test_an_exported_head_takes_texts_shorter_than_its_windows_reach():
    head, features, mask = PluckerNLIHead(8, d_model=8, d_ff=8).eval(), torch.randn(2, 20, 8), torch.ones(2, 20).bool()
    length = torch.export.Dim("T", min=1, max=99)
    exported = torch.export.export(
        head, (features, mask), dynamic_shapes={"features": {1: length}, "mask": {1: length}}
    )
    for length in (1, 2, 9, 15, 20):
        inputs = features[:, :length].contiguous(), mask[:, :length].contiguous()
        torch.testing.assert_close(exported.module()(*inputs), head(*inputs))


def test_windows_do_not_see_each_other_and_see_both_ways():
    layer = mixer()
    x = torch.randn(1, 8, 6, dtype=torch.float64)
    changed = x.clone()
    changed[0, 5] += 1
    moved = (layer(changed) - layer(x)).abs().sum(-1)[0] > 0
    assert moved.tolist() == [False] * 4 + [True] * 4


def test_the_wedge_of_a_head_is_invariant_under_gl2_with_positive_determinant():
    layer = mixer(window=2, stride=2, rank=4, num_heads=1)
    z = torch.randn(1, 2, 4, dtype=torch.float64)
    a, b = z[:, :1], z[:, 1:]

    def coordinates(z):
        layer.reduce.weight.data = torch.eye(4, 6, dtype=torch.float64)
        layer.reduce.bias.data.zero_()
        layer.gate.weight.data.zero_()
        layer.gate.bias.data.fill_(-100.0)
        return layer(torch.cat([z, torch.zeros(1, 2, 2, dtype=torch.float64)], -1))

    assert torch.allclose(coordinates(torch.cat([2 * a + b, a + 3 * b], 1)), coordinates(z), atol=1e-12)
    flipped, plain = coordinates(torch.cat([b, a], 1)), coordinates(z)
    bias = layer.plucker.bias
    assert torch.allclose(flipped - bias, -(plain - bias), atol=1e-12)


@KINDS
def test_padding_never_changes_logits(kind, options):
    layer = head(kind, options)
    x, mask = torch.randn(3, 10, 5, dtype=torch.float64), torch.ones(3, 10, dtype=torch.bool)
    mask[1, 6:], mask[2, 3:] = False, False
    logits = layer(x, mask)
    for poison in (1e6, torch.inf, torch.nan):
        assert torch.equal(layer(torch.where(mask[..., None], x, poison), mask), logits)
    assert torch.equal(layer(x, mask.long()), logits)
    more = torch.nn.functional.pad(x, (0, 0, 0, 9), value=3.0)
    assert torch.allclose(layer(more, torch.nn.functional.pad(mask, (0, 9))), logits, rtol=0, atol=1e-12)
    for row, length in enumerate(mask.sum(1)):
        assert torch.allclose(layer(x[row : row + 1, :length]), logits[row : row + 1], rtol=0, atol=1e-12)


@KINDS
def test_gradcheck(kind, options):
    layer = head(kind, {**options, "num_layers": 1}, features=3)
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    assert torch.autograd.gradcheck(lambda x: layer(x, mask), x)


@KINDS
def test_it_learns_and_every_parameter_gets_a_gradient(kind, options):
    torch.manual_seed(0)
    layer = kind(5, **{**options, "dropout": 0.1})
    x = torch.randn(48, 7, 5)
    labels = (x.mean(1)[:, 0] > 0).long()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-2)
    losses = []
    for _ in range(200):
        loss = torch.nn.functional.cross_entropy(layer(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    assert sum(losses[-5:]) / 5 < 0.4 * losses[0]


def test_the_papers_sizes():
    plucker, transformer = PluckerNLIHead(), TransformerNLIHead()
    counts = [sum(p.numel() for p in made.parameters()) for made in (plucker, transformer)]
    assert plucker(torch.randn(2, 48, 768)).shape == transformer(torch.randn(2, 48, 768)).shape == (2, 3)
    assert plucker.mixers[0].branch.plucker.weight.shape == (256, 4 * 16 * 15 // 2)
    # "Comparable parameter counts", section 4.2.
    assert abs(counts[0] / counts[1] - 1) < 0.1, counts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_and_autocast(dtype):
    layer = PluckerNLIHead(5, **HEADS[0][1]).eval()
    x = torch.randn(2, 9, 5)
    exact = layer.double()(x.double())
    found = layer.to(dtype)(x.to(dtype))
    assert found.dtype == dtype and torch.allclose(found.double(), exact, atol=1e-5 if dtype == torch.float32 else 2e-2)
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(layer(x).double(), exact, atol=2e-2)


def test_it_compiles_in_one_graph():
    layer = PluckerNLIHead(5, **HEADS[0][1]).eval()
    x, mask = torch.randn(2, 9, 5), torch.arange(9) < torch.tensor([[9], [5]])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, mask), layer(x, mask), atol=1e-6)


@pytest.mark.parametrize(
    "kind, options, named",
    [
        (PluckerNLIHead, {"num_heads": 3}, "num_heads must divide rank=64"),
        (PluckerNLIHead, {"d_proj": 4}, "num_heads must divide rank=4 into groups of at least 2"),
        (PluckerNLIHead, {"window": 1}, "window must be an integer of at least 2, got 1"),
        (PluckerNLIHead, {"stride": 9}, r"stride must be an integer in \[1, window=8\], got 9"),
        (PluckerNLIHead, {"dropout": 1.0}, "dropout"),
        (TransformerNLIHead, {"num_heads": 3}, "num_heads must be a positive divisor of dim=256"),
        (TransformerNLIHead, {"num_layers": 0}, "num_layers must be a positive integer, got 0"),
        (TransformerNLIHead, {"num_classes": 2.5}, "num_classes"),
    ],
)
def test_bad_arguments_are_named(kind, options, named):
    with pytest.raises(ValueError, match=named):
        kind(**options)


@KINDS
def test_bad_inputs_are_named(kind, options):
    layer = kind(5, **options)
    x = torch.randn(2, 4, 5)
    with pytest.raises(ValueError, match=r"features must be \(B, T, 5\), got \(2, 4, 6\)"):
        layer(torch.randn(2, 4, 6))
    with pytest.raises(ValueError, match=r"features must have at least one token, got \(2, 0, 5\)"):
        layer(x[:, :0])
    with pytest.raises(TypeError, match=r"features must have the dtype of the layer's weights"):
        layer(x.bfloat16())
    with pytest.raises(ValueError, match=r"mask must be bool or integer \(2, 4\), got torch.bool \(2, 3\)"):
        layer(x, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="row 1 has none"):
        layer(x, torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]))
