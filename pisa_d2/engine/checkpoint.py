"""Checkpoints that survive interruptions."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm


class _WriteAside:
    """A path manager whose files appear complete or not at all."""

    def __init__(self, path_manager: Any) -> None:
        self._path_manager = path_manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._path_manager, name)

    @contextmanager
    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Iterator[IO]:
        if "w" not in mode or "://" in path:  # object stores do so themselves
            with self._path_manager.open(path, mode, **kwargs) as file:
                yield file
            return
        partial = f"{path}.partial"
        try:
            with self._path_manager.open(partial, mode, **kwargs) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # or a machine that crashes may keep only the name
        except BaseException:
            with suppress(OSError):
                os.remove(partial)
            raise
        os.replace(partial, path)


class Checkpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer, for runs that may be interrupted. The checkpoint, and then the file
    that names the last one, are written next to their place and moved there; checkpoints that
    cannot be read are skipped.
    """

    def __init__(self, model: torch.nn.Module, save_dir: str = "", **kwargs: Any) -> None:
        super().__init__(model, save_dir, **kwargs)
        self.path_manager: Any = _WriteAside(self.path_manager)
        self._read: dict[str, dict[str, Any]] = {}  # a file's content, until it is loaded
        self._whole = False

    def save(self, name: str, **kwargs: Any) -> None:
        """
        Save a checkpoint.

        Raises:
            OSError: it could not be written. No part of it stays on the disk.
        """
        try:
            super().save(name, **kwargs)
        except (OSError, RuntimeError) as error:  # torch wraps the system's error in a RuntimeError
            free = shutil.disk_usage(self.save_dir).free / 2**20
            raise OSError(
                f"Checkpoint '{os.path.join(self.save_dir, name)}.pth' could not be written "
                f"({_reason(error)}); its disk has {free:.0f} MiB left. Make room, then rerun with "
                "--resume to continue from the checkpoint before it."
            ) from error

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """
        Load a checkpoint.

        Raises:
            ValueError: the file cannot be read, or has nothing for this model. The message names
                it.
        """
        try:
            return super().load(path, *args, **kwargs)
        except ValueError as error:
            raise ValueError(f"Checkpoint '{path}' cannot be loaded: {error}") from error

    def resume_or_load(
        self, path: str, *, resume: bool = True, whole: bool = False
    ) -> dict[str, Any]:
        """
        Load the last checkpoint if ``resume`` is set and there is one, otherwise ``path``. Unlike
        Detectron2's, a damaged checkpoint causes a warning, and the one before it is loaded. All
        processes load the file that the main process has chosen, and each reads only this file.

        Args:
            whole: whether ``path`` must have all parameters of the model, as a resumed checkpoint
                must. Otherwise Detectron2 warns about the parameters that stay as they are.

        Raises:
            RuntimeError: there are checkpoints, but none can be read.
            FileNotFoundError: not all processes see the main process's folder, or ``path`` does not
                exist.
            ValueError: a parameter is missing or has a different shape; ``path`` is not a
                checkpoint; or ``path`` is empty although ``whole`` is set.
        """
        chosen = ""
        if resume and "://" not in self.save_dir:
            found = self._newest_readable() if comm.is_main_process() else ""
            chosen = comm.all_gather(found)[0]
            if not all(comm.all_gather(not chosen or os.path.isfile(chosen))):
                raise FileNotFoundError(
                    f"Not all processes can read '{chosen}': OUTPUT_DIR must be a folder that all "
                    "machines share."
                )
        if not chosen and path and "://" not in path and not os.path.isfile(path.split("?")[0]):
            raise FileNotFoundError(f"MODEL.WEIGHTS = '{path}': there is no such file.")
        if whole and not chosen and not path:
            raise ValueError(
                "There are no weights to load: name a checkpoint as MODEL.WEIGHTS, or add --resume "
                f"if OUTPUT_DIR = '{self.save_dir}' has one."
            )
        self._whole = whole or bool(chosen)
        try:
            if chosen:
                return self.load(chosen)
            return super().resume_or_load(path, resume=resume and "://" in self.save_dir)
        finally:
            self._whole = False

    def _newest_readable(self) -> str:
        """Find the last checkpoint, or the newest that can be read; "" without checkpoints."""
        if not self.has_checkpoint():
            return ""
        last = self.get_checkpoint_file()
        others = [
            file
            for file in self.get_all_checkpoint_files()
            if os.path.basename(file).startswith("model_") and file != last
        ]
        others.sort(key=os.path.getmtime, reverse=True)
        for file in (last, *others):
            try:
                content = torch.load(file, map_location="cpu")
            except Exception as error:
                self.logger.warning(
                    "Checkpoint '%s' is damaged (%s): looking for the one before it.",
                    file,
                    _reason(error),
                )
                continue
            if file == last or "trainer" in content:  # other files may be weights alone
                self._read[file] = content if "model" in content else {"model": content}
                return file
        raise RuntimeError(
            f"None of the checkpoints in '{self.save_dir}' can be read. To start again, remove "
            "them or choose another OUTPUT_DIR."
        )

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename in self._read:
            return self._read.pop(filename)
        try:
            content = super()._load_file(filename)
            weights = content["model"]
        except Exception as error:  # of any kind, since pickle runs code in the file
            raise ValueError(
                f"it is not a checkpoint, or damaged ({_reason(error)}). Check MODEL.WEIGHTS, or "
                "download the file again."
            ) from error
        kinds = (torch.Tensor, np.ndarray)
        if not isinstance(weights, dict) or not all(isinstance(w, kinds) for w in weights.values()):
            found = list(weights)[:5] if isinstance(weights, dict) else type(weights).__name__
            raise ValueError(
                f"it is not a checkpoint of Detectron2. It contains {found} instead of parameters "
                "by name, at the top or under 'model'."
            )
        return content

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        incompatible = super()._load_model(checkpoint)
        names = {name for name, _ in self.model.named_parameters()}
        missing = sorted(names.intersection(incompatible.missing_keys))
        advice = (
            "Use the config that it was trained with. To start from it with other classes, name it "
            "as MODEL.WEIGHTS, with another OUTPUT_DIR and without --resume."
        )
        if self._whole and incompatible.incorrect_shapes:
            name, there, here = incompatible.incorrect_shapes[0]
            raise ValueError(
                f"it belongs to a different model. {name} has the shape {there} there and {here} "
                f"here, as when the number of classes differs. {advice}"
            )
        if names and len(missing) == len(names):
            there = sorted(incompatible.unexpected_keys)
            raise ValueError(
                f"it has no parameter of this model. Its names are like {there[:3]}, the model's "
                f"like {missing[:3]}."
            )
        if self._whole and missing:
            raise ValueError(
                f"it belongs to a different model. {len(missing)} of the {len(names)} parameters "
                f"are missing, such as {missing[0]}. {advice}"
            )
        return incompatible


def _reason(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__
