"""
Shape shorthand in this module:

    N: number of images
    R: number of default boxes of an image
    P: number of positives of all images
    K: number of foreground classes
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms, cat, nonzero_tuple
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from fvcore.nn import smooth_l1_loss
from torch import Tensor, nn
from torch.nn import functional as F

from pisa_d2.attention import Positives
from pisa_d2.config import check_range, ignored_ioa_thresh
from pisa_d2.ordering import at_least_float32
from pisa_d2.regions import ignore_inside, warn_of_gaps
from pisa_d2.samplers.candidates import is_positive
from pisa_d2.scalars import log_ignored
from pisa_d2.settings import check_ioa_thresh

from .default_boxes import DefaultBoxes
from .head import SSDHead
from .matcher import SSDMatcher
from .mining import hard_negatives


@META_ARCH_REGISTRY.register()
class SSD(DenseDetector):
    """
    Single Shot MultiBox Detector. Takes images of any size and resizes them to its square, with
    their ground truths; detections are in pixels of the original image.
    """

    ignores_regions = True

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        default_boxes: DefaultBoxes,
        box2box_transform: Box2BoxTransform,
        matcher: Matcher,
        num_classes: int,
        negatives_per_positive: float = 3.0,
        smooth_l1_beta: float = 1.0,
        ignored_ioa_thresh: float | None = None,
        test_score_thresh: float = 0.01,
        test_topk_candidates: int = 400,
        test_nms_thresh: float = 0.45,
        max_detections_per_image: int = 200,
        pixel_mean: list[float],
        pixel_std: list[float],
    ) -> None:
        """
        Args:
            backbone: its features, in the order of its ``output_shape``, are all used.
            head: features to logits and deltas, see :class:`SSDHead`.
            default_boxes: features to default boxes.
            box2box_transform: between default boxes and objects.
            matcher: IoU (objects, R) to the object of each default box (R,) and its label, 1 for
                positives and 0 for negatives.
            num_classes: foreground classes.
            negatives_per_positive: how many negatives are trained on, image by image.
            smooth_l1_beta: where smooth L1 turns from quadratic to linear, in deltas.
            ignored_ioa_thresh: negatives with at least this share of their area inside a region to
                ignore are ignored, in (0, 1]; None to ignore no regions.
            test_score_thresh: detections score above it.
            test_topk_candidates: of each class, before NMS.
            test_nms_thresh: IoU above which a detection suppresses one of its class.
            max_detections_per_image: of all classes, after NMS.
            pixel_mean, pixel_std: see :class:`DenseDetector`.
        """
        features = list(backbone.output_shape())
        if ignored_ioa_thresh is not None:
            check_ioa_thresh("ignored_ioa_thresh", ignored_ioa_thresh)
        super().__init__(backbone, head, features, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.default_boxes = default_boxes
        self.box2box_transform = box2box_transform
        self.matcher = matcher
        self.num_classes = num_classes
        self.negatives_per_positive = negatives_per_positive
        self.smooth_l1_beta = smooth_l1_beta
        self.ignored_ioa_thresh = ignored_ioa_thresh
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        ssd = cfg.MODEL.SSD
        warn_of_gaps(cfg)
        for key, high in (("SCORE_THRESH_TEST", 1), ("NMS_THRESH_TEST", 1)):
            check_range(f"MODEL.SSD.{key}", ssd[key], 0, high)
        for key in ("NEGATIVES_PER_POSITIVE", "SMOOTH_L1_BETA"):
            check_range(f"MODEL.SSD.{key}", ssd[key], 0)
        backbone = build_backbone(cfg)
        default_boxes = DefaultBoxes(ssd.IMAGE_SIZE, ssd.SCALES, ssd.STEPS, ssd.ASPECT_RATIOS)
        channels = [shape.channels for shape in backbone.output_shape().values()]
        if len(channels) != len(ssd.STEPS):
            raise ValueError(
                f"MODEL.SSD.STEPS has {len(ssd.STEPS)} entries, but the backbone has "
                f"{len(channels)} feature maps: give one for each."
            )
        return {
            "backbone": backbone,
            "head": SSDHead(channels, default_boxes.num_boxes(), ssd.NUM_CLASSES),
            "default_boxes": default_boxes,
            "box2box_transform": Box2BoxTransform(weights=tuple(ssd.BBOX_REG_WEIGHTS)),
            "matcher": SSDMatcher(ssd.IOU_THRESHOLD),
            "num_classes": ssd.NUM_CLASSES,
            "negatives_per_positive": ssd.NEGATIVES_PER_POSITIVE,
            "smooth_l1_beta": ssd.SMOOTH_L1_BETA,
            "ignored_ioa_thresh": ignored_ioa_thresh(cfg),
            "test_score_thresh": ssd.SCORE_THRESH_TEST,
            "test_topk_candidates": ssd.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": ssd.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """See :class:`DenseDetector`."""
        # Without a size in the input, detections are in pixels of the image as it was given.
        images = [x["image"] for x in batched_inputs]
        sizes = [{"height": image.shape[1], "width": image.shape[2]} for image in images]
        return super().forward([{**s, **x} for s, x in zip(sizes, batched_inputs, strict=True)])

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise the images, resize each to the square and batch them."""
        size = (self.default_boxes.image_size,) * 2
        images = [
            F.interpolate(
                (x["image"].to(self.device) - self.pixel_mean)[None] / self.pixel_std,
                size,
                mode="bilinear",
                align_corners=False,
            )
            for x in batched_inputs
        ]
        return ImageList(torch.cat(images), [size] * len(images))

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: tuple[list[Tensor], list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        logits, deltas = self._flatten(predictions)
        boxes = self.default_boxes(features)
        return self.losses(boxes, logits, deltas, *self.label_boxes(boxes, gt_instances))

    def _flatten(self, predictions: tuple[list[Tensor], list[Tensor]]) -> tuple[Tensor, Tensor]:
        """Logits (N, R, K + 1) and deltas (N, R, 4) of all feature maps."""
        dims = [self.num_classes + 1, 4]
        logits, deltas = self._transpose_dense_predictions(predictions, dims)
        return at_least_float32(cat(logits, dim=1)), at_least_float32(cat(deltas, dim=1))

    @torch.no_grad()
    def label_boxes(
        self, default_boxes: Tensor, gt_instances: list[Instances]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            default_boxes: (R, 4).
            gt_instances: N, in pixels of the images as they came.

        Returns:
            int64 (N, R), class of each default box, K for negatives and -1 for ignored ones; float
            (N, R, 4), box of its object in the square image, and int64 (N, R), the object, unique
            over the batch: both mean nothing for others than positives.
        """
        side = self.default_boxes.image_size
        classes, gt_boxes, objects = [], [], []
        first = 0
        for image in gt_instances:
            boxes = image.gt_boxes.clone()
            boxes.scale(side / image.image_size[1], side / image.image_size[0])
            matches, labels = self.matcher(pairwise_iou(boxes, Boxes(default_boxes)))
            if len(image) == 0:
                own = torch.full_like(matches, self.num_classes)
                gt_boxes.append(default_boxes)
            else:
                own = torch.where(labels == 1, image.gt_classes[matches], self.num_classes)
                gt_boxes.append(boxes.tensor[matches])
            classes.append(own)
            objects.append(matches + first)
            first += len(image)
        if self.ignored_ioa_thresh is not None:
            thresh = self.ignored_ioa_thresh
            classes = self._ignore_inside(classes, default_boxes, gt_instances, thresh)
        return torch.stack(classes), torch.stack(gt_boxes), torch.stack(objects)

    def _ignore_inside(
        self,
        classes: list[Tensor],
        default_boxes: Tensor,
        gt_instances: list[Instances],
        thresh: float,
    ) -> list[Tensor]:
        side = self.default_boxes.image_size
        scaled = []
        for image in gt_instances:  # regions are in pixels of the image as it came
            boxes = Boxes(default_boxes.clone())
            boxes.scale(image.image_size[1] / side, image.image_size[0] / side)
            scaled.append(boxes.tensor)
        ignored = [
            ignore_inside(own, self.num_classes, boxes, image, thresh)
            for own, boxes, image in zip(classes, scaled, gt_instances, strict=True)
        ]
        log_ignored("anchors", ignored, scaled, gt_instances, thresh)
        return ignored

    def losses(
        self,
        default_boxes: Tensor,
        logits: Tensor,
        deltas: Tensor,
        classes: Tensor,
        gt_boxes: Tensor,
        objects: Tensor,
    ) -> dict[str, Tensor]:
        """
        Args:
            default_boxes: (R, 4).
            logits, deltas: (N, R, K + 1) and (N, R, 4).
            classes, gt_boxes, objects: see :meth:`label_boxes`.

        Returns:
            The losses of :meth:`positive_losses`, with the hard negatives added to ``loss_cls``,
            all divided by the number of positives of the batch; 0, with a graph, if it has none.
        """
        positive = is_positive(classes, self.num_classes)
        # Ignored boxes have no loss, so that mining passes them over.
        cls_losses = F.cross_entropy(
            logits.flatten(0, 1), classes.flatten(), ignore_index=-1, reduction="none"
        )
        # Copies to the host, as Detectron2's dense detectors do; nothing below does.
        rows = nonzero_tuple(positive.flatten())[0]
        boxes = default_boxes[rows % len(default_boxes)]
        own_gt_boxes = gt_boxes.flatten(0, 1)[rows]
        own_deltas = deltas.flatten(0, 1)[rows]
        targets = self.box2box_transform.get_deltas(boxes, own_gt_boxes)
        box_losses = smooth_l1_loss(own_deltas, targets, self.smooth_l1_beta, reduction="none")
        own_classes = classes.flatten()[rows]
        probs = logits.flatten(0, 1)[rows].softmax(dim=1)
        losses = self.positive_losses(
            Positives(
                boxes=boxes,
                gt_boxes=own_gt_boxes,
                objects=objects.flatten()[rows],
                classes=own_classes,
                deltas=own_deltas,
                probs=probs.gather(1, own_classes[:, None])[:, 0],
                cls_losses=cls_losses[rows],
                box_losses=box_losses.sum(dim=1),
            )
        )
        cls_losses = cls_losses.view_as(classes)
        hard = hard_negatives(cls_losses, positive, self.negatives_per_positive)
        losses["loss_cls"] = losses["loss_cls"] + torch.where(hard, cls_losses, 0).sum()
        return {name: loss / max(len(rows), 1) for name, loss in losses.items()}

    def positive_losses(self, positives: Positives) -> dict[str, Tensor]:
        """``loss_cls`` and ``loss_box_reg`` of the positives: sums, not divided by anything."""
        return {
            "loss_cls": positives.cls_losses.sum(),
            "loss_box_reg": positives.box_losses.sum(),
        }

    def forward_inference(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: tuple[list[Tensor], list[Tensor]],
    ) -> list[Instances]:
        logits, deltas = self._flatten(predictions)
        boxes = self.default_boxes(features)
        scores = logits.softmax(dim=2)[:, :, : self.num_classes]
        return [
            self.inference_single_image(boxes, *of_image)
            for of_image in zip(scores, deltas, images.image_sizes, strict=True)
        ]

    def inference_single_image(
        self, default_boxes: Tensor, scores: Tensor, deltas: Tensor, image_size: tuple[int, int]
    ) -> Instances:
        """
        Args:
            default_boxes, deltas: (R, 4).
            scores: probabilities (R, K).
            image_size: height and width that boxes are clipped to.

        Returns:
            ``pred_boxes``, ``scores`` and ``pred_classes`` of the detections, best first.
        """
        boxes = Boxes(self.box2box_transform.apply_deltas(deltas, default_boxes))
        boxes.clip(image_size)
        num = min(self.test_topk_candidates, len(scores))
        scores, rows = scores.topk(num, dim=0)
        places, classes = nonzero_tuple(scores > self.test_score_thresh)
        scores, candidates = scores[places, classes], boxes.tensor[rows[places, classes]]
        keep = batched_nms(candidates, scores, classes, self.test_nms_thresh)
        keep = keep[: self.max_detections_per_image]
        return Instances(
            image_size,
            pred_boxes=Boxes(candidates[keep]),
            scores=scores[keep],
            pred_classes=classes[keep],
        )
