import itertools
import logging
import re

import pytest
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import logger as detectron2_logger
from helpers import (
    IMAGE_SIZE,
    REGIONS_ON,
    ROOT,
    random_batch,
    small_cfg,
    small_retinanet_cfg,
    with_regions,
)
from region_scenes import build, candidates, slow_classes

from pisa_d2 import PISAROIHeads
from pisa_d2.regions import warn_of_gaps

pytestmark = pytest.mark.usefixtures("storage")


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch):
    """Let warnings that are given once appear in each test."""
    counter = type(detectron2_logger._LOG_COUNTER)()
    monkeypatch.setattr(detectron2_logger, "_LOG_COUNTER", counter)


def test_targets_without_their_regions_get_one_warning_that_names_the_loader(caplog):
    model = build(*REGIONS_ON)
    for _ in range(2):
        model(random_batch([3, 2]))
    assert [r.levelno for r in caplog.records if "IGNORED_REGIONS" in r.message] == [
        logging.WARNING
    ]
    assert "the data loader drops the regions" in caplog.text
    assert "pisa_d2.data.KeepRegions(mapper)" in caplog.text


NAMES = {
    "MODEL.PROPOSAL_GENERATOR.NAME": ("PISARPN", "RPN"),
    "MODEL.ROI_HEADS.NAME": ("PISAROIHeads", "StandardROIHeads"),
}


@pytest.mark.parametrize("chosen", [*itertools.product([0, 1], repeat=2)])
def test_parts_that_do_not_ignore_regions_get_one_warning_that_names_them(caplog, chosen):
    names = {key: both[i] for (key, both), i in zip(NAMES.items(), chosen, strict=True)}
    opts = [x for pair in names.items() for x in pair]
    cfg = small_cfg(*REGIONS_ON, *opts)
    for _ in range(2):
        build_model(cfg)
    warn_of_gaps(cfg)
    warned = [r.message for r in caplog.records if "has no effect on" in r.message]
    assert len(warned) == (1 if any(chosen) else 0)
    for (key, (_, theirs)), i in zip(NAMES.items(), chosen, strict=True):
        assert (f"{key} = {theirs!r}" in caplog.text) == bool(i)


def test_a_stock_retinanet_is_warned_of_too(caplog):
    warn_of_gaps(small_retinanet_cfg(*REGIONS_ON[:2]))
    assert "has no effect" not in caplog.text
    warn_of_gaps(small_retinanet_cfg(*REGIONS_ON[:2], "MODEL.META_ARCHITECTURE", "RetinaNet"))
    assert "no effect on MODEL.META_ARCHITECTURE = 'RetinaNet'" in caplog.text


@pytest.mark.parametrize("value", [0, 1.1, -0.5, "half", float("nan")])
def test_a_share_out_of_range_is_refused(value):
    key = "MODEL.IGNORED_REGIONS.IOA_THRESH"
    cfg = small_cfg(*REGIONS_ON)
    cfg.MODEL.IGNORED_REGIONS.IOA_THRESH = value
    with pytest.raises(ValueError, match=key):
        build_model(cfg)
    with pytest.raises(ValueError, match="ignored_ioa_thresh"):
        PISAROIHeads(small_cfg(), build().backbone.output_shape(), ignored_ioa_thresh=value)


def test_heads_take_the_share_as_an_argument():
    shapes = build().backbone.output_shape()
    assert PISAROIHeads(small_cfg(), shapes, ignored_ioa_thresh=0.3).ignored_ioa_thresh == 0.3
    assert PISAROIHeads(small_cfg(*REGIONS_ON), shapes).ignored_ioa_thresh == 0.5
    assert (
        PISAROIHeads(small_cfg(*REGIONS_ON), shapes, ignored_ioa_thresh=None).ignored_ioa_thresh
        is None
    )


def test_the_matcher_in_the_documentation_ignores_by_the_center_in_any_image():
    text = (ROOT / "docs/ignored_regions.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    cfg = small_cfg(*REGIONS_ON, "MODEL.IGNORED_REGIONS.IOA_THRESH", 1.0)
    program = {"cfg": cfg, "mapper": lambda record: None}
    for block in blocks:
        exec(block, program)
    heads = build_model(cfg).roi_heads
    region = [40, 20, 90, 80]
    for num_objects in (3, 0):
        [sample] = with_regions(random_batch([num_objects]), [region])
        targets = sample["instances"]
        boxes = candidates(targets)
        [found] = heads.match([Instances(IMAGE_SIZE, proposal_boxes=Boxes(boxes))], [targets])
        expected = slow_classes(boxes.tolist(), targets, [], heads.num_classes)
        for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            inside = 40 <= (x1 + x2) / 2 < 90 and 20 <= (y1 + y2) / 2 < 80
            if inside and expected[i] == heads.num_classes:
                expected[i] = -1
        assert found.classes.tolist() == expected and -1 in expected
