"""Training images with some of their labels hidden, and images with regions to ignore."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from head_study import cache, training
from head_study.cache import Frozen, View
from head_study.detector import load_detector
from head_study.hidden import HiddenLabels, check_hidden, hide
from head_study_models import detector_cfg, head_study_node, register_study_images, small_study
from helpers import load_script

from pisa_d2.regions import TargetsWithRegions

hide_labels = load_script("projects/HeadStudy/hide_labels.py")

REGIONS = {
    "MODEL.IGNORED_REGIONS.ENABLED": True,
    "HEAD_STUDY.HIDDEN_LABELS": 0.5,
    "HEAD_STUDY.HIDDEN_AS": "regions",
}


@pytest.fixture
def dataset(tmp_path):
    return register_study_images(tmp_path, [4, 7])


def objects(num):
    boxes = torch.arange(4.0 * num).view(num, 4)
    return Instances((50, 60), gt_boxes=Boxes(boxes), gt_classes=torch.arange(num))


@pytest.mark.parametrize("as_regions", [False, True])
@pytest.mark.parametrize(
    ("share", "num_hidden"), [(0.0, 0), (0.4, 2), (0.5, 2), (0.6, 3), (1.0, 5)]
)
def test_a_share_of_the_labels_becomes_background_or_regions(share, num_hidden, as_regions):
    targets = objects(5)
    kept = hide(targets, share, as_regions, seed=3)
    assert len(kept) == 5 - num_hidden and kept.image_size == (50, 60)
    classes = kept.gt_classes.tolist()
    assert classes == sorted(classes)
    assert torch.equal(kept.gt_boxes.tensor, targets.gt_boxes.tensor[classes])
    assert isinstance(kept, TargetsWithRegions) == as_regions
    if as_regions:
        hidden = {tuple(box) for box in kept.ignored_regions.tensor.tolist()}
        others = set(range(5)) - set(classes)
        assert hidden == {tuple(targets.gt_boxes.tensor[i].tolist()) for i in others}


def test_a_seed_hides_the_same_labels_either_way_and_every_time():
    views = [View({}, None, objects(9), i, 50, 60) for i in range(3)]

    def kept(hidden_as, seed):
        cfg = objects_cfg(HIDDEN_LABELS=0.4, HIDDEN_AS=hidden_as)
        return [v.targets.gt_classes.tolist() for v in HiddenLabels(views, cfg, seed)]

    first = kept("background", seed=1)
    assert first == kept("regions", seed=1) == kept("background", seed=1)
    assert first != kept("background", seed=2) and first[0] != first[1]


def objects_cfg(**values):
    cfg = head_study_node(**values)
    return type(cfg)({"HEAD_STUDY": cfg, "MODEL": {"IGNORED_REGIONS": {"ENABLED": False}}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"HIDDEN_LABELS": 1.5}, r"HEAD_STUDY.HIDDEN_LABELS = 1.5 must be between 0 and 1"),
        ({"HIDDEN_AS": "objects"}, r"HEAD_STUDY.HIDDEN_AS = 'objects' must be"),
        ({"HIDDEN_AS": "regions"}, r"needs MODEL.IGNORED_REGIONS.ENABLED True"),
    ],
)
def test_wrong_keys_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        check_hidden(objects_cfg(**values))


def test_heads_train_on_what_is_not_hidden(dataset, tmp_path, monkeypatch):
    hidden = {"HEAD_STUDY.HIDDEN_LABELS": 0.5}
    options = {"all": {}, "background": hidden, "regions": REGIONS}
    study = small_study(detector_cfg(tmp_path, dataset), tmp_path, options, steps=1)
    seen = []

    def run_head(head, views, device):
        seen.append([view.targets for view in views])
        return cache.run_head(head, views, device)

    monkeypatch.setattr(training, "run_head", run_head)
    for name in options:
        training.train_head(study.config(name), study.head(name, 1), study.views("train"), 1)
    # 2 of 4 and, as halves are rounded to even, 4 of 7 are hidden.
    numbers = [sorted(map(len, targets)) for targets in seen]
    assert numbers == [[4, 7], [2, 3], [2, 3]]
    assert sorted(len(t.ignored_regions) for t in seen[2]) == [2, 4]


def test_the_regions_of_a_dataset_reach_the_head(dataset, tmp_path):
    records = DatasetCatalog.get(dataset)
    for record in records:
        record["annotations"][0]["iscrowd"] = 1
    of_dataset = {}
    for on in (False, True):
        cfg = detector_cfg(tmp_path, dataset, "MODEL.IGNORED_REGIONS.ENABLED", on)
        frozen = Frozen(load_detector(cfg), cfg)
        targets = [frozen.view(record, training=True).targets for record in records]
        of_dataset[on] = [len(getattr(t, "ignored_regions", [])) for t in targets]
        assert [len(t) for t in targets] == [3, 6]
    assert of_dataset == {False: [0, 0], True: [1, 1]}


def test_a_dataset_is_written_without_some_labels_and_with_these_as_regions(
    dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["", dataset, "--seed", "3", "--output", str(tmp_path / "out")])
    hide_labels.main()
    removed, regions = (
        json.loads((tmp_path / f"out/{dataset}_{kind}_3.json").read_text())
        for kind in ("removed", "regions")
    )
    records = DatasetCatalog.get(dataset)
    numbers = [len(r["annotations"]) for r in records]
    for content, expected in ((removed, [n - round(0.4 * n) for n in numbers]), (regions, numbers)):
        of_images = Counter(a["image_id"] for a in content["annotations"])
        assert [of_images[record["image_id"]] for record in records] == expected
        assert {Path(i["file_name"]).name for i in content["images"]} == {
            Path(r["file_name"]).name for r in records
        }
    hidden = {a["id"] for a in regions["annotations"] if a["ignore"]}
    assert {a["id"] for a in removed["annotations"]} == {
        a["id"] for a in regions["annotations"]
    } - hidden
    assert (
        hide_labels.hidden_ids(regions, 0.4, 3) == hidden != hide_labels.hidden_ids(regions, 0.4, 4)
    )
