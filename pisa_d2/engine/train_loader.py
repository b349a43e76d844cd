import itertools
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MapDataset, build_detection_train_loader
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from ..config import ignored_ioa_thresh
from ..data.regions import KeepRegions, without_regions_alone
from ..regions import warn_of_gaps
from .seeding import seeded

Batch = list[dict[str, Any]]

# Seconds that a process which loads data goes on after SIGTERM, see outlive_signals.
LINGER = 60


class _SeededDataset(Dataset):
    """Its keys are (position in the training's sequence, index); the first seeds the mapper."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        position, index = key
        with seeded(self.seed, 0, position):
            return self.dataset[index]


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def outlive_signals(worker_id: int) -> None:
    """
    A ``worker_init_fn``: SIGTERM of a scheduler and Ctrl-C reach all processes, and the training
    still needs batches to end its step. The training ends those that load them.
    """
    # With status 0, as any other would break off what the training does at that moment.
    signal.signal(signal.SIGALRM, lambda signum, frame: os._exit(0))
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(LINGER))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


class TrainLoader:
    """
    The training batches of Detectron2's loader, in its sequence, from any iteration on.

    Batch i and the random augmentation in it depend on the config, the seed and the number of
    processes alone: not on the batches that were loaded before, nor on ``NUM_WORKERS``.

    Attributes:
        seed: of the sequence and the augmentation, at least 0, the same on all processes.
        start: the iteration to begin with. Both count when the first batch is asked for.
    """

    def __init__(
        self,
        dataset: list[dict],
        make_sampler: Callable[[Dataset], Iterable[int]],
        mapper: Callable[[dict], dict],
        *,
        batch_size: int,
        aspect_ratio_grouping: bool = True,
        num_workers: int = 0,
    ) -> None:
        """
        Args:
            dataset: in Detectron2's format; with "width" and "height" if they are grouped.
            make_sampler: gives the endless sequence of indices of the data set for this process,
                seeded from NumPy's global generator, as Detectron2's samplers are.
            mapper: makes a model's input of an element of ``dataset``.
            batch_size: for this process.
            aspect_ratio_grouping: batches are of images that are all wide, or all high.
        """
        self.seed = 0
        self.start = 0
        # Serialized: a list of dicts would be copied to each process that loads data, in time.
        self._dicts = DatasetFromList(dataset, copy=False)
        self._mapped = MapDataset(self._dicts, mapper)
        self._make_sampler = make_sampler
        self._wide = [aspect_ratio_grouping and d["width"] > d["height"] for d in dataset]
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._batches: Generator[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        # A generator does nothing before the first batch: Detectron2 0.6 calls this before it
        # loads a checkpoint, and with it the seed and where to start.
        self._batches = self._load()
        return self._batches

    def close(self) -> None:
        """End the processes that load data."""
        if self._batches is not None:
            self._batches.close()

    def _load(self) -> Generator[Batch]:
        loader = DataLoader(
            _SeededDataset(self._mapped, self.seed),
            batch_sampler=itertools.islice(self._sample_batches(), self.start, None),
            num_workers=self._num_workers,
            collate_fn=list,
            worker_init_fn=outlive_signals,
            generator=torch.Generator(),  # or it would draw from the one that a step draws from
        )
        # Inherited by its processes, which take seconds to start where they are spawned.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield from batches

    def _sample_batches(self) -> Iterator[list[tuple[int, int]]]:
        """The batches of a training, from its first; an image as its (position, index)."""
        with seeded(self.seed, 1):
            sampler = self._make_sampler(self._dicts)
        rank, world_size = comm.get_rank(), comm.get_world_size()
        waiting: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        for position, index in zip(itertools.count(rank, world_size), sampler, strict=False):
            batch = waiting[self._wide[index]]
            batch.append((position, index))
            if len(batch) == self._batch_size:
                yield batch.copy()
                batch.clear()


def build_train_loader(cfg: CfgNode, mapper: Callable | None = None) -> Iterable[Batch]:
    """
    A :class:`TrainLoader` of what ``cfg`` says, as Detectron2's ``build_detection_train_loader``.

    Args:
        mapper: by default Detectron2's ``DatasetMapper``.

    Returns:
        Detectron2's own loader, which starts anew each time, where a data set is no list of dicts,
        or these do not tell the images' sizes and they are to be grouped by aspect ratio.
    """
    from_config = build_detection_train_loader.from_config
    settings = from_config(cfg, mapper=mapper)
    if ignored_ioa_thresh(cfg) is not None:
        warn_of_gaps(cfg)
        mapper = KeepRegions(settings["mapper"])
        dataset = settings["dataset"]
        if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and isinstance(dataset, list):
            dataset = without_regions_alone(dataset)
        settings = from_config(cfg, mapper=mapper, dataset=dataset)
    dataset, grouping = settings["dataset"], settings["aspect_ratio_grouping"]
    if not isinstance(dataset, list) or (grouping and any("width" not in d for d in dataset)):
        return build_detection_train_loader(**settings)
    world_size = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH = {cfg.SOLVER.IMS_PER_BATCH} is not allowed: it must be "
            f"divisible by the number of processes, {world_size}."
        )
    return TrainLoader(
        dataset,
        lambda dicts: from_config(cfg, mapper=mapper, dataset=dicts)["sampler"],
        settings["mapper"],
        batch_size=cfg.SOLVER.IMS_PER_BATCH // world_size,
        aspect_ratio_grouping=grouping,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
