from collections import defaultdict
from typing import NamedTuple

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss
from helpers import copies_to_host, random_batch, small_retinanet_cfg, switch
from torch.overrides import TorchFunctionMode
from torchvision.ops import box_iou

from pisa_d2 import PISARetinaNet
from pisa_d2.config import CARL, ISR
from pisa_d2.isr import positive_weights

pytestmark = pytest.mark.usefixtures("storage")

NUM_CLASSES = 3
ALL_OFF = switch(False, False, False)
ONLY_ISR_P, ONLY_CARL = switch(True, False, False), switch(False, False, True)
STOCK = ["MODEL.META_ARCHITECTURE", "RetinaNet"]
BOX_LOSSES = ["smooth_l1", "giou", "diou", "ciou"]
BATCHES = [[3, 5], [4, 0], [0, 0], [2, 1, 4]]


def build(*opts):
    torch.manual_seed(0)
    return build_model(small_retinanet_cfg(*opts))


def box_loss(loss_type):
    return ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", loss_type]


def scattered(batch, seed=0):
    """
    Make the input of the losses, with predictions all over the range as leaves of the graph, since
    a fresh head predicts the same for every anchor.
    """
    model = build().train()
    images = model.preprocess_image(batch)
    features = [model.backbone(images.tensor)[name] for name in model.head_in_features]
    generator = torch.Generator().manual_seed(seed)
    predictions = []
    for part, (scale, shift) in zip(model.head(features), [(1.5, -2), (0.3, 0)], strict=True):
        noise = [scale * torch.randn(x.shape, generator=generator) + shift for x in part]
        predictions.append([x.requires_grad_() for x in noise])
    return images, features, predictions, [x["instances"] for x in batch]


def rows(levels):
    """Bring logits, or other outputs of the head with this layout, to (B * R, K)."""
    return torch.cat([permute_to_N_HWA_K(x, NUM_CLASSES) for x in levels], dim=1).flatten(0, 1)


def logits_and_deltas(predictions):
    """Return logits (B * R, K) and deltas (B * R, 4)."""
    deltas = [permute_to_N_HWA_K(x.detach(), 4) for x in predictions[1]]
    return rows(predictions[0]).detach(), torch.cat(deltas, dim=1).flatten(0, 1)


def gradient(loss, predictions):
    """Return the gradient of the logits, (B * R, K)."""
    return rows(torch.autograd.grad(loss, predictions[0]))


class Positive(NamedTuple):
    row: int  # index of the anchor among all B * R
    class_: int
    object: tuple[int, int]
    anchor: torch.Tensor
    gt_box: torch.Tensor


def positives_by_loops(model, features, targets):
    """Match by loops: the object of highest IoU, if it is 0.5 or the object's own highest."""
    anchors = Boxes.cat(model.anchor_generator(features)).tensor
    found = []
    for i, target in enumerate(targets):
        if len(target) == 0:
            continue
        ious = box_iou(target.gt_boxes.tensor, anchors)
        for r in range(len(anchors)):
            k = int(ious[:, r].argmax())
            is_best = any(ious[m, r] == ious[m].max() for m in range(len(target)))
            if ious[k, r] >= 0.5 or is_best:
                class_, gt_box = int(target.gt_classes[k]), target.gt_boxes.tensor[k]
                found.append(Positive(i * len(anchors) + r, class_, (i, k), anchors[r], gt_box))
    return found


def weights_by_loops(model, predictions, positives, gamma):
    logits, deltas = logits_and_deltas(predictions)
    groups, losses = defaultdict(list), {}
    for p in positives:
        box = model.box2box_transform.apply_deltas(deltas[p.row][None], p.anchor[None])
        iou = box_iou(box, p.gt_box[None]).item()
        groups[p.class_, p.object].append((-iou, p.row))
        target = torch.zeros(NUM_CLASSES)
        target[p.class_] = 1
        losses[p.row] = sigmoid_focal_loss(logits[p.row], target, 0.25, 2.0).sum().item()
    by_class = defaultdict(list)
    for (class_, _), members in groups.items():
        for rank, (minus_iou, row) in enumerate(sorted(members)):
            by_class[class_].append((rank, minus_iou, row))
    n_max = max(len(members) for members in by_class.values())
    weights = {
        row: ((n_max - rank) / n_max) ** gamma
        for members in by_class.values()
        for rank, (_, _, row) in enumerate(sorted(members))
    }
    ratio = sum(losses.values()) / sum(w * losses[row] for row, w in weights.items())
    return {row: w * ratio for row, w in weights.items()}


@pytest.mark.parametrize("loss_type", BOX_LOSSES)
@pytest.mark.parametrize("num_objects", BATCHES)
def test_with_both_parts_off_the_losses_are_stock_to_the_last_bit(loss_type, num_objects):
    models = [build(*box_loss(loss_type), *opts) for opts in (ALL_OFF, STOCK)]
    for seed in range(3):  # the normaliser is a running mean
        batch = random_batch(num_objects, seed=seed)
        results = []
        for model in models:
            with EventStorage() as storage:
                results.append((model.train()(batch), storage.latest()))
        (ours, our_scalars), (theirs, their_scalars) = results
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert our_scalars == their_scalars
        assert models[0].loss_normalizer == models[1].loss_normalizer


@pytest.mark.parametrize("loss_type", BOX_LOSSES)
@pytest.mark.parametrize("num_objects", BATCHES)
def test_isr_changes_no_loss_and_carl_adds_one_of_the_size_of_the_box_loss(loss_type, num_objects):
    inputs = scattered(random_batch(num_objects))
    models = [build(*box_loss(loss_type), *opts) for opts in ([], STOCK)]
    for _ in range(2):
        ours, theirs = (model.forward_training(*inputs) for model in models)
        assert ours.keys() - theirs.keys() == {"loss_carl"}
        for name, loss in theirs.items():
            torch.testing.assert_close(ours[name], loss, rtol=1e-5, atol=1e-7)
        # CARL's weights have mean 1 and at most 1 / 0.2.
        assert 0 <= ours["loss_carl"] <= 5 * theirs["loss_box_reg"]
        assert (ours["loss_carl"] > 0) == (sum(num_objects) > 0)
        assert models[0].loss_normalizer == models[1].loss_normalizer


def test_a_seed_gives_the_weights_and_the_random_state_of_stock():
    ours, ours_next = build(), torch.rand(1)
    theirs, theirs_next = build(*STOCK), torch.rand(1)
    assert isinstance(ours, PISARetinaNet) and ours_next == theirs_next
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("trained, loaded", [([], STOCK), (STOCK, [])])
def test_a_checkpoint_detects_the_same_in_stock_and_the_reverse(tmp_path, trained, loaded):
    low = ["MODEL.RETINANET.SCORE_THRESH_TEST", 0.001]
    model, other = build(*trained, *low), build(*loaded, *low)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    DetectionCheckpointer(model, save_dir=str(tmp_path)).save("model")
    file = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    other.load_state_dict(file, strict=True)
    batch = random_batch([3, 2])
    with torch.no_grad():
        results = [[x["instances"] for x in m.eval()(batch)] for m in (model, other)]
    for a, b in zip(*results, strict=True):
        assert len(a) > 0
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)


@pytest.mark.parametrize("num_objects", [[3, 5], [4, 0], [2, 1, 4]])
def test_labels_are_stock_and_each_positive_knows_its_object(num_objects):
    batch = random_batch(num_objects)
    targets = [x["instances"] for x in batch]
    targets[0].gt_classes[0] = -1  # ignored, as stock reads it
    model = build()
    _, features, _, _ = scattered(batch)
    anchors = model.anchor_generator(features)
    flat = model.label_anchors_and_objects(anchors, targets)
    labels, gt_boxes, objects = (values.chunk(len(targets)) for values in flat)
    stock_labels, stock_boxes = model.label_anchors(anchors, targets)
    for ours, theirs in ((labels, stock_labels), (gt_boxes, stock_boxes)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert {-1, NUM_CLASSES} < set(torch.cat(labels).tolist())
    all_boxes = torch.cat([t.gt_boxes.tensor for t in targets])
    first = 0
    for target, label, boxes, own in zip(targets, labels, gt_boxes, objects, strict=True):
        positive = (label >= 0) & (label < NUM_CLASSES)
        assert torch.equal(all_boxes[own[positive]], boxes[positive])
        # Unique in the batch, also from the third image on.
        assert set(own[positive].tolist()) <= set(range(first, first + len(target)))
        first += len(target)
        assert (target.gt_classes < NUM_CLASSES).all()  # the inputs do not change


def test_a_class_that_the_model_does_not_have_is_an_error_as_in_stock():
    batch = random_batch([2, 1])
    batch[0]["instances"].gt_classes[:] = NUM_CLASSES + 2
    for opts in ([], STOCK):
        with pytest.raises((RuntimeError, IndexError)):
            build(*opts).train()(batch)


@pytest.mark.parametrize("num_objects", [[3, 5], [4, 0], [2, 1, 4]])
def test_isr_p_weighs_positives_as_the_equations_say(num_objects):
    inputs = scattered(random_batch(num_objects))
    _, features, predictions, targets = inputs
    model, stock = build(*ONLY_ISR_P), build(*STOCK)
    ours, plain = (
        gradient(m.forward_training(*inputs)["loss_cls"], predictions) for m in (model, stock)
    )
    positives = positives_by_loops(model, features, targets)
    expected = torch.ones(len(plain))
    for row, weight in weights_by_loops(model, predictions, positives, gamma=2.0).items():
        expected[row] = weight
    torch.testing.assert_close(ours, expected[:, None] * plain, rtol=1e-4, atol=1e-7)
    weights = expected[[p.row for p in positives]]
    assert len(weights) > 20 and weights.max() > 10 * weights.min()


@pytest.mark.parametrize("loss_type", BOX_LOSSES)
def test_carl_is_the_weighted_sum_of_the_equations(loss_type):
    settings = ["MODEL.PISA.CARL.GAMMA", 1.5, "MODEL.PISA.CARL.LOSS_WEIGHT", 0.5]
    inputs = scattered(random_batch([3, 0, 2]))
    _, features, predictions, targets = inputs
    model = build(*ONLY_CARL, *box_loss(loss_type), *settings)
    losses = model.forward_training(*inputs)
    stock = build(*STOCK, *box_loss(loss_type))
    logits, deltas = logits_and_deltas(predictions)
    values, box_losses = [], []
    for p in positives_by_loops(model, features, targets):
        # Stock's loss of one anchor, with the normaliser of the first step of one positive.
        one = stock.losses(
            [Boxes(p.anchor[None])],
            [logits[p.row][None, None]],
            [torch.tensor([p.class_])],
            [deltas[p.row][None, None]],
            [p.gt_box[None]],
        )["loss_box_reg"].item()
        box_losses.append(one * stock.loss_normalizer)
        values.append((0.8 * logits[p.row, p.class_].sigmoid().item() + 0.2) ** 1.5)
    mean = sum(values) / len(values)
    total = sum(v / mean * loss for v, loss in zip(values, box_losses, strict=True))
    expected = 0.5 * total / model.loss_normalizer
    assert losses["loss_carl"].item() == pytest.approx(expected, rel=1e-4)


def test_an_isr_of_gamma_0_and_a_carl_of_gamma_0_are_plain_losses():
    inputs = scattered(random_batch([3, 2]))
    model = build("MODEL.PISA.ISR_P.GAMMA", 0.0, "MODEL.PISA.CARL.GAMMA", 0.0)
    losses = model.forward_training(*inputs)
    stock = build(*STOCK).forward_training(*inputs)
    torch.testing.assert_close(losses["loss_carl"], losses["loss_box_reg"])
    ours, theirs = (gradient(x["loss_cls"], inputs[2]) for x in (losses, stock))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_carl_raises_the_score_of_the_best_regressed_and_lowers_that_of_the_worst():
    inputs = scattered(random_batch([3, 4]))
    _, features, predictions, targets = inputs
    model = build(*ONLY_CARL)
    on_logits = gradient(model.forward_training(*inputs)["loss_carl"], predictions)
    deltas = logits_and_deltas(predictions)[1]
    positives = positives_by_loops(model, features, targets)
    errors = []
    for p in positives:
        wanted = model.box2box_transform.get_deltas(p.anchor[None], p.gt_box[None])[0]
        errors.append((deltas[p.row] - wanted).abs().sum().item())
    best, worst = (positives[errors.index(pick(errors))] for pick in (min, max))
    assert on_logits[best.row, best.class_] < 0 < on_logits[worst.row, worst.class_]
    # One logit per positive, and no other.
    touched = {(p.row, p.class_) for p in positives}
    assert {tuple(index) for index in on_logits.nonzero().tolist()} <= touched


@pytest.mark.parametrize("num_objects", [[0, 0], [3, 0]])
@pytest.mark.parametrize("loss_type", ["smooth_l1", "giou"])
def test_every_parameter_that_stock_reaches_is_reached(num_objects, loss_type):
    def touched(*opts):
        model = build(*box_loss(loss_type), *opts)
        losses = model.train()(random_batch(num_objects))
        assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert all(grad.isfinite().all() for grad in grads.values())
        return grads.keys()

    assert touched() == touched(*STOCK) and touched(*ONLY_CARL) == touched(*STOCK)


@pytest.mark.parametrize("opts", [[], ONLY_CARL])
def test_a_batch_without_positives_has_no_box_losses_but_a_graph(opts):
    inputs = scattered(random_batch([0, 0]))
    losses = build(*opts).forward_training(*inputs)
    assert losses["loss_box_reg"] == losses["loss_carl"] == 0
    assert losses["loss_box_reg"].requires_grad and losses["loss_carl"].requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss_type", BOX_LOSSES)
def test_half_precision_predictions_give_the_losses_of_full_precision(dtype, loss_type):
    images, features, predictions, targets = scattered(random_batch([3, 0, 4]))
    full, half = (build(*box_loss(loss_type)) for _ in range(2))
    expected = full.forward_training(images, features, predictions, targets)
    predictions = [[x.to(dtype) for x in part] for part in predictions]
    losses = half.forward_training(images, features, predictions, targets)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name].float(), loss, rtol=0.02, atol=0.01)


def test_bfloat16_autocast_gives_finite_losses_and_gradients():
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.train()(random_batch([3, 5]))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_scores_of_nan_reach_the_loss_as_they_do_in_stock_and_boxes_of_nan_rank_last():
    inputs = scattered(random_batch([3, 4]))
    _, features, predictions, targets = inputs
    with torch.no_grad():
        predictions[0][0][0, 0, 0, 0] = float("nan")
        losses = [build(*opts).forward_training(*inputs) for opts in ([], STOCK)]
        assert all(x["loss_cls"].isnan() for x in losses)
        torch.testing.assert_close(losses[0]["loss_box_reg"], losses[1]["loss_box_reg"])
    ious, same = torch.tensor([0.5, float("nan"), 0.9, 0.7]), torch.zeros(4, dtype=torch.int64)
    weights = positive_weights(ious, same, same, torch.ones(4))
    assert weights.argsort(descending=True).tolist() == [2, 3, 0, 1]


class CountHostCopies(TorchFunctionMode):
    num = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.num += copies_to_host(func, args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss_type", BOX_LOSSES)
def test_no_more_is_copied_to_the_host_than_in_stock(loss_type):
    inputs = scattered(random_batch([3, 0, 4]))
    copies = []
    for opts in ([], STOCK):
        model = build(*box_loss(loss_type), *opts)
        with CountHostCopies() as count:
            model.forward_training(*inputs)
        copies.append(count.num)
    assert 0 < copies[0] <= copies[1]


def test_weights_are_made_without_copies_to_the_host(as_on_gpu):
    generator = torch.Generator().manual_seed(0)
    ious, losses = torch.rand(2, 300, generator=generator)
    objects, classes = torch.randint(20, (300,), generator=generator), torch.arange(300) % 3
    weights = positive_weights(*map(as_on_gpu, (ious, objects, classes, losses)))
    expected = positive_weights(ious, objects, classes, losses)
    torch.testing.assert_close(weights.as_subclass(torch.Tensor), expected)


def test_scalars_show_the_method_every_20_iterations(storage):
    inputs = scattered(random_batch([3, 4]))
    model = build()
    for _ in range(20):
        assert not any(name.startswith("pisa/") for name in storage.latest())
        model.forward_training(*inputs)
        storage.step()
    scalars = {name: value for name, (value, _) in storage.latest().items() if "pisa/" in name}
    assert scalars["pisa/positive_iou_weighted"] > scalars["pisa/positive_iou"] > 0
    assert scalars["pisa/first_rank_weight"] > scalars["pisa/first_rank_share"] > 0
    assert 0 < scalars["pisa/positive_prob"] < 1
    assert not any("negative" in name for name in scalars)


def test_settings_are_those_of_the_config_without_isr_n():
    model = build("MODEL.PISA.ISR_P.GAMMA", 1.5, "MODEL.PISA.CARL.LOSS_WEIGHT", 0.5)
    assert model.isr_p == ISR(gamma=1.5, beta=0.0)
    assert model.carl == CARL(gamma=1.0, beta=0.2, loss_weight=0.5)
    off = build(*switch(False, True, False))
    assert off.isr_p is None and off.carl is None


def test_training_lowers_the_losses():
    batch = random_batch([3, 2, 4])
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    history = []
    for _ in range(30):
        losses = model.train()(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    for name in history[0]:
        values = [losses[name] for losses in history]
        assert sum(values[-5:]) < 0.9 * sum(values[:5]), name
    total = [sum(losses.values()) for losses in history]
    assert sum(total[-5:]) < 0.7 * sum(total[:5])
