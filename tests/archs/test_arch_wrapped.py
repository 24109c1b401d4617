"""Inner layers that are more than their weight, by an adapter, a hook or quantisation: what they add is not lost."""

import copy

import pytest
import torch
from torch import nn

from grassland.archs import (
    CausalAttention,
    CausalConvolution,
    CausalGrassmannMixer,
    ConcatenationMixer,
    HadamardMixer,
    LinearHead,
    LocalAttention,
    create_model,
)
from grassland.archs.mixers.window import WindowGrassmannMixer

HISTORY = [CausalConvolution, CausalGrassmannMixer, ConcatenationMixer, HadamardMixer, LocalAttention]
FLOAT64 = {"dtype": torch.float64}
SIZES = {"dim": 8, "depth": 2, "ffn_dim": 12, "norm": "pre", "vocab_size": 13, "max_len": 9, **FLOAT64}
MODELS = {
    "lm": {"rank": 4, "offsets": (1, 3), "head": "linear"},
    "mlm": {"num_heads": 2, "embed_dim": 6, "num_classes": 3},
}


class Adapter(nn.Module):
    """W x + b + B A x with the weight and the bias of W x + b, and its merger into one layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, **FLOAT64))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, **FLOAT64))
        self.weight, self.bias, self.in_features = base.weight, base.bias, base.in_features

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T

    def merged(self):
        layer = copy.deepcopy(self.base)
        with torch.no_grad():
            layer.weight += self.up @ self.down
        return layer


def adapted(module):
    """The module with an adapter around each linear layer, and a copy with these merged."""
    linear = [name for name, layer in module.named_modules() if type(layer) is nn.Linear]
    for name in linear:
        replace(module, name, Adapter(module.get_submodule(name)))
    merged = copy.deepcopy(module)
    for name in linear:
        replace(merged, name, merged.get_submodule(name).merged())
    return module, merged


def replace(module, name, layer):
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, layer)


def randomised(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("cls", [*HISTORY, WindowGrassmannMixer])
def test_adapters_in_a_mixer_are_those_of_its_merged_weights_and_learn(cls):
    mixer, merged = adapted(randomised(cls(8, rank=8, **FLOAT64)))
    x = torch.randn(2, 7, 8, **FLOAT64)
    torch.testing.assert_close(mixer(x), merged(x))
    mixer(x).square().sum().backward()
    ours = [p for name, p in mixer.named_parameters() if name.endswith((".down", ".up"))]
    assert len(ours) >= 6 and all(p.grad is not None and p.grad.abs().max() > 0 for p in ours)


@pytest.mark.parametrize("cls", HISTORY)
def test_adapters_hold_while_decoding(cls):
    mixer, _ = adapted(randomised(cls(8, rank=4, offsets=(1, 3), **FLOAT64)))
    x = torch.randn(2, 7, 8, **FLOAT64)
    state = mixer.init_state(2, 7)
    steps = torch.cat([mixer(x[:, :3], state), *(mixer(x[:, t : t + 1], state) for t in range(3, 7))], 1)
    torch.testing.assert_close(steps, mixer(x))


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_everywhere_in_a_model_are_those_of_its_merged_weights(kind):
    model, merged = adapted(randomised(create_model(kind, **SIZES, **MODELS[kind])))
    ids = torch.randint(13, (2, 6))
    torch.testing.assert_close(model(ids), merged(ids))
    loss = model(ids, labels=ids, **({"classes": torch.tensor([0, 2])} if kind == "mlm" else {}))
    loss.backward()
    torch.testing.assert_close(model(ids, labels=ids), merged(ids, labels=ids))
    assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith((".down", ".up")))


@pytest.mark.parametrize("name", ["plucker", "out_proj", "gate"])
@pytest.mark.parametrize("how", ["hook", "forward"])
def test_what_stands_around_a_projection_is_called(name, how):
    mixer = randomised(CausalGrassmannMixer(8, rank=4, **FLOAT64))
    x = torch.randn(2, 7, 8, **FLOAT64)
    before, layer = mixer(x), getattr(mixer, name)
    if how == "hook":
        handle = layer.register_forward_hook(lambda module, args, out: 2 * out)
        changed = mixer(x)
        handle.remove()
    else:
        original = layer.forward
        layer.forward = lambda x: 2 * original(x)
        changed = mixer(x)
        del layer.forward
    with torch.no_grad():
        layer.weight *= 2
        layer.bias *= 2
    torch.testing.assert_close(changed, mixer(x))
    assert not torch.allclose(changed, before)


def test_a_linear_heads_loss_is_that_of_its_adapted_logits():
    head, merged = adapted(LinearHead(8, 5, **FLOAT64))
    x, labels = torch.randn(6, 8, **FLOAT64), torch.tensor([0, 4, -100, 2, 2, 1])
    torch.testing.assert_close(head.loss(x, labels, label_smoothing=0.1), merged.loss(x, labels, label_smoothing=0.1))
    torch.testing.assert_close(head.loss(x, labels, "sum"), merged.loss(x, labels, "sum"))


@pytest.mark.parametrize("name", ["positions", "types"])
def test_an_embedding_is_called_when_it_is_more_than_its_weight(name):
    model = randomised(create_model("mlm", **SIZES, **MODELS["mlm"]))
    ids = torch.randint(13, (2, 6))
    embedding = getattr(model, name)
    handle = embedding.register_forward_hook(lambda module, args, out: 2 * out)
    changed = model(ids)
    handle.remove()
    with torch.no_grad():
        embedding.weight *= 2
    torch.testing.assert_close(changed, model(ids))


class Packed(nn.Module):
    """As torch's dynamically quantised layers: no parameters, and the weight is a method."""

    def __init__(self, base):
        super().__init__()
        self.parts = base.weight.detach(), base.bias if base.bias is None else base.bias.detach()

    def weight(self):
        return self.parts[0]

    def bias(self):
        return self.parts[1]

    def forward(self, x):
        return nn.functional.linear(x, *self.parts)


@pytest.mark.parametrize("mixer", ["grassmann", "hadamard"])
def test_a_layer_whose_weight_is_no_tensor_runs_and_decodes(mixer):
    model = randomised(create_model("lm", **{**SIZES, **MODELS["lm"]}, mixer=mixer))
    ids = torch.randint(13, (2, 6))
    expected = model(ids)
    for name in [name for name, layer in model.named_modules() if type(layer) is nn.Linear]:
        replace(model, name, Packed(model.get_submodule(name)))
    torch.testing.assert_close(model(ids), expected)
    torch.testing.assert_close(model.decode(ids, model.init_state(2)), expected[:, -1])


@pytest.mark.parametrize("cls", [*HISTORY, CausalAttention])
def test_a_quantised_mixer_decodes(cls):
    mixer, x = cls(8), torch.randn(2, 7, 8)
    expected = mixer(x)
    for name in [name for name, layer in mixer.named_children() if type(layer) is nn.Linear]:
        replace(mixer, name, Packed(mixer.get_submodule(name)))
    # As in bitsandbytes, whose packed weights are parameters of single bytes.
    mixer.packed = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    state = mixer.init_state(2, 7)
    torch.testing.assert_close(torch.cat([mixer(x[:, :3], state), mixer(x[:, 3:], state)], 1), expected)
