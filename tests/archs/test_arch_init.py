"""How the weights of a model start."""

import math

import pytest
import torch

from grassland.archs import create_model, load_model, save_model
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
