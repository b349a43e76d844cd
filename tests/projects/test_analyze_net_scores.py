from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from analysis_models import labelled_images, small_detector
from helpers import HEADS, IMAGE_SIZE, load_script, random_boxes
from pycocotools.cocoeval import COCOeval
from torch.nn import functional as F

from pisa_d2.evaluation import index_coco

load_script("projects/SampleAnalysis/analyze_net.py")
NAMES = ("collect", "coco_scores", "findings", "mistakes", "resampling", "spool", "what_if")
collect, coco_scores, findings, mistakes, resampling, spool, what_if = map(import_module, NAMES)
dataset_detections = import_module("dataset_detections")
Detections = dataset_detections.Detections


def coco(objects, num_images):
    """Ground truth of (image, class, box XYWH)."""
    return index_coco(
        {
            "images": [{"id": i} for i in range(num_images)],
            "categories": [{"id": i, "name": str(i)} for i in (10, 20, 30)],
            "annotations": [
                {
                    **{"id": i + 1, "image_id": image, "category_id": 10 * (class_ + 1)},
                    **{"bbox": box, "area": box[2] * box[3], "iscrowd": int(crowd)},
                }
                for i, (image, class_, box, crowd) in enumerate(objects)
            ],
        }
    )


def detection(image, class_, box, score):
    return {"image_id": image, "category_id": class_, "bbox": box, "score": score}


def random_data(num_images, seed=0):
    rng = np.random.default_rng(seed)
    objects, found = [], []
    for image in range(num_images):
        for _ in range(rng.integers(0, 6)):
            box = [*rng.uniform(0, 100, 2), *rng.uniform(10, 120, 2)]
            class_ = int(rng.integers(3))
            objects.append((image, class_, box, rng.random() < 0.1))
            for _ in range(rng.integers(0, 3)):
                moved = [x + rng.normal(0, 3) for x in box]
                found.append(detection(image, class_, moved, rng.random()))
        found.append(detection(image, 0, [*rng.uniform(0, 100, 2), 30.0, 30.0], rng.random()))
    for result in found:  # numbers that float32 holds, as detectors give them
        result["bbox"] = np.array(result["bbox"], np.float32).tolist()
        result["score"] = float(np.float32(result["score"]))
    return objects, found


def evaluate(objects, found, num_images):
    truth, detections = coco(objects, num_images), Detections.of_results(found)
    return coco_scores.evaluate(truth, detections, range(num_images), [10, 20, 30])


def test_average_precision_is_that_of_pycocotools():
    objects, found = random_data(12)
    evaluation = evaluate(objects, found, 12)
    ap = coco_scores.average_precision(evaluation)
    truth = coco(objects, 12)
    results = [{**d, "category_id": 10 * (d["category_id"] + 1)} for d in found]
    original = COCOeval(truth, truth.loadRes(results), "bbox")
    original.evaluate()
    original.accumulate()
    np.testing.assert_array_equal(evaluation.precision, original.eval["precision"][..., -1])
    original.summarize()
    np.testing.assert_allclose(np.nanmean(ap[..., 0]), 100 * original.stats[0])
    resampled = resampling.Resampler(evaluation).average_precision(np.ones(12, dtype=int))
    np.testing.assert_allclose(resampled, ap, atol=1e-9)
    alone = coco_scores.evaluate(
        truth, Detections.of_results(found), range(12), [10, 20, 30], with_details=False
    )
    np.testing.assert_array_equal(alone.precision, evaluation.precision[..., :1])


def test_images_that_do_not_count_are_left_out():
    objects, found = random_data(12)
    of_some = coco_scores.evaluate(
        coco(objects, 12), Detections.of_results(found), range(5), [10, 20, 30]
    )
    few = [[item for item in objects if item[0] < 5], [d for d in found if d["image_id"] < 5]]
    np.testing.assert_array_equal(of_some.precision, evaluate(*few, 12).precision)


def test_detections_come_back_by_class_and_in_their_sequence():
    _, found = random_data(6)
    detections = Detections.of_results(found)
    assert list(detections) == found and len(detections) == len(found)
    for class_, rows in enumerate(detections.by_class(4)):
        expected = [d for d in found if d["category_id"] == class_]
        assert detections.results(rows) == expected


def test_a_spool_gives_its_items_any_number_of_times():
    items = [{"a": torch.arange(i)} for i in range(5)]
    on_disk = spool.Spool()
    for item in items[:3]:
        on_disk.append(item)
    assert [len(item["a"]) for item in on_disk] == [0, 1, 2]
    for item in items[3:]:
        on_disk.append(item)
    for _ in range(2):
        assert [item["a"].tolist() for item in on_disk] == [x["a"].tolist() for x in items]
    assert len(on_disk) == 5


def test_resampling_is_evaluation_of_repeated_images():
    objects, found = random_data(8)
    counts = np.array([2, 0, 1, 3, 0, 1, 1, 0])
    repeated = np.repeat(np.arange(8), counts)
    copies = [[], []]
    for new, old in enumerate(repeated):
        copies[0] += [(new, *rest) for image, *rest in objects if image == old]
        copies[1] += [{**d, "image_id": new} for d in found if d["image_id"] == old]
    expected = coco_scores.average_precision(evaluate(*copies, len(repeated)))
    resampler = resampling.Resampler(evaluate(objects, found, 8))
    np.testing.assert_allclose(resampler.average_precision(counts), expected, atol=1e-9)


def test_bootstrap_is_the_same_for_a_seed_and_for_both_detectors():
    evaluation = evaluate(*random_data(8), 8)
    first, same = resampling.bootstrap([evaluation, evaluation], 5, seed=3)
    again = resampling.bootstrap([evaluation], 5, seed=3)[0]
    other = resampling.bootstrap([evaluation], 5, seed=4)[0]
    np.testing.assert_array_equal(first, same)
    np.testing.assert_array_equal(first, again)
    assert first.shape == (5, 10, 3, 4) and not np.array_equal(first, other, equal_nan=True)
    low, high = np.nanpercentile(np.nanmean(first[..., 0], axis=(1, 2)), [0, 100])
    assert low < np.nanmean(coco_scores.average_precision(evaluation)[..., 0]) < high


def test_nothing_found_is_no_precision():
    evaluation = evaluate([(0, 1, [5, 5, 20, 20], False)], [], 2)
    ap = coco_scores.average_precision(evaluation)
    np.testing.assert_array_equal(ap[:, :, 0], [[np.nan, 0, np.nan]] * 10)
    counts = np.array([1, 1])
    resampled = resampling.Resampler(evaluation).average_precision(counts)
    np.testing.assert_array_equal(resampled, ap)
    assert mistakes.describe_images(evaluation)[0].num_errors == 2


def test_kinds_of_false_positives():
    objects = [
        (0, 0, [0, 0, 100, 100], False),
        (0, 1, [200, 0, 100, 100], False),
        (0, 0, [0, 300, 100, 100], False),
        (0, 0, [200, 300, 100, 100], False),
        (0, 0, [400, 300, 100, 100], False),
        (0, 0, [600, 300, 100, 100], True),
    ]
    expected = {
        0.9: None,
        0.8: "duplicate",
        0.7: "classification",
        0.6: "localisation",
        0.5: "background",
    }
    found = [
        detection(0, 0, [0, 0, 100, 90], 0.9),
        detection(0, 0, [0, 0, 100, 80], 0.8),
        detection(0, 0, [200, 0, 100, 90], 0.7),
        detection(0, 0, [0, 360, 100, 100], 0.6),  # IoU 0.25
        detection(0, 0, [400, 0, 100, 100], 0.5),
        detection(0, 0, [600, 300, 100, 100], 0.95),  # of a crowd: neither right nor wrong
    ]
    # A sixth detection of the class is one more than it has objects.
    extra = [(1, 0, [0, 0, 50, 50], False)]
    found.append(detection(1, 0, [500, 500, 50, 50], 0.1))
    first, second = mistakes.describe_images(evaluate(objects + extra, found, 2))
    assert {round(d.score, 3): d.mistake for d in first.detections} == expected
    assert second.detections == []
    assert mistakes.count_mistakes([first, second]) == dict.fromkeys(mistakes.KINDS, 1)
    # Right at both thresholds: one; wrong at both: four; missed at both: four of five objects.
    assert first.num_errors == 2 * 4 + 2 * 4
    assert second.num_errors == 2


def test_images_that_differ_most_come_first():
    def result(image, num_errors):
        missed = [{0.5}] * num_errors
        return mistakes.ImageResult(image, [{}] * num_errors, [], missed)

    first = [result(i, n) for i, n in enumerate([3, 1, 5, 2])]
    second = [result(i, n) for i, n in enumerate([3, 4, 0, 5])]
    pairs = mistakes.most_different(first, second, 3)
    assert [pair[0].image_id for pair in pairs] == [2, 1, 3]


@pytest.fixture(scope="module", params=["PISAROIHeads", "PISARes5ROIHeads"])
def scored(request):
    """A detector's scored boxes, its own detections and its box predictor."""
    _, model = small_detector(*HEADS[request.param])
    predictor = model.roi_heads.box_predictor
    with torch.no_grad():  # so that some scores are high and some are below the threshold
        predictor.cls_score.weight.normal_(std=0.3)
    found = collect.Observer(model, {}, 0.05, 0.5, with_scored_boxes=True).run(
        labelled_images([4, 0, 7])
    )
    return found.scored_boxes, found.detections, predictor


def test_with_nothing_raised_detections_are_the_detectors_own(scored):
    images, expected, predictor = scored
    found = Detections()
    for image in images:
        nobody = torch.zeros(len(image.ious), dtype=torch.bool)
        found.add(what_if.detect(image, nobody, 0.0, predictor), image.image_id)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        np.testing.assert_allclose([*a["bbox"], a["score"]], [*b["bbox"], b["score"]], rtol=1e-4)


def test_raised_scores_are_those_of_raised_logits(scored):
    image, predictor = many_positives()[0], scored[2]
    found = what_if.detect(image, image.gt_classes == 0, 50.0, predictor)
    assert set(found.pred_classes.tolist()) == {0, 1, 2}
    raised = found.pred_classes == 0
    assert (found.scores[raised] > 0.999).all()
    assert torch.isin(found.scores[~raised], image.scores).all()


@pytest.mark.parametrize("use_sigmoid", [False, True])
def test_raised_scores_and_losses_are_those_of_all_logits(use_sigmoid):
    """Next to the logits of all classes, of which two numbers per positive are kept."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20, 4, generator=generator)
    classes = torch.randint(3, (20,), generator=generator)
    rows, columns = torch.arange(20).repeat_interleave(3), torch.arange(3).repeat(20)
    chosen = torch.arange(20) % 2 == 0

    def probs_of(logits):
        return logits.sigmoid() if use_sigmoid else logits.softmax(dim=1)

    def losses_of(logits, classes):
        if not use_sigmoid:
            return F.cross_entropy(logits, classes, reduction="none")
        targets = F.one_hot(classes, logits.shape[1])[:, :-1].float()
        losses = F.binary_cross_entropy_with_logits(logits[:, :-1], targets, reduction="none")
        return losses.sum(dim=1)

    others = logits.scatter(1, classes[:, None], -torch.inf)
    image = findings.ScoredBoxes(
        *(0, IMAGE_SIZE, IMAGE_SIZE, random_boxes(60, generator), columns),
        *(probs_of(logits)[rows, columns], rows, classes, classes, torch.rand(20)),
        losses=losses_of(logits, classes),
        own_logits=logits.gather(1, classes[:, None])[:, 0],
        rest_logits=None if use_sigmoid else others.logsumexp(dim=1),
    )
    raised = logits + 1.7 * chosen[:, None] * F.one_hot(classes, 4)
    scores = what_if.raised_scores(image, chosen, 1.7)
    torch.testing.assert_close(scores, probs_of(raised)[rows, columns])
    assert torch.equal(scores[~chosen[rows]], image.scores[~chosen[rows]])
    predictor = SimpleNamespace(classification_losses=losses_of)
    positives = what_if.gather([image])
    losses = what_if.losses_after(positives, chosen, 1.7, predictor)
    torch.testing.assert_close(losses.float(), losses_of(raised, classes)[chosen])


def many_positives(num_images=2, seed=0):
    """Scored boxes of images with about 30 positives for each of 3 objects, at random."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for image_id in range(num_images):
        objects = torch.randint(3, (90,), generator=generator)
        own, rest = 2 * torch.randn(2, 90, generator=generator)
        losses = F.softplus(rest - own)
        images.append(
            findings.ScoredBoxes(
                *(image_id, IMAGE_SIZE, IMAGE_SIZE, random_boxes(90, generator), objects),
                *((-losses).exp(), torch.arange(90), objects, objects),
                *(torch.rand(90, generator=generator), losses, own, rest),
            )
        )
    return images


def chosen_by_hand(images, losses):
    """For each choice the set of (image, positive)."""
    names = ("first 5 by IoU-HLR", "first 25 by IoU-HLR", "last 5 by IoU", "hardest 5", "all")
    chosen = {name: set() for name in names}
    for i, image in enumerate(images):
        for object_ in range(3):
            rows = [r for r in range(90) if image.objects[r] == object_]
            by_iou = sorted(rows, key=lambda r: -float(image.ious[r]))
            by_loss = sorted(rows, key=lambda r: -losses[i][r])
            parts = (by_iou[:5], by_iou[:25], by_iou[-5:], by_loss[:5], rows)
            for name, part in zip(chosen, parts, strict=True):
                chosen[name] |= {(i, r) for r in part}
    return chosen


def test_all_choices_spend_the_same_budget(scored):
    predictor, images = scored[2], many_positives()
    evaluated = []

    def evaluate(detections, with_details):
        evaluated.append(with_details)
        return coco_scores.evaluate(coco([], 2), detections, range(2), [10, 20, 30], with_details)

    outcomes = what_if.spend(images, predictor, evaluate)
    assert outcomes[0].budget == 0 and len(outcomes) == 1 + 3 * 5 == len(evaluated)
    # Intervals over images are taken of the detector, the first 5, the first 25 and the last 5.
    assert sum(evaluated) == 4

    def loss(image, row, delta):
        logits = torch.stack([image.own_logits[row], image.rest_logits[row]]).double()
        logits[0] += delta
        return -float(logits.log_softmax(0)[0])

    losses = [[loss(image, row, 0) for row in range(90)] for image in images]
    expected = chosen_by_hand(images, losses)
    for outcome in outcomes[1:]:
        rows = expected[outcome.choice]
        assert outcome.num_raised == len(rows)
        spent = sum(losses[i][r] - loss(images[i], r, outcome.delta) for i, r in rows)
        np.testing.assert_allclose(spent, outcome.budget, rtol=1e-6)
    least = min(sum(losses[i][r] for i, r in rows) for rows in expected.values())
    budgets = sorted({outcome.budget for outcome in outcomes[1:]})
    np.testing.assert_allclose(np.array(budgets) / least, [0.2, 0.5, 0.8], rtol=1e-4)


def test_choices_are_the_first_of_each_object(scored):
    images = many_positives()
    positives = what_if.gather(images)
    losses = positives.losses.view(-1, 90).tolist()
    expected = chosen_by_hand(images, losses)
    for name, chosen in what_if.choices(positives).items():
        assert {divmod(i, 90) for i in chosen.nonzero()[:, 0].tolist()} == expected[name]
