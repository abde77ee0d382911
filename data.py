"""The data of paraclip: from tar shards of images and captions to training batches.

    tar shards -> ShardIndex      a table: where each image and each caption lies
               -> epoch_order     a permutation of its rows
               -> TrainingSet[i]  one image, decoded and cropped, with one caption
               -> collate         a batch of them
               -> training_loader the batches of a run

    python data.py PATH [--workers N]   # check your shards: samples, skips by reason, images/s
"""

import argparse
import atexit
import contextlib
import functools
import glob
import hashlib
import io
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
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torchvision
from filelock import FileLock
from typing import NamedTuple
from concurrent.futures import ThreadPoolExecutor
from common.cli import UserError, flag, check_ranges, parse_config, run
from common.files import atomic_write, cache_folder, data_folder
from common.distributed import usable_cores, cores_to_spare
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm


# ---- the index: a table of samples ---------------------------------------------------------------
# A row of the table. Members of a tar begin at multiples of 512 bytes, so that 32 bits are enough
# for the place of a member in a shard of up to 2 TiB.
BLOCK = tarfile.BLOCKSIZE
ENTRY = np.dtype([("image_block", "<u4"), ("image_size", "<u4"),
                  ("caption_block", "<u4"), ("caption_size", "<u4"), ("is_json", "?")])


class ShardIndex:
    """The table of all usable samples of a set of shards, numbered 0 .. len - 1 in storage order.

    It is built once, by `workers` processes, and kept in $PARACLIP_CACHE (default
    ~/.cache/paraclip). Rows are read from there one by one, 17 bytes a sample: 400 million
    samples need no memory. Raises UserError if there is no usable sample.

    shards: paths of the tar files. skipped: {reason: samples left out}. extensions: {extension:
    members}. rows_file: path of the table. fingerprint: a hash of the table and of all captions,
    the same wherever the shards lie.
    """

    def __init__(self, data: str, workers: int = 0):
        # A shard may have been replaced since it was opened.
        open_shard.cache_clear()
        self.shards = [str(path.absolute()) for path in find_shards(data)]
        # ctime, unlike mtime, tells every change of a file.
        ctimes = [os.stat(path).st_ctime_ns for path in self.shards if os.path.exists(path)]
        key = json.dumps([ENTRY.descr, os.getuid(), self.shards, ctimes])
        stem = f"{cache_folder()}/{hashlib.sha256(key.encode()).hexdigest()[:24]}"
        # Of processes that start together one builds the index, and the others wait.
        with FileLock(f"{stem}.lock"):
            facts = load_index(stem) or build_index(self.shards, stem, workers)
        self.skipped, self.extensions = facts["skipped"], facts["extensions"]
        self.rows_file = rows_file_of(stem, facts)
        self.fingerprint = fingerprint_of(facts)
        # The number of the first sample of each shard, and of the end.
        self.starts = np.cumsum([0] + facts["samples"])
        if len(self) == 0:
            raise UserError(f"no KEY.jpg with KEY.txt or KEY.json in '{data}'; skipped: "
                            f"{self.skipped}; members seen: {self.extensions or 'none'}")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _row(self, i: int) -> tuple[str, np.void]:
        """The shard that holds sample i, and the sample's row."""
        shard = self.shards[int(np.searchsorted(self.starts, i, side="right")) - 1]
        content = read_range(self.rows_file, i * ENTRY.itemsize, ENTRY.itemsize)
        return shard, np.frombuffer(content, ENTRY)[0]

    def image(self, i: int) -> bytes:
        """The image file of sample i. Raises BadSample."""
        shard, row = self._row(i)
        return read_range(shard, int(row["image_block"]) * BLOCK, int(row["image_size"]))

    def captions(self, i: int) -> list[str]:
        """The captions of sample i, one or several. Raises BadSample."""
        shard, row = self._row(i)
        return read_captions(shard, int(row["caption_block"]) * BLOCK, int(row["caption_size"]),
                             bool(row["is_json"]))

    def prefetch(self, first: int, count: int):
        """Asks the system to read `count` neighbouring samples into its page cache as one piece.

        Samples are read in random order. From a cold disk this is 1.2 to 2 times as fast.
        """
        last = min(first + count, len(self)) - 1
        with contextlib.suppress(BadSample, OSError):
            shard, row = self._row(first)
            last_shard, last_row = self._row(last)
            # A block that spans two shards is left to ordinary reading; macOS has no such call.
            if shard == last_shard and hasattr(os, "posix_fadvise"):
                begin = int(row["image_block"]) * BLOCK
                end = int(last_row["image_block"]) * BLOCK + int(last_row["image_size"])
                os.posix_fadvise(open_shard(shard).fileno(), begin, end - begin,
                                 os.POSIX_FADV_WILLNEED)


# ---- the order of samples ------------------------------------------------------------------------
#   0 1 2 3 4 5 6 7 8 9 ...         samples in storage order; neighbours lie together on disk
#   [0 1 2] [3 4 5] [6 7 8] ...     cut into blocks of neighbours, BLOCK_BYTES long
#   [6 7 8] [0 1 2] | [3 4 5] ...   blocks shuffled, and grouped into windows of WINDOW samples
#   7 0 8 2 6 1 | 4 9 3 ...         samples shuffled within each window; batches are cut from these
WINDOW = 24_576
BLOCK_BYTES = 4 << 20


def epoch_order(n: int, block: int, seed: int, epoch: int):
    """Yields 0 .. n - 1 in an order that is a function of (seed, epoch): blocks of `block`
    neighbours are shuffled over the whole set, then samples within windows of blocks."""
    blocks = np.random.default_rng((seed, epoch)).permutation(math.ceil(n / block))
    windows = np.array_split(blocks, max(1, n // WINDOW))
    for number, window in enumerate(windows):
        samples = (window[:, None] * block + np.arange(block)).ravel()
        # The last block may be shorter than the others.
        samples = samples[samples < n]
        yield from np.random.default_rng((seed, epoch, number)).permutation(samples).tolist()


def batch_order(index: ShardIndex, batch_size: int, seed: int, start: int, steps: int,
                rank: int, ranks: int):
    """Yields this rank's [(epoch, sample)] for each of the steps start .. steps - 1.

    It is the rank-th slice of every global batch. What remains at an epoch's end and fills no
    global batch is dropped.
    """
    image_bytes = np.fromfile(index.rows_file, ENTRY, 1024)["image_size"].mean()
    block = int(max(1, min(1024, BLOCK_BYTES / float(image_bytes))))
    # Of several machines each reads a part of every block only.
    one_machine = ranks == int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    steps_per_epoch = len(index) // batch_size
    slice_size = batch_size // ranks
    for step in range(start, steps):
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        if step == start or step_in_epoch == 0:
            samples = epoch_order(len(index), block, seed, epoch)
            prefetched = set()
            for _ in range(step_in_epoch * batch_size):
                next(samples)
        batch = [(epoch, next(samples)) for _ in range(batch_size)]
        for _, i in batch:
            if one_machine and i // block not in prefetched:
                prefetched.add(i // block)
                index.prefetch(i // block * block, block)
        yield batch[rank * slice_size:(rank + 1) * slice_size]


# ---- the training loader -------------------------------------------------------------------------
# If so many samples in a row are bad, the set is called unusable.
MAX_REPLACEMENTS = 100
# tokenize_groups makes at most LENGTH_GROUPS groups, each of at least MIN_GROUP captions.
LENGTH_GROUPS = 4
MIN_GROUP = 64


class TrainingSet(Dataset):
    """(epoch, sample) -> (image uint8 (3, S, S), caption, all captions of the image, reason).

    Crop, mirroring, and caption where a sample has several, are functions of (seed, epoch, sample).
    A sample that proves bad is replaced by another one, and `reason` says why; it is "" otherwise.
    """

    def __init__(self, index: ShardIndex, image_size: int, min_area: float, flip: bool, seed: int):
        self.index, self.image_size, self.seed = index, image_size, seed
        self.min_area, self.flip = min_area, flip

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, str, list[str], str]:
        epoch, i = key
        first_reason = ""
        # numpy's generators take twice as long to seed.
        rng = random.Random(f"{self.seed} {epoch} {i}")
        for _ in range(MAX_REPLACEMENTS):
            try:
                image = decode_image(self.index.image(i))
                image = random_crop(image, self.image_size, self.min_area, rng)
                captions = self.index.captions(i)
            except BadSample as reason:
                first_reason = first_reason or str(reason)
                # A random sample and not the next one: a broken shard makes long bad stretches.
                i = rng.randrange(len(self.index))
                continue
            caption = captions[0] if len(captions) == 1 else rng.choice(captions)
            if self.flip and rng.random() < 0.5:
                image = image.flip(-1)
            return Sample(image, caption, captions, epoch, i, first_reason)
        raise UserError(f"{MAX_REPLACEMENTS} samples in a row cannot be read, the first: "
                        f"{first_reason}")


class Sample(NamedTuple):
    image: object
    caption: str
    captions: list
    epoch: int
    number: int
    fault: str


class Batch(NamedTuple):
    micro_batches: list
    constants: object
    replaced: dict
    waited: float = 0.0


def collate(samples, accum, tokenize, objective):
    samples = sorted(samples, key=lambda sample: len(sample.caption))
    size = len(samples) // accum
    micro_batches = []
    for first in range(0, len(samples), size):
        part = samples[first:first + size]
        micro_batches.append((default_collate([s.image for s in part]),
                              tokenize_groups(objective.captions(part), tokenize)))
    replaced = Counter(s.fault for s in samples if s.fault)
    return Batch(micro_batches, objective.constants(samples), dict(replaced))


def read_ahead(batches):
    batches = iter(batches)
    batch = next(batches, None)
    with ThreadPoolExecutor(1) as fetcher:
        waited = 0.0
        while batch is not None:
            upcoming = fetcher.submit(next, batches, None)
            yield batch._replace(waited=waited)
            began = time.perf_counter()
            batch = upcoming.result()
            waited = time.perf_counter() - began


def tokenize_groups(captions: tuple[str], tokenize) -> list[dict]:
    """Captions, sorted by length -> token batches. Captions of about equal length share one, so
    that they need little padding."""
    group = max(MIN_GROUP, math.ceil(len(captions) / LENGTH_GROUPS))
    return [tokenize(list(captions[i:i + group])) for i in range(0, len(captions), group)]


def training_loader(index: ShardIndex, cfg, start: int, steps: int, rank: int, ranks: int,
                    tokenize, objective, pin_memory: bool = False) -> DataLoader:
    """Iterates over this rank's batches of the steps start .. steps - 1, as `collate` returns them:
    cfg.accum micro-batches have b = batch_size / ranks / accum samples each.

    The batches are the same for any cfg.workers. tokenize: list of str -> dict of tensors.
    cfg has batch_size (global), accum, image_size, crop (minimum area), flip, geometry (all
    captions are needed if it is not 0), seed and workers.
    """
    # Every tensor that a worker hands over takes a file descriptor.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        # Some systems allow less than their own limit.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 1 << 16)), hard))
    return make_loader(
        TrainingSet(index, cfg.image_size, cfg.crop, cfg.flip, cfg.seed), cores_to_spare() if cfg.workers < 0 else cfg.workers,
        batch_sampler=batch_order(index, cfg.batch_size, cfg.seed, start, steps, rank, ranks),
        collate_fn=functools.partial(collate, accum=cfg.accum, tokenize=tokenize, objective=objective),
        pin_memory=pin_memory)


def make_loader(dataset, workers: int, **options) -> DataLoader:
    """A DataLoader whose workers survive the signals that are meant for their parent."""
    atexit.register(kill_workers)
    return DataLoader(dataset, num_workers=workers, worker_init_fn=leave_signals_to_parent,
                      **options)


def leave_signals_to_parent(worker: int):
    # A scheduler signals every process of a job, and the parent needs its workers until it has
    # finished its step and saved. Ten minutes later a worker ends by itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(600))


def kill_workers():
    """At exit. Python would send SIGTERM to workers that are left, and wait for them to end."""
    # torch's handler raises an error for each worker that dies.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


# ---- shards: what a tar file holds ---------------------------------------------------------------
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
# Larger members count as missing.
MAX_MEMBER_BYTES = 64 << 20
MAX_JSON_BYTES = 1 << 20
# Language models keep some 77 tokens of a caption; a page of text would only slow the tokenizer.
MAX_CAPTION = 10_000


def find_shards(data: str) -> list[Path]:
    """The tar files that `data` names, sorted within each part.

    data: a folder of .tar files, one .tar, a glob, a range {00000..01242}, or several of these
    joined by ::. The name cc12m means $PARACLIP_DATA/cc12m. Raises UserError if a part has no file.
    """
    if data == "cc12m":
        data = str(data_folder(data))
    shards = []
    for part in data.split("::"):
        braces = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", part)
        if os.path.isdir(part):
            paths = sorted(glob.glob(f"{glob.escape(part)}/*.tar"))
        elif os.path.isfile(part):
            # Before the glob, since a file's name may look like one: x[2].tar
            paths = [part]
        elif braces:
            # A number without a file is counted later, as a missing shard.
            before, first, last, after = braces.groups()
            numbers = range(int(first), int(last) + 1)
            paths = [f"{before}{number:0{len(first)}d}{after}" for number in numbers]
        else:
            paths = sorted(glob.glob(part))
        if not any(os.path.isfile(path) for path in paths):
            raise UserError(f"no .tar file at '{part}': give a folder, a .tar, a glob, or a range "
                            "such as 'x/{00000..01242}.tar'. For CC12M see img2dataset's dataset_"
                            "examples/cc12m.md, or take Hugging Face's pixparse/cc12m-wds")
        shards += [Path(path) for path in paths]
    return shards


def scan_shard(path: Path | str) -> tuple[dict, dict, dict, Counter, Counter]:
    """Where the members of a shard lie: three dicts {key: (block, bytes)} of its images, .txt and
    .json members; then {reason: samples skipped} and {extension: members}.

    A key is the member's path without the last extension. Links, empty and huge members count as
    missing; nothing is unpacked. Of a broken shard all that comes before the fault is given.
    """
    images, texts, jsons = {}, {}, {}
    skipped, extensions = Counter(), Counter()
    try:
        length = os.path.getsize(path)
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            last_offset = -1
            while True:
                member = tar.next()
                if member is None:
                    break
                # Else tarfile keeps every header in memory.
                tar.members = []
                # A sparse member is shorter in the shard than the size that it states.
                sparse = member.issparse()
                if not sparse and member.size > length - member.offset_data:
                    raise tarfile.ReadError("a member ends after the file")
                # A negative size leads tarfile backwards, where it would go round for ever.
                if tar.offset <= last_offset:
                    raise tarfile.ReadError("a member begins before the last one")
                last_offset = tar.offset

                key, _, extension = member.name.rpartition(".")
                extension = extension.lower()
                extensions[extension] += 1
                if extension in IMAGE_TYPES:
                    members, limit = images, MAX_MEMBER_BYTES
                elif extension == "txt":
                    members, limit = texts, MAX_MEMBER_BYTES
                elif extension == "json":
                    members, limit = jsons, MAX_JSON_BYTES
                else:
                    continue
                if not member.isreg() or sparse or not 0 < member.size <= limit:
                    continue
                if key in members:
                    skipped["duplicate key"] += 1
                    continue
                members[key] = (member.offset_data // BLOCK, member.size)

            # tarfile ends without an error at a header that it cannot read. A tar's true end is a
            # block of zeros, and only zeros follow.
            rest = os.pread(file.fileno(), 1 << 20, tar.offset)
            if rest[:BLOCK] != bytes(BLOCK):
                raise tarfile.ReadError("no end of archive")
            if any(rest):
                skipped["a second archive in the shard"] += 1
    except FileNotFoundError:
        skipped["missing shard"] += 1
    except OSError:
        skipped["unreadable shard"] += 1
    except Exception:
        # tarfile raises whatever it meets in a garbled header: ValueError, OverflowError, ...
        skipped["broken or truncated shard"] += 1
    return images, texts, jsons, skipped, extensions


def index_shard(path: Path | str) -> tuple[list[tuple], int, Counter, Counter]:
    """A shard's usable samples in the order of their images: their ENTRY rows, and the crc32 of
    their captions; then {reason: samples skipped} and {extension: members}."""
    images, texts, jsons, skipped, extensions = scan_shard(path)
    rows, crc32 = [], 0
    for key, (image_block, image_size) in images.items():
        # A .txt is taken before a .json.
        is_json = key not in texts
        if is_json and key not in jsons:
            skipped["no caption"] += 1
            continue
        block, size = jsons[key] if is_json else texts[key]
        try:
            captions = read_captions(str(path), block * BLOCK, size, is_json)
        except BadSample as reason:
            skipped[str(reason)] += 1
            continue
        rows.append((image_block, image_size, block, size, is_json))
        crc32 = zlib.crc32("\n".join(captions).encode(), crc32)
    without_image = len((texts.keys() | jsons.keys()) - images.keys())
    if without_image:
        skipped["no image"] += without_image
    return rows, crc32, skipped, extensions


def rows_file_of(stem: str, facts: dict) -> str:
    # Named by its content: while a shard cannot be read, the same shards have another table, which
    # another process may be using.
    return f"{stem}.{facts['rows_sha256'][:16]}.rows"


def fingerprint_of(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def hash_file(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_index(stem: str) -> dict | None:
    """The facts of an index in the cache; None if it is not there, or damaged."""
    try:
        cached = json.loads(Path(f"{stem}.json").read_bytes())
        facts = cached["facts"]
        if cached["fingerprint"] != fingerprint_of(facts):
            return None
        if facts["rows_sha256"] != hash_file(rows_file_of(stem, facts)):
            return None
        return facts
    except (OSError, ValueError, LookupError, TypeError):
        return None


def build_index(shards: list[str], stem: str, workers: int) -> dict:
    """Indexes the shards and writes their table to the cache. Returns the facts about it."""
    samples, crc32s, skipped, extensions = [], [], Counter(), Counter()
    results = make_loader(shards, workers, batch_size=None, collate_fn=index_shard)
    with atomic_write(f"{stem}.rows") as file:
        for rows, crc32, shard_skipped, shard_extensions in tqdm(
                results, "indexing shards", disable=None, leave=False):
            file.write(np.array(rows, ENTRY).tobytes())
            samples.append(len(rows))
            crc32s.append(crc32)
            skipped += shard_skipped
            extensions += shard_extensions
    facts = {"samples": samples, "captions_crc32": crc32s, "skipped": dict(skipped),
             "extensions": dict(extensions.most_common(20)),
             "rows_sha256": hash_file(f"{stem}.rows")}
    os.replace(f"{stem}.rows", rows_file_of(stem, facts))
    # What a disk cannot read now it may read the next time.
    if "unreadable shard" not in skipped:
        with atomic_write(f"{stem}.json") as file:
            cached = {"fingerprint": fingerprint_of(facts), "facts": facts}
            file.write(json.dumps(cached).encode())
    return facts


# Open files, the most recently used. A file is closed when it falls out of the cache.
@functools.lru_cache(maxsize=128)
def open_shard(path: str):
    return open(path, "rb", buffering=0)


def read_range(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on. Raises BadSample if they cannot be read."""
    try:
        content = os.pread(open_shard(path).fileno(), size, offset)
    except OSError:
        raise BadSample("unreadable shard") from None
    if len(content) < size:
        raise BadSample("unreadable shard")
    return content


def fix_surrogates(text: str) -> str:
    """Replaces half surrogate pairs by ?. Captions cut in mid-emoji have them, and tokenizers
    refuse them."""
    return text.encode("utf-8", errors="replace").decode()


def read_captions(path: str, offset: int, size: int, is_json: bool) -> list[str]:
    """The captions of a KEY.txt (always one) or KEY.json (one or several), white space folded.

    Captions are cut after MAX_CAPTION characters. Raises BadSample if none has a letter.
    """
    if not is_json:
        # No character of UTF-8 has more than four bytes.
        size = min(size, 4 * MAX_CAPTION)
    text = read_range(path, offset, size).decode("utf-8-sig", errors="replace")
    texts = [text]
    if is_json:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            record = None
        texts = record.get("caption") if isinstance(record, dict) else None
        if not isinstance(texts, list):
            texts = [texts]

    captions = []
    for text in texts:
        if isinstance(text, str):
            words = fix_surrogates(text[:MAX_CAPTION]).split()
            if words:
                captions.append(" ".join(words))
    if not captions:
        raise BadSample("empty or broken caption")
    return captions


# ---- images: decoding and cropping ---------------------------------------------------------------
# An image that states a larger size is refused before it is decoded.
MAX_PIXELS = 64_000_000
# Each scan of a progressive JPEG costs a pass over all pixels. Encoders write about ten.
MAX_JPEG_SCANS = 64
JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
# Evaluation cuts the long side of a longer image, since resizing its short side would blow it up.
MAX_ASPECT = 32
# Pillow would also open, under any name, EPS (by running Ghostscript) and a zoo of rare formats.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image as viewers show it: turned as EXIF says, on white, 8 bits a channel."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        # 16-bit grey, which convert() would clip.
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def count_jpeg_scans(content: bytes) -> int:
    """The scans of a JPEG, whatever its metadata hold and whatever follows its end."""
    scans, position = 0, 2
    while True:
        marker = JPEG_MARKER.search(content, position)
        if marker is None or marker.group() == b"\xff\xd9":
            return scans
        if marker.group() == b"\xff\xda":
            scans += 1
        # A segment begins with its length. A scan's data, which follow its segment, hold no marker.
        length = int.from_bytes(content[marker.end():marker.end() + 2], "big")
        position = marker.end() + length


def decode_image(content: bytes) -> torch.Tensor:
    """The bytes of an image file -> uint8 RGB (3, H, W), as `to_rgb` shows it. Raises BadSample."""
    try:
        # This reads the header only.
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise BadSample("too many pixels")
        if image.format == "JPEG":
            if count_jpeg_scans(content) > MAX_JPEG_SCANS:
                raise BadSample("too many scans")
            if image.getexif().get(0x0112, 1) == 1:
                # Upright. torchvision gives the same pixels as Pillow, faster. Where it cannot,
                # Pillow decides.
                with contextlib.suppress(Exception):
                    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                    return torchvision.io.decode_jpeg(encoded, torchvision.io.ImageReadMode.RGB)
        return TF.pil_to_tensor(to_rgb(image))
    except BadSample:
        raise
    except Image.DecompressionBombError:
        raise BadSample("too many pixels") from None
    except Exception:
        # Pillow's plugins raise whatever they meet in garbled bytes.
        raise BadSample("broken image") from None


def random_crop(image: torch.Tensor, size: int, min_area: float, rng: random.Random):
    """Inception's training crop: uint8 (3, H, W) -> (3, size, size).

    The box has a random share of the image's area, min_area .. 1, and a random aspect ratio,
    3/4 .. 4/3. A box that does not fit is cut to the image, where torchvision would draw again.
    """
    height, width = image.shape[-2:]
    area = height * width * rng.uniform(min_area, 1)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    h = max(1, min(height, round((area / ratio) ** 0.5)))
    w = max(1, min(width, round((area * ratio) ** 0.5)))
    top = rng.randint(0, height - h)
    left = rng.randint(0, width - w)
    crop = image[None, :, top:top + h, left:left + w]
    # Bilinear as in SLIP's training; bicubic, as in evaluation, would take a seventh longer.
    return torch.nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]


def cut_long_side(image: Image.Image) -> Image.Image:
    """The middle of an image whose long side is more than MAX_ASPECT times the short one."""
    longest = MAX_ASPECT * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = min(image.width, longest), min(image.height, longest)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def center_crop(image: Image.Image, size: int) -> torch.Tensor:
    """Evaluation's crop: a Pillow image, its shorter side resized -> uint8 (3, size, size)."""
    image = cut_long_side(to_rgb(image))
    image = TF.resize(image, [size], TF.InterpolationMode.BICUBIC)
    return TF.pil_to_tensor(TF.center_crop(image, [size, size]))


# ---- galleries: the images of an evaluation ------------------------------------------------------
# A gallery is a dict {name: item} in ranking order. An item is the path of an image file, a (tar,
# offset, bytes) range of a shard, or a uint8 array (H, W, 3) that is in memory already.
def list_gallery(folder) -> dict:
    """The gallery of a folder: the images in its .tar shards by key, in storage order; or else
    every image file below it that is not hidden, named and sorted by its path in the folder."""
    open_shard.cache_clear()
    folder = Path(folder)
    from_shards, skipped = {}, Counter()
    for shard in sorted(folder.glob("*.tar")):
        images, _, _, shard_skipped, _ = scan_shard(shard)
        skipped += shard_skipped
        for key, (block, size) in images.items():
            if key in from_shards:
                skipped["duplicate key"] += 1
            else:
                from_shards[key] = (str(shard), block * BLOCK, size)
    if skipped:
        print(f"{folder}: left out of the gallery: {dict(skipped)}", file=sys.stderr)

    files, visited = {}, set()
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        # Through links a folder may hold itself.
        if os.path.realpath(parent) in visited:
            subfolders.clear()
            continue
        visited.add(os.path.realpath(parent))
        subfolders[:] = [name for name in sorted(subfolders) if not name.startswith(".")]
        for name in names:
            extension = name.rpartition(".")[2].lower()
            if not name.startswith(".") and extension in (*IMAGE_TYPES, "bmp"):
                path = Path(parent, name)
                files[path.relative_to(folder).as_posix()] = path

    if from_shards and files:
        raise UserError(f"{folder} holds {len(from_shards)} images in .tar shards and {len(files)} "
                        "image files beside them: give a folder with one or the other")
    if not from_shards and not files:
        raise UserError(f"{folder}: no such folder, or no image in it or below")
    return from_shards or dict(sorted(files.items()))


def open_image(item) -> Image.Image:
    """The RGB Pillow image of a gallery's item. Raises BadSample or OSError."""
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    content = item.read_bytes() if isinstance(item, Path) else read_range(*item)
    return cut_long_side(TF.to_pil_image(decode_image(content)))


def collate_images(items: list, preprocess):
    indices, images, failed = [], [], []
    for i, item in items:
        try:
            images.append(preprocess(open_image(item)))
            indices.append(i)
        except Exception as error:
            # One image, whatever it or a model's preprocessing raises, never ends an evaluation.
            failed.append((i, str(error) or type(error).__name__))
    return indices, default_collate(images) if images else None, failed


def image_loader(gallery: dict, preprocess, batch_size: int, workers: int) -> DataLoader:
    """Iterates over a gallery: (indices, batch of preprocess(image), or None if all failed,
    [(index, reason it failed)])."""
    return make_loader(list(enumerate(gallery.values())), workers, batch_size=batch_size,
                       collate_fn=functools.partial(collate_images, preprocess=preprocess))


# ---- what all programs share ---------------------------------------------------------------------
class BadSample(ValueError):
    """A sample that has to be left out. Its text is the reason under which it is counted."""


# ---- python data.py PATH -------------------------------------------------------------------------
@dataclass
class InspectConfig:
    data: str = flag("", "shards, as for paraclip.py --data", positional=True)
    workers: int = flag(1, "processes that read and decode", low=0)


class DecodingTest(Dataset):
    """Sample number -> "", or the reason why it cannot be trained on."""

    def __init__(self, index: ShardIndex):
        self.index = index

    def __getitem__(self, i: int) -> str:
        try:
            image = decode_image(self.index.image(i))
            random_crop(image, 224, 0.5, random.Random(i))
            self.index.captions(i)
        except BadSample as reason:
            return str(reason)
        return ""


def main(argv=None):
    cfg = parse_config(InspectConfig, argv)
    check_ranges(cfg)
    index = ShardIndex(cfg.data, cfg.workers)
    # At most 50,000 samples, from all over the set.
    samples = []
    for i in epoch_order(len(index), block=128, seed=0, epoch=0):
        if len(samples) < 50_000:
            samples.append(i)
    began = time.perf_counter()
    loader = make_loader(DecodingTest(index), cfg.workers, batch_size=64, sampler=samples,
                         collate_fn=list)
    skipped = Counter()
    for reasons in tqdm(loader, "decoding", leave=False):
        skipped.update(reason for reason in reasons if reason)
    seconds = time.perf_counter() - began
    print(json.dumps({"shards": len(index.shards), "samples": len(index) - skipped.total(),
                      "skipped": Counter(index.skipped) + skipped, "keys": index.extensions,
                      "images_per_s": round(len(samples) / seconds, 1)}))


if __name__ == "__main__":
    run(main)
