"""Real photographs: Tiny ImageNet, asked for by WordNet's second names of its classes.

    python -m benchmark.photos tiny-imagenet-200     # the folder as its zip unpacks
    python -m benchmark.ablation --data photos --out runs/photos -- --steps 600

writes train/, val/ and test/ below $PARACLIP_DATA/photos (without it shards/photos): ordinary
shards, and for the two galleries, which halve the official validation photographs, pairs.jsonl and
zeroshot.json. A training caption names the class by WordNet's first lemma. A paraphrase of kind
`synonym` names it by another lemma, which no training caption holds; one of kind `template` says
the first lemma in other wordings. Of either, all photographs of the class are right.
"""

import difflib
import json
import os
import random
import re
import shutil
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmark.emoji_scenes import UNSEEN_WORDINGS, add_member, caption_of, words_of
from data import UserError, check_ranges, data_folder, flag, parse_config, run

TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "an image of {}")  # also of the queries
TRAINING_TEMPLATES = TEMPLATES + (
    "a small photo of {}", "a snapshot of {}", "{} in a photo", "a photograph with {}",
    "in this picture: {}", "one can see {}", "someone took a photo of {}", "nothing but {}")
SHARD_SIZE = 5_000  # photographs a tar

# Lemmas that no rule tells from a second name, and what most readers take them for.
MISLEADING = {
    "bear cat": "the binturong", "black Maria": "a woman", "board": "a plank",
    "cimarron": "a place", "crawfish": "crayfish", "crayfish": "an animal of rivers",
    "darning needle": "a needle", "dike": "a wall along water", "drop": "a little water",
    "drop-off": "a delivery", "dyke": "a wall along water", "grunter": "a fish",
    "judge's robe": "another gown", "keypad": "the keys of a telephone",
    "lollipop": "a sweet on a stick", "native bear": "any bear that is native",
    "painter": "an artist", "paling": "turning pale", "panther": "a leopard",
    "rocker": "a musician", "sewing needle": "a needle", "shades": "shadows",
    "squealer": "an informer", "taper": "getting thinner"}


# ---- names ---------------------------------------------------------------------------------------
def squeezed(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower())


def why_not(name: str, before: list[str], trained: list[str], uses: Counter) -> str:
    """Why a lemma is no second name of its class, or "".

    before: the class's lemmas that stand before it, the one of training captions first; trained:
    what training captions are made of; uses: {lemma in lower case: classes that have it}.
    """
    if name in MISLEADING:
        return f"taken for {MISLEADING[name]}"
    for other in before:
        pair = squeezed(name), squeezed(other)
        if difflib.SequenceMatcher(None, *pair, autojunk=False).ratio() >= 0.8:
            return f"much like {other}"
    one, other = squeezed(name), squeezed(before[0])
    if one in other or other in one or {*words_of(before[0])} <= {*words_of(name)}:
        return "a longer or shorter form of the first"
    if any(contains(text, name) for text in trained):
        return "in a training caption"
    return "a name of two classes" if uses[name.lower()] > 1 else ""


def contains(text: str, name: str) -> bool:
    return f" {' '.join(words_of(name))} " in f" {' '.join(words_of(text))} "


def second_names(lemmas: dict[str, list[str]]) -> dict[str, dict[str, str]]:
    """{class: {lemma after its first: why it is no second name, "" if it is one}}."""
    trained = [names[0] for names in lemmas.values()] + list(TRAINING_TEMPLATES)
    uses = Counter(name.lower() for names in lemmas.values() for name in names)
    found = {}
    for wnid, names in lemmas.items():
        found[wnid] = {name: why_not(name, names[:i], trained, uses)
                       for i, name in enumerate(names) if i}
        # Genus and species close a list: the genus has a capital letter, the species has not
        if len(names) > 1 and re.fullmatch("[A-Z][a-z]+( [a-z]+){1,2}", names[-1]):
            found[wnid][names[-1]] = "scientific"
    return found


# ---- shards --------------------------------------------------------------------------------------
def read_classes(source: Path) -> dict[str, list[str]]:
    """{WordNet id: lemmas} of the data set's classes, sorted by id."""
    lines = (source / "words.txt").read_text().splitlines()
    words = dict(line.split("\t") for line in lines)
    wnids = sorted((source / "wnids.txt").read_text().split())
    return {wnid: [name.strip() for name in words[wnid].split(",")] for wnid in wnids}


def read_photographs(source: Path, wnids: list[str]) -> dict[str, list[tuple[Path, str]]]:
    """{split: [(file, WordNet id)]}; of the official validation set the first half of each class is
    val, the second half test. Training photographs are shuffled: they lie sorted by class."""
    def number(path):
        return int(re.search(r"(\d+)\.JPEG$", path.name)[1])

    splits = {"train": [], "val": [], "test": []}
    for wnid in wnids:
        files = sorted((source / "train" / wnid / "images").glob("*.JPEG"), key=number)
        splits["train"] += [(file, wnid) for file in files]
    random.Random(0).shuffle(splits["train"])
    lines = (source / "val" / "val_annotations.txt").read_text().splitlines()
    labels = dict(line.split("\t")[:2] for line in lines)
    files = sorted((source / "val" / "images" / name for name in labels), key=number)
    for i, wnid in enumerate(wnids):
        own = [(file, wnid) for file in files if labels[file.name] == wnid]
        splits["val"] += own[:len(own) // 2]
        splits["test"] += own[len(own) // 2:]
    return splits


def write_shards(folder: Path, photographs: list[tuple[Path, str]], lemmas: dict) -> dict:
    """Shards of (file, class), a training caption each; returns {class: keys of its pictures}."""
    folder.mkdir(parents=True)
    rng, keys = random.Random(folder.name), {wnid: [] for wnid in lemmas}
    for shard in range(-(-len(photographs) // SHARD_SIZE)):
        part = photographs[shard * SHARD_SIZE:(shard + 1) * SHARD_SIZE]
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (file, wnid) in enumerate(part):
                key = f"{shard * 10_000 + number:09d}"  # numbered as img2dataset does
                caption = caption_of(rng.choice(TRAINING_TEMPLATES), "{0}", [lemmas[wnid][0]])
                add_member(tar, f"{key}.jpg", file.read_bytes())
                add_member(tar, f"{key}.txt", caption.encode())
                keys[wnid].append(key)
    return keys


def write_questions(folder: Path, keys: dict, lemmas: dict, second: dict):
    """pairs.jsonl and zeroshot.json of a gallery whose classes have these `keys`.

    A second name stands in one pair only: intervals take pairs for independent of each other.
    """
    rng, pairs = random.Random(folder.name), []
    for wnid, images in keys.items():
        first = lemmas[wnid][:1]
        for name in (name for name, reason in second[wnid].items() if not reason):
            template = rng.choice(TEMPLATES)
            pairs.append({"query": caption_of(template, "{0}", first), "kind": "synonym",
                          "paraphrase": caption_of(template, "{0}", [name]), "images": images})
        unseen = rng.choice(UNSEEN_WORDINGS["single"])
        pairs.append({"query": caption_of(rng.choice(TEMPLATES), "{0}", first), "kind": "template",
                      "paraphrase": caption_of("{}", unseen, first), "images": images})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    labels = {key: i for i, wnid in enumerate(lemmas) for key in keys[wnid]}
    zeroshot = {"classnames": [names[0] for names in lemmas.values()], "labels": labels}
    (folder / "zeroshot.json").write_text(json.dumps(zeroshot))


@dataclass
class PhotosConfig:
    source: str = flag("tiny-imagenet-200", "the data set's folder, as its zip unpacks",
                       positional=True)
    out: str = flag("photos", "a folder in $PARACLIP_DATA, or its whole path")
    names: bool = flag(False, "print the second names and what was left out, write nothing")

    def __post_init__(self):
        check_ranges(self)


def main(argv=None):
    cfg = parse_config(PhotosConfig, argv)
    source, out = Path(cfg.source), data_folder(cfg.out)
    for part in ("words.txt", "wnids.txt", "train", "val/val_annotations.txt", "val/images"):
        if not (source / part).exists():
            raise UserError(f"{source}: no {part} in it; expected Tiny ImageNet as its zip unpacks "
                            "(http://cs231n.stanford.edu/tiny-imagenet-200.zip, 237 MB)")
    lemmas = read_classes(source)
    second = second_names(lemmas)
    if cfg.names:
        for wnid, names in lemmas.items():
            print(", ".join([names[0]] + [f"{name} ({reason or 'ASKED'})"
                                          for name, reason in second[wnid].items()]))
        return
    if out.exists():
        raise UserError(f"{out} is there already: remove it, or give another --out")
    beside = Path(f"{out}.tmp")
    shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
    for split, photographs in read_photographs(source, list(lemmas)).items():
        keys = write_shards(beside / split, photographs, lemmas)
        if split != "train":
            write_questions(beside / split, keys, lemmas, second)
    os.replace(beside, out)
    asked = [reason for names in second.values() for reason in names.values()].count("")
    print(f"{out}: {len(lemmas)} classes, {asked} second names")


if __name__ == "__main__":
    run(main)
