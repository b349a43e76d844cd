"""What a model needs of a dataset."""

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
    What a dataset is for, and what a model needs of it.

    Attributes:
        train, test: whether it is for training and for evaluation.
        classes: those of the model, if their number is known.
        objects: whether to refuse a dataset for training in which nothing is labelled.
        masks: ``INPUT.MASK_FORMAT`` of a model with masks, otherwise None.
        keypoints: per object; 0 of a model without keypoints.
        reading: how images are read.
        ignores_regions: whether regions to ignore are ignored in training, see
            :mod:`pisa_d2.regions`.
    """

    train: bool = False
    test: bool = False
    classes: Classes | None = None
    objects: bool = False
    masks: str | None = None
    keypoints: int = 0
    reading: Reading = field(default_factory=Reading)
    ignores_regions: bool = False
