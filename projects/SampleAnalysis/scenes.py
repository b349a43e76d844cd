"""Single images: their ranked boxes, the samples chosen in them, and their scored boxes."""

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from findings import RankedBoxes, Scene, ScoredBoxes, as_numpy
from sampling_picture import Samples
from torch import Tensor

from pisa_d2.hlr import hierarchical_local_rank, local_rank
from pisa_d2.ordering import at_least_float32
from pisa_d2.ranking import ImageLayout, groups_of_eligible
from pisa_d2.regions import TargetsWithRegions, inside_regions
from pisa_d2.roi_heads import PISAMixin
from pisa_d2.samplers import Candidates
from pisa_d2.samplers.candidates import is_positive


def samples_of(
    positives: Candidates,
    negatives: Candidates,
    candidates: Candidates,
    target: Instances,
    ioa_thresh: float | None,
) -> Samples:
    """
    Args:
        positives, negatives: the samples of an image.
        candidates: the proposals they were chosen among.
        ioa_thresh: the share of a proposal's area in a region above which it is ignored, or None.
    """
    regions = (
        target.ignored_regions.tensor
        if isinstance(target, TargetsWithRegions)
        else candidates.boxes.new_zeros(0, 4)
    )
    inside = torch.zeros_like(candidates.classes, dtype=torch.bool)
    if ioa_thresh is not None:
        inside = inside_regions(candidates.boxes, regions, ioa_thresh)
    return Samples(
        as_numpy(positives.boxes),
        as_numpy(positives.objects),
        as_numpy(positives.ious),
        as_numpy(negatives.boxes),
        as_numpy(negatives.ious),
        as_numpy(regions),
        int((inside & (candidates.classes == -1)).sum()),
    )


def unevenness(random: Samples, balanced: Samples, num_objects: int) -> tuple[int, int]:
    """
    Tell how much worse random positives are spread over the objects than instance-balanced ones.

    Returns:
        The number of objects that only the balanced ones reach, less those that only the random
        ones reach; and by how many positives the numbers of the objects differ in total.
    """
    counts = [np.bincount(s.objects, minlength=num_objects) for s in (random, balanced)]
    reached = [int((count > 0).sum()) for count in counts]
    return reached[1] - reached[0], int(np.abs(counts[0] - counts[1]).sum())


def describe_scene(
    inputs: dict,
    candidates: Candidates,
    probs: Tensor,
    num_classes: int,
    ranked_above: float,
    nms_thresh: float,
) -> Scene:
    """
    Args:
        candidates: the test-time proposals of the image.
        probs: (number of candidates, K + 1), or K columns for sigmoids.
        ranked_above, nms_thresh: of Score-HLR.
    """
    rows = is_positive(candidates.classes, num_classes).nonzero()[:, 0]
    positives = candidates.select(rows)
    own = probs[rows].gather(1, positives.classes[:, None])[:, 0]
    ious = positives.predictions.ious
    found = candidates.predictions
    negative = candidates.classes == num_classes
    ranked = negative & (found.scores > ranked_above)
    layout = ImageLayout([len(ranked)], ranked.device)
    groups = groups_of_eligible(found.boxes, found.scores, ranked, layout, nms_thresh)[ranked]
    negatives = candidates.select(ranked.nonzero()[:, 0])
    scores = negatives.predictions.scores
    hardest = found.cls_losses.masked_fill(~negative, -torch.inf).argmax()[None][: negative.sum()]
    zeros = torch.zeros_like(hardest)
    return Scene(
        inputs,
        ranked_boxes(positives, ious, own, positives.objects, positives.classes),
        ranked_boxes(negatives, scores, scores, groups, torch.zeros_like(groups)),
        ranked_boxes(
            candidates.select(hardest), found.scores[hardest], found.scores[hardest], zeros, zeros
        ),
    )


def ranked_boxes(
    chosen: Candidates, values: Tensor, scores: Tensor, groups: Tensor, partitions: Tensor
) -> RankedBoxes:
    """Rank boxes by ``values`` in the two steps of the hierarchical local rank."""
    found = chosen.predictions
    columns = (
        *(found.boxes, groups, partitions, found.ious, scores, found.cls_losses),
        local_rank(values, groups),
        hierarchical_local_rank(values, groups, partitions),
    )
    return RankedBoxes(*(as_numpy(column) for column in columns))


def scored_boxes(
    heads: PISAMixin,
    inputs: dict,
    candidates: Candidates,
    outputs: tuple[Tensor, Tensor],
    probs: Tensor,
    proposals: list[Instances],
) -> ScoredBoxes:
    """
    Args:
        candidates: the test-time proposals of the image.
        outputs: logits and deltas of the box predictor.
        probs: its probabilities.
        proposals: of the image.
    """
    predictor = heads.box_branch.predictor
    num_classes, size = heads.num_classes, proposals[0].image_size
    probs = probs[:, :num_classes]
    rows = is_positive(candidates.classes, num_classes).nonzero()[:, 0]
    classes = candidates.classes[rows]
    owners = torch.full_like(candidates.classes, -1)
    owners[rows] = torch.arange(len(rows), device=probs.device)
    kept = probs > predictor.test_score_thresh
    kept[rows, classes] = True  # may be raised above it
    of_proposals, of_classes = kept.nonzero().T
    boxes = predictor.predict_boxes(outputs, proposals)[0].view(len(probs), -1, 4)
    boxes = boxes.expand(-1, num_classes, 4)[of_proposals, of_classes]
    clipped = Boxes(boxes)
    clipped.clip(size)
    logits = at_least_float32(outputs[0][rows])
    own, rest = logits.gather(1, classes[:, None])[:, 0], None
    if not getattr(predictor, "use_sigmoid_ce", False):
        others = logits.scatter(1, classes[:, None], -torch.inf)
        rest = others.logsumexp(dim=1)
    # Federated loss draws the classes it is computed for: the same draw for all images.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        losses = predictor.classification_losses(logits, classes)
    return ScoredBoxes(
        image_id=inputs["image_id"],
        input_size=size,
        image_size=(inputs["height"], inputs["width"]),
        boxes=clipped.tensor,
        classes=of_classes,
        scores=probs[kept],
        owners=owners[of_proposals],
        gt_classes=classes,
        objects=candidates.objects[rows],
        ious=candidates.predictions.ious[rows],
        losses=losses,
        own_logits=own,
        rest_logits=rest,
    )
