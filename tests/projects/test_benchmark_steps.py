from helpers import ROOT, load_script

benchmark = load_script("projects/Benchmark/benchmark_steps.py")


def test_every_strategy_is_timed_against_random_and_the_extra_pass_by_its_parts(
    monkeypatch, capsys
):
    words = ["--images", "1", "--size", "64", "96", "--proposals", "100", "--rounds", "2"]
    config = str(ROOT / "configs/BCCD/pisa_faster_rcnn_R_18_FPN.yaml")
    monkeypatch.setattr("sys.argv", ["benchmark_steps.py", *words, "--config-file", config])
    benchmark.main()
    table, parts = capsys.readouterr().out.strip().split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[3:]]
    assert [row[0] for row in rows] == [benchmark.STOCK, *benchmark.STRATEGIES]
    assert rows[1][-1] == "1.000"
    assert len(parts.splitlines()) == 2 + 5
