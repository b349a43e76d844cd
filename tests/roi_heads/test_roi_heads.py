import logging

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads, build_model
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from helpers import (
    HEADS,
    IMAGE_SIZE,
    random_batch,
    random_boxes,
    sampled_by,
    small_cfg,
    stock,
    switch,
)
from torch import nn

import pisa_d2
from pisa_d2 import (
    PROPOSAL_SAMPLER_REGISTRY,
    PISAFastRCNNOutputLayers,
    PISAMixin,
    PISAROIHeads,
    ProposalSampler,
    add_pisa_config,
)
from pisa_d2.boxes import box_iou
from pisa_d2.hlr import hierarchical_local_rank
from pisa_d2.roi_heads import scoring
from pisa_d2.roi_heads.sample_fields import IMPORTANCE_FIELD, OBJECT_FIELD
from pisa_d2.roi_heads.sampling import with_object_ids

pytestmark = pytest.mark.usefixtures("storage")

ALL_OFF = switch(False, False, False)
STOCK = stock("PISAROIHeads")


def build(*opts):
    torch.manual_seed(0)
    return build_model(small_cfg(*opts))


def losses_of(model, batch, seed=1):
    torch.manual_seed(seed)  # the sampler's draws
    return model.train()(batch)


def detections_of(model, batch):
    with torch.no_grad():
        return [output["instances"].get_fields() for output in model.eval()(batch)]


def assert_same_detections(ours, theirs):
    assert sum(len(fields["scores"]) for fields in theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a["pred_boxes"].tensor, b["pred_boxes"].tensor)
        assert torch.equal(a["scores"], b["scores"])
        assert torch.equal(a["pred_classes"], b["pred_classes"])


def roi_heads(cls=PISAROIHeads, *opts):
    cfg = small_cfg("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 512, *opts)
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    shapes = {f"p{i}": ShapeSpec(channels=channels, stride=2**i) for i in range(2, 6)}
    return cls(cfg, shapes)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("num_objects", [[3, 5], [4, 0], [0, 0]])
def test_with_all_parts_off_a_model_has_the_losses_of_stock_to_the_last_bit(heads, num_objects):
    batch = random_batch(num_objects)
    with EventStorage() as our_storage:
        ours = losses_of(build(*HEADS[heads], *ALL_OFF), batch)
    with EventStorage() as their_storage:
        theirs = losses_of(build(*stock(heads)), batch)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert our_storage.latest() == their_storage.latest()


@pytest.mark.parametrize("heads", HEADS)
def test_with_all_parts_off_autocast_gives_the_losses_of_stock_to_the_last_bit(heads):
    batch = random_batch([3, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = losses_of(build(*HEADS[heads], *ALL_OFF), batch)
        theirs = losses_of(build(*stock(heads)), batch)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("num_objects", [[3, 5], [4, 0], [0, 0], [1, 1, 1]])
def test_isr_changes_no_loss_and_carl_adds_one(num_objects):
    batch = random_batch(num_objects)
    ours = losses_of(build(), batch)
    stock = losses_of(build(*STOCK), batch)
    assert ours.keys() - stock.keys() == {"loss_carl"}
    for name, loss in stock.items():
        torch.testing.assert_close(ours[name], loss, rtol=1e-5, atol=1e-7)
    sum(ours.values()).backward()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("sampler", ["RandomSampler", "HardSampler"])
def test_a_seed_gives_the_weights_and_the_random_state_of_stock(heads, sampler):
    ours, ours_next = build(*HEADS[heads], *sampled_by(sampler, sampler)), torch.rand(1)
    theirs, theirs_next = build(*stock(heads)), torch.rand(1)
    assert ours_next == theirs_next
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    batch = random_batch([3, 2])
    assert_same_detections(detections_of(ours, batch), detections_of(theirs, batch))


@pytest.mark.parametrize("trained, loaded", [([], STOCK), (STOCK, [])])
def test_a_checkpoint_loads_in_stock_and_the_reverse(tmp_path, trained, loaded):
    batch = random_batch([3, 2])
    model = build(*trained)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        sum(model.train()(batch).values()).backward()
        optimizer.step()
    DetectionCheckpointer(model, save_dir=str(tmp_path)).save("model")

    torch.manual_seed(9)
    other = build_model(small_cfg(*loaded))
    file = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    incompatible = other.load_state_dict(file, strict=True)
    assert not incompatible.missing_keys and not incompatible.unexpected_keys
    DetectionCheckpointer(other).load(str(tmp_path / "model.pth"))
    assert_same_detections(detections_of(other, batch), detections_of(model, batch))


@pytest.mark.parametrize("heads", HEADS)
def test_bfloat16_autocast_gives_finite_losses_and_gradients(heads):
    model = build(*HEADS[heads])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model, random_batch([3, 5]))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("heads", HEADS)
def test_a_batch_without_positives_reaches_every_parameter_that_stock_reaches(heads):
    def touched(*opts):
        model = build("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False, *opts)
        losses = losses_of(model, random_batch([0, 0]))
        assert all(loss.shape == () for loss in losses.values())
        sum(losses.values()).backward()
        return {name for name, p in model.named_parameters() if p.grad is not None}

    assert touched(*HEADS[heads]) == touched(*stock(heads))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou", "diou", "ciou"])
def test_carl_is_of_the_size_of_the_box_loss_whichever_type_it_has(heads, box_loss):
    opts = [*HEADS[heads], "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", box_loss]
    losses = losses_of(build(*opts), random_batch([3, 5]))
    pairs = {
        name: (loss, losses[name.replace("box_reg", "carl")])
        for name, loss in losses.items()
        if name.startswith("loss_box_reg")
    }
    assert len(pairs) == (3 if "Cascade" in heads else 1)
    # An untrained classifier gives all positives about the same weight.
    assert all(loss / 2 < carl < 2 * loss for loss, carl in pairs.values())


@pytest.mark.parametrize("heads", HEADS)
def test_a_step_leaves_its_inputs_alone(heads):
    batch, untouched = random_batch([3, 0, 5]), random_batch([3, 0, 5])
    losses_of(build(*HEADS[heads], *sampled_by("HardSampler", "ScoreHLRSampler")), batch)
    for after, before in zip(batch, untouched, strict=True):
        assert torch.equal(after["image"], before["image"])
        ours, theirs = after["instances"], before["instances"]
        assert ours.get_fields().keys() == theirs.get_fields().keys()
        assert torch.equal(ours.gt_boxes.tensor, theirs.gt_boxes.tensor)
        assert torch.equal(ours.gt_classes, theirs.gt_classes)


def test_training_lowers_the_losses():
    batch = random_batch([3, 2, 4])
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    history = []
    for _ in range(30):
        losses = losses_of(model, batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    total = [sum(losses.values()) for losses in history]
    assert sum(total[-5:]) < 0.7 * sum(total[:5])
    assert all(loss == loss for losses in history for loss in losses.values())


def test_objects_are_numbered_through_the_batch():
    targets = [sample["instances"] for sample in random_batch([3, 0, 1, 5, 2])]
    numbered = with_object_ids(targets)
    ids = [t.get(OBJECT_FIELD).tolist() for t in numbered]
    assert ids == [[0, 1, 2], [], [3], [4, 5, 6, 7, 8], [9, 10]]
    assert not any(t.has(OBJECT_FIELD) for t in targets)


def proposals_around(targets, generator):
    """Make ten proposals near each object and twenty anywhere."""
    result = []
    for target in targets:
        near = target.gt_boxes.tensor.repeat_interleave(10, dim=0)
        near = near + 6 * torch.rand(near.shape, generator=generator) - 3
        proposals = Instances(IMAGE_SIZE)
        boxes = torch.cat([near, random_boxes(20, generator)])
        proposals.proposal_boxes = Boxes(boxes)
        proposals.objectness_logits = torch.zeros(len(boxes))
        result.append(proposals)
    return result


def test_samples_carry_the_object_they_were_matched_to():
    targets = [sample["instances"] for sample in random_batch([3, 0, 4])]
    proposals = proposals_around(targets, torch.Generator().manual_seed(0))
    sampled = roi_heads().label_and_sample_proposals(proposals, targets)
    gt_boxes = torch.cat([t.gt_boxes.tensor for t in targets])
    for p in (sampled[0], sampled[2]):
        assert torch.equal(p.gt_boxes.tensor, gt_boxes[p.get(OBJECT_FIELD)])
    assert not sampled[1].has(OBJECT_FIELD)


def test_ranks_of_two_images_stay_when_images_of_other_classes_join_in_any_order():
    targets = [sample["instances"] for sample in random_batch([3] * 16, num_classes=2)]
    for target in targets[2:]:
        target.gt_classes = target.gt_classes + 2
    proposals = proposals_around(targets, torch.Generator().manual_seed(0))
    # Without the ground truths, whose IoU of 1 would be equal in all images.
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", 4, "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False]
    heads = roi_heads(PISAROIHeads, *opts)

    def ranks_in_first_two(images):
        sampled = heads.label_and_sample_proposals(
            [proposals[i] for i in images], [targets[i] for i in images]
        )
        positives = [p[p.gt_classes < 4] for p in sampled]
        boxes = torch.cat([p.proposal_boxes.tensor for p in positives])
        ious = box_iou(boxes, torch.cat([p.gt_boxes.tensor for p in positives]))
        objects = torch.cat([p.get(OBJECT_FIELD) for p in positives])
        classes = torch.cat([p.gt_classes for p in positives])
        ranks = hierarchical_local_rank(ious, objects, classes).tolist()
        of_image = [i for i, p in zip(images, positives, strict=True) for _ in range(len(p))]
        # Proposals are drawn in a different order each time, so their boxes identify them.
        return {
            tuple(box): rank
            for box, rank, image in zip(boxes.tolist(), ranks, of_image, strict=True)
            if image < 2
        }

    expected = ranks_in_first_two([0, 1])
    assert len(expected) > 40
    for num_images in range(2, 17):
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(num_images))
        assert ranks_in_first_two(order.tolist()) == expected


POSITIVE = ["RandomSampler", "InstanceBalancedSampler", "HardSampler", "IoUHLRSampler"]
NEGATIVE = ["RandomSampler", "IoUBalancedSampler", "HardSampler", "ScoreHLRSampler"]
JOINT = ["MODEL.ROI_HEADS.HARD_SAMPLER.JOINT", True]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("positive", POSITIVE)
@pytest.mark.parametrize("negative", NEGATIVE)
@pytest.mark.parametrize("pisa", [[], pytest.param(ALL_OFF, marks=pytest.mark.slow)])
def test_any_positive_sampler_trains_with_any_negative_one(heads, positive, negative, pisa):
    model = build(*HEADS[heads], *sampled_by(positive, negative), *pisa)
    losses = losses_of(model, random_batch([3, 0, 5]))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("num_objects", [[3, 5], [0, 2], [0, 0]])
def test_hard_samples_of_both_kinds_together_train(heads, num_objects):
    opts = [*sampled_by("HardSampler", "HardSampler"), *JOINT]
    losses = losses_of(build(*HEADS[heads], *opts), random_batch(num_objects))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


def passes_of(model, batch):
    """Record the number of boxes in each pass of the (first) box head in a training step."""
    branch = model.roi_heads.box_branch
    sizes = []
    branch.head.register_forward_hook(lambda _, x, __: sizes.append(len(x[0])))
    sum(losses_of(model, batch).values()).backward()
    return sizes


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("positive", POSITIVE)
@pytest.mark.parametrize("negative", NEGATIVE)
def test_samplers_that_need_predictions_share_one_more_pass(heads, positive, negative):
    model = build(*HEADS[heads], *sampled_by(positive, negative))
    sizes = passes_of(model, random_batch([3, 0, 5]))
    *extra, chosen = sizes
    assert chosen <= 3 * 32
    assert len(extra) == (positive in POSITIVE[2:] or negative in NEGATIVE[2:])
    assert all(size > 200 for size in extra)


def gradients(model, batch):
    sum(losses_of(model, batch).values()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("heads", HEADS)
def test_boxes_are_pooled_once_where_their_features_can_be_kept(heads, monkeypatch):
    opts = [*HEADS[heads], *sampled_by("HardSampler", "HardSampler")]
    found = []
    for bound in (2**30, 0):
        monkeypatch.setattr(scoring, "MAX_BYTES_KEPT", bound)
        model = build(*opts)
        calls = []
        pooler = model.roi_heads.box_branch.pooler
        pooler.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found.append((gradients(model, random_batch([3, 0, 5])), len(calls)))
    (reused, calls), (pooled_again, more_calls) = found
    assert more_calls == calls + 1
    assert reused.keys() == pooled_again.keys()
    for name, grad in reused.items():
        torch.testing.assert_close(grad, pooled_again[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("heads", HEADS)
def test_autocast_reaches_the_parameters_of_the_head_after_the_extra_pass(heads):
    def touched(*opts):
        model = build(*HEADS[heads], *opts)
        # Only the heads, since on CPUs a backbone takes seconds in bfloat16.
        autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        model.roi_heads.forward = autocast(model.roi_heads.forward)
        losses = losses_of(model, random_batch([3, 5]))
        sum(losses.values()).backward()
        return {name for name, p in model.named_parameters() if p.grad is not None}

    assert touched(*sampled_by("HardSampler", "ScoreHLRSampler")) == touched()


def test_the_extra_pass_leaves_batch_norm_alone():
    norm = ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_CONV", 1]
    norm += ["MODEL.ROI_BOX_HEAD.CONV_DIM", 16, "MODEL.ROI_BOX_HEAD.NORM", "BN"]
    model = build(*norm, *sampled_by("HardSampler", "ScoreHLRSampler"))
    losses_of(model, random_batch([3, 5]))
    norm = model.roi_heads.box_head.conv1.norm
    assert norm.num_batches_tracked == 1 and norm.training


def test_hard_samples_are_those_of_the_highest_loss_by_stock_detectron2():
    torch.manual_seed(0)
    targets = [sample["instances"] for sample in random_batch([3, 0, 4])]
    proposals = proposals_around(targets, torch.Generator().manual_seed(0))
    features = {
        f"p{i}": torch.randn(3, 32, IMAGE_SIZE[0] >> i, IMAGE_SIZE[1] >> i) for i in range(2, 6)
    }
    size = ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False]
    heads = roi_heads(PISAROIHeads, *size, *sampled_by("HardSampler", "HardSampler"))
    chosen = heads.choose_samples(features, proposals, targets)

    maps = [features[name] for name in heads.box_in_features]
    for image, (p, target) in enumerate(zip(proposals, targets, strict=True)):
        of_image = [m[image : image + 1] for m in maps]
        pooled = heads.box_pooler(of_image, [p.proposal_boxes])
        scores, deltas = heads.box_predictor(heads.box_head(pooled))
        everything = roi_heads(StandardROIHeads, *size[2:])
        losses = {0: [], 1: []}  # of negatives and positives
        for i in range(len(p)):
            one = everything.label_and_sample_proposals([p[i : i + 1]], [target])
            if len(one[0]) == 0:
                continue
            loss = FastRCNNOutputLayers.losses(
                heads.box_predictor, (scores[i : i + 1], deltas[i : i + 1]), one
            )["loss_cls"]
            losses[int(one[0].gt_classes < 3)].append((-loss.item(), i))
        positives = [i for _, i in sorted(losses[1])[:4]]
        negatives = [i for _, i in sorted(losses[0])[: 16 - len(positives)]]
        expected = p.proposal_boxes.tensor[positives + negatives]
        assert torch.equal(chosen[image].proposal_boxes.tensor, expected)


def test_random_draws_have_the_frequencies_of_stock():
    torch.manual_seed(0)
    targets = [sample["instances"] for sample in random_batch([3])]
    proposals = proposals_around(targets, torch.Generator().manual_seed(0))
    boxes = [tuple(box) for box in proposals[0].proposal_boxes.tensor.tolist()]
    opts = ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 12, "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False]
    counts = torch.zeros(2, len(boxes))
    for row, cls in enumerate((PISAROIHeads, StandardROIHeads)):
        heads = roi_heads(cls, *opts)
        for _ in range(1500):
            sampled = heads.label_and_sample_proposals(proposals, targets)[0]
            for box in sampled.proposal_boxes.tensor.tolist():
                counts[row, boxes.index(tuple(box))] += 1
    ours, theirs = counts
    assert ours.sum() == theirs.sum()
    chi_squared = ((ours - theirs) ** 2 / (ours + theirs)).sum()
    assert chi_squared < 87  # at most 49 degrees of freedom; exceeds 85.4 once in 1,000


def test_isr_n_takes_the_ranks_of_score_hlr_sampling():
    torch.manual_seed(0)
    model = build(*sampled_by("RandomSampler", "ScoreHLRSampler"))
    seen = []
    predictor = model.roi_heads.box_predictor
    losses = type(predictor).losses
    predictor.losses = lambda out, sampled: seen.append(sampled) or losses(predictor, out, sampled)
    losses_of(model, random_batch([3, 0, 5]))
    for p in seen[0]:
        negative = p.gt_classes == 3
        # In an untrained model all score above 0.05, so each has a rank among all candidates.
        importance = p.get(IMPORTANCE_FIELD)
        assert (importance[~negative] == 1).all()
        first, second = importance[negative][:2].tolist()
        assert first == 1 and 1 / (1 - second) > 60
        steps = torch.arange(int(negative.sum())) * (1 - second)
        torch.testing.assert_close(importance[negative], 1 - steps, rtol=0, atol=1e-5)


def test_samplers_that_need_predictions_say_so_where_there_are_no_features():
    heads = roi_heads(PISAROIHeads, *sampled_by("HardSampler", "RandomSampler"))
    targets = [sample["instances"] for sample in random_batch([3])]
    proposals = proposals_around(targets, torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="call the ROI heads or their choose_samples"):
        heads.label_and_sample_proposals(proposals, targets)


@pytest.mark.parametrize("negative", NEGATIVE)
def test_images_without_positives_or_without_negatives_train(negative):
    torch.manual_seed(0)
    targets = [sample["instances"] for sample in random_batch([3, 0])]
    proposals = proposals_around(targets, torch.Generator().manual_seed(0))
    proposals[0] = proposals[0][:0]  # with ground truth appended, its only proposals
    features = {
        f"p{i}": torch.randn(2, 32, IMAGE_SIZE[0] >> i, IMAGE_SIZE[1] >> i) for i in range(2, 6)
    }
    heads = roi_heads(PISAROIHeads, *sampled_by("HardSampler", negative))
    _, losses = heads(None, features, proposals, targets)
    assert losses["loss_cls"] > 0 and losses["loss_box_reg"] > 0
    one = {name: values[:1] for name, values in features.items()}
    _, losses = heads(None, one, proposals[:1], targets[:1])
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("heads", HEADS)
def test_the_extra_pass_is_shared_and_forgotten_after_a_step(heads):
    model = build(*HEADS[heads], *sampled_by("HardSampler", "HardSampler"))
    losses_of(model, random_batch([3]))
    assert model.roi_heads._step is None
    assert model.roi_heads.box_branch.pooler.step is None


def test_iou_balanced_sampling_takes_less_background():
    def share_of_overlapping(sampler):
        torch.manual_seed(0)
        targets = [sample["instances"] for sample in random_batch([2, 3])]
        proposals = proposals_around(targets, torch.Generator().manual_seed(0))
        for p in proposals:  # among many that lie anywhere
            p.proposal_boxes.tensor[10:] = random_boxes(len(p) - 10, torch.Generator())
        name = "MODEL.ROI_HEADS.NEGATIVE_SAMPLER.NAME"
        heads = roi_heads(PISAROIHeads, name, sampler, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16)
        sampled = heads.label_and_sample_proposals(proposals, targets)
        negatives = [p[p.gt_classes == heads.num_classes] for p in sampled]
        ious = [
            box_iou(p.proposal_boxes.tensor[:, None], t.gt_boxes.tensor[None]).amax(dim=1)
            for p, t in zip(negatives, targets, strict=True)
        ]
        return (torch.cat(ious) > 0.05).float().mean()

    assert share_of_overlapping("IoUBalancedSampler") > share_of_overlapping("RandomSampler")


def test_ignored_proposals_are_never_chosen():
    opts = ["MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.3, 0.7], "MODEL.ROI_HEADS.IOU_LABELS", [0, -1, 1]]
    targets = [sample["instances"] for sample in random_batch([3, 4])]
    proposals = proposals_around(targets, torch.Generator().manual_seed(0))
    sampled = roi_heads(PISAROIHeads, *opts).label_and_sample_proposals(proposals, targets)
    for p, t in zip(sampled, targets, strict=True):
        ious = box_iou(p.proposal_boxes.tensor[:, None], t.gt_boxes.tensor[None]).amax(dim=1)
        assert ((ious < 0.3) | (ious >= 0.7)).all()
        assert torch.equal(p.gt_classes < 3, ious >= 0.7)


def test_a_sampler_from_outside_the_package_is_named_in_the_config():
    @PROPOSAL_SAMPLER_REGISTRY.register()
    class SmallestFirstSampler(ProposalSampler):
        def __call__(self, candidates, num):
            width, height = (candidates.boxes[:, 2:] - candidates.boxes[:, :2]).T
            return (width * height).argsort()[:num]

    targets = [sample["instances"] for sample in random_batch([3])]
    proposals = proposals_around(targets, torch.Generator().manual_seed(0))
    name = "MODEL.ROI_HEADS.NEGATIVE_SAMPLER.NAME"
    opts = [name, "SmallestFirstSampler", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"]
    chosen, all_ = (
        roi_heads(PISAROIHeads, *opts, size).label_and_sample_proposals(proposals, targets)[0]
        for size in (8, 512)
    )
    areas = [p.proposal_boxes.area()[p.gt_classes == 3] for p in (chosen, all_)]
    assert torch.equal(areas[0].sort().values, areas[1].sort().values[: len(areas[0])])


def test_the_mixin_turns_any_roi_heads_into_pisa_heads():
    class OtherHeads(StandardROIHeads):
        pass

    class PISAOtherHeads(PISAMixin, OtherHeads):
        pass

    heads = roi_heads(PISAOtherHeads)
    assert type(heads.box_predictor) is PISAFastRCNNOutputLayers
    assert heads.box_predictor.isr_p is not None


def test_a_box_predictor_of_another_class_stays_with_a_warning(caplog):
    class OwnPredictor(nn.Module):
        def __init__(self, cfg, input_shape):
            super().__init__()

    class OwnHeads(StandardROIHeads):
        @classmethod
        def _init_box_head(cls, cfg, input_shape):
            ret = super()._init_box_head(cfg, input_shape)
            return {**ret, "box_predictor": OwnPredictor(cfg, ret["box_head"].output_shape)}

    class PISAOwnHeads(PISAMixin, OwnHeads):
        pass

    with caplog.at_level(logging.WARNING):
        heads = roi_heads(PISAOwnHeads)
    assert type(heads.box_predictor) is OwnPredictor
    assert "PISAOwnHeads keeps its box predictor OwnPredictor" in caplog.text


def test_a_box_predictor_of_another_class_has_no_losses_for_samplers():
    class OtherPredictor(nn.Module):
        def __init__(self, cfg, input_shape):
            super().__init__()

    class OtherHeads(StandardROIHeads):
        @classmethod
        def _init_box_head(cls, cfg, input_shape):
            ret = super()._init_box_head(cfg, input_shape)
            return {**ret, "box_predictor": OtherPredictor(cfg, ret["box_head"].output_shape)}

    class PISAOtherHeads(PISAMixin, OtherHeads):
        pass

    with pytest.raises(
        TypeError, match=r"HardSampler \(negatives\) needs .* which OtherPredictor is not"
    ):
        roi_heads(PISAOtherHeads, *sampled_by("RandomSampler", "HardSampler"))


def test_objects_keep_their_identity_through_the_stages_of_a_cascade():
    model = build(*HEADS["PISACascadeROIHeads"])
    seen = []
    for predictor in model.roi_heads.box_predictor:
        losses = type(predictor).losses
        predictor.losses = lambda out, sampled, predictor=predictor, losses=losses: (
            seen.append(sampled) or losses(predictor, out, sampled)
        )
    batch = random_batch([3, 0, 4])
    losses_of(model, batch)
    gt_boxes = torch.cat([sample["instances"].gt_boxes.tensor for sample in batch])
    assert len(seen) == 3 and not seen[0][1].has(OBJECT_FIELD)
    for stage, iou in zip(seen, (0.5, 0.6, 0.7), strict=True):
        for image, p in enumerate(stage):
            if image == 1:
                continue
            matched = gt_boxes[p.get(OBJECT_FIELD)]
            assert torch.equal(matched, p.gt_boxes.tensor)
            ious = box_iou(p.proposal_boxes.tensor, matched)
            assert torch.equal(p.gt_classes < 3, ious >= iou)


def test_stages_of_a_cascade_can_go_without():
    opts = [*HEADS["PISACascadeROIHeads"], "MODEL.PISA.CASCADE_STAGES", [0, 2]]
    predictors = build(*opts).roi_heads.box_predictor
    assert [p.isr_p is not None for p in predictors] == [True, False, True]
    losses = losses_of(build(*opts, *sampled_by("RandomSampler", "HardSampler")), random_batch([3]))
    assert "loss_carl_stage0" in losses and "loss_carl_stage1" not in losses


@pytest.mark.parametrize("heads", HEADS)
def test_focal_loss_trains_with_isr_and_carl(heads):
    focal = ["MODEL.ROI_BOX_HEAD.FOCAL_LOSS.ENABLED", True]
    batch = random_batch([3, 5])
    ours, cross_entropy = (
        losses_of(build(*HEADS[heads], *focal), batch),
        losses_of(build(*HEADS[heads]), batch),
    )
    assert ours.keys() == cross_entropy.keys()
    for name, loss in cross_entropy.items():
        if name.startswith("loss_cls"):
            assert 0 < ours[name] < loss
        else:
            torch.testing.assert_close(ours[name], loss)


def test_every_stage_of_a_cascade_has_isr_and_carl():
    batch = random_batch([3, 5])
    ours = losses_of(build(*HEADS["PISACascadeROIHeads"]), batch)
    theirs = losses_of(build(*stock("PISACascadeROIHeads")), batch)
    assert ours.keys() - theirs.keys() == {f"loss_carl_stage{i}" for i in range(3)}
    for name, loss in theirs.items():
        torch.testing.assert_close(ours[name], loss, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_registered_under_their_name(name):
    assert ROI_HEADS_REGISTRY.get(name) is getattr(pisa_d2, name)


def test_masks_and_keypoints_are_trained_too():
    from detectron2.structures import BitMasks, Keypoints

    batch = random_batch([3, 2], num_classes=1)
    for sample in batch:
        instances = sample["instances"]
        instances.gt_masks = BitMasks(torch.ones(len(instances), *IMAGE_SIZE, dtype=torch.bool))
        centers = instances.gt_boxes.get_centers()
        visible = torch.full((len(instances), 17, 1), 2.0)
        points = torch.cat([centers[:, None].expand(-1, 17, 2), visible], dim=2)
        instances.gt_keypoints = Keypoints(points)
    opts = ["MODEL.MASK_ON", True, "MODEL.KEYPOINT_ON", True, "MODEL.ROI_HEADS.NUM_CLASSES", 1]
    losses = losses_of(build(*opts), batch)
    assert {"loss_mask", "loss_keypoint", "loss_carl"} <= losses.keys()
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


def test_add_pisa_config_is_asked_for_where_it_was_forgotten():
    from detectron2.config import get_cfg

    cfg = get_cfg()
    with pytest.raises(ValueError, match="add_pisa_config"):
        PISAFastRCNNOutputLayers(cfg, ShapeSpec(channels=4))
    add_pisa_config(cfg)
    PISAFastRCNNOutputLayers(cfg, ShapeSpec(channels=4))
