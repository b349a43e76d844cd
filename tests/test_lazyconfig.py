"""configs/LazyConfig, with the models and schedules of the yaml files."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import build_model
from detectron2.solver import LRMultiplier, build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage
from helpers import ROOT, batch_with_masks, flatten, load_cfg, random_batch
from omegaconf import ListConfig, OmegaConf

from pisa_d2 import PISACascadeROIHeads, PISARetinaNet, PISAROIHeads
from pisa_d2.samplers import RandomSampler
from pisa_d2.settings import CARL, ISR, NegativeISR

LAZY = ROOT / "configs" / "LazyConfig"
# The yaml file of each plain config.
YAML = {
    "COCO/faster_rcnn_R_50_FPN_1x": "COCO-Detection/faster_rcnn_R_50_FPN_1x",
    "COCO/mask_rcnn_R_50_FPN_1x": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
    "COCO/cascade_mask_rcnn_R_50_FPN_1x": "COCO-InstanceSegmentation/cascade_mask_rcnn_R_50_FPN_1x",
    "COCO/retinanet_R_50_FPN_1x": "COCO-Detection/retinanet_R_50_FPN_1x",
    "Digits/faster_rcnn_R_18_FPN": "Digits/faster_rcnn_R_18_FPN",
}


def pisa(name):
    folder, _, file = name.rpartition("/")
    return f"{folder}/pisa_{file}"


def load(name):
    return LazyConfig.load(str(LAZY / f"{name}.py"))


def test_each_config_has_its_yaml_file():
    names = {str(path.relative_to(LAZY).with_suffix("")) for path in LAZY.glob("[A-Z]*/*.py")}
    assert names == {*YAML, *map(pisa, YAML)}


@pytest.mark.parametrize("name", YAML)
def test_the_target_alone_makes_it_pisa(name):
    ours, theirs = (
        dict(flatten(OmegaConf.to_container(load(n), resolve=False))) for n in (pisa(name), name)
    )
    target = "model._target_" if "retinanet" in name else "model.roi_heads._target_"
    assert ours.keys() == theirs.keys()
    differing = {key for key in ours if str(ours[key]) != str(theirs[key])}
    assert differing == {target, "train.output_dir"}
    heads = PISACascadeROIHeads if "cascade" in name else PISAROIHeads
    assert ours[target] is (PISARetinaNet if "retinanet" in name else heads)


def losses(model, batch):
    torch.manual_seed(0)
    with EventStorage(), torch.no_grad():
        return model.train()(batch)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if "mask" in n else n for n in YAML]
)
def test_weights_and_batch_give_the_losses_of_the_yaml_file(name):
    cfg, lazy = load_cfg(f"{pisa(YAML[name])}.yaml"), load(pisa(name))
    if "retinanet" not in name:
        assert lazy.model.roi_heads.batch_size_per_image == cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
        # Fewer, since most of the time goes to the head.
        cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = lazy.model.roi_heads.batch_size_per_image = 32
    expected, model = build_model(cfg), instantiate(lazy.model)
    model.load_state_dict(expected.state_dict(), strict=True)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == [n for n, p in expected.named_parameters() if p.requires_grad]
    batch = batch_with_masks([3, 2]) if "mask" in name else random_batch([3, 2])
    ours, theirs = losses(model, batch), losses(expected, batch)
    assert ours.keys() == theirs.keys() and any("loss_carl" in key for key in ours)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_settings_are_the_published_ones():
    heads = instantiate(load(pisa("Digits/faster_rcnn_R_18_FPN")).model).roi_heads
    assert type(heads.sampler.positive) is type(heads.sampler.negative) is RandomSampler
    predictor = heads.box_predictor
    assert (predictor.isr_p, predictor.isr_n, predictor.carl) == (ISR(), NegativeISR(), CARL())


def settings(augmentation):
    lists = (tuple, ListConfig)
    return {k: [*v] if isinstance(v, lists) else v for k, v in vars(augmentation).items()}


@pytest.mark.parametrize("name", YAML)
def test_solver_and_augmentation_are_those_of_the_yaml_file(name):
    cfg, lazy = load_cfg(f"{YAML[name]}.yaml"), load(name)
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GroupNorm(1, 2))
    expected = build_optimizer(cfg, layers)
    lazy.optimizer.params.model = layers
    optimizer = instantiate(lazy.optimizer)
    for ours, theirs in zip(optimizer.param_groups, expected.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {
            k: v for k, v in theirs.items() if k != "params"
        }
    assert type(optimizer).__name__ == type(expected).__name__  # the name includes the clipping

    num = cfg.SOLVER.MAX_ITER
    assert lazy.train.max_iter == num
    scheduler = LRMultiplier(optimizer, instantiate(lazy.lr_multiplier), num)
    for i in (0, 1, 19, 20, 500, 999, 1000, 59_999, 60_001, 80_001, num - 1):
        if i < num:
            where = build_lr_scheduler(cfg, expected)._multiplier(i / num)
            assert scheduler._multiplier(i / num) == pytest.approx(where, rel=1e-6)

    assert lazy.dataloader.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert lazy.dataloader.train.mapper.use_instance_mask == cfg.MODEL.MASK_ON
    for part, is_train in (("train", True), ("test", False)):
        augmentations = instantiate(lazy.dataloader[part].mapper.augmentations)
        for ours, theirs in zip(augmentations, build_augmentation(cfg, is_train), strict=True):
            assert type(ours) is type(theirs)
            assert settings(ours) == settings(theirs)
    names = cfg.DATASETS
    assert (lazy.dataloader.train.dataset.names,) == tuple(names.TRAIN)
    assert (lazy.dataloader.test.dataset.names,) == tuple(names.TEST)
