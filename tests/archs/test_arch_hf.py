"""grassland's models behind transformers' interface."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")

import grassland.archs.interop.hf as hf
from grassland.archs import CheckpointError, create_model, load_model, save_model
from grassland.archs.heads import reproject_
from grassland.train.optim import parameter_groups

IDS = torch.tensor([[3, 7, 1, 9, 4, 4, 2], [2, 2, 8, 30, 1, 6, 11]])
VARIANTS = {
    "grassmann": {"rank": 4, "offsets": (1, 2)},
    "attention": {"mixer": "attention", "num_heads": 2, "head": "linear"},
    "kromhc-shared-moe": {
        "residual": "kromhc", "ffn": "shared_moe", "share": ("mixer", "ffn"), "rank": 4, "offsets": ((1,), (2,)),
        "num_experts": 3, "dropout": 0.1,
    },
    "grassmann-head": {"rank": 4, "offsets": (1, 2), "head": "grassmann", "subspace_dim": 2},
}  # fmt: skip


def lm(name="grassmann", **more):
    torch.manual_seed(0)
    sizes = {"dim": 16, "depth": 2, "ffn_dim": 32, "vocab_size": 50, "max_len": 32, "norm": "pre"}
    return create_model("lm", **{**sizes, **VARIANTS[name], **more}).eval()


def sharp(name):
    """A model whose continuations differ: other weights than those it starts with, which all give one token."""
    model = lm(name)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return reproject_(model)


def vision(**more):
    torch.manual_seed(0)
    sizes = {"dim": 16, "depth": 2, "ffn_dim": 32, "image_size": 8, "patch_size": 4, "num_classes": 5, "num_heads": 2}
    return create_model("vision", **sizes, **more).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_folder_is_a_hugging_face_folder_and_back(name, tmp_path):
    model = lm(name)
    save_model(model, tmp_path / "run", extra={"task": "lm", "run": {"seed": 0}})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert type(loaded) is hf.GrasslandForCausalLM and not loaded.training
    assert torch.equal(loaded(IDS).logits, model(IDS))
    loaded.save_pretrained(tmp_path / "out")
    stored, first = (load_file(tmp_path / place / "model.safetensors") for place in ("out", "run"))
    assert stored.keys() == first.keys() and all(torch.equal(stored[key], first[key]) for key in stored)
    assert sum(t.numel() for t in stored.values()) == model.num_parameters()
    assert torch.equal(load_model(tmp_path / "out")(IDS), model(IDS))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(IDS).logits, model(IDS)) and again.config.own() == model.config
    assert json.loads((tmp_path / "out" / "config.json").read_text())["run"] == {"seed": 0}
    sizes = again.config.vocab_size, again.config.hidden_size, again.config.num_hidden_layers
    assert (*sizes, again.config.max_position_embeddings) == (50, 16, 2, 32)


@pytest.mark.parametrize("name", VARIANTS)
def test_loaded_parameters_go_to_the_optimiser_groups_they_were_in(name, tmp_path):
    model = lm(name)
    save_model(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours, theirs = parameter_groups(model), parameter_groups(loaded)
    assert {k: [p.shape for p in v] for k, v in ours.items()} == {k: [p.shape for p in v] for k, v in theirs.items()}
    assert all(p.subspace_dim == 2 for p in theirs["manifold"]) and bool(theirs["manifold"]) == (name[-4:] == "head")


def test_a_loaded_model_has_counted_no_tokens(tmp_path, monkeypatch):
    save_model(lm("kromhc-shared-moe"), tmp_path)
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kw: torch.Tensor.fill_(empty(*args, **kw), 7))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.blocks[0].ffn.branch.tally.tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("name", VARIANTS)
def test_generate_with_the_state_gives_what_it_gives_without(name):
    model = lm(name)
    wrapped = hf.GrasslandForCausalLM.wrap(model)
    own = model.generate(IDS, max_new_tokens=9, temperature=0)
    options = {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(wrapped.generate(IDS, **options), own)
    assert torch.equal(wrapped.generate(IDS, use_cache=False, **options), own)
    beams = [wrapped.generate(IDS, num_beams=3, use_cache=use, **options) for use in (True, False)]
    assert torch.equal(*beams)
    sampled = wrapped.generate(IDS, do_sample=True, num_return_sequences=2, max_new_tokens=3)
    assert sampled.shape == (4, 10)


@pytest.mark.parametrize("name", VARIANTS)
def test_generate_goes_on_from_a_cache_of_what_it_has_generated(name):
    wrapped = hf.GrasslandForCausalLM.wrap(sharp(name))
    options = {"max_new_tokens": 4, "do_sample": False}
    first = wrapped.generate(IDS, return_dict_in_generate=True, **options)
    more = torch.cat([first.sequences, IDS[:, :2]], 1)
    assert torch.equal(wrapped.generate(more, cache=first.cache, **options), wrapped.generate(more, **options))
    assert first.cache.get_seq_length() == more.shape[1] + 3 and not first.cache.is_croppable
    first.cache.reset()
    assert first.cache.get_seq_length() == 0
    assert torch.equal(wrapped.generate(IDS, cache=first.cache, **options), first.sequences)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_routed_in_training(side):
    """Neither do experts have less room, nor is there more to balance."""
    wrapped = hf.GrasslandForCausalLM.wrap(lm("kromhc-shared-moe", noise=False, capacity_factor=2.0).train())
    wrapped.model.apply(lambda m: setattr(m, "p", 0.0) if isinstance(m, torch.nn.Dropout) else None)
    experts = wrapped.model.blocks[0].ffn.branch
    experts.dropout = 0.0
    ids = IDS[:1, :4]
    alone = wrapped(ids, labels=ids).loss
    assert experts.routing.counts.sum() == 2 * 4
    extra = torch.full((1, 3), 49)
    both = torch.cat((extra, ids) if side == "left" else (ids, extra), 1)
    mask = both != 49
    labels = both.masked_fill(~mask | (both == ids[0, 0]), -100)  # nothing stands before the first token
    padded = wrapped(both, attention_mask=mask.int(), labels=labels)
    assert torch.allclose(padded.loss, alone, rtol=1e-5) and experts.routing.counts.sum() == 2 * 4


@pytest.mark.parametrize("name", ["grassmann", "attention"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(name, side):
    wrapped = hf.GrasslandForCausalLM.wrap(lm(name))
    left = side == "left"
    mask = torch.ones_like(IDS)
    mask[1, slice(0, 3) if left else slice(4, 7)] = 0
    inside = slice(3, 7) if left else slice(0, 4)
    padded = torch.where(mask.bool(), IDS, 49)
    alone = wrapped(IDS[1:, inside]).logits
    for use in (False, True):
        logits = wrapped(padded, attention_mask=mask, use_cache=use).logits
        assert torch.allclose(logits[1:, inside], alone, atol=1e-5)
        assert torch.allclose(logits[:1], wrapped(IDS[:1]).logits, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_are_continued_as_they_are_alone(name, side):
    wrapped = hf.GrasslandForCausalLM.wrap(sharp(name))
    mask = torch.ones_like(IDS)
    mask[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    padded = torch.where(mask.bool(), IDS, 49)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    alone = [wrapped.generate(row[keep.bool()][None], **options)[0, -5:] for row, keep in zip(IDS, mask, strict=True)]
    for use in (True, False):
        both = wrapped.generate(padded, attention_mask=mask, use_cache=use, **options)
        assert torch.equal(both[:, :7], padded) and torch.equal(both[:, 7:], torch.stack(alone))


def test_prompts_without_padding_are_decoded_as_such(monkeypatch):
    wrapped = hf.GrasslandForCausalLM.wrap(sharp("grassmann"))
    calls, features = [], wrapped.model._features
    monkeypatch.setattr(wrapped.model, "_features", lambda *args: calls.append(args[2:]) or features(*args))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wrapped.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    assert calls == [()] * 4
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    wrapped.generate(IDS, attention_mask=mask, **options)
    assert [len(lengths) for lengths in calls[4:]] == [1, 0, 0, 0]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("size", [1, 3])
def test_left_padding_in_chunks_changes_nothing(name, size):
    wrapped = hf.GrasslandForCausalLM.wrap(sharp(name))
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    expected, cache, parts = wrapped(IDS, attention_mask=mask).logits, None, []
    for start in range(0, 7, size):
        end = min(start + size, 7)
        output = wrapped(IDS[:, start:end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
        cache, parts = output.cache, [*parts, output.logits]
    assert torch.allclose(torch.cat(parts, 1)[mask.bool()], expected[mask.bool()], atol=1e-5)


def test_the_auxiliary_loss_has_its_labels_share_of_the_items():
    wrapped = hf.GrasslandForCausalLM.wrap(
        lm("kromhc-shared-moe", noise=False, balance_weight=1.0, dropout=0.0)
    ).train()
    labels = IDS.clone()
    labels[0, :5] = -100
    count, items = 2 + 6, 20
    mean = wrapped(IDS, labels=labels).loss
    assert mean > wrapped.eval()(IDS, labels=labels).loss + 1
    shared = wrapped.train()(IDS, labels=labels, num_items_in_batch=torch.tensor(items)).loss
    assert torch.allclose(shared, mean * count / items)
    nothing = wrapped(IDS, labels=torch.full_like(IDS, -100), num_items_in_batch=items).loss
    assert nothing == 0


@pytest.mark.parametrize("batch", [8, 1])
def test_the_trainers_accumulation_leaves_the_loss_as_it_is(tmp_path, batch):
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in IDS[:1].repeat(8, 1)]
    options = {"noise": False, "capacity_factor": None, "balance_weight": 1.0, "dropout": 0.0}
    wrapped = hf.GrasslandForCausalLM.wrap(lm("kromhc-shared-moe", **options)).train()
    expected = wrapped(IDS[:1], labels=IDS[:1]).loss.item()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch,
        max_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    loss = transformers.Trainer(wrapped, arguments, train_dataset=rows).train().training_loss
    assert loss == pytest.approx(expected, rel=1e-5)


def test_the_loss_shifts_labels_and_counts_items():
    model = lm()
    wrapped = hf.GrasslandForCausalLM.wrap(model)
    labels = IDS.clone()
    labels[0, :3] = -100
    output = wrapped(IDS, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(output.loss, expected)
    assert torch.allclose(wrapped(IDS, labels=labels, num_items_in_batch=5).loss, expected * 10 / 5)
    assert wrapped(IDS, logits_to_keep=1).logits.shape == (2, 1, 50)
    trained = wrapped.train()(IDS, labels=labels)
    assert trained.logits is None and trained.cache is None
    moe = hf.GrasslandForCausalLM.wrap(lm("kromhc-shared-moe")).train()
    loss, plain = moe(IDS, labels=IDS).loss, moe.eval()(IDS, labels=IDS).loss
    assert loss.item() > plain.item() - 1 and wrapped(IDS, return_dict=False, use_cache=False)[0].shape == (2, 7, 50)


def test_the_base_model_gives_features(tmp_path):
    model = lm()
    save_model(model, tmp_path / "lm")
    base = transformers.AutoModel.from_pretrained(tmp_path / "lm")
    assert torch.equal(base.model.head.logits(base(IDS).last_hidden_state), model(IDS))
    sizes = {"dim": 16, "depth": 1, "ffn_dim": 16, "embed_dim": 8, "vocab_size": 50, "max_len": 16, "norm": "pre"}
    encoder = create_model("mlm", **sizes, num_heads=2).eval()
    save_model(encoder, tmp_path / "mlm")
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    features = transformers.AutoModel.from_pretrained(tmp_path / "mlm")(IDS, attention_mask=mask).last_hidden_state
    assert torch.equal(features, encoder.features(IDS, mask=mask.bool())[0])
    with pytest.raises(ValueError, match="mixer 'grassmann' takes no mask"):
        create_model("mlm", **sizes, mixer="grassmann", pooler=False, rank=4, offsets=(1,))(IDS, mask=mask.bool())
    images = torch.randn(2, 3, 8, 8)
    save_model(vision(), tmp_path / "vision")
    pooled = transformers.AutoModel.from_pretrained(tmp_path / "vision")(pixel_values=images).pooler_output
    assert torch.equal(pooled, vision().features(images)[0])


@pytest.mark.parametrize("more", [{}, {"ffn": "shared_moe", "share": ("mixer", "ffn"), "head": "grassmann"}])
def test_an_image_classifier_round_trips(tmp_path, more):
    model, images, labels = vision(**more), torch.randn(2, 3, 8, 8), torch.tensor([1, 4])
    save_model(model, tmp_path / "run")
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    output = loaded(images, labels=labels)
    assert torch.equal(output.logits, model(images)) and torch.equal(output.loss, model(images, labels))
    assert loaded.config.num_labels == 5 and loaded.config.image_size == 8
    loaded.save_pretrained(tmp_path / "out")
    assert torch.equal(load_model(tmp_path / "out")(images), model(images))


@pytest.mark.parametrize("kind", ["lm", "vision"])
def test_the_trainer_trains_saves_and_resumes(tmp_path, kind, monkeypatch):
    pytest.importorskip("accelerate")
    if kind == "lm":
        rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
        wrapped = hf.GrasslandForCausalLM.wrap(lm("kromhc-shared-moe")).train()
    else:
        rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": torch.tensor(i % 5)} for i in range(8)]
        wrapped = hf.GrasslandForImageClassification.wrap(vision()).train()
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    options = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none",
        "use_cpu": True, "save_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(max_steps=1, **options)
    trainer = transformers.Trainer(wrapped, arguments, train_dataset=rows, eval_dataset=rows)
    assert trainer.train().global_step == 1
    moved = {name for name, p in wrapped.named_parameters() if not torch.equal(p, before[name])}
    assert len(moved) > 0.5 * len(before)
    assert trainer.evaluate()["eval_loss"] > 0
    checkpoint = tmp_path / "checkpoint-1"
    inputs = IDS if kind == "lm" else torch.stack([row["pixel_values"] for row in rows])
    assert torch.equal(load_model(checkpoint)(inputs), wrapped.eval()(inputs).logits)
    fresh = type(wrapped)(wrapped.config).train()
    arguments = transformers.TrainingArguments(max_steps=2, **options)
    second = transformers.Trainer(fresh, arguments, train_dataset=rows)
    seen = {}
    monkeypatch.setattr(second, "training_step", lambda model, *_: seen.setdefault("model", model) and torch.zeros(()))
    second.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(p, wrapped.get_parameter(name)) for name, p in seen["model"].named_parameters())


def test_a_fresh_model_is_drawn_as_ours_is():
    config = hf.GrasslandConfig.of(lm("kromhc-shared-moe").config)
    torch.manual_seed(0)
    fresh = transformers.AutoModelForCausalLM.from_config(config)
    assert all(
        torch.equal(p, fresh.model.get_parameter(name)) for name, p in lm("kromhc-shared-moe").named_parameters()
    )


def test_dtype_is_kept_and_can_be_chosen(tmp_path):
    save_model(lm().to(torch.bfloat16), tmp_path)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_the_tokenizer_of_a_run_is_found(tmp_path):
    from grassland.train.data import save_tokenizer
    from grassland.train.data.tokenizer import train_bpe

    save_model(lm(), tmp_path)
    save_tokenizer(train_bpe("the cat sees the moon " * 20, 270), tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("the moon")["input_ids"]) == "the moon"


def test_errors_name_what_is_wrong(tmp_path):
    wrapped = hf.GrasslandForCausalLM.wrap(lm())
    with pytest.raises(ValueError, match="GrasslandForCausalLM is for kind lm, got 'vision'"):
        hf.GrasslandForCausalLM.wrap(vision())
    with pytest.raises(ValueError, match="got Linear without one"):
        hf.GrasslandModel.wrap(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="unknown mixer 'atention'"):
        hf.GrasslandConfig(model={"mixer": "atention"})
    with pytest.raises(ValueError, match="cache must be a GrasslandCache, got DynamicCache"):
        wrapped(IDS, cache=transformers.DynamicCache())
    with pytest.raises(ValueError, match="the vocabulary is part of the model's config"):
        wrapped.resize_token_embeddings(60)
    with pytest.raises(ValueError, match=r"labels must have input_ids' shape \(2, 7\)"):
        wrapped(IDS, labels=IDS[:, :3])
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 7\) for 0 tokens in the cache .*got \(2, 4\)"):
        wrapped(IDS, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="input_ids must be given"):
        wrapped()
    save_model(lm(), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["model"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="missing keys: "):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_missing_library_is_named():
    code = "import sys; sys.modules['transformers'] = None; import grassland.archs.interop.hf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "grassland.archs.interop.hf needs transformers: pip install 'grassland[hf]'" in done.stderr
