import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from helpers import random_boxes
from torch import nn

from pisa_d2.roi_heads import scoring
from pisa_d2.roi_heads.scoring import BoxBranch, evaluating, predict_all, split_predictions
from pisa_d2.samplers import Predictions


def predict(parts, features, boxes):
    """Predict logits and deltas of all boxes; return them and the pooled features."""
    outputs, pooled = predict_all(parts, features, boxes, lambda outputs, rows: outputs)
    return tuple(torch.cat(values) for values in zip(*outputs, strict=True)), pooled


class Predictor(nn.Linear):
    def forward(self, x):
        scores = super().forward(x)
        return scores, 2 * scores


def branch():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(20), nn.Dropout(0.5))
    pooler = ROIPooler(2, (0.25,), 2, "ROIAlignV2")
    return BoxBranch(["p2"], pooler, head, None, Predictor(20, 4))


def inputs(*sizes):
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(len(sizes), 5, 24, 32, generator=generator)]
    return features, [Boxes(random_boxes(size, generator)) for size in sizes]


def test_predictions_are_those_in_evaluation_of_image_after_image():
    parts = branch()
    features, boxes = inputs(4, 0, 3)
    (scores, deltas), pooled = predict(parts, features, boxes)
    parts.head.eval()
    expected = parts.predictor(parts.head(parts.pooler(features, boxes)))
    torch.testing.assert_close((scores, deltas), expected)
    torch.testing.assert_close(pooled, parts.pooler(features, boxes))
    assert not scores.requires_grad and not pooled.requires_grad


@pytest.mark.parametrize("num_boxes", [1, 3, 100])
def test_parts_of_bounded_size_make_no_difference(monkeypatch, num_boxes):
    features, boxes = inputs(4, 0, 3)
    expected, pooled = predict(branch(), features, boxes)
    monkeypatch.setattr(scoring, "MAX_BYTES_AT_A_TIME", num_boxes * 5 * 2 * 2 * 4)
    parts = branch()
    sizes = []
    parts.head.register_forward_hook(lambda _, x, __: sizes.append(len(x[0])))
    ours, ours_pooled = predict(parts, features, boxes)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(ours_pooled, pooled)
    assert sum(sizes) == 7 and max(sizes) <= num_boxes


@pytest.mark.parametrize(
    ("name", "value", "parts_of"),
    [
        ("MAX_BYTES_AT_A_TIME", 3 * 5 * 2 * 2 * 4, [3, 3, 1]),
        ("MAX_CACHED_LOGITS", 5 * 4, [5, 2]),
        ("MAX_CACHED_LOGITS", 3, [1] * 7),
    ],
)
def test_parts_say_where_they_are_and_are_split_by_image(monkeypatch, name, value, parts_of):
    features, boxes = inputs(4, 0, 3)
    expected = predict(branch(), features, boxes)[0][0]
    monkeypatch.setattr(scoring, name, value)
    rows = torch.arange(7)
    sizes = []

    def summarise(outputs, part):
        sizes.append(len(outputs[0]))
        return Predictions(cls_losses=rows[part].float(), boxes=outputs[0])

    parts, _ = predict_all(branch(), features, boxes, summarise)
    assert sizes == parts_of
    of_images = split_predictions(parts, [4, 0, 3])
    assert [p.cls_losses.tolist() for p in of_images] == [[0, 1, 2, 3], [], [4, 5, 6]]
    torch.testing.assert_close(torch.cat([p.boxes for p in of_images]), expected)
    assert not hasattr(of_images[0], "scores")


def test_pooled_features_above_the_bound_are_not_kept(monkeypatch):
    features, boxes = inputs(4, 3)
    for bound, kept in ((7 * 80, True), (7 * 80 - 1, False)):
        monkeypatch.setattr(scoring, "MAX_BYTES_KEPT", bound)
        assert (predict(branch(), features, boxes)[1] is not None) == kept


def test_no_boxes_give_no_predictions():
    (scores, deltas), pooled = predict(branch(), *inputs(0, 0))
    assert scores.shape == deltas.shape == (0, 4) and len(pooled) == 0


def test_batch_norm_and_modes_stay_as_they_were():
    parts = branch()
    parts.head[2].eval()
    before = {name: value.clone() for name, value in parts.head.state_dict().items()}
    predict(parts, *inputs(4, 3))
    assert [m.training for m in parts.head.modules()] == [True, True, True, False]
    for name, value in parts.head.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_modes_come_back_after_an_error():
    head = branch().head
    with pytest.raises(RuntimeError), evaluating(head):
        assert not head.training
        raise RuntimeError
    assert all(m.training for m in head.modules())
