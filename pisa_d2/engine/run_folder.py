"""Checks and a lock of ``OUTPUT_DIR``, so that runs do not mix."""

import fcntl
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

# A checkpoint has the optimizer with these settings, the seed and the weights. Detectron2 resumes
# with them, even if the config differs.
RESTORED = (
    "SOLVER.BASE_LR",
    "SOLVER.BIAS_LR_FACTOR",
    "SOLVER.MOMENTUM",
    "SOLVER.NESTEROV",
    "SOLVER.WEIGHT_DECAY",
    "SOLVER.WEIGHT_DECAY_NORM",
    "SOLVER.WEIGHT_DECAY_BIAS",
    "SEED",
    "MODEL.WEIGHTS",
)
# The folder in OUTPUT_DIR for the log, the config and the results of an evaluation.
EVALUATION = "inference"

_LOCK = ".lock"
_CHECKPOINT = re.compile(r"last_checkpoint|model_(final|\d{7})\.pth")
_PROBE_BYTES = 2**20
_ABSENT = "(not set)"

logger = logging.getLogger(__name__)


def check_output(folder: str) -> None:
    """
    Create the folder, write a megabyte to it, and remove the megabyte again.

    Raises:
        OSError: a step fails.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise OSError(
            f"OUTPUT_DIR = {folder!r} cannot be written to ({error}). Name a folder that you "
            "may write to, on a disk with room for the checkpoints."
        ) from error


def check_room(folder: str, model: nn.Module) -> None:
    """
    Check that the disk has room for a checkpoint: the weights, and the momentum of each.

    Raises:
        OSError: it does not.
    """
    needed = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"The disk of OUTPUT_DIR = {folder!r} has {free / 2**20:.0f} MiB left, and a "
            f"checkpoint takes about {needed / 2**20:.0f} MiB. Make room, or name another folder."
        )


@contextmanager
def occupied(folder: str) -> Iterator[None]:
    """
    Reserve ``OUTPUT_DIR`` for one training. Enter this on all its processes before anything is
    written. The main process takes a lock, which the system releases when that process ends for any
    reason.

    Raises:
        OSError: the folder cannot be written to.
        RuntimeError: another training holds the lock.
    """
    if not comm.is_main_process() or "://" in folder:
        yield
        return
    check_output(folder)
    with open(os.path.join(folder, _LOCK), "a+") as file:
        try:
            # Data loaders, which may outlive a killed training, do not inherit it, unlike flock.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise RuntimeError(
                f"Another training is running in OUTPUT_DIR = {folder!r} ({file.read().strip()}). "
                "Wait until it ends, stop it, or choose another OUTPUT_DIR."
            ) from None
        except OSError as error:
            logger.warning(
                "The file system of OUTPUT_DIR = %r has no locks (%s): make sure that no other "
                "training runs in it.",
                folder,
                error,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def check_run(cfg: CfgNode, resume: bool) -> str:
    """
    Compare a training with the contents of its ``OUTPUT_DIR``. Call this on all processes, before
    ``default_setup`` writes config.yaml. A resumed run continues with some settings of its
    checkpoint, :data:`RESTORED`. They are written into ``cfg``, so that config.yaml has the values
    in use.

    Returns:
        A warning that names each key whose value differs from the stored config.yaml, and the value
        that is used; empty if there is none.

    Raises:
        ValueError: the training is new, but the folder has checkpoints of another one.
    """
    stored: dict[str, Any] | str | None = None
    if comm.is_main_process() and "://" not in cfg.OUTPUT_DIR and os.path.isdir(cfg.OUTPUT_DIR):
        found = sorted(filter(_CHECKPOINT.fullmatch, os.listdir(cfg.OUTPUT_DIR)))
        if found and not resume:
            raise ValueError(
                f"OUTPUT_DIR = {cfg.OUTPUT_DIR!r} has checkpoints of another run: "
                f"{', '.join(found[:3])}{', ...' if found[3:] else ''}. To continue that run, add "
                "--resume; for a new run, choose another OUTPUT_DIR."
            )
        if found:
            stored = _read_config(os.path.join(cfg.OUTPUT_DIR, "config.yaml"))
        # The config of an evaluation, see evaluation_config, whose results the training replaces.
        with suppress(FileNotFoundError):
            os.remove(os.path.join(cfg.OUTPUT_DIR, EVALUATION, "config.yaml"))
    stored = comm.all_gather(stored)[0]  # before the main process writes the file again
    if stored is None:
        return ""
    if isinstance(stored, str):
        return f"{stored}: the settings of the resumed run were not compared."

    new = _flatten(yaml.safe_load(cfg.dump()))
    keys = [key for key in {**stored, **new} if key != "OUTPUT_DIR"]
    values = {key: (stored.get(key, _ABSENT), new.get(key, _ABSENT)) for key in keys}
    values = {key: (before, now) for key, (before, now) in values.items() if before != now}
    kept = {key: pair for key, pair in values.items() if key in RESTORED and key in stored}
    cfg.merge_from_list([word for key, (before, _) in kept.items() for word in (key, before)])
    lines = []
    if kept:
        lines += [
            "These come from the checkpoint, and the new value is ignored (to change one, start a "
            "new run from the checkpoint: MODEL.WEIGHTS, another OUTPUT_DIR, no --resume):",
            *(f"  {key}: {before!r}, not {now!r}" for key, (before, now) in kept.items()),
        ]
    if len(kept) < len(values):
        lines += [
            "The new value is used for:",
            *(
                f"  {key}: {now!r}, before {before!r}"
                for key, (before, now) in values.items()
                if key not in kept
            ),
        ]
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    return "\n".join([f"Resuming with settings other than in '{path}'.", *lines]) if lines else ""


def _read_config(path: str) -> dict[str, Any] | str:
    """Read the values by their full keys, or return the reason why that is impossible."""
    try:
        with open(path) as file:
            config = yaml.safe_load(file)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        return f"'{path}' cannot be read ({str(error).splitlines()[0]})"
    return _flatten(config) if isinstance(config, dict) else f"'{path}' is not a config"


def _flatten(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def evaluation_config(cfg: CfgNode) -> CfgNode:
    """
    Make a config for the ``default_setup`` of an evaluation, whose config.yaml and log go next to
    its results, so that the files of the run, which may still be training, stay as they are. A
    folder without a config.yaml gets one. Call this on all processes.
    """
    if comm.is_main_process() and "://" not in cfg.OUTPUT_DIR:
        with (
            suppress(FileExistsError),
            open(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), "x") as file,
        ):
            file.write(cfg.dump())
    copy = cfg.clone()
    copy.defrost()
    copy.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, EVALUATION)
    return copy
