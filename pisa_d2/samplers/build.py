"""Building samplers from a config."""

import inspect
from typing import Any

from detectron2.config import CfgNode

from ..config import look_up
from ..settings import SettingError, check_flag, naming_keys
from .pair import PairSampler
from .predicted import HardSampler, OHEMSampler
from .sampler import NEGATIVE, POSITIVE, PROPOSAL_SAMPLER_REGISTRY, BatchSampler, ProposalSampler

_ANY_KIND = ProposalSampler.kinds


def _takes_cfg(cls: type) -> bool:
    """Return whether the constructor takes a config: arguments of others are keyword-only."""
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in by_position for p in inspect.signature(cls).parameters.values())


def build_proposal_sampler(
    cfg: CfgNode, kind: str, node: str = "MODEL.ROI_HEADS"
) -> ProposalSampler:
    """
    Build the sampler that a config names for one kind.

    Args:
        kind: "POSITIVE_SAMPLER" or "NEGATIVE_SAMPLER".
        node: the node of ``cfg`` that contains it.

    Raises:
        ValueError: its NAME is not registered, or belongs to a sampler of the other kind; or a
            setting of the sampler is out of range.
    """
    key = f"{node}.{kind}"
    settings = _find(cfg, key)
    cls = look_up(PROPOSAL_SAMPLER_REGISTRY, f"{key}.NAME", settings.NAME)
    of_kind = POSITIVE if kind == "POSITIVE_SAMPLER" else NEGATIVE
    if of_kind not in _kinds(cls):
        raise SettingError(
            f"{key}.NAME",
            settings.NAME,
            f"it does not choose {of_kind}s alone; choose one of {_samplers_of(of_kind)}",
        )
    with naming_keys(f"{key}.{cls.settings}" if cls.settings else key):
        return cls(cfg) if _takes_cfg(cls) else cls(cfg, settings)


def build_batch_sampler(cfg: CfgNode) -> BatchSampler:
    """
    Build the sampler of ROI heads that ``MODEL.ROI_HEADS.POSITIVE_SAMPLER`` and
    ``NEGATIVE_SAMPLER`` name: a pair of samplers, or a :class:`BatchSampler` that both name.

    Raises:
        ValueError: see :func:`build_proposal_sampler`; or only one node names a BatchSampler.
    """
    heads = cfg.MODEL.ROI_HEADS
    joint = heads.HARD_SAMPLER.JOINT
    check_flag("MODEL.ROI_HEADS.HARD_SAMPLER.JOINT", joint)
    names = [heads.POSITIVE_SAMPLER.NAME, heads.NEGATIVE_SAMPLER.NAME]
    if joint and any(name != HardSampler.__name__ for name in names):
        raise SettingError(
            "MODEL.ROI_HEADS.HARD_SAMPLER.JOINT",
            joint,
            "POSITIVE_SAMPLER.NAME and NEGATIVE_SAMPLER.NAME must both be 'HardSampler', not "
            f"{names}",
        )
    cls: Any = OHEMSampler if joint else None
    if names[0] == names[1] and not joint:
        key = "MODEL.ROI_HEADS.POSITIVE_SAMPLER.NAME"
        named = look_up(PROPOSAL_SAMPLER_REGISTRY, key, heads.POSITIVE_SAMPLER.NAME)
        cls = named if issubclass(named, BatchSampler) else None
    if cls is not None:
        with naming_keys("MODEL.ROI_HEADS.HARD_SAMPLER"):
            return cls(cfg)
    return PairSampler(
        positive=build_proposal_sampler(cfg, "POSITIVE_SAMPLER"),
        negative=build_proposal_sampler(cfg, "NEGATIVE_SAMPLER"),
    )


def _find(cfg: CfgNode, path: str) -> CfgNode:
    for key in path.split("."):
        cfg = cfg[key]
    return cfg


def _kinds(cls: type) -> frozenset[str]:
    return frozenset() if issubclass(cls, BatchSampler) else getattr(cls, "kinds", _ANY_KIND)


def _samplers_of(kind: str) -> list[str]:
    return sorted(name for name, cls in PROPOSAL_SAMPLER_REGISTRY if kind in _kinds(cls))
