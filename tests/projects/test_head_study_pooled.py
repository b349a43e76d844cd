"""Features that are looked up are those that the head would pool."""

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from head_study.cache import Frozen, collate, plan_cache
from head_study.detector import build_head, head_config, head_weights, load_detector, with_options
from head_study.pooled import looking_up, places, pooler_of
from head_study.training import train_head
from head_study_models import PISA, detector_cfg, register_study_images
from helpers import HEADS

RELEASED = {**PISA, "MODEL.ROI_HEADS.NEGATIVE_SAMPLER.NAME": "ScoreHLRSampler"}


@pytest.fixture
def dataset(tmp_path):
    return register_study_images(tmp_path, [4, 7, 3])


class Parts:
    """A detector's frozen parts, and heads of strategies."""

    def __init__(self, cfg):
        model = load_detector(cfg)
        self.base = head_config(cfg, num_steps=4)
        self.shape, self.weights = model.backbone.output_shape(), head_weights(model.roi_heads)
        self.frozen = Frozen(model, cfg, pooler_of(self.head({}))[1])
        self.records = DatasetCatalog.get(*cfg.DATASETS.TRAIN)

    def head(self, options):
        cfg = with_options(self.base, options)
        return build_head(self.base, cfg, self.shape, self.weights, seed=1, from_detector=True)

    def views(self, training, pooled):
        return [self.frozen.view(record, training, pooled) for record in self.records]


@pytest.fixture
def calls(monkeypatch):
    """The number of calls of ROIAlign, in a list."""
    counted = [0]
    align = ROIAlign.forward

    def forward(self, *args):
        counted[0] += 1
        return align(self, *args)

    monkeypatch.setattr(ROIAlign, "forward", forward)
    return counted


@pytest.mark.parametrize("heads", ["PISAROIHeads", "PISARes5ROIHeads"])
@pytest.mark.parametrize("options", [{}, RELEASED], ids=["random", "as released"])
def test_training_is_the_same_without_pooling_again(heads, options, dataset, tmp_path, calls):
    parts = Parts(detector_cfg(tmp_path, dataset, *HEADS[heads]))
    trained, num_calls = [], []
    for pooled in (False, True):
        views = parts.views(training=True, pooled=pooled)
        head, calls[0] = parts.head(options), 0
        train_head(with_options(parts.base, options), head, views, seed=1)
        trained.append(head.state_dict())
        num_calls.append(calls[0])
    assert num_calls[0] > 0 and num_calls[1] == 0
    assert all(torch.equal(trained[0][name], value) for name, value in trained[1].items())


def test_detections_are_the_same(dataset, tmp_path, calls):
    cfg = detector_cfg(tmp_path, dataset, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    parts = Parts(cfg)
    head = parts.head({}).eval()
    for plain, view in zip(
        *(parts.views(training=False, pooled=pooled) for pooled in (False, True)), strict=True
    ):
        (expected,), _ = head(*collate([plain], torch.device("cpu")))
        calls[0] = 0
        with looking_up(head, [view.pooled]):
            (found,), _ = head(*collate([view], torch.device("cpu")))
        assert calls[0] == 0 and len(found) > 10
        assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(found.scores, expected.scores)
    assert type(head.box_pooler) is ROIPooler


def test_a_strategy_with_a_pooler_of_its_own_pools_by_itself(dataset, tmp_path, calls):
    parts = Parts(detector_cfg(tmp_path, dataset))
    (view, *_) = parts.views(training=True, pooled=True)
    for options, changed in (
        ({}, False),
        ({"MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 3}, True),
        ({"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign"}, True),
    ):
        head = parts.head(options)
        own = pooler_of(head)[1]
        with looking_up(head, [view.pooled]):
            assert (head.box_pooler is own) == changed
        assert head.box_pooler is own
    with looking_up(parts.head({}), [view.pooled, None]) as nothing:
        assert nothing is None

    class OwnPooler(ROIPooler):
        def forward(self, *args):
            return 2 * super().forward(*args)

    head.box_pooler.__class__ = OwnPooler
    assert pooler_of(head) is None


def test_boxes_that_a_head_makes_are_pooled(dataset, tmp_path, calls):
    parts = Parts(detector_cfg(tmp_path, dataset))
    (view, *_) = parts.views(training=True, pooled=True)
    head = parts.head({})
    maps = [view.features[name][None] for name in head.box_in_features]
    known = view.pooled.boxes[:3]
    moved = torch.cat([known[:2], known[2:] + 1])
    for boxes, num_calls in ((known, 0), (known.flip(0), 0), (moved, len(maps))):
        calls[0] = 0
        with looking_up(head, [view.pooled]):
            found = head.box_pooler(maps, [Boxes(boxes)])
        assert calls[0] == num_calls
        assert torch.equal(found, head.box_pooler(maps, [Boxes(boxes)]))


def test_boxes_are_found_by_their_corners():
    known = torch.arange(20.0).view(5, 4)
    assert places(known[:3], known) == slice(3)
    assert places(known[[4, 0, 4]], known).tolist() == [4, 0, 4]
    assert places(known[:0], known) == slice(0)
    assert places(known[[1, 2]] + torch.tensor([0, 0, 0, 1.0]), known) is None
    assert places(known[1:2], known[:0]) is None


def test_pooled_features_are_stored_if_those_of_all_images_fit(dataset, tmp_path):
    cfg = detector_cfg(tmp_path, dataset)
    frozen = Parts(cfg).frozen
    plan = plan_cache(frozen, cfg, max_gigabytes=1, half=False)
    assert plan.pooled and "feature maps and pooled features" in plan.text()
    assert plan_cache(frozen, cfg, max_gigabytes=1.01 * plan.gigabytes, half=False).pooled
    short = plan_cache(frozen, cfg, max_gigabytes=0.99 * plan.gigabytes, half=False)
    assert not short.pooled and (len(short.train), len(short.test)) == (3, 3)
    assert plan_cache(frozen, cfg, max_gigabytes=0.51 * plan.gigabytes, half=True).pooled
    assert not plan_cache(Frozen(frozen.model, cfg), cfg, max_gigabytes=1, half=False).pooled
