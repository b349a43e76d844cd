"""Small models, batches, samples and trainings that several tests build and run."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import pisa_d2  # isort: skip  (before Detectron2, which it patches)

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import Image

from pisa_d2.regions import TargetsWithRegions
from pisa_d2.samplers import PROPOSAL_SAMPLER_REGISTRY, ProposalSampler, build_proposal_sampler

ROOT = Path(__file__).resolve().parents[1]
COCO = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser() / "coco"
IMAGE_SIZE = (96, 128)
# Without "equal": NMS may ask whether all boxes have settled, see projects/Benchmark's waits.yaml.
HOST_COPIES = {
    "__bool__",
    "__float__",
    "__index__",
    "__int__",
    "cpu",
    "item",
    "masked_select",
    "nonzero",
    "numpy",
    "tolist",
    "unique",
}

# Paths under configs/. A config of a method is named after the plain one next to it.
CONFIGS = sorted(str(p.relative_to(ROOT / "configs")) for p in ROOT.glob("configs/**/*.yaml"))
METHODS = ("pisa_", "pisa_score_hlr_", "iou_balanced_", "ohem_")
PLAIN = [c for c in CONFIGS if not Path(c).name.startswith(("Base", *METHODS))]


def methods_of(plain: str) -> list[str]:
    """List the configs that apply a method to a plain one."""
    path = Path(plain)
    named = (str(path.with_name(method + path.name)) for method in METHODS)
    return [config for config in named if config in CONFIGS]


def has_coco() -> bool:
    """Return whether COCO's train2017 and its annotations are available."""
    files = COCO / "annotations" / "instances_train2017.json", COCO / "train2017"
    return all(path.exists() for path in files)


def load_script(path: str) -> ModuleType:
    """Import a script of this repository by its path, with the modules next to it on the path."""
    folder = str((ROOT / path).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@cache
def _read_cfg(name: str) -> CfgNode:
    cfg = get_cfg()
    pisa_d2.add_pisa_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / name))
    return cfg


def load_cfg(name: str, *opts: object) -> CfgNode:
    """Load the config of this name under configs/, for the CPU."""
    cfg = _read_cfg(name).clone()  # takes a fifteenth of the time of reading it
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *opts])
    return cfg


# A ResNet of 50 layers and few channels, which is built and trained several times as fast as one of
# 18 layers, whose channels are fixed. It is linear but for its ReLUs, and magnifies its input.
THIN_RESNET: list[object] = [
    *("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.NORM", "FrozenBN"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.PIXEL_STD", [4000.0, 4000.0, 4000.0]),
]


def small_cfg(*opts: object) -> CfgNode:
    """A PISA Faster R-CNN that takes a training step in a tenth of a second."""
    return load_cfg(
        "BCCD/pisa_faster_rcnn_R_18_FPN.yaml",
        *THIN_RESNET,
        *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32),
        *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 100, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 100),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32),
        *opts,
    )


def small_retinanet_cfg(*opts: object) -> CfgNode:
    """A PISA RetinaNet that takes a training step in a tenth of a second."""
    return load_cfg(
        "BCCD/pisa_retinanet_R_18_FPN.yaml",
        *THIN_RESNET,
        *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.RETINANET.NUM_CONVS", 1),
        *opts,
    )


# Overrides that make a small model with each kind of heads.
HEADS: dict[str, list[object]] = {
    "PISAROIHeads": [],
    "PISARes5ROIHeads": [
        *("MODEL.ROI_HEADS.NAME", "PISARes5ROIHeads"),
        *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ["res4"]),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32, 64]]),
        *("MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.ROI_HEADS.IN_FEATURES", ["res4"]),
    ],
    "PISACascadeROIHeads": [
        *("MODEL.ROI_HEADS.NAME", "PISACascadeROIHeads"),
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
    ],
}


def stock(name: str) -> list[object]:
    """Make overrides that name Detectron2's heads instead of the ones in :data:`HEADS`."""
    theirs = "StandardROIHeads" if name == "PISAROIHeads" else name.removeprefix("PISA")
    return [*HEADS[name], "MODEL.ROI_HEADS.NAME", theirs]


def sampled_by(positive: str, negative: str) -> list[object]:
    """Make overrides that name the samplers."""
    names = {"POSITIVE_SAMPLER": positive, "NEGATIVE_SAMPLER": negative}
    return [x for kind, name in names.items() for x in (f"MODEL.ROI_HEADS.{kind}.NAME", name)]


def build_sampler(name: str, *opts: object) -> ProposalSampler:
    """Build the sampler of this name from a config that names it for a kind that it chooses."""
    cls = PROPOSAL_SAMPLER_REGISTRY.get(name)
    kind = "NEGATIVE_SAMPLER" if "negative" in cls.kinds else "POSITIVE_SAMPLER"
    return build_proposal_sampler(small_cfg(f"MODEL.ROI_HEADS.{kind}.NAME", name, *opts), kind)


def flatten(node: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the full keys of a config and their values."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# Regions to ignore, and the RPN that ignores them.
REGIONS_ON = [
    *("MODEL.IGNORED_REGIONS.ENABLED", True),
    *("MODEL.PROPOSAL_GENERATOR.NAME", "PISARPN"),
]


def switch(isr_p: bool, isr_n: bool, carl: bool) -> list[object]:
    """Make overrides that switch the three parts of PISA on or off."""
    parts = {"ISR_P": isr_p, "ISR_N": isr_n, "CARL": carl}
    return [x for part, on in parts.items() for x in (f"MODEL.PISA.{part}.ENABLED", on)]


def copies_to_host(func: Callable, args: tuple) -> bool:
    """Return whether this call of a torch function would copy from the GPU to the host."""
    name = getattr(func, "__name__", "")
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else args[1:2]
        return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index)
    return name in HOST_COPIES


def random_boxes(num: int, generator: torch.Generator) -> torch.Tensor:
    """Make (num, 4) boxes of 8 to 48 pixels inside an image."""
    height, width = IMAGE_SIZE
    size = 8 + 40 * torch.rand(num, 2, generator=generator)
    corner = torch.rand(num, 2, generator=generator) * (torch.tensor([width, height]) - size)
    return torch.cat([corner, corner + size], dim=1)


def random_batch(num_objects: list[int], num_classes: int = 3, seed: int = 0) -> list[dict]:
    """Make model inputs: an image of noise for each number of objects."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for num in num_objects:
        instances = Instances(IMAGE_SIZE)
        instances.gt_boxes = Boxes(random_boxes(num, generator))
        instances.gt_classes = torch.randint(num_classes, (num,), generator=generator)
        image = torch.randint(256, (3, *IMAGE_SIZE), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    return batch


def batch_with_masks(num_objects: list[int], num_classes: int = 3) -> list[dict]:
    """Make a :func:`random_batch` with a mask that fills the box of each object."""
    batch = random_batch(num_objects, num_classes)
    for sample in batch:
        masks = torch.zeros(len(sample["instances"]), *IMAGE_SIZE, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, sample["instances"].gt_boxes, strict=True):
            mask[int(y0) : int(y1), int(x0) : int(x1)] = True
        sample["instances"].gt_masks = BitMasks(masks)
    return batch


def with_regions(batch: list[dict], *regions: Sequence[Sequence[float]]) -> list[dict]:
    """Add regions to ignore, XYXY in pixels, to each image of the model inputs."""
    targets = []
    for sample, boxes in zip(batch, regions, strict=True):
        objects = sample["instances"]
        tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        fields = objects.get_fields()
        targets.append(TargetsWithRegions(objects.image_size, Boxes(tensor), **fields))
    pairs = zip(batch, targets, strict=True)
    return [{**sample, "instances": target} for sample, target in pairs]


def register_images(
    name: str, folder: Path, batch: list[dict], class_names: Sequence[str] = ("a", "b", "c")
) -> None:
    """Register a dataset of these model inputs, with its files in a folder."""
    records = []
    for i, sample in enumerate(batch):
        path = folder / f"image{i}.png"
        Image.fromarray(sample["image"].permute(1, 2, 0).numpy()).save(path)
        boxes, classes = sample["instances"].gt_boxes.tensor, sample["instances"].gt_classes
        annotations = [
            {"bbox": box, "bbox_mode": 0, "category_id": class_}
            for box, class_ in zip(boxes.tolist(), classes.tolist(), strict=True)
        ]
        size = dict(zip(("height", "width"), IMAGE_SIZE, strict=True))
        record = {"file_name": str(path), "image_id": i, "annotations": annotations}
        records.append({**record, **size})
    DatasetCatalog.register(name, lambda: json.loads(json.dumps(records)))
    MetadataCatalog.get(name).thing_classes = list(class_names)


def run_training(script: Path, config: Path, datasets: Path, output: Path, *words: str) -> str:
    """Run a train_net.py, and return its output; on an error, fail with the end of it."""
    options = ["--config-file", str(config), *words, "OUTPUT_DIR", str(output)]
    command = [sys.executable, str(script), *options]
    env = {**os.environ, "DETECTRON2_DATASETS": str(datasets)}
    result = subprocess.run(command, env=env, cwd=output.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def run_until(
    ready: Callable[[], bool], signum: signal.Signals, words: Sequence[object], cwd: Path
) -> tuple[int, str]:
    """
    Run Python with these words, send it alone a signal once it is ready, and return its exit status
    and what it and all that it started wrote to stderr. Fails if one of them goes on for a minute.
    """
    kwargs = {"cwd": cwd, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, *map(str, words)], **kwargs) as process:
        try:
            while not ready() and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(signum)
            printed = process.communicate(timeout=60)[1]
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, printed


@contextmanager
def locked_by_another_process(folder: Path) -> Iterator[None]:
    """Let another process hold the lock of an output folder."""
    script = f"import fcntl; f = open({str(folder / '.lock')!r}, 'w'); fcntl.lockf(f, 2)"
    script += "; print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as other:
        other.stdout.readline()
        try:
            yield
        finally:
            other.kill()


def read_metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.json").open()]


def noise_image(
    path: Path, index: int = 0, mode: str = "RGB", orientation: int | None = None, **options: object
) -> Path:
    """
    Write an image of noise, 64 pixels wide and 48 high, and return its path.

    Args:
        index: the seed of the noise.
        orientation: of EXIF.
        options: for Pillow's format.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(index).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    if orientation is not None:
        options["exif"] = exif = image.getexif()
        exif[274] = orientation
    image.save(path, **options)
    return path


def make_coco(
    folder: Path, num_images: int, classes: Sequence[str] = ("cup", "ball"), first_id: int = 1
) -> Path:
    """
    Write a COCO json with an object of each class in each image, and the images into
    ``folder / "images"``. Annotation ids begin at ``first_id``.
    """
    images, annotations = [], []
    for i in range(num_images):
        images.append({"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48})
        noise_image(folder / "images" / f"{i}.jpg", i)
        for j in range(len(classes)):
            box = [4 + 20 * j, 6 + i % 8, 16, 24]
            annotations.append(
                {
                    "id": first_id + len(annotations),
                    "image_id": i,
                    "category_id": j + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": j, "name": name} for j, name in enumerate(classes, start=1)]
    path = folder / "a.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return path


def make_voc(folder: Path, num_images: int, classes: Sequence[str] = ("cup", "ball")) -> None:
    """Write the annotations and images of :func:`make_coco` in Pascal VOC's layout."""
    (folder / "Annotations").mkdir(parents=True)
    for i in range(num_images):
        noise_image(folder / "JPEGImages" / f"{i}.jpg", i)
        objects = "".join(
            f"<object><name>{name}</name><difficult>0</difficult><bndbox>"
            f"<xmin>{5 + 20 * j}</xmin><ymin>{7 + i % 8}</ymin>"
            f"<xmax>{20 + 20 * j}</xmax><ymax>{30 + i % 8}</ymax></bndbox></object>"
            for j, name in enumerate(classes)
        )
        (folder / "Annotations" / f"{i}.xml").write_text(
            f"<annotation><filename>{i}.jpg</filename><size><width>64</width>"
            f"<height>48</height><depth>3</depth></size>{objects}</annotation>"
        )
