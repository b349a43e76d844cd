import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import ssd
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from helpers import load_script
from ssd.mining import hard_negatives
from ssd_models import NUM_CLASSES, PISA, PLAIN, load, random_predictions, random_targets, small
from torch.nn import functional as F
from torchvision.models import vgg16, vgg16_bn
from torchvision.models.detection import ssd as torchvision_ssd
from torchvision.models.detection import ssd300_vgg16
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection._utils import SSDMatcher as TorchvisionMatcher
from torchvision.ops import box_iou

DATASETS = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()
COCO_IMAGE = DATASETS / "coco/train2017/000000000009.jpg"
SIZES = {300: [38, 19, 10, 5, 3, 1], 512: [64, 32, 16, 8, 4, 2, 1]}


@pytest.fixture(scope="module")
def reference():
    """torchvision's SSD300 with random weights that predict as varied as trained ones do."""
    torch.manual_seed(0)
    model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=NUM_CLASSES + 1).eval()
    heads = model.head.classification_head, model.head.regression_head
    with torch.no_grad():
        image = model.transform([synthetic_image() / 255])[0].tensors
        for i, x in enumerate(model.backbone(image).values()):
            for head in heads:
                conv = head.module_list[i]
                conv.weight *= 1.5 / conv(x).std()
            heads[0].module_list[i].bias[:: NUM_CLASSES + 1] = 9  # most boxes are background
    return model


def synthetic_image(size=(240, 320)):
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(1, 3, 12, 16, generator=generator) * 255
    return F.interpolate(coarse, size, mode="bicubic")[0].clamp(0, 255).to(torch.uint8)


def converted(reference):
    """Our SSD300 with the weights of torchvision's."""
    mean = [255 * value for value in reference.transform.image_mean]  # ours is in whole numbers
    model = build_model(load(PLAIN, "MODEL.PIXEL_MEAN", mean))
    weights = ssd.convert_torchvision(reference.state_dict(), model.default_boxes.num_boxes())
    model.load_state_dict(weights)
    return model


def default_boxes_by_loops(side, maps, scales, steps, aspect_ratios):
    boxes = []
    for k, size in enumerate(maps):
        shapes = [(scales[k],) * 2, (math.sqrt(scales[k] * scales[k + 1]),) * 2]
        for ratio in aspect_ratios[k]:
            shape = (scales[k] * math.sqrt(ratio), scales[k] / math.sqrt(ratio))
            shapes += [shape, shape[::-1]]
        for y in range(size):
            for x in range(size):
                for w, h in shapes:
                    w, h = min(w, 1) * side, min(h, 1) * side
                    cx, cy = (x + 0.5) * steps[k], (y + 0.5) * steps[k]
                    boxes.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    return torch.tensor(boxes)


@pytest.mark.parametrize("side, num", [(300, 8732), (512, 24564)])
def test_default_boxes_are_the_published_ones(side, num):
    model = small(f"COCO-Detection/ssd{side}_vgg16.yaml")
    settings = load(f"COCO-Detection/ssd{side}_vgg16.yaml").MODEL.SSD
    with torch.no_grad():
        features = list(model.backbone(torch.zeros(1, 3, side, side)).values())
    assert [f.shape[2:] for f in features] == [(size, size) for size in SIZES[side]]
    boxes = model.default_boxes(features)
    assert boxes.shape == (num, 4)
    expected = default_boxes_by_loops(
        side, SIZES[side], settings.SCALES, settings.STEPS, settings.ASPECT_RATIOS
    )
    torch.testing.assert_close(boxes, expected, rtol=0, atol=1e-3)


def test_default_boxes_of_half_precision_features_are_float32():
    boxes = small(PISA).default_boxes
    features = [torch.zeros(1, 2, size, size) for size in SIZES[300]]
    half = boxes([f.half() for f in features])
    assert half.dtype == torch.float32
    assert torch.equal(half, boxes(features))


def check_same_detections(model, reference, image, num):
    model.max_detections_per_image = reference.detections_per_img = num
    with torch.no_grad():
        expected = reference([image / 255])[0]
        found = model.eval()([{"image": image}])[0]["instances"]
    assert found.image_size == image.shape[1:]
    nonempty = (expected["boxes"][:, 2:] > expected["boxes"][:, :2]).all(dim=1)
    # Rounding, which depends on the number of threads, moves boxes by thousandths of a pixel.
    theirs = [expected["labels"][:, None] - 1, expected["scores"][:, None], expected["boxes"] / 10]
    ours = [found.pred_classes[:, None], found.scores[:, None], found.pred_boxes.tensor / 10]
    theirs, ours = torch.cat(theirs, dim=1)[nonempty].double(), torch.cat(ours, dim=1).double()
    # Equal scores may come in another sequence.
    apart = torch.cdist(ours, theirs, p=float("inf"))
    assert len(ours) == len(theirs)
    assert apart.amin(dim=1).max() < 1e-3 and apart.amin(dim=0).max() < 1e-3
    return found


@pytest.mark.parametrize("topk", [400, 30])
def test_weights_of_torchvision_find_what_they_find_there(reference, topk):
    model = converted(reference)
    reference.topk_candidates = model.test_topk_candidates = topk
    found = check_same_detections(model, reference, synthetic_image(), num=10**4)
    num_found = found.pred_classes.bincount()
    assert len(num_found) == NUM_CLASSES and 10 < num_found.max() < topk
    assert found.scores.max() > 0.1 and (topk == 30 or found.scores.min() < 0.011)


@pytest.mark.skipif(not COCO_IMAGE.is_file(), reason="needs images of COCO")
def test_weights_of_torchvision_find_what_they_find_there_in_a_photograph(reference):
    image = torch.tensor(read_image(str(COCO_IMAGE), "RGB")).permute(2, 0, 1)
    reference.topk_candidates = 400
    assert len(check_same_detections(converted(reference), reference, image, num=200)) > 150


def test_weights_of_torchvision_have_the_losses_that_they_have_there(reference):
    image, boxes = synthetic_image(), torch.tensor([[20.0, 30, 120, 200], [150, 60, 310, 110]])
    instances = Instances((240, 320))
    instances.gt_boxes, instances.gt_classes = Boxes(boxes), torch.tensor([1, 4])
    targets = {"boxes": boxes, "labels": instances.gt_classes + 1}
    with torch.no_grad():
        expected = reference.train()([image / 255], [targets])
        losses = converted(reference)([{"image": image, "instances": instances}])
    reference.eval()
    torch.testing.assert_close(losses["loss_cls"], expected["classification"], rtol=1e-4, atol=0)
    torch.testing.assert_close(
        losses["loss_box_reg"], expected["bbox_regression"], rtol=1e-4, atol=0
    )
    assert torch.equal(instances.gt_boxes.tensor, boxes)


def test_labels_are_chosen_and_the_background_comes_last():
    weight = (
        torch.arange(4.0).repeat(2)[:, None] + torch.tensor([0.0, 10]).repeat_interleave(4)[:, None]
    )
    name = "head.classification_head.module_list.0.weight"
    (converted,) = ssd.convert_torchvision({name: weight}, [2], labels=[3, 1]).values()
    assert converted[:, 0].tolist() == [3, 1, 0, 13, 11, 10]


def test_the_script_writes_a_checkpoint_with_the_classes_of_coco(tmp_path, monkeypatch):
    head = "head.classification_head.module_list.0.weight"
    conv1, fc6 = "backbone.features.0.bias", "backbone.extra.0.7.1.bias"
    trunk = {conv1: torch.rand(64), fc6: torch.rand(1024)}
    # Each class's weights are its number.
    by_class = torch.arange(91.0).repeat(4)[:, None, None, None].expand(-1, 512, 3, 3)
    torch.save({**trunk, head: by_class.half()}, tmp_path / "theirs.pth")
    script = load_script("projects/SSD/convert_torchvision.py")
    words = ["ssd300_vgg16", tmp_path / "ours.pth", "--file", tmp_path / "theirs.pth"]
    monkeypatch.setattr("sys.argv", ["", *map(str, words)])
    script.main()
    model = build_model(load(PLAIN, "MODEL.SSD.NUM_CLASSES", 80))
    DetectionCheckpointer(model).load(str(tmp_path / "ours.pth"))
    assert torch.equal(model.backbone.features[0].bias, trunk[conv1])
    assert torch.equal(model.backbone.fc[1].bias, trunk[fc6])
    labels = model.head.cls_score[0].weight[:81, 0, 0, 0].tolist()
    assert labels[:13] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14] and labels[79:] == [90, 0]


@pytest.mark.parametrize("build, batch_norm", [(vgg16, False), (vgg16_bn, True)])
def test_weights_of_a_classifier_fill_the_trunk(build, batch_norm):
    with torch.device("meta"):
        trunk = ssd.SSDVGG([], batch_norm=batch_norm).features.state_dict()
        found = ssd.convert_torchvision(build().state_dict(), [])
    expected = {f"backbone.features.{name}": value.shape for name, value in trunk.items()}
    assert {name: value.shape for name, value in found.items()} == expected


@pytest.mark.parametrize("seed", range(10))
def test_default_boxes_are_matched_as_in_torchvision(seed):
    boxes, (image,) = random_targets([8], seed=seed)
    ious = box_iou(image.gt_boxes.tensor, boxes)
    matches, labels = ssd.SSDMatcher(0.5)(ious)
    expected = TorchvisionMatcher(0.5)(ious)
    assert torch.equal(labels, (expected >= 0).to(labels.dtype))
    assert torch.equal(matches[labels == 1], expected[labels == 1])
    assert 8 < labels.sum() < 60


def test_each_object_keeps_its_best_default_box_unlike_in_detectron2():
    ious = torch.tensor([[0.4, 0.3, 0.0], [0.45, 0.5, 0.1]])
    assert [x.tolist() for x in ssd.SSDMatcher(0.5)(ious)] == [[0, 1, 1], [1, 1, 0]]
    theirs = Matcher([0.5], [0, 1], allow_low_quality_matches=True)(ious)
    assert [x.tolist() for x in theirs] == [[1, 1, 1], [1, 1, 0]]


def test_an_object_that_nothing_overlaps_has_no_default_box_and_of_equals_the_last_wins():
    ious = torch.tensor([[0.0, 0.0], [0.2, 0.6], [0.1, 0.55]])
    assert [x.tolist() for x in ssd.SSDMatcher(0.5)(ious)] == [[1, 2], [0, 1]]
    none = ssd.SSDMatcher(0.5)(torch.zeros(0, 3))
    assert [x.tolist() for x in none] == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_losses_are_those_of_torchvision(seed):
    boxes, images = random_targets([3, 6, 1, 0], seed=seed)
    logits, deltas = random_predictions(4, seed=seed)
    model = small(PLAIN)
    losses = model.losses(boxes, logits, deltas, *model.label_boxes(boxes, images))
    matched = [torch.full((60,), -1)] * 4
    for i, image in enumerate(images[:3]):
        matched[i] = TorchvisionMatcher(0.5)(box_iou(image.gt_boxes.tensor, boxes))
    expected = torchvision_ssd.SSD.compute_loss(
        SimpleNamespace(box_coder=BoxCoder((10.0, 10.0, 5.0, 5.0)), neg_to_pos_ratio=3.0),
        [{"boxes": x.gt_boxes.tensor, "labels": x.gt_classes + 1} for x in images],
        {"cls_logits": logits.roll(1, dims=2), "bbox_regression": deltas},
        [boxes] * 4,
        matched,
    )
    torch.testing.assert_close(losses["loss_cls"], expected["classification"])
    torch.testing.assert_close(losses["loss_box_reg"], expected["bbox_regression"])


def test_hard_negatives_are_those_of_highest_loss_and_never_more_than_there_are(as_on_gpu):
    losses = torch.tensor([[5.0, 1, 4, 4, 2, 0], [9, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1]])
    positive = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    hard = hard_negatives(as_on_gpu(losses), as_on_gpu(positive), 2.0).as_subclass(torch.Tensor)
    assert [row.nonzero()[:, 0].tolist() for row in hard] == [[2, 3], [3, 4, 5], []]


def test_detections_are_in_pixels_of_the_size_that_is_asked_for():
    model = small(PISA).eval()
    image = synthetic_image()
    inputs = [{"image": image}, {"image": image, "height": 480, "width": 640}]
    with torch.no_grad():
        one, two = (x["instances"] for x in model(inputs))
    assert one.image_size == (240, 320) and two.image_size == (480, 640)
    torch.testing.assert_close(2 * one.pred_boxes.tensor, two.pred_boxes.tensor)
    assert 0 < len(one) <= 200
