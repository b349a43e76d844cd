"""Every module of the package has its file of tests, in the same place and of the same name."""

import ast

import pytest
from helpers import ROOT

PACKAGE = ROOT / "pisa_d2"
MODULES = sorted(
    str(path.relative_to(PACKAGE))
    for path in PACKAGE.rglob("*.py")
    if path.name not in ("__init__.py", "_version.py")
)
# Dataclasses without a function, which the tests of their users fill in.
RECORDS = {"data/needs.py", "roi_heads/step.py"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_its_file_of_tests_unless_it_has_no_function(module):
    if module in RECORDS:
        tree = ast.parse((PACKAGE / module).read_text())
        kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda
        assert not any(isinstance(node, kinds) for node in ast.walk(tree))
    else:
        folder, _, name = module.rpartition("/")
        assert (ROOT / "tests" / folder / f"test_{name}").is_file()


def test_folders_of_tests_mirror_folders_of_the_package_but_projects():
    folders = {path.parent.relative_to(ROOT / "tests") for path in ROOT.glob("tests/**/test_*.py")}
    mirrored = {path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    assert {str(folder) for folder in folders - mirrored} == {"projects"}
