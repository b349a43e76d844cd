"""
Controls: strategies that tell attention from its side effects, or try another definition of it.

Each keeps all of Prime Sample Attention but one thing. ``HEAD_STUDY.CONTROL`` names it, and
``MODEL.ROI_HEADS.NAME`` the heads of this module, or ``MODEL.META_ARCHITECTURE`` its RetinaNet.

Shape shorthand in this module:

    P: number of positives of a batch
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from torch import Tensor

from pisa_d2 import add_pisa_config
from pisa_d2.attention import Positives, Samples
from pisa_d2.meta_arch import PISARetinaNet
from pisa_d2.roi_heads import PISAFastRCNNOutputLayers, PISARes5ROIHeads, PISAROIHeads
from pisa_d2.settings import CARL, ISR


def add_head_study_config(cfg: CfgNode) -> None:
    """Add the keys of pisa_d2 and of ``HEAD_STUDY`` to ``cfg`` in place."""
    add_pisa_config(cfg)
    cfg.HEAD_STUDY = CfgNode()
    # A name in CONTROLS, with ControlROIHeads or ControlRes5ROIHeads; empty for none.
    cfg.HEAD_STUDY.CONTROL = ""
    # Share of the labels of each training image that is hidden, and whether each leaves
    # "background" or a region to ignore ("regions"): see hidden.py. For studies alone.
    cfg.HEAD_STUDY.HIDDEN_LABELS = 0.0
    cfg.HEAD_STUDY.HIDDEN_AS = "background"


def permuted(values: Tensor, classes: Tensor) -> Tensor:
    """``values`` (P, ...) in random order among the positives of each class (P,)."""
    order = torch.rand(len(values), device=values.device).argsort()
    of_classes = order[classes[order].argsort(stable=True)]
    result = torch.empty_like(values)
    result[classes.argsort(stable=True)] = values[of_classes]
    return result


# Ranks follow from the regressed boxes and their objects. The losses stay in place, since ISR-P
# keeps the total of the losses that it weights.
RANKED_BY = ("boxes", "gt_boxes", "objects", "deltas")


def permuted_ranks(samples: Samples, positives: Positives) -> tuple[Samples, Positives]:
    """For ISR-P in which every positive has the rank of another one of its class, at random."""
    rows = samples.positives
    order = permuted(rows, positives.classes)
    ranked_as = {
        name: (values := getattr(samples, name)).index_copy(0, rows, values[order])
        for name in RANKED_BY
    }
    return replace(samples, **ranked_as), positives


def permuted_ranks_of_anchors(positives: Positives) -> Positives:
    """As :func:`permuted_ranks`, for the ISR-P of anchors."""
    classes = positives.classes
    order = permuted(torch.arange(len(classes), device=classes.device), classes)
    return replace(positives, **{name: getattr(positives, name)[order] for name in RANKED_BY})


def truth_not_ranked(samples: Samples, positives: Positives) -> tuple[Samples, Positives]:
    """
    For ISR-P of the proposals alone. The boxes of the objects, which Detectron2 adds to them, keep
    weight 1.
    """
    ranked = ~is_truth(positives)
    rows = samples.positives
    of_ranked = replace(
        samples,
        positives=rows[ranked],
        classes=samples.classes.index_fill(0, rows[~ranked], -1),
    )
    return of_ranked, Positives(**{name: value[ranked] for name, value in vars(positives).items()})


def ranks_of_proposals(samples: Samples, positives: Positives) -> tuple[Samples, Positives]:
    """For ISR-P that ranks positives by the IoU of the proposals, and not of regressed boxes."""
    deltas = samples.deltas.index_fill(0, samples.positives, 0.0)
    return replace(samples, deltas=deltas), positives


def is_truth(positives: Positives) -> Tensor:
    """Bool (P,), whether a positive is the box of its object itself, and no proposal."""
    return (positives.boxes == positives.gt_boxes).all(dim=1)


def permuted_probabilities(positives: Positives) -> Positives:
    """For CARL in which every positive has the probability of another of its class, at random."""
    return replace(positives, probs=permuted(positives.probs, positives.classes))


def constant_probabilities(positives: Positives) -> Positives:
    """For CARL whose weights depend on the probabilities, but send no gradient to them."""
    return replace(positives, probs=positives.probs.detach())


# By control, the function that changes the arguments of ISR or CARL.
OF_ISR: dict[str, Callable[[Samples, Positives], tuple[Samples, Positives]]] = {
    "permuted_ranks": permuted_ranks,
    "truth_not_ranked": truth_not_ranked,
    "ranks_of_proposals": ranks_of_proposals,
}
# The positives of RetinaNet are anchors, and none is the box of an object.
OF_ISR_OF_ANCHORS: dict[str, Callable[[Positives], Positives]] = {
    "permuted_ranks": permuted_ranks_of_anchors
}
OF_CARL: dict[str, Callable[[Positives], Positives]] = {
    "permuted_probabilities": permuted_probabilities,
    "constant_probabilities": constant_probabilities,
}
CONTROLS = (*OF_ISR, *OF_CARL)
CONTROLS_OF_RETINANET = (*OF_ISR_OF_ANCHORS, *OF_CARL)


def check_control(name: str, known: Collection[str]) -> None:
    """
    Raises:
        ValueError: the control is unknown.
    """
    if name not in known:
        raise ValueError(
            f"HEAD_STUDY.CONTROL = {name!r} is not known: choose one of {list(known)}."
        )


class ControlPredictor(PISAFastRCNNOutputLayers):
    """
    The box predictor with the losses of a control.

    Attributes:
        control: a name in :data:`CONTROLS`.
    """

    control: str

    @torch.no_grad()
    def isr_weights(self, samples: Samples, positives: Positives) -> Tensor:
        """As in :class:`PISAFastRCNNOutputLayers`."""
        if self.control in OF_ISR:
            samples, positives = OF_ISR[self.control](samples, positives)
        return super().isr_weights(samples, positives)

    def carl_loss(self, carl: CARL, positives: Positives) -> Tensor:
        """As in :class:`PISAFastRCNNOutputLayers`."""
        if self.control in OF_CARL:
            positives = OF_CARL[self.control](positives)
        return super().carl_loss(carl, positives)


def controlled(predictor: PISAFastRCNNOutputLayers, cfg: CfgNode) -> None:
    """
    Give a predictor the losses of the control that ``cfg`` names, in place.

    Raises:
        ValueError: the control is unknown.
    """
    name = cfg.HEAD_STUDY.CONTROL
    check_control(name, CONTROLS)
    predictor.__class__ = ControlPredictor
    predictor.control = name


@ROI_HEADS_REGISTRY.register()
class ControlROIHeads(PISAROIHeads):
    """:class:`PISAROIHeads` with a control."""

    def __init__(self, cfg: CfgNode, *args: Any, **kwargs: Any) -> None:
        super().__init__(cfg, *args, **kwargs)
        controlled(self.box_predictor, cfg)


@ROI_HEADS_REGISTRY.register()
class ControlRes5ROIHeads(PISARes5ROIHeads):
    """:class:`PISARes5ROIHeads` with a control."""

    def __init__(self, cfg: CfgNode, *args: Any, **kwargs: Any) -> None:
        super().__init__(cfg, *args, **kwargs)
        controlled(self.box_predictor, cfg)


@META_ARCH_REGISTRY.register()
class ControlRetinaNet(PISARetinaNet):
    """:class:`PISARetinaNet` with a control."""

    @configurable
    def __init__(self, *, control: str, **kwargs: Any) -> None:
        """
        Args:
            control: a name in :data:`CONTROLS_OF_RETINANET`.
            kwargs: arguments of :class:`PISARetinaNet`.

        Raises:
            ValueError: the control is unknown.
        """
        super().__init__(**kwargs)
        check_control(control, CONTROLS_OF_RETINANET)
        self.control = control

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {**super().from_config(cfg), "control": cfg.HEAD_STUDY.CONTROL}

    def isr_p_weights(self, isr_p: ISR, positives: Positives) -> Tensor:
        """As in :class:`PISARetinaNet`."""
        if self.control in OF_ISR_OF_ANCHORS:
            positives = OF_ISR_OF_ANCHORS[self.control](positives)
        return super().isr_p_weights(isr_p, positives)

    def carl_loss(self, carl: CARL, positives: Positives) -> Tensor:
        """As in :class:`PISARetinaNet`."""
        if self.control in OF_CARL:
            positives = OF_CARL[self.control](positives)
        return super().carl_loss(carl, positives)
