"""Balanced L1 as the box loss of every kind of heads, with and without PISA."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from helpers import (
    HEADS,
    IMAGE_SIZE,
    random_batch,
    random_boxes,
    sampled_by,
    small_cfg,
    small_retinanet_cfg,
    switch,
)
from oracles import slow_balanced_l1

from pisa_d2.config import CARL, BalancedL1
from pisa_d2.roi_heads.fast_rcnn import PISAFastRCNNOutputLayers

pytestmark = pytest.mark.usefixtures("storage")

NUM_CLASSES = 3
BETA = 0.11
TRANSFORM = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
ALL_OFF, ONLY_CARL = switch(False, False, False), switch(False, False, True)
BALANCED = ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "balanced_l1"]
BALANCED_RETINANET = ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "balanced_l1"]


def slow_box_loss(deltas, wanted, alpha=0.5, gamma=1.5):
    """Sum the loss of a box, one delta at a time."""
    return sum(slow_balanced_l1(x, alpha, gamma, BETA)[0] for x in (deltas - wanted).tolist())


def build(cls=PISAFastRCNNOutputLayers, **kwargs):
    kwargs = {"box_reg_loss_type": "balanced_l1", "smooth_l1_beta": BETA, **kwargs}
    if cls is PISAFastRCNNOutputLayers:
        kwargs = {**dict.fromkeys(("isr_p", "isr_n", "carl")), **kwargs}
    transform = {"box2box_transform": TRANSFORM, "num_classes": NUM_CLASSES}
    return cls(ShapeSpec(channels=16), **transform, **kwargs)


def samples(num_pos=12, num_neg=20, agnostic=False):
    """Make logits, deltas and the proposals of one image, positives first."""
    generator = torch.Generator().manual_seed(0)
    num = num_pos + num_neg
    proposals = Instances(IMAGE_SIZE)
    proposals.proposal_boxes = Boxes(random_boxes(num, generator))
    shifts = 6 * torch.rand(num, 4, generator=generator) - 3
    proposals.gt_boxes = Boxes(proposals.proposal_boxes.tensor + shifts)
    proposals.gt_classes = torch.randint(NUM_CLASSES, (num,), generator=generator)
    proposals.gt_classes[num_pos:] = NUM_CLASSES
    scores = torch.randn(num, NUM_CLASSES + 1, generator=generator).requires_grad_()
    wanted = TRANSFORM.get_deltas(proposals.proposal_boxes.tensor, proposals.gt_boxes.tensor)
    noise = 0.3 * torch.randn(num, 1 if agnostic else NUM_CLASSES, 4, generator=generator)
    deltas = (wanted[:, None] + noise).flatten(1).requires_grad_()
    return (scores, deltas), proposals


def losses_by_loops(predictions, p, *shape):
    losses = []
    for i, class_ in enumerate(p.gt_classes.tolist()):
        if class_ < NUM_CLASSES:
            box, gt_box = p.proposal_boxes.tensor[i : i + 1], p.gt_boxes.tensor[i : i + 1]
            own = predictions[1][i].view(-1, 4)
            own = own[class_ if len(own) > 1 else 0]
            losses.append(slow_box_loss(own, TRANSFORM.get_deltas(box, gt_box)[0], *shape))
    return losses


@pytest.mark.parametrize("agnostic", [False, True])
def test_with_pisa_off_the_box_loss_is_that_of_the_equations_and_the_other_stock(agnostic):
    predictions, proposals = samples(agnostic=agnostic)
    weight = {"loss_weight": {"loss_box_reg": 3.0}, "cls_agnostic_bbox_reg": agnostic}
    losses = build(**weight).losses(predictions, [proposals])
    stock = build(FastRCNNOutputLayers, **weight, box_reg_loss_type="smooth_l1")
    expected = stock.losses(predictions, [proposals])
    assert losses.keys() == expected.keys()
    torch.testing.assert_close(losses["loss_cls"], expected["loss_cls"])
    by_loops = losses_by_loops(predictions, proposals)
    assert len(by_loops) == 12
    assert losses["loss_box_reg"].item() == pytest.approx(3 * sum(by_loops) / 32, rel=1e-4)


def test_carl_weighs_balanced_l1():
    predictions, proposals = samples()
    losses = build(carl=CARL(gamma=1.0, beta=0.2, loss_weight=0.5)).losses(predictions, [proposals])
    probs = predictions[0].softmax(dim=1)[torch.arange(12), proposals.gt_classes[:12]].tolist()
    values = [0.8 * p + 0.2 for p in probs]
    by_loops = losses_by_loops(predictions, proposals)
    weighted = sum(v * loss for v, loss in zip(values, by_loops, strict=True)) * 12 / sum(values)
    assert losses["loss_carl"].item() == pytest.approx(0.5 * weighted / 32, rel=1e-4)
    assert losses["loss_box_reg"].item() == pytest.approx(sum(by_loops) / 32, rel=1e-4)


def test_joint_hard_sampling_goes_by_the_same_box_loss():
    predictions, proposals = samples()
    predictor = build(loss_weight={"loss_box_reg": 2.0}, balanced_l1=BalancedL1(0.2, 0.9))
    result = predictor.predict_candidates(
        predictions,
        proposals.proposal_boxes.tensor,
        proposals.gt_boxes.tensor,
        proposals.gt_classes,
        needs=["box_losses"],
    )
    expected = torch.zeros(32)
    expected[:12] = 2 * torch.tensor(losses_by_loops(predictions, proposals, 0.2, 0.9))
    torch.testing.assert_close(result.box_losses, expected, rtol=1e-4, atol=1e-5)


def test_settings_reach_the_loss():
    predictions, proposals = samples()
    losses = build(balanced_l1=BalancedL1(0.2, 0.9)).losses(predictions, [proposals])
    by_loops = losses_by_loops(predictions, proposals, 0.2, 0.9)
    assert losses["loss_box_reg"].item() == pytest.approx(sum(by_loops) / 32, rel=1e-4)


@pytest.mark.parametrize("num_pos, num_neg", [(0, 8), (0, 0), (3, 0)])
@pytest.mark.parametrize("carl", [None, CARL(1.0, 0.2, 1.0)])
def test_batches_that_lack_something_give_finite_losses_with_a_graph(num_pos, num_neg, carl):
    _, proposals = samples(num_pos, num_neg)
    predictor = build(carl=carl)
    losses = predictor.losses(predictor(torch.randn(num_pos + num_neg, 16)), [proposals])
    sum(losses.values()).backward()
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in predictor.parameters())


def step(cfg, num_objects=(3, 0, 4)):
    """Take a training step; return its losses and the parameters that they reach."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    losses = model(random_batch(num_objects))
    sum(losses.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for grad in grads.values())
    return {name: loss.item() for name, loss in losses.items()}, grads.keys()


@pytest.mark.parametrize("parts", [ALL_OFF, ONLY_CARL, []], ids=["off", "CARL", "PISA"])
@pytest.mark.parametrize("heads", HEADS)
def test_it_changes_the_box_losses_of_all_heads_and_no_other(heads, parts):
    smooth, reached = step(small_cfg(*HEADS[heads], *parts))
    balanced, ours = step(small_cfg(*HEADS[heads], *parts, *BALANCED))
    assert balanced.keys() == smooth.keys() and ours == reached
    # The later stages of a cascade train on the same boxes: no step was taken yet.
    for name, loss in smooth.items():
        if name.startswith(("loss_box_reg", "loss_carl")):
            # alpha b = 9.5 times smooth L1 for small errors, 1.5 times for large ones.
            assert 1.4 * loss < balanced[name] < 9.6 * loss, name
        else:
            assert balanced[name] == pytest.approx(loss, rel=1e-5), name


@pytest.mark.parametrize("heads", HEADS)
def test_joint_hard_sampling_trains_with_it(heads):
    hard = sampled_by("HardSampler", "HardSampler")
    joint = ["MODEL.ROI_HEADS.HARD_SAMPLER.JOINT", True]
    losses, _ = step(small_cfg(*HEADS[heads], *ALL_OFF, *BALANCED, *hard, *joint))
    assert all(math.isfinite(loss) for loss in losses.values())


def test_the_config_says_how_it_is_shaped():
    shape = ["MODEL.BALANCED_L1.ALPHA", 0.2, "MODEL.BALANCED_L1.GAMMA", 0.9]
    for cfg in (small_cfg(*BALANCED, *shape), small_retinanet_cfg(*BALANCED_RETINANET, *shape)):
        model = build_model(cfg)
        part = model.roi_heads.box_predictor if hasattr(model, "roi_heads") else model
        assert part.balanced_l1 == BalancedL1(0.2, 0.9)


@pytest.mark.parametrize(
    "cfg, key",
    [
        (small_cfg(*BALANCED, "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", 0.0), "SMOOTH_L1_BETA"),
        (
            small_retinanet_cfg(*BALANCED_RETINANET, "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.0),
            "SMOOTH_L1_LOSS_BETA",
        ),
    ],
)
def test_a_beta_of_0_is_refused_when_the_model_is_built(cfg, key):
    with pytest.raises(ValueError, match=rf"{key} = 0.0 is not allowed.*balanced_l1"):
        build_model(cfg)


@pytest.mark.parametrize("parts", [ALL_OFF, ONLY_CARL, []], ids=["off", "CARL", "PISA"])
@pytest.mark.parametrize("num_objects", [(3, 0, 4), (0, 0)])
def test_it_changes_the_box_loss_of_retinanet_and_no_other(parts, num_objects):
    smooth, reached = step(small_retinanet_cfg(*parts), num_objects)
    balanced, ours = step(small_retinanet_cfg(*parts, *BALANCED_RETINANET), num_objects)
    assert balanced.keys() == smooth.keys() and ours == reached
    for name, loss in smooth.items():
        if name == "loss_cls":
            assert balanced[name] == pytest.approx(loss, rel=1e-5)
        else:
            assert 1.4 * loss <= balanced[name] <= 9.6 * loss, name
            assert (balanced[name] > 0) == (sum(num_objects) > 0)


def test_retinanets_box_loss_is_that_of_the_equations():
    shape = ["MODEL.BALANCED_L1.ALPHA", 0.2, "MODEL.BALANCED_L1.GAMMA", 0.9]
    model = build_model(small_retinanet_cfg(*ALL_OFF, *BALANCED_RETINANET, *shape))
    generator = torch.Generator().manual_seed(0)
    anchors = random_boxes(10, generator)
    labels = [torch.tensor([0, 3, 1, -1, 2, 3, 0, 3, 3, -1]), torch.full((10,), 3)]
    gt_boxes = [anchors + 6 * torch.rand(10, 4, generator=generator) - 3 for _ in labels]
    deltas = 0.3 * torch.randn(2, 10, 4, generator=generator)
    objects = [torch.arange(10), torch.zeros(10, dtype=torch.int64)]
    logits = torch.zeros(2, 10, NUM_CLASSES)
    targets = (torch.cat(of_images) for of_images in (labels, gt_boxes, objects))
    losses = model.pisa_losses([Boxes(anchors)], [logits], [deltas], *targets)
    assert model.smooth_l1_beta == BETA
    wanted = model.box2box_transform.get_deltas(anchors, gt_boxes[0])
    total = sum(slow_box_loss(deltas[0, i], wanted[i], 0.2, 0.9) for i in (0, 2, 4, 6))
    assert losses["loss_box_reg"].item() == pytest.approx(total / model.loss_normalizer, rel=1e-4)
