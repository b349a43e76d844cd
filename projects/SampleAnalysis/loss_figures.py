"""Figures of the loss and AP: a lower loss with a lower AP, and what the same decrease buys."""

import numpy as np
from box_drawing import draw_boxes, show_image
from html_report import Plot, Table
from lower_loss import ObjectScores
from matplotlib.figure import Figure
from palette import BLUE, DPI, GREEN, ORANGE, PALETTE, PURPLE
from resampling import ap_difference
from what_if import ALL, AS_IT_IS, FIRST_5, FIRST_25, HARDEST_5, LAST_5, Outcome

DRAWN_IOUS = (0.5, 0.7, 0.8, 0.9)
CURVES = {AS_IT_IS: ("-", 1.2), FIRST_25: ((0, (1.5, 1.5)), 1.6), FIRST_5: ((0, (7, 2)), 1.6)}
STYLES_OF_CHOICES = {
    FIRST_5: (ORANGE, (0, (7, 2)), "o"),
    FIRST_25: (BLUE, (0, (1.5, 1.5)), "s"),
    HARDEST_5: (GREEN, "-.", "^"),
    LAST_5: ("black", "-", "v"),
    ALL: (PURPLE, ":", "D"),
}


def plot_lower_loss(
    found: ObjectScores,
    outcomes: dict[str, Outcome],
    total: float,
    image: np.ndarray,
    class_name: str,
    draws: int,
    seed: int,
) -> Plot:
    """
    Args:
        found: the object and its sets of scores.
        outcomes: of the same sets, over the dataset.
        total: loss of all positives of the dataset.
        image: of the object, uint8 (H, W, 3), RGB.
        draws, seed: of the bootstrap.
    """
    styles = dict(zip(outcomes, ((GREEN, "o"), (ORANGE, "s")), strict=True))
    figure = Figure(figsize=(13, 4.2), dpi=DPI, layout="constrained")
    picture, of_boxes, of_all = figure.subplots(1, 3, width_ratios=[1, 1.2, 1])
    show_image(picture, image, alpha=0.85)
    draw_boxes(picture, found.boxes, ["0.45"] * len(found.boxes), [0.8] * len(found.boxes))
    facts: dict[str, float | int | str] = {"image": str(found.image_id), "class": class_name}
    facts["boxes of the object"] = len(found.boxes)
    rows = []
    for name, of_set in found.sets.items():
        color, marker = styles[name]
        top = int(of_set.scores.argmax())
        draw_boxes(picture, found.boxes[top : top + 1], [color], [3.0])
        label = f"{name}: loss {of_set.loss:.2f}, AP {of_set.ap:.2f}"
        of_boxes.plot(found.ious, of_set.scores, marker, color=color, label=label, ms=7, alpha=0.85)
        of_boxes.plot(found.ious[top], of_set.scores[top], marker, mec="black", mfc="none", ms=13)
        facts[f"{name}: loss of the object"] = of_set.loss
        facts[f"{name}: AP of the object"] = of_set.ap
        facts[f"{name}: IoU of the highest-scored box"] = float(found.ious[top])
        rows += [
            [name, *(float(x) for x in box), float(iou), float(score)]
            for box, iou, score in zip(found.boxes, found.ious, of_set.scores, strict=True)
        ]
    of_boxes.vlines(
        found.ious, *(s.scores for s in found.sets.values()), color="0.8", lw=1, zorder=0
    )
    of_boxes.set(xlabel="IoU of the box with the object", ylabel=f"score of {class_name}")
    of_boxes.set_ylim(-0.03, 1.35)
    of_boxes.set_title(
        "the same boxes, two sets of scores\nringed: the box that NMS keeps", fontsize=10
    )
    of_boxes.legend(loc="upper left", fontsize=9)
    (x0, y0), (x1, y1) = found.boxes[:, :2].min(axis=0), found.boxes[:, 2:].max(axis=0)
    pad = 0.15 * max(x1 - x0, y1 - y0)
    picture.set_xlim(max(x0 - pad, 0), min(x1 + pad, image.shape[1]))
    picture.set_ylim(min(y1 + pad, image.shape[0]), max(y0 - pad, 0))
    picture.set_title(
        f"{len(found.boxes)} boxes of one {class_name}", fontsize=10, parse_math=False
    )
    for name, outcome in outcomes.items():
        color, marker = styles[name]
        left = 100 * (1 - outcome.budget / total)
        of_all.plot(left, outcome.ap, marker, color=color, ms=11)
        of_all.annotate(
            f"{name}\nAP {outcome.ap:.1f}",
            (left, outcome.ap),
            xytext=(0, 12),
            textcoords="offset points",
            color=color,
            ha="center",
        )
        facts[f"{name}: % of the positives' loss left"] = left
        facts[f"{name}: AP of all images"] = outcome.ap
    of_all.margins(0.35, 0)
    aps = [outcome.ap for outcome in outcomes.values()]
    spread = max(max(aps) - min(aps), 2)
    of_all.set_ylim(min(aps) - 0.4 * spread, max(aps) + 0.6 * spread)
    of_all.set(
        xlabel="loss of all positives, in % of the detector's", ylabel="AP of all images, in %"
    )
    of_all.set_title("all images", fontsize=10)
    first, last = outcomes.values()
    change = ap_difference(first.evaluation, last.evaluation, draws, seed)
    ends = zip(("", ", low", ", high"), change, strict=True)
    facts |= {f"set B - set A: AP of all images{end}": value for end, value in ends}
    return Plot(
        "lower_loss",
        "A lower loss, a worse detector",
        "Look at the two sets of scores: the orange one has the lower loss, and puts a worse box "
        "on top.",
        "Two sets of scores for the same boxes. Set A has the scores of the detector. Set B "
        "raises the logits of the 5 positives of each object that fit worst, all by one amount, "
        f"which takes {100 * last.budget / total:.1f}% from the loss of all positives. Left and "
        f"middle: one object of image {facts['image']} with its {len(found.boxes)} positives; it "
        "is the object whose AP (by its own boxes alone, after NMS) falls most from A to B while "
        f"its loss falls too. Right: all images; {last.num_raised:,} positives are raised, and AP "
        f"changes by {change[0]:+.1f} ({change[1]:+.1f} to {change[2]:+.1f}, 95% bootstrap "
        "interval over images).",
        figure,
        Table(["set", "x0", "y0", "x1", "y1", "IoU", "score"], rows),
        facts,
        Table(
            ["", "loss of the object", "its AP", "loss of all positives", "AP of all images"],
            [
                [
                    name,
                    f"{found.sets[name].loss:.2f}",
                    f"{found.sets[name].ap:.2f}",
                    f"{100 * (1 - outcome.budget / total):.1f}%",
                    f"{outcome.ap:.1f}",
                ]
                for name, outcome in outcomes.items()
            ],
        ),
    )


def plot_what_if(outcomes: list[Outcome], total: float, most: int, draws: int, seed: int) -> Plot:
    """
    Args:
        outcomes: the detector as it is, then each choice of positives with each budget.
        total: loss of all positives.
        most: the largest number of positives of an object.
        draws, seed: of the bootstrap.
    """
    figure = Figure(figsize=(13.5, 4.8), dpi=DPI, layout="constrained")
    curve, by_budget = figure.subplots(1, 2, width_ratios=[1.2, 1])
    plain, spent = outcomes[0], outcomes[1:]
    budgets = sorted({outcome.budget for outcome in spent})
    middle = {o.choice: o for o in spent if o.budget == budgets[len(budgets) // 2]}
    share = 100 * middle[FIRST_5].budget / total
    rows = []
    for name, (dashes, width) in CURVES.items():
        outcome = middle.get(name, plain)
        for iou, color in zip(DRAWN_IOUS, PALETTE, strict=False):
            at = int(np.argmin(np.abs(outcome.evaluation.thresholds - iou)))
            recalls, precision = outcome.evaluation.recalls, outcome.precision[at]
            label = f"IoU {iou}" if name == AS_IT_IS else None
            curve.plot(recalls, precision, ls=dashes, lw=width, color=color, label=label)
            rows += [
                ["precision", name, iou, float(x), float(y)]
                for x, y in zip(recalls, precision, strict=True)
            ]
        curve.plot([], [], ls=dashes, lw=width, color="0.3", label=f"{name}: AP {outcome.ap:.1f}")
    curve.set(xlabel="recall", ylabel="precision, mean of classes", xlim=(0, 1), ylim=(0, 1.02))
    curve.set_title(f"{share:.1f}% of the positives' loss taken away", fontsize=11)
    curve.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for name, (color, dashes, marker) in STYLES_OF_CHOICES.items():
        of_choice = [outcome for outcome in spent if outcome.choice == name]
        ring = {"mfc": "none", "ms": 10} if name == ALL else {}
        x = [0.0] + [100 * outcome.budget / total for outcome in of_choice]
        y = [plain.ap] + [outcome.ap for outcome in of_choice]
        by_budget.plot(x, y, color=color, ls=dashes, marker=marker, label=name, **ring)
        rows += [["AP", name, "0.5 to 0.95", a, b] for a, b in zip(x, y, strict=True)]
    by_budget.set(
        xlabel="loss taken from the positives, in % of it", ylabel="AP (0.5 to 0.95), in %"
    )
    by_budget.legend(title="scores raised of", fontsize=9)
    difference = ap_difference(middle[FIRST_25].evaluation, middle[FIRST_5].evaluation, draws, seed)
    gains = {
        name: ap_difference(plain.evaluation, middle[name].evaluation, draws, seed)
        for name in (FIRST_5, FIRST_25)
    }
    facts: dict[str, float | int | str] = {
        "% of the positives' loss taken away": share,
        "positives": len(plain.chosen),
        "most positives of an object": most,
        "AP as it is": plain.ap,
    }
    for name, outcome in middle.items():
        facts[f"{name}: positives"] = outcome.num_raised
        facts[f"{name}: AP"] = outcome.ap
    named = {"first 5 less first 25": difference, **{f"gain of {n}": g for n, g in gains.items()}}
    for name, values in named.items():
        ends = zip(("", ", low", ", high"), values, strict=True)
        facts |= {f"{name}, AP{end}": value for end, value in ends}
    texts = {n: f"{v[0]:+.1f} ({v[1]:+.1f} to {v[2]:+.1f})" for n, v in named.items()}
    same = " No object has more than 25, so the first 25 are all." if most <= 25 else ""
    return Plot(
        "what_if",
        "What the same decrease of the loss buys",
        "Look at whether long dashes (first 5) lie above short ones (first 25) at the same loss.",
        "The boxes are those of the detector, and nothing is trained. Positives are the test-time "
        "proposals that training would call positive, ranked by IoU-HLR. The logit of its class "
        "is raised for the first 5 or the first 25 positives of each object, by one amount for "
        f"all of them, so that the loss of all {facts['positives']:,} positives falls by the same "
        f"total, {share:.1f}% of it; scores, NMS and COCO AP follow. The first 5 are "
        f"{middle[FIRST_5].num_raised:,} positives, the first 25 {middle[FIRST_25].num_raised:,}; "
        f"an object has at most {most}.{same} AP of the first 5 less AP of the first 25: "
        f"{texts['first 5 less first 25']}, with the 95% bootstrap interval over images. The "
        "original does not say of what the 5 and 25 are. On the right also: the 5 positives of "
        "each object with the highest loss, the 5 with the lowest IoU, and all.",
        figure,
        Table(["drawn", "scores raised of", "IoU threshold", "x", "y"], rows),
        facts,
        Table(
            ["scores raised of", "positives", "AP", "gained"],
            [
                [name, f"{middle[name].num_raised:,}", f"{middle[name].ap:.1f}"]
                + [texts.get(f"gain of {name}", f"{middle[name].ap - plain.ap:+.1f}")]
                for name in middle
            ],
        ),
    )
