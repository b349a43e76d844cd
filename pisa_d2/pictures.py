"""File names for pictures of images."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def picture_names(paths: Sequence[str]) -> list[str]:
    """
    Make different file names, without a suffix, for pictures of the images at these paths: the
    stem of the image, or for equal stems the path below the folder that all images share.
    """
    paths = [os.path.abspath(path) for path in paths]
    stems = [Path(path).stem for path in paths]
    counts = Counter(stems)
    root = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    names: dict[str, None] = {}  # in order
    for stem, path in zip(stems, paths, strict=True):
        below = os.path.relpath(path, root).replace(os.sep, "_")
        name = unique = stem if counts[stem] == 1 else below
        number = 1
        while unique in names:  # "a_b/c.jpg" and "a/b_c.jpg", or one image twice
            number += 1
            unique = f"{name}_{number}"
        names[unique] = None
    return list(names)
