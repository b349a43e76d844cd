import json
import multiprocessing
import os
import time

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from helpers import noise_image
from PIL import Image, ImageFile, UnidentifiedImageError

from pisa_d2.data import image_headers
from pisa_d2.data.image_headers import read_header, read_headers


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_image_as_detectron2_turns_it(tmp_path, suffix, orientation):
    path = noise_image(tmp_path / f"a.{suffix}", orientation=orientation)
    height, width, _ = read_image(str(path), "RGB").shape
    header = read_header(str(path))
    assert (header.width, header.height) == (width, height)
    assert header.turned == (orientation > 4)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "LA"])
def test_images_of_8_bits_have_the_range_of_8_bits(tmp_path, mode):
    header = read_header(str(noise_image(tmp_path / "a.png", mode=mode)))
    assert header == (64, 48, False, mode, 0, 255)


@pytest.mark.parametrize(
    ("dtype", "suffix", "mode"),
    [(np.uint16, "png", "I;16"), (np.int32, "tiff", "I"), (np.float32, "tiff", "F")],
)
def test_images_of_more_bits_have_the_range_of_their_values(tmp_path, dtype, suffix, mode):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.array([[7, 300, 12], [40, 5, 1000]], dtype=dtype)).save(path)
    assert read_header(str(path)) == (3, 2, False, mode, 5, 1000)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp"])
def test_only_images_with_an_incomplete_end_are_decoded(tmp_path, monkeypatch, suffix):
    path = noise_image(tmp_path / f"a.{suffix}")
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
        header = read_header(str(path))
    assert header[:2] == (64, 48)
    path.write_bytes(path.read_bytes() + bytes(100))  # looks incomplete, but is not
    assert read_header(str(path)) == header
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises((OSError, SyntaxError)):
        read_header(str(path))


def test_errors_are_outcomes_of_their_images(tmp_path):
    paths = {"good": noise_image(tmp_path / "a.jpg"), "text": tmp_path / "b.jpg"}
    paths |= {"missing": tmp_path / "c.jpg", "folder": tmp_path}
    paths["text"].write_text("not an image")
    outcomes = read_headers([str(path) for path in paths.values()], "mine")
    found = {name: outcomes[str(path)] for name, path in paths.items()}
    assert found["good"] == read_header(str(paths["good"]))
    assert isinstance(found["text"], UnidentifiedImageError)
    assert isinstance(found["missing"], FileNotFoundError)
    assert isinstance(found["folder"], IsADirectoryError)


@pytest.fixture
def reads(monkeypatch, tmp_path):
    """Record the files whose headers are read, starting with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read = []

    def counted(path):
        read.append(path)
        return read_header(path)

    monkeypatch.setattr(image_headers, "read_header", counted)
    return read


def test_unchanged_images_are_read_once_and_others_again(reads, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    paths = [str(noise_image(folder / f"{i}.jpg")) for i in range(4)]
    first = read_headers(paths, "mine")
    assert sorted(reads) == paths
    assert read_headers(paths, "mine") == first and len(reads) == 4
    Image.new("RGB", (10, 10)).save(paths[1])  # a different size
    os.utime(paths[2], ns=(0, 0))  # a different time
    headers = read_headers(paths, "mine")
    assert sorted(reads[4:]) == paths[1:3]
    assert headers[paths[1]][:2] == (10, 10)
    assert sorted(p.name for p in folder.iterdir()) == [f"{i}.jpg" for i in range(4)]


def test_bad_images_are_not_remembered(reads, tmp_path):
    path = noise_image(tmp_path / "a.jpg")
    good = path.read_bytes()
    path.write_bytes(good[:500])
    for _ in range(2):
        assert isinstance(read_headers([str(path)], "mine")[str(path)], OSError)
    assert len(reads) == 2


def test_datasets_of_one_folder_do_not_forget_each_other(reads, tmp_path):
    paths = [str(noise_image(tmp_path / f"{i}.jpg")) for i in range(4)]
    for part in (paths[:2], paths[2:], paths[:2], paths):
        read_headers(part, "mine")
    assert sorted(reads) == paths


def test_a_damaged_cache_or_one_that_cannot_be_written_costs_only_time(reads, tmp_path):
    path = str(noise_image(tmp_path / "a.jpg"))
    read_headers([path], "mine")
    (cache,) = image_headers.cache_folder().glob("*.json")
    for content in ("", "[1]", '{"version": 0}', '{"version": 1}'):
        cache.write_text(content)
        assert read_headers([path], "mine")[path][:2] == (64, 48)
    assert len(reads) == 5
    (tmp_path / "file").touch()
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "file")
    assert read_headers([path], "mine")[path][:2] == (64, 48)
    assert len(reads) == 6


def test_a_cache_of_another_version_is_not_read(reads, tmp_path):
    path = str(noise_image(tmp_path / "a.jpg"))
    read_headers([path], "mine")
    (cache,) = image_headers.cache_folder().glob("*.json")
    content = json.loads(cache.read_text())
    cache.write_text(json.dumps({**content, "version": content["version"] - 1}))
    read_headers([path], "mine")
    assert reads == [path, path]


def test_processes_share_the_work(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = [str(noise_image(tmp_path / f"{i}.jpg")) for i in range(3)]
    log = tmp_path / "log"

    def slow(path):
        with log.open("a") as file:
            file.write(f"{path}\n")
        time.sleep(0.3)
        return read_header(path)

    monkeypatch.setattr(image_headers, "read_header", slow)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read_headers, args=(paths, "mine")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    assert sorted(log.read_text().split()) == paths


def test_what_was_read_is_remembered_when_it_is_interrupted(reads, tmp_path, monkeypatch):
    paths = [str(noise_image(tmp_path / f"{i:03}.jpg")) for i in range(64)]

    def interrupted(outcomes, *args, **kwargs):
        for _ in range(40):
            yield next(outcomes)
        raise KeyboardInterrupt  # as Python does in the main thread

    with monkeypatch.context() as patch:
        patch.setattr(image_headers, "tqdm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            read_headers(paths, "mine")
    (cache,) = image_headers.cache_folder().glob("*.json")
    assert sorted(json.loads(cache.read_text())["images"]) == paths[:40]
