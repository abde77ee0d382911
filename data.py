"""Data of paraclip: tar shards -> index -> order -> batches, and readers of evaluation files.

    python data.py PATH [--batch-size N]     # inspects a shard set: samples, skips, images/s

Training sets are tar shards as img2dataset and webdataset write them. Nothing here knows of models.
What all programs share (errors, files, flags) comes first.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torchvision
from filelock import FileLock  # a dependency of torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm


# ---- what all programs share: errors and files ---------------------------------------------------
class UserError(ValueError):
    """A mistake of the user's: the programs print it as one line, without a traceback."""


class BadSample(ValueError):
    """A sample that is left out; its text is the reason under which it is counted."""


def run(program):
    """Calls a program's main(): what its user can cause ends in one line on stderr and status 2.

    Ctrl-C ends in status 130; a reader of stdout that has left (`| head`) in 1, without a word.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it is closed
        stream.reconfigure(errors="replace")  # an ASCII terminal gets ? for what it lacks
    try:
        program()
        return print(end="", flush=True)  # so that a closed pipe is met here, not at exit
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # takes what is flushed at exit
        sys.exit(1)
    except (UserError, OSError, ImportError, RuntimeError) as error:
        message, status = str(error).strip(), 2
        if "Traceback (most recent" in message:  # from a loader process: its last line tells
            message = message.splitlines()[-1].partition(": ")[2]
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}"
        if isinstance(error, RuntimeError):  # PyTorch's when a loader process dies, or a bug
            if not re.search("killed by sig|exited unexp|shared memory|file </torch", message):
                raise
            message += "; fewer --workers need less memory, docker needs --ipc=host"
        message = f"error: {' '.join(message.split())}"
    # Under torchrun all ranks may fail alike, or only one. The first speaks at once; the others
    # wait, and torchrun ends them meanwhile if one before them has failed, too.
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    time.sleep(local_rank and 3 + local_rank)
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)


@contextlib.contextmanager
def replacing(path: Path | str):
    """Opens a file beside `path` for binary writing; moves it into place when all is on disk.

    A kill or a full disk in mid-write leaves the former file as it was; the next writer removes
    what a killed one left behind.
    """
    path, beside = Path(path), Path(f"{path}.{os.getpid()}.tmp")
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*[0-9].tmp"):
        try:
            os.kill(int(leftover.suffixes[-2][1:]), 0)  # sends nothing, only finds the process
        except ProcessLookupError:
            leftover.unlink(missing_ok=True)
        except (ValueError, PermissionError):  # not our kind of name; another user's process
            pass
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        error.filename = str(path)  # the name that the user knows
        raise
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def data_folder(name: str) -> Path:
    """Where a data set known by name lies: $PARACLIP_DATA/name, without it shards/name."""
    return Path(os.environ.get("PARACLIP_DATA", "shards")) / name


def keep_memory():
    """Lets glibc keep freed memory: given back, it would be mapped and zeroed anew each step."""
    with contextlib.suppress(AttributeError, OSError):  # other C libraries have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, the largest that it takes


# ---- what all programs share: flags, the fields of a dataclass -----------------------------------
def flag(default, help: str, **rules):
    """A field that is a flag; rules: choices, at_least, above, at_most, positional."""
    limits = [name for name in ("at_least", "above", "at_most") if name in rules]
    range_ = ", ".join(f"{name.replace('_', ' ')} {rules[name]}" for name in limits)
    rules |= {"default": default, "help": help, "range": range_}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=rules)
    return dataclasses.field(default=default, metadata=rules)


def check_ranges(cfg):
    """Raises UserError if a number is not finite or out of its range, or a choice is none."""
    for field in dataclasses.fields(cfg):
        value, rules = getattr(cfg, field.name), field.metadata
        valid = value in (rules["default"], *rules.get("choices", [value]))
        if isinstance(rules["default"], (int, float)):
            valid = (isinstance(value, (int, type(rules["default"]))) and abs(value) < math.inf
                     and rules.get("at_least", value) <= value <= rules.get("at_most", value)
                     and value > rules.get("above", -math.inf))
        if not valid:
            expected = rules["range"] or ", ".join(rules.get("choices", ["a number"]))
            raise UserError(f"--{field.name.replace('_', '-')} {value}: expected {expected}")


def parse_config(cls, argv=None, recipes: dict = {}):
    """An instance of the dataclass `cls`, whose fields are `flag`s, from the command line.

    A flag that is given wins over recipes[name], which wins over the field's default; name is the
    given --recipe, without it the given --data.
    """
    def refuse(message):
        raise UserError(f"{message}; see --help")

    parser = argparse.ArgumentParser(
        description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    parser.error = refuse
    for field in dataclasses.fields(cls):
        rules, default = field.metadata, field.metadata["default"]
        positional = "positional" in rules
        notes = [f"default: {default}" if default not in ("", []) else "", rules["range"]]
        notes = "; ".join(filter(None, notes))
        if isinstance(default, bool):
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, list):
            options = {"nargs": "*" if positional else "+"}
        else:
            options = {"type": type(default), "choices": rules.get("choices")}
        help = (rules["help"] + (notes and f" ({notes})")).replace("%", "%%")
        name = field.name if positional else "--" + field.name.replace("_", "-")
        parser.add_argument(name, help=help, **options)
    given = vars(parser.parse_args(argv))
    return cls(**recipes.get(given.get("recipe") or given.get("data"), {}) | given)


# ---- shards: which files -------------------------------------------------------------------------
def find_shards(data: str) -> list[Path]:
    """The tar files that `data` means, in the order given, sorted within each part.

    `data` is emoji or cc12m, or a folder, one .tar, a glob, a range {00000..01242}, or several of
    these joined by ::. Raises UserError if there is no file.
    """
    if data == "emoji":
        from benchmark.emoji_scenes import emoji_folder  # here: other data need no drawings
        data = str(emoji_folder() / "train")
    elif data == "cc12m":
        data = str(data_folder(data))
        if not Path(data).is_dir():
            raise UserError(
                f"no CC12M at {data} (PARACLIP_DATA names the folder above it). Download it with "
                "img2dataset's recipe dataset_examples/cc12m.md (--output_format webdataset), or "
                "take the ready-made shards of the Hugging Face data set pixparse/cc12m-wds, and "
                f"put the .tar files into {data}")
    paths = []
    for part in data.split("::"):
        braces = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", part)
        if os.path.isdir(part):
            found = sorted(Path(part).glob("*.tar"))
        elif braces:  # a gap in the numbers is counted as an unreadable shard
            before, first, last, after = braces.groups()
            numbers = range(int(first), int(last) + 1)
            found = [Path(f"{before}{i:0{len(first)}d}{after}") for i in numbers]
        else:  # a name may hold the signs of a glob and mean itself
            found = [Path(name) for name in sorted(glob.glob(part)) or [part]]
        if not any(path.is_file() for path in found):
            raise UserError(f"no .tar file at '{part}': give a folder of shards, one .tar, a glob, "
                            "a range such as 'x/{00000..01242}.tar', or several joined by ::")
        paths += found
    return paths


# ---- shards: the index ---------------------------------------------------------------------------
MAX_IMAGE_BYTES = 64 << 20  # a tar member larger than this is not read
MAX_CAPTION_BYTES = 64 << 10
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
# Where a sample's two members lie in its shard. A negative text_size marks a .json, not a .txt.
ENTRY = np.dtype([("image", "<u8"), ("image_size", "<u4"), ("text", "<u8"), ("text_size", "<i4")])


def well_formed(text: str) -> str:
    """Half a surrogate pair, as captions cut at a length have, becomes ?: no tokenizer takes it."""
    return text.encode("utf-8", errors="replace").decode()


def parse_caption(content: bytes, is_json: bool) -> str:
    """Caption of a .txt or .json member, white space folded. Raises BadSample if it has none."""
    text = content.decode("utf-8-sig", errors="replace")
    if is_json:
        try:
            text = json.loads(text).get("caption")
        except (ValueError, AttributeError, RecursionError):
            raise BadSample("broken json") from None
        if not isinstance(text, str):
            raise BadSample("no caption in json")
    if not text.strip():
        raise BadSample("empty caption")
    return " ".join(well_formed(text).split())


@functools.lru_cache(maxsize=128)
def open_shard(path: str):
    return open(path, "rb", buffering=0)  # closed when it falls out of the cache


def read_range(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset`. Raises BadSample if they cannot be read."""
    try:
        content = os.pread(open_shard(path).fileno(), size, offset)
    except OSError:
        raise BadSample("unreadable shard") from None
    if len(content) < size:
        raise BadSample("truncated shard")
    return content


def index_shard(path: Path | str) -> tuple[list[str], np.ndarray, Counter, Counter]:
    """Keys and ENTRY rows of a shard's usable samples, {reason: skipped}, {extension: members}.

    Members are paired by key = path without the last extension, wherever in the shard they stand.
    Links are never followed and nothing is unpacked, so no path leads out of the archive. A shard
    that breaks off, or is no tar at all, gives what can be read up to there.
    """
    images, texts, jsons = {}, {}, {}  # key: (offset, bytes), or () where that is a link
    parts = dict.fromkeys(IMAGE_TYPES, images) | {"txt": texts, "json": jsons}
    skipped, extensions, last = Counter(), Counter(), -1
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # A negative size leads backwards, where tarfile would go round for ever
                if member.size < 0 or tar.offset <= last:
                    raise BadSample("broken tar header")
                last, tar.members = tar.offset, []  # else tarfile keeps every header
                key, _, extension = member.name.rpartition(".")
                extension = extension.lower()
                extensions[extension] += 1
                if extension not in parts or member.isdir():
                    continue
                if member.offset_data + member.size > size:
                    raise BadSample("truncated shard")
                if key in parts[extension]:
                    skipped["duplicate key"] += 1
                else:
                    plain = member.isreg() and not member.issparse()
                    parts[extension][key] = (member.offset_data, member.size) if plain else ()
            # tarfile ends quietly at a header that it cannot read; a true end is a block of zeros
            end = os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset)
            if end != bytes(tarfile.BLOCKSIZE):
                whole = len(end) == tarfile.BLOCKSIZE
                raise BadSample("broken tar header" if whole else "truncated shard")
    except BadSample as reason:
        skipped[str(reason)] += 1
    except tarfile.ReadError:
        skipped["truncated shard" if extensions else "not a tar" if size else "empty shard"] += 1
    except OSError:
        skipped["unreadable shard"] += 1
    except Exception:  # tarfile raises what it meets in a garbled header: ValueError, ...
        skipped["broken tar header"] += 1

    keys, rows = [], []
    for key, image in images.items():
        is_json = key not in texts
        text = jsons.get(key) if is_json else texts[key]
        try:
            if text is None:
                raise BadSample("no caption")
            if not image or not text:
                raise BadSample("link or special member")
            if not image[1]:
                raise BadSample("empty image")
            if image[1] > MAX_IMAGE_BYTES or text[1] > MAX_CAPTION_BYTES:
                raise BadSample("member too large")
            parse_caption(read_range(str(path), *text), is_json)
        except BadSample as reason:
            skipped[str(reason)] += 1
        else:
            keys.append(key)
            rows.append((*image, text[0], -text[1] if is_json else text[1]))
    skipped["no image"] += len((texts.keys() | jsons.keys()) - images.keys())
    return keys, np.array(rows, dtype=ENTRY), +skipped, extensions


class ShardIndex:
    """All usable samples of a list of shards, by number 0 .. len - 1, in storage order.

    The headers are read once, `workers` shards at a time, and the result is kept, in
    $PARACLIP_CACHE or ~/.cache/paraclip. It is memory-mapped: the processes of a machine share one
    copy of an ENTRY a sample, which is why 400 million fit. A damaged one is made again.

    Attributes: `shards`, `skipped` {reason: count}, `extensions` {extension: members}, and
    `fingerprint`, a hash of every sample's place and length, the same wherever the same shards lie.
    Raises UserError if no sample is usable.
    """

    def __init__(self, data: str, workers: int = 1):
        open_shard.cache_clear()  # a shard may have been replaced since
        self.shards = [str(path.absolute()) for path in find_shards(data)]
        versions = [ENTRY.descr, os.getuid()]
        for path in self.shards:
            versions.append(path)
            with contextlib.suppress(OSError):  # the last of the times changes by a move, too
                status = os.stat(path)
                versions += status.st_size, status.st_mtime_ns, status.st_ctime_ns
        folder = os.path.expanduser(os.environ.get("PARACLIP_CACHE") or "~/.cache/paraclip")
        if folder.startswith("~"):
            raise UserError("no home folder to keep the index of shards in: set PARACLIP_CACHE")
        os.makedirs(folder, exist_ok=True)
        stem = f"{folder}/{hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:24]}"
        with FileLock(f"{stem}.lock"):  # of processes that start together one builds it
            summary = None
            with contextlib.suppress(Exception):  # not there, or damaged in whatever way
                kept = json.loads(Path(f"{stem}.json").read_bytes())
                rows_file = f"{stem}.{kept['fingerprint'][:12]}.rows"
                summary = kept if kept["fingerprint"] == self._hash(kept, rows_file) else None
            if summary is None:
                summary = self._build(workers, stem)
        self.skipped, self.extensions = summary["skipped"], summary["extensions"]
        self.starts = np.cumsum([0] + summary["counts"])  # first sample of each shard, and the end
        self.fingerprint = summary["fingerprint"]
        self.rows_file = f"{stem}.{self.fingerprint[:12]}.rows"
        if not len(self):
            raise UserError(
                f"no usable sample in the {len(self.shards)} shards of '{data}': a sample is "
                "KEY.jpg, .jpeg, .png or .webp and KEY.txt, or KEY.json with \"caption\"; "
                f"skipped: {self.skipped}; members seen: {self.extensions or 'none'}")

    def _hash(self, summary: dict, rows_file: str) -> str:
        facts = [summary[name] for name in ("counts", "skipped", "extensions")]
        digest = hashlib.sha256(json.dumps(facts).encode())
        if os.path.getsize(rows_file):
            digest.update(np.memmap(rows_file, np.uint8, mode="r"))
        return digest.hexdigest()

    def _build(self, workers: int, stem: str) -> dict:
        counts, skipped, extensions = [], Counter(), Counter()
        with contextlib.ExitStack() as stack, replacing(f"{stem}.rows") as file:
            indexed = map(index_shard, self.shards)
            if workers > 1:
                pool = multiprocessing.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN))
                indexed = stack.enter_context(pool).imap(index_shard, self.shards)
            for _, rows, bad, seen in tqdm(indexed, "indexing shards", len(self.shards),
                                           disable=None, leave=False):
                file.write(rows.tobytes())
                counts.append(len(rows))
                skipped += bad
                extensions += seen
        summary = {"counts": counts, "skipped": dict(skipped),
                   "extensions": dict(extensions.most_common(20))}
        fingerprint = summary["fingerprint"] = self._hash(summary, f"{stem}.rows")
        # Named by its content: whoever reads an index that was built before this one keeps it
        os.replace(f"{stem}.rows", f"{stem}.{fingerprint[:12]}.rows")
        if skipped["unreadable shard"] == sum(not os.path.exists(path) for path in self.shards):
            with replacing(f"{stem}.json") as file:  # else a passing fault would be remembered
                file.write(json.dumps(summary).encode())
        return summary

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "entries"}  # workers map it anew

    @functools.cached_property
    def entries(self) -> np.ndarray:
        return np.memmap(self.rows_file, ENTRY, mode="r")

    def _read(self, i: int, part: str) -> tuple[bytes, int]:
        entry = self.entries[i]
        shard = self.shards[int(np.searchsorted(self.starts, i, side="right")) - 1]
        size = int(entry[f"{part}_size"])
        return read_range(shard, int(entry[part]), abs(size)), size

    def caption(self, i: int) -> str:  # raises BadSample, as image does
        content, size = self._read(i, "text")
        return parse_caption(content, is_json=size < 0)

    def image(self, i: int) -> bytes:
        return self._read(i, "image")[0]


# ---- order: a function of (seed, epoch) and of nothing else --------------------------------------
WINDOW = 24_576  # samples that are mixed with each other
BLOCK_BYTES = 4 << 20


def epoch_order(n: int, block: int, seed: int, epoch: int):
    """Yields the samples 0 .. n - 1 in a random order that disks can follow.

    A full permutation would make every read a random one, and need 8 bytes a sample. So blocks of
    neighbouring samples are permuted over the whole set, and the samples of WINDOW's worth of
    blocks among themselves.
    """
    blocks = np.random.default_rng((seed, epoch)).permutation(-(-n // block))
    for number, window in enumerate(np.array_split(blocks, max(1, n // WINDOW))):
        samples = (window[:, None] * block + np.arange(block)).ravel()
        samples = samples[samples < n]  # the last block may be short
        yield from np.random.default_rng((seed, epoch, number)).permutation(samples).tolist()


def batch_order(index: ShardIndex, batch_size: int, seed: int, start: int, steps: int, rank: int,
                world: int):
    """Yields this rank's [(epoch, sample)] for each of the steps start .. steps - 1.

    Rank r takes the r-th slice of every global batch: W ranks see together what one process would
    see, in as many steps. The remainder of an epoch that fills no global batch is dropped.
    """
    n, local = len(index), batch_size // world
    mean_bytes = max(1, float(index.entries["image_size"][:1024].mean()))
    block = int(max(1, min(1024, BLOCK_BYTES / mean_bytes)))
    for step in range(start, steps):
        epoch, done = divmod(step, n // batch_size)
        if step == start or done == 0:
            samples = itertools.islice(epoch_order(n, block, seed, epoch), done * batch_size, None)
        batch = [(epoch, i) for i in itertools.islice(samples, batch_size)]
        yield batch[rank * local:(rank + 1) * local]


# ---- pictures: decoding and cropping -------------------------------------------------------------
MAX_PIXELS = 64_000_000  # a picture that says it is larger is refused before it is decoded
# Pillow would also open, under any name, EPS (by running Ghostscript) and a zoo of rare formats.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
try:
    # Pillow reads every header, and decodes all once torchvision drops its JPEG decoder, as it
    # announces: until then that one gives the same pixels faster. (torchcodec, which is
    # to follow it, would be one more dependency tied to a release of torch.)
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None


def to_rgb(picture: Image.Image) -> Image.Image:
    """A Pillow picture as viewers show it: turned as EXIF says, on white, 8 bits a channel."""
    if picture.getexif().get(ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):  # 16-bit grey, which convert() would clip
        picture = picture.point(lambda value: value / 256).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def decode_image(content: bytes) -> torch.Tensor:
    """Bytes of a picture -> uint8 RGB (3, H, W), as `to_rgb` shows it. Raises BadSample."""
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)  # reads the header
    except Image.DecompressionBombError:
        raise BadSample("too many pixels") from None
    except Exception:  # Pillow's plugins raise what they like on garbled bytes
        raise BadSample("not a picture") from None
    if picture.width * picture.height > MAX_PIXELS:
        raise BadSample("too many pixels")
    try:
        if decode_jpeg and picture.format == "JPEG" and picture.getexif().get(ORIENTATION, 1) == 1:
            with contextlib.suppress(RuntimeError):  # then Pillow decides whether it is broken
                encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                return decode_jpeg(encoded, mode=ImageReadMode.RGB)
        return TF.pil_to_tensor(to_rgb(picture))
    except Exception:
        raise BadSample("broken image") from None


def random_crop(image: torch.Tensor, size: int, min_area: float, rng: random.Random):
    """Inception's crop of min_area .. 1 of the area: uint8 (3, H, W) -> (3, size, size)."""
    height, width = image.shape[-2:]
    area = height * width * rng.uniform(min_area, 1)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    h = max(1, min(height, round((area / ratio) ** 0.5)))
    w = max(1, min(width, round((area * ratio) ** 0.5)))
    top, left = rng.randint(0, height - h), rng.randint(0, width - w)
    # In uint8, and bilinear as SLIP: bicubic, as evaluation has it, would take a seventh longer.
    crop = image[None, :, top:top + h, left:left + w]
    return F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]


def center_crop(picture: Image.Image, size: int) -> torch.Tensor:
    """Evaluation's view, shorter side resized, centre cut out: Pillow -> uint8 (3, size, size)."""
    picture = TF.resize(to_rgb(picture), [size], TF.InterpolationMode.BICUBIC)
    return TF.pil_to_tensor(TF.center_crop(picture, [size, size]))


# ---- the training loader -------------------------------------------------------------------------
REPLACEMENTS = 100  # samples that may fail in a row before the set is called unusable
MIN_GROUP, LENGTH_GROUPS = 64, 4  # captions in a group at least, groups in a micro-batch at most
GRACE = 20  # seconds


class TrainingSet(Dataset):
    """(epoch, sample) -> (image (3, S, S), caption, None or why another sample takes its place).

    fill=False: none does; a bad sample is a black image without a caption, and the reason.
    """

    def __init__(self, index: ShardIndex, image_size: int, crop: float, seed: int, fill=True):
        self.index, self.image_size, self.crop = index, image_size, crop
        self.seed, self.fill = seed, fill

    def __getitem__(self, key: tuple[int, int]):
        epoch, i = key
        rng = random.Random(f"{self.seed} {epoch} {i}")  # numpy's take twice as long to seed
        failed = None
        for _ in range(REPLACEMENTS):
            try:
                image = decode_image(self.index.image(i))
                image = random_crop(image, self.image_size, self.crop, rng)
                return image, self.index.caption(i), failed
            except BadSample as reason:
                failed = failed or str(reason)
                if not self.fill:
                    return torch.zeros(3, self.image_size, self.image_size).byte(), "", failed
                # A random other sample, not the next: a broken shard makes long bad stretches.
                i = rng.randrange(len(self.index))
        raise UserError(f"{REPLACEMENTS} samples in a row could not be read, the first because of: "
                        f"{failed}. `python data.py PATH` counts what is wrong")


def collate(samples: list, accum: int, tokenize):
    """-> `accum` micro-batches (images, token groups), and {reason: samples filled}.

    The loss does not mind the order inside a batch: captions are sorted by length and tokenized in
    groups, so that few are padded to the length of the longest.
    """
    samples = sorted(samples, key=lambda sample: len(sample[1]))
    size = len(samples) // accum  # b
    group = max(MIN_GROUP, math.ceil(size / LENGTH_GROUPS))
    micro_batches = []
    for first in range(0, len(samples), size):
        images, captions, _ = zip(*samples[first:first + size])
        # default_collate and not stack: in a worker it writes into memory that the parent shares.
        images = default_collate(images)  # (b, 3, S, S)
        groups = [tokenize(list(captions[i:i + group])) for i in range(0, size, group)]
        micro_batches.append((images, groups))
    # A plain dict: pinning copies a mapping by its update(), which in a Counter adds.
    return micro_batches, dict(Counter(reason for *_, reason in samples if reason))


def leave_signals_to_parent(worker: int):
    # A scheduler signals the whole process group. The parent, which finishes its step and writes a
    # checkpoint, needs its workers a little longer; SIGTERM is also how it ends them itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))


def training_loader(index: ShardIndex, *, batch_size: int, accum: int, seed: int, start: int,
                    steps: int, rank: int, world: int, image_size: int, crop: float, workers: int,
                    tokenize, pin: bool = False):
    """Batches of this rank for the steps start .. steps - 1, the same for any `workers`.

    Each is a list of `accum` micro-batches (images uint8 (b, 3, S, S), token groups), where
    b = batch_size / world / accum, and {reason: samples filled}. A token group is what `tokenize`
    (list of str -> dict of tensors) makes of the next captions.
    """
    with contextlib.suppress(ValueError, OSError):  # each tensor of a worker takes a descriptor
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 1 << 16)), hard))
    return DataLoader(
        TrainingSet(index, image_size, crop, seed), num_workers=workers, pin_memory=pin,
        batch_sampler=batch_order(index, batch_size, seed, start, steps, rank, world),
        collate_fn=functools.partial(collate, accum=accum, tokenize=tokenize),
        worker_init_fn=leave_signals_to_parent,
        prefetch_factor=2 if workers else None)  # each batch that waits takes shared memory


# ---- evaluation data: texts ----------------------------------------------------------------------
# Every reader raises UserError naming the file and the line (in a JSON array: the item).
def read_text(path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (at byte {error.start}); save it as UTF-8") from None


def read_lines(path) -> list[tuple[int, str]]:
    """[(line number, stripped text)] of the lines that are not blank."""
    # Not splitlines(), which would also cut at U+2028 and its like, legal inside a JSON string.
    lines = read_text(path).split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def parse_json(text: str, place):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}") from None


def read_records(path, fields: list[str], aliases: dict = {}) -> list[dict]:
    """The objects of a JSON array or of JSON lines, each with text under all `fields`.

    aliases: {another name of a field: the field}. "image" must be a text, "images" a list of them.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        items = enumerate(parse_json(text, path), 1)
        found = [(f"{path}, item {number}", item) for number, item in items]
    else:
        lines = [(f"{path}, line {number}", line) for number, line in read_lines(path)]
        found = [(place, parse_json(line, place)) for place, line in lines]
    if not found:
        raise UserError(f"{path}: empty; expected a JSON array or lines with {', '.join(fields)}")
    for place, record in found:
        if not isinstance(record, dict):
            raise UserError(f"{place}: expected an object with {', '.join(fields)}")
        for name in aliases.keys() & record.keys():
            record.setdefault(aliases[name], record[name])
        for field in fields:
            if not isinstance(record.get(field), str) or not record[field].strip():
                raise UserError(f'{place}: no text under "{field}" (found: {", ".join(record)})')
            record[field] = well_formed(record[field])
        images = record.get("images", [])
        names = [record.get("image", ""), record.get("filename", "")]
        names += images if isinstance(images, list) else [None]
        if not all(isinstance(name, str) for name in names):
            raise UserError(f'{place}: "image" must be a name, "images" a list of names')
    return [record for _, record in found]


def read_pairs(path) -> list[dict]:
    """[{"query", "paraphrase", ...}]; the keys of SugarCrepe++ serve as well.

    "image" names the picture that the query describes, "images" a list where several are right.
    """
    return read_records(path, ["query", "paraphrase"],
                        {"caption": "query", "caption2": "paraphrase", "filename": "image"})


def read_triplets(path) -> list[dict]:
    """[{"caption", "caption2", "negative_caption", "filename"?}] of a SugarCrepe++ file."""
    return read_records(path, ["caption", "caption2", "negative_caption"])


def read_captions(path) -> dict[str, list[str]]:
    """{file name: [captions]} of a COCO captions file, without pictures that have none."""
    coco, captions = parse_json(read_text(path), path), {}
    try:
        names = {image["id"]: image["file_name"] for image in coco["images"]}
        for annotation in coco["annotations"]:
            name, caption = names[annotation["image_id"]], annotation["caption"]
            if not (isinstance(name, str) and isinstance(caption, str) and caption.strip()):
                raise TypeError(f"no text: {annotation}")
            captions.setdefault(name, []).append(well_formed(caption))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a COCO captions file ({type(error).__name__}: {error}); expected "
            '{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}') from None
    if not captions:
        raise UserError(f"{path}: no annotations with a caption")
    return captions


def read_sts(path) -> list[tuple[str, str, float]]:
    """[(sentence1, sentence2, score)] of CSV or TSV: columns of these names, else the first."""
    text, header = read_text(path), ["sentence1", "sentence2", "score"]
    # Tab-separated sets (GLUE's) hold stray quote characters that quote nothing.
    tabs = "\t" in text.lstrip().partition("\n")[0]
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    reader, rows, columns = csv.reader(io.StringIO(text, newline=""), **style), [], [0, 1, 2]
    try:
        for row in reader:
            names = [name.strip().lower() for name in row]
            if not rows and set(header) <= set(names):
                columns = [names.index(name) for name in header]
            elif row:
                sentence1, sentence2, score = (row[column] for column in columns)
                if not math.isfinite(float(score)):
                    raise ValueError
                rows.append((sentence1, sentence2, float(score)))
    except (IndexError, ValueError, csv.Error):
        raise UserError(f"{path}, line {reader.line_num}: expected sentence1, sentence2 and a "
                        "finite number") from None
    if not rows:
        raise UserError(f"{path}: no rows; expected {', '.join(header)}")
    return rows


def read_templates(path) -> list[str]:
    """The prompt templates of a file, one a line, each with {} where the class name goes."""
    lines = read_lines(path)
    for number, line in lines or [(1, "")]:
        if "{}" not in line:
            raise UserError(f"{path}, line {number}: a template needs {{}} where the class name "
                            f"goes, found {line!r}")
    return [line for _, line in lines]


# ---- evaluation data: pictures -------------------------------------------------------------------
# A gallery is a dict {name: item} in ranking order. An item is a file's path, a (tar, offset,
# bytes) range of a shard, or a uint8 array (H, W, 3) of a torchvision data set held in memory.
def list_pictures(folder) -> dict:
    """The gallery of a folder: the pictures in its .tar shards by key, or else every one below it.

    Those are named and sorted by their path relative to the folder. Links are followed (a folder
    that is reached twice counts once), hidden names left out.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder of pictures")
    open_shard.cache_clear()
    gallery, skipped, seen = {}, Counter(), set()
    for shard in sorted(Path(folder).glob("*.tar")):
        keys, rows, bad, _ = index_shard(shard)
        skipped += bad
        for key, row in zip(keys, rows):
            gallery[key] = str(shard), int(row["image"]), int(row["image_size"])
    if skipped:
        print(f"{folder}: left out of the gallery: {dict(skipped)}", file=sys.stderr)
    if gallery:
        return gallery
    suffixes = tuple(f".{suffix}" for suffix in (*IMAGE_TYPES, "bmp"))
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = sorted(name for name in folders if name[0] != "." and real not in seen)
        for name in files if real not in seen else ():
            path = Path(place, name)
            if name[0] != "." and name.lower().endswith(suffixes) and path.is_file():
                gallery[path.relative_to(folder).as_posix()] = path
        seen.add(real)
    if not gallery:
        raise UserError(f"{folder}: no picture in it or below ({', '.join(suffixes)})")
    return dict(sorted(gallery.items()))


def rows_by_name(names) -> dict[str, int]:
    """{name: row}; a picture in a subfolder also by its file name alone, unless two share that."""
    shorts = [name.rsplit("/", 1)[-1] for name in names]
    uses = Counter(shorts)
    rows = {short: row for row, short in enumerate(shorts) if uses[short] == 1}
    return rows | {name: row for row, name in enumerate(names)}


def read_benchmark(folder):
    """(gallery, pairs, class names, {picture: class index}) of a folder of shards with questions.

    Those are pairs.jsonl, each pair with a "kind", and zeroshot.json.
    """
    gallery, file = list_pictures(folder), Path(folder) / "zeroshot.json"
    pairs = read_records(Path(folder) / "pairs.jsonl", ["query", "paraphrase", "kind"])
    zeroshot = parse_json(read_text(file), file)
    try:
        names = [str(name) for name in zeroshot["classnames"]]
        labels = {key: range(len(names))[i] for key, i in zeroshot["labels"].items()}
    except (KeyError, TypeError, IndexError, AttributeError):
        raise UserError(f"{file}: expected classnames: [names], labels: {{key: index}}") from None
    return gallery, pairs, names, {key: i for key, i in labels.items() if key in gallery}


def read_zeroshot(source: str, classnames: str = ""):
    """(gallery, class names, {picture: class index}) of labelled pictures.

    source: a folder of class folders, imagenet:ROOT (those of ROOT/val), cifar10:ROOT or
    cifar100:ROOT (torchvision's test sets; nothing is downloaded). Names: the lines of the file
    `classnames` in the order of the sorted folders, else the folders', of ImageNet and CIFAR
    torchvision's, with _ read as a space.
    """
    kind, _, root = source.partition(":")
    if kind in ("cifar10", "cifar100"):
        try:
            dataset = getattr(torchvision.datasets, kind.upper())(root, train=False)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{root}: torchvision's {kind.upper()} is not there, and nothing is "
                            f"downloaded ({error})") from None
        names, gallery = dataset.classes, {f"test/{i}": p for i, p in enumerate(dataset.data)}
        labels = dict(zip(gallery, dataset.targets))
    else:
        folder = Path(root).expanduser() / "val" if kind == "imagenet" else Path(source)
        gallery = {name: path for name, path in list_pictures(folder).items() if "/" in name}
        names = sorted({name.split("/")[0] for name in gallery})
        numbers = {name: number for number, name in enumerate(names)}
        labels = {name: numbers[name.split("/")[0]] for name in gallery}
        if kind == "imagenet" and len(names) == 1000:  # folders named by sorted WordNet ids
            names = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    if not labels:
        raise UserError(f"{source}: no class folders with pictures; expected one folder a class")
    names = [name.replace("_", " ") for name in names]
    if classnames:
        given = [line for _, line in read_lines(classnames)]
        if len(given) != len(names):
            raise UserError(f"{classnames}: {len(given)} names for {len(names)} classes")
        names = given
    return gallery, names, labels


def open_picture(item) -> Image.Image:
    """Pillow picture (RGB) of a gallery's item. Raises BadSample or OSError."""
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    content = item.read_bytes() if isinstance(item, Path) else read_range(*item)
    return TF.to_pil_image(decode_image(content))


def collate_pictures(items: list, preprocess):
    good, bad = {}, []
    for i, item in items:
        try:
            good[i] = preprocess(open_picture(item))
        except (ValueError, OSError) as error:  # BadSample, or the model's preprocessing refuses it
            bad.append((i, str(error) or type(error).__name__))
    return list(good), default_collate(list(good.values())) if good else None, bad


def picture_loader(gallery: dict, preprocess, batch_size: int, workers: int):
    """Yields (indices, batch or None, [(index, reason)]) of a gallery, in its order.

    preprocess is the model's own (Pillow RGB -> tensors).
    """
    return DataLoader(list(enumerate(gallery.values())), batch_size, num_workers=workers,
                      collate_fn=functools.partial(collate_pictures, preprocess=preprocess),
                      worker_init_fn=leave_signals_to_parent)


# ---- inspecting a shard set ----------------------------------------------------------------------
INSPECTED = 50_000  # pictures decoded at most by `python data.py PATH`


@dataclasses.dataclass
class InspectConfig:
    data: str = flag("", "folder, .tar, glob, range {00000..01242}.tar, several joined by ::",
                     positional=True)
    batch_size: int = flag(256, "global batch, to tell the steps of an epoch", at_least=1)
    image_size: int = flag(224, "pixels a side of the training crop", at_least=1)
    workers: int = flag(1, "processes that read and decode", at_least=0)

    def __post_init__(self):
        check_ranges(self)


def main(argv=None):
    cfg = parse_config(InspectConfig, argv)
    index = ShardIndex(cfg.data, cfg.workers)
    n, steps = min(len(index), INSPECTED), len(index) // cfg.batch_size
    samples = [(0, i) for i in itertools.islice(epoch_order(len(index), 128, seed=0, epoch=0), n)]
    loader = DataLoader(
        TrainingSet(index, cfg.image_size, crop=0.5, seed=0, fill=False), num_workers=cfg.workers,
        batch_sampler=[samples[i:i + 64] for i in range(0, n, 64)],
        collate_fn=functools.partial(collate, accum=1, tokenize=list))
    failed, lengths, done, began = Counter(), [], 0, None
    for [(images, groups)], bad in tqdm(loader, "decoding", disable=None, leave=False):
        failed.update(bad)
        lengths += [len(caption.split()) for group in groups for caption in group]
        done += len(images) if began else 0  # not the first batch: it waits for the workers' start
        began = began or time.perf_counter()
    rate = round(done / (time.perf_counter() - began), 1) if done else None
    print(f"{len(index.shards)} shards, {len(index):,} samples, {steps} steps an epoch; skipped: "
          f"{index.skipped or 'none'}; {n:,} decoded, broken: {dict(failed) or 'none'}; words a "
          f"caption: {np.mean(lengths):.1f}, at most {max(lengths)}")
    print(json.dumps({
        "shards": len(index.shards), "samples": len(index) - failed.total(), "decoded": n,
        "skipped": Counter(index.skipped) + failed, "keys": index.extensions,
        "steps_per_epoch": steps, "images_per_s": rate}))


if __name__ == "__main__":
    import data  # the module that all others import, whose UserError they raise
    data.run(data.main)
