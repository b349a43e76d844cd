import re

import pytest
from helpers import HEADS, sampled_by, small_cfg, small_retinanet_cfg

from pisa_d2.setting_checks import check_settings

HEAD, RPN = "MODEL.ROI_HEADS", "MODEL.RPN"
CASCADE = HEADS["PISACascadeROIHeads"]
REFUSED = {
    "no samples": ([f"{HEAD}.BATCH_SIZE_PER_IMAGE", 0], "BATCH_SIZE_PER_IMAGE = 0 is not allowed"),
    "negative": ([f"{HEAD}.BATCH_SIZE_PER_IMAGE", -1], "BATCH_SIZE_PER_IMAGE = -1 is not allowed"),
    "no positive fits": (
        [f"{HEAD}.BATCH_SIZE_PER_IMAGE", 3, f"{HEAD}.POSITIVE_FRACTION", 0.25],
        "BATCH_SIZE_PER_IMAGE = 3 and POSITIVE_FRACTION = 0.25 leave no room for a positive sample",
    ),
    "no positives": ([f"{HEAD}.POSITIVE_FRACTION", 0.0], "leave no room for a positive sample"),
    "more than all": ([f"{HEAD}.POSITIVE_FRACTION", 1.5], "POSITIVE_FRACTION = 1.5 is not allowed"),
    "less than none": ([f"{HEAD}.POSITIVE_FRACTION", -0.5], "in [0, 1]"),
    "no anchors": ([f"{RPN}.BATCH_SIZE_PER_IMAGE", 0], f"{RPN}.BATCH_SIZE_PER_IMAGE = 0"),
    "no positive anchor": (
        [f"{RPN}.BATCH_SIZE_PER_IMAGE", 1, f"{RPN}.POSITIVE_FRACTION", 0.5],
        f"{RPN}.BATCH_SIZE_PER_IMAGE = 1 and POSITIVE_FRACTION = 0.5",
    ),
    "no proposals": ([f"{RPN}.POST_NMS_TOPK_TRAIN", 0], f"{RPN}.POST_NMS_TOPK_TRAIN = 0"),
    "no classes": ([f"{HEAD}.NUM_CLASSES", 0], f"{HEAD}.NUM_CLASSES = 0"),
    "no images": (["SOLVER.IMS_PER_BATCH", 0], "SOLVER.IMS_PER_BATCH = 0"),
    "no learning": (["SOLVER.BASE_LR", 0.0], "SOLVER.BASE_LR = 0.0"),
    "no number": (["SOLVER.BASE_LR", float("nan")], "SOLVER.BASE_LR = nan"),
    "nothing is positive": ([f"{HEAD}.IOU_LABELS", [0, -1]], "without 1 nothing would be learnt"),
    "an unknown label": ([f"{RPN}.IOU_LABELS", [0, 2, 1]], f"{RPN}.IOU_LABELS = [0, 2, 1]"),
    "too few labels": ([f"{HEAD}.IOU_THRESHOLDS", [0.4, 0.5]], "do not fit"),
    "descending": ([f"{RPN}.IOU_THRESHOLDS", [0.7, 0.3]], "thresholds must ascend"),
    "beyond 1": ([f"{HEAD}.IOU_THRESHOLDS", [50]], f"{HEAD}.IOU_THRESHOLDS = 50"),
    "a cascade with several": (
        [*CASCADE, f"{HEAD}.IOU_THRESHOLDS", [0.5, 0.6], f"{HEAD}.IOU_LABELS", [0, -1, 1]],
        f"{HEAD}.IOU_THRESHOLDS = [0.5, 0.6] is not allowed in a cascade",
    ),
    "a cascade with another": (
        [*CASCADE, f"{HEAD}.IOU_THRESHOLDS", [0.4]],
        "set IOU_THRESHOLDS to [0.5] and IOU_LABELS to [0, 1]",
    ),
    "a cascade with boxes per class": (
        [*CASCADE, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False],
        "CLS_AGNOSTIC_BBOX_REG = False is not allowed in a cascade",
    ),
    "keypoints that cannot be evaluated": (
        ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 5],
        "TEST.KEYPOINT_OKS_SIGMAS = [] must have a number for each of the",
    ),
}
ACCEPTED = {
    "one positive": [f"{HEAD}.BATCH_SIZE_PER_IMAGE", 4, f"{HEAD}.POSITIVE_FRACTION", 0.25],
    "all positive": [f"{HEAD}.POSITIVE_FRACTION", 1.0],
    "a fraction that is ignored": [
        f"{HEAD}.HARD_SAMPLER.JOINT",
        True,
        f"{HEAD}.POSITIVE_FRACTION",
        0.0,
    ],
    "a fraction that a sampler of the whole batch ignores": [
        *sampled_by("OHEMSampler", "OHEMSampler"),
        *(f"{HEAD}.POSITIVE_FRACTION", 0.0),
    ],
    "a band to ignore": [f"{HEAD}.IOU_THRESHOLDS", [0.4, 0.5], f"{HEAD}.IOU_LABELS", [0, -1, 1]],
    "a cascade": CASCADE,
    "COCO's keypoints": ["MODEL.KEYPOINT_ON", True],
    "other keypoints": [
        *("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2),
        *("TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.1]),
    ],
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_setting_that_trains_nothing_names_key_and_value(case):
    opts, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        check_settings(small_cfg(*opts))


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_setting_that_trains_is_accepted(case):
    check_settings(small_cfg(*ACCEPTED[case]))


def test_settings_of_other_architectures_are_not_looked_at():
    check_settings(small_retinanet_cfg(f"{HEAD}.BATCH_SIZE_PER_IMAGE", 0))
    with pytest.raises(ValueError, match=r"MODEL\.RETINANET\.NUM_CLASSES = 0"):
        check_settings(small_retinanet_cfg("MODEL.RETINANET.NUM_CLASSES", 0))
    check_settings(small_cfg("MODEL.META_ARCHITECTURE", "Other", f"{HEAD}.NUM_CLASSES", 0))


def test_every_shipped_config_is_accepted():
    from helpers import CONFIGS, load_cfg

    for config in CONFIGS:
        check_settings(load_cfg(config))
