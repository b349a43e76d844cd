import pytest
import torch
from helpers import build_sampler as build
from helpers import random_boxes, sampled_by, small_cfg
from hypothesis import given
from hypothesis import strategies as st
from oracles import slow_iou_hlr, slow_joint_choice, slow_score_hlr

from pisa_d2.samplers import (
    Candidates,
    OHEMSampler,
    Predictions,
    Quota,
    build_batch_sampler,
)

SAMPLERS = ["HardSampler", "IoUHLRSampler", "ScoreHLRSampler"]
SCORE_HLR = "MODEL.ROI_HEADS.NEGATIVE_SAMPLER.SCORE_HLR"
HARD = "MODEL.ROI_HEADS.HARD_SAMPLER"


def candidates(size, seed=0, **predictions):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(5, size, generator=generator)
    made = {"cls_losses": values[0], "box_losses": values[1], "scores": values[2]}
    made |= {"ious": values[3], "boxes": random_boxes(size, generator)}
    made |= {name: torch.as_tensor(value) for name, value in predictions.items()}
    objects = torch.randint(4, (size,), generator=generator)
    return Candidates(
        random_boxes(size, generator), values[4], objects, objects % 2, Predictions(**made)
    )


@pytest.mark.parametrize("name", SAMPLERS)
@given(st.integers(0, 40), st.integers(0, 50), st.integers(0, 5))
def test_indices_are_different_in_range_and_as_many_as_there_can_be(name, size, num, seed):
    chosen = build(name)(candidates(size, seed), num).tolist()
    assert len(chosen) == len(set(chosen)) == min(size, num)
    assert set(chosen) <= set(range(size))


@pytest.mark.parametrize("name", SAMPLERS)
def test_predictions_that_are_not_numbers_come_after_those_that_are(name):
    broken = torch.arange(30) % 3 == 0
    given_ = candidates(30)
    predictions = [
        v.clone().index_fill_(0, broken.nonzero()[:, 0], float("nan"))
        for v in vars(given_.predictions).values()
    ]
    one_object = torch.zeros(30, dtype=torch.int64)
    given_ = Candidates(
        given_.boxes, given_.ious, one_object, one_object, Predictions(*predictions)
    )
    num_ranked = int((given_.predictions.scores > 0.05).sum()) if name.startswith("Score") else 20
    assert not broken[build(name)(given_, num_ranked)].any()
    assert len(build(name)(given_, 30)) == 30


def test_hard_samples_are_those_of_the_highest_loss_first_come_at_equal_loss():
    chosen = build("HardSampler")(candidates(5, cls_losses=[0.1, 0.7, 0.3, 0.7, 0.2]), 3)
    assert chosen.tolist() == [1, 3, 2]


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 20))
def test_prime_positives_are_those_of_the_lowest_iou_hlr(size, num, seed):
    given_ = candidates(size, seed)
    values = given_.predictions.ious, given_.objects, given_.classes
    expected = slow_iou_hlr(*(v.tolist() for v in values))
    assert build("IoUHLRSampler")(given_, num).tolist() == expected[:num]


def score_hlr(given_, score_thresh, nms_thresh):
    values = given_.predictions.boxes, given_.predictions.scores
    return slow_score_hlr(*(v.tolist() for v in values), score_thresh, nms_thresh)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 20))
def test_prime_negatives_are_those_of_the_lowest_score_hlr_and_the_rest_random(size, num, seed):
    scores = torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 0.1
    given_ = candidates(size, seed, scores=scores)
    sampler = build("ScoreHLRSampler")
    chosen = sampler(given_, num)
    order = score_hlr(given_, 0.05, 0.5)
    assert chosen[: len(order)].tolist() == order[:num]

    ranks, n_max = sampler.ranks(given_, chosen, num)
    assert n_max == max(num, len(order))
    last = max(len(order) - 1, 0)
    assert ranks.tolist() == [min(i, last) for i in range(len(chosen))]


def test_negatives_of_low_score_are_as_likely_as_each_other():
    torch.manual_seed(0)
    sampler = build("ScoreHLRSampler")
    given_ = candidates(25, scores=torch.tensor([0.9] * 5 + [0.01] * 20))
    counts = torch.zeros(25)
    for _ in range(1000):
        counts[sampler(given_, 15)] += 1
    assert (counts[:5] == 1000).all()
    chi_squared = ((counts[5:] - 500) ** 2 / 250).sum()
    assert chi_squared < 44  # 19 degrees of freedom; exceeds 43.8 once in 1,000


def test_the_thresholds_of_score_hlr_are_its_own():
    given_ = candidates(40)
    for scores, overlap in ((0.5, 0.5), (0.05, 0.1)):
        sampler = build(
            "ScoreHLRSampler",
            f"{SCORE_HLR}.SCORE_THRESH",
            scores,
            f"{SCORE_HLR}.NMS_THRESH",
            overlap,
        )
        order = score_hlr(given_, scores, overlap)
        assert sampler(given_, 15).tolist() == order[:15]


def quota_of(num, batch):
    """Make a quota of ``num`` samples per image, with two classes."""
    per_image, rest = divmod(num, len(batch))
    assert rest == 0
    return Quota(per_image, positive_fraction=0.25, num_classes=2)


@pytest.mark.parametrize("nms_thresh", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("num", [0, 21, 501])
def test_both_kinds_of_the_batch_are_chosen_together_as_in_the_original(nms_thresh, num):
    batch = [candidates(size, seed) for seed, size in enumerate([30, 0, 45])]
    for given_ in batch:
        given_.classes[::5] = 2  # negatives
        given_.classes[3::10] = -1  # ignored
    choices = OHEMSampler(nms_thresh=nms_thresh)(batch, quota_of(num, batch))
    chosen = {(image, i) for image, c in enumerate(choices) for i in c.indices.tolist()}
    images = [
        (c.boxes, c.predictions.cls_losses + c.predictions.box_losses, c.classes) for c in batch
    ]
    images = [tuple(v.tolist() for v in image) for image in images]
    assert chosen == slow_joint_choice(images, num, nms_thresh)
    for c, choice in zip(batch, choices, strict=True):
        assert (c.classes[choice.positives] < 2).all() and (c.classes[choice.negatives] == 2).all()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_losses_that_are_no_numbers_are_chosen_before_what_is_not_eligible(value):
    # Otherwise a batch of NaN would be an empty batch, whose loss of 0 hides the fault.
    given_ = candidates(30, cls_losses=torch.full((30,), value))
    given_.classes[:] = -1
    given_.classes[10:14] = 2
    (choice,) = OHEMSampler(nms_thresh=1.0)([given_], quota_of(20, [given_]))
    assert choice.indices.tolist() == [10, 11, 12, 13]


def test_positives_of_nan_loss_are_not_crowded_out_by_negatives():
    given_ = candidates(30)
    given_.predictions.box_losses[:3] = float("nan")
    (choice,) = OHEMSampler(nms_thresh=1.0)([given_], quota_of(5, [given_]))
    assert {0, 1, 2} <= set(choice.positives.tolist())


def test_choosing_both_kinds_together_takes_the_sampler_for_both():
    opts = [*sampled_by("HardSampler", "RandomSampler"), f"{HARD}.JOINT", True]
    with pytest.raises(ValueError, match=r"JOINT = True.*'HardSampler', 'RandomSampler'"):
        build_batch_sampler(small_cfg(*opts))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("ScoreHLRSampler", f"{SCORE_HLR}.NMS_THRESH"),
        ("ScoreHLRSampler", f"{SCORE_HLR}.SCORE_THRESH"),
    ],
)
def test_a_wrong_setting_names_the_key(name, key):
    with pytest.raises(ValueError, match=rf"{key} = 1.5.*in \[0, 1\]"):
        build(name, key, 1.5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_is_copied_to_the_host(name, as_on_gpu):
    given_ = candidates(30)
    predictions = Predictions(
        **{name: as_on_gpu(values) for name, values in vars(given_.predictions).items()}
    )
    objects = as_on_gpu(given_.objects)
    moved = Candidates(given_.boxes, given_.ious, objects, objects % 2, predictions)
    torch.manual_seed(0)
    chosen = build(name)(moved, 12)
    torch.manual_seed(0)
    assert chosen.as_subclass(torch.Tensor).tolist() == build(name)(given_, 12).tolist()
    if name == "ScoreHLRSampler":
        build(name).ranks(moved, chosen, 12)
