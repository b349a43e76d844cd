"""Resumable training with Detectron2's LazyConfig, and the parts that configs/LazyConfig needs."""

import copy
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
from detectron2.config import get_cfg, instantiate
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import (
    AMPTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter, TensorboardXWriter
from omegaconf import DictConfig
from torch.optim import Optimizer
from torch.utils.data import Dataset

from ..data import ReadableOnly
from .checkpoint import Checkpointer
from .metrics import MetricsWriter
from .train_loader import TrainLoader
from .trainer import ResumableTrainer, SaveOnSignal


def build_lazy_train_loader(
    *,
    dataset: list[dict],
    mapper: Callable[[dict], dict],
    total_batch_size: int,
    num_workers: int = 0,
    aspect_ratio_grouping: bool = True,
    make_sampler: Callable[[Dataset], Any] | None = None,
) -> TrainLoader:
    """
    Build a :class:`TrainLoader`, which resumes exactly, from arguments of Detectron2's
    ``build_detection_train_loader``. Damaged images are left out with a warning.

    Args:
        dataset, mapper, total_batch_size, num_workers, aspect_ratio_grouping: see Detectron2.
        make_sampler: makes the sampler of ``dataset``; by default ``TrainingSampler``.

    Raises:
        ValueError: the batch cannot be divided among the processes.
    """
    world_size = comm.get_world_size()
    if total_batch_size % world_size:
        raise ValueError(
            f"total_batch_size = {total_batch_size} is not allowed: it must be divisible by the "
            f"number of processes, {world_size}."
        )
    return TrainLoader(
        dataset,
        make_sampler or (lambda dicts: TrainingSampler(len(cast(Any, dicts)))),
        cast(Any, ReadableOnly(mapper, skip=True)),
        batch_size=total_batch_size // world_size,
        aspect_ratio_grouping=aspect_ratio_grouping,
        num_workers=num_workers,
    )


def clip_gradients(*, optimizer: type[Optimizer], max_norm: float, **kwargs: Any) -> Optimizer:
    """
    Build an optimizer that first clips the gradient of each parameter, like
    ``SOLVER.CLIP_GRADIENTS`` of type "norm".

    Args:
        optimizer: the class of the optimizer.
        max_norm: the largest norm of a gradient.
        kwargs: arguments of ``optimizer``.
    """
    cfg = get_cfg()
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, "norm", float(max_norm)
    return maybe_add_gradient_clipping(cfg, optimizer)(**kwargs)


def evaluate(cfg: DictConfig, model: torch.nn.Module) -> dict[str, Any]:
    """
    Evaluate on ``dataloader.test``.

    Returns:
        The results of ``dataloader.evaluator``; empty without an evaluator.
    """
    if "evaluator" not in cfg.dataloader:
        return OrderedDict()
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    print_csv_format(results)
    return results


class LazyTrainer(ResumableTrainer):
    """
    A :class:`ResumableTrainer` for a LazyConfig with the fields of Detectron2's
    ``tools/lazyconfig_train_net.py``: ``model``, ``optimizer``, ``lr_multiplier``, ``dataloader``
    and ``train``. It resumes exactly if ``dataloader.train`` is a
    :func:`build_lazy_train_loader`. With any other loader the sequence of images restarts, and a
    warning says so.
    """

    def __init__(self, cfg: DictConfig) -> None:
        TrainerBase.__init__(self)
        self.cfg = cfg
        seed = cfg.train.get("seed", -1)
        self.seed = seed if seed >= 0 else comm.shared_random_seed()
        self.start_iter = 0
        self.max_iter = cfg.train.max_iter

        device = torch.device(cfg.train.device)
        model = instantiate(cfg.model).to(device)
        of_model = copy.deepcopy(cfg.optimizer)
        of_model.params.model = model
        optimizer = instantiate(of_model)
        data_loader = instantiate(cfg.dataloader.train)
        devices: dict[str, None] = {"device_ids": None} if device.type == "cpu" else {}
        model = create_ddp_model(model, **cfg.train.get("ddp", {}), **devices)
        trainer = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
        self._trainer = trainer(model, data_loader, optimizer)
        self.checkpointer = Checkpointer(model, cfg.train.output_dir, trainer=weakref.proxy(self))
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """Build the hooks of Detectron2's script, with :class:`SaveOnSignal` before evaluation."""
        train = self.cfg.train
        is_main = comm.is_main_process()
        built = [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(self.cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(self.checkpointer, **train.checkpointer)
            if is_main
            else None,
            SaveOnSignal(),
            hooks.EvalHook(train.eval_period, lambda: evaluate(self.cfg, self.model)),
            hooks.PeriodicWriter(self.build_writers(), period=train.log_period)
            if is_main
            else None,
        ]
        return [hook for hook in built if hook is not None]

    def build_writers(self) -> list[EventWriter]:
        """Build Detectron2's writers, with :class:`MetricsWriter` for metrics.json."""
        folder = self.cfg.train.output_dir
        return [
            CommonMetricPrinter(self.max_iter),
            MetricsWriter(os.path.join(folder, "metrics.json")),
            TensorboardXWriter(folder),
        ]

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint in ``train.output_dir``, or ``train.init_checkpoint``."""
        self.checkpointer.resume_or_load(self.cfg.train.init_checkpoint, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1

    def train(self) -> None:
        TrainerBase.train(self, self.start_iter, self.max_iter)
