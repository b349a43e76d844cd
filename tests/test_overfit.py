"""Small detectors of each kind overfit eight COCO images, plain and with PISA."""

import copy
from contextlib import redirect_stdout
from io import StringIO

import pisa_d2  # isort: skip  (before Detectron2, which it patches)

import pytest
import ssd
import torch
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import COCO, ROOT, has_coco

pytestmark = [
    pytest.mark.by_hand,  # about 3 minutes each on one core
    pytest.mark.skipif(not has_coco(), reason=f"'{COCO}' has no COCO images and annotations"),
]

NUM_IMAGES, SIZE, STEPS = 8, 192, 250
R18 = [
    *("INPUT.MIN_SIZE_TEST", SIZE, "INPUT.MAX_SIZE_TEST", SIZE),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 200, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64),
]
# For each kind: the config, its overrides and the ones for PISA.
MODELS = {
    "mask": (
        "configs/Base-RCNN-R18-FPN-GN.yaml",
        [*R18, "MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NUM_CONV", 2]
        + ["MODEL.ROI_MASK_HEAD.CONV_DIM", 64],
        ["MODEL.ROI_HEADS.NAME", "PISAROIHeads"],
    ),
    "cascade": (
        "configs/Base-RCNN-R18-FPN-GN.yaml",
        [*R18, "MODEL.MASK_ON", False, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads"]
        + ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True],
        ["MODEL.ROI_HEADS.NAME", "PISACascadeROIHeads"],
    ),
    "retinanet": (
        "configs/Base-RetinaNet-R18-FPN-GN.yaml",
        R18[:4],
        ["MODEL.META_ARCHITECTURE", "PISARetinaNet"],
    ),
    "ssd": (
        "projects/SSD/configs/BCCD/ssd300_vgg16.yaml",
        ["MODEL.SSD.NUM_CLASSES", 80, "MODEL.PIXEL_STD", [57.0] * 3],
        ["MODEL.META_ARCHITECTURE", "PISASSD"],
    ),
}
LEAST_AP = 15.0


def load(config, opts):
    cfg = get_cfg()
    pisa_d2.add_pisa_config(cfg)
    ssd.add_ssd_config(cfg)
    cfg.merge_from_file(str(ROOT / config))
    cfg.merge_from_list([*opts, "MODEL.DEVICE", "cpu"])
    return cfg


@pytest.fixture(scope="module")
def eight_images():
    metadata = MetadataCatalog.get("coco_2017_train")
    records = [r for r in DatasetCatalog.get("coco_2017_train") if len(r["annotations"]) > 1]
    DatasetCatalog.register("eight_images", lambda: copy.deepcopy(records[:NUM_IMAGES]))
    MetadataCatalog.get("eight_images").set(
        thing_classes=metadata.thing_classes,
        thing_dataset_id_to_contiguous_id=metadata.thing_dataset_id_to_contiguous_id,
    )
    yield "eight_images"
    DatasetCatalog.remove("eight_images")
    MetadataCatalog.remove("eight_images")


def average_precision(cfg, model, name, folder):
    evaluator = COCOEvaluator(name, tasks=("bbox",), distributed=False, output_dir=str(folder))
    with redirect_stdout(StringIO()):
        results = inference_on_dataset(model, build_detection_test_loader(cfg, name), evaluator)
    return results["bbox"]["AP"]


@pytest.mark.parametrize("pisa", [False, True], ids=["plain", "pisa"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_losses_fall_and_the_average_precision_rises(kind, pisa, eight_images, tmp_path):
    config, opts, method = MODELS[kind]
    cfg = load(config, [*opts, *(method if pisa else [])])
    augmentations = [ResizeShortestEdge(SIZE, SIZE)]
    mapper = DatasetMapper(cfg, is_train=True, augmentations=augmentations)
    inputs = [mapper(record) for record in DatasetCatalog.get(eight_images)]
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, STEPS)
    history = []
    with EventStorage():
        model.train()
        for _ in range(STEPS):
            losses = model([inputs[i] for i in torch.randperm(NUM_IMAGES)[:4].tolist()])
            optimizer.zero_grad()
            sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            history.append(sum(loss.item() for loss in losses.values()))
    ap = average_precision(cfg, model, eight_images, tmp_path)
    first, last = sum(history[:10]) / 10, sum(history[-10:]) / 10
    print(f"{kind}, {'PISA' if pisa else 'plain'}: loss {first:.2f} -> {last:.2f}, AP {ap:.1f}")
    assert last < first / 2
    assert ap > LEAST_AP
