import logging
import os

import pytest
import torch
from torch import nn

from pisa_d2.engine import Checkpointer


class Steps:
    """Stands in for a trainer."""

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
    assert resumed_from(tmp_path) == 3


def test_without_checkpoints_it_loads_the_weights_that_are_named(checkpointer, tmp_path):
    other = Checkpointer(nn.Linear(2, 2), str(tmp_path / "other"), trainer=Steps())
    other.resume_or_load(str(tmp_path / "model_0000003.pth"))
    assert other.checkpointables["trainer"].iteration == 0
    torch.testing.assert_close(other.model.state_dict(), checkpointer.model.state_dict())
