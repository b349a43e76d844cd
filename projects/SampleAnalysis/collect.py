"""One pass of a detector over a data set."""

from collections.abc import Iterable

import torch
from dataset_detections import Detections
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from findings import (
    IOU_EDGES,
    Findings,
    Ranks,
    SampleStatistics,
    ScoredBoxes,
    ScoreStatistics,
    as_numpy,
)
from running_sums import cells_of
from spool import Spool
from torch import Tensor, nn

from pisa_d2.hlr import hierarchical_local_rank, local_rank
from pisa_d2.ordering import at_least_float32
from pisa_d2.ranking import ImageLayout, rank_negatives
from pisa_d2.samplers import BatchSampler, Candidates, Quota
from pisa_d2.samplers.candidates import is_positive


def predict_proposals(
    heads: nn.Module, features: dict[str, Tensor], proposals: Instances, target: Instances
) -> tuple[Candidates, tuple[Tensor, Tensor]]:
    """
    The proposals of an image, matched as in training, with what samplers go by; and the logits and
    deltas of the box predictor, which in a cascade is the first one.
    """
    batch = heads.match([proposals], [target])
    parts: list[tuple[Tensor, Tensor]] = []
    batch, _ = heads.predict(features, batch, [target], observe=parts.append)
    logits, deltas = (torch.cat(values) for values in zip(*parts, strict=True))
    return batch[0], (logits, deltas)


class Observer:
    """Looks at a detector that is in eval mode."""

    def __init__(
        self,
        model: nn.Module,
        samplers: dict[str, BatchSampler],
        ranked_above: float,
        nms_thresh: float,
        ranks_of: int | str | None = None,
        with_scored_boxes: bool = False,
    ) -> None:
        """
        Args:
            model: a GeneralizedRCNN whose heads have samplers that need predictions.
            samplers: of the strategies whose samples are to be described.
            ranked_above, nms_thresh: of Score-HLR, as in the config.
            ranks_of: the image whose positives are to be ranked.
            with_scored_boxes: keep what detections are made of.
        """
        self.model, self.samplers = model, samplers
        self.ranked_above, self.nms_thresh = ranked_above, nms_thresh
        self.ranks_of, self.with_scored_boxes = ranks_of, with_scored_boxes
        samples = {name: SampleStatistics() for name in samplers}
        self.findings = Findings(samples, ScoreStatistics(), Detections(), Spool())

    @torch.no_grad()
    def run(self, batches: Iterable[dict]) -> Findings:
        """
        Args:
            batches: model inputs of one image each, with instances.
        """
        with EventStorage():
            for inputs in batches:
                self._look_at(inputs)
        return self.findings

    def _look_at(self, inputs: dict) -> None:
        model, heads = self.model, self.model.roi_heads
        images = model.preprocess_image([inputs])
        features = model.backbone(images.tensor)
        target = inputs["instances"].to(model.device)
        if self.samplers:
            self._add_samples(inputs, features, self._propose(images, features, target), target)
        proposals, _ = model.proposal_generator(images, features, None)
        candidates, outputs = predict_proposals(heads, features, proposals[0], target)
        self._add_scores(candidates, outputs, proposals)
        if self.with_scored_boxes:
            scored = self._scored_boxes(inputs, candidates, outputs, proposals)
            self.findings.scored_boxes.append(scored)
        found, _ = heads(images, features, proposals)
        found = detector_postprocess(found[0], inputs["height"], inputs["width"])
        self.findings.detections.add(found, inputs["image_id"])

    def _propose(
        self, images: ImageList, features: dict[str, Tensor], target: Instances
    ) -> Instances:
        """As in training: by its limits, and with the objects among them."""
        generator = self.model.proposal_generator
        generator.training = True  # of its parts, norms and dropout too, none is touched
        try:
            proposals, _ = generator(images, features, [target])
        finally:
            generator.training = False
        if self.model.roi_heads.proposal_append_gt:
            proposals = add_ground_truth_to_proposals([target], proposals)
        return proposals[0]

    def _add_samples(
        self, inputs: dict, features: dict[str, Tensor], proposals: Instances, target: Instances
    ) -> None:
        heads = self.model.roi_heads
        candidates, _ = predict_proposals(heads, features, proposals, target)
        quota = Quota(heads.batch_size_per_image, heads.positive_fraction, heads.num_classes)
        for name, sampler in self.samplers.items():
            choice = sampler([candidates], quota)[0]
            chosen = candidates.select(choice.positives), candidates.select(choice.negatives)
            self.findings.samples[name].add(*chosen)
        if inputs["image_id"] == self.ranks_of:
            rows = is_positive(candidates.classes, heads.num_classes).nonzero()[:, 0]
            self.findings.ranks = rank_positives(inputs, candidates.select(rows))

    def _add_scores(
        self,
        candidates: Candidates,
        outputs: tuple[Tensor, Tensor],
        proposals: list[Instances],
    ) -> None:
        heads, scores = self.model.roi_heads, self.findings.scores
        scores.num_images += 1
        probs = heads.box_branch.predictor.predict_probs(outputs, proposals)[0]
        rows = is_positive(candidates.classes, heads.num_classes).nonzero()[:, 0]
        positives = candidates.select(rows)
        ious = positives.predictions.ious
        ranks = hierarchical_local_rank(ious, positives.objects, positives.classes)
        own = as_numpy(probs[rows].gather(1, positives.classes[:, None])[:, 0])
        scores.positives.add(as_numpy(ranks), own)
        scores.by_iou.add(cells_of(as_numpy(ious), IOU_EDGES), own)
        scores.correlation.add(as_numpy(ious), own)

        found = candidates.predictions
        ranked = (candidates.classes == heads.num_classes) & (found.scores > self.ranked_above)
        layout = ImageLayout([len(ranked)], ranked.device)
        ranks = rank_negatives(found.boxes, found.scores, ranked, layout, self.nms_thresh)
        scores.negatives.add(as_numpy(ranks[ranked]), as_numpy(found.scores[ranked]))

    def _scored_boxes(
        self,
        inputs: dict,
        candidates: Candidates,
        outputs: tuple[Tensor, Tensor],
        proposals: list[Instances],
    ) -> ScoredBoxes:
        predictor = self.model.roi_heads.box_branch.predictor
        num_classes, size = self.model.roi_heads.num_classes, proposals[0].image_size
        probs = predictor.predict_probs(outputs, proposals)[0][:, :num_classes]
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
        # Federated loss draws the classes that count: the same for all images.
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


def rank_positives(inputs: dict, positives: Candidates) -> Ranks:
    """The two steps to the IoU-HLR of P positives of one image."""
    found = positives.predictions
    ranks = (
        local_rank(found.ious, positives.objects),
        hierarchical_local_rank(found.ious, positives.objects, positives.classes),
    )
    values = (found.boxes, positives.classes, positives.objects, found.ious, *ranks)
    return Ranks(inputs, *(as_numpy(v) for v in values))
