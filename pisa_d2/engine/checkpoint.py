import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

# What torch.load raises for a file that ends too early, or is no checkpoint.
UNREADABLE = (RuntimeError, OSError, EOFError, pickle.UnpicklingError)


class _WriteAside:
    """A path manager whose files appear complete or not at all."""

    def __init__(self, path_manager: Any) -> None:
        self._path_manager = path_manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._path_manager, name)

    @contextmanager
    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Iterator[IO]:
        aside = "w" in mode and "://" not in path  # object stores do this by themselves
        written = f"{path}.partial" if aside else path
        with self._path_manager.open(written, mode, **kwargs) as file:
            yield file
            if aside:
                file.flush()
                os.fsync(file.fileno())  # or a machine that goes down may keep the name alone
        if aside:
            os.replace(written, path)


class Checkpointer(DetectionCheckpointer):
    """
    Detectron2's, for runs that are interrupted: the checkpoint, and then the file that says which
    is the last, are written aside and moved into place; and what cannot be read is passed over.
    """

    def __init__(self, model: torch.nn.Module, save_dir: str = "", **kwargs: Any) -> None:
        super().__init__(model, save_dir, **kwargs)
        self.path_manager: Any = _WriteAside(self.path_manager)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """
        As Detectron2's, but a damaged checkpoint is named in a warning and the one before it is
        loaded. All processes load the one that the main process has chosen.

        Raises:
            RuntimeError: there are checkpoints, and none can be read.
            FileNotFoundError: not all processes see the folder of the main process.
        """
        if not resume or "://" in self.save_dir:
            return super().resume_or_load(path, resume=resume)
        chosen = comm.all_gather(self._newest_readable() if comm.is_main_process() else "")[0]
        if not chosen:
            return super().resume_or_load(path, resume=False)
        if not all(comm.all_gather(os.path.isfile(chosen))):
            raise FileNotFoundError(
                f"Not all processes can read '{chosen}': OUTPUT_DIR must be a folder that all "
                "machines share."
            )
        return self.load(chosen)

    def _newest_readable(self) -> str:
        """The last checkpoint if it can be read, otherwise the newest that can; "" without any."""
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
            except UNREADABLE as error:
                reason = str(error).split("\n")[0] or type(error).__name__
                self.logger.warning(
                    "Checkpoint '%s' is damaged (%s): looking for the one before it.", file, reason
                )
                continue
            if file == last or "trainer" in content:  # others may be weights alone
                return file
        raise RuntimeError(
            f"None of the checkpoints in '{self.save_dir}' can be read. To begin anew, remove them "
            "or choose another OUTPUT_DIR."
        )
