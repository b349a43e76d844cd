"""How the benchmarks measure: in turn, in one run, after a warm-up."""

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm


class Timing(NamedTuple):
    """Seconds of one call: median and quartiles; and the median of the ratio to the base."""

    low: float
    median: float
    high: float
    ratio: float


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(
    functions: Mapping[str, Callable[[], object]], base: str, rounds: int, device: str
) -> dict[str, Timing]:
    """
    Call all functions in each round, in a different order each time, so that a temporary slowdown
    of the machine affects all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in tqdm(range(rounds + 1), desc="rounds", leave=False, delay=1):
        for name in random.Random(i).sample(list(functions), len(functions)):
            start = now(device)
            functions[name]()
            if i > 0:  # the first warms up
                seconds[name].append(now(device) - start)
    timings = {}
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        # Ratios within a round: a slowdown of the round cancels.
        ratios = [value / other for value, other in zip(values, seconds[base], strict=True)]
        timings[name] = Timing(low, median, high, statistics.median(ratios))
    return timings


def peak_memory(function: Callable[[], object], device: str) -> int:
    """Return the peak of the bytes that a call allocates."""
    function()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        recorded.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    allocations: list[dict[str, Any]] = [e for e in events if e.get("name") == "[memory]"]
    if not allocations:
        return 0
    allocations.sort(key=lambda event: event["ts"])
    first = allocations[0]["args"]
    before = first["Total Allocated"] - first["Bytes"]
    return max(event["args"]["Total Allocated"] for event in allocations) - before


@contextmanager
def _silent() -> Iterator[None]:
    """Silence what torch's profiler writes to the error stream past Python."""
    stream = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stream, 2)
        os.close(stream)


def count_synchronisations(function: Callable[[], object]) -> int:
    """Count the copies from the GPU to the host, and other waits for it, in one call."""
    names = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    return _count_calls(function, names)


def count_launches(function: Callable[[], object]) -> int:
    """Count the kernels that the host launches in one call."""
    return _count_calls(function, ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel"))


def _count_calls(function: Callable[[], object], names: tuple[str, ...]) -> int:
    # The profiler waits for the GPU at its own end.
    of_profiler = _count_all_calls(lambda: None, names)
    return _count_all_calls(function, names) - of_profiler


def _count_all_calls(function: Callable[[], object], names: tuple[str, ...]) -> int:
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with _silent(), profile(activities=activities) as recorded:
        function()
    return sum(event.count for event in recorded.key_averages() if event.key in names)
