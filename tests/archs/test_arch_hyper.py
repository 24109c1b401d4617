"""Hyper-connections: the official vectors, the equations, the slot, the stream state."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from grassland.archs import (
    MHC,
    HyperConnection,
    KromHC,
    MHCLite,
    PlainResidual,
    StreamState,
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


def through(layers, x):
    streams = layers[0].expand(x)
    for layer in layers:
        streams = layer(streams)
    return layers[-1].reduce(streams)


def saved_tensors(out):
    """The streams that the backward of `out` holds, as stored: a recipe stays a recipe."""
    found, seen, pending = [], set(), [out.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        saved = getattr(node, "_raw_saved_tensors", ()) or ()
        found += [s.data for s in saved if s.data is not None]
        pending += [edge for edge, _ in node.next_functions]
    return found


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
def test_a_layer_is_its_equation(kind):
    layer = randomised(CLASSES[kind](nn.Linear(6, 6, **FLOAT64), 6, num_streams=4, **FLOAT64))
    x = normal(2, 3, 4, 6)
    h_pre, h_post, mixing = layer.coefficients(x)
    y = layer.branch(torch.einsum("...n,...nc->...c", h_pre, x))
    expected = torch.einsum("...ij,...jc->...ic", mixing, x) + torch.einsum("...n,...c->...nc", h_post, y)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_deferred_state_equals_the_two_kernels(dtype):
    layers = randomised(chain("kromhc", dtype=dtype)).to(dtype)
    x = normal(2, 3, 6, dtype=dtype)
    state, streams = layers[0].expand(x), layers[0].expand(x).tensor()
    assert isinstance(state, StreamState)
    for layer in layers:
        state, streams = layer(state), layer(streams)
        assert isinstance(state, StreamState) and isinstance(streams, torch.Tensor)
    assert torch.equal(state.tensor(), streams)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduce", ["sum", "mean", "learned"])
def test_reducing_a_deferred_state(reduce, dtype):
    """Against float64, values and gradients are as near as those of streams that are made first."""
    layers = randomised(chain("kromhc", reduce=reduce)).to(dtype)
    x = normal(2, 3, 6, dtype=dtype)

    def results(layers, x, deferred):
        x = x.clone().requires_grad_()
        streams = layers[0].expand(x)
        streams = streams if deferred else streams.tensor()
        for layer in layers:
            streams = layer(streams)
        assert isinstance(streams, StreamState) is deferred
        out = layers[-1].reduce(streams)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *layers.parameters()])]

    exact = results(copy.deepcopy(layers).double(), x.double(), deferred=False)
    errors = []
    for deferred in (False, True):
        found = results(layers, x, deferred)
        assert all(tensor.dtype is dtype for tensor in found)
        pairs = zip(found, exact, strict=True)
        errors.append(max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs))
    # In float64 the truth itself is rounded.
    assert errors[1] <= 2 * errors[0] + 16 * torch.finfo(torch.float64).eps


def test_the_sum_of_a_deferred_state_is_rounded_once():
    layer = randomised(KromHC(nn.Tanh(), 6, dtype=torch.bfloat16))
    x = normal(50, 4, 6, dtype=torch.bfloat16)
    h_pre, h_post, _ = layer.coefficients(x)
    y = torch.tanh((h_pre[..., None] * x).sum(-2).bfloat16())
    exact = x.double().sum(-2) + h_post.double().sum(-1, keepdim=True) * y.double()
    found = layer.reduce(layer(StreamState(x, layer.factors)))
    assert found.dtype is torch.bfloat16
    assert ((found.double() - exact).abs() <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 1e-6).all()


def test_state_behaves_as_its_tensor():
    layers = randomised(chain("kromhc"))
    state = layers[0](layers[0].expand(normal(2, 3, 6)))
    assert state.shape == (2, 3, 4, 6)
    found = [state + 1, 2 * state, state[0], torch.relu(state), state.mean(-2), torch.cat([state, state]), -state]
    x = state.tensor()
    expected = [x + 1, 2 * x, x[0], torch.relu(x), x.mean(-2), torch.cat([x, x]), -x]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and len(state) == 2


OPERATORS = {
    "pow": lambda s: s**2,
    "rpow": lambda s: 2**s,
    "rtruediv": lambda s: 1 / s,
    "rsub": lambda s: 1 - s,
    "floordiv": lambda s: s // 2,
    "rfloordiv": lambda s: 2 // s,
    "mod": lambda s: s % 2,
    "rmod": lambda s: 2 % s,
    "abs": abs,
    "pos": lambda s: +s,
    "lt": lambda s: s < 0,
    "le": lambda s: s <= 0,
    "gt": lambda s: s > 0,
    "ge": lambda s: s >= 0,
    "eq": lambda s: s == 0,
    "ne": lambda s: s != 0,
    "eq_itself": lambda s: s == s,
    "in": lambda s: torch.tensor(1.0 in s),
    "rmatmul": lambda s: torch.ones(4, 4, **FLOAT64) @ s,
    "reversed": lambda s: reversed(s),
    "numpy": lambda s: torch.from_numpy(np.asarray(s.detach() if isinstance(s, torch.Tensor) else s)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_on_a_state(name):
    layers = randomised(chain("kromhc"))
    with torch.no_grad():
        state = layers[0](layers[0].expand(normal(2, 3, 6)))
        x = layers[0](layers[0].expand(normal(2, 3, 6)).tensor())
        found, expected = OPERATORS[name](state), OPERATORS[name](x)
    assert isinstance(found, torch.Tensor) and torch.equal(found, expected) and {state: 1}[state] == 1
    with pytest.raises(TypeError, match="item assignment"):
        state[0] = 1


@pytest.mark.parametrize("keep", [2, 3, 10])
def test_recomputed_streams_give_the_same_gradients_in_less_memory(keep):
    results, alive = [], []
    for every in (1, keep):
        layers = randomised(chain("kromhc", depth=7, keep_streams=every))
        x = normal(2, 3, 6).requires_grad_()
        out = through(layers, x)
        saved = saved_tensors(out)
        alive.append(len({t.data_ptr() for t in saved if isinstance(t, torch.Tensor) and t.shape == (6, 4, 6)}))
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layers.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # X_0 … X_5: the sum that ends the chain needs no more.
    assert alive == [6, math.ceil(6 / keep)]


class Chain(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layers = randomised(chain("kromhc", **options), std=0.2)

    def forward(self, x, call=lambda layer, streams: layer(streams)):
        streams = self.layers[0].expand(x)
        for layer in self.layers:
            streams = call(layer, streams)
        return self.layers[-1].reduce(streams)


def gradients(model, x, *call):
    out = model(x, *call)
    model.zero_grad()
    out.square().sum().backward()
    found = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    return [out.detach(), *found]


def sharded(model, mesh, **options):
    for unit in (*model.layers, model):
        fully_shard(unit, mesh=mesh, ignored_params={p for p in unit.parameters() if p.ndim == 0}, **options)
    return model


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def checkpointed(layer, streams):
    return checkpoint(layer, streams, use_reentrant=False)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("keep", [1, 3])
def test_checkpointed_and_sharded_layers_give_the_same_gradients(keep, mesh):
    model, x = Chain(keep_streams=keep), normal(2, 3, 6)
    expected = gradients(model, x)
    runs = [gradients(model, x, checkpointed)]
    sharded(model, mesh)
    runs += [gradients(model, x), gradients(model, x, checkpointed)]
    for found in runs:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_mixed_precision_may_cast_a_state(mesh):
    model, x = Chain(keep_streams=3).float(), normal(2, 3, 6, dtype=torch.float32)
    expected = gradients(model, x)
    found = gradients(sharded(model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)), x)
    assert found[0].dtype is torch.bfloat16
    found, expected = (torch.cat([tensor.float().flatten() for tensor in run]) for run in (found, expected))
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpointing_of_streams_is_refused():
    model, x = Chain(), normal(2, 3, 6).requires_grad_()
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(x, lambda layer, streams: checkpoint(layer, streams, use_reentrant=True))
    # Tensors go in and out of it, streams among them, and without a graph nothing is lost.
    tensors = lambda layer, s: checkpoint(layer, torch.clone(s), use_reentrant=True)  # noqa: E731
    runs = [gradients(model, x), gradients(model, x, tensors)]
    runs.append([checkpoint(model, x, use_reentrant=True).detach()])
    with torch.no_grad():
        runs.append([model(x)])
    with torch.inference_mode():
        runs.append([model(x)])
    for found in runs[1:]:
        for a, b in zip(found, runs[0], strict=False):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", ["compile", "export"])
def test_streams_that_would_be_recomputed_are_traced_to_one_graph(how):
    torch._dynamo.reset()
    model, x = Chain(keep_streams=2), normal(2, 3, 6)
    if how == "compile":
        expected = gradients(model, x)
        found = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    else:
        expected, found = [model(x)], [torch.export.export(model, (x,)).module()(x)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_state_is_a_pytree():
    layer = randomised(chain("kromhc", depth=1))[0]
    state = layer(layer.expand(normal(2, 3, 6)))
    tensors, spec = pytree.tree_flatten(state)
    assert len(tensors) == 3 and all(t.requires_grad for t in tensors)
    again = pytree.tree_unflatten(tensors, spec)
    assert isinstance(again, StreamState) and torch.equal(again.tensor(), state.tensor())


def test_a_pytree_keeps_the_recipe_of_streams_that_nothing_has_changed():
    layers = randomised(chain("kromhc", depth=3, keep_streams=3))
    state = layers[0].expand(normal(2, 3, 6))
    for layer in layers:
        state = layer(state)
    recipe = state._recipe
    assert recipe is not None and pytree.tree_map(lambda t: t, state)._recipe is recipe
    assert pytree.tree_map(lambda t: 2 * t, state)._recipe is None
    with torch.no_grad():
        assert pytree.tree_map(lambda t: t.mul_(2), state)._recipe is None


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
def test_compiles_to_one_graph_for_all_lengths(kind):
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
        (lambda: KromHC(None, 8, reduce="learned", num_layers=2).reduce(torch.zeros(2, 4, 8)), ("learned", "0")),
        (lambda: get_init_and_expand_reduce_stream_functions(4, kind="mhd"), ("kind", "mhd")),
        (lambda: get_init_and_expand_reduce_stream_functions(4, reduce="learned"), ("reduce", "learned", "mean")),
        (lambda: get_init_and_expand_reduce_stream_functions(4, expand="learned"), ("expand", "learned", "repeat")),
        (lambda: get_init_and_expand_reduce_stream_functions(4, dim=8)[0](init="identity"), ("init", "given to")),
        (lambda: get_init_and_expand_reduce_stream_functions(4)[0](), ("dim",)),
        (lambda: get_init_and_expand_reduce_stream_functions(4, dim=8)[0]()(torch.zeros(6, 8)), ("4 streams", "6")),
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
