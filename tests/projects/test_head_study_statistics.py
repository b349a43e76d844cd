"""The statistics of a head study, by other routes."""

from itertools import combinations

import numpy as np
import pytest
from head_study.bootstrap import Matches, average_precision, bootstrap_error, matches_of, resamples
from head_study.paired import (
    Interval,
    holm,
    mean_interval,
    paired_t_test,
    pooled_spread,
    sign_test,
    welch,
)
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import stats


def some_runs(num, seed=0):
    generator = np.random.default_rng(seed)
    of_seed = generator.normal(50, 2, num)
    return of_seed + generator.normal(1, 1, num), of_seed + generator.normal(0, 1, num)


@pytest.mark.parametrize("num", [2, 5, 20])
def test_the_paired_interval_and_p_value_are_those_of_scipys_paired_t_test(num):
    runs, baseline = some_runs(num)
    differences = (runs - baseline).tolist()
    expected = stats.ttest_rel(runs, baseline)
    low, high = expected.confidence_interval(0.95)
    interval = mean_interval(differences)
    assert interval == pytest.approx(((low + high) / 2, (high - low) / 2))
    assert paired_t_test(differences) == pytest.approx(expected.pvalue)


def test_a_single_pair_has_no_interval_and_shows_nothing():
    assert mean_interval([1.5]) == Interval(1.5, float("inf"))
    assert mean_interval([1.5]).text(signed=True) == "+1.50"
    assert paired_t_test([1.5]) == 1.0


def test_equal_differences_show_what_they_are():
    assert paired_t_test([0.0, 0.0, 0.0]) == 1.0
    assert paired_t_test([0.5, 0.5, 0.5]) == 0.0


@pytest.mark.parametrize("signs", ["+", "+-", "+++++", "+++++-", "++++00--", "-" * 9 + "+", "00"])
def test_the_sign_test_is_scipys_binomial_test_without_ties(signs):
    differences = [{"+": 0.3, "-": -0.2, "0": 0.0}[sign] for sign in signs]
    up, num = signs.count("+"), len(signs.replace("0", ""))
    expected = stats.binomtest(up, num).pvalue if num else 1.0
    assert sign_test(differences) == pytest.approx(expected)


def test_holm_is_the_closed_test_of_all_bonferroni_tests():
    """A comparison is rejected if every intersection of hypotheses with it in is rejected."""
    generator = np.random.default_rng(0)
    for num in (1, 2, 3, 6):
        values = (generator.random(num) ** 3).tolist()
        subsets = [s for size in range(1, num + 1) for s in combinations(range(num), size)]
        expected = [
            max(min(1, len(s) * min(values[j] for j in s)) for s in subsets if i in s)
            for i in range(num)
        ]
        assert holm(values) == pytest.approx(expected)


@pytest.mark.parametrize("sizes", [(5, 3), (2, 8), (20, 20)])
def test_unpaired_rows_are_compared_as_by_scipys_welch_test(sizes):
    runs, baseline = some_runs(sizes[0])[0], 2 * some_runs(sizes[1], seed=1)[1]
    expected = stats.ttest_ind(runs, baseline, equal_var=False)
    low, high = expected.confidence_interval(0.95)
    compared = welch(runs.tolist(), baseline.tolist())
    assert compared.interval() == pytest.approx(((low + high) / 2, (high - low) / 2))
    assert compared.p_value() == pytest.approx(expected.pvalue)


def test_unpaired_runs_that_do_not_vary_show_what_they_are():
    assert welch([1.0, 1.0], [2.0, 2.0]).p_value() == 0.0
    assert welch([1.0, 1.0], [1.0, 1.0]).p_value() == 1.0
    single = welch([1.0], [3.0, 2.0])
    assert (single.interval(), single.p_value()) == ((-1.5, float("inf")), 1.0)


def test_the_pooled_spread_is_the_residual_of_a_least_squares_fit():
    table = np.random.default_rng(3).normal(40, 3, (4, 6))
    rows, columns = np.indices(table.shape).reshape(2, -1)
    design = np.concatenate([np.eye(4)[rows], np.eye(6)[columns]], axis=1)
    _, residuals, rank, _ = np.linalg.lstsq(design, table.ravel(), rcond=None)
    left = table.ravel() - design @ np.linalg.lstsq(design, table.ravel(), rcond=None)[0]
    freedom = table.size - rank
    runs = {f"s{i}": dict(enumerate(row)) for i, row in enumerate(table.tolist())}
    runs["s0"][17] = 99.0  # a seed that the others do not have
    spread = pooled_spread(runs)
    assert spread.freedom == freedom
    assert spread.deviation == pytest.approx(np.sqrt(left @ left / freedom))


def test_of_two_strategies_the_pooled_spread_is_their_own():
    runs, baseline = some_runs(7)
    table = {"a": dict(enumerate(runs.tolist())), "b": dict(enumerate(baseline.tolist()))}
    differences = (runs - baseline).tolist()
    assert pooled_spread(table).of_difference(differences) == pytest.approx(
        mean_interval(differences)
    )


def random_detections(num_images=6, num_classes=3, seed=0):
    """Ground truth and detections in COCO's format; the last class has no object."""
    generator = np.random.default_rng(seed)
    truth, found = [], []
    for image in range(num_images):
        for _ in range(generator.integers(0, 6)):
            x, y, w, h = *generator.uniform(0, 80, 2), *generator.uniform(10, 40, 2)
            category = int(generator.integers(num_classes - 1))
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(generator.random() < 0.15),
                }
            )
            for _ in range(generator.integers(0, 4)):
                box = np.array([x, y, w, h]) + generator.normal(0, 3, 4)
                category = int(generator.integers(num_classes))
                found.append({"image_id": image, "category_id": category, "bbox": box.tolist()})
    for detection in found:
        detection["score"] = float(generator.random())
    return truth, found


def coco_eval(truth, found, num_images, num_classes=3):
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": i, "width": 128, "height": 128} for i in range(num_images)],
        "annotations": truth,
        "categories": [{"id": i, "name": str(i)} for i in range(num_classes)],
    }
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
    evaluation.evaluate()
    return evaluation


@pytest.mark.parametrize("seed", range(5))
def test_with_every_image_once_it_is_coco_ap(seed):
    truth, found = random_detections(seed=seed)
    evaluation = coco_eval(truth, found, 6)
    matches = matches_of(evaluation)
    evaluation.accumulate()
    evaluation.summarize()
    ap = average_precision(matches, np.ones((1, 6), dtype=int))
    assert ap == pytest.approx(100 * evaluation.stats[0])
    assert evaluation.stats[0] > 0.02


@pytest.mark.parametrize("seed", range(5))
def test_a_resample_has_the_ap_of_a_dataset_with_repeated_and_missing_images(seed):
    truth, found = random_detections(seed=seed)
    weights = resamples(6, 4, seed=seed)
    assert (weights.sum(axis=1) == 6).all() and (weights == 0).any() and (weights > 1).any()
    of_resamples = average_precision(matches_of(coco_eval(truth, found, 6)), weights)
    for times, ap in zip(weights, of_resamples, strict=True):
        chosen = np.repeat(np.arange(6), times)
        copies = [
            [{**x, "image_id": place} for place, i in enumerate(chosen) for x in part
             if x["image_id"] == i]
            for part in (truth, found)
        ]  # fmt: skip
        for number, annotation in enumerate(copies[0], start=1):
            annotation["id"] = number
        evaluation = coco_eval(*copies, 6)
        evaluation.accumulate()
        evaluation.summarize()
        assert ap == pytest.approx(100 * evaluation.stats[0])


def test_a_resample_without_any_object_has_no_ap():
    matches = Matches(
        np.array([0]), np.ones((10, 1), bool), np.zeros((10, 1), bool), np.array([1, 0])
    )
    ap = average_precision([matches], np.array([[1, 1], [0, 2]]))
    assert ap[0] == pytest.approx(100)
    assert np.isnan(ap[1])


def test_the_error_of_a_bootstrap_is_that_of_the_mean_over_images():
    of_images = np.random.default_rng(0).normal(0, 1, 50)
    differences = resamples(50, 4000, seed=1) @ of_images / 50
    expected = of_images.std() / np.sqrt(50)
    assert bootstrap_error(differences) == pytest.approx(expected, rel=0.05)
