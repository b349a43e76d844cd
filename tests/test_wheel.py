"""A wheel installed into an environment without this checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest
from helpers import ROOT

import pisa_d2
from pisa_d2 import model_zoo
from pisa_d2.data import make_digits

SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "32", "SOLVER.IMS_PER_BATCH", "2"),
    *("SOLVER.MAX_ITER", "2", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
]
SMALL_LAZY = [
    *("train.device=cpu", "train.max_iter=2", "dataloader.train.total_batch_size=2"),
    *("model.roi_heads.batch_size_per_image=16", "train.output_dir=lazy"),
]


def run(*command, **kwargs):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("pisa_d2", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", folder / "dist", folder)
    return next((folder / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Make an environment with the wheel and all packages of this one except for pisa_d2."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = run(python, "-c", code).strip()
    # Python ignores the .pth files in that folder, such as an editable installation's.
    with open(f"{site}/others.pth", "w") as file:
        file.write(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--no-deps", "--no-index", wheel)
    return python


@pytest.mark.slow
def test_a_wheel_has_its_configs_and_trains_in_an_empty_folder(python, tmp_path):
    datasets, folder = tmp_path / "datasets", tmp_path / "empty"
    make_digits(datasets, num_train=4, num_val=2)
    folder.mkdir()
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["DETECTRON2_DATASETS"] = str(datasets)

    def call(*words):
        return run(python, *words, cwd=folder, env=env)

    code = (
        "import importlib.metadata, json, pisa_d2;"
        "print(json.dumps([pisa_d2.__file__, pisa_d2.__version__, pisa_d2.model_zoo.list_configs(),"
        "dict(importlib.metadata.metadata('pisa_d2'))]))"
    )
    file, version, configs, metadata = json.loads(call("-c", code).splitlines()[-1])
    assert file.startswith(str(python.parents[1]))
    assert version == metadata["Version"] == pisa_d2.__version__
    assert configs == model_zoo.list_configs()
    assert metadata["Author"] == "pisa_d2 contributors"
    assert "License-File" in metadata and "Classifier" in metadata and "Keywords" in metadata

    name = "Digits/pisa_faster_rcnn_R_18_FPN.yaml"
    call("-m", "pisa_d2.train_net", "--config-file", name, *SMALL, "OUTPUT_DIR", "run")
    assert (folder / "run" / "model_final.pth").is_file()
    name = "LazyConfig/Digits/pisa_faster_rcnn_R_18_FPN.py"
    call("-m", "pisa_d2.lazyconfig_train_net", "--config-file", name, *SMALL_LAZY)
    assert (folder / "lazy" / "model_final.pth").is_file()
