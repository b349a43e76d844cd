"""Every config takes training steps and detects, on COCO images and on synthetic ones."""

import copy

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BoxMode, Instances
from detectron2.utils.events import EventStorage
from helpers import COCO, PLAIN, THIN_RESNET, has_coco, load_cfg, methods_of, random_batch
from PIL import Image
from pycocotools import mask as coco_mask


def reduced(config, *opts):
    """Make every part of a config small."""
    cfg = load_cfg(config, "MODEL.WEIGHTS", "")
    if cfg.MODEL.RESNETS.DEPTH >= 50:  # for images that are larger than these
        sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[size // 4 for size in level] for level in sizes]
    cfg.merge_from_list(THIN_RESNET)
    if cfg.MODEL.RESNETS.NUM_GROUPS > 1:
        cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 1
    small = [
        *("INPUT.MIN_SIZE_TRAIN", (128,), "INPUT.MAX_SIZE_TRAIN", 160),
        *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32),
        *("MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (16, 16)),
        *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32),
        *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 200, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 100),
        *("MODEL.RPN.PRE_NMS_TOPK_TEST", 100, "MODEL.RPN.POST_NMS_TOPK_TEST", 30),
        *("SOLVER.BASE_LR", 0.001, "SOLVER.CLIP_GRADIENTS.ENABLED", True),
    ]
    cfg.merge_from_list([*small, *opts])
    return cfg


def record(file_name, height, width, annotations):
    return {
        "file_name": str(file_name),
        "height": height,
        "width": width,
        "annotations": annotations,
    }


@pytest.fixture(scope="module")
def made_up_records(tmp_path_factory):
    """Make images with objects and a crowd, with nothing, and with only a crowd."""
    folder = tmp_path_factory.mktemp("images")
    records = []
    for i, sample in enumerate(random_batch([4, 0, 0], num_classes=80)):
        file_name = folder / f"{i}.png"
        pixels = sample["image"].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(file_name)
        height, width = pixels.shape[:2]
        annotations = []
        instances = sample["instances"]
        boxes, classes = instances.gt_boxes.tensor.tolist(), instances.gt_classes.tolist()
        for (x0, y0, x1, y1), category in zip(boxes, classes, strict=True):
            diamond = [(x0 + x1) / 2, y0, x1, (y0 + y1) / 2, (x0 + x1) / 2, y1, x0, (y0 + y1) / 2]
            annotations.append(
                {
                    "bbox": [x0, y0, x1, y1],
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": category,
                    "iscrowd": 0,
                    "segmentation": [diamond],
                }
            )
        if i != 1:
            region = np.zeros((height, width), dtype=np.uint8, order="F")
            region[10:60, 20:90] = 1
            annotations.append(
                {
                    "bbox": [20, 10, 70, 50],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": 0,
                    "iscrowd": 1,
                    "segmentation": coco_mask.encode(region),
                }
            )
        records.append(record(file_name, height, width, annotations))
    return records


@pytest.fixture(scope="module")
def coco_records():
    """Take COCO images with few objects, with the most crowds and with no object."""
    if not has_coco():
        pytest.skip(f"'{COCO}' has no annotations/instances_train2017.json and train2017")
    loaded = DatasetCatalog.get("coco_2017_train")
    few = next(r for r in loaded if 2 <= len(r["annotations"]) <= 5)
    crowds = max(loaded, key=lambda r: sum(a["iscrowd"] for a in r["annotations"]))
    empty = next(r for r in loaded if not r["annotations"])
    assert any(a["iscrowd"] for a in crowds["annotations"])
    return [few, crowds, empty]


@pytest.fixture(params=["made_up_records", "coco_records"])
def records(request):
    return request.getfixturevalue(request.param)


def keypoints_in(box):
    """Put COCO's 17 keypoints on the diagonal of a box, all but the first visible."""
    x0, y0, x1, y1 = box
    at = [(i + 1) / 18 for i in range(17)]
    return [z for t in at for z in (x0 + t * (x1 - x0), y0 + t * (y1 - y0), 2 * (t > 0.1))]


def sem_seg_of(record, num_classes, file_name):
    """Write a map with classes in the things' boxes, an ignored margin, and 0 elsewhere."""
    labels = np.zeros((record["height"], record["width"]), dtype=np.uint8)
    for annotation in record["annotations"]:
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        x0, y0, x1, y1 = (int(z) for z in box)
        labels[y0:y1, x0:x1] = 1 + annotation["category_id"] % (num_classes - 1)
    labels[:5] = 255
    Image.fromarray(labels).save(file_name)
    return str(file_name)


def annotated_for(cfg, records, folder):
    """Copy the records, with the kinds of annotations and the classes that a config needs."""
    records = copy.deepcopy(records)
    one_stage = cfg.MODEL.META_ARCHITECTURE.endswith("RetinaNet")
    num_classes = (cfg.MODEL.RETINANET if one_stage else cfg.MODEL.ROI_HEADS).NUM_CLASSES
    for i, r in enumerate(records):
        for annotation in r["annotations"]:
            annotation["category_id"] %= num_classes
            if cfg.MODEL.KEYPOINT_ON:
                mode = annotation["bbox_mode"]
                box = BoxMode.convert(annotation["bbox"], mode, BoxMode.XYXY_ABS)
                annotation["keypoints"] = keypoints_in(box)
        if cfg.MODEL.META_ARCHITECTURE == "PanopticFPN":
            path = folder / f"sem_seg_{i}.png"
            r["sem_seg_file_name"] = sem_seg_of(r, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, path)
    return records


def inputs_of(cfg, records, folder):
    """Map the records with Detectron2's own mapper for training."""
    torch.manual_seed(0)
    np.random.seed(0)
    mapper = DatasetMapper(cfg, is_train=True)
    return [mapper(r) for r in annotated_for(cfg, records, folder)]


def train(cfg, inputs, steps=2):
    """Train; return the losses of each step and the parameters with a gradient."""
    torch.manual_seed(1)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    history = []
    with EventStorage():
        for _ in range(steps):
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            losses = model(inputs)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            history.append({name: loss.item() for name, loss in losses.items()})
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            assert all(grad.isfinite().all() for grad in grads.values())
            moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
            assert moved and moved <= grads.keys()
    return history, grads.keys()


def carl_of(cfg):
    if not cfg.MODEL.PISA.CARL.ENABLED:
        return set()
    if cfg.MODEL.ROI_HEADS.NAME == "PISACascadeROIHeads":
        return {f"loss_carl_stage{i}" for i in range(3)}
    return {"loss_carl"}


@pytest.mark.parametrize("plain", PLAIN)
def test_every_config_trains_and_pisa_adds_one_loss_alone(plain, records, tmp_path):
    cfg = reduced(plain)
    inputs = inputs_of(cfg, records, tmp_path)
    assert [len(sample["instances"]) > 0 for sample in inputs[::2]] == [True, False]
    theirs, reached = train(cfg, inputs)
    for config in methods_of(plain):
        cfg = reduced(config)
        ours, ours_reached = train(cfg, inputs)
        for losses, expected in zip(ours, theirs, strict=True):
            assert losses.keys() - expected.keys() == carl_of(cfg), config
            assert losses.keys() >= expected.keys()
            assert np.isfinite([*losses.values(), *expected.values()]).all()
        # Parameters with a gradient in stock must have one here: several processes wait for it.
        assert ours_reached == reached


def assert_equal(a, b):
    """Compare all that models return, bit by bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, Instances):
        assert_equal(a.get_fields(), b.get_fields())
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_equal(a[name], b[name])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif hasattr(a, "tensor"):
        assert torch.equal(a.tensor, b.tensor)
    else:
        assert a == b


@pytest.mark.parametrize("plain", PLAIN)
def test_a_method_detects_what_stock_does_with_the_same_weights(plain):
    opts = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 10]
    opts += ["MODEL.RETINANET.SCORE_THRESH_TEST", 0.0]
    opts += ["MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", 0.0]
    batch = [{"image": sample["image"]} for sample in random_batch([0, 0])]
    torch.manual_seed(0)
    stock = build_model(reduced(plain, *opts)).eval()
    with torch.no_grad():
        head = stock.roi_heads if hasattr(stock, "roi_heads") else stock.head
        for p in head.parameters():  # the first scores nearly tie
            p.add_(0.02 * torch.randn_like(p))
        expected = stock(batch)
        assert all(len(output["instances"]) > 0 for output in expected)
        for config in methods_of(plain):
            model = build_model(reduced(config, *opts)).eval()
            model.load_state_dict(stock.state_dict(), strict=True)
            assert_equal(model(batch), expected)
