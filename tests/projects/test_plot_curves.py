import json

import pytest
from helpers import load_script

script = load_script("projects/StrategyComparison/plot_curves.py")


def write_run(folder):
    folder.mkdir()
    lines = [
        {"iteration": 19, "loss_cls": 0.9, "time": 0.1},
        {"iteration": 39, "loss_cls": 0.5},
        {"iteration": 19, "loss_cls": 0.8},  # resumed from an earlier checkpoint
        {"iteration": 20, "bbox/AP": 10.0, "bbox/AP50": 30.0},
        {"iteration": 39, "loss_cls": 0.4},
        {"iteration": 40, "bbox/AP": 20.0},
    ]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)) + "\n")


def test_curves_of_runs_are_read_and_drawn(tmp_path, monkeypatch, capsys):
    folder, picture = tmp_path / "run", tmp_path / "out" / "curves.png"
    write_run(folder)
    assert script.read_curves(folder, ["AP", "loss_cls", "loss_carl"]) == {
        "AP": {20: 10.0, 40: 20.0},
        "loss_cls": {19: 0.8, 39: 0.4},
    }
    words = [str(folder), "--output", str(picture), "--curves", "AP", "loss_carl"]
    monkeypatch.setattr("sys.argv", ["plot_curves.py", *words])
    script.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().err == "No run has 'loss_carl': its panel is empty.\n"


def test_a_run_has_one_style_in_all_panels_and_a_place_in_the_legend():
    curve = {1: 0.5, 2: 0.4}
    runs = {f"run {i}": {"AP": curve, "loss_cls": curve} for i in range(12)}
    del runs["run 3"]["AP"]  # not evaluated yet
    figure = script.draw(runs, ["AP", "loss_cls"])
    styles = [
        {line.get_label(): (line.get_color(), line.get_linestyle()) for line in axes.lines}
        for axes in figure.axes
    ]
    assert styles[1] == {**styles[1], **styles[0]}
    assert len(set(styles[1].values())) == 12 and "run 3" not in styles[0]
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == set(runs)


def test_a_folder_without_a_run_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plot_curves.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=str(tmp_path)):
        script.main()
