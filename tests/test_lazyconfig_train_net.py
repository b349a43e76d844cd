import argparse
import logging
import sys
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from helpers import locked_by_another_process

from pisa_d2 import lazyconfig_train_net
from pisa_d2.data import make_digits
from pisa_d2.engine import LazyTrainer


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    make_digits(root, num_train=8, num_val=2)
    return root / "digits"


@pytest.fixture
def overrides(digits, monkeypatch):
    """Make overrides for an even smaller model, on a dataset that they register."""
    monkeypatch.setattr(DatasetCatalog, "data", dict(DatasetCatalog.data))
    small = "[{_target_: detectron2.data.transforms.ResizeShortestEdge, short_edge_length: 64}]"
    train, val = (
        [f"lazy_{part}", f"{digits}/annotations/instances_{part}.json", f"{digits}/{part}"]
        for part in ("train", "val")
    )
    return [
        *("train.device=cpu", "train.seed=1", "train.log_period=1", "train.max_iter=4"),
        *("model.roi_heads.batch_size_per_image=16", "train.checkpointer.period=2"),
        f"dataloader.train.mapper.augmentations={small}",
        f"dataloader.test.mapper.augmentations={small}",
        "dataloader.train.total_batch_size=2",
        f"dataloader.register=[[{','.join(train)}],[{','.join(val)}]]",
        *("dataloader.train.dataset.names=lazy_train", "dataloader.test.dataset.names=lazy_val"),
    ]


def arguments(overrides, output, **kwargs):
    name = "LazyConfig/Digits/pisa_faster_rcnn_R_18_FPN.py"
    opts = [*overrides, f"train.output_dir={output}"]
    defaults = {"eval_only": False, "resume": False}
    return argparse.Namespace(**{**defaults, "config_file": name, "opts": opts, **kwargs})


class Stop(HookBase):
    def after_step(self):
        if self.trainer.iter == 2:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_training_ends_as_if_it_had_not_been(overrides, tmp_path):
    lazyconfig_train_net.main(arguments(overrides, tmp_path / "whole"))

    args = arguments(overrides, tmp_path / "parts")
    trainer = LazyTrainer(lazyconfig_train_net.setup(args))
    trainer.register_hooks([Stop()])
    trainer.resume_or_load(resume=False)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    results = lazyconfig_train_net.main(arguments(overrides, tmp_path / "parts", resume=True))
    assert results is None

    whole, parts = (
        torch.load(tmp_path / name / "model_final.pth")["model"] for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_trains_and_its_weights_are_evaluated(overrides, tmp_path):
    short = [*overrides, "train.max_iter=1"]
    assert lazyconfig_train_net.main(arguments(short, tmp_path / "run")) is None
    assert (tmp_path / "run" / "config.yaml").is_file()
    weights = f"train.init_checkpoint={tmp_path}/run/model_final.pth"
    args = arguments([*short, weights], tmp_path / "eval", eval_only=True)
    assert "bbox" in lazyconfig_train_net.main(args)
    path = tmp_path / "run" / "model_final.pth"
    content = torch.load(path, weights_only=True)
    del content["model"]["roi_heads.box_predictor.cls_score.bias"]
    torch.save(content, path)
    with pytest.raises(ValueError, match="cls_score.bias"):
        lazyconfig_train_net.main(args)


def test_a_config_is_found_by_its_name_or_path_and_overridden(tmp_path):
    args = arguments(["train.max_iter=7"], tmp_path)
    cfg = lazyconfig_train_net.load_config(args)
    assert (cfg.train.max_iter, cfg.train.output_dir) == (7, str(tmp_path))
    assert Path(args.config_file).is_absolute()  # of this package
    assert lazyconfig_train_net.load_config(args).train.max_iter == 7
    args.config_file = "LazyConfig/Digits/unheard_of.py"
    with pytest.raises(ValueError, match="unheard_of.py'.*no such file"):
        lazyconfig_train_net.load_config(args)


@pytest.mark.parametrize(("device", "there"), [("cuda", False), ("cuda", True), ("cpu", False)])
def test_without_a_gpu_the_cpu_is_used_with_a_warning(tmp_path, monkeypatch, caplog, device, there):
    logger = logging.getLogger("pisa_d2")
    monkeypatch.setattr(logger, "propagate", True)  # which setting up the log file changes
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(lazyconfig_train_net, "default_setup", lambda cfg, args: None)
    monkeypatch.setattr(lazyconfig_train_net, "setup_logger", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    args = arguments([f"train.device={device}", f"dataloader.register=[[mine,{tmp_path}]]"], "out")
    registered = []
    monkeypatch.setattr(lazyconfig_train_net, "register_datasets", registered.append)
    cfg = lazyconfig_train_net.setup(args)
    assert cfg.train.device == ("cuda" if there else "cpu")
    assert registered == [[["mine", str(tmp_path)]]]
    warned = "No GPU was found: train.device is set to cpu." in caplog.messages
    assert warned == (device == "cuda" and not there)


def test_a_second_training_in_a_folder_is_refused_before_anything_is_written(tmp_path):
    with (
        locked_by_another_process(tmp_path),
        pytest.raises(RuntimeError, match="Another training is running in"),
    ):
        lazyconfig_train_net.main(arguments([], tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_command_line_says_how_many_processes_train_on_what(monkeypatch):
    launched = []
    monkeypatch.setattr(
        lazyconfig_train_net, "launch", lambda *args, **kwargs: launched.append((args, kwargs))
    )
    words = ["--config-file", arguments([], "out").config_file, "--num-gpus", "2"]
    words += ["--num-machines", "3", "--machine-rank", "1", "train.device=cpu"]
    monkeypatch.setattr(sys, "argv", ["lazyconfig_train_net", *words])
    lazyconfig_train_net.run()
    [((function, num), kwargs)] = launched
    assert function is lazyconfig_train_net.main and num == 2
    assert (kwargs["num_machines"], kwargs["machine_rank"], kwargs["device"]) == (3, 1, "cpu")
    assert kwargs["args"][0].opts == ["train.device=cpu"]
