"""The strategies of a study, and what is compared: a yaml file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Options = dict[str, Any]

_KEYS = {"strategies", "comparisons", "also"}


class Comparison(NamedTuple):
    strategy: str
    baseline: str


class Strategies(NamedTuple):
    """
    Attributes:
        options: config keys and values, by the name of a strategy.
        comparisons: the family that was settled beforehand, in the order of its tests.
        also: comparisons that are described and not tested.
    """

    options: dict[str, Options]
    comparisons: list[Comparison]
    also: list[Comparison]

    def schedule(self, strategy: str) -> Options:
        """Solver keys of a strategy: runs of different schedules are not paired."""
        options = self.options[strategy]
        return {key: value for key, value in options.items() if key.startswith("SOLVER.")}


def read_strategies(path: Path) -> Strategies:
    """
    Raises:
        ValueError: the file is not as the README says; names what is wrong.
    """
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict) or not isinstance(content.get("strategies"), dict):
        raise ValueError(f"'{path}' has no mapping 'strategies' of a name to config keys.")
    # A key that begins with a dot holds parts for YAML's anchors.
    if unknown := {key for key in content if not key.startswith(".")} - _KEYS:
        raise ValueError(f"'{path}': unknown {sorted(unknown)}; known are {sorted(_KEYS)}.")
    options = {name: dict(keys or {}) for name, keys in content["strategies"].items()}
    if len(options) < 2:
        raise ValueError(f"'{path}' needs two strategies or more, to compare them.")

    def pairs(key: str, otherwise: Sequence[Sequence[str]]) -> list[Comparison]:
        found = content.get(key, otherwise)
        for pair in found:
            if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= options.keys():
                raise ValueError(
                    f"'{path}', {key}: {pair} must be two different names of {list(options)}."
                )
        return [Comparison(*pair) for pair in found]

    first, *others = options
    return Strategies(
        options,
        pairs("comparisons", [(name, first) for name in others]),
        pairs("also", []),
    )
