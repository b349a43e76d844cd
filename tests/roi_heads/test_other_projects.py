"""The mixin in heads of other projects, with two lines for each."""

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
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers, Res5ROIHeads
from helpers import HEADS, ROOT, batch_with_masks, random_batch, sampled_by, small_cfg, switch

from pisa_d2 import (
    ISR,
    PISAFastRCNNOutputLayers,
    PISAMixin,
    PISAROIHeads,
)
from pisa_d2.samplers import RandomSampler

pytestmark = pytest.mark.usefixtures("storage")


def import_point_rend():
    """Import PointRend, even without OpenCV, which only its colour augmentation calls."""
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
def register():
    """Return a decorator that registers heads."""
    return lambda cls: ROI_HEADS_REGISTRY.register()(cls) or cls


def build(name, *opts):
    cfg = small_cfg()
    point_rend.add_pointrend_config(cfg)
    cfg.merge_from_list([*opts, "MODEL.ROI_HEADS.NAME", name])
    torch.manual_seed(0)
    return build_model(cfg)


def step(model, batch):
    """Take a training step; return its losses after the backward pass."""
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
        """Heads like DensePose's and TridentNet's, with a constructor that takes only cfg."""

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


class OwnLosses(FastRCNNOutputLayers):
    """A predictor like CenterNet2's and Detic's, with its own losses and more arguments."""

    def losses(self, predictions, proposals, more=None):
        return FastRCNNOutputLayers.losses(self, predictions, proposals)


class OwnLossesHeads(CascadeROIHeads):
    predictor = OwnLosses

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        shape = ret["box_heads"][0].output_shape
        return {**ret, "box_predictors": [cls.predictor(cfg, shape) for _ in ret["box_heads"]]}


def test_losses_of_a_predictors_own_stay_and_are_told_of_once(register, caplog):
    @register
    class PISAOwnLossesHeads(PISAMixin, OwnLossesHeads):
        pass

    model = build("PISAOwnLossesHeads", *HEADS["PISACascadeROIHeads"])
    assert len(model.roi_heads.box_predictor) == 3
    assert caplog.text.count("keeps its box predictor OwnLosses") == 1
    caplog.set_level("INFO")
    losses = step(model, random_batch([3, 2]))
    assert not any(name.startswith("loss_carl") for name in losses)
    assert "ISR-P, ISR-N, CARL, where OwnLosses uses them in its own losses." in caplog.text


def test_losses_of_a_predictors_own_are_exchanged_in_a_subclass(register, caplog):
    class WithPISA(OwnLosses):
        losses = PISAFastRCNNOutputLayers.losses

    @register
    class PISAOwnLossesHeads(PISAMixin, OwnLossesHeads):
        predictor = WithPISA

    opts = sampled_by("HardSampler", "HardSampler")
    losses = step(
        build("PISAOwnLossesHeads", *HEADS["PISACascadeROIHeads"], *opts), random_batch([3, 2])
    )
    assert "loss_carl_stage2" in losses
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


class ValidationLossHeads(StandardROIHeads):
    """Heads like unbiased-teacher's, with further arguments and losses outside training."""

    def forward(self, images, features, proposals, targets=None, compute_val_loss=False, branch=""):
        assert branch == "val_loss"
        if self.training or compute_val_loss:
            proposals = self.label_and_sample_proposals(proposals, targets, branch=branch)
            return proposals, self._forward_box_losses(features, proposals)
        return super().forward(images, features, proposals, targets)

    def _forward_box_losses(self, features, proposals):
        boxes = [p.proposal_boxes for p in proposals]
        x = self.box_head(self.box_pooler([features[f] for f in self.box_in_features], boxes))
        return self.box_predictor.losses(self.box_predictor(x), proposals)


def test_samplers_that_need_predictions_serve_a_validation_loss(register):
    @register
    class PISAValidationLossHeads(PISAMixin, ValidationLossHeads):
        pass

    model = build("PISAValidationLossHeads", *SAMPLERS[1]).eval()
    batch = random_batch([3, 2])
    images = model.preprocess_image(batch)
    targets = [sample["instances"] for sample in batch]
    with torch.no_grad():
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features)
        heads = model.roi_heads
        for args, kwargs in (((targets,), {}), ((), {"targets": targets})):
            inputs = (images, features, proposals, *args)
            _, losses = heads(*inputs, **kwargs, compute_val_loss=True, branch="val_loss")
            assert "loss_carl" in losses
    assert heads._step is None


def test_the_page_for_other_projects_is_a_program_that_trains():
    text = (ROOT / "docs" / "use_in_your_project.md").read_text()
    page = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)), page)
    cfg = small_cfg()
    point_rend.add_pointrend_config(cfg)
    theirs = page["cfg"].MODEL.ROI_HEADS
    heads = cfg.MODEL.ROI_HEADS
    heads.PROPOSAL_MATCHER = theirs.PROPOSAL_MATCHER
    heads.POSITIVE_SAMPLER, heads.NEGATIVE_SAMPLER = (
        theirs.POSITIVE_SAMPLER,
        theirs.NEGATIVE_SAMPLER,
    )
    batch = batch_with_masks([3, 0, 2])
    for name, more in ((theirs.NAME, POINT_REND), ("CosinePISAROIHeads", [])):
        cfg.merge_from_list([*more, "MODEL.ROI_HEADS.NAME", name])
        model = build_model(cfg)
        assert "loss_carl" in step(model, batch)
        sampler = model.roi_heads.sampler
        parts = [sampler.positive, sampler.negative, model.roi_heads.proposal_matcher]
        names = ["SmallestFirstSampler", "MostConfidentSampler", "GenerousMatcher"]
        assert [type(part).__name__ for part in parts] == names
        assert sampler.positive.min_area == 16
        cfg.merge_from_list(["MODEL.MASK_ON", False])
    assert type(model.roi_heads.box_predictor).__name__ == "PISACosineOutputLayers"

    of_batch = page["of_batch"].MODEL.ROI_HEADS
    heads.POSITIVE_SAMPLER.NAME = of_batch.POSITIVE_SAMPLER.NAME
    heads.NEGATIVE_SAMPLER.NAME = of_batch.NEGATIVE_SAMPLER.NAME
    model = build_model(cfg)
    assert type(model.roi_heads.sampler).__name__ == "AllPositivesSampler"
    assert "loss_carl" in step(model, batch)

    heads = page["lazy_model"].roi_heads
    assert type(heads) is PISAROIHeads and heads.sampler.negative.num_bins == 5
    predictor = heads.box_predictor
    assert (predictor.isr_p, predictor.isr_n, predictor.carl.beta) == (ISR(), None, 0.3)
    assert "loss_carl" in step(page["lazy_model"], random_batch([3, 0, 2]))
