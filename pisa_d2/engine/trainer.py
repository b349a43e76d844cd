"""A trainer that resumes interrupted runs exactly."""

import logging
import os
import signal
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import FrameType
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
    hooks,
)
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventWriter, JSONWriter
from detectron2.utils.logger import setup_logger

from .checkpoint import Checkpointer
from .metrics import MetricsWriter
from .seeding import derive_seed
from .signals import on_signals
from .train_loader import Batch, TrainLoader, build_train_loader

# The exit status of a training that SIGTERM or Ctrl-C ended after a checkpoint. In sysexits.h it is
# "temporary failure; user is invited to retry"; a killed process has 128 + 15.
EXIT_SAVED = 75

logger = logging.getLogger(__name__)


class SaveOnSignal(HookBase):
    """
    Save a checkpoint at the end of the step after SIGTERM or Ctrl-C (SIGINT) on any process, and
    exit with :data:`EXIT_SAVED` on all processes. A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self._told = ""
        self._interrupted = False
        self._handlers = ExitStack()
        self._process = os.getpid()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # processes that load data inherit this, and continue
            return
        if signum != signal.SIGINT:
            self._told = self._told or signal.Signals(signum).name
            return
        if self._interrupted:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self._told, self._interrupted = "Ctrl-C", True
        if comm.is_main_process():  # the signal may have interrupted a logger
            os.write(2, b"\nSaving a checkpoint after this step. Ctrl-C again ends at once.\n")

    def before_train(self) -> None:
        self._handlers.enter_context(on_signals(self._on_signal))

    def after_step(self) -> None:
        # The signal reaches processes in different steps.
        told = next(filter(None, comm.all_gather(self._told)), "")
        if not told:
            return
        trainer = self.trainer
        name = f"model_{trainer.iter:07d}"
        trainer.checkpointer.save(name, iteration=trainer.iter)
        comm.synchronize()  # no process leaves before the checkpoint is written
        logger.warning(
            "%s: saved %s.pth after iteration %d. Rerun with --resume to continue. Exit status %d.",
            told,
            name,
            trainer.iter,
            EXIT_SAVED,
        )
        raise SystemExit(EXIT_SAVED)

    def after_train(self) -> None:
        self._handlers.close()


class ResumableTrainer(DefaultTrainer):
    """
    A ``DefaultTrainer`` that resumes an interrupted run exactly.

    * (seed, i, process) seeds the random draws of iteration i, and its batch does not depend on the
      iteration at which the run started. The seed is ``SEED`` or a random one; a checkpoint has it.
    * A checkpoint has the optimizer with Detectron2 0.6 too, under the same key as with main.
    * Checkpoints appear complete or not at all, see :class:`Checkpointer`. SIGTERM or Ctrl-C saves
      one and ends the run, see :class:`SaveOnSignal`.
    * It runs on several processes without GPUs.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # Detectron2's constructor ties a distributed model to a GPU and makes the checkpointer that
        # its hooks keep, so its few lines are repeated here.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        on_cpu = next(model.parameters()).device.type == "cpu"
        devices: dict[str, None] = {"device_ids": None} if on_cpu else {}
        model = create_ddp_model(model, broadcast_buffers=False, **devices)
        trainer = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = trainer(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, mapper: Callable | None = None) -> Iterable[Batch]:
        """Build the loader, see :func:`build_train_loader`."""
        return build_train_loader(cfg, mapper)

    def build_hooks(self) -> list[HookBase]:
        """Build Detectron2's hooks, and :class:`SaveOnSignal` between checkpoint and evaluation."""
        built = [hook for hook in super().build_hooks() if hook is not None]
        evaluation = next(i for i, hook in enumerate(built) if isinstance(hook, hooks.EvalHook))
        return [*built[:evaluation], SaveOnSignal(), *built[evaluation:]]

    def build_writers(self) -> list[EventWriter]:
        """Build Detectron2's writers, with :class:`MetricsWriter` for metrics.json."""
        writers = super().build_writers()
        for index, writer in enumerate(writers):
            if type(writer) is JSONWriter:
                writer.close()
                writers[index] = MetricsWriter(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json"))
        return writers

    def before_train(self) -> None:
        if isinstance(self.data_loader, TrainLoader):
            self.data_loader.seed, self.data_loader.start = self.seed, self.start_iter
        elif self.start_iter > 0:
            logger.warning(
                "build_train_loader returned no TrainLoader, so the sequence of images restarts."
            )
        super().before_train()

    def run_step(self) -> None:
        seed_all_rng(derive_seed(self.seed, 2, comm.get_rank(), self.iter))
        super().run_step()

    def after_train(self) -> None:
        if isinstance(self.data_loader, TrainLoader):
            self.data_loader.close()
        if self.iter < self.max_iter:  # it failed or was stopped, maybe only on this process
            rest = [hook for hook in self._hooks if not isinstance(hook, hooks.EvalHook)]
            self._hooks: list[HookBase] = rest
        super().after_train()

    def state_dict(self) -> dict[str, Any]:
        own = {"_trainer": self._trainer.state_dict(), "seed": self.seed}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        TrainerBase.load_state_dict(self, state_dict)
        self.seed = state_dict.get("seed", self.seed)
        if "_trainer" in state_dict:
            # A checkpoint of a training without AMP has no gradient scale.
            restored = {**self._trainer.state_dict(), **state_dict["_trainer"]}
            self._trainer.load_state_dict(restored)
        else:
            logger.warning("The checkpoint, of Detectron2 0.6's trainer, has no optimizer state.")
