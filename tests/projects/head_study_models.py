"""A small detector, images and a study of its box head."""

from argparse import Namespace
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from head_study.controls import add_head_study_config
from head_study.runs import Study, prepare
from head_study.strategies import Strategies
from helpers import random_batch, register_images, small_cfg

PISA = {
    "MODEL.PISA.ISR_P.ENABLED": True,
    "MODEL.PISA.ISR_N.ENABLED": True,
    "MODEL.PISA.CARL.ENABLED": True,
}


def register_study_images(folder: Path, num_objects: list[int]) -> str:
    """Register images with these numbers of objects, and return the name of the dataset."""
    name = "head_study_images"
    register_images(name, folder, random_batch(num_objects))
    return name


def head_study_node(**values: object) -> CfgNode:
    cfg = get_cfg()
    add_head_study_config(cfg)
    cfg.HEAD_STUDY.update(values)
    return cfg.HEAD_STUDY


def detector_cfg(folder: Path, dataset: str, *opts: object) -> CfgNode:
    """The config of a detector with random weights, whose file it names."""
    cfg = small_cfg(
        *("DATASETS.TRAIN", (dataset,), "DATASETS.TEST", (dataset,)),
        *("INPUT.MIN_SIZE_TEST", 96, "OUTPUT_DIR", str(folder), "SOLVER.IMS_PER_BATCH", 2),
        *("MODEL.RPN.PRE_NMS_TOPK_TEST", 100, "MODEL.RPN.POST_NMS_TOPK_TEST", 50),
        *("SOLVER.WARMUP_ITERS", 0, "MODEL.WEIGHTS", str(folder / "detector.pth")),
        *opts,
    )
    cfg.HEAD_STUDY = head_study_node()
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "detector.pth")
    return cfg


def small_study(cfg: CfgNode, folder: Path, options: dict | None = None, **words: object) -> Study:
    """With the views of all images."""
    args = {"steps": 4, "max_gb": 1.0, "half": False, "from_detector": False, "output": folder}
    args["keep"] = None
    options = options or {"random": {}, "PISA": PISA}
    return prepare(cfg, Namespace(**{**args, **words}), Strategies(options, [], []))
