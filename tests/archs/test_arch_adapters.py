"""The layers in other people's models, with random weights: forward, backward, shapes, undo."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from grassland.archs import GrassmannHead, HyperConnection, KromHC, SharedMoE, swap
from grassland.archs.interop.adapters import (
    GrassmannAttention,
    HyperBlock,
    MoEMlp,
    balance_loss,
    grassmann_attention,
    grassmann_multihead,
    hyper_blocks,
    llama_branches,
    moe_mlp,
    vit_branches,
)
from grassland.train.optim import parameter_groups


@pytest.fixture
def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=49
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture
def llama():
    return decoder("Llama")


def decoder(name, **more):
    """A small one of transformers, with weights whose continuations differ."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        bos_token_id=0, eos_token_id=49, pad_token_id=None, **more,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture
def vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": 32, "num_classes": 5}
    return timm.models.vision_transformer.VisionTransformer(**options, init_values=0.1, drop_path_rate=0.2).eval()


def attention():
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    return GPT2Attention


def decoder_layer():
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    return LlamaDecoderLayer


def gradients(model):
    return {name: p.grad is not None and bool(p.grad.abs().sum() > 0) for name, p in model.named_parameters()}


IDS = torch.tensor([[3, 7, 1, 9, 4, 4], [2, 2, 8, 30, 1, 6]])


def encoder(batch_first=True, norm_first=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first and batch_first)


CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)
RIGHT = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_grassmann_mixing_in_torchs_encoder(batch_first, training):
    model, x = encoder(batch_first), torch.randn(2, 6, 16)
    swap(model, {nn.MultiheadAttention: grassmann_multihead(rank=4, offsets=(1, 2))})
    model.train(training)

    def run(x, **masks):
        y = model(x if batch_first else x.transpose(0, 1), **masks)
        return y if batch_first else y.transpose(0, 1)

    y = run(x, mask=CAUSAL)
    y.sum().backward()
    assert all(gradients(model).values())
    expected = x
    for block in model.layers:
        expected = block.norm1(expected + block.self_attn.mixer(expected))
        expected = block.norm2(expected + block.linear2(block.linear1(expected).relu()))
    torch.testing.assert_close(y, expected)
    # Without gradients torch has faster paths of its own, which must not be taken.
    with torch.no_grad():
        assert torch.equal(run(x, mask=CAUSAL, is_causal=True), y)
        assert torch.equal(run(x, mask=CAUSAL.isinf(), src_key_padding_mask=RIGHT), y)
        changed = run(torch.where(RIGHT[..., None], 9.0, x), mask=CAUSAL, src_key_padding_mask=RIGHT)
        assert torch.equal(changed[~RIGHT], y[~RIGHT])
        with pytest.raises(ValueError, match="attn_mask must be causal"):
            run(x)
        with pytest.raises(ValueError, match="attn_mask must be causal"):
            run(x, src_key_padding_mask=RIGHT)
        with pytest.raises(ValueError, match="attn_mask must be causal"):
            run(x, mask=torch.zeros(6, 6))
        with pytest.raises(ValueError, match="key_padding_mask must hide the end"):
            run(x, mask=CAUSAL, src_key_padding_mask=RIGHT.flip(1))


def test_grassmann_mixing_in_torchs_layers():
    make, x = grassmann_multihead(rank=4, offsets=(1, 2)), torch.randn(2, 6, 16)
    block = encoder(norm_first=True).layers[0].eval()
    swap(block, {"self_attn": make}, example={"src": x, "src_mask": CAUSAL})
    with torch.no_grad():
        expected = x + block.self_attn.mixer(block.norm1(x))
        expected = expected + block.linear2(block.linear1(block.norm2(expected)).relu())
        torch.testing.assert_close(block(x, CAUSAL), expected)
        stacked = nn.TransformerEncoder(block, 1, enable_nested_tensor=False)
        assert torch.equal(stacked(x, CAUSAL), block(x, CAUSAL))
        torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x, CAUSAL), expected)
    decoder = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True).eval()
    swap(decoder, {nn.MultiheadAttention: make}, "self_attn", example=(x, torch.randn(2, 5, 16), CAUSAL))
    swap(decoder, {nn.MultiheadAttention: make})
    with pytest.raises(ValueError, match="query, key and value must be one tensor"):
        decoder(x, torch.randn(2, 5, 16), CAUSAL)


def test_experts_for_another_mlp_are_made_by_hand(llama):
    with pytest.raises(ValueError, match=r"moe_mlp takes .* fc1 and fc2, got LlamaMLP: .* MoEMlp\(SharedMoE\("):
        swap(llama, {"model.layers.*.mlp": moe_mlp()})
    swap(llama, {"model.layers.*.mlp": lambda old: MoEMlp(SharedMoE(16, 32))}, example=IDS)


def test_grassmann_mixing_in_gpt2(gpt2):
    before = gpt2(IDS).logits
    with swap(gpt2, {attention(): grassmann_attention(rank=4, offsets=(1, 2))}, example={"input_ids": IDS}) as report:
        assert [r.names for r in report.replaced] == [["transformer.h.0.attn"], ["transformer.h.1.attn"]]
        gpt2.train()
        loss = gpt2(IDS, labels=IDS).loss
        loss.backward()
        found = gradients(gpt2)
        assert all(found[name] for name in found if "mixer" in name) and any("mixer.plucker" in name for name in found)
        gpt2.eval()
        changed = IDS.clone()
        changed[:, 4] = 11
        logits, other = gpt2(IDS).logits, gpt2(changed).logits
        assert torch.equal(logits[:, :4], other[:, :4]) and not torch.allclose(logits[:, 5], other[:, 5])
    assert torch.equal(gpt2(IDS).logits, before)


def test_gpt2_with_grassmann_mixing_generates_with_the_cache_what_it_does_without(gpt2):
    swap(gpt2, {attention(): grassmann_attention(rank=4, offsets=(1, 3, 8))})
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = gpt2.generate(IDS, use_cache=False, **options)
    assert torch.equal(gpt2.generate(IDS, use_cache=True, **options), plain) and plain.shape == (2, 18)
    beams = [gpt2.generate(IDS, use_cache=use, num_beams=3, **options) for use in (True, False)]
    assert torch.equal(*beams)
    cache = gpt2(IDS[:, :2], use_cache=True).cache
    parts = [gpt2(IDS[:, 2:5], cache=cache).logits, gpt2(IDS[:, 5:], cache=cache).logits]
    assert torch.allclose(torch.cat(parts, 1), gpt2(IDS).logits[:, 2:], atol=1e-5)
    assert cache.layers[0].keys.shape == (2, 1, 6, 4) and cache.layers[0].values.numel() == 0


@pytest.mark.parametrize(("name", "where"), [("GPTNeoX", "*.attention"), ("Falcon", "*.self_attention")])
def test_the_cache_is_found_by_whatever_name_it_comes(name, where):
    model = decoder(name)
    swap(model, {where: grassmann_attention(rank=4, offsets=(1, 3, 8))})
    with torch.no_grad():
        for module in model.modules():
            for p in module.parameters() if isinstance(module, GrassmannAttention) else ():
                p.add_(torch.randn_like(p) * 0.2)
    cache = model(IDS[:, :2], use_cache=True).cache
    parts = [model(IDS[:, 2:5], cache=cache).logits, model(IDS[:, 5:], cache=cache).logits]
    assert cache.get_seq_length() == 6
    assert torch.allclose(torch.cat(parts, 1), model(IDS).logits[:, 2:], atol=1e-5)


def test_an_encoders_attention_is_not_replaced_by_a_causal_one():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    for name, kind in (("Bert", "BertSelfAttention"), ("ViT", "ViTAttention")):
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
        where = "*.self" if name == "Bert" else "*.attention"
        with pytest.raises(ValueError, match=f"takes the causal self-attention of a decoder .*, got {kind}"):
            swap(model, {where: grassmann_attention(rank=4)})


def test_a_decoder_with_cross_attention_generates_with_the_cache_what_it_does_without():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, forced_eos_token_id=None,
    )  # fmt: skip
    bart = transformers.BartForConditionalGeneration(config).eval()
    example = {"input_ids": IDS, "decoder_input_ids": IDS}
    swap(bart, {"*.decoder.layers.*.self_attn": grassmann_attention(rank=4, offsets=(1, 3))}, example=example)
    with torch.no_grad():
        for p in bart.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    for beams in (1, 3):
        options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
        assert torch.equal(bart.generate(IDS, **options), bart.generate(IDS, use_cache=False, **options))


def test_a_sliding_window_is_named_past_its_end():
    mistral = decoder("Mistral", num_key_value_heads=2, sliding_window=4)
    swap(mistral, {"*.self_attn": grassmann_attention(rank=4, offsets=(1, 2))}, example=IDS[:, :4])
    with pytest.raises(ValueError, match="no left padding and no sliding window"):
        mistral(IDS)
    with pytest.raises(ValueError, match="got one of fixed size or window"):
        mistral.generate(IDS[:, :3], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_grassmann_mixing_refuses_left_padding_and_takes_right_padding(gpt2, implementation):
    gpt2.set_attn_implementation(implementation)
    swap(gpt2, {attention(): grassmann_attention(rank=4, offsets=(1, 2))})
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    padded, alone = gpt2(IDS, attention_mask=mask).logits, gpt2(IDS[1:, :4]).logits
    assert torch.allclose(padded[1:, :4], alone, atol=1e-5)
    with pytest.raises(ValueError, match="attention_mask must hide the end of a row alone"):
        gpt2(IDS, attention_mask=mask.flip(1))
    with pytest.raises(ValueError, match="generates nothing after right padding"):
        gpt2.generate(IDS, attention_mask=mask, max_new_tokens=2, pad_token_id=0)
    with pytest.raises(ValueError, match="cache must be a DynamicCache"):
        gpt2.generate(IDS, max_new_tokens=2, cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize("kind", [KromHC, HyperConnection])
def test_hyper_connections_around_the_branches_of_llama(llama, kind):
    before = llama(IDS).logits
    make = hyper_blocks(llama_branches, 16, 3, kind, init="identity", num_streams=4)
    with swap(llama, {decoder_layer(): make}, example={"input_ids": IDS}) as report:
        assert report.parameters_after > report.parameters_before
        assert torch.allclose(llama(IDS).logits, before, atol=1e-5)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(llama.generate(IDS, **options), llama.generate(IDS, use_cache=False, **options))
        llama.train()
        llama(IDS, labels=IDS).loss.backward()
        found = gradients(llama)
        assert all(found[name] for name in found if "static_beta" in name or "block" in name), found
        assert sum("static_beta" in name for name in found) == 6
    assert torch.equal(llama.eval()(IDS).logits, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_hyper_connections_with_checkpointed_activations_give_the_same_gradients(llama, reentrant):
    swap(llama, {decoder_layer(): hyper_blocks(llama_branches, 16, 3)})
    runs = []
    llama.model.layers[1].block.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    llama.train()
    llama(IDS, labels=IDS).loss.backward()
    plain = {name: p.grad.clone() for name, p in llama.named_parameters()}
    llama.zero_grad()
    llama.activation_checkpointing_enable({"use_reentrant": reentrant})
    llama(IDS, labels=IDS, use_cache=False).loss.backward()
    assert len(runs) == 3
    assert all(torch.allclose(p.grad, plain[name], atol=1e-6) for name, p in llama.named_parameters())
    hidden, cache = torch.zeros(1, 2, 16), pytest.importorskip("transformers").DynamicCache()
    with pytest.raises(ValueError, match="cache must be None while activations are checkpointed"):
        llama.model.layers[0](hidden, cache=cache)
    llama.eval()(IDS)
    llama.train().activation_checkpointing_disable()
    llama(IDS)
    assert len(runs) == 5


def test_hyper_connections_have_no_hidden_states_to_show(llama):
    swap(llama, {decoder_layer(): hyper_blocks(llama_branches, 16, 3)})
    with pytest.raises(ValueError, match="output_hidden_states must be False"):
        llama(IDS, output_hidden_states=True)
    llama.config.output_hidden_states = True
    with pytest.raises(ValueError, match="output_hidden_states must be False"):
        llama(IDS)


@pytest.mark.parametrize(
    ("name", "more", "other", "compiled"),
    [
        ("Gemma2", {"head_dim": 8}, "post_feedforward_layernorm, pre_feedforward_layernorm", False),
        ("Olmo2", {}, "input_layernorm, post_feedforward_layernorm", False),
        ("Granite", {"residual_multiplier": 0.3}, "residual_multiplier", False),
        ("Granite", {"residual_multiplier": 0.3}, "residual_multiplier", True),
    ],
)
def test_the_branches_of_llama_are_not_those_of_layers_with_more(name, more, other, compiled):
    model = decoder(name, num_key_value_heads=2, **more)
    kind = type(model.model.layers[0])
    swap(model, {kind: hyper_blocks(llama_branches, 16, 3, init="identity")})
    run = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(ValueError, match=f"{kind.__name__} must be made of .* alone, but differs in {other}: "):
        run(IDS, use_cache=False)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_branches_of_llama_are_not_those_of_a_layer_that_norms_after_them(compiled):
    chameleon = pytest.importorskip("transformers.models.chameleon.modeling_chameleon")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    layer = chameleon.ChameleonSwinDecoderLayer(chameleon.ChameleonConfig(**sizes, attn_implementation="eager"), 0)
    model = nn.ModuleDict({"0": layer})
    swap(model, {"0": hyper_blocks(llama_branches, 16, 1)})
    run = torch.compile(model["0"], backend="eager") if compiled else model["0"]
    with pytest.raises(ValueError, match="ChameleonSwinDecoderLayer norms what comes out of its branches"):
        run(torch.zeros(1, 4, 16))


def test_the_branches_of_a_vit_are_not_those_of_blocks_with_windows():
    sam = pytest.importorskip("timm").models.vision_transformer_sam
    model = nn.ModuleDict({"0": sam.Block(16, 2, window_size=2)})
    swap(model, {"0": hyper_blocks(vit_branches, 16, 1)})
    with pytest.raises(ValueError, match=r"Block must be made of .* alone, but differs in window_size: "):
        model["0"](torch.zeros(1, 4, 4, 16))


def test_hyper_blocks_must_be_numbered(llama):
    with pytest.raises(ValueError, match=r"model.layers.2 must end in the number of a block below depth=2"):
        swap(llama, {decoder_layer(): hyper_blocks(llama_branches, 16, 2)})
    assert not any(isinstance(module, HyperBlock) for module in llama.modules())


def test_kromhc_around_the_branches_of_a_vit(vit):
    from timm.models.vision_transformer import Block

    images = torch.randn(2, 3, 32, 32)
    before = vit(images)
    with swap(vit, {Block: hyper_blocks(vit_branches, 16, 3, init="identity")}, example=images):
        assert torch.allclose(vit(images), before, atol=1e-5)
        vit.train()(images).square().sum().backward()
        assert all(flag for name, flag in gradients(vit).items() if "static_beta" in name)
    assert torch.equal(vit.eval()(images), before)


@pytest.mark.parametrize("share", [False, True])
def test_shared_experts_in_a_vit(vit, share):
    from timm.layers import Mlp

    images = torch.randn(2, 3, 32, 32)
    before = vit(images)
    make = moe_mlp(share, num_experts=3, top_k=2)
    with swap(vit, {Mlp: make}, "blocks.*.mlp", example=images) as report:
        layers = [r.new for r in report.replaced]
        assert [type(layer) for layer in layers] == [MoEMlp] * 3
        assert len({id(layer.experts) for layer in layers}) == (1 if share else 3)
        vit.train()
        balance = (vit(images), balance_loss(vit))[1]
        assert balance.shape == () and 0 < balance.item() < 1
        (vit(images).sum() + balance_loss(vit)).backward()
        assert all(flag for name, flag in gradients(vit).items() if "experts" in name)
        with pytest.raises(ValueError, match="no MoEMlp of VisionTransformer has run"):
            balance_loss(vit)
    assert torch.equal(vit.eval()(images), before)


def test_a_model_with_experts_is_copied_and_pickled_between_forward_and_backward(vit):
    from timm.layers import Mlp

    swap(vit, {Mlp: moe_mlp(share=True, num_experts=3)}, "blocks.*.mlp")
    images = torch.randn(2, 3, 32, 32)
    expected = vit(images)
    for twin in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))):
        assert torch.equal(twin(images), expected)
        assert twin.blocks[0].mlp.experts is twin.blocks[1].mlp.experts is not vit.blocks[0].mlp.experts
    balance_loss(vit).backward()


def test_a_balance_loss_without_a_gradient_is_refused():
    model, x = MoEMlp(SharedMoE(8, 12)), torch.randn(2, 5, 8, requires_grad=True)
    checkpoint(model, x, use_reentrant=True)
    with pytest.raises(ValueError, match=r"MoEMlp has run without gradients.*use_reentrant=False"):
        balance_loss(model)
    checkpoint(model, x, use_reentrant=False)
    assert balance_loss(model).requires_grad
    with torch.no_grad():
        model(x)
        assert balance_loss(model) > 0
    model.eval()(x.detach())
    assert balance_loss(model) > 0


def test_models_share_no_experts_with_one_another(vit):
    from timm.layers import Mlp

    other, make = copy.deepcopy(vit), moe_mlp(share=True, num_experts=3)
    for model in (vit, other):
        swap(model, {Mlp: make}, "blocks.0.mlp")
        swap(model, {Mlp: make}, "blocks.[12].mlp")
    used = [{id(m.experts) for m in model.modules() if isinstance(m, MoEMlp)} for model in (vit, other)]
    assert [len(experts) for experts in used] == [1, 1] and not used[0] & used[1]


@pytest.mark.parametrize(
    "name", ["resnet50d", "swin_tiny_patch4_window7_224", "deit3_small_patch16_224"], ids=lambda name: name[:6]
)
def test_a_grassmann_head_on_the_papers_models(name):
    timm = pytest.importorskip("timm")
    from grassland.archs.interop.timm import put_grassmann_head

    slim = {"resnet50d": {"channels": (8, 16, 16, 16), "stem_width": 8}}
    small = {"swin": {"embed_dim": 12, "depths": (1, 1, 1, 1)}, "deit": {"embed_dim": 24, "depth": 2, "num_heads": 2}}
    model = timm.create_model(name, num_classes=6, **slim.get(name, small.get(name[:4], {})))
    size = 64 if name == "resnet50d" else 224
    put_grassmann_head(model, subspace_dim=2)
    head = next(module for module in model.modules() if isinstance(module, GrassmannHead))
    logits = model(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 6) and logits.min().item() >= 0 and logits.max().item() <= head.scale
    nn.functional.cross_entropy(logits, torch.tensor([1, 4])).backward()
    assert gradients(head)["weight"] and head.orthogonality_error() < 1e-6
    assert model.get_classifier() is head


def test_a_grassmann_head_by_swap_is_undone():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=6).eval()
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    with swap(model, {"fc": lambda old: GrassmannHead(old.in_features, old.out_features, 2)}, example=images):
        assert isinstance(model.get_classifier(), GrassmannHead)
        assert parameter_groups(model)["manifold"] == [model.fc.weight] and model.fc.orthogonality_error() < 1e-6
    assert torch.equal(model(images), before)


def test_the_attention_adapter_refuses_cross_attention_and_a_residual_stream():
    layer = GrassmannAttention(8, 0, rank=4, offsets=(1,))
    with pytest.raises(ValueError, match="encoder_hidden_states must be None"):
        layer(torch.zeros(1, 2, 8), encoder_hidden_states=torch.zeros(1, 2, 8))
    with pytest.raises(ValueError, match="hidden_states must be the only positional argument, got 1 more"):
        layer(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8))
