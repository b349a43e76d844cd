"""The figures of README and docs are those of the committed runs."""

import re
import shutil

import pytest
from helpers import ROOT, load_script

compare = load_script("projects/StrategyComparison/compare.py")

PROJECT = ROOT / "projects/StrategyComparison"
GRIDS = sorted(path.stem for path in PROJECT.glob("results/*.csv"))
IN_README = {"strategies": "", "few_objects": ", few objects", "from_scratch": ", from scratch"}


def tables(text):
    return re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)


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
    known = {table for name in GRIDS for table in tables(committed(name))}
    headers = {table.splitlines()[0] for table in known}
    in_report = [
        table
        for table in tables((ROOT / "docs/results.md").read_text())
        if table.splitlines()[0] in headers
    ]
    assert len(in_report) > 5
    assert [table for table in in_report if table not in known] == []


def test_the_table_of_the_readme_is_an_extract_of_the_comparison():
    sections = {}
    for name, start in IN_README.items():
        for section in committed(name).split("### ")[1:]:
            sections[section.splitlines()[0] + start] = section
    extract = re.findall(
        rf"^\| ({'|'.join(sections)}) (\|.* ± .* ± .*) \|$",
        (ROOT / "README.md").read_text(),
        flags=re.MULTILINE,
    )
    assert len(extract) > 10
    for dataset, row in extract:
        assert f"\n{row} |" in sections[dataset], (dataset, row)
