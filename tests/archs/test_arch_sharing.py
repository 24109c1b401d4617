"""Groups of blocks that share weights, in every assembly."""

import pytest
import torch

from grassland.archs import create_model, load_model, save_model

COMMON = {"dim": 12, "depth": 4, "ffn_dim": 16, "dropout": 0.0, "norm": "pre"}
LM = {"mixer": "attention", "vocab_size": 31, "max_len": 16, "num_heads": 2, **COMMON}
TEXT = {"vocab_size": 31, "max_len": 16, "num_heads": 2, "embed_dim": 6, **COMMON}
IMAGES = {"image_size": 8, "patch_size": 4, "num_classes": 31, "num_heads": 2, **COMMON}
SIZES = {"lm": LM, "mlm": TEXT, "vision": IMAGES}
KINDS = list(SIZES)
BOTH = ("mixer", "ffn")


def build(kind, share=BOTH, **options):
    torch.manual_seed(0)
    experts = {"ffn": "shared_moe", "capacity_factor": None, "noise": False}
    return create_model(kind, dtype=torch.float64, share=share, **{**SIZES[kind], **experts, **options})


def batch(kind):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(31, (3,) if kind == "vision" else (3, 9), generator=generator)
    return torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64) if kind == "vision" else labels, labels


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_more_is_one_attention_and_one_set_of_experts_more(kind):
    one, two, four = (build(kind, share_groups=groups) for groups in (1, 2, 4))
    unit = size(one.blocks[0].mixer.branch) + size(one.blocks[0].ffn.branch)
    assert two.num_parameters() - one.num_parameters() == unit
    assert four.num_parameters() == build(kind, share=()).num_parameters() == one.num_parameters() + 3 * unit
    assert sum(t.numel() for t in two.state_dict().values()) == two.num_parameters()
    owners = {name.split(".")[1] for name in two.state_dict() if "w_up" in name}
    assert owners == {"0", "2"}
    assert len({id(block.ffn.norm) for block in two.blocks}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_experts_and_choices_of_each_group(kind, tmp_path):
    model = build(kind, share_groups=2, num_experts=(4, 8), top_k=(2, 1), capacity_factor=(None, 1.5))
    layers = [block.ffn.branch for block in model.blocks]
    layers = [getattr(layer, "module", layer) for layer in layers]
    assert [(layer.num_experts, layer.top_k, layer.capacity_factor) for layer in layers] == [
        *[(4, 2, None)] * 2,
        *[(8, 1, 1.5)] * 2,
    ]
    assert layers[0] is layers[1] and layers[2] is layers[3]
    inputs, labels = batch(kind)
    model.train()(inputs, labels=labels).backward()
    assert layers[0].w_up.grad.abs().max() > 0 and layers[2].w_up.grad.abs().max() > 0
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(inputs), model.eval()(inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_group_are_the_sum_over_an_untied_copy(kind):
    shared, untied = build(kind, share_groups=2), build(kind, share=())
    state = shared.state_dict()
    for name in untied.state_dict().keys() - state.keys():
        head, layer, rest = name.split(".", 2)
        state[name] = state[f"{head}.{int(layer) // 2 * 2}.{rest}"]
    untied.load_state_dict(state)
    inputs, labels = batch(kind)
    losses = [model.train()(inputs, labels=labels) for model in (shared, untied)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for first in (0, 2):
        for slot in BOTH:
            for name, parameter in getattr(shared.blocks[first], slot).branch.named_parameters():
                copies = [getattr(untied.blocks[first + i], slot).branch.get_parameter(name).grad for i in (0, 1)]
                torch.testing.assert_close(parameter.grad, sum(copies), atol=1e-12, rtol=0)


def test_groups_of_blocks_without_sharing_have_experts_of_their_own():
    model = build("vision", share=("mixer",), share_groups=2, num_experts=(2, 3))
    assert [block.ffn.branch.num_experts for block in model.blocks] == [2, 2, 3, 3]
    assert len({id(block.ffn.branch) for block in model.blocks}) == 4


def test_schedules_over_depth_go_on_within_groups():
    sizes = {key: value for key, value in LM.items() if key not in ("mixer", "num_heads")}
    offsets = ((1,), (2,), (3,), (4,))
    model = create_model("lm", **sizes, share=("mixer",), share_groups=2, rank=4, offsets=offsets)
    branches = [block.mixer.branch for block in model.blocks]
    assert [b.options["offsets"] if hasattr(b, "options") else b.offsets for b in branches] == list(offsets)
    assert branches[1].module is branches[0] and branches[3].module is branches[2]


def test_groups_of_an_albert_share_their_norms_too():
    torch.manual_seed(0)
    model = create_model("albert_base", dtype=torch.float64, share_groups=2, **{**TEXT, "norm": "post"}).eval()
    ids, _ = batch("mlm")
    assert len(model.blocks) == 2
    x = model.blocks[0].mixer.expand(model._embed(ids, None))
    for block in (0, 0, 1, 1):
        x, _ = model.blocks[block](x)
    assert torch.equal(model.features(ids)[0], x)
    one = create_model("albert_base", device="meta", **{**TEXT, "norm": "post"})
    assert model.num_parameters() - one.num_parameters() == size(model.blocks[0])
    assert model.flops_per_token(9) == create_model("bert_factorised", device="meta", **TEXT).flops_per_token(9)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("lm", {"share_groups": 3}, ("share_groups", "depth=4", "3")),
        ("mlm", {"share_groups": 0}, ("share_groups", "0")),
        ("vision", {"share_groups": 2, "num_experts": (4, 8, 16)}, ("num_experts", "share_groups=2", "(4, 8, 16)")),
        ("lm", {"top_k": (2, 1)}, ("top_k", "share_groups=1", "(2, 1)")),
        ("lm", {"share_groups": 2, "num_experts": (4, 2), "top_k": (2, 3)}, ("top_k", "num_experts=2", "3")),
        ("vision", {"share": (), "share_groups": 2}, ("share_groups=2", "share=()")),
    ],
)
def test_errors_name_what_is_wrong(kind, options, words):
    with pytest.raises(ValueError) as caught:
        build(kind, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_blocks_with_experts_of_their_own_cannot_be_grouped():
    with pytest.raises(ValueError, match=r"moe_blocks=2 .* share_groups=2"):
        create_model("vit_moe_b16", share=("mixer",), share_groups=2, device="meta")
