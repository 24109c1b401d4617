import json

import pytest
import torch

from grassland.archs import create_model, save_model
from grassland.train.inspect import inspect, measure

SIZES = {"vocab_size": 40, "dim": 16, "depth": 2, "ffn_dim": 32, "max_len": 8, "rank": 4, "offsets": (1, 2)}


def model_with(residual, std=1.0):
    torch.manual_seed(0)
    model = create_model("lm", residual=residual, norm="pre", **SIZES)
    for name, parameter in model.named_parameters():
        if "dynamic" in name or "static" in name or "scale" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


@pytest.mark.parametrize("residual", ["plain", "hc", "mhc", "mhc_lite", "kromhc"])
def test_every_residual_gets_a_picture(residual, tmp_path):
    pytest.importorskip("matplotlib")
    save_model(model_with(residual), tmp_path / "run")
    layers = inspect(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "inspect.png").stat().st_size > 5000
    assert json.loads((tmp_path / "out" / "inspect.json").read_text()) == layers
    streams = 1 if residual == "plain" else 4
    assert [layer["layer"] for layer in layers] == [0, 1, 2, 3]
    assert all(len(layer["stream_norms"]) == len(layer["eigenvalues"]) == streams for layer in layers)


def test_exactness_is_told_from_sinkhorns_error_and_from_nothing_at_all():
    ids = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(1))
    kromhc, mhc, hc = (measure(model_with(r, std=3.0), ids) for r in ("kromhc", "mhc", "hc"))
    assert all(layer["deviation"] <= 4 * torch.finfo(torch.float32).eps for layer in kromhc)
    assert all(layer["eigenvalues"][0] == pytest.approx(1, abs=1e-6) for layer in kromhc)
    assert max(layer["deviation"] for layer in mhc) > 100 * max(layer["deviation"] for layer in kromhc)
    assert hc[-1]["product_deviation"] > 0.1


def test_the_plain_residual_is_the_identity():
    layers = measure(model_with("plain"), torch.zeros(1, 4, dtype=torch.int64))
    assert all(layer["deviation"] == layer["product_deviation"] == 0 for layer in layers)


def test_a_model_without_residuals_says_so():
    with pytest.raises(ValueError, match="Linear"):
        measure(torch.nn.Linear(2, 2), torch.zeros(1, 4))


def test_command_line(tmp_path, capsys):
    from grassland.train.__main__ import main

    save_model(model_with("kromhc"), tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert (tmp_path / "inspect.png").stat().st_size > 1000
    assert "4 sublayers" in capsys.readouterr().out
