"""The stream state of KromHC: it behaves as its tensor, and recomputes, checkpoints, shards and flattens as one."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from grassland.archs import KromHC, StreamState

FLOAT64 = {"dtype": torch.float64}


def randomised(module, std=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += std * noise.to(parameter.dtype)
    return module


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chain(depth=4, dim=6, **options):
    torch.manual_seed(0)
    return nn.ModuleList(
        KromHC(nn.Linear(dim, dim, **FLOAT64), dim, layer, num_layers=depth, **{**FLOAT64, **options})
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_deferred_state_equals_the_two_kernels(dtype):
    layers = randomised(chain(dtype=dtype)).to(dtype)
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
    layers = randomised(chain(reduce=reduce)).to(dtype)
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
    layers = randomised(chain())
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
    layers = randomised(chain())
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
        layers = randomised(chain(depth=7, keep_streams=every))
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
        self.layers = randomised(chain(**options), std=0.2)

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
    layer = randomised(chain(depth=1))[0]
    state = layer(layer.expand(normal(2, 3, 6)))
    tensors, spec = pytree.tree_flatten(state)
    assert len(tensors) == 3 and all(t.requires_grad for t in tensors)
    again = pytree.tree_unflatten(tensors, spec)
    assert isinstance(again, StreamState) and torch.equal(again.tensor(), state.tensor())


def test_a_pytree_keeps_the_recipe_of_streams_that_nothing_has_changed():
    layers = randomised(chain(depth=3, keep_streams=3))
    state = layers[0].expand(normal(2, 3, 6))
    for layer in layers:
        state = layer(state)
    recipe = state._recipe
    assert recipe is not None and pytree.tree_map(lambda t: t, state)._recipe is recipe
    assert pytree.tree_map(lambda t: 2 * t, state)._recipe is None
    with torch.no_grad():
        assert pytree.tree_map(lambda t: t.mul_(2), state)._recipe is None
