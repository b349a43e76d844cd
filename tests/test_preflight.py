import pytest
from detectron2.data import DatasetCatalog
from helpers import small_cfg

from pisa_d2.data.catalog import register_dataset
from pisa_d2.data.checks import Classes
from pisa_d2.preflight import check_config, check_data, model_classes


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
    return loaded


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
