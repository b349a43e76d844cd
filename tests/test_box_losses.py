import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from torch import Tensor
from torch.testing import assert_close

from pisa_d2.box_losses import box_regression_losses

TRANSFORM = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
LOSS_TYPES = ["smooth_l1", "giou", "diou", "ciou"]
NUM_CLASSES = 3


def random_samples(num_samples: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Deltas for all classes, proposals, their ground truths and its classes."""
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(num_samples, NUM_CLASSES, 4, generator=generator)
    corners = torch.rand(num_samples, 2, generator=generator) * 50
    sizes = torch.rand(num_samples, 2, generator=generator) * 50 + 5
    proposals = torch.cat([corners, corners + sizes], dim=1)
    gt_boxes = proposals + torch.rand(num_samples, 4, generator=generator) * 4 - 2
    gt_classes = torch.randint(0, NUM_CLASSES, (num_samples,), generator=generator)
    return deltas.requires_grad_(), proposals, gt_boxes, gt_classes


@pytest.mark.parametrize("smooth_l1_beta", [0.0, 0.5])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_sum_to_those_of_detectron2(loss_type, smooth_l1_beta):
    stock = FastRCNNOutputLayers(
        ShapeSpec(channels=1),
        box2box_transform=TRANSFORM,
        num_classes=NUM_CLASSES,
        box_reg_loss_type=loss_type,
        smooth_l1_beta=smooth_l1_beta,
    )
    deltas, proposals, gt_boxes, gt_classes = random_samples(20)
    expected = stock.box_reg_loss(proposals, gt_boxes, deltas.flatten(1), gt_classes) * 20
    losses = box_regression_losses(
        deltas[torch.arange(20), gt_classes],
        proposals,
        gt_boxes,
        TRANSFORM,
        loss_type,
        smooth_l1_beta,
    )
    assert_close(losses.sum(), expected)
    assert_close(torch.autograd.grad(losses.sum(), deltas), torch.autograd.grad(expected, deltas))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_each_box_has_the_loss_that_it_has_alone(loss_type):
    deltas, proposals, gt_boxes, _ = random_samples(6)
    args = deltas[:, 0], proposals, gt_boxes
    losses = box_regression_losses(*args, TRANSFORM, loss_type, 0.5)
    alone = [
        box_regression_losses(*(t[i : i + 1] for t in args), TRANSFORM, loss_type, 0.5)
        for i in range(6)
    ]
    assert losses.shape == (6,)
    assert_close(losses, torch.cat(alone))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_box_regressed_onto_its_ground_truth_has_no_loss(loss_type):
    _, proposals, gt_boxes, _ = random_samples(6)
    deltas = TRANSFORM.get_deltas(proposals, gt_boxes)
    losses = box_regression_losses(deltas, proposals, gt_boxes, TRANSFORM, loss_type, 0.0)
    assert_close(losses, torch.zeros(6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_boxes_have_no_losses_but_a_graph(loss_type):
    deltas = torch.zeros(0, 4, requires_grad=True)
    none = torch.zeros(0, 4)
    losses = box_regression_losses(deltas, none, none, TRANSFORM, loss_type, 0.5)
    assert_close(losses, torch.zeros(0))
    losses.sum().backward()
    assert_close(deltas.grad, torch.zeros(0, 4))


def test_an_unknown_loss_type_is_refused_with_the_choices():
    none = torch.zeros(0, 4)
    with pytest.raises(ValueError) as error:
        box_regression_losses(none, none, none, TRANSFORM, "iou", 0.0)
    for part in ("BBOX_REG_LOSS_TYPE", "'iou'", str(LOSS_TYPES)):
        assert part in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_box_that_is_not_finite_has_a_loss_that_is_not_and_leaves_the_others_theirs(
    loss_type, value
):
    deltas, proposals, gt_boxes, _ = random_samples(6)
    args = proposals, gt_boxes, TRANSFORM, loss_type, 0.5
    expected = box_regression_losses(deltas[:, 0], *args)
    broken = deltas[:, 0].detach().clone()
    broken[2, 0] = value
    losses = box_regression_losses(broken, *args)
    assert not 0 <= losses[2] < 1e30
    assert_close(losses[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])
