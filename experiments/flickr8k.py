"""Real photographs with human captions and human paraphrases: Flickr8k and SICK as a benchmark.

    python -m experiments.flickr8k FLICKR SICK.txt [--sts stsb-dev.csv ...]
    python -m experiments.ablation --data flickr8k

writes train/, val/ and test/ below $PARACLIP_DATA/flickr8k (without it shards/flickr8k): tar shards
of KEY.jpg and KEY.json {"caption": [five captions]}, for val and test also pairs.jsonl, and
captions.json (COCO's format) for recall. KEY is the name of the image's file without its extension.

FLICKR is the folder of Flickr8k (Hodosh et al. 2013) with Images/ or Flicker8k_Dataset/, with
Flickr8k.token.txt or Kaggle's captions.txt, and with the official split files
Flickr_8k.{train,dev,test}Images.txt. Kaggle's copy lacks these: a hash of the file name then makes
an eighth of the images `dev` and an eighth `test`. SICK.txt is SICK (Marelli et al. 2014) as
https://zenodo.org/record/2787612 has it: sentences made from captions of Flickr8k, with the
captions that they were made from, and judged by people.

test   The official test images and, as distractors or as what is asked for, every image whose
       caption SICK or a file of --sts holds. captions.json has the official test images alone.
       Pairs: two sentences made from captions of exactly one common image, which entail each other,
       of relatedness 4.5 to 5 (the top of the scale), without a negation.
val    The other official dev images. Its pairs are made without SICK: two captions of one image
       that differ in one content word, and captions rewritten by rule (see `val_pairs`). So are its
       pairs that change the meaning: a negation, or another word of EXCLUSIVE.
train  All other images. One with the same bytes as an image of test or val is left out.

A caption is found by its letters and digits alone: captions differ from the sentences' originals in
capitals, spaces and full stops. The kinds of pairs compare content words, which are all words but
FUNCTION_WORDS, without endings such as -s, -ed, -en and -ing:
words    a content word is replaced, added or left out: "a black dog is leaping" / "... jumping"
order    the same content words (but one, at most) in another order: "the dog is catching a ball" /
         "a ball is being caught by the dog", "a child, who is young" / "a young child"
article  the same content words in the same order; function words differ: "a dog" / "the dog"

Test also has pairs that change the meaning ("same": false): two sentences made from captions of
exactly one common image, which contradict each other,
opposite: negation  one with a negation: "there is no boy on the swing" / "a boy is on the swing"
opposite: words     both without: "a boy is jumping into an empty pool" / "... a full pool"
or of which neither entails or contradicts the other,
opposite: roles     the same content words, endings and all, in other roles:
                    "a boy is watching a family" / "a family is watching a boy"
"""

import csv
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tarfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from common.cli import UserError, flag, parse_config, run
from common.files import data_folder
from demo.emoji_scenes import add_member

SHARD_SIZE = 2_000  # images a tar
SHORTER_SIDE = 256  # pixels; an image that is larger is made smaller
KINDS = ("words", "order", "article")  # the first is the headline
OPPOSITES = ("opposite: negation", "opposite: words", "opposite: roles")

FUNCTION_WORDS = set("""
    a an the this that these those some there it its his her he she him they their them one s
    who which while as and or is are was were be being been am has have had do does did
    in on at of to into onto from by with for over up down out off through across along near
    beside next""".split())
# Participles that an ending alone does not lead back to their verb.
PARTICIPLES = dict(
    bitten="bite", broken="break", caught="catch", clung="cling", drawn="draw", driven="drive",
    drunk="drink", eaten="eat", given="give", held="hold", leapt="leap", ridden="ride",
    shaken="shake", shown="show", sold="sell", sung="sing", taken="take", thrown="throw",
    worn="wear")
NEGATION = re.compile(r"\b(no|not|none|nobody|nothing|never|neither|nor|without)\b|n't\b")
# For val: a caption changes its meaning if a word of one list is replaced by the word of the other
# list that has its place.
EXCLUSIVE = [
    "man men boy boys dog dogs black red green yellow two summer indoor day".split(),
    "woman women girl girls cat cats white blue purple pink four winter outdoor night".split()]
# "a red ball" before a function word, a verb in -ing, or the end: more words may belong to a noun
# that stands before anything else ("a red ball cap").
FUNCTION_WORD = "|".join(sorted(FUNCTION_WORDS))
COLOURED_NOUN = re.compile(
    r"\b(a) (black|white|brown|red|blue|green|yellow|orange|pink|purple|grey|tan) "
    rf"(?!(?:{FUNCTION_WORD})\b)([b-df-hj-np-tv-z]\w+)(?= (?:{FUNCTION_WORD}|\w+ing)\b| ?[.,]|$)",
    re.IGNORECASE)


# ---- kinds of pairs ------------------------------------------------------------------------------
def words_of(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def squeezed(text: str) -> str:
    """Letters and digits of a text: by them a sentence's original finds its caption."""
    return "".join(words_of(text))


def stem(word: str) -> str:
    """A word without its ending: running, runs -> run; grassy, grass -> gras."""
    word = PARTICIPLES.get(word, word)
    for ending in ("ing", "ed", "en", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            break
    # running -> runn -> run; studying -> study, studied -> studi, both -> stud.
    if len(word) > 3:
        word = word.rstrip("eiy")
    if len(word) > 3 and word[-1] == word[-2]:
        word = word[:-1]
    return word


def content_words(text: str) -> list[str]:
    return [stem(word) for word in words_of(text) if word not in FUNCTION_WORDS]


def kind_of(first: str, second: str) -> str:
    """Kind of a pair by the rule above; "" if the two are equal in all their letters."""
    if words_of(first) == words_of(second):
        return ""
    a, b = content_words(first), content_words(second)
    if a == b:
        return "article"
    common = Counter(a) & Counter(b)
    unshared = len(a) + len(b) - 2 * common.total()
    reordered = [word for word in a if word in common] != [word for word in b if word in common]
    return "order" if reordered and unshared <= 1 else "words"


# ---- pairs ---------------------------------------------------------------------------------------
def opposite_kind(row: dict) -> str:
    """Kind of two sentences that do not mean the same, by the rule above; "" if they may."""
    texts = [row["sentence_A"], row["sentence_B"]]
    relations = row["entailment_AB"], row["entailment_BA"]
    if relations == ("A_contradicts_B", "B_contradicts_A"):
        negated = NEGATION.search(" ".join(texts).lower())
        return "opposite: negation" if negated else "opposite: words"
    first, second = [Counter(words_of(text)) for text in texts]
    differing = (first - second) | (second - first)
    if relations == ("A_neutral_B", "B_neutral_A") and differing.keys() <= FUNCTION_WORDS:
        return "opposite: roles"
    return ""


def test_pairs(sick: list[dict], images_of: dict[str, set]) -> list[dict]:
    """The pairs of test; images_of: {squeezed caption: images}."""
    pairs = []
    for row in sick:
        texts = [row["sentence_A"].strip(), row["sentence_B"].strip()]
        common = (images_with([row["sentence_A_original"]], images_of)
                  & images_with([row["sentence_B_original"]], images_of))
        if len(common) != 1:
            continue
        pair = {"query": texts[0], "paraphrase": texts[1]}
        if kind := opposite_kind(row):
            # The image may show what either of the two says, or neither.
            pairs.append(pair | {"group": Path(min(common)).stem, "kind": kind, "same": False})
        entailed = (row["entailment_AB"], row["entailment_BA"]) == ("A_entails_B", "B_entails_A")
        if not entailed or float(row["relatedness_score"]) < 4.5:
            continue
        if not NEGATION.search(" ".join(texts).lower()) and (kind := kind_of(*texts)):
            pairs.append(pair | {"image": min(common), "kind": kind})
    return pairs


def with_the(caption: str) -> str:
    """"A dog in a park" -> "The dog in the park"."""
    caption = re.sub(r"\bAn?\b", "The", caption)
    return re.sub(r"\ban?\b", "the", caption)


def with_clause(caption: str) -> str:
    """"A red ball in the grass" -> "A ball which is red in the grass"; the first noun like it."""
    return COLOURED_NOUN.sub(r"\1 \3 which is \2", caption, count=1)


def negated(caption: str) -> str:
    """"A dog in a park" -> "No dog in a park"; only what starts with an article."""
    return re.sub(r"^An? ", "No ", caption)


def with_other_word(caption: str) -> str:
    """"A man and two dogs" -> "A woman and two dogs": the first word that EXCLUSIVE holds."""
    first, second = EXCLUSIVE
    other = dict(zip(first + second, second + first))
    words = rf"\b({'|'.join(other)})\b"
    return re.sub(words, lambda match: other[match[0].lower()], caption, count=1,
                  flags=re.IGNORECASE)


def val_pairs(captions: dict[str, list[str]]) -> list[dict]:
    """At most one pair of each kind for an image, the first that is found: two of its captions
    that differ in one content word at most, of three or more, longest first; or a caption and
    what `with_the` and `with_clause` make of it. Beside each of these, for contrast, its query and
    what `negated` and `with_other_word` make of it."""
    pairs = []
    for image, texts in captions.items():
        candidates = []
        for pair in itertools.combinations(texts, 2):
            a, b = content_words(pair[0]), content_words(pair[1])
            shared = (Counter(a) & Counter(b)).total()
            if len(a) == len(b) >= 3 and shared >= len(a) - 1:
                candidates.append(pair)
        candidates.sort(key=lambda pair: -len(content_words(pair[0])))
        for text in texts:
            candidates += [(text, with_the(text)), (text, with_clause(text))]
        kinds, queries = set(), {}
        for first, second in candidates:
            kind = kind_of(first, second)
            if kind and kind not in kinds:
                kinds.add(kind)
                pairs.append({"query": first, "paraphrase": second, "image": image, "kind": kind})
                queries[first] = {"opposite: negation": negated(first),
                                  "opposite: words": with_other_word(first)}
        for query, opposites in queries.items():
            for kind, changed in opposites.items():
                if changed != query:
                    pairs.append({"query": query, "paraphrase": changed,
                                  "group": Path(image).stem, "kind": kind, "same": False})
    return pairs


# ---- the official files --------------------------------------------------------------------------
def find_file(folder: Path, *names: str) -> Path | None:
    """The first of these that is there, in the folder or in one in it."""
    for name in names:
        for path in (folder / name, *sorted(folder.glob(f"*/{name}"))):
            if path.exists():
                return path


def read_captions(path: Path) -> dict[str, list[str]]:
    """{image file: captions}, sorted, of Flickr8k.token.txt or Kaggle's captions.txt."""
    captions = defaultdict(list)
    with open(path, encoding="utf-8", newline="") as file:
        if path.name == "captions.txt":
            rows = csv.DictReader(file)
            if rows.fieldnames != ["image", "caption"]:
                raise UserError(f"{path}: expected the columns image,caption")
            for row in rows:
                captions[row["image"]].append(" ".join(row["caption"].split()))
        else:
            for line in file:
                name, _, caption = line.partition("\t")
                captions[name.partition("#")[0]].append(" ".join(caption.split()))
    return dict(sorted(captions.items()))


def read_split(flickr: Path, split: str, captions: dict) -> set[str]:
    """Image files of the official dev or test set."""
    if path := find_file(flickr, f"Flickr_8k.{split}Images.txt"):
        return set(path.read_text().split())
    eighth = {"dev": 0, "test": 1}[split]
    print(f"{flickr}: no Flickr_8k.{split}Images.txt, so a hash of the names makes the {split} set")
    return {name for name in captions if hashlib.sha256(name.encode()).digest()[0] % 8 == eighth}


def read_sick(path: Path) -> list[dict]:
    """The rows whose two sentences come from captions of Flickr8k; others are about videos."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or "sentence_A_original" not in rows[0]:
        raise UserError(f"{path}: no column sentence_A_original; expected SICK.txt as in SICK.zip "
                        "of https://zenodo.org/record/2787612")
    return [row for row in rows
            if row["sentence_A_dataset"] == row["sentence_B_dataset"] == "FLICKR"]


def read_cells(path: Path) -> list[str]:
    """All cells of a CSV or TSV file, of which only those that are captions will matter."""
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    if "\t" in text.partition("\n")[0]:
        return re.split("[\t\r\n]+", text)
    return [cell for row in csv.reader(io.StringIO(text)) for cell in row]


def images_with(texts: list[str], images_of: dict[str, set]) -> set[str]:
    """Image files that have one of these texts as a caption; images_of as in `test_pairs`."""
    found = set()
    for text in texts:
        found |= images_of.get(squeezed(text), set())
    return found


def read_image(path: Path) -> bytes:
    """A JPEG whose shorter side has 256 pixels; the file's own bytes if it is not larger."""
    content = path.read_bytes()
    image = Image.open(io.BytesIO(content))
    scale = SHORTER_SIDE / min(image.size)
    if scale >= 1:
        return content
    image = ImageOps.exif_transpose(image).convert("RGB")
    image = image.resize([round(scale * side) for side in image.size], Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


# ---- the benchmark -------------------------------------------------------------------------------
def write_shards(folder: Path, images: dict[str, bytes], captions: dict[str, list[str]]):
    folder.mkdir(parents=True)
    names = list(images)
    for start in range(0, len(names), SHARD_SIZE):
        path = folder / f"{start // SHARD_SIZE:05d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name in names[start:start + SHARD_SIZE]:
                key = Path(name).stem
                add_member(tar, f"{key}.jpg", images[name])
                add_member(tar, f"{key}.json", json.dumps({"caption": captions[name]}).encode())


def write_evaluation(folder: Path, pairs: list[dict], captions: dict[str, list[str]]):
    """pairs.jsonl, sorted by kind, and captions.json."""
    with open(folder / "pairs.jsonl", "w") as file:
        for pair in sorted(pairs, key=lambda pair: (*KINDS, *OPPOSITES).index(pair["kind"])):
            if "image" in pair:
                pair["image"] = Path(pair["image"]).stem
            file.write(json.dumps(pair) + "\n")
    images, annotations = [], []
    for number, (name, texts) in enumerate(captions.items()):
        images.append({"id": number, "file_name": Path(name).stem})
        annotations += [{"image_id": number, "caption": text} for text in texts]
    coco = {"images": images, "annotations": annotations}
    (folder / "captions.json").write_text(json.dumps(coco))


@dataclass
class Flickr8kConfig:
    flickr: str = flag("flickr8k", "folder of Flickr8k", positional=True)
    sick: str = flag("SICK.txt", "file of SICK", positional=True)
    sts: list[str] = flag([], "CSV or TSV files whose sentences' images are not trained on")
    out: str = flag("flickr8k", "a folder in $PARACLIP_DATA, or its whole path")


def main(argv=None):
    cfg = parse_config(Flickr8kConfig, argv)
    flickr, out = Path(cfg.flickr), data_folder(cfg.out)
    image_folder = find_file(flickr, "Images", "Flicker8k_Dataset", "Flickr8k_Dataset")
    caption_file = find_file(flickr, "Flickr8k.token.txt", "captions.txt")
    if not image_folder or not caption_file:
        raise UserError(f"{flickr}: expected Images/ or Flicker8k_Dataset/ in it, and "
                        "Flickr8k.token.txt or captions.txt")
    if out.exists():
        raise UserError(f"{out} is there already: remove it, or give another --out")

    captions = read_captions(caption_file)
    images_of = defaultdict(set)
    for name, texts in captions.items():
        for text in texts:
            images_of[squeezed(text)].add(name)

    # Whatever has a caption in SICK or STS files leaves training, whether or not it makes a pair.
    sick = read_sick(Path(cfg.sick))
    originals = {row["sentence_A_original"] for row in sick}
    originals |= {row["sentence_B_original"] for row in sick}
    sts_texts = []
    for path in cfg.sts:
        sts_texts += read_cells(Path(path))
    official_test = read_split(flickr, "test", captions)
    official_dev = read_split(flickr, "dev", captions)
    test = official_test | images_with(originals, images_of)
    test |= images_with(sts_texts, images_of) - official_dev
    val = official_dev - test
    splits = {"test": test, "val": val, "train": captions.keys() - test - val}

    unfinished = Path(f"{out}.tmp")
    # What a run that was killed has left.
    shutil.rmtree(unfinished, ignore_errors=True)
    counts, digests, skipped = {}, set(), Counter()
    for split, names in splits.items():
        images = {}
        for name in sorted(names & captions.keys()):
            try:
                image = read_image(image_folder / name)
            except OSError:
                # The official captions name one file that is not there.
                skipped["missing or broken image"] += 1
                continue
            digest = hashlib.sha256(image).digest()
            if digest in digests:
                skipped["the same image twice"] += 1
                continue
            digests.add(digest)
            images[name] = image
        if not images:
            raise UserError(f"{flickr}: no image is left for {split}")
        write_shards(unfinished / split, images, captions)
        counts[split] = {"images": len(images)}
        if split == "train":
            continue
        kept = {name: captions[name] for name in images}
        if split == "val":
            pairs = val_pairs(kept)
        else:
            pairs = [pair for pair in test_pairs(sick, images_of)
                     if "image" not in pair or pair["image"] in images]
            kept = {name: texts for name, texts in kept.items() if name in official_test}
        write_evaluation(unfinished / split, pairs, kept)
        counts[split]["images with captions"] = len(kept)
        counts[split].update(Counter(pair["kind"] for pair in pairs))
    os.replace(unfinished, out)
    matched = [text for text in originals if squeezed(text) in images_of]
    print(f"{out}: {len(matched)} of {len(originals)} originals of SICK's sentences are captions; "
          f"skipped: {dict(skipped)}")
    print(json.dumps(counts))


if __name__ == "__main__":
    run(main)
