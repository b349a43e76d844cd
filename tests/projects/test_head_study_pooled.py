"""Features that are looked up are those that the head would pool."""

import pytest
import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from head_study.cache import Frozen, collate, plan_cache, run_head
from head_study.detector import load_detector
from head_study.pooled import looking_up, places, pooler_of
from head_study.runs import detector_head
from head_study.training import train_head
from head_study_models import PISA, detector_cfg, register_study_images, small_study
from helpers import HEADS

CPU = torch.device("cpu")
STRATEGIES = {
    "random": {},
    "as released": {**PISA, "MODEL.ROI_HEADS.NEGATIVE_SAMPLER.NAME": "ScoreHLRSampler"},
}


@pytest.fixture
def make_study(tmp_path):
    """Return a function that makes a study with pooled features in its views."""

    def make(*opts, options=STRATEGIES):
        dataset = register_study_images(tmp_path, [4, 7, 3])
        return small_study(detector_cfg(tmp_path, dataset, *opts), tmp_path, options)

    return make


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
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_is_the_same_without_pooling_again(heads, strategy, make_study, calls):
    study = make_study(*HEADS[heads])
    pooled = list(study.views("train"))
    trained, num_calls = [], []
    for views in ([view._replace(pooled=None) for view in pooled], pooled):
        head, calls[0] = study.head(strategy, seed=1), 0
        train_head(study.config(strategy), head, views, seed=1)
        trained.append(head.state_dict())
        num_calls.append(calls[0])
    assert num_calls[0] > 0 and num_calls[1] == 0
    assert all(torch.equal(trained[0][name], value) for name, value in trained[1].items())


def test_detections_are_the_same(make_study, calls):
    study = make_study("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    head = detector_head(study).eval()
    for view in study.views("test"):
        (expected,), _ = head(*collate([view], CPU))
        calls[0] = 0
        (found,), _ = run_head(head, [view], CPU)
        assert calls[0] == 0 and len(found) > 10
        assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(found.scores, expected.scores)
    assert type(head.box_pooler) is ROIPooler


def test_a_strategy_with_a_pooler_of_its_own_pools_by_itself(make_study):
    options = {
        "plain": {},
        "samples": {"MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 3},
        "type": {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign"},
    }
    study = make_study(options=options)
    pooled = study.views("train")[0].pooled
    for name in options:
        head = study.head(name, seed=1)
        own = pooler_of(head)[1]
        with looking_up(head, [pooled]):
            assert (head.box_pooler is own) == (name != "plain")
        assert head.box_pooler is own
        with looking_up(head, [pooled, None]):
            assert head.box_pooler is own

    class OwnPooler(ROIPooler):
        def forward(self, *args):
            return 2 * super().forward(*args)

    head.box_pooler.__class__ = OwnPooler
    assert pooler_of(head) is None


def test_boxes_that_a_head_makes_are_pooled(make_study, calls):
    study = make_study()
    view, head = study.views("train")[0], study.head("random", seed=1)
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


def test_pooled_features_are_stored_if_those_of_all_images_fit(make_study):
    study = make_study()
    cfg = study.base
    frozen = Frozen(load_detector(cfg), cfg, pooler_of(detector_head(study))[1])
    plan = plan_cache(frozen, cfg, max_gigabytes=1, half=False)
    assert plan.pooled and "feature maps and pooled features" in plan.text()
    assert plan_cache(frozen, cfg, max_gigabytes=1.01 * plan.gigabytes, half=False).pooled
    short = plan_cache(frozen, cfg, max_gigabytes=0.99 * plan.gigabytes, half=False)
    assert not short.pooled and (len(short.train), len(short.test)) == (3, 3)
    assert plan_cache(frozen, cfg, max_gigabytes=0.51 * plan.gigabytes, half=True).pooled
    assert not plan_cache(Frozen(frozen.model, cfg), cfg, max_gigabytes=1, half=False).pooled
