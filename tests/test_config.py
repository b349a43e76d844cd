import math
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from helpers import (
    CONFIGS,
    METHODS,
    PLAIN,
    ROOT,
    flatten,
    load_cfg,
    methods_of,
    sampled_by,
    switch,
)

from pisa_d2 import add_pisa_config
from pisa_d2.config import (
    CARL,
    ISR,
    BalancedL1,
    NegativeISR,
    balanced_l1_settings,
    focal_gamma,
    ignored_ioa_thresh,
    pisa_settings,
)
from pisa_d2.matcher import build_proposal_matcher
from pisa_d2.proposal_generator.rpn import build_anchor_sampler
from pisa_d2.roi_heads.adoption import PISASettings
from pisa_d2.samplers import PairSampler, build_batch_sampler

# Nodes with a box loss, and the key of its beta.
BOX_HEAD, RETINANET = ("ROI_BOX_HEAD", "SMOOTH_L1_BETA"), ("RETINANET", "SMOOTH_L1_LOSS_BETA")
# Places of Detectron2's own configs in a checkout or an installation.
THEIRS = next(
    (
        folder
        for folder in (
            Path(detectron2.__file__).parents[1] / "configs",
            Path(detectron2.__file__).parent / "model_zoo" / "configs",
        )
        if (folder / "COCO-Detection").is_dir()
    ),
    None,
)


def new_cfg(*opts):
    cfg = get_cfg()
    add_pisa_config(cfg)
    cfg.merge_from_list(list(opts))
    return cfg


def test_defaults_are_the_published_settings():
    settings = pisa_settings(new_cfg())
    assert settings == {
        "isr_p": ISR(gamma=2.0, beta=0.0),
        "isr_n": NegativeISR(gamma=0.5, beta=0.0, nms_thresh=0.5, score_thresh=0.05),
        "carl": CARL(gamma=1.0, beta=0.2, loss_weight=1.0),
    }
    for keys in (BOX_HEAD, RETINANET):
        assert balanced_l1_settings(new_cfg(), *keys) == BalancedL1(0.5, 1.5) == BalancedL1()


def test_every_key_is_read():
    read = {f"{part}.ENABLED" for part in ("ISR_P", "ISR_N", "CARL")}
    for part, cls in (("ISR_P", ISR), ("ISR_N", NegativeISR), ("CARL", CARL)):
        read |= {f"{part}.{field.name.upper()}" for field in fields(cls)}
    assert {*read, "CASCADE_STAGES"} == {name for name, _ in flatten(new_cfg().MODEL.PISA)}
    for name in read:
        value = {"ENABLED": False, "N_MAX": "class"}.get(name.split(".")[1], 0.25)
        assert pisa_settings(new_cfg(f"MODEL.PISA.{name}", value)) != pisa_settings(new_cfg())


@pytest.mark.parametrize(
    "stages, expected",
    [([], [True] * 3), ([2], [False, False, True]), ([0, 2], [True, False, True])],
)
def test_stages_of_a_cascade_are_those_named_or_all(stages, expected):
    settings = PISASettings.from_config(new_cfg("MODEL.PISA.CASCADE_STAGES", stages))
    settings.check_stages(3)
    assert [settings.of_stage(stage)["isr_p"] is not None for stage in range(3)] == expected


def test_a_stage_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"CASCADE_STAGES = \[3\].*stages are \[0, 1, 2\]"):
        PISASettings.from_config(new_cfg("MODEL.PISA.CASCADE_STAGES", [3])).check_stages(3)


def test_every_key_of_the_samplers_and_the_loss_is_read():
    def describe(cfg):
        matcher = build_proposal_matcher(cfg)
        sampler = build_batch_sampler(cfg)
        is_pair = isinstance(sampler, PairSampler)
        samplers = [sampler.positive, sampler.negative] if is_pair else [sampler]
        rpn = build_anchor_sampler(cfg)
        samplers += [rpn.positive, rpn.negative]
        parts = [(type(part), vars(part)) for part in (matcher, *samplers)]
        others = [rpn.max_negatives_per_positive, ignored_ioa_thresh(cfg), focal_gamma(cfg)]
        return [*parts, *others, balanced_l1_settings(cfg, *BOX_HEAD)]

    heads, focal = "MODEL.ROI_HEADS", "MODEL.ROI_BOX_HEAD.FOCAL_LOSS"
    negative = f"{heads}.NEGATIVE_SAMPLER"
    balanced = [f"{negative}.NAME", "IoUBalancedSampler"]
    hard = sampled_by("HardSampler", "HardSampler")
    score_hlr = [f"{negative}.NAME", "ScoreHLRSampler"]
    others = {
        f"{heads}.POSITIVE_SAMPLER.NAME": ([], "InstanceBalancedSampler"),
        f"{negative}.NAME": (balanced, "RandomSampler"),
        f"{negative}.IOU_BALANCED.NUM_BINS": (balanced, 5),
        f"{negative}.IOU_BALANCED.FLOOR_THRESH": (balanced, 0.1),
        f"{negative}.IOU_BALANCED.FLOOR_FRACTION": (balanced, 0.5),
        f"{negative}.SCORE_HLR.NMS_THRESH": (score_hlr, 0.1),
        f"{negative}.SCORE_HLR.SCORE_THRESH": (score_hlr, 0.1),
        f"{heads}.HARD_SAMPLER.JOINT": (hard, True),
        f"{heads}.HARD_SAMPLER.NMS_THRESH": ([*hard, f"{heads}.HARD_SAMPLER.JOINT", True], 0.1),
        f"{RPN}.POSITIVE_SAMPLER.NAME": ([], "InstanceBalancedSampler"),
        f"{RPN}.NEGATIVE_SAMPLER.NAME": (RPN_BALANCED, "RandomSampler"),
        f"{RPN}.NEGATIVE_SAMPLER.IOU_BALANCED.NUM_BINS": (RPN_BALANCED, 5),
        f"{RPN}.NEGATIVE_SAMPLER.IOU_BALANCED.FLOOR_THRESH": (RPN_BALANCED, 0.1),
        f"{RPN}.NEGATIVE_SAMPLER.IOU_BALANCED.FLOOR_FRACTION": (RPN_BALANCED, 0.5),
        f"{RPN}.MAX_NEGATIVES_PER_POSITIVE": ([], 3),
        "MODEL.IGNORED_REGIONS.ENABLED": ([], True),
        "MODEL.IGNORED_REGIONS.IOA_THRESH": (["MODEL.IGNORED_REGIONS.ENABLED", True], 0.3),
        f"{focal}.ENABLED": ([], True),
        f"{focal}.GAMMA": ([f"{focal}.ENABLED", True], 1.0),
        "MODEL.BALANCED_L1.ALPHA": ([], 0.25),
        "MODEL.BALANCED_L1.GAMMA": ([], 1.0),
    }
    for key, (base, value) in others.items():
        assert describe(new_cfg(*base, key, value)) != describe(new_cfg(*base)), key
    with pytest.raises(ValueError, match="PROPOSAL_MATCHER"):
        describe(new_cfg(f"{heads}.PROPOSAL_MATCHER", "none"))
    added = dict(flatten(new_cfg())).keys() - dict(flatten(get_cfg())).keys()
    rest = {key for key in added if not key.startswith(("MODEL.PISA.", "DATASETS."))}
    assert rest == {*others, f"{heads}.PROPOSAL_MATCHER"}


def test_adding_the_keys_leaves_detectron2s_own_and_other_configs_alone():
    before = dict(flatten(get_cfg()))
    added = dict(flatten(new_cfg("MODEL.PISA.ISR_P.GAMMA", 7.0)))
    assert dict(flatten(get_cfg())) == before
    assert {name: added[name] for name in before} == before
    assert new_cfg().MODEL.PISA.ISR_P.GAMMA == 2.0


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("ISR_P.GAMMA", -0.1, "at least 0"),
        ("ISR_P.GAMMA", float("inf"), "finite"),
        ("ISR_P.BETA", 1.1, r"in \[0, 1\]"),
        ("ISR_N.GAMMA", float("nan"), "at least 0"),
        ("ISR_N.BETA", -0.1, r"in \[0, 1\]"),
        ("ISR_N.NMS_THRESH", 1.5, r"in \[0, 1\]"),
        ("ISR_N.SCORE_THRESH", -1.0, r"in \[0, 1\]"),
        ("CARL.GAMMA", -1.0, "at least 0"),
        ("CARL.BETA", 2.0, r"in \[0, 1\]"),
        ("CARL.LOSS_WEIGHT", -1.0, "at least 0"),
    ],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_a_wrong_value_is_refused_when_the_model_is_built(key, value, allowed, enabled):
    part = key.split(".")[0]
    cfg = load_cfg(
        "BCCD/pisa_faster_rcnn_R_18_FPN.yaml",
        *(f"MODEL.PISA.{key}", value, f"MODEL.PISA.{part}.ENABLED", enabled),
    )
    with pytest.raises(ValueError, match=rf"MODEL\.PISA\.{key} = {value}.*{allowed}"):
        build_model(cfg)


HEADS = "MODEL.ROI_HEADS"
NEGATIVE = f"{HEADS}.NEGATIVE_SAMPLER"
BALANCED = [f"{NEGATIVE}.NAME", "IoUBalancedSampler"]
SCORE_HLR = [f"{NEGATIVE}.NAME", "ScoreHLRSampler"]
RPN = "MODEL.RPN"
RPN_BALANCED = [f"{RPN}.NEGATIVE_SAMPLER.NAME", "IoUBalancedSampler"]
HARD = sampled_by("HardSampler", "HardSampler")
OHEM = [*HARD, f"{HEADS}.HARD_SAMPLER.JOINT", True]
UNIT = r"in \[0, 1\]"
FROM_0 = "finite and at least 0"
FROM_1 = "(finite and at least 1|a whole number)"
# For each numeric key: overrides that make it matter, and numbers below and above its range (or
# None).
NUMBERS = {
    "MODEL.PISA.ISR_P.GAMMA": ([], -0.1, None, FROM_0),
    "MODEL.PISA.ISR_P.BETA": ([], -0.1, 1.1, UNIT),
    "MODEL.PISA.ISR_N.GAMMA": ([], -0.1, None, FROM_0),
    "MODEL.PISA.ISR_N.BETA": ([], -0.1, 1.1, UNIT),
    "MODEL.PISA.ISR_N.NMS_THRESH": ([], -0.1, 1.1, UNIT),
    "MODEL.PISA.ISR_N.SCORE_THRESH": ([], -0.1, 1.1, UNIT),
    "MODEL.PISA.CARL.GAMMA": ([], -0.1, None, FROM_0),
    "MODEL.PISA.CARL.BETA": ([], -0.1, 1.1, UNIT),
    "MODEL.PISA.CARL.LOSS_WEIGHT": ([], -0.1, None, FROM_0),
    "MODEL.ROI_BOX_HEAD.FOCAL_LOSS.GAMMA": ([], -0.1, None, FROM_0),
    "MODEL.BALANCED_L1.ALPHA": ([], 0.0, None, "finite and above 0"),
    "MODEL.BALANCED_L1.GAMMA": ([], 0.0, 20.5, r"in \[0.0005, 20\]"),
    f"{NEGATIVE}.IOU_BALANCED.NUM_BINS": (BALANCED, 0, None, FROM_1),
    f"{NEGATIVE}.IOU_BALANCED.FLOOR_THRESH": (BALANCED, -1.1, 1.1, r"in \[-1, 1\]"),
    f"{NEGATIVE}.IOU_BALANCED.FLOOR_FRACTION": (BALANCED, -0.1, 1.1, UNIT),
    f"{NEGATIVE}.SCORE_HLR.NMS_THRESH": (SCORE_HLR, -0.1, 1.1, UNIT),
    f"{NEGATIVE}.SCORE_HLR.SCORE_THRESH": (SCORE_HLR, -0.1, 1.1, UNIT),
    f"{HEADS}.HARD_SAMPLER.NMS_THRESH": (OHEM, -0.1, 1.1, UNIT),
    f"{RPN}.NEGATIVE_SAMPLER.IOU_BALANCED.NUM_BINS": (RPN_BALANCED, 0, None, FROM_1),
    f"{RPN}.NEGATIVE_SAMPLER.IOU_BALANCED.FLOOR_THRESH": (RPN_BALANCED, -1.1, 1.1, r"in \[-1, 1\]"),
    f"{RPN}.NEGATIVE_SAMPLER.IOU_BALANCED.FLOOR_FRACTION": (RPN_BALANCED, -0.1, 1.1, UNIT),
    f"{RPN}.MAX_NEGATIVES_PER_POSITIVE": ([], -2, None, FROM_1),
    "MODEL.IGNORED_REGIONS.IOA_THRESH": ([], 0.0, 1.1, "above 0 and at most 1"),
}
FLAGS = {
    "MODEL.PISA.ISR_P.ENABLED": [],
    "MODEL.PISA.ISR_N.ENABLED": [],
    "MODEL.PISA.CARL.ENABLED": [],
    "MODEL.ROI_BOX_HEAD.FOCAL_LOSS.ENABLED": [],
    f"{HEADS}.HARD_SAMPLER.JOINT": HARD,
    "MODEL.IGNORED_REGIONS.ENABLED": [],
}
CHOICES = {"MODEL.PISA.ISR_P.N_MAX": "choose one of ['shared', 'class']"}
NAMES = [
    *(f"{HEADS}.PROPOSAL_MATCHER", f"{HEADS}.POSITIVE_SAMPLER.NAME", f"{NEGATIVE}.NAME"),
    *(f"{RPN}.POSITIVE_SAMPLER.NAME", f"{RPN}.NEGATIVE_SAMPLER.NAME"),
]


def set_in_python(base, key, value):
    """Set a value of any type, which merging a file or a command line would refuse."""
    cfg = new_cfg(*base)
    *nodes, leaf = key.split(".")
    node = cfg
    for name in nodes:
        node = node[name]
    node[leaf] = value
    return cfg


def read_all(cfg):
    pisa_settings(cfg)
    focal_gamma(cfg)
    balanced_l1_settings(cfg, *BOX_HEAD)
    build_proposal_matcher(cfg)
    build_batch_sampler(cfg)
    build_anchor_sampler(cfg)
    ignored_ioa_thresh(cfg)


def test_each_key_is_in_the_tests_of_wrong_values():
    added = dict(flatten(new_cfg())).keys() - dict(flatten(get_cfg())).keys()
    others = {"MODEL.PISA.CASCADE_STAGES", "DATASETS.REGISTER"}  # with tests of their own
    assert added == {*NUMBERS, *FLAGS, *NAMES, *CHOICES, *others}


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_out_of_range_or_none_at_all_is_refused(key):
    base, below, above, allowed = NUMBERS[key]
    no_numbers = [math.nan, math.inf, -math.inf, 10**400, "0.5", "", None, True, [0.5], {}]
    if key.endswith(("NUM_BINS", "MAX_NEGATIVES_PER_POSITIVE")):
        no_numbers += [2.5, 3.0]
    read_all(new_cfg(*base))
    for value in [x for x in (below, above) if x is not None] + no_numbers:
        match = f"{re.escape(key)} = {re.escape(repr(value))} is not allowed: it must be {allowed}"
        with pytest.raises(ValueError, match=match):
            read_all(set_in_python(base, key, value))


@pytest.mark.parametrize("head, beta", [BOX_HEAD, RETINANET])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "1.0", None, True])
def test_balanced_l1_needs_a_beta_above_0(head, beta, value):
    key, balanced = f"MODEL.{head}.{beta}", [f"MODEL.{head}.BBOX_REG_LOSS_TYPE", "balanced_l1"]
    match = rf"{key} = {value!r} is not allowed: .* above 0, since BBOX_REG_LOSS_TYPE is 'balanced"
    with pytest.raises(ValueError, match=match):
        balanced_l1_settings(set_in_python(balanced, key, value), head, beta)
    balanced_l1_settings(set_in_python([], key, value), head, beta)


@pytest.mark.parametrize("key", FLAGS)
@pytest.mark.parametrize("value", ["off", "False", 0, 1, None])
def test_a_flag_that_is_neither_true_nor_false_is_refused(key, value):
    with pytest.raises(ValueError, match=f"{re.escape(key)} = {value!r} .*True or False"):
        read_all(set_in_python(FLAGS[key], key, value))


@pytest.mark.parametrize("key", CHOICES)
@pytest.mark.parametrize("value", ["", "Class", 3, None, ["class"]])
def test_another_choice_is_refused(key, value):
    match = re.escape(f"{key} = {value!r} is not allowed: {CHOICES[key]}")
    with pytest.raises(ValueError, match=match):
        read_all(set_in_python([], key, value))


@pytest.mark.parametrize("key", NAMES)
@pytest.mark.parametrize("value", ["Unheard", "", "randomsampler", 3, None, ["RandomSampler"]])
def test_an_unknown_name_is_refused_with_the_choices(key, value):
    match = f"{re.escape(key)} = {re.escape(repr(value))} is not known: choose one of .*'"
    with pytest.raises(ValueError, match=match):
        read_all(set_in_python([], key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.PISA.ISR_P.GAMMA", "much"),
        ("MODEL.PISA.ISR_P.GAMMA", "2"),
        ("MODEL.PISA.CARL.ENABLED", "off"),
        (f"{NEGATIVE}.IOU_BALANCED.NUM_BINS", "2.5"),
        (f"{NEGATIVE}.NAME", "3"),
    ],
)
def test_a_value_of_another_type_is_refused_on_the_command_line_with_its_key(key, value):
    with pytest.raises(ValueError, match=rf"Type mismatch .*{re.escape(value)}.*key: {key}"):
        new_cfg(key, value)


def test_an_unknown_key_is_refused():
    with pytest.raises(AssertionError, match="Non-existent key: MODEL.PISA.ISR_P.GAMA"):
        new_cfg("MODEL.PISA.ISR_P.GAMA", 1.0)


@cache
def build_without_memory(config):
    """Build the model of a config at full size, on the device without numbers."""
    with torch.device("meta"):
        return build_model(load_cfg(config, "MODEL.WEIGHTS", "", "MODEL.DEVICE", "meta"))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_builds(config):
    cfg = load_cfg(config)
    model = build_without_memory(config)
    name = cfg.MODEL.META_ARCHITECTURE
    assert type(model).__name__ == name
    if hasattr(model, "roi_heads"):
        name = cfg.MODEL.ROI_HEADS.NAME
        assert type(model.roi_heads).__name__ == name
    assert Path(config).name.startswith(METHODS) == name.startswith("PISA")


def differing(config, plain):
    ours, theirs = (dict(flatten(load_cfg(c))) for c in (config, plain))
    return {name: value for name, value in ours.items() if value != theirs[name]}


@pytest.mark.parametrize("plain", PLAIN)
def test_plain_and_pisa_configs_differ_by_the_method_alone(plain):
    pisa = methods_of(plain)[0]
    assert Path(pisa).name == f"pisa_{Path(plain).name}"
    changed = differing(pisa, plain)
    cfg = load_cfg(plain)
    if cfg.MODEL.META_ARCHITECTURE != "RetinaNet":
        name = cfg.MODEL.ROI_HEADS.NAME.removeprefix("Standard")
        assert changed.pop("MODEL.ROI_HEADS.NAME") == f"PISA{name}"
    else:
        name = cfg.MODEL.META_ARCHITECTURE
        assert changed.pop("MODEL.META_ARCHITECTURE") == f"PISA{name}"
    assert changed.keys() == {"OUTPUT_DIR"}


@pytest.mark.parametrize("plain", PLAIN)
def test_a_method_keeps_the_state_dict_of_the_plain_model(plain):
    def shapes(config):
        return [(k, v.shape, v.dtype) for k, v in build_without_memory(config).state_dict().items()]

    expected = shapes(plain)
    for config in methods_of(plain):
        assert shapes(config) == expected


@pytest.mark.parametrize(
    "method, samplers",
    [
        ("iou_balanced", sampled_by("RandomSampler", "IoUBalancedSampler")),
        ("ohem", sampled_by("HardSampler", "HardSampler")),
    ],
)
def test_configs_of_samplers_have_nothing_of_pisa(method, samplers):
    plain = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    config = f"COCO-Detection/{method}_faster_rcnn_R_50_FPN_1x.yaml"
    opts = ["MODEL.ROI_HEADS.NAME", "PISAROIHeads", *samplers, *switch(False, False, False)]
    expected = dict(flatten(load_cfg(plain, *opts)))
    ours = dict(flatten(load_cfg(config)))
    assert {name for name in ours if ours[name] != expected[name]} == {"OUTPUT_DIR"}


def test_the_config_of_the_release_differs_from_pisa_by_the_negatives():
    released = "COCO-Detection/pisa_score_hlr_faster_rcnn_R_50_FPN_1x.yaml"
    changed = differing(released, "COCO-Detection/pisa_faster_rcnn_R_50_FPN_1x.yaml")
    assert changed.pop("MODEL.ROI_HEADS.NEGATIVE_SAMPLER.NAME") == "ScoreHLRSampler"
    assert changed.keys() == {"OUTPUT_DIR"}


@pytest.mark.parametrize("plain", PLAIN)
def test_the_model_zoo_lists_every_config(plain):
    text = (ROOT / "MODEL_ZOO.md").read_text()
    for name in (plain, *methods_of(plain)[1:]):
        assert f"`configs/{Path(name).parent}/`" in text
        assert f"`{Path(name).stem}`" in text


def test_every_config_of_the_model_zoo_is_there():
    text = (ROOT / "MODEL_ZOO.md").read_text()
    named = re.findall(r"`(\w+rcnn\w+|\w+_fpn_\w+|\w*retinanet\w+)`", text)
    assert set(named) <= {Path(config).stem for config in CONFIGS}
    folders = re.findall(r"`configs/([\w-]+)/`", text)
    assert set(folders) == {str(Path(config).parent) for config in PLAIN}


def test_no_two_configs_write_to_the_same_folder():
    folders = [load_cfg(c).OUTPUT_DIR for c in CONFIGS if not Path(c).name.startswith("Base")]
    assert len(set(folders)) == len(folders)
    assert all(folder.startswith("output/") for folder in folders)


PUBLISHED = [c for c in PLAIN if c.startswith(("COCO-Det", "COCO-Instance")) and "rcnn" in c]
AS_DETECTRON2 = [c for c in PLAIN if c.split("-")[0] in ("LVISv1", "PascalVOC")]
AS_DETECTRON2 += [c for c in PLAIN if c.startswith(("COCO-Keypoints", "COCO-Panoptic"))]


@pytest.mark.parametrize("config", PUBLISHED)
def test_coco_configs_keep_the_published_settings_and_stock_names(config):
    cfg = load_cfg(config)
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.DATASETS.TEST == ("coco_2017_val",)
    assert cfg.MODEL.WEIGHTS.startswith("detectron2://ImageNetPretrained/")
    rpn, heads = cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS
    assert rpn.POST_NMS_TOPK_TRAIN == rpn.POST_NMS_TOPK_TEST == 2000
    in_all = rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST
    assert in_all == ((2000, 2000) if len(rpn.IN_FEATURES) == 5 else (12000, 6000))
    assert (heads.BATCH_SIZE_PER_IMAGE, heads.POSITIVE_FRACTION) == (512, 0.25)
    assert heads.PROPOSAL_APPEND_GT and cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA == 1.0
    solver = cfg.SOLVER
    steps = {"1x": (90000, (60000, 80000)), "3x": (270000, (210000, 250000))}
    assert steps[config[-7:-5]] == (solver.MAX_ITER, solver.STEPS)
    assert (solver.IMS_PER_BATCH, solver.BASE_LR) == (16, 0.02)
    assert (cfg.INPUT.MIN_SIZE_TRAIN == (800,)) == config.endswith("1x.yaml")


@pytest.mark.skipif(THEIRS is None, reason="this Detectron2 came without its configs")
@pytest.mark.parametrize("config", [*PUBLISHED, *AS_DETECTRON2])
def test_settings_that_are_not_published_are_those_of_detectron2s_own_config(config):
    theirs = THEIRS / config
    if "cascade" in config:
        theirs = THEIRS / "Misc" / theirs.name
    expected = get_cfg()
    expected.merge_from_file(str(theirs))
    expected.MODEL.DEVICE = "cpu"
    ours = dict(flatten(load_cfg(config)))
    changed = {name for name, value in flatten(expected) if ours[name] != value} - {"OUTPUT_DIR"}
    assert changed <= {
        "INPUT.MIN_SIZE_TRAIN",
        "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA",
        "MODEL.RPN.PRE_NMS_TOPK_TEST",
        "MODEL.RPN.POST_NMS_TOPK_TRAIN",
        "MODEL.RPN.POST_NMS_TOPK_TEST",
    }
    assert not changed or config in PUBLISHED


@pytest.mark.parametrize(
    "config, depth, iterations",
    [("retinanet_R_50_FPN_1x.yaml", 50, 90000), ("retinanet_R_101_FPN_3x.yaml", 101, 270000)],
)
def test_retinanet_configs_keep_the_published_settings(config, depth, iterations):
    cfg = load_cfg(f"COCO-Detection/{config}")
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.DATASETS.TEST == ("coco_2017_val",)
    assert f"detectron2://ImageNetPretrained/MSRA/R-{depth}.pkl" == cfg.MODEL.WEIGHTS
    sizes = [[x * 2 ** (i / 3) for i in range(3)] for x in (32, 64, 128, 256, 512)]
    for ours, theirs in zip(cfg.MODEL.ANCHOR_GENERATOR.SIZES, sizes, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS == [[0.5, 1.0, 2.0]]
    retinanet = cfg.MODEL.RETINANET
    assert (retinanet.FOCAL_LOSS_ALPHA, retinanet.FOCAL_LOSS_GAMMA) == (0.25, 2.0)
    assert (retinanet.BBOX_REG_LOSS_TYPE, retinanet.SMOOTH_L1_LOSS_BETA) == ("smooth_l1", 0.11)
    assert (retinanet.IOU_THRESHOLDS, retinanet.IOU_LABELS) == ([0.4, 0.5], [0, -1, 1])
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (16, 0.01)
    assert iterations == cfg.SOLVER.MAX_ITER
