"""Tests of the figure: which pair it shows, and that a shared picture is framed alike."""

import numpy as np
import torch
from PIL import Image

from benchmark import figure
from benchmark.figure import FRAMES, choose_pair, draw_figure


def part(tops, ao, right=None):
    """What one model's measurement hands to the figure: the first picture of each list, AO."""
    ranked = torch.tensor(tops).T[:, :, None]  # (2, P, 1)
    return {"pairs": [{}] * len(ao), "ranked": ranked, "ao": np.array(ao),
            "correct": right or [[i] for i in range(len(ao))]}


def test_the_pair_is_chosen_by_the_rule_that_the_caption_states():
    # The last model finds pairs 0, 1 and 3 by both texts, pair 2 by its query alone.
    last = part([(0, 0), (1, 1), (2, 0), (3, 3)], [0.9, 0.5, 0.9, 0.8])
    first = part([(0, 0), (0, 0), (0, 0), (0, 0)], [0.6, 0.3, 0.0, 0.4])
    index, rule = choose_pair([("old", first), ("new", last)])
    assert index == 3  # leads of 0.3, 0.2 and 0.4; that of pair 2 would be 0.9
    assert rule.startswith("Of 4 pairs the 3 for which new finds the right picture first")
    assert rule.endswith("AO of old is lowest relative to that of new.")
    unnamed = {**last, "correct": [[]] * 4}
    assert choose_pair([("old", first), ("new", {**unnamed})])[0] == 2  # all are candidates
    assert choose_pair([("new", last)]) == (3, "Of 4 pairs the 3 for which new finds the right "
                                            "picture first, by query and by paraphrase; of these "
                                            "the one of median AO.")
    several = {**last, "correct": [[1], [0], [0, 2], [1]]}  # any right picture will do
    assert choose_pair([("old", first), ("new", several)])[0] == 2
    assert choose_pair([("new", part([(0, 0)], [0.5]))]) == (0, "")


def test_a_shared_picture_has_one_colour_in_both_rows_and_the_right_one_a_dot(tmp_path):
    gallery = {f"{i}.png": np.full((40, 30, 3), 40 * i, np.uint8) for i in range(5)}
    rows = {f"{i}.png": i - 1 for i in range(1, 5)}  # the first one could not be read
    text = "naïve 中 \u200b query " * 20
    shown = {"pairs": [{"query": text, "paraphrase": "W" * 900}], "rows": rows, "correct": [[1]],
             "ranked": torch.tensor([[[0, 1, 2]], [[2, 3, 0]]]),
             "ao": np.array([0.25]), "js": np.array([0.5])}
    draw_figure(tmp_path / "x.png", gallery, [("one" * 300, shown), ("\ufffe", shown)], 3)
    pixels = np.array(Image.open(tmp_path / "x.png"))

    def columns(colour):
        value = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
        found = np.argwhere((pixels == value).all(-1))
        step = figure.THUMB + figure.GAP
        start = figure.MARGIN + figure.TEXT_WIDTH - 8
        return {((y - figure.MARGIN) // step, (x - start) // step) for y, x in found.tolist()}

    first, second = columns(FRAMES[0]), columns(FRAMES[1])
    assert {x for _, x in first} == {0, 2} == {x for _, x in second}  # places 1 and 3, 3 and 1
    assert len({y for y, _ in first}) >= 4  # in both rows of both models
    assert not any(columns(colour) for colour in FRAMES[2:])
    assert {x for _, x in columns("#e0a100")} == {1}  # of the query's row
    grey = pixels[:, figure.MARGIN + figure.TEXT_WIDTH + 50]
    assert (grey == 40).all(-1).any() and not (grey == 0).all(-1).any()  # row 0 is picture 1
