"""Samplers of one kind, and those of a whole batch."""

from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from fvcore.common.registry import Registry
from torch import Tensor

from .candidates import Candidates, Choice, Quota

PROPOSAL_SAMPLER_REGISTRY = Registry("PROPOSAL_SAMPLER")
PROPOSAL_SAMPLER_REGISTRY.__doc__ = """
Samplers choose the proposals that are trained on. The NAME in a node such as
``MODEL.ROI_HEADS.POSITIVE_SAMPLER`` or ``NEGATIVE_SAMPLER`` picks one.

A registered class is one of

* a :class:`ProposalSampler`, for the positives or the negatives of each image;
* a :class:`BatchSampler`, for both kinds of all images together: both nodes name it.

It is called with ``cfg`` and the node that names it, and translates them in ``from_config``; or
with ``cfg`` alone, if its constructor takes that as a positional argument.
"""

POSITIVE, NEGATIVE = "positive", "negative"


class ProposalSampler:
    """
    Base class of samplers that choose among the positives, or the negatives, of one image.

    Attributes:
        kinds: the kinds that it serves, "positive" or "negative" or both.
        needs_predictions: names of the :class:`Predictions` that ``candidates.predictions`` must
            have, or True for all of them. They cost one pass of the box head over all proposals per
            step, which all samplers share.
        settings: the node, in the one that names the sampler, that has its settings: each key is
            an argument of the constructor in capitals. Empty if it has none.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({POSITIVE, NEGATIVE})
    needs_predictions: ClassVar[bool | tuple[str, ...]] = False
    settings: ClassVar[str] = ""

    @configurable
    def __init__(self) -> None:
        pass

    @classmethod
    def from_config(cls, cfg: CfgNode, node: CfgNode | None = None) -> dict[str, Any]:
        """
        Args:
            cfg: the whole config.
            node: the node that names the sampler; ``MODEL.ROI_HEADS.NEGATIVE_SAMPLER`` by default.
        """
        if not cls.settings:
            return {}
        node = cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER if node is None else node
        return {key.lower(): value for key, value in node[cls.settings].items()}

    def __call__(self, candidates: Candidates, num: int) -> Tensor:
        """
        Args:
            candidates: N of them, any number.
            num: how many to choose.

        Returns:
            int64, min(N, num) different indices in [0, N), in any sequence.
        """
        raise NotImplementedError

    def ranks(
        self, candidates: Candidates, chosen: Tensor, num: int
    ) -> tuple[Tensor, Tensor] | None:
        """
        The ranks by which the sampler chose negatives, for ISR-N to weigh them by.

        Args:
            candidates, num: as in the call.
            chosen: what it returned.

        Returns:
            int64, the rank of each of the chosen, and the number () that ranks are divided by.
            None if there are none: ISR-N then ranks the chosen among themselves.
        """
        return None


class BatchSampler:
    """
    Base class of samplers that choose for the whole batch.

    Attributes:
        needs_predictions: as in :class:`ProposalSampler`.
    """

    needs_predictions: bool | tuple[str, ...] = False

    def __call__(self, batch: list[Candidates], quota: Quota) -> list[Choice]:
        """
        Args:
            batch: all proposals of each image, of class -1 where they are ignored.
            quota: how many to choose.

        Returns:
            The choice of each image.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        return type(self).__name__


@PROPOSAL_SAMPLER_REGISTRY.register()
class RandomSampler(ProposalSampler):
    """Each candidate is as likely as any other: stock Detectron2's sampling, draw for draw."""

    def __call__(self, candidates: Candidates, num: int) -> Tensor:
        return torch.randperm(len(candidates), device=candidates.device)[:num]
