"""The language model as a function of its tokens: causality, decoding, losses, no leak."""

import copy
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_hook

import grassland.archs.mixers.grassmann as grassmann
from grassland.archs import CausalAttention, CausalGrassmannMixer, create_model
from grassland.kernels import dispatch, products

SIZES = {"vocab_size": 31, "max_len": 24, "dim": 16, "depth": 2, "ffn_dim": 24}
MIXERS = {
    "grassmann": {"mixer": "grassmann", "rank": 6, "offsets": (1, 2, 5)},
    "schedule": {"mixer": "grassmann", "rank": 5, "offsets": ((1,), (3,)), "out_proj": False},
    "attention": {"mixer": "attention", "num_heads": 2},
    "convolution": {"mixer": "convolution", "rank": 6, "offsets": (1, 2, 5)},
    "hadamard": {"mixer": "hadamard", "rank": 6, "offsets": ((1, 7), (2, 3))},
    "concatenation": {"mixer": "concatenation", "rank": 6, "offsets": ((1,), (2, 6)), "out_proj": False},
    "local_attention": {"mixer": "local_attention", "rank": 6, "offsets": ((1, 2), (5,)), "num_heads": 2},
    "shared": {"mixer": "grassmann", "rank": 6, "offsets": ((1,), (2, 7)), "share": ("mixer", "ffn")},
}


DECODING = list(product(MIXERS, ("pre", "post"), (torch.float64, torch.float32)))


def tiny(mixer="grassmann", dtype=torch.float64, std=0.3, **overrides):
    """A model whose weights are large enough for every part to matter."""
    torch.manual_seed(0)
    model = create_model("lm", dtype=dtype, **{**SIZES, **MIXERS[mixer], **overrides})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def tokens(*shape, seed=1):
    return torch.randint(SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("mixer", "norm"), list(product(MIXERS, ("pre", "post"))))
def test_later_tokens_do_not_change_a_bit(mixer, norm):
    model = tiny(mixer, torch.float32, norm=norm)
    ids = tokens(2, 20)
    logits = model(ids)
    for t in (0, 7, 18):
        changed = ids.clone()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % SIZES["vocab_size"]
        after = model(changed)
        assert torch.equal(after[:, : t + 1], logits[:, : t + 1])
        assert not torch.equal(after[:, t + 1], logits[:, t + 1])


@pytest.mark.parametrize(("mixer", "norm", "dtype"), DECODING)
def test_decoding_equals_the_full_pass(mixer, norm, dtype):
    model, ids = tiny(mixer, dtype, norm=norm), tokens(3, 20)
    full, state = model(ids), model.init_state(3)
    tolerance = 200 * torch.finfo(dtype).eps
    start = 0
    for length in (5, 1, 3, *[1] * 11):
        logits = model.decode(ids[:, start : start + length], state)
        start += length
        torch.testing.assert_close(logits, full[:, start - 1], atol=tolerance * full.abs().max().item(), rtol=0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_decoding_has_the_gradients_of_the_full_pass(mixer):
    model, ids = tiny(mixer), tokens(2, 9)
    lengths = torch.tensor([4, 2])

    def gradients(logits):
        return torch.autograd.grad(logits.square().sum(), [*model.parameters()])

    state = model.init_state(2)
    steps = [model.decode(ids[:, :4], state, lengths)]
    rest = torch.stack([ids[0, 4:8], ids[1, 2:6]])
    steps += [model.decode(chunk, state) for chunk in rest.split((1, 1, 2), 1)]
    full = model(ids)
    expected = [full[torch.arange(2), lengths - 1 + more] for more in (0, 1, 2, 4)]
    with torch.no_grad():
        model.decode(rest[:, :1], state)
    found = gradients(torch.stack(steps))
    torch.testing.assert_close(found, gradients(torch.stack(expected)), atol=1e-9, rtol=1e-9)
    state.layers[0].reset()
    assert not any(t.requires_grad for t in vars(state.layers[0]).values() if isinstance(t, torch.Tensor))


def test_decoding_divides_by_the_smallest_norm_asked_for():
    mixer = CausalGrassmannMixer(8, rank=4, offsets=(1, 3), eps=0.5, dtype=torch.float64)
    x = 0.1 * torch.randn(2, 6, 8, dtype=torch.float64)
    state = mixer.init_state(2, max_len=6)
    steps = torch.cat([mixer(x[:, t : t + 1], state) for t in range(6)], 1)
    torch.testing.assert_close(steps, mixer(x), atol=1e-13, rtol=0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_ragged_chunks_decode_as_each_row_alone(mixer):
    model, ids = tiny(mixer), tokens(3, 20)
    full, state, seen = model(ids), model.init_state(3), torch.zeros(3, dtype=torch.long)
    for lengths in ([2, 6, 4], [1, 1, 1], [3, 1, 2], [1, 1, 1], [1, 1, 1]):
        lengths = torch.tensor(lengths)
        chunk = torch.full((3, int(lengths.max())), 7)
        for row, (start, length) in enumerate(zip(seen, lengths, strict=True)):
            chunk[row, :length] = ids[row, start : start + length]
        logits = model.decode(chunk, state, lengths)
        seen += lengths
        torch.testing.assert_close(logits, full[torch.arange(3), seen - 1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("lengths", [None, [2, 5, 1]])
def test_steps_with_all_partners_take_the_kernel_and_equal_the_full_pass(lengths, monkeypatch):
    mixer = CausalGrassmannMixer(8, rank=4, offsets=(3, 1, 3), dtype=torch.float64)
    x, state, taken = torch.randn(3, 16, 8, dtype=torch.float64), mixer.init_state(3, max_len=16), []
    mix = mixer._mix

    def watched(z, offsets, context=0):
        if context:
            taken.append((state.least, z.shape[1] - context))
        return mix(z, offsets, context)

    monkeypatch.setattr(mixer, "_mix", watched)
    full, seen = mixer(x), torch.tensor(lengths or [5, 5, 5])
    mixer(x[:, :5], state, None if lengths is None else seen)
    rows = torch.arange(3)
    for chunk in (1, 1, 1, 1, 1, 3):
        at = seen[:, None] + torch.arange(chunk)
        out = mixer(x[rows[:, None], at], state)
        torch.testing.assert_close(out, full[rows[:, None], at], atol=1e-13, rtol=0)
        seen = seen + chunk
    # The host knows of a row's tokens from where chunks are full for all.
    every = [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (8, 3)]
    assert taken == ([(5 + least, chunk) for least, chunk in every] if lengths is None else every[3:])
    state.reset()
    assert state.least == state.extent == 0
    again = torch.cat([mixer(x[:, t : t + 1], state) for t in range(9)], 1)
    torch.testing.assert_close(again, full[:, :9], atol=1e-13, rtol=0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_row_does_not_depend_on_its_batch(mixer):
    model, ids = tiny(mixer), tokens(4, 12)
    torch.testing.assert_close(model(ids)[2:3], model(ids[2:3]), atol=1e-13, rtol=0)


def test_state_size_of_the_grassmann_mixer_does_not_grow():
    mixer = CausalGrassmannMixer(8, rank=4, offsets=(1, 5))
    state = mixer.init_state(2, max_len=1000)
    for _ in range(9):
        mixer(torch.randn(2, 3, 8), state)
    assert state.z.shape == (2, 5, 4)


def test_kv_cache_says_when_it_is_full():
    mixer = CausalAttention(8, num_heads=2)
    state = mixer.init_state(1, max_len=4)
    mixer(torch.randn(1, 3, 8), state)
    with pytest.raises(ValueError, match=r"4 tokens; 3 \+ 2"):
        mixer(torch.randn(1, 2, 8), state)


@pytest.mark.parametrize("head", ["tied", "linear"])
def test_loss_is_cross_entropy_of_the_logits(head):
    model, ids = tiny(head=head), tokens(2, 9)
    labels = tokens(2, 9, seed=2)
    labels[0, :4] = -100
    expected = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model(ids, labels=labels), expected, atol=1e-13, rtol=0)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    found = torch.autograd.grad(model(ids, labels=labels), list(model.parameters()))
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    summed = model(ids, labels=labels, reduction="sum")
    torch.testing.assert_close(summed, expected * (labels != -100).sum(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model(tokens(1, 25)), ("input_ids", "25", "max_len=24")),
        (lambda model: model(tokens(3)), ("input_ids", "(3,)")),
        (lambda model: model(torch.tensor([[31]])), ("input_ids", "[0, 31)", "31")),
        (lambda model: model(torch.tensor([[-1]])), ("input_ids", "-1")),
        (lambda model: model(tokens(1, 3), labels=tokens(1, 4)), ("labels", "(1, 3)", "(1, 4)")),
        (lambda model: model(tokens(1, 3), labels=torch.tensor([[1, 2, 31]])), ("labels", "31")),
        (lambda model: model(tokens(1, 3), labels=torch.tensor([[1, -7, -100]])), ("labels", "-7")),
        (lambda model: model(tokens(1, 3), labels=tokens(1, 3), reduction="none"), ("reduction", "none")),
    ],
)
def test_bad_input_names_itself(call, words):
    with pytest.raises(ValueError) as caught:
        call(tiny())
    assert all(word in str(caught.value) for word in words), str(caught.value)


def trained_perplexity(steps):
    """Perplexity on fresh i.i.d. uniform tokens after training on such tokens; V = 16, nothing to learn but a leak."""
    torch.manual_seed(0)
    model = create_model("lm", vocab_size=16, max_len=12, dim=24, depth=1, ffn_dim=32, rank=6, offsets=(1, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        ids = torch.randint(16, (64, 13))
        model(ids[:, :-1], labels=ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    ids = torch.randint(16, (512, 13))
    with torch.no_grad():
        return math.exp(model(ids[:, :-1], labels=ids[:, 1:]))


def test_no_leak_on_random_tokens():
    assert trained_perplexity(250) > 15.7


def test_the_leak_test_can_fail(monkeypatch):
    # The paper's printed formula: position t is paired with t + Δ, which is t − Δ read backwards.
    causal = grassmann.plucker_mix
    monkeypatch.setattr(grassmann, "plucker_mix", lambda z, *a, **k: causal(z.flip(1), *a, **k).flip(1))
    assert trained_perplexity(250) < 8


@pytest.mark.parametrize("mixer", ["grassmann", "attention"])
def test_compiles_without_a_graph_break(mixer):
    model, ids, labels = tiny(mixer, torch.float32, depth=1, std=0.1), tokens(2, 6), tokens(2, 6, seed=2)
    model.train()
    expected = model(ids, labels=labels)
    expected.backward()
    wanted = [p.grad for p in model.parameters()]
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=labels)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close([p.grad for p in model.parameters()], wanted)


@pytest.mark.parametrize("mixer", ["grassmann", "attention"])
def test_autocast_trains_in_bfloat16_with_float32_gradients(mixer):
    model, ids, labels = tiny(mixer, torch.float32, std=0.1), tokens(2, 9), tokens(2, 9, seed=2)
    expected = model(ids, labels=labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=labels)
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    found = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype is torch.float32
        assert (a - b).norm() <= 0.1 * b.norm() + 1e-3


@pytest.mark.parametrize("mixer", ["grassmann", "attention"])
def test_half_precision_decoding_follows_the_full_pass(mixer):
    model, ids = tiny(mixer, torch.bfloat16, std=0.1), tokens(2, 12)
    exact, full, state = tiny(mixer, torch.float64, std=0.1)(ids), model(ids).double(), model.init_state(2)
    model.decode(ids[:, :4], state)
    steps = torch.stack([model.decode(ids[:, t : t + 1], state) for t in range(4, 12)], dim=1).double()
    error, bound = (steps - exact[:, 4:]).abs().max(), (full - exact).abs().max()
    assert error <= 2 * bound


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("head", ["tied", "linear", "cosine"])
def test_large_products_are_those_of_torch(mixer, head, monkeypatch):
    """Layers as wide as products of our own begin, in decoding, evaluation and training."""
    model = tiny(mixer, torch.float32, std=0.08, dim=192, ffn_dim=256, vocab_size=200, head=head)
    ids = tokens(3, 21)
    calls, multiply = [], products._multiply
    monkeypatch.setattr(products, "_multiply", lambda *given: calls.append(1) or multiply(*given))
    monkeypatch.setattr(products, "LARGE_PRODUCT", 0)

    def results():
        model.zero_grad()
        loss = model(ids[:, :-1], labels=ids[:, 1:])
        loss.backward()
        with torch.no_grad():
            logits, written = model(ids), model.generate(ids[:, :4], 9, temperature=0)
        return loss.detach(), logits, written, *(p.grad for p in model.parameters())

    found = results()
    assert calls or dispatch.extension_error()
    calls.clear()
    monkeypatch.setenv("GRASSLAND_BACKEND", "eager")
    for ours, theirs in zip(found, results(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert not calls


def test_hooks_of_all_modules_see_every_linear_layer():
    model, seen = tiny("attention"), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(tokens(1, 5))
    finally:
        handle.remove()
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(layers) == 8 and all(layer in seen for layer in layers)


def test_a_copy_is_tied_to_itself():
    model = tiny("shared")
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.embed.weight and twin.head.weight is not model.embed.weight
    assert twin.blocks[1].mixer.branch.module is twin.blocks[0].mixer.branch
    ids = tokens(1, 9)
    assert torch.equal(twin(ids), model(ids))


def test_meta_model_materialises_to_a_working_one():
    model = create_model("lm", device="meta", **{**SIZES, **MIXERS["shared"]})
    model.to_empty(device="cpu")
    model.reset_parameters()
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.blocks[0].ffn.branch.up.bias.abs().max() == 0
    assert model.head.weight is model.embed.weight
    ids = tokens(2, 8)
    assert model(ids, labels=tokens(2, 8, seed=2)).item() == pytest.approx(math.log(31), abs=0.1)


def test_shared_layers_have_one_set_of_weights_and_individual_norms():
    model = tiny("shared", depth=3)
    alone = tiny("grassmann", depth=1)
    norms = 2 * 2 * 2 * SIZES["dim"]
    assert model.num_parameters() == alone.num_parameters() + norms
    names = [name for name in model.state_dict() if "reduce" in name or ".up." in name]
    assert sorted({name.split(".")[1] for name in names}) == ["0"]
    loss = model(tokens(2, 9), labels=tokens(2, 9, seed=2))
    first = model.blocks[0].mixer.branch.plucker.weight
    assert torch.autograd.grad(loss, first)[0].abs().max() > 0


def test_a_model_without_memory_has_the_shapes_of_its_outputs():
    model = create_model("lm", **SIZES, **MIXERS["grassmann"], device="meta")
    logits = model(torch.zeros(2, 7, dtype=torch.int64, device="meta"))
    assert logits.is_meta and logits.shape == (2, 7, SIZES["vocab_size"])
