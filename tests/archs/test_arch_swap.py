"""The generic replacement of modules, on plain torch models."""

import pytest
import torch
from torch import nn

from grassland.archs import MLP, SharedMoE, create_model, load_model, save_model, swap


class Scale(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner
        self.factor = nn.Parameter(torch.ones(1))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, x):
        return self.factor * (x if self.inner is None else self.inner(x))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), nn.Linear(8, 3))


def names(report):
    return [name for replacement in report.replaced for name in replacement.names]


@pytest.mark.parametrize(
    "keys, where, expected",
    [
        ({nn.Linear: Scale}, None, ["0", "2.0", "3"]),
        ({nn.Linear: Scale}, "2.*", ["2.0"]),
        ({nn.Linear: Scale}, lambda name: name != "3", ["0", "2.0"]),
        ({"2.?": Scale}, None, ["2.0", "2.1"]),
        ({nn.Sequential: Scale, nn.Linear: Scale}, None, ["0", "2", "3"]),
        ({nn.modules.dropout._DropoutNd: Scale}, None, ["2.1"]),
    ],
    ids=["class", "glob", "predicate", "name", "outermost", "subclass"],
)
def test_keys_and_where_choose(keys, where, expected):
    assert names(swap(mlp(), keys, where)) == expected


def test_factories_get_the_old_module_and_the_name_if_they_ask():
    seen = []
    swap(mlp(), {"0": lambda old, name: seen.append((type(old), name)) or Scale(old)})
    swap(mlp(), {"0": lambda old, gain=3: seen.append(gain) or Scale(old)})
    swap(mlp(), {"0": lambda old, *, name: seen.append(name) or Scale(old)})
    assert seen == [(nn.Linear, "0"), 3, "0"]


def test_undo_restores_the_model_bit_by_bit_with_its_hooks():
    model, x = mlp(), torch.randn(5, 4)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    modules, state = list(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    model.eval()
    before = model(x)
    report = swap(model, {nn.Linear: lambda old: nn.Linear(old.in_features, old.out_features)})
    assert not torch.equal(model(x), before) and calls == ["hook"]
    report.undo()
    report.undo()
    assert torch.equal(model(x), before) and calls == ["hook"] * 2
    assert [name for name, _ in model.named_modules()] == [name for name, _ in modules]
    assert all(a is b for (_, a), (_, b) in zip(model.named_modules(), modules, strict=True))
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_context_manager_undoes_even_after_an_error():
    model = mlp()
    first = model[0]
    with pytest.raises(KeyError), swap(model, {nn.Linear: Scale}) as report:
        assert isinstance(model[0], Scale) and report.active
        raise KeyError
    assert model[0] is first and not report.active


def test_swaps_nest_and_are_undone_in_reverse():
    model = mlp()
    first = model[0]
    outer = swap(model, {"0": Scale})
    inner = swap(model, {"0": Scale})
    with pytest.raises(ValueError, match="0 is no longer what swap put there"):
        outer.undo()
    inner.undo()
    outer.undo()
    assert model[0] is first


def test_a_shared_module_is_replaced_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": shared})
    made = []
    report = swap(model, {nn.Linear: lambda old: made.append(Scale(old)) or made[-1]}, "[ab]*")
    assert len(made) == len(report.replaced) == 1 and names(report) == ["a", "b.0"]
    assert model["a"] is model["b"][0] is made[0] and model["c"] is shared
    report.undo()
    assert model["a"] is model["b"][0] is model["c"] is shared


def language_model(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "max_len": 8, "dim": 8, "depth": 3, "ffn_dim": 12, "mixer": "attention"}
    return create_model("lm", **{**sizes, **options}).eval()


IDS = torch.arange(10).view(2, 5)


def test_blocks_that_share_weights_share_the_new_ones(tmp_path):
    model = language_model(ffn="shared_moe", share=("ffn",))
    before, old = model(IDS), model.blocks[0].ffn.branch
    report = swap(model, {SharedMoE: lambda old: MLP(8, 12)}, example=IDS)
    assert names(report) == [f"blocks.{i}.ffn.branch" for i in range(3)] and "in 3 places" in str(report)
    new = model.blocks[0].ffn.branch
    assert all(block.ffn.branch.module is new for block in model.blocks[1:])
    model(IDS, labels=IDS).backward()
    assert all(p.grad is not None for p in model.parameters())
    plain = language_model(share=("ffn",))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(IDS), model(IDS))
    report.undo()
    assert all(block.ffn.branch.module is old for block in model.blocks[1:]) and torch.equal(model(IDS), before)
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(IDS), before)


def test_what_is_around_a_shared_module_keeps_the_sharing():
    model = language_model(share=("ffn",))
    before = model(IDS)
    swap(model, {MLP: Scale})
    new = model.blocks[0].ffn.branch
    assert isinstance(new, Scale) and model.blocks[2].ffn.branch.module is new and torch.equal(model(IDS), before)


def test_a_tied_head_follows_the_embedding():
    model = language_model()
    old = model.embed
    report = swap(model, {"embed": lambda old: nn.Embedding(11, 8)}, example=IDS)
    assert model.head.weight is model.embed.weight is not old.weight and names(report) == ["embed", "head.tied"]
    report.undo()
    assert model.head.weight is old.weight
    swap(model, {"embed": lambda old: nn.Sequential(old, nn.Dropout(0.5))}, example=IDS)
    assert model.head.weight is old.weight is model.embed[0].weight


@pytest.mark.parametrize(
    "key, factory, named",
    [
        ("embed", lambda old: nn.Sequential(nn.Embedding(11, 8)), "head.tied would use what is no longer in the model"),
        ("blocks.0", lambda old: nn.Identity(), "blocks.1.ffn.branch, blocks.2.ffn.branch would use"),
    ],
)
def test_what_others_use_does_not_leave_the_model(key, factory, named):
    model = language_model(share=("ffn",))
    before, modules = model(IDS), list(model.modules())
    with pytest.raises(ValueError, match=named):
        swap(model, {key: factory})
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True)) and torch.equal(model(IDS), before)


def test_a_part_whose_owner_is_elsewhere_can_be_swapped_in():
    model = language_model(share=("ffn",))
    swap(model.blocks[1], {"mixer.branch": lambda old: nn.Sequential(nn.Identity())})
    assert isinstance(model.blocks[1].mixer.branch, nn.Sequential)


def test_a_parent_that_is_shared_is_entered_under_each_of_its_names():
    parent = nn.Sequential(nn.Linear(2, 2))
    model = nn.ModuleDict({"a": parent, "b": parent})
    assert names(swap(model, {nn.Linear: Scale}, "b.*")) == ["b.0"]
    assert isinstance(parent[0], Scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_new_modules_take_dtype_device_mode_and_frozenness(dtype):
    model = mlp().to(dtype)
    model[2].eval()
    model[3].requires_grad_(False)
    old = dict(model.named_modules())
    swap(model, {nn.Linear: lambda old: Scale(nn.Linear(4, 4).to(torch.float16))})
    for name in ("0", "2.0", "3"):
        new = model.get_submodule(name)
        assert new.factor.dtype == new.inner.weight.dtype == dtype and new.count.dtype == torch.int64
        assert new.training == new.inner.training == old[name].training
        assert new.factor.requires_grad == new.inner.weight.requires_grad == (name != "3")
    meta = mlp().to("meta")
    swap(meta, {nn.Linear: Scale})
    assert meta[0].factor.is_meta and meta[0].count.is_meta


def test_what_a_new_module_keeps_of_the_old_model_is_not_touched():
    model = mlp()
    model[0].half()
    model[2][0].weight.requires_grad_(False)
    model[2].eval()
    inner = model[2]
    report = swap(model, {"2": Scale, "0": lambda old: Scale(model[3])})
    assert model[2].inner is inner and not inner[0].weight.requires_grad and inner[0].bias.requires_grad
    assert model[0].factor.dtype == torch.float16 and model[0].inner.weight.dtype == torch.float32
    report.undo()
    assert model[2] is inner


def test_the_report_says_what_changed():
    report = swap(mlp(), {"3": lambda old: nn.Linear(8, 3, bias=False)})
    replacement = report.replaced[0]
    assert replacement.missing == ["bias"]
    assert (report.parameters_before, report.parameters_after) == ((139, 139), (136, 136))
    text = str(report)
    assert "3: Linear (27) -> Linear (24); without bias" in text and "parameters 139 -> 136" in text
    report.undo()
    assert "undone" in str(report)


def test_an_example_is_run_before_and_after_without_a_trace():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(5, 4)
    random = torch.get_rng_state()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    swap(model, {nn.Linear: Scale}, example=x).undo()
    swap(model, {nn.Linear: Scale}, example=(x,)).undo()
    swap(model, {nn.Linear: Scale}, example={"input": x}).undo()
    assert torch.equal(torch.get_rng_state(), random) and model.training and model[1].training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Outputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Identity()

    def forward(self, x):
        return self.part({"a": x, "b": (x, [x.sum()])})


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda out: {"a": out["a"]}, r"output had the entries \['a', 'b'\] and has \['a'\]"),
        (lambda out: {**out, "a": out["a"][:1]}, r"output.a was \(2, 3\) float32 on cpu and is \(1, 3\)"),
        (lambda out: {**out, "a": out["a"].double()}, "output.a was .* and is .* float64"),
        (lambda out: {**out, "b": out["b"][:1]}, "output.b had 2 entries and has 1"),
        (lambda out: {**out, "b": (out["b"][0], (1,))}, r"output.b\[1\] was list and is tuple"),
        (lambda out: out["c"], "does not run on example after the replacement: 'c'"),
    ],
)
def test_another_output_is_refused_and_the_model_restored(change, named):
    class Changed(nn.Module):
        def forward(self, out):
            return change(out)

    model = Outputs()
    part = model.part
    with pytest.raises(ValueError, match=named):
        swap(model, {nn.Identity: lambda old: Changed()}, example=torch.ones(2, 3))
    assert model.part is part


def test_errors_name_what_is_wrong_and_change_nothing():
    model = mlp()
    modules = list(model.modules())
    with pytest.raises(ValueError, match=r"nothing in Sequential matches Conv2d where 'a\*'; inside it are .*Linear"):
        swap(model, {nn.Conv2d: Scale}, "a*")
    with pytest.raises(TypeError, match="factory for 0 must return a module, got int"):
        swap(model, {nn.Linear: lambda old: 3})
    with pytest.raises(TypeError, match=r"key must be a subclass of nn\.Module or a glob of names, got 3"):
        swap(model, {3: Scale})
    with pytest.raises(ZeroDivisionError):
        swap(model, {"0": Scale, "3": lambda old: 1 / 0})
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
