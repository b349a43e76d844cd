"""The box head's predictions for all candidates, before any is chosen."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import torch
from detectron2.layers import cat
from detectron2.modeling import ROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..samplers import Candidates, Predictions
from ..samplers.candidates import Joined

T = TypeVar("T")

# Boxes go through the head in parts whose pooled features take at most this much memory: 10,000
# boxes at a time with 256 x 7 x 7 float32 features (FPN), 600 with 1024 x 14 x 14 (C4).
MAX_BYTES_AT_A_TIME = 2**29
# On a CPU, logits are summarised in parts of this many numbers, which fit its cache: with 1,203
# classes that takes half the time.
MAX_CACHED_LOGITS = 2**21
# Up to this size the pooled features of all boxes are kept; above it, the chosen boxes are pooled
# again.
MAX_BYTES_KEPT = 2**30
# The output size of poolers without an attribute that has it.
_USUAL_SIZE = (7, 7)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch off dropout and updates of batch statistics; restore the mode of each part after."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class BoxBranch(NamedTuple):
    """
    The modules from feature maps to the predictions for a box.

    Attributes:
        in_features: names of the feature maps.
        pooler: their ROIPooler.
        head: the module after the pooler.
        flatten: applied to the output of the head, None to leave it as it is.
        predictor: the box predictor, which returns logits (R, K + 1) and deltas (R, 4 or K * 4).
    """

    in_features: list[str]
    pooler: Any
    head: nn.Module
    flatten: Callable[[Tensor], Tensor] | None
    predictor: Any


def branch_of(heads: ROIHeads) -> BoxBranch:
    """
    Return the box branch of heads that extend Detectron2's; of a cascade, the first stage's.

    Args:
        heads: :class:`StandardROIHeads`, :class:`Res5ROIHeads` or :class:`CascadeROIHeads`.
    """
    if isinstance(heads, Res5ROIHeads):
        return BoxBranch(
            heads.in_features,
            heads.pooler,
            heads.res5,
            lambda x: x.mean(dim=[2, 3]),
            heads.box_predictor,
        )
    standard = cast(StandardROIHeads, heads)
    head, predictor = standard.box_head, standard.box_predictor
    if isinstance(heads, CascadeROIHeads):
        head, predictor = head[0], predictor[0]
    return BoxBranch(standard.box_in_features, standard.box_pooler, head, None, predictor)


def predict_candidates(
    branch: BoxBranch,
    features: dict[str, Tensor],
    batch: list[Candidates],
    targets: list[Instances],
    needs: Sequence[str],
    observe: Callable[[tuple[Tensor, Tensor]], object] | None = None,
) -> tuple[list[Candidates], Tensor | None]:
    """
    Predict for all candidates, without gradient.

    Args, Returns: see :meth:`PISAMixin.predict`.
    """
    joined = Joined(batch)
    gt_boxes = joined.boxes
    if not {"box_losses", "ious"}.isdisjoint(needs):
        gt_boxes = cat(
            [
                target.gt_boxes.tensor[candidates.objects] if len(target) else candidates.boxes
                for candidates, target in zip(batch, targets, strict=True)
            ]
        )

    def summarise(outputs: tuple[Tensor, Tensor], rows: slice) -> Predictions:
        if observe is not None:
            observe(outputs)
        return branch.predictor.predict_candidates(
            outputs, joined.boxes[rows], gt_boxes[rows], joined.classes[rows], needs
        )

    parts, pooled = predict_all(
        branch,
        [features[name] for name in branch.in_features],
        [Boxes(candidates.boxes) for candidates in batch],
        summarise,
    )
    of_images = split_predictions(parts, [len(candidates) for candidates in batch])
    with_predictions = [
        candidates.with_predictions(predictions)
        for candidates, predictions in zip(batch, of_images, strict=True)
    ]
    return with_predictions, pooled


@torch.no_grad()
def predict_all(
    branch: BoxBranch,
    features: list[Tensor],
    boxes: list[Boxes],
    summarise: Callable[[tuple[Tensor, Tensor], slice], T],
) -> tuple[list[T], Tensor | None]:
    """
    Take boxes through the box head in parts. Logits and deltas of many boxes and classes are large,
    so only a summary of each part is kept.

    Args:
        branch: the modules of the box head.
        features: the feature maps of B images.
        boxes: the boxes of each image, R in all.
        summarise: called with the logits and deltas of each part (on a CPU, of smaller parts of
            it), and with the place of these rows among all boxes, image after image.

    Returns:
        The result of ``summarise`` for each part, and the pooled features of all boxes, or None if
        these take more than ``MAX_BYTES_KEPT``.
    """
    height, width = getattr(branch.pooler, "output_size", _USUAL_SIZE)
    bytes_each = features[0].shape[1] * width * height * features[0].element_size()
    total = sum(len(b) for b in boxes)
    size = max(1, MAX_BYTES_AT_A_TIME // bytes_each)
    keep = total * bytes_each <= MAX_BYTES_KEPT
    summaries, kept = [], []
    with evaluating(branch.head), evaluating(branch.predictor):
        for start in range(0, max(total, 1), size):
            pooled = branch.pooler(features, _part(boxes, start, start + size))
            x = branch.head(pooled)
            outputs = branch.predictor(x if branch.flatten is None else branch.flatten(x))
            for rows in _rows_at_a_time(outputs[0]):
                of_rows = outputs[0][rows], outputs[1][rows]
                summaries.append(summarise(of_rows, slice(start + rows.start, start + rows.stop)))
            if keep:
                kept.append(pooled)
    # Autocast remembers the weights that were cast here, without their graph.
    torch.clear_autocast_cache()
    return summaries, _join(kept) if keep else None


def split_predictions(parts: list[Predictions], sizes: list[int]) -> list[Predictions]:
    """
    Join the predictions for parts of all candidates, and split them by image.

    Args:
        parts: the predictions of each part.
        sizes: the number of candidates in each image.
    """
    fields = {
        name: _join([getattr(part, name) for part in parts]).split(sizes) for name in vars(parts[0])
    }
    return [
        Predictions(**{name: values[image] for name, values in fields.items()})
        for image in range(len(sizes))
    ]


def _rows_at_a_time(logits: Tensor) -> list[slice]:
    """Return the rows to summarise at a time: all on a GPU, parts that fit the cache on a CPU."""
    num_rows, num_classes = logits.shape
    step = max(1, num_rows if logits.is_cuda else MAX_CACHED_LOGITS // num_classes)
    return [slice(i, min(i + step, num_rows)) for i in range(0, max(num_rows, 1), step)]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _part(boxes: list[Boxes], start: int, end: int) -> list[Boxes]:
    """Select boxes ``start`` to ``end`` of all images together; return them by image."""
    parts = []
    for boxes_per_image in boxes:
        parts.append(boxes_per_image[max(start, 0) : max(end, 0)])
        start, end = start - len(boxes_per_image), end - len(boxes_per_image)
    return parts
