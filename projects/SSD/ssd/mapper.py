import copy

import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils as utils
from detectron2.structures import Boxes, BoxMode, Instances
from torchvision import tv_tensors
from torchvision.transforms import v2

from pisa_d2.config import check_range
from pisa_d2.data.regions import REGION

from .regions import make_regions


class SSDMapper:
    """
    Training images as SSD was published: colours distorted, placed on a larger canvas, cropped
    around an object, resized to the model's square and flipped, by torchvision's transforms.

    Test images need no mapper of their own: the model resizes them. ``INPUT.MIN_SIZE_TEST: 0``
    keeps Detectron2's mapper from resizing them before.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Raises:
            ValueError: ``cfg.INPUT`` has a value that is not allowed here.
        """
        settings = cfg.INPUT.SSD
        if cfg.INPUT.FORMAT != "RGB":
            raise ValueError(
                f"INPUT.FORMAT = {cfg.INPUT.FORMAT!r} is not allowed: torchvision's transforms "
                "need 'RGB'."
            )
        check_range("INPUT.SSD.MAX_ZOOM_OUT", settings.MAX_ZOOM_OUT, 1)
        augmentations: list[v2.Transform] = []
        if settings.PHOTOMETRIC:
            augmentations.append(v2.RandomPhotometricDistort(p=0.5))
        if settings.MAX_ZOOM_OUT > 1:
            mean = [int(value + 0.5) for value in cfg.MODEL.PIXEL_MEAN]
            fill = {tv_tensors.Image: mean, "others": 0}
            augmentations.append(v2.RandomZoomOut(fill, side_range=(1, settings.MAX_ZOOM_OUT)))
        if settings.IOU_CROP:
            augmentations.append(v2.RandomIoUCrop())
        # Objects whose centre is outside the crop come out of it without an area.
        augmentations.append(v2.SanitizeBoundingBoxes())
        # As the model resizes test images.
        side = cfg.MODEL.SSD.IMAGE_SIZE
        augmentations.append(v2.Resize((side, side), antialias=False))
        if cfg.INPUT.RANDOM_FLIP == "horizontal":
            augmentations.append(v2.RandomHorizontalFlip())
        elif cfg.INPUT.RANDOM_FLIP == "vertical":
            augmentations.append(v2.RandomVerticalFlip())
        self.augment = v2.Compose(augmentations)

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Args:
            dataset_dict: one image in Detectron2's dataset format.

        Returns:
            The same without annotations, with "image", uint8 (3, side, side), and "instances" with
            ``gt_boxes`` and ``gt_classes``; crowds are left out. Objects of class ``REGION``, see
            :class:`pisa_d2.data.KeepRegions`, are clipped where others would be dropped.
        """
        dataset_dict = copy.deepcopy(dataset_dict)
        array = utils.read_image(dataset_dict["file_name"], format="RGB")
        utils.check_image_size(dataset_dict, array)
        annotations = [x for x in dataset_dict.pop("annotations", []) if not x.get("iscrowd", 0)]
        objects = [x for x in annotations if x["category_id"] != REGION]
        regions = [x for x in annotations if x["category_id"] == REGION]
        size = array.shape[:2]
        sample = {
            "image": tv_tensors.Image(torch.tensor(array).permute(2, 0, 1)),
            "boxes": tv_tensors.BoundingBoxes(_boxes_of(objects), format="XYXY", canvas_size=size),
            "labels": torch.tensor([x["category_id"] for x in objects], dtype=torch.int64),
            "regions": make_regions(_boxes_of(regions), size),
        }
        sample = self.augment(sample)
        image = sample["image"].as_subclass(torch.Tensor).contiguous()
        instances = Instances(tuple(image.shape[1:]))
        boxes = [sample[name].as_subclass(torch.Tensor) for name in ("boxes", "regions")]
        instances.gt_boxes = Boxes(torch.cat(boxes))
        of_regions = torch.full((len(boxes[1]),), REGION, dtype=torch.int64)
        instances.gt_classes = torch.cat([sample["labels"], of_regions])
        dataset_dict["image"] = image
        dataset_dict["instances"] = instances
        return dataset_dict


def _boxes_of(annotations: list[dict]) -> torch.Tensor:
    """Float32 (N, 4), XYXY in pixels."""
    boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in annotations]
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
