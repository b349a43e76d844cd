import json
import os
from typing import Any

from detectron2.utils.events import JSONWriter


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
