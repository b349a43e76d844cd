import numpy as np
import pytest
from detectron2.data import DatasetMapper, build_detection_train_loader
from helpers import small_cfg
from PIL import Image

from pisa_d2.data import ReadableOnly

DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "no image": lambda data: b"<html>not found</html>",
    "empty": lambda data: b"",
}


def write_images(folder, suffix, damage=None):
    """Write five images, the third of them damaged."""
    noise = np.random.default_rng(0).integers(256, size=(5, 64, 64, 3), dtype=np.uint8)
    dicts = []
    for i, pixels in enumerate(noise):
        path = folder / f"{i}.{suffix}"
        Image.fromarray(pixels).save(path)
        if i == 2 and damage is not None:
            path.write_bytes(damage(path.read_bytes()))
        dicts.append({"file_name": str(path), "width": 64, "height": 64, "annotations": []})
    return dicts


def mapper(skip):
    return ReadableOnly(DatasetMapper(small_cfg(), is_train=True), skip)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_training_goes_on_without_a_damaged_image_and_names_it(tmp_path, caplog, suffix, damage):
    dicts = write_images(tmp_path, suffix, DAMAGES[damage])
    loader = iter(
        build_detection_train_loader(
            dicts, mapper=mapper(skip=True), total_batch_size=5, aspect_ratio_grouping=False
        )
    )
    drawn = [sample["file_name"] for _ in range(4) for sample in next(loader)]
    assert set(drawn) == {record["file_name"] for i, record in enumerate(dicts) if i != 2}
    assert f"Left out '{dicts[2]['file_name']}', which is damaged (" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_evaluation_stops_at_a_damaged_image_and_names_it(tmp_path, damage):
    dicts = write_images(tmp_path, "jpg", DAMAGES[damage])
    with pytest.raises(
        OSError, match=rf"'{dicts[2]['file_name']}' is damaged \(.*copy or download it again"
    ):
        mapper(skip=False)(dicts[2])


def test_a_file_that_cannot_be_opened_is_an_error_in_training_too(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg"):
        mapper(skip=True)({"file_name": str(tmp_path / "nowhere.jpg")})


def test_good_images_are_mapped_as_by_the_mapper_alone(tmp_path, caplog):
    record = write_images(tmp_path, "png")[0]
    assert mapper(skip=True)(record)["image"].shape[0] == 3
    assert not caplog.messages


def test_any_other_error_names_the_image(tmp_path):
    record = write_images(tmp_path, "png")[0]
    record["annotations"] = [{"bbox": [1, 2], "bbox_mode": 0, "category_id": 0}]
    match = rf"'{record['file_name']}' cannot be turned into an input of the model: \w+Error"
    with pytest.raises(RuntimeError, match=match):
        mapper(skip=True)(record)
