import shutil
from pathlib import Path

import pisa_d2  # noqa: F401  # isort: skip  (before Detectron2, which it patches)

import pytest
from PIL import Image

from pisa_d2.data.voc import load_voc, voc_classes

Object = tuple[str, list[int], str]
CUP: Object = ("cup", [11, 6, 40, 30], "")
BALL: Object = ("ball", [1, 1, 64, 48], "")


def xml(objects: list[Object], name: str = "", size: tuple[int, int] = (64, 48)) -> str:
    text = f"<annotation><filename>{name}</filename>"
    if size:
        text += f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    for class_, box, rest in objects:
        sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        corners = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
        text += f"<object><name>{class_}</name><bndbox>{corners}</bndbox>{rest}</object>"
    return f"{text}</annotation>"


def make(annotations: Path, images: Path, image: str = "1.jpg", text: str = "") -> None:
    """Write an annotation and its image of 64x48."""
    for file in (images / image, annotations / image):
        file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48)).save(images / image)
    (annotations / image).with_suffix(".xml").write_text(text or xml([CUP], name=image))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make three images in Pascal VOC's own layout, in "train" (2 and 1) and "val" (3)."""
    folder = tmp_path / "my data"
    for i, objects in enumerate(([CUP], [CUP, BALL], []), start=1):
        text = xml(objects)
        make(folder / "Annotations", folder / "JPEGImages", f"{i}.jpg", text)
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2\n1\n\n")
    (lists / "val.txt").write_text("3")
    return folder


def test_a_folder_is_all_of_its_annotations(folder: Path):
    first, second, third = load_voc(folder)
    assert [r["image_id"] for r in (first, second, third)] == ["1", "2", "3"]
    assert first["file_name"] == str(folder / "JPEGImages" / "1.jpg")
    assert (first["width"], first["height"]) == (64, 48)
    cup, ball = second["annotations"]
    assert (cup["bbox"], cup["category_id"]) == ([10, 5, 40, 30], 1)
    assert (ball["bbox"], ball["category_id"]) == ([0, 0, 64, 48], 0)
    assert third["annotations"] == []


def test_a_list_chooses_images_but_not_classes(folder: Path):
    lists = folder / "ImageSets" / "Main"
    assert [r["image_id"] for r in load_voc(lists / "train.txt")] == ["2", "1"]
    assert [r["image_id"] for r in load_voc(lists / "val.txt")] == ["3"]
    for path in (folder, lists / "train.txt", lists / "val.txt"):
        assert voc_classes(path) == ["ball", "cup"]


def test_lists_of_one_class_and_names_with_blanks_are_read(folder: Path):
    make(folder / "Annotations", folder / "JPEGImages", "a b.jpg")
    path = folder / "ImageSets" / "Main" / "cup_train.txt"
    path.write_text("1  1\n2 -1\na b\n")
    assert [r["image_id"] for r in load_voc(path)] == ["1", "2", "a b"]


@pytest.mark.parametrize(
    ("annotations", "images", "image"),
    [
        ("Annotations", "JPEGImages", "1.png"),
        ("Annotations", "JPEGImages", "1.JPEG"),
        ("Annotations", "JPEGImages", "photos/1.jpg"),
        ("annotations", "images", "1.jpg"),
        ("annots", "images", "1.webp"),
        (".", ".", "1_jpg.rf.0a1b.jpg"),
        ("Annotations", "Annotations", "1.jpg"),
        ("Annotations", ".", "1.jpg"),
    ],
)
def test_layouts_of_various_tools_and_any_suffix(
    tmp_path: Path, annotations: str, images: str, image: str
):
    make(tmp_path / annotations, tmp_path / images, image)
    (record,) = load_voc(tmp_path)
    assert Path(record["file_name"]) == tmp_path / images / image
    assert record["image_id"] == str(Path(image).with_suffix(""))


def test_masks_of_the_same_name_elsewhere_do_not_confuse(folder: Path):
    (folder / "SegmentationClass").mkdir()
    shutil.copy(folder / "JPEGImages" / "1.jpg", folder / "SegmentationClass" / "1.png")
    assert load_voc(folder)[0]["file_name"] == str(folder / "JPEGImages" / "1.jpg")


def test_of_several_images_the_annotation_chooses(folder: Path):
    images = folder / "JPEGImages"
    (images / "1.jpg").rename(images / "1.png")
    shutil.copy(images / "1.png", images / "1.webp")
    with pytest.raises(ValueError, match=r"1\.xml.*several images belong to it.*1\.png.*1\.webp"):
        load_voc(folder)
    (folder / "Annotations" / "1.xml").write_text(xml([CUP], name="C:\\old\\1.png"))
    assert load_voc(folder)[0]["file_name"] == str(images / "1.png")


def test_an_image_of_another_name_is_found_by_what_the_annotation_says(folder: Path):
    images = folder / "JPEGImages"
    (images / "1.jpg").rename(images / "one.jpg")
    (folder / "Annotations" / "1.xml").write_text(xml([CUP], name="one.jpg"))
    assert load_voc(folder)[0]["file_name"] == str(images / "one.jpg")


def test_difficult_objects_are_marked(folder: Path):
    marked = (*CUP[:2], "<difficult>1</difficult>")
    plain = (*CUP[:2], "<difficult>0</difficult>")
    (folder / "Annotations" / "1.xml").write_text(xml([marked, plain, CUP]))
    annotations = load_voc(folder)[0]["annotations"]
    assert [a.get("ignore", 0) for a in annotations] == [1, 0, 0]


@pytest.mark.parametrize("size", [(), (0, 0)])
def test_a_missing_size_is_read_from_the_image(folder: Path, size: tuple[int, int]):
    (folder / "Annotations" / "1.xml").write_text(xml([CUP], size=size))
    record = load_voc(folder)[0]
    assert (record["width"], record["height"]) == (64, 48)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no element found"),
        ("<annotation><size>", "no element found"),
        ("<html></html>", "root is <html>"),
        (xml([("dog", [1, 1, 2, 2], "")]), "'dog' is not one of cup"),
        (xml([CUP]).replace("<xmin>11</xmin>", ""), "'cup' has no bndbox/xmin"),
        (xml([CUP]).replace("11", "left"), "bndbox/xmin is 'left', not a number"),
    ],
)
def test_a_wrong_annotation_is_named_with_the_reason(folder: Path, text: str, reason: str):
    file = folder / "Annotations" / "1.xml"
    file.write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        load_voc(folder, ["cup", "ball"])
    assert str(file) in str(caught.value)


def test_torn_annotations_are_named_when_classes_are_collected(folder: Path):
    file = folder / "Annotations" / "1.xml"
    file.write_text("<annotation>")
    with pytest.raises(ValueError, match=str(file)):
        voc_classes(folder)


def test_what_is_not_there_is_named(folder: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no folder and no list of images '.*nowhere'"):
        load_voc(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no xml files.*Annotations/\*\.xml"):
        load_voc(folder / "JPEGImages")
    path = folder / "ImageSets" / "Main" / "val.txt"
    path.write_text("9")
    with pytest.raises(FileNotFoundError, match=r"val\.txt' lists '9', but '.*9\.xml' is missing"):
        load_voc(path)
    with pytest.raises(ValueError, match="neither the folder of a dataset.*nor a file"):
        load_voc(folder / "Annotations" / "1.xml")
