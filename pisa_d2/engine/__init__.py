"""Training on several processes, through interruptions, and in a folder of its own."""

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
