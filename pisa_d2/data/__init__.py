"""
The data sets of this project. Importing it registers them with Detectron2, under the folder that
``$DETECTRON2_DATASETS`` names ("datasets" by default). Nothing is read or made before it is asked
for.
"""

import os
import warnings

from .bccd import register_bccd
from .digits import make_digits, register_digits
from .mapper import ReadableOnly

__all__ = ["ReadableOnly", "make_digits", "register_bccd", "register_digits"]

_root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
register_bccd(_root)
register_digits(_root)

# `python -m pisa_d2.data.digits` finds its module already imported by the lines above, and warns.
# It does no harm: only this file registers, and the module keeps no state.
warnings.filterwarnings("ignore", r"'pisa_d2\.data\.digits' found in sys\.modules", RuntimeWarning)
