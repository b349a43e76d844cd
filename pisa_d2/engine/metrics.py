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
    Returns:
        The lines of the ``metrics.json`` of a run, in its output folder, with NaN for null. A line
        that is not finished, of a run that goes on or was killed, is left out.

    Raises:
        FileNotFoundError: there is none.
    """
    text = (Path(folder) / "metrics.json").read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [
        {name: math.nan if value is None else value for name, value in json.loads(line).items()}
        for line in lines
    ]


class _WithoutNaN:
    """A text file that gets each line of JSON with null for NaN and infinity, unknown to JSON."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, line: str) -> None:
        values = json.loads(line, parse_constant=lambda name: None)
        self._file.write(json.dumps(values, sort_keys=True) + "\n")


class MetricsWriter(JSONWriter):
    """
    Detectron2's, for a metrics.json whose every line is valid JSON: a number that is not finite is
    null, and a line that an earlier run left unfinished is removed.
    """

    def __init__(self, json_file: str, **kwargs: Any) -> None:
        if os.path.isfile(json_file):
            with open(json_file, "rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        super().__init__(json_file, **kwargs)
        self._file_handle: Any = _WithoutNaN(self._file_handle)
