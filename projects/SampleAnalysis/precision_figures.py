"""The figure of precision and recall over score thresholds."""

import numpy as np
from box_drawing import draw_boxes, label_box, show_image
from coco_scores import Evaluation, scored_marks
from html_report import Plot, Table
from matplotlib.figure import Figure
from mistakes import ImageResult
from palette import AMBER, BLUE, DPI, GREEN, ORANGE, PURPLE

MATCHED_AT = 0.5  # IoU of a right detection in the figure of AP


def image_with_highest_mistake(results: list[ImageResult]) -> tuple[ImageResult, str] | None:
    """
    Find the image with the false positive of the highest score, of those with more right detections
    than false positives; without any, of all images that have both.

    Returns:
        The image, and among which images it was chosen; None where no image has both.
    """

    def counts(result: ImageResult) -> tuple[int, int]:
        right = sum(MATCHED_AT in d.right_at for d in result.detections)
        return right, len(result.detections) - right

    def score(result: ImageResult) -> float:
        return max(d.score for d in result.detections if d.mistake)

    usable = [result for result in results if min(counts(result)) > 0]
    mostly_right = [result for result in usable if counts(result)[0] > counts(result)[1]]
    if mostly_right:
        among = "images with more right detections than false positives"
        return max(mostly_right, key=score), among
    return (max(usable, key=score), "images with a right detection") if usable else None


def precision_recall(
    scores: np.ndarray, right: np.ndarray, num_objects: int
) -> tuple[np.ndarray, np.ndarray]:
    """
    Return precision and recall with the threshold at each score.

    Args:
        scores: (D,), highest first.
        right: bool (D,).
    """
    hits = right.cumsum()
    return hits / np.arange(1, len(right) + 1), hits / max(num_objects, 1)


def plot_ap_revisited(
    evaluation: Evaluation,
    result: ImageResult,
    among: str,
    image: np.ndarray,
    class_names: list[str],
) -> Plot:
    """
    Args:
        evaluation: of all images, with details.
        result, among: see :func:`image_with_highest_mistake`.
        image: that image, uint8 (H, W, 3), RGB.
        class_names: of all classes.
    """
    names = dict(zip(evaluation.ids_of_classes, class_names, strict=True))
    figure = Figure(figsize=(13, 4.2), dpi=DPI, layout="constrained")
    picture, of_image, of_all = figure.subplots(1, 3, width_ratios=[1.2, 1, 1])
    show_image(picture, image, alpha=0.85)
    detections = result.detections  # highest score first
    right = np.array([MATCHED_AT in d.right_at for d in detections])
    own = np.array([d.score for d in detections])
    worst = int(np.flatnonzero(~right)[0])
    for i in range(len(detections))[::-1]:
        x, y, width, height = detections[i].box
        box = np.array([x, y, x + width, y + height])
        color = BLUE if right[i] else ORANGE if i == worst else AMBER
        style = "-" if right[i] else ":"
        draw_boxes(picture, box[None], [color], [3.0 if right[i] or i == worst else 1.2], style)
        text = f"{names[detections[i].class_id]} {detections[i].score:.2f}"
        label_box(picture, box, image.shape, text, color, 8)
    num = len(result.objects)
    picture.set_title(
        f"blue: best box of each object ({right.sum()} of {num} found)\n"
        "orange: false positive of the highest score",
        fontsize=10,
    )
    scores, all_right, total = scored_marks(evaluation, MATCHED_AT)
    rows = []
    for axes, name, s, r, n in (
        (of_image, "image", own, right, num),
        (of_all, "dataset", scores, all_right, total),
    ):
        precision, recall = precision_recall(s, r, n)
        axes.step(s, precision, where="pre", color=GREEN, lw=1.8, label="precision")
        axes.step(s, recall, where="pre", color=PURPLE, ls="--", lw=1.8, label="recall")
        rows += [
            [name, float(a), int(b), float(p), float(q)]
            for a, b, p, q in zip(s, r, precision, recall, strict=True)
        ]
        axes.set(xlabel="score threshold", xlim=(1.02, min(s) - 0.02), ylim=(0, 1.12))
    first_wrong = float(scores[~all_right][0]) if (~all_right).any() else float("nan")
    above = int((all_right & (scores > first_wrong)).sum())
    label = f"best boxes of {right.sum()} objects"
    of_image.plot(own[right], np.full(right.sum(), 1.06), "v", color=BLUE, ms=7, label=label)
    of_image.plot(own[~right], np.full((~right).sum(), 1.06), "x", color=AMBER, ms=6)
    of_image.plot(own[worst], 1.06, "X", color=ORANGE, ms=9, label="highest false positive")
    of_image.set_title(f"this image: {len(detections)} detections", fontsize=10)
    of_all.axvline(first_wrong, color=ORANGE, lw=1.5, ls=":", label="highest false positive")
    of_all.set_title(f"all images: {len(scores):,} detections, {total:,} objects", fontsize=10)
    for axes in (of_image, of_all):
        axes.legend(loc="lower right", fontsize=8)
    facts: dict[str, float | int | str] = {
        "image": str(result.image_id),
        "IoU of a right detection": MATCHED_AT,
        "objects in the image": num,
        "found in the image": int(right.sum()),
        "detections in the image": len(detections),
        "score of the highest false positive in the image": float(own[worst]),
        "objects": total,
        "detections": len(scores),
        "score of the highest false positive": first_wrong,
        "% of objects found above the highest false positive": 100 * above / max(total, 1),
    }
    return Plot(
        "ap_revisited",
        "AP revisited",
        "Look at the steps: recall rises only at the best box of an object, and precision falls "
        "most at the false positives with the highest scores. All other boxes leave AP nearly "
        "unchanged.",
        f"Precision and recall while the score threshold falls, at IoU {MATCHED_AT}, of one image "
        f"({facts['image']}, {num} objects, {len(detections)} detections) and of all images, the "
        "classes together. The image has the false positive of the highest score, among "
        f"{among}. Of each class those "
        "detections are drawn on it that score highest in the dataset, as many as it has objects. "
        f"Over all images, {above:,} of {total:,} objects "
        f"({facts['% of objects found above the highest false positive']:.1f}%) are found above "
        "the highest false positive.",
        figure,
        Table(["of", "threshold", "right", "precision", "recall"], rows),
        facts,
    )
