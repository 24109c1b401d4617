"""Routing and grouped experts: what the shared rungs of test_ops.py do not ask."""

import pytest
import torch
from safetensors.torch import load_file

from grassland.kernels import dispatch
from grassland.kernels.moe import expert_capacity, moe_ffn, moe_route
from grassland.kernels.testing import normal, record_launches

BACKENDS = ["reference", "eager"]
FLOAT32 = ["eager", *(["cpp"] if dispatch.extension_error() is None else [])]


def weights(experts, dim, inner, dtype=torch.float64):
    shapes = {"w_up": (experts, inner, dim), "b_up": (experts, inner), "w_down": (experts, dim, inner)}
    shapes["b_down"] = (experts, dim)
    return {n: normal(*s, seed=k).mul(0.4).to(dtype).requires_grad_() for k, (n, s) in enumerate(shapes.items())}


def layer(x, logits, w, backend, capacity=None, top_k=2, mask=None, **options):
    r = moe_route(logits, top_k=top_k, capacity=capacity, mask=mask, backend=backend)
    return moe_ffn(x, r.gates.to(x.dtype), r.slots, r.order, r.offsets, **w, backend=backend, **options), r


def dense(x, logits, w, top_k):
    """Every expert on every token, with gates from a top-k mask."""
    p = logits.softmax(-1)
    gates = p * torch.zeros_like(p).scatter(1, logits.topk(top_k).indices, 1)
    outs = []
    for up, b_up, down, b_down in zip(*w.values(), strict=True):
        h = torch.nn.functional.gelu(x @ up.T + b_up, approximate="tanh")
        outs.append(h @ down.T + b_down)
    return (gates[:, :, None] * torch.stack(outs, 1)).sum(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(23, 4, 2), (1, 4, 2), (9, 1, 1), (8, 3, 3), (17, 5, 2), (3, 16, 2)]
)
def test_dropless_is_the_dense_loop(backend, tokens, experts, top_k):
    x, logits = normal(tokens, 6).requires_grad_(), normal(tokens, experts, seed=9).requires_grad_()
    w = weights(experts, 6, 10)
    results = []
    for y in (dense(x, logits, w, top_k), layer(x, logits, w, backend, top_k=top_k)[0]):
        results.append([y, *torch.autograd.grad(y, [x, logits, *w.values()], normal(tokens, 6, seed=3))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, atol=1e-10, rtol=0)


@pytest.mark.parametrize("experts", [4, 8])
@pytest.mark.parametrize("backend", [*BACKENDS, *FLOAT32[1:]])
def test_golden_router(shared, experts, backend):
    golden = load_file(shared / "golden" / f"widenet_router_e{experts}.safetensors")
    logits = golden["logits"].float() if backend == "cpp" else golden["logits"]
    capacity = int(golden["capacity"])
    for name, places in (("keep", capacity), ("keep_official", capacity - 1)):
        r = moe_route(logits, capacity=places, backend=backend)
        assert torch.equal(r.experts, golden["experts"])
        kept = torch.zeros_like(golden[name]).scatter(1, r.experts, r.slots >= 0)
        assert torch.equal(kept, golden[name])
        tolerance = 1e-12 if logits.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(r.gates.double(), golden["gates"], atol=tolerance, rtol=0)
        torch.testing.assert_close(r.balance.double()[None], golden["balance_loss"], atol=4 * tolerance, rtol=0)


@pytest.mark.parametrize("backend", FLOAT32)
def test_ample_capacity_is_dropless_bitwise(backend):
    x, logits, w = normal(40, 6).float(), normal(40, 4).float(), weights(4, 6, 10, torch.float32)
    assert torch.equal(layer(x, logits, w, backend)[0], layer(x, logits, w, backend, capacity=40)[0])


@pytest.mark.parametrize("backend", FLOAT32)
def test_a_dropped_pair_contributes_exactly_zero(backend):
    x, w = normal(12, 6).float().requires_grad_(), weights(3, 6, 10, torch.float32)
    logits = torch.tensor([5.0, 1.0, 0.0]).expand(12, 3).clone().requires_grad_()
    y, r = layer(x, logits, w, backend, capacity=4)
    assert (r.slots[4:] == -1).all() and (r.slots[:4] >= 0).all()
    assert (y[4:] == 0).all() and (y[:4] != 0).any(-1).all()
    dx, dlogits = torch.autograd.grad(y.square().sum(), [x, logits])
    assert (dx[4:] == 0).all() and (dlogits[4:] == 0).all()


@pytest.mark.parametrize("backend", FLOAT32)
def test_a_dropped_pair_contributes_nothing_of_a_nan_gate(backend):
    x, w = normal(12, 6).float(), weights(3, 6, 10, torch.float32)
    r = moe_route(normal(12, 3).float(), capacity=4)
    gates = r.gates.masked_fill(r.slots < 0, torch.nan)
    y, expected = (moe_ffn(x, g, r.slots, r.order, r.offsets, **w, backend=backend) for g in (gates, r.gates))
    assert (r.slots < 0).any() and torch.equal(y, expected)


@pytest.mark.parametrize("backend", FLOAT32)
def test_a_nan_is_the_largest_logit_as_where_pytorch_sorts(backend):
    logits = normal(6, 4).float()
    logits[4], logits[2, 3], logits[3, 0] = torch.nan, torch.nan, torch.nan
    for capacity in (None, 2):
        found, wanted = (moe_route(logits, capacity=capacity, backend=b) for b in (backend, "reference"))
        torch.testing.assert_close(found, wanted, equal_nan=True)


@pytest.mark.skipif(len(FLOAT32) == 1, reason="the extension is not built")
@pytest.mark.parametrize("name, number", [("slots", 12), ("order", 24), ("order", -1), ("offsets", 1), ("offsets", -1)])
def test_the_extension_reads_nothing_outside_of_the_tensors(name, number):
    x, w = normal(12, 6).float(), weights(3, 6, 10, torch.float32)
    r = moe_route(normal(12, 3).float(), capacity=4)
    arguments = {"slots": r.slots, "order": r.order, "offsets": r.offsets}
    arguments[name] = arguments[name].clone()
    arguments[name].view(-1)[0] = number
    with pytest.raises(RuntimeError, match="slots, order and offsets must be those of one moe_route"):
        moe_ffn(x, r.gates, **arguments, **w, backend="cpp")


@pytest.mark.parametrize("backend", FLOAT32)
def test_everything_to_one_expert_leaves_the_others_without_gradient(backend):
    x, w = normal(9, 6).float(), weights(4, 6, 10, torch.float32)
    logits = torch.zeros(9, 4)
    logits[:, 2] = 50
    y, r = layer(x, logits, w, backend, top_k=1)
    assert r.counts.tolist() == [0, 0, 9, 0]
    for gradient in torch.autograd.grad(y.square().sum(), list(w.values())):
        assert (gradient[[0, 1, 3]] == 0).all() and (gradient[2] != 0).any()


@pytest.mark.parametrize("backend", [*BACKENDS, *FLOAT32[1:]])
def test_slots_are_a_stable_counting_sort(backend):
    logits = normal(60, 5).float()
    r = moe_route(logits, capacity=20, backend=backend)
    kept = r.order[r.order >= 0]
    assert torch.equal(r.slots.view(-1)[kept], torch.arange(len(kept)))
    for e in range(5):
        rows = kept[r.offsets[e] : r.offsets[e + 1]]
        assert (r.experts.view(-1)[rows] == e).all() and torch.equal(rows, rows.sort().values)
        chosen = (r.experts.view(-1) == e).nonzero()[:, 0]
        assert torch.equal(rows, chosen[:20]) and r.counts[e] == len(chosen)


@pytest.mark.parametrize("backend", [*BACKENDS, *FLOAT32[1:]])
def test_balance_loss(backend):
    assert moe_route(torch.zeros(1, 1), top_k=1, backend=backend).balance == 1
    uniform = torch.eye(4).repeat(5, 1) * 3 + torch.eye(4).roll(1, 1).repeat(5, 1) * 2
    assert moe_route(uniform, backend=backend).balance.item() == pytest.approx(1, abs=1e-6)
    logits = normal(50, 6).float()
    permuted = moe_route(logits[:, [3, 0, 5, 1, 4, 2]], backend=backend).balance
    torch.testing.assert_close(permuted, moe_route(logits, backend=backend).balance)
    torch.testing.assert_close(permuted, moe_route(logits, capacity=3, backend=backend).balance)


@pytest.mark.parametrize("backend", [*BACKENDS, *FLOAT32[1:]])
def test_masked_tokens_are_as_if_they_were_not_there(backend):
    x, logits, w = normal(20, 6).float(), normal(20, 4).float().requires_grad_(), weights(4, 6, 10, torch.float32)
    mask = torch.arange(20) % 3 != 0
    y, r = layer(x, logits, w, backend, capacity=6, mask=mask)
    alone, s = layer(x[mask], logits[mask], w, backend, capacity=6)
    torch.testing.assert_close(y[mask], alone, atol=1e-6, rtol=0)
    assert (y[~mask] == 0).all() and (r.slots[~mask] == -1).all()
    torch.testing.assert_close(r.balance, s.balance)
    grads = [torch.autograd.grad(q.balance, logits)[0] for q in (r, s)]
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("backend", [*BACKENDS, *FLOAT32[1:]])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_masked_token_of_any_value_leaves_the_balance_alone(backend, value):
    logits, mask = normal(6, 4).float(), torch.tensor([True, True, False, True, False, True])
    logits[2, 1] = value
    balance = moe_route(logits, mask=mask, backend=backend).balance
    torch.testing.assert_close(balance, moe_route(logits[mask], backend=backend).balance)


@pytest.mark.parametrize("backend", FLOAT32)
def test_dropout_is_fixed_by_its_seed_and_keeps_the_mean(backend):
    x, logits, w = normal(64, 32).float(), normal(64, 4).float(), weights(4, 32, 48, torch.float32)
    with torch.no_grad():
        plain = layer(x, logits, w, backend)[0]
        runs = [layer(x, logits, w, backend, dropout=0.2, seed=torch.tensor([s]))[0] for s in [1, 1, *range(2, 300)]]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    mean = torch.stack(runs[1:]).mean(0)
    assert (mean - plain).norm() < 0.06 * plain.norm()


def test_gates_and_balance_have_gradients_of_their_own():
    for pick in (lambda r: r.gates.square().sum(), lambda r: r.balance):
        logits = normal(9, 4).requires_grad_()
        found, expected = (
            torch.autograd.grad(pick(moe_route(logits, backend=backend)), logits)[0]
            for backend in ("eager", "reference")
        )
        assert found.norm() > 0
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.skipif(len(FLOAT32) == 1, reason="the extension is not built")
@pytest.mark.parametrize(("dim", "inner"), [(300, 409), (17, 3857)])
def test_few_rows_of_every_number(dim, inner):
    """Products of few rows have kernels of their own: panels of rows, blocks of the weights, each with its edge."""
    # Down and its gradients without signs: a sum over the tokens that cancels would measure the summation order.
    found = weights(1, dim, inner, torch.float32)
    found["w_down"].data.abs_()
    exact = {n: t.detach().double().requires_grad_() for n, t in found.items()}
    for tokens in (1, 15, 16, 17, 33, 48, 64, 65):
        results = []
        for w, backend in ((exact, "eager"), (found, "cpp")):
            x, logits, grad = (normal(tokens, n, seed=n).float().to(w["w_up"].dtype) for n in (dim, 1, dim))
            y, _ = layer(x.requires_grad_(), logits, w, backend, top_k=1)
            results.append([y, *torch.autograd.grad(y, [x, *w.values()], grad.abs())])
        for a, b in zip(*results, strict=True):
            assert (b - a).norm() < 1e-6 * a.norm(), tokens


@pytest.mark.parametrize("gelu_out", [False, True])
@pytest.mark.parametrize("backend", FLOAT32)
def test_the_slope_of_a_huge_preactivation_is_0_or_1(backend, gelu_out):
    """x^3 times the clamped exponential of the gate was 3.5 at 1e13, and infinite from 1e25 on."""
    sizes = torch.tensor([10.0, 11.0, 1e6, 1e10, 1e13, 1e16, 1e18])
    x = torch.cat([sizes, -sizes])[:, None]
    logits, one = torch.zeros(len(x), 1), torch.ones(1, 1, 1)
    w = {"w_up": one, "b_up": torch.zeros(1, 1), "w_down": one, "b_down": torch.zeros(1, 1)}
    y, _ = layer(x.requires_grad_(), logits, w, backend, top_k=1, gelu_out=gelu_out)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, (x > 0).float(), atol=1e-30, rtol=0)


@pytest.mark.skipif(len(FLOAT32) == 1, reason="the extension is not built")
def test_accumulating_backward_adds_to_what_is_there():
    from grassland.kernels.moe import op

    for dtype in (torch.float32, torch.bfloat16):
        w = {n: t.detach().to(dtype) for n, t in weights(3, 6, 10).items()}
        x, r = normal(14, 6).to(dtype), moe_route(normal(14, 3).float(), capacity=8)
        args = (x, r.gates, r.slots, r.order, r.offsets)
        for backend in FLOAT32:
            _, h, o = op.moe_ffn(*args, *w.values(), 0.0, None, False, True, backend)
            saved = (x, *args, w["w_up"], w["w_down"], w["b_down"], h, o, 0.0, None, False)
            once, twice = ([torch.empty_like(w[n]) for n in ("w_up", "w_down")] for _ in "ab")
            small = op.moe_ffn_backward(*saved, *once, False, backend)
            totals = [torch.ones_like(t, dtype=torch.float32) for t in once]
            for _ in range(2):
                op.moe_ffn_backward(*saved, *totals, True, backend)
            for total, single in zip(totals, once, strict=True):
                relative = 1e-5 if dtype == torch.float32 else 1e-2
                torch.testing.assert_close((total - 1) / 2, single.float(), atol=1e-5, rtol=relative)
            alone = op.moe_ffn_backward(*saved, None, twice[1], False, backend)
            assert all(torch.equal(a, b) for a, b in zip((*small, once[1]), (*alone, twice[1]), strict=True))


@pytest.mark.parametrize("backend", [*BACKENDS, *FLOAT32[1:]])
def test_with_nothing_to_route_output_balance_and_gradients_are_zero(backend):
    x, logits = normal(6, 6).float().requires_grad_(), normal(6, 4).float().requires_grad_()
    w = weights(4, 6, 10, torch.float32)
    y, r = layer(x, logits, w, backend, mask=torch.zeros(6, dtype=torch.bool))
    assert (y == 0).all() and r.balance == 0 and r.counts.sum() == 0 and (r.order == -1).all()
    found = torch.autograd.grad(y.sum() + r.balance, [x, logits, *w.values()])
    assert all((g == 0).all() for g in found)


@pytest.mark.parametrize("gelu_out", [False, True])
def test_the_triton_path_asks_nothing_of_the_device(gelu_out):
    """With tensors that have no values, every launch from routing to the backward is made."""
    pytest.importorskip("triton")
    from grassland.kernels.moe import fused

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, logits, mask = empty(40, 6), empty(40, 4), empty(40, dtype=torch.bool)
    w_up, b_up, w_down, b_down = empty(4, 10, 6), empty(4, 10), empty(4, 6, 10), empty(4, 6)

    def run():
        gates, balance, experts, slots, order, offsets, counts, p = fused.route(logits, mask, 2, 12, True)
        seed = empty(1, dtype=torch.int64)
        index = (gates, slots, order, offsets)
        y, h, o = fused.moe_ffn(x, *index, w_up, b_up, w_down, b_down, 0.1, seed, gelu_out, True)
        kept = (w_up, w_down, b_down, h, o, 0.1, seed, gelu_out, w_up, w_down, True)
        fused.moe_ffn_backward(y, x, *index, *kept)
        fused.route_backward(gates, balance, p, experts, counts, mask, True)

    names = [launch.name for launch in record_launches(run)]
    assert names.count("grouped_kernel") == 4 and names.count("weight_gradient_kernel") == 2
    assert {"choose_kernel", "scan_kernel", "slot_kernel", "route_backward_kernel"} < set(names)


def test_capacity_formula():
    assert expert_capacity(64, 4, 2, 1.2) == 38
    assert expert_capacity(1, 4, 2, 1.2) == 0


@pytest.mark.parametrize("strict", [True, False])
def test_a_capacity_of_the_batch_is_exported(strict):
    class Router(torch.nn.Module):
        def forward(self, logits):
            return moe_route(logits, capacity=expert_capacity(logits.shape[0], 3, 2, 1.2)).slots

    sizes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Router(), (normal(10, 3).float(),), dynamic_shapes=sizes, strict=strict)
    logits = normal(22, 3, seed=1).float()
    assert torch.equal(program.module()(logits), Router()(logits))


def test_the_reference_routes_on_the_device_of_the_logits():
    logits = normal(6, 4)
    with torch.device("meta"):
        found = moe_route(logits, capacity=2, backend="reference")
    for a, b in zip(found, moe_route(logits, capacity=2, backend="eager"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logits": torch.zeros(3)}, ("logits", "(3,)")),
        ({"top_k": 5}, ("top_k", "5", "4")),
        ({"top_k": 0}, ("top_k", "0")),
        ({"capacity": 0}, ("capacity", "0")),
        ({"mask": torch.ones(2, dtype=torch.bool)}, ("mask", "(2,)")),
        ({"mask": torch.ones(3)}, ("mask", "float32")),
        ({"backend": "tpu"}, ("backend", "tpu")),
    ],
)
def test_bad_routing_arguments_name_themselves(change, words):
    with pytest.raises(ValueError) as caught:
        moe_route(**{"logits": torch.zeros(3, 4), **change})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"x": torch.zeros(3, 2, 6)}, ValueError, ("x", "(3, 2, 6)")),
        ({"gates": torch.zeros(4, 2)}, ValueError, ("gates", "(4, 2)")),
        ({"slots": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, ("slots", "(3, 1)")),
        ({"order": torch.zeros(6)}, ValueError, ("order", "float32")),
        ({"w_up": torch.zeros(4, 10, 5)}, ValueError, ("w_up", "(4, 10, 5)")),
        ({"w_down": torch.zeros(4, 6, 9)}, ValueError, ("w_down", "(4, 6, 9)")),
        ({"b_up": torch.zeros(4, 10).bfloat16()}, TypeError, ("b_up", "bfloat16")),
        ({"dropout": 1.0}, ValueError, ("dropout", "1.0")),
        ({"seed": torch.zeros(2)}, ValueError, ("seed", "(2,)")),
    ],
)
def test_bad_expert_arguments_name_themselves(change, kind, words):
    r = moe_route(torch.zeros(3, 4))
    given = {"x": torch.zeros(3, 6), "gates": r.gates, "slots": r.slots, "order": r.order, "offsets": r.offsets}
    given |= weights(4, 6, 10, torch.float32)
    with pytest.raises(kind) as caught:
        moe_ffn(**{**given, **change})
    assert all(word in str(caught.value) for word in words), str(caught.value)
