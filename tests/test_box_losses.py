import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from hypothesis import given
from hypothesis import strategies as st
from oracles import slow_balanced_l1
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from pisa_d2.box_losses import balanced_l1_loss, box_regression_losses
from pisa_d2.config import BalancedL1

TRANSFORM = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
STOCK_LOSS_TYPES = ["smooth_l1", "giou", "diou", "ciou"]
LOSS_TYPES = ["smooth_l1", "balanced_l1", "giou", "diou", "ciou"]
NUM_CLASSES = 3


def random_samples(num_samples: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make deltas for all classes, proposals, and their ground truths with classes."""
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(num_samples, NUM_CLASSES, 4, generator=generator)
    corners = torch.rand(num_samples, 2, generator=generator) * 50
    sizes = torch.rand(num_samples, 2, generator=generator) * 50 + 5
    proposals = torch.cat([corners, corners + sizes], dim=1)
    gt_boxes = proposals + torch.rand(num_samples, 4, generator=generator) * 4 - 2
    gt_classes = torch.randint(0, NUM_CLASSES, (num_samples,), generator=generator)
    return deltas.requires_grad_(), proposals, gt_boxes, gt_classes


@pytest.mark.parametrize("smooth_l1_beta", [0.0, 0.5])
@pytest.mark.parametrize("loss_type", STOCK_LOSS_TYPES)
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
    beta = 0.5 if loss_type == "balanced_l1" else 0.0
    losses = box_regression_losses(deltas, proposals, gt_boxes, TRANSFORM, loss_type, beta)
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


BETAS = [0.05, 0.11, 0.5, 1.0, 2.0]
SHAPES = [(0.5, 1.5), (0.2, 1.5), (1.0, 0.7)]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("alpha", "gamma"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_balanced_l1_and_its_gradient_are_those_of_the_equations(alpha, gamma, beta, dtype):
    errors = torch.cat([torch.linspace(-3, 3, 241), torch.tensor([0.0, beta, -beta, 1e-6, 1e6])])
    targets = torch.linspace(-1, 1, len(errors)).to(dtype)
    inputs = (targets + errors).requires_grad_()
    losses = balanced_l1_loss(inputs, targets, alpha, gamma, beta)
    gradients = torch.autograd.grad(losses.sum(), inputs)[0]
    expected = [slow_balanced_l1(x, alpha, gamma, beta) for x in (inputs - targets).tolist()]
    assert losses.shape == errors.shape and losses.dtype == dtype
    exact = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    for ours, theirs in zip((losses, gradients), zip(*expected, strict=True), strict=True):
        assert_close(ours, torch.tensor(theirs, dtype=dtype), **exact)


@pytest.mark.parametrize("beta", BETAS)
def test_balanced_l1_has_no_gradient_without_an_error_and_gamma_from_beta_on(beta):
    errors = torch.tensor([0.0, beta, -beta, 1e30, -1e30], requires_grad=True)
    losses = balanced_l1_loss(errors, torch.zeros(5), 0.5, 1.5, beta)
    gradients = torch.autograd.grad(losses.sum(), errors)[0]
    assert losses[0] == 0
    assert_close(gradients, torch.tensor([0, 1.5, -1.5, 1.5, -1.5]))


@pytest.mark.parametrize("beta", BETAS)
def test_errors_too_large_for_the_inner_form_leave_no_nan_in_the_gradient(beta):
    alpha, gamma = 0.05, 1.0  # b is 5e8: b x / beta exceeds float32
    errors = torch.tensor([1e30, -1e30, 0.01], requires_grad=True)
    losses = balanced_l1_loss(errors, torch.zeros(3), alpha, gamma, beta)
    gradients = torch.autograd.grad(losses.sum(), errors)[0]
    assert losses.isfinite().all()
    expected = [slow_balanced_l1(x, alpha, gamma, beta)[1] for x in errors.tolist()]
    assert_close(gradients, torch.tensor(expected))


@pytest.mark.parametrize("beta", BETAS)
def test_balanced_l1_and_its_gradient_have_no_step_at_beta(beta):
    step = 1e-9 * beta
    errors = torch.tensor([beta - step, beta + step], dtype=torch.float64, requires_grad=True)
    losses = balanced_l1_loss(errors, torch.zeros(2, dtype=torch.float64), 0.5, 1.5, beta)
    gradients = torch.autograd.grad(losses.sum(), errors)[0]
    assert_close(losses[0], losses[1], rtol=0, atol=4 * step)
    assert_close(gradients[0], gradients[1], rtol=0, atol=1e-8)


@pytest.mark.parametrize("beta", BETAS)
def test_balanced_l1_passes_the_gradient_check(beta):
    inputs = torch.linspace(-2.03, 2.04, 12, dtype=torch.float64, requires_grad=True)
    targets = torch.zeros(12, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: balanced_l1_loss(x, targets, 0.5, 1.5, beta), inputs, eps=1e-7, atol=1e-5
    )


@pytest.mark.parametrize("beta", BETAS)
def test_balanced_l1_becomes_smooth_l1_where_alpha_is_large(beta):
    errors = torch.linspace(-3, 3, 61, dtype=torch.float64)
    targets = torch.zeros_like(errors)
    losses = balanced_l1_loss(errors, targets, 1500.0, 1.5, beta)
    smooth = F.smooth_l1_loss(errors, targets, beta=beta, reduction="none")
    assert_close(losses, 1.5 * smooth, rtol=1e-3, atol=1e-12)


@given(
    errors=st.lists(st.floats(-100, 100), min_size=1, max_size=20),
    alpha=st.floats(0.01, 10),
    ratio=st.floats(0.001, 40),
    beta=st.floats(0.01, 100),
    scale=st.floats(0.1, 10),
)
def test_balanced_l1_rises_with_the_error_ever_faster_up_to_gamma(
    errors, alpha, ratio, beta, scale
):
    gamma = alpha * ratio
    BalancedL1(alpha, min(gamma, 40 * alpha))
    x = torch.tensor(errors, dtype=torch.float64).abs().sort().values.requires_grad_()
    losses = balanced_l1_loss(x, torch.zeros_like(x), alpha, gamma, beta)
    gradients = torch.autograd.grad(losses.sum(), x)[0]
    # For small numbers, ln(b u + 1) loses digits in the sum with 1, and so does the loss.
    digits = 1e-12 * alpha * (1 + 1 / ratio)
    assert (losses >= -digits * beta).all() and (losses <= gamma * x + digits * beta).all()
    assert (losses.diff() >= -digits * beta).all() and (gradients.diff() >= -digits).all()
    assert (gradients >= -digits).all() and (gradients <= gamma + digits).all()
    mirrored = balanced_l1_loss(torch.zeros_like(x), x, alpha, gamma, beta)
    assert torch.equal(mirrored, losses)
    scaled = balanced_l1_loss(scale * x, torch.zeros_like(x), alpha, gamma, scale * beta)
    assert_close(scaled, scale * losses, rtol=1e-7, atol=100 * digits * beta)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_balanced_l1_of_half_precision_is_computed_in_float32(dtype):
    inputs, targets = torch.linspace(-2, 2, 41).to(dtype), torch.zeros(41, dtype=dtype)
    losses = balanced_l1_loss(inputs, targets, 0.5, 1.5, 0.11)
    assert losses.dtype == torch.float32
    assert_close(losses, balanced_l1_loss(inputs.float(), targets.float(), 0.5, 1.5, 0.11))


def test_balanced_l1_of_a_box_is_the_sum_over_its_deltas():
    deltas, proposals, gt_boxes, _ = random_samples(6)
    wanted = TRANSFORM.get_deltas(proposals, gt_boxes)
    for settings, (alpha, gamma) in ((None, (0.5, 1.5)), (BalancedL1(0.2, 0.9), (0.2, 0.9))):
        losses = box_regression_losses(
            deltas[:, 0], proposals, gt_boxes, TRANSFORM, "balanced_l1", 0.11, settings
        )
        errors = (deltas[:, 0] - wanted).tolist()
        expected = [sum(slow_balanced_l1(x, alpha, gamma, 0.11)[0] for x in row) for row in errors]
        assert_close(losses, torch.tensor(expected))
