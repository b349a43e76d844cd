import importlib.util

import pytest
import ssd
import torch
from detectron2.structures import BoxMode
from helpers import read_metrics, run_training
from PIL import Image, ImageDraw
from ssd_models import PISA, PLAIN, PROJECT, load
from torch import nn

from pisa_d2.data import make_digits

BOXES = [(30, 40, 90, 100), (120, 20, 180, 60), (60, 110, 75, 140)]


@pytest.fixture
def painted(tmp_path):
    """A black image of 200x160 with red boxes; the last is a crowd."""
    image = Image.new("RGB", (200, 160))
    for x0, y0, x1, y1 in BOXES[:2]:
        ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), fill=(255, 0, 0))
    image.save(tmp_path / "painted.png")
    annotations = [
        {
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": i,
            "iscrowd": int(i == 2),
        }
        for i, (x0, y0, x1, y1) in enumerate(BOXES)
    ]
    size = {"width": 200, "height": 160}
    return {"file_name": str(tmp_path / "painted.png"), "annotations": annotations, **size}


def mapper(*opts):
    return ssd.SSDMapper(load(PLAIN, *opts))


@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical"])
def test_boxes_follow_their_objects_through_all_augmentations(painted, flip):
    augment = mapper("INPUT.RANDOM_FLIP", flip, "MODEL.PIXEL_MEAN", [0.0, 0.0, 0.0])
    torch.manual_seed(0)
    sizes, nums = set(), set()
    for _ in range(40):
        result = augment(painted)
        image, instances = result["image"], result["instances"]
        assert image.shape == (3, 300, 300) and image.dtype == torch.uint8
        assert "annotations" not in result and instances.image_size == (300, 300)
        red = image.amax(dim=0) > 30
        for x0, y0, x1, y1 in instances.gt_boxes.tensor.round().int().tolist():
            assert 0 <= x0 < x1 <= 300 and 0 <= y0 < y1 <= 300
            inside = red[y0:y1, x0:x1].float()
            assert inside.mean() > 0.8
            sizes.add((x1 - x0) * (y1 - y0))
        assert set(instances.gt_classes.tolist()) <= {0, 1}
        nums.add(len(instances))
    assert nums == {1, 2} and max(sizes) > 10 * min(sizes)
    assert len(painted["annotations"]) == 3


def test_without_augmentations_the_image_is_only_resized(painted):
    off = ["INPUT.SSD.PHOTOMETRIC", False, "INPUT.SSD.MAX_ZOOM_OUT", 1.0, "INPUT.SSD.IOU_CROP"]
    result = mapper(*off, False, "INPUT.RANDOM_FLIP", "none")(painted)
    expected = torch.tensor(BOXES[:2]) * torch.tensor([300 / 200, 300 / 160] * 2)
    torch.testing.assert_close(result["instances"].gt_boxes.tensor, expected)
    assert result["instances"].gt_classes.tolist() == [0, 1]


def test_an_image_without_objects_is_augmented_too(painted):
    augment = mapper()
    for _ in range(5):
        result = augment({**painted, "annotations": []})
        assert result["instances"].gt_boxes.tensor.shape == (0, 4)
        assert result["instances"].gt_classes.shape == (0,)


@pytest.mark.parametrize(
    "opts", [["INPUT.FORMAT", "BGR"], ["INPUT.SSD.MAX_ZOOM_OUT", 0.5]], ids=["format", "zoom"]
)
def test_a_wrong_value_of_the_mapper_is_refused(opts):
    with pytest.raises(ValueError, match=rf"{opts[0]} = '?{opts[1]}'? is not allowed"):
        mapper(*opts)


def load_trainer():
    spec = importlib.util.spec_from_file_location("ssd_train_net", PROJECT / "train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Trainer


def test_clipping_full_model_limits_the_norm_of_the_whole_gradient():
    options = ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 5.0, "SOLVER.BASE_LR", 1.0]
    cfg = load(PISA, *options, "SOLVER.MOMENTUM", 0.0, "SOLVER.WEIGHT_DECAY", 0.0)
    model = nn.Linear(2, 2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = load_trainer().build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    optimizer.step()
    steps = [(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]
    torch.testing.assert_close(torch.cat(steps).norm(), torch.tensor(5.0))
    assert cfg.SOLVER.CLIP_GRADIENTS.ENABLED


@pytest.mark.slow
def test_a_run_trains_and_evaluates(tmp_path):
    make_digits(tmp_path, num_train=8, num_val=2)
    run_training(
        PROJECT / "train_net.py",
        PROJECT / "configs/BCCD/pisa_ssd300_vgg16.yaml",
        tmp_path,
        tmp_path / "run",
        *("DATASETS.TRAIN", "('digits_train',)", "DATASETS.TEST", "('digits_val',)"),
        *("MODEL.DEVICE", "cpu", "MODEL.SSD.NUM_CLASSES", "10", "MODEL.SSD.WIDTH", "0.05"),
        *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "20"),
    )
    metrics = read_metrics(tmp_path / "run")
    steps = next(line for line in metrics if line.get("iteration") == 19)
    assert {"loss_cls", "loss_box_reg", "loss_carl", "pisa/positive_iou"} <= steps.keys()
    assert any("bbox/AP" in line for line in metrics)
