import csv

import pytest
import torch
from helpers import ROOT, load_script

benchmark = load_script("projects/Benchmark/benchmark.py")
parts, steps = benchmark.benchmark_parts, benchmark.benchmark_steps


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A run of seconds: of few samples, of a small model and without data."""
    sizes = [parts.Size(n, 5, max(1, n // 12)) for n in (256, 64, 300, 400)]
    monkeypatch.setattr(parts, "SIZES", sizes)
    monkeypatch.setattr(parts, "NMS_SIZES", [64])
    monkeypatch.setattr(benchmark.report, "SIZES", sizes)
    monkeypatch.setattr(benchmark.report, "NMS_SIZES", [64])
    config = ROOT / "configs/BCCD/pisa_faster_rcnn_R_18_FPN.yaml"
    monkeypatch.setattr(benchmark, "ON_CPU", [benchmark.Model("small", config, 1, (64, 96), 32)])
    monkeypatch.setattr(benchmark, "measure_data", lambda device: {"loading": 1.0})
    counted = benchmark.benchmark_counts.Row("losses", "PISA", 2, 300, 200, 9, 1, 1000)
    monkeypatch.setattr(benchmark.benchmark_counts, "run", lambda: [counted])
    words = ["--device", "cpu", "--rounds", "2", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *words])
    return tmp_path


@pytest.mark.slow
def test_one_command_writes_tables_and_a_plot(small):
    benchmark.main()
    rows = list(csv.DictReader((small / "benchmark.csv").open()))
    assert {row["section"] for row in rows} == {"parts", "losses", "steps"}
    of_steps = [row["what"] for row in rows if row["section"] == "steps"]
    assert of_steps == [
        "Detectron2",
        steps.BASE,
        "ISR-P",
        "ISR-P and ISR-N",
        "PISA",
        *steps.SAMPLERS,
    ]
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert all(int(row["peak_bytes"]) > 0 for row in rows if row["section"] == "steps")
    text = (small / "benchmark.md").read_text()
    assert "| HLR | 256 samples, 5 classes, 21 objects |" in text
    assert "| losses | PISA | 2 | 300 | 200 | 9 | 1 | 0.0 |" in text
    assert "pooling of all proposals" in text and "of a step (small" in text
    assert (small / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_parts_are_computed_on_the_device_of_their_input():
    size = parts.Size(64, 5, 6)
    of_parts = {**parts.functions_of(size, "cpu"), "NMS groups": parts.nms_functions(64, "cpu")}
    with torch.device("meta"):  # where a tensor is made that is not told a device
        for functions in of_parts.values():
            assert functions["ours"]().is_cpu and functions["loops"]().is_cpu


def test_an_interrupted_benchmark_keeps_the_rows_it_has_measured(small, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    measured = [row("parts", "HLR, ours", "64 samples", 2.0)]
    monkeypatch.setattr(benchmark, "measure_parts", lambda device, rounds: (measured, []))
    of_losses = [row("losses", "PISA", "small", 1.5)]
    monkeypatch.setattr(benchmark, "measure_losses", lambda *args: of_losses)
    monkeypatch.setattr(benchmark, "ON_CPU", 2 * benchmark.ON_CPU)
    steps_of = iter([lambda: ([], {}), interrupted])
    monkeypatch.setattr(benchmark, "measure_steps", lambda *args: next(steps_of)())
    with pytest.raises(KeyboardInterrupt):
        benchmark.main()
    kept = list(csv.DictReader((small / "benchmark.csv").open()))
    assert [row["what"] for row in kept] == ["HLR, ours", "PISA"]


def row(section, what, size, ratio, seconds=1.0, waits=None):
    return benchmark.Row(section, what, size, seconds, "", ratio, None, waits)


def test_ratios_beyond_their_bounds_are_named():
    def rows(hlr, loops, hard, share, waits):
        sizes = [str(size) for size in parts.SIZES]
        return [
            row("parts", "HLR, ours", sizes[3], hlr),
            row("parts", "ISR-P, loops", sizes[0], loops),
            row("losses", "Detectron2", "model", 1, 0.1),
            row("losses", "PISA", "model", 2, 0.1 + share),
            row("steps", "Detectron2", "model", 1, waits=7),
            row("steps", steps.BASE, "model", 1, waits=7),
            row("steps", "PISA", "model", 1, waits=7 + waits),
            row("steps", "hard negatives", "model", hard, waits=9),
        ]

    assert benchmark.check(rows(4.9, 25, 1.05, 0.009, 0), "cuda") == []
    failures = benchmark.check(rows(5.1, 19, 1.13, 0.13, 4), "cuda")
    assert len(failures) == 5
    assert all("bound" in failure for failure in failures)
    assert benchmark.check(rows(4.9, 11, 1.3, 0.009, 0), "cpu") == []
    (failure,) = benchmark.check(rows(4.9, 11, 1.3, 0.011, 0), "cpu")
    assert "share of a step" in failure


def test_check_ends_with_an_error(small, monkeypatch):
    for name, measured in {"parts": ([], {}), "losses": [], "steps": ([], {})}.items():
        monkeypatch.setattr(benchmark, f"measure_{name}", lambda *args, result=measured: result)
    monkeypatch.setattr(benchmark.report, "markdown", lambda *args: "")
    monkeypatch.setattr(benchmark.report, "plot", lambda *args: None)
    monkeypatch.setattr(benchmark, "check", lambda rows, device: ["HLR: 6, bound 5"])
    monkeypatch.setattr("sys.argv", [*benchmark.sys.argv, "--check"])
    with pytest.raises(SystemExit, match="HLR: 6, bound 5"):
        benchmark.main()


def test_data_that_cannot_be_made_are_left_out(monkeypatch, capsys):
    def loading(cfg, num_workers, num_images):
        raise ImportError("Making the digits dataset needs scikit-learn")

    monkeypatch.setattr(benchmark.benchmark_data, "loading", loading)
    assert benchmark.measure_data("cpu") == {}
    assert "Left out: Making the digits dataset" in capsys.readouterr().err
