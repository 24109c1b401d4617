"""WideNet, ViT and the text encoders: counts, equations, masks, sharing, clear errors."""

import pytest
import torch
import torch.nn.functional as F

from grassland.archs import WideNet, create_model, load_model, save_model
from grassland.archs.registry import slot_choices

TINY = {"image_size": 8, "patch_size": 4, "dim": 12, "depth": 2, "ffn_dim": 16, "num_heads": 2, "num_classes": 5}
WITHOUT_DEPTH = {name: size for name, size in TINY.items() if name != "depth"}
TEXT = {"vocab_size": 31, "max_len": 16, "dim": 12, "depth": 3, "ffn_dim": 16, "num_heads": 2, "embed_dim": 6}
LINEAR = {name: size for name, size in TEXT.items() if name != "num_heads"}


def images(count=4, size=8):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens(*shape, seed=1):
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))


def build(name, **overrides):
    torch.manual_seed(0)
    model = create_model(name, dtype=torch.float64, **overrides)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("widenet_b16", 29_691_369),
        ("widenet_l16", 40_942_569),
        ("widenet_h16", 63_343_081),
        ("vit_b16", 87_158_249),
        ("vit_l16", 305_376_233),
        ("vit_moe_b16", 128_090_089),
        ("vit_moe_l16", 406_117_353),
        ("widenet_albert_4e", 25_887_744),
        ("widenet_albert_8e", 44_780_544),
        ("widenet_albert_16e", 82_566_144),
        ("albert_base", 11_683_584),
        ("bert_factorised", 89_650_176),
    ],
)
def test_parameter_counts_of_the_paper(name, parameters):
    model = create_model(name, device="meta")
    assert model.num_parameters() == parameters
    assert sum(t.numel() for t in model.state_dict().values()) == parameters


def test_widenet_is_the_paper_block_by_block():
    model = build("widenet_b16", capacity_factor=None, **TINY).eval()
    x = F.conv2d(images(), model.patches.weight, model.patches.bias, 4).flatten(2).mT
    x = torch.cat([torch.zeros(4, 1, 12, dtype=x.dtype), x], 1) + model.positions.weight
    attention, moe = model.blocks[0].mixer.branch, model.blocks[0].ffn.branch
    for block in model.blocks:
        h = F.layer_norm(x, (12,), block.mixer.norm.weight, block.mixer.norm.bias, 1e-6)
        q, k, v = (t.unflatten(-1, (2, 6)).transpose(1, 2) for t in attention.qkv(h).split(12, -1))
        y = ((q @ k.mT / 6**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + attention.out_proj(y)
        h = F.layer_norm(x, (12,), block.ffn.norm.weight, block.ffn.norm.bias, 1e-6)
        p = (h @ moe.router.T).softmax(-1)
        for e in range(4):
            inside = F.gelu(h @ moe.w_up[e].T + moe.b_up[e], approximate="tanh")
            gate = torch.where((p.topk(2).indices == e).any(-1), p[..., e], 0)
            x = x + gate[..., None] * (inside @ moe.w_down[e].T + moe.b_down[e])
    x = F.layer_norm(x, (12,), model.norm.weight, model.norm.bias, 1e-6).mean(1)
    logits = model.head.proj(torch.tanh(model.pre_logits(x)))
    torch.testing.assert_close(model(images()), logits, atol=1e-11, rtol=0)


def test_loss_has_the_balance_losses_in_training_only():
    model = build("widenet_b16", noise=False, capacity_factor=None, dropout=0, balance_weight=0.5, **TINY)
    labels = torch.tensor([0, 1, 4, 2])
    expected = F.cross_entropy(model(images()), labels)
    torch.testing.assert_close(model.eval()(images(), labels=labels), expected)
    auxiliary = sum(model.features(images())[1])
    assert auxiliary > 0
    torch.testing.assert_close(model.train()(images(), labels=labels), expected + auxiliary)
    soft = F.one_hot(labels, 5).double()
    torch.testing.assert_close(model.eval()(images(), labels=soft), expected)


@pytest.mark.parametrize("name", ["widenet_b16", "vit_b16", "vit_moe_b16"])
def test_models_train_and_are_stored_with_shared_weights_once(name, tmp_path):
    model = build(name, **({**TINY, "depth": 3, "moe_dim": 8} if "moe" in name else TINY)).train()
    model(images(), labels=torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded.config) is type(model.config) and loaded.config == model.config
    assert torch.equal(loaded(images()), model.eval()(images()))


def test_one_stack_of_blocks_whichever_have_experts():
    sizes = {**TINY, "depth": 5, "moe_dim": 8, "moe_blocks": 2, "dropout": 0.2}
    streams = {"residual": "kromhc", "expand": "learned", "reduce": "learned"}
    model = build("vit_moe_b16", **sizes, **streams).train()
    model(images(), labels=torch.arange(4)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert [block.ffn.layer_index for block in model.blocks] == [1, 3, 5, 7, 9]
    assert [block.ffn.dropout.p for block in model.blocks] == [0.2, 0.2, 0.2, 0, 0]
    assert [block.ffn.branch.dropout for block in model.blocks[3:]] == [0.2, 0.2]
    del sizes["num_heads"]
    schedule = ((1,), (2,), (4,), (3,), (5,))
    model = build("vit_moe_b16", mixer="grassmann", rank=4, offsets=schedule, **sizes)
    assert [block.mixer.branch.offsets for block in model.blocks] == list(schedule)


def test_the_experts_of_vit_moe_are_chosen_as_widenets(tmp_path):
    model = build("vit_moe_b16", num_experts=3, top_k=1, capacity_factor=None, depth=3, moe_dim=8, **WITHOUT_DEPTH)
    experts = [block.ffn.branch for block in model.blocks[1:]]
    assert [(layer.num_experts, layer.top_k, layer.capacity_factor) for layer in experts] == [(3, 1, None)] * 2
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(images()), model.eval()(images()))
    # Without blocks that have them, they are dropped as those of any slot that is replaced.
    assert "num_experts" not in model.config.override(moe_blocks=0).options


def test_widenet_class_is_the_preset():
    assert WideNet(device="meta", **TINY).config == create_model("widenet_b16", device="meta", **TINY).config


def test_a_prediction_does_not_depend_on_the_batch():
    model = build("widenet_b16", **TINY).eval()
    torch.testing.assert_close(model(images())[2:3], model(images()[2:3]), atol=1e-12, rtol=0)


def test_class_token_pooling_and_no_pre_logits():
    model = build("vit_b16", pooling="cls", pre_logits=False, **TINY).eval()
    assert model.pre_logits is None
    assert not torch.allclose(model(images()), build("vit_b16", pre_logits=False, **TINY).eval()(images()))


def test_compiles_without_a_graph_break():
    model = build("widenet_b16", **TINY).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), model(images()))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: create_model("vit_b16", image_size=225), ("patch_size", "225", "16")),
        (lambda: create_model("vit_b16", pooling="max"), ("pooling", "max")),
        (lambda: create_model("vit_b16", moe_blocks=12), ("moe_blocks", "12")),
        (lambda: create_model("widenet_b16", moe_blocks=1), ("moe_blocks", "share")),
        (lambda: create_model("vit_b16", **TINY)(torch.zeros(1, 3, 10, 8)), ("10 × 8", "patch_size=4")),
        (lambda: create_model("vit_b16", **TINY)(torch.zeros(1, 3, 12, 12)), ("images", "(1, 3, 12, 12)")),
        (lambda: create_model("vit_b16", **TINY)(torch.zeros(1, 3, 8, 8), torch.zeros(2)), ("labels", "(2,)")),
        (lambda: create_model("vit_b16", **{**TINY, "num_heads": 5}), ("num_heads", "5", "12")),
        (lambda: create_model("albert_base", share=("ffn",)), ("share_norms", "ffn")),
        (
            lambda: create_model("albert_base", mixer="grassmann", pooler=False, offsets=((1,), (2,)), **LINEAR),
            ("offsets", "share_norms", "((1,), (2,))"),
        ),
        (lambda: create_model("vit_b16", num_experts=8), ("num_experts",)),
        (lambda: create_model("vit_moe_b16", num_experts=(4, 8)), ("num_experts", "(4, 8)")),
        (lambda: create_model("albert_base", **TEXT)(tokens(1, 17)), ("input_ids", "17", "max_len=16")),
        (lambda: create_model("albert_base", pooler=False, **TEXT).pooled(tokens(1, 3)), ("pooler",)),
        (lambda: create_model("albert_base", **TEXT)(tokens(1, 3), tokens(1, 4)), ("labels", "(1, 4)")),
        (lambda: create_model("lm", mixer="bidirectional"), ("mixer", "bidirectional")),
    ],
)
def test_errors_name_what_is_wrong(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("name", ["widenet_albert_4e", "albert_base", "bert_factorised"])
def test_padding_does_not_matter_and_order_does(name):
    model, ids = build(name, **TEXT).eval(), tokens(2, 9)
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    padded = torch.where(mask, ids, 7)
    full = model(padded, mask=mask)
    torch.testing.assert_close(full[1:, :5], model(ids[1:, :5]), atol=1e-11, rtol=0)
    torch.testing.assert_close(full[:1], model(ids[:1]), atol=1e-11, rtol=0)
    later = ids.clone()
    later[:, -1] = (later[:, -1] + 1) % 31
    assert not torch.equal(model(later)[:, 0], model(ids)[:, 0])


def test_masked_loss_is_cross_entropy_through_the_transposed_embedding():
    model, ids = build("albert_base", **TEXT).eval(), tokens(2, 9)
    labels = torch.where(torch.arange(9) % 3 == 0, tokens(2, 9, seed=2), -100)
    features = model.features(ids)[0]
    logits = features @ model.proj.weight @ model.embed.weight.T
    torch.testing.assert_close(model(ids), logits)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model(ids, labels=labels), expected)
    pooled, _ = model.pooled(ids)
    torch.testing.assert_close(pooled, torch.tanh(model.pooler(features[:, 0])))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("residual", slot_choices("residual"))
@pytest.mark.parametrize("kind", ["mlm", "vision"])
def test_features_are_normalised_whatever_the_residual(kind, residual, norm):
    torch.manual_seed(0)
    sizes = TEXT if kind == "mlm" else {"pre_logits": False, "pooling": "cls", **TINY}
    model = create_model(kind, residual=residual, norm=norm, dtype=torch.float64, **sizes).eval()
    for linear in (module for module in model.modules() if isinstance(module, torch.nn.Linear)):
        torch.nn.init.normal_(linear.weight, std=0.3)
    x, _ = model.features(tokens(2, 9) if kind == "mlm" else images())
    torch.testing.assert_close(x.std(-1, correction=0), torch.ones(x.shape[:-1], dtype=x.dtype), atol=0.01, rtol=0)


def test_token_types_join_the_embedding():
    model, ids = build("albert_base", **TEXT).eval(), tokens(2, 9)
    assert torch.equal(model(ids), model(ids, token_types=torch.zeros_like(ids)))
    assert not torch.equal(model(ids), model(ids, token_types=torch.ones_like(ids)))


def test_widenet_encoder_trains_with_padding():
    model, ids = build("widenet_albert_4e", **TEXT).train(), tokens(4, 12)
    mask = torch.arange(12) < torch.tensor([[12], [7], [9], [3]])
    model(ids, labels=torch.where(mask, ids, -100), mask=mask).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == ["pooler.weight", "pooler.bias"]
    assert model.blocks[0].ffn.branch.load()["share"].sum().item() == pytest.approx(1)


def test_cls_pooling_reads_the_class_token():
    model, normed = build("vision", pooling="cls", pre_logits=False, **TINY).eval(), []
    model.norm.register_forward_hook(lambda module, args, out: normed.append(out))
    found, _ = model.features(images())
    assert torch.equal(found, normed[0][:, 0])


def test_a_text_encoder_embeds_tokens_positions_and_types():
    model = build("mlm", **TEXT).eval()
    ids, types = tokens(2, 7), torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0]])
    x = model.embed.weight[ids] + model.positions.weight[:7] + model.types.weight[types]
    x = model.proj(model.embed_norm(x))
    for block in model.blocks:
        x, _ = block(x)
    torch.testing.assert_close(model.features(ids, token_types=types)[0], model.norm(x), atol=1e-12, rtol=0)
    assert torch.equal(model(ids), model(ids, token_types=torch.zeros_like(types)))
