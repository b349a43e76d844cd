"""Base classes of samplers for one kind and for a whole batch, and the random sampler."""

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

It is called with ``cfg`` and the node that names it, and translates them in ``from_config``. If its
constructor takes ``cfg`` as a positional argument, it is called with ``cfg`` alone.
"""

POSITIVE, NEGATIVE = "positive", "negative"


class ProposalSampler:
    """
    Base class of samplers that choose among the positives or the negatives of one image.

    Attributes:
        kinds: the kinds that it can choose, "positive" or "negative" or both.
        needs_predictions: names of the :class:`Predictions` that ``candidates.predictions`` must
            have, or True for all of them. They cost one pass of the box head over all proposals per
            step, which all samplers share.
        settings: the name of the node with its settings, next to the NAME of the sampler. Each key
            is an argument of the constructor in capitals. Empty for a sampler without settings.
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
        Translate the settings in a config into arguments of the constructor.

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
        Choose candidates.

        Args:
            candidates: N candidates; N may be 0.
            num: the number to choose.

        Returns:
            int64, min(N, num) different indices in [0, N), in any order.
        """
        raise NotImplementedError

    def ranks(
        self, candidates: Candidates, chosen: Tensor, num: int
    ) -> tuple[Tensor, Tensor] | None:
        """
        Return the ranks by which the sampler chose negatives, which ISR-N then weights them by.

        Args:
            candidates, num: the arguments of the call.
            chosen: the result of the call.

        Returns:
            int64, the rank of each chosen negative, and the number () that ranks are divided by.
            None if the sampler does not rank: ISR-N then ranks the chosen among themselves.
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
        Choose the samples of a batch.

        Args:
            batch: all proposals of each image; ignored ones have class -1.
            quota: the number of samples to choose.

        Returns:
            The choice for each image.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        return type(self).__name__


@PROPOSAL_SAMPLER_REGISTRY.register()
class RandomSampler(ProposalSampler):
    """Choose any candidate with equal probability, with the same draws as stock Detectron2."""

    def __call__(self, candidates: Candidates, num: int) -> Tensor:
        return torch.randperm(len(candidates), device=candidates.device)[:num]
