"""A study: what is prepared once, and its runs, which worker processes take one by one."""

import argparse
import importlib
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_roi_heads
from torch import Tensor

from .bootstrap import Array, resamples
from .cache import Frozen, Plan, Views, digest, plan_cache, write_views
from .controls import add_head_study_config
from .detector import (
    Options,
    build_head,
    digest_of_weights,
    head_config,
    head_weights,
    is_cascade,
    load_detector,
    with_head,
    with_options,
)
from .evaluation import Evaluator, Scores, Truth, truth_of
from .hidden import check_hidden
from .pooled import pooler_of
from .report import DETECTOR, About
from .results import Row
from .strategies import Strategies
from .training import train_head

# The standard error of a standard deviation over this many resamples is 4%.
NUM_RESAMPLES = 300
# The AP that half precision may change.
SAME_AP = 0.05


def add_config(use: list[str], cfg: CfgNode) -> None:
    """Add the keys of pisa_d2, of the controls, and of the modules to ``use``, which it imports."""
    add_head_study_config(cfg)
    for words in use:
        module, _, function = words.partition(":")
        imported = importlib.import_module(module)
        if function:
            getattr(imported, function)(cfg)


@dataclass(frozen=True)
class Study:
    """
    Everything that a worker needs.

    Attributes:
        base: the config of the plain head.
        options: those of each strategy.
        folder: with the views of training and test images.
        shape: of the feature maps.
        weights: of the detector's head.
        truth: annotations of the test images.
        from_detector: whether heads start from ``weights``.
        kept: folder for checkpoints of the detector with each trained head, or None.
    """

    base: CfgNode
    options: Mapping[str, Options]
    folder: Path
    shape: dict[str, ShapeSpec]
    weights: dict[str, Tensor]
    truth: Truth
    from_detector: bool
    kept: Path | None = None

    def config(self, strategy: str) -> CfgNode:
        return with_options(self.base, self.options[strategy])

    def settings(self, strategy: str) -> str:
        """A digest of all that makes a run of this strategy, but its seed."""
        parts = {k: v for k, v in self.config(strategy).items() if k not in ("OUTPUT_DIR", "SEED")}
        return digest(self.folder.name, self.from_detector, CfgNode(parts).dump())

    def head(self, strategy: str, seed: int) -> Any:
        return build_head(
            self.base,
            self.config(strategy),
            self.shape,
            self.weights,
            seed,
            self.from_detector,
        )

    def checkpoint(self, strategy: str, seed: int) -> Path | None:
        """The file that keeps a trained head, or None."""
        return self.kept and self.kept / strategy.replace("/", "_") / f"seed{seed}.pth"

    def views(self, kind: str) -> Views:
        return Views(self.folder / kind)

    def evaluator(self) -> Evaluator:
        ids = [view.image_id for view in self.views("test")]
        return Evaluator(self.truth, ids, resamples(len(ids), NUM_RESAMPLES, seed=0))


def prepare(cfg: CfgNode, args: argparse.Namespace, strategies: Strategies) -> Study:
    """
    Cache the views, and check that every strategy can be built.

    Raises:
        ValueError: a strategy is wrong, the views do not fit, half precision changes AP, or heads
            of a cascade are to be kept.
    """
    model = load_detector(cfg)
    if args.keep and is_cascade(model.roi_heads):
        raise ValueError(
            "--keep cannot write checkpoints of a cascade: only its first stage is trained here."
        )
    base, shape = head_config(cfg, args.steps), model.backbone.output_shape()
    _, pooler = pooler_of(build_roi_heads(base, shape)) or ("", None)
    frozen = Frozen(model, cfg, pooler)
    plan = plan_cache(frozen, cfg, args.max_gb, args.half)
    parts = [cfg[node].dump() for node in ("MODEL", "INPUT", "DATASETS", "DATALOADER")]
    sizes = len(plan.train), len(plan.test)
    key = digest(digest_of_weights(cfg), parts, sizes, args.half, plan.pooled, frozen.amp)
    folder = args.output / "cache" / key
    study = Study(
        base=base,
        options=strategies.options,
        folder=folder,
        shape=shape,
        weights=head_weights(model.roi_heads),
        truth=truth_of(cfg.DATASETS.TEST[0], cfg.MODEL.IGNORED_REGIONS.ENABLED),
        from_detector=args.from_detector,
        kept=args.keep,
    )
    check_strategies(study)
    print(f"Caching {plan.text()}, in '{folder}'.")
    write_views(frozen, plan.train, folder / "train", True, plan.half, plan.pooled)
    write_views(frozen, plan.test, folder / "test", False, plan.half, plan.pooled)
    if args.half:
        check_half(study, frozen, plan)
    return study


def check_strategies(study: Study) -> None:
    """
    Raises:
        ValueError: the head of a strategy cannot be built; names it.
    """
    for name in study.options:
        try:
            check_hidden(study.config(name))
            study.head(name, seed=0)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The strategy {name!r} cannot be built: {error}") from error


def check_half(study: Study, frozen: Frozen, plan: Plan) -> None:
    """
    Raises:
        ValueError: the AP of the detector's own head differs by more than ``SAME_AP``.
    """
    full = [frozen.view(record, training=False) for record in plan.test]
    evaluator, head = study.evaluator(), detector_head(study)
    of_full, of_half = (
        evaluator(head, views).metrics["AP"] for views in (full, study.views("test"))
    )
    if abs(of_full - of_half) > SAME_AP:
        raise ValueError(
            f"Half precision changes the AP of the detector from {of_full:.2f} to {of_half:.2f}: "
            "leave out --half, and give --max-gb more room."
        )
    print(f"Half precision keeps the detector's AP: {of_full:.3f}, and {of_half:.3f} with it.")


def detector_head(study: Study) -> Any:
    """The detector's own head, as it was trained."""
    base = study.base.clone()
    return build_head(base, base, study.shape, study.weights, seed=0, from_detector=True)


def score_detector(study: Study) -> tuple[Row, Array]:
    scores = study.evaluator()(detector_head(study), study.views("test"))
    return Row.of(DETECTOR, 0, scores, 0.0, study.folder.name), scores.resampled


class Worker:
    """Takes one run after the other, in a process of its own."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.evaluator = study.evaluator()
        self.train, self.test = study.views("train"), study.views("test")
        self.detector = load_detector(study.base).state_dict() if study.kept else {}

    def __call__(self, strategy: str, seed: int) -> tuple[Row, Array]:
        begin = time.perf_counter()
        head = train_head(
            self.study.config(strategy), self.study.head(strategy, seed), self.train, seed
        )
        seconds = time.perf_counter() - begin
        scores: Scores = self.evaluator(head, self.test)
        settings = self.study.settings(strategy)
        if path := self.study.checkpoint(strategy, seed):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"model": with_head(self.detector, head)}, path)
        return Row.of(strategy, seed, scores, seconds, settings), scores.resampled


_worker: Worker | None = None


def start_worker(study: Study, threads: int, use: list[str]) -> None:
    """
    Args:
        use: see :func:`add_config`.
    """
    global _worker
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    torch.set_num_threads(threads)
    add_config(use, get_cfg())
    _worker = Worker(study)


def run(strategy: str, seed: int) -> tuple[Row, Array]:
    """
    A run of the study that this process was started with.

    Raises:
        FloatingPointError: its loss is not finite.
    """
    assert _worker is not None
    return _worker(strategy, seed)


def about(study: Study, cfg: CfgNode, args: argparse.Namespace, code: str) -> About:
    return About(
        config=Path(args.config_file).name,
        dataset=cfg.DATASETS.TEST[0],
        train_images=len(study.views("train")),
        test_images=len(study.views("test")),
        steps=args.steps,
        start="the detector's weights" if args.from_detector else "new weights",
        code=code,
    )
