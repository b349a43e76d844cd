import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from helpers import ROOT, load_cfg, sampled_by

from pisa_d2 import add_pisa_config
from pisa_d2.config import CARL, ISR, NegativeISR, focal_gamma, pisa_settings
from pisa_d2.matcher import build_proposal_matcher
from pisa_d2.samplers import build_proposal_sampler

CONFIGS = sorted(str(p.relative_to(ROOT / "configs")) for p in ROOT.glob("configs/**/*.yaml"))
PLAIN = [c for c in CONFIGS if not Path(c).name.startswith(("Base", "pisa"))]


def new_cfg(*opts):
    cfg = get_cfg()
    add_pisa_config(cfg)
    cfg.merge_from_list(list(opts))
    return cfg


def flatten(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_defaults_are_the_published_settings():
    settings = pisa_settings(new_cfg())
    assert settings == {
        "isr_p": ISR(gamma=2.0, beta=0.0),
        "isr_n": NegativeISR(gamma=0.5, beta=0.0, nms_thresh=0.5, score_thresh=0.05),
        "carl": CARL(gamma=1.0, beta=0.2, loss_weight=1.0),
    }


def test_every_key_is_read():
    read = {f"{part}.ENABLED" for part in ("ISR_P", "ISR_N", "CARL")}
    for part, cls in (("ISR_P", ISR), ("ISR_N", NegativeISR), ("CARL", CARL)):
        read |= {f"{part}.{field.name.upper()}" for field in fields(cls)}
    assert read == {name for name, _ in flatten(new_cfg().MODEL.PISA)}
    for name in read:
        value = not new_cfg().MODEL.PISA.ISR_P.ENABLED if name.endswith("ENABLED") else 0.25
        assert pisa_settings(new_cfg(f"MODEL.PISA.{name}", value)) != pisa_settings(new_cfg())


def test_every_key_of_the_samplers_and_the_loss_is_read():
    def describe(cfg):
        matcher = build_proposal_matcher(cfg)
        samplers = [build_proposal_sampler(cfg, f"{k}_SAMPLER") for k in ("POSITIVE", "NEGATIVE")]
        return [(type(part), vars(part)) for part in (matcher, *samplers)] + [focal_gamma(cfg)]

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
        f"{heads}.HARD_SAMPLER.NMS_THRESH": (hard, 0.1),
        f"{focal}.ENABLED": ([], True),
        f"{focal}.GAMMA": ([f"{focal}.ENABLED", True], 1.0),
    }
    for key, (base, value) in others.items():
        assert describe(new_cfg(*base, key, value)) != describe(new_cfg(*base)), key
    with pytest.raises(ValueError, match="PROPOSAL_MATCHER"):
        describe(new_cfg(f"{heads}.PROPOSAL_MATCHER", "none"))
    added = dict(flatten(new_cfg())).keys() - dict(flatten(get_cfg())).keys()
    rest = {key for key in added if not key.startswith("MODEL.PISA.")}
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
HARD = sampled_by("HardSampler", "HardSampler")
UNIT = r"in \[0, 1\]"
FROM_0 = "finite and at least 0"
FROM_1 = "(finite and at least 1|a whole number)"
# For each numeric key: what makes it count, a number below and one above its range (or None).
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
    f"{NEGATIVE}.IOU_BALANCED.NUM_BINS": (
        BALANCED,
        0,
        None,
        "(finite and at least 1|a whole number)",
    ),
    f"{NEGATIVE}.IOU_BALANCED.FLOOR_THRESH": (BALANCED, -1.1, 0.6, r"in \[-1, 0.5\]"),
    f"{NEGATIVE}.IOU_BALANCED.FLOOR_FRACTION": (BALANCED, -0.1, 1.1, UNIT),
    f"{NEGATIVE}.SCORE_HLR.NMS_THRESH": (SCORE_HLR, -0.1, 1.1, UNIT),
    f"{NEGATIVE}.SCORE_HLR.SCORE_THRESH": (SCORE_HLR, -0.1, 1.1, UNIT),
    f"{HEADS}.HARD_SAMPLER.NMS_THRESH": (HARD, -0.1, 1.1, UNIT),
}
FLAGS = {
    "MODEL.PISA.ISR_P.ENABLED": [],
    "MODEL.PISA.ISR_N.ENABLED": [],
    "MODEL.PISA.CARL.ENABLED": [],
    "MODEL.ROI_BOX_HEAD.FOCAL_LOSS.ENABLED": [],
    f"{HEADS}.HARD_SAMPLER.JOINT": HARD,
}
NAMES = [f"{HEADS}.PROPOSAL_MATCHER", f"{HEADS}.POSITIVE_SAMPLER.NAME", f"{NEGATIVE}.NAME"]


def set_in_python(base, key, value):
    """A config with a value of any type, which merging a file or a command line would not take."""
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
    build_proposal_matcher(cfg)
    for kind in ("POSITIVE", "NEGATIVE"):
        build_proposal_sampler(cfg, f"{kind}_SAMPLER")


def test_each_key_is_in_the_tests_of_wrong_values():
    added = dict(flatten(new_cfg())).keys() - dict(flatten(get_cfg())).keys()
    assert added == {*NUMBERS, *FLAGS, *NAMES}


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_out_of_range_or_none_at_all_is_refused(key):
    base, below, above, allowed = NUMBERS[key]
    no_numbers = [math.nan, math.inf, -math.inf, 10**400, "0.5", "", None, True, [0.5], {}]
    if key.endswith("NUM_BINS"):
        no_numbers += [2.5, 3.0]
    read_all(new_cfg(*base))
    for value in [x for x in (below, above) if x is not None] + no_numbers:
        match = f"{re.escape(key)} = {re.escape(repr(value))} is not allowed: it must be {allowed}"
        with pytest.raises(ValueError, match=match):
            read_all(set_in_python(base, key, value))


@pytest.mark.parametrize("key", FLAGS)
@pytest.mark.parametrize("value", ["off", "False", 0, 1, None])
def test_a_flag_that_is_neither_true_nor_false_is_refused(key, value):
    with pytest.raises(ValueError, match=f"{re.escape(key)} = {value!r} .*True or False"):
        read_all(set_in_python(FLAGS[key], key, value))


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


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_builds(config):
    cfg = load_cfg(config, "MODEL.WEIGHTS", "")
    model = build_model(cfg)
    assert type(model.roi_heads).__name__ == cfg.MODEL.ROI_HEADS.NAME
    assert ("pisa" in config) == cfg.MODEL.ROI_HEADS.NAME.startswith("PISA")


@pytest.mark.parametrize("config", PLAIN)
def test_plain_and_pisa_configs_differ_by_the_method_alone(config):
    plain = dict(flatten(load_cfg(config)))
    path = Path(config)
    pisa = dict(flatten(load_cfg(str(path.with_name(f"pisa_{path.name}")))))
    differing = {name for name in plain if plain[name] != pisa[name]}
    assert "MODEL.ROI_HEADS.NAME" in differing
    assert differing <= {"MODEL.ROI_HEADS.NAME", "OUTPUT_DIR"}


@pytest.mark.parametrize("config", ["faster_rcnn_R_50_FPN_1x.yaml"])
def test_coco_configs_keep_the_published_settings_and_stock_names(config):
    cfg = load_cfg(f"COCO-Detection/{config}")
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.DATASETS.TEST == ("coco_2017_val",)
    assert cfg.MODEL.WEIGHTS.startswith("detectron2://ImageNetPretrained/MSRA/")
    rpn, heads = cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS
    assert rpn.POST_NMS_TOPK_TRAIN == rpn.POST_NMS_TOPK_TEST == 2000
    assert rpn.PRE_NMS_TOPK_TRAIN == rpn.PRE_NMS_TOPK_TEST == 2000
    assert (heads.BATCH_SIZE_PER_IMAGE, heads.POSITIVE_FRACTION) == (512, 0.25)
    assert heads.PROPOSAL_APPEND_GT and cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA == 1.0
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER) == (16, 90000)
