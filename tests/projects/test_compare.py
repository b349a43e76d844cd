import json
import sys

import pytest
from helpers import ROOT, load_script

compare = load_script("projects/StrategyComparison/compare.py")

GRID = """
seeds: [4, 7]
strategies:
  plain: {config: configs/a.yaml}
  "twice, x 2": {config: configs/a.yaml, options: {MODEL.X: 2.0}}
"""


@pytest.fixture
def runs(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    return list(compare.read_grid(path, tmp_path / "out"))


def write_metrics(run, ap):
    run.folder.mkdir(parents=True)
    earlier = dict.fromkeys((f"bbox/{metric}" for metric in compare.METRICS), 1.0)
    last = {f"bbox/{metric}": ap + i for i, metric in enumerate(compare.METRICS)}
    lines = [{"iteration": 0, "total_loss": 1.0}, earlier, last]
    (run.folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)) + "\n")


def test_a_grid_is_run_seed_by_seed_in_folders_of_their_own(runs):
    assert [(run.strategy, run.seed) for run in runs] == [
        ("plain", 4),
        ("twice, x 2", 4),
        ("plain", 7),
        ("twice, x 2", 7),
    ]
    assert len({run.folder for run in runs}) == 4


def test_a_command_names_config_seed_folder_and_options(runs):
    command = runs[1].command()
    assert command[:3] == [sys.executable, str(ROOT / "train_net.py"), "--resume"]
    words = dict(zip(command[3::2], command[4::2], strict=True))
    assert words == {
        "--config-file": str(ROOT / "configs/a.yaml"),
        "SEED": "4",
        "OUTPUT_DIR": str(runs[1].folder),
        "MODEL.X": "2.0",
    }


def test_a_run_is_done_once_it_was_evaluated(runs):
    assert compare.read_result(runs[0]) is None
    write_metrics(runs[0], ap=40.0)
    assert compare.read_result(runs[0]) == {
        **{"strategy": "plain", "seed": 4},
        **{"AP": 40.0, "AP50": 41.0, "AP75": 42.0, "APs": 43.0, "APm": 44.0, "APl": 45.0},
    }


def test_the_table_has_mean_and_standard_deviation_over_seeds(runs):
    for run, ap in zip(runs, (40.0, 50.0, 42.0, 50.0), strict=True):
        write_metrics(run, ap)
    table = compare.markdown_table([compare.read_result(run) for run in runs]).splitlines()
    assert table[0] == "| strategy | seeds | AP | AP50 | AP75 | APs | APm | APl |"
    assert table[2].startswith("| plain | 2 | 41.0 ± 1.4 | 42.0 ± 1.4 |")
    assert table[3].startswith("| twice, x 2 | 2 | 50.0 ± 0.0 |")


def test_a_failed_run_names_its_log(runs):
    with pytest.raises(RuntimeError, match=r"plain, seed 4, failed.*seed4.train\.log"):
        compare.train(runs[0], threads=1)
    assert "configs/a.yaml" in (runs[0].folder / "train.log").read_text()
