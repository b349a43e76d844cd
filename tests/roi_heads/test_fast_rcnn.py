import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from helpers import IMAGE_SIZE, random_boxes, small_cfg, switch
from oracles import slow_iou, slow_negative_weights, slow_positive_weights
from torch.nn import functional as F

from pisa_d2.config import CARL, ISR, NegativeISR
from pisa_d2.roi_heads.fast_rcnn import PISAFastRCNNOutputLayers
from pisa_d2.roi_heads.sample_fields import IMPORTANCE_FIELD, OBJECT_FIELD

pytestmark = pytest.mark.usefixtures("storage")

NUM_CLASSES = 5
TRANSFORM = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
PARTS = {
    "isr_p": ISR(gamma=2.0, beta=0.0),
    "isr_n": NegativeISR(gamma=0.5, beta=0.0, nms_thresh=0.5, score_thresh=0.05),
    "carl": CARL(gamma=1.0, beta=0.2, loss_weight=1.0),
}
BOX_LOSSES = ["smooth_l1", "giou", "diou", "ciou"]


def build(cls=PISAFastRCNNOutputLayers, **kwargs):
    if cls is not FastRCNNOutputLayers:
        kwargs = {**dict.fromkeys(PARTS), **kwargs}
    kwargs = {"box2box_transform": TRANSFORM, "num_classes": NUM_CLASSES, **kwargs}
    return cls(ShapeSpec(channels=16), **kwargs)


def sample_image(num_pos, num_neg, first_object, generator, num_objects=3):
    """Make proposals as label_and_sample_proposals returns them."""
    gt_boxes = random_boxes(num_objects, generator)
    gt_classes = torch.randint(NUM_CLASSES, (num_objects,), generator=generator)
    matched = torch.randint(num_objects, (num_pos + num_neg,), generator=generator)
    boxes = random_boxes(num_pos + num_neg, generator)
    shifts = 6 * torch.rand(num_pos, 4, generator=generator) - 3
    boxes[:num_pos] = gt_boxes[matched[:num_pos]] + shifts
    proposals = Instances(IMAGE_SIZE)
    proposals.proposal_boxes = Boxes(boxes)
    proposals.gt_classes = gt_classes[matched]
    proposals.gt_classes[num_pos:] = NUM_CLASSES
    proposals.gt_boxes = Boxes(gt_boxes[matched])
    proposals.set(OBJECT_FIELD, first_object + matched)
    return proposals


def image_without_objects(num_neg, generator):
    proposals = Instances(IMAGE_SIZE)
    proposals.proposal_boxes = Boxes(random_boxes(num_neg, generator))
    proposals.gt_classes = torch.full((num_neg,), NUM_CLASSES)
    return proposals


def sample_batch(sizes=((6, 20), (9, 14), (4, 25)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [sample_image(p, n, 10 * i, generator) for i, (p, n) in enumerate(sizes)]


def predict(proposals, seed=0, agnostic=False):
    generator = torch.Generator().manual_seed(seed)
    num = sum(len(p) for p in proposals)
    scores = 2 * torch.randn(num, NUM_CLASSES + 1, generator=generator)
    deltas = 0.3 * torch.randn(num, 4 if agnostic else 4 * NUM_CLASSES, generator=generator)
    return scores.requires_grad_(), deltas.requires_grad_()


def weights_in_gradient(predictor, proposals, predictions):
    """Measure the weight of each sample: its logits' gradient, relative to the plain one."""
    scores = predictions[0]
    loss = predictor.losses(predictions, proposals)["loss_cls"]
    gradient = torch.autograd.grad(loss, scores)[0]
    plain = F.cross_entropy(scores, torch.cat([p.gt_classes for p in proposals]))
    return gradient[:, 0] / torch.autograd.grad(plain, scores)[0][:, 0]


def regressed(predictions, proposals, classes):
    boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
    deltas = predictions[1].detach().view(len(boxes), NUM_CLASSES, 4)
    return TRANSFORM.apply_deltas(deltas[torch.arange(len(boxes)), classes], boxes)


def positive_weights_by_loops(predictions, proposals, isr_p):
    classes = torch.cat([p.gt_classes for p in proposals])
    gt_boxes = torch.cat([p.gt_boxes.tensor for p in proposals])
    objects = torch.cat([p.get(OBJECT_FIELD) for p in proposals])
    boxes = regressed(predictions, proposals, classes.clamp(max=NUM_CLASSES - 1))
    losses = F.cross_entropy(predictions[0].detach(), classes, reduction="none")
    ious = {
        i: slow_iou(boxes[i].tolist(), gt_boxes[i].tolist(), np.float32)
        for i in (classes < NUM_CLASSES).nonzero()[:, 0].tolist()
    }
    lists = (values.tolist() for values in (objects, classes, losses))
    return slow_positive_weights(ious, *lists, isr_p.gamma, isr_p.beta)


def negative_weights_by_loops(predictions, proposals, isr_n):
    classes = torch.cat([p.gt_classes for p in proposals])
    probs, top = predictions[0].detach().softmax(dim=1)[:, :NUM_CLASSES].max(dim=1)
    losses = F.cross_entropy(predictions[0].detach(), classes, reduction="none")
    rows = torch.arange(len(classes)).split([len(p) for p in proposals])
    images = [[i for i in image.tolist() if classes[i] == NUM_CLASSES] for image in rows]
    lists = (regressed(predictions, proposals, top), probs, losses)
    lists = (values.tolist() for values in lists)
    settings = isr_n.gamma, isr_n.beta, isr_n.score_thresh, isr_n.nms_thresh
    return slow_negative_weights(images, *lists, *settings)


@pytest.mark.parametrize("loss_type", BOX_LOSSES)
@pytest.mark.parametrize("agnostic", [False, True])
def test_with_all_parts_off_the_losses_are_stock_to_the_last_bit(loss_type, agnostic):
    options = {"box_reg_loss_type": loss_type, "cls_agnostic_bbox_reg": agnostic}
    proposals = sample_batch()
    predictions = predict(proposals, agnostic=agnostic)
    losses = build(**options).losses(predictions, proposals)
    stock = build(FastRCNNOutputLayers, **options).losses(predictions, proposals)
    assert losses.keys() == stock.keys()
    assert all(torch.equal(losses[name], stock[name]) for name in stock)


@pytest.mark.parametrize("loss_type", BOX_LOSSES)
@pytest.mark.parametrize("agnostic", [False, True])
def test_pisa_keeps_the_size_of_the_stock_losses(loss_type, agnostic):
    options = {
        "box_reg_loss_type": loss_type,
        "cls_agnostic_bbox_reg": agnostic,
        "loss_weight": {"loss_cls": 0.7, "loss_box_reg": 3.0},
    }
    proposals = sample_batch()
    predictions = predict(proposals, agnostic=agnostic)
    losses = build(**PARTS, **options).losses(predictions, proposals)
    stock = build(FastRCNNOutputLayers, **options).losses(predictions, proposals)
    for name, loss in stock.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-6, atol=0)
    # CARL's weights have mean 1 and at most 1 / (0.2 of their mean).
    assert 0 < losses["loss_carl"] < 5 * stock["loss_box_reg"] / 3.0


def test_isr_p_weighs_positives_as_the_equations_say():
    proposals = sample_batch()
    predictions = predict(proposals)
    weights = weights_in_gradient(build(isr_p=PARTS["isr_p"]), proposals, predictions)
    expected = torch.ones(len(weights))
    for i, weight in positive_weights_by_loops(predictions, proposals, PARTS["isr_p"]).items():
        expected[i] = weight
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    assert expected.max() > 2 * expected[expected > 0].min()


@pytest.mark.parametrize("score_thresh", [0.05, 0.5])
def test_isr_n_weighs_negatives_as_the_equations_say(score_thresh):
    proposals = sample_batch()
    predictions = predict(proposals)
    isr_n = NegativeISR(gamma=0.5, beta=0.0, nms_thresh=0.5, score_thresh=score_thresh)
    weights = weights_in_gradient(build(isr_n=isr_n), proposals, predictions)
    expected = torch.ones(len(weights))
    for i, weight in negative_weights_by_loops(predictions, proposals, isr_n).items():
        expected[i] = weight
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    assert expected.unique().numel() > 10


def test_isr_n_takes_the_importance_that_the_sampler_gave():
    proposals = sample_batch()
    predictions = predict(proposals)
    generator = torch.Generator().manual_seed(3)
    for n_max, p in zip((30, 40, 50), proposals, strict=True):
        ranks = torch.randint(n_max, (len(p),), generator=generator)
        p.set(IMPORTANCE_FIELD, (n_max - ranks) / n_max)
    weights = weights_in_gradient(build(isr_n=PARTS["isr_n"]), proposals, predictions)
    classes = torch.cat([p.gt_classes for p in proposals])
    negative = classes == NUM_CLASSES
    expected = torch.cat([p.get(IMPORTANCE_FIELD) for p in proposals]) ** 0.5
    losses = F.cross_entropy(predictions[0].detach(), classes, reduction="none")
    expected *= losses[negative].sum() / (expected * losses)[negative].sum()
    expected = torch.where(negative, expected, 1.0)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)


def test_isr_n_weighs_all_negatives_alike_where_none_is_scored_high_enough():
    proposals = sample_batch()
    predictions = predict(proposals)
    isr_n = NegativeISR(gamma=0.5, beta=0.0, nms_thresh=0.5, score_thresh=1.0)
    weights = weights_in_gradient(build(isr_n=isr_n), proposals, predictions)
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=1e-4, atol=1e-5)


def test_focal_loss_of_gamma_0_is_cross_entropy():
    proposals = sample_batch()
    predictions = predict(proposals)
    ours = build(focal_gamma=0.0).losses(predictions, proposals)
    theirs = build(FastRCNNOutputLayers).losses(predictions, proposals)
    assert ours.keys() == theirs.keys()
    for name, loss in theirs.items():
        torch.testing.assert_close(ours[name], loss)


def test_isr_keeps_the_size_of_focal_loss_and_carl_is_beside_it():
    proposals = sample_batch()
    predictions = predict(proposals)
    plain = build(focal_gamma=2.0).losses(predictions, proposals)
    ours = build(focal_gamma=2.0, **PARTS).losses(predictions, proposals)
    torch.testing.assert_close(ours["loss_cls"], plain["loss_cls"])
    assert ours["loss_carl"] > 0
    gradients = [torch.autograd.grad(x["loss_cls"], predictions[0])[0] for x in (plain, ours)]
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


def test_an_isr_of_gamma_0_and_a_carl_of_gamma_0_are_plain_losses():
    proposals = sample_batch()
    predictions = predict(proposals)
    predictor = build(
        isr_p=ISR(gamma=0.0, beta=0.0),
        isr_n=NegativeISR(gamma=0.0, beta=0.0, nms_thresh=0.5, score_thresh=0.05),
        carl=CARL(gamma=0.0, beta=0.2, loss_weight=1.0),
    )
    weights = weights_in_gradient(predictor, proposals, predictions)
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=1e-4, atol=1e-5)
    losses = predictor.losses(predictions, proposals)
    torch.testing.assert_close(losses["loss_carl"], losses["loss_box_reg"])


@pytest.mark.parametrize("loss_type", BOX_LOSSES)
def test_carl_is_the_weighted_sum_of_the_equations(loss_type):
    proposals = sample_batch()
    predictions = predict(proposals)
    carl = CARL(gamma=1.5, beta=0.2, loss_weight=0.5)
    losses = build(carl=carl, box_reg_loss_type=loss_type).losses(predictions, proposals)
    # The stock box loss of one positive at a time, under the normaliser of the batch.
    stock = build(FastRCNNOutputLayers, box_reg_loss_type=loss_type)
    values, box_losses = [], []
    scores, deltas = (x.detach() for x in predictions)
    num, row = len(scores), 0
    for p in proposals:
        for k in range(len(p)):
            if p.gt_classes[k] < NUM_CLASSES:
                pair = scores[row : row + 1], deltas[row : row + 1]
                box_losses.append(stock.losses(pair, [p[k : k + 1]])["loss_box_reg"].item())
                prob = scores[row].softmax(dim=0)[p.gt_classes[k]].item()
                values.append((0.8 * prob + 0.2) ** 1.5)
            row += 1
    mean = sum(values) / len(values)
    expected = sum(v / mean * loss for v, loss in zip(values, box_losses, strict=True)) / num
    assert losses["loss_carl"].item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_carl_raises_the_score_of_the_best_regressed_and_lowers_that_of_the_worst():
    proposals = sample_batch()
    scores, deltas = predict(proposals)
    loss = build(carl=PARTS["carl"]).losses((scores, deltas), proposals)["loss_carl"]
    gradient = torch.autograd.grad(loss, scores)[0]
    classes = torch.cat([p.gt_classes for p in proposals])
    positives = (classes < NUM_CLASSES).nonzero()[:, 0]
    on_class = gradient[positives, classes[positives]]
    gt_boxes = torch.cat([p.gt_boxes.tensor for p in proposals])[positives]
    boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])[positives]
    own = deltas.detach().view(-1, NUM_CLASSES, 4)[positives, classes[positives]]
    errors = (own - TRANSFORM.get_deltas(boxes, gt_boxes)).abs().sum(dim=1)
    assert on_class[errors.argmin()] < 0 < on_class[errors.argmax()]
    assert not gradient[classes == NUM_CLASSES].any()


def empty_batches():
    generator = torch.Generator().manual_seed(0)
    background = image_without_objects(12, generator)
    return {
        "image without objects beside one with": [*sample_batch(((4, 8),)), background],
        "only images without objects": [background, background],
        "no positives": sample_batch(((0, 8), (0, 3))),
        "no negatives": sample_batch(((5, 0), (2, 0))),
        "one sample": sample_batch(((1, 0),)),
        "an image without proposals": sample_batch(((0, 0), (3, 5))),
        "no proposals": sample_batch(((0, 0), (0, 0))),
        "no images": [],
    }


@pytest.mark.parametrize("case", empty_batches())
@pytest.mark.parametrize("loss_type", ["smooth_l1", "giou"])
def test_batches_that_lack_something_give_finite_losses_and_gradients(case, loss_type):
    proposals = empty_batches()[case]
    predictor = build(**PARTS, box_reg_loss_type=loss_type)
    features = torch.randn(sum(len(p) for p in proposals), 16)
    losses = predictor.losses(predictor(features), proposals)
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_carl"}
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in predictor.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("loss_type", BOX_LOSSES)
def test_double_precision_predictions_give_the_losses_of_full_precision(loss_type):
    for proposals in (sample_batch(), []):
        scores, deltas = predict(proposals)
        predictor = build(**PARTS, box_reg_loss_type=loss_type)
        full = predictor.losses((scores, deltas), proposals)
        double = predictor.losses((scores.double(), deltas.double()), proposals)
        for name in full:
            torch.testing.assert_close(double[name].float(), full[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_give_the_losses_of_full_precision(dtype):
    proposals = sample_batch()
    scores, deltas = predict(proposals)
    predictor = build(**PARTS)
    full = predictor.losses((scores, deltas), proposals)
    half = predictor.losses((scores.to(dtype), deltas.to(dtype)), proposals)
    for name in full:
        torch.testing.assert_close(half[name].float(), full[name], rtol=0.03, atol=0.01)


def test_underflowing_losses_do_not_make_nan():
    proposals = sample_batch()
    scores, deltas = predict(proposals)
    certain = 200 * F.one_hot(torch.cat([p.gt_classes for p in proposals]), NUM_CLASSES + 1)
    scores = certain.half().requires_grad_()
    losses = build(**PARTS).losses((scores, deltas), proposals)
    sum(losses.values()).backward()
    assert losses["loss_cls"] == 0
    assert scores.grad.isfinite().all()


def test_infinite_scores_reach_the_loss_as_they_do_in_stock():
    proposals = sample_batch()
    scores, deltas = (x.detach().clone() for x in predict(proposals))
    scores[3] = float("nan")
    losses = build(**PARTS).losses((scores, deltas), proposals)
    stock = build(FastRCNNOutputLayers).losses((scores, deltas), proposals)
    assert losses["loss_cls"].isnan() and stock["loss_cls"].isnan()
    torch.testing.assert_close(losses["loss_box_reg"], stock["loss_box_reg"])


def test_without_the_identity_of_objects_the_losses_are_the_same():
    proposals = sample_batch()
    expected = build(**PARTS).losses(predict(proposals), proposals)
    for p in proposals:
        p.remove(OBJECT_FIELD)
    losses = build(**PARTS).losses(predict(proposals), proposals)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert torch.equal(loss, expected[name]), name


def test_unknown_box_loss_names_the_key_and_the_choices():
    proposals = sample_batch()
    with pytest.raises(ValueError, match="BBOX_REG_LOSS_TYPE = 'l2'.*smooth_l1.*ciou"):
        build(**PARTS, box_reg_loss_type="l2").losses(predict(proposals), proposals)


def test_without_arguments_the_parts_are_those_published():
    predictor = PISAFastRCNNOutputLayers(
        ShapeSpec(channels=16), box2box_transform=TRANSFORM, num_classes=NUM_CLASSES
    )
    assert predictor.isr_p == ISR(2.0, 0.0)
    assert predictor.isr_n == NegativeISR(0.5, 0.0, 0.5, 0.05)
    assert predictor.carl == CARL(1.0, 0.2, 1.0)
    assert predictor.focal_gamma is None


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_balanced_l1_needs_a_beta_above_0(beta):
    with pytest.raises(ValueError, match="smooth_l1_beta = .* above 0.*'balanced_l1'"):
        build(box_reg_loss_type="balanced_l1", smooth_l1_beta=beta)


def test_a_number_as_loss_weight_weighs_every_loss():
    proposals = sample_batch()
    predictions = predict(proposals)
    once, twice = (
        build(**PARTS, loss_weight=weight).losses(predictions, proposals) for weight in (1.0, 2.0)
    )
    assert once.keys() == {"loss_cls", "loss_box_reg", "loss_carl"}
    for name, loss in once.items():
        torch.testing.assert_close(twice[name], 2 * loss)


def test_an_own_classification_loss_counts_with_all_parts_off():
    class Doubled(PISAFastRCNNOutputLayers):
        def classification_losses(self, scores, gt_classes):
            return 2 * super().classification_losses(scores, gt_classes)

    proposals = sample_batch()
    predictions = predict(proposals)
    ours = build(Doubled).losses(predictions, proposals)
    stock = build(FastRCNNOutputLayers).losses(predictions, proposals)
    torch.testing.assert_close(ours["loss_cls"], 2 * stock["loss_cls"])
    torch.testing.assert_close(ours["loss_box_reg"], stock["loss_box_reg"])


def test_a_part_that_is_switched_off_is_none():
    cfg = small_cfg(*switch(False, True, False))
    predictor = PISAFastRCNNOutputLayers(cfg, ShapeSpec(channels=8))
    assert predictor.isr_p is None and predictor.carl is None
    assert predictor.isr_n is not None


def test_scalars_show_the_method_every_20_iterations(storage):
    proposals = sample_batch()
    predictor = build(**PARTS)
    for _ in range(20):
        assert not any(name.startswith("pisa/") for name in storage.latest())
        predictor.losses(predict(proposals), proposals)
        storage.step()
    scalars = {name: value for name, (value, _) in storage.latest().items() if "pisa/" in name}
    assert scalars["pisa/positive_iou_weighted"] > scalars["pisa/positive_iou"]
    assert scalars["pisa/first_rank_weight"] > scalars["pisa/first_rank_share"]
    assert scalars["pisa/negative_score_weighted"] > scalars["pisa/negative_score"]
    objects = torch.cat([p.get(OBJECT_FIELD)[p.gt_classes < NUM_CLASSES] for p in proposals])
    assert scalars["pisa/first_rank_share"] == pytest.approx(len(objects.unique()) / len(objects))
    assert all(value > 0 for value in scalars.values())


needs_sigmoid = pytest.mark.skipif(
    not hasattr(FastRCNNOutputLayers, "sigmoid_cross_entropy_loss"),
    reason="this Detectron2 has no sigmoid cross-entropy for boxes",
)


@needs_sigmoid
def test_focal_loss_is_refused_with_sigmoid_cross_entropy():
    with pytest.raises(ValueError, match="FOCAL_LOSS needs the softmax"):
        build(focal_gamma=2.0, use_sigmoid_ce=True)


@needs_sigmoid
@pytest.mark.parametrize("federated", [False, True])
def test_sigmoid_and_federated_losses_keep_their_size(federated):
    options = {"use_sigmoid_ce": True, "use_fed_loss": federated, "fed_loss_num_classes": 5}
    if federated:
        options["get_fed_loss_cls_weights"] = lambda: torch.ones(NUM_CLASSES)
    proposals = sample_batch()
    predictions = predict(proposals)
    losses = build(**PARTS, **options).losses(predictions, proposals)
    stock = build(FastRCNNOutputLayers, **options).losses(predictions, proposals)
    for name, loss in stock.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-5, atol=0)
    assert losses["loss_carl"] > 0


def test_no_samples_need_no_event_storage(monkeypatch):
    def refuse():
        raise AssertionError("there is no event storage")

    monkeypatch.setattr("pisa_d2.scalars.get_event_storage", refuse)
    transform = Box2BoxTransform(weights=(10, 10, 5, 5))
    predictor = PISAFastRCNNOutputLayers(
        ShapeSpec(channels=4), box2box_transform=transform, num_classes=8
    )
    logits, deltas = (torch.randn(0, n, requires_grad=True) for n in (9, 32))
    losses = predictor.losses((logits, deltas), [])
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_carl"}
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert logits.grad is not None and deltas.grad is not None
