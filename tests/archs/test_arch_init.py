"""How the weights of a model start."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from grassland.archs import (
    CausalGrassmannMixer,
    PluckerNLIHead,
    TransformerNLIHead,
    create_model,
    load_model,
    save_model,
)
from grassland.archs.mixers.window import WindowGrassmannMixer
from grassland.archs.registry import slot_choices, slot_class

COMMON = {"dim": 12, "depth": 3, "ffn_dim": 16, "norm": "pre", "num_heads": 2}
LM = {"vocab_size": 31, "max_len": 16, **COMMON}
SIZES = {
    "lm": LM,
    "mlm": {"embed_dim": 6, **LM},
    "vision": {"image_size": 8, "patch_size": 4, "num_classes": 31, **COMMON},
}
MIXERS = {"lm": "attention", "mlm": "bidirectional", "vision": "bidirectional"}


def build(kind, **options):
    torch.manual_seed(0)
    return create_model(kind, **{**SIZES[kind], "mixer": MIXERS[kind], **options})


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"ffn": "mlp", "share": ()}, ("out_proj.weight", "down.weight")),
        ({"ffn": "mlp", "share": ("mixer", "ffn")}, ("out_proj.weight", "down.weight")),
        ({"ffn": "shared_moe", "share": ("ffn",)}, ("out_proj.weight", "w_down")),
        ({"ffn": "mlp", "residual": "kromhc", "share": ()}, ("out_proj.weight", "down.weight")),
    ],
)
def test_scaled_init_shrinks_what_branches_end_in_and_nothing_else(kind, options, ends):
    plain, scaled = (build(kind, **options, scaled_init=on).state_dict() for on in (False, True))
    shrunk = {name for name in plain if name.startswith("blocks.") and name.endswith(ends)}
    # A shared branch is scaled once, however many blocks it serves.
    assert len(shrunk) == sum(1 if slot in options["share"] else 3 for slot in ("mixer", "ffn"))
    for name, weight in plain.items():
        wanted = weight / math.sqrt(2 * 3) if name in shrunk else weight
        torch.testing.assert_close(scaled[name], wanted, msg=name)


def test_reset_parameters_draws_scaled_weights_again(tmp_path):
    model = build("lm", dim=32, scaled_init=True)
    weight = model.blocks[1].mixer.branch.out_proj.weight
    before = weight.clone()
    model.reset_parameters()
    assert not torch.equal(weight, before)
    assert weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.1)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config.scaled_init
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


LAYERS = {
    **{choice: partial(slot_class("mixer", choice), 32) for choice in slot_choices("mixer")},
    **{choice: partial(slot_class("ffn", choice), 32, 24) for choice in slot_choices("ffn")},
    **{choice: partial(slot_class("head", choice), 32, 24) for choice in slot_choices("head") if choice != "tied"},
    **{choice: partial(slot_class("residual", choice), None, 32) for choice in slot_choices("residual")},
    **{cls.__name__: partial(cls, 32) for cls in (PluckerNLIHead, TransformerNLIHead, WindowGrassmannMixer)},
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_made_without_memory_is_drawn_by_reset_parameters(name):
    torch.manual_seed(0)
    made, layer = LAYERS[name](), LAYERS[name](device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.fill_(torch.nan)
    layer.reset_parameters()
    for key, found in layer.state_dict().items():
        wanted = made.state_dict()[key]
        torch.testing.assert_close(found.mean(), wanted.mean(), atol=0.04, rtol=0)
        torch.testing.assert_close(found.std(correction=0), wanted.std(correction=0), atol=1e-7, rtol=0.25)
    assert made.state_dict().keys() == layer.state_dict().keys()


def test_a_rule_of_ones_own_has_the_last_word_in_a_model(monkeypatch):
    monkeypatch.setattr(CausalGrassmannMixer, "reset_parameters", lambda self: nn.init.ones_(self.gate.weight))
    model = create_model("lm", mixer="grassmann", rank=4, dim=12, depth=2, ffn_dim=16, vocab_size=31, max_len=16)
    assert all((block.mixer.branch.gate.weight == 1).all() for block in model.blocks)


def test_a_mixer_that_carries_its_input_starts_as_ever():
    sizes = {name: value for name, value in LM.items() if name != "num_heads"}
    states = []
    for scaled in (False, True):
        torch.manual_seed(0)
        states.append(create_model("lm", **sizes, mixer="grassmann", rank=4, scaled_init=scaled).state_dict())
    plain, scaled = states
    changed = {name for name in plain if not torch.equal(plain[name], scaled[name])}
    assert changed == {f"blocks.{layer}.ffn.branch.down.weight" for layer in range(3)}


@pytest.mark.parametrize("slot", ["mixer", "ffn"])
def test_every_choice_can_start_scaled(slot):
    for choice in slot_choices(slot):
        cls = slot_class(slot, choice)
        assert hasattr(cls, "outputs") or cls.carries_input, choice


def test_a_choice_that_does_not_tell_its_end_is_refused(monkeypatch):
    monkeypatch.delattr(slot_class("ffn", "mlp"), "outputs")
    with pytest.raises(ValueError, match=r"scaled_init=True .* ffn 'mlp'"):
        build("lm", scaled_init=True)
    with pytest.raises(ValueError, match="scaled_init must be True or False"):
        build("lm", scaled_init="yes")
