import json

import pytest
import torch

from grassland.archs import CheckpointError, create_model, save_model
from grassland.train.inspect import compare, inspect, measure, plot

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


def test_runs_side_by_side(tmp_path):
    pytest.importorskip("matplotlib")
    folders = [tmp_path / "a" / "mhc", tmp_path / "a" / "kromhc", tmp_path / "a" / "plain"]
    for folder in folders:
        save_model(model_with(folder.name, std=3.0), folder)
    runs = compare(folders, tmp_path / "out")
    assert list(runs) == ["mhc", "kromhc", "plain"]
    for folder in folders:
        assert json.loads((tmp_path / "out" / f"inspect-{folder.name}.json").read_text()) == runs[folder.name]
        assert runs[folder.name] == inspect(folder)
    assert runs["mhc"][-1]["product_deviation"] > 100 * runs["kromhc"][-1]["product_deviation"]
    assert (tmp_path / "out" / "inspect.png").stat().st_size > (folders[0] / "inspect.png").stat().st_size / 2


def test_picture_has_a_legend_entry_for_each_run(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    shown = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: shown.append(self))
    runs = {name: measure(model_with(name), torch.zeros(1, 4, dtype=torch.int64)) for name in ("mhc", "kromhc")}
    plot(runs, tmp_path / "x.png")
    plot({"mhc": runs["mhc"]}, tmp_path / "x.png")
    several, one = ([[t.get_text() for t in a.get_legend().get_texts()] for a in f.axes] for f in shown)
    assert several == [["mhc", "kromhc"]] * 4
    streams = [f"mhc: {k}" for k in range(4)]
    assert one == [["mhc"], ["mhc"], streams, streams]
    lines = [line.get_ydata() for line in shown[0].axes[2].lines]
    assert [list(line) for line in lines[:4]] == [[r["stream_norms"][k] for r in runs["mhc"]] for k in range(4)]


def test_runs_of_one_name_are_told_apart_and_repeated_ones_refused(tmp_path):
    pytest.importorskip("matplotlib")
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run"]
    for folder in folders:
        save_model(model_with("plain"), folder)
    assert list(compare(folders, tmp_path / "out")) == ["x/run", "y/run"]
    assert (tmp_path / "out" / "inspect-y-run.json").exists()
    for wrong in ([], [folders[0], folders[0]]):
        with pytest.raises(ValueError, match="folders must be one or more different runs"):
            compare(wrong, tmp_path)


def test_one_unreadable_run_writes_nothing(tmp_path):
    save_model(model_with("plain"), tmp_path / "good")
    with pytest.raises(CheckpointError, match="bad"):
        compare([tmp_path / "good", tmp_path / "bad"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path, capsys, monkeypatch):
    from grassland.train.__main__ import main

    for name in ("kromhc", "mhc"):
        save_model(model_with(name), tmp_path / name)
    assert main(["inspect", str(tmp_path / "kromhc")]) == 0
    assert (tmp_path / "kromhc" / "inspect.png").stat().st_size > 1000
    assert (tmp_path / "kromhc" / "inspect.json").exists()
    assert "kromhc: 4 sublayers" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "kromhc", "mhc"]) == 0
    assert (tmp_path / "inspect.png").stat().st_size > 1000 and (tmp_path / "inspect-mhc.json").exists()
    said = capsys.readouterr().out
    assert "kromhc: 4 sublayers" in said and "mhc: 4 sublayers" in said
    assert main(["inspect"]) == 2
    assert "folders must be" in capsys.readouterr().err
