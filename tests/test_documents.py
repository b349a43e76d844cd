"""Checks of README and docs: length, links, commands, config keys and names of functions."""

import ast
import importlib
import re
import runpy
import sys
from collections.abc import Iterator
from operator import attrgetter

import pytest
from detectron2.config import CfgNode, get_cfg
from helpers import ROOT
from libra import add_libra_config
from ssd import add_ssd_config

from pisa_d2 import add_pisa_config
from pisa_d2.samplers import PROPOSAL_SAMPLER_REGISTRY

DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "projects/*.md", "projects/*/*.md")
    for path in ROOT.glob(pattern)
)
OF_PACKAGE = [name for name in DOCUMENTS if not name.startswith("projects/")]
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"^\|.*\n", re.MULTILINE)
KEY = re.compile(r"\b[A-Z][A-Z0-9_]*(?:\.[A-Z][A-Z0-9_]*)+\b")


def read(document: str) -> str:
    return (ROOT / document).read_text()


def test_the_readme_has_at_most_900_words_outside_code_and_tables():
    assert len(TABLE.sub("", CODE.sub("", read("README.md"))).split()) <= 900


def anchors(text: str) -> set[str]:
    """Make the anchors of headings as GitHub does."""
    titles = re.findall(r"^#+ (.*)$", CODE.sub("", text), re.MULTILINE)
    plain = (re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


def test_the_package_page_has_no_links_into_the_repository(monkeypatch):
    arguments = {}
    monkeypatch.setattr("setuptools.setup", lambda **given: arguments.update(given))
    runpy.run_path(str(ROOT / "setup.py"))
    page = arguments["long_description"]
    targets = re.findall(r"\]\(([^)\s]+)\)", page)
    assert len(targets) >= 3
    assert [target for target in targets if not target.startswith("https://")] == []
    for title in re.findall(r"^## .*$", read("README.md"), re.MULTILINE):
        assert title in page


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", read(document))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        if anchor:
            page = target / "README.md" if target.is_dir() else target
            assert anchor in anchors(page.read_text()), link


def commands(document: str) -> Iterator[tuple[str, str]]:
    """Yield each script or module in a command of the document, and the words after it."""
    text = read(document)
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks = [block for language, block in fences if language in ("", "bash")]
    inline = re.findall(r"`([^`\n]+)`", CODE.sub("", text))
    # An indented line continues the command.
    lines = [re.sub(r"\\?\n +", " ", block).splitlines() for block in [*blocks, *inline]]
    for line in sum(lines, []):
        for script, words in re.findall(r"(-m [\w.]+|\S+\.py)\b([^;&]*)", line.split(" # ")[0]):
            if not script.startswith("tests/"):  # for pytest
                yield script, words


def known_options(script: str, monkeypatch, capsys) -> set[str]:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    with pytest.raises(SystemExit) as end:
        if script.startswith("-m "):
            runpy.run_module(script[3:], run_name="__main__")
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 0
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out))


USED: dict[str, set[tuple[str, str]]] = {}
for name in DOCUMENTS:
    for script, words in commands(name):
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", words):
            USED.setdefault(script, set()).add((name, option))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("script", sorted(USED))
def test_commands_have_options_that_exist(script, monkeypatch, capsys):
    options = known_options(script, monkeypatch, capsys)
    assert {use for use in USED[script] if use[1] not in options} == set()


def test_every_script_of_the_readme_is_found():
    scripts = {script for script, _ in commands("README.md")}
    assert scripts == {
        "train_net.py",
        "projects/ShowDetections/show_detections.py",
        "projects/HeadStudy/study.py",
    }
    assert all((ROOT / script).exists() for script in scripts)


def paths(node: CfgNode, start: str = "") -> dict[str, object]:
    """Collect the values of all keys, and the nodes, by path."""
    found: dict[str, object] = {}
    for key, value in node.items():
        found[start + key] = value
        if isinstance(value, CfgNode):
            found.update(paths(value, f"{start}{key}."))
    return found


def of_package() -> CfgNode:
    cfg = get_cfg()
    add_pisa_config(cfg)
    return cfg


def test_the_reference_has_every_key_with_its_default():
    rows = re.findall(r"^\| `([A-Z0-9_.]+)` \| `(.*?)` \|", read("docs/configuration.md"), re.M)
    stock = paths(get_cfg())
    added = {
        key: value
        for key, value in paths(of_package()).items()
        if key not in stock and not isinstance(value, CfgNode)
    }
    assert len(rows) == len(dict(rows))
    assert {key: ast.literal_eval(default) for key, default in rows} == added


@pytest.mark.parametrize("document", OF_PACKAGE)
def test_config_keys_exist(document):
    text = read(document)
    cfg = of_package()
    add_libra_config(cfg)
    add_ssd_config(cfg)
    own = re.findall(r"cfg\.([A-Z0-9_.]+) = CfgNode\(", text)  # keys that an example adds
    known = [f".{key}." for key in [*paths(cfg), *own]]
    unknown = {key for key in KEY.findall(text) if not any(f".{key}." in path for path in known)}
    assert unknown == set()


def test_functions_of_the_method_exist():
    modules = {path.stem for path in (ROOT / "pisa_d2").iterdir()}
    names = {
        name
        for name in re.findall(r"`(\w+\.[\w.]+)`", read("docs/method.md"))
        if name.split(".")[0] in modules
    }
    assert len(names) >= 10
    for name in names:
        module, _, rest = name.partition(".")
        if module in ("roi_heads", "meta_arch"):
            module, rest = ".".join([module, rest.split(".")[0]]), rest.partition(".")[2]
        attrgetter(rest)(importlib.import_module(f"pisa_d2.{module}"))


def test_every_sampler_is_described():
    described = re.findall(r"^\| `(\w+)` \|", read("docs/samplers.md"), re.MULTILINE)
    registered = {name for name, cls in PROPOSAL_SAMPLER_REGISTRY if "pisa_d2" in cls.__module__}
    assert set(described) == registered
