import subprocess
import sys

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from helpers import noise_image
from PIL import Image

from pisa_d2.data.image_checks import Reading, check_images

TRAIN = Reading(max_size=1333, skips_damaged=True)
TEST = Reading(max_size=1333)
FORMATS = {
    "jpg": {},
    "png": {},
    "gif": {},
    "bmp": {},
    "tiff": {},
    "webp": {},
    "ppm": {},
}


def record(path, size=(64, 48)):
    return {"file_name": str(path), "width": size[0], "height": size[1]}


def check(dicts, reading=TRAIN):
    warnings = []
    return check_images(dicts, "mine", reading, warnings.append), warnings


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "1", "LA"])
def test_what_detectron2_reads_is_accepted(tmp_path, suffix, mode):
    try:
        path = noise_image(tmp_path / f"Bild ä 1 (копия) #%.{suffix}", mode=mode)
    except (OSError, ValueError):
        pytest.skip(f"{suffix} cannot have this mode")
    assert read_image(str(path), "BGR").shape == (48, 64, 3)
    dicts = [record(path)]
    assert check(dicts, TRAIN) == check(dicts, TEST) == (dicts, [])


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_size_is_that_of_the_image_as_detectron2_turns_it(tmp_path, orientation):
    path = noise_image(tmp_path / "a.jpg", orientation=orientation)
    height, width, _ = read_image(str(path), "RGB").shape
    check([record(path, (width, height))])
    with pytest.raises(ValueError, match=rf"is {width} x {height}.*say {height} x {width}"):
        check([record(path, (height, width))])


def test_a_turned_image_whose_stored_size_was_annotated_is_explained(tmp_path):
    path = noise_image(tmp_path / "a.jpg", orientation=6)
    with pytest.raises(ValueError, match=r"rotated by its EXIF tag.*exiftool -Orientation="):
        check([record(path)])


def test_an_image_of_another_size_names_all_that_have_one(tmp_path):
    dicts = [record(noise_image(tmp_path / f"{i}.jpg")) for i in range(9)]
    for i in range(1, 8):
        dicts[i]["width"] = 640
    match = r"'mine': 7 of 9 images differ in size.*1\.jpg' is 64 x 48, .*say 640 x 48.*2 more"
    with pytest.raises(ValueError, match=match):
        check(dicts)


def test_an_image_without_a_size_in_its_annotations_is_fine(tmp_path):
    dicts = [{"file_name": str(noise_image(tmp_path / "a.jpg"))}, {"image": "in memory"}]
    assert check(dicts) == (dicts, [])


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "the last bytes": lambda data: data[:-200],
    "a web page": lambda data: b"<html>not found</html>",
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_images_are_left_out_of_training_and_refused_for_evaluation(
    tmp_path, suffix, damage
):
    paths = [noise_image(tmp_path / f"{i}.{suffix}") for i in range(2)]
    paths[1].write_bytes(DAMAGES[damage](paths[1].read_bytes()))
    dicts = [record(path) for path in paths]
    kept, (warning,) = check(dicts)
    assert kept == dicts[:1]
    assert "1 of 2 images are left out, since they are damaged or of an unknown" in warning
    assert str(paths[1]) in warning
    with pytest.raises(ValueError, match=rf"1 of 2 images are damaged.*'{paths[1]}' \(.+\)"):
        check(dicts, TEST)
    with pytest.raises(ValueError, match=r"'mine': 1 of 1 images are damaged"):
        check(dicts[1:])


def deep(tmp_path, dtype, low, high, suffix="png"):
    values = np.linspace(low, high, 48 * 64).reshape(48, 64).astype(dtype)
    path = tmp_path / f"{np.dtype(dtype).name}_{high}.{suffix}"
    Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize(
    ("dtype", "low", "high", "suffix"),
    [
        (np.uint16, 0, 65535, "png"),
        (np.uint16, 200, 256, "tiff"),
        (np.int32, -1, 200, "tiff"),
        (np.float32, 0, 1, "tiff"),
        (np.float32, 0, 300, "tiff"),
    ],
)
def test_values_beyond_8_bits_are_refused_with_a_line_that_converts_them(
    tmp_path, dtype, low, high, suffix
):
    path = deep(tmp_path, dtype, low, high, suffix)
    with pytest.raises(ValueError, match=f"values from {low} to {high}") as caught:
        check([record(path)])
    line = str(caught.value).split("python -c ")[1].rstrip(".")
    line = line.replace("OLD", str(path)).replace("NEW.png", str(tmp_path / "new.png"))
    subprocess.run(f"{sys.executable} -c {line}", shell=True, check=True)
    converted = np.asarray(Image.open(tmp_path / "new.png"))
    assert converted.dtype == np.uint8 and converted.min() == 0 and converted.max() >= 254
    # A program of other values reads them all.
    assert check([record(path)], Reading(image_format="F"))[1] == []


def test_deep_images_whose_values_fit_8_bits_are_accepted(tmp_path):
    paths = [deep(tmp_path, np.uint16, 0, 255), deep(tmp_path, np.float32, 0, 200, "tiff")]
    dicts = [record(path) for path in paths]
    assert check(dicts, TEST) == (dicts, [])


def test_an_image_beyond_pillows_limit_is_refused(tmp_path, monkeypatch):
    path = noise_image(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 64 // 2 - 1)
    with pytest.raises(ValueError, match=rf"1 of 1 images have more pixels.*'{path}' \(Image size"):
        check([record(path)])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    check([record(path)])


@pytest.mark.parametrize(("width", "fits"), [(2666, True), (2667, False)])
def test_an_image_of_which_resizing_leaves_nothing_is_refused(tmp_path, width, fits):
    from detectron2.data.transforms import ResizeShortestEdge

    path = tmp_path / "thin.png"
    Image.new("RGB", (width, 1)).save(path)
    shape = ResizeShortestEdge.get_output_shape(1, width, 800, TRAIN.max_size)
    assert (min(shape) > 0) == fits
    dicts = [record(path, (width, 1))]
    check(dicts, Reading())  # no resizing
    if fits:
        check(dicts)
    else:
        with pytest.raises(ValueError, match=rf"so thin.*'{path}' \(2667 x 1\)"):
            check(dicts)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sub\\a.jpg", "Write '/' instead of"),
        ("a.JPG", "The folder has 'a.jpg' instead"),
        ("A.jpg", "The folder has 'a.jpg' instead"),
        ("nowhere/a.jpg", "There is no folder '.*nowhere'"),
    ],
)
def test_missing_images_are_named_with_a_hint(tmp_path, name, hint):
    dicts = [record(noise_image(tmp_path / "a.jpg")), record(tmp_path / name)]
    with pytest.raises(FileNotFoundError, match="1 of its 2 images are missing") as caught:
        check(dicts)
    with pytest.raises(FileNotFoundError, match=hint):
        raise caught.value


def test_a_folder_as_an_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match=rf"cannot be opened: .*Is a directory: '{tmp_path}'"):
        check([record(tmp_path)])
