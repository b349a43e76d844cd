"""The figures of a report: of one detector, and of runs that are compared."""

from collections.abc import Iterable

import numpy as np
import torch
from coco_scores import Evaluation, class_ids, evaluate, ground_truth
from collect import Observer, observe_all, share_frozen_parts
from dataset_detections import Detections
from detection_figures import plot_average_precision, plot_detections
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.modeling import GeneralizedRCNN
from findings import Findings
from html_report import Plot
from loading import labelled_test_images, load_detector, rgb_image, samplers_of
from loss_figures import plot_lower_loss, plot_what_if
from lower_loss import clearest_object
from mistakes import describe_images, most_different
from precision_figures import image_with_highest_mistake, plot_ap_revisited
from rank_figures import plot_iou_ranks, plot_prime_and_hard, plot_score_ranks
from records import easiest_to_read
from resampling import bootstrap
from run_figures import plot_after_training, plot_ranks, plot_score_by_iou
from sample_figures import (
    DRAWN,
    plot_densities,
    plot_negative_ious,
    plot_samples,
    plot_uneven,
)
from torch import nn
from tqdm import tqdm
from what_if import LAST_5, gather, spend, total_loss

NUM_PICTURES = 3
STRATEGIES = ("random", "IoU-balanced", "hard", "prime")


class Report:
    """
    Draws the figures of a dataset.

    Attributes:
        left_out: which figures are missing, and why.
        ap: of the detector, once its figures are drawn.
    """

    def __init__(
        self, cfg: CfgNode, dataset: str, records: list[dict], num_draws: int, seed: int
    ) -> None:
        """
        Args:
            records: of the images.
            num_draws: of each bootstrap.
            seed: of samplers and bootstrap.
        """
        self.cfg, self.dataset, self.records = cfg, dataset, records
        self.num_draws, self.seed = num_draws, seed
        self.truth = ground_truth(dataset)
        self.ids = class_ids(dataset, self.truth)
        self.class_names = list(MetadataCatalog.get(dataset).thing_classes)
        self.image_ids = sorted({record["image_id"] for record in records})
        self.paths = {record["image_id"]: record["file_name"] for record in records}
        self.left_out: list[str] = []
        self.ap = float("nan")

    def of_detector(self, weights: str) -> list[Plot]:
        """The figures of one checkpoint."""
        found, model = self._observe(weights)
        predictor = model.roi_heads.box_branch.predictor
        highest = self.cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0]
        score_thresh, nms_thresh = self._ranking()
        drawn = {name: found.samples[name] for name in DRAWN}
        plots = [plot_negative_ious(drawn, highest, self.seed)]
        if found.sampled is not None:
            image = rgb_image(found.sampled.inputs, self.cfg)
            plots.append(plot_samples(found.sampled, image, highest))
        if found.uneven is not None:
            image = rgb_image(found.uneven.inputs, self.cfg)
            plots.append(plot_uneven(found.uneven, image, found.samples, self.seed))
        else:
            self._leave_out(
                "Positives per object", "random and balanced positives are as many of each object"
            )
        plots += self._losses_and_ap(found, predictor)
        scene = found.scene
        if scene is not None and len(scene.positives):
            image = rgb_image(scene.inputs, self.cfg)
            plots.append(plot_prime_and_hard(scene, image))
            plots.append(plot_iou_ranks(scene, image, self.class_names))
        else:
            self._leave_out("A prime sample and the ranks of an image", "there is no positive")
        if scene is not None and len(scene.negatives):
            image = rgb_image(scene.inputs, self.cfg)
            plots.append(plot_score_ranks(scene, image, score_thresh, nms_thresh))
        else:
            self._leave_out(
                "Score-HLR", f"no negative of the image has a score above {score_thresh}"
            )
        plots.append(plot_densities(drawn, highest))
        scores = {"detector": [found.scores]}
        return [*plots, plot_ranks(scores), plot_score_by_iou(scores)]

    def of_runs(self, runs: dict[str, list[str]]) -> list[Plot]:
        """
        The figures that compare runs.

        Args:
            runs: checkpoints of equally many seeds, by the name of the run, the baseline first.
        """
        scores = {}
        evaluations: dict[str, list[Evaluation]] = {}
        compared = [next(iter(runs)), list(runs)[-1]]
        of_all = iter(self._observe_runs(sum(runs.values(), [])))
        for name, checkpoints in runs.items():
            found = [next(of_all) for _ in checkpoints]
            scores[name] = [f.scores for f in found]
            if name in compared:
                evaluations[name] = [self._evaluate(f.detections) for f in found]
        plots = [plot_ranks(scores), plot_score_by_iou(scores), plot_after_training(scores)]
        images = [describe_images(evaluations[name][0]) for name in compared]
        pairs = most_different(images[0], images[1], NUM_PICTURES)
        pictures = [self._picture(pair[0].image_id) for pair in pairs]
        classes = dict(zip(self.ids, self.class_names, strict=True))
        plots.append(plot_detections(pairs, pictures, compared, classes))
        of_seeds = [evaluations[name] for name in compared]
        draws = bootstrap(sum(of_seeds, []), self.num_draws, self.seed)
        num = len(of_seeds[0])
        means = [np.mean(of_run, axis=0) for of_run in (draws[:num], draws[num:])]
        plots.append(plot_average_precision(of_seeds, means, images, compared, self.class_names))
        return plots

    def _losses_and_ap(self, found: Findings, predictor: nn.Module) -> list[Plot]:
        """The figures of a lower loss, of AP, and of what a decrease of the loss buys."""
        outcomes = spend(found.scored_boxes, predictor, self._evaluate)
        self.ap = outcomes[0].ap
        plots = []
        results = describe_images(outcomes[0].evaluation)
        if len(outcomes) == 1:
            for title in ("A lower loss", "What the same decrease of the loss buys"):
                self._leave_out(title, "there is no positive")
        else:
            positives = gather(found.scored_boxes)
            total = total_loss(positives, predictor)
            largest = max(o.budget for o in outcomes)
            (last,) = (o for o in outcomes if (o.choice, o.budget) == (LAST_5, largest))
            sets = {"set A": outcomes[0], "set B": last}
            clearest = clearest_object(found.scored_boxes, sets, predictor)
            if clearest is not None:
                image, name = self._picture(clearest.image_id), self.class_names[clearest.class_]
                draws = self.num_draws, self.seed
                plots.append(plot_lower_loss(clearest, sets, total, image, name, *draws))
            else:
                self._leave_out("A lower loss", "no object's AP falls together with its loss")
        if chosen := image_with_highest_mistake(results):
            image = self._picture(chosen[0].image_id)
            plots.append(
                plot_ap_revisited(outcomes[0].evaluation, *chosen, image, self.class_names)
            )
        else:
            self._leave_out(
                "AP revisited", "no image has both a right detection and a false positive"
            )
        if len(outcomes) > 1:
            draws = self.num_draws, self.seed
            plots.append(plot_what_if(outcomes, total, positives.most_per_object, *draws))
        return plots

    def _observe(self, weights: str) -> tuple[Findings, GeneralizedRCNN]:
        """One pass over the images, with everything that the figures of one detector need."""
        torch.manual_seed(self.seed)
        model = load_detector(self.cfg, weights)
        observer = Observer(
            *(model, samplers_of(self.cfg, STRATEGIES), *self._ranking()),
            scene_of=easiest_to_read(self.records),
            with_scored_boxes=True,
        )
        return observer.run(self._inputs()), model

    def _observe_runs(self, checkpoints: list[str]) -> list[Findings]:
        """One pass over the images for all checkpoints."""
        models = [load_detector(self.cfg, weights) for weights in checkpoints]
        share_frozen_parts(models)
        observers = [Observer(model, {}, *self._ranking()) for model in models]
        return observe_all(observers, self._inputs())

    def _ranking(self) -> tuple[float, float]:
        """The score and the IoU of Score-HLR."""
        isr_n = self.cfg.MODEL.PISA.ISR_N
        return isr_n.SCORE_THRESH, isr_n.NMS_THRESH

    def _inputs(self) -> Iterable[dict]:
        mapper = labelled_test_images(self.cfg)
        return (mapper(record) for record in tqdm(self.records, desc="images", unit="image"))

    def _evaluate(self, detections: Detections, with_details: bool = True) -> Evaluation:
        return evaluate(self.truth, detections, self.image_ids, self.ids, with_details)

    def _picture(self, image_id: int | str) -> np.ndarray:
        return read_image(self.paths[image_id], "RGB")

    def _leave_out(self, title: str, reason: str) -> None:
        self.left_out.append(f"{title}: {reason}.")
