"""Training on several processes, through interruptions, and in a folder of its own."""

from .checkpoint import Checkpointer
from .launch import launch
from .lazy import LazyTrainer, build_lazy_train_loader, clip_gradients
from .train_loader import TrainLoader, build_train_loader
from .trainer import EXIT_SAVED, ResumableTrainer

__all__ = [
    "EXIT_SAVED",
    "Checkpointer",
    "LazyTrainer",
    "ResumableTrainer",
    "TrainLoader",
    "build_lazy_train_loader",
    "build_train_loader",
    "clip_gradients",
    "launch",
]
