#!/usr/bin/env python3
"""Train and evaluate SSD: pisa_d2's train_net.py with SSD's keys, images and clipping."""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import pisa_d2  # isort: skip  (before detectron2: it patches 0.6)

import torch
from detectron2.config import CfgNode
from ssd import SSDMapper, add_ssd_config

from pisa_d2 import train_net


class Trainer(train_net.Trainer):
    @classmethod
    def build_train_loader(cls, cfg: CfgNode, mapper: Callable | None = None) -> Any:
        return super().build_train_loader(cfg, mapper or SSDMapper(cfg))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """
        SOLVER.CLIP_GRADIENTS.CLIP_TYPE "full_model" clips the norm of the whole gradient, as PISA
        was published; Detectron2's "norm" that of each parameter by itself.
        """
        clip = cfg.SOLVER.CLIP_GRADIENTS
        if not clip.ENABLED or clip.CLIP_TYPE != "full_model":
            return super().build_optimizer(cfg, model)
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
        optimizer = super().build_optimizer(cfg, model)

        def clip_gradients(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            groups = (group["params"] for group in optimizer.param_groups)
            params = itertools.chain.from_iterable(groups)
            torch.nn.utils.clip_grad_norm_(params, clip.CLIP_VALUE, clip.NORM_TYPE)

        optimizer.register_step_pre_hook(clip_gradients)
        return optimizer


def add_config(cfg: CfgNode) -> None:
    pisa_d2.add_pisa_config(cfg)
    add_ssd_config(cfg)


def main(args: argparse.Namespace) -> Any:
    return train_net.main(args, Trainer, add_config)


if __name__ == "__main__":
    train_net.run(main, add_config)
