import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from helpers import random_boxes
from oracles import slow_iou
from torch import tensor
from torch.nn import functional as F
from torch.testing import assert_close

from pisa_d2.roi_heads.predicting import PredictingOutputLayers
from pisa_d2.samplers import Predictions

NUM_CLASSES = 3
TRANSFORM = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))

needs_sigmoid = pytest.mark.skipif(
    not hasattr(FastRCNNOutputLayers, "sigmoid_cross_entropy_loss"),
    reason="this Detectron2 has no sigmoid cross-entropy for boxes",
)


def predictor(focal_gamma=None, **kwargs):
    kwargs = {"box2box_transform": TRANSFORM, "num_classes": NUM_CLASSES, **kwargs}
    made = PredictingOutputLayers(ShapeSpec(channels=4), **kwargs)
    made.focal_gamma = focal_gamma
    return made


def logits_and_classes(num=12):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(num, NUM_CLASSES + 1, generator=generator)
    return logits.requires_grad_(), torch.arange(num) % (NUM_CLASSES + 1)


def test_without_focal_loss_each_sample_has_the_stock_cross_entropy():
    logits, classes = logits_and_classes()
    losses = predictor().classification_losses(logits, classes)
    assert torch.equal(losses, F.cross_entropy(logits, classes, reduction="none"))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_loss_is_that_of_the_equation_and_its_gradient_that_of_autograd(gamma):
    logits, classes = logits_and_classes()
    losses = predictor(gamma).classification_losses(logits, classes)
    p = logits.softmax(dim=1).gather(1, classes[:, None])[:, 0]
    expected = -((1 - p) ** gamma) * p.log()
    assert_close(losses, expected)
    ours, theirs = (torch.autograd.grad(x.sum(), logits)[0] for x in (losses, expected))
    assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_has_a_finite_gradient_where_nothing_is_wrong(gamma):
    classes = torch.arange(NUM_CLASSES + 1)
    logits = (200.0 * F.one_hot(classes, NUM_CLASSES + 1)).requires_grad_()
    losses = predictor(gamma).classification_losses(logits, classes)
    assert not losses.any() and not torch.autograd.grad(losses.sum(), logits)[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [None, 2.0])
def test_losses_of_half_precision_are_computed_in_full(dtype, gamma):
    logits, classes = (values.detach() for values in logits_and_classes())
    losses = predictor(gamma).classification_losses(logits.to(dtype), classes)
    expected = predictor(gamma).classification_losses(logits.to(dtype).float(), classes)
    assert losses.dtype == torch.float32 and torch.equal(losses, expected)


@needs_sigmoid
@pytest.mark.parametrize("federated", [None, [0, 2]])
def test_sigmoid_losses_are_summed_over_the_classes_that_count(monkeypatch, federated):
    options = {"use_sigmoid_ce": True}
    if federated is not None:
        weights = torch.ones(NUM_CLASSES)
        options |= {"use_fed_loss": True, "fed_loss_num_classes": 2}
        options["get_fed_loss_cls_weights"] = lambda: weights
    made = predictor(**options)
    if federated is not None:
        # The draw includes the background, which has no logit in this loss.
        drawn = tensor([*federated, NUM_CLASSES])
        monkeypatch.setattr(made, "get_fed_loss_classes", lambda *args, **kwargs: drawn)
    logits, classes = logits_and_classes()
    losses = made.classification_losses(logits, classes)
    rows = zip(logits.detach().sigmoid().tolist(), classes.tolist(), strict=True)
    counting = range(NUM_CLASSES) if federated is None else federated
    expected = [
        -sum(math.log(probs[k] if k == class_ else 1 - probs[k]) for k in counting)
        for probs, class_ in rows
    ]
    assert_close(losses, tensor(expected))


def candidates(agnostic=False):
    """Make predictions, boxes and classes: ignored, of each class, and background."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(10) % (NUM_CLASSES + 2) - 1
    boxes = random_boxes(10, generator)
    gt_boxes = boxes + 6 * torch.rand(10, 4, generator=generator) - 3
    logits = 2 * torch.randn(10, NUM_CLASSES + 1, generator=generator)
    deltas = 0.3 * torch.randn(10, 4 if agnostic else 4 * NUM_CLASSES, generator=generator)
    return (logits.requires_grad_(), deltas.requires_grad_()), boxes, gt_boxes, classes


@pytest.mark.parametrize("agnostic", [False, True])
def test_predictions_are_those_of_one_candidate_at_a_time(agnostic):
    (logits, deltas), boxes, gt_boxes, classes = args = candidates(agnostic)
    made = predictor(cls_agnostic_bbox_reg=agnostic, loss_weight={"loss_box_reg": 3.0})
    ours = made.predict_candidates(*args)
    assert vars(ours).keys() == set(Predictions.FIELDS)
    assert not any(values.requires_grad for values in vars(ours).values())
    for i, class_ in enumerate(classes.tolist()):
        is_positive = 0 <= class_ < NUM_CLASSES
        probs = logits[i].softmax(dim=0)
        own_class = class_ if is_positive else int(probs[:NUM_CLASSES].argmax())
        own = deltas[i] if agnostic else deltas[i].split(4)[own_class]
        box = TRANSFORM.apply_deltas(own[None], boxes[i : i + 1])[0]
        label = NUM_CLASSES if class_ < 0 else class_
        assert_close(ours.cls_losses[i], -probs[label].log())
        wanted = TRANSFORM.get_deltas(boxes[i : i + 1], gt_boxes[i : i + 1])[0]
        box_loss = 3 * sum((own - wanted).abs().tolist()) if is_positive else 0
        assert ours.box_losses[i].item() == pytest.approx(box_loss, rel=1e-5)
        assert_close(ours.scores[i], probs[:NUM_CLASSES].max())
        assert_close(ours.boxes[i], box)
        iou = slow_iou(box.tolist(), gt_boxes[i].tolist())
        assert ours.ious[i].item() == pytest.approx(iou, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", Predictions.FIELDS)
def test_only_the_predictions_that_are_needed_are_made(name):
    args = candidates()
    made = predictor()
    ours = made.predict_candidates(*args, needs=[name])
    assert vars(ours).keys() == {name}
    assert torch.equal(getattr(ours, name), getattr(made.predict_candidates(*args), name))
    assert not vars(made.predict_candidates(*args, needs=()))


@needs_sigmoid
def test_scores_are_those_of_the_sigmoid_if_it_is_used():
    args = candidates()
    scores = predictor(use_sigmoid_ce=True).predict_candidates(*args, needs=["scores"]).scores
    assert_close(scores, args[0][0][:, :NUM_CLASSES].detach().sigmoid().amax(dim=1))


def test_no_candidates_have_no_predictions():
    (logits, deltas), *others = candidates()
    none = (logits[:0], deltas[:0]), *(values[:0] for values in others)
    ours = predictor().predict_candidates(*none)
    assert [len(values) for values in vars(ours).values()] == [0] * 5


def test_only_box_losses_take_a_copy_to_the_host(as_on_gpu):
    (logits, deltas), *others = candidates()
    moved = (as_on_gpu(logits), as_on_gpu(deltas)), *map(as_on_gpu, others)
    made = predictor()
    needs = [name for name in Predictions.FIELDS if name != "box_losses"]
    ours = made.predict_candidates(*moved, needs=needs)
    theirs = made.predict_candidates((logits, deltas), *others, needs=needs)
    for name in needs:
        found = getattr(ours, name).as_subclass(torch.Tensor)
        assert torch.equal(found, getattr(theirs, name))
