"""
Feature maps and proposals of the frozen parts of a detector, computed once for each image.

An image is cached at the scale of ``INPUT.MIN_SIZE_TEST`` and without augmentation.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.modeling import GeneralizedRCNN, ROIHeads
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from pisa_d2.data import KeepRegions, ReadableOnly
from pisa_d2.data.regions import without_regions_alone
from pisa_d2.engine.seeding import seeded

from .pooled import Pooled, looking_up, pool

Record = dict[str, Any]


class View(NamedTuple):
    """
    Attributes:
        features: map (C, H, W) of each feature level that the head reads.
        proposals: the RPN's, in training or inference as the view is for.
        targets: the objects; None in a view of a test image.
        image_id, height, width: of the image in the dataset.
        pooled: what the head's pooler makes of the boxes; None to pool them in every step.
    """

    features: dict[str, Tensor]
    proposals: Instances
    targets: Instances | None
    image_id: int | str
    height: int
    width: int
    pooled: Pooled | None = None


class Batch(NamedTuple):
    """What ``forward`` of the ROI heads takes."""

    images: ImageList
    features: dict[str, Tensor]
    proposals: list[Instances]
    targets: list[Instances] | None


def collate(views: Sequence[View], device: torch.device) -> Batch:
    """
    A batch of views, whose feature maps are padded with 0 to the largest. The images are empty
    tensors: the heads get their sizes alone.
    """
    features = {}
    for name in views[0].features:
        maps = [view.features[name] for view in views]
        height, width = (max(m.shape[axis] for m in maps) for axis in (1, 2))
        padded = [F.pad(m, (0, width - m.shape[2], 0, height - m.shape[1])) for m in maps]
        features[name] = torch.stack(padded).to(device)
    sizes = [view.proposals.image_size for view in views]
    targets = [view.targets.to(device) for view in views if view.targets is not None]
    return Batch(
        ImageList(torch.empty(len(views), 3, 0, 0, device=device), sizes),
        features,
        [view.proposals.to(device) for view in views],
        targets or None,
    )


def run_head(head: ROIHeads, views: Sequence[View], device: torch.device) -> Any:
    """What ``head`` returns for a batch of views; boxes that are pooled already are looked up."""
    with looking_up(head, [view.pooled for view in views]):
        return head(*collate(views, device))


class Views(Sequence[View]):
    """The views in a folder, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.pt"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        view = torch.load(self.paths[index], map_location="cpu", mmap=True, weights_only=False)
        half = torch.float16
        features = {n: m.float() if m.dtype == half else m for n, m in view.features.items()}
        return view._replace(features=features)


class Frozen:
    """
    The frozen parts of a detector at work.

    Args:
        model: in evaluation mode. Its RPN makes the proposals of training images as in training.
        cfg: of the model.
        pooler: of the studied box head, None if it cannot be known.
    """

    def __init__(
        self, model: GeneralizedRCNN, cfg: CfgNode, pooler: ROIPooler | None = None
    ) -> None:
        self.model = model
        # A GPU pools faster than it gets features from the host.
        self.pooler = pooler if model.device.type == "cpu" else None
        self.names = list(cfg.MODEL.ROI_HEADS.IN_FEATURES)
        # As Detectron2 trains: evaluation is in float32 whatever this says.
        self.amp = cfg.SOLVER.AMP.ENABLED and model.device.type == "cuda"
        resize = T.ResizeShortestEdge(
            cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, sample_style="choice"
        )
        boxes_only = cfg.clone()
        boxes_only.defrost()
        boxes_only.MODEL.MASK_ON = boxes_only.MODEL.KEYPOINT_ON = False
        mapper = DatasetMapper(boxes_only, is_train=True, augmentations=[resize])
        if cfg.MODEL.IGNORED_REGIONS.ENABLED:
            mapper = KeepRegions(mapper)
        self.mapper = ReadableOnly(mapper, skip=False)

    @torch.no_grad()
    def view(self, record: Record, training: bool, pooled: bool = False) -> View:
        """
        Return the view of an image for training or evaluation.

        Args:
            pooled: with pooled features, if there is a pooler.
        """
        sample = self.mapper(record)
        assert sample is not None  # an image that cannot be read is an error
        generator = self.model.proposal_generator
        targets = sample["instances"].to(self.model.device)
        images = self.model.preprocess_image([sample])
        # Its own flag alone: layers below it must not move statistics.
        generator.training = training
        try:
            # In training the RPN draws anchors for its loss, which nothing here needs.
            with (
                seeded(0),
                EventStorage(),
                torch.autocast("cuda", enabled=self.amp and training),
            ):
                features = self.model.backbone(images.tensor)
                proposals, _ = generator(images, features, [targets] if training else None)
        finally:
            generator.training = False
        of_boxes = None
        if pooled and self.pooler is not None:
            boxes = proposals[0].proposal_boxes.tensor
            if training:
                boxes = torch.cat([boxes, targets.gt_boxes.tensor])
            of_boxes = pool(self.pooler, [features[name] for name in self.names], boxes)
        return View(
            {name: features[name][0].contiguous().cpu() for name in self.names},
            proposals[0].to("cpu"),
            targets.to("cpu") if training else None,
            record["image_id"],
            record["height"],
            record["width"],
            of_boxes,
        )


def num_bytes(view: View) -> int:
    tensors = [*view.features.values(), *([view.pooled.features] if view.pooled else [])]
    return sum(t.numel() * t.element_size() for t in tensors)


def halved(view: View) -> View:
    """The view with features in half precision."""
    pooled = view.pooled and view.pooled._replace(features=view.pooled.features.half())
    return view._replace(
        features={name: m.half() for name, m in view.features.items()}, pooled=pooled
    )


class Plan(NamedTuple):
    """
    The images to cache, and how much room they take.

    Attributes:
        train, test: the chosen records.
        of: numbers of training and test images that there are.
        gigabytes: about what the features take, in 10^9 bytes.
        half: store features in half precision.
        pooled: store the pooled features of all boxes in addition to the feature maps.
    """

    train: list[Record]
    test: list[Record]
    of: tuple[int, int]
    gigabytes: float
    half: bool
    pooled: bool

    def text(self) -> str:
        parts = (self.train, self.test)
        train, test = (
            f"all {total}" if len(part) == total else f"{len(part)} of {total}, chosen at random,"
            for part, total in zip(parts, self.of, strict=True)
        )
        precision = "half" if self.half else "single"
        what = "feature maps and pooled features" if self.pooled else "feature maps"
        return (
            f"{train} training images and {test} test images: about {self.gigabytes:.1f} GB of "
            f"{what} in {precision} precision"
        )


def plan_cache(frozen: Frozen, cfg: CfgNode, max_gigabytes: float, half: bool) -> Plan:
    """
    Choose the images that fit, by the size of one view, and pooled features if those of all images
    fit. Where not all feature maps do, test images take up to half of the room.

    Raises:
        ValueError: not even a batch of training images fits.
    """
    train = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    if cfg.MODEL.IGNORED_REGIONS.ENABLED and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        train = without_regions_alone(train)
    test = get_detection_dataset_dicts(cfg.DATASETS.TEST, filter_empty=False)
    largest = max((*train[:100], *test[:100]), key=lambda r: r["height"] * r["width"])
    num_train, num_test = len(train), len(test)
    size_of = 0.5 if half else 1
    views = [frozen.view(largest, training, pooled=True) for training in (True, False)]
    each = size_of * num_bytes(views[0]._replace(pooled=None))
    total = size_of * (num_train * num_bytes(views[0]) + num_test * num_bytes(views[1]))
    pooled = frozen.pooler is not None and total <= max_gigabytes * 1e9
    if not pooled:
        room = int(max_gigabytes * 1e9 / each)
        num_test = min(num_test, max(room // 2, room - num_train))
        num_train = min(num_train, room - num_test)
        total = each * (num_train + num_test)
    if num_train < cfg.SOLVER.IMS_PER_BATCH or num_test < 1:
        raise ValueError(
            f"--max-gb {max_gigabytes:g} leaves room for {num_train} training images and "
            f"{num_test} test images, each of {each / 1e6:.0f} MB: give it more."
        )
    generator = random.Random(0)
    chosen = [
        [records[i] for i in sorted(generator.sample(range(len(records)), num))]
        for records, num in ((train, num_train), (test, num_test))
    ]
    return Plan(chosen[0], chosen[1], (len(train), len(test)), total / 1e9, half, pooled)


def digest(*words: Any) -> str:
    text = json.dumps(words, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def write_views(
    frozen: Frozen,
    records: Sequence[Record],
    folder: Path,
    training: bool,
    half: bool,
    pooled: bool,
) -> Views:
    """
    Write the views that are not in ``folder`` yet.

    Args:
        half, pooled: see :class:`Plan`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / "unfinished"
    name = "training" if training else "test"
    for i, record in enumerate(tqdm(records, desc=f"caching {name} images")):
        path = folder / f"{i:06d}.pt"
        if path.is_file():
            continue
        view = frozen.view(record, training, pooled)
        torch.save(halved(view) if half else view, scratch)
        scratch.replace(path)
    return Views(folder)
