"""The report: one page that needs no other file, and each figure's picture and numbers."""

import base64
import csv
import io
import math
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from palette import PALETTE
from PIL import Image

STYLE = """
body { font: 16px/1.5 sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 14px; margin: 1em 0 }
td, th { padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
figure { margin: 1em 0 }
.note { background: #f4f4f4; padding: 0.5em 1em }
"""


INTRODUCTION = """
<p>A two-stage detector proposes boxes in an image and trains a classifier on some of them, its
<b>samples</b>. A sample is <b>positive</b> if it overlaps a labelled object by an <b>IoU</b>
(intersection over union: 0 for disjoint boxes, 1 for equal ones) above a threshold, mostly 0.5,
and otherwise <b>negative</b>. Its <b>score</b> for a class is the probability that the classifier
gives; its <b>classification loss</b> is high where the score of the right answer is low. The
classifier also moves each box: the result is the <b>regressed</b> box. A detection is <b>right</b>
if it overlaps an object of its class by more than a threshold and no higher-scored detection took
that object; <b>AP</b> (average precision, 0 to 100%) is the area under the curve of precision over
recall, the mean over classes and, in COCO, over ten IoU thresholds from 0.5 to 0.95.</p>
<p>The figures follow an argument: training lowers the loss of all samples alike, but AP depends on
few of them, the <b>prime samples</b>: the best-fitting box of each object, and the highest-scored
negative of each neighbourhood. <b>IoU-HLR</b> and <b>Score-HLR</b> (hierarchical local ranks) rank
samples so that these come first. <b>ISR</b> (importance-based sample reweighting) gives the first
ranks more weight; <b>CARL</b> (classification-aware regression loss) raises the scores of boxes
that fit and lowers the others; <b>PISA</b> (Prime Sample Attention) is both.</p>
"""


NUM_COLORS = 64


@dataclass
class Table:
    """Rows of texts and numbers."""

    header: list[str]
    rows: list[list[Any]]


@dataclass
class Plot:
    """
    Attributes:
        name: of its files, without ending.
        look_for: one sentence.
        explained: the rest of the caption.
        numbers: everything that the picture shows, for the CSV file.
        facts: the numbers of the caption, by their meaning, for a second CSV file.
        shown: a short table for the page.
    """

    name: str
    title: str
    look_for: str
    explained: str
    figure: Figure
    numbers: Table
    facts: dict[str, float | int | str]
    shown: Table | None = field(default=None)


def write_report(
    folder: Path, title: str, facts: list[tuple[str, str]], plots: list[Plot], left_out: list[str]
) -> Path:
    """
    Args:
        folder: created if it is missing.
        facts: name and value of each thing that was analysed.
        left_out: missing figures, and why they are missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"<h1>{escape(title)}</h1>", "<table>"]
    parts += [f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in facts]
    parts += ["</table>", INTRODUCTION]
    if left_out:
        items = "".join(f"<li>{escape(text)}</li>" for text in left_out)
        parts.append(f'<div class="note">Left out: <ul>{items}</ul></div>')
    for number, plot in enumerate(plots, start=1):
        picture = _save(plot, folder)
        parts += [
            f'<h2 id="{plot.name}">{number}. {escape(plot.title)}</h2>',
            f'<figure><img alt="{escape(plot.title)}" src="data:image/png;base64,{picture}">',
            f"<figcaption><b>{escape(plot.look_for)}</b> {escape(plot.explained)}</figcaption>",
            "</figure>",
            _html_table(plot.shown) if plot.shown else "",
        ]
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _save(plot: Plot, folder: Path) -> str:
    """Write the picture and the numbers that it and its caption show; return the PNG in base64."""
    buffer, small = io.BytesIO(), io.BytesIO()
    plot.figure.savefig(buffer, format="png")
    reduce_colors(Image.open(buffer).convert("RGB")).save(small, format="png", optimize=True)
    (folder / f"{plot.name}.png").write_bytes(small.getvalue())
    plot.figure.savefig(folder / f"{plot.name}.svg")
    _write_csv(plot.numbers, folder / f"{plot.name}.csv")
    facts = Table(["number", "value"], [list(fact) for fact in plot.facts.items()])
    _write_csv(facts, folder / f"{plot.name}_caption.csv")
    return base64.b64encode(small.getvalue()).decode("ascii")


def reduce_colors(image: Image.Image) -> Image.Image:
    """
    Return a picture with few colours, a quarter of the size: the colours of lines as they are,
    which cover few pixels, and ``NUM_COLORS`` for the photographs.
    """
    of_maps = [[colormaps[name](i / 23)[:3] for i in range(24)] for name in ("viridis", "tab20")]
    lines = [to_rgb(color) for color in (*PALETTE, "white")] + of_maps[0] + of_maps[1]
    fixed = sorted({tuple(round(255 * part) for part in color) for color in lines})
    own = image.quantize(NUM_COLORS).getpalette()
    assert own is not None  # a quantized image has a palette
    palette = Image.new("P", (1, 1))
    # Of colours that are nearly equal, the first is taken.
    palette.putpalette([*(part for color in fixed for part in color), *own[: 3 * NUM_COLORS]])
    return image.quantize(palette=palette, dither=Image.Dither.NONE)


def _write_csv(table: Table, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.header)
        writer.writerows([_for_csv(value) for value in row] for row in table.rows)


def _for_csv(value: Any) -> Any:
    if isinstance(value, float):  # NumPy's too
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def _html_table(table: Table) -> str:
    def row(values: list[Any], cell: str) -> str:
        return "<tr>" + "".join(f"<{cell}>{escape(str(v))}</{cell}>" for v in values) + "</tr>"

    rows = "".join(row(values, "td") for values in table.rows)
    return f"<table>{row(table.header, 'th')}{rows}</table>"
