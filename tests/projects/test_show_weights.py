import numpy as np
import torch
from detectron2.modeling import build_model
from helpers import load_script, random_batch, small_cfg

show_weights = load_script("projects/SampleAnalysis/show_weights.py")


def test_weights_are_those_of_the_losses(tmp_path):
    torch.manual_seed(0)
    model = build_model(small_cfg())
    inputs = random_batch([4])[0]
    positives = show_weights.weigh_positives(model, inputs)
    assert len(positives.boxes) == len(positives.ious) >= 4
    np.testing.assert_allclose(positives.carl.mean(), 1, rtol=1e-5)
    assert positives.isr_p.min() < 1 < positives.isr_p.max()
    # The best of all has rank 0, and rank 0 the highest weight.
    best = positives.ious.argmax()
    assert positives.isr_p[best] == positives.isr_p.max()
    path = tmp_path / "weights.png"
    show_weights.draw(inputs["image"].permute(1, 2, 0).numpy(), positives, path)
    assert path.read_bytes().startswith(b"\x89PNG")
