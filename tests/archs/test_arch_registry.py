"""Names, options and presets: what a user can ask for and what a wrong name says."""

import json

import pytest

from grassland.archs import ModelConfig, create_model, list_models, model_config, register_model, register_slot

TINY = {"vocab_size": 16, "max_len": 8, "dim": 8, "depth": 2, "ffn_dim": 16}


@pytest.mark.parametrize(
    ("name", "overrides", "parameters"),
    [
        ("grassmann_lm_6l", {}, 13_001_920),
        ("grassmann_lm_12l", {}, 18_156_928),
        ("transformer_lm_6l", {}, 12_585_472),
        ("transformer_lm_12l", {}, 17_324_032),
        ("grassmann_lm_6l", {"out_proj": False}, 12_607_168),
        ("grassmann_lm_12l", {"max_len": 256}, 18_156_928 + 128 * 256),
        ("grassmann_lm_6l", {"head": "linear"}, 13_001_920 + 30_522 * 256),
    ],
)
def test_parameter_fingerprints(name, overrides, parameters):
    model = create_model(name, device="meta", **overrides)
    assert model.num_parameters() == parameters
    assert all(p.is_meta for p in model.parameters())


def test_flops_follow_the_specification():
    # grassmann.md: the mixer's forward is 0.54 MFLOP a token, causal attention at L = 256 is 0.66.
    grassmann = create_model("lm", device="meta", out_proj=False)
    attention = create_model("lm", device="meta", mixer="attention")
    assert grassmann.blocks[0].mixer.branch.flops_per_token(256) == pytest.approx(0.54e6, rel=0.01)
    assert attention.blocks[0].mixer.branch.flops_per_token(256) == pytest.approx(0.66e6, rel=0.01)
    assert grassmann.flops_per_token(256, training=True) == 3 * grassmann.flops_per_token(256)


def test_presets_use_one_offset_a_layer_in_schedule_order():
    model = create_model("grassmann_lm_12l", device="meta")
    offsets = [block.mixer.branch.offsets for block in model.blocks]
    assert offsets == [(delta,) for delta in (1, 1, 2, 2, 4, 4, 8, 8, 12, 12, 16, 16)]


def test_flat_offsets_serve_every_layer_and_a_schedule_cycles():
    flat = create_model("lm", offsets=(1, 3), **TINY)
    assert [block.mixer.branch.offsets for block in flat.blocks] == [(1, 3), (1, 3)]
    cycled = create_model("lm", offsets=[[1], [2, 5]], **{**TINY, "depth": 3})
    assert [block.mixer.branch.offsets for block in cycled.blocks] == [(1,), (2, 5), (1,)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: create_model("grasmann_lm_6l"), ("model", "grasmann_lm_6l", "grassmann_lm_6l")),
        (lambda: create_model("lm", mixer="atention"), ("mixer", "atention", "'attention'")),
        (lambda: create_model("lm", head="tide"), ("head", "tide", "'tied'")),
        (lambda: create_model("lm", ofsets=(1, 2)), ("option", "ofsets", "'offsets'")),
        (lambda: create_model("lm", mixer="attention", rank=8), ("option", "rank", "mixer='grassmann'")),
        (lambda: create_model("lm", num_heads=8), ("option", "num_heads", "mixer='attention'")),
        (lambda: create_model("lm", dept=3), ("option", "dept", "'depth'")),
        (lambda: create_model("lm", norm="middle"), ("norm", "middle", "pre")),
        (lambda: create_model("lm", dim=0), ("dim", "0")),
        (lambda: create_model("lm", depth=1.5), ("depth", "1.5")),
        (lambda: create_model("lm", dropout=1), ("dropout", "1")),
        (lambda: create_model("lm", share=("heads",)), ("share", "heads")),
        (lambda: create_model("lm", share="mixer"), ("share", "mixer")),
        (lambda: create_model("lm", rank=1, device="meta"), ("rank", "1")),
        (lambda: create_model("lm", offsets=(0,), device="meta"), ("offsets", "0")),
        (lambda: create_model("lm", offsets=(), device="meta"), ("offsets",)),
        (lambda: create_model("lm", mixer="attention", num_heads=3, device="meta"), ("num_heads", "3", "256")),
        (lambda: ModelConfig(options={"ranks": 4}), ("ranks", "'rank'")),
        (lambda: ModelConfig.from_dict({"dimm": 4}), ("dimm", "'dim'")),
        (lambda: register_slot("mixr", "x"), ("slot", "mixr", "'mixer'")),
        (lambda: register_slot("mixer", "attention")(type("X", (), {})), ("attention", "already")),
        (lambda: register_model("grassmann_lm_6l")(ModelConfig), ("grassmann_lm_6l", "already")),
        (lambda: register_model("lm")(ModelConfig), ("lm", "assembly")),
    ],
)
def test_errors_name_what_is_wrong_and_what_is_near(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_list_models_globs():
    assert list_models("grassmann*") == ["grassmann_lm_12l", "grassmann_lm_6l"]
    assert set(list_models("*_6l")) < set(list_models())
    assert list_models("nothing*") == []


def test_a_new_slot_choice_drops_the_old_ones_options_only():
    config = model_config("grassmann_lm_6l", mixer="attention", num_heads=8)
    assert config.options == {"num_heads": 8}
    assert model_config("grassmann_lm_6l", norm="pre").options == model_config("grassmann_lm_6l").options


@pytest.mark.parametrize("name", list_models())
def test_config_survives_json(name):
    config = model_config(name, dropout=0.2, dim=24)
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_sharing_survives_json():
    config = model_config("grassmann_lm_6l", share=("ffn",), dropout=0.1)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("name", "value", "slots"),
    [
        # Text from a command line, which would count as true.
        ("noise", "no", {"ffn": "shared_moe"}),
        ("renormalize", "off", {"ffn": "shared_moe"}),
        ("official_capacity", 2, {"ffn": "shared_moe"}),
        ("capacity_factor", "x", {"ffn": "shared_moe"}),
        ("capacity_factor", (1.0, "x"), {"ffn": "shared_moe", "share": ("ffn",), "share_groups": 2}),
        ("balance_weight", "x", {"ffn": "shared_moe"}),
        ("balance_weight", float("nan"), {"ffn": "shared_moe"}),
        ("balance_weight", -0.1, {"ffn": "shared_moe"}),
        ("out_proj", "no", {}),
        ("eps", "x", {}),
        ("eps", float("inf"), {}),
        ("rank", None, {"mixer": "convolution"}),
        ("num_heads", True, {"mixer": "local_attention"}),
        ("backend", "fast", {}),
        ("dynamic", "off", {"residual": "mhc"}),
        ("factors", 3, {"residual": "kromhc"}),
        ("norm_eps", "x", {}),
        ("norm_eps", -1, {}),
        ("norm_eps", float("nan"), {"residual": "hc"}),
        ("norm_eps", None, {"residual": "kromhc"}),
        ("share", 3, {}),
        ("share", [["ffn"]], {}),
        ("mixer", ["attention"], {}),
        ("head", {}, {}),
    ],
)
def test_a_value_of_the_wrong_kind_names_itself_before_anything_is_built(name, value, slots):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        create_model("lm", **{**TINY, **slots, name: value})


@pytest.mark.parametrize(("kind", "name"), [("mlm", "pooler"), ("mlm", "share_norms"), ("vision", "pre_logits")])
def test_a_switch_is_true_or_false(kind, name):
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 'no'"):
        model_config(kind, **{name: "no"})
