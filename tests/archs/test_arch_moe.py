"""SharedMoE as a layer of anyone's model, and shared across depth."""

import copy
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from grassland.archs import SharedMoE, create_model

SIZES = {"vocab_size": 31, "max_len": 24, "dim": 16, "depth": 3, "ffn_dim": 24, "rank": 4, "norm": "pre"}


def moe(**options):
    torch.manual_seed(0)
    layer = SharedMoE(8, 12, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer


def model(seed=0, **overrides):
    torch.manual_seed(seed)
    return create_model("lm", ffn="shared_moe", dtype=torch.float64, **{**SIZES, **overrides})


def tokens(*shape):
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(1))


def test_noise_is_in_training_only_and_seeded():
    layer, x = moe(capacity_factor=None), torch.randn(40, 8, dtype=torch.float64)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(layer.train()(x)[0])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(layer.eval()(x)[0], layer(x)[0])
    layer.noise = False
    assert torch.equal(layer.train()(x)[0], layer.eval()(x)[0])


def test_noise_has_the_standard_deviation_of_one_over_e():
    layer = moe(num_experts=8, top_k=8, capacity_factor=None).train()
    torch.nn.init.zeros_(layer.router)
    torch.manual_seed(0)
    layer(torch.zeros(5000, 8, dtype=torch.float64))
    logits = layer.routing.gates.gather(1, layer.routing.experts.argsort(1)).log()
    assert (logits - logits.mean(1, keepdim=True)).std().item() == pytest.approx((7 / 8) ** 0.5 / 8, rel=0.03)


def test_evaluation_does_not_depend_on_the_batch():
    layer, x = moe().eval(), torch.randn(6, 10, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0][2:3], layer(x[2:3])[0], atol=1e-14, rtol=0)
    layer.drop_at_eval = True
    layer.capacity_factor = 0.5
    assert layer(x)[0].shape == x.shape and layer.load()["dropped"] > 0.4


@pytest.mark.parametrize(("official", "places"), [(False, 12), (True, 11)])
def test_capacity_of_the_paper_and_of_its_program(official, places):
    layer = moe(official_capacity=official, top_k=1).train()
    torch.nn.init.zeros_(layer.router)
    layer.noise = False
    layer(torch.randn(4, 10, 8, dtype=torch.float64))
    assert layer.routing.offsets.tolist() == [0, places, places, places, places]
    load = layer.load()
    assert load["share"].tolist() == [1, 0, 0, 0] and load["dropped"].item() == pytest.approx(1 - places / 40)


def test_balance_loss_is_scaled_and_reaches_the_router_alone():
    layer, x = moe(balance_weight=0.5), torch.randn(30, 8, dtype=torch.float64)
    _, auxiliary = layer.eval()(x)
    torch.testing.assert_close(auxiliary, 0.5 * layer.routing.balance)
    auxiliary.backward()
    assert layer.router.grad.abs().max() > 0 and layer.w_up.grad is None


def test_padding_is_not_routed():
    layer, x = moe().eval(), torch.randn(3, 5, 8, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    y, auxiliary = layer(x, mask)
    assert (y[~mask] == 0).all() and layer.routing.counts.sum() == 2 * mask.sum()
    alone, expected = layer(x[mask])
    assert torch.equal(y[mask], alone)
    torch.testing.assert_close(auxiliary, expected)


def test_a_sequence_of_padding_alone_passes_by_the_residual():
    layer, x = moe().train(), torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    y, auxiliary = layer(x, torch.tensor([True, False, True])[:, None].expand(3, 5))
    assert (y[1] == 0).all() and (y[[0, 2]] != 0).any() and torch.isfinite(auxiliary)
    (x + y).sum().backward()
    assert (x.grad[1] == 1).all()


def test_gradient_of_shared_weights_is_the_sum_over_an_untied_copy():
    shared, untied = model(share=("ffn",), capacity_factor=None), model(share=(), capacity_factor=None)
    state = shared.state_dict()
    for name in untied.state_dict().keys() - state.keys():
        state[name] = state[".".join([*name.split(".")[:1], "0", *name.split(".")[2:]])]
    untied.load_state_dict(state)
    ids = tokens(2, 12)
    for m in (shared, untied):
        torch.manual_seed(5)
        m.train()(ids, labels=ids).backward()
    for name, parameter in shared.blocks[0].ffn.branch.named_parameters():
        total = sum(block.ffn.branch.get_parameter(name).grad for block in untied.blocks)
        torch.testing.assert_close(parameter.grad, total, atol=1e-12, rtol=0)


def test_state_dict_has_the_experts_once():
    m = model(share=("ffn",))
    names = [name for name in m.state_dict() if "w_up" in name]
    assert names == ["blocks.0.ffn.branch.w_up"]
    assert sum(t.numel() for t in m.state_dict().values()) == m.num_parameters()


class Stack(torch.nn.Module):
    """One SharedMoE applied several times, in checkpoints or not."""

    def __init__(self, times=3, **options):
        super().__init__()
        self.layer, self.times = moe(**options), times

    def forward(self, x, mode=None):
        total = x.new_zeros(())
        for _ in range(self.times):
            if mode is None:
                y, auxiliary = self.layer(x)
            else:
                y, auxiliary = checkpoint(self.layer, x, use_reentrant=mode == "reentrant")
            x, total = x + y, total + auxiliary
        return x, total


@pytest.mark.parametrize("mode", ["reentrant", "hooks"])
def test_checkpointing_changes_nothing(mode):
    x = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for kind in (None, mode):
        stack = Stack(dropout=0.2).train()
        torch.manual_seed(3)
        y, auxiliary = stack(x, kind)
        x.grad = None
        (y.square().sum() + auxiliary).backward()
        results.append([auxiliary, x.grad, *(p.grad for p in stack.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_selective_checkpointing_finds_its_operations_again():
    layer, x = moe(noise=False), torch.randn(20, 8, dtype=torch.float64, requires_grad=True)

    def block(x):
        return (layer(x)[0] - x.tanh()).exp()

    expected = torch.autograd.grad(block(x).sum(), x)[0]
    saved = partial(create_selective_checkpoint_contexts, [torch.ops.aten.sub.Tensor])
    y = checkpoint(block, x, use_reentrant=False, context_fn=saved)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
    assert layer.tally[0].sum() == 2 * 20 * 2


@pytest.mark.parametrize("mode", [None, "reentrant", "hooks"])
def test_training_is_tallied_once(mode):
    stack, x = Stack(capacity_factor=0.8).train(), torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        y, auxiliary = stack(x, mode)
        (y.sum() + auxiliary).backward()
    chosen, kept = stack.layer.tally
    assert chosen.sum() == 2 * 3 * 20 * 2
    assert (kept <= chosen).all() and 0 < kept.sum() < chosen.sum()
    before = stack.layer.tally.clone()
    stack.eval()(x)
    assert torch.equal(stack.layer.tally, before)
    assert not any("tally" in name for name in stack.state_dict())


def test_a_compiled_layer_is_tallied_too():
    layer, x = moe().train(), torch.randn(20, 8, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        compiled(x)[0].sum().backward()
    assert layer.tally[0].sum() == 3 * 20 * 2


def test_gradient_accumulation_and_retained_graphs_add_up():
    stack, x = Stack(noise=False, capacity_factor=None).train(), torch.randn(2, 20, 8, dtype=torch.float64)
    wanted = [torch.zeros_like(p) for p in stack.parameters()]
    for part in x:
        y, auxiliary = stack(part)
        for total, g in zip(wanted, torch.autograd.grad(y.sum() + auxiliary, list(stack.parameters())), strict=True):
            total += g
    for part in x:
        y, auxiliary = stack(part)
        (y.sum() + auxiliary).backward()
    torch.testing.assert_close([p.grad for p in stack.parameters()], wanted)
    y, _ = stack(x)
    first, second = (torch.autograd.grad(y.sum(), stack.layer.w_up, retain_graph=True)[0] for _ in "ab")
    assert torch.equal(first, second)


def test_frozen_experts_still_pass_gradients_through():
    stack, x = Stack().train(), torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    stack.layer.w_up.requires_grad_(False)
    stack(x)[0].sum().backward()
    assert stack.layer.w_up.grad is None and stack.layer.w_down.grad.abs().max() > 0 and x.grad.abs().max() > 0


def test_a_used_layer_can_be_copied():
    stack, x = Stack().train(), torch.randn(20, 8, dtype=torch.float64)
    stack(x)
    twin = copy.deepcopy(stack)
    assert torch.equal(twin.eval()(x)[0], stack.eval()(x)[0])


def test_autocast_gives_bfloat16_experts_and_a_float32_router():
    layer, x = SharedMoE(16, 32), torch.randn(30, 16)
    exact = layer.eval()(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, auxiliary = layer(x)
    assert y.dtype is torch.bfloat16 and auxiliary.dtype is torch.float32
    assert (y.float() - exact).norm() < 0.02 * exact.norm()
    y.float().sum().backward()
    assert layer.w_up.grad.dtype is torch.float32


def test_lm_with_shared_experts_compiles_and_decodes():
    m = model(share=("ffn",), depth=2)
    ids = tokens(2, 12)
    full, state = m.eval()(ids), m.init_state(2)
    torch.testing.assert_close(m.decode(ids, state), full[:, -1], atol=1e-12, rtol=0)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), full)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_experts": 2, "top_k": 3}, ("top_k", "3", "num_experts=2")),
        ({"capacity_factor": 0}, ("capacity_factor", "0")),
        ({"capacity_factor": -1.0}, ("capacity_factor", "-1.0")),
        ({"capacity_factor": float("inf")}, ("capacity_factor", "inf", "None")),
        ({"capacity_factor": float("nan")}, ("capacity_factor", "nan")),
        ({"num_experts": 0}, ("num_experts", "0")),
        ({"top_k": 1.5}, ("top_k", "1.5")),
        ({"out_act": "relu"}, ("out_act", "relu")),
        ({"dropout": 1.0}, ("dropout", "1.0")),
        ({"dropout": None}, ("dropout", "None")),
        ({"capacity_factor": "1.2"}, ("capacity_factor", "'1.2'")),
        ({"balance_weight": None}, ("balance_weight", "None")),
    ],
)
def test_bad_options_name_themselves(options, words):
    with pytest.raises(ValueError) as caught:
        SharedMoE(8, 12, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(3, 7),), ("x", "(3, 7)")),
        ((torch.zeros(1, 8),), ("capacity_factor=1.2", "4 experts", "1 tokens")),
        ((torch.zeros(4, 8), torch.ones(3, dtype=torch.bool)), ("mask", "(3,)")),
        ((torch.zeros(4, 8), torch.zeros(4, dtype=torch.bool)), ("mask", "all False")),
    ],
)
def test_bad_input_names_itself(arguments, words):
    with pytest.raises(ValueError) as caught:
        SharedMoE(8, 12).train()(*arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("training", [False, True])
def test_vmap_runs_an_ensemble(training):
    torch.manual_seed(0)
    layers = [SharedMoE(6, 5, num_experts=3, noise=False).train(training) for _ in range(4)]
    weights, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(7, 6)
    y, balance = torch.vmap(lambda w, b: torch.func.functional_call(layers[0], (w, b), (x,)))(weights, buffers)
    assert layers[0].routing is None
    for layer, one, loss in zip(layers, y, balance, strict=True):
        torch.testing.assert_close((one, loss), layer(x))
