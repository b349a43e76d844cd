import json
import math

import pytest
from detectron2.utils.events import EventStorage

from pisa_d2.engine.metrics import MetricsWriter, read_metrics


def write(path, **values):
    with EventStorage(4) as storage:
        storage.put_scalars(smoothing_hint=False, **values)
        writer = MetricsWriter(str(path))
        writer.write()
        writer.close()


def no_constants(name):
    raise AssertionError(f"{name} is no JSON")


def test_a_number_that_is_not_finite_is_null(tmp_path):
    path = tmp_path / "metrics.json"
    write(path, AP=12.5, APs=math.nan, loss=math.inf, other=-math.inf)
    (line,) = path.read_text().splitlines()
    values = json.loads(line, parse_constant=no_constants)
    assert values == {"AP": 12.5, "APs": None, "loss": None, "other": None, "iteration": 4}


def test_lines_are_added_and_one_that_was_cut_off_is_removed(tmp_path):
    path = tmp_path / "metrics.json"
    write(path, loss=1.0)
    with path.open("a") as file:
        file.write('{"iteration": 5, "lo')
    write(path, loss=2.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1.0, 2.0]


def test_finished_lines_are_read_with_nan_for_null(tmp_path):
    write(tmp_path / "metrics.json", loss=1.0, APs=math.nan)
    with (tmp_path / "metrics.json").open("a") as file:
        file.write('{"iteration": 5, "lo')
    (line,) = read_metrics(tmp_path)
    assert math.isnan(line.pop("APs"))
    assert line == {"loss": 1.0, "iteration": 4}
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "elsewhere")
