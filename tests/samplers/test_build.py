import pytest
import torch
from helpers import sampled_by, small_cfg

from pisa_d2 import PROPOSAL_SAMPLER_REGISTRY
from pisa_d2.samplers import (
    BatchSampler,
    Candidates,
    Choice,
    HardSampler,
    InstanceBalancedSampler,
    IoUBalancedSampler,
    IoUHLRSampler,
    OHEMSampler,
    PairSampler,
    ProposalSampler,
    Quota,
    RandomSampler,
    ScoreHLRSampler,
    build_batch_sampler,
    build_proposal_sampler,
)


@pytest.fixture
def register():
    """Return a decorator that registers samplers."""
    return lambda cls: PROPOSAL_SAMPLER_REGISTRY.register()(cls) or cls


def image_of(*classes):
    """Make candidates of these classes, where 2 is the class of negatives."""
    classes = torch.tensor(classes)
    zeros = torch.zeros(len(classes))
    return Candidates(torch.zeros(len(classes), 4), zeros, zeros.long(), classes)


@pytest.mark.parametrize(
    ("positive", "negative", "key", "fitting"),
    [
        ("IoUBalancedSampler", "RandomSampler", "POSITIVE_SAMPLER", "InstanceBalancedSampler"),
        ("ScoreHLRSampler", "RandomSampler", "POSITIVE_SAMPLER", "IoUHLRSampler"),
        ("RandomSampler", "InstanceBalancedSampler", "NEGATIVE_SAMPLER", "IoUBalancedSampler"),
        ("RandomSampler", "IoUHLRSampler", "NEGATIVE_SAMPLER", "ScoreHLRSampler"),
        ("RandomSampler", "OHEMSampler", "NEGATIVE_SAMPLER", "HardSampler"),
    ],
)
def test_a_sampler_for_the_other_kind_is_refused_with_those_that_fit(
    positive, negative, key, fitting
):
    wrong = positive if key == "POSITIVE_SAMPLER" else negative
    kind = key.removesuffix("_SAMPLER").lower()
    match = rf"{key}\.NAME = '{wrong}' is not allowed: .* {kind}s alone; .*'{fitting}'"
    with pytest.raises(ValueError, match=match) as error:
        build_batch_sampler(small_cfg(*sampled_by(positive, negative)))
    assert f"'{wrong}'" not in str(error.value).partition("choose one of")[2]


@pytest.mark.parametrize(
    "pair",
    [
        {"positive": IoUBalancedSampler(), "negative": RandomSampler()},
        {"positive": RandomSampler(), "negative": IoUHLRSampler()},
    ],
)
def test_a_pair_refuses_a_sampler_for_the_other_kind(pair):
    with pytest.raises(ValueError, match="(positive|negative) = IoU.* is not allowed"):
        PairSampler(**pair)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IoUBalancedSampler(num_bins=0), "^num_bins = 0 is not allowed"),
        (lambda: IoUBalancedSampler(floor_thresh=2.0), "^floor_thresh = 2.0"),
        (lambda: ScoreHLRSampler(score_thresh=-1), "^score_thresh = -1"),
        (lambda: OHEMSampler(nms_thresh=1.5), "^nms_thresh = 1.5"),
    ],
)
def test_a_constructor_names_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_samplers_have_the_published_settings_by_default():
    of_config = [
        build_proposal_sampler(small_cfg("MODEL.ROI_HEADS.NEGATIVE_SAMPLER.NAME", name), kind)
        for name, kind in (
            ("IoUBalancedSampler", "NEGATIVE_SAMPLER"),
            ("ScoreHLRSampler", "NEGATIVE_SAMPLER"),
        )
    ]
    for ours, theirs in zip((IoUBalancedSampler(), ScoreHLRSampler()), of_config, strict=True):
        assert type(ours) is type(theirs) and vars(ours) == vars(theirs)
    for cls in (RandomSampler, HardSampler, InstanceBalancedSampler, IoUHLRSampler):
        assert vars(cls()) == {}


def test_a_class_from_outside_may_take_the_config_alone(register):
    @register
    class OfConfig(ProposalSampler):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES

    @register
    class OfConfigAndSettings(IoUBalancedSampler):
        def __init__(self, config):
            super().__init__(config)

    opts = sampled_by("OfConfig", "OfConfigAndSettings")
    bins = ["MODEL.ROI_HEADS.NEGATIVE_SAMPLER.IOU_BALANCED.NUM_BINS", 5]
    sampler = build_batch_sampler(small_cfg(*opts, *bins))
    assert sampler.positive.num_classes == 3
    assert sampler.negative.num_bins == 5


def test_a_sampler_reads_the_node_that_it_is_named_in():
    cfg = small_cfg()
    cfg.MODEL.RPN.NEGATIVE_SAMPLER = cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER.clone()
    cfg.MODEL.RPN.NEGATIVE_SAMPLER.NAME = "IoUBalancedSampler"
    cfg.MODEL.RPN.NEGATIVE_SAMPLER.IOU_BALANCED.NUM_BINS = 7
    assert build_proposal_sampler(cfg, "NEGATIVE_SAMPLER", "MODEL.RPN").num_bins == 7
    cfg.MODEL.RPN.NEGATIVE_SAMPLER.IOU_BALANCED.NUM_BINS = 0
    with pytest.raises(
        ValueError, match=r"MODEL\.RPN\.NEGATIVE_SAMPLER\.IOU_BALANCED\.NUM_BINS = 0"
    ):
        build_proposal_sampler(cfg, "NEGATIVE_SAMPLER", "MODEL.RPN")


def test_a_joint_sampler_from_outside_is_named_for_both_kinds(register):
    @register
    class FirstOfTheBatch(BatchSampler):
        def __init__(self, cfg):
            pass

        def __call__(self, batch, quota):
            nothing = torch.zeros(0, dtype=torch.int64)
            first = Choice(torch.tensor([0]), nothing)
            return [first, *(Choice(nothing, nothing) for _ in batch[1:])]

    sampler = build_batch_sampler(small_cfg(*sampled_by("FirstOfTheBatch", "FirstOfTheBatch")))
    choices = sampler([image_of(0, 2), image_of(1)], Quota(5, 0.25, 2))
    assert [choice.indices.tolist() for choice in choices] == [[0], []]
    with pytest.raises(ValueError, match=r"POSITIVE_SAMPLER\.NAME = 'FirstOfTheBatch'"):
        build_batch_sampler(small_cfg(*sampled_by("FirstOfTheBatch", "RandomSampler")))


def test_joint_ohem_is_named_by_itself_or_by_the_flag():
    joint = ["MODEL.ROI_HEADS.HARD_SAMPLER.JOINT", True]
    for opts in (
        sampled_by("OHEMSampler", "OHEMSampler"),
        [*sampled_by("HardSampler", "HardSampler"), *joint],
    ):
        assert type(build_batch_sampler(small_cfg(*opts))) is OHEMSampler


def test_a_pair_takes_positives_up_to_their_fraction_and_fills_up_with_negatives():
    sampler = PairSampler(positive=RandomSampler(), negative=RandomSampler())
    image = image_of(0, 1, 2, 2, -1, 2, 0, 2, 2, 2, -1, 2)
    (choice,) = sampler([image], Quota(8, 0.25, 2))
    assert len(choice.positives) == 2 and len(choice.negatives) == 6
    assert set(choice.positives.tolist()) <= {0, 1, 6}
    assert set(choice.negatives.tolist()) <= {2, 3, 5, 7, 8, 9, 11}
    assert len(set(choice.indices.tolist())) == 8
