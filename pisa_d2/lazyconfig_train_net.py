"""
Train and evaluate detectors with Detectron2's LazyConfig, like its own
``tools/lazyconfig_train_net.py``::

    python -m pisa_d2.lazyconfig_train_net \\
        --config-file LazyConfig/COCO/pisa_mask_rcnn_R_50_FPN_1x.py train.output_dir=output/mine

It also runs under torchrun, saves a checkpoint and ends on SIGTERM or Ctrl-C, and resumes exactly,
see :class:`pisa_d2.engine.LazyTrainer`. Unlike ``pisa_d2.train_net``, it does not check datasets
before training.
"""

import argparse
import logging
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf

from .data import register_builtin_datasets, register_datasets
from .engine import Checkpointer, LazyTrainer, launch
from .engine.lazy import evaluate
from .engine.run_folder import check_room, occupied
from .model_zoo import find_config


def load_config(args: argparse.Namespace) -> DictConfig:
    """Load the config that the command line names, by its path or its name in this package."""
    args.config_file = find_config(args.config_file)
    return LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)


def setup(args: argparse.Namespace) -> DictConfig:
    """Load the config, register its datasets, and set up the output folder and the log."""
    cfg = load_config(args)
    no_gpu = str(cfg.train.device).startswith("cuda") and not torch.cuda.is_available()
    if no_gpu:
        cfg.train.device = "cpu"
    register_builtin_datasets()
    entries: Any = OmegaConf.to_container(cfg.dataloader.get("register") or OmegaConf.create([]))
    register_datasets(entries)
    default_setup(cfg, args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="pisa_d2")
    if no_gpu:
        logging.getLogger("pisa_d2").warning("No GPU was found: train.device is set to cpu.")
    return cfg


def main(args: argparse.Namespace) -> Any:
    """Train or evaluate, as the command line ``args`` say."""
    if args.eval_only:
        cfg = setup(args)
        model = instantiate(cfg.model).to(torch.device(cfg.train.device))
        Checkpointer(model, cfg.train.output_dir).resume_or_load(
            cfg.train.init_checkpoint, resume=args.resume, whole=True
        )
        return evaluate(cfg, model)
    with occupied(load_config(args).train.output_dir):
        cfg = setup(args)
        trainer = LazyTrainer(cfg)
        if comm.is_main_process():
            check_room(cfg.train.output_dir, trainer.model)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()


def run() -> None:
    """Call :func:`main` on each of the processes that the command line asks for."""
    args = default_argument_parser().parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
        device=load_config(args).train.device,
    )


if __name__ == "__main__":
    run()
