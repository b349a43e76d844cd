import libra
import pytest
import torch
from detectron2.modeling import build_model
from helpers import ROOT, flatten
from libra_models import CONFIGS, PROJECT, RCNN, RETINANET, load, new_cfg

NAMES = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.glob("*/*.yaml"))
METHOD = {
    "MODEL.BACKBONE.NAME": "build_libra_backbone",
    "MODEL.PROPOSAL_GENERATOR.NAME": "PISARPN",
    "MODEL.RPN.MAX_NEGATIVES_PER_POSITIVE": 5,
    "MODEL.ROI_HEADS.NAME": "PISAROIHeads",
    "MODEL.ROI_HEADS.POSITIVE_SAMPLER.NAME": "InstanceBalancedSampler",
    "MODEL.ROI_HEADS.NEGATIVE_SAMPLER.NAME": "IoUBalancedSampler",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "balanced_l1",
    "MODEL.PISA.ISR_P.ENABLED": False,
    "MODEL.PISA.ISR_N.ENABLED": False,
    "MODEL.PISA.CARL.ENABLED": False,
}
RETINANET_METHOD = {
    "MODEL.META_ARCHITECTURE": "PISARetinaNet",
    "MODEL.BACKBONE.NAME": "build_libra_backbone",
    "MODEL.LIBRA.BACKBONE": "build_retinanet_resnet_fpn_backbone",
    "MODEL.LIBRA.REFINE_LEVEL": 1,
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": "balanced_l1",
    **{key: value for key, value in METHOD.items() if key.startswith("MODEL.PISA.")},
}


def load_plain(name):
    """The config of the plain detector in the repository that one of Libra R-CNN extends."""
    cfg = new_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / name.replace("/libra_", "/")))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def differing(ours, theirs):
    ours, theirs = dict(flatten(ours)), dict(flatten(theirs))
    assert ours.keys() == theirs.keys()
    changed = {key: value for key, value in ours.items() if value != theirs[key]}
    assert changed.pop("OUTPUT_DIR").startswith("output/libra/")
    return changed


def build(cfg):
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds_and_refines_p4(name):
    cfg = load(name)
    model = build(cfg)
    assert type(model).__name__ == cfg.MODEL.META_ARCHITECTURE
    backbone = model.backbone
    assert type(backbone) is libra.BalancedFeaturePyramid
    assert backbone.levels[backbone.refine_level] == "p4"
    assert len(backbone.levels) == 5 and backbone.size_divisibility == 32
    part = model if "retinanet" in name else model.roi_heads.box_predictor
    assert part.box_reg_loss_type == "balanced_l1"
    assert part.smooth_l1_beta == (0.11 if "retinanet" in name else 1.0)


@pytest.mark.parametrize("name", [n for n in NAMES if "pisa" not in n and "R_101" not in n])
def test_a_config_differs_from_the_plain_one_by_the_method_alone(name):
    method = RETINANET_METHOD if "retinanet" in name else METHOD
    assert differing(load(name), load_plain(name)) == method


def test_pisa_on_top_is_switched_on_and_nothing_else():
    for name in (n for n in NAMES if "pisa" in n):
        changed = differing(load(name), load(name.replace("libra_pisa_", "libra_")))
        assert changed == {key: True for key in METHOD if key.startswith("MODEL.PISA.")}


def test_r101_differs_from_r50_by_its_depth():
    name = "COCO-Detection/libra_faster_rcnn_R_101_FPN_1x.yaml"
    weights = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
    expected = {"MODEL.RESNETS.DEPTH": 101, "MODEL.WEIGHTS": weights}
    assert differing(load(name), load(name.replace("101", "50"))) == expected


@pytest.mark.parametrize("name", [n for n in NAMES if "pisa" not in n])
def test_the_non_local_block_is_all_that_a_plain_model_lacks(name):
    cfg = load(name)
    shapes = {k: tuple(v.shape) for k, v in build(cfg).state_dict().items()}
    added = {k for k in shapes if k.startswith("backbone.refine.")}
    assert len(added) == 7
    cfg.MODEL.BACKBONE.NAME = cfg.MODEL.LIBRA.BACKBONE
    plain = {k: tuple(v.shape) for k, v in build(cfg).state_dict().items()}
    renamed = {k.replace("backbone.", "backbone.pyramid.", 1): v for k, v in plain.items()}
    assert {k: v for k, v in shapes.items() if k not in added} == renamed


def test_no_two_configs_write_to_the_same_folder():
    assert len({load(name).OUTPUT_DIR for name in NAMES}) == len(NAMES)


def test_every_key_is_read():
    keys = {key for key, _ in flatten(new_cfg()) if key.startswith("MODEL.LIBRA.")}
    assert keys == {"MODEL.LIBRA.BACKBONE", "MODEL.LIBRA.REFINE_LEVEL"}
    assert build(load(RCNN, "MODEL.LIBRA.REFINE_LEVEL", 0)).backbone.refine_level == 0
    assert build(load(RETINANET)).backbone.levels[-1] == "p7"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.LIBRA.REFINE_LEVEL", 5),
        ("MODEL.LIBRA.REFINE_LEVEL", -1),
        ("MODEL.LIBRA.BACKBONE", "build_libra_backbone"),
        ("MODEL.BALANCED_L1.ALPHA", 0.0),
        ("MODEL.BALANCED_L1.GAMMA", 0.0),
        ("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", 0.0),
    ],
)
def test_a_wrong_value_is_refused_when_the_model_is_built(key, value):
    with pytest.raises(ValueError, match=rf"{key} = {value!r} is not allowed"):
        build(load(RCNN, key, value))


def test_the_readme_lists_every_config_for_coco():
    text = (PROJECT / "README.md").read_text()
    for name in NAMES:
        assert not name.startswith("COCO") or f"`{name.split('/')[1]}`" in text
