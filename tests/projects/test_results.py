"""The figures of README and docs are those of the committed runs."""

import re
import shutil

import pytest
from helpers import ROOT, load_script

compare = load_script("projects/StrategyComparison/compare.py")

PROJECT = ROOT / "projects/StrategyComparison"
GRIDS = sorted(path.stem for path in PROJECT.glob("results/*.csv"))


def rows(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def committed(name):
    return (PROJECT / f"results/{name}.md").read_text()


@pytest.mark.parametrize("name", GRIDS)
def test_the_committed_tables_are_made_of_the_committed_runs(name, tmp_path, monkeypatch):
    results = shutil.copy(PROJECT / f"results/{name}.csv", tmp_path)
    words = [f"{PROJECT}/{name}.yaml", "--no-training", "--results", results, "--output", tmp_path]
    monkeypatch.setattr("sys.argv", ["compare.py", *map(str, words)])
    compare.main()
    assert (tmp_path / f"{name}.md").read_text() == committed(name)


def test_the_tables_of_the_report_are_those_of_the_comparison():
    known = {row for name in GRIDS for row in rows(committed(name))}
    text = (ROOT / "docs/results.md").read_text()
    of_strategies = [row for row in rows(text) if re.search(r" ± .* ± .* ± ", row)]
    assert len(of_strategies) > 20
    assert [row for row in of_strategies if row not in known] == []


def test_the_table_of_the_readme_is_an_extract_of_the_comparison():
    tables = {}
    for name in GRIDS:
        for section in committed(name).split("### ")[1:]:
            dataset = section.splitlines()[0] + ", from scratch" * (name == "from_scratch")
            tables[dataset] = rows(section)
    extract = re.findall(
        rf"^\| ({'|'.join(tables)}) (\|.* ± .* ± .*) \|$",
        (ROOT / "README.md").read_text(),
        flags=re.MULTILINE,
    )
    assert len(extract) > 10
    for dataset, row in extract:
        assert any(full.startswith(row) for full in tables[dataset]), (dataset, row)
