"""The requirements of a model on a dataset."""

from dataclasses import dataclass, field

from .image_checks import Reading


@dataclass(frozen=True)
class Classes:
    """
    The number of classes of a model.

    Attributes:
        key: the config key that sets it.
        num: its value.
    """

    key: str
    num: int


@dataclass(frozen=True)
class Needs:
    """
    The purpose of a dataset, and the requirements of a model on it.

    Attributes:
        train, test: whether it is for training, and for evaluation.
        classes: the classes of the model, None if their number is unknown.
        objects: whether to refuse a dataset for training without labelled objects.
        masks: ``INPUT.MASK_FORMAT`` of a model with masks, otherwise None.
        keypoints: number of keypoints per object; 0 for a model without keypoints.
        reading: the settings by which images are read.
        ignores_regions: whether training ignores regions to ignore, see :mod:`pisa_d2.regions`.
    """

    train: bool = False
    test: bool = False
    classes: Classes | None = None
    objects: bool = False
    masks: str | None = None
    keypoints: int = 0
    reading: Reading = field(default_factory=Reading)
    ignores_regions: bool = False
