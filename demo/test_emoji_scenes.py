"""Tests of the emoji scenes: names, drawings, and the set as it is written."""

import json
import errno
import os
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from demo import emoji_scenes
from demo.emoji_scenes import CONTRAST, MARGIN, SCENE_SIZE, draw_scene

EMOJI = emoji_scenes.emoji_names()
SECOND_NAMES = {emoji.name: emoji.second_name for emoji in EMOJI if emoji.second_name}
NAMES = {emoji.name for emoji in EMOJI}


@pytest.fixture(scope="session")
def glyphs():
    return emoji_scenes.draw_glyphs([emoji.char for emoji in EMOJI])


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Captions and pairs of a quarter of the set; its images are blank."""
    root = tmp_path_factory.mktemp("emoji")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji_scenes, "draw_glyphs", lambda chars: chars)
        patch.setattr(emoji_scenes, "draw_scene", lambda *args: Image.new("RGB", (1, 1)))
        emoji_scenes.write_emoji(root, train=3_000, gallery=1_000)
    return root


def captions_in(folder: Path) -> dict[str, str]:
    """{key: caption} of a folder of shards."""
    captions = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if name.endswith(".txt"):
                    captions[name[:-4]] = tar.extractfile(name).read().decode()
    return captions


def names_in(caption: str, names=NAMES) -> list[str]:
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


def pairs_in(folder: Path, *kinds: str) -> list[dict]:
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    return [pair for pair in pairs if pair["kind"] in (kinds or emoji_scenes.KINDS)]


# ---- names and pairs -----------------------------------------------------------------------------
def test_training_captions_hold_no_second_name(scenes):
    text = "\n".join(captions_in(scenes / "train").values())
    assert len(set(SECOND_NAMES.values())) == len(SECOND_NAMES) == 210
    # Whole words, any letter case, any punctuation between words, singular or plural.
    for second_name in SECOND_NAMES.values():
        words = [re.escape(re.sub("s$", "", word)) for word in re.findall(r"\w+", second_name)]
        pattern = r"[\W_]+".join(f"{word}s?" for word in words)
        assert not re.search(rf"\b{pattern}\b", text, re.IGNORECASE), second_name


@pytest.mark.parametrize("text, other, shares", [
    ("slice of pizza", "pizza", True),
    ("racehorse", "horse", True),
    ("chart decreasing", "decreased value", True),
    ("face of an imp", "angry face", False),
    ("stop sign", "octagonal sign", False)])
def test_longer_names_are_told_from_synonyms(text, other, shares):
    assert emoji_scenes.share_a_word(text, other) == shares
    assert emoji_scenes.share_a_word(other, text) == shares


@pytest.mark.parametrize("split", ["val", "test"])
def test_queries_are_captions_and_synonyms_first(scenes, split):
    captions, pairs = captions_in(scenes / split), pairs_in(scenes / split)
    assert all(pair["query"] == captions[pair["image"]] for pair in pairs)
    kinds = [pair["kind"] for pair in pairs]
    assert list(dict.fromkeys(kinds)) == ["synonym", "longer name", "order", "template"]
    assert kinds == sorted(kinds, key=emoji_scenes.KINDS.index)


@pytest.mark.parametrize("kind", ["synonym", "longer name"])
def test_second_names_replace_names(scenes, kind):
    pairs = pairs_in(scenes / "test", kind)
    assert len(pairs) > 50
    for pair in pairs:
        names = names_in(pair["query"])
        second_names = names_in(pair["paraphrase"], set(SECOND_NAMES.values()))
        assert second_names == [SECOND_NAMES[name] for name in names]
        words = set(re.findall("[a-z]{3,}", " ".join(names))) - emoji_scenes.STOP_WORDS
        # A longer name may share an inflection only; a synonym shares nothing.
        if kind == "synonym":
            assert not words & set(re.findall("[a-z]{3,}", " ".join(second_names)))


def test_order_pairs_turn_the_relation(scenes):
    turned = {" to the left of ": " to the right of ", " to the right of ": " to the left of ",
              " above ": " below ", " below ": " above "}
    for pair in pairs_in(scenes / "test", "order"):
        relation, = [relation for relation in turned if relation in pair["query"]]
        assert turned[relation] in pair["paraphrase"]
        assert names_in(pair["paraphrase"]) == names_in(pair["query"])[::-1]


def test_template_pairs_are_no_training_captions(scenes):
    training = set(captions_in(scenes / "train").values())
    for pair in pairs_in(scenes / "test", "template"):
        assert pair["paraphrase"] not in training
        assert sorted(names_in(pair["paraphrase"])) == sorted(names_in(pair["query"]))


def without_names(caption: str, names: list[str]) -> str:
    for name in sorted(names, key=len, reverse=True):
        caption = caption.replace(name, "#", 1)
    return re.sub(r"\ban? #", "#", caption)


def test_changed_meanings_come_last_and_change_it(scenes):
    turned = {"left": "right", "right": "left", "above": "below", "below": "above"}
    lines = [json.loads(line) for line in (scenes / "test/pairs.jsonl").read_text().splitlines()]
    changed = [pair for pair in lines if not pair.get("same", True)]
    assert [pair["kind"] for pair in changed] == 500 * ["side swapped"] + 1000 * ["name replaced"]
    assert lines[-len(changed):] == changed and lines[0]["kind"] == "synonym"
    captions = captions_in(scenes / "test")
    for pair in changed:
        query, other = pair["query"], pair["paraphrase"]
        assert captions[pair["image"]] == query
        names, other_names = names_in(query), names_in(other)
        if pair["kind"] == "side swapped":
            differing = [words for words in zip(query.split(), other.split(), strict=True)
                         if words[0] != words[1]]
            assert other_names == names and len(differing) == 1
            assert turned[differing[0][0]] == differing[0][1]
        else:
            new, = set(other_names) - set(names)
            assert sum(a != b for a, b in zip(names, other_names, strict=True)) == 1
            said = [*names, *[SECOND_NAMES[name] for name in names if name in SECOND_NAMES]]
            assert not any(emoji_scenes.share_a_word(new, name) for name in said)
            # Nothing else differs than that name and its article.
            assert without_names(query, names) == without_names(other, other_names)


def test_labels_name_the_single_emoji(scenes):
    zeroshot = json.loads((scenes / "test/zeroshot.json").read_text())
    expected = {}
    for key, caption in captions_in(scenes / "test").items():
        if len(names_in(caption)) == 1:
            expected[key], = names_in(caption)
    labels = zeroshot["labels"].items()
    assert {key: zeroshot["classnames"][label] for key, label in labels} == expected
    # Every second name is asked for.
    assert set(expected.values()) >= SECOND_NAMES.keys()


def test_no_two_emoji_meet_twice(scenes):
    meetings = []
    for split in ("train", "val", "test"):
        for caption in captions_in(scenes / split).values():
            if len(names_in(caption)) == 2:
                meetings.append(frozenset(names_in(caption)))
    assert len(meetings) == len(set(meetings)) == 1200 + 500 + 500


# ---- drawings ------------------------------------------------------------------------------------
def test_glyphs_are_unlike_each_other(glyphs):
    grey = Image.new("RGBA", (12, 12), "grey")
    thumbnails = []
    for image, _ in glyphs:
        small = image.resize((12, 12)).convert("RGBA")
        thumbnail = Image.alpha_composite(grey, small).convert("RGB")
        thumbnails.append(np.array(thumbnail, np.float32).flatten())
    pixels = torch.from_numpy(np.array(thumbnails))
    distances = torch.cdist(pixels, pixels, p=1) / (3 * 12 * 12)
    distances.fill_diagonal_(255)
    closest = divmod(int(distances.argmin()), len(EMOJI))
    assert distances.min() > 1.5, [EMOJI[i].name for i in closest]


HALF = SCENE_SIZE // 2


@pytest.mark.parametrize("layout, cells", [
    ("single", [np.s_[:]]),
    ("row", [np.s_[:, :HALF], np.s_[:, HALF:]]),
    ("column", [np.s_[:HALF], np.s_[HALF:]])])
def test_scenes_show_every_glyph_within_margins(glyphs, layout, cells):
    rng = random.Random(0)
    for glyph in glyphs[::5]:
        drawn = [glyph, rng.choice(glyphs)][:len(cells)]
        scene = np.asarray(draw_scene(drawn, layout, rng)).astype(int)
        from_background = np.abs(scene - scene[0, 0]).max(-1)
        # A pale drawing on a pale background fails here.
        for cell in cells:
            distinct = (from_background[cell] > CONTRAST).sum()
            assert distinct > max(30, 0.35 * (from_background[cell] > 8).sum())
        from_background[MARGIN:-MARGIN, MARGIN:-MARGIN] = 0
        assert not from_background.any()


# ---- the set as it is written --------------------------------------------------------------------
WRITE_SMALL_SET = """
import sys
from pathlib import Path
from demo import emoji_scenes
names = emoji_scenes.emoji_names()[:100]
emoji_scenes.emoji_names = lambda: names
emoji_scenes.write_emoji(Path(sys.argv[1]), train=60, gallery=40)
"""


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def test_same_bytes_in_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji_scenes, "emoji_names", lambda: EMOJI[:100])
    emoji_scenes.write_emoji(tmp_path / "here", train=60, gallery=40)
    # With another hash seed, sets iterate in another order.
    subprocess.run([sys.executable, "-c", WRITE_SMALL_SET, tmp_path / "there"], check=True,
                   cwd=Path(data.__file__).parent, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert files_below(tmp_path / "here") == files_below(tmp_path / "there")
    assert len(files_below(tmp_path / "here")) == 7


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the set will lie; it is drawn in no time."""
    def write_emoji(root):
        (root / "train").mkdir(parents=True)

    monkeypatch.setenv("PARACLIP_DATA", str(tmp_path))
    monkeypatch.setattr(emoji_scenes, "write_emoji", write_emoji)
    return tmp_path / "emoji"


def test_after_a_kill_it_is_drawn_anew(folder):
    (folder.parent / ".emoji.paraclip-tmp/train").mkdir(parents=True)
    assert emoji_scenes.emoji_folder() == folder
    assert (folder / "train").is_dir()


def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch):
    def write_a_part(root):
        (root / "train").mkdir(parents=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(emoji_scenes, "write_emoji", write_a_part)
    with pytest.raises(data.UserError, match="cannot write the emoji set.*No space left"):
        emoji_scenes.emoji_folder()
    assert [path.name for path in folder.parent.iterdir()] == ["emoji.lock"]


def test_a_complete_set_is_only_read(folder, monkeypatch):
    emoji_scenes.emoji_folder()
    # It may lie where nothing can be written, not even a lock.
    monkeypatch.setattr(emoji_scenes, "FileLock", lambda path: pytest.fail("locked"))
    assert emoji_scenes.emoji_folder() == folder


@pytest.mark.parametrize("version", [None, "1"])
def test_an_older_set_is_drawn_anew(folder, version):
    (folder / "train").mkdir(parents=True)
    (folder / "train/00000.tar").write_text("old")
    # Left behind by a kill between two renamings.
    (folder.parent / ".emoji.paraclip-old/train").mkdir(parents=True)
    if version:
        (folder / "version.txt").write_text(version)
    assert emoji_scenes.emoji_folder() == folder
    assert not (folder / "train/00000.tar").exists()
    assert (folder / "version.txt").read_text() == emoji_scenes.VERSION
    assert {path.name for path in folder.parent.iterdir()} == {"emoji", "emoji.lock"}


def test_somebodys_folder_is_left_alone(folder):
    (folder / "mine").mkdir(parents=True)
    with pytest.raises(data.UserError, match="emoji holds other files.*PARACLIP_DATA"):
        emoji_scenes.emoji_folder()
    assert [path.name for path in folder.iterdir()] == ["mine"]
