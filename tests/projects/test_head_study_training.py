"""A head that is trained alone is trained as in its detector."""

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage
from head_study import training
from head_study.cache import Frozen, Views, collate, plan_cache, write_views
from head_study.detector import build_head, head_config, head_weights, load_detector, with_options
from head_study.training import batches, train_head
from head_study_models import PISA, detector_cfg, register_study_images, small_study
from helpers import HEADS, sampled_by, stock

from pisa_d2.engine.seeding import seeded

SHAPE_OF_IMAGES = [4, 0, 7, 3]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def dataset(tmp_path):
    """Four images; the second has no object."""
    return register_study_images(tmp_path, SHAPE_OF_IMAGES)


def frozen_of(cfg):
    model = load_detector(cfg)
    return model, Frozen(model, cfg)


def same_weights(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("heads", ["PISAROIHeads", "PISARes5ROIHeads"])
def test_on_cached_views_the_detectors_own_head_finds_what_the_detector_finds(
    heads, dataset, tmp_path
):
    cfg = detector_cfg(tmp_path, dataset, *HEADS[heads], "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    model, frozen = frozen_of(cfg)
    base = head_config(cfg, num_steps=4)
    shape, weights = model.backbone.output_shape(), head_weights(model.roi_heads)
    head = build_head(base, base, shape, weights, seed=0, from_detector=True).eval()
    for record in DatasetCatalog.get(dataset):
        (expected,) = model.inference([frozen.mapper(record)], do_postprocess=False)
        view = frozen.view(record, training=False)
        (found,), _ = head(*collate([view], model.device))
        assert len(found) == len(expected) > 10
        for name, value in expected.get_fields().items():
            value, own = (getattr(v, "tensor", v) for v in (value, found.get(name)))
            assert torch.equal(value, own), name


def test_of_a_cascade_the_first_stage_is_studied(dataset, tmp_path):
    weights = ((8.0, 8.0, 4.0, 4.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
    of_stages = ["MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", weights]
    cfg = detector_cfg(tmp_path, dataset, *HEADS["PISACascadeROIHeads"], *of_stages)
    model, _ = frozen_of(cfg)
    base = head_config(cfg, num_steps=4)
    shape, weights = model.backbone.output_shape(), head_weights(model.roi_heads)
    head = build_head(base, base, shape, weights, seed=0, from_detector=True)
    cascade = model.roi_heads
    same_weights(head.box_head.state_dict(), cascade.box_head[0].state_dict(), rtol=0, atol=0)
    first = cascade.box_predictor[0]
    same_weights(head.box_predictor.state_dict(), first.state_dict(), rtol=0, atol=0)
    assert head.box_predictor.box2box_transform.weights == first.box2box_transform.weights
    matcher, of_stage = head.proposal_matcher, cascade.proposal_matchers[0]
    assert (matcher.thresholds, matcher.labels) == (of_stage.thresholds, of_stage.labels)


def train_whole(cfg, frozen, records, num_steps, seed):
    """The detector with frozen backbone and RPN, trained as a whole; its heads' random numbers."""
    model = build_model(cfg)
    model.load_state_dict(torch.load(cfg.MODEL.WEIGHTS)["model"])
    model.backbone.requires_grad_(False)
    model.proposal_generator.requires_grad_(False)
    cfg = head_config(cfg, num_steps)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    model.train()
    device, amp = model.device, cfg.SOLVER.AMP.ENABLED
    scaler = torch.amp.GradScaler(device.type, enabled=amp)
    size = cfg.SOLVER.IMS_PER_BATCH
    steps = zip(range(num_steps), batches(len(records), size, seed), strict=False)
    with EventStorage():
        for step, indices in steps:
            forward = model.roi_heads.forward

            def drawn_by_step(*args, forward=forward, step=step):
                with seeded(seed, 2, step, device=device):
                    return forward(*args)

            model.roi_heads.forward = drawn_by_step
            with torch.autocast(device.type, enabled=amp):
                losses = model([frozen.mapper(records[i]) for i in indices])
            model.roi_heads.forward = forward
            optimizer.zero_grad()
            scaler.scale(sum(losses.values())).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
    return model


# A GPU rounds the feature maps of a batch and of an image so differently that other proposals come
# out: there, a batch is an image.
ON_GPU = ["MODEL.DEVICE", "cuda", "SOLVER.IMS_PER_BATCH", 1]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="cpu"),
        pytest.param(ON_GPU, id="gpu", marks=needs_gpu),
        pytest.param([*ON_GPU, "SOLVER.AMP.ENABLED", True], id="mixed precision", marks=needs_gpu),
    ],
)
@pytest.mark.parametrize("heads", ["PISAROIHeads", "PISARes5ROIHeads"])
def test_its_steps_are_those_of_a_whole_stock_detector_with_frozen_parts(
    heads, options, dataset, tmp_path
):
    cfg = detector_cfg(tmp_path, dataset, *stock(heads), *options)
    model, frozen = frozen_of(cfg)
    records = plan_cache(frozen, cfg, max_gigabytes=1, half=False).train
    assert len(records) == 3  # without the image that has no object
    whole = train_whole(cfg, frozen, records, num_steps=4, seed=5)
    views = write_views(
        frozen, records, tmp_path / "views", training=True, half=False, pooled=False
    )
    base = head_config(cfg, num_steps=4)
    shape, weights = model.backbone.output_shape(), head_weights(model.roi_heads)
    head = build_head(base, base, shape, weights, seed=5, from_detector=True)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    train_head(base, head, views, seed=5)
    moved = [name for name in before if not torch.equal(before[name], head.state_dict()[name])]
    assert "box_predictor.cls_score.weight" in moved
    # A batch and a single image round their feature maps differently.
    same_weights(head.state_dict(), whole.roi_heads.state_dict(), rtol=1e-3, atol=1e-5)


def test_nothing_moves_the_frozen_parts(dataset, tmp_path):
    """Batch norm in the backbone would move its statistics in training."""
    cfg = detector_cfg(tmp_path, dataset, "MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN")
    model, frozen = frozen_of(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    records = DatasetCatalog.get(dataset)
    views = [frozen.view(records[i], training=True) for i in (0, 2)]
    base = head_config(cfg, num_steps=2)
    shape, weights = model.backbone.output_shape(), head_weights(model.roi_heads)
    train_head(base, build_head(base, base, shape, weights, 1, from_detector=True), views, seed=1)
    same_weights(model.state_dict(), before, rtol=0, atol=0)
    assert not model.proposal_generator.training


def test_training_views_have_the_proposals_of_training(dataset, tmp_path):
    cfg = detector_cfg(tmp_path, dataset)
    _, frozen = frozen_of(cfg)
    record = DatasetCatalog.get(dataset)[0]
    views = [frozen.view(record, training) for training in (True, False)]
    assert [len(view.proposals) for view in views] == [
        cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN,
        cfg.MODEL.RPN.POST_NMS_TOPK_TEST,
    ]
    assert len(views[0].targets) == SHAPE_OF_IMAGES[0] and views[1].targets is None


def test_a_seed_gives_all_strategies_one_start_and_one_order_of_images(dataset, tmp_path):
    control = {**PISA, "MODEL.ROI_HEADS.NAME": "ControlROIHeads"}
    hard = sampled_by("HardSampler", "HardSampler")
    options = {
        "random": {},
        "PISA": PISA,
        "OHEM": dict(zip(hard[::2], hard[1::2], strict=True)),
        "control": {**control, "HEAD_STUDY.CONTROL": "permuted_ranks"},
    }
    study = small_study(detector_cfg(tmp_path, dataset), tmp_path, options)
    starts = {name: study.head(name, seed=3).state_dict() for name in options}
    for start in starts.values():
        same_weights(start, starts["random"], rtol=0, atol=0)
    others = study.weights, study.head("random", seed=4).state_dict()
    for other in others:
        name = "box_predictor.cls_score.weight"
        assert not torch.equal(other[name], starts["random"][name])
    orders = [next(batches(50, 20, seed)) for seed in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]


def test_from_the_detectors_weights_every_seed_starts_alike(dataset, tmp_path):
    study = small_study(detector_cfg(tmp_path, dataset), tmp_path, from_detector=True)
    for seed in (1, 2):
        same_weights(study.head("PISA", seed).state_dict(), study.weights, rtol=0, atol=0)


def test_new_weights_of_a_c4_head_keep_its_pretrained_stage(dataset, tmp_path):
    cfg = detector_cfg(tmp_path, dataset, *HEADS["PISARes5ROIHeads"])
    study = small_study(cfg, tmp_path)
    start = study.head("random", seed=1).state_dict()
    kept = {name for name, value in start.items() if torch.equal(value, study.weights[name])}
    assert {name for name in start if name.startswith("res5")} <= kept
    assert "box_predictor.cls_score.weight" not in kept


def test_an_epoch_has_every_image_once():
    steps = batches(10, 4, seed=0)
    drawn = [i for _ in range(5) for i in next(steps)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))


def test_it_returns_the_mean_of_the_weights_after_each_of_the_last_fifth(
    dataset, tmp_path, monkeypatch
):
    study = small_study(detector_cfg(tmp_path, dataset), tmp_path, steps=10)
    head = study.head("random", seed=1)
    after = []

    def recording(cfg, optimizer):
        scheduler = build_lr_scheduler(cfg, optimizer)
        step = scheduler.step

        def record():
            after.append({name: value.clone() for name, value in head.state_dict().items()})
            step()

        scheduler.step = record
        return scheduler

    monkeypatch.setattr(training, "build_lr_scheduler", recording)
    averaged = train_head(study.base, head, study.views("train"), seed=1)
    assert len(after) == 10
    mean = {name: (after[8][name] + after[9][name]) / 2 for name in after[0]}
    same_weights(averaged.state_dict(), mean)
    assert not torch.equal(after[8]["box_head.fc1.weight"], after[9]["box_head.fc1.weight"])


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(dataset, tmp_path):
    study = small_study(detector_cfg(tmp_path, dataset), tmp_path)
    cfg = with_options(study.base, {"SOLVER.BASE_LR": 1e30, "SOLVER.CLIP_GRADIENTS.ENABLED": False})
    with pytest.raises(FloatingPointError, match=r"not finite in step [123].*loss_cls"):
        train_head(cfg, study.head("random", seed=1), study.views("train"), seed=1)


def test_images_of_different_sizes_are_padded_after_the_backbone(dataset, tmp_path):
    cfg = detector_cfg(tmp_path, dataset)
    _, frozen = frozen_of(cfg)
    large = frozen.view(DatasetCatalog.get(dataset)[0], training=True)
    small = large._replace(features={n: m[:, :2, :3] for n, m in large.features.items()})
    batch = collate([small, large], torch.device("cpu"))
    for name, m in large.features.items():
        assert torch.equal(batch.features[name][1], m)
        assert torch.equal(batch.features[name][0, :, :2, :3], m[:, :2, :3])
        assert (batch.features[name][0, :, 2:] == 0).all()


def test_views_are_written_once_and_read_in_order(dataset, tmp_path):
    cfg = detector_cfg(tmp_path, dataset)
    _, frozen = frozen_of(cfg)
    records = DatasetCatalog.get(dataset)
    write_views(frozen, records[:2], tmp_path / "views", training=False, half=False, pooled=False)
    first = tmp_path / "views/000000.pt"
    time = first.stat().st_mtime_ns
    views = write_views(
        frozen, records, tmp_path / "views", training=False, half=True, pooled=False
    )
    assert first.stat().st_mtime_ns == time
    assert [view.image_id for view in views] == [record["image_id"] for record in records]
    assert len(Views(tmp_path / "views")) == 4
    full = frozen.view(records[3], training=False).features["p2"]
    assert views[3].features["p2"].dtype == torch.float32
    assert not torch.equal(views[3].features["p2"], full)
    torch.testing.assert_close(views[3].features["p2"], full, rtol=1e-3, atol=1e-3)
