#!/usr/bin/env python3
"""
Measure the cost of each part of pisa_d2, and how it grows: tables (markdown and CSV) and a plot.

Everything is measured in turn in one run. Read the ratios: times depend on the machine and its
load.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_counts
import benchmark_data
import benchmark_losses
import benchmark_parts
import benchmark_steps
import detectron2
import report
import torch
import yaml
from benchmark_losses import Shape
from benchmark_parts import Part
from report import Row

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parents[1] / "configs"
DIGITS = CONFIGS / "Digits/pisa_faster_rcnn_R_18_FPN.yaml"


class Model(NamedTuple):
    """A model whose training steps are measured, and the size of its batch."""

    name: str
    config: Path
    images: int
    size: tuple[int, int]
    samples: int  # per image, for the losses of the box predictor

    @property
    def size_name(self) -> str:
        return f"{self.name}, {self.images} x {self.size[0]} x {self.size[1]}"


ON_CPU = [
    Model("Faster R-CNN R18-FPN", DIGITS, 4, (240, 320), 128),
    Model("RetinaNet R18-FPN", CONFIGS / "BCCD/pisa_retinanet_R_18_FPN.yaml", 4, (240, 320), 128),
]
FASTER_RCNN = CONFIGS / "COCO-Detection/pisa_faster_rcnn_R_50_FPN_1x.yaml"
RETINANET = CONFIGS / "COCO-Detection/pisa_retinanet_R_50_FPN_1x.yaml"
FULL_SIZE = [
    Model("Faster R-CNN R50-FPN", FASTER_RCNN, 2, (800, 1333), 512),
    Model("Faster R-CNN R50-FPN", FASTER_RCNN, 16, (800, 1333), 512),
    Model("RetinaNet R50-FPN", RETINANET, 2, (800, 1333), 512),
    Model("RetinaNet R50-FPN", RETINANET, 16, (800, 1333), 512),
]


def measure_parts(device: str, rounds: int) -> tuple[list[Row], list[Part]]:
    parts = benchmark_parts.run(device, rounds, benchmark_parts.SIZES, benchmark_parts.NMS_SIZES)
    rows = []
    for part in parts:
        base = {"ours": "sort", "loops": "ours", "sort": "sort"}
        rows += [
            Row(
                section="parts",
                what=f"{part.name}, {name}",
                size=part.size,
                seconds=timing.median,
                base=base[name],
                ratio=timing.ratio,
                peak_bytes=part.peak if name == "ours" else None,
            )
            for name, timing in part.timings.items()
        ]
    return rows, parts


def measure_losses(model: Model, classes: int, device: str, rounds: int) -> list[Row]:
    shape = Shape(model.images, model.samples, 10, classes)
    timings = benchmark_losses.run(shape, rounds, device)
    return [
        Row(
            section="losses",
            what=name,
            size=model.size_name,
            seconds=timing.median,
            base="Detectron2",
            ratio=timing.ratio,
        )
        for name, timing in timings.items()
    ]


def measure_steps(
    model: Model, classes: int, device: str, rounds: int
) -> tuple[list[Row], dict[str, dict[str, float]]]:
    cfg = benchmark_steps.setup(str(model.config), [], device)
    batch = benchmark_steps.make_batch(classes, model.images, model.size, objects=10)
    steps, parts = benchmark_steps.run(cfg, batch, rounds, device)
    rows = [
        Row(
            section="steps",
            what=step.name,
            size=model.size_name,
            seconds=step.timing.median,
            base=benchmark_steps.BASE,
            ratio=step.timing.ratio,
            peak_bytes=step.peak,
            synchronisations=step.synchronisations,
        )
        for step in steps
    ]
    return rows, parts


def measure_data(device: str) -> dict[str, float]:
    """Measure images per second of the digits; empty if they are missing and cannot be made."""
    cfg = benchmark_steps.setup(str(DIGITS), [], device)
    try:
        speeds = {
            f"loading for training, {n} workers": benchmark_data.loading(cfg, n, 200)
            for n in (0, 2)
        }
    except ImportError as error:
        print(f"Left out: {error}", file=sys.stderr)
        return {}
    detecting, evaluating = benchmark_data.evaluating(cfg)
    return {**speeds, "detecting": detecting, "COCO evaluation alone": evaluating}


def check(rows: list[Row], device: str) -> list[str]:
    """Return a line for each value that exceeds its bound in bounds.yaml."""
    bounds = yaml.safe_load((HERE / "bounds.yaml").read_text())
    failures = []

    def hold(name: str, value: float, bound: float, lowest: bool = False) -> None:
        if value < bound if lowest else value > bound:
            failures.append(f"{name}: {value:.3g}, bound {bound:g}")

    million = benchmark_parts.SIZES[3]
    typical = benchmark_parts.SIZES[0]
    for row in rows:
        if (row.what, row.size) == ("HLR, ours", str(million)):
            hold("HLR by a bare sort", row.ratio, bounds["hlr_to_sort"])
        if (row.what, row.size) == ("ISR-P, loops", str(typical)):
            bound = bounds["isr_p_over_loops"][device]
            hold("loops by ISR-P", row.ratio, bound, lowest=True)
        if row.section == "steps" and row.what in benchmark_steps.NEED_PREDICTIONS:
            bound = bounds["sampling_to_random"][device]
            hold(f"{row.what} by random sampling, {row.size}", row.ratio, bound)
    for size, share in report.share_of_step(rows).items():
        bound = bounds["pisa_share_of_step"][device]
        hold(f"PISA's losses as a share of a step, {size}", share, bound)
    for size, waits in added_synchronisations(rows).items():
        hold(f"synchronisations, {size}", waits, bounds["added_synchronisations"])
    return failures


def added_synchronisations(rows: list[Row]) -> dict[str, int]:
    """Count the extra waits for the GPU of a step with PISA, for each model."""
    waits = {
        (row.size, row.what): row.synchronisations
        for row in rows
        if row.section == "steps" and row.synchronisations is not None
    }
    return {
        size: of_pisa - waits[size, "Detectron2"]
        for (size, what), of_pisa in waits.items()
        if what == "PISA"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split()))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20, help="%(default)s by default")
    parser.add_argument(
        "--full-size", action="store_true", help="also measure a model of full size on a CPU"
    )
    parser.add_argument("--check", action="store_true", help="compare the ratios with bounds.yaml")
    parser.add_argument("--output", type=Path, default=Path("output/benchmark"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    on_gpu = args.device == "cuda"
    models = FULL_SIZE if on_gpu else [*ON_CPU, *FULL_SIZE[: int(args.full_size)]]
    print("Parts ...", file=sys.stderr)
    rows, measured_parts = measure_parts(args.device, args.rounds)
    parts: dict[str, Any] = {}
    # Written after each model, so that an interrupted run keeps what it has measured.
    table = args.output / "benchmark.csv"
    report.write_csv(rows, table)
    for model in models:
        print(f"{model.name}, {model.images} images ...", file=sys.stderr)
        cfg = benchmark_steps.setup(str(model.config), [], args.device)
        two_stage = cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
        node = cfg.MODEL.ROI_HEADS if two_stage else cfg.MODEL.RETINANET
        if two_stage:
            rows += measure_losses(model, node.NUM_CLASSES, args.device, args.rounds)
        of_model, of_sampling = measure_steps(model, node.NUM_CLASSES, args.device, args.rounds)
        rows += of_model
        parts[model.size_name] = of_sampling
        report.write_csv(rows, table)
    print("Operators and waits ...", file=sys.stderr)
    counts = benchmark_counts.run()
    print("Data ...", file=sys.stderr)
    speeds = measure_data(args.device)

    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, Detectron2 {detectron2.__version__}"
    tables = [report.markdown(rows, parts, speeds), *benchmark_counts.markdown(counts)]
    text = "\n".join([f"{where}, {versions}, median of {args.rounds}\n", *tables, ""])
    (args.output / "benchmark.md").write_text(text)
    report.plot(measured_parts, rows, args.output / "benchmark.png")
    print(text)
    print(args.output)
    if args.check and (failures := check(rows, args.device) + benchmark_counts.check(counts)):
        sys.exit("\n".join(["Beyond their bounds:", *failures]))


if __name__ == "__main__":
    main()
