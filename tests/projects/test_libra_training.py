import pickle
import re

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import random_batch, read_metrics, run_training, switch
from libra_models import PROJECT, RCNN, RETINANET, SMALL, load, small

from pisa_d2.data import make_digits

PISA_ON_TOP = "BCCD/libra_pisa_faster_rcnn_R_18_FPN.yaml"


def without_libra(*opts):
    """The same detector on the pyramid as it is."""
    torch.manual_seed(0)
    plain = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]
    return build_model(load(RCNN, *SMALL, *plain, *opts))


@pytest.mark.parametrize(
    ("name", "parts"),
    [(RCNN, []), (PISA_ON_TOP, []), (RETINANET, []), (RETINANET, switch(True, False, True))],
    ids=["rcnn", "rcnn with PISA", "retinanet", "retinanet with PISA"],
)
def test_training_lowers_the_losses(name, parts):
    batch = random_batch([3, 2, 4])
    model = small(name, *parts).train()
    before = {k: p.detach().clone() for k, p in model.backbone.refine.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    history = []
    with EventStorage():
        for _ in range(20):
            losses = model(batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            history.append(sum(losses.values()).item())
    assert ("loss_carl" in losses) == (name == PISA_ON_TOP or len(parts) > 0)
    assert sum(history[-5:]) < 0.8 * sum(history[:5])
    after = dict(model.backbone.refine.named_parameters())
    assert all(not torch.equal(after[k], value) for k, value in before.items())


def test_imagenet_weights_find_their_layers_by_name(tmp_path):
    def resnet_of(model):
        return {k.split("bottom_up.")[1]: v for k, v in model.state_dict().items() if "bottom" in k}

    model, other = small(RCNN), without_libra()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    weights = {name: value.numpy() for name, value in resnet_of(other).items()}
    path = tmp_path / "imagenet.pkl"
    content = {"model": weights, "__author__": "", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    DetectionCheckpointer(model).load(str(path))
    assert all(torch.equal(v, resnet_of(other)[k]) for k, v in resnet_of(model).items())
    for name, value in model.state_dict().items():
        assert "bottom_up" in name or torch.equal(value, fresh[name]), name


def test_a_plain_detectors_checkpoint_loads_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain, model = without_libra(), small(RCNN)
    DetectionCheckpointer(plain, save_dir=str(tmp_path)).save("plain")
    (program,) = re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL)
    exec(program, {})
    DetectionCheckpointer(model).load("start.pth")
    keys = model.load_state_dict(torch.load("start.pth")["model"], strict=False)
    assert not keys.unexpected_keys
    assert all(key.startswith("backbone.refine.") for key in keys.missing_keys)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, ours = plain.backbone(x), model.backbone.pyramid(x)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_run_trains_and_evaluates(tmp_path):
    make_digits(tmp_path, num_train=8, num_val=2)
    run_training(
        PROJECT / "train_net.py",
        PROJECT / "configs/Digits/libra_faster_rcnn_R_18_FPN.yaml",
        tmp_path,
        tmp_path / "run",
        *("MODEL.DEVICE", "cpu", "SEED", "1", "MODEL.FPN.OUT_CHANNELS", "32"),
        *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"),
        *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "20", "SOLVER.WARMUP_ITERS", "2"),
    )
    metrics = read_metrics(tmp_path / "run")
    steps = next(line for line in metrics if line.get("iteration") == 19)
    assert steps["loss_box_reg"] > 0 and "loss_carl" not in steps
    assert any("bbox/AP" in line for line in metrics)
