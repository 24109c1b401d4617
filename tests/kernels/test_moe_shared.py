"""Calls of moe_ffn that share their weights: one gradient buffer, and in every situation the gradients of autograd."""

import gc
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from grassland.kernels import dispatch
from grassland.kernels.moe import moe_ffn, moe_route, shared
from grassland.kernels.testing import normal, poisoned

COMPILED = dispatch.extension_error() is None
needs_extension = pytest.mark.skipif(not COMPILED, reason=str(dispatch.extension_error()))
EXACT = {"atol": 1e-12, "rtol": 0}


def weights(dtype=torch.float64, experts=3, dim=6, inner=10):
    shapes = {"w_up": (experts, inner, dim), "b_up": (experts, inner), "w_down": (experts, dim, inner)}
    shapes["b_down"] = (experts, dim)
    return {n: normal(*s, seed=k).mul(0.4).to(dtype).requires_grad_() for k, (n, s) in enumerate(shapes.items())}


def inputs(dtype=torch.float64, dim=6):
    return normal(9, dim).to(dtype).requires_grad_()


def call(x, w, **options):
    logits = torch.arange(1.0, len(x) * len(w["b_up"]) + 1, dtype=x.dtype).sin().view(len(x), -1)
    r = moe_route(logits, capacity=5)
    return moe_ffn(x, r.gates.to(x.dtype), r.slots, r.order, r.offsets, **w, **options)


def copies(w):
    """Other tensors for each call, so that nothing is shared and autograd sums."""
    return {name: t.clone() for name, t in w.items()}


def stack(x, w, times=3, each=dict, **options):
    for _ in range(times):
        x = x + call(x, each(w), **options)
    return x


def expected(w, loss, *arguments):
    """Gradients of x's and of the weights when no call shares."""
    return torch.autograd.grad(loss(copies), [*arguments, *w.values()], allow_unused=True)


def accumulated(*tensors):
    return [t.grad for t in tensors]


@pytest.mark.parametrize("retain", [False, True])
def test_one_backward(retain):
    x, w = inputs(), weights()
    wanted = expected(w, lambda each: stack(x, w, each=each).square().sum(), x)
    loss = stack(x, w).square().sum()
    if retain:
        loss.backward(retain_graph=True)
        torch.testing.assert_close(accumulated(x, *w.values()), list(wanted), **EXACT)
        wanted = [2 * g for g in wanted]
    loss.backward()
    torch.testing.assert_close(accumulated(x, *w.values()), list(wanted), **EXACT)


@pytest.mark.parametrize("order", ["one after the other", "forwards first", "their sum", "reversed"])
def test_micro_batches(order):
    w, batches = weights(), [inputs(), (inputs() * 0.3).detach()]
    wanted = expected(w, lambda each: sum(stack(x, w, each=each).square().sum() for x in batches))
    if order == "one after the other":
        for x in batches:
            stack(x, w).square().sum().backward()
    else:
        losses = [stack(x, w).square().sum() for x in batches]
        if order == "their sum":
            losses = [losses[0] + losses[1]]
        for loss in reversed(losses) if order == "reversed" else losses:
            loss.backward()
    torch.testing.assert_close(accumulated(*w.values()), list(wanted), **EXACT)


@pytest.mark.parametrize("mode", ["reentrant", "hooks", "mixed"])
def test_checkpointing(mode):
    x, w = inputs(), weights()
    wanted = expected(w, lambda each: stack(x, w, each=each).square().sum(), x)
    y = x
    for layer in range(3):
        if mode == "mixed" and layer == 1:
            y = y + call(y, w)
        else:
            reentrant = mode == "reentrant" or layer == 2
            y = y + checkpoint(call, y, w, use_reentrant=reentrant and mode != "hooks")
    y.square().sum().backward()
    torch.testing.assert_close(accumulated(x, *w.values()), list(wanted), **EXACT)


def test_a_call_whose_output_is_not_used():
    x, w = inputs(), weights()
    wanted = expected(w, lambda each: stack(x, w, 2, each).square().sum(), x)
    y = stack(x, w, 2)
    call(y, w)
    y.square().sum().backward()
    torch.testing.assert_close(accumulated(x, *w.values()), list(wanted), **EXACT)


@pytest.mark.parametrize("frozen", [["w_up"], ["w_down"], ["w_up", "w_down"], ["w_up", "b_up", "w_down", "b_down"]])
def test_frozen_weights(frozen):
    x, w = inputs(), weights()
    for name in frozen:
        w[name].requires_grad_(False)
    free = [t for t in (x, *w.values()) if t.requires_grad]
    wanted = torch.autograd.grad(stack(x, w, each=copies).square().sum(), free)
    stack(x, w).square().sum().backward()
    torch.testing.assert_close(accumulated(*free), list(wanted), **EXACT)
    assert all(w[name].grad is None for name in frozen)


def test_gradients_of_chosen_inputs_leave_nothing_behind():
    x, w = inputs(), weights()
    full = expected(w, lambda each: stack(x, w, each=each).square().sum(), x)
    loss = stack(x, w).square().sum()
    for chosen, wanted in (([x], full[:1]), ([w["w_up"]], full[1:2]), ([w["b_up"], x], (full[2], full[0]))):
        found = torch.autograd.grad(loss, chosen, retain_graph=True)
        torch.testing.assert_close(found, wanted, **EXACT)
    loss.backward(inputs=[w["w_down"]], retain_graph=True)
    assert w["w_up"].grad is None
    loss.backward(inputs=[w["w_up"], w["w_down"]])
    torch.testing.assert_close([w["w_up"].grad, w["w_down"].grad / 2], [full[1], full[3]], **EXACT)


def test_weight_gradients_that_nobody_asked_for_are_not_computed():
    x, w = inputs(dim=9), weights(dim=9, inner=257)
    y = stack(x, w)
    for wanted in (x, w["w_up"]):
        with count_allocations(w["w_up"]) as count:
            torch.autograd.grad(y.sum(), wanted, retain_graph=True)
        assert (count() == 0) == (wanted is x)


def test_a_backward_that_fails_leaves_nothing_behind():
    x, w = inputs(), weights()
    wanted = expected(w, lambda each: stack(x, w, each=each).square().sum())

    def fail(_):
        raise RuntimeError("interrupted")

    y = x + call(x, w)
    y.register_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        stack(y, w, 2).square().sum().backward()
    stack(x, w).square().sum().backward()
    torch.testing.assert_close(accumulated(*w.values()), list(wanted), **EXACT)


def test_hooks_of_the_parameter_see_one_complete_gradient():
    x, w = inputs(), weights()
    wanted = expected(w, lambda each: stack(x, w, each=each).square().sum())
    seen = {"before": [], "after": []}
    w["w_up"].register_hook(lambda g: seen["before"].append(g.clone()) or 2 * g)
    w["w_up"].register_post_accumulate_grad_hook(lambda p: seen["after"].append(p.grad.clone()))
    stack(x, w).square().sum().backward()
    torch.testing.assert_close(seen["before"], [wanted[0]], **EXACT)
    torch.testing.assert_close(seen["after"], [2 * wanted[0]], **EXACT)


def test_second_derivatives():
    x, w = inputs(), weights()

    def both(each):
        y = stack(x, w, each=each)
        first = torch.autograd.grad(y.square().sum(), [x, w["w_up"]], create_graph=True)
        return sum(g.square().sum() for g in first)

    wanted = torch.autograd.grad(both(copies), [x, *w.values()])
    torch.testing.assert_close(torch.autograd.grad(both(dict), [x, *w.values()]), wanted, atol=1e-10, rtol=1e-12)
    names = list(w)
    assert torch.autograd.gradgradcheck(
        lambda x, *values: call(x, dict(zip(names, values, strict=True))), [x, *w.values()]
    )


@pytest.mark.parametrize("each", [dict, copies])
def test_functional_gradients(each):
    x, w = inputs().detach(), {name: t.detach() for name, t in weights().items()}
    found = torch.func.grad(lambda w: stack(x, w, each=each).square().sum())(w)
    wanted = expected(live := weights(), lambda each: stack(x, live, each=each).square().sum())
    torch.testing.assert_close(list(found.values()), list(wanted), **EXACT)


def test_batched_gradients_are_right_or_refused():
    x, w = inputs(), weights()
    cotangents = torch.eye(9 * 6, dtype=torch.float64)[:2].view(2, 9, 6)
    y = stack(x, w)
    wanted = torch.stack([torch.autograd.grad(y, w["w_up"], g, retain_graph=True)[0] for g in cotangents])
    try:
        found = torch.autograd.grad(y, w["w_up"], cotangents, is_grads_batched=True, retain_graph=True)[0]
    except RuntimeError:
        found = wanted
    torch.testing.assert_close(found, wanted, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(y, w["w_up"], cotangents[0])[0], wanted[0], **EXACT)


def test_compiled():
    x, w = inputs(), weights()
    wanted = expected(w, lambda each: stack(x, w, each=each).square().sum(), x)
    compiled = torch.compile(lambda x, w: stack(x, w).square().sum(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x, w), [x, *w.values()]), wanted, **EXACT)


def test_weights_changed_in_place():
    x, w = inputs(), weights()
    y = stack(x, w)
    with torch.no_grad():
        w["w_up"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert torch.equal(stack(x, w), stack(x, w, each=copies))


def test_weights_whose_data_is_set():
    x, w = inputs(), weights()
    first = stack(x, w)
    for t in w.values():
        t.data = 2 * t.data
    y = stack(x, w)
    assert torch.equal(y, stack(x, w, each=copies))
    found = torch.autograd.grad(y.square().sum(), list(w.values()))
    torch.testing.assert_close(found, expected(w, lambda each: stack(x, w, each=each).square().sum()), **EXACT)
    del first  # as long as it is there, so is what the calls before shared


@pytest.mark.parametrize(
    "dtype, backend, dim, inner",
    [
        (torch.bfloat16, "eager", 6, 10),
        (torch.float16, "eager", 6, 10),
        # Large enough for the product of few rows that adds to the sum itself.
        pytest.param(torch.bfloat16, "cpp", 150, 202, marks=needs_extension),
    ],
)
def test_half_precision_weights_are_summed_in_float32(dtype, backend, dim, inner):
    x, w = inputs(dtype, dim), weights(dtype, dim=dim, inner=inner)
    exact_x, exact = x.detach().double(), {n: t.detach().double().requires_grad_() for n, t in w.items()}
    loss = sum(call(exact_x * k, exact).sum() for k in range(1, 40))
    wanted = torch.autograd.grad(loss, exact["w_down"])[0]
    errors = []
    for each in (dict, copies):
        loss = sum(call(x * k, each(w), backend=backend).sum() for k in range(1, 40))
        found = torch.autograd.grad(loss, w["w_down"])[0]
        assert found.dtype == dtype
        errors.append((found.double() - wanted).norm() / wanted.norm())
    assert errors[0] < errors[1] and errors[0] < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_autocast_casts_once_and_sums_in_float32(reentrant):
    x, w = inputs(torch.float32), weights(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = expected(w, lambda each: stack(x, w, each=each).float().square().sum())
        casts = [shared.shared(w["w_up"], torch.bfloat16) for _ in "ab"]
        assert casts[0] is casts[1]
        del casts
        y = x
        for _ in range(3):
            y = y + (call(y, w) if reentrant is None else checkpoint(call, y, w, use_reentrant=reentrant))
    y.float().square().sum().backward()
    for found, exact in zip(accumulated(*w.values()), wanted, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact, atol=0.02 * exact.norm().item(), rtol=0)


class count_allocations:
    """Allocations of the size of `like` within, those inside the kernels too."""

    def __init__(self, like):
        self.nbytes = like.untyped_storage().nbytes()
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self):
        self.profile.__enter__()
        return self.count

    def __exit__(self, *error):
        self.profile.__exit__(*error)

    def count(self):
        events = self.profile.profiler.kineto_results.events()
        return sum(e.name() == "[memory]" and e.nbytes() == self.nbytes for e in events)


@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=needs_extension)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_buffers_of_the_size_of_the_experts_do_not_grow_with_depth(backend, accumulate):
    x, w = inputs(torch.float32, dim=9), weights(torch.float32, experts=4, dim=9, inner=257)
    found = {}
    for each in (dict, copies):
        for times in (1, 4):
            loss = stack(x, w, times, each, backend=backend).square().sum()
            for t in w.values():
                t.grad = torch.zeros_like(t) if accumulate else None
            with count_allocations(w["w_up"]) as count:
                loss.backward()
            found[each, times] = count()
    assert found[dict, 1] == found[dict, 4] == 2
    assert found[copies, 4] > found[copies, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_the_same_bit_for_bit(dtype):
    runs = []
    for _ in range(2):
        x, w = normal(197, 64).to(dtype).requires_grad_(), weights(dtype, 4, 64, 96)
        with poisoned():
            runs.append(torch.autograd.grad(stack(x, w).float().square().sum(), [x, *w.values()]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_nothing_outlives_the_graph():
    x, w = inputs(), weights()
    gc.collect()
    before = len(shared._open)
    y = stack(x, w)
    assert len(shared._open) == before + 2
    y.sum().backward(retain_graph=True)
    assert not any(s.sums.totals for s in shared._open.values())
    del y
    gc.collect()
    assert len(shared._open) == before


def test_threads_share_weights():
    w, batches = weights(), [inputs().detach() * k for k in range(1, 5)]
    wanted = expected(w, lambda each: sum(stack(x, w, each=each).square().sum() for x in batches))
    found = {}

    def work(k):
        found[k] = torch.autograd.grad(stack(batches[k], w).square().sum(), list(w.values()))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close([sum(g) for g in zip(*found.values(), strict=True)], list(wanted))


class Shared(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, t in weights().items():
            self.register_parameter(name, torch.nn.Parameter(t.detach().clone()))

    def forward(self, x):
        return stack(x, dict(self.named_parameters()))


def test_distributed_data_parallel(tmp_path):
    x, module = inputs(), Shared()
    w = dict(module.named_parameters())
    wanted = expected(w, lambda each: stack(x, w, each=each).square().sum())
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped, reduced = torch.nn.parallel.DistributedDataParallel(module), []

        def reduce(_, bucket):
            reduced.extend(g.clone() for g in bucket.gradients())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped.register_comm_hook(None, reduce)
        for times in (1, 2):
            wrapped(x).square().sum().backward()
            torch.testing.assert_close(accumulated(*w.values()), [times * g for g in wanted], **EXACT)
        assert len(reduced) == 2 * len(w)
    finally:
        torch.distributed.destroy_process_group()
