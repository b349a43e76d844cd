"""Reading and writing of metrics.json, whose every line is valid JSON."""

import json
import math
import os
from pathlib import Path
from typing import Any

from detectron2.utils.events import JSONWriter

# COCO's AP of boxes, in the order of COCOeval.stats; metrics.json has them as "bbox/AP".
COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def read_metrics(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Read the ``metrics.json`` in the output folder of a run.

    Returns:
        One dict per line, with NaN for null. An incomplete last line, of a run that still trains or
        was killed, is left out.

    Raises:
        FileNotFoundError: there is no such file.
    """
    text = (Path(folder) / "metrics.json").read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [
        {name: math.nan if value is None else value for name, value in json.loads(line).items()}
        for line in lines
    ]


class _WithoutNaN:
    """A text file for lines of JSON, with null for NaN and infinity, which JSON does not have."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, line: str) -> None:
        values = json.loads(line, parse_constant=lambda name: None)
        self._file.write(json.dumps(values, sort_keys=True) + "\n")


class MetricsWriter(JSONWriter):
    """
    Detectron2's writer, with valid JSON on every line of metrics.json: null stands for a number
    that is not finite, and an incomplete line of an earlier run is removed.
    """

    def __init__(self, json_file: str, **kwargs: Any) -> None:
        if os.path.isfile(json_file):
            with open(json_file, "rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        super().__init__(json_file, **kwargs)
        self._file_handle: Any = _WithoutNaN(self._file_handle)
