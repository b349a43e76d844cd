"""One pass of a detector over a dataset."""

from collections.abc import Iterable, Sequence

import torch
from dataset_detections import Detections
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import EventStorage
from findings import (
    IOU_EDGES,
    Findings,
    SampledImage,
    SampleStatistics,
    ScoreStatistics,
    as_numpy,
)
from running_sums import cells_of
from scenes import describe_scene, samples_of, scored_boxes, unevenness
from spool import Spool
from torch import Tensor, nn

from pisa_d2.hlr import hierarchical_local_rank
from pisa_d2.ranking import ImageLayout, rank_negatives
from pisa_d2.roi_heads import PISAMixin
from pisa_d2.samplers import BatchSampler, Candidates, Quota
from pisa_d2.samplers.candidates import is_positive

# The strategies whose positives are compared in the uneven image.
COMPARED = ("random", "IoU-balanced")
FROZEN_PARTS = ("backbone", "proposal_generator")


def predict_proposals(
    heads: PISAMixin, features: dict[str, Tensor], proposals: Instances, target: Instances
) -> tuple[Candidates, tuple[Tensor, Tensor]]:
    """
    Match the proposals of an image as in training, and predict what samplers need.

    Returns:
        The candidates with predictions; and the logits and deltas of the box predictor, which in
        a cascade is the first one.
    """
    batch = heads.match([proposals], [target])
    parts: list[tuple[Tensor, Tensor]] = []
    batch, _ = heads.predict(features, batch, [target], observe=parts.append)
    logits, deltas = (torch.cat(values) for values in zip(*parts, strict=True))
    return batch[0], (logits, deltas)


# Image, features and proposals of an image, by the modules that made the latter two.
Views = dict[tuple[nn.Module, nn.Module], tuple[ImageList, dict[str, Tensor], list[Instances]]]


class Observer:
    """Observes a detector that is in eval mode."""

    def __init__(
        self,
        model: GeneralizedRCNN,
        samplers: dict[str, BatchSampler],
        ranked_above: float,
        nms_thresh: float,
        scene_of: int | str | None = None,
        with_scored_boxes: bool = False,
    ) -> None:
        """
        Args:
            model: a GeneralizedRCNN whose heads have samplers that need predictions.
            samplers: of the strategies whose samples are described.
            ranked_above, nms_thresh: of Score-HLR, as in the config.
            scene_of: the image whose samples and ranks are kept.
            with_scored_boxes: whether to keep the boxes that detections are made of.
        """
        self.model, self.samplers = model, samplers
        self.ranked_above, self.nms_thresh = ranked_above, nms_thresh
        self.scene_of, self.with_scored_boxes = scene_of, with_scored_boxes
        samples = {name: SampleStatistics() for name in samplers}
        self.findings = Findings(samples, ScoreStatistics(), Detections(), Spool())
        self._unevenness = (0, 0)

    def run(self, batches: Iterable[dict]) -> Findings:
        """
        Args:
            batches: model inputs of one image each, with instances.
        """
        return observe_all([self], batches)[0]

    def look_at(self, inputs: dict, views: Views) -> None:
        """
        Args:
            inputs: of one image.
            views: of this image, by the observers before.
        """
        model, heads = self.model, self.model.roi_heads
        parts = model.backbone, model.proposal_generator
        if parts not in views:
            images = model.preprocess_image([inputs])
            features = model.backbone(images.tensor)
            proposals, _ = model.proposal_generator(images, features, None)
            views[parts] = images, features, proposals
        images, features, proposals = views[parts]
        target = inputs["instances"].to(model.device)
        if self.samplers:
            self._add_samples(inputs, features, self._propose(images, features, target), target)
        candidates, outputs = predict_proposals(heads, features, proposals[0], target)
        probs = heads.box_branch.predictor.predict_probs(outputs, proposals)[0]
        self._add_scores(candidates, probs)
        if self.samplers and inputs["image_id"] == self.scene_of:
            settings = self.ranked_above, self.nms_thresh
            self.findings.scene = describe_scene(
                inputs, candidates, probs, heads.num_classes, *settings
            )
        if self.with_scored_boxes:
            self.findings.scored_boxes.append(
                scored_boxes(heads, inputs, candidates, outputs, probs, proposals)
            )
        if isinstance(heads, CascadeROIHeads):  # later stages are still to come
            found, _ = heads(images, features, proposals)
        else:
            found, _ = heads.box_branch.predictor.inference(outputs, proposals)
        found = detector_postprocess(found[0], inputs["height"], inputs["width"])
        self.findings.detections.add(found, inputs["image_id"])

    def _propose(
        self, images: ImageList, features: dict[str, Tensor], target: Instances
    ) -> Instances:
        """Propose as in training: by its limits, and with the objects among the proposals."""
        generator = self.model.proposal_generator
        generator.training = True  # only this flag: norms and dropout stay in eval mode
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
        heads, findings = self.model.roi_heads, self.findings
        candidates, _ = predict_proposals(heads, features, proposals, target)
        quota = Quota(heads.batch_size_per_image, heads.positive_fraction, heads.num_classes)
        samples = {}
        for name, sampler in self.samplers.items():
            choice = sampler([candidates], quota)[0]
            chosen = candidates.select(choice.positives), candidates.select(choice.negatives)
            findings.samples[name].add(*chosen, len(target))
            samples[name] = samples_of(*chosen, candidates, target, heads.ignored_ioa_thresh)
        if inputs["image_id"] == self.scene_of:
            findings.sampled = SampledImage(inputs, len(target), samples)
        if all(name in samples for name in COMPARED):
            random, balanced = (samples[name] for name in COMPARED)
            uneven = unevenness(random, balanced, len(target))
            if uneven > self._unevenness:
                self._unevenness = uneven
                of_compared = {name: samples[name] for name in COMPARED}
                findings.uneven = SampledImage(inputs, len(target), of_compared)

    def _add_scores(self, candidates: Candidates, probs: Tensor) -> None:
        heads, scores = self.model.roi_heads, self.findings.scores
        scores.num_images += 1
        rows = is_positive(candidates.classes, heads.num_classes).nonzero()[:, 0]
        positives = candidates.select(rows)
        ious = positives.predictions.ious
        ranks = hierarchical_local_rank(ious, positives.objects, positives.classes)
        own = as_numpy(probs[rows].gather(1, positives.classes[:, None])[:, 0])
        scores.positives.add(as_numpy(ranks), own)
        scores.by_iou.add(cells_of(as_numpy(ious), IOU_EDGES), own)
        scores.correlation.add(as_numpy(ious), own)

        found = candidates.predictions
        negative = candidates.classes == heads.num_classes
        ranked = negative & (found.scores > self.ranked_above)
        layout = ImageLayout([len(ranked)], ranked.device)
        ranks = rank_negatives(found.boxes, found.scores, ranked, layout, self.nms_thresh)
        scores.negatives.add(as_numpy(ranks[ranked]), as_numpy(found.scores[ranked]))

        negatives = candidates.select(negative.nonzero()[:, 0])
        for kind, chosen in (("positives", positives), ("negatives", negatives)):
            scores.losses[kind].add(as_numpy(chosen.predictions.cls_losses))
            scores.ious[kind].add(as_numpy(chosen.predictions.ious))


@torch.no_grad()
def observe_all(observers: Sequence[Observer], batches: Iterable[dict]) -> list[Findings]:
    """
    Observe several detectors in one pass over the images.

    Args:
        batches: model inputs of one image each, with instances.
    """
    with EventStorage():
        for inputs in batches:
            views: Views = {}
            for observer in observers:
                observer.look_at(inputs, views)
    return [observer.findings for observer in observers]


def share_frozen_parts(models: Sequence[nn.Module]) -> None:
    """
    Let models whose backbone and proposal generator have equal weights use the same modules, so
    that each image goes through these once.
    """
    for i, model in enumerate(models):
        for earlier in models[:i]:
            parts = [(getattr(model, n), getattr(earlier, n)) for n in FROZEN_PARTS]
            if all(_equal(own.state_dict(), other.state_dict()) for own, other in parts):
                for name, (_, other) in zip(FROZEN_PARTS, parts, strict=True):
                    setattr(model, name, other)
                break


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )
