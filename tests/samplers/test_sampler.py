import pytest
import torch
from helpers import small_cfg

from pisa_d2.samplers import BatchSampler, Candidates, ProposalSampler, Quota, RandomSampler


def candidates(num: int) -> Candidates:
    indices = torch.arange(num)
    return Candidates(torch.rand(num, 4), torch.rand(num), indices, indices)


@pytest.mark.parametrize(("num", "wanted"), [(9, 4), (9, 9), (3, 5), (0, 5), (9, 0)])
def test_random_samples_are_the_first_of_a_permutation_as_in_detectron2(num, wanted):
    pool = candidates(num)
    torch.manual_seed(3)
    chosen = RandomSampler()(pool, wanted)
    torch.manual_seed(3)
    assert torch.equal(chosen, torch.randperm(num)[:wanted])
    assert len(chosen) == min(num, wanted) == len(set(chosen.tolist()))


def test_every_candidate_is_chosen_equally_often():
    torch.manual_seed(0)
    sampler, pool = RandomSampler(), candidates(5)
    counts = torch.stack([sampler(pool, 2).bincount(minlength=5) for _ in range(500)]).sum(dim=0)
    assert counts.sum() == 1000
    assert (counts > 150).all()  # 200 each, give or take 11


def test_a_sampler_serves_both_kinds_without_predictions_or_ranks_unless_it_says_so():
    sampler = RandomSampler()
    assert sampler.kinds == {"positive", "negative"}
    assert not sampler.needs_predictions and not BatchSampler().needs_predictions
    assert sampler.ranks(candidates(3), torch.arange(2), 2) is None


def test_settings_of_a_sampler_are_the_keys_of_its_node_in_lower_case():
    cfg = small_cfg("MODEL.ROI_HEADS.NEGATIVE_SAMPLER.IOU_BALANCED.NUM_BINS", 7)

    class WithSettings(ProposalSampler):
        settings = "IOU_BALANCED"

    keys = {"num_bins": 7, "floor_thresh": -1.0, "floor_fraction": 0.0}
    assert WithSettings.from_config(cfg) == keys
    node = cfg.MODEL.RPN.NEGATIVE_SAMPLER
    assert WithSettings.from_config(cfg, node) == {**keys, "num_bins": node.IOU_BALANCED.NUM_BINS}
    assert RandomSampler.from_config(cfg) == {}


def test_base_classes_choose_nothing():
    with pytest.raises(NotImplementedError):
        ProposalSampler()(candidates(3), 1)
    with pytest.raises(NotImplementedError):
        BatchSampler()([candidates(3)], Quota(2, 0.5, 3))
    assert str(BatchSampler()) == "BatchSampler"
