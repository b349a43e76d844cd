import pytest
from helpers import ROOT

import pisa_d2
from pisa_d2 import model_zoo
from pisa_d2.matcher import PROPOSAL_MATCHER_REGISTRY
from pisa_d2.samplers import PROPOSAL_SAMPLER_REGISTRY
from pisa_d2.train_net import load_config

CONFIG = "COCO-Detection/pisa_faster_rcnn_R_50_FPN_1x.yaml"
LAZY = "LazyConfig/COCO/pisa_faster_rcnn_R_50_FPN_1x.py"

# Names that users rely on: removing one takes a breaking release.
PUBLIC = {
    *("PISAMixin", "PISAROIHeads", "PISARes5ROIHeads", "PISACascadeROIHeads"),
    *("PISAFastRCNNOutputLayers", "PISARetinaNet", "PISARPN", "add_pisa_config"),
    *("ISR", "NegativeISR", "CARL", "BalancedL1"),
    *("RandomSampler", "InstanceBalancedSampler", "IoUBalancedSampler"),
    *("HardSampler", "IoUHLRSampler", "ScoreHLRSampler", "OHEMSampler"),
    *("ProposalSampler", "BatchSampler", "PairSampler"),
    *("Candidates", "Predictions", "Quota", "Choice"),
    *("ProposalMatcher", "IoUMatcher", "Match"),
    *("PROPOSAL_SAMPLER_REGISTRY", "PROPOSAL_MATCHER_REGISTRY"),
    *("data", "model_zoo", "__version__"),
}


def test_what_users_name_is_exported():
    assert set(pisa_d2.__all__) >= PUBLIC
    assert all(hasattr(pisa_d2, name) for name in pisa_d2.__all__)
    for registry in (PROPOSAL_SAMPLER_REGISTRY, PROPOSAL_MATCHER_REGISTRY):
        own = [cls for _, cls in registry if cls.__module__.startswith("pisa_d2.")]
        assert own and all(getattr(pisa_d2, cls.__name__) is cls for cls in own)


def test_a_checkout_has_its_own_configs():
    assert model_zoo.get_config_file(CONFIG) == str(ROOT / "configs" / CONFIG)
    assert {CONFIG, LAZY} <= set(model_zoo.list_configs())


def test_a_config_comes_with_its_keys():
    cfg = model_zoo.get_config(CONFIG)
    assert cfg.MODEL.ROI_HEADS.NAME == "PISAROIHeads"
    assert cfg.MODEL.PISA.CARL.ENABLED
    assert model_zoo.get_config(LAZY).model.roi_heads._target_ is pisa_d2.PISAROIHeads


def test_an_unknown_config_names_those_that_are_like_it():
    name = "COCO-Detection/pisa_faster_rcnn_R_50_FPN.yaml"
    with pytest.raises(
        ValueError, match=f"'{name}' is not a config of pisa_d2: did you.*'{CONFIG}"
    ):
        model_zoo.get_config_file(name)
    with pytest.raises(ValueError, match="'mine.yaml': there is no such file, and 'mine.yaml' is"):
        model_zoo.find_config("mine.yaml")


def test_trained_weights_are_refused():
    with pytest.raises(ValueError, match="no trained weights of 'COCO-Detection"):
        model_zoo.get_config(CONFIG, trained=True)


class Args:
    opts = ()


@pytest.mark.parametrize("name", [CONFIG, f"configs/{CONFIG}"])
def test_training_finds_a_config_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = Args()
    args.config_file = name
    assert load_config(args).MODEL.ROI_HEADS.NAME == "PISAROIHeads"
    assert args.config_file == str(ROOT / "configs" / CONFIG)


def test_a_file_of_the_users_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / CONFIG
    path.parent.mkdir()
    path.touch()
    assert model_zoo.find_config(CONFIG) == CONFIG
