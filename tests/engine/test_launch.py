import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from pisa_d2.engine import launch
from pisa_d2.engine.launch import ENVIRONMENT


def test_one_process_needs_no_other():
    assert launch(os.getpid, 1) == os.getpid()


def test_several_machines_need_an_address():
    with pytest.raises(ValueError, match="dist_url='auto' serves one machine"):
        launch(os.getpid, 2, num_machines=2)


@pytest.mark.parametrize(
    "ranks, message",
    [
        ((0, 2, 0, 2), "2 processes are to run on this machine, which has 1 GPUs"),
        ((0, 3, 0, 2), "3 processes in all cannot be 2 on each machine"),
    ],
)
def test_processes_that_cannot_be_are_refused(ranks, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *args, **kwargs: iter([(None,)]))
    monkeypatch.setattr(torch.distributed, "PrefixStore", lambda name, store: store)
    for name, value in zip(ENVIRONMENT, ranks, strict=True):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match=message):
        launch(os.getpid, 1)


LAUNCH = "import jobs, pisa_d2.engine as e; e.launch(jobs.wait, 2, args=({},), device='cpu')"


@pytest.mark.parametrize("count", [1, 2])
def test_ctrl_c_ends_processes_that_save_nothing_and_the_second_those_that_do_not_listen(count):
    process = subprocess.Popen(
        [sys.executable, "-c", f"if __name__ == '__main__': {LAUNCH.format(count == 2)}"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert sorted(process.stdout.readline() for _ in range(2)) == ["waits\n"] * 2
    process.send_signal(signal.SIGINT)
    if count == 2:
        assert [process.stdout.readline() for _ in range(2)] == ["stays\n"] * 2
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=15)  # until the last of them has closed what it prints to
    assert process.returncode == -signal.SIGINT
