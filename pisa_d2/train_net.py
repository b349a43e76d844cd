"""
Train and evaluate detectors with pisa_d2.

This is Detectron2's standard training script, for every dataset that Detectron2 can evaluate, with
the config keys of pisa_d2. It also runs under torchrun, and an interrupted run that is resumed ends
with the same weights: see docs/distributed.md.
"""

import argparse
import logging
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.engine import default_argument_parser, default_setup, hooks
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
    verify_results,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from .config import add_pisa_config, ignored_ioa_thresh, read_config
from .data import ReadableOnly, register_from_config
from .data.classes import check_same_classes, take_num_classes
from .detections import DetectionsWriter
from .engine import Checkpointer, ResumableTrainer, launch
from .engine.run_folder import EVALUATION, check_room, check_run, evaluation_config, occupied
from .engine.train_loader import outlive_signals
from .evaluation import CheckedCOCOEvaluator
from .model_zoo import find_config
from .preflight import check_config, check_data

# Raised by Detectron2 0.6's anchors and pooler; users cannot act on it.
warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)
# Raised by Detectron2's distributed model, in both versions.
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)

# Called with the dataset, the folder for results, and whether to ignore regions.
EVALUATORS: dict[str, Callable[[str, str, bool], list]] = {
    "coco": lambda name, folder, ignores: [
        CheckedCOCOEvaluator(name, output_dir=folder, ignored_regions=ignores)
    ],
    "coco_panoptic_seg": lambda name, folder, ignores: [
        SemSegEvaluator(name, output_dir=folder),
        CheckedCOCOEvaluator(name, output_dir=folder, ignored_regions=ignores),
        COCOPanopticEvaluator(name, folder),
    ],
    "sem_seg": lambda name, folder, _: [SemSegEvaluator(name, output_dir=folder)],
    "cityscapes_instance": lambda name, *_: [CityscapesInstanceEvaluator(name)],
    "cityscapes_sem_seg": lambda name, *_: [CityscapesSemSegEvaluator(name)],
    "pascal_voc": lambda name, folder, _: [
        PascalVOCDetectionEvaluator(name),
        DetectionsWriter(folder),
    ],
    "lvis": lambda name, folder, _: [LVISEvaluator(name, output_dir=folder)],
}


class Trainer(ResumableTrainer):
    """A trainer that skips images that cannot be decoded in training, and fails in evaluation."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, mapper: Callable | None = None) -> Any:
        mapper = ReadableOnly(mapper or DatasetMapper(cfg, is_train=True), skip=True)
        return super().build_train_loader(cfg, mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        mapper = ReadableOnly(DatasetMapper(cfg, is_train=False), skip=False)
        loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        loader.worker_init_fn = outlive_signals
        return loader

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluators:
        """Build the evaluators for the ``evaluator_type`` in the metadata of the dataset."""
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
        if kind not in EVALUATORS:
            raise NotImplementedError(
                f"No evaluator for {dataset_name!r} of type {kind!r}; known: {list(EVALUATORS)}."
            )
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        ignores = ignored_ioa_thresh(cfg) is not None
        return DatasetEvaluators(EVALUATORS[kind](dataset_name, folder, ignores))

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: Any) -> OrderedDict:
        """Evaluate with test-time augmentation; result names end in ``_TTA``."""
        logging.getLogger("pisa_d2").info("Evaluating with test-time augmentation ...")
        model = GeneralizedRCNNWithTTA(cfg, model)
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, model, evaluators)
        return OrderedDict((f"{name}_TTA", result) for name, result in results.items())


AddConfig = Callable[[CfgNode], None]


def load_config(args: argparse.Namespace, add_config: AddConfig = add_pisa_config) -> CfgNode:
    """Load the config that the command line names, by its path or its name in this package."""
    args.config_file = find_config(args.config_file)
    cfg = read_config(args.config_file, add_config)
    cfg.merge_from_list(args.opts)
    register_from_config(cfg)
    return cfg


def setup(args: argparse.Namespace, add_config: AddConfig = add_pisa_config) -> CfgNode:
    """Load the config, check it and its datasets, and set up the output folder and the log."""
    cfg = load_config(args, add_config)
    no_gpu = cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available()
    if no_gpu:
        cfg.MODEL.DEVICE = "cpu"
    check_config(cfg, train=not args.eval_only)
    folder = os.path.join(cfg.OUTPUT_DIR, EVALUATION) if args.eval_only else cfg.OUTPUT_DIR
    logger = setup_logger(folder, distributed_rank=comm.get_rank(), name="pisa_d2")
    take_num_classes(cfg)
    changes = "" if args.eval_only else check_run(cfg, args.resume)
    cfg.freeze()
    default_setup(evaluation_config(cfg) if args.eval_only else cfg, args)
    if no_gpu:
        logger.warning("No GPU was found: MODEL.DEVICE is set to cpu.")
    if changes:
        logger.warning(changes)
    check_data(cfg, train=not args.eval_only)
    return cfg


def main(
    args: argparse.Namespace,
    trainer_class: type[Trainer] = Trainer,
    add_config: AddConfig = add_pisa_config,
) -> Any:
    """
    Train or evaluate, as the command line ``args`` say.

    Args:
        trainer_class: the trainer; projects pass their own.
        add_config: adds the keys of this package, and of a project, to a config.
    """
    if args.eval_only:
        cfg = setup(args, add_config)
        model = trainer_class.build_model(cfg)
        Checkpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume, whole=True
        )
        results = trainer_class.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(trainer_class.test_with_tta(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    with occupied(load_config(args, add_config).OUTPUT_DIR):
        cfg = setup(args, add_config)
        trainer = trainer_class(cfg)
        check_same_classes(cfg)  # all classes are known now
        if comm.is_main_process():
            check_room(cfg.OUTPUT_DIR, trainer.model)
        trainer.resume_or_load(resume=args.resume)
        if cfg.TEST.AUG.ENABLED:
            trainer.register_hooks(
                [hooks.EvalHook(0, lambda: trainer.test_with_tta(cfg, trainer.model))]
            )
        return trainer.train()


def run(
    main_func: Callable[[argparse.Namespace], Any] = main, add_config: AddConfig = add_pisa_config
) -> None:
    """Call ``main_func(args)`` on each of the processes that the command line asks for."""
    args = default_argument_parser().parse_args()
    launch(
        main_func,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
        device=load_config(args, add_config).MODEL.DEVICE,
    )


if __name__ == "__main__":
    run()
