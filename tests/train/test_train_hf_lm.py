"""Causal language models of Hugging Face transformers in the loop of grassland's own."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from grassland.archs import CheckpointError, create_model
from grassland.train.__main__ import main
from grassland.train.hf_lm import HuggingFaceLM
from grassland.train.log import read_metrics
from grassland.train.optim import parameter_groups
from grassland.train.sample import load_run
from grassland.train.seeds import seed_everything
from grassland.train.start import run
from grassland.train.tasks import LanguageModeling
from grassland.train.tasks.finetune import encoder_from
from grassland.train.text_model import build_text_model, load_text_model, save_text_model

VOCAB, LENGTH = 30, 12
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2}
MAMBA2 = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 8}
SIZES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba2": {**MAMBA2, "chunk_size": 8},
    "openai-gpt": GPT2,  # it decodes without a cache
}


def build(kind, **more):
    torch.manual_seed(0)
    return build_text_model(f"hf/{kind}", VOCAB, LENGTH, {**SIZES[kind], **more})


def tokens(rows=2, length=LENGTH, seed=1):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def setting(options):
    return tuple(f"{name}={value}" for name, value in options.items())


def losses(folder, event="train"):
    return [entry["loss"] for entry in read_metrics(folder) if entry["event"] == event]


@pytest.fixture
def gpt2(variant):
    """A run with the dropout that the architecture has by default."""
    return lambda **changes: variant(**{"model": "hf/gpt2", "set": setting(GPT2), **changes})


def gpt2_of(model, positions):
    """transformers' own GPT-2 with a model's weights, and zeros for the positions beyond them."""
    config = transformers.GPT2Config(vocab_size=model.config.vocab_size, n_positions=positions, **GPT2, **NO_DROPOUT)
    own = transformers.GPT2LMHeadModel(config)
    weights = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    table = weights["transformer.wpe.weight"]
    weights["transformer.wpe.weight"] = F.pad(table, (0, 0, 0, positions - len(table)))
    own.load_state_dict(weights)
    return own.train()


def test_a_run_logs_the_losses_of_hand_written_steps_with_transformers_own_loss(gpt2, tmp_path):
    """Their labels are the inputs, shifted inside; what is decayed is chosen by name here."""
    options = setting({**GPT2, **NO_DROPOUT})
    config = gpt2(set=options, weight_decay=0.5, schedule="constant", warmup=0, steps=6)
    assert run(LanguageModeling, replace(config, out=str(tmp_path / "run"))) == 0
    seed_everything(config.seed)
    task = LanguageModeling(config, torch.device("cpu"))
    model = gpt2_of(task.model, config.seq_len + 1)
    matrices = [p for n, p in model.named_parameters() if n.endswith(("attn.weight", "proj.weight", "fc.weight"))]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    expected = []
    for _, (inputs, targets) in zip(range(6), task.batches(0), strict=False):
        whole = torch.cat([inputs, targets[:, -1:]], dim=1)
        loss = model(whole, labels=whole).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0] - 0.1


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral"])
def test_labels_are_the_callers_and_some_do_not_count(kind):
    more = {"output_router_logits": True, "router_aux_loss_coef": 0.5} if kind == "mixtral" else NO_DROPOUT
    model = build(kind, **(more if kind != "llama" else {})).train()
    inputs, labels = tokens(), tokens(seed=2)
    labels[0, :5] = -100
    own = model.model(inputs, labels=labels, shift_labels=labels).loss
    torch.testing.assert_close(model(inputs, labels=labels), own)
    logits = model.eval()(inputs).double()
    kept = labels != -100
    summed = -logits.log_softmax(-1)[kept].gather(-1, labels[kept][:, None]).sum()
    torch.testing.assert_close(model(inputs, labels=labels, reduction="sum").double(), summed, rtol=1e-5, atol=0)
    torch.testing.assert_close(model(inputs, labels=labels).double(), summed / kept.sum(), rtol=1e-5, atol=0)


def test_the_balance_of_experts_is_part_of_the_loss_of_training_alone():
    model = build("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    inputs = tokens()
    difference = model.train()(inputs, labels=inputs) - model.eval()(inputs, labels=inputs)
    # Two of four experts a token, about evenly: the balance loss of an even router is 2.
    assert difference.item() == pytest.approx(0.5 * 2, rel=0.1)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_interrupted_run_ends_with_the_very_numbers_of_a_straight_one(kind, variant, assert_resumes):
    config = variant(model=f"hf/{kind}", set=setting(SIZES[kind]), optimizer="muon" if kind == "gpt2" else "adamw")
    assert_resumes(LanguageModeling, config, 6)


@pytest.mark.parametrize("kind", SIZES)
def test_a_saved_model_loads_to_the_same_logits(kind, tmp_path):
    model = build(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_text_model(model, tmp_path, {"task": "lm"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_text_model(tmp_path)
    assert torch.equal(loaded(tokens()), model.eval()(tokens()))
    assert (loaded.config, loaded.training) == (model.config, False)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model = build("gpt2")
    save_text_model(model, tmp_path, {})
    stored = load_file(tmp_path / "model.safetensors")
    assert "transformer.wte.weight" in stored and "lm_head.weight" not in stored
    loaded = load_text_model(tmp_path).train()
    assert loaded.model.lm_head.weight is loaded.model.transformer.wte.weight
    assert sum(tensor.numel() for tensor in stored.values()) == model.num_parameters() == loaded.num_parameters()
    loaded(tokens(), labels=tokens()).backward()
    torch.optim.SGD(loaded.parameters(), lr=1.0).step()
    assert torch.equal(loaded.model.lm_head.weight, loaded.model.transformer.wte.weight)
    assert not torch.equal(loaded.model.lm_head.weight, model.model.lm_head.weight)


def test_untied_weights_are_two(tmp_path):
    model = build("gpt2", tie_word_embeddings=False)
    save_text_model(model, tmp_path, {})
    assert {"transformer.wte.weight", "lm_head.weight"} < load_file(tmp_path / "model.safetensors").keys()
    assert torch.equal(load_text_model(tmp_path)(tokens()), model.eval()(tokens()))
    assert model.num_parameters() == build("gpt2").num_parameters() + VOCAB * 16


def grouped(model):
    names = {id(parameter): name for name, parameter in model.model.named_parameters()}
    return {group: {names[id(p)] for p in members} for group, members in parameter_groups(model).items()}


def test_parameters_go_to_the_groups_of_their_kind():
    groups = grouped(build("gpt2"))
    matrices = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert groups["matrix"] == {f"transformer.h.{layer}.{name}.weight" for layer in range(2) for name in matrices}
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight"} < groups["no_decay"]
    assert groups["decay"] == groups["manifold"] == set()
    untied = grouped(build("llama"))
    assert untied["decay"] == {"lm_head.weight"} and "model.embed_tokens.weight" in untied["no_decay"]
    assert len(untied["matrix"]) == 2 * 7
    # A matrix and three-dimensional vectors by their shapes.
    mamba = build_text_model("hf/mamba", VOCAB, LENGTH, {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4})
    assert mamba.model.backbone.layers[0].mixer.A_log.ndim == 2
    assert "backbone.layers.0.mixer.A_log" in grouped(mamba)["no_decay"]
    rwkv = build_text_model("hf/rwkv", VOCAB, LENGTH, {"hidden_size": 16, "num_hidden_layers": 2})
    assert rwkv.model.rwkv.blocks[0].attention.time_mix_key.shape == (1, 1, 16)
    assert "rwkv.blocks.0.attention.time_mix_key" in grouped(rwkv)["no_decay"]


def test_flops_are_those_of_the_formula_and_of_grasslands_transformer_of_equal_size():
    dim, depth, length = 16, 2, LENGTH
    model = build("gpt2")
    matrices = sum(p.numel() for p in parameter_groups(model)["matrix"])
    assert matrices == depth * 12 * dim * dim
    # A query sees (length + 1) / 2 keys on average, of which it takes a score and a value.
    attention = depth * 2 * 2 * dim * (length + 1) / 2
    expected = 2 * matrices + attention + 2 * VOCAB * dim
    assert model.flops_per_token(length) == expected
    assert model.flops_per_token(length, training=True) == 3 * expected
    sizes = {"dim": dim, "depth": depth, "ffn_dim": 4 * dim, "num_heads": 2, "vocab_size": VOCAB, "max_len": length}
    own = create_model("lm", mixer="attention", head="tied", **sizes)
    assert model.flops_per_token(length) == own.flops_per_token(length)


def test_flops_of_grouped_queries_windows_and_experts():
    def llama(mlps, keys):
        layer = 2 * (2 * 16 * 16 + 2 * 16 * 8 + mlps * 3 * 16 * 24) + 4 * 16 * keys
        return 2 * layer + 2 * VOCAB * 16

    assert build("llama").flops_per_token(LENGTH) == llama(1, (LENGTH + 1) / 2)
    experts = build("mixtral")
    implementation = experts.model.get_experts_implementation()
    assert experts.flops_per_token(LENGTH) == llama(2, (LENGTH + 1) / 2) + 2 * (2 * 16 * 4)
    assert experts.model.get_experts_implementation() == implementation and experts.training
    window = build_text_model("hf/mistral", VOCAB, LENGTH, {**LLAMA, "sliding_window": 4})
    assert window.flops_per_token(LENGTH) == llama(1, sum(min(t + 1, 4) for t in range(LENGTH)) / LENGTH)


def test_the_run_counts_three_forward_passes_a_token(gpt2):
    task = LanguageModeling(gpt2(), torch.device("cpu"))
    before = torch.get_rng_state()
    assert task.flops_per_unit == 3 * task.model.flops_per_token(16)
    assert torch.equal(torch.get_rng_state(), before) and task.model.training


@pytest.mark.parametrize("kind", SIZES)
def test_greedy_text_is_that_of_full_passes_past_the_longest_text(kind):
    model = build(kind).train()
    ids = tokens(rows=3, length=5)
    given = torch.stack(list(model.generate_stream(ids, 20, temperature=0)), dim=1)
    assert model.training
    expected, view = ids, ids
    for _ in range(20):
        view = view if view.shape[1] <= LENGTH else expected[:, -(LENGTH // 2) :]
        with torch.no_grad():
            token = model.eval()(view)[:, -1:].argmax(-1)
        expected, view = torch.cat([expected, token], 1), torch.cat([view, token], 1)
    assert torch.equal(given, expected[:, 5:])
    assert len(given.unique()) > 2


def test_a_run_can_be_sampled_plotted_and_continued_by_command(gpt2, arguments, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main([*arguments(gpt2(steps=4, out=str(folder)))]) == 0
    assert main(["lm", "--resume", str(folder), "--steps", "8"]) == 0
    assert len(losses(folder)) == 8
    assert main(["sample", str(folder), "--prompt", "the cat", "--tokens", "40", "--temperature", "0"]) == 0
    said = capsys.readouterr().out
    assert main(["sample", str(folder), "--prompt", "the cat", "--tokens", "40", "--temperature", "0"]) == 0
    assert capsys.readouterr().out in said
    assert main(["plot", str(folder), "--out", str(tmp_path / "curves.png")]) == 0
    model, _ = load_run(folder)
    (start,) = [entry for entry in read_metrics(folder) if entry["event"] == "start"]
    assert isinstance(model, HuggingFaceLM) and start["parameters"] == model.num_parameters()
    (test,) = losses(folder, "test")
    task = LanguageModeling(gpt2(), torch.device("cpu"))
    assert task.evaluate(model, "test")["loss"] == pytest.approx(test, rel=1e-6)


def test_lm_eval_reads_a_run(gpt2, tmp_path):
    harness = pytest.importorskip("grassland.train.harness", reason="lm-eval is not installed", exc_type=ImportError)
    run(LanguageModeling, gpt2(steps=2, samples=0, out=str(tmp_path / "run")))
    model, tokenizer = load_run(tmp_path / "run")
    judge = harness.GrasslandLM(model, tokenizer)
    assert judge.max_len == 16
    context, continuation = [5, 6, 7], [8, 9]
    ((score, greedy),) = judge._loglikelihood_tokens([(None, context, continuation)])
    log_p = model(torch.tensor([[5, 6, 7, 8]]))[0, 2:].log_softmax(-1).detach()
    assert score == pytest.approx(float(log_p[0, 8] + log_p[1, 9]), rel=1e-5)
    assert greedy == (log_p.argmax(-1).tolist() == continuation)


def test_what_reads_other_kinds_of_models_says_so(tmp_path, capsys):
    save_text_model(build("gpt2"), tmp_path, {"task": "lm"})
    with pytest.raises(CheckpointError, match="a model of kind 'hf', not a text encoder"):
        encoder_from(tmp_path, {}, num_classes=2)
    for command, said in {
        ("inspect", str(tmp_path)): "model must have blocks with residuals, got HuggingFaceLM",
        ("mlm", "--model", "hf/gpt2"): "unknown model 'hf/gpt2'",
    }.items():
        assert main([*command]) == 2
        assert said in capsys.readouterr().err


def test_no_special_token_of_the_architectures_own_is_in_the_way():
    config = build("gpt2").model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    assert build("gpt2", eos_token_id=3).model.config.eos_token_id == 3
    # Token 1 is OPT's padding, whose embedding would never learn.
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"word_embed_proj_dim": 16, "pad_token_id": 1, "tie_word_embeddings": False}
    opt = build_text_model("hf/opt", VOCAB, LENGTH, {**sizes, **more})
    opt(torch.ones(1, 4, dtype=torch.int64), labels=tokens(1, 4)).backward()
    assert opt.model.get_input_embeddings().weight.grad[1].abs().max() > 0


def test_sizes_come_from_the_data_unless_given(gpt2):
    model = LanguageModeling(gpt2(), torch.device("cpu")).model
    assert (model.model.config.vocab_size, model.model.config.n_positions) == (280, 16)
    longer = LanguageModeling(gpt2(set=(*setting(GPT2), "n_positions=40", "vocab_size=320")), torch.device("cpu"))
    assert longer.model.model.transformer.wpe.weight.shape == (40, 16)
    assert (longer.model.config.max_len, longer.model.config.vocab_size) == (40, 320)
    # The names that all architectures have in common.
    common = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 24}
    alike = build_text_model("hf/gpt2", VOCAB, 8, common)
    assert (alike.model.config.n_embd, alike.model.config.n_layer, alike.config.max_len) == (16, 1, 24)
    assert alike.model.transformer.wpe.weight.shape == (24, 16)


def test_a_padded_vocabulary_can_be_sampled(gpt2, tmp_path, capsys):
    folder = tmp_path / "run"
    run(LanguageModeling, gpt2(set=(*setting(GPT2), "vocab_size=320"), steps=2, out=str(folder)))
    assert main(["sample", str(folder), "--tokens", "30", "--temperature", "3"]) == 0


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("gpt3", {}, "unknown model 'hf/gpt3'; did you mean 'hf/gpt"),
        ("gpt2", {"n_emb": 16}, "unknown field of hf/gpt2's config 'n_emb'; did you mean 'n_embd'"),
        ("gpt2", {"dtype": "float16"}, "unknown field of hf/gpt2's config 'dtype'"),
        ("gpt2", {"attn_implementation": "someone/kernel"}, "unknown field of hf/gpt2's config 'attn_implementation'"),
        ("gpt2", {"n_embd": 16, "n_head": 3}, "model hf/gpt2: .*must be divisible"),
        ("gpt2", {"n_embd": "wide"}, "model hf/gpt2: .*n_embd"),
        ("gpt2", {"hidden_size": "wide"}, "model hf/gpt2: .*Field 'n_embd' expected int, got str"),
        ("gpt2", {**GPT2, "vocab_size": 20}, "vocab_size must be at least the data's 30, got 20"),
        ("gpt2", {**GPT2, "n_positions": 4}, "hf/gpt2: input_ids reach length 12, but the model has 4 positions"),
        ("gemma3", {}, "hf/gemma3 is not one for text alone"),
        ("bert", {**{k: v for k, v in LLAMA.items() if "key" not in k}, "is_decoder": False}, "bert is not causal"),
    ],
)
def test_what_cannot_be_built_is_named(name, options, said):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        build_text_model(f"hf/{name}", VOCAB, LENGTH, options)


def test_bert_as_a_decoder_is_causal():
    sizes = {name: value for name, value in LLAMA.items() if "key" not in name}
    model = build_text_model("hf/bert", VOCAB, LENGTH, sizes).eval()
    ids, other = tokens(), tokens()
    other[:, 7:] = (other[:, 7:] + 1) % VOCAB
    torch.testing.assert_close(model(ids)[:, :7], model(other)[:, :7])


def test_bad_input_is_named():
    model = build("gpt2")
    with pytest.raises(ValueError, match="input_ids reach length 13, but the model has 12 positions"):
        model(tokens(length=13))
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, 30\), got values from 30 to 30"):
        model(torch.full((1, 3), 30))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 30\)"):
        model(tokens(), labels=tokens() + 20)
    with pytest.raises(ValueError, match=r"labels must have input_ids' shape \(2, 12\), got \(2, 11\)"):
        model(tokens(), labels=tokens()[:, 1:])
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'none'"):
        model(tokens(), labels=tokens(), reduction="none")
    with pytest.raises(ValueError, match="max_new_tokens must be an integer of at least 0, got -1"):
        model.generate_stream(tokens(), -1)


def test_without_transformers_the_error_says_what_to_install(tmp_path, monkeypatch):
    save_text_model(build("gpt2"), tmp_path, {})
    monkeypatch.setitem(sys.modules, "transformers", None)
    for action in (lambda: build("gpt2"), lambda: load_text_model(tmp_path)):
        with pytest.raises(ValueError, match=r"transformers is not installed: pip install 'grassland\[hf\]'") as caught:
            action()
        assert not isinstance(caught.value, CheckpointError)


def test_damage_is_named(tmp_path):
    save_text_model(build("gpt2"), tmp_path, {})
    weights, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    save_file({name: weights[name] for name in list(weights)[1:]}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors: 1 tensors are missing"):
        load_text_model(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    # What would have transformers fetch code from elsewhere is no field of a config.
    config["model"]["options"]["attn_implementation"] = "someone/kernel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config.json: unknown field of hf/gpt2's config 'attn_implementation'"):
        load_text_model(tmp_path)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(mode, gpt2, arguments, launch, tmp_path):
    config = gpt2(set=setting({**GPT2, **NO_DROPOUT}), steps=4)
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert run(LanguageModeling, replace(config, out=str(alone))) == 0
    launch(2, *arguments(config, out=str(together), parallel=mode))
    for event in ("train", "valid", "test"):
        assert losses(together, event) == pytest.approx(losses(alone, event), rel=1e-4)
    assert load_file(together / "model.safetensors").keys() == load_file(alone / "model.safetensors").keys()
    loaded = load_text_model(together)
    assert loaded.model.lm_head.weight is loaded.model.transformer.wte.weight
