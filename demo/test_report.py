"""Tests of the page: what stands on it, that texts stay texts, and what a browser makes of it."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from demo import report
from demo.test_figure import record

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
MARKUP = '<b>bold</b> "quoted" & </script><i>x</i>'
IMAGES = {str(i): np.full((300, 200, 3), 50 * i, np.uint8) for i in range(4)}


def write(path, details: dict, most_pairs=200, images=IMAGES, k=3) -> str:
    def open_image(pixels):
        if pixels is None:
            raise OSError("no such file")
        return Image.fromarray(pixels)
    reports = [{"ao": 0.5, "ao_ci": [0.4, 0.6], "ao_random": 0.1, "kinds": {MARKUP: {"ao": 0.25}}}
               for _ in details]
    table = ["a line"], [("all pairs", [("AO@3", ["50.0 "] * len(details))])]
    report.write_report(path, list(details), table, reports, images, details, k,
                        open_image, most_pairs)
    return path.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """[(tag, attributes)] and the text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag) -> list[dict]:
        return [attributes for name, attributes in self.found if name == tag]


def test_images_in_both_lists_and_correct_ones_are_marked(tmp_path):
    page = Elements(write(tmp_path / "x.html", {"new": [record(images=["1", "3"])]}))
    # The query finds 0, 1, 2, the paraphrase 2, 3, 0.
    assert [item["class"] for item in page.all("li")] == ["both", "right", "both",
                                                          "both", "right", "both"]
    alts = [img["alt"] for img in page.all("img")]
    assert alts[0] == "1: 0, number 3 of the paraphrase"
    assert alts[4] == "2: 3, “a dog”, correct"


def test_only_the_first_k_ranks_count(tmp_path):
    page = Elements(write(tmp_path / "x.html", {"new": [record()]}, k=2))
    # Of 0, 1 and 2, 3 nothing is in both, although details hold longer lists.
    assert [item["class"] for item in page.all("li")] == ["", "right", "", ""]
    assert "0 of 2 images in both lists" in page.text


def test_thumbnails_are_small_and_stand_once(tmp_path):
    page = write(tmp_path / "x.html", {"a": [record()] * 9, "b": [record()] * 9})
    thumbs = json.loads(re.search(r"THUMBS = (\[.*?\]);", page)[1])
    assert len(thumbs) == len(set(thumbs)) == 4 and all(page.count(thumb) == 1 for thumb in thumbs)
    assert max(map(len, thumbs)) < 3000


def test_the_page_names_nothing_outside_itself(tmp_path):
    page = write(tmp_path / "x.html", {"new": [record()]})
    assert "://" not in page and "url(" not in page
    found = Elements(page).found
    assert not [tag for tag, attributes in found if {"src", "href"} & set(attributes)]


def test_texts_are_data(tmp_path):
    images = {MARKUP: IMAGES["0"], "\udcff": IMAGES["1"]}
    details = {MARKUP: [record(text=MARKUP, kind=MARKUP, query=list(images), paraphrase=[MARKUP],
                               images=[MARKUP])]}
    page = Elements(write(tmp_path / "x.html", details, images=images))
    # The page's own: a model's AO and the legend; two bars; its script.
    assert [len(page.all(tag)) for tag in ("b", "i", "script")] == [2, 2, 1]
    assert page.all("img")[0]["alt"].startswith(f"1: {MARKUP}")
    assert page.all("article")[0]["data-kind"] == MARKUP
    # As text: in the bars, the headings of pair and model, the kind and its choice.
    assert page.text.count(MARKUP) >= 5


def test_bars_show_contrast_recall_and_what_should_be_low():
    results = {"ao": 0.6, "ao_changed": 0.3, "changed": {"opposite": {"ao": 0.25}},
               "contrast": 0.8, "contrast_ci": [0.7, 0.9],
               "recall": {"t2i@10": 0.4}, "recall_ci": {"t2i@10": [0.35, 0.45]}}
    page = Elements(report.bars_html({"model": results}, k=10))
    bars = [bar["style"] for bar in page.all("i")]
    assert bars == [f"width:{width}.0%" for width in (25, 60, 30, 80, 40)]
    assert [body["class"] for body in page.all("tbody")] == ["lower", "", "lower", "", ""]
    # Chance, which only contrast has here.
    assert [mark["style"] for mark in page.all("s")] == ["left:50.0%"]
    assert page.all("u")[-1]["style"] == "left:35.0%;width:10.0%"
    lists = {name: value for name, value in results.items() if "recall" not in name}
    two = report.bars_html({"lists": lists, "model": results}, k=10)
    assert two.count(">lists<") == 4 and two.count(">model<") == 5


def test_only_the_query_of_another_meaning_has_correct_images():
    for same, ticks in ((True, 2), (False, 1)):
        pair = record(query=["0"], paraphrase=["0"], images=["0"], same=same)
        page = report.pair_html({"model": pair}, 3, {"0": 0}, {})
        assert page.count(", correct") == ticks
        assert ("text of another meaning" in page) == (not same)


def test_pairs_are_chosen_evenly_and_the_rest_is_counted(tmp_path):
    scores = np.random.default_rng(0).permutation(101) / 100
    records = [record(score) for score in scores]
    assert [scores[i] for i in report.choose_pairs({"new": records}, 5)] == [0, .25, .5, .75, 1]
    # Of each kind as large a share as it has.
    records = [record(0.1, kind="x")] * 90 + [record(0.2, kind="y")] * 10
    chosen = report.choose_pairs({"new": records}, 20)
    assert sum(records[i]["kind"] == "y" for i in chosen) == 2
    assert "20 of 100 pairs are shown" in write(tmp_path / "x.html", {"new": records}, 20)
    assert "80 are left out (--report-pairs" in write(tmp_path / "x.html", {"new": records}, 20)
    assert "All 100 pairs" in write(tmp_path / "x.html", {"new": records}, 100)


def test_a_page_that_would_be_too_large_has_fewer_pairs(tmp_path, monkeypatch):
    records = [record(text="word " * 1000)] * 64
    monkeypatch.setattr(report, "MAX_BYTES", 10**5)
    page = write(tmp_path / "x.html", {"new": records})
    assert len(page) < 10**5 and "would exceed 0 MB" in page
    monkeypatch.setattr(report, "MAX_BYTES", 1)
    assert "1 of 64 pairs" in write(tmp_path / "x.html", {"new": records})


def test_pairs_that_change_the_meaning_are_marked_and_are_bad_if_they_agree(tmp_path):
    details = {"new": [record(0.9, same=False), record(0.3), record(0.05, same=False)]}
    page = Elements(write(tmp_path / "x.html", details))
    articles = page.all("article")
    # 1 - 0.9 comes first, then 0.3, then 1 - 0.05.
    assert [json.loads(a["data-scores"]) for a in articles] == [[0.1], [0.3], [0.95]]
    assert [a["class"] for a in articles] == ["changed", "", "changed"]
    assert page.text.count("pairs, meaning changed: the lists should differ") == 2


def test_an_unreadable_image_shows_its_name(tmp_path):
    page = write(tmp_path / "x.html", {"new": [record()]}, images=IMAGES | {"0": None})
    assert json.loads(re.search(r"THUMBS = (\[.*?\]);", page)[1])[0] == ""
    assert Elements(page).all("img")[0]["alt"].startswith("1: 0")


def browse(path, script: str, *flags) -> list:
    """What a script returns in the page in a real browser, once its images are there."""
    page = path.read_text(encoding="utf-8")
    path.write_text(page.replace("</body>", "<pre id='result'></pre><script>onload = () => {"
                    "document.getElementById('result').textContent = JSON.stringify((() => "
                    f"{{{script}}})())}}</script></body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
               f"--user-data-dir={path.parent / 'profile'}", *flags, path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    return json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', dom, re.S)[1]))


in_browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium, chromium-browser or "
                                "google-chrome on PATH to open the page with")


@in_browser
def test_a_browser_sorts_and_filters(tmp_path):
    path = tmp_path / "x.html"
    old = [record(0.1, text="one dog", kind="x"), record(0.2, text="Two dogs", kind="y"),
           record(0.3, text=MARKUP, kind=MARKUP)]
    new = [old[0] | {"ao": 0.9}, old[1] | {"ao": 0.1}, old[2] | {"ao": 0.5}]
    write(path, {"old": old, "new": new})
    results = browse(path, """
        const results = [];
        const look = (changes) => {
          Object.entries({by: "0", order: "worst", kind: "", words: "", ...changes}).forEach(
            ([name, value]) => { document.forms[0][name].value = value; });
          document.forms[0].dispatchEvent(new Event("input"));
          results.push([...document.querySelectorAll("article:not([hidden]) h3 bdi:first-of-type")]
            .map(e => e.textContent).filter(text => text !== "a hound"));
        };
        [{}, {by: "1"}, {by: "1,0"}, {order: "best"}, {kind: "y"}, {kind: %s}, {words: "DOG hound"},
         {words: "dog nothing"}, {words: "<b>bold"}].forEach(look);
        results.push(document.getElementById("count").textContent);
        return results""" % json.dumps(MARKUP).replace("</", "<\\/"))
    one, two, markup = "one dog", "Two dogs", MARKUP
    assert results == [
        [one, two, markup], [two, markup, one], [two, markup, one], [markup, two, one], [two],
        [markup], [one, two], [], [markup], "1 of 3 pairs"]


@in_browser
def test_a_browser_shows_images_and_nothing_is_wider_than_a_phone(tmp_path):
    path = tmp_path / "x.html"
    write(path, {"m" * 90: [record(text="W" * 300, kind="k" * 80)] * 2, "new": [record()] * 2})
    # A window is at least 500 pixels wide, a frame is not.
    frame = tmp_path / "frame.html"
    frame.write_text("<body><iframe id='f' src='x.html' width='400'></iframe></body>")
    found = browse(frame, """
        const page = document.getElementById("f").contentDocument;
        const images = [...page.images];
        return [page.documentElement.scrollWidth, images.length,
                Math.min(...images.map(image => image.naturalWidth))];
        """, "--allow-file-access-from-files")
    assert found[0] <= 400 and found[1] == 24 and found[2] > 50
