import os
import resource
import shutil
import subprocess
from collections import namedtuple

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from helpers import small_cfg
from torch import nn

from pisa_d2 import preflight
from pisa_d2.data.catalog import register_dataset
from pisa_d2.data.checks import Classes
from pisa_d2.preflight import check_checkpoint, check_config, check_data, check_model, model_classes


@pytest.mark.parametrize(
    ("key", "choices"),
    [
        ("META_ARCHITECTURE", "'GeneralizedRCNN'"),
        ("BACKBONE.NAME", "'build_resnet_fpn_backbone'"),
        ("PROPOSAL_GENERATOR.NAME", "'RPN'"),
        ("ROI_HEADS.NAME", "'PISACascadeROIHeads', 'PISAROIHeads'"),
    ],
)
def test_an_unknown_part_of_the_model_names_the_key_and_the_choices(tmp_path, key, choices):
    cfg = small_cfg(f"MODEL.{key}", "Unheard", "OUTPUT_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=rf"MODEL\.{key} = 'Unheard' is not known.*{choices}"):
        check_config(cfg)


def test_a_good_config_leaves_the_folder_and_nothing_in_it(tmp_path):
    folder = tmp_path / "new" / "run"
    check_config(small_cfg("OUTPUT_DIR", str(folder)))
    check_config(
        small_cfg(
            *("OUTPUT_DIR", str(folder), "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
        )
    )
    assert folder.is_dir() and not list(folder.iterdir())


def refused(folder):
    return pytest.raises(OSError, match=rf"OUTPUT_DIR = '{folder}' cannot be written to \(.*room")


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_file_in_the_place_of_the_output_folder_is_refused(tmp_path, folder):
    (tmp_path / "file").touch()
    with refused(tmp_path / folder):
        preflight.check_output(str(tmp_path / folder))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_without_permission_to_write_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with refused(tmp_path):
        preflight.check_output(str(tmp_path))
    with refused(tmp_path / "below"):
        preflight.check_output(str(tmp_path / "below"))


def test_a_write_that_the_system_refuses_is_an_error_before_training(tmp_path):
    # Stands in for a full disk, which takes root to make.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with refused(tmp_path):
            preflight.check_output(str(tmp_path))
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
        preflight.check_output(str(full_disk))


def test_a_disk_without_room_for_a_checkpoint_is_an_error_before_training(tmp_path, monkeypatch):
    model = nn.Linear(1024, 1024, bias=False)  # 4 MiB, and 4 of momentum
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**23))
    preflight.check_room(str(tmp_path), model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(7 * 2**20))
    with pytest.raises(OSError, match=rf"OUTPUT_DIR = '{tmp_path}' has 7 MiB left.*about 8 MiB"):
        preflight.check_room(str(tmp_path), model)


def test_classes_are_those_of_the_architecture():
    cfg = small_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.RETINANET.NUM_CLASSES", 4)
    expected = {
        "GeneralizedRCNN": Classes("MODEL.ROI_HEADS.NUM_CLASSES", 3),
        "PanopticFPN": Classes("MODEL.ROI_HEADS.NUM_CLASSES", 3),
        "RetinaNet": Classes("MODEL.RETINANET.NUM_CLASSES", 4),
        "PISARetinaNet": Classes("MODEL.RETINANET.NUM_CLASSES", 4),
        "SemanticSegmentor": None,
        "OfAnotherProject": None,
    }
    for name, classes in expected.items():
        cfg.MODEL.META_ARCHITECTURE = name
        assert model_classes(cfg) == classes


@pytest.fixture
def two_datasets():
    loaded = []

    def load(name):
        loaded.append(name)
        return [{"annotations": [{"bbox": [1, 2, 3, 4], "category_id": 0}]}]

    names = ("train_of_test", "val_of_test")
    for name in names:
        register_dataset(name, lambda name=name: load(name), thing_classes=["a", "b", "c"])
    yield loaded
    for name in names:
        DatasetCatalog.pop(name)


def test_data_for_evaluation_are_loaded_before_training_so_that_it_is_not_in_vain(two_datasets):
    opts = ["DATASETS.TRAIN", ["train_of_test"], "DATASETS.TEST", ["val_of_test", "train_of_test"]]
    check_data(small_cfg(*opts), train=False)
    assert two_datasets == []
    check_data(small_cfg(*opts), train=True)
    assert two_datasets == ["val_of_test"]
    check_data(small_cfg(*opts, "MODEL.ROI_HEADS.NUM_CLASSES", 1), train=False)
    with pytest.raises(ValueError, match=r"DATASETS\.TEST = 'nowhere'"):
        check_data(small_cfg("DATASETS.TEST", ["nowhere"]), train=False)


@pytest.mark.parametrize(
    ("filtered", "train", "refused"),
    [
        (True, ["empty_of_test"], True),
        (False, ["empty_of_test"], True),
        (True, ["empty_of_test", "train_of_test"], True),
        (False, ["empty_of_test", "train_of_test"], False),
    ],
)
def test_nothing_but_background_is_allowed_beside_other_data_when_it_is_kept(
    two_datasets, filtered, train, refused
):
    register_dataset("empty_of_test", lambda: [{"annotations": []}])
    opts = ["DATASETS.TRAIN", train, "DATASETS.TEST", [], "DATALOADER.FILTER_EMPTY_ANNOTATIONS"]
    check_data(small_cfg(*opts, filtered), train=True)
    if refused:
        with pytest.raises(ValueError, match="no object to train on"):
            DatasetCatalog.get("empty_of_test")
    else:
        assert DatasetCatalog.get("empty_of_test")


@pytest.fixture(scope="module")
def run_of_three_classes(tmp_path_factory):
    """The folder of a run, and the model of another number of classes."""
    folder = tmp_path_factory.mktemp("run")
    model = build_model(small_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 3))
    DetectionCheckpointer(model, str(folder)).save("model_final", iteration=9)
    return folder, model, build_model(small_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 5))


WRONG = r"model_final\.pth' cannot be taken over.*of this model: .*cls_score.*\(4, 32\).*\(6, 32\)"


def test_a_run_of_another_class_count_is_neither_resumed_nor_evaluated(run_of_three_classes):
    folder, same, other = run_of_three_classes
    weights = ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
    resumed = small_cfg("OUTPUT_DIR", str(folder))
    evaluated = small_cfg(*weights, "OUTPUT_DIR", str(folder / "new"))
    check_model(resumed, same, resume=True, train=True)
    check_model(evaluated, same, resume=False, train=False)
    for train in (True, False):
        with pytest.raises(ValueError, match=WRONG):
            check_model(resumed, other, resume=True, train=train)
    with pytest.raises(ValueError, match=WRONG):
        check_model(evaluated, other, resume=False, train=False)


def test_training_may_start_from_another_class_count_and_names_what_is_left_out(
    run_of_three_classes, tmp_path, caplog
):
    folder, _, other = run_of_three_classes
    weights = str(folder / "model_final.pth")
    cfg = small_cfg("OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", weights)
    check_model(cfg, other, resume=True, train=True)  # nothing to resume in this folder
    check_model(cfg, other, resume=False, train=True)
    DetectionCheckpointer(other, str(tmp_path)).resume_or_load(weights, resume=False)
    assert "cls_score.weight" in caplog.text and "incompatible shapes" in caplog.text


def test_a_checkpoint_saved_in_parallel_is_compared_by_the_same_names(tmp_path):
    model = nn.Linear(2, 3)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "parallel.pth")
    check_checkpoint(str(tmp_path / "parallel.pth"), model)
    with pytest.raises(ValueError, match=r"weight is \(3, 2\) there and \(4, 2\) here"):
        check_checkpoint(str(tmp_path / "parallel.pth"), nn.Linear(2, 4))
