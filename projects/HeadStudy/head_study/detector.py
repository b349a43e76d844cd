"""A detector whose box head is studied: what stays frozen, and the head that is trained alone."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN, ROIHeads, build_model, build_roi_heads
from detectron2.utils.file_io import PathManager
from torch import Tensor

from pisa_d2.engine import Checkpointer
from pisa_d2.engine.seeding import seeded

logger = logging.getLogger(__name__)

# The heads of this package that train the box branch of these alone. Of a cascade, that is its
# first stage.
_HEADS = {
    "StandardROIHeads": "PISAROIHeads",
    "CascadeROIHeads": "PISAROIHeads",
    "PISACascadeROIHeads": "PISAROIHeads",
    "Res5ROIHeads": "PISARes5ROIHeads",
}
_CASCADES = ("CascadeROIHeads", "PISACascadeROIHeads")

Options = Mapping[str, Any]


def load_detector(cfg: CfgNode) -> GeneralizedRCNN:
    """
    The detector with the weights ``MODEL.WEIGHTS``, frozen and ready for inference.

    Raises:
        ValueError: it is no two-stage detector with an RPN, or not all of its weights are there.
    """
    if not cfg.MODEL.WEIGHTS:
        raise ValueError(
            "MODEL.WEIGHTS is empty: a study needs a trained detector. Train one with train_net.py "
            "and name its model_final.pth."
        )
    model = build_model(cfg)
    if not isinstance(model, GeneralizedRCNN) or model.proposal_generator is None:
        raise ValueError(
            f"MODEL.META_ARCHITECTURE = {cfg.MODEL.META_ARCHITECTURE!r} with "
            f"MODEL.PROPOSAL_GENERATOR.NAME = {cfg.MODEL.PROPOSAL_GENERATOR.NAME!r} cannot be "
            "studied: the detector must be a GeneralizedRCNN with proposals of its own."
        )
    Checkpointer(model).resume_or_load(cfg.MODEL.WEIGHTS, resume=False, whole=True)
    return model.eval().requires_grad_(False)


def digest_of_weights(cfg: CfgNode) -> str:
    """A digest of the content of the file, which may be written again under the same name."""
    path = Path(PathManager.get_local_path(cfg.MODEL.WEIGHTS))
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()[:16]


def head_config(cfg: CfgNode, num_steps: int) -> CfgNode:
    """
    The config of the studied box head before a strategy changes it: the detector's, with random
    samplers, without Prime Sample Attention, and with the learning rate schedule squeezed into
    ``num_steps``.

    Heads that are not Detectron2's or of this package are kept as they are.
    """
    cfg = cfg.clone()
    cfg.defrost()
    model, solver = cfg.MODEL, cfg.SOLVER
    model.MASK_ON = model.KEYPOINT_ON = False
    if model.ROI_HEADS.NAME in _CASCADES:
        model.ROI_HEADS.IOU_THRESHOLDS = [model.ROI_BOX_CASCADE_HEAD.IOUS[0]]
        model.ROI_HEADS.IOU_LABELS = [0, 1]
        model.ROI_BOX_HEAD.BBOX_REG_WEIGHTS = model.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS[0]
    model.ROI_HEADS.NAME = _HEADS.get(model.ROI_HEADS.NAME, model.ROI_HEADS.NAME)
    for part in ("ISR_P", "ISR_N", "CARL"):
        model.PISA[part].ENABLED = False
    for kind in ("POSITIVE_SAMPLER", "NEGATIVE_SAMPLER"):
        model.ROI_HEADS[kind].NAME = "RandomSampler"
    solver.STEPS = tuple(int(step * num_steps / solver.MAX_ITER) for step in solver.STEPS)
    solver.WARMUP_ITERS = min(solver.WARMUP_ITERS, num_steps // 10)
    solver.MAX_ITER = num_steps
    return cfg


def with_options(cfg: CfgNode, options: Options) -> CfgNode:
    """A frozen copy of ``cfg`` with the keys of a strategy."""
    cfg = cfg.clone()
    cfg.merge_from_list([word for pair in options.items() for word in pair])
    cfg.freeze()
    return cfg


def is_cascade(heads: ROIHeads) -> bool:
    return isinstance(getattr(heads, "box_head", None), torch.nn.ModuleList)


def head_weights(detector: ROIHeads) -> dict[str, Tensor]:
    """The detector's weights, by their names in the studied head."""
    state = detector.state_dict()
    if is_cascade(detector):
        for part in ("box_head", "box_predictor"):
            first = f"{part}.0."
            state = {
                name.replace(first, f"{part}.", 1) if name.startswith(first) else name: value
                for name, value in state.items()
            }
    return state


def with_head(detector: Mapping[str, Tensor], head: ROIHeads) -> dict[str, Tensor]:
    """The weights of a detector with a trained box head for its own heads."""
    frozen = {name: value for name, value in detector.items() if not name.startswith("roi_heads.")}
    return {**frozen, **{f"roi_heads.{name}": value for name, value in head.state_dict().items()}}


def build_head(
    base: CfgNode,
    cfg: CfgNode,
    shape: dict[str, ShapeSpec],
    weights: Mapping[str, Tensor],
    seed: int,
    from_detector: bool,
) -> ROIHeads:
    """
    The box head of a strategy. A seed gives every strategy the same initial weights, as far as
    the plain head has the same parameters.

    Args:
        base: the config of the plain head.
        cfg: the config of the strategy.
        shape: of the feature maps.
        weights: the detector's, see :func:`head_weights`.
        seed: of new weights.
        from_detector: start from the detector's weights. Otherwise all weights are new, except for
            the res5 stage of a C4 model, which its pretraining has made.
    """
    device = torch.device(cfg.MODEL.DEVICE)
    with seeded(seed, 0):
        initial = build_roi_heads(base, shape).state_dict()
    for name, value in weights.items():
        if name in initial and (from_detector or name.startswith("res5.")):
            initial[name] = value
    with seeded(seed, 0):
        head = build_roi_heads(cfg, shape)
    own = head.state_dict()
    shared = {
        name: value
        for name, value in initial.items()
        if name in own and own[name].shape == value.shape
    }
    head.load_state_dict(shared, strict=False)
    if missing := sorted(own.keys() - shared.keys()):
        logger.warning("New in this strategy, with weights of its own: %s.", ", ".join(missing))
    return head.to(device)
