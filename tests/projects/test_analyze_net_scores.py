from importlib import import_module

import numpy as np
import pytest
import torch
from analysis_models import labelled_images, small_detector
from helpers import HEADS, IMAGE_SIZE, load_script, random_boxes

load_script("projects/SampleAnalysis/analyze_net.py")
collect, coco_scores, findings, mistakes, what_if = (
    import_module(name) for name in ("collect", "coco_scores", "findings", "mistakes", "what_if")
)


def coco(objects, num_images):
    """Ground truth of (image, class, box XYWH)."""
    return coco_scores._index(
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
                moved = [float(x + rng.normal(0, 3)) for x in box]
                found.append(detection(image, class_, moved, float(rng.random())))
        found.append(detection(image, 0, [*rng.uniform(0, 100, 2), 30.0, 30.0], rng.random()))
    return objects, found


def evaluate(objects, found, num_images):
    images = list(range(num_images))
    return coco_scores.evaluate(coco(objects, num_images), found, images, [10, 20, 30])


def test_average_precision_is_that_of_pycocotools():
    evaluation = evaluate(*random_data(12), 12)
    ap = coco_scores.average_precision(evaluation)
    evaluation.summarize()
    np.testing.assert_allclose(np.nanmean(ap[..., 0]), 100 * evaluation.stats[0])
    np.testing.assert_allclose(np.nanmean(ap[5, :, 0]), 100 * evaluation.stats[2])
    resampled = coco_scores.Resampler(evaluation).average_precision(np.ones(12, dtype=int))
    np.testing.assert_allclose(resampled, ap, atol=1e-9)


def test_resampling_is_evaluation_of_repeated_images():
    objects, found = random_data(8)
    counts = np.array([2, 0, 1, 3, 0, 1, 1, 0])
    repeated = np.repeat(np.arange(8), counts)
    copies = [[], []]
    for new, old in enumerate(repeated):
        copies[0] += [(new, *rest) for image, *rest in objects if image == old]
        copies[1] += [{**d, "image_id": new} for d in found if d["image_id"] == old]
    expected = coco_scores.average_precision(evaluate(*copies, len(repeated)))
    resampler = coco_scores.Resampler(evaluate(objects, found, 8))
    np.testing.assert_allclose(resampler.average_precision(counts), expected, atol=1e-9)


def test_bootstrap_is_the_same_for_a_seed_and_for_both_detectors():
    evaluation = evaluate(*random_data(8), 8)
    first, same = coco_scores.bootstrap([evaluation, evaluation], 5, seed=3)
    again = coco_scores.bootstrap([evaluation], 5, seed=3)[0]
    other = coco_scores.bootstrap([evaluation], 5, seed=4)[0]
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
    resampled = coco_scores.Resampler(evaluation).average_precision(counts)
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
    assert {d.score: d.mistake for d in first.detections} == expected
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
    found = []
    for image in images:
        nobody = torch.zeros(len(image.ious), dtype=torch.bool)
        found += collect.as_results(what_if.detect(image, nobody, 0.0, predictor), image.image_id)
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


def many_positives(num_images=2, seed=0):
    """Scored boxes of images with about 30 positives for each of 3 objects, at random."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for image_id in range(num_images):
        objects = torch.randint(3, (90,), generator=generator)
        logits = 2 * torch.randn(90, 4, generator=generator)
        scores = logits.softmax(dim=1)[range(90), objects]
        images.append(
            findings.ScoredBoxes(
                *(image_id, IMAGE_SIZE, IMAGE_SIZE, random_boxes(90, generator), objects, scores),
                *(torch.arange(90), logits, objects, objects),
                torch.rand(90, generator=generator),
            )
        )
    return images


def chosen_by_hand(images, losses):
    """For each choice the set of (image, positive)."""
    chosen = {name: set() for name in ("top 5 by IoU-HLR", "top 25 by IoU-HLR", "hardest 5", "all")}
    for i, image in enumerate(images):
        for object_ in range(3):
            rows = [r for r in range(90) if image.objects[r] == object_]
            by_iou = sorted(rows, key=lambda r: -float(image.ious[r]))
            by_loss = sorted(rows, key=lambda r: -losses[i][r])
            parts = (by_iou[:5], by_iou[:25], by_loss[:5], rows)
            for name, part in zip(chosen, parts, strict=True):
                chosen[name] |= {(i, r) for r in part}
    return chosen


def test_all_choices_spend_the_same_budget(scored):
    predictor, images = scored[2], many_positives()
    evaluated = []
    outcomes = what_if.spend(images, predictor, evaluated.append)
    assert outcomes[0].budget == 0 and len(outcomes) == 1 + 3 * 4 == len(evaluated)

    def loss(image, row, delta):
        logits = image.logits[row].double().clone()
        logits[image.gt_classes[row]] += delta
        return -float(logits.log_softmax(0)[image.gt_classes[row]])

    losses = [[loss(image, row, 0) for row in range(90)] for image in images]
    expected = chosen_by_hand(images, losses)
    for outcome in outcomes[1:]:
        rows = expected[outcome.choice]
        assert outcome.num_raised == len(rows)
        spent = sum(losses[i][r] - loss(images[i], r, outcome.delta) for i, r in rows)
        np.testing.assert_allclose(spent, outcome.budget, rtol=1e-4)
    least = min(sum(losses[i][r] for i, r in rows) for rows in expected.values())
    budgets = sorted({outcome.budget for outcome in outcomes[1:]})
    np.testing.assert_allclose(np.array(budgets) / least, [0.2, 0.5, 0.8], rtol=1e-4)


def test_choices_are_the_first_of_each_object(scored):
    images = many_positives()
    positives = what_if.gather(images, scored[2].classification_losses)
    losses = positives.losses.view(-1, 90).tolist()
    expected = chosen_by_hand(images, losses)
    for name, chosen in what_if.choices(positives).items():
        assert {divmod(i, 90) for i in chosen.nonzero()[:, 0].tolist()} == expected[name]
