"""The report: one page that needs no other file, and each figure's picture and numbers."""

import base64
import csv
import io
import math
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.5 sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 14px; margin: 1em 0 }
td, th { padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
figure { margin: 1em 0 }
.note { background: #f4f4f4; padding: 0.5em 1em }
"""


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
        numbers: all that the picture shows, for the CSV file.
        shown: a short table for the page.
    """

    name: str
    title: str
    look_for: str
    explained: str
    figure: Figure
    numbers: Table
    shown: Table | None = field(default=None)


def write_report(
    folder: Path, title: str, facts: list[tuple[str, str]], plots: list[Plot], left_out: list[str]
) -> Path:
    """
    Args:
        folder: is made where it is missing.
        facts: what was analysed, name and value.
        left_out: what the report lacks and why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"<h1>{escape(title)}</h1>", "<table>"]
    parts += [f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in facts]
    parts.append("</table>")
    if left_out:
        items = "".join(f"<li>{escape(text)}</li>" for text in left_out)
        parts.append(f'<div class="note">Left out: <ul>{items}</ul></div>')
    for plot in plots:
        picture = _save(plot, folder)
        parts += [
            f'<h2 id="{plot.name}">{escape(plot.title)}</h2>',
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
    """Write the picture and its numbers; the PNG in base64."""
    buffer = io.BytesIO()
    plot.figure.savefig(buffer, format="png")
    (folder / f"{plot.name}.png").write_bytes(buffer.getvalue())
    plot.figure.savefig(folder / f"{plot.name}.svg")
    with (folder / f"{plot.name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(plot.numbers.header)
        writer.writerows([_for_csv(value) for value in row] for row in plot.numbers.rows)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _for_csv(value: Any) -> Any:
    if isinstance(value, float):  # NumPy's too
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def _html_table(table: Table) -> str:
    def row(values: list[Any], cell: str) -> str:
        return "<tr>" + "".join(f"<{cell}>{escape(str(v))}</{cell}>" for v in values) + "</tr>"

    rows = "".join(row(values, "td") for values in table.rows)
    return f"<table>{row(table.header, 'th')}{rows}</table>"
