"""Jobs that the tests of pisa_d2/engine run, also in processes of their own."""

import json
import os
import signal
import subprocess
import sys

from helpers import (
    REGIONS_ON,
    ROOT,
    THIN_RESNET,
    load_cfg,
    random_batch,
    small_cfg,
    stock,
    switch,
    with_regions,
)

sys.path.insert(0, str(ROOT))

import torch
from detectron2.engine import create_ddp_model
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

# A model of a few milliseconds per step, images of three sizes, and 9 iterations.
OPTIONS = [
    *("MODEL.DEVICE", "cpu", "SEED", "1", "TEST.EXPECTED_RESULTS", "[]"),
    *map(str, THIN_RESNET),
    *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32"),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "100", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "50"),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", "20", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,80,96)", "INPUT.MIN_SIZE_TEST", "64"),
    *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.WARMUP_ITERS", "2"),
    *("SOLVER.MAX_ITER", "9", "SOLVER.CHECKPOINT_PERIOD", "2"),
]

# Models for the gradients: Detectron2's heads, ours without PISA, and ours with PISA.
KINDS = {
    "stock": stock("PISAROIHeads"),
    "off": switch(False, False, False),
    "pisa": [],
    "regions": REGIONS_ON,
}

# Objects per image on each process: the second has none, and so no positive.
OBJECTS = ([3, 1], [0, 0])
# Regions of these images, which only "regions" ignores.
REGIONS = ([[[0, 0, 64, 60]], []], [[[30, 20, 90, 90], [80, 0, 128, 96]], [[0, 0, 128, 96]]])


def mark_crowds(root):
    """Turn every third training annotation of the digits in a folder of datasets into a crowd."""
    path = root / "digits/annotations/instances_train.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"][::3]:
        annotation["iscrowd"] = 1
    path.write_text(json.dumps(content))


def digits_cfg(*options):
    return load_cfg("Digits/pisa_faster_rcnn_R_18_FPN.yaml", *OPTIONS, *options)


def command(script, output, *words):
    """
    Make the command that runs train_net.py, or another script with the same arguments, with regions
    to ignore.
    """
    config = ROOT / "configs/Digits/pisa_faster_rcnn_R_18_FPN.yaml"
    overrides = [*words, *OPTIONS, *map(str, REGIONS_ON), "OUTPUT_DIR", str(output)]
    return [str(ROOT / script), "--config-file", str(config), "--dist-url", "auto", *overrides]


def run(words, datasets, **env):
    """
    Run Python with these words in a session of its own; return its exit status and its output.
    Processes would wait half an hour for one that was killed, so ten minutes are an error.
    """
    process = subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed = process.communicate(timeout=600)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, printed


def build(kind):
    torch.manual_seed(0)
    return build_model(small_cfg(*KINDS[kind]))


def gradients(model, rank):
    """Compute the gradients of a process's losses twice, since DDP checks more the second time."""
    for _ in range(2):
        model.zero_grad()
        batch = with_regions(random_batch(OBJECTS[rank], seed=rank), *REGIONS[rank])
        torch.manual_seed(rank)
        with EventStorage():
            sum(model(batch).values()).backward()
    named = getattr(model, "module", model).named_parameters()
    return {name: p.grad.clone() for name, p in named if p.requires_grad}


def save_gradients(folder):
    """Save on each process what DistributedDataParallel makes of both processes' gradients."""
    for kind in KINDS:
        model = create_ddp_model(build(kind), device_ids=None, broadcast_buffers=False)
        torch.save(gradients(model, comm.get_rank()), folder / f"{kind}{comm.get_rank()}.pth")


def train_and_save_gradients(args, folder):
    import train_net

    save_gradients(folder)
    train_net.main(args)
