import pytest
from helpers import load_script

benchmark = load_script("projects/Benchmark/benchmark_losses.py")


@pytest.mark.parametrize("shape", [["1", "40", "3", "2"], ["3", "64", "5", "20"]])
def test_the_loops_give_the_losses_of_the_package_and_all_three_are_timed(
    shape, monkeypatch, capsys
):
    images, samples, objects, classes = shape
    words = ["--images", images, "--samples", samples, "--objects", objects, "--classes", classes]
    monkeypatch.setattr("sys.argv", ["benchmark_losses.py", *words, "--rounds", "2"])
    benchmark.main()  # compares the losses before it times them
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[3:]]
    assert rows == ["Detectron2", "PISA", "PISA by loops"]
