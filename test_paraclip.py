"""Tests of paraclip in the order of its files: data, model, training, evaluation. CPU only, no hub.

Each compares with something independent: numbers worked by hand, a library's model with the same
weights, a slow and obvious twin, one process against several, an uninterrupted run against a
killed one. `pytest` also runs the tests below benchmark/.
"""

import dataclasses
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
from argparse import Namespace
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F

import data
import eval_paraphrase as ev
import paraclip
from benchmark import laptop
from data import BadSample, ShardIndex, UserError
from paraclip import Config, ParaCLIP, ViT, contrastive_loss, load_model

HERE = Path(__file__).parent
WORDS = "a red blue green circle square dog cat on the left of right above below small big ."
WORDS = WORDS.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
TINY = dict(image_size=16, patch_size=8, width=32, depth=2, heads=2, embed_dim=16, batch_size=16,
            precision="fp32", warmup=2, steps=4, workers=0, save_every=100)
pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding and encoding"),
              pytest.mark.filterwarnings("ignore:This DataLoader will create")]


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("PARACLIP_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def lm(tmp_path_factory) -> str:
    """Folder of a tiny BERT with random weights and a word tokenizer."""
    folder, words = tmp_path_factory.mktemp("lm"), [*WORDS, *SPECIAL]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, pad_token_id=words.index("[PAD]"))
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def picture(seed: int, size=(20, 18), kind="JPEG", mode="RGB", **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (3, 3, 3), dtype=np.uint8)
    out = io.BytesIO()
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    image.convert(mode).save(out, kind, **options)
    return out.getvalue()


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


def shards(folder: Path, counts: list[int]) -> str:
    """Shards of these many samples; sample i has picture(i) and a caption that ends in i."""
    first = 0
    for number, count in enumerate(counts):
        members = [member for i in range(first, first + count) for member in sample(i)]
        write_tar(folder / f"{number:05d}.tar", members)
        first += count
    return str(folder)


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


def evaluate(capsys, *argv) -> list[dict]:
    """The JSON that ends the output of eval_paraphrase.py."""
    capsys.readouterr()
    call(ev, *argv, "--workers", 0)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def train(lm: str, folder: str, out: Path, **fields) -> Path:
    """The run folder of a tiny model trained for a few steps on shards."""
    paraclip.train(Config(**TINY | dict(data=folder, lm=lm, out=str(out)) | fields))
    return out
# ---- what all programs share ---------------------------------------------------------------------
flag = data.flag


@dataclasses.dataclass
class Flags:
    recipe: str = flag("", "whose defaults", choices=("small", "large"))
    data: str = flag("small", "shards")
    steps: int = flag(10, "100 % of them", at_least=1)
    lr: float = flag(0.1, "peak", above=0, at_most=1)
    files: list = flag([], "files")
    decay: float = flag(0.0, "has no range")

    def __post_init__(self):
        data.check_ranges(self)


def test_flags_come_from_the_command_line_then_the_recipe_then_the_field(capsys):
    def parse(line: str) -> Flags:
        return data.parse_config(Flags, line.split(), {"large": {"steps": 1000, "lr": 1}})
    assert parse("--data large --lr 0.5") == Flags("", "large", 1000, 0.5, [])
    assert parse("--recipe large --data x").steps == 1000
    assert parse("--recipe small --data large").steps == 10
    assert parse("--files a b").files == ["a", "b"] and not Flags().files
    with pytest.raises(SystemExit):
        parse("--help")
    help = " ".join(capsys.readouterr().out.split())
    assert "100 % of them (default: 10; at least 1)" in help
    for line, complaint in {
            "--steps 0": "--steps 0: expected at least 1", "--steps 1.5": "invalid int",
            "--lr 0": "--lr 0.0: expected above 0, at most 1", "--lr 2": "at most 1",
            "--lr nan": "--lr nan: expected", "--decay inf": "--decay inf: expected a number",
            "--recipe none": "invalid choice",
            "--step 3": "unrecognized arguments: --step"}.items():
        with pytest.raises(UserError, match=complaint):
            parse(line)
    for fields in (dict(steps="9"), dict(steps=1.5), dict(lr=math.nan), dict(recipe="none")):
        with pytest.raises(UserError, match="expected"):
            Flags(**fields)  # made by hand, or read from a checkpoint


def raising(error):
    def program():
        raise error
    return program


@pytest.mark.parametrize("error, status, line", [
    (UserError("no such\n thing"), 2, "error: no such thing"),
    (FileNotFoundError(2, "No such file", "a.txt"), 2, "error: a.txt: No such file"),
    (UserError("Caught UserError in worker 0.\nTraceback (most recent call last):\n  x\n"
               "data.UserError: all: gone"), 2, "error: all: gone"),
    (RuntimeError("DataLoader worker is killed by signal: Bus error."), 2,
     "error: DataLoader worker is killed by signal: Bus error.; fewer --workers need less memory, "
     "docker needs --ipc=host"),
    (KeyboardInterrupt(), 130, "interrupted"), (RuntimeError("shapes differ"), None, None),
    (KeyError("a bug"), None, None)])
def test_what_a_user_can_cause_ends_in_one_line(capsys, monkeypatch, error, status, line):
    waited = []
    monkeypatch.setattr(data.time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "3")  # waits for the ranks before it, then speaks as well
    with pytest.raises(SystemExit if line else type(error)) as stop:
        data.run(raising(error))
    if line:
        assert stop.value.code == status and waited == [6]
        assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize("words", [99_999, 1])  # the pipe is met while printing, or at the end
def test_a_closed_pipe_and_an_ascii_terminal_are_no_tracebacks(tmp_path, words):
    end, start = os.pipe()

    def child():
        os.dup2(start, 1)
        os.close(end)
        sys.stdout, sys.stderr = open(1, "w", encoding="ascii"), open(tmp_path / "stderr", "w")
        data.run(lambda: print("\u00b1 5" * words))
        os._exit(0)
    process = multiprocessing.get_context("fork").Process(target=child)
    if words == 1:
        os.close(end)
        end = os.open(os.devnull, os.O_RDONLY)
    process.start()
    assert os.read(end, 4) == (b"? 5?" if words > 1 else b"")
    os.close(end)
    process.join(60)
    assert process.exitcode == 1 and (tmp_path / "stderr").read_text() == ""


def test_replacing_keeps_the_former_file_and_cleans_up_after_the_killed(tmp_path):
    file, process = tmp_path / "f.pt", subprocess.Popen(["true"])
    process.wait()
    (tmp_path / f"f.pt.{process.pid}.tmp").write_text("of a writer that is gone")
    others = {tmp_path / name for name in (f"f.pt.{os.getppid()}.tmp", "g.pt.1.tmp", "f.pt.x.tmp")}
    for other in others:
        other.touch()
    with data.replacing(file) as out:
        out.write(b"old")
    with pytest.raises(OSError, match="f.pt'$"), data.replacing(file) as out:
        out.write(b"new")
        raise OSError(28, "No space left on device")
    assert file.read_bytes() == b"old" and {*tmp_path.iterdir()} == {file} | others


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
    for name in (str(tmp_path / "nowhere"), "00000.tar::"):  # "" is not the working directory
        with pytest.raises(UserError, match="no .tar file at"):
            data.find_shards(name)
    monkeypatch.setenv("PARACLIP_DATA", str(tmp_path))
    with pytest.raises(UserError, match="img2dataset.*pixparse/cc12m-wds"):
        data.find_shards("cc12m")
    copy = write_tar(tmp_path / "cc12m" / "cc12m-train-0000.tar", sample(0))  # ready-made naming
    assert data.find_shards("cc12m") == [copy]


def huge_png() -> bytes:
    """A PNG of a few bytes whose header says 30,000 x 30,000."""
    def chunk(name, body):
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


def test_every_fault_is_skipped_and_counted_and_nothing_is_mispaired(tmp_path):
    jpg, png, webp = picture(7), picture(8, kind="PNG"), picture(10, kind="WEBP")
    path = write_tar(tmp_path / "00000.tar", [
        ("b.txt", b"of b"), ("a.JPG", jpg), ("x/a.png", png), ("a.txt", b"\xef\xbb\xbfof a"),
        ("b.jpeg", picture(9)), ("x/a.txt", b"of x/a"), ("a.cls", b"3"),
        ("../../out.jpg", jpg), ("../../out.txt", b"of out"),  # only a key: never unpacked
        ("dot.v2.webp", webp), ("dot.v2.json", b'{"caption": "of dot"}'),
        ("utf.jpg", jpg), ("utf.txt", b"caf\xe9"),  # not UTF-8: replaced
        ("half.jpg", jpg), ("half.json", b'{"caption": "half an emoji \\ud83d"}'),
        ("lonely.jpg", jpg), ("only.txt", b"no picture"), ("zero.jpg", b""), ("zero.txt", b"none"),
        ("white.jpg", jpg), ("white.txt", b" \n\t "), ("null.jpg", jpg),
        ("null.json", b'{"caption": null}'), ("bad.jpg", jpg), ("bad.json", b'{"caption'),
        ("a.jpg", picture(11)), ("cut.jpg", jpg[:-30]), ("cut.txt", b"cut"), ("lnk.txt", b"link"),
        ("text.jpg", b"<html>"), ("text.txt", b"text"), ("huge.png", huge_png()),
        ("huge.txt", b"huge")])
    link = tarfile.TarInfo("lnk.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(path, "a") as tar:
        tar.addfile(link)
    keys, _, skipped, extensions = data.index_shard(path)
    assert keys == ["a", "x/a", "b", "../../out", "dot.v2", "utf", "half", "cut", "text", "huge"]
    assert skipped == {"link or special member": 1, "no caption": 1, "empty caption": 1,
                       "no caption in json": 1, "broken json": 1, "empty image": 1,
                       "duplicate key": 1, "no image": 1}
    assert extensions["cls"] == 1 and extensions["jpg"] == 13

    four = [member for i in range(20, 24) for member in sample(i)]
    whole = write_tar(tmp_path / "00003.tar", four).read_bytes()
    first = whole.index(b"00021.jpg")  # the header of the second sample
    for number, content in enumerate((
            b"", b"this is no tar" * 100, whole[:first + 100],  # breaks off within a header
            whole[:first + 600], whole[:first],  # within a picture, between two members
            whole[:first] + b"?" * 2048), 1):  # a garbled header
        (tmp_path / f"0000{number}.tar").write_bytes(content)
    os.mkdir(tmp_path / "00007.tar")
    index = ShardIndex(str(tmp_path))
    found = {index.caption(i): index.image(i) for i in range(len(index))}
    assert found["of a"] == found["caf\ufffd"] == found["half an emoji ?"] == jpg
    assert found["of b"] == picture(9) and found["of x/a"] == png and found["of dot"] == webp
    assert index.skipped == skipped + Counter({
        "not a tar": 1, "unreadable shard": 1, "empty shard": 1, "truncated shard": 3,
        "broken tar header": 1})
    assert len(index) == 10 + 4 and found[sentence(20)] == picture(20)
    reasons = {}
    for caption, content in found.items():
        try:
            data.decode_image(content)
        except BadSample as reason:
            reasons[caption] = str(reason)
    assert reasons == {"cut": "broken image", "text": "not a picture", "huge": "too many pixels"}


@pytest.mark.parametrize("pax", [{}, {"GNU.sparse.size": "99"}])
def test_a_header_that_leads_backwards_ends_the_shard(tmp_path, pax):
    member = tarfile.TarInfo("b.jpg")
    member.pax_headers = pax  # a second size may hide that the first one is negative
    header = bytearray(member.tobuf(tarfile.PAX_FORMAT))
    header[-388:-376] = (-512 - len(header) * bool(pax)).to_bytes(12, "big", signed=True)
    header[-364:-356] = b" " * 8
    header[-364:-356] = b"%06o\0 " % sum(header[-512:])
    path = write_tar(tmp_path / "0.tar", sample(0))
    used = sum(512 - len(content) // -512 * 512 for _, content in sample(0))
    path.write_bytes(path.read_bytes()[:used] + header + bytes(1024))
    process = multiprocessing.Process(target=data.index_shard, args=(path,), daemon=True)
    process.start()
    process.join(20)
    assert process.exitcode == 0, "it goes round and round"
    keys, _, skipped, _ = data.index_shard(path)
    assert keys == ["00000"] and skipped == {"broken tar header": 1}


def test_an_index_is_small_follows_its_shards_and_knows_its_data(tmp_path):
    folder = shards(tmp_path / "s", [5, 3])
    index = ShardIndex(folder, workers=2)
    assert index.entries.nbytes == 24 * 8 and isinstance(index.entries, np.memmap)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert ShardIndex(str(copy)).fingerprint == index.fingerprint
    for summary in (tmp_path / "cache").glob("*.json"):  # damaged, but JSON and of the same sum
        summary.write_text(summary.read_text().replace("[5, 3]", "[3, 5]"))
    assert [ShardIndex(folder).caption(i) for i in range(8)] == [sentence(i) for i in range(8)]
    path = tmp_path / "s" / "00000.tar"
    status, caption = os.stat(path), sentence(0).encode()
    other = tmp_path / "other"  # takes its place, of the same size and time
    other.write_bytes(path.read_bytes().replace(caption, b" " * len(caption)))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)
    assert len(ShardIndex(folder)) == 7 and ShardIndex(folder).fingerprint != index.fingerprint
    write_tar(tmp_path / "0.tar", [("a.jpg", picture(0)), ("a.cls", b"1"), ("b.npy", b"1")])
    with pytest.raises(UserError, match=r"no usable sample.*'no caption': 1.*'cls': 1.*'npy': 1"):
        ShardIndex(str(tmp_path / "0.tar"))


def test_a_passing_fault_of_a_disk_is_not_remembered(tmp_path, monkeypatch):
    folder, good = shards(tmp_path / "s", [3, 3]), os.pread

    def failing(descriptor, *span):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("0.tar"):
            raise OSError(5, "Input/output error")
        return good(descriptor, *span)
    monkeypatch.setattr(os, "pread", failing)
    index = ShardIndex(folder)
    assert len(index) == 3 and index.skipped == {"unreadable shard": 4}
    monkeypatch.setattr(os, "pread", good)
    assert len(ShardIndex(folder)) == 6 and not ShardIndex(folder).skipped
    assert index.caption(2) == sentence(5)  # a process that still has the former one reads right


# ---- data: pictures ------------------------------------------------------------------------------
def refusing(encoded, mode):
    raise RuntimeError("no")


@pytest.fixture(params=[data.decode_jpeg, refusing, None])  # torchvision's, then Pillow's
def decoder(request, monkeypatch):
    monkeypatch.setattr(data, "decode_jpeg", request.param)


def saved(image: Image.Image, kind="PNG") -> bytes:
    image.save(out := io.BytesIO(), kind)
    return out.getvalue()


@pytest.mark.parametrize("kind, mode", [
    ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1"),
    ("WEBP", "RGB"), ("GIF", "P"), ("BMP", "RGB")])
def test_decoding_agrees_with_pillow_for_every_kind_of_picture(decoder, kind, mode):
    content = picture(3, kind=kind, mode=mode)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(data.decode_image(content).numpy(), expected)


def test_all_see_a_picture_turned_on_white_and_16_bit_grey_unclipped(decoder):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to view
    turned, stored = (picture(1, (30, 10), **options) for options in (dict(exif=exif), {}))
    clear = saved(Image.new("RGBA", (4, 4), (200, 0, 0, 0)))
    grey = saved(Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)))
    upright = np.rot90(np.asarray(Image.open(io.BytesIO(stored))), k=-1)
    for content, expected in ((turned, upright), (clear, np.full((4, 4, 3), 255)),
                              (grey, np.full((4, 4, 3), 128))):
        assert np.array_equal(data.decode_image(content).numpy().transpose(1, 2, 0), expected)
        # ... and so does a library's user, who opens it without us
        direct = data.center_crop(Image.open(io.BytesIO(content)), 4)
        assert torch.equal(direct, data.center_crop(Image.fromarray(np.uint8(expected)), 4))


def test_a_picture_is_refused_by_the_size_that_its_decoder_sees_and_by_its_format(monkeypatch):
    jpeg = picture(0)
    at = jpeg.index(b"\xff\xc0")  # the header with the size
    monkeypatch.setattr(data, "MAX_PIXELS", 20 * 18 - 1)
    small = b"\xff\xff\xc0\x00\x11\x08\x00\x08\x00\x08"  # a false one, if fill bytes are misread
    for planted in (b"", b"\xff", b"\xff\x01", small + bytes(9)):
        with pytest.raises(BadSample, match="too many pixels|not a picture"):
            data.decode_image(jpeg[:at] + planted + jpeg[at:])
    tiff = saved(Image.new("RGB", (9, 9)), "TIFF")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    monkeypatch.setattr(Image.Image, "load", lambda *args: pytest.fail("decoded"))
    for content in (eps, tiff):  # EPS would run Ghostscript
        with pytest.raises(BadSample, match="not a picture"):
            data.decode_image(content)


def test_a_random_crop_is_one_box_with_the_share_and_shape_it_promises():
    ramp = torch.stack([torch.arange(200).expand(100, 200), torch.zeros(100, 200),
                        torch.arange(100)[:, None].expand(100, 200)]).to(torch.uint8)
    rng, shares, ratios = random.Random(0), [], []
    for _ in range(300):
        crop = data.random_crop(ramp, 32, 0.3, rng).double()  # red tells the column, blue the row
        assert (crop[0] == crop[0, :1]).all() and (crop[2] == crop[2, :, :1]).all()
        w, h = ((crop[i].max() - crop[i].min()).item() * 32 / 31 for i in (0, 2))
        shares.append(w * h / 20_000)
        ratios.append(w / h)
        assert 0 <= crop[0, 0, 0] and crop[0].max() <= 199 and crop[2].max() <= 99
    assert 0.28 < min(shares) < 0.35 and 0.7 < max(shares) < 0.82  # of 2:1 no box takes more
    assert 0.70 < min(ratios) < 0.80 and 1.3 < max(ratios) < 1.64  # cut off at its height
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(64).expand(3, 128, 128)
    crops = torch.stack([data.random_crop(stripes, 16, 0.5, rng) for _ in range(20)])
    assert 100 < crops.min() <= crops.max() < 155  # shrunk with a filter, no columns left out


# ---- data: order and loader ----------------------------------------------------------------------
def test_an_epoch_is_a_permutation_that_mixes_and_reads_in_blocks(monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 1000)
    n, block = 5003, 10
    order = {key: np.array([*data.epoch_order(n, block, *key)]) for key in ((0, 0), (1, 0), (0, 1))}
    first, other, later = order.values()
    assert [*first] == [*data.epoch_order(n, block, 0, 0)]
    assert sorted(first) == sorted(other) == sorted(later) == list(range(n))
    assert (first == other).mean() < 0.01 and (first == later).mean() < 0.01
    once, twice = (np.array([*data.epoch_order(50, 50, 0, epoch)]) for epoch in (0, 1))
    assert (once == twice).mean() < 0.3  # one block: all the mixing is the window's
    window = first[:1000]
    assert len(set(window // block)) <= 101  # whole blocks: a window's bytes are long stretches
    assert np.abs(np.diff(window)).mean() > n / 5  # ... from all over the set, mixed


def as_codes(captions: list[str]) -> dict:
    """A tokenizer whose tokens are letters."""
    rows = [torch.tensor([ord(letter) for letter in caption]) for caption in captions]
    return {"ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}


def load(index, start=0, steps=8, world=1, **options) -> list:
    """[({caption: image}, {reason: count})] of the global batches."""
    batches = [({}, Counter()) for _ in range(start, steps)]
    for rank in range(world):
        loader = data.training_loader(index, **dict(
            batch_size=8, accum=1, seed=0, start=start, steps=steps, rank=rank, world=world,
            image_size=8, crop=1.0, workers=0, tokenize=as_codes) | options)
        for (pairs, counts), (parts, failed) in zip(batches, loader, strict=True):
            counts.update(failed)
            for images, groups in parts:
                rows = [row for group in groups for row in group["ids"]]
                pairs |= zip(["".join(map(chr, row[row > 0])) for row in rows], images, strict=True)
    return batches


@pytest.mark.parametrize("world, workers, accum", [(1, 3, 2), (2, 0, 4), (4, 2, 1)])
def test_each_sample_is_seen_once_over_ranks_and_workers_with_its_own_caption(
        tmp_path, world, workers, accum):
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


def test_captions_are_tokenized_in_groups_of_like_length(monkeypatch):
    monkeypatch.setattr(data, "MIN_GROUP", 3)
    samples = [(torch.tensor(i), "x" * (17 * i % 40 + 1), None) for i in range(40)]
    parts, failed = data.collate(samples, accum=2, tokenize=as_codes)
    for images, groups in parts:  # 20 pairs each, in at most four groups
        lengths = [int((row > 0).sum()) for group in groups for row in group["ids"]]
        assert lengths == sorted(lengths) == [17 * i % 40 + 1 for i in images.tolist()]
        assert [group["ids"].shape for group in groups] == [(5, n) for n in lengths[4::5]]
    parts, _ = data.collate(samples[:10], accum=2, tokenize=as_codes)
    assert [len(group["ids"]) for group in parts[0][1]] == [3, 2] and failed == {}


def junk(i: int) -> list[tuple[str, bytes]]:
    return [(f"{i:05d}.jpg", b"junk"), (f"{i:05d}.txt", b"junk")]


def test_a_picture_that_proves_bad_is_replaced_the_same_way_each_time_and_counted(
        tmp_path, monkeypatch):
    members = [member for i in range(16) for member in (sample(i) if i % 4 else junk(i))]
    index = ShardIndex(str(write_tar(tmp_path / "0.tar", members)))
    (pairs, failed), = load(index, steps=1, batch_size=16, crop=0.5)
    assert failed == {"not a picture": 4}
    assert pairs.keys() == {sentence(i) for i in range(16) if i % 4}
    (again, _), = load(index, steps=1, batch_size=16, crop=0.5, workers=2)
    assert pairs.keys() == again.keys()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *device: tensor)  # wants CUDA
    batch = data.collate([(torch.zeros(3, 2, 2), "a", reason) for reason in "xxyz"], 1, as_codes)
    _, failed = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert failed == {"x": 2, "y": 1, "z": 1}  # as a Counter they would be doubled


def test_a_loader_process_that_dies_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    index = ShardIndex(shards(tmp_path / "s", [16]))
    monkeypatch.setattr(data, "collate", lambda *_, **options: os.kill(os.getpid(), signal.SIGBUS))
    with pytest.raises(SystemExit):
        data.run(lambda: load(index, workers=1))
    message = capsys.readouterr().err
    assert re.fullmatch("error: DataLoader worker .*; fewer --workers.*--ipc=host\n", message)


def test_data_program_inspects_a_set(tmp_path, capsys):
    folder = Path(shards(tmp_path / "s", [20, 20]))
    write_tar(folder / "00002.tar", [*junk(99), ("b.jpg", picture(0))])
    call(data, folder, "--batch-size", 16, "--image-size", 16, "--workers", 0)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == {"shards": 3, "samples": 40, "steps_per_epoch": 2, "decoded": 41,
                      "skipped": {"no caption": 1, "not a picture": 1},
                      "keys": {"jpg": 42, "txt": 41}, "images_per_s": None}  # all in one batch
    broken = write_tar(tmp_path / "0.tar", [member for i in range(130) for member in junk(i)])
    call(data, broken, "--image-size", 16)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["samples"] == 0 and report["skipped"] == {"not a picture": 130}
    with pytest.raises(UserError, match="100 samples in a row.*not a picture.*data.py PATH"):
        load(ShardIndex(str(broken)))
    assert "no .tar file" in mistake(capsys, data, tmp_path / "none")
    assert "--workers -1: expected at least 0" in mistake(capsys, data, folder, "--workers", -1)


def damage(content: bytes, rng: random.Random) -> bytes:
    """The same bytes with a fault: flipped, cut, emptied, or two parts swapped or one taken out."""
    a, b, c = sorted(rng.randrange(len(content) + 1) for _ in range(3))
    return rng.choice([
        bytes(byte ^ (rng.random() < 0.002) << rng.randrange(8) for byte in content),
        content[:a] + bytes([rng.randrange(256)]) + content[a + 1:], content[:a], b"",
        content[:a] + content[b:c] + content[a:b] + content[c:], content[:a] + content[b:]])


def check_damage(folder: Path, cache: Path, rng: random.Random):
    """One of three shards is damaged, then what is kept of the index."""
    own = {sentence(i): picture(i) for i in range(12)}
    path = Path(shards(folder, [4, 4, 4])) / f"0000{rng.randrange(3)}.tar"
    path.write_bytes(damage(path.read_bytes(), rng))
    index = ShardIndex(str(folder))
    before = [(index.caption(i), index.image(i)) for i in range(len(index))]
    assert len(index) >= 8
    for caption, content in before:  # if neither is damaged itself, they belong together
        assert caption not in own or content not in own.values() or own[caption] == content
        try:
            data.decode_image(content)
        except BadSample:
            pass
    cached = sorted(cache.iterdir())
    for file in rng.sample(cached, rng.randint(1, len(cached))):
        file.unlink() if rng.random() < 0.2 else file.write_bytes(damage(file.read_bytes(), rng))
    again = ShardIndex(str(folder))
    assert [(again.caption(i), again.image(i)) for i in range(len(again))] == before
    assert (again.fingerprint, again.skipped) == (index.fingerprint, index.skipped)


def test_damage_never_gives_a_traceback_a_hang_or_a_wrong_pair(tmp_path, monkeypatch):
    monkeypatch.setenv("PARACLIP_CACHE", str(tmp_path / "cache"))
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    first = int(os.environ.get("FUZZ_SEED", 0))
    for seed in range(first, first + int(os.environ.get("FUZZ_CASES", 40))):
        signal.alarm(60)
        check_damage(tmp_path / "s", tmp_path / "cache", random.Random(seed))
        signal.alarm(0)
        data.open_shard.cache_clear()
        for folder in ("s", "cache"):
            shutil.rmtree(tmp_path / folder)


# ---- data: readers of evaluation files -----------------------------------------------------------
PAIR = {"query": "q", "paraphrase": "p"}
COCO = '{"images": [{"id": 5, "file_name": "a"}], "annotations": [{"image_id": 5, "caption": %s}]}'


@pytest.mark.parametrize("reader, text, expected", [
    (data.read_pairs, json.dumps([PAIR]), [PAIR]),
    (data.read_pairs, "\ufeff" + json.dumps(PAIR) + "\r\n\n" + json.dumps(PAIR), [PAIR, PAIR]),
    (data.read_pairs, '{"caption": "q\\ud83d", "caption2": "p", "filename": "1"}', [
        {"caption": "q\ud83d", "caption2": "p", "filename": "1", "query": "q?", "paraphrase": "p",
         "image": "1"}]),
    (data.read_pairs, json.dumps(PAIR | {"images": ["a"]}), [PAIR | {"images": ["a"]}]),
    (data.read_pairs, json.dumps(PAIR) + "\n\n{", "line 3: not JSON"),
    (data.read_pairs, "[" * 99_999, "not JSON"), (data.read_pairs, "", "empty"),
    (data.read_pairs, "[5]", "item 1: expected an object"),
    (data.read_pairs, '{"query": "q"}', 'line 1: no text under "paraphrase".*found: query'),
    (data.read_pairs, json.dumps(PAIR | {"image": ["a"]}), '"image" must be a name'),
    (data.read_pairs, json.dumps(PAIR | {"images": "a"}), "a list of names"),
    (data.read_pairs, b"\xff\xfe{\0", "not UTF-8"), (data.read_sts, b"a\xe9,b,1", "not UTF-8"),
    (data.read_triplets, '{"caption": "a", "caption2": "b"}', 'no text under "negative_caption"'),
    (data.read_captions, COCO % '"x"', {"a": ["x"]}), (data.read_captions, "[]", "not a COCO"),
    (data.read_captions, COCO % "null", "not a COCO.*no text"),
    (data.read_sts, 'a,"b, c",1\nd,e,2.5\n', [("a", "b, c", 1.0), ("d", "e", 2.5)]),
    (data.read_sts, 'id\tScore\tsentence1\tsentence2\n7\t3\ta\t"b\n', [("a", '"b', 3.0)]),
    (data.read_sts, "a,b,1\nc,d,nan", "line 2: .*finite number"), (data.read_sts, "a,b", "line 1"),
    (data.read_sts, "a,b," + "9" * 140_000, "line 1"),
    (data.read_sts, "sentence1,sentence2,score\n", "no rows"),
    (data.read_templates, "a {}\n\nof {} b\n", ["a {}", "of {} b"]),
    (data.read_templates, "a {}\n\nno place\n", "line 3: a template needs"),
    (data.read_templates, "", "line 1: a template needs")])
def test_evaluation_files_are_read_or_refused_with_their_place(tmp_path, reader, text, expected):
    file = tmp_path / "file"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    if isinstance(expected, str):
        with pytest.raises(UserError, match=f"{file}.*{expected}"):
            reader(file)
    else:
        assert reader(file) == expected


def write_pictures(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(0))
    return str(folder)


def test_pictures_are_listed_in_order_through_links_and_without_hidden_ones(tmp_path):
    folder = tmp_path / "f"
    write_pictures(folder, "b/2.PNG", "b/1.jpg", "a.webp", "c.txt", "b/deep/x.JPEG", ".hid/1.jpg",
                   "b/.y.jpg", "../far/1.png")
    (folder / "link").symlink_to(tmp_path / "far")
    (folder / "b" / "loop").symlink_to(folder)
    gallery = data.list_pictures(folder)
    assert list(gallery) == ["a.webp", "b/1.jpg", "b/2.PNG", "b/deep/x.JPEG", "link/1.png"]
    rows = data.rows_by_name([*gallery, "other/1.jpg"])  # two are called 1.jpg
    assert "1.jpg" not in rows and rows["x.JPEG"] == rows["b/deep/x.JPEG"] == 3


def small_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1)


def test_galleries_of_files_and_of_shards_skip_and_name_what_cannot_be_read(tmp_path, capsys):
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i)[:{1: 0, 3: 200}.get(i)])
    for workers in (0, 2):
        batches = [*data.picture_loader(data.list_pictures(tmp_path), small_tensor, 2, workers)]
        assert [good for good, _, _ in batches] == [[0], [2], [4]]
        assert [i for *_, bad in batches for i, reason in bad if reason] == [1, 3]
        assert batches[0][1].shape == (1, 3, 8, 8)
    folder = Path(shards(tmp_path / "s", [2, 3]))  # a benchmark: two shards, the second one cut
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[:whole.index(b"00004.jpg") + 600])
    (folder / "pairs.jsonl").write_text(json.dumps(PAIR | {"image": "00000", "kind": "name"}))
    (folder / "zeroshot.json").write_text('{"classnames": ["x"], "labels": {"00001": 0, "9": 0}}')
    gallery, pairs, names, labels = data.read_benchmark(folder)
    assert list(gallery) == ["00000", "00001", "00002", "00003"]
    assert "left out of the gallery: {'truncated shard': 1}" in capsys.readouterr().err
    assert pairs[0]["kind"] == "name" and names == ["x"] and labels == {"00001": 0}
    original = Image.open(io.BytesIO(picture(3)))
    assert np.array_equal(data.open_picture(gallery["00003"]), original)
    for wrong in ("5", '{"classnames": ["x"], "labels": {"00001": 1}}'):
        (folder / "zeroshot.json").write_text(wrong)
        with pytest.raises(UserError, match="expected classnames"):
            data.read_benchmark(folder)


def test_zero_shot_sources(tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "f", "z/a.png", "fire_truck/a.png", "ant/b.png",
                            "ant/sub/c.png", "stray.png", ".hidden/a.png", "empty/a.txt")
    os.symlink(tmp_path / "far", tmp_path / "f" / "dog")  # a class may be a link
    write_pictures(tmp_path / "far", "a.png")
    _, names, labels = data.read_zeroshot(folder)
    assert names == ["ant", "dog", "fire truck", "z"]
    assert labels == {"ant/b.png": 0, "ant/sub/c.png": 0, "dog/a.png": 1, "fire_truck/a.png": 2,
                      "z/a.png": 3}
    given = tmp_path / "names"
    given.write_text("emmet\nDog\nfire engine\nZ\n")
    assert data.read_zeroshot(folder, given)[1] == ["emmet", "Dog", "fire engine", "Z"]
    given.write_text("emmet\n")
    with pytest.raises(UserError, match="1 names for 4 classes"):
        data.read_zeroshot(folder, given)
    root = write_pictures(tmp_path, *(f"val/n{i:08}/x.JPEG" for i in range(1000)))
    _, names, labels = data.read_zeroshot(f"imagenet:{root}")
    assert names[0] == "tench" and names[-1] == "toilet tissue" and len(labels) == 1000
    assert labels["n00000999/x.JPEG"] == 999
    with pytest.raises(UserError, match="CIFAR10 is not there"):
        data.read_zeroshot(f"cifar10:{tmp_path}")
    pixels = np.zeros((2, 32, 32, 3), np.uint8)
    fake = lambda root, train: Namespace(classes=["x", "y_z"], targets=[1, 0], data=pixels)
    monkeypatch.setattr(data.torchvision.datasets, "CIFAR100", fake)
    gallery, names, labels = data.read_zeroshot(f"cifar100:{tmp_path}")
    assert names == ["x", "y z"] and labels == {"test/0": 1, "test/1": 0}
    assert data.open_picture(gallery["test/1"]).size == (32, 32)


# ---- model ---------------------------------------------------------------------------------------
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


def test_vit_equals_pytorchs_transformer_with_the_same_weights():
    torch.manual_seed(0)
    ours = ViT(image_size=32, patch_size=8, stem="patch", width=48, depth=3, heads=4)
    layers = [torch.nn.TransformerEncoderLayer(48, 4, 192, 0.0, "gelu", 1e-6, True, True)
              for _ in ours.blocks]  # batch first, norm first
    names = {"norm1": "norm1", "norm2": "norm2", "fc1": "linear1", "fc2": "linear2",
             "proj": "self_attn.out_proj"}
    for block, layer in zip(ours.blocks, layers):
        for p in block.parameters():
            p.data += 0.1 * torch.randn_like(p)  # no zero bias, no norm of one
        state = {f"{theirs}.{part}": getattr(getattr(block, mine), part)
                 for mine, theirs in names.items() for part in ("weight", "bias")}
        state |= {f"self_attn.in_proj_{part}": getattr(block.qkv, part)
                  for part in ("weight", "bias")}
        layer.load_state_dict(state)
    images = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        patches = F.unfold((images - ours.mean) / ours.std, 8, stride=8).transpose(1, 2)
        x = patches @ ours.patch_embed.weight.flatten(1).T + ours.patch_embed.bias
        x = torch.cat([ours.cls_token.expand(5, -1, -1), x], 1) + ours.pos_embed
        for layer in layers:
            x = layer(x)
        assert torch.allclose(ours(images), F.layer_norm(x[:, 0], (48,), eps=1e-6), atol=1e-5)


def test_images_of_another_shape_dtype_or_range_are_refused(lm):
    model = build(lm)
    good = torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(model.encode_image(good), model.encode_image(good / 255), atol=1e-6)
    for bad in (good.int(), good.float(), good / 255 - 0.5, good[:, :, :8], good[:, :1],
                F.pad(good, (0, 7, 0, 7)), good[0]):
        with pytest.raises(ValueError, match="images"):
            model.encode_image(bad)
    for bad in ("a dog", [], None):
        with pytest.raises(ValueError, match="expected a list of captions"):
            model.encode_text(bad)


@pytest.mark.parametrize("text", ["frozen", "align", "finetune"])
def test_frozen_is_frozen_in_every_way_and_finetune_is_not(lm, text):
    model = build(lm, text=text)
    before = {k: v.clone() for k, v in model.text_tower.lm.state_dict().items()}
    optimizers = paraclip.make_optimizers(model, Config(lr=0.1, weight_decay=0.5, text=text))
    model.train()
    assert not any(module.training for module in model.text_tower.lm.modules())
    for _ in range(3):
        paraclip.backward(model, Config(), batch(model, 8))
        paraclip.update(model, optimizers, 1.0)
    after = model.text_tower.lm.state_dict()
    assert all(torch.equal(v, before[k]) for k, v in after.items()) == (text != "finetune")
    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    frozen = {id(p) for p in model.text_tower.lm.parameters()} if text != "finetune" else set()
    assert {*held} == {id(p) for p in model.parameters()} - frozen and len(held) == len({*held})
    captions = [sentence(i) for i in range(4)]
    assert torch.equal(model.encode_text(captions), model.encode_text(captions))  # no dropout


def test_scratch_starts_from_random_weights_of_the_same_architecture(lm):
    scratch, finetune = (build(lm, text=text).text_tower.lm for text in ("scratch", "finetune"))
    shapes = [{k: v.shape for k, v in part.state_dict().items()} for part in (scratch, finetune)]
    assert shapes[0] == shapes[1]
    one, other = (part.encoder.layer[0].output.dense.weight for part in (scratch, finetune))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("text", ["scratch", "finetune", "frozen", "align"])
def test_a_captions_feature_does_not_depend_on_padding_or_neighbours(lm, text):
    model = build(lm, text=text).eval()
    short, long = "a red dog", "a " * 60 + "cat on the left of a blue circle"
    with torch.no_grad():
        alone = model.encode_text([short])
        assert torch.allclose(alone, model.encode_text([long, short])[1:], atol=1e-6)
        padded = {k: F.pad(v, (0, 9)) for k, v in model.tokenize([short]).items()}
        assert torch.allclose(alone, model.encode_text(padded), atol=1e-6)
        groups = [model.tokenize([long]), padded]
        assert torch.allclose(alone, model.encode_text(groups)[1:], atol=1e-6)
        assert not torch.allclose(alone, model.encode_text(["a red cat"]), atol=1e-3)
    ids = model.tokenize(["a " * 100])["input_ids"]
    assert ids.shape[1] == paraclip.MAX_TOKENS
    assert ids[0, -1] == model.text_tower.tokenizer.sep_token_id  # truncation keeps the end token


def test_remembered_states_are_those_of_the_language_model(lm, tmp_path, monkeypatch):
    model, index = build(lm).eval(), ShardIndex(shards(tmp_path / "s", [40]))
    recall = laptop.remember_states(model, index)
    captions = [index.caption(i) for i in (7, 3, 7, 21)]
    tokens = recall(captions)
    assert "input_ids" not in tokens and tokens["attention_mask"].sum(1).tolist() == [
        len(model.text_tower.tokenizer(caption)["input_ids"]) for caption in captions]
    with torch.no_grad():
        for encode in (model.encode_text, model.encode_lm):
            assert torch.allclose(encode(tokens), encode(captions), atol=1e-6)
    monkeypatch.setattr(laptop, "STATES_BYTES", 40 * 6 * 32 * 4)  # what most, not all, would take
    assert laptop.remember_states(model, index) is None
    assert laptop.remember_states(build(lm, text="finetune"), index) is None  # they would change


def test_pooling_against_a_loop():
    torch.manual_seed(0)
    states = torch.randn(3, 5, 4) - 3  # all negative: a padding's 0 would be the maximum
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    rows = [row[:int(m.sum())] for row, m in zip(states, mask)]
    mean, highest = (torch.stack([pool(row) for row in rows])
                     for pool in (lambda x: x.mean(0), lambda x: x.amax(0)))
    assert torch.allclose(paraclip.masked_mean(states, mask), mean, atol=1e-6)
    assert torch.equal(paraclip.masked_max(states, mask), highest)


def test_features_are_unit_fp32_also_under_bf16(lm):
    model = build(lm, precision="bf16")
    (images, text), = batch(model, 3)
    for features in (model.encode_image(images), model.encode_text(text), model.encode_lm(text)):
        assert features.dtype == torch.float32
        assert torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-6)


def test_a_swapped_image_tower_keeps_its_weights(lm, monkeypatch):
    """Once every matrix that was not the language model's was initialised anew, a pretrained
    tower's too."""
    class Pretrained(ViT):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.blocks[0].fc1.weight.data.fill_(7)

    monkeypatch.setattr(paraclip, "ViT", Pretrained)
    assert (build(lm).image_tower.blocks[0].fc1.weight == 7).all()


def test_a_language_model_that_does_not_fit_is_refused(lm, tmp_path):
    def refused(name, words):
        with pytest.raises(UserError, match=words):
            build(str(tmp_path / name))

    refused("no-such-lm", "cannot be loaded")
    for name in ("no-tokenizer", "no-layer"):
        shutil.copytree(lm, tmp_path / name)
    for file in (tmp_path / "no-tokenizer").glob("*tok*"):
        file.unlink()
    (tmp_path / "no-tokenizer/vocab.txt").unlink()
    refused("no-tokenizer", "takes 'a dog' and 'a cat' for the same")
    model = transformers.BertModel.from_pretrained(lm)
    state = {k: v for k, v in model.state_dict().items() if "layer.1.output" not in k}
    model.save_pretrained(tmp_path / "no-layer", state_dict=state)
    refused("no-layer", "lacks weights")
    config = transformers.GPT2Config(vocab_size=30, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2Model(config).save_pretrained(tmp_path / "causal")
    transformers.BertTokenizerFast(f"{lm}/vocab.txt").save_pretrained(tmp_path / "causal")
    refused("causal", "takes 'a dog' and 'a cat' for the same")


# ---- loss ----------------------------------------------------------------------------------------
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
    assert paraclip.geometry_loss(lm, lm, lm).item() == pytest.approx(0, abs=1e-6)


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


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_loss_and_every_gradient_on_many_processes_equal_one_on_the_joined_batch(
        lm, tmp_path, ranks):
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
        "image_tower.blocks.0.fc1.bias": (1, 1, 0), "image_tower.pos_embed": (1, 1, 0),
        "image_tower.cls_token": (1, 1, 0), "image_tower.blocks.0.fc1.weight": (10, 1, 0.3),
        "image_tower.patch_embed.0.weight": (10, 1, 0.3), "text_proj.weight": (1, 1, 0.3),
        layer + "weight": (1, 0.1, 0.3), layer + "bias": (0.1, 0.1, 0),
        "text_tower.lm.embeddings.word_embeddings.weight": (0.1, 0.1, 0.3)}
    for column, name in enumerate(("muon", "adamw")):
        cfg = Config(text="finetune", optimizer=name, lr=1.0, lm_lr=0.1,
                     weight_decay=0.3)
        groups = [g for o in paraclip.make_optimizers(model, cfg) for g in o.param_groups]
        for weight, facts in expected.items():
            p = model.get_parameter(weight)
            group, = (g for g in groups if any(p is q for q in g["params"]))
            assert group["peak_lr"] == pytest.approx(facts[column]), (name, weight)
            assert group["weight_decay"] == facts[2], (name, weight)


def test_sixteen_pairs_are_learnt_by_heart(lm, tmp_path):
    folder = shards(tmp_path / "s", [16])
    out = train(lm, folder, tmp_path / "run", steps=60, lr=3e-3, crop=1.0)
    model, index = load_model(out), ShardIndex(folder)
    assert not model.training
    pictures = [Image.open(io.BytesIO(index.image(i))) for i in range(16)]
    with torch.no_grad():
        images = model.encode_image(torch.stack([model.preprocess(p) for p in pictures]))
        texts = model.encode_text([index.caption(i) for i in range(16)])
    assert (images @ texts.T).argmax(1).tolist() == list(range(16))
    assert (texts @ images.T).argmax(1).tolist() == list(range(16))


@pytest.mark.parametrize("text", ["align", "scratch"])
def test_checkpoint_holds_what_was_trained_and_no_more(lm, tmp_path, text):
    out = train(lm, shards(tmp_path / "s", [16]), tmp_path / "run", text=text)
    checkpoint = torch.load(out / "model.pt", weights_only=True)
    has_lm = any(name.startswith("text_tower.lm.") for name in checkpoint["model"])
    assert has_lm == (text == "scratch") and checkpoint["lm"]["name"] == lm
    assert checkpoint["step"] == 4 and checkpoint["config"]["text"] == text
    row = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 4 and row.keys() >= {"epoch", "loss", "accuracy", "logit_scale", "lr",
                                               "images_per_s", "data_wait"}
    model = load_model(out)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in checkpoint["model"].items())
    for name, v in checkpoint["model"].items():
        assert model.get_parameter(name).requires_grad


def test_a_checkpoint_of_another_language_model_or_program_is_refused(lm, tmp_path):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"model": {}}, tmp_path / "other.pt")
    for name in ("junk.pt", "other.pt"):
        with pytest.raises(UserError, match="no paraclip checkpoint"):
            load_model(tmp_path / name)
    own = Path(shutil.copytree(lm, tmp_path / "lm"))
    out = train(str(own), shards(tmp_path / "s", [16]), tmp_path / "run", steps=1)
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
        with pytest.raises(UserError, match="was trained on another"):
            load_model(out)
    checkpoint = torch.load(out / "model.pt", weights_only=True)
    (own / "config.json").write_bytes(good["config.json"])
    for change, words in ((dict(width=64), "does not fit its own config"),
                          (dict(colour="red"), "another version's")):
        torch.save(checkpoint | {"config": checkpoint["config"] | change}, tmp_path / "changed.pt")
        with pytest.raises(UserError, match=words):
            load_model(tmp_path / "changed.pt")


def start(*argv, nproc: int = 1, restarts: int = 0) -> subprocess.Popen:
    """A program in a process of its own, or under torchrun in `nproc` of them."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={nproc}", "--standalone",
                f"--max-restarts={restarts}", "--monitor-interval=0.1"] if nproc > 1 else []
    return subprocess.Popen([sys.executable, *launcher, *map(str, argv)], text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output
    return output


def wait_for(process, path: Path, newer_than: int = 0):
    while process.poll() is None and not (path.exists() and path.stat().st_mtime_ns > newer_than):
        time.sleep(0.002)


def weights(run: Path) -> dict:
    return torch.load(run / "model.pt", weights_only=True)["model"]


def same(a: Path, b: Path) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_a_killed_run_continues_to_the_same_bits(lm, tmp_path, capsys):
    """A checkpoint after every step, so that kills fall into its writing, too."""
    folder = shards(tmp_path / "s", [40, 9, 30])
    args = flags(**TINY | dict(data=folder, lm=lm, steps=40, workers=2, accum=2, save_every=1))
    call(paraclip, *args, "--out", tmp_path / "whole")
    out, rng = tmp_path / "killed", random.Random(0)
    for killer in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = start(HERE / "paraclip.py", *args, "--out", out)
        newest = (out / "model.pt").stat().st_mtime_ns if (out / "model.pt").exists() else 0
        wait_for(process, out / "model.pt", newest)
        time.sleep(rng.random() * 0.1)
        process.send_signal(killer)
        finish(process, -killer if killer == signal.SIGKILL else 128 + killer)
    assert torch.load(out / "model.pt", weights_only=True)["step"] < 40
    with open(out / "log.jsonl", "ab") as log:
        log.write(b'{"step": 39, "lo')  # newer than the checkpoint, and cut by the kill
    call(paraclip, *args, "--out", out)
    assert same(tmp_path / "whole", out)
    logs = [[json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (tmp_path / "whole", out)]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    assert not list(out.glob("*.tmp"))  # what a kill in mid-write leaves goes with the next start
    capsys.readouterr()
    call(paraclip, *args, "--out", out)
    assert "is finished" in capsys.readouterr().out
    assert "lr 0.001 -> 0.5" in mistake(capsys, paraclip, *args, "--out", out, "--lr", "0.5")
    (out / "config.json").unlink()  # the checkpoint knows it, too
    assert "lr 0.001 -> 0.5" in mistake(capsys, paraclip, *args, "--out", out, "--lr", "0.5")
    write_tar(tmp_path / "s" / "00001.tar", [m for i in range(50, 59) for m in sample(i)])
    assert "other data" in mistake(capsys, paraclip, *args, "--out", out)


def test_two_processes_follow_one_and_torchrun_recovers_from_a_killed_rank(lm, tmp_path):
    folder = shards(tmp_path / "s", [40, 9, 30])
    args = flags(**TINY | dict(data=folder, lm=lm, steps=30, workers=1, save_every=1))
    call(paraclip, *args, "--out", tmp_path / "one")
    process = start(HERE / "paraclip.py", *args, "--out", tmp_path / "two", nproc=2, restarts=1)
    wait_for(process, tmp_path / "two" / "model.pt")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert "continuing at step" in finish(process)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:  # up to rounding, which the optimizer amplifies
        assert torch.allclose(one[name], two[name], atol=2e-4), name


def test_an_error_on_one_rank_ends_all_with_one_line(lm, tmp_path):
    """One of two ranks finds its data gone bad; the other one would wait for it for ever."""
    folder = shards(tmp_path / "s", [40])
    script = tmp_path / "fail.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import paraclip
def failing(*args, real=paraclip.update):
    if os.environ["RANK"] == "1":
        raise paraclip.UserError("this rank has failed")
    return real(*args)
paraclip.update = failing
paraclip.run(paraclip.main)
""")
    args = flags(**TINY | dict(data=folder, lm=lm, out=tmp_path / "run"))
    output = finish(start(script, *args, nproc=2), 1)
    assert output.count("error: this rank has failed") == 1
    assert output.count("error: ") == 1 and "paraclip.py\", line" not in output
    output = finish(start(HERE / "paraclip.py", *args, "--batch-size", 0, nproc=2), 1)
    assert output.count("error: --batch-size 0") == 1


def test_a_full_disk_and_a_number_that_is_not_finite_leave_the_former_checkpoint(
        lm, tmp_path, monkeypatch):
    folder = shards(tmp_path / "s", [32])
    # A limit on the size of files stands for the full disk: only a checkpoint exceeds it.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*model.pt"):
            train(lm, folder, tmp_path / "run", save_every=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "run").glob("*.tmp")) and not (tmp_path / "run/model.pt").exists()
    losses = iter([1.0, 1.0, float("nan")])
    real = paraclip.contrastive_loss
    monkeypatch.setattr(paraclip, "contrastive_loss",
                        lambda *x: (real(*x)[0] * next(losses), torch.tensor(0.0)))
    with pytest.raises(UserError, match="nan.* at step 3"):
        train(lm, folder, tmp_path / "run", save_every=2, workers=1)
    assert not multiprocessing.active_children()  # the loader's workers are gone
    assert torch.load(tmp_path / "run/model.pt", weights_only=True)["step"] == 2
    monkeypatch.undo()
    update = paraclip.update

    def spoiling(model, *args):  # loss and gradient are those of before the step, and finite
        norm = update(model, *args)
        model.text_proj.weight.data[0, 0] = torch.inf
        return norm
    monkeypatch.setattr(paraclip, "update", spoiling)
    with pytest.raises(UserError, match="weight is not finite at step 1"):
        train(lm, folder, tmp_path / "bad", save_every=1)
    assert not (tmp_path / "bad/model.pt").exists()


def test_a_run_folder_has_one_writer_and_is_not_somebody_elses(lm, tmp_path, capsys):
    args = flags(**TINY | dict(data=shards(tmp_path / "s", [16]), lm=lm, out=tmp_path / "run"))
    with paraclip.run_folder(tmp_path / "run"):
        assert "another process is writing" in mistake(capsys, paraclip, *args)
    (tmp_path / "run" / "log.jsonl").write_text("somebody's\n")
    assert "no run of paraclip.py" in mistake(capsys, paraclip, *args)
    assert (tmp_path / "run" / "log.jsonl").read_text() == "somebody's\n"
    (tmp_path / "file").touch()
    assert "file" in mistake(capsys, paraclip, *args, "--out", tmp_path / "file")


def test_a_damaged_run_folder_is_continued_or_refused_and_never_lost(lm, tmp_path):
    """Faults in checkpoint, log and config: no exception but a UserError, no weight changed."""
    folder = shards(tmp_path / "s", [16])
    good = train(lm, folder, tmp_path / "good", steps=2)
    first, expected = int(os.environ.get("FUZZ_SEED", 0)), weights(good)
    content, weight = (good / "model.pt").read_bytes(), expected["text_proj.weight"]
    at = content.index(weight.numpy().tobytes())  # one bit of a weight
    flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]
    (tmp_path / "flipped.pt").write_bytes(flipped)
    with pytest.raises(UserError, match="damaged"):
        load_model(tmp_path / "flipped.pt")
    for seed in range(first, first + int(os.environ.get("FUZZ_CASES", 40))):
        rng, run = random.Random(seed), tmp_path / f"run{seed}"
        shutil.copytree(good, run)
        name = rng.choice(["model.pt", "model.pt", "log.jsonl", "config.json"])
        damaged = damage((run / name).read_bytes(), rng)
        (run / name).write_bytes(damaged)
        try:
            found = load_model(run).state_dict()
            assert all(torch.equal(found[k], v) for k, v in expected.items()), seed
            train(lm, folder, run, steps=2)
        except UserError:
            assert name == "model.pt" and (run / name).read_bytes() == damaged, seed
        shutil.rmtree(run)


def test_a_compiled_image_tower_gives_the_same_losses(lm, tmp_path, monkeypatch):
    compile = torch.nn.Module.compile  # with the graph captured, but no C++ compiler asked for
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **how: compile(self, backend="aot_eager", **how))
    folder, losses = shards(tmp_path / "s", [16]), []
    for flag in (False, True):
        out = train(lm, folder, tmp_path / str(flag), compile=flag, accum=2)
        losses.append(json.loads((out / "log.jsonl").read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_out_of_memory_names_the_way_out(lm, tmp_path, capsys, monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(paraclip, "backward", out_of_memory)
    args = flags(**TINY | dict(data=shards(tmp_path / "s", [16]), lm=lm, out=tmp_path / "run"))
    assert "out of memory: --accum 4" in mistake(capsys, paraclip, *args, "--accum", 2)


def test_bf16_only_where_pytorch_says_that_the_cpu_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
    for name in names:  # private: a PyTorch that has dropped them must not stop every run
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert paraclip.best_precision() == "fp32"
    for name in names:
        with monkeypatch.context() as this_one:
            this_one.setattr(torch.cpu, name, lambda: True, raising=False)
            assert paraclip.best_precision() == "bf16"


@pytest.mark.parametrize("layout", ["published", "copy"])
def test_cc12m_needs_no_other_flag_but_its_data(lm, tmp_path, monkeypatch, capsys, layout):
    """Both published layouts; sizes are cut down, the recipe's other fields stay."""
    shards(tmp_path / "cc12m", [20, 20])
    for number in range(2 * (layout == "copy")):
        name = tmp_path / "cc12m" / f"0000{number}.tar"
        name.rename(name.with_name(f"cc12m-train-000{number}.tar"))
    monkeypatch.setenv("PARACLIP_DATA", str(tmp_path))
    small = flags(lm=lm, batch_size=16, epochs=1, image_size=16, patch_size=8, width=32, depth=1,
                  heads=2, workers=1, out=tmp_path / "run")
    if layout == "published":
        finish(start(HERE / "paraclip.py", "--data", "cc12m", *small, nproc=2))
    else:  # the same set by its shards
        call(paraclip, "--recipe", "cc12m", "--data", tmp_path / "cc12m", *small)
    checkpoint = torch.load(tmp_path / "run/model.pt", weights_only=True)
    assert checkpoint["step"] == 2 and checkpoint["data"]["samples"] == 40
    recipe = paraclip.RECIPES["cc12m"]
    assert checkpoint["config"]["weight_decay"] == recipe["weight_decay"] != Config().weight_decay
    assert checkpoint["config"]["embed_dim"] == recipe["embed_dim"]
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    pair = {"query": "a red dog", "paraphrase": "a dog red", "image": "3.jpg"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    report, = evaluate(capsys, tmp_path / "run", "--pairs", tmp_path / "pairs.jsonl",
                       "--images", tmp_path)
    assert (report["gallery"], report["pairs"], report["k"]) == (6, 1, 6)


@pytest.mark.parametrize("args, message", [
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    (["--text", "thaw"], "--text"), (["--lm", "no/such-model"], "cannot be loaded"),
    (["--batch-size", "64"], "usable samples"), (["--epochs", "0.01"], "usable samples"),
    (["--accum", "3"], "must be a multiple"), (["--image-size", "15"], "must be a multiple"),
    (["--text", "scratch", "--geometry", "1"], "--geometry needs"),
    *(([flag, value], f"{flag} {value}") for flag, value in (
        ("--lr", "nan"), ("--lr", "0"), ("--lr", "inf"), ("--lr", "1e+38"), ("--crop", "2"),
        ("--depth", "0"),
        ("--steps", "-5"), ("--batch-size", "1"), ("--accum", "0"), ("--seed", "-1"),
        ("--workers", "-1"), ("--align-layers", "0"), ("--geometry", "-1")))])
def test_mistakes_are_told_in_one_line(lm, tmp_path, capsys, args, message):
    fields = TINY | dict(data=shards(tmp_path / "s", [20]), out=tmp_path / "run", lm=lm, steps=0)
    assert message in mistake(capsys, paraclip, *flags(**fields), *args)
    assert not (tmp_path / "run" / "model.pt").exists()
# ---- evaluation: metrics -------------------------------------------------------------------------
@pytest.mark.parametrize("a, b, ao, js", [
    ([1, 2, 3, 4], [1, 2, 3, 4], 1, 1),
    ([1, 2, 3, 4], [5, 6, 7, 8], 0, 0),
    ([1, 2, 3, 4], [2, 1, 3, 5], (0 + 2 / 2 + 3 / 3 + 3 / 4) / 4, 3 / 5),
    ([1, 2, 3], [1, 4, 5], (1 + 1 / 2 + 1 / 3) / 3, 1 / 5),  # one agreement at the top
    ([1, 2, 3], [4, 5, 1], (0 + 0 + 1 / 3) / 3, 1 / 5),  # the same one at the bottom
])
def test_ao_and_js_by_hand(a, b, ao, js):
    for more in ([], [9]):  # only the first k are read
        lists = a + more, b + more, len(a)
        assert ev.average_overlap(*lists) == pytest.approx(ao, abs=1e-15)
        assert ev.jaccard(*lists) == pytest.approx(js, abs=1e-15)
    batch = ev.average_overlap(torch.tensor([a, a]), torch.tensor([a, b]))
    assert batch.tolist() == [1, pytest.approx(ao)]  # exactly 1: no rounding
    for k in (0, len(a) + 1):
        with pytest.raises(ValueError, match=f"k = {k}"):
            ev.average_overlap(a, b, k)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_rankings_break_ties_by_index_whatever_the_chunk(chunk):
    # Of 57 vectors of four signs most are equal: the tie rule decides nearly every place, and
    # ties straddle the borders of chunks and the k-th place. All have the norm 2.
    rng = np.random.default_rng(0)
    gallery, queries = (rng.choice([-1, 1], size=(n, 4)) for n in (57, 23))
    for k in (1, 10, 60):
        ranked = ev.rankings(torch.tensor(queries), torch.tensor(gallery), k, chunk=chunk)
        for row, scores in zip(ranked.tolist(), (queries @ gallery.T).tolist(), strict=True):
            assert row == sorted(range(57), key=lambda i: (-scores[i], i))[:k]


def test_rankings_of_real_features_do_not_depend_on_place_or_chunk():
    # In fp32 a row scores differently at the edge of a block: copies of an item would not tie.
    torch.manual_seed(0)
    gallery = F.normalize(torch.randn(30, 512), dim=-1)[torch.randint(30, (301,))]
    queries = F.normalize(torch.randn(41, 512), dim=-1)
    scores = (queries.double() @ gallery.double().T * 2**24).round().tolist()
    expected = [sorted(range(301), key=lambda i: (-row[i], i))[:20] for row in scores]
    for chunk in (3, 13, 2048):
        assert ev.rankings(queries, gallery, 20, chunk=chunk).tolist() == expected
    for x, y in zip(ev.unit_grid(queries), ev.unit_grid(gallery)):
        assert (x * y).sum().item() == math.fsum((x * y).tolist())  # no sum is rounded at all


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
    assert ev.precision_at_k([[3, 1], [0, 2]], [{1, 4}, {0, 2}], 2).tolist() == [0.5, 1]
    assert set(ev.retrieval("", ranked[:1], texts[:1], pictures, [[1]])) == {"recall"}


def test_bootstrap_interval_covers_the_mean():
    # 300 samples of 50 from a skewed law of mean 1. A 95 % percentile interval covers it a little
    # less often than that; the share's deviation is 0.0145, and the seeds are fixed.
    rng = np.random.default_rng(0)
    spans = [ev.bootstrap_ci(rng.exponential(size=50), seed=i) for i in range(300)]
    assert 0.87 < np.mean([low <= 1 <= high for low, high in spans]) < 0.99
    values = rng.random(400)
    assert np.ptp(ev.bootstrap_ci(values)) == pytest.approx(0.196 * values.std(), rel=0.06)
    assert ev.bootstrap_ci(values) == ev.bootstrap_ci(values) != ev.bootstrap_ci(values, seed=1)
    assert ev.bootstrap_ci([0.1] * 7) == (0.1, 0.1) and ev.bootstrap_ci([0.3]) == (0.3, 0.3)
    with pytest.raises(ValueError):
        ev.bootstrap_ci([])


def test_unrelated_pairs_share_nothing_where_possible():
    pairs = [{"query": f"q{i // 3}", "paraphrase": f"p{i}", "images": [f"{i % 7}", f"x{i % 5}"]}
             for i in range(42)]
    partner = ev.unrelated(pairs, 0).tolist()
    assert partner == ev.unrelated(pairs, 0).tolist() != ev.unrelated(pairs, 1).tolist()
    about = [{pair["query"], *pair["images"]} for pair in pairs]
    assert all(about[i].isdisjoint(about[j]) for i, j in enumerate(partner))
    assert len(set(partner)) > 21  # not the same few for all
    same = [{"query": f"{i}", "paraphrase": "p", "image": "x"} for i in range(5)]
    assert all(i != j for i, j in enumerate(ev.unrelated(same, 0)))  # never itself


def test_a_tie_between_triplets_is_a_miss():
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
    assert ev.measure_zeroshot(["2"], {"gone": 0}, ["{}"], model, pictures, ev.EvalConfig()) == {}


# ---- evaluation: the whole program on tiny random models -----------------------------------------
def save_model(folder: Path, kind: str):
    """A CLIP or SigLIP of two narrow layers with a tokenizer of whole words, and big weights."""
    def make(part, *args, **options):
        return getattr(transformers, f"{kind}{part}")(*args, **options)

    vocab = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}
    tokens = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    tokenizer = transformers.PreTrainedTokenizerFast(  # without a maximum length, as some are
        tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=len(vocab), max_position_embeddings=12, eos_token_id=3, **size)
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
def world(tmp_path_factory) -> Path:
    """A folder with two models and a small set of every kind."""
    root = tmp_path_factory.mktemp("world")
    save_model(root / "clip", "CLIP")
    save_model(root / "siglip", "Siglip")
    names = [f"{i:02}.png" for i in range(14)]
    files = [f"images/{'sub/' * (i % 2)}{name}" for i, name in enumerate(names)]
    files += [f"classes/{name}/{i}.png" for name in ("big_cat", "dog") for i in (1, 2)]
    for seed, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(seed, (48, 40), "PNG"))
    (root / "images/broken.jpg").write_bytes(b"\xff\xd8 not much of a picture")
    names.append("lost.png")
    triplets = [{"caption": sentence(i), "caption2": sentence(20 + i), "filename": name,
                 "negative_caption": sentence(40 + i)} for i, name in enumerate(names)]
    triplets[0]["caption"] = "red dog " * 9  # more than the models have places for
    coco = {"images": [{"id": i, "file_name": name} for i, name in enumerate(names[5:])],
            "annotations": [{"image_id": i % 10, "caption": sentence(i)} for i in range(27)]}
    sts = [f"{sentence(i)},{sentence(20 + i)},{i % 6}" for i in range(12)]
    for name, text in (("triplets.json", json.dumps(triplets)), ("sts.csv", "\n".join(sts)),
                       ("captions.json", json.dumps(coco)), ("templates.txt", "{}\nthe {}\n")):
        (root / name).write_text(text)
    # models and files that are not what they seem
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
    (root / "owner").mkdir()
    (root / "owner/x.jpg").write_bytes(b"nothing")
    (root / "one.csv").write_text("a dog,a cat,1\na dog,a square,1\n")
    return root


def everything(root: Path) -> list:
    files = dict(pairs="triplets.json", triplets="triplets.json", captions="captions.json",
                 sts="sts.csv", templates="templates.txt", images="images", zeroshot="classes")
    return flags(k=5, **{name: root / file for name, file in files.items()})


def test_everything_in_one_call(world, tmp_path, capsys, monkeypatch):
    files = {"json": tmp_path / "x.json", "figure": tmp_path / "x.png"}
    argv = [world / "siglip", *everything(world), *flags(**files)]
    clip, siglip = evaluate(capsys, world / "clip", *argv)
    assert json.loads(files["json"].read_text()) == [clip, siglip]
    assert not torch.backends.cudnn.allow_tf32  # fp32 on CUDA as on a CPU
    triplets = clip["triplets"]["triplets.json"]
    assert (clip["k"], clip["gallery"], clip["pairs"]) == (5, 14, 15)
    assert clip["recall_pairs"] == triplets["image_text_n"] == 14  # one picture is not there
    assert clip["captions"] == {"images": 9, "captions": 25, "missing": 1}
    assert (clip["zeroshot"]["classes"], clip["zeroshot"]["images"]) == (2, 4)
    for part, name in ((clip, "ao"), (clip, "js_random"), (triplets, "image_text")):
        assert 0 <= part[f"{name}_ci"][0] <= part[name] <= part[f"{name}_ci"][1] <= 1
    for name in ("recall", "query_recall", "paraphrase_recall"):
        for at, (low, high) in clip[f"{name}_ci"].items():
            assert 0 <= low <= clip[name][at] <= high <= 1
    diff = siglip["diff"]
    assert diff["ao"] == pytest.approx(siglip["ao"] - clip["ao"], abs=1e-12)
    assert diff["ao_ci"][0] <= diff["ao"] <= diff["ao_ci"][1]
    assert diff["zeroshot"].keys() == {"top1", "top1_ci", "top5", "top5_ci"}
    assert diff.keys().isdisjoint({"k", "pairs", "captions", "sts"})
    exact, rough = (ev.HuggingFaceCLIP(world / "clip", precision).encode_text(["a red dog"])
                    for precision in ("fp32", "bf16"))
    assert 1e-6 < (rough - exact).abs().max() < 0.05
    for file in files.values():  # they are written before a reader of the output can fail
        file.unlink()
    monkeypatch.setattr(ev, "print_tables", lambda results: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(ev, *argv, "--workers", 0)
    assert all(file.is_file() for file in files.values())


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_numbers_equal_those_of_the_library_used_by_hand(world, capsys, kind):
    report, = evaluate(capsys, world / kind, *everything(world), "--batch-size", 3)
    assert evaluate(capsys, world / kind, *everything(world)) == [report]
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
    row = {file.name: i for i, file in enumerate(order)}
    pictures = torch.stack([of_picture(file) for file in order])
    ranked, hits = [], {"query_recall": [], "paraphrase_recall": []}
    for item in json.loads((world / "triplets.json").read_text()):
        for name, field in zip(hits, ("caption", "caption2")):
            ranked.append((pictures @ of_text(item[field])).argsort(descending=True).tolist())
            if item["filename"] in row:
                hits[name].append(row[item["filename"]] in ranked[-1][:5])
    for name, found in hits.items():
        assert report[name]["t2i@5"] == pytest.approx(np.mean(found))
    overlap = [len({*a[:d]} & {*b[:d]}) / d for a, b in zip(ranked[::2], ranked[1::2])
               for d in range(1, 6)]
    assert report["ao"] == pytest.approx(np.mean(overlap))

    rows = [line.split(",") for line in (world / "sts.csv").read_text().splitlines()]
    columns = [of_text(a) @ of_text(b) for a, b, _ in rows], [int(score) for *_, score in rows]
    ranks = [[sum(w < v for w in column) + sum(w <= v for w in column) for v in column]
             for column in columns]  # twice the mean rank
    assert report["sts"]["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def write_benchmark(folder: Path, counts: list[int]):
    """Shards, for each picture a pair of both kinds but one, and a class but for the first."""
    shards(folder, counts)
    keys = [f"{i:05d}" for i in range(sum(counts))]
    pairs = [{"query": f"{a} {WORDS[i]}", "paraphrase": f"the {WORDS[i + 3]}", "image": key,
              "kind": kind} for kind, a in (("template", "big"), ("name", "a"))
             for i, key in enumerate(keys)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs[:-1])))
    labels = {key: i % 8 for i, key in enumerate(keys) if i > 0}
    (folder / "zeroshot.json").write_text(json.dumps({"classnames": WORDS[:8], "labels": labels}))


def test_our_run_on_the_emoji_benchmark(lm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PARACLIP_DATA", raising=False)
    shards(Path("shards/emoji/train"), [16])
    write_benchmark(Path("shards/emoji/test"), [8, 6])
    write_benchmark(Path("shards/emoji/val"), [6])
    train(lm, "shards/emoji/train", Path("runs/emoji-align"))
    report, = evaluate(capsys)
    one, two = evaluate(capsys, "runs/emoji-align", "runs/emoji-align/model.pt")
    assert report == one and two["diff"]["kinds"]["template"]["ao_ci"] == [0, 0]
    assert (report["split"], report["gallery"]) == ("test", 14)
    assert [report["kinds"][kind]["pairs"] for kind in ("name", "template")] == [13, 14]
    assert report.items() >= report["kinds"]["name"].items()  # the headline
    asked = []
    monkeypatch.setattr(data, "find_shards", asked.append)  # it draws them the first time
    assert evaluate(capsys, "--split", "val")[0]["gallery"] == 6 and asked == ["emoji"]

    model = load_model("runs/emoji-align")
    pictures = [model.preprocess(Image.open(io.BytesIO(picture(i)))) for i in range(14)]
    prompts = [form.format(name) for name in WORDS[:8] for form in ev.TEMPLATES]
    with torch.no_grad():
        images = model.encode_image(torch.stack(pictures))
        classes = F.normalize(model.encode_text(prompts).view(8, 3, -1).mean(1), dim=-1)
        queries = model.encode_text([f"a {word}" for word in WORDS[:13]])
    top5 = (images @ classes.T).topk(5).indices
    for k in (1, 5):
        hits = [i % 8 in top5[i, :k] for i in range(1, 14)]
        assert report["zeroshot"][f"top{k}"] == pytest.approx(np.mean(hits))
    ranked = (queries @ images.T).topk(10).indices.tolist()
    hits = [i in row[:5] for i, row in enumerate(ranked)]
    assert report["recall"]["t2i@5"] == pytest.approx(np.mean(hits))

    pairs = data.read_pairs("shards/emoji/test/pairs.jsonl")
    Path("pairs.json").write_text(json.dumps([pair for pair in pairs if pair["kind"] == "name"]))
    user = ["runs/emoji-align", *flags(pairs="pairs.json", images="shards/emoji/test")]
    assert evaluate(capsys, *user)[0]["ao"] == report["ao"]
    # a user's pairs, of several kinds and with several right pictures
    pairs = [{"query": f"a {WORDS[0]}", "paraphrase": "dog", "kind": kind,
              "images": [f"{i:05d}", f"{i + 1:05d}", "gone"]} for i, kind in enumerate("aab")]
    Path("pairs.json").write_text(json.dumps(pairs))
    report, = evaluate(capsys, *user)
    assert (report["pairs"], report["recall_pairs"], "split" in report) == (3, 3, False)
    assert [report["kinds"][kind]["pairs"] for kind in "ab"] == [2, 1]
    share = [len({i, i + 1}.intersection(ranked[0])) / 10 for i in range(3)]
    assert report["precision"]["t2i@10"] == pytest.approx(np.mean(share))


# ---- evaluation: what goes wrong -----------------------------------------------------------------
def test_what_is_left_out_is_told(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(world)
    shutil.copy("triplets.json", tmp_path)  # the same name in two folders: both are measured
    report, = evaluate(capsys, "clip", "--triplets", "triplets.json", tmp_path / "triplets.json")
    assert len(report["triplets"]) == 2

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
    monkeypatch.setattr(ev, "read_tasks", None)  # a wrong name is told before anything is done
    assert "no/model: neither" in mistake(capsys, ev, "clip", "no/model")


STS = ["clip", "--sts", "sts.csv"]


@pytest.mark.parametrize("arguments, complaint", [
    ([], "run `python paraclip.py` first"),
    (["nowhere.pt"], "nowhere.pt: neither a checkpoint"),
    (["owner/model", *STS[1:]], "owner/model: neither"),  # though there is a folder owner
    (["images"], "images: neither"),
    (["bert", *STS[1:]], "lm0: neither"),
    (["remote", *STS[1:]], "remote: neither"),  # it brings code of its own
    (["weights", *STS[1:]], "weights are missing"),  # once they were measured as random numbers
    (["tokenizer", *STS[1:]], "tokenizer of 2 tokens"),  # once all words were the same
    (["nan", *STS[1:]], "finite numbers"),
    (["sts.csv", *STS[1:]], "sts.csv"),
    (["clip", "--pairs", "triplets.json"], "need --images"),
    (["clip", "--pairs", "triplets.json", "--images", "owner"], "none of the 1 pictures can be"),
    (["clip", "--captions", "captions.json", "--images", "classes"], "none of the 10 named"),
    (["clip", "--pairs", "triplets.json", "--captions", "captions.json", "--images", "classes"],
     "captions.json: none of its pictures"),
    (["clip", "--images", "images"], "what to search for"),
    (["clip", "--query", "a dog", "--images", "images"], "belong together"),
    (["clip", "--query", " ", "--paraphrase", " ", "--images", "images"], "neither empty"),
    (["clip", "--sts", "one.csv"], "one.csv: equal scores"),
    ([*STS, "--templates", "templates.txt"], "belong to --zeroshot"),
    ([*STS, "--figure", "x.png"], "--figure draws a pair"),
    ([*STS, "--json", "nowhere/x.json"], "nowhere/x.json: expected a file"),
    ([*STS, "--json", "images"], "images: expected a file"),
    ([*STS, "--device", "meta"], "--device meta"),
    ([*STS, "--k", "0"], "--k 0: expected at least 1"),
    ([*STS, "--workers", "-1"], "--workers -1: expected at least 0"),
])
def test_mistakes_in_evaluation_are_told(world, lm, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(world)
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    assert complaint in mistake(capsys, ev, *(lm if a == "bert" else a for a in arguments))
    assert not Path("ran").exists()


def test_damaged_files_give_numbers_or_one_line(world, tmp_path, monkeypatch, capsys):
    model = ev.HuggingFaceCLIP(world / "clip", "fp32").eval()
    monkeypatch.setattr(ev, "HuggingFaceCLIP", lambda name, precision: model)
    monkeypatch.setattr(ev, "bootstrap_ci", lambda values, seed: (min(values), max(values)))
    root, folder = shutil.copytree(world, tmp_path / "copy"), tmp_path / "mine/test"
    write_benchmark(folder, [5])
    files = [Path(file) for file in everything(root)] + list(folder.iterdir())
    files = {file: file.read_bytes() for file in files if file.is_file()}
    rng, ended = random.Random(int(os.environ.get("FUZZ_SEED", 0))), Counter()
    for _ in range(int(os.environ.get("FUZZ_CASES", 80))):
        file = rng.choice(list(files))
        parts = re.findall(rb'"[^"]*"|\d+|,', files[file]) or [b"0"]
        other = rng.choice([b"null", b"-1", b"[]", b"{}", b"NaN", b'"\\ud800"', b"[" * 9000, b'""'])
        file.write_bytes(rng.choice([
            damage(files[file], rng), files[file].replace(rng.choice(parts), other)]))
        argv = ["--benchmark", folder.parent] if file.parent == folder else everything(root)
        try:
            call(ev, root / "clip", *argv, "--workers", 0)
            ended[0] += 1
        except SystemExit as stop:
            lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
            assert len(lines) == 1, (file, lines)
            ended[stop.code] += 1
        file.write_bytes(files[file])
    assert set(ended) == {0, 2} and min(ended.values()) > 10
