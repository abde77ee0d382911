"""The data of paraclip: from tar shards of images and captions to training batches.

    tar shards -> ShardIndex             a table: where each image and each caption lies
               -> epoch_order            a permutation of its rows
               -> TrainingSet[epoch, i]  one image, decoded and cropped, and its captions
               -> collate                a batch of them
               -> training_loader        the batches of a run

    python data.py PATH [--workers N]   # check your shards: samples, skips by reason, images/s
"""

import signal

import common  # noqa: F401, it names missing packages

if __name__ == "__main__":
    # The imports take seconds. Until run() is called, Ctrl-C ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import atexit
import contextlib
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
import shutil
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from filelock import FileLock
from PIL import ExifTags, Image
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from common.cli import UserError, flag, note, parse_config, run
from common.distributed import cores_to_spare
from common.files import atomic_write, cache_folder, data_folder
from common.records import PYTHON_LIST, fix_surrogates
from common.tar import ArchiveError, list_members


class BadSample(ValueError):
    """A sample that has to be left out. Its text is the reason under which it is counted."""


# ---- the index: a table of samples ---------------------------------------------------------------
# A row: the number of a shard, and the offset and size in bytes of the two members in it.
ROW = np.dtype([("shard", "<u4"), ("image", "<u8"), ("image_size", "<u4"),
                ("caption", "<u8"), ("caption_size", "<u4"), ("is_json", "?")])
# Neighbours are read from disk together, about this many bytes at a time.
BLOCK_BYTES = 4 << 20
MAX_AGE = 7 * 24 * 3600  # seconds that a set's former index is kept
RUN_AGE = 3600  # seconds in which the ranks of a run take an index that lacks an unreadable shard
UNREADABLE = "unreadable shard"  # a fault that may pass


class ShardIndex:
    """The table of all usable samples of a set of shards, numbered 0 .. len - 1 in storage order.

    caption_keys: take captions from these fields of KEY.json, all of them together, and not from
    KEY.txt. By default KEY.txt is taken, or else the field "caption".

    The table is built once, by `workers` processes, and kept in the cache folder, from where rows
    are mapped into memory: 400 million samples need none. Raises UserError if no sample is usable,
    or if a field is in no sample.

    shards: paths of the tar files. skipped: {reason: samples, or shards, left out}. examples:
    {reason: one of them}. extensions: {extension: members}. fingerprint: a hash of the table and of
    all captions, the same wherever the shards lie. block: how many neighbours are about BLOCK_BYTES
    long.
    """

    def __init__(self, data: str, workers: int = 0, caption_keys: list[str] = ()):
        self.shards = find_shards(data)
        self.caption_keys = list(caption_keys)
        stats = [os.stat(path) if os.path.exists(path) else None for path in self.shards]
        self.versions = [stat and version_of(stat) for stat in stats]
        # ctime, unlike mtime, tells every change of a file.
        ctimes = [stat and stat.st_ctime_ns for stat in stats]
        # By user, since several may share the cache folder.
        of_this_set = cache_folder() / hash_of([os.getuid(), self.shards, self.caption_keys])
        # A change of the shards, or of the rules by which they are read, needs another index.
        folder = of_this_set / hash_of([ROW.descr, MAX_BYTES, MAX_CAPTION, ctimes])
        # An index that lacks an unreadable shard is kept here, for the ranks of this run alone,
        # whose parent is torchrun. Else each of them would build it in turn.
        of_run = folder.with_name(f"{folder.name}-{os.getppid()}") if "RANK" in os.environ else None
        if not folder.exists():
            of_this_set.mkdir(exist_ok=True)
            # Of processes that start together one builds the index, and the others wait.
            with FileLock(of_this_set / "lock"):
                if of_run and of_run.exists() and age_of(of_run) < RUN_AGE:
                    folder = of_run
                elif not folder.exists():
                    folder = build_index(self.shards, self.caption_keys, folder, of_run, workers)
        self.table = folder / "rows"
        self.length = os.path.getsize(self.table) // ROW.itemsize
        facts = json.loads((folder / "facts.json").read_text())
        self.skipped, self.examples = facts["skipped"], facts["examples"]
        self.extensions, self.fingerprint = facts["extensions"], facts["fingerprint"]
        absent = [key for key in self.caption_keys if key not in facts["fields"]]
        if absent:
            raise UserError(f"no KEY.json in '{data}' has a field {' or '.join(absent)}; fields "
                            f"seen: {', '.join(facts['fields']) or 'none'}")
        if len(self) == 0:
            raise UserError(f"no KEY.jpg with KEY.txt or KEY.json in '{data}'; skipped: "
                            f"{self.skipped}; members seen: {self.extensions or 'none'}")
        image_bytes = open_table(self.table)["image_size"][:1024].mean()
        self.block = int(max(1, min(1024, BLOCK_BYTES / image_bytes)))

    def __len__(self) -> int:
        return self.length

    def image(self, i: int) -> bytes:
        """The image file of sample i. Raises BadSample."""
        row = open_table(self.table)[i]
        return self.read(row["shard"], row["image"], row["image_size"])

    def captions(self, i: int) -> list[str]:
        """The captions of sample i, one or several. Raises BadSample."""
        row = open_table(self.table)[i]
        content = self.read(row["shard"], row["caption"], row["caption_size"])
        return captions_in(read_record(content, row["is_json"]), self.caption_keys)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        return read_range(self.shards[shard], offset, size, self.versions[shard])

    def prefetch(self, first: int, count: int):
        """Asks the system to read `count` neighbouring samples into its page cache as one piece.

        Samples are read in random order. From a cold disk this is 1.2 to 2 times as fast.
        """
        rows = open_table(self.table)[first:first + count]
        # A block that spans two shards is left to ordinary reading.
        if rows[0]["shard"] == rows[-1]["shard"]:
            begin, end = rows[0]["image"], rows[-1]["image"] + rows[-1]["image_size"]
            # macOS has no such call.
            with contextlib.suppress(AttributeError, OSError):
                file = open_shard(self.shards[rows[0]["shard"]])
                os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)


# Not a member of ShardIndex: pickling the index for a worker would copy the whole mapped table.
@functools.lru_cache(maxsize=8)
def open_table(path: Path) -> np.ndarray:
    return np.memmap(path, ROW, mode="r")


def version_of(stat) -> tuple:
    """What tells files apart but survives a chmod or another hard link, unlike ctime."""
    return stat.st_mtime_ns, stat.st_size


def hash_of(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]


def build_index(shards: list[str], caption_keys: list[str], folder: Path, of_run: Path | None,
                workers: int) -> Path:
    """Indexes the shards, and returns the folder where the index lies: `folder` or, if a shard
    could not be read, `of_run` or else one that nobody shares."""
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
    facts = {"skipped": Counter(), "examples": {}, "extensions": Counter(), "fields": set()}
    fingerprint = hashlib.sha256()
    # With batch_size=None, collate_fn gets each item by itself: workers index a shard at a time.
    results = make_loader(list(enumerate(shards)), workers, batch_size=None,
                          collate_fn=functools.partial(index_shard, caption_keys=caption_keys))
    with atomic_write(unfinished / "rows") as file:
        for rows, captions_crc32, shard_facts in tqdm(
                results, "indexing shards", disable=None, leave=False):
            file.write(rows)
            fingerprint.update(rows + captions_crc32.to_bytes(4, "big"))
            # A Counter's update() adds.
            for name, collected in facts.items():
                collected.update(shard_facts[name])
    facts |= {"fingerprint": fingerprint.hexdigest(), "fields": sorted(facts["fields"]),
              "extensions": dict(facts["extensions"].most_common(20))}
    with atomic_write(unfinished / "facts.json") as file:
        file.write(json.dumps(facts).encode())
    # Former indexes, and what killed processes left, are removed once they are old: where nodes
    # share this folder and not the shards, another node may be using its own index.
    for former in folder.parent.iterdir():
        if former.is_dir() and age_of(former) > MAX_AGE:
            shutil.rmtree(former, ignore_errors=True)
    # What a disk cannot read now it may read later, so such an index is not kept for others.
    if UNREADABLE in facts["skipped"]:
        if of_run is None:
            return unfinished
        shutil.rmtree(of_run, ignore_errors=True)
        folder = of_run
    return unfinished.rename(folder)


def age_of(path: Path) -> float:
    """Seconds since the last change."""
    return time.time() - path.stat().st_mtime


# ---- the order of samples ------------------------------------------------------------------------
#   0 1 2 3 4 5 6 7 8 9 ...         samples in storage order; neighbours lie together on disk
#   [0 1 2] [3 4 5] [6 7 8] ...     cut into blocks of neighbours
#   [6 7 8] [0 1 2] | [3 4 5] ...   blocks shuffled, and grouped into windows
#   7 0 8 2 6 1 | 4 9 3 ...         samples shuffled within each window; batches are cut from these
# A window has about this many samples, if the set has them, and fewer than twice as many.
WINDOW = 24_576


def epoch_order(n: int, block: int, seed: int, epoch: int):
    """Yields 0 .. n - 1 in an order that is a function of (seed, epoch): blocks of `block`
    neighbours are shuffled over the whole set, then samples within windows of blocks."""
    # numpy takes (seed, epoch) and (seed, epoch, 0) for the same seed, so windows count from 1.
    blocks = np.random.default_rng((seed, epoch)).permutation(math.ceil(n / block))
    windows = np.array_split(blocks, max(1, n // WINDOW))
    for number, window in enumerate(windows, start=1):
        samples = (window[:, None] * block + np.arange(block)).ravel()
        # The last block may be shorter than the others.
        samples = samples[samples < n]
        yield from np.random.default_rng((seed, epoch, number)).permutation(samples).tolist()


def batch_order(index: ShardIndex, batch_size: int, seed: int, start: int, steps: int,
                rank: int, world_size: int):
    """Yields this rank's [(epoch, sample)] for each of the steps start + 1 .. steps.

    It is the rank-th slice of every global batch. What remains at an epoch's end and fills no
    global batch is dropped.
    """
    # With several machines each needs a part of every block only, so reading whole blocks ahead
    # would be too much.
    one_machine = world_size == int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    steps_per_epoch = len(index) // batch_size
    slice_size = batch_size // world_size
    for finished in range(start, steps):
        epoch, finished_in_epoch = divmod(finished, steps_per_epoch)
        if finished == start or finished_in_epoch == 0:
            samples = epoch_order(len(index), index.block, seed, epoch)
            samples = itertools.islice(samples, finished_in_epoch * batch_size, None)
            prefetched = set()
        batch = list(itertools.islice(samples, batch_size))
        for i in batch:
            block_start = i - i % index.block
            if one_machine and block_start not in prefetched:
                prefetched.add(block_start)
                index.prefetch(block_start, index.block)
        yield [(epoch, i) for i in batch[rank * slice_size:(rank + 1) * slice_size]]


# ---- samples and batches -------------------------------------------------------------------------
# If this many samples in a row are bad, the set is called unusable.
MAX_REPLACEMENTS = 100
# tokenize_groups makes at most LENGTH_GROUPS groups, each but the last of at least MIN_GROUP
# captions.
LENGTH_GROUPS = 4
MIN_GROUP = 32


class Sample(NamedTuple):
    image: torch.Tensor  # uint8 (3, S, S)
    caption: str  # the one drawn of `captions`
    captions: list[str]  # all captions of the image
    epoch: int
    number: int  # its row in the index
    fault: str  # why it replaces the sample that was due; "" if it is that sample


@dataclass
class TrainingSet(Dataset):
    """TrainingSet[epoch, i] is the Sample that stands for sample i in this epoch.

    Crop, other changes of the image, and caption where a sample has several, are functions of
    (seed, epoch, i). A sample that proves bad is replaced by another one. Raises UserError if too
    many are bad.
    """
    index: ShardIndex
    image_size: int
    min_area: float  # of a crop, as a share of the image
    flip: bool
    seed: int
    augment: bool = False

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, i = key
        fault = ""
        # numpy's generators take twice as long to seed.
        rng = random.Random(f"{self.seed} {epoch} {i}")
        for _ in range(MAX_REPLACEMENTS):
            try:
                image = decode_image(self.index.image(i))
                image = random_crop(image, self.image_size, self.min_area, rng)
                captions = self.index.captions(i)
            except BadSample as reason:
                fault = fault or str(reason)
                # A random sample and not the next one: a broken shard makes long bad stretches.
                i = rng.randrange(len(self.index))
                continue
            caption = captions[0] if len(captions) == 1 else rng.choice(captions)
            if self.flip and rng.random() < 0.5:
                image = image.flip(-1)
            if self.augment:
                image = change_colours(image, rng)
                image = blot_out(image, rng)
            return Sample(image, caption, captions, epoch, i, fault)
        raise UserError(f"{MAX_REPLACEMENTS} samples in a row cannot be read, the first: {fault}")


class Batch(NamedTuple):
    """A rank's part of a global batch, in micro-batches of b samples each.

    A micro-batch is (images uint8 (b, 3, S, S), token batches), where the token batches have b x C
    rows together: the C captions that the objective takes of each image, side by side.
    """
    micro_batches: list[tuple[torch.Tensor, list]]
    targets: torch.Tensor | None  # a row for each sample, in the order of the images
    replaced: dict[str, int]  # how many samples were replaced, by reason


def collate(samples: list[Sample], accum: int, tokenize, objective) -> Batch:
    """A Batch of `accum` micro-batches. tokenize: list of str -> a token batch.

    objective.captions(samples) gives what the text tower encodes, C captions for each sample;
    objective.targets(samples) a tensor with a row for each sample, or None.
    """
    # The order within a batch does not matter to the loss. Sorted by their number of tokens,
    # captions need little padding.
    mask = tokenize([sample.caption for sample in samples])["attention_mask"]
    samples = [samples[i] for i in mask.sum(1).argsort(stable=True)]
    size = len(samples) // accum
    micro_batches = []
    for first in range(0, len(samples), size):
        part = samples[first:first + size]
        # In a worker, default_collate writes into memory that the parent shares; stack does not.
        images = default_collate([sample.image for sample in part])
        micro_batches.append((images, tokenize_groups(objective.captions(part), tokenize)))
    replaced = Counter(sample.fault for sample in samples if sample.fault)
    # A plain dict: pinning copies a mapping by its update(), which in a Counter adds.
    return Batch(micro_batches, objective.targets(samples), dict(replaced))


def tokenize_groups(captions: list[str], tokenize) -> list[dict]:
    """Captions in the order that collate() gives them -> token batches of about equal length."""
    group = max(MIN_GROUP, math.ceil(len(captions) / LENGTH_GROUPS))
    return [tokenize(captions[i:i + group]) for i in range(0, len(captions), group)]


# ---- the training loader -------------------------------------------------------------------------
def training_loader(index: ShardIndex, cfg, start: int, steps: int, rank: int, world_size: int,
                    tokenize, objective, pin_memory: bool = False) -> DataLoader:
    """Iterates over this rank's Batch of each of the steps start + 1 .. steps, see `collate`.

    The batches are the same for any cfg.workers. cfg has batch_size (global), accum, image_size,
    crop (minimum area), flip, augment, seed and workers.
    """
    # Every tensor that a worker hands over takes a file descriptor.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Some systems, such as macOS, refuse a soft limit that their hard limit would allow.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16), hard))
    return make_loader(
        TrainingSet(index, cfg.image_size, cfg.crop, cfg.flip, cfg.seed, cfg.augment), cfg.workers,
        batch_sampler=batch_order(index, cfg.batch_size, cfg.seed, start, steps, rank, world_size),
        collate_fn=functools.partial(collate, accum=cfg.accum, tokenize=tokenize,
                                     objective=objective),
        pin_memory=pin_memory)


def make_loader(dataset, workers: int, **options) -> DataLoader:
    """A DataLoader whose workers survive the signals that are meant for their parent. A negative
    number of workers stands for this rank's share of the cores."""
    atexit.register(kill_workers)
    return DataLoader(dataset, num_workers=cores_to_spare() if workers < 0 else workers,
                      worker_init_fn=leave_signals_to_parent, **options)


def leave_signals_to_parent(worker: int):
    # A scheduler signals every process of a job, and the parent needs its workers until it has
    # finished its step and saved. Some time later a worker ends by itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(600))


def kill_workers():
    """At exit. Python would send SIGTERM to workers that are left, and wait for them to end."""
    # torch's handler raises an error for each worker that dies.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        # A loader's worker is a daemon. Other children are not ours.
        if process.daemon:
            process.kill()


# ---- shards: what a tar file holds ---------------------------------------------------------------
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "avif")
# Larger members cannot be used.
MAX_BYTES = dict.fromkeys(IMAGE_TYPES, 64 << 20) | {"txt": 1 << 20, "json": 1 << 20}
# Language models keep a few dozen tokens of a caption; a page of text would only slow their
# tokenizers.
MAX_CAPTION = 10_000


def find_shards(data: str) -> list[str]:
    """The absolute paths of the tar files that `data` names, sorted within each part, each once.

    data: a folder of .tar files, one .tar, a glob, a range {00000..01242}, or several of these
    joined by ::. The name cc12m means $PARACLIP_DATA/cc12m. Raises UserError if a part has no file.
    """
    if data == "cc12m":
        data = str(data_folder(data))
    shards = []
    for part in data.split("::"):
        braces = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", part)
        if os.path.isdir(part):
            paths = sorted(glob.glob(f"{glob.escape(part)}/*"))
        elif os.path.isfile(part):
            # Before the glob, since a file's name may look like one: x[2].tar
            paths = [part]
        elif braces:
            # A number without a file is counted later, as a missing shard.
            before, first, last, after = braces.groups()
            numbers = range(int(first), int(last) + 1)
            paths = [f"{before}{number:0{len(first)}d}{after}" for number in numbers]
        else:
            paths = sorted(glob.glob(part, recursive=True))
        tars = [os.path.abspath(path) for path in paths if path.endswith(".tar")]
        if not any(os.path.isfile(path) for path in tars):
            seen = Counter(Path(path).suffix for path in paths if os.path.isfile(path))
            raise UserError(
                f"no .tar file at '{part}' (files there: {dict(seen) or 'none'}): give a folder, a "
                ".tar, a glob, or a range such as 'x/{00000..01242}.tar'. docs/formats.md says how "
                "to make shards of a list of URLs, of image and text files, or of compressed "
                "shards. For CC12M see img2dataset's dataset_examples/cc12m.md, or take Hugging "
                "Face's pixparse/cc12m-wds")
        # An interrupted gunzip leaves a part of a set compressed.
        others = [path for path in paths if re.search(r"\.tar\.\w+$|\.TAR$", path)]
        if others:
            note(f"'{part}': only .tar files are read, not {others[0]} ({len(others)} such files)")
        shards += tars
    # A link and the file that it leads to are one shard.
    unique = {}
    for path in shards:
        unique.setdefault(os.path.realpath(path), path)
    return list(unique.values())


def scan_shard(path: Path | str) -> tuple[list[tuple], Counter, Counter]:
    """The images, .txt and .json members of a shard, in their order: (key, extension, offset,
    bytes) each; then {reason: faults of the shard} and {extension: members of any kind}.

    A key is the member's path without the last extension. What cannot be used has 0 bytes here;
    nothing is unpacked. Of a broken shard all that comes before the fault is given.
    """
    members, faults, extensions = [], Counter(), Counter()
    try:
        with open(path, "rb") as file:
            for name, offset, size in list_members(file):
                # macOS adds a ._NAME to each file.
                if "._" in name and os.path.basename(name).startswith("._"):
                    continue
                key, _, extension = name.rpartition(".")
                extension = extension.lower()
                extensions[extension] += 1
                if extension in MAX_BYTES:
                    usable = size <= MAX_BYTES[extension]
                    members.append((key, extension, offset, size if usable else 0))
    except ArchiveError as reason:
        faults[str(reason)] += 1
    except FileNotFoundError:
        faults["missing shard"] += 1
    except OSError:
        faults[UNREADABLE] += 1
    except Exception:
        # tarfile raises whatever it meets in a garbled header: ValueError, OverflowError, ...
        faults["broken or truncated shard"] += 1
    return members, faults, extensions


def group_members(members: list[tuple]):
    """Yields (key, {extension: (offset, bytes)}) of each sample of a shard, from what scan_shard
    gives. In place of what cannot be used stands the reason, a str.

    A stretch is a sequence of neighbours whose names begin with one key, such as 1.jpg, 1.seg.png,
    1.txt. Members of one key in one stretch are a sample. If key 1 is in several:
        1.jpg 2.jpg 1.txt 2.txt                no kind is there twice: one sample 1
        1.jpg 1.txt 2.jpg 2.txt 1.jpg 1.txt    kinds repeat, as in joined shards: two samples 1
    Of the keys in a stretch the fullest count: 1.seg.png beside 1.jpg and 1.txt is no sample.
    """
    # {key: {stretch: {extension: place}}}
    samples = {}
    stretch, stem, last_key = 0, None, None
    for key, extension, offset, size in members:
        if key != last_key:
            last_key = key
            if stem is None or not f"{key}.".startswith(f"{stem}."):
                # 1.seg.png may also stand before 1.jpg.
                stretch += stem is None or not stem.startswith(f"{key}.")
                stem = key
            sample = samples.setdefault(key, {}).setdefault(stretch, {})
        if extension in sample:
            # Which of the two belongs to the others cannot be told.
            sample[extension] = "duplicate key"
        else:
            sample[extension] = (offset, size) if size else "empty or too large member, or a link"

    # {stretch: [(key, sample)]}
    stretches = {}
    for key, parts in samples.items():
        if len(parts) > 1:
            kinds = ["image" if kind in IMAGE_TYPES else kind
                     for part in parts.values() for kind in part]
            if len(set(kinds)) == len(kinds):
                first, *others = parts
                for other in others:
                    parts[first].update(parts.pop(other))
        for stretch, sample in parts.items():
            stretches.setdefault(stretch, []).append((key, sample))
    for neighbours in stretches.values():
        if len(neighbours) > 1:
            fullest = max(fullness(sample) for _, sample in neighbours)
            neighbours = [(key, sample) for key, sample in neighbours
                          if fullness(sample) == fullest]
        yield from neighbours


def fullness(sample: dict) -> int:
    """3 with image and caption, 2 with an image, 1 with a caption."""
    images = [kind in IMAGE_TYPES for kind in sample]
    return 2 * any(images) + (not all(images))


def index_shard(numbered_path: tuple[int, str], caption_keys: list[str]):
    """The rows of a shard's usable samples, in the order of their images, the crc32 of their
    captions, and this shard's part of the facts of build_index."""
    number, path = numbered_path
    members, skipped, extensions = scan_shard(path)
    rows, captions_crc32, fields = [], 0, set()
    try:
        file = open_shard(path) if members else None
    except OSError:
        members = []
        skipped[UNREADABLE] += 1
    examples = dict.fromkeys(skipped, os.path.basename(path))
    for key, sample in group_members(members):
        try:
            image_place = place_of(sample, IMAGE_TYPES, "no image")
            captions, *caption_place = find_captions(file, sample, caption_keys, fields)
        except BadSample as reason:
            skipped[str(reason)] += 1
            examples.setdefault(str(reason), f"{key} in {os.path.basename(path)}")
        else:
            rows.append((number, *image_place, *caption_place))
            captions_crc32 = zlib.crc32("\n".join(captions).encode(), captions_crc32)
    facts = {"skipped": skipped, "examples": examples, "extensions": extensions, "fields": fields}
    return np.array(sorted(rows), ROW).tobytes(), captions_crc32, facts


def place_of(sample: dict, kinds, absent: str) -> tuple[int, int]:
    """Where the first of these kinds of members lies. Raises BadSample, with `absent` if the sample
    has none of them."""
    for kind in kinds:
        if kind in sample:
            if isinstance(sample[kind], str):
                raise BadSample(sample[kind])
            return sample[kind]
    raise BadSample(absent)


def find_captions(file, sample: dict, caption_keys: list[str], fields: set) -> tuple:
    """(captions, offset, bytes, is_json) of a sample's captions. Adds to `fields` those of the
    record that is read, see read_record(). Raises BadSample."""
    fault = BadSample("no caption")
    for kind in ["json"] if caption_keys else ["txt", "json"]:
        if kind in sample:
            try:
                # It is there: this only raises the fault that may stand in its place.
                offset, size = place_of(sample, [kind], "")
                record = read_record(read_from(file, offset, size), kind == "json")
                fields.update(record)
                return captions_in(record, caption_keys), offset, size, kind == "json"
            except BadSample as reason:
                # A .txt that cannot be used is as good as none.
                fault = reason
    raise fault


def open_shard(path: str):
    """The open file, cached until its ctime changes."""
    return open_version(path, os.stat(path).st_ctime_ns)


# A file is closed when it falls out of the cache.
@functools.lru_cache(maxsize=128)
def open_version(path: str, ctime: int):
    return open(path, "rb", buffering=0)


def read_range(path: str, offset: int, size: int, version: tuple | None = None) -> bytes:
    """`size` bytes of a file from `offset` on. Raises BadSample if they cannot be read, or if the
    file is no longer the one whose version_of() is `version`."""
    try:
        file = open_shard(path)
        changed = version and version_of(os.fstat(file.fileno())) != version
    except OSError:
        raise BadSample(UNREADABLE) from None
    if changed:
        raise BadSample("shard changed since it was indexed")
    return read_from(file, offset, size)


def read_from(file, offset: int, size: int) -> bytes:
    """`size` bytes of an open file from `offset` on. Raises BadSample."""
    try:
        content = os.pread(file.fileno(), size, offset)
    except OSError:
        raise BadSample(UNREADABLE) from None
    if len(content) < size:
        raise BadSample(UNREADABLE)
    return content


def read_record(content: bytes, is_json: bool) -> dict:
    """The fields of a KEY.json. A KEY.txt is read as the field "caption". Raises BadSample."""
    # Windows' PowerShell writes UTF-16.
    text = content.decode(json.detect_encoding(content), errors="replace")
    if not is_json:
        return {"caption": text}
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(text)
        if isinstance(record, dict):
            return record
    raise BadSample("broken .json")


def captions_in(record: dict, caption_keys: list[str]) -> list[str]:
    """The captions in these fields, by default in "caption": a text or a list of texts each, white
    space folded, and cut after MAX_CAPTION characters. Raises BadSample if all are blank, or if
    one is a list written as a text."""
    caption_keys = caption_keys or ["caption"]
    captions = []
    for key in caption_keys:
        texts = record.get(key)
        for text in texts if isinstance(texts, list) else [texts]:
            if isinstance(text, str):
                if PYTHON_LIST.fullmatch(text):
                    raise BadSample("a list in Python's notation")
                words = fix_surrogates(text[:MAX_CAPTION]).split()
                if words:
                    captions.append(" ".join(words))
    if captions:
        return captions
    if record.keys().isdisjoint(caption_keys):
        raise BadSample(f"no {' or '.join(caption_keys)} in .json")
    raise BadSample("empty caption")


# ---- images: decoding and cropping ---------------------------------------------------------------
# An image that states a larger size is refused before it is decoded.
MAX_PIXELS = 64_000_000
# Evaluation cuts the long side of a longer image, since resizing its short side would blow it up.
MAX_ASPECT = 32
# Pillow would also open, under any name, EPS (by running Ghostscript) and a zoo of rare formats.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "AVIF")
# How an image of each EXIF orientation is turned upright.
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


def orientation_of(image: Image.Image) -> int:
    """EXIF's: 1 is upright, the others are in TURNS. 1 if EXIF is absent or cannot be read."""
    # Pillow raises whatever it meets in a garbled block.
    with contextlib.suppress(Exception):
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image as viewers show it: turned as EXIF says, on white, 8 bits a channel. Raises
    BadSample."""
    # ImageOps.exif_transpose() also rewrites the rest of EXIF, and fails where that is malformed.
    turn = TURNS.get(orientation_of(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "F":
        raise BadSample("floating-point image, whose range is not known")
    if image.mode.startswith("I"):
        # 16-bit grey, which convert("L") alone would clip. point() takes one order of bytes only,
        # and "I" has it.
        image = image.convert("I").point(lambda value: value / 256).convert("L")
        # A transparent shade has 16 bits, and would be compared with the 8 bits that are left.
        image.info.pop("transparency", None)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode_image(content: bytes, formats=FORMATS) -> torch.Tensor:
    """The bytes of an image file in one of Pillow's `formats` -> uint8 RGB (3, H, W), as `to_rgb`
    shows it. Raises BadSample."""
    try:
        # This reads the header only.
        image = Image.open(io.BytesIO(content), formats=formats)
        if image.width * image.height > MAX_PIXELS:
            raise BadSample("too many pixels")
        if image.format == "JPEG" and orientation_of(image) == 1:
            # torchvision gives the same pixels as Pillow, faster. Where it cannot, Pillow decides.
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


def change_colours(image: torch.Tensor, rng: random.Random):
    """uint8 (3, S, S) with its brightness, contrast and saturation times 0.7 .. 1.3 each."""
    for adjust in (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation):
        image = adjust(image, rng.uniform(0.7, 1.3))
    return image


def blot_out(image: torch.Tensor, rng: random.Random):
    """uint8 (3, S, S), of which half get a rectangle of the image's mean grey, a fifth to a half of
    S on each side (random erasing, arXiv 1708.04896)."""
    if rng.random() < 0.5:
        return image
    size = image.shape[-1]
    height, width = [round(size * rng.uniform(0.2, 0.5)) for _ in range(2)]
    top, left = rng.randint(0, size - height), rng.randint(0, size - width)
    grey = image.float().mean().to(torch.uint8)
    return TF.erase(image, top, left, height, width, grey)


def cut_long_side(image: Image.Image) -> Image.Image:
    """The middle of an image whose long side is more than MAX_ASPECT times the short one."""
    longest = MAX_ASPECT * min(image.size)
    return TF.center_crop(image, [min(image.height, longest), min(image.width, longest)])


def center_crop(image: Image.Image, size: int) -> torch.Tensor:
    """Evaluation's crop: a Pillow image, its shorter side resized -> uint8 (3, size, size)."""
    image = cut_long_side(to_rgb(image))
    image = TF.resize(image, [size], TF.InterpolationMode.BICUBIC)
    return TF.pil_to_tensor(TF.center_crop(image, [size, size]))


# ---- python data.py PATH -------------------------------------------------------------------------
@dataclass
class InspectConfig:
    data: str = flag("", "shards, as for paraclip.py --data, or cc12m", positional=True)
    caption_key: list[str] = flag([], "fields of KEY.json, as for paraclip.py --caption-key")
    workers: int = flag(1, "processes that read and decode", low=0)


MOST_DECODED = 50_000  # samples


class Look(NamedTuple):
    fault: str  # why the sample cannot be trained on, or ""
    format: str = ""  # of the image
    height: int = 0
    width: int = 0
    captions: int = 0  # how many


def look_at(numbers: list[int], index: ShardIndex) -> list[Look]:
    looks = []
    for i in numbers:
        try:
            content = index.image(i)
            image = decode_image(content)
            # Only for the time it takes: images/s are those of training.
            random_crop(image, 224, 0.5, random.Random(i))
            kind = Image.open(io.BytesIO(content)).format
            looks.append(Look("", kind, *image.shape[1:], len(index.captions(i))))
        except BadSample as reason:
            looks.append(Look(str(reason)))
    return looks


def describe(looks: list[Look]) -> str:
    by_size = sorted(looks, key=lambda look: look.height * look.width)
    median, smallest = by_size[len(looks) // 2], by_size[0]
    formats = Counter(look.format for look in looks).most_common()
    return (f"captions a sample: {sum(look.captions for look in looks) / len(looks):.1f}; "
            f"images: {median.width} x {median.height} (median), "
            f"{smallest.width} x {smallest.height} (smallest), "
            + ", ".join(f"{count / len(looks):.1%} {name}" for name, count in formats))


def main(argv=None):
    cfg = parse_config(InspectConfig, argv)
    index = ShardIndex(cfg.data, cfg.workers, cfg.caption_key)
    # Of a large set a part is decoded, from all over it: the faults of others stay unknown.
    samples = list(itertools.islice(epoch_order(len(index), 128, seed=0, epoch=0), MOST_DECODED))
    began = time.perf_counter()
    loader = make_loader(samples, cfg.workers, batch_size=64,
                         collate_fn=functools.partial(look_at, index=index))
    looks = list(itertools.chain(*tqdm(loader, "decoding", disable=None, leave=False)))
    seconds = time.perf_counter() - began

    skipped, examples = Counter(index.skipped), dict(index.examples)
    for i, look in zip(samples, looks):
        if look.fault:
            row = open_table(index.table)[i]
            skipped[look.fault] += 1
            examples[look.fault] = f"byte {row['image']} of {index.shards[row['shard']]}"
    good = [look for look in looks if not look.fault]
    usable = len(index) - len(looks) + len(good)
    print(f"{usable:,} samples in {len(index.shards):,} shards; {len(looks):,} were decoded")
    print(f"index: {index.table.stat().st_size / 1e6:,.1f} MB in {index.table.parent}")
    if good:
        print(describe(good))
    for reason, count in skipped.most_common():
        print(f"left out: {count:,} x {reason}, such as {examples[reason]}")
    print(json.dumps({"shards": len(index.shards), "samples": usable, "decoded": len(looks),
                      "skipped": skipped, "keys": index.extensions,
                      "images_per_s": round(len(looks) / seconds, 1)}))


if __name__ == "__main__":
    run(main)
