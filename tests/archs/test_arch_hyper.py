"""Hyper-connections: the official vectors, the equations, the slot."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from grassland.archs import (
    MHC,
    HyperConnection,
    KromHC,
    MHCLite,
    PlainResidual,
    create_model,
    get_init_and_expand_reduce_stream_functions,
    swap,
)
from grassland.train.optim import parameter_groups

CLASSES = {"hc": HyperConnection, "mhc": MHC, "mhc_lite": MHCLite, "kromhc": KromHC}
EXACT = ("mhc_lite", "kromhc")
GOLDENS = [("kromhc_n2", "kromhc"), ("kromhc_n4", "kromhc"), ("kromhc_n8", "kromhc"), ("mhc_n4", "mhc")]
GOLDENS += [("mhc_lite_n4", "mhc_lite")]
FLOAT64 = {"dtype": torch.float64}
SIZES = {"vocab_size": 31, "max_len": 24, "dim": 16, "depth": 3, "ffn_dim": 24, "rank": 6, "offsets": (1, 2, 5)}


def randomised(module, std=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += std * noise.to(parameter.dtype)
    return module


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tokens(*shape, seed=1):
    return torch.randint(SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def chain(kind, depth=4, dim=6, **options):
    torch.manual_seed(0)
    return nn.ModuleList(
        CLASSES[kind](nn.Linear(dim, dim, **FLOAT64), dim, layer, num_layers=depth, **{**FLOAT64, **options})
        for layer in range(depth)
    )


@pytest.mark.parametrize(("file", "kind"), GOLDENS)
def test_official_state_dict_gives_the_official_numbers(shared, file, kind):
    golden = load_file(shared / "golden" / f"{file}.safetensors")
    n, dim = int(file.rpartition("n")[2]), golden["input"].shape[-1]
    init, expand, reduce = get_init_and_expand_reduce_stream_functions(n, dim=dim, kind=kind, **FLOAT64)
    layers = nn.ModuleList(init(branch=nn.Sequential(nn.Linear(dim, dim, **FLOAT64), nn.Tanh())) for _ in range(3))
    layers.load_state_dict({k.removeprefix("param."): v for k, v in golden.items() if k.startswith("param.")})
    x = golden["input"].clone().requires_grad_()
    streams = expand(x)
    for index, layer in enumerate(layers):
        streams = layer(streams)
        expected = golden[f"streams.{index}"].flatten(0, 1)
        torch.testing.assert_close(streams, expected, atol=1e-12, rtol=0)
    out = reduce(streams)
    torch.testing.assert_close(out, golden["output"], atol=1e-12, rtol=0)
    out.backward(golden["grad_output"])
    torch.testing.assert_close(x.grad, golden["grad_input"], atol=1e-12, rtol=0)
    for name, parameter in layers.named_parameters():
        torch.testing.assert_close(parameter.grad, golden[f"grad.{name}"], atol=1e-12, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"residual": "kromhc"}, 958_824),
        ({"residual": "mhc"}, 1_843_848),
        ({"residual": "mhc_lite"}, 2_433_864),
        ({"residual": "kromhc", "num_streams": 8}, 3_392_088),
    ],
)
def test_parameter_table_of_the_paper(options, total):
    model = create_model("kromhc_lm_12l", device="meta", **options)
    plain = create_model("kromhc_lm_12l", residual="plain", device="meta")
    assert model.num_parameters() - plain.num_parameters() == total
    assert create_model("kromhc_lm_6l", device="meta").config.dim == 384


@pytest.mark.parametrize("kind", CLASSES)
def test_identity_init_is_the_plain_pre_norm_network(kind):
    plain = create_model("lm", norm="pre", **SIZES, **FLOAT64)
    model = create_model("lm", norm="pre", residual=kind, init="identity", **SIZES, **FLOAT64)
    renamed = {name.replace(".mixer.norm.", ".mixer.branch_norm."): v for name, v in plain.state_dict().items()}
    renamed = {name.replace(".ffn.norm.", ".ffn.branch_norm."): v for name, v in renamed.items()}
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert not unexpected and not any(".branch." in name or "branch_norm" in name for name in missing)
    ids = tokens(2, 9)
    torch.testing.assert_close(model(ids), plain(ids), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("off", [{"num_streams": 1}, {"disable": True}])
def test_one_stream_and_disable_are_the_plain_residual(kind, off):
    branch, x = nn.Linear(6, 6, **FLOAT64), normal(2, 3, 6)
    layer = CLASSES[kind](branch, 6, norm="pre", **off, **FLOAT64)
    plain = PlainResidual(branch, 6, norm="pre", **FLOAT64)
    assert torch.equal(layer.reduce(layer(layer.expand(x))), plain(x))
    assert len(list(layer.parameters())) == len(list(plain.parameters()))


def test_paper_init_values():
    # What stands beside the identity, each of weight e^-8: a swap in a factor, three entries of a row, or the 23 other
    # permutations.
    for kind, others in (("kromhc", 2), ("mhc", 3), ("mhc_lite", 23)):
        layer = CLASSES[kind](None, 5, layer_index=6, **FLOAT64)
        h_pre, h_post, mixing = layer.coefficients(normal(4, 5))
        assert h_pre.sum().item() == pytest.approx(1.538, abs=5e-4)
        assert h_post.sum().item() == pytest.approx(3.076, abs=5e-4)
        assert h_pre.argmax() == 2 == h_post.argmax()
        torch.testing.assert_close(mixing, torch.eye(4, **FLOAT64), atol=others * math.exp(-8), rtol=0)
    layer = KromHC(None, 5, init="identity", **FLOAT64)
    h_pre, h_post, _ = layer.coefficients(normal(4, 5))
    assert h_pre.sum().item() == pytest.approx(1, abs=1e-14) and torch.equal(h_post, torch.ones_like(h_post))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("off", [{}, {"disable": True}])
def test_reset_parameters_gives_all_that_is_a_layers_own_its_first_values(kind, off):
    layer = CLASSES[kind](None, 5, norm="pre", expand="learned", reduce="learned", **off)
    first = copy.deepcopy(layer.state_dict())
    randomised(layer).reset_parameters()
    torch.testing.assert_close(layer.state_dict(), first, atol=0, rtol=0)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_layer_is_its_equation(kind):
    layer = randomised(CLASSES[kind](nn.Linear(6, 6, **FLOAT64), 6, num_streams=4, **FLOAT64))
    x = normal(2, 3, 4, 6)
    h_pre, h_post, mixing = layer.coefficients(x)
    y = layer.branch(torch.einsum("...n,...nc->...c", h_pre, x))
    expected = torch.einsum("...ij,...jc->...ic", mixing, x) + torch.einsum("...n,...c->...nc", h_post, y)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_hc_is_the_papers_matrices():
    """arXiv 2409.19606: h0 = A_m^T H and H' = A_r^T H + B y with A = [A_m | A_r]."""
    layer = randomised(HyperConnection(None, 6, **FLOAT64))
    x, y = normal(2, 4, 6), normal(2, 6, seed=1)
    normed = layer.norm(x)
    a = layer.static_alpha + layer.dynamic_alpha_scale * torch.tanh(normed @ layer.dynamic_alpha_fn)
    b = layer.static_beta + layer.dynamic_beta_scale * torch.tanh(normed @ layer.dynamic_beta_fn)
    u, join = layer(x)
    torch.testing.assert_close(u, torch.einsum("bi,bic->bc", a[..., 0], x), atol=1e-12, rtol=0)
    expected = torch.einsum("bij,bic->bjc", a[..., 1:], x) + b[..., None] * y[:, None]
    torch.testing.assert_close(join(y), expected, atol=1e-12, rtol=0)


def test_general_factors_and_their_transpose():
    x = normal(2, 12, 5)
    for factors in ((2, 3, 2), (4, 3), (3, 4), None):
        layer = randomised(KromHC(None, 5, num_streams=12, factors=factors, **FLOAT64))
        mixing = layer.coefficients(x)[2]
        ones = torch.ones(2, 12, **FLOAT64)
        torch.testing.assert_close(mixing.sum(-1), ones)
        torch.testing.assert_close(mixing.sum(-2), ones)
        layer.transposed = True
        torch.testing.assert_close(layer.coefficients(x)[2], mixing.mT, atol=1e-14, rtol=0)
    assert KromHC(None, 5, num_streams=12).factors == (2, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("autocast", [False, True])
def test_coefficients_are_float32_and_sum_to_one(kind, dtype, autocast):
    layer = randomised(CLASSES[kind](None, 8, num_streams=4, dtype=dtype), std=3.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        h_pre, h_post, mixing = layer.coefficients(normal(64, 4, 8, dtype=dtype))
    assert h_pre.dtype is h_post.dtype is mixing.dtype is torch.float32
    ulp = torch.finfo(torch.float32).eps
    assert (mixing.sum(-1) - 1).abs().max() <= 4 * ulp and (mixing.sum(-2) - 1).abs().max() <= 4 * ulp
    assert mixing.min() >= 0


@pytest.mark.parametrize("kind", CLASSES)
def test_scaling_the_streams_leaves_the_coefficients(kind):
    layer = randomised(CLASSES[kind](None, 6, **FLOAT64))
    x = normal(3, 4, 6)
    for a, b in zip(layer.coefficients(x), layer.coefficients(1e3 * x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", CLASSES)
def test_zero_streams_are_finite(kind):
    layer = randomised(CLASSES[kind](nn.Linear(6, 6), 6))
    x = torch.zeros(2, 4, 6, requires_grad=True)
    layer(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None) and x.grad.isfinite().all()


def test_xor_relabelling_of_the_streams():
    """Mixing by 2×2 factors commutes with n -> n xor m; permuting the projection's rows and columns does the rest."""
    layer = randomised(KromHC(nn.Linear(6, 6, **FLOAT64), 6, **FLOAT64))
    x, order = normal(3, 4, 6), [s ^ 2 for s in range(4)]
    expected = layer(x)[:, order]
    with torch.no_grad():
        for name in ("dynamic_alpha_fn", "dynamic_beta_fn"):
            parameter = getattr(layer, name)
            parameter.copy_(parameter.unflatten(0, (4, 6))[order].flatten(0, 1))
        layer.norm.gamma.copy_(layer.norm.gamma.unflatten(0, (4, 6))[order].flatten())
        columns = [*order, *range(4, 8)]
        layer.dynamic_alpha_fn.copy_(layer.dynamic_alpha_fn[:, columns])
        layer.static_alpha.copy_(layer.static_alpha[columns])
        layer.dynamic_beta_fn.copy_(layer.dynamic_beta_fn[:, order])
        layer.static_beta.copy_(layer.static_beta[order])
    torch.testing.assert_close(layer(x[:, order]), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("halved", ["norm.gamma", "dynamic_alpha_fn", "static_beta", "h_post_scale"])
def test_one_parameter_may_be_half(halved):
    layer = randomised(chain("kromhc", depth=1)).float()[0]
    parameter = layer.get_parameter(halved)
    parameter.data = parameter.data.bfloat16().float()
    x = normal(2, 3, 4, 6).float()
    expected = layer(x)
    parameter.data = parameter.data.bfloat16()
    found = layer(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert parameter.grad is not None and parameter.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", CLASSES)
def test_branches_that_return_tuples_and_take_arguments(kind):
    def branch(u, scale):
        return scale * u, u.sum(), "aux"

    layer = CLASSES[kind](branch, 6, **FLOAT64)
    x = normal(2, 4, 6)
    streams, total, word = layer(x, 3.0)
    alone = CLASSES[kind](lambda u: 3 * u, 6, **FLOAT64)
    assert torch.equal(streams, alone(x)) and word == "aux" and total.dim() == 0
    dropping = [CLASSES[kind](b, 6, dropout=0.5, **FLOAT64) for b in (branch, alone.branch)]
    torch.manual_seed(0)
    streams = dropping[0](x, 3.0)[0]
    torch.manual_seed(0)
    assert torch.equal(streams, dropping[1](x)) and not torch.equal(streams, alone(x))


@pytest.mark.parametrize("kind", CLASSES)
def test_without_a_branch_it_gives_input_and_join(kind):
    layer = randomised(CLASSES[kind](None, 6, **FLOAT64))
    other = CLASSES[kind](torch.tanh, 6, **FLOAT64)
    other.load_state_dict(layer.state_dict())
    x = normal(2, 4, 6)
    u, join = layer(x)
    assert torch.equal(join(torch.tanh(u)), other(x))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("off", [{}, {"disable": True}])
def test_without_a_branch_join_drops_out(kind, off):
    layer = CLASSES[kind](None, 6, dropout=0.5, **off, **FLOAT64)
    x = layer.expand(normal(2, 6))
    torch.manual_seed(0)
    u, join = layer(x)
    found = torch.clone(join(u))
    other = CLASSES[kind](nn.Identity(), 6, dropout=0.5, **off, **FLOAT64)
    torch.manual_seed(0)
    assert torch.equal(found, torch.clone(other(x)))
    assert not torch.equal(found, torch.clone(layer.eval()(x)[1](u)))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("reduce", ["sum", "mean", "learned"])
def test_expand_and_reduce(kind, reduce):
    layers = chain(kind, expand="learned", reduce=reduce)
    names = [name for name, _ in layers.named_parameters()]
    assert [name for name in names if "stream_embed" in name] == ["0.stream_embed"]
    assert [name for name in names if "reduce_weight" in name] == (["3.reduce_weight"] if reduce == "learned" else [])
    randomised(layers)
    x = normal(2, 6)
    streams = layers[0].expand(x)
    assert torch.equal(torch.clone(streams), x[:, None] + layers[0].stream_embed)
    weights = {"sum": torch.ones(4), "mean": torch.full((4,), 0.25)}
    weight = layers[-1].reduce_weight if reduce == "learned" else weights[reduce]
    expected = (torch.clone(streams) * weight[:, None]).sum(-2)
    torch.testing.assert_close(layers[-1].reduce(streams), expected, atol=1e-13, rtol=0)


def test_learned_ends_may_be_parametrised():
    layer = KromHC(None, 6, num_layers=1, expand="learned", reduce="learned", **FLOAT64)
    double = randomised(copy.deepcopy(layer))
    layer.load_state_dict(double.state_dict())
    for name in ("stream_embed", "reduce_weight"):
        parametrize.register_parametrization(layer, name, Doubled())
        with torch.no_grad():
            getattr(double, name).mul_(2)
    x = normal(2, 6)
    assert torch.equal(layer.expand(x).tensor(), double.expand(x).tensor())
    assert torch.equal(layer.reduce(layer.expand(x)), double.reduce(double.expand(x)))


def test_what_has_no_norm_has_no_attribute_norm():
    for options in ({"dynamic": False}, {"disable": True}):
        assert not any(hasattr(cls(None, 6, **options), "norm") for cls in CLASSES.values())
    model = nn.Sequential(PlainResidual(nn.Linear(6, 6), 6))
    swap(model, {PlainResidual: lambda old: KromHC(old.branch, 6, disable=True)})
    assert isinstance(model[0], KromHC)


def test_static_coefficients_do_not_see_the_streams():
    for cls in CLASSES.values():
        layer = cls(None, 6, dynamic=False, **FLOAT64)
        assert not any("dynamic" in name or "scale" in name or "norm" in name for name, _ in layer.named_parameters())
        randomised(layer)
        a, b = (layer.coefficients(normal(3, 4, 6, seed=seed)) for seed in (0, 1))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_slot_decodes_as_it_reads(kind, norm):
    model = randomised(create_model("lm", residual=kind, num_streams=4, norm=norm, **SIZES, **FLOAT64), std=0.2).eval()
    ids = tokens(3, 12)
    full, state = model(ids), model.init_state(3)
    torch.testing.assert_close(model.decode(ids[:, :5], state), full[:, 4], atol=1e-11, rtol=0)
    for t in range(5, 12):
        torch.testing.assert_close(model.decode(ids[:, t : t + 1], state), full[:, t], atol=1e-11, rtol=0)
    changed = ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % SIZES["vocab_size"]
    assert torch.equal(model(changed)[:, :8], full[:, :8])


@pytest.mark.parametrize("kind", CLASSES)
def test_slot_learns_and_breaks_the_streams_symmetry(kind):
    torch.manual_seed(0)
    model = create_model("lm", residual=kind, init="identity", norm="pre", **SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids = tokens(8, 17)
    losses = []
    for _ in range(30):
        loss = model(ids[:, :-1], labels=ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    x = model.blocks[0].mixer.expand(normal(2, 5, SIZES["dim"], dtype=torch.float32))
    out = torch.clone(model.blocks[0].mixer(x))
    assert (out - out.mean(-2, keepdim=True)).norm() > 1e-4 * out.norm()


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("how", ["made", "deepcopy", "assign", "to_empty"])
def test_optimiser_decays_the_dynamic_matrices_only(kind, how):
    model = create_model("lm", residual=kind, expand="learned", reduce="learned", **SIZES)
    if how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "assign":
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    elif how == "to_empty":
        model = model.to("meta").to_empty(device="cpu")
    names = {id(p): name for name, p in model.named_parameters()}
    own = ("static", "dynamic", "scale", "norm.gamma", "stream_embed", "reduce_weight")
    for group, members in parameter_groups(model).items():
        for name in (names[id(p)] for p in members):
            if any(part in name for part in own):
                assert group == ("decay" if name.endswith("_fn") else "no_decay"), name


@pytest.mark.parametrize("kind", CLASSES)
def test_compiles_to_one_graph_for_all_lengths(kind, monkeypatch):
    monkeypatch.setattr(MHC, "iterations", 2)  # more make the graph longer, not another one
    torch._dynamo.reset()
    model = randomised(create_model("lm", residual=kind, **{**SIZES, "depth": 1}), std=0.1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (7, 9, 12):
            ids = tokens(2, length)
            loss = compiled(ids, labels=ids)
            wanted = model(ids, labels=ids)
            torch.testing.assert_close(loss, wanted)
            found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            expected = torch.autograd.grad(wanted, list(model.parameters()), allow_unused=True)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", CLASSES)
def test_two_runs_agree_bitwise(kind):
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = randomised(create_model("lm", residual=kind, **SIZES))
        loss = model(tokens(2, 9), labels=tokens(2, 9, seed=2))
        runs.append([loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_wrapping_a_transformer_layer_of_torch():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dropout=0.0).eval()
    init, expand, reduce = get_init_and_expand_reduce_stream_functions(4, dim=8, init="identity", norm="pre")
    attend = init(branch=lambda u: encoder._sa_block(u, None, None))
    feed = init(branch=encoder._ff_block)
    x = normal(2, 5, 8, dtype=torch.float32)
    streams = feed(attend(expand(x)))
    torch.testing.assert_close(reduce(streams), encoder(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", CLASSES)
def test_layers_of_the_official_interface_are_pickled(kind):
    init, expand, _ = get_init_and_expand_reduce_stream_functions(4, dim=6, kind=kind, **FLOAT64)
    layer = randomised(init(branch=nn.Linear(6, 6, **FLOAT64)))
    twin, streams = pickle.loads(pickle.dumps(layer)), expand(normal(2, 3, 6))
    assert isinstance(twin, CLASSES[kind]) and torch.equal(twin(streams), layer(streams))


@pytest.mark.parametrize(
    ("options", "kind"),
    [({}, "sum"), ({"reduce": "mean"}, "mean"), ({"init": "identity", "reduce": "sum"}, "sum")],
)
def test_the_official_interface_reduces_as_it_is_told(options, kind):
    _, expand, reduce = get_init_and_expand_reduce_stream_functions(4, dim=6, **options)
    x = normal(2, 3, 6)
    torch.testing.assert_close(reduce(expand(x)), 4 * x if kind == "sum" else x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: KromHC(None, 8, num_streams=0), ("num_streams", "0")),
        (lambda: KromHC(None, 8, num_streams=5), ("num_streams", "5")),
        (lambda: KromHC(None, 8, num_streams=7), ("num_streams", "7")),
        (lambda: KromHC(None, 8, num_streams=True), ("num_streams", "True")),
        (lambda: KromHC(None, 8, num_streams=8, factors=(2, 3)), ("factors", "8")),
        (lambda: KromHC(None, 8, num_streams=8, factors=(8,)), ("factors", "8")),
        (lambda: KromHC(None, 8, keep_streams=0), ("keep_streams", "0")),
        (lambda: KromHC(None, 0), ("dim", "0")),
        (lambda: MHCLite(None, 8, num_streams=6), ("num_streams", "6")),
        (lambda: MHC(None, 8, init="zero"), ("init", "zero", "identity")),
        (lambda: MHC(None, 8, reduce="max"), ("reduce", "max")),
        (lambda: MHC(None, 8, expand="max"), ("expand", "max")),
        (lambda: MHC(None, 8, norm="layer"), ("norm", "layer")),
        (lambda: KromHC(None, 8)(torch.zeros(2, 8)), ("x", "num_streams=4", "(2, 8)")),
        (lambda: KromHC(None, 8)(torch.zeros(2, 4, 7)), ("x", "dim=8", "(2, 4, 7)")),
        (lambda: MHC(None, 8)(torch.zeros(2, 3, 8)), ("x", "(2, 3, 8)")),
        (lambda: KromHC(None, 8)(KromHC(None, 6).expand(torch.zeros(2, 6))), ("x", "dim=8", "(2, 4, 6)")),
        (lambda: KromHC(None, 8).reduce(torch.zeros(2, 3, 8)), ("x", "num_streams=4", "(2, 3, 8)")),
        (lambda: KromHC(None, 8).expand(torch.zeros(2, 7)), ("x", "8", "(2, 7)")),
        (lambda: KromHC(None, 8).expand(torch.zeros(())), ("x", "8", "()")),
        (lambda: KromHC(torch.tanh, 8, disable=True)(torch.zeros(2, 7)), ("x", "8", "(2, 7)")),
        (lambda: PlainResidual(torch.tanh, 8)(torch.zeros(2, 7)), ("x", "8", "(2, 7)")),
        (lambda: MHC(lambda u: u[:1], 8)(torch.zeros(2, 4, 8)), ("y", "(2, 8)", "(1, 8)")),
        (lambda: KromHC(lambda u: u[:1], 8)(torch.zeros(2, 4, 8)), ("y", "(2, 8)", "(1, 8)")),
        (lambda: KromHC(lambda u: u[:1], 8)(KromHC(None, 8).expand(torch.zeros(2, 8))), ("y", "(2, 8)", "(1, 8)")),
        (lambda: KromHC(None, 8, reduce="learned", num_layers=2).reduce(torch.zeros(2, 4, 8)), ("learned", "0")),
        (lambda: get_init_and_expand_reduce_stream_functions(4, kind="mhd"), ("kind", "mhd")),
        (lambda: get_init_and_expand_reduce_stream_functions(4, reduce="learned"), ("reduce", "learned", "mean")),
        (lambda: get_init_and_expand_reduce_stream_functions(4, expand="learned"), ("expand", "learned", "repeat")),
        (lambda: get_init_and_expand_reduce_stream_functions(4, dim=8)[0](init="identity"), ("init", "given to")),
        (lambda: get_init_and_expand_reduce_stream_functions(4)[0](), ("dim",)),
        (lambda: get_init_and_expand_reduce_stream_functions(4, dim=8)[0]()(torch.zeros(6, 8)), ("4 streams", "6")),
        (lambda: KromHC(None, 8, "0"), ("layer_index", "'0'")),
        (lambda: MHC(None, 8, -1), ("layer_index", "-1")),
        (lambda: create_model("lm", residual="kromhc", num_streams=7, **SIZES), ("num_streams", "7")),
        (lambda: create_model("lm", residual="kromch", **SIZES), ("residual", "kromch", "'kromhc'")),
    ],
)
def test_bad_input_names_itself(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_integer_streams_are_refused():
    for cls in CLASSES.values():
        with pytest.raises(TypeError, match="x must be"):
            cls(None, 8)(torch.zeros(2, 4, 8, dtype=torch.int64))
        with pytest.raises(TypeError, match="x must be"):
            cls(None, 8).expand(torch.zeros(2, 8, dtype=torch.int64))


def test_inverse_permutations():
    from grassland.kernels.kronecker.reference import inverses

    for size in (2, 3, 4):
        orders = list(itertools.permutations(range(size)))
        for order, index in zip(orders, inverses(size), strict=True):
            assert [orders[index][i] for i in order] == list(range(size))


@pytest.mark.parametrize(("residual", "logits"), [("mhc", 16), ("mhc_lite", 24), ("kromhc", 4)])
def test_flops_are_projections_branch_ends_and_mixing(residual, logits):
    sizes = {"vocab_size": 11, "max_len": 8, "dim": 8, "depth": 1, "ffn_dim": 8, "rank": 3, "norm": "pre"}
    plain = create_model("lm", device="meta", **sizes)
    streams = create_model("lm", device="meta", residual=residual, num_streams=4, **sizes)
    width, mixing = 4 * 8, {"kromhc": 2 * (2 + 2) * 4 * 8}.get(residual, 2 * 4 * 4 * 8)
    more = 2 * width * (4 + 4 + logits) + 4 * width + mixing
    assert streams.flops_per_token(8) - plain.flops_per_token(8) == 2 * more


@pytest.mark.parametrize("kind", [*CLASSES, "plain"])
@pytest.mark.parametrize("off", [{}, {"disable": True}])
def test_keyword_arguments_go_to_the_branch(kind, off):
    cls, options = (PlainResidual, {}) if kind == "plain" else (CLASSES[kind], off)
    layer = cls(lambda u, shift, *, scale: scale * u + shift, 6, **options, **FLOAT64)
    alone = cls(lambda u: 3 * u + 2, 6, **options, **FLOAT64)
    x = layer.expand(normal(2, 4, 6))
    assert torch.equal(torch.clone(layer(x, 2.0, scale=3.0)), torch.clone(alone(x)))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("reduce", ["sum", "mean", "learned"])
def test_autocast_leaves_the_reduction_in_the_streams_dtype(kind, reduce):
    layer = randomised(CLASSES[kind](nn.Identity(), 6, reduce=reduce))
    x = normal(2, 4, 4, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.reduce(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, layer.reduce(x))


@pytest.mark.parametrize("residual", ["plain", *CLASSES])
def test_every_norm_of_a_model_has_the_epsilon_asked_for(residual):
    model = create_model("lm", residual=residual, norm="pre", norm_eps=1e-3, **SIZES)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * SIZES["depth"] + 1 and {norm.eps for norm in norms} == {1e-3}
    image = create_model("vit_b16", residual=residual, depth=1, dim=12, ffn_dim=8, num_heads=2, device="meta")
    assert {norm.eps for norm in image.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}
