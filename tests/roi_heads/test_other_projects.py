"""The mixin in heads of other projects, each of them two lines."""

import importlib
import importlib.util
import re
import sys
from types import ModuleType

import pytest
import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads, build_model
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads
from detectron2.structures import BitMasks
from helpers import HEADS, IMAGE_SIZE, ROOT, random_batch, sampled_by, small_cfg, switch

from pisa_d2 import (
    PROPOSAL_MATCHER_REGISTRY,
    PROPOSAL_SAMPLER_REGISTRY,
    PISAMixin,
    PISAROIHeads,
)
from pisa_d2.samplers import RandomSampler

pytestmark = pytest.mark.usefixtures("storage")


def import_point_rend():
    """PointRend, of which only the colour augmentation calls OpenCV, also where that is absent."""
    absent = importlib.util.find_spec("cv2") is None
    if absent:
        sys.modules["cv2"] = ModuleType("cv2")
    try:
        return importlib.import_module("detectron2.projects.point_rend")
    finally:
        if absent:
            del sys.modules["cv2"]


point_rend = import_point_rend()

POINT_REND = [
    *("MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask"),
    *("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True, "MODEL.ROI_MASK_HEAD.POOLER_TYPE", ""),
    *("MODEL.ROI_MASK_HEAD.NAME", "PointRendMaskHead", "MODEL.ROI_MASK_HEAD.FC_DIM", 32),
    *("MODEL.ROI_MASK_HEAD.POINT_HEAD_ON", True, "MODEL.POINT_HEAD.NUM_CLASSES", 3),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.POINT_HEAD.FC_DIM", 16),
    *("MODEL.POINT_HEAD.SUBDIVISION_STEPS", 2, "TEST.DETECTIONS_PER_IMAGE", 5),
]


@pytest.fixture
def register(monkeypatch):
    """Registers heads until the end of a test."""
    monkeypatch.setattr(ROI_HEADS_REGISTRY, "_obj_map", dict(ROI_HEADS_REGISTRY._obj_map))
    return lambda cls: ROI_HEADS_REGISTRY.register()(cls) or cls


def batch_with_masks(num_objects):
    batch = random_batch(num_objects)
    for sample in batch:
        masks = torch.zeros(len(sample["instances"]), *IMAGE_SIZE, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, sample["instances"].gt_boxes, strict=True):
            mask[int(y0) : int(y1), int(x0) : int(x1)] = True
        sample["instances"].gt_masks = BitMasks(masks)
    return batch


def build(name, *opts):
    cfg = small_cfg()
    point_rend.add_pointrend_config(cfg)
    cfg.merge_from_list([*opts, "MODEL.ROI_HEADS.NAME", name])
    torch.manual_seed(0)
    return build_model(cfg)


def step(model, batch):
    """The losses, after their gradients reached the parameters."""
    torch.manual_seed(1)
    losses = model.train()(batch)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    return losses


SAMPLERS = [sampled_by("RandomSampler", "RandomSampler"), sampled_by("HardSampler", "HardSampler")]


@pytest.mark.parametrize("samplers", SAMPLERS)
def test_point_rend_trains_with_pisa(register, samplers):
    @register
    class PISAPointRendROIHeads(PISAMixin, point_rend.roi_heads.PointRendROIHeads):
        pass

    batch = batch_with_masks([3, 0, 2])
    model = build("PISAPointRendROIHeads", *POINT_REND, *samplers)
    stock = build("PointRendROIHeads", *POINT_REND)
    assert step(model, batch).keys() - step(stock, batch).keys() == {"loss_carl"}
    assert "loss_mask_point" in step(model, batch)
    stock.load_state_dict(model.state_dict(), strict=True)
    inputs = [{"image": sample["image"]} for sample in batch]
    with torch.no_grad():
        pairs = zip(model.eval()(inputs), stock.eval()(inputs), strict=True)
    for ours, theirs in pairs:
        ours, theirs = ours["instances"], theirs["instances"]
        assert len(theirs) > 0
        assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        assert torch.equal(ours.pred_masks, theirs.pred_masks)


def test_point_rend_with_all_parts_off_has_its_own_losses_to_the_last_bit(register):
    @register
    class PISAPointRendROIHeads(PISAMixin, point_rend.roi_heads.PointRendROIHeads):
        pass

    batch = batch_with_masks([3, 0, 2])
    off = switch(False, False, False)
    ours = step(build("PISAPointRendROIHeads", *POINT_REND, *off), batch)
    theirs = step(build("PointRendROIHeads", *POINT_REND), batch)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


BASES = [StandardROIHeads, Res5ROIHeads, CascadeROIHeads]


def of_cfg(base):
    class CfgHeads(base):
        """As the heads of DensePose and TridentNet: all from cfg, in a constructor of their own."""

        def __init__(self, cfg, input_shape):
            super().__init__(cfg, input_shape)
            self.factor = cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION

    return CfgHeads


def of_any_arguments(base):
    class AnyHeads(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.factor = 0.25

    return AnyHeads


def of_parts(base):
    class ConfigurableHeads(base):
        @configurable
        def __init__(self, *, factor, **kwargs):
            super().__init__(**kwargs)
            self.factor = factor

        @classmethod
        def from_config(cls, cfg, input_shape):
            factor = cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION
            return {**super().from_config(cfg, input_shape), "factor": factor}

    return ConfigurableHeads


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", [of_cfg, of_any_arguments, of_parts])
@pytest.mark.parametrize("samplers", SAMPLERS)
def test_heads_with_a_constructor_of_their_own_train_with_pisa(register, base, kind, samplers):
    @register
    class PISAOwnHeads(PISAMixin, kind(base)):
        pass

    name = "PISAROIHeads" if base is StandardROIHeads else f"PISA{base.__name__}"
    model = build("PISAOwnHeads", *HEADS[name], *samplers)
    assert model.roi_heads.factor == 0.25
    expected = step(build(name, *HEADS[name], *samplers), random_batch([3, 0, 2]))
    losses = step(model, random_batch([3, 0, 2]))
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], expected[name]) for name in losses)


@pytest.mark.parametrize("kind", [of_cfg, of_any_arguments, of_parts])
def test_heads_derived_from_those_with_pisa_have_a_constructor_of_their_own(register, kind):
    @register
    class OwnPISAHeads(kind(PISAROIHeads)):
        pass

    opts = sampled_by("InstanceBalancedSampler", "IoUBalancedSampler")
    model = build("OwnPISAHeads", *opts)
    assert model.roi_heads.factor == 0.25
    assert type(model.roi_heads.sampler.positive).__name__ == "InstanceBalancedSampler"
    assert type(model.roi_heads.sampler.negative).__name__ == "IoUBalancedSampler"
    assert "loss_carl" in step(model, random_batch([3, 0, 2]))


def test_heads_made_of_parts_sample_at_random_without_a_sampler():
    class PISAOwnHeads(of_parts(PISAROIHeads)):
        pass

    cfg = small_cfg()
    shapes = {f"p{i}": ShapeSpec(channels=32, stride=2**i) for i in range(2, 6)}
    parts = PISAOwnHeads.from_config(cfg, shapes)
    del parts["pisa"]
    sampler = PISAOwnHeads(**parts).sampler
    assert type(sampler.positive) is type(sampler.negative) is RandomSampler


def test_the_page_for_other_projects_is_a_program_that_trains(register, monkeypatch):
    for registry in (PROPOSAL_SAMPLER_REGISTRY, PROPOSAL_MATCHER_REGISTRY):
        monkeypatch.setattr(registry, "_obj_map", dict(registry._obj_map))
    text = (ROOT / "docs" / "use_in_your_project.md").read_text()
    page = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)), page)
    heads = page["cfg"].MODEL.ROI_HEADS
    names = [heads.POSITIVE_SAMPLER.NAME, heads.NEGATIVE_SAMPLER.NAME]
    opts = [*sampled_by(*names), "MODEL.ROI_HEADS.PROPOSAL_MATCHER", heads.PROPOSAL_MATCHER]
    for name, more in ((heads.NAME, POINT_REND), ("CosinePISAROIHeads", [])):
        model = build(name, *opts, *more)
        assert "loss_carl" in step(model, batch_with_masks([3, 0, 2]))
        samplers = model.roi_heads.sampler.positive, model.roi_heads.sampler.negative
        parts = [*samplers, model.roi_heads.proposal_matcher]
        assert [type(part).__name__ for part in parts] == [*names, heads.PROPOSAL_MATCHER]
    assert type(model.roi_heads.box_predictor).__name__ == "CosineOutputLayers"
