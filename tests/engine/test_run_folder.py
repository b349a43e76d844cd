import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
from helpers import ROOT, small_cfg
from torch import nn

from pisa_d2.engine.run_folder import (
    check_output,
    check_room,
    check_run,
    evaluation_config,
    occupied,
)


def refused(folder):
    return pytest.raises(OSError, match=rf"OUTPUT_DIR = '{folder}' cannot be written to \(.*room")


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_file_in_the_place_of_the_output_folder_is_refused(tmp_path, folder):
    (tmp_path / "file").touch()
    with refused(tmp_path / folder):
        check_output(str(tmp_path / folder))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_without_permission_to_write_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with refused(tmp_path):
        check_output(str(tmp_path))
    with refused(tmp_path / "below"):
        check_output(str(tmp_path / "below"))


def test_a_write_that_the_system_refuses_is_an_error_before_training(tmp_path):
    # Replaces a full disk, which only root could make.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with refused(tmp_path):
            check_output(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def full_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_an_error_before_training(full_disk):
    with refused(full_disk):
        check_output(str(full_disk))


def test_a_disk_without_room_for_a_checkpoint_is_an_error_before_training(tmp_path, monkeypatch):
    model = nn.Linear(1024, 1024, bias=False)  # 4 MiB, and 4 MiB of momentum
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**23))
    check_room(str(tmp_path), model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(7 * 2**20))
    with pytest.raises(OSError, match=rf"OUTPUT_DIR = '{tmp_path}' has 7 MiB left.*about 8 MiB"):
        check_room(str(tmp_path), model)


HOLD = """
import sys, time, os
from pisa_d2.engine.run_folder import occupied
with occupied(sys.argv[1]):
    if len(sys.argv) > 2 and not os.fork():
        time.sleep(60)  # as a process that loads data, and does not hear that the training ended
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder, *words):
    """Start a process that occupies the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.slow
def test_a_folder_is_refused_while_another_training_runs_in_it_and_free_when_that_is_killed(
    tmp_path,
):
    folder = tmp_path / "run"
    other = hold(folder, "with a process of its own that survives it")
    try:
        message = rf"running in OUTPUT_DIR = '{folder}' \(process {other.pid} on .*choose another"
        with pytest.raises(RuntimeError, match=message), occupied(str(folder)):
            pytest.fail("was let in")
        other.kill()
        other.wait()
        with occupied(str(folder)):
            pass
    finally:
        os.killpg(other.pid, 9)


def is_free(folder):
    script = f"import fcntl; fcntl.lockf(open({str(folder / '.lock')!r}, 'a'), 6)  # EX | NB"
    return subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def test_a_folder_is_held_while_the_training_runs_and_free_when_it_ends_by_an_error_too(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), occupied(str(tmp_path)):
            assert not is_free(tmp_path)
            1 / 0  # noqa: B018
        assert is_free(tmp_path)
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on")


def test_only_the_main_process_locks_and_a_file_system_without_locks_is_a_warning(
    tmp_path, monkeypatch, caplog
):
    from pisa_d2.engine import run_folder

    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "lockf", no_locks)
    with occupied(str(tmp_path)):
        assert f"OUTPUT_DIR = '{tmp_path}' has no locks" in caplog.text
    caplog.clear()
    monkeypatch.setattr(run_folder.comm, "is_main_process", lambda: False)
    with occupied(str(tmp_path / "other")):
        assert not caplog.text and not (tmp_path / "other").exists()


def config_of(folder, *opts):
    return small_cfg("OUTPUT_DIR", str(folder), *opts)


def store(folder, *opts, checkpoint="last_checkpoint"):
    """Write the files that a run leaves."""
    (folder / "config.yaml").write_text(config_of(folder, *opts).dump())
    (folder / checkpoint).touch()


@pytest.mark.parametrize("name", ["last_checkpoint", "model_final.pth", "model_0000099.pth"])
def test_a_new_run_is_refused_where_another_ones_checkpoints_lie(tmp_path, name):
    store(tmp_path, checkpoint=name)
    message = rf"OUTPUT_DIR = '{tmp_path}' has checkpoints .*{name}.*--resume.*another OUTPUT_DIR"
    with pytest.raises(ValueError, match=message):
        check_run(config_of(tmp_path), resume=False)
    assert check_run(config_of(tmp_path), resume=True) == ""


def test_a_new_run_may_start_beside_weights_and_where_none_was_saved(tmp_path):
    store(tmp_path, "SOLVER.BASE_LR", 1.0, checkpoint="model_zoo.pth")
    for resume in (False, True):
        cfg = config_of(tmp_path)
        before = cfg.dump()
        assert check_run(cfg, resume) == "" and cfg.dump() == before
    assert check_run(config_of(tmp_path / "new"), resume=False) == ""


def test_a_resumed_run_is_told_which_settings_changed_and_which_value_counts(tmp_path):
    store(tmp_path, "SOLVER.BASE_LR", 0.02, "SOLVER.STEPS", (5,), "SOLVER.MAX_ITER", 10, "SEED", 3)
    options = ["SOLVER.BASE_LR", 0.001, "SOLVER.STEPS", (7,), "SOLVER.MAX_ITER", 20]
    options += ["SEED", -1, "MODEL.WEIGHTS", "other.pkl"]
    cfg = config_of(tmp_path / "." / "", *options)
    warning = check_run(cfg, resume=True)
    kept, new = warning.split("The new value is used for:")
    assert f"'{tmp_path}/config.yaml'" in kept and "MODEL.WEIGHTS, another OUTPUT_DIR" in kept
    assert "SOLVER.BASE_LR: 0.02, not 0.001" in kept
    assert "SEED: 3, not -1" in kept
    assert "MODEL.WEIGHTS: '', not 'other.pkl'" in kept
    assert new.split("\n")[1:] == [
        "  SOLVER.MAX_ITER: 20, before 10",
        "  SOLVER.STEPS: [7], before [5]",
    ]
    # The folder gets the values with which the run continues, not the given ones.
    assert (cfg.SOLVER.BASE_LR, cfg.SEED, cfg.MODEL.WEIGHTS) == (0.02, 3, "")
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (20, (7,))


def test_keys_that_only_one_of_both_configs_has_are_named(tmp_path):
    store(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("MAX_ITER:", "MAX_ITERATIONS:"))
    warning = check_run(config_of(tmp_path, "SOLVER.MAX_ITER", 7), resume=True)
    assert "SOLVER.MAX_ITERATIONS: '(not set)', before " in warning
    assert "SOLVER.MAX_ITER: 7, before '(not set)'" in warning


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), ("a: [", "cannot be read"), ("", "is not a config")],
)
def test_a_stored_config_that_cannot_be_compared_is_named(tmp_path, content, reason):
    store(tmp_path)
    (tmp_path / "config.yaml").unlink()
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    warning = check_run(config_of(tmp_path), resume=True)
    assert f"'{tmp_path}/config.yaml'" in warning and reason in warning
    assert warning.endswith("were not compared.")


def test_an_evaluation_leaves_the_config_of_the_run_alone(tmp_path):
    store(tmp_path, "SEED", 5)
    stored = (tmp_path / "config.yaml").read_text()
    cfg = config_of(tmp_path, "SEED", 6)
    folder = evaluation_config(cfg).OUTPUT_DIR
    assert folder == str(tmp_path / "inference")
    assert (tmp_path / "config.yaml").read_text() == stored
    (tmp_path / "config.yaml").unlink()
    evaluation_config(cfg)
    assert (tmp_path / "config.yaml").read_text() == cfg.dump()
