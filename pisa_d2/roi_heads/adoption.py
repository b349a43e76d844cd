"""Turning stock box predictors into PISA's in place, with their parameters and settings."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from torch import nn

from ..config import check_stages, ignored_ioa_thresh
from ..samplers import (
    BatchSampler,
    PairSampler,
    ProposalSampler,
    RandomSampler,
    build_batch_sampler,
)
from ..settings import CARL, ISR, BalancedL1, NegativeISR, check_ioa_thresh, naming_keys
from .fast_rcnn import PISAFastRCNNOutputLayers, predictor_settings

# Methods of a predictor that PISA's losses replace or do not call.
_LOSS_METHODS = ("losses", "box_reg_loss", "predict_probs")


def _random_pair() -> BatchSampler:
    return PairSampler(positive=RandomSampler(), negative=RandomSampler())


@dataclass(frozen=True)
class PISASettings:
    """
    Defaults of ROI heads: their sampler, and the parts for their stock predictors, see
    :class:`PISAFastRCNNOutputLayers`.

    Attributes:
        cascade_stages: stages of a cascade, counted from 0, with the parts of PISA; empty for all.
        sampler: chooses the samples of the batch.
        ignored_ioa_thresh: negatives with at least this share of their area inside a region to
            ignore are ignored; None to ignore no regions.

    Raises:
        SettingError: ``ignored_ioa_thresh`` is not in (0, 1].
    """

    isr_p: ISR | None = ISR()
    isr_n: NegativeISR | None = NegativeISR()
    carl: CARL | None = CARL()
    focal_gamma: float | None = None
    balanced_l1: BalancedL1 | None = None
    cascade_stages: tuple[int, ...] = ()
    sampler: BatchSampler = field(default_factory=_random_pair)
    ignored_ioa_thresh: float | None = None

    def __post_init__(self) -> None:
        if self.ignored_ioa_thresh is not None:
            check_ioa_thresh("ignored_ioa_thresh", self.ignored_ioa_thresh)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "PISASettings":
        """Read the settings from ``cfg``."""
        return cls(
            **predictor_settings(cfg),
            cascade_stages=tuple(cfg.MODEL.PISA.CASCADE_STAGES),
            sampler=build_batch_sampler(cfg),
            ignored_ioa_thresh=ignored_ioa_thresh(cfg),
        )

    def has_parts(self) -> bool:
        """Return whether any part of PISA is on."""
        return any(part is not None for part in (self.isr_p, self.isr_n, self.carl))

    def check_stages(self, num_stages: int) -> None:
        """
        Check ``cascade_stages``.

        Raises:
            ValueError: ``cascade_stages`` names a stage that the cascade does not have.
        """
        with naming_keys("MODEL.PISA"):
            check_stages("cascade_stages", list(self.cascade_stages), num_stages)

    def of_stage(self, stage: int) -> dict[str, Any]:
        """Make the arguments of :meth:`PISAFastRCNNOutputLayers.set_losses` for a stage."""
        on = not self.cascade_stages or stage in self.cascade_stages
        return {
            "isr_p": self.isr_p if on else None,
            "isr_n": self.isr_n if on else None,
            "carl": self.carl if on else None,
            "focal_gamma": self.focal_gamma,
            "balanced_l1": self.balanced_l1,
        }


def pick_sampler(
    sampler: BatchSampler | None,
    positive: ProposalSampler | None,
    negative: ProposalSampler | None,
    default: BatchSampler,
) -> BatchSampler:
    """
    Return the given sampler, or a pair of the given ones. A missing one of the pair comes from
    ``default``.

    Raises:
        ValueError: ``sampler`` is given together with a sampler for one kind.
    """
    if positive is None and negative is None:
        return sampler or default
    if sampler is not None:
        raise ValueError("Give either sampler, or positive_sampler and negative_sampler.")
    pair: Any = default if isinstance(default, PairSampler) else _random_pair()
    return PairSampler(positive=positive or pair.positive, negative=negative or pair.negative)


def adopt(predictor: nn.Module, settings: dict[str, Any], given: Sequence[str] = ()) -> str:
    """
    Give PISA's losses to a stock predictor, or to one derived from it, in place: it stays the same
    module, with its parameters, its other settings and the overrides of its class. A predictor of
    PISA keeps its losses.

    Args:
        settings: see :meth:`PISASettings.of_stage`.
        given: names of the settings that were given explicitly.

    Returns:
        The reason why PISA has no part, or not its whole part, in the losses; empty if it has.

    Raises:
        ValueError: settings are given, but the predictor has its own.
    """
    name = type(predictor).__name__
    if isinstance(predictor, PISAFastRCNNOutputLayers):
        if given and not predictor.adopted:
            raise ValueError(
                f"{', '.join(given)} given to ROI heads, but their box predictor {name} has its "
                "own settings: give them to the predictor instead."
            )
        return ""
    if not isinstance(predictor, FastRCNNOutputLayers):
        return "its losses do not use PISA"
    adopted: Any = predictor
    adopted.__class__ = _with_pisa(predictor.__class__)
    adopted.set_losses(**settings)
    adopted.adopted = True
    overridden = overridden_losses(predictor)
    return f"PISA may have no part in its own {', '.join(overridden)}" if overridden else ""


def overridden_losses(predictor: nn.Module) -> list[str]:
    """List the methods by which the class of an adopted predictor changes PISA's losses."""
    return [
        method
        for method in _LOSS_METHODS
        if getattr(type(predictor), method) is not getattr(PISAFastRCNNOutputLayers, method)
    ]


@functools.cache
def _with_pisa(base: type) -> type:
    """
    Derive a class from ``base`` with PISA's losses instead of the stock predictor's: overrides in
    ``base`` come first, and their ``super()`` leads to PISA's.
    """
    if base is FastRCNNOutputLayers:
        return PISAFastRCNNOutputLayers

    def reduce(self: nn.Module, protocol: Any) -> tuple:
        # Unpickling could not find by name a class that is made here.
        parts: Any = nn.Module.__reduce_ex__(self, protocol)
        return _new_adopted, (base,), *parts[2:]

    return type(
        f"PISA{base.__name__}",
        (base, PISAFastRCNNOutputLayers),
        {"__reduce_ex__": reduce, "__module__": base.__module__, "__doc__": base.__doc__},
    )


def _new_adopted(base: type) -> Any:
    cls: Any = _with_pisa(base)
    return cls.__new__(cls)


def predictors_of(box_predictor: nn.Module) -> Sequence[nn.Module]:
    """List the predictors of the stages of a cascade, or the only one of other heads."""
    return list(box_predictor) if isinstance(box_predictor, nn.ModuleList) else [box_predictor]
