#!/usr/bin/env python3
"""Train a whole detector under a control of HeadStudy: pisa_d2's train_net.py with its key."""

from functools import partial

from head_study.controls import add_head_study_config

from pisa_d2 import train_net

if __name__ == "__main__":
    train_net.run(partial(train_net.main, add_config=add_head_study_config), add_head_study_config)
