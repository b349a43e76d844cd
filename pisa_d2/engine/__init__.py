"""Training on several processes, and through interruptions."""

from .checkpoint import Checkpointer
from .launch import launch
from .train_loader import TrainLoader, build_train_loader
from .trainer import EXIT_SAVED, ResumableTrainer

__all__ = [
    "EXIT_SAVED",
    "Checkpointer",
    "ResumableTrainer",
    "TrainLoader",
    "build_train_loader",
    "launch",
]
