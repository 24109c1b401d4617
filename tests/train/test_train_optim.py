import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from grassland.archs import GrassmannHead, TransformerNLIHead, create_model
from grassland.train.muon import Muon, muon
from grassland.train.optim import OPTIMIZERS, build_optimizer, parameter_groups

SIZES = {"vocab_size": 40, "dim": 16, "depth": 2, "ffn_dim": 32, "max_len": 8, "rank": 4, "offsets": (1, 2)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("lm", **SIZES)


def names(model, parameters):
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return {by_id[id(parameter)] for parameter in parameters}


def step(model, optimizer, seed):
    ids = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(ids, labels=ids).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_settings_reach_the_optimisers(name):
    pytest.importorskip("timm")
    net = nn.Sequential(nn.Linear(4, 4), GrassmannHead(4, 2, 2))
    given = {"lr": 0.25, "betas": (0.7, 0.8), "eps": 1e-5, "weight_decay": 0.125}
    optimizer = build_optimizer(net, name, **given, head_lr=0.5, head_momentum=0.6, momentum_mode="project")
    *euclidean, head = optimizer.param_groups
    assert (head["lr"], head["momentum"], head["momentum_mode"]) == (0.5, 0.6, "project")
    assert sorted(group["weight_decay"] for group in euclidean) == [0, 0.125]
    assert all(group["lr"] == 0.25 for group in euclidean)
    assert all(group["betas"] == (0.7, 0.8) for group in euclidean if "betas" in group)
    if name == "sgd":
        assert all(group["momentum"] == 0.7 for group in euclidean)
    if name == "lamb":  # the loop clips the gradient
        assert all(group["max_grad_norm"] is None for group in euclidean)
    if name == "adamw":
        assert all(group["eps"] == 1e-5 for group in euclidean)


def test_groups_hold_every_parameter_once_and_decay_matrices_only(model):
    groups = parameter_groups(model)
    everything = [name for members in groups.values() for name in names(model, members)]
    assert sorted(everything) == sorted(name for name, _ in model.named_parameters())
    undecayed = names(model, groups["no_decay"])
    assert {"embed.weight", "positions.weight", "norm.weight", "norm.bias"} <= undecayed
    for name, parameter in model.named_parameters():
        assert (name in undecayed) == (parameter.ndim < 2 or name in ("embed.weight", "positions.weight")), name


def test_a_mark_on_a_parameter_decides_its_group(model):
    model.norm.weight.optim_group = "decay"
    assert "norm.weight" in names(model, parameter_groups(model)["decay"])
    model.norm.weight.optim_group = "nowhere"
    with pytest.raises(ValueError, match="'nowhere'"):
        parameter_groups(model)


def group_of(model, name):
    found = [group for group, members in parameter_groups(model).items() if name in names(model, members)]
    assert len(found) == 1
    return found[0]


def test_biases_of_experts_and_taps_of_convolutions_are_no_matrices():
    sizes = {name: value for name, value in SIZES.items() if name != "rank"}
    model = create_model("lm", mixer="convolution", ffn="shared_moe", **sizes)
    assert model.blocks[0].ffn.branch.b_up.ndim == model.blocks[0].mixer.branch.taps.ndim == 2
    for bias in ("b_up", "b_down"):
        assert group_of(model, f"blocks.0.ffn.branch.{bias}") == "no_decay"
    assert group_of(model, "blocks.0.mixer.branch.taps") == "decay"
    assert group_of(model, "blocks.0.ffn.branch.router") == group_of(model, "blocks.0.mixer.branch.reduce.weight")


@pytest.mark.parametrize(("head", "weight"), [("linear", "proj."), ("classifier", "proj."), ("cosine", "")])
def test_the_weight_of_the_logits_is_decayed_and_not_for_muon(head, weight):
    model = create_model("lm", head=head, **SIZES)
    assert group_of(model, f"head.{weight}weight") == "decay"
    assert group_of(model, "embed.weight") == "no_decay"


def test_so_is_the_weight_of_a_classifier_of_texts():
    encoder = create_model("mlm", vocab_size=9, dim=8, depth=1, ffn_dim=8, num_heads=2, embed_dim=4, num_classes=3)
    assert group_of(encoder, "classifier.weight") == "decay" and group_of(encoder, "pooler.weight") == "matrix"
    assert group_of(encoder, "embed.weight") == "no_decay" and group_of(encoder, "proj.weight") == "matrix"
    nli = TransformerNLIHead(8, 3, d_model=8, num_layers=1, num_heads=2, d_ff=8)
    assert group_of(nli, "classifier.weight") == "decay" and group_of(nli, "hidden.weight") == "matrix"


def test_vectors_of_any_shape_are_not_decayed():
    model = nn.Module()
    model.token = nn.Parameter(torch.zeros(1, 1, 5))
    model.table = nn.Parameter(torch.zeros(1, 4, 5))
    assert group_of(model, "token") == "no_decay" and group_of(model, "table") == "decay"


def test_models_of_timm_say_what_is_not_decayed_and_what_classifies():
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "num_heads": 2, "num_classes": 3}
    vit = timm.models.VisionTransformer(depth=1, **sizes)
    # As a part of another model, too.
    for model, prefix in ((vit, ""), (nn.Sequential(vit), "0.")):
        assert {group_of(model, prefix + name) for name in vit.no_weight_decay() & vit.state_dict().keys()} == {
            "no_decay"
        }
        assert group_of(model, f"{prefix}pos_embed") == "no_decay"
        assert group_of(model, f"{prefix}head.weight") == "decay"
        assert group_of(model, f"{prefix}blocks.0.attn.qkv.weight") == "matrix"
    # By a pattern.
    xcit = timm.models.Xcit(depth=1, cls_attn_layers=1, **sizes)
    assert group_of(xcit, "pos_embed.token_projection.weight") == "no_decay"
    swin = timm.models.SwinTransformer(depths=(1,), window_size=2, **{**sizes, "patch_size": 4, "num_heads": (2,)})
    assert group_of(swin, "layers.0.blocks.0.attn.relative_position_bias_table") == "no_decay"
    assert group_of(swin, "head.fc.weight") == "decay"
    vit.pos_embed.optim_group = "decay"
    assert group_of(vit, "pos_embed") == "decay"


def test_models_of_transformers_say_what_gives_their_logits():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    for tied, group in ((False, "decay"), (True, "no_decay")):
        config = transformers.LlamaConfig(num_attention_heads=2, tie_word_embeddings=tied, **sizes)
        model = transformers.LlamaForCausalLM(config)
        assert any(p is model.lm_head.weight for p in parameter_groups(model)[group])
        assert group_of(model, "model.layers.0.mlp.up_proj.weight") == "matrix"


def test_adamw_decays_exactly_the_decayed_groups():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, "adamw", lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model[0].weight, before["0.weight"] * (1 - 0.1 * 0.5))
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(model.state_dict()[name], before[name])


def test_muon_steps_hidden_matrices_along_a_nearly_orthogonal_matrix():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(7, 24), nn.Linear(24, 48))
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, "muon", lr=0.01, weight_decay=0.0)
    model(torch.arange(7)).square().sum().backward()
    # A gradient of rank 7 says nothing about the other directions: replace it by one of full rank.
    gradient = torch.randn(48, 24)
    model[1].weight.grad = gradient.clone()
    optimizer.step()
    update = (before["1.weight"] - model[1].weight.detach()) / (0.01 * 0.2 * 48**0.5)
    singular = torch.linalg.svdvals(update)
    assert singular.min() > 0.6 and singular.max() < 1.3
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    assert torch.cosine_similarity(update.flatten(), (left @ right).flatten(), dim=0) > 0.97
    # Embeddings and biases get AdamW's first step: lr in each coordinate that has a gradient.
    for name in ("1.bias", "0.weight"):
        change = (before[name] - model.state_dict()[name]).abs()
        torch.testing.assert_close(change, torch.full_like(change, 0.01), rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(6, 96), (96, 6), (48, 48)], ids=str)
def test_muons_updates_have_the_size_of_adamws(shape):
    """0.2 of the rate an entry, in the root mean square, whatever the shape."""
    torch.manual_seed(3)
    model = nn.Linear(*shape, bias=False)
    before = model.weight.detach().clone()
    model.weight.grad = torch.randn_like(before)
    build_optimizer(model, "muon", lr=0.01, weight_decay=0.0).step()
    size = (model.weight.detach() - before).square().mean().sqrt().item()
    assert size == pytest.approx(0.2 * 0.01, rel=0.2)


@pytest.mark.parametrize("rule", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(6, 96), (96, 6), (48, 48)], ids=str)
def test_muon_in_float32_is_torchs_but_for_bfloat16(monkeypatch, shape, rule):
    monkeypatch.setattr("grassland.train.muon.multiplies_halves", lambda: False)
    torch.manual_seed(4)
    ours, torchs = (nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).reshape(shape)) for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.8, "adjust_lr_fn": rule}
    optimizers = [muon([ours], **options), torch.optim.Muon([torchs], **options)]
    assert type(optimizers[0]) is Muon
    for _ in range(3):
        ours.grad = torch.randn(shape)
        torchs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    start = torch.linspace(-1, 1, shape[0] * shape[1]).reshape(shape)
    assert (ours - torchs).norm() < 0.02 * (torchs - start).norm()
    optimizers[0].load_state_dict(optimizers[1].state_dict())
    assert torch.equal(optimizers[0].state[ours]["momentum_buffer"], optimizers[1].state[torchs]["momentum_buffer"])


def test_lambs_first_step_has_the_length_of_the_weight_times_the_rate():
    pytest.importorskip("timm")
    torch.manual_seed(2)
    model = nn.Linear(6, 5)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = build_optimizer(model, "lamb", lr=0.1, weight_decay=0.5)
    model(torch.randn(7, 6)).square().sum().backward()
    gradient = model.weight.grad.clone()
    optimizer.step()
    # m / (sqrt(v) + eps) is the sign of the gradient after one step; the decay is added before the trust ratio.
    update = gradient.sign() + 0.5 * weight
    torch.testing.assert_close(
        model.weight, weight - 0.1 * update * weight.norm() / update.norm(), rtol=1e-3, atol=1e-4
    )
    assert ((model.bias - bias).abs() - 0.1).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon", "sgd"])
def test_state_dict_continues_bitwise(model, name):
    optimizer = build_optimizer(model, name, lr=1e-2)
    for seed in range(3):
        step(model, optimizer, seed)
    twin = copy.deepcopy(model)
    other = build_optimizer(twin, name, lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(twin, other, seed)
    for (key, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_a_scheduler_moves_every_part_of_a_joined_optimizer(model):
    optimizer = build_optimizer(model, "muon", lr=1.0)
    assert len(optimizer.optimizers) == 2
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for part in optimizer.optimizers for group in part.param_groups] == [0.5, 0.5]
    with pytest.raises(ValueError, match="the state has 0 groups, this optimiser has 2"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})


def test_a_joined_optimizer_refuses_parameters_that_no_part_would_step(model):
    optimizer = build_optimizer(model, "muon")
    before = [len(group["params"]) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match="take no further param_group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 3))]})
    assert [len(group["params"]) for group in optimizer.param_groups] == before


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copied_joined_optimizer_goes_on_as_the_original(how):
    torch.manual_seed(0)
    model = create_model("lm", head="grassmann", subspace_dim=2, **SIZES)
    optimizer = build_optimizer(model, "muon", lr=1e-2)
    step(model, optimizer, 0)
    twin, other = how((model, optimizer))
    assert len(other.optimizers) == 3 and other.optimizers[0] is not optimizer.optimizers[0]
    other.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.02
    for seed in range(1, 3):
        step(model, optimizer, seed)
        step(twin, other, seed)
    for (key, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_distributed_checkpoints_take_a_joined_optimizer():
    torch.manual_seed(0)
    model = create_model("lm", head="grassmann", subspace_dim=2, **SIZES)
    optimizer = build_optimizer(model, "muon", lr=1e-2)
    step(model, optimizer, 0)
    twin = copy.deepcopy(model)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert saved["state"].keys() == dict(model.named_parameters()).keys()
    other = build_optimizer(twin, "muon", lr=0.5)
    step(twin, other, 5)
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, other, saved)
    for seed in range(1, 3):
        step(model, optimizer, seed)
        step(twin, other, seed)
    for (key, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_unknown_optimizer_is_named(model):
    with pytest.raises(ValueError, match="'lion'"):
        build_optimizer(model, "lion")
