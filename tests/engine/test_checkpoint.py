import logging
import os
import pickle
import resource

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from helpers import small_cfg
from torch import nn

from pisa_d2.engine import Checkpointer


class Steps:
    """A substitute for a trainer."""

    iteration = 0

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


@pytest.fixture
def checkpointer(tmp_path):
    checkpointer = Checkpointer(nn.Linear(2, 2), str(tmp_path), trainer=Steps())
    for iteration in (1, 3):
        checkpointer.checkpointables["trainer"].iteration = iteration
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        os.utime(tmp_path / f"model_{iteration:07d}.pth", (iteration, iteration))
    return checkpointer


def resumed_from(tmp_path):
    checkpointer = Checkpointer(nn.Linear(2, 2), str(tmp_path), trainer=Steps())
    checkpointer.resume_or_load("")
    return checkpointer.checkpointables["trainer"].iteration


@pytest.mark.parametrize("damage", ["half", "empty", "noise", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    checkpointer, tmp_path, damage, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("fvcore"), "propagate", True)
    assert resumed_from(tmp_path) == 3
    last = tmp_path / "model_0000003.pth"
    content = last.read_bytes()
    last.write_bytes({"half": content[: len(content) // 2], "noise": b"noise"}.get(damage, b""))
    if damage == "missing":
        last.unlink()
    assert resumed_from(tmp_path) == 1
    assert f"Checkpoint '{last}' is damaged" in caplog.text

    (tmp_path / "model_0000001.pth").write_bytes(b"")
    with pytest.raises(RuntimeError, match=f"None of the checkpoints in '{tmp_path}' can be read"):
        resumed_from(tmp_path)


def test_weights_alone_are_not_resumed_from(checkpointer, tmp_path):
    torch.save({"model": {}}, tmp_path / "model_best.pth")
    (tmp_path / "model_0000003.pth").write_bytes(b"")
    assert resumed_from(tmp_path) == 1


@pytest.mark.parametrize("what", ["checkpoint", "pointer"])
def test_a_checkpoint_that_is_cut_off_while_it_is_written_hides_nothing(
    checkpointer, tmp_path, what, monkeypatch
):
    before = (tmp_path / "model_0000003.pth").read_bytes()

    def cut_off(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if what == "checkpoint":
            patch.setattr(torch, "save", lambda data, file: file.write(b"half") and cut_off())
        else:
            patch.setattr(checkpointer, "tag_last_checkpoint", cut_off)
        checkpointer.save("model_0000005")
    assert (tmp_path / "model_0000005.pth").exists() == (what == "pointer")
    assert (tmp_path / "model_0000003.pth").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))
    assert resumed_from(tmp_path) == 3


def test_a_disk_that_is_full_is_named_and_keeps_no_part_of_a_checkpoint(checkpointer, tmp_path):
    # A limit replaces a full disk, which only root could make.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**9, before[1]))
    try:
        with pytest.raises(OSError, match=r"model_0000005\.pth' could not be written .*MiB left"):
            checkpointer.save("model_0000005")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("*0005*"))
    assert resumed_from(tmp_path) == 3


def test_a_checkpoint_is_read_once(checkpointer, tmp_path, monkeypatch):
    read = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda f, **kwargs: read.append(f) or load(f, **kwargs))
    assert resumed_from(tmp_path) == 3
    assert read == [str(tmp_path / "model_0000003.pth")]


def test_without_checkpoints_it_loads_the_weights_that_are_named(checkpointer, tmp_path):
    other = Checkpointer(nn.Linear(2, 2), str(tmp_path / "other"), trainer=Steps())
    other.resume_or_load(str(tmp_path / "model_0000003.pth"))
    assert other.checkpointables["trainer"].iteration == 0
    torch.testing.assert_close(other.model.state_dict(), checkpointer.model.state_dict())


def load(model, path, whole=False):
    Checkpointer(model).resume_or_load(str(path), resume=False, whole=whole)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.pth", b"<html>404</html>", "is not a checkpoint, or damaged"),
        ("a.pth", b"", "is not a checkpoint, or damaged"),
        ("a.pkl", b"version https://git-lfs.github.com/spec/v1", "is not a checkpoint, or damaged"),
        ("a.pkl", pickle.dumps([1, 2]), "is not a checkpoint, or damaged"),
        ("a.pth", {"state_dict": {}, "epoch": 3}, r"contains \['state_dict', 'epoch'\]"),
        ("a.pth", {"model": [1]}, "contains list"),
        (
            "a.pth",
            {"conv1.weight": torch.ones(2)},
            r"like \['conv1.weight'\], the model's .*'bias'",
        ),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, name, content, reason):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=rf"'{path}' cannot be loaded: it .*{reason}"):
        load(nn.Linear(2, 2), path)


def test_a_file_that_is_not_there_and_weights_that_are_not_named_are_errors(tmp_path):
    path = tmp_path / "a.pth"
    for whole in (False, True):
        with pytest.raises(FileNotFoundError, match=f"MODEL.WEIGHTS = '{path}': there is no"):
            load(nn.Linear(2, 2), path, whole)
    load(nn.Linear(2, 2), "")
    with pytest.raises(ValueError, match="no weights to load: name a checkpoint"):
        load(nn.Linear(2, 2), "", whole=True)


def test_a_bare_state_dict_is_loaded(tmp_path):
    source, model = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    load(model, tmp_path / "bare.pth", whole=True)
    torch.testing.assert_close(model.state_dict(), source.state_dict())


@pytest.fixture(scope="module")
def run_of_three_classes(tmp_path_factory):
    """Make the folder of a run, and a model with a different number of classes."""
    folder = tmp_path_factory.mktemp("run")
    model = build_model(small_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 3))
    DetectionCheckpointer(model, str(folder)).save("model_final", iteration=9)
    return folder, model, build_model(small_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 5))


WRONG = r"model_final\.pth' cannot be loaded.*different model.*\(4, 32\) there and \(6, 32\) here"


def test_a_run_of_another_class_count_is_neither_resumed_nor_evaluated(run_of_three_classes):
    folder, same, other = run_of_three_classes
    Checkpointer(same, str(folder)).resume_or_load("")
    load(same, folder / "model_final.pth", whole=True)
    with pytest.raises(ValueError, match=WRONG):
        Checkpointer(other, str(folder)).resume_or_load("")
    with pytest.raises(ValueError, match=WRONG):
        load(other, folder / "model_final.pth", whole=True)


def test_training_may_start_from_another_class_count_and_names_what_is_left_out(
    run_of_three_classes, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("fvcore"), "propagate", True)
    folder, _, other = run_of_three_classes
    # There is nothing to resume in this folder.
    Checkpointer(other, str(tmp_path)).resume_or_load(str(folder / "model_final.pth"))
    assert "cls_score.weight" in caplog.text and "incompatible shapes" in caplog.text


def test_parameters_that_are_missing_are_an_error_where_all_are_needed(tmp_path):
    model = nn.Linear(2, 3)
    torch.save({"model": {"weight": torch.ones(3, 2)}}, tmp_path / "half.pth")
    load(model, tmp_path / "half.pth")
    with pytest.raises(ValueError, match="1 of the 2 parameters are missing, such as bias"):
        load(model, tmp_path / "half.pth", whole=True)


def test_a_checkpoint_saved_in_parallel_is_loaded_by_the_same_names(tmp_path):
    model = nn.Linear(2, 3)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "parallel.pth")
    load(model, tmp_path / "parallel.pth", whole=True)
    with pytest.raises(ValueError, match=r"bias has the shape \(3,\) there and \(4,\) here"):
        load(nn.Linear(2, 4), tmp_path / "parallel.pth", whole=True)
