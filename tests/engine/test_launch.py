import multiprocessing.connection
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from pisa_d2.engine import launch
from pisa_d2.engine.launch import ENVIRONMENT, _wait_for


def test_one_process_needs_no_other():
    assert launch(os.getpid, 1) == os.getpid()


def test_several_machines_need_an_address():
    with pytest.raises(ValueError, match="dist_url='auto' is for one machine"):
        launch(os.getpid, 2, num_machines=2)


@pytest.mark.parametrize(
    "ranks, message",
    [
        ((0, 2, 0, 2), "2 processes were started on this machine, which has 1 GPUs"),
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


FORK = multiprocessing.get_context("fork")


def wait(pipe, stays):
    """Wait for a signal; with ``stays``, ignore SIGTERM."""
    if stays:
        signal.signal(signal.SIGTERM, lambda signum, frame: os.write(pipe, b"t"))
    os.write(pipe, b"w")
    for _ in range(60):
        time.sleep(1)


def wait_for_two(pipe, stays):
    processes = [FORK.Process(target=wait, args=(pipe, stays)) for _ in range(2)]
    for process in processes:
        process.start()
    wait_for_any = multiprocessing.connection.wait

    def tell_once(sentinels):
        # The handlers are set by now; an earlier signal would end this process at once.
        multiprocessing.connection.wait = wait_for_any
        os.write(pipe, b"p")
        return wait_for_any(sentinels)

    multiprocessing.connection.wait = tell_once
    try:
        _wait_for(SimpleNamespace(processes=processes))
    except KeyboardInterrupt:
        os._exit(130)


@pytest.mark.parametrize("stays", [False, True])
def test_ctrl_c_ends_processes_that_save_nothing_and_the_second_those_that_do_not_listen(stays):
    read, write = os.pipe()
    process = FORK.Process(target=wait_for_two, args=(write, stays))
    process.start()
    os.close(write)
    assert sorted(os.read(read, 1) for _ in range(3)) == [b"p", b"w", b"w"]
    os.kill(process.pid, signal.SIGINT)
    if stays:
        assert os.read(read, 1) + os.read(read, 1) == b"tt"
        os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == (-signal.SIGINT if stays else 130)
    assert os.read(read, 1) == b""  # all processes that could write have ended
    os.close(read)
