"""Numbers of the figures of projects/SampleAnalysis, on detectors with known scores."""

from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import load_script
from scipy import stats
from test_analyze_net_scores import coco, detection, evaluate, many_positives
from torch.nn import functional as F

load_script("projects/SampleAnalysis/analyze_net.py")
NAMES = ("findings", "loss_figures", "lower_loss", "mistakes", "precision_figures", "rank_figures")
findings, loss_figures, lower_loss, mistakes, precision_figures, rank_figures = map(
    import_module, NAMES
)
NAMES = ("coco_scores", "resampling", "run_figures", "sample_figures", "seeds", "what_if")
coco_scores, resampling, run_figures, sample_figures, seeds, what_if = map(import_module, NAMES)
Detections = import_module("dataset_detections").Detections


class Predictor:
    """Of a detector with a softmax over 3 classes and background."""

    test_score_thresh, test_nms_thresh, test_topk_per_image = 0.05, 0.5, 100

    @staticmethod
    def classification_losses(logits, classes):
        return F.cross_entropy(logits, classes, reduction="none")


def image_of(shape=(96, 128)):
    return np.full((*shape, 3), 255, dtype=np.uint8)


def test_shares_and_their_intervals_are_those_of_resampled_images():
    parts, wholes = np.array([1, 3, 0]), np.array([2, 4, 10])
    share, low, high = resampling.share_interval(parts, wholes, seed=0)
    assert share == 25
    # Of 27 equally likely draws: all of the last image 0%, all of the second 75%.
    draws = [100 * parts[list(d)].sum() / wholes[list(d)].sum() for d in np.ndindex(3, 3, 3)]
    assert low in draws and high in draws
    np.testing.assert_allclose((low, high), np.percentile(draws * 99, [2.5, 97.5]), atol=2)
    assert np.isnan(resampling.share_interval(np.zeros(2, int), np.zeros(2, int), 0)).all()


def chosen(ious, losses, classes=None):
    """Samples of one image, of one object."""
    ious, losses = torch.tensor(ious), torch.tensor(losses)
    predictions = SimpleNamespace(ious=ious, cls_losses=losses)
    objects = torch.zeros(len(ious), dtype=torch.int64)
    return SimpleNamespace(ious=ious, predictions=predictions, objects=objects)


@pytest.fixture
def samples():
    found = {}
    for name, ious in {"random": [0.0, 0.01, 0.065, 0.3], "hard": [0.2, 0.4, 0.049, 0.05]}.items():
        found[name] = findings.SampleStatistics()
        positives = chosen([0.9, 0.3], [0.5, 1.5])
        found[name].add(positives, chosen(ious, [1.0, 2.0, 3.0, 4.0]), 2)
        found[name].add(chosen([], []), chosen([0.45], [2.5]), 0)
    found["prime"] = found["hard"]
    return found


def test_shares_of_overlapping_negatives_are_counted(samples):
    plot = sample_figures.plot_negative_ious(samples, 0.5, seed=0)
    assert plot.facts["random: negatives"] == 5
    assert plot.facts["random: % above 0.05"] == 60
    assert plot.facts["hard: % above 0.05"] == pytest.approx(60)  # 0.05 itself is not above
    counts = {(name, round(iou, 2)): n for name, iou, n in plot.numbers.rows}
    assert counts["random", 0.06] == 1 and counts["hard", 0.2] == 1
    assert sum(n for (name, _), n in counts.items() if name == "hard") == 5


def test_means_and_points_off_the_axis_are_counted(samples):
    plot = sample_figures.plot_densities(samples, 0.5)
    assert plot.facts["random: positives"] == 2
    assert plot.facts["random: positives below the axis"] == 1
    assert plot.facts["random: mean IoU of positives"] == pytest.approx(0.6)
    assert plot.facts["random: mean loss of positives"] == pytest.approx(1.0)
    assert plot.facts["hard: mean loss of negatives"] == pytest.approx(2.5)
    assert "1 random, 1 hard, 1 prime" in plot.explained


OBJECTS = [(0, 0, [0, 0, 100, 100], False), (0, 0, [200, 0, 100, 100], False)]
FOUND = [
    detection(0, 0, [0, 0, 100, 90], 0.9),
    detection(0, 0, [0, 300, 100, 100], 0.75),
    detection(0, 0, [200, 0, 100, 100], 0.5),
    detection(0, 0, [0, 0, 100, 80], 0.25),
]


def test_precision_and_recall_at_each_score_are_counted():
    # A second image has an object that is not found, and two detections of another class.
    objects = [*OBJECTS, (1, 1, [0, 0, 50, 50], False), (1, 1, [300, 0, 50, 50], False)]
    found = [*FOUND, detection(1, 1, [0, 0, 50, 50], 0.8), detection(1, 1, [90, 90, 9, 9], 0.1)]
    evaluation = evaluate(objects, found, 2)
    scores, right, total = coco_scores.scored_marks(evaluation, 0.5)
    np.testing.assert_allclose(scores, [0.9, 0.8, 0.75, 0.5, 0.25, 0.1], rtol=1e-6)
    assert right.tolist() == [True, True, False, True, False, False] and total == 4
    assert coco_scores.scored_marks(evaluation, 0.95)[1].sum() == 2
    precision, recall = precision_figures.precision_recall(scores, right, total)
    np.testing.assert_allclose(precision, [1, 1, 2 / 3, 3 / 4, 3 / 5, 3 / 6])
    np.testing.assert_allclose(recall, [1 / 4, 2 / 4, 2 / 4, 3 / 4, 3 / 4, 3 / 4])


def test_ap_revisited_marks_the_highest_false_positive():
    objects = [*OBJECTS, (0, 0, [400, 0, 50, 50], False), (1, 1, [0, 0, 50, 50], False)]
    found = [*FOUND, detection(1, 1, [90, 90, 9, 9], 0.95)]
    evaluation = evaluate(objects, found, 2)
    results = mistakes.describe_images(evaluation)
    # The second image has the highest mistake, and one object, which is not found.
    result, among = precision_figures.image_with_highest_mistake(results)
    assert result.image_id == 0 and among.startswith("images with more right")
    names = ["a", "b", "c"]
    plot = precision_figures.plot_ap_revisited(
        evaluation, result, among, image_of((400, 500)), names
    )
    assert plot.facts["score of the highest false positive in the image"] == pytest.approx(0.75)
    assert plot.facts["score of the highest false positive"] == pytest.approx(0.95)
    assert plot.facts["% of objects found above the highest false positive"] == 0
    assert (plot.facts["found in the image"], plot.facts["objects in the image"]) == (2, 3)
    assert precision_figures.image_with_highest_mistake(results[1:]) is None


def test_ap_of_an_object_is_one_over_the_place_of_the_first_right_box():
    # Apart from one another, so that NMS keeps all; the second is the best.
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9]])
    ious, scores = torch.tensor([0.62, 0.91, 0.2]), torch.tensor([0.9, 0.8, 0.95])
    thresholds = np.linspace(0.5, 0.95, 10)
    ap = lower_loss.object_ap(boxes, scores, ious, 0.5, thresholds)
    # Right are: at 0.5, 0.55 and 0.6 the second by score; from 0.65 to 0.9 the third.
    assert ap == pytest.approx((3 / 2 + 6 / 3) / 10)
    # Where NMS keeps one box, AP is the share of thresholds that it passes.
    same = boxes[:1].expand(3, 4)
    assert lower_loss.object_ap(same, scores.flip(0), ious, 0.5, thresholds) == pytest.approx(0.3)


def outcome_of(positives, rows, delta):
    raised = torch.zeros(len(positives.classes), dtype=torch.bool)
    raised[rows] = True
    evaluation = evaluate(OBJECTS, FOUND, 1)
    before_after = what_if.reduction(positives, raised, delta, Predictor)
    return what_if.Outcome("x", before_after, delta, raised, evaluation)


def test_the_object_whose_ap_falls_with_its_loss_is_found():
    images = many_positives()
    positives = what_if.gather(images)
    # Of object 1 of the second image: the best box a little, or all others by far.
    image = images[1]
    own = (image.objects == 1).nonzero()[:, 0]
    best = own[image.ious[own].argmax()]
    others = own[own != best]
    sets = {
        "A": outcome_of(positives, [90 + int(best)], 9.0),
        "B": outcome_of(positives, [90 + int(i) for i in others], 5.0),
    }
    found = lower_loss.clearest_object(images, sets, Predictor)
    assert (found.image_id, found.class_) == (1, 1)
    np.testing.assert_allclose(found.ious, image.ious[own])
    for name, rows in {"A": {int(best)}, "B": set(others.tolist())}.items():
        raised = torch.tensor([9.0 if name == "A" else 5.0]) * torch.tensor(
            [float(int(i) in rows) for i in own]
        )
        logits = torch.stack([image.own_logits[own] + raised, image.rest_logits[own]]).double()
        log_probs = logits.log_softmax(0)[0]
        np.testing.assert_allclose(found.sets[name].scores, log_probs.exp(), rtol=1e-5)
        np.testing.assert_allclose(found.sets[name].loss, -log_probs.sum(), rtol=1e-5)
    assert found.sets["B"].loss < found.sets["A"].loss
    assert found.sets["B"].ap < found.sets["A"].ap
    plot = loss_figures.plot_lower_loss(found, sets, 1000.0, image_of(), "cell", 5, 0)
    assert plot.facts["A: loss of the object"] == found.sets["A"].loss
    assert plot.facts["set B - set A: AP of all images"] == 0  # of one evaluation
    left = 100 * (1 - sets["B"].budget / 1000)
    assert plot.facts["B: % of the positives' loss left"] == pytest.approx(left)
    assert plot.facts["A: IoU of the highest-scored box"] == pytest.approx(
        float(image.ious.max()), abs=1
    )
    assert lower_loss.clearest_object(images, {"A": sets["B"], "B": sets["A"]}, Predictor) is None


def test_the_share_of_the_loss_and_the_counts_of_what_if_are_those_of_the_positives():
    images = many_positives()
    positives = what_if.gather(images)
    total = what_if.total_loss(positives, Predictor)
    assert total == pytest.approx(sum(float(i.losses.double().sum()) for i in images))

    def evaluated(detections, with_details):
        truth = coco(OBJECTS, 2)
        return coco_scores.evaluate(truth, detections, range(2), [10, 20, 30], with_details)

    outcomes = what_if.spend(images, Predictor, evaluated)
    plot = loss_figures.plot_what_if(outcomes, total, positives.most_per_object, 5, 0)
    largest = max(int((i.objects == o).sum()) for i in images for o in range(3))
    assert plot.facts["most positives of an object"] == largest > 25
    assert plot.facts["first 5 by IoU-HLR: positives"] == 2 * 3 * 5
    middle = sorted({o.budget for o in outcomes[1:]})[1]
    assert plot.facts["% of the positives' loss taken away"] == pytest.approx(100 * middle / total)
    assert "No object has more than 25" not in plot.explained
    share = f"{100 * middle / total:.1f}% of it"
    assert share in plot.explained


def test_intervals_over_seeds_are_students():
    values = [np.array([1.0, 5.0]), np.array([2.0, 5.0]), np.array([4.0, 5.0])]
    found = seeds.OverSeeds.of(values)
    expected = stats.ttest_1samp([1, 2, 4], 0).confidence_interval(0.95)
    np.testing.assert_allclose(found.mean, [7 / 3, 5])
    np.testing.assert_allclose(found.mean[0] - found.half[0], expected.low)
    assert found.half[1] == 0
    assert np.isnan(seeds.OverSeeds.of(values[:1]).half).all()


def statistics_of(positives, negatives, by_iou):
    """Scores by rank and by cell of IoU, each of so many samples as there are images."""
    found = findings.ScoreStatistics()
    found.num_images = 60
    for means, scores in ((found.positives, positives), (found.negatives, negatives)):
        for rank, score in enumerate(scores):
            means.add(np.full(60, rank), np.full(60, score))
    for cell, score in by_iou.items():
        found.by_iou.add(np.full(60, cell), np.full(60, score))
    found.correlation.add(np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 2.0]))
    for kind, losses in (("positives", [1.0, 3.0]), ("negatives", [0.5])):
        found.losses[kind].add(np.array(losses))
        found.ious[kind].add(np.array([0.5]))
    return found


RUNS = {
    "plain": [
        statistics_of([0.5, 0.4, 0.3, 0.2], [0.9, 0.1], {20: 0.3, 36: 0.8}),
        statistics_of([0.6, 0.4, 0.3, 0.2], [0.7, 0.1], {20: 0.3, 36: 0.8}),
    ],
    "ISR": [
        statistics_of([0.7, 0.4, 0.2, 0.1], [0.4, 0.1], {20: 0.2, 36: 0.9}),
        statistics_of([0.7, 0.4, 0.2, 0.1], [0.4, 0.1], {20: 0.1, 36: 0.9}),
    ],
}


def test_changes_by_rank_are_means_over_seeds():
    facts = run_figures.plot_ranks(RUNS).facts
    assert facts["ISR - plain: positives, rank 0"] == pytest.approx(0.15)
    assert facts["ISR - plain: positives, second half of the ranks"] == pytest.approx(-0.1)
    assert facts["ISR - plain: negatives, rank 0"] == pytest.approx(-0.4)
    half = stats.t.ppf(0.975, 1) * np.std([0.2, 0.1], ddof=1) / np.sqrt(2)
    assert facts["ISR - plain: positives, rank 0, low"] == pytest.approx(0.15 - half)


def test_changes_by_iou_and_after_training_are_means_over_seeds():
    facts = run_figures.plot_score_by_iou(RUNS).facts
    assert facts["ISR - plain: IoU below 0.7"] == pytest.approx(-0.15)
    assert facts["ISR - plain: IoU above 0.8"] == pytest.approx(0.1)
    assert facts["ISR: correlation"] == pytest.approx(1)
    facts = run_figures.plot_after_training(RUNS).facts
    assert facts["plain: mean loss of positives"] == 2
    assert facts["ISR: mean loss of negatives"] == 0.5
    assert facts["ISR - plain: loss of positives"] == 0


def test_a_prime_and_a_hard_sample_are_of_the_same_object():
    def boxes(ious, scores, losses, groups, local_ranks, ranks):
        columns = (np.zeros((len(ious), 4)), groups, [0] * len(ious), ious, scores, losses)
        return findings.RankedBoxes(*map(np.asarray, (*columns, local_ranks, ranks)))

    positives = boxes(
        [0.9, 0.8, 0.6], [0.9, 0.7, 0.1], [0.1, 0.4, 2.3], [0, 1, 1], [0, 0, 1], [0, 1, 2]
    )
    negatives = boxes([0.1, 0.2], [0.6, 0.8], [0.9, 1.6], [0, 1], [0, 0], [1, 0])
    hardest = boxes([0.4], [0.7], [2.0], [0], [0], [0])
    scene = findings.Scene({"image_id": 7}, positives, negatives, hardest)
    facts = rank_figures.plot_prime_and_hard(scene, image_of()).facts
    assert facts["hard positive: loss"] == 2.3 and facts["prime positive: IoU"] == 0.8
    assert facts["prime negative: score"] == 0.8 and facts["hard negative: loss"] == 2.0
