"""Traced and scripted models with these heads do the same as with Detectron2's."""

import re

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import ROI_HEADS_REGISTRY, build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes
from detectron2.utils.testing import assert_instances_allclose, convert_scripted_instances
from helpers import (
    HEADS,
    REGIONS_ON,
    ROOT,
    random_batch,
    sampled_by,
    small_cfg,
    small_retinanet_cfg,
)
from torch import Tensor

from pisa_d2 import PROPOSAL_SAMPLER_REGISTRY, PISAROIHeads, ProposalSampler
from pisa_d2.roi_heads.pooling import ReusingPooler

FIELDS = {
    "proposal_boxes": Boxes,
    "objectness_logits": Tensor,
    "pred_boxes": Boxes,
    "scores": Tensor,
    "pred_classes": Tensor,
}
FEW = [*("MODEL.RPN.PRE_NMS_TOPK_TEST", 30, "MODEL.RPN.POST_NMS_TOPK_TEST", 30)]
PREDICTED = sampled_by("IoUHLRSampler", "ScoreHLRSampler")
JOINT = [*sampled_by("HardSampler", "HardSampler"), "MODEL.ROI_HEADS.HARD_SAMPLER.JOINT", True]
MASKS = ["MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16]


def build(cfg):
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for name, p in model.named_parameters():  # or all scores would be equal, and nothing detected
        if name.endswith(("cls_score.weight", "bbox_pred.weight")):
            torch.nn.init.normal_(p, std=0.3)
    return model


def random_image():
    return random_batch([1])[0]["image"].float()


def detect(model, image):
    return model.inference([{"image": image}], do_postprocess=False)[0]


@torch.no_grad()
def scripted_and_plain(model, **more):
    scripted = scripting_with_instances(model, {**FIELDS, **more})
    image = random_image()
    return convert_scripted_instances(detect(scripted, image)), detect(model, image)


def own_heads_with_own_samplers():
    @PROPOSAL_SAMPLER_REGISTRY.register()
    class OwnSampler(ProposalSampler):
        needs_predictions = True

        def __init__(self, cfg):
            self.state = {1: torch.Generator(), "cfg": cfg, None: lambda x: x}

    @ROI_HEADS_REGISTRY.register()
    class OwnHeads(PISAROIHeads):
        pass

    return [
        *("MODEL.ROI_HEADS.NAME", "OwnHeads", *sampled_by("OwnSampler", "OwnSampler")),
        *("MODEL.PROPOSAL_GENERATOR.NAME", "PISARPN", "MODEL.IGNORED_REGIONS.ENABLED", True),
    ]


@pytest.mark.parametrize("kind", ["masks", "own", pytest.param("joint", marks=pytest.mark.slow)])
def test_heads_script_with_any_sampler(kind):
    opts = {
        "masks": lambda: [*MASKS, *PREDICTED, *REGIONS_ON],
        "own": own_heads_with_own_samplers,
        "joint": lambda: JOINT,
    }[kind]()
    model = build(small_cfg(*FEW, *opts))
    assert isinstance(model.roi_heads.box_pooler, ReusingPooler)
    more = {"pred_masks": Tensor} if kind == "masks" else {}
    scripted, plain = scripted_and_plain(model, **more)
    assert len(plain) > 0
    assert_instances_allclose(scripted, plain)


@pytest.mark.slow
@pytest.mark.parametrize("samplers", [[], PREDICTED])
def test_heads_of_c4_models_script(samplers):
    # Without masks, stock heads cannot be scripted.
    opts = [*HEADS["PISARes5ROIHeads"], *MASKS, *samplers]
    scripted, plain = scripted_and_plain(build(small_cfg(*FEW, *opts)), pred_masks=Tensor)
    assert len(plain) > 0
    assert_instances_allclose(scripted, plain)


@pytest.mark.slow
def test_retinanet_scripts():
    model = build(small_retinanet_cfg("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0))
    scripted = scripting_with_instances(model, FIELDS)
    image = random_image().repeat(1, 2, 2)
    with torch.no_grad():
        ours = convert_scripted_instances(scripted([{"image": image}])[0])
        plain = model([{"image": image}])[0]["instances"]
    assert len(plain) > 0
    assert_instances_allclose(detector_postprocess(ours, *image.shape[1:]), plain)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", HEADS)
def test_heads_trace_with_samplers_that_need_predictions(name):
    model = build(small_cfg(*FEW, *HEADS[name], *PREDICTED, *REGIONS_ON))
    image = random_image()
    adapter = TracingAdapter(model, image, detect).eval()
    with torch.no_grad():
        traced = torch.jit.trace(adapter, (image[:, :80, :100],), check_trace=False)
        ours, plain = adapter.outputs_schema(traced(image)), detect(model, image)
    assert len(plain) > 0
    assert_instances_allclose(ours, plain, size_as_tensor=True)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.slow
def test_the_page_on_deployment_is_a_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "deployment.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    folder = re.search('folder = "(.*)"', blocks[0]).group(1)
    cfg = small_cfg(*FEW)
    model = build(cfg)
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "config.yaml").write_text(cfg.dump())
    DetectionCheckpointer(model, str(tmp_path / folder)).save("model_final")
    page = {}
    exec("\n".join(blocks), page)

    image = random_image()
    with torch.no_grad():
        expected = detect(model, image)
        assert len(expected) > 0
        assert type(page["stock"].roi_heads).__name__ == "StandardROIHeads"
        assert_instances_allclose(detect(page["stock"], image), expected)
        scripted = convert_scripted_instances(detect(page["scripted"], image))
        assert_instances_allclose(scripted, expected)
        traced = page["traced"].outputs_schema(torch.jit.load("traced.pt")(image))
        assert_instances_allclose(traced, expected, size_as_tensor=True)
