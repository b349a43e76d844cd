"""
Train and evaluate detectors with pisa_d2.

Detectron2's standard training script, for every data set that Detectron2 can evaluate, with the
config keys of pisa_d2 added. Runs also under torchrun, and ends up in the same place when it was
interrupted and resumed: see docs/distributed.md.
"""

import argparse
import logging
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.engine import default_argument_parser, default_setup, hooks
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
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

from .config import add_pisa_config
from .data import ReadableOnly
from .engine import Checkpointer, ResumableTrainer, launch
from .preflight import check_config, check_data, check_model

# Of Detectron2 0.6's anchors and pooler; nothing that a user could mend.
warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)
# Of Detectron2's distributed model, in both versions.
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)

EVALUATORS: dict[str, Callable[[str, str], list]] = {
    "coco": lambda name, folder: [COCOEvaluator(name, output_dir=folder)],
    "coco_panoptic_seg": lambda name, folder: [
        SemSegEvaluator(name, output_dir=folder),
        COCOEvaluator(name, output_dir=folder),
        COCOPanopticEvaluator(name, folder),
    ],
    "sem_seg": lambda name, folder: [SemSegEvaluator(name, output_dir=folder)],
    "cityscapes_instance": lambda name, folder: [CityscapesInstanceEvaluator(name)],
    "cityscapes_sem_seg": lambda name, folder: [CityscapesSemSegEvaluator(name)],
    "pascal_voc": lambda name, folder: [PascalVOCDetectionEvaluator(name)],
    "lvis": lambda name, folder: [LVISEvaluator(name, output_dir=folder)],
}


class Trainer(ResumableTrainer):
    @classmethod
    def build_train_loader(cls, cfg: CfgNode, mapper: Callable | None = None) -> Any:
        mapper = ReadableOnly(mapper or DatasetMapper(cfg, is_train=True), skip=True)
        return super().build_train_loader(cfg, mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        mapper = ReadableOnly(DatasetMapper(cfg, is_train=False), skip=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluators:
        """The evaluators for the ``evaluator_type`` in the metadata of the data set."""
        kind = MetadataCatalog.get(dataset_name).evaluator_type
        if kind not in EVALUATORS:
            raise NotImplementedError(
                f"No evaluator for {dataset_name!r} of type {kind!r}; known: {list(EVALUATORS)}."
            )
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return DatasetEvaluators(EVALUATORS[kind](dataset_name, folder))

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
    cfg = get_cfg()
    add_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    return cfg


def setup(args: argparse.Namespace, add_config: AddConfig = add_pisa_config) -> CfgNode:
    cfg = load_config(args, add_config)
    no_gpu = cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available()
    if no_gpu:
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    check_config(cfg, train=not args.eval_only)
    default_setup(cfg, args)
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="pisa_d2")
    if no_gpu:
        logger.warning("No GPU was found: MODEL.DEVICE is set to cpu.")
    check_data(cfg, train=not args.eval_only)
    return cfg


def main(
    args: argparse.Namespace,
    trainer_class: type[Trainer] = Trainer,
    add_config: AddConfig = add_pisa_config,
) -> Any:
    """
    Train, or evaluate, as the command line ``args`` say. Projects give their own trainer, and what
    adds their keys to a config.
    """
    cfg = setup(args, add_config)

    if args.eval_only:
        model = trainer_class.build_model(cfg)
        check_model(cfg, model, args.resume, train=False)
        Checkpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = trainer_class.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(trainer_class.test_with_tta(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = trainer_class(cfg)
    check_model(cfg, trainer.model, args.resume, train=True)
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
