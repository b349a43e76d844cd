"""
A train_net.py in which a process sends a signal during a step.

STRIKE="<rank> <iteration> <signal> <self or group>" names the process, the time, the signal and its
receivers. After a restart by torchrun nothing is sent.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pisa_d2  # noqa: F401  # isort: skip  (patches Detectron2)

from detectron2.utils import comm

import train_net


class Trainer(train_net.Trainer):
    def run_step(self):
        rank, iteration, name, whom = os.environ["STRIKE"].split()
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if first and (comm.get_rank(), self.iter) == (int(rank), int(iteration)):
            send = {"self": os.kill, "group": os.killpg}[whom]
            send(os.getpid() if whom == "self" else os.getpgrp(), getattr(signal, name))
        super().run_step()


def main(args):
    return train_net.main(args, Trainer)


if __name__ == "__main__":
    train_net.run(main)
