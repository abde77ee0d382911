"""Tests of the figure: which pairs are drawn, and what is marked."""

import numpy as np
from PIL import Image, ImageColor, ImageFont

from demo import figure


def record(ao=0.5, query=("0", "1", "2"), paraphrase=("2", "3", "0"), images=("1",), text="a dog",
           kind="", same=True):
    """A pair as --details writes it."""
    return {"query": text, "paraphrase": "a hound", "ao": ao, "images": list(images),
            "kind": kind, "same": same,
            "query_ranking": list(query), "paraphrase_ranking": list(paraphrase)}


IMAGES = {str(i): np.full((40, 30, 3), 50 * i, np.uint8) for i in range(4)}


def draw(path, details: dict, images=IMAGES):
    def open_image(pixels):
        if pixels is None:
            raise OSError("no such file")
        return Image.fromarray(pixels)
    figure.draw_pairs(path, images, 4, details, 10, open_image)


def chosen(details: dict) -> list[int]:
    return figure.choose_pairs(details)[0]


def test_a_good_the_median_and_a_bad_pair():
    gains = np.random.default_rng(0).permutation(21) / 100
    first = [record(0.2)] * 21
    last = [record(0.2 + gain) for gain in gains]
    # Behind two of 21, in the middle, before two.
    expected = [int(np.flatnonzero(gains == gain)[0]) for gain in (0.18, 0.1, 0.02)]
    assert chosen({"old": first, "new": last}) == expected
    assert chosen({"new": last}) == expected
    # With fewer than three there is no such choice.
    assert chosen({"new": [record(0.9), record(0.1)]}) == [0]


def test_pairs_have_a_correct_image_where_drawn():
    far = record(query=["0"] * 5 + ["1"], paraphrase=["0"] * 5 + ["1"], images=["1"])
    records = [far, record(0.1), record(0.2), far, record(0.3, images=["7"]), record(0.4)]
    found, rule = figure.choose_pairs({"new": records})
    assert found == [5, 2, 1] and "3 pairs with a correct image" in rule
    assert figure.choose_pairs({"new": [far] * 4})[1].endswith("of 4 pairs.")


def test_pairs_keep_the_meaning_and_are_of_the_first_kind():
    records = [record(0.1, same=False), record(0.2), record(0.3, kind="other"), record(0.4),
               record(0.5)]
    assert chosen({"new": records}) == [4, 3, 1]


def pixels_of(path, color: str) -> np.ndarray:
    """(N, 2) rows and columns of the pixels of a color."""
    image = np.array(Image.open(path).convert("RGB"))
    return np.argwhere((image == ImageColor.getrgb(color)).all(-1))


def columns_of(path, color: str) -> set[int]:
    """The columns of thumbnails in which a color occurs, above the legend."""
    pixels = pixels_of(path, color)
    pixels = pixels[pixels[:, 0] < 470]
    left = figure.MARGIN + figure.TEXT_WIDTH - 8
    return set(((pixels[:, 1] - left) // (figure.THUMB + figure.GAP)).tolist())


def test_marks_and_corners(tmp_path):
    # Images 0 and 2 are in both rows; image 0 cannot be read.
    draw(tmp_path / "x.png", {"new": [record(images=["1", "3"])]}, IMAGES | {"0": None})
    assert columns_of(tmp_path / "x.png", figure.FRAME) == {0, 2}
    assert columns_of(tmp_path / "x.png", figure.CHECK) == {1}
    image = Image.open(tmp_path / "x.png")
    assert image.getpixel((0, 0))[3] == 0 and image.getpixel((99, 99))[3] == 255


def test_odd_texts_are_drawn(tmp_path):
    details = {"naïve 中 \u200b query " * 20: [record(text="W" * 900)],
               "\ufffe": [record(text=" ")]}
    draw(tmp_path / "x.png", details)
    assert Image.open(tmp_path / "x.png").width == figure.WIDTH


def test_lines_fit_their_width():
    font = ImageFont.load_default(size=20)
    lines = figure.wrap("a hound and " + "W" * 300 + " end", font, 200, 9)
    assert max(font.getlength(line) for line in lines) <= 200 and lines[-1].endswith("end")


