"""Tests of photos.py on a small copy of the data set's layout, and of its rules for names."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import data
import eval_paraphrase
from benchmark import photos, read_benchmark

# WordNet's lemmas of a few classes; what is asked for stands first in each second list.
WORDS = {
    "n1": ("cougar, puma, painter, mountain lion, Felis concolor", ["puma", "mountain lion"]),
    "n2": ("bow tie, bow-tie, bowtie", []),
    "n3": ("lawn mower, mower", []),
    "n4": ("thatch, thatched roof", []),
    "n5": ("American lobster, Northern lobster, Homarus americanus", ["Northern lobster"]),
    "n6": ("hog, pig, grunter", []),
    "n7": ("guinea pig, Cavia cobaya", []),
    "n8": ("police van, wagon, paddy wagon", ["paddy wagon"]),
    "n9": ("barrel, cask, wagon", ["cask"])}
NUMBERS = list(range(8))  # validation photographs of a class
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """All photographs of a class are one grey: 10 x class in training, one more in validation."""
    root, lines = tmp_path_factory.mktemp("tiny-imagenet-200"), []
    (root / "val" / "images").mkdir(parents=True)
    for i, wnid in enumerate(WORDS):
        (root / "train" / wnid / "images").mkdir(parents=True)
        for number in range(12):
            grey = Image.new("L", (64, 64), 10 * i)
            grey.save(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG")
        for number in NUMBERS:
            name = f"val_{number * len(WORDS) + i}.JPEG"  # classes take turns
            Image.new("L", (64, 64), 10 * i + 1).save(root / "val" / "images" / name)
            lines.append(f"{name}\t{wnid}\t0\t0\t62\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines))
    (root / "wnids.txt").write_text("\n".join(reversed(WORDS)))
    other = "n0\tunused, never asked for\n"
    (root / "words.txt").write_text(other + "\n".join(f"{k}\t{v[0]}" for k, v in WORDS.items()))
    return root


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "photos"
    photos.main([str(source), "--out", str(out)])
    return out


def greys(folder: Path) -> dict[str, int]:
    return {key: int(np.median(np.asarray(data.open_picture(item))))
            for key, item in data.list_pictures(folder).items()}


def test_second_names_follow_the_rules():
    found = photos.second_names({wnid: text.split(", ") for wnid, (text, _) in WORDS.items()})
    asked = {wnid: [name for name, reason in names.items() if not reason]
             for wnid, names in found.items()}
    assert asked == {wnid: names for wnid, (_, names) in WORDS.items()}
    assert found["n1"]["painter"].startswith("taken for")
    assert found["n1"]["Felis concolor"] == "scientific"
    assert found["n2"]["bowtie"].startswith("much like")
    assert found["n6"]["pig"] == "in a training caption"  # of guinea pigs
    assert found["n8"]["wagon"] == found["n9"]["wagon"] == "a name of two classes"


def test_no_second_name_and_no_asked_wording_stands_in_a_training_caption(written):
    index = data.ShardIndex(str(written / "train"))
    captions = {" ".join(photos.words_of(index.caption(i))) for i in range(len(index))}
    pairs = read_benchmark(written, "val")[1]
    for name in (name for _, names in WORDS.values() for name in names):
        assert any(pair["paraphrase"].endswith(name) for pair in pairs)
        assert not any(photos.contains(caption, name) for caption in captions)
    for pair in pairs:
        words = " ".join(photos.words_of(pair["paraphrase"]))
        assert pair["kind"] == "synonym" or words not in captions


def test_captions_name_their_own_picture_and_galleries_are_apart(source, written):
    index = data.ShardIndex(str(written / "train"))
    first = {10 * i: text.split(", ")[0] for i, (text, _) in enumerate(WORDS.values())}
    seen, order = Counter(), []
    for i in range(len(index)):
        grey = int(data.decode_image(index.image(i)).median())
        assert first[grey] in index.caption(i)
        seen[grey] += 1
        order.append(grey)
    assert set(seen.values()) == {12} and order != sorted(order)
    for split in ("val", "test"):
        gallery, pairs, names, labels = read_benchmark(written, split)
        found = greys(written / split)
        assert len(gallery) == len(WORDS) * len(NUMBERS) / 2
        assert all(names[labels[key]] == first[grey - 1] for key, grey in found.items())
        for pair in pairs:  # all photographs of the class and no others
            grey, = {found[key] for key in pair["images"]}
            assert len(pair["images"]) == len(NUMBERS) / 2 and first[grey - 1] in pair["query"]
    # By number: classes took turns, so the first half of the numbers is the validation gallery
    photographs = photos.read_photographs(source, list(WORDS))
    numbers = {split: {int(file.stem[4:]) for file, _ in photographs[split]}
               for split in ("val", "test")}
    half = len(WORDS) * len(NUMBERS) // 2
    assert numbers == {"val": set(range(half)), "test": set(range(half, 2 * half))}


def test_the_same_bytes_each_time_and_nothing_is_overwritten(source, written, tmp_path):
    photos.main([str(source), "--out", str(tmp_path / "again")])
    for path in sorted(written.rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(written)).read_bytes()
    with pytest.raises(data.UserError, match="there already"):
        photos.main([str(source), "--out", str(written)])
    with pytest.raises(data.UserError, match="words.txt.*zip"):
        photos.main([str(tmp_path), "--out", str(tmp_path / "other")])


def test_evaluation_counts_every_photograph_of_the_class_as_right(written, monkeypatch, capsys):
    """A model that sees the grey and knows the first lemmas finds all of a class."""
    classes = [text.split(", ")[0] for text, _ in WORDS.values()]

    class Model:
        def preprocess(self, picture):
            return torch.tensor(np.asarray(picture))[:1, :1, 0]

        def encode_image(self, images):
            return F.one_hot(images.flatten().long() // 10, len(classes)).float()

        def encode_text(self, texts):
            own = [next((i for i, name in enumerate(classes) if name in text), 0) for text in texts]
            return F.one_hot(torch.tensor(own), len(classes)).float()

    monkeypatch.setattr(eval_paraphrase, "load_model", lambda *args: Model())
    (written.parent / "model.pt").touch()
    eval_paraphrase.main([str(written.parent / "model.pt"), "--benchmark", str(written),
                          "--workers", "0", "--k", "4"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])[0]
    assert report["recall"]["t2i@1"] == 1 and report["zeroshot"]["top1"] == 1
    assert report["precision"]["t2i@10"] == len(NUMBERS) / 2 / 10
    assert report["kinds"]["template"]["ao"] == 1 and report["ao"] < 1
    assert report["gallery"] == len(WORDS) * len(NUMBERS) / 2
    assert report["pairs"] == sum(len(names) for _, names in WORDS.values())
