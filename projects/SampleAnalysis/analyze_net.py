#!/usr/bin/env python3
"""
Draw a report on a two-stage detector: which samples each strategy trains on, what their ranks are
worth, and, with a second checkpoint, what Prime Sample Attention changed.
"""

import argparse
import logging
import sys
from pathlib import Path

import pisa_d2  # noqa: F401  # isort: skip  (before Detectron2, which it readies)

import torch
from coco_scores import Evaluation, class_ids, evaluate, ground_truth
from collect import Observer
from dataset_detections import Detections
from detection_figures import plot_average_precision, plot_detections
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from findings import Findings
from html_report import Plot, write_report
from loading import (
    STRATEGIES,
    dataset_of,
    labelled_test_images,
    rgb_image,
    setup,
    with_samplers,
)
from mistakes import describe_images, most_different
from resampling import bootstrap
from sample_figures import plot_densities, plot_negative_ious, plot_two_steps
from score_figures import plot_ranks, plot_score_by_iou, plot_what_if
from torch import nn
from tqdm import tqdm
from what_if import spend

from pisa_d2.roi_heads import PISAMixin
from pisa_d2.samplers import BatchSampler, build_batch_sampler

DRAWN = ("random", "hard", "prime")
NUM_PICTURES = 3


def make_cfg(config_file: str, options: list[str]) -> CfgNode:
    """Of the boxes alone, with samplers that ask the box head for predictions."""
    cfg = setup(config_file, options)
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = False
    # The report shows positives and negatives apart.
    cfg.MODEL.ROI_HEADS.HARD_SAMPLER.JOINT = False
    return with_samplers(cfg, *STRATEGIES["hard"])


def load(cfg: CfgNode, weights: str) -> nn.Module:
    """
    Raises:
        ValueError: the model is no two-stage detector of this package.
    """
    model = build_model(cfg).eval()
    if not isinstance(getattr(model, "roi_heads", None), PISAMixin):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r} with MODEL.ROI_HEADS.NAME "
            f"{cfg.MODEL.ROI_HEADS.NAME!r} has no ROI heads with PISAMixin, whose samples could be "
            "shown. Name the config of a two-stage detector."
        )
    DetectionCheckpointer(model).load(weights)
    return model


def samplers_of(cfg: CfgNode) -> dict[str, BatchSampler]:
    return {name: build_batch_sampler(with_samplers(cfg, *STRATEGIES[name])) for name in DRAWN}


def load_records(dataset: str, num_images: int | None) -> list[dict]:
    """All images of the data set, or that many, evenly from the whole of it."""
    records = get_detection_dataset_dicts([dataset], filter_empty=False)
    for record in records:
        for annotation in record.get("annotations", []):
            # Of boxes alone; outlines would be most of the memory.
            annotation.pop("segmentation", None)
    num = min(num_images or len(records), len(records))
    return [records[(2 * i + 1) * len(records) // (2 * num)] for i in range(num)]


def easiest_to_read(records: list[dict]) -> int | str | None:
    """
    The image whose smallest object is the largest, of those with 2 to 5 objects; without any, that
    with the fewest objects. None where no image has an object.
    """
    found: list[tuple[bool, float, int | str]] = []
    for record in records:
        items = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS) for a in items]
        few = 2 <= len(boxes) <= 5
        if boxes:
            area = min(width * height for _, _, width, height in boxes)
            size = area / (record["width"] * record["height"])
            found.append((few, size if few else -len(boxes), record["image_id"]))
    return max(found, key=lambda image: image[:2])[2] if found else None


def observe(cfg: CfgNode, model: nn.Module, records: list[dict], first: bool) -> Findings:
    """One pass; ``first`` for the checkpoint that figures 1 to 4 are about."""
    isr_n = cfg.MODEL.PISA.ISR_N
    observer = Observer(
        *(model, samplers_of(cfg) if first else {}),
        *(isr_n.SCORE_THRESH, isr_n.NMS_THRESH),
        ranks_of=easiest_to_read(records) if first else None,
        with_scored_boxes=first,
    )
    mapper = labelled_test_images(cfg)
    return observer.run(mapper(r) for r in tqdm(records, desc="images", unit="image"))


def plot_all(
    cfg: CfgNode, dataset: str, records: list[dict], runs: dict[str, str], num_draws: int, seed: int
) -> tuple[list[Plot], list[str]]:
    """
    Args:
        runs: a checkpoint for each of one or two names.

    Returns:
        The figures, and what is left out of them.
    """
    metadata = MetadataCatalog.get(dataset)
    truth = ground_truth(dataset)
    ids = class_ids(dataset, truth)
    image_ids = sorted({record["image_id"] for record in records})
    names, findings = list(runs), []
    for name, weights in runs.items():
        torch.manual_seed(seed)
        model = load(cfg, weights)
        findings.append(observe(cfg, model, records, first=name == names[0]))
        if name == names[0]:
            predictor = model.roi_heads.box_branch.predictor

    found = findings[0]
    highest = cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0]
    plots = [plot_negative_ious(found.samples, highest), plot_densities(found.samples, highest)]
    left_out = []
    if found.ranks is not None and len(found.ranks.ious):
        image = rgb_image(found.ranks.inputs, cfg)
        plots.append(plot_two_steps(found.ranks, image, metadata.thing_classes))
    else:
        left_out.append("Figure 3, the ranks of an image's positives: no image has an object.")

    def evaluate_all_sizes(detections: Detections) -> Evaluation:
        return evaluate(truth, detections, image_ids, ids, with_details=False)

    outcomes = spend(found.scored_boxes, predictor, evaluate_all_sizes)
    if len(outcomes) > 1:
        plots.append(plot_what_if(outcomes))
    else:
        left_out.append("Figure 4, what a better classifier would buy: there is no positive.")
    scores = {name: f.scores for name, f in zip(names, findings, strict=True)}
    plots += [plot_ranks(scores), plot_score_by_iou(scores)]
    if len(runs) == 1:
        left_out.append(
            "Figures 7 and 8, and the differences in 5 and 6: they need a second checkpoint "
            "(--compare-with)."
        )
        return plots, left_out

    evaluations = [evaluate(truth, f.detections, image_ids, ids) for f in findings]
    images = [describe_images(evaluation) for evaluation in evaluations]
    pairs = most_different(*images, NUM_PICTURES)
    paths = {record["image_id"]: record["file_name"] for record in records}
    pictures = [read_image(paths[pair[0].image_id], "RGB") for pair in pairs]
    plots.append(plot_detections(pairs, pictures, names))
    draws = bootstrap(evaluations, num_draws, seed)
    plots.append(plot_average_precision(evaluations, draws, images, names, metadata.thing_classes))
    return plots, left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split()))
    parser.add_argument("--config-file", required=True, help="of a two-stage detector")
    parser.add_argument(
        "--compare-with",
        metavar="CHECKPOINT",
        help="of the same model, trained with PISA while MODEL.WEIGHTS was trained without",
    )
    parser.add_argument(
        "--names", nargs=2, default=["plain", "PISA"], help="of the two (plain PISA)"
    )
    parser.add_argument("--dataset", help="registered name (the first of DATASETS.TEST)")
    parser.add_argument("--num-images", type=int, help="this many, evenly from the data set (all)")
    parser.add_argument("--bootstrap", type=int, default=200, help="draws (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of samplers and bootstrap")
    parser.add_argument("--output", type=Path, help="folder of the report (OUTPUT_DIR/analysis)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args()
    for name in ("num_images", "bootstrap"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if args.names[0] == args.names[1]:
        parser.error("--names must be two different ones")

    cfg = make_cfg(args.config_file, args.opts)
    dataset = dataset_of(cfg, args.dataset)
    runs = {args.names[0] if args.compare_with else "detector": cfg.MODEL.WEIGHTS}
    if args.compare_with:
        runs[args.names[1]] = args.compare_with
    logging.getLogger("detectron2").setLevel(logging.WARNING)
    records = load_records(dataset, args.num_images)
    try:
        plots, left_out = plot_all(cfg, dataset, records, runs, args.bootstrap, args.seed)
    except ValueError as error:
        sys.exit(f"{parser.prog}: {error}")
    facts = [
        ("config", args.config_file),
        *((f"checkpoint: {name}", weights) for name, weights in runs.items()),
        ("data set", f"{dataset}, {len(records)} images"),
        ("figures 1 to 4 are of", next(iter(runs))),
    ]
    if "Cascade" in cfg.MODEL.ROI_HEADS.NAME:
        facts.append(("cascade", "figures 1 to 6 are of its first stage, 7 and 8 of the whole"))
    output = args.output or Path(cfg.OUTPUT_DIR) / "analysis"
    title = f"Samples of {Path(args.config_file).stem} on {dataset}"
    print(write_report(output, title, facts, plots, left_out))


if __name__ == "__main__":
    main()
