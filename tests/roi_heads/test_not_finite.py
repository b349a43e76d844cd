"""NaN in the predictions reaches the trainer's check with any sampler and loss."""

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from helpers import HEADS, random_batch, sampled_by, small_cfg

SAMPLERS = {
    "random": [],
    "balanced": sampled_by("InstanceBalancedSampler", "IoUBalancedSampler"),
    "hard": sampled_by("HardSampler", "HardSampler"),
    "joint": [
        *sampled_by("HardSampler", "HardSampler"),
        *("MODEL.ROI_HEADS.HARD_SAMPLER.JOINT", True),
    ],
    "prime": sampled_by("IoUHLRSampler", "ScoreHLRSampler"),
}
NAN, INF = float("nan"), float("inf")


def reported(name):
    """Make the pattern of Detectron2's message, with losses as NumPy 1 or 2 writes them."""
    message = rf"infinite or NaN at iteration=5!\n.*'{name}': (np\.float64\()?(nan|inf)"
    return pytest.raises(FloatingPointError, match=message)


def train_broken(layer, value, *opts):
    torch.manual_seed(0)
    model = build_model(small_cfg(*opts))
    predictor = model.roi_heads.box_predictor
    if isinstance(predictor, torch.nn.ModuleList):
        predictor = predictor[0]
    batches = [random_batch([3, 0])] * 8
    trainer = SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.0))
    torch.nn.init.constant_(getattr(predictor, layer).bias, value)
    trainer.train(5, 7)


@pytest.mark.parametrize("samplers", SAMPLERS)
@pytest.mark.parametrize("heads", HEADS)
def test_nan_logits_end_training_with_the_iteration_and_the_loss(heads, samplers):
    with reported(r"loss_cls\w*"):
        train_broken("cls_score", NAN, *HEADS[heads], *SAMPLERS[samplers])


@pytest.mark.parametrize("samplers", SAMPLERS)
@pytest.mark.parametrize("loss_type", ["smooth_l1", "giou"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_deltas_that_are_not_finite_end_training_likewise(loss_type, samplers, value):
    opts = ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", loss_type, *SAMPLERS[samplers]]
    with reported("loss_box_reg"):
        train_broken("bbox_pred", value, *opts)


@pytest.mark.parametrize("samplers", SAMPLERS)
def test_infinite_logits_end_training_likewise(samplers):
    with reported("loss_cls"):
        train_broken("cls_score", INF, *SAMPLERS[samplers])
