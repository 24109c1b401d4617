"""Generation: sampling options, ragged batches, streaming, the sliding window."""

import pytest
import torch

from grassland.archs import create_model, sampling
from grassland.archs.sampling import Sampling

SIZES = {"vocab_size": 23, "max_len": 16, "dim": 16, "depth": 2, "ffn_dim": 24, "dtype": torch.float64}


@pytest.fixture(params=["grassmann", "attention"])
def model(request):
    torch.manual_seed(0)
    options = {"rank": 5, "offsets": ((1,), (3, 4))} if request.param == "grassmann" else {"num_heads": 2}
    model = create_model("lm", mixer=request.param, dropout=0.5, **options, **SIZES)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def prompt(*shape):
    return torch.randint(SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(3))


def greedy_by_full_passes(model, ids, steps):
    """What `generate` documents, without a state: past max_len a row keeps the newest half."""
    start = 0
    with torch.no_grad():
        for _ in range(steps):
            if ids.shape[1] - start > SIZES["max_len"]:
                start = ids.shape[1] - SIZES["max_len"] // 2
            ids = torch.cat([ids, model(ids[:, start:])[:, -1:].argmax(-1)], dim=1)
    return ids


def test_greedy_equals_full_passes_within_and_past_the_window(model):
    ids = prompt(1, 5)
    found = model.train().generate(ids, 40, temperature=0)
    assert model.training
    assert torch.equal(found, greedy_by_full_passes(model.eval(), ids, 40))


def test_a_full_window_goes_on_from_its_newest_half(model, monkeypatch):
    encoded, decode = [], model.decode

    def recording(ids, state, lengths=None):
        encoded.append(ids)
        return decode(ids, state, lengths)

    monkeypatch.setattr(model, "decode", recording)
    found = model.generate(prompt(1, 15), 12)
    assert [ids.shape[1] for ids in encoded] == [15, 1, 8, *[1] * 8, 8]
    assert torch.equal(encoded[2], found[:, 9:17]) and torch.equal(encoded[-1], found[:, 18:26])


def test_a_prompt_longer_than_the_window_continues_from_its_end(model):
    ids = prompt(1, 30)
    found = model.generate(ids, 3, temperature=0)
    assert torch.equal(found[:, 30:], model.generate(ids[:, 14:], 3, temperature=0)[:, 16:])


def test_a_ragged_batch_gives_what_each_prompt_gives_alone(model):
    ids, lengths = prompt(4, 9), torch.tensor([2, 9, 5, 1])
    ids[0, 2:] = -1  # whatever stands in the padding does not matter
    together = model.generate(ids, 30, temperature=0, prompt_lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model.generate(ids[row : row + 1, :length], 30, temperature=0)
        assert torch.equal(together[row, : length + 30], alone[0])
        assert (together[row, length + 30 :] == 0).all()


def test_stream_yields_what_generate_returns(model):
    ids = prompt(2, 4)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    whole = model.generate(ids, 20, top_k=5, temperature=0.8, generator=generators[0])
    pieces = list(model.generate_stream(ids, 20, top_k=5, temperature=0.8, generator=generators[1]))
    assert torch.equal(whole[:, 4:], torch.stack(pieces, dim=1))
    assert not torch.equal(whole, model.generate(ids, 20, generator=torch.Generator().manual_seed(6)))


def test_closing_a_stream_restores_training_mode(model):
    steps = model.train().generate_stream(prompt(1, 3), 5)
    next(steps)
    assert torch.is_grad_enabled()
    steps.close()
    assert model.training


def test_generating_leaves_each_module_in_its_mode(model):
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    model.generate(prompt(1, 3), 2)
    assert [module.training for module in model.modules()] == modes


def test_eos_ends_a_row_and_then_the_batch(model):
    ids = prompt(2, 3)
    free = model.generate(ids, 12, temperature=0)[:, 3:]
    eos = int(free[0, 4])
    ended = model.generate(ids, 12, temperature=0, eos_id=eos)[:, 3:]
    for row in range(2):
        hits = (free[row] == eos).nonzero()
        stop = int(hits[0]) if len(hits) else 11
        stop = min(stop, ended.shape[1] - 1)
        assert torch.equal(ended[row, : stop + 1], free[row, : stop + 1])
        assert (ended[row, stop + 1 :] == eos).all()
    only = model.generate(ids[:1], 12, temperature=0, eos_id=eos)
    assert only.shape[1] == 3 + int((free[0] == eos).nonzero()[0]) + 1


def test_no_new_tokens_returns_the_prompt(model):
    ids = prompt(2, 3)
    assert torch.equal(model.generate(ids, 0), ids)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, ("temperature", "-1")),
        ({"temperature": float("nan")}, ("temperature", "nan")),
        ({"top_k": 0}, ("top_k", "0")),
        ({"top_p": 0.0}, ("top_p", "0.0")),
        ({"top_p": 1.5}, ("top_p", "1.5")),
        ({"eos_id": 23}, ("eos_id", "23")),
        ({"prompt_lengths": torch.tensor([0, 2])}, ("prompt_lengths", "[0, 2]")),
        ({"prompt_lengths": torch.tensor([1, 4])}, ("prompt_lengths", "[1, 4]")),
        ({"max_new_tokens": -1}, ("max_new_tokens", "-1")),
    ],
)
def test_bad_options_name_themselves_before_the_first_step(model, options, words):
    with pytest.raises(ValueError) as caught:
        model.generate_stream(prompt(2, 3), **{"max_new_tokens": 1, **options})
    assert all(word in str(caught.value) for word in words), str(caught.value)


LOGITS = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]),
        ({"temperature": 0.5}, [[0.25, 0.0625, 0.0225, 0.01], [0.01, 0.04, 0.09, 0.16]]),
        ({"top_k": 2}, [[0.5, 0.25, 0, 0], [0, 0, 0.3, 0.4]]),
        ({"top_k": 9}, [[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]),
        ({"top_p": 0.45}, [[1, 0, 0, 0], [0, 0, 0.3, 0.4]]),
        ({"top_p": 0.8}, [[0.5, 0.25, 0.15, 0], [0, 0.2, 0.3, 0.4]]),
        ({"top_p": 1e-9}, [[1, 0, 0, 0], [0, 0, 0, 1]]),
        ({"top_k": 2, "top_p": 0.6}, [[1, 0, 0, 0], [0, 0, 0.3, 0.4]]),
    ],
)
def test_sampled_distribution(options, expected):
    expected = torch.tensor(expected, dtype=torch.float32)
    found = Sampling(**options).probabilities(LOGITS)
    torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True))


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    draws = Sampling(top_k=2)(LOGITS[:1].expand(4000, -1), generator)
    assert set(draws.tolist()) == {0, 1}
    assert (draws == 0).float().mean().item() == pytest.approx(2 / 3, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_draws_of_many_rows(dtype):
    """Of as many rows as draws: what is impossible never comes, at either end; the rest as often as it should."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([-torch.inf, 0, 1, -torch.inf, 2, -torch.inf], dtype=dtype)
    counts = Sampling()(logits.expand(20000, -1), generator).bincount(minlength=6)
    expected = 20000 * logits.double().softmax(-1)
    assert (counts - expected).square().div(expected.clamp_min(1e-9)).sum() < 13.8  # chi squared, 2 degrees: p = 0.001


@pytest.mark.parametrize(("level", "expected"), [(0.0, [1, 0, 0]), (1 - 2**-53, [2, 0, 2])])
def test_the_first_and_the_last_draw_are_possible(monkeypatch, level, expected):
    monkeypatch.setattr(torch, "rand", lambda shape, dtype, generator: torch.full(shape, level, dtype=dtype))
    rows = [[-torch.inf, 0.1, 0.7, -torch.inf], [3.0, -torch.inf, -torch.inf, -torch.inf], [0.3, 0.3, 0.3, -torch.inf]]
    assert Sampling()(torch.tensor(rows)).tolist() == expected


def test_a_level_that_rounds_to_the_whole_mass_draws_the_last(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, dtype, generator: torch.ones(shape, dtype=dtype))
    assert Sampling()(torch.tensor([[0.1, 0.7, -torch.inf]])).tolist() == [1]


@pytest.mark.parametrize("top_p", [None, 0.5])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, [-torch.inf, -torch.inf]])
def test_logits_that_are_no_distribution(wrong, top_p):
    logits = torch.zeros(3, 2)
    logits[1] = torch.as_tensor(wrong)
    with pytest.raises(ValueError, match="logits must be finite or -inf"):
        Sampling(top_p=top_p)(logits)


def test_top_p_takes_no_token_more_once_the_mass_is_reached():
    found = Sampling(top_p=0.5).probabilities(torch.tensor([[2.0, 2.0, 2.0, 2.0]]))
    assert found.tolist() == [[0.5, 0.5, 0, 0]]


def take_while(row: list[float], top_p: float) -> list[float]:
    """The most likely first, of equally likely ones the first, until they have the mass."""
    kept, mass = [0.0] * len(row), 0.0
    for i in sorted(range(len(row)), key=lambda i: -row[i]):
        if mass >= top_p:
            break
        kept[i] = row[i]
        mass += row[i]
    return [value / mass for value in kept]


@pytest.mark.parametrize("top_k", [None, 40])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("way", ["cpu", "gpu"])
def test_top_p_is_its_definition(way, dtype, top_p, top_k, monkeypatch):
    if way == "gpu":
        monkeypatch.setattr(sampling, "_nucleus_by_row", sampling._nucleus_by_sort)
    torch.manual_seed(0)
    logits = torch.randn(6, 300, requires_grad=True) * torch.tensor([0.1, 0.5, 1, 2, 4, 8])[:, None]
    logits = (8 * logits).round().div(8).to(dtype)  # many are equal
    found = Sampling(top_k=top_k, top_p=top_p).probabilities(logits)
    given = Sampling(top_k=top_k).probabilities(logits).double().tolist()
    expected = torch.tensor([take_while(row, top_p) for row in given], dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    alone = [Sampling(top_k=top_k, top_p=top_p).probabilities(row) for row in logits.split(1)]
    assert torch.equal(torch.cat(alone), found)
    assert found.requires_grad
