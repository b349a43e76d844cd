"""Images per second that are loaded for training, detected and evaluated."""

import contextlib
import io
import tempfile
import time
from itertools import islice
from typing import Any

import pisa_d2  # noqa: F401  # isort: skip  (before detectron2: it patches 0.6)

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model

from pisa_d2.engine import build_train_loader
from pisa_d2.evaluation import CheckedCOCOEvaluator


def loading(cfg: CfgNode, num_workers: int, num_images: int) -> float:
    """Measure images per second of the training loader: decoded, augmented and batched."""
    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = num_workers
    loader: Any = build_train_loader(cfg)
    batches = iter(loader)
    next(batches)  # workers start
    num_batches = max(1, num_images // cfg.SOLVER.IMS_PER_BATCH)
    start = time.perf_counter()
    for _ in islice(batches, num_batches):
        pass
    seconds = time.perf_counter() - start
    loader.close()
    return num_batches * cfg.SOLVER.IMS_PER_BATCH / seconds


def evaluating(cfg: CfgNode) -> tuple[float, float]:
    """Measure images per second of an untrained detector, and of the COCO evaluator alone."""
    model = build_model(cfg).eval()
    name = cfg.DATASETS.TEST[0]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        evaluator = CheckedCOCOEvaluator(
            name, tasks=("bbox",), distributed=False, output_dir=folder
        )
        own_evaluate, seconds = evaluator.evaluate, []

        def evaluate() -> dict:
            start = time.perf_counter()
            results = own_evaluate()
            seconds.append(time.perf_counter() - start)
            return results

        evaluator.evaluate = evaluate
        loader = build_detection_test_loader(cfg, name)
        start = time.perf_counter()
        inference_on_dataset(model, loader, evaluator)
        total = time.perf_counter() - start
    num_images = len(loader.dataset)
    return num_images / (total - seconds[0]), num_images / seconds[0]
