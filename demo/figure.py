"""The figure of eval_paraphrase.py: what queries and their paraphrases find.

A block per pair and model, with a row of images for the query and one for the paraphrase. Images in
both rows have a blue frame, correct images a green check mark. Drawn on a white card with rounded
corners, 1280 pixels wide, to be read at the width of a README on a light or dark page.
"""

import itertools

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.files import atomic_write
from data import BadSample

WIDTH, MARGIN = 1280, 44
COLUMNS, THUMB, GAP, TEXT_WIDTH = 5, 164, 22, 266
BLACK, GRAY, PALE = "#1a1a1a", "#666666", "#e2e2e2"
FRAME, CHECK = "#2f6fde", "#1f9d48"


class Card:
    """A white canvas that grows downwards, with the few shapes that the figures need."""

    def __init__(self, height: int):
        self.image = Image.new("RGB", (WIDTH, height), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x, y, text, size, fill=BLACK, width=WIDTH, lines=1, anchor="la"):
        """Writes the text in at most `lines` lines of `width` pixels."""
        font = ImageFont.load_default(size=size)
        for line in wrap(text, font, width, lines):
            self.draw.text((x, y), line, fill=fill, font=font, anchor=anchor)
            y += 1.3 * size

    def frame(self, x, y, size):
        self.draw.rounded_rectangle((x - 8, y - 8, x + size + 7, y + size + 7), 10,
                                    outline=FRAME, width=6)

    def check(self, x, y):
        """A white check mark on a green disc of 34 pixels, whose corner is (x, y)."""
        self.draw.ellipse((x, y, x + 34, y + 34), fill=CHECK, outline="white", width=2)
        self.draw.line([(x + 9, y + 18), (x + 15, y + 24), (x + 25, y + 11)], fill="white",
                       width=4, joint="curve")

    def save(self, path, height: int):
        """Writes the upper `height` pixels as PNG, with transparent rounded corners."""
        image = self.image.crop((0, 0, WIDTH, height))
        mask = Image.new("L", (2 * WIDTH, 2 * height))
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, 2 * WIDTH - 1, 2 * height - 1), 48, fill=255)
        image.putalpha(mask.resize(image.size))
        with atomic_write(path) as file:
            image.save(file, "PNG")


def wrap(text: str, font, width: int, lines: int) -> list[str]:
    """The text in at most `lines` lines of at most `width` pixels; what is left out shows as …"""
    wrapped = [""]
    for word in text[:1000].split():
        if len(word) > 2 and font.getlength(word) > width:
            while len(word) > 2 and font.getlength(word + "…") > width:
                word = word[:-1]
            word += "…"
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    if len(wrapped) > lines:
        wrapped[lines - 1] += " …"
    return wrapped[:lines]


def choose_pairs(details: dict[str, list[dict]]) -> tuple[list[int], str]:
    """(indices of the pairs to draw, the rule by which they were chosen).

    details: {model label: what --details writes of each pair}. The candidates keep the meaning, are
    of the first kind, and a model finds a correct image of theirs among those drawn (all pairs, if
    there is none). By the AO of the only model, or by how much the last model's AO is above the
    first's, these are drawn: the one behind which a tenth of them is left, the median, and the one
    with a tenth before it.
    """
    labels = list(details)
    first, last = details[labels[0]], details[labels[-1]]
    pairs = [i for i, record in enumerate(last) if record["same"]] or list(range(len(last)))
    pairs = [i for i in pairs if last[i]["kind"] == last[pairs[0]]["kind"]]
    candidates = []
    for i in pairs:
        shown = set()
        for records in details.values():
            shown.update(records[i]["query_ranking"][:COLUMNS])
            shown.update(records[i]["paraphrase_ranking"][:COLUMNS])
        if shown & set(last[i]["images"]):
            candidates.append(i)
    of = f"the {len(candidates)} pairs with a correct image among those shown"
    if not candidates:
        candidates, of = pairs, f"{len(pairs)} pairs"
    if len(candidates) < 3:
        return candidates[:1], ""
    gains, measure = [last[i]["ao"] for i in candidates], "AO"
    if len(labels) > 1:
        gains = [last[i]["ao"] - first[i]["ao"] for i in candidates]
        measure = f"AO of {labels[-1]} minus AO of {labels[0]}"
    order = np.argsort(gains, kind="stable")[::-1]
    places = [len(order) // 10, len(order) // 2, len(order) - 1 - len(order) // 10]
    rule = f"A good, the median and a bad pair by {measure}: ranks "
    rule += ", ".join(str(place + 1) for place in places) + f" of {of}."
    return [candidates[order[place]] for place in places], rule


def draw_pairs(path, images: dict, count: int, details: dict[str, list[dict]], k: int, open_image):
    """Writes the PNG of some pairs, see choose_pairs.

    images: {name: what open_image opens as a Pillow image}; count: how many could be searched.
    """
    chosen, rule = choose_pairs(details)
    block = 2 * (THUMB + GAP) + 84
    card = Card(MARGIN + len(chosen) * len(details) * block + 260)
    y = MARGIN - 8
    any_correct = False
    for index, (label, records) in itertools.product(chosen, details.items()):
        record = records[index]
        card.text(MARGIN, y, label, 34, width=820)
        card.text(WIDTH - MARGIN, y + 4, f"AO@{k} of this pair: {100 * record['ao']:.0f}", 28,
                  fill=GRAY, anchor="ra")
        card.draw.line((MARGIN, y + 48, WIDTH - MARGIN, y + 48), fill=PALE, width=2)
        y += 66
        in_both = set(record["query_ranking"][:COLUMNS])
        in_both &= set(record["paraphrase_ranking"][:COLUMNS])
        for text in ("query", "paraphrase"):
            card.text(MARGIN, y, text, 22, fill=GRAY)
            card.text(MARGIN, y + 30, f"“{record[text]}”", 27, width=TEXT_WIDTH - 24, lines=4)
            x = MARGIN + TEXT_WIDTH
            for name in record[f"{text}_ranking"][:COLUMNS]:
                try:
                    image = open_image(images[name])
                except (BadSample, OSError):
                    # Ranked lists may name an image that cannot be read.
                    image = Image.new("RGB", (1, 1), PALE)
                card.image.paste(ImageOps.fit(image, (THUMB, THUMB)), (x, y))
                card.draw.rectangle((x, y, x + THUMB - 1, y + THUMB - 1), outline=PALE)
                if name in in_both:
                    card.frame(x, y, THUMB)
                if name in record["images"]:
                    card.check(x + THUMB - 40, y + 6)
                    any_correct = True
                x += THUMB + GAP
            y += THUMB + GAP
        y += 18
    # The legend, with a sample of each mark.
    card.frame(MARGIN + 8, y + 10, 22)
    card.text(MARGIN + 60, y + 4, "in both rows", 27)
    if any_correct:
        card.check(MARGIN + 280, y + 4)
        card.text(MARGIN + 326, y + 4, "correct image", 27)
    y += 56
    note = f"{rule} Gallery of {count:,} images.".strip()
    card.text(MARGIN, y, note, 22, fill=GRAY, width=WIDTH - 2 * MARGIN, lines=3)
    lines = len(wrap(note, ImageFont.load_default(size=22), WIDTH - 2 * MARGIN, 3))
    card.save(path, int(y + 29 * lines + MARGIN - 14))
