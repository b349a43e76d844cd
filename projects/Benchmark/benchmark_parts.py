"""
The parts of PISA by themselves, beside loops over classes, objects and boxes and beside one bare
sort of the same size, which no ranking can beat.
"""

from collections.abc import Callable
from typing import NamedTuple

import loops
import torch
from timing import Timing, in_turn, peak_memory
from torch import Tensor

from pisa_d2.config import ISR
from pisa_d2.hlr import hierarchical_local_rank, nms_groups
from pisa_d2.isr import positive_weights
from pisa_d2.reweighting import carl_weights

# Loops over more samples than this take minutes.
LARGEST_LOOP = 4096


class Size(NamedTuple):
    samples: int
    classes: int
    objects: int

    def __str__(self) -> str:
        return f"{self.samples} samples, {self.classes} classes, {self.objects} objects"


# 16 images of 128 positives, and from there each number by itself.
SIZES = [
    Size(2048, 80, 160),
    *(Size(n, 80, max(1, n // 12)) for n in (64, 65_536, 1_000_000)),
    *(Size(2048, classes, 160) for classes in (1, 1203)),
    *(Size(2048, 80, 16 * objects) for objects in (1, 500)),
]
NMS_SIZES = [64, 512, 2048, 4096]


class Part(NamedTuple):
    name: str
    size: str
    samples: int
    timings: dict[str, Timing]
    peak: int


def run(device: str, rounds: int, sizes: list[Size], nms_sizes: list[int]) -> list[Part]:
    """
    The measured parts: ``ours``, as a ratio to ``sort``, and ``loops``, as a ratio to ``ours``.
    """
    parts = []
    for size in sizes:
        for name, functions in functions_of(size, device).items():
            parts.append(measure(name, str(size), size.samples, functions, rounds, device))
    for num in nms_sizes:
        functions = nms_functions(num, device)
        parts.append(
            measure("NMS groups", f"{num} boxes of an image", num, functions, rounds, device)
        )
    return parts


def measure(
    name: str, size: str, samples: int, functions: dict[str, Callable], rounds: int, device: str
) -> Part:
    if samples > LARGEST_LOOP:
        del functions["loops"]
    elif "loops" in functions:
        torch.testing.assert_close(
            functions["ours"]().cpu(), functions["loops"]().cpu(), rtol=1e-4, atol=1e-5
        )
    by_loops = functions.pop("loops", None)
    timings = in_turn(functions, "sort", rounds, device)
    if by_loops is not None:  # in fewer rounds: one takes as long as many of the others
        few = in_turn({"loops": by_loops, "ours": functions["ours"]}, "ours", 3, device)
        timings["loops"] = few["loops"]
    return Part(name, size, samples, timings, peak_memory(functions["ours"], device))


def functions_of(size: Size, device: str) -> dict[str, dict[str, Callable]]:
    generator = torch.Generator().manual_seed(0)
    ious, probs, losses = torch.rand(3, size.samples, generator=generator)
    objects = torch.randint(size.objects, (size.samples,), generator=generator)
    class_of_object = torch.randint(size.classes, (size.objects,), generator=generator)
    classes = class_of_object[objects].to(device)
    ious, probs, losses = (values.to(device) for values in (ious, probs, losses))
    objects = objects.to(device)
    isr = ISR(gamma=2.0, beta=0.0)

    def sort() -> object:
        return torch.sort(ious)

    def isr_by_loops() -> Tensor:
        ranks = loops.hierarchical_local_rank(ious, objects, classes)
        return loops.importance_weights(ranks, classes, isr.gamma, isr.beta, losses)

    return {
        "HLR": {
            "ours": lambda: hierarchical_local_rank(ious, objects, classes),
            "loops": lambda: loops.hierarchical_local_rank(ious, objects, classes),
            "sort": sort,
        },
        "ISR-P": {
            "ours": lambda: positive_weights(
                ious, objects, classes, losses, gamma=isr.gamma, beta=isr.beta
            ),
            "loops": isr_by_loops,
            "sort": sort,
        },
        "CARL": {
            "ours": lambda: (carl_weights(probs, 1.0, 0.2) * losses).sum(),
            "loops": lambda: loops.carl(probs, losses, 1.0, 0.2),
            "sort": sort,
        },
    }


def nms_functions(num: int, device: str) -> dict[str, Callable]:
    generator = torch.Generator().manual_seed(0)
    centers = 800 * torch.rand(max(1, num // 20), 2, generator=generator)
    centers = centers[torch.randint(len(centers), (num,), generator=generator)]
    sizes = 40 + 60 * torch.rand(num, 2, generator=generator)
    centers = centers + 20 * torch.rand(num, 2, generator=generator)
    boxes = torch.cat([centers - sizes / 2, centers + sizes / 2], dim=1).to(device)
    scores = torch.rand(num, generator=generator).to(device)
    return {
        "ours": lambda: nms_groups(boxes, scores, 0.5),
        "loops": lambda: loops.nms_groups(boxes, scores, 0.5),
        "sort": lambda: torch.sort(scores),
    }
