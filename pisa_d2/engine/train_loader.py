"""A loader of training batches that can start at any iteration."""

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

# Seconds for which a process that loads data continues after SIGTERM, see outlive_signals.
LINGER = 60


class _SeededDataset(Dataset):
    """A dataset with keys (position in the training, index), whose position seeds the mapper."""

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
    Let a process that loads data survive SIGTERM and Ctrl-C, as a ``worker_init_fn``. These reach
    all processes, but the training still needs batches to end its step; it then ends the loading
    processes itself.
    """
    # With status 0: any other would interrupt the training at that moment.
    signal.signal(signal.SIGALRM, lambda signum, frame: os._exit(0))
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(LINGER))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


class TrainLoader:
    """
    The training batches of Detectron2's loader, in its sequence, from any iteration on.

    Batch i and its random augmentation depend only on the config, the seed and the number of
    processes, not on earlier batches or on ``NUM_WORKERS``.

    Attributes:
        seed: the seed of the sequence and the augmentation, at least 0, equal on all processes.
        start: the iteration to begin with. Both are read when the first batch is loaded.
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
            dataset: dicts in Detectron2's format, with "width" and "height" to group them.
            make_sampler: makes the endless sequence of indices of the dataset for this process,
                seeded from NumPy's global generator, as Detectron2's samplers are.
            mapper: turns an element of ``dataset`` into a model's input.
            batch_size: number of images per step on this process.
            aspect_ratio_grouping: whether the images of a batch are all wide or all high.
            num_workers: number of processes that load data; 0 loads in this process.
        """
        self.seed = 0
        self.start = 0
        # Serialized: of a list of dicts, each process that loads data would end up with a copy.
        self._dicts = DatasetFromList(dataset, copy=False)
        self._mapped = MapDataset(self._dicts, mapper)
        self._make_sampler = make_sampler
        self._wide = [aspect_ratio_grouping and d["width"] > d["height"] for d in dataset]
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._batches: Generator[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        # A generator does nothing before the first batch. Detectron2 0.6 calls this before it loads
        # a checkpoint, which sets the seed and the start.
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
            generator=torch.Generator(),  # its own, not the generator of the training steps
        )
        # Its processes inherit the block, until outlive_signals runs seconds later in spawned ones.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield from batches

    def _sample_batches(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the batches of a training from its first on, each image as (position, index)."""
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
    Build a :class:`TrainLoader` from a config, like Detectron2's ``build_detection_train_loader``.

    Args:
        mapper: by default Detectron2's ``DatasetMapper``.

    Returns:
        A :class:`TrainLoader`. If a dataset is not a list of dicts, or has no sizes of images
        although they are grouped by aspect ratio: Detectron2's loader, which restarts each time.

    Raises:
        ValueError: the batch cannot be divided among the processes.
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
