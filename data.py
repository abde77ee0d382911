"""Data of paraclip: tar shards -> index -> order -> batches, and readers of evaluation files.

    python data.py PATH [--workers N]     # inspects a shard set: samples, skips, images/s
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import glob
import hashlib
import io
import itertools
import json
import math
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
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm


# ---- what all programs share ---------------------------------------------------------------------
class UserError(ValueError):
    """A mistake of the user's: the programs print it as one line, without a traceback."""


class BadSample(ValueError):
    """A sample that is left out; its text is the reason under which it is counted."""


def run(program):
    """Calls a program's main(): what its user can cause ends in one line on stderr and status 2,
    Ctrl-C in status 130, a reader of stdout that has left (`| head`) in 1 without a word."""
    sys.stdout.reconfigure(errors="replace")  # an ASCII terminal gets ? for what it lacks
    try:
        program()
        return sys.stdout.flush()  # so that a closed pipe is met here, not at exit
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except BrokenPipeError:
        os._exit(1)  # sys.exit would flush stdout, and fail again
    except (UserError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("ader worker|of memory", str(error)):
            raise  # a bug, unless a loader process has died or a GPU's memory is full
        # A loader process sends its whole traceback, whose end tells
        message, status = str(error).rpartition("\ndata.UserError: ")[2], 2
    # Ranks may fail alike: the first speaks at once, and torchrun ends the others while they wait
    time.sleep(3 * int(os.environ.get("LOCAL_RANK", 0)))
    print("error:", *message.split(), file=sys.stderr, flush=True)
    sys.exit(status)


@contextlib.contextmanager
def replacing(path: Path | str):
    """Opens a file beside `path` for writing bytes; moves it into place when all is on disk. A kill
    in mid-write leaves the former one, and beside it what the next writer overwrites."""
    beside = Path(f"{path}.tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:  # a full disk does not say which
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        beside.unlink(missing_ok=True)


def data_folder(name: str) -> Path:
    """Where a data set known by name lies: $PARACLIP_DATA/name, without it shards/name."""
    return Path(os.environ.get("PARACLIP_DATA", "shards")) / name


def flag(default, help: str, positional=False, **rules):
    """A dataclass's field that is a flag. rules: choices, at_least, above, at_most."""
    limits = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in rules.items())
    notes = [limits] if limits and "choices" not in rules else []
    notes += [f"default: {default}"] if default not in ("", []) else []
    rules |= dict(default=default, positional=positional, range=limits or "a number",
                  help=f"{help} ({', '.join(notes)})" if notes else help)
    return dataclasses.field(default_factory=lambda: type(default)(default), metadata=rules)


def check_ranges(cfg):
    """Raises UserError if a number is not finite or out of its range, or a choice is none."""
    for field in dataclasses.fields(cfg):
        value, rules = getattr(cfg, field.name), field.metadata
        valid = value in (rules["default"], *rules.get("choices", [value]))
        if isinstance(rules["default"], (int, float)):
            valid = (isinstance(value, (int, type(rules["default"])))
                     and rules.get("at_least", value) <= value <= rules.get("at_most", value)
                     and rules.get("above", -math.inf) < value < math.inf)
        if not valid:
            raise UserError(f"--{field.name.replace('_', '-')} {value}: expected {rules['range']}")


def parse_config(cls, argv=None, recipes: dict = {}):
    """An instance of the dataclass `cls`, whose fields are `flag`s, from the command line. What is
    given wins over recipes[name], that over the defaults; name is the given --recipe, or --data."""
    def refuse(message):
        raise UserError(f"{message}; see --help")

    parser = argparse.ArgumentParser(
        description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    parser.error = refuse
    for field in dataclasses.fields(cls):
        rules, kind = field.metadata, type(field.metadata["default"])
        options = {bool: {"action": argparse.BooleanOptionalAction},
                   list: {"nargs": "*" if rules["positional"] else "+"}}
        options = options.get(kind, {"type": kind, "choices": rules.get("choices")})
        name = field.name if rules["positional"] else f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, help=rules["help"].replace("%", "%%"), **options)
    given = vars(parser.parse_args(argv))
    return cls(**recipes.get(given.get("recipe") or given.get("data"), {}) | given)


# ---- shards and their index ----------------------------------------------------------------------
MAX_BYTES = 64 << 20  # a tar member larger than this is not read
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
# Where a sample's two members lie in its shard. A negative text_size marks a .json, not a .txt.
ENTRY = np.dtype([("image", "<u8"), ("image_size", "<u4"), ("text", "<u8"), ("text_size", "<i4")])
# A file is closed when it falls out of the cache.
open_shard = functools.lru_cache(maxsize=128)(functools.partial(open, mode="rb", buffering=0))


def find_shards(data: str) -> list[Path]:
    """The tar files that `data` means, sorted within each part: emoji, cc12m, a folder, one .tar,
    a glob, a range {00000..01242}, several joined by ::. UserError if a part has no file."""
    if data == "emoji":
        from benchmark.emoji_scenes import emoji_folder  # here: other data need no drawings
        data = str(emoji_folder() / "train")
    elif data == "cc12m":
        data = str(data_folder(data))
    paths = []
    for part in data.split("::"):
        pattern = f"{glob.escape(part)}/*.tar" if os.path.isdir(part) else part
        found = sorted(glob.glob(pattern)) or [part]  # its name may look like a glob and be none
        if braces := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", part):
            before, first, last, after = braces.groups()  # a gap will be an unreadable shard
            found = [f"{before}{i:0{len(first)}d}{after}" for i in range(int(first), int(last) + 1)]
        if not any(map(os.path.isfile, found)):
            raise UserError(f"no .tar file at '{part}': give a folder, a .tar, a glob, or a range "
                            "such as 'x/{00000..01242}.tar'. For CC12M see img2dataset's dataset_"
                            "examples/cc12m.md, or take Hugging Face's pixparse/cc12m-wds")
        paths += map(Path, found)
    return paths


def read_range(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset`. Raises BadSample if they cannot be read."""
    with contextlib.suppress(OSError):
        content = os.pread(open_shard(path).fileno(), size, offset)
        if len(content) == size:
            return content
    raise BadSample("unreadable shard")


def well_formed(text: str) -> str:
    """Half a surrogate pair, as captions cut at a length have, becomes ?: no tokenizer takes it."""
    if not text.strip():
        raise UserError("empty text")
    return text.encode("utf-8", errors="replace").decode()


def read_caption(path: str, offset: int, size: int) -> str:
    """Caption of a .txt, or a .json if size < 0; white space folded. BadSample if there is none."""
    text = read_range(path, offset, abs(size)).decode("utf-8-sig", errors="replace")
    try:
        text = json.loads(text)["caption"] if size < 0 else text
        return " ".join(well_formed(text).split())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise BadSample("empty or broken caption") from None


def index_shard(path: Path | str) -> tuple[list[str], np.ndarray, Counter, Counter]:
    """Keys and ENTRY rows of a shard's usable samples, {reason: skipped}, {extension: members}. Of
    a sample both have the same key, the path without the last extension. Links, empty and huge
    members count as missing; nothing is unpacked. A broken shard gives what comes before."""
    images, texts, jsons = {}, {}, {}  # key: (offset, bytes, of a json negative)
    parts = dict.fromkeys(IMAGE_TYPES, images) | {"txt": texts, "json": jsons}
    skipped, extensions, last = Counter(), Counter(), -1
    try:
        length = os.path.getsize(path)
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                offset, size = member.offset_data, member.size
                # A negative size leads backwards, where tarfile would go round for ever
                if size < 0 or tar.offset <= last or offset + size > length:
                    raise tarfile.ReadError
                last, tar.members = tar.offset, []  # else tarfile keeps every header
                key, _, extension = member.name.rpartition(".")
                extensions[extension.lower()] += 1
                if member.isreg() and not member.issparse() and 0 < size <= MAX_BYTES:
                    part = parts.get(extension.lower(), {})
                    skipped["duplicate key"] += key in part
                    part.setdefault(key, (offset, -size if part is jsons else size))
            # tarfile ends quietly at a header that it cannot read; a true end is a block of zeros
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError
    except OSError:
        skipped["unreadable shard"] += 1
    except Exception:  # tarfile raises what it meets in a garbled header: ValueError, ...
        skipped["broken or truncated shard"] += 1

    keys, rows = [], []
    for key, image in images.items():
        try:
            text = texts.get(key) or jsons[key]
            read_caption(str(path), *text)
            keys.append(key)
            rows.append((*image, *text))
        except (BadSample, KeyError) as reason:
            skipped["no caption" if isinstance(reason, KeyError) else str(reason)] += 1
    skipped["no image"] += len((texts.keys() | jsons.keys()) - images.keys())
    return keys, np.array(rows, dtype=ENTRY), +skipped, extensions


class ShardIndex:
    """All usable samples of shards, by number 0 .. len - 1, in storage order. `workers` processes
    index them once; the rows are kept in $PARACLIP_CACHE or ~/.cache/paraclip and read one by one
    from there: 400 million fit. Attributes: `shards`, `skipped` {reason: count}, `extensions`
    {extension: members}, `fingerprint`: a hash of what is where in them, wherever they lie."""

    def __init__(self, data: str, workers: int = 0):
        open_shard.cache_clear()  # a shard may have been replaced since
        self.shards = [str(path.absolute()) for path in find_shards(data)]
        folder = os.path.expanduser(os.environ.get("PARACLIP_CACHE") or "~/.cache/paraclip")
        os.makedirs(folder, exist_ok=True)
        versions = [ENTRY.descr, os.getuid(), self.shards]  # and, as it tells any change, ctime
        versions += [os.stat(path).st_ctime_ns for path in self.shards if os.path.exists(path)]
        stem = f"{folder}/{hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:24]}"
        with FileLock(f"{stem}.lock"):  # of processes that start together one builds it
            try:
                facts, self.rows_file = json.loads(Path(f"{stem}.json").read_bytes())
                self._open(facts)
                if self.fingerprint not in self.rows_file:
                    raise ValueError
            except Exception:  # not there, or damaged in whatever way
                self._build(stem, workers)
        if not len(self):
            raise UserError(f"no KEY.jpg with KEY.txt or KEY.json in '{data}'; skipped: "
                            f"{self.skipped}; members seen: {self.extensions or 'none'}")

    def _open(self, facts: list):
        counts, self.skipped, self.extensions = facts
        self.starts = np.cumsum([0] + counts)  # first sample of each shard, and the end
        with open(self.rows_file, "rb") as file:
            start = functools.partial(hashlib.sha256, json.dumps(facts).encode())
            self.fingerprint = hashlib.file_digest(file, start).hexdigest()

    def _build(self, stem: str, workers: int):
        self.rows_file, counts, skipped, extensions = f"{stem}.rows", [], Counter(), Counter()
        indexed = DataLoader(self.shards, batch_size=None, num_workers=workers,
                             collate_fn=index_shard, worker_init_fn=leave_signals_to_parent)
        with replacing(self.rows_file) as file:
            for _, rows, bad, seen in tqdm(indexed, "indexing shards", disable=None, leave=False):
                file.write(rows.tobytes())
                counts.append(len(rows))
                skipped += bad
                extensions += seen
        facts = [counts, dict(skipped), dict(extensions.most_common(20))]
        self._open(facts)
        self.rows_file = f"{stem}.{self.fingerprint}.rows"  # a former one may be in use
        os.replace(f"{stem}.rows", self.rows_file)
        if skipped["unreadable shard"] == sum(not os.path.exists(path) for path in self.shards):
            with replacing(f"{stem}.json") as file:  # else a passing fault would be remembered
                file.write(json.dumps([facts, self.rows_file]).encode())

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _place(self, i: int, part: str) -> tuple[str, int, int]:
        shard = self.shards[int(np.searchsorted(self.starts, i, side="right")) - 1]
        row = read_range(self.rows_file, i * ENTRY.itemsize, ENTRY.itemsize)
        entry = np.frombuffer(row, ENTRY)[0]
        return shard, int(entry[part]), int(entry[f"{part}_size"])

    def caption(self, i: int) -> str:
        return read_caption(*self._place(i, "text"))

    def image(self, i: int) -> bytes:
        return read_range(*self._place(i, "image"))


# ---- pictures: decoding and cropping -------------------------------------------------------------
MAX_PIXELS = 64_000_000  # a picture that says it is larger is refused before it is decoded
# Pillow would also open, under any name, EPS (by running Ghostscript) and a zoo of rare formats.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")


def to_rgb(picture: Image.Image) -> Image.Image:
    """A Pillow picture as viewers show it: turned as EXIF says, on white, 8 bits a channel."""
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
        if picture.width * picture.height > MAX_PIXELS:
            raise Image.DecompressionBombError  # as Pillow does, but its limit is higher
        if picture.format == "JPEG" and picture.getexif().get(0x0112, 1) == 1:  # is upright
            # The same pixels, faster. If it fails, or torchvision has dropped it, Pillow decides.
            with contextlib.suppress(Exception):
                encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                return torchvision.io.decode_jpeg(encoded, torchvision.io.ImageReadMode.RGB)
        return TF.pil_to_tensor(to_rgb(picture))
    except Image.DecompressionBombError:
        raise BadSample("too many pixels") from None
    except Exception:  # Pillow's plugins raise what they like on garbled bytes
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
    return torch.nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]


def center_crop(picture: Image.Image, size: int) -> torch.Tensor:
    """Evaluation's view, shorter side resized, centre cut out: Pillow -> uint8 (3, size, size)."""
    picture = TF.resize(to_rgb(picture), [size], TF.InterpolationMode.BICUBIC)
    return TF.pil_to_tensor(TF.center_crop(picture, [size, size]))


# ---- the training loader -------------------------------------------------------------------------
WINDOW, BLOCK_BYTES = 24_576, 4 << 20  # samples that are mixed with each other; neighbours' bytes
REPLACEMENTS = 100  # samples that may fail in a row before the set is called unusable
MIN_GROUP, LENGTH_GROUPS = 64, 4  # captions in a group at least, groups in a micro-batch at most


def epoch_order(n: int, block: int, seed: int, epoch: int):
    """Yields 0 .. n - 1 in an order of (seed, epoch) alone that disks can follow: blocks of
    neighbours are permuted over the whole set, then samples within WINDOW's worth of blocks."""
    blocks = np.random.default_rng((seed, epoch)).permutation(-(-n // block))
    for number, window in enumerate(np.array_split(blocks, max(1, n // WINDOW))):
        samples = (window[:, None] * block + np.arange(block)).ravel()
        samples = samples[samples < n]  # the last block may be short
        yield from np.random.default_rng((seed, epoch, number)).permutation(samples).tolist()


def batch_order(index: ShardIndex, batch_size, seed, start, steps, rank, world):
    """Yields this rank's [(epoch, sample)] for each of the steps start .. steps - 1: the rank-th
    slice of every global batch. The remainder of an epoch that fills no global batch is dropped."""
    n, local = len(index), batch_size // world
    mean_bytes = float(np.fromfile(index.rows_file, ENTRY, 1024)["image_size"].mean())
    block = int(max(1, min(1024, BLOCK_BYTES / mean_bytes)))
    for step in range(start, steps):
        epoch, done = divmod(step, n // batch_size)
        if step == start or done == 0:
            samples = itertools.islice(epoch_order(n, block, seed, epoch), done * batch_size, None)
        batch = [(epoch, i) for i in itertools.islice(samples, batch_size)]
        yield batch[rank * local:(rank + 1) * local]


class TrainingSet(Dataset):
    """(epoch, sample) -> (image (3, S, S), caption, None or why another sample takes its place)."""

    def __init__(self, index: ShardIndex, image_size: int, crop: float, seed: int, fill=True):
        self.index, self.image_size, self.crop, self.seed = index, image_size, crop, seed
        self.fill = fill  # if not, a bad sample is black and has no caption

    def __getitem__(self, key: tuple[int, int]):
        (epoch, i), failed = key, None
        rng = random.Random(f"{self.seed} {epoch} {i}")  # numpy's take twice as long to seed
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
        raise UserError(f"{REPLACEMENTS} samples in a row cannot be read, the first: {failed}")


def collate(samples: list, accum: int, tokenize):
    """-> `accum` micro-batches (images, token groups), and {reason: samples filled}."""
    # The loss minds no order inside a batch: sorted and in groups, captions need little padding.
    samples = sorted(samples, key=lambda sample: len(sample[1]))
    size = len(samples) // accum  # b
    group = max(MIN_GROUP, math.ceil(size / LENGTH_GROUPS))
    micro_batches = []
    for first in range(0, len(samples), size):
        images, captions, _ = zip(*samples[first:first + size])
        groups = [tokenize(list(captions[i:i + group])) for i in range(0, size, group)]
        # default_collate and not stack: in a worker it writes into memory that the parent shares.
        micro_batches.append((default_collate(images), groups))
    # A plain dict: pinning copies a mapping by its update(), which in a Counter adds.
    return micro_batches, dict(Counter(reason for *_, reason in samples if reason))


def leave_signals_to_parent(worker: int):
    # A scheduler signals all processes, and the parent still needs these; SIGTERM is also its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(20))


def training_loader(index: ShardIndex, cfg, start, steps, rank, world, tokenize):
    """This rank's batches of the steps start .. steps - 1, the same for any cfg.workers: each a
    list of cfg.accum micro-batches (images uint8 (b, 3, S, S), token groups), b = batch_size /
    world / accum, and {reason: samples filled}. tokenize: list of str -> dict of tensors."""
    with contextlib.suppress(ValueError, OSError):  # each tensor of a worker takes a descriptor
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 1 << 16)), hard))
    return DataLoader(
        TrainingSet(index, cfg.image_size, cfg.crop, cfg.seed), num_workers=cfg.workers,
        batch_sampler=batch_order(index, cfg.batch_size, cfg.seed, start, steps, rank, world),
        collate_fn=functools.partial(collate, accum=cfg.accum, tokenize=tokenize),
        worker_init_fn=leave_signals_to_parent, pin_memory=torch.cuda.is_available())


# ---- evaluation data -----------------------------------------------------------------------------
@contextlib.contextmanager
def reading(path, expected: str):
    """Gives an iterator over the lines of a file that are not blank. What is raised where they are
    not what is expected becomes a UserError of one line, with the number of the last one taken."""
    number = 0
    def lines():
        nonlocal number
        # Not splitlines(), which would also cut at U+2028 and its like, legal inside a JSON string.
        for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):
            if line.strip():
                yield line.strip(" ")

    try:
        yield lines()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, ArithmeticError,
            csv.Error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}, up to line {number}: expected {expected} ({reason})") from None


def read_records(path, fields: list[str], aliases: dict = {}) -> list[dict]:
    """The objects of a JSON array or of JSON lines, each with text under all `fields`, for which
    aliases {another name: field} may stand. "image" must be a text, "images" a list of them."""
    found = []
    with reading(path, f"a JSON array or JSON lines with {', '.join(fields)}") as lines:
        first = next(lines, "")
        is_array, lines = first.startswith("["), itertools.chain([first], lines)
        for record in json.loads("\n".join(lines)) if is_array else map(json.loads, lines):
            for name in aliases.keys() & record.keys():
                record.setdefault(aliases[name], record[name])
            names = [record.get("image", ""), record.get("filename", "")] + record.get("images", [])
            "".join(names)  # raises TypeError if one is no text
            found.append(record | {field: well_formed(record[field]) for field in fields})
        found[0]  # raises IndexError if there is none
    return found


# SugarCrepe++'s triplets: "filename" may name a picture. Its keys serve in pairs as well.
read_triplets = functools.partial(read_records, fields=["caption", "caption2", "negative_caption"])
read_pairs = functools.partial(
    read_records, fields=["query", "paraphrase"],
    aliases={"caption": "query", "caption2": "paraphrase", "filename": "image"})


def read_captions(path) -> dict[str, list[str]]:
    """{file name: [captions]} of a COCO captions file, without pictures that have none."""
    with reading(path, "COCO's images {id, file_name}, annotations {image_id, caption}") as lines:
        coco, captions = json.loads("\n".join(lines)), {}
        names = {image["id"]: well_formed(image["file_name"]) for image in coco["images"]}
        for annotation in coco["annotations"]:
            name, caption = names[annotation["image_id"]], well_formed(annotation["caption"])
            captions.setdefault(name, []).append(caption)
        min(captions)  # raises ValueError if there are none
    return captions


def read_sts(path) -> list[tuple[str, str, float]]:
    """[(sentence1, sentence2, score)] of CSV or TSV: columns of these names, else the first."""
    header, columns, found = ["sentence1", "sentence2", "score"], [0, 1, 2], []
    with reading(path, "sentence1, sentence2 and a finite score") as lines:
        first = next(lines, "")
        # Tab-separated sets (GLUE's) hold stray quote characters that quote nothing.
        style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if "\t" in first else {}
        for row in csv.reader(itertools.chain([first], lines), **style):
            names = [name.strip().lower() for name in row]
            if not found and set(header) <= set(names):
                columns = [names.index(name) for name in header]
            else:
                one, other, score = (row[column] for column in columns)
                found.append((well_formed(one), well_formed(other), float(score)))
                math.ceil(found[-1][2])  # raises OverflowError or ValueError if it is not finite
        found[0]  # raises IndexError if there is none
    return found


def read_templates(path) -> list[str]:
    """The prompt templates of a file, one a line, each with {} where the class name goes."""
    with reading(path, "a template a line, with {} for the class name") as lines:
        found = [line for line in lines if line.index("{}") >= 0]  # it raises ValueError
        found[0]
    return found


# A gallery is a dict {name: item} in ranking order. An item is a file's path, a (tar, offset,
# bytes) range of a shard, or a uint8 array (H, W, 3) of a torchvision data set held in memory.
def list_pictures(folder) -> dict:
    """The gallery of a folder: the pictures in its .tar shards by key, or else every one below it
    that is not hidden, sorted by path relative to the folder, which is their name."""
    open_shard.cache_clear()
    gallery, skipped = {}, Counter()
    for shard in sorted(Path(folder).glob("*.tar")):
        keys, rows, bad, _ = index_shard(shard)
        for key, place in zip(keys, rows[["image", "image_size"]].tolist()):
            gallery[key] = (str(shard), *place)
        skipped += bad
    if skipped:
        print(f"{folder}: left out of the gallery: {dict(skipped)}", file=sys.stderr)
    if gallery:
        return gallery
    seen = set()  # through links a folder may hold itself
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        if os.path.realpath(place) in seen:
            folders[:], files = [], []
        seen.add(os.path.realpath(place))
        for path in (Path(place, name) for name in files if name[0] != "."):
            if path.suffix[1:].lower() in (*IMAGE_TYPES, "bmp"):
                gallery[path.relative_to(folder).as_posix()] = path
    if not gallery:
        raise UserError(f"{folder}: no such folder, or no picture in it or below")
    return dict(sorted(gallery.items()))


def rows_by_name(names) -> dict[str, int]:
    """{name: row}; a picture in a subfolder also by its file name alone, unless two share that."""
    shorts = [name.rsplit("/", 1)[-1] for name in names]
    uses = Counter(shorts)
    rows = {short: row for row, short in enumerate(shorts) if uses[short] == 1}
    return rows | {name: row for row, name in enumerate(names)}


def read_zeroshot(source: str, classnames: str = ""):
    """(gallery, class names, {picture: class index}) of a folder of class folders, imagenet:ROOT
    (those of ROOT/val), cifar10:ROOT or cifar100:ROOT (torchvision's test sets). Names: the lines
    of `classnames` in the order of the sorted folders, else theirs or torchvision's, _ as space."""
    kind, _, root = source.partition(":")
    if kind in ("cifar10", "cifar100"):
        try:
            dataset = getattr(torchvision.datasets, kind.upper())(root, train=False)
        except RuntimeError as error:
            raise UserError(f"{root}: no {kind.upper()} there ({error})") from None
        names, gallery = dataset.classes, {f"test/{i}": p for i, p in enumerate(dataset.data)}
        labels = dict(zip(gallery, dataset.targets))
    else:
        folder = Path(root).expanduser() / "val" if kind == "imagenet" else source
        gallery = {name: path for name, path in list_pictures(folder).items() if "/" in name}
        names = sorted({name.split("/")[0] for name in gallery})
        labels = {name: names.index(name.split("/")[0]) for name in gallery}
        if kind == "imagenet" and len(names) == 1000:  # folders named by sorted WordNet ids
            names = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    if not labels:
        raise UserError(f"{source}: expected a folder of pictures for each class")
    names = [name.replace("_", " ") for name in names]
    if classnames:
        with reading(classnames, f"{len(names)} class names") as given:
            names = [new for new, _ in zip(given, names, strict=True)]
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
            bad.append((i, str(error)))
    return list(good), default_collate(list(good.values())) if good else None, bad


def picture_loader(gallery: dict, preprocess, batch_size: int, workers: int):
    """Yields (indices, batch of preprocess(picture)s or None, [(index, reason)]) of a gallery."""
    return DataLoader(list(enumerate(gallery.values())), batch_size, num_workers=workers,
                      collate_fn=functools.partial(collate_pictures, preprocess=preprocess),
                      worker_init_fn=leave_signals_to_parent)


# ---- inspecting a shard set ----------------------------------------------------------------------
@dataclasses.dataclass
class InspectConfig:
    data: str = flag("", "shards, as paraclip.py takes them", positional=True)
    workers: int = flag(1, "processes that read and decode", at_least=0)


def main(argv=None):
    cfg = parse_config(InspectConfig, argv)
    check_ranges(cfg)
    index, failed = ShardIndex(cfg.data, cfg.workers), Counter()
    order = itertools.islice(epoch_order(len(index), 128, seed=0, epoch=0), 50_000)
    samples, began = [(0, i) for i in order], time.perf_counter()
    loader = DataLoader(
        TrainingSet(index, 224, crop=0.5, seed=0, fill=False), num_workers=cfg.workers,
        batch_size=64, sampler=samples,
        collate_fn=functools.partial(collate, accum=1, tokenize=list))
    for _, bad in tqdm(loader, "decoding", disable=None, leave=False):
        failed.update(bad)
    print(json.dumps({"shards": len(index.shards), "samples": len(index) - failed.total(),
                      "skipped": Counter(index.skipped) + failed, "keys": index.extensions,
                      "images_per_s": round(len(samples) / (time.perf_counter() - began), 1)}))


if __name__ == "__main__":
    import data  # the module that all others import, whose UserError they raise
    data.run(data.main)
