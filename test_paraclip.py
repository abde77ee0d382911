"""Tests of paraclip in the order of its files: data, model, training, evaluation. CPU only, no hub.

Each compares with something independent: numbers worked by hand, a library's model with the same
weights, a slow twin, one process against several, an uninterrupted run against a killed one.
`pytest` also runs the tests below benchmark/. FUZZ_SEED and FUZZ_CASES give other damage.
"""

import contextlib
import io
import json
import math
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
from argparse import Namespace
from collections import Counter
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import pytest
import torch
import transformers
from filelock import FileLock
from PIL import Image
from torch.nn import functional as F

import data
import eval_paraphrase as ev
import paraclip
from data import BadSample, ShardIndex, UserError
from paraclip import Config, ParaCLIP, ViT, contrastive_loss, load_model

HERE = Path(__file__).parent
FUZZ_SEED = int(os.environ.get("FUZZ_SEED", 0))
FUZZ_CASES = int(os.environ.get("FUZZ_CASES", 40))
WORDS = "a red blue green circle square dog cat on the left of right above below small big ."
WORDS = WORDS.split()
TINY = dict(image_size=16, patch_size=8, width=32, depth=2, heads=2, embed_dim=16, batch_size=16,
            precision="fp32", warmup=2, steps=4, workers=0, save_every=100)
pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding and encoding"),
              pytest.mark.filterwarnings("ignore:This DataLoader will create")]


# ---- helpers -------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("PARACLIP_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def lm(tmp_path_factory) -> str:
    """Folder of a tiny BERT with random weights and a word tokenizer."""
    folder = tmp_path_factory.mktemp("lm")
    words = [*WORDS, "[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, pad_token_id=words.index("[PAD]"))
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def saved(image: Image.Image, kind="PNG", **options) -> bytes:
    image.save(out := io.BytesIO(), kind, **options)
    return out.getvalue()


def picture(seed: int, size=(20, 18), kind="JPEG", mode="RGB", **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (3, 3, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    return saved(image.convert(mode), kind, **options)


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def write_pictures(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(0))
    return str(folder)


def sentence(seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 9))) + f" {seed}"


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(i: int) -> list[tuple[str, bytes]]:
    return [(f"{i:05d}.jpg", picture(i)), (f"{i:05d}.txt", sentence(i).encode())]


def junk(i: int) -> list[tuple[str, bytes]]:
    return [(f"{i:05d}.jpg", b"junk"), (f"{i:05d}.txt", b"junk")]


def shards(folder: Path, counts: list[int]) -> str:
    """Shards of these many samples; sample i has picture(i) and a caption that ends in i."""
    first = 0
    for number, count in enumerate(counts):
        members = [member for i in range(first, first + count) for member in sample(i)]
        write_tar(folder / f"{number:05d}.tar", members)
        first += count
    return str(folder)


def damage(content: bytes, rng: random.Random) -> bytes:
    """The same bytes with a fault: flipped, cut, emptied, or two parts swapped or one taken out."""
    a, b, c = sorted(rng.randrange(len(content) + 1) for _ in range(3))
    return rng.choice([
        bytes(byte ^ (rng.random() < 0.002) << rng.randrange(8) for byte in content),
        content[:a] + bytes([rng.randrange(256)]) + content[a + 1:], content[:a], b"",
        content[:a] + content[b:c] + content[a:b] + content[c:], content[:a] + content[b:]])


def flags(**fields) -> list[str]:
    return [part for k, v in fields.items() for part in (f"--{k.replace('_', '-')}", str(v))]


def call(program, *argv):
    """A program's main() in this process, with the handling of mistakes that its users get."""
    data.run(lambda: program.main([str(a) for a in argv]))


def mistake(capsys, program, *argv) -> str:
    """The one line that a user's mistake gives; the exit status is 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(program, *argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def last_json(capsys, program, *argv):
    """The JSON that ends the output of a program."""
    capsys.readouterr()
    call(program, *argv)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def evaluate(capsys, *argv) -> list[dict]:
    return last_json(capsys, ev, *argv, "--workers", 0)


def start(*argv, nproc: int = 1, restarts: int = 0) -> subprocess.Popen:
    """A program in a process of its own, or under torchrun in `nproc` of them."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={nproc}", "--standalone",
                f"--max-restarts={restarts}", "--monitor-interval=0.1"] if nproc > 1 else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.Popen([sys.executable, *launcher, *map(str, argv)], text=True, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output
    return output


def wait_for(process, path: Path, newer_than: int = 0):
    while process.poll() is None and not (path.exists() and path.stat().st_mtime_ns > newer_than):
        time.sleep(0.002)


def build(lm, seed=0, **fields) -> ParaCLIP:
    torch.manual_seed(seed)
    return ParaCLIP(Config(**TINY | {"lm": lm} | fields))


def batch(model: ParaCLIP, n: int, accum: int = 1, start: int = 0):
    """Micro-batches of random pictures and sentences, as the loader gives them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (64, 3, 16, 16), generator=generator, dtype=torch.uint8)
    size = n // accum
    return [(images[i:i + size], [model.tokenize([sentence(j) for j in range(i, i + size)])])
            for i in range(start, start + n, size)]


def train(lm: str, folder: str, out: Path, **fields) -> Path:
    """The run folder of a tiny model trained for a few steps on shards."""
    paraclip.train(Config(**TINY | dict(data=folder, lm=lm, out=str(out)) | fields))
    return out


def checkpoint_of(run: Path) -> dict:
    return torch.load(run / "model.pt", weights_only=True)


def same(x: dict, y: dict) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


# ---- what all programs share ---------------------------------------------------------------------
def test_flags_win_over_the_recipe_which_wins_over_the_defaults(capsys):
    def parse(line: str) -> Config:
        return data.parse_config(Config, line.split(), {"cc12m": {"steps": 1000, "lr": 1.0}})

    assert parse("--data cc12m --lr 0.5") == Config(data="cc12m", steps=1000, lr=0.5)
    assert parse("--recipe cc12m --data x").steps == 1000
    assert parse("--recipe emoji --data cc12m").steps == Config().steps
    for program in (paraclip, ev, data):
        with pytest.raises(SystemExit) as stop:
            program.main(["--help"])
        assert stop.value.code == 0 and "default: " in capsys.readouterr().out


def test_a_mistake_ends_in_one_line_and_a_bug_in_a_traceback(capsys, monkeypatch):
    def ending(error):
        with pytest.raises(BaseException) as stop:
            data.run(mock.Mock(side_effect=error))
        return getattr(stop.value, "code", stop.value), capsys.readouterr().err

    assert ending(UserError("no such\n thing")) == (2, "error: no such thing\n")
    assert ending(KeyboardInterrupt())[0] == 130
    for bug in (RuntimeError("shapes differ"), KeyError("a bug")):
        assert ending(bug) == (bug, "")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    data.run(lambda: print("\u00b1 5"))  # a terminal that lacks a sign is no mistake
    assert sys.stdout.buffer.getvalue() == b"? 5\n"


# ---- data: shards --------------------------------------------------------------------------------
def test_find_shards_understands_every_way_to_name_them(tmp_path, monkeypatch):
    folder = Path(shards(tmp_path / "s", [1, 1, 1]))
    every = [folder / f"0000{i}.tar" for i in range(3)]
    for name in (str(folder), f"{folder}/*.tar", f"{folder}/{{00000..00002}}.tar"):
        assert data.find_shards(name) == every
    several = f"{folder}/00002.tar::{folder}/{{00000..00001}}.tar"
    assert data.find_shards(several) == [every[2], *every[:2]]
    odd = write_tar(tmp_path / "y[2].tar", sample(0))
    assert data.find_shards(str(odd)) == [odd]  # no glob, though it looks like one
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PARACLIP_DATA", str(tmp_path))
    for name in (str(tmp_path / "nowhere"), "00000.tar::", "cc12m"):  # "" is not "."
        with pytest.raises(UserError, match="no .tar file|img2dataset.*pixparse/cc12m-wds"):
            data.find_shards(name)
    copy = write_tar(tmp_path / "cc12m" / "cc12m-train-0000.tar", sample(0))
    assert data.find_shards("cc12m") == [copy]


def test_every_fault_is_skipped_and_counted_and_nothing_is_mispaired(tmp_path):
    jpg, png, webp = picture(7), picture(8, kind="PNG"), picture(10, kind="WEBP")
    at = jpg.index(b"\xff\xc0") + 5  # there a JPEG tells its height and width
    huge, large = (jpg[:at] + struct.pack(">HH", side, side) + jpg[at + 4:]
                   for side in (30_000, 9000))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"  # would run Ghostscript
    path = write_tar(tmp_path / "00000.tar", [
        ("b.txt", b"of b"), ("a.JPG", jpg), ("x/a.png", png), ("a.txt", b"\xef\xbb\xbfof a"),
        ("b.jpeg", picture(9)), ("x/a.txt", b"of x/a"), ("a.cls", b"3"),
        ("../../out.jpg", jpg), ("../../out.txt", b"of out"),  # only a key: never unpacked
        ("dot.v2.webp", webp), ("dot.v2.json", b'{"caption": "of dot"}'),
        ("utf.jpg", jpg), ("utf.txt", b"caf\xe9"),  # not UTF-8: replaced
        ("half.jpg", jpg), ("half.json", b'{"caption": "half an emoji \\ud83d"}'),
        ("lonely.jpg", jpg), ("only.txt", b"no picture"), ("a.jpg", picture(11)),
        ("zero.jpg", b""), ("zero.txt", b"none"), ("lnk.txt", b"link"),
        ("white.jpg", jpg), ("white.txt", b" \n\t "),
        ("null.jpg", jpg), ("null.json", b'{"caption": null}'),
        ("bad.jpg", jpg), ("bad.json", b'{"caption'),
        ("cut.jpg", jpg[:-30]), ("cut.txt", b"cut"), ("eps.jpg", eps), ("eps.txt", b"eps"),
        ("text.jpg", b"<html>"), ("text.txt", b"text"), ("huge.jpg", huge), ("huge.txt", b"huge"),
        ("large.jpg", large), ("large.txt", b"large")])
    link = tarfile.TarInfo("lnk.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(path, "a") as tar:
        tar.addfile(link)
    four = [member for i in range(20, 24) for member in sample(i)]
    whole = write_tar(tmp_path / "00001.tar", four).read_bytes()
    first = whole.index(b"00021.jpg")  # the header of the second sample
    back, far, pax = (tarfile.TarInfo("b.jpg") for _ in range(3))
    back.size, far.size = -512, -2048  # to themselves: a reader may go round for ever
    pax.pax_headers = {"GNU.sparse.size": "99"}  # hides that the other size is negative
    hidden = pax.tobuf(tarfile.PAX_FORMAT)[:1024] + far.tobuf(tarfile.GNU_FORMAT)
    for number, content in enumerate((
            b"", b"this is no tar" * 100, whole[:first + 100],  # breaks off within a header
            whole[:first + 600], whole[:first],  # within a picture, between two members
            whole[:first] + b"?" * 2048,  # a garbled header
            whole[:first] + back.tobuf(tarfile.GNU_FORMAT) + bytes(1024),
            whole[:first] + hidden + bytes(1024)), 2):
        (tmp_path / f"0000{number}.tar").write_bytes(content)
    os.mkdir(tmp_path / "00010.tar")

    index = ShardIndex(str(tmp_path))
    assert index.skipped == {
        "no caption": 1, "empty or broken caption": 3, "duplicate key": 1,
        "no image": 3, "unreadable shard": 1, "broken or truncated shard": 8}
    assert len(index) == 12 + 4 + 6  # one sample of each shard that breaks off
    found = {index.caption(i): index.image(i) for i in range(len(index))}
    assert found["of a"] == found["caf\ufffd"] == found["half an emoji ?"] == jpg == found["of out"]
    assert found["of b"] == picture(9) and found["of x/a"] == png and found["of dot"] == webp
    assert found[sentence(20)] == picture(20)
    for caption, reason in (("cut", "broken image"), ("text", "broken image"),
                            ("eps", "broken image"), ("huge", "too many pixels"),
                            ("large", "too many pixels")):
        with pytest.raises(BadSample, match=reason):
            data.decode_image(found[caption])


def test_an_index_follows_its_shards_and_knows_its_data(tmp_path, monkeypatch):
    folder = shards(tmp_path / "s", [5, 3])
    with monkeypatch.context() as patch, pytest.raises(UserError, match="unreadable shard"):
        patch.setattr(os, "pread", mock.Mock(side_effect=OSError(5, "Input/output error")))
        ShardIndex(folder)
    index = ShardIndex(folder, workers=2)  # a passing fault of a disk is not remembered
    assert os.path.getsize(index.rows_file) == 24 * 8
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert ShardIndex(str(copy)).fingerprint == index.fingerprint
    path = tmp_path / "s" / "00000.tar"
    status, caption = os.stat(path), sentence(0).encode()
    other = tmp_path / "other"  # takes its place, of the same size and time
    other.write_bytes(path.read_bytes().replace(caption, b" " * len(caption)))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)
    assert len(ShardIndex(folder)) == 7 and ShardIndex(folder).fingerprint != index.fingerprint
    write_tar(tmp_path / "0.tar", [("a.jpg", picture(0)), ("a.cls", b"1"), ("b.npy", b"1")])
    with pytest.raises(UserError, match=r"'no caption': 1.*'cls': 1.*'npy': 1"):
        ShardIndex(str(tmp_path / "0.tar"))


# ---- data: pictures ------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, mode", [
    ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1"),
    ("WEBP", "RGB"), ("GIF", "P"), ("BMP", "RGB")])
def test_decoding_agrees_with_pillow_for_every_kind_of_picture(kind, mode):
    content = picture(3, kind=kind, mode=mode)
    expected = np.asarray(opened(content).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(data.decode_image(content).numpy(), expected)


def test_all_see_a_picture_turned_on_white_and_16_bit_grey_unclipped():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to view
    turned, stored = (picture(1, (30, 10), **options) for options in (dict(exif=exif), {}))
    clear = saved(Image.new("RGBA", (4, 4), (200, 0, 0, 0)))
    grey = saved(Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)))
    upright = np.rot90(np.asarray(opened(stored)), k=-1)
    for content, expected in ((turned, upright), (clear, np.full((4, 4, 3), 255)),
                              (grey, np.full((4, 4, 3), 128))):
        assert np.array_equal(data.decode_image(content).numpy().transpose(1, 2, 0), expected)
        # ... and so does a library's user, who opens it without us
        direct = data.center_crop(opened(content), 4)
        assert torch.equal(direct, data.center_crop(Image.fromarray(np.uint8(expected)), 4))


def test_a_random_crop_is_one_box_with_the_share_and_shape_it_promises():
    ramp = torch.stack([torch.arange(200).expand(100, 200), torch.zeros(100, 200),
                        torch.arange(100)[:, None].expand(100, 200)]).to(torch.uint8)
    rng, shares, ratios = random.Random(0), [], []
    for _ in range(300):
        crop = data.random_crop(ramp, 32, 0.3, rng).double()  # red: column, blue: row
        assert (crop[0] == crop[0, :1]).all() and (crop[2] == crop[2, :, :1]).all()
        w, h = ((crop[i].max() - crop[i].min()).item() * 32 / 31 for i in (0, 2))
        shares.append(w * h / 20_000)
        ratios.append(w / h)
    assert 0.28 < min(shares) < 0.35 and 0.7 < max(shares) < 0.82  # of 2:1 no box takes more
    assert 0.70 < min(ratios) < 0.80 and 1.3 < max(ratios) < 1.64  # cut off at its height
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(64).expand(3, 128, 128)
    crops = torch.stack([data.random_crop(stripes, 16, 0.5, rng) for _ in range(20)])
    assert 100 < crops.min() <= crops.max() < 155  # shrunk with a filter


# ---- data: order and loader ----------------------------------------------------------------------
def test_an_epoch_is_a_permutation_that_mixes_and_reads_in_blocks(monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 1000)
    n, block = 5003, 10
    order = {key: np.array([*data.epoch_order(n, block, *key)]) for key in ((0, 0), (1, 0), (0, 1))}
    first, other, later = order.values()
    assert sorted(first) == sorted(other) == sorted(later) == list(range(n))
    assert (first == other).mean() < 0.01 and (first == later).mean() < 0.01
    assert len({*first[:1000]} & {*later[:1000]}) < 400  # other samples meet
    window = first[:1000]
    assert len(set(window // block)) <= 101  # whole blocks, so long stretches
    assert np.abs(np.diff(window)).mean() > n / 5  # ... from all over the set, mixed


def as_codes(captions: list[str]) -> dict:
    """A tokenizer whose tokens are letters."""
    rows = [torch.tensor([ord(letter) for letter in caption]) for caption in captions]
    return {"ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}


def load(index, start=0, steps=8, world=1, tokenize=as_codes, **options) -> list:
    """[({caption: image}, {reason: count})] of the global batches."""
    batches = [({}, Counter()) for _ in range(start, steps)]
    for rank in range(world):
        cfg = Namespace(**dict(batch_size=8, accum=1, seed=0, image_size=8, crop=1.0, workers=0)
                        | options)
        loader = data.training_loader(index, cfg, start, steps, rank, world, tokenize)
        for (pairs, counts), (parts, failed) in zip(batches, loader, strict=True):
            assert type(failed) is dict  # pinning would double a Counter
            counts.update(failed)
            for images, groups in parts:
                rows = [row for group in groups for row in group["ids"]]
                pairs |= zip(["".join(map(chr, row[row > 0])) for row in rows], images, strict=True)
    return batches


@pytest.mark.parametrize("world, workers, accum", [(1, 3, 2), (2, 0, 4), (4, 2, 1)])
def test_each_sample_is_seen_once_over_ranks_and_workers_with_its_own_caption(
        tmp_path, monkeypatch, world, workers, accum):
    monkeypatch.setattr(data, "MIN_GROUP", 1)  # captions in several groups of like length
    index = ShardIndex(shards(tmp_path / "s", [1, 30, 3]))  # fewer shards than readers
    batches = load(index, world=world, workers=workers, accum=accum)
    for epoch in (batches[:4], batches[4:]):
        seen = [caption for pairs, _ in epoch for caption in pairs]
        assert len(seen) == len(set(seen)) == 32 and set(seen) <= {sentence(i) for i in range(34)}
    assert batches[0][0].keys() != batches[4][0].keys()
    # Ranks see together what one process sees, augmentation too; a continued run, what is left
    rest = load(index, start=5, world=world, workers=workers, accum=accum)
    for (pairs, _), (alone, _) in zip(batches + rest, load(index) + load(index)[5:], strict=True):
        assert pairs.keys() == alone.keys()
        for caption, image in pairs.items():
            assert torch.equal(image, alone[caption])
            original = data.decode_image(picture(int(caption.split()[-1]))).float().mean((1, 2))
            assert (image.float().mean((1, 2)) - original).abs().max() < 45  # crops keep the mean


def test_bad_pictures_are_replaced_the_same_way_each_time_counted_and_told(tmp_path, capsys):
    mixed = Path(shards(tmp_path / "s", [3])) / "1.tar"
    write_tar(mixed, [member for i in range(4, 16) for member in (sample(i) if i % 4 else junk(i))])
    write_tar(mixed.with_name("2.tar"), [("b.jpg", picture(0))])
    index = ShardIndex(str(mixed))
    (pairs, failed), = load(index, steps=1, batch_size=12, crop=0.5)
    assert failed == {"broken image": 3}
    assert pairs.keys() == {sentence(i) for i in range(4, 16) if i % 4}
    (again, _), = load(index, steps=1, batch_size=12, crop=0.5, workers=2)
    assert same(pairs, again)
    report = last_json(capsys, data, mixed.parent, "--workers", "0")
    assert report.pop("images_per_s") > 0
    assert report == {"shards": 3, "samples": 12, "keys": {"jpg": 16, "txt": 15},
                      "skipped": {"no caption": 1, "broken image": 3}}
    broken = write_tar(tmp_path / "0.tar", [member for i in range(9) for member in junk(i)])
    reader = Namespace(main=lambda argv: load(ShardIndex(str(broken)), workers=1))
    assert re.match("error: 100 samples in a row.*broken image", mistake(capsys, reader))
    dying = lambda captions: os.kill(os.getpid(), signal.SIGBUS)  # as where memory is short
    reader.main = lambda argv: load(index, batch_size=4, workers=1, tokenize=dying)
    assert re.match("error: DataLoader worker ", mistake(capsys, reader))


def test_damage_never_gives_a_traceback_a_hang_or_a_wrong_pair(tmp_path):
    """One of three shards is damaged, then what is kept of the index."""
    own = {sentence(i): picture(i) for i in range(12)}
    for seed in range(FUZZ_SEED, FUZZ_SEED + FUZZ_CASES):
        rng, folder = random.Random(seed), tmp_path / str(seed)
        path = Path(shards(folder, [4, 4, 4])) / f"0000{rng.randrange(3)}.tar"
        path.write_bytes(damage(path.read_bytes(), rng))
        index = ShardIndex(str(folder))
        before = [(index.caption(i), index.image(i)) for i in range(len(index))]
        assert len(index) >= 8
        for caption, content in before:  # if neither is damaged itself, they belong together
            assert caption not in own or content not in own.values() or own[caption] == content
            with contextlib.suppress(BadSample):
                data.decode_image(content)
        cached = sorted((tmp_path / "cache").iterdir())
        for file in rng.sample(cached, rng.randint(1, len(cached))):
            file.unlink() if rng.random() < 0.2 else file.write_bytes(
                damage(file.read_bytes(), rng))
        again = ShardIndex(str(folder))
        assert [(again.caption(i), again.image(i)) for i in range(len(again))] == before
        assert (again.fingerprint, again.skipped) == (index.fingerprint, index.skipped)
        shutil.rmtree(tmp_path / "cache")


# ---- data: readers of evaluation files -----------------------------------------------------------
PAIR = {"query": "q", "paraphrase": "p"}
COCO = '{"images": [{"id": 5, "file_name": "a"}], "annotations": [{"image_id": 5, "caption": %s}]}'


@pytest.mark.parametrize("reader, text, expected", [
    (data.read_pairs, json.dumps([PAIR]), [PAIR]),
    (data.read_pairs, "\ufeff" + json.dumps(PAIR) + "\r\n\n" + json.dumps(PAIR), [PAIR, PAIR]),
    (data.read_pairs, '{"caption": "q\\ud83d", "caption2": "p", "filename": "1"}', [
        {"caption": "q\ud83d", "caption2": "p", "filename": "1", "query": "q?", "paraphrase": "p",
         "image": "1"}]),
    (data.read_pairs, json.dumps(PAIR) + "\n\n{", "line 3"),
    (data.read_pairs, "[" * 99_999, ""),
    (data.read_pairs, '{"query": "q"}', 'line 1.*query, paraphrase'),
    (data.read_pairs, b"\xff\xfe{\0", "utf-8"),
    (data.read_triplets, '{"caption": "a", "caption2": "b"}', 'negative_caption'),
    (data.read_captions, COCO % '"x"', {"a": ["x"]}),
    (data.read_captions, COCO % "null", "COCO"),
    (data.read_sts, 'a,"b, c",1\nd,e,2.5\n', [("a", "b, c", 1.0), ("d", "e", 2.5)]),
    (data.read_sts, 'id\tScore\tsentence1\tsentence2\n7\t3\ta\t"b\n', [("a", '"b', 3.0)]),
    (data.read_sts, "a,b,1\nc,d,nan", "line 2"),
    (data.read_templates, "a {}\n\nof {} b\n", ["a {}", "of {} b"]),
    (data.read_templates, "a {}\n\nno place\n", "line 3")])
def test_evaluation_files_are_read_or_refused_with_their_place(tmp_path, reader, text, expected):
    file = tmp_path / "file"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    if isinstance(expected, str):
        with pytest.raises(UserError, match=f"{file}.*{expected}"):
            reader(file)
    else:
        assert reader(file) == expected


def test_zero_shot_sources(tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "f", "z/a.PNG", "fire_truck/a.png", "ant/b.png", "z/.y.jpg",
                            "ant/sub/c.jpeg", "stray.png", ".hidden/a.png", "empty/a.txt")
    os.symlink(write_pictures(tmp_path / "far", "a.png"), f"{folder}/dog")  # a class may be a link
    os.symlink(folder, f"{folder}/ant/loop")
    gallery, names, labels = data.read_zeroshot(folder)
    assert names == ["ant", "dog", "fire truck", "z"]
    assert list(labels.items()) == [("ant/b.png", 0), ("ant/sub/c.jpeg", 0), ("dog/a.png", 1),
                                    ("fire_truck/a.png", 2), ("z/a.PNG", 3)]
    rows = data.rows_by_name(gallery)  # three are called a.png
    assert "a.png" not in rows and rows["c.jpeg"] == rows["ant/sub/c.jpeg"] == 1
    given = tmp_path / "names"
    given.write_text("emmet\nDog\nfire engine\nZ\n")
    assert data.read_zeroshot(folder, given)[1] == ["emmet", "Dog", "fire engine", "Z"]
    given.write_text("emmet\n")
    with pytest.raises(UserError, match="4 class names"):
        data.read_zeroshot(folder, given)
    root = write_pictures(tmp_path, *(f"val/n{i:08}/x.JPEG" for i in range(1000)))
    _, names, labels = data.read_zeroshot(f"imagenet:{root}")
    assert names[0] == "tench" and names[-1] == "toilet tissue" and len(labels) == 1000
    pixels = np.zeros((2, 32, 32, 3), np.uint8)
    fake = lambda root, train: Namespace(classes=["x", "y_z"], targets=[1, 0], data=pixels)
    monkeypatch.setattr(data.torchvision.datasets, "CIFAR100", fake)
    gallery, names, labels = data.read_zeroshot(f"cifar100:{tmp_path}")
    assert names == ["x", "y z"] and labels == {"test/0": 1, "test/1": 0}
    assert data.open_picture(gallery["test/1"]).size == (32, 32)


# ---- model and loss ------------------------------------------------------------------------------
def test_vit_equals_pytorchs_transformer_with_the_same_weights():
    torch.manual_seed(0)
    ours = ViT(image_size=32, patch_size=8, stem="patch", width=48, depth=3, heads=4)
    images = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        patches = F.unfold((images - ours.mean) / ours.std, 8, stride=8).transpose(1, 2)
        x = patches @ ours.patch_embed.weight.flatten(1).T + ours.patch_embed.bias
        x = torch.cat([ours.cls_token.expand(5, -1, -1), x], 1) + ours.pos_embed
        for block in ours.blocks:
            layer = torch.nn.TransformerEncoderLayer(  # batch first, norm first
                48, 4, 192, 0.0, "gelu", 1e-6, True, True)
            parts = torch.nn.ModuleList([block.qkv, block.proj, block.fc1, block.fc2, block.norm1,
                                         block.norm2])
            for p, theirs in zip(parts.parameters(), layer.parameters(), strict=True):
                p += 0.1 * torch.randn_like(p)  # no zero bias, no norm of one
                theirs.copy_(p)
            x = layer(x)
        assert torch.allclose(ours(images), F.layer_norm(x[:, 0], (48,), eps=1e-6), atol=1e-5)


def test_images_of_another_shape_dtype_or_range_are_refused(lm):
    model = build(lm, precision="bf16")
    good = torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(model.encode_image(good), model.encode_image(good / 255))
    captions = ["a dog", "a red cat"]
    for features in (model.encode_image(good), model.encode_text(captions),
                     model.encode_lm(captions)):
        assert features.dtype == torch.float32
        assert torch.allclose(features.norm(dim=1), torch.ones(2), atol=1e-6)
    for bad in (good.int(), good.float(), good / 255 - 0.5, good[:, :, :8], good[:, :1], good[0]):
        with pytest.raises(ValueError, match="images"):
            model.encode_image(bad)
    assert torch.allclose(model.encode_text("a dog"), model.encode_text(captions)[:1], atol=0.02)


@pytest.mark.parametrize("text", ["frozen", "align", "finetune"])
def test_frozen_is_frozen_in_every_way_and_finetune_is_not(lm, text):
    model, frozen = build(lm, text=text), text != "finetune"
    pretrained = transformers.BertModel.from_pretrained(lm, add_pooling_layer=False).state_dict()
    assert same(model.text_tower.lm.state_dict(), pretrained)
    optimizers = paraclip.make_optimizers(model, Config(lr=0.1, weight_decay=0.5, text=text))
    model.train()
    assert not any(module.training for module in model.text_tower.lm.modules())
    for _ in range(3):
        paraclip.backward(model, Config(), batch(model, 8))
        paraclip.update(model, optimizers, 1.0)
    assert same(model.text_tower.lm.state_dict(), pretrained) == frozen
    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    left_out = {id(p) for p in model.text_tower.lm.parameters()} if frozen else set()
    assert sorted(held) == sorted({id(p) for p in model.parameters()} - left_out)
    scratch = build(lm, text="scratch").text_tower.lm.state_dict()
    assert scratch.keys() == pretrained.keys() and not same(scratch, pretrained)


@pytest.mark.parametrize("text", ["scratch", "finetune", "frozen", "align"])
def test_a_captions_feature_does_not_depend_on_padding(lm, text):
    model = build(lm, text=text)  # in training mode: no dropout either
    for p in model.text_tower.align.parameters():  # which start as the identity
        p.data += 0.1 * torch.randn_like(p)
    short, long = "a red dog", "a " * 60 + "cat on the left of a blue circle"
    with torch.no_grad():
        alone = model.encode_text([short])
        assert torch.allclose(alone, model.encode_text([long, short])[1:], atol=1e-6)
        padded = {k: F.pad(v, (0, 9)) for k, v in model.tokenize([short]).items()}
        groups = [model.tokenize([long]), padded]
        assert torch.allclose(alone, model.encode_text(groups)[1:], atol=1e-6)
        assert not torch.allclose(alone, model.encode_text(["a red cat"]), atol=1e-3)
    ids = model.tokenize(["a " * 100])["input_ids"]
    assert ids.shape[1] == 77
    assert ids[0, -1] == model.text_tower.tokenizer.sep_token_id  # truncation keeps the end token


def test_text_is_pooled_by_maximum_and_the_language_models_states_by_mean(lm):
    model = build(lm, text="frozen")
    captions = ["a red dog", "a cat on the left of a blue circle"]
    with torch.no_grad():
        for i, caption in enumerate(captions):  # alone: no padding
            states = model.text_tower.lm(**model.tokenize([caption])).last_hidden_state[0]
            for encode, pooled in ((model.encode_text, model.text_proj(states.amax(0))),
                                   (model.encode_lm, states.mean(0))):
                expected = F.normalize(pooled, dim=-1)
                assert torch.allclose(encode(captions)[i], expected, atol=1e-6)


def test_a_language_model_that_does_not_fit_is_refused(lm, tmp_path):
    model = transformers.BertModel.from_pretrained(lm)
    model.save_pretrained(tmp_path / "no-tokenizer")
    shutil.copytree(lm, tmp_path / "no-layer")
    state = {k: v for k, v in model.state_dict().items() if "layer.1.output" not in k}
    model.save_pretrained(tmp_path / "no-layer", state_dict=state)
    for name in ("no-tokenizer", "no-layer"):
        with pytest.raises(UserError, match=f"language model '.*{name}'"):
            build(str(tmp_path / name))


def test_contrastive_loss_on_a_case_worked_by_hand():
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # Scores x 2: [[2, 0], [1.2, 1.6]]; rows: log(1 + e^-2), log(1 + e^-0.4); columns:
    # log(1 + e^-0.8), log(1 + e^-1.6).
    expected = sum(math.log(1 + math.exp(-x)) for x in (2, 0.4, 0.8, 1.6)) / 4
    loss, accuracy = contrastive_loss(images, texts, torch.tensor(2.0))
    assert loss.item() == pytest.approx(expected, rel=1e-6) and accuracy == 1


def test_geometry_loss_against_a_loop():
    torch.manual_seed(0)
    image, text, lm = (F.normalize(torch.randn(5, width), dim=1) for width in (3, 3, 4))
    tau, expected = paraclip.GEOMETRY_TAU, 0.0
    for i in range(5):
        others = [j for j in range(5) if j != i]
        softmax = lambda q, k: torch.tensor([float(q[i] @ k[j]) / tau for j in others]).softmax(0)
        z = softmax(lm, lm)
        for weight, q, k in ((1, text, text), (0.5, image, text), (0.5, text, image)):
            expected += weight * float((z * (z / softmax(q, k)).log()).sum()) / 5
    assert paraclip.geometry_loss(image, text, lm).item() == pytest.approx(expected, rel=1e-4)


CASES = [dict(text="align"), dict(text="align", accum=2), dict(text="finetune", accum=2),
         dict(text="finetune"), dict(text="align", geometry=0.7, accum=2)]


def gradients(lm, rank: int, ranks: int, **case):
    model, cfg = build(lm, **case), Config(**TINY | case)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    micro_batches = batch(model, 16 // ranks, cfg.accum, start=rank * 16 // ranks)
    loss, _ = paraclip.backward(wrapped, cfg, micro_batches)
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def rank_main(rank: int, ranks: int, lm: str, folder: str):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                                         world_size=ranks)
    results = []
    for case in CASES:
        loss, grads = gradients(lm, rank, ranks, **case)
        torch.distributed.all_reduce(loss)
        results.append((loss / ranks, grads))
    if rank == ranks - 1:
        torch.save(results, f"{folder}/grads.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [1, 4])
def test_loss_and_every_gradient_on_many_processes_equal_those_on_one(lm, tmp_path, ranks):
    if ranks > 1:
        torch.multiprocessing.spawn(rank_main, args=(ranks, lm, str(tmp_path)), nprocs=ranks)
    results = torch.load(tmp_path / "grads.pt") if ranks > 1 else \
        [gradients(lm, 0, 1, **case) for case in CASES]
    for case, (loss, grads) in zip(CASES, results, strict=True):
        expected_loss, expected = gradients(lm, 0, 1, **case | {"accum": 1})
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
        assert grads.keys() == expected.keys() and "logit_scale" in grads
        largest = max(g.norm() for g in expected.values())
        for name in grads:  # 1e-3: a key's bias has no gradient in exact arithmetic
            scale = max(expected[name].norm(), 1e-3 * largest)
            assert (grads[name] - expected[name]).norm() < 1e-5 * scale, (case, name)


# ---- training ------------------------------------------------------------------------------------
def test_schedule_and_the_optimizers_shares(lm):
    rates = [paraclip.schedule(step, steps=10, warmup=2) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.5) and rates[-1] < 0.05
    model = build(lm, text="finetune", stem="conv")
    layer = "text_tower.lm.encoder.layer.0.output.dense."
    expected = {  # name: (learning rate with Muon, with AdamW alone, weight decay)
        "logit_scale": (1, 1, 0), "image_tower.norm.weight": (1, 1, 0),
        "image_tower.cls_token": (1, 1, 0), "image_tower.blocks.0.fc1.weight": (10, 1, 0.3),
        "image_tower.patch_embed.0.weight": (10, 1, 0.3), "text_proj.weight": (1, 1, 0.3),
        layer + "weight": (1, 0.1, 0.3), layer + "bias": (0.1, 0.1, 0)}
    for column, name in enumerate(("muon", "adamw")):
        cfg = Config(text="finetune", optimizer=name, lr=1.0, lm_lr=0.1, weight_decay=0.3)
        groups = [g for o in paraclip.make_optimizers(model, cfg) for g in o.param_groups]
        for weight, facts in expected.items():
            p = model.get_parameter(weight)
            group, = (g for g in groups if any(p is q for q in g["params"]))
            found = group["peak_lr"], group["weight_decay"]
            assert found == pytest.approx((facts[column], facts[2])), (name, weight)


@pytest.mark.parametrize("text, compiled", [("align", False), ("scratch", True)])
def test_pairs_are_learnt_by_heart_and_the_checkpoint_holds_no_more(
        lm, tmp_path, monkeypatch, text, compiled):
    compile = torch.nn.Module.compile  # the graph is captured, but no C++ compiler asked for
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **how: compile(self, backend="aot_eager", **how))
    folder = shards(tmp_path / "s", [16])
    out = train(lm, folder, tmp_path / "run", text=text, compile=compiled, steps=60, lr=3e-3,
                crop=1.0)
    checkpoint = checkpoint_of(out)
    has_lm = any(name.startswith("text_tower.lm.") for name in checkpoint["model"])
    assert has_lm == (text == "scratch") and checkpoint["lm"]["name"] == lm
    assert checkpoint["step"] == 60 and checkpoint["config"]["text"] == text
    row = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 60 and row.keys() >= {"epoch", "loss", "accuracy", "logit_scale", "lr",
                                                "images_per_s", "data_wait"}
    model, index = load_model(out), ShardIndex(folder)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not model.training and same(trained, checkpoint["model"])
    pictures = [model.preprocess(opened(index.image(i))) for i in range(16)]
    with torch.no_grad():
        images = model.encode_image(torch.stack(pictures))
        scores = images @ model.encode_text([index.caption(i) for i in range(16)]).T
    assert scores.argmax(0).tolist() == scores.argmax(1).tolist() == list(range(16))


def test_a_checkpoint_of_another_language_model_is_refused(lm, tmp_path):
    own = Path(shutil.copytree(lm, tmp_path / "lm"))
    out = train(str(own), shards(tmp_path / "s", [16]), tmp_path / "run", steps=1)
    checkpoint, file = checkpoint_of(out), tmp_path / "changed.pt"
    configs = [checkpoint["config"] | change
               for change in (dict(width=64), dict(lr=math.nan), dict(colour="red"))]
    for content in (*(checkpoint | {"config": config} for config in configs), {"model": {}}):
        torch.save(content, file)
        with pytest.raises(UserError):
            load_model(file)
    good = {path.name: path.read_bytes() for path in own.iterdir()}
    model = transformers.BertModel.from_pretrained(own)
    model.embeddings.word_embeddings.weight.data[3] += 1e-3
    model.save_pretrained(own)
    changes = {"model.safetensors": (own / "model.safetensors").read_bytes(),
               "tokenizer.json": good["tokenizer.json"].replace(b'"dog"', b'"DOG"'),
               "config.json": good["config.json"].replace(b'"gelu"', b'"relu"')}
    for name, content in changes.items():  # weights, a word, the activation
        assert content != good[name]
        for file, before in good.items():
            (own / file).write_bytes(content if file == name else before)
        with pytest.raises(UserError, match="of another language model"):
            load_model(out)


def test_a_killed_run_continues_to_the_same_bits(lm, tmp_path, capsys):
    """A checkpoint after every step, so that kills fall into its writing, too."""
    folder, whole, out = shards(tmp_path / "s", [40, 9, 30]), tmp_path / "whole", tmp_path / "run"
    args = flags(**TINY | dict(data=folder, lm=lm, steps=40, workers=2, accum=2, save_every=1))
    call(paraclip, *args, "--out", whole)
    args, rng, newest = [*args, "--out", out], random.Random(0), 0
    for killer in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = start(HERE / "paraclip.py", *args)
        wait_for(process, out / "model.pt", newest)
        time.sleep(rng.random() * 0.1)
        process.send_signal(killer)
        finish(process, -killer if killer == signal.SIGKILL else 128 + killer)
        newest = (out / "model.pt").stat().st_mtime_ns
    assert checkpoint_of(out)["step"] < 40
    (out / "model.pt.tmp").touch()  # what a kill in mid-write leaves
    with open(out / "log.jsonl", "ab") as log:
        log.write(b'{"step": 39, "lo')  # newer than the checkpoint, and cut by the kill
    with FileLock(out / "run.lock"):  # there is one writer
        assert "run" in mistake(capsys, paraclip, *args)
    call(paraclip, *args)
    assert same(checkpoint_of(out)["model"], checkpoint_of(whole)["model"])
    logs = [[json.loads(line)["loss"] for line in open(run / "log.jsonl")] for run in (whole, out)]
    assert logs[0] == logs[1] and len(logs[0]) == 4 and not list(out.glob("*.tmp"))
    capsys.readouterr()
    call(paraclip, *args)
    assert "is finished" in capsys.readouterr().out
    assert "lr 0.001" in mistake(capsys, paraclip, *args, "--lr", "0.5")
    write_tar(tmp_path / "s" / "00001.tar", [m for i in range(50, 59) for m in sample(i)])
    assert "data" in mistake(capsys, paraclip, *args)


def test_two_processes_follow_one_and_survive_a_killed_rank(lm, tmp_path, monkeypatch):
    """Of the recipe cc12m, for which its data suffice; sizes are cut down."""
    shards(tmp_path / "cc12m", [40, 9, 30])
    monkeypatch.setenv("PARACLIP_DATA", str(tmp_path))
    fields = TINY | dict(lm=lm, steps=30, workers=1, save_every=1, optimizer="muon")
    args = ["--data", "cc12m", *flags(**fields)]
    call(paraclip, *args, "--out", tmp_path / "one")
    process = start(HERE / "paraclip.py", *args, "--out", tmp_path / "two", nproc=2, restarts=1)
    wait_for(process, tmp_path / "two" / "model.pt")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert len(set(re.findall("steps ([0-9]+) to 30", finish(process)))) == 2  # from 1, from later
    one, two = (checkpoint_of(tmp_path / name) for name in ("one", "two"))
    recipe = paraclip.RECIPES["cc12m"]["weight_decay"]
    assert two["config"]["weight_decay"] == recipe != Config().weight_decay
    for name, weight in one["model"].items():  # up to rounding
        assert torch.allclose(weight, two["model"][name], atol=2e-4), name


def test_an_error_on_one_rank_ends_all_with_one_line(lm, tmp_path):
    """One of two ranks finds its data gone bad; the other one would wait for it for ever."""
    script = tmp_path / "fail.py"
    script.write_text("""
import os, paraclip
from unittest import mock
if os.environ["RANK"] == "1":
    paraclip.update = mock.Mock(side_effect=paraclip.UserError("this rank has failed"))
paraclip.run(paraclip.main)
""")
    args = flags(**TINY | dict(data=shards(tmp_path / "s", [40]), lm=lm, out=tmp_path / "run"))
    output = finish(start(script, *args, nproc=2), 1)
    assert output.count("error: this rank has failed") == output.count("error: ") == 1
    assert "paraclip.py\", line" not in output
    output = finish(start(HERE / "paraclip.py", *args, "--batch-size", 0, nproc=2), 1)
    assert output.count("error: --batch-size 0") == 1


def test_a_failure_leaves_the_former_checkpoint(lm, tmp_path, monkeypatch, capsys):
    folder, run = shards(tmp_path / "s", [32]), tmp_path / "run"
    args = flags(**TINY | dict(data=folder, lm=lm, out=run, save_every=2))
    real, losses = paraclip.contrastive_loss, iter([1.0, 1.0, math.nan])
    with monkeypatch.context() as patch:
        patch.setattr(paraclip, "contrastive_loss",
                      lambda *x: (real(*x)[0] * next(losses), torch.tensor(0.0)))
        assert re.search("nan.* at step 3", mistake(capsys, paraclip, *args))
    former = (run / "model.pt").read_bytes()
    assert checkpoint_of(run)["step"] == 2
    # A limit on the size of files stands for the full disk: only a checkpoint exceeds it.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert "model.pt" in mistake(capsys, paraclip, *args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run / "model.pt").read_bytes() == former and not list(run.glob("*.tmp"))

    def spoiling(model, *args, update=paraclip.update):
        norm = update(model, *args)  # of before the step, and finite, as is the loss
        model.text_proj.weight.data[0, 0] = torch.inf
        return norm
    monkeypatch.setattr(paraclip, "update", spoiling)
    assert "at step 3" in mistake(capsys, paraclip, *args, "--save-every", 1)
    assert (run / "model.pt").read_bytes() == former


def test_a_damaged_run_folder_is_continued_or_refused(lm, tmp_path):
    folder = shards(tmp_path / "s", [16])
    good = train(lm, folder, tmp_path / "good", steps=2)
    expected, content = checkpoint_of(good)["model"], (good / "model.pt").read_bytes()
    at = content.index(expected["text_proj.weight"].numpy().tobytes())  # one bit of a weight
    flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]
    (tmp_path / "flipped.pt").write_bytes(flipped)
    with pytest.raises(UserError, match="damaged"):
        load_model(tmp_path / "flipped.pt")
    for seed in range(FUZZ_SEED, FUZZ_SEED + FUZZ_CASES):
        rng, run = random.Random(seed), tmp_path / f"run{seed}"
        shutil.copytree(good, run)
        file = run / rng.choice(["model.pt", "model.pt", "log.jsonl", "config.json"])
        damaged = damage(file.read_bytes(), rng)
        file.write_bytes(damaged)
        try:
            found = load_model(run).state_dict()
            assert all(torch.equal(found[k], v) for k, v in expected.items()), seed
            train(lm, folder, run, steps=2)
        except UserError:
            assert file.name == "model.pt" and file.read_bytes() == damaged, seed


@pytest.mark.parametrize("args, message", [
    ("--no-such-flag", "--no-such-flag"), ("--text thaw", "--text"), ("--lr 1e+38", "--lr"),
    ("--crop 2", "--crop 2"), ("--steps -5", "--steps"), ("--batch-size 1", "--batch-size"),
    ("--lm no/such-model", "no/such-model"), ("--out theirs", "theirs"),
    ("--batch-size 64", "usable samples"), ("--epochs 0.01", "usable samples"),
    ("--accum 3", "multiple"), ("--image-size 15", "multiple"),
    ("--text scratch --geometry 1", "--geometry")])
def test_mistakes_in_training_are_told(lm, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    fields = TINY | dict(data=shards(Path("s"), [20]), out="run", lm=lm, steps=0)
    write_pictures(Path("theirs"), "log.jsonl")  # somebody else's
    assert message in mistake(capsys, paraclip, *flags(**fields), *args.split())
    assert not Path("run/model.pt").exists()


# ---- evaluation: metrics -------------------------------------------------------------------------
@pytest.mark.parametrize("a, b, ao, js", [
    ([1, 2, 3, 4], [1, 2, 3, 4], 1, 1),
    ([1, 2, 3, 4], [5, 6, 7, 8], 0, 0),
    ([1, 2, 3, 4], [2, 1, 3, 5], (0 + 2 / 2 + 3 / 3 + 3 / 4) / 4, 3 / 5),
    ([1, 2, 3], [1, 4, 5], (1 + 1 / 2 + 1 / 3) / 3, 1 / 5),  # one agreement at the top
    ([1, 2, 3], [4, 5, 1], (0 + 0 + 1 / 3) / 3, 1 / 5),  # the same one at the bottom
])
def test_ao_and_js_by_hand(a, b, ao, js):
    lists = a + [9], b + [9], len(a)  # only the first k are read
    assert ev.average_overlap(*lists) == pytest.approx(ao, abs=1e-15)
    assert ev.jaccard(*lists) == pytest.approx(js, abs=1e-15)
    batch = ev.average_overlap(torch.tensor([a, a]), torch.tensor([a, b]))
    assert batch.tolist() == [1, pytest.approx(ao)]  # exactly 1: no rounding
    with pytest.raises(ValueError):
        ev.average_overlap(a, b, len(a) + 1)


def test_rankings_break_ties_by_index_whatever_the_place_and_the_chunk():
    # Few vectors are different: the tie rule decides nearly every place, also at the borders of
    # chunks. In fp32 a row scores differently at the edge of a block: copies would not tie.
    torch.manual_seed(0)
    signs = torch.randint(2, (80, 4)) - 0.5
    real = F.normalize(torch.randn(71, 512), dim=-1)
    for queries, gallery in ((signs[57:], signs[:57]),
                             (real[30:], real[torch.randint(30, (301,))])):
        scores = (queries.double() @ gallery.double().T * 2**24).round().tolist()
        order = [sorted(range(len(row)), key=lambda i: (-row[i], i)) for row in scores]
        for chunk, k in ((3, 1), (13, 60), (2048, 20)):
            expected = [row[:k] for row in order]
            assert ev.rankings(queries, gallery, k, chunk=chunk).tolist() == expected
    for x, y in zip(ev.unit_grid(queries), ev.unit_grid(gallery)):
        assert (x * y).sum().item() == math.fsum((x * y).tolist())  # no sum is rounded


def test_recall_and_precision_against_a_loop_with_several_right_ones():
    rng = np.random.default_rng(1)
    # 23 texts with one to three right pictures of 9; for the ninth no text is right
    correct = [rng.permutation(8)[:1 + i % 3].tolist() for i in range(23)]
    texts, pictures = (torch.tensor(rng.normal(size=(n, 6))) for n in (23, 9))
    ranked, back = ev.rankings(texts, pictures, 9), ev.rankings(pictures, texts, 23).tolist()
    found = ev.retrieval("x_", ranked, texts, pictures, correct)
    for k in (1, 5, 10):
        hits = [any(i in right for i in row[:k]) for row, right in zip(ranked.tolist(), correct)]
        assert found["x_recall"][f"t2i@{k}"].tolist() == hits
        hits = [any(i in correct[text] for text in back[i][:k])
                for i in dict.fromkeys(sum(correct, []))]
        assert found["x_recall"][f"i2t@{k}"].tolist() == hits
    share = [len(right) / 9 for right in correct]  # all nine are among the first ten
    assert found["x_precision"]["t2i@10"].tolist() == pytest.approx(share)


def test_a_bootstrap_interval_is_as_wide_as_the_normal_law_says():
    values = np.random.default_rng(0).random(400)
    low, high = ev.bootstrap_ci(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.06)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.1 * (high - low))
    assert ev.bootstrap_ci(values) == (low, high) != ev.bootstrap_ci(values, seed=1)
    assert ev.bootstrap_ci([0.1] * 7) == (0.1, 0.1) and ev.bootstrap_ci([0.3]) == (0.3, 0.3)


def test_unrelated_pairs_share_nothing_where_possible():
    pairs = [{"query": f"q{i // 3}", "paraphrase": f"p{i}", "images": [f"{i % 7}", f"x{i % 5}"]}
             for i in range(42)]
    partner = ev.unrelated(pairs, 0).tolist()
    assert partner == ev.unrelated(pairs, 0).tolist() != ev.unrelated(pairs, 1).tolist()
    about = [{pair["query"], *pair["images"]} for pair in pairs]
    assert all(about[i].isdisjoint(about[j]) for i, j in enumerate(partner))
    assert len(set(partner)) > 21  # not the same few for all
    alike = [{"query": "q", "paraphrase": "p"}] * 5
    assert all(i != j for i, j in enumerate(ev.unrelated(alike, 0)))  # never itself


def test_a_tie_between_triplets_is_a_miss_and_prompts_are_averaged():
    vectors = torch.tensor([[1, 0], [3, 4], [4, 3], [3, -4], [-4, 3], [0, 1], [1, 1]])
    model = Namespace(encode_text=lambda texts: vectors[[int(text) for text in texts]])
    found = []
    for texts in ("2146",  # both captions are nearer to each other, and to the picture
                  "0130", "1030",  # the negative is as near to one, and to the picture
                  "2145", "1245"):  # the negative is as near to the picture as one is
        triplet = dict(zip(("caption", "caption2", "negative_caption"), texts), filename="x")
        pictures = {"x": 0}, vectors[[int(texts[3])]]
        part = ev.measure_triplets({"x": [triplet]}, model, pictures, ev.EvalConfig())
        part = part["triplets"]["x"]
        found.append((part["text_only"][0], part["image_text"][0]))
    assert found == [(1, 1), (0, 0), (0, 0), (1, 0), (1, 0)]
    pictures = {"x": 0}, torch.tensor([[10, -0.7]])  # of the first prompts alone 2 is nearer
    part = ev.measure_zeroshot(["2", "3"], {"x": 1}, ["{}", "5"], model, pictures, ev.EvalConfig())
    assert part["zeroshot"]["top1"] == 1


# ---- evaluation: the whole program ---------------------------------------------------------------
def save_model(folder: Path, kind: str, lm: str):
    """A CLIP or SigLIP of two narrow layers with the words of `lm`, and big weights."""
    def make(part, *args, **options):
        return getattr(transformers, f"{kind}{part}")(*args, **options)

    tokenizer = transformers.BertTokenizerFast(  # without a maximum length, as some are
        f"{lm}/vocab.txt", model_input_names=["input_ids", "attention_mask"])
    end = tokenizer.sep_token_id
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=12, eos_token_id=end, **size)
    vision, side = dict(image_size=32, patch_size=16, **size), {"height": 32, "width": 32}
    torch.manual_seed(len(kind))
    model = make("Model", make("Config", text_config=text, vision_config=vision))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    pixels = make("ImageProcessor", size=side, crop_size=side)
    make("Processor", pixels, tokenizer).save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory, lm) -> Path:
    """A folder with two models and a small set of every kind."""
    root = tmp_path_factory.mktemp("world")
    save_model(root / "clip", "CLIP", lm)
    save_model(root / "siglip", "Siglip", lm)
    names = [f"{i:02}.png" for i in range(14)]
    files = [f"images/{'sub/' * (i % 2)}{name}" for i, name in enumerate(names)]
    files += [f"classes/{name}/{i}.png" for name in ("big_cat", "dog") for i in (1, 2)]
    write_pictures(root, *files)
    for seed, name in enumerate(files):
        (root / name).write_bytes(picture(seed, (48, 40), "PNG"))
    (root / "images/broken.jpg").write_bytes(b"\xff\xd8 not much of a picture")
    names.append("lost.png")
    triplets = [{"caption": sentence(i), "caption2": sentence(20 + i), "filename": name,
                 "negative_caption": sentence(40 + i)} for i, name in enumerate(names)]
    triplets[0]["caption"] = "red dog " * 9  # more than the models have places for
    triplets[1]["images"] = names[1:4]  # several are right
    coco = {"images": [{"id": i, "file_name": name} for i, name in enumerate(names[5:])],
            "annotations": [{"image_id": i % 10, "caption": sentence(i)} for i in range(27)]}
    sts = [f"{sentence(i)},{sentence(20 + i)},{i % 6}" for i in range(12)]
    for name, text in (("triplets.json", json.dumps(triplets)), ("sts.csv", "\n".join(sts)),
                       ("captions.json", json.dumps(coco)), ("templates.txt", "{}\nthe {}\n"),
                       ("one.csv", "a dog,a cat,1\na dog,a square,1\n")):
        (root / name).write_text(text)
    # models that are not what they seem
    for name in ("weights", "tokenizer", "remote", "nan"):
        shutil.copytree(root / "clip", root / name)
    model = transformers.CLIPModel.from_pretrained(root / "clip")
    kept = {key: value for key, value in model.state_dict().items() if "vision" not in key}
    model.save_pretrained(root / "weights", state_dict=kept)
    model.text_projection.weight.data.fill_(math.nan)
    model.save_pretrained(root / "nan")
    for file in (root / "tokenizer").glob("tokenizer*"):
        file.unlink()
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (root / "remote/config.json").write_text(json.dumps(config))
    (root / "remote/code.py").write_text("open('ran', 'w')")
    return root


def everything(root: Path) -> list:
    files = dict(pairs="triplets.json", triplets="triplets.json", captions="captions.json",
                 sts="sts.csv", templates="templates.txt", images="images", zeroshot="classes")
    return flags(k=5, **{name: root / file for name, file in files.items()})


def test_everything_in_one_call(world, tmp_path, capsys):
    files = {"json": tmp_path / "x.json", "figure": tmp_path / "x.png"}
    argv = [world / "siglip", *everything(world), *flags(**files)]
    clip, siglip = evaluate(capsys, world / "clip", *argv)
    assert json.loads(files["json"].read_text()) == [clip, siglip] and files["figure"].is_file()
    assert not torch.backends.cudnn.allow_tf32  # fp32 on CUDA as on a CPU
    assert (clip["k"], clip["gallery"], clip["pairs"], "split" in clip) == (5, 14, 15, False)
    assert clip["recall_pairs"] == 14  # one picture is not there
    assert clip["triplets"]["triplets.json"]["image_text_n"] == 14
    assert clip["captions"] == {"images": 9, "captions": 25, "missing": 1}
    assert (clip["zeroshot"]["classes"], clip["zeroshot"]["images"]) == (2, 4)
    for name in ("ao", "js", "ao_random", "js_random"):
        low, high = clip[f"{name}_ci"]
        assert 0 <= low <= clip[name] <= high <= 1
    diff = siglip["diff"]
    assert diff["ao"] == pytest.approx(siglip["ao"] - clip["ao"], abs=1e-12)
    assert diff["zeroshot"].keys() == {"top1", "top1_ci", "top5", "top5_ci"}
    assert diff.keys().isdisjoint({"k", "pairs", "captions", "sts"})


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_numbers_equal_those_of_the_library_used_by_hand(world, capsys, kind):
    report, = evaluate(capsys, world / kind, *everything(world), "--batch-size", 3)
    assert last_json(capsys, ev, world / kind, *everything(world)) == [report]
    model = transformers.AutoModel.from_pretrained(world / kind).eval()
    processor = transformers.AutoProcessor.from_pretrained(world / kind)
    # one at a time: no padding for CLIP, padding to all 12 places for SigLIP
    fill = dict(padding="max_length", return_attention_mask=False) if kind == "siglip" else {}

    def unit(output):
        return F.normalize(output.pooler_output[0].detach().double(), dim=-1)

    def of_text(text):
        return unit(model.get_text_features(**processor.tokenizer(
            text, max_length=12, truncation=True, return_tensors="pt", **fill)))

    def of_picture(file):
        pixels = processor.image_processor(Image.open(file), return_tensors="pt")
        return unit(model.get_image_features(**pixels))

    order = sorted(world.glob("images/**/*.png"), key=lambda file: file.relative_to(world).parts)
    pictures = torch.stack([of_picture(file) for file in order])
    ranked, hits = [], {"query_recall": [], "paraphrase_recall": []}
    for item in json.loads((world / "triplets.json").read_text()):
        for name, field in zip(hits, ("caption", "caption2")):
            ranked.append((pictures @ of_text(item[field])).argsort(descending=True).tolist())
            if item["filename"] != "lost.png":
                first = {order[i].name for i in ranked[-1][:5]}
                hits[name].append(not first.isdisjoint(item.get("images", [item["filename"]])))
    for name, found in hits.items():
        assert report[name]["t2i@5"] == pytest.approx(np.mean(found))
    overlap = [len({*a[:d]} & {*b[:d]}) / d for a, b in zip(ranked[::2], ranked[1::2])
               for d in range(1, 6)]
    assert report["ao"] == pytest.approx(np.mean(overlap))

    names = ["big cat", "dog"]
    classes = [F.normalize(of_text(name) + of_text(f"the {name}"), dim=-1) for name in names]
    nearest = [int((torch.stack(classes) @ of_picture(file)).argmax())
               for file in sorted(world.glob("classes/*/*.png"))]
    assert report["zeroshot"]["top1"] == np.mean(np.array(nearest) == [0, 0, 1, 1])
    rows = [line.split(",") for line in (world / "sts.csv").read_text().splitlines()]
    columns = [of_text(a) @ of_text(b) for a, b, _ in rows], [int(score) for *_, score in rows]
    ranks = [[sum(w < v for w in column) + sum(w <= v for w in column) for v in column]
             for column in columns]  # twice the mean rank
    assert report["sts"]["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_what_is_left_out_is_told(world, capsys, monkeypatch):
    monkeypatch.chdir(world)

    def without_the_first(model, gallery, cfg, embed=ev.embed_pictures, calls=[]):
        calls.append(model)
        names = list(gallery)[len(calls) - 1:]
        return embed(model, {name: gallery[name] for name in names}, cfg)
    monkeypatch.setattr(ev, "embed_pictures", without_the_first)
    call(ev, "clip", "siglip", "--pairs", "triplets.json", "--images", "images", "--workers", 0)
    shown = capsys.readouterr()
    assert "1 of 15 named pictures are not there, such as lost.png" in shown.err
    assert "skipped 1 of 15 pictures: broken.jpg: " in shown.err
    # two models that read different pictures are not compared query by query
    assert "siglip and clip can read different pictures" in shown.err
    assert "diff" not in json.loads(shown.out.splitlines()[-1])[1]


@pytest.mark.parametrize("arguments, complaint", [
    ("", "run `python paraclip.py` first"), ("nowhere.pt", "nowhere.pt"),
    ("remote --sts sts.csv", "remote"),  # it brings code of its own
    ("bert --sts sts.csv", "lm0"),  # it has no image tower
    ("weights --sts sts.csv", "weights are missing"),  # once they were random numbers
    ("tokenizer --sts sts.csv", "tokenizer"),  # once all words were the same
    ("nan --sts sts.csv", "finite numbers"),
    ("clip --captions captions.json --images classes", "none of the 10 named"),
    ("clip --images images", "what to search for"),
    ("clip --sts one.csv", "one.csv: equal scores"),
    ("clip --sts sts.csv --k 0", "--k 0")])
def test_mistakes_in_evaluation_are_told(world, lm, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(world)
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    assert complaint in mistake(capsys, ev, *arguments.replace("bert", lm).split())
    assert not Path("ran").exists()


def test_damaged_files_give_numbers_or_one_line(world, tmp_path, monkeypatch, capsys):
    model = ev.HuggingFaceCLIP(world / "clip", "fp32").eval()
    monkeypatch.setattr(ev, "HuggingFaceCLIP", lambda name, precision: model)
    monkeypatch.setattr(ev, "bootstrap_ci", lambda values, seed: (min(values), max(values)))
    root = shutil.copytree(world, tmp_path / "copy")
    files = [Path(file) for file in everything(root)]
    files = {file: file.read_bytes() for file in files if file.is_file()}
    rng, ended = random.Random(FUZZ_SEED), Counter()
    for _ in range(2 * FUZZ_CASES):
        file = rng.choice(list(files))
        parts = re.findall(rb'"[^"]*"|\d+|,', files[file]) or [b"0"]
        other = rng.choice([b"null", b"-1", b"[]", b"{}", b"NaN", b'"\\ud800"', b"[" * 9000, b'""'])
        file.write_bytes(rng.choice([
            damage(files[file], rng), files[file].replace(rng.choice(parts), other)]))
        try:
            call(ev, root / "clip", *everything(root), "--workers", 0)
            ended[0] += 1
        except SystemExit as stop:
            lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
            assert len(lines) == 1, (file, lines)
            ended[stop.code] += 1
        file.write_bytes(files[file])
    assert set(ended) == {0, 2} and min(ended.values()) > 10
