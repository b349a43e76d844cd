"""The numbers of docs/argument.md come from the CSV files next to its pictures."""

import csv
import re

import pytest
from helpers import ROOT

DOCS = ROOT / "docs"
PAGE = (DOCS / "argument.md").read_text()
PICTURE = re.compile(r"^!\[(.+)\]\((argument/\S+)\.png\)$", re.MULTILINE)
PICTURES = [name for _, name in PICTURE.findall(PAGE)]
# The level of intervals, the steps of a box head, and the first 5 and 25 samples of each object.
CONSTANTS = {"95", "300", "5", "25"}
COMMANDS = PAGE.split("\n## Draw it")[1]
NUMBER = re.compile(r"(?<![\w.\]])[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")


def numbers_of(picture: str) -> list[float]:
    with (DOCS / f"{picture}_caption.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Meanings name thresholds, such as "% above 0.05".
    found = [float(n) for row in rows for n in re.findall(r"\d+(?:\.\d+)?", row["number"])]
    for value in (row["value"] for row in rows):
        try:
            found.append(float(value))
        except ValueError:
            found += [float(n) for n in re.findall(r"\d+", value)]  # the name of an image
    return found


def is_among(printed: str, numbers: list[float]) -> bool:
    """Whether a printed number is one of ``numbers``, rounded as it is."""
    digits = len(printed.partition(".")[2])
    value = float(printed.replace(",", ""))
    return any(
        round(value - number, 9) == 0 or f"{number:.{digits}f}" == f"{value:.{digits}f}"
        for number in numbers
    )


def sections() -> dict[str, str]:
    """The text of each claim by its heading."""
    parts = re.split(r"^### (.*)$", PAGE.split("\n## Draw it")[0], flags=re.MULTILINE)
    return {
        title: text.split("\n## ")[0] for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }


SECTIONS = sections()


@pytest.mark.parametrize("title", SECTIONS)
def test_numbers_come_from_the_tables_next_to_the_pictures(title):
    text = SECTIONS[title]
    pictures = [name for _, name in PICTURE.findall(text)]
    assert pictures
    known = sum((numbers_of(picture) for picture in pictures), [])
    known += [float(n) for n in NUMBER.findall(COMMANDS)]
    paragraphs = [p for p in text.split("\n\n") if not p.lstrip().startswith("**Claim.**")]
    plain = re.sub(r"\]\(.*?\)", "]", PICTURE.sub("", "\n\n".join(paragraphs)))
    printed = NUMBER.findall(plain)
    unknown = [n for n in printed if n not in CONSTANTS and not is_among(n, known)]
    assert unknown == []


def test_every_claim_has_a_picture_a_caption_and_a_verdict():
    assert len(SECTIONS) >= 12
    for title, text in SECTIONS.items():
        assert "**Claim.**" in text, title
        assert "**Measured" in text or "**By construction" in text
        for name in (name for _, name in PICTURE.findall(text)):
            after = text.split(f"({name}.png)")[1].lstrip()
            caption = after.split("\n\n")[0]
            assert re.fullmatch(r"\*[^*].*[^*]\*", caption, re.DOTALL), name
            assert "BCCD" in caption or "digits" in caption or "the same image" in caption, name


def test_the_table_of_verdicts_has_the_numbers_of_the_claims():
    rows = re.findall(r"^\| \[(.+?)\]\(#\S+\) \| (.+) \|$", PAGE, re.MULTILINE)
    assert [title for title, _ in rows] == list(SECTIONS)
    for title, verdict in rows:
        text = SECTIONS[title]
        missing = [
            n
            for n in NUMBER.findall(verdict)
            if n not in CONSTANTS and n not in NUMBER.findall(text)
        ]
        assert missing == [], title


@pytest.mark.parametrize("picture", PICTURES)
def test_pictures_are_small_and_have_their_numbers(picture):
    path = DOCS / f"{picture}.png"
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 250_000
    with (DOCS / f"{picture}.csv").open() as file:
        rows = list(csv.reader(file))
    assert len(rows) > 1 and len({len(row) for row in rows}) == 1


def test_no_picture_lies_unused():
    names = {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.glob("argument/*/*.png")}
    assert names == set(PICTURES)
