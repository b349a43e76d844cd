"""One line for the log on the active parts of ROI heads."""

from detectron2.modeling import ROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads
from torch import nn

from .adoption import overridden_losses, predictors_of
from .fast_rcnn import PISAFastRCNNOutputLayers

_STOCK = (StandardROIHeads, Res5ROIHeads, CascadeROIHeads, ROIHeads)
_REPLACED = ("label_and_sample_proposals", "_match_and_label_boxes")


def describe(heads: ROIHeads, replaced_by: type) -> str:
    """
    Describe the samplers, the parts of PISA in each stage, whether regions are ignored, and the
    overrides of the extended heads that are not called.

    Args:
        heads: ROI heads with ``sampler``, ``box_predictor`` and ``ignored_ioa_thresh``.
        replaced_by: the base class whose methods are called instead of overrides in the classes
            after it.
    """
    cls = type(heads)
    stages = [_parts_of(predictor) for predictor in predictors_of(heads.box_predictor)]
    parts = stages[0]
    if len(set(stages)) > 1:
        parts = "; ".join(f"stage {i}: {of_stage}" for i, of_stage in enumerate(stages))
    replaced = [
        f"{base.__name__}.{name}"
        for base in cls.__mro__[cls.__mro__.index(replaced_by) + 1 :]
        if base not in _STOCK
        for name in _REPLACED
        if name in vars(base)
    ]
    line = f"{cls.__name__}: {heads.sampler}; {parts}."
    if heads.ignored_ioa_thresh is not None:
        line += f" Ignores regions, from {heads.ignored_ioa_thresh:g} of a negative's area."
    return line + (f" Replaces {', '.join(replaced)}." if replaced else "")


def _parts_of(predictor: nn.Module) -> str:
    if not isinstance(predictor, PISAFastRCNNOutputLayers):
        return f"no part of PISA in {type(predictor).__name__}"
    parts = {"ISR-P": predictor.isr_p, "ISR-N": predictor.isr_n, "CARL": predictor.carl}
    active = [name for name, part in parts.items() if part is not None]
    if not active:
        return "no part of PISA"
    own = overridden_losses(predictor) if predictor.adopted else []
    name = type(predictor).__name__.removeprefix("PISA")
    return ", ".join(active) + (f", where {name} uses them in its own {', '.join(own)}" * bool(own))
