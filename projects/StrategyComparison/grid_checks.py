"""Checks of a grid before anything is trained."""

import difflib
from collections.abc import Iterable
from typing import Any

REQUIRED = ("seeds", "baseline", "datasets", "strategies")
OF_GRID = (*REQUIRED, "parts", "tables")
OF_STRATEGY = ("config", "script", "options", "datasets", "seeds", "against", "also")


def check_grid(grid: Any) -> None:
    """
    Raises:
        ValueError: a key is unknown or missing, or a name is none of the grid's; with where it is.
    """
    if not isinstance(grid, dict):
        raise ValueError(f"a grid is a mapping with the keys {', '.join(REQUIRED)}")
    _check_names("the grid", "key", grid, OF_GRID)
    if missing := [key for key in REQUIRED if not grid.get(key)]:
        raise ValueError(f"the grid needs the key {missing[0]!r}")
    for key in ("datasets", "strategies"):
        if not isinstance(grid[key], dict):
            raise ValueError(f"{key} must be a mapping by name, not {grid[key]!r}")
    datasets, strategies = grid["datasets"], grid["strategies"]
    _check_seeds("seeds of the grid", grid["seeds"], datasets)
    _check_names("baseline", "strategy", [grid["baseline"]], strategies)
    for name, strategy in strategies.items():
        where = f"strategy {name!r}"
        if not isinstance(strategy, dict) or "config" not in strategy:
            raise ValueError(f"{where} needs the key 'config'")
        _check_names(where, "key", strategy, OF_STRATEGY)
        _check_names(f"datasets of {where}", "dataset", strategy.get("datasets", ()), datasets)
        for key in ("against", "also"):
            _check_names(f"{key} of {where}", "strategy", strategy.get(key, ()), strategies)
        if both := set(strategy.get("against", ())).intersection(strategy.get("also", ())):
            raise ValueError(f"{where}: {both.pop()!r} is in both 'against' and 'also'")
        if "seeds" in strategy:
            own: Any = strategy.get("datasets", datasets)
            _check_seeds(f"seeds of {where}", strategy["seeds"], own)
    for title, rows in (grid.get("tables") or {}).items():
        for row in rows.values():
            _check_names(f"table {title!r}", "strategy", row.values(), strategies)


def _check_names(where: str, kind: str, found: Iterable[Any], known: Iterable[str]) -> None:
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(str(name), [str(x) for x in known], n=1)
            hint = (
                f"Do you mean {near[0]!r}?" if near else f"There are {', '.join(map(str, known))}."
            )
            raise ValueError(f"{where}: unknown {kind} {name!r}. {hint}")


def _check_seeds(where: str, seeds: Any, datasets: Iterable[str]) -> None:
    if isinstance(seeds, dict):
        for name in datasets:
            if name not in seeds:
                raise ValueError(f"{where}: dataset {name!r} has none")
    for some in seeds.values() if isinstance(seeds, dict) else [seeds]:
        if not isinstance(some, list) or not all(type(seed) is int for seed in some):
            raise ValueError(f"{where}: {some!r} is not a list of integers")
