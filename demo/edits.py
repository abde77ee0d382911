"""Pairs from any English captions, by rule: edits that keep the meaning, and edits that change it.

    python -m demo.edits CAPTIONS > pairs.jsonl
    python eval_paraphrase.py MODEL --images DIR --pairs pairs.jsonl

CAPTIONS is a text file with a caption a line, or what --captions of eval_paraphrase.py takes, such
as COCO's JSON or JSON lines of {"caption", "image"}. Each rule gives a caption at most one pair,
which depends on that caption alone; pairs that change the meaning have "same": false.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass

from common.cli import UserError, flag, parse_config, run
from common.records import read_captions, read_lines, read_text


# ---- words ---------------------------------------------------------------------------------------
def both_ways(text: str) -> dict[str, str]:
    """"cat dog, bus train" -> each word's partner."""
    swaps = {}
    for pair in text.split(", "):
        first, second = pair.split(" ")
        swaps |= {first: second, second: first}
    return swaps


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "ch")) else "s")


# Partners both take "a", never "an".
COLOURS = both_ways("black white, red blue, green yellow, pink purple") | {
    "brown": "black", "grey": "red", "gray": "red"}
NUMBERS = both_ways("two four, three five") | {"six": "three"}
NOUNS = {"hot dog": "sandwich", "sandwich": "burger", "teddy bear": "doll"} | both_ways(
    "dog cat, horse cow, giraffe zebra, bus train, truck boat, motorcycle bicycle, pizza cake, "
    "kitchen bathroom, skateboard surfboard, bed couch, laptop book, bird rabbit")
NOUNS |= {plural(noun): plural(other) for noun, other in NOUNS.items()}
PERSONS = both_ways("man woman, men women, boy girl, boys girls") | {
    "guy": "woman", "guys": "women", "lady": "man", "ladies": "men"}
SIDES = both_ways("above below")
for left, right in (("left", "right"), ("right", "left")):
    for phrase in ("the {}", "{} side", "{} hand", "{} of"):
        SIDES[phrase.format(left)] = phrase.format(right)

PRONOUN = r"(?i)\b(he|him|his|himself|she|her|hers|herself)\b"
NEGATION = r"(?i)\b(no|not|none|nobody|nothing|without)\b|n't\b"
# What "a photo of" cannot stand before: a caption that speaks of a photo, and a sentence.
PHOTO_OR_SENTENCE = "(?i)" + "|".join([
    r"\b(photo|picture|image|view|close|closeup|is|are|was|were|has|have)\b",
    # With a verb in -s before any preposition or participle: "A bike rests between two signs".
    r"^an? ((?!(of|with|in|on|at|to|by|\w+ing|\w{2,}ed)\b)\w+ )+?\w*[^su]s\b",
    # With one after them: "A man in a suit stands near a car".
    r"\w[^su]s (a|an|the|his|her|its|at|by|near|next|to|up|down|out|into|through|while)\b",
    # With a verb in the plural: "A group of zebras stand together".
    r"^an? (group|couple|pair|herd|bunch) of"])
# "the couple of dogs" is not what "a couple of dogs" becomes.
NOT_A_FEW = "(?!(?:couple|few|lot|bunch|number|variety) )"


# ---- rules: the edited caption, or the caption itself where the rule does not apply --------------
def change_case(caption: str) -> str:
    return caption.lower() if caption.isupper() else caption.upper()


def change_period(caption: str) -> str:
    if caption.endswith("."):
        return caption.rstrip(" .")
    return caption + "." if caption[-1].isalnum() else caption


def change_article(caption: str) -> str:
    """The first "a" or "an" becomes "the"; not of "there is a dog", nor of "the letter A"."""
    return re.sub(rf"(?<!is )(?<!are )(?<!letter )\b(?:(A)|a)n? {NOT_A_FEW}(?=[A-Za-z])",
                  lambda match: "The " if match[1] else "the ", caption, count=1)


def add_photo(caption: str) -> str:
    if not re.match("(?i)an? ", caption) or re.search(PHOTO_OR_SENTENCE, caption):
        return caption
    return "a photo of " + caption[0].lower() + caption[1:]


def mistype(caption: str) -> str:
    """Swaps two neighbouring letters inside the longest word, near its middle."""
    word = max(re.finditer(r"[^\W\d_]+", caption), key=lambda word: len(word[0]), default=None)
    if word and len(word[0]) >= 5:
        for i in range((word.start() + word.end()) // 2 - 1, word.end() - 2):
            if caption[i] != caption[i + 1]:
                return caption[:i] + caption[i + 1] + caption[i] + caption[i + 2:]
    return caption


def swap(caption: str, swaps: dict[str, str]) -> str:
    """Puts a word's partner in its place, wherever it stands: the first word that has a partner
    which is not there too."""
    for match in re.finditer(rf"(?i)(?<![\w-])({'|'.join(swaps)})(?![\w-])", caption):
        partner = swaps[match[0].lower()]
        if not re.search(rf"(?i)\b{partner}", caption):
            def in_case(word):
                return partner.capitalize() if word[0][0].isupper() else partner
            return re.sub(rf"(?i)(?<![\w-]){match[0]}(?![\w-])", in_case, caption)
    return caption


def swap_person(caption: str) -> str:
    # "A woman and his dog" would be wrong.
    return caption if re.search(PRONOUN, caption) else swap(caption, PERSONS)


def swap_side(caption: str) -> str:
    # "What is left of a sandwich", "left over pizza", "right side up".
    other_left = re.search(r"(?i)\b(is left of|left over|side up)\b", caption)
    return caption if other_left else swap(caption, SIDES)


def negate(caption: str) -> str:
    """"is" becomes "is not"; without such a verb, the leading "a" or "two" becomes "no"."""
    if re.search(NEGATION, caption):
        return caption
    # "A dog that is not red" would say less than "No dog that is red".
    negated = re.sub(r"(?i)(?<!that )(?<!which )(?<!who )\b(is|are)\b", r"\1 not", caption, count=1)
    if negated == caption:
        leading = rf"(?i)^(an?|the|{'|'.join(NUMBERS)}) {NOT_A_FEW}"
        negated = re.sub(leading, "No ", caption)
    return negated


KEEPING = {"letter case": change_case, "final period": change_period, "article": change_article,
           "a photo of": add_photo, "typing error": mistype}
CHANGING = {"colour": lambda caption: swap(caption, COLOURS),
            "number": lambda caption: swap(caption, NUMBERS),
            "noun": lambda caption: swap(caption, NOUNS), "person": swap_person,
            "side": swap_side, "negation": negate}


def edit(caption: str) -> list[dict]:
    """The pairs of a caption, without its image."""
    pairs = []
    for kind, rule in (KEEPING | CHANGING).items():
        edited = rule(caption)
        if caption.isupper() and kind != "letter case":
            edited = edited.upper()
        if edited != caption:
            pairs.append({"query": caption, "paraphrase": edited, "kind": kind})
            if kind in CHANGING:
                pairs[-1]["same"] = False
    return pairs


# ---- the program ---------------------------------------------------------------------------------
def captions_of(path: str) -> list[tuple[str, str | None]]:
    """[(caption, image)] with single spaces; image is None where none is named."""
    text = read_text(path)
    is_table = path.endswith((".csv", ".tsv")) or "\t" in text.partition("\n")[0]
    # "image," begins the captions.txt of Kaggle's copy of Flickr.
    if is_table or text.lstrip().startswith(("[", "{", "image,")):
        captions = read_captions(path)
    else:
        captions = [(line, None) for line in read_lines(path)]
    return [(" ".join(caption.split()), image) for caption, image in captions]


@dataclass
class EditsConfig:
    captions: str = flag("", "file of captions", positional=True)


def main(argv=None):
    path = parse_config(EditsConfig, argv).captions
    # Each caption of an image once, none without a letter or digit.
    captions = [pair for pair in dict.fromkeys(captions_of(path)) if re.search(r"\w", pair[0])]
    counts = Counter()
    for caption, image in captions:
        for pair in edit(caption):
            counts[pair["kind"]] += 1
            print(json.dumps(pair | ({"image": image} if image else {})))
    if not captions:
        raise UserError(f"{path}: there is no caption in it")
    print(f"{len(captions)} captions give {counts.total()} pairs: {dict(counts)}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
