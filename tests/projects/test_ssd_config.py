import pytest
import ssd
import torch
from detectron2.modeling import build_model
from helpers import flatten
from ssd_models import CONFIGS, PISA, PLAIN, load, small

NAMES = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.glob("*/*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds(name):
    with torch.device("meta"):
        model = build_model(load(name, "MODEL.DEVICE", "meta"))
    assert type(model) is (ssd.PISASSD if "pisa" in name else ssd.SSD)
    ssd.SSDMapper(load(name))


@pytest.mark.parametrize("name", [name for name in NAMES if "pisa" not in name])
def test_plain_and_pisa_configs_differ_by_the_method_and_its_clipping(name):
    plain = dict(flatten(load(name)))
    pisa = dict(flatten(load(name.replace("/", "/pisa_"))))
    differing = {key for key in plain if plain[key] != pisa[key]}
    clipping = {key for key in plain if key.startswith("SOLVER.CLIP_GRADIENTS.")}
    assert {"MODEL.META_ARCHITECTURE", "OUTPUT_DIR"} <= differing
    assert differing <= {"MODEL.META_ARCHITECTURE", "OUTPUT_DIR"} | clipping


def describe(cfg):
    with torch.device("meta"):
        model = build_model(cfg)
    simple = {k: v for k, v in vars(model).items() if isinstance(v, (int, float))}
    transform = model.box2box_transform.weights
    parts = (repr(model), simple, vars(model.matcher), transform, repr(model.backbone.l2_scale))
    return (*parts, repr(ssd.SSDMapper(cfg).augment))


def test_every_key_is_read():
    others = {
        "MODEL.SSD.NUM_CLASSES": 7,
        "MODEL.SSD.IMAGE_SIZE": 301,
        "MODEL.SSD.EXTRA_LAYERS": [[8, 8, 3, 2, 1]] * 4,
        "MODEL.SSD.WIDTH": 0.5,
        "MODEL.SSD.BATCH_NORM": True,
        "MODEL.SSD.SCALES": [0.1, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
        "MODEL.SSD.STEPS": [8, 16, 32, 64, 100, 200],
        "MODEL.SSD.ASPECT_RATIOS": [[2]] * 6,
        "MODEL.SSD.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
        "MODEL.SSD.IOU_THRESHOLD": 0.4,
        "MODEL.SSD.NEGATIVES_PER_POSITIVE": 2.0,
        "MODEL.SSD.SMOOTH_L1_BETA": 0.5,
        "MODEL.SSD.SCORE_THRESH_TEST": 0.1,
        "MODEL.SSD.TOPK_CANDIDATES_TEST": 10,
        "MODEL.SSD.NMS_THRESH_TEST": 0.5,
        "INPUT.SSD.PHOTOMETRIC": False,
        "INPUT.SSD.MAX_ZOOM_OUT": 1.0,
        "INPUT.SSD.IOU_CROP": False,
    }
    name = PLAIN
    keys = {key for key, _ in flatten(load(name)) if ".SSD." in key}
    assert keys == others.keys()
    plain = describe(load(name, "MODEL.DEVICE", "meta"))
    for key, value in others.items():
        assert describe(load(name, "MODEL.DEVICE", "meta", key, value)) != plain, key


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.SSD.WIDTH", 0.0),
        ("MODEL.SSD.IOU_THRESHOLD", 0.0),
        ("MODEL.SSD.NEGATIVES_PER_POSITIVE", -1.0),
        ("MODEL.SSD.SMOOTH_L1_BETA", -1.0),
        ("MODEL.SSD.SCORE_THRESH_TEST", 2.0),
        ("MODEL.SSD.NMS_THRESH_TEST", -0.1),
        ("MODEL.PISA.CARL.BETA", 2.0),
    ],
)
def test_a_wrong_value_is_refused_when_the_model_is_built(key, value):
    cfg = load(PISA, key, value)
    with pytest.raises(ValueError, match=rf"{key} = {value} is not allowed"):
        build_model(cfg)


@pytest.mark.parametrize(
    "opts",
    [
        ["MODEL.SSD.STEPS", [8, 16]],
        ["MODEL.SSD.EXTRA_LAYERS", [[8, 8, 3, 2, 1]] * 2],
        ["MODEL.SSD.SCALES", [0.1, 0.2]],
    ],
)
def test_numbers_of_feature_maps_that_do_not_fit_are_refused(opts):
    with pytest.raises(ValueError, match="STEPS.*feature map"):
        small(PLAIN, *opts)


def test_coco_configs_keep_the_published_schedule():
    for name in NAMES:
        if name.startswith("COCO"):
            cfg = load(name)
            assert cfg.DATASETS.TRAIN == ("coco_2017_train",)
            # 117,266 images with objects, five times each in 24 epochs.
            assert abs(cfg.SOLVER.MAX_ITER * 64 / (5 * 117266) - 24) < 0.01
            assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (64, 0.002)
            assert ("pisa" in name) == cfg.SOLVER.CLIP_GRADIENTS.ENABLED
            assert cfg.TEST.DETECTIONS_PER_IMAGE == 200
    assert load(PISA).SOLVER.CLIP_GRADIENTS.CLIP_VALUE == 35
