import math
from collections import defaultdict
from dataclasses import fields

import pytest
import ssd
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from helpers import random_batch
from ssd.ssd import Positives
from ssd_models import (
    NUM_CLASSES,
    OFF,
    PISA,
    PLAIN,
    load,
    random_predictions,
    random_targets,
    small,
)
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection._utils import SSDMatcher as TorchvisionMatcher
from torchvision.ops import box_iou

pytestmark = pytest.mark.usefixtures("storage")


def pisa_by_loops(model, boxes, images, logits, deltas, gamma=2.0, carl_beta=0.2):
    """ISR-P's weight of each positive (image, default box), and CARL's value."""
    probs, losses = logits.detach().softmax(dim=2), []
    groups, box_losses, own_probs, cls_losses = defaultdict(list), {}, {}, {}
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    for n, image in enumerate(images):
        gt_boxes = image.gt_boxes.tensor
        if len(gt_boxes) == 0:
            continue
        matches = TorchvisionMatcher(0.5)(box_iou(gt_boxes, boxes)).tolist()
        for r, match in enumerate(matches):
            if match < 0:
                continue
            class_, delta = int(image.gt_classes[match]), deltas[n, r].detach()
            box = coder.decode_single(delta[None], boxes[r][None])
            iou = float(box_iou(box, gt_boxes[match][None]))
            groups[class_, n, match].append((-iou, n, r))
            target = coder.encode_single(gt_boxes[match][None], boxes[r][None])[0]
            box_losses[n, r] = float(F.smooth_l1_loss(delta, target, reduction="sum"))
            own_probs[n, r] = float(probs[n, r, class_])
            cls_losses[n, r] = -math.log(own_probs[n, r])
    by_class = defaultdict(list)
    for (class_, _, _), members in groups.items():
        for rank, (minus_iou, n, r) in enumerate(sorted(members)):
            by_class[class_].append((rank, minus_iou, n, r))
    n_max = max(len(members) for members in by_class.values())
    weights = {}
    for members in by_class.values():
        for rank, (_, _, n, r) in enumerate(sorted(members)):
            weights[n, r] = ((n_max - rank) / n_max) ** gamma
    losses = sum(cls_losses.values())
    ratio = losses / sum(cls_losses[i] * weight for i, weight in weights.items())
    v = {i: (1 - carl_beta) * p + carl_beta for i, p in own_probs.items()}
    carl = sum(v[i] * box_losses[i] for i in v) / sum(v.values())
    return {i: weight * ratio for i, weight in weights.items()}, carl


@pytest.mark.parametrize("seed", range(5))
def test_pisa_weighs_positives_as_the_equations_say_and_leaves_negatives_alone(seed):
    boxes, images = random_targets([3, 6, 0, 4, 5], seed=seed)
    logits, deltas = random_predictions(5, seed=seed)
    model, plain = small(PISA), small(PLAIN)
    targets = model.label_boxes(boxes, images)
    losses = model.losses(boxes, logits, deltas, *targets)
    expected = plain.losses(boxes, logits, deltas, *targets)
    assert losses.keys() == {"loss_cls", "loss_box_reg", "loss_carl"}
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-5, atol=0)

    by_loops, carl = pisa_by_loops(model, boxes, images, logits, deltas)
    torch.testing.assert_close(losses["loss_carl"], torch.tensor(carl), rtol=1e-4, atol=0)
    gradient, plain_gradient = (
        torch.autograd.grad(x["loss_cls"], logits)[0] for x in (losses, expected)
    )
    weights = torch.ones(5, 60)
    for (n, r), weight in by_loops.items():
        weights[n, r] = weight
    torch.testing.assert_close(gradient, weights[..., None] * plain_gradient, rtol=1e-4, atol=1e-6)
    assert (plain_gradient.abs().sum(dim=2) > 0).sum() > len(by_loops) > 20


def test_carl_raises_the_scores_of_well_regressed_positives_and_has_its_own_factor():
    boxes, images = random_targets([6, 4])
    logits, deltas = random_predictions(2)
    model = small(PISA)
    targets = model.label_boxes(boxes, images)
    loss = model.losses(boxes, logits, deltas, *targets)["loss_carl"]
    gradient = torch.autograd.grad(loss, logits)[0]
    rows = (targets[0] < NUM_CLASSES).nonzero()
    own = gradient[rows[:, 0], rows[:, 1], targets[0][rows[:, 0], rows[:, 1]]]
    goal = model.box2box_transform.get_deltas(boxes[rows[:, 1]], targets[1][rows[:, 0], rows[:, 1]])
    errors = F.smooth_l1_loss(deltas[rows[:, 0], rows[:, 1]], goal, reduction="none").sum(dim=1)
    assert own[errors.argmin()] < 0 < own[errors.argmax()]
    double = small(PISA, "MODEL.PISA.CARL.LOSS_WEIGHT", 2.0)
    doubled = double.losses(boxes, logits, deltas, *targets)["loss_carl"]
    torch.testing.assert_close(doubled, 2 * loss)


def test_objects_are_unique_over_the_batch():
    boxes, images = random_targets([3, 0, 2, 4])
    model = small(PISA)
    classes, _, objects = model.label_boxes(boxes, images)
    seen = [set(objects[i][classes[i] < NUM_CLASSES].tolist()) for i in range(4)]
    assert seen[0] == {0, 1, 2} and seen[1] == set() and seen[2] == {3, 4}
    assert seen[3] == {5, 6, 7, 8}


def test_with_both_parts_off_pisa_is_plain_ssd_to_the_last_bit():
    plain = small(PLAIN)
    off = small(PISA, *OFF)
    assert type(off) is ssd.PISASSD and type(plain) is ssd.SSD
    assert off.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(off.parameters(), plain.parameters(), strict=True))
    batch = random_batch([3, 0, 2], num_classes=NUM_CLASSES)
    losses, expected = off(batch), plain(batch)
    assert losses.keys() == expected.keys() == {"loss_cls", "loss_box_reg"}
    assert all(torch.equal(losses[name], expected[name]) for name in expected)


def test_isr_n_does_not_apply():
    batch = random_batch([3], num_classes=NUM_CLASSES)
    on, off = (small(PISA, "MODEL.PISA.ISR_N.ENABLED", enabled)(batch) for enabled in (True, False))
    assert all(torch.equal(on[name], off[name]) for name in on)


@pytest.mark.parametrize("kind", ["ssd300", "pisa_ssd300"])
def test_images_without_objects_and_empty_boxes_give_zero_losses_with_a_graph(kind):
    model = small(f"COCO-Detection/{kind}_vgg16.yaml")
    batch = random_batch([0, 2], num_classes=NUM_CLASSES)
    point = torch.tensor([[40.0, 30, 40, 30], [10, 20, 10, 60]])  # a point and a line
    batch[1]["instances"].gt_boxes = Boxes(point)
    losses = model(batch)
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()
    head = [p for name, p in model.named_parameters() if name.startswith("head.")]
    assert all(p.grad is not None and not p.grad.any() for p in head)
    assert all(p.grad is not None for p in model.parameters())


def test_the_losses_of_a_batch_fall():
    torch.manual_seed(0)
    model = build_model(load("BCCD/pisa_ssd300_vgg16.yaml", "MODEL.SSD.WIDTH", 0.1))
    batch = random_batch([3, 2], num_classes=NUM_CLASSES)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history = []
    for _ in range(15):
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    assert all(history[-1][name] < 0.6 * history[0][name] for name in history[0])


def test_pisa_copies_nothing_to_the_host(as_on_gpu):
    boxes, images = random_targets([6, 4])
    logits, deltas = random_predictions(2)
    model = small(PISA)
    taken = {}
    model.positive_losses = lambda positives: taken.update(p=positives) or {"loss_cls": 0.0}
    model.losses(boxes, logits, deltas, *model.label_boxes(boxes, images))
    del model.positive_losses
    expected = model.positive_losses(taken["p"])
    wrapped = {f.name: as_on_gpu(getattr(taken["p"], f.name)) for f in fields(Positives)}
    losses = model.positive_losses(Positives(**wrapped))
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name].as_subclass(torch.Tensor), loss)
