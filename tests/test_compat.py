import importlib.util
import subprocess
import sys

import pytest
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch.nn import GroupNorm

from pisa_d2 import compat


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_without_detectron2_says_what_to_install():
    code = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "detectron2" else find_spec(name, *a)
import pisa_d2
"""
    result = run(code)
    assert result.returncode != 0
    assert "ImportError: pisa_d2 needs Detectron2" in result.stderr
    assert "make setup" in result.stderr


needs_no_operators = pytest.mark.skipif(
    importlib.util.find_spec("detectron2._C") is not None,
    reason="this Detectron2 has its compiled operators",
)


@needs_no_operators
def test_a_missing_operator_is_named_when_it_is_used():
    operators = compat._MissingOperators("detectron2._C")
    with pytest.raises(ImportError, match="_C.deform_conv_forward is not available.*from source"):
        operators.deform_conv_forward  # noqa: B018
    assert not hasattr(operators, "__path__")


@pytest.mark.slow
@needs_no_operators
def test_coco_evaluation_and_training_import_without_operators_and_without_noise():
    result = run(
        "import pisa_d2\n"
        "from detectron2.engine import DefaultTrainer\n"
        "from detectron2.evaluation import COCOEvaluator\n"
        "from detectron2.utils.collect_env import collect_env_info\n"
        "assert 'detectron2._C' in collect_env_info()\n"
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr


def test_the_head_of_a_retinanet_can_have_group_norm():
    head = RetinaNetHead(
        input_shape=[ShapeSpec(channels=64)],
        num_classes=3,
        num_anchors=9,
        conv_dims=[64],
        norm="GN",
    )
    assert [m.num_channels for m in head.modules() if isinstance(m, GroupNorm)] == [64, 64]


def test_preparing_twice_changes_nothing():
    modules = set(sys.modules)
    compat.prepare_detectron2()
    assert set(sys.modules) == modules


def test_a_loader_takes_another_sample_for_one_that_its_mapper_leaves_out():
    from detectron2.data.common import DatasetFromList, MapDataset

    compat.prepare_detectron2()
    dataset = MapDataset(DatasetFromList([0, 1, 2]), lambda x: None if x == 1 else x)
    assert {dataset[1] for _ in range(9)} == {0, 2}
    assert [dataset[0], dataset[2], len(dataset)] == [0, 2, 3]
