import itertools
import random

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetFromList, MapDataset
from detectron2.data.build import build_batch_data_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from jobs import digits_cfg

from pisa_d2.data import make_digits, register_digits
from pisa_d2.data.catalog import register_dataset
from pisa_d2.engine import TrainLoader, build_train_loader

DICTS = [{"id": i, "width": 10 + i % 3, "height": 11} for i in range(20)]
SAMPLERS = {
    "uniform": lambda dicts, seed=None: TrainingSampler(len(dicts), seed=seed),
    "repeat": lambda dicts, seed=None: RepeatFactorTrainingSampler(
        torch.linspace(1, 2, len(dicts)), seed=seed
    ),
}


def with_draws(d):
    return {**d, "draws": (random.random(), np.random.rand(), torch.rand(()).item())}


def loader_of(sampler="uniform", start=0, **settings):
    loader = TrainLoader(DICTS, SAMPLERS[sampler], with_draws, batch_size=3, **settings)
    loader.seed, loader.start = 5, start
    return loader


def take(loader, num):
    batches = [batch for batch in itertools.islice(loader, num)]
    if isinstance(loader, TrainLoader):
        loader.close()
    return batches


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_batches_are_those_of_detectron2s_loader(sampler, grouping, monkeypatch):
    seeds = []
    make = SAMPLERS[sampler]
    monkeypatch.setitem(SAMPLERS, sampler, lambda dicts: seeds.append(make(dicts)) or seeds[0])
    found = take(loader_of(sampler, aspect_ratio_grouping=grouping), 30)
    theirs = build_batch_data_loader(
        MapDataset(DatasetFromList(DICTS), lambda d: d),
        make(DICTS, seed=seeds[0]._seed),
        total_batch_size=3,
        aspect_ratio_grouping=grouping,
    )
    ids = [[d["id"] for d in batch] for batch in found]
    assert ids == [[d["id"] for d in batch] for batch in take(theirs, 30)]


@pytest.mark.parametrize("grouping", [True, False])
def test_a_loader_that_starts_later_gives_the_same_batches_by_any_number_of_workers(grouping):
    batches = take(loader_of(aspect_ratio_grouping=grouping), 12)
    for start, num_workers in ((0, 2), (1, 0), (7, 2), (11, 0)):
        loader = loader_of(start=start, num_workers=num_workers, aspect_ratio_grouping=grouping)
        assert take(loader, 12 - start) == batches[start:]


def test_images_of_a_batch_and_the_same_image_later_are_augmented_differently():
    draws = [d["draws"] for batch in take(loader_of(), 30) for d in batch]
    assert len(set(draws)) == len(draws)


def test_loading_leaves_the_generators_of_the_step_alone():
    states = []
    for num in (0, 4):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        take(loader_of(), num)
        states.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert states[0] == states[1]


def test_processes_share_the_sequence(monkeypatch):
    alone = [d["id"] for batch in take(loader_of(aspect_ratio_grouping=False), 8) for d in batch]
    monkeypatch.setattr(
        "detectron2.utils.comm.shared_random_seed", lambda: np.random.randint(2**31)
    )
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        own = [d for batch in take(loader_of(aspect_ratio_grouping=False), 4) for d in batch]
        assert [d["id"] for d in own] == alone[rank::2]


def test_detectron2s_own_loader_serves_where_sizes_are_not_known(tmp_path):
    make_digits(tmp_path, num_train=4, num_val=1)
    register_digits(tmp_path)
    assert isinstance(build_train_loader(digits_cfg()), TrainLoader)
    dicts = DatasetCatalog.get("digits_train")
    for d in dicts:
        del d["width"], d["height"]
    register_dataset("digits_train", lambda: dicts)
    loader = build_train_loader(digits_cfg())
    assert not isinstance(loader, TrainLoader)
    ungrouped = digits_cfg("DATALOADER.ASPECT_RATIO_GROUPING", "False")
    assert isinstance(build_train_loader(ungrouped), TrainLoader)


def test_samplers_that_read_the_dataset_are_resumed_too(tmp_path):
    make_digits(tmp_path, num_train=8, num_val=1)
    register_digits(tmp_path)
    repeat = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]
    cfg = digits_cfg(*repeat, "DATALOADER.REPEAT_THRESHOLD", "0.9")
    batches = take(build_train_loader(cfg), 6)
    loader = build_train_loader(cfg)
    loader.start = 4
    for batch, expected in zip(take(loader, 2), batches[4:], strict=True):
        assert [d["image_id"] for d in batch] == [d["image_id"] for d in expected]
        assert all(
            torch.equal(d["image"], e["image"]) for d, e in zip(batch, expected, strict=True)
        )
