"""
The datasets of this package, and users' own datasets in COCO's or Pascal VOC's format. Importing
this module registers nothing.
"""

import warnings

from .bccd import register_bccd
from .coco import load_coco
from .digits import make_digits, register_digits
from .mapper import ReadableOnly
from .regions import KeepRegions
from .registered import register_builtin_datasets, register_datasets, register_from_config
from .voc import load_voc

__all__ = [
    "KeepRegions",
    "ReadableOnly",
    "load_coco",
    "load_voc",
    "make_digits",
    "register_bccd",
    "register_builtin_datasets",
    "register_datasets",
    "register_digits",
    "register_from_config",
]

# `python -m pisa_d2.data.digits` warns that the lines above have already imported its module. That
# is harmless, since the module keeps no state.
warnings.filterwarnings("ignore", r"'pisa_d2\.data\.digits' found in sys\.modules", RuntimeWarning)
