#!/usr/bin/env python3
"""Train and evaluate detectors with pisa_d2: a script over ``pisa_d2.train_net``."""

from pisa_d2.train_net import Trainer, load_config, main, run, setup

__all__ = ["Trainer", "load_config", "main", "run", "setup"]

if __name__ == "__main__":
    run()
