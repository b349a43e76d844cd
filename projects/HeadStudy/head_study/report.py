"""Reports the rows of a study: tables, a picture and one sentence."""

import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from pisa_d2.engine.paired import (
    SIGNIFICANT,
    Interval,
    holm,
    mean_interval,
    p_text,
    paired_t_test,
    pooled_spread,
    sign_test,
    welch,
)

from .bootstrap import bootstrap_error
from .results import Results, Row
from .strategies import Comparison, Strategies

# The row of the detector's own head, before any training.
DETECTOR = "the detector's own head"
# Half of a 95% interval, in standard errors of a bootstrap.
_NORMAL = statistics.NormalDist().inv_cdf(0.975)


class About(NamedTuple):
    """
    The facts about a study that a report states.

    Attributes:
        config: the detector's.
        dataset: it was tested on.
        train_images, test_images: numbers of cached images.
        steps: of a run.
        start: "new weights" or "the detector's weights".
        code: versions.
    """

    config: str
    dataset: str
    train_images: int
    test_images: int
    steps: int
    start: str
    code: str


class Difference(NamedTuple):
    """
    A strategy and its baseline, paired by the seeds that both have; or not paired, if their
    schedules differ.

    Attributes:
        values: differences of AP by seed; empty if not paired.
        interval: of the mean, by their own spread (paired t), or the spread of each (Welch).
        p: by the t-test of this interval.
        holm: p adjusted for the family; None outside of it.
        sign: p by the sign test; None if not paired.
        images: half of the 95% interval by bootstrap over test images.
        both: half of the interval over seeds and test images.
        pooled: the interval with the spread pooled over all strategies of the schedule; None if
            not paired.
    """

    pair: Comparison
    values: list[float]
    interval: Interval
    p: float
    holm: float | None
    sign: float | None
    images: float
    both: float
    pooled: Interval | None

    @property
    def differs(self) -> bool:
        """True if this is a difference after the correction for the whole family."""
        return self.holm is not None and self.holm < SIGNIFICANT


Runs = dict[str, dict[int, Row]]


def of_strategies(results: Results, names: Sequence[str]) -> Runs:
    """The rows by strategy and seed; strategies without any are left out."""
    runs: Runs = {}
    for name in names:
        rows = {row.seed: row for row in results.rows.values() if row.strategy == name}
        if rows:
            runs[name] = dict(sorted(rows.items()))
    return runs


def differences(results: Results, strategies: Strategies) -> list[Difference]:
    """
    The family in its order, then the other comparisons. A comparison without two runs of each is
    left out: nothing says how wide its interval is. It still counts as one of the family.
    """
    runs = of_strategies(results, list(strategies.options))
    found = []
    for in_family, pairs in ((True, strategies.comparisons), (False, strategies.also)):
        of_pairs = [_difference(results, strategies, runs, pair) for pair in pairs]
        adjusted = holm([1.0 if d is None else d.p for d in of_pairs])
        found += [
            d._replace(holm=p if in_family else None)
            for d, p in zip(of_pairs, adjusted, strict=True)
            if d is not None
        ]
    return found


def _difference(
    results: Results, strategies: Strategies, runs: Runs, pair: Comparison
) -> Difference | None:
    of_pair = [runs.get(name, {}) for name in pair]
    schedule = strategies.schedule(pair.strategy)
    paired = schedule == strategies.schedule(pair.baseline)
    if paired:
        shared = sorted(of_pair[0].keys() & of_pair[1].keys())
        of_pair = [{seed: rows[seed] for seed in shared} for rows in of_pair]
    if min(map(len, of_pair)) < 2:
        return None
    # A mean over runs is resampled for each, and the runs of a seed stay together where paired.
    resampled = [
        np.stack([results.resampled[name, seed] for seed in rows]).mean(axis=0)
        for name, rows in zip(pair, of_pair, strict=True)
    ]
    images = _NORMAL * bootstrap_error(resampled[0] - resampled[1])
    values, baseline = ([row.AP for row in rows.values()] for rows in of_pair)
    if not paired:
        compared = welch(values, baseline)
        interval = compared.interval()
        both = math.hypot(interval.half, images)
        return Difference(pair, [], interval, compared.p_value(), None, None, images, both, None)
    by_seed = [a - b for a, b in zip(values, baseline, strict=True)]
    alike = {n: r for n, r in runs.items() if strategies.schedule(n) == schedule}
    spread = pooled_spread({n: {s: row.AP for s, row in r.items()} for n, r in alike.items()})
    interval = mean_interval(by_seed)
    return Difference(
        pair,
        by_seed,
        interval,
        paired_t_test(by_seed),
        None,
        sign_test(by_seed),
        images,
        math.hypot(interval.half, images),
        spread.of_difference(by_seed),
    )


def markdown(results: Results, strategies: Strategies, about: About) -> str:
    """The tables with what they rest on, and the sentence."""
    found = differences(results, strategies)
    lines = [
        f"{about.config}, {about.train_images} training images, tested on the "
        f"{about.test_images} images of {about.dataset}; box heads trained for {about.steps} steps "
        f"from {about.start}. Made with {about.code}.",
        "",
        "| strategy | seeds | AP | AP50 | AP75 | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in of_strategies(results, [DETECTOR, *strategies.options]).items():
        cells = [
            mean_interval([getattr(row, metric) for row in rows.values()]).text()
            for metric in ("AP", "AP50", "AP75")
        ]
        seconds = statistics.median(row.seconds for row in rows.values())
        # The detector's own head was neither trained nor seeded.
        number, time = ("", "") if name == DETECTOR else (str(len(rows)), f"{seconds:.1f}")
        lines.append(f"| {name} | {number} | {' | '.join(cells)} | {time} |")
    if found:
        lines += [
            "",
            "| difference in AP of | to | seeds | mean | p, Holm | p | higher | p, signs "
            "| ± test images | ± images and seeds | ± pooled |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
    lines += [_line(difference) for difference in found]
    compared = [difference.pair for difference in found]
    missing = [p for p in (*strategies.comparisons, *strategies.also) if p not in compared]
    if missing:
        named = "; ".join(f"{pair.strategy} against {pair.baseline}" for pair in missing)
        lines += ["", f"Not compared, for want of runs: {named}."]
    if any(difference.holm is not None for difference in found):
        lines += ["", sentence(found, about, len(strategies.comparisons))]
    return "\n".join(lines) + "\n"


def _line(d: Difference) -> str:
    number = str(len(d.values)) if d.values else "unpaired"
    higher = f"{sum(value > 0 for value in d.values)} of {len(d.values)}" if d.values else ""
    adjusted = "not tested" if d.holm is None else p_text(d.holm)
    cells = [
        d.pair.strategy,
        d.pair.baseline,
        number,
        f"**{d.interval.text(signed=True)}**" if d.differs else d.interval.text(signed=True),
        adjusted,
        p_text(d.p),
        higher,
        "" if d.sign is None else p_text(d.sign),
        f"{d.images:.2f}",
        f"{d.both:.2f}",
        "" if d.pooled is None or math.isinf(d.pooled.half) else f"{d.pooled.half:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _named(d: Difference) -> str:
    return f"{d.pair.strategy} against {d.pair.baseline} ({d.interval.text(signed=True)})"


def sentence(found: list[Difference], about: About, num_tests: int) -> str:
    """
    Which strategies pay, by how much, and what this does not say.

    Args:
        num_tests: number of comparisons in the family, with those that are not in ``found``.
    """
    family = [d for d in found if d.holm is not None]
    parts = {
        ("pays", "pay"): [_named(d) for d in family if d.differs and d.interval.mean > 0],
        ("costs AP", "cost AP"): [_named(d) for d in family if d.differs and d.interval.mean < 0],
        ("shows no difference", "show no difference"): [_named(d) for d in family if not d.differs],
    }
    said = [f"{', '.join(names)} {verb[len(names) > 1]}" for verb, names in parts.items() if names]
    numbers = sorted({len(d.values) for d in family if d.values})
    runs = f"{' or '.join(map(str, numbers))} paired seeds" if numbers else "unpaired runs"
    correction = f", Holm's correction for {num_tests} comparisons" if num_tests > 1 else ""
    return (
        f"In AP on the {about.test_images} images of {about.dataset}, for this detector's box "
        f"head alone: {'; '.join(said)} (95% intervals over {runs}{correction}); backbone and RPN "
        "were frozen, so what a strategy does to them, and to a longer training, is not in this "
        "answer."
    )


def plot(results: Results, strategies: Strategies, about: About, path: Path) -> None:
    """The differences, a row for each."""
    found = differences(results, strategies)
    if not found:
        return
    figure = Figure(figsize=(8.5, 1.3 + 0.42 * len(found)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for place, d in enumerate(found):
        color = "gray" if not d.differs else ("C0" if d.interval.mean > 0 else "C3")
        axes.plot(d.values, [place] * len(d.values), ".", color="lightgray", zorder=1)
        axes.errorbar(d.interval.mean, place, xerr=d.both, lw=1, color=color, capsize=3)
        axes.errorbar(d.interval.mean, place, xerr=d.interval.half, fmt="o", lw=3, color=color)
    labels = [textwrap.fill(f"{d.pair.strategy} − ({d.pair.baseline})", 46) for d in found]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.axvline(0, color="black", lw=1)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(
        "difference in AP: each seed, mean, 95% interval over seeds (thick)\n"
        "and over seeds and test images (thin); coloured where Holm's correction leaves it",
        fontsize=8,
    )
    axes.set_title(f"{about.dataset}, backbone and RPN frozen", fontsize=9)
    figure.savefig(path)
