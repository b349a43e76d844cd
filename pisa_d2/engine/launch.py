"""
Starting the processes of a training, or joining processes that torchrun (or a cluster's scheduler,
with the same environment variables) has started. NCCL connects GPUs, gloo connects CPUs.
"""

import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import record

from .signals import on_signals

# Variables that torchrun sets for a process; torch itself reads MASTER_ADDR and MASTER_PORT.
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

# Seconds that the other processes have to end by themselves after one has failed. A process that
# waits for NCCL reacts to no signal but SIGKILL.
GRACE = 20


def _create_local_process_group(size: int) -> None:
    """Tell ``comm`` the ``size`` processes on this machine, which have consecutive ranks."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(size)
        return
    for first in range(0, dist.get_world_size(), size):  # 0.6: each process makes all groups
        group = dist.new_group(list(range(first, first + size)))
        if first <= dist.get_rank() < first + size:
            comm._LOCAL_PROCESS_GROUP = group


def _join(rank: int, world_size: int, local_rank: int, local_size: int, where: dict) -> None:
    """
    Join the other processes.

    Args:
        where: arguments of ``init_process_group`` by which the processes meet, with "backend".
    """
    if world_size % local_size:
        raise ValueError(
            f"{world_size} processes in all cannot be {local_size} on each machine: start the same "
            "number on each."
        )
    if where["backend"] == "nccl":
        if local_size > torch.cuda.device_count():
            raise ValueError(
                f"{local_size} processes were started on this machine, which has "
                f"{torch.cuda.device_count()} GPUs: start one process for each GPU, or set "
                "MODEL.DEVICE to cpu."
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group(rank=rank, world_size=world_size, timeout=DEFAULT_TIMEOUT, **where)
    _create_local_process_group(local_size)
    comm.synchronize()


def _join_from_environment(backend: str) -> None:
    rank, world_size, local_rank, local_size = (int(os.environ[name]) for name in ENVIRONMENT)
    store = next(dist.rendezvous("env://", timeout=DEFAULT_TIMEOUT))[0]
    if world_size == local_size:
        # torchrun's store, with the addresses of processes that have ended, outlives a restart
        # (pytorch issue 135712). Restart counts can differ between machines.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    _join(rank, world_size, local_rank, local_size, {"backend": backend, "store": store})


def _worker(
    local_rank: int,
    main_func: Callable,
    args: tuple,
    local_size: int,
    num_machines: int,
    machine_rank: int,
    where: dict,
) -> None:
    rank = machine_rank * local_size + local_rank
    _join(rank, num_machines * local_size, local_rank, local_size, where)
    main_func(*args)
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _wait_for(context: mp.ProcessContext) -> None:
    """
    Wait until all processes are done, or one fails; then end the others.

    Raises:
        SystemExit: a process exited with a status of its own, which becomes this process's status.
        KeyboardInterrupt: Ctrl-C came when there was nothing to save.
        ProcessRaisedException: a process raised an exception; with its traceback.
        ProcessExitedException: a process was killed.
    """
    processes = context.processes

    told: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signum in told:  # the second Ctrl-C
            for process in processes:
                process.kill()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        told.append(signum)
        for process in processes:
            process.terminate()  # not SIGINT, which a terminal itself sends to all

    with on_signals(forward):
        running = list(processes)
        while running and not any(process.exitcode for process in processes):
            multiprocessing.connection.wait([process.sentinel for process in running])
            running = [process for process in running if process.exitcode is None]
        # Newer versions of torch do so in join(); older ones wait forever.
        timer = threading.Timer(GRACE, lambda: [process.kill() for process in running])
        timer.start()
        try:
            status = max(process.exitcode or 0 for process in processes)
            if status > 1 or signal.SIGINT in told:  # they end by themselves, or were told to
                for process in running:
                    process.join()
                if status > 1:
                    sys.exit(status)
                raise KeyboardInterrupt
            while not context.join():
                pass
        finally:
            timer.cancel()


def launch(
    main_func: Callable,
    num_processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple = (),
    device: str = "cuda",
) -> Any:
    """
    Call ``main_func(*args)`` on each process of a training. Call this on all machines.

    Compared with Detectron2's function, this one also starts processes on CPUs with Detectron2 0.6;
    starts no process under torchrun; passes SIGTERM and Ctrl-C on to all processes; makes the exit
    status of a process the job's; and ends the other processes within :data:`GRACE` seconds when
    one fails.

    Args:
        num_processes: the number on this machine, the same on each: one per GPU, or any number on
            CPUs. Under torchrun this and the next three arguments are ignored, since its
            environment has them.
        num_machines, machine_rank: the number of machines, and the index of this one.
        dist_url: the address at which the processes meet, such as "tcp://10.0.0.1:29500"; "auto"
            finds a free port on a single machine.
        device: the ``MODEL.DEVICE`` to train on; without a GPU, the CPU is used.

    Returns:
        The result of ``main_func`` if no process was started.

    Raises:
        ValueError: there are fewer GPUs than processes, or ``dist_url`` is "auto" on several
            machines.
    """
    backend = "nccl" if device.startswith("cuda") and torch.cuda.is_available() else "gloo"
    if all(name in os.environ for name in ENVIRONMENT):
        _join_from_environment(backend)
        result = record(main_func)(*args)  # record makes torchrun report the error
        dist.destroy_process_group()
        return result
    if num_machines * num_processes == 1:
        return main_func(*args)
    if dist_url == "auto":
        if num_machines > 1:
            raise ValueError(
                "dist_url='auto' is for one machine: give an address that all machines can reach."
            )
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    if backend == "gloo":  # or each process would take all cores; torchrun allows one thread
        threads = max(1, (os.cpu_count() or 1) // num_processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    where = {"backend": backend, "init_method": dist_url}
    context = mp.start_processes(
        _worker,
        args=(main_func, args, num_processes, num_machines, machine_rank, where),
        nprocs=num_processes,
        join=False,
        start_method="spawn",
    )
    return _wait_for(context)
