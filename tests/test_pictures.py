import pytest

from pisa_d2.pictures import picture_names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ([], []),
        (["d/a/1.jpg", "d/b/2.jpg"], ["1", "2"]),
        (["d/a/1.jpg", "d/b/1.jpg", "d/2.jpg"], ["a_1.jpg", "b_1.jpg", "2"]),
        (["/d/1.jpg", "/d/1.png"], ["1.jpg", "1.png"]),
        (["1.jpg", "a/1.jpg"], ["1.jpg", "a_1.jpg"]),
        (["a/b_1.jpg", "a_b/1.jpg", "c/1.jpg", "c/b_1.jpg"], None),
        (["a/1.jpg", "a/1.jpg"], ["1.jpg", "1.jpg_2"]),
    ],
)
def test_images_of_equal_stem_have_pictures_of_their_own(paths, names):
    found = picture_names(paths)
    assert len(set(found)) == len(paths) and not any("/" in name for name in found)
    assert names is None or found == names
