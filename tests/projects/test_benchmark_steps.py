import pytest
from helpers import ROOT, load_script

benchmark = load_script("projects/Benchmark/benchmark_steps.py")


@pytest.mark.slow
def test_every_strategy_is_timed_against_random_and_the_extra_pass_by_its_parts(
    monkeypatch, capsys
):
    words = ["--images", "1", "--size", "64", "96", "--proposals", "100", "--rounds", "2"]
    config = str(ROOT / "configs/BCCD/pisa_faster_rcnn_R_18_FPN.yaml")
    monkeypatch.setattr("sys.argv", ["benchmark_steps.py", *words, "--config-file", config])
    benchmark.main()
    table, parts = capsys.readouterr().out.strip().split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[3:]]
    names = ["Detectron2", benchmark.BASE, "ISR-P", "ISR-P and ISR-N", "PISA", *benchmark.SAMPLERS]
    assert [row[0] for row in rows] == names
    assert rows[1][3] == "1.000"
    cells = [line.split("|")[1].strip() for line in parts.splitlines()[2:]]
    assert {"pooling of all proposals", "choosing of negatives"} <= set(cells)
