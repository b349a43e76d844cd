"""Trains a box head on cached views."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import ROIHeads
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage
from torch.optim.swa_utils import AveragedModel

from pisa_d2.engine.seeding import derive_seed, seeded

from .cache import View, run_head
from .hidden import HiddenLabels

# The weights of this last part of the steps are averaged.
AVERAGED_PART = 0.2


def batches(num_images: int, size: int, seed: int) -> Iterator[list[int]]:
    """Indices of the images of each step, epoch after epoch: a seed gives one sequence to all."""
    generator = np.random.default_rng(derive_seed(seed, 1))
    rest: list[int] = []
    while True:
        while len(rest) < size:
            rest += generator.permutation(num_images).tolist()
        yield rest[:size]
        rest = rest[size:]


def train_head(cfg: CfgNode, head: ROIHeads, views: Sequence[View], seed: int) -> ROIHeads:
    """
    Train ``head`` in place, with the solver of ``cfg`` for its ``MAX_ITER`` steps. What samplers
    draw in a step depends on the seed and the step alone.

    Returns:
        A head with the mean of the weights after each of the last fifth of the steps.

    Raises:
        FloatingPointError: the loss is not finite; names the step.
    """
    num_steps = cfg.SOLVER.MAX_ITER
    first_averaged = num_steps - max(1, round(AVERAGED_PART * num_steps))
    device = torch.device(cfg.MODEL.DEVICE)
    amp = cfg.SOLVER.AMP.ENABLED and device.type == "cuda"
    optimizer = build_optimizer(cfg, head)
    scheduler = build_lr_scheduler(cfg, optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=amp)
    averaged = AveragedModel(head, use_buffers=True)
    head.train()
    if cfg.HEAD_STUDY.HIDDEN_LABELS:
        views = HiddenLabels(views, cfg, seed)
    with EventStorage() as storage:
        of_steps = batches(len(views), cfg.SOLVER.IMS_PER_BATCH, seed)
        for step, indices in zip(range(num_steps), of_steps, strict=False):
            batch = [views[i] for i in indices]
            drawn_by_step = seeded(seed, 2, step, device=device)
            with drawn_by_step, torch.autocast(device.type, enabled=amp):
                _, losses = run_head(head, batch, device)
            loss = torch.stack(list(losses.values())).sum()
            if not torch.isfinite(loss):
                values = {name: value.item() for name, value in losses.items()}
                raise FloatingPointError(f"The loss is not finite in step {step}: {values}.")
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            storage.step()
            if step >= first_averaged:
                averaged.update_parameters(head)
    return averaged.module
