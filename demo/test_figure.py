"""Tests of the figures: which pair is drawn, what is marked, how high the bars are."""

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageFont

from demo import figure


def record(ao=0.5, query=("0", "1", "2"), paraphrase=("2", "3", "0"), images=("1",), text="a dog"):
    """A pair as --details writes it."""
    return {"query": text, "paraphrase": "a hound", "ao": ao, "images": list(images),
            "query_ranking": list(query), "paraphrase_ranking": list(paraphrase)}


GALLERY = {str(i): np.full((40, 30, 3), 50 * i, np.uint8) for i in range(4)}


def test_the_pair_of_median_gain():
    first = [record(ao) for ao in (0.1, 0.2, 0.55)]
    last = [record(ao) for ao in (0.9, 0.3, 0.6)]  # gains of 0.8, 0.1, 0.05
    assert figure.choose_pair({"old": first, "new": last})[0] == 1


def test_a_single_models_median_pair():
    assert figure.choose_pair({"new": [record(0.9), record(0.1), record(0.5)]})[0] == 2


def test_a_pair_needs_a_correct_image():
    records = [record(0.9, images=["3"]), record(0.1, images=["7"]), record(0.8, images=[]),
               record(0.95, images=["1"])]
    index, rule = figure.choose_pair({"new": records})
    assert index == 3 and "2 of 4 pairs with a correct image" in rule


def test_correct_images_count_where_drawn():
    far = record(query=["0"] * 5 + ["1"], paraphrase=["0"] * 5 + ["1"], images=["1"])
    assert "correct image" not in figure.choose_pair({"new": [far, far]})[1]


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


def test_images_in_both_rows_are_framed(tmp_path):
    figure.draw_pair(tmp_path / "x.png", GALLERY, {"new": [record()]}, 10)
    # Images 0 and 2 are in both: columns 0 and 2 of both rows.
    assert columns_of(tmp_path / "x.png", figure.FRAME) == {0, 2}


def test_correct_images_are_checked(tmp_path):
    figure.draw_pair(tmp_path / "x.png", GALLERY, {"new": [record(images=["1", "3"])]}, 10)
    assert columns_of(tmp_path / "x.png", figure.CHECK) == {1}


def test_odd_texts_are_drawn(tmp_path):
    details = {"naïve 中 \u200b query " * 20: [record(text="W" * 900)],
               "\ufffe": [record(text=" ")]}
    figure.draw_pair(tmp_path / "x.png", GALLERY, details, 3)
    assert Image.open(tmp_path / "x.png").width == figure.WIDTH


def test_an_unreadable_image_stays_blank(tmp_path):
    gallery = GALLERY | {"0": tmp_path / "nowhere.png"}
    figure.draw_pair(tmp_path / "x.png", gallery, {"new": [record()]}, 10)
    assert columns_of(tmp_path / "x.png", figure.FRAME) == {0, 2}


def test_lines_fit_their_width():
    font = ImageFont.load_default(size=20)
    lines = figure.wrap("a hound and " + "W" * 300 + " end", font, 200, 9)
    assert max(font.getlength(line) for line in lines) <= 200 and lines[-1].endswith("end")


def report(ao1: float, random=0.0) -> dict:
    part = {"ao1": ao1, "ao1_ci": [ao1, ao1], "ao1_random": random}
    part |= {"ao": ao1, "ao_ci": [ao1, ao1], "ao_random": random}
    return {"k": 10, "gallery": 9, "kinds": {"synonym": part}}


@pytest.mark.parametrize("value", [0.25, 0.75])
def test_bars_are_as_high_as_values(tmp_path, value):
    figure.draw_summary(tmp_path / "x.png", {"old": report(value, 0.1), "new": report(value, 0.1)})
    rows = pixels_of(tmp_path / "x.png", figure.BARS[1])[:, 0]
    rows = rows[rows < 480]  # without the legend
    floor = pixels_of(tmp_path / "x.png", figure.FLOOR)[:, 0]
    floor = floor[floor < 482]
    assert floor.max() - rows.min() == pytest.approx(330 * value, abs=3)
    assert floor.max() - floor.min() == pytest.approx(33, abs=2)


def test_corners_are_transparent(tmp_path):
    figure.draw_summary(tmp_path / "x.png", {"new": report(0.5)})
    image = Image.open(tmp_path / "x.png")
    assert image.getpixel((0, 0))[3] == 0 and image.getpixel((99, 99))[3] == 255
