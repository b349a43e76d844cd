import json
import random
import re

import pytest
import torch
from detectron2.engine import default_argument_parser
from jobs import (
    KINDS,
    OBJECTS,
    build,
    command,
    gradients,
    mark_crowds,
    run,
    train_and_save_gradients,
)

from pisa_d2.data import make_digits
from pisa_d2.engine import EXIT_SAVED, launch

pytestmark = pytest.mark.slow

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    make_digits(root, num_train=12, num_val=2)
    mark_crowds(root)
    return root


@pytest.fixture(scope="module")
def uninterrupted(datasets, tmp_path_factory):
    """Make the folder of an uninterrupted run of two processes, with their gradients."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    args = default_argument_parser().parse_args(command("train_net.py", folder)[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(datasets))
        patch.setenv("OMP_NUM_THREADS", "1")
        launch(train_and_save_gradients, 2, args=(args, folder), device="cpu")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_average_of_the_gradients_of_their_own_images(uninterrupted, kind):
    one, other = (gradients(build(kind), rank) for rank in range(len(OBJECTS)))
    average = {name: (one[name] + other[name]) / 2 for name in one}
    for rank in range(len(OBJECTS)):
        found = torch.load(uninterrupted / f"{kind}{rank}.pth", weights_only=True)
        torch.testing.assert_close(found, average)


def test_without_pisa_that_gradient_is_stock_detectron2s(uninterrupted):
    stock, off = (torch.load(uninterrupted / f"{kind}0.pth") for kind in ("stock", "off"))
    torch.testing.assert_close(off, stock, rtol=0, atol=0)


def test_a_run_that_is_killed_stopped_twice_and_killed_ends_as_if_it_had_been_left_alone(
    uninterrupted, datasets, tmp_path
):
    folder = tmp_path / "run"
    rng = random.Random(0)
    at = [rng.choice(iterations) for iterations in ((2, 3), (4,), (6,), (7, 8))]

    # A process of Detectron2's launcher dies.
    words = command("tests/engine/strike.py", folder, "--num-gpus", "2")
    status, printed = run(words, datasets, STRIKE=f"1 {at[0]} SIGKILL self")
    assert status == 1 and "process 1 terminated with signal SIGKILL" in printed, printed
    assert (folder / "last_checkpoint").read_text() == f"model_{at[0] // 2 * 2 - 1:07d}.pth"

    # A scheduler stops all processes, including the ones that load data.
    words = command("tests/engine/strike.py", folder, "--num-gpus", "2", "--resume")
    words += ["DATALOADER.NUM_WORKERS", "1"]
    status, printed = run(words, datasets, STRIKE=f"0 {at[1]} SIGTERM group")
    assert status == EXIT_SAVED, printed
    assert f"SIGTERM: saved model_{at[1]:07d}.pth after iteration {at[1]}" in printed
    assert (folder / "last_checkpoint").read_text() == f"model_{at[1]:07d}.pth"

    # Ctrl-C, which a terminal sends to all processes too.
    status, printed = run(words, datasets, STRIKE=f"1 {at[2]} SIGINT group")
    assert status == EXIT_SAVED and "Ctrl-C again ends at once" in printed, printed
    assert f"Ctrl-C: saved model_{at[2]:07d}.pth after iteration {at[2]}" in printed

    # A process of torchrun dies, and torchrun restarts all.
    words = command("tests/engine/strike.py", folder, "--resume")
    words = [*TORCHRUN, "--max-restarts", "1", *words]
    status, printed = run(words, datasets, STRIKE=f"1 {at[3]} SIGKILL self")
    assert status == 0, printed
    starts = re.findall(r"Starting training from iteration (\d+)", printed)
    assert starts == [str(at[2] + 1), str(max(at[2] + 1, at[3] // 2 * 2))]

    final, expected = (torch.load(f / "model_final.pth") for f in (folder, uninterrupted))
    torch.testing.assert_close(final, expected, rtol=0, atol=0)
    lines = [(f / "metrics.json").read_text().splitlines() for f in (folder, uninterrupted)]
    losses, expected = (json.loads(line[-2]) for line in lines)  # the last is the evaluation
    assert (losses["iteration"], losses["lr"]) == (expected["iteration"], expected["lr"])


def test_torchrun_ends_with_the_error_of_its_processes(datasets, tmp_path):
    words = [*TORCHRUN, *command("train_net.py", tmp_path), "SOLVER.IMS_PER_BATCH", "3"]
    status, printed = run(words, datasets)
    assert status == 1
    last_words = printed[printed.index("Root Cause") :]
    assert "SOLVER.IMS_PER_BATCH = 3 is not allowed" in last_words
