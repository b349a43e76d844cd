import json
import shutil

import pytest
from detectron2.data import MetadataCatalog
from detectron2.engine import default_argument_parser
from helpers import (
    ROOT,
    THIN_RESNET,
    load_cfg,
    load_script,
    locked_by_another_process,
    read_metrics,
    run_training,
)

from pisa_d2.data import make_digits, register_digits
from pisa_d2.engine.run_folder import occupied
from pisa_d2.train_net import main

DIGITS = ROOT / "configs/Digits/pisa_faster_rcnn_R_18_FPN.yaml"
SMALL = [
    *("MODEL.DEVICE", "cpu", "SEED", "1", *map(str, THIN_RESNET)),
    *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),  # so that a few steps are enough to detect
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "2", "TEST.EXPECTED_RESULTS", "[]"),
]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    make_digits(root, num_train=12, num_val=4)
    return root


def train_net(datasets, output, *words):
    words = (*words, *SMALL)
    return run_training(ROOT / "train_net.py", DIGITS, datasets, output, *words)


@pytest.mark.slow
def test_a_run_trains_evaluates_resumes_and_is_evaluated_again(datasets, tmp_path):
    output = tmp_path / "run"
    train_net(datasets, output, "SOLVER.MAX_ITER", "20")
    metrics = read_metrics(output)
    steps = next(line for line in metrics if line.get("iteration") == 19)
    assert {"loss_cls", "loss_box_reg", "loss_carl", "pisa/positive_iou"} <= steps.keys()
    # Equal except for rounding if each object has one positive.
    assert steps["pisa/positive_iou_weighted"] > steps["pisa/positive_iou"] - 1e-5
    evaluation = next(line for line in metrics if "bbox/AP" in line)
    assert 0 <= evaluation["bbox/AP50"] <= 100
    assert list(output.glob("events.out.tfevents.*"))
    assert (output / "inference" / "coco_instances_results.json").is_file()

    args = default_argument_parser().parse_args(["--config-file", str(DIGITS)])
    args.opts = ["OUTPUT_DIR", str(output)]
    with pytest.raises(ValueError, match=f"OUTPUT_DIR = '{output}' has checkpoints of another"):
        main(args)
    words = ["--resume", "SOLVER.MAX_ITER", "25", "SOLVER.BASE_LR", "9.0"]
    printed = train_net(datasets, output, *words)
    assert "Starting training from iteration 20" in printed
    assert "SOLVER.MAX_ITER: 25, before 20" in printed
    assert "SOLVER.BASE_LR: 0.04, not 9.0" in printed
    assert max(line["iteration"] for line in read_metrics(output)) == 25
    config = (output / "config.yaml").read_text()
    assert "BASE_LR: 0.04" in config and "MAX_ITER: 25" in config

    log = (output / "log.txt").read_text()
    with occupied(str(output)):  # by a running training
        printed = train_net(datasets, output, "--eval-only", "--resume", "SOLVER.MAX_ITER", "7")
    assert (output / "config.yaml").read_text() == config
    assert (output / "log.txt").read_text() == log
    assert "MAX_ITER: 7" in (output / "inference" / "config.yaml").read_text()
    last = [line for line in read_metrics(output) if "bbox/AP" in line][-1]
    scores = [last[f"bbox/{name}"] for name in ("AP", "AP50", "AP75")]
    assert "copypaste: " + ",".join(f"{score:.4f}" for score in scores) in printed


def test_a_second_training_in_a_folder_is_refused_before_anything_is_written(tmp_path):
    args = default_argument_parser().parse_args(["--config-file", str(DIGITS)])
    args.opts = ["OUTPUT_DIR", str(tmp_path)]
    with (
        locked_by_another_process(tmp_path),
        pytest.raises(RuntimeError, match="Another training is running in OUTPUT_DIR"),
    ):
        main(args)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.fixture
def bad_datasets(datasets, tmp_path):
    """Copy the datasets, to spoil them; return the folder and the training annotations."""
    root = tmp_path / "datasets"
    shutil.copytree(datasets, root)
    path = root / "digits" / "annotations" / "instances_train.json"
    return root, path, json.loads(path.read_text())


@pytest.mark.slow
def test_bad_data_are_named_and_left_out_while_training_goes_on(bad_datasets, tmp_path):
    root, path, content = bad_datasets
    boxes = content["annotations"]
    of_image_3 = [box for box in boxes if box["image_id"] == 3]
    for box in of_image_3:
        box["iscrowd"] = 1
    others = [box for box in boxes if box["image_id"] != 3]
    spoilt = [[5, 5, 0, 9], [5, 5, -20, 9], [9000, 5, 9, 9], [float("nan"), 5, 9, 9]]
    for box, value in zip(others, spoilt, strict=False):
        box["bbox"] = value
    path.write_text(json.dumps(content))  # with NaN, as Python writes and reads it
    damaged = root / "digits" / "train" / "000005.jpg"
    damaged.write_bytes(damaged.read_bytes()[:2000])

    printed = train_net(root, tmp_path / "run", "SOLVER.MAX_ITER", "8", "TEST.EVAL_PERIOD", "0")
    assert "'digits_train': dropped 4 of" in printed
    for box, fault in zip(spoilt, ("no area", "negative", "outside", "not finite"), strict=True):
        assert f"{box} of" in printed and fault in printed
    assert "1 image(s) have only crowd boxes" in printed and "000003.jpg" in printed
    assert f"images are left out, since they are damaged or of an unknown format: '{damaged}'" in (
        printed
    )
    assert (tmp_path / "run" / "model_final.pth").is_file()


def test_a_dataset_that_cannot_be_evaluated_names_the_types_that_can():
    MetadataCatalog.get("of_unknown_type").set(evaluator_type="unheard_of")
    trainer = load_script("train_net.py").Trainer
    cfg = load_cfg("BCCD/faster_rcnn_R_18_FPN.yaml")
    with pytest.raises(NotImplementedError, match="'unheard_of'.*'coco'.*'lvis'"):
        trainer.build_evaluator(cfg, "of_unknown_type")


def _spoil_train_size(root, content):
    content["images"][3]["width"] += 1


def _spoil_train_category(root, content):
    content["annotations"][3]["category_id"] = 99


def _spoil_all_train_images(root, content):
    for image in (root / "digits" / "train").iterdir():
        image.write_bytes(image.read_bytes()[:500])


def _spoil_val_image(root, content):
    image = root / "digits" / "val" / "000002.jpg"
    image.write_bytes(image.read_bytes()[:500])


def _drop_val_image(root, content):
    (root / "digits" / "val" / "000002.jpg").unlink()


@pytest.mark.parametrize(
    ("spoil", "opts", "message"),
    [
        (_spoil_train_size, [], "'digits_train': 1 of 12 images differ in size"),
        (_spoil_train_category, [], r"annotations\[3\] .*category_id = 99"),
        (_spoil_all_train_images, [], "'digits_train': 12 of 12 images are damaged"),
        (_spoil_val_image, [], "'digits_val': 1 of 4 images are damaged"),
        (_drop_val_image, [], "'digits_val': 1 of its 4 images are missing: .*000002.jpg"),
        (None, ["MODEL.MASK_ON", "True"], "none of .* objects have a mask"),
        (None, ["MODEL.ROI_HEADS.NUM_CLASSES", "80"], "Set the key to 10"),
        (None, ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "1"], "room for a positive sample"),
    ],
)
def test_what_would_fail_or_falsify_a_run_ends_it_before_the_first_step(
    bad_datasets, tmp_path, monkeypatch, spoil, opts, message
):
    root, path, content = bad_datasets
    if spoil is not None:
        spoil(root, content)
        path.write_text(json.dumps(content))
    config = str(ROOT / "configs/Digits/pisa_faster_rcnn_R_18_FPN.yaml")
    output = tmp_path / "run"
    words = [*SMALL, *opts, "OUTPUT_DIR", str(output)]
    args = default_argument_parser().parse_args(["--config-file", config, *words])
    register_digits(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(args)
    assert not list(output.glob("metrics.json")) and not list(output.glob("*.pth"))
