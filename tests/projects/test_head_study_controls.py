"""Controls change one thing each."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from head_study import controls
from head_study.cache import collate, run_head
from head_study.controls import is_truth, permuted
from head_study_models import (
    PISA,
    detector_cfg,
    head_study_node,
    register_study_images,
    small_study,
)
from helpers import HEADS, load_script, random_batch, small_cfg, small_retinanet_cfg

from pisa_d2.attention import Positives, isr_p_weights, isr_weights
from pisa_d2.boxes import box_iou
from pisa_d2.isr import positive_weights
from pisa_d2.meta_arch import retinanet
from pisa_d2.roi_heads import fast_rcnn

hold_out = load_script("projects/HeadStudy/hold_out.py")

NAMES = {
    "PISAROIHeads": "ControlROIHeads",
    "PISARes5ROIHeads": "ControlRes5ROIHeads",
}


@pytest.fixture
def dataset(tmp_path):
    return register_study_images(tmp_path, [4, 7])


def test_values_are_permuted_among_the_samples_of_each_class():
    torch.manual_seed(0)
    classes = torch.randint(4, (400,))
    values = torch.arange(400) + 1000 * classes
    result = permuted(values, classes)
    assert torch.equal(result.sort().values, values.sort().values)
    assert torch.equal(result // 1000, classes)
    for index in range(4):
        own, others = values[classes == index].float(), result[classes == index].float()
        assert abs(torch.corrcoef(torch.stack([own, others]))[0, 1]) < 0.3
    assert len(permuted(values[:0], classes[:0])) == 0


def step_of(study, strategy, views):
    """A head, and the losses of its step from one start."""
    head = study.head(strategy, seed=1).train()
    torch.manual_seed(7)
    with EventStorage():
        _, losses = run_head(head, views, torch.device("cpu"))
    return head, losses


def losses_of(study, strategy, views):
    _, losses = step_of(study, strategy, views)
    return {name: value.item() for name, value in losses.items()}


@pytest.mark.parametrize("heads", NAMES)
def test_a_control_changes_the_loss_that_it_is_about_alone(heads, dataset, tmp_path):
    control = {**PISA, "MODEL.ROI_HEADS.NAME": NAMES[heads]}
    options = {
        "PISA": PISA,
        **{name: {**control, "HEAD_STUDY.CONTROL": name} for name in controls.CONTROLS},
    }
    cfg = detector_cfg(tmp_path, dataset, *HEADS[heads])
    study = small_study(cfg, tmp_path, options)
    views = list(study.views("train"))
    losses = {name: losses_of(study, name, views) for name in options}
    for name, of_control in losses.items():
        assert of_control.keys() == {"loss_cls", "loss_box_reg", "loss_carl"}
        # Weights keep the total of the classification loss; what differs is its gradient.
        assert of_control["loss_cls"] == pytest.approx(losses["PISA"]["loss_cls"], rel=1e-5)
        assert of_control["loss_box_reg"] == losses["PISA"]["loss_box_reg"]
        changed = of_control["loss_carl"] != losses["PISA"]["loss_carl"]
        assert changed == (name == "permuted_probabilities")


def test_a_whole_detector_has_a_control_with_the_start_of_pisa():
    """projects/HeadStudy/train_net.py trains one."""
    losses, starts = {}, {}
    for control in ("", "permuted_probabilities"):
        cfg = small_cfg()
        cfg.HEAD_STUDY = head_study_node(CONTROL=control)
        cfg.MODEL.ROI_HEADS.NAME = "ControlROIHeads" if control else "PISAROIHeads"
        torch.manual_seed(3)
        model = build_model(cfg)
        starts[control] = {name: value.clone() for name, value in model.state_dict().items()}
        torch.manual_seed(4)
        with EventStorage():
            losses[control] = model(random_batch([4, 7]))
    plain, of_control = losses.values()
    assert all(torch.equal(starts[""][name], value) for name, value in starts[control].items())
    assert plain["loss_cls"] == of_control["loss_cls"]
    assert plain["loss_carl"] != of_control["loss_carl"]


def retinanet_step(control=None):
    """The losses of a step of RetinaNet from one start, and the gradient of its classifier."""
    cfg = small_retinanet_cfg()
    if control:
        cfg.HEAD_STUDY = head_study_node(CONTROL=control)
        cfg.MODEL.META_ARCHITECTURE = "ControlRetinaNet"
    torch.manual_seed(3)
    model = build_model(cfg)
    torch.manual_seed(4)
    with EventStorage():
        losses = model(random_batch([4, 7]))
    sum(losses.values()).backward()
    return losses, model.head.cls_score.weight.grad


def test_a_retinanet_has_the_controls_that_apply_to_anchors():
    losses, gradient = retinanet_step()
    for control in controls.CONTROLS_OF_RETINANET:
        of_control, own_gradient = retinanet_step(control)
        assert of_control["loss_box_reg"] == losses["loss_box_reg"]
        torch.testing.assert_close(of_control["loss_cls"], losses["loss_cls"])
        assert not torch.allclose(own_gradient, gradient)
        changed = of_control["loss_carl"] != losses["loss_carl"]
        assert changed == (control == "permuted_probabilities")


def test_permuted_ranks_of_anchors_give_each_class_its_weights_in_another_order(storage):
    with mock.patch.object(retinanet, "isr_p_weights", wraps=isr_p_weights) as isr_p:
        retinanet_step()
    settings, positives, transform = isr_p.call_args.args
    # With equal losses, ISR-P scales both alike.
    positives = replace(positives, cls_losses=torch.ones_like(positives.cls_losses))
    weights = isr_p_weights(settings, positives, transform)
    permuted_ones = controls.permuted_ranks_of_anchors(positives)
    own_weights = isr_p_weights(settings, permuted_ones, transform)
    assert not torch.allclose(own_weights, weights)
    for index in positives.classes.unique():
        of_class = positives.classes == index
        torch.testing.assert_close(
            own_weights[of_class].sort().values, weights[of_class].sort().values
        )


def test_a_control_of_proposals_is_refused_by_retinanet():
    cfg = small_retinanet_cfg()
    cfg.HEAD_STUDY = head_study_node(CONTROL="truth_not_ranked")
    cfg.MODEL.META_ARCHITECTURE = "ControlRetinaNet"
    with pytest.raises(ValueError, match="'truth_not_ranked' is not known: choose one of"):
        build_model(cfg)


def gradients(study, strategy, views, loss="loss_cls"):
    """Return the gradient of the class logits' weights, None if there is none."""
    head, losses = step_of(study, strategy, views)
    losses[loss].backward()
    return head.box_predictor.cls_score.weight.grad


def test_controls_of_isr_move_the_gradient_of_the_classification_loss(dataset, tmp_path):
    control = {**PISA, "MODEL.ROI_HEADS.NAME": "ControlROIHeads"}
    options = {
        "PISA": PISA,
        **{name: {**control, "HEAD_STUDY.CONTROL": name} for name in controls.CONTROLS},
    }
    study = small_study(detector_cfg(tmp_path, dataset), tmp_path, options)
    views = list(study.views("train"))
    of_pisa = gradients(study, "PISA", views)
    for name in ("permuted_ranks", "truth_not_ranked", "ranks_of_proposals"):
        assert not torch.allclose(gradients(study, name, views), of_pisa, rtol=1e-3)
    torch.testing.assert_close(gradients(study, "permuted_probabilities", views), of_pisa)
    assert gradients(study, "PISA", views, "loss_carl").any()
    assert gradients(study, "constant_probabilities", views, "loss_carl") is None


@pytest.fixture
def weighted(dataset, tmp_path):
    """Return the arguments of isr_weights in a step, and the objects of the batch."""
    study = small_study(detector_cfg(tmp_path, dataset), tmp_path)
    batch = collate(list(study.views("train")), torch.device("cpu"))
    head = study.head("PISA", seed=1).train()
    with (
        EventStorage(),
        mock.patch.object(fast_rcnn, "isr_weights", wraps=isr_weights) as isr,
    ):
        head(*batch)
    objects = {tuple(box) for target in batch.targets for box in target.gt_boxes.tensor.tolist()}
    return isr.call_args.args, objects


def isr_of(change, arguments):
    isr_p, isr_n, samples, positives, transform = arguments
    return isr_weights(isr_p, isr_n, *change(samples, positives), transform)


def test_the_boxes_of_the_objects_are_known_among_the_positives(weighted):
    (_, _, _, positives, _), objects = weighted
    found = [tuple(box) in objects for box in positives.boxes.tolist()]
    assert is_truth(positives).tolist() == found
    assert 0 < sum(found) < len(found)


def test_permuted_ranks_give_each_class_its_weights_in_another_order(weighted, storage):
    (isr_p, isr_n, samples, positives, transform), _ = weighted
    # With equal losses, ISR-P scales both alike.
    positives = replace(positives, cls_losses=torch.ones_like(positives.cls_losses))
    arguments = isr_p, isr_n, samples, positives, transform
    permuted_weights = isr_of(controls.permuted_ranks, arguments)
    weights = isr_weights(*arguments)
    rows = samples.positives
    assert not torch.allclose(weights[rows], permuted_weights[rows])
    negative = samples.negative
    assert torch.equal(weights[negative], permuted_weights[negative])
    for index in positives.classes.unique():
        of_class = rows[positives.classes == index]
        own, others = weights[of_class].sort().values, permuted_weights[of_class].sort().values
        torch.testing.assert_close(own, others)


def test_without_the_truth_the_proposals_are_ranked_among_themselves(weighted, storage):
    (isr_p, isr_n, samples, positives, transform), _ = weighted
    weights = isr_of(controls.truth_not_ranked, weighted[0])
    of_positives, proposals = weights[samples.positives], ~is_truth(positives)
    assert (of_positives[~proposals] == 1).all()
    alone = Positives(**{name: value[proposals] for name, value in vars(positives).items()})
    alone = replace(alone, objects=samples.objects[samples.positives[proposals]])
    torch.testing.assert_close(of_positives[proposals], isr_p_weights(isr_p, alone, transform))
    losses = positives.cls_losses
    torch.testing.assert_close((of_positives * losses).sum(), losses.sum())


def test_ranks_of_proposals_are_those_of_their_own_iou(weighted, storage):
    (isr_p, isr_n, samples, positives, transform), _ = weighted
    weights = isr_of(controls.ranks_of_proposals, weighted[0])
    rows = samples.positives
    # The boxes of objects have nearly equal IoU, which rounding puts in order.
    proposals = transform.apply_deltas(torch.zeros_like(positives.deltas), positives.boxes)
    torch.testing.assert_close(proposals, positives.boxes)
    expected = positive_weights(
        box_iou(proposals, positives.gt_boxes),
        samples.objects[rows],
        positives.classes,
        positives.cls_losses,
        gamma=isr_p.gamma,
        beta=isr_p.beta,
        n_max=isr_p.n_max,
    )
    torch.testing.assert_close(weights[rows], expected)
    usual = isr_weights(*weighted[0])
    assert not torch.allclose(usual[rows], expected)
    assert torch.equal(weights[samples.negative], usual[samples.negative])


def test_what_is_held_out_is_a_random_part_with_its_annotations():
    content = {
        "images": [{"id": i} for i in range(50)],
        "annotations": [{"id": j, "image_id": j % 50} for j in range(130)],
        "categories": [{"id": 1}],
    }
    fit, held = hold_out.hold_out(content, 0.2, seed=0)
    ids = [{image["id"] for image in part["images"]} for part in (fit, held)]
    assert len(ids[1]) == 10 and ids[0] | ids[1] == set(range(50)) and not ids[0] & ids[1]
    assert ids[1] != set(range(10)) and ids[1] != set(range(40, 50))
    for part, own in zip((fit, held), ids, strict=True):
        assert {a["image_id"] for a in part["annotations"]} == own
        assert part["categories"] == content["categories"]
    assert len(fit["annotations"]) + len(held["annotations"]) == 130
    assert hold_out.hold_out(content, 0.2, seed=0) == [fit, held]
    assert hold_out.hold_out(content, 0.2, seed=1) != [fit, held]
