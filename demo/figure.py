"""The figures of eval_paraphrase.py: what one pair of queries finds, and AO as bars.

draw_pair: a block per model, with a row of images for the query and one for the paraphrase. Images
in both rows have a blue frame, correct images a green check mark.
draw_summary: same first image (AO@1) and AO@k, a group of bars per kind of pair, a bar per model.

Both are drawn on a white card with rounded corners, 1280 pixels wide, to be read at the width of a
README on a light or dark page.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.files import atomic_write
from data import BadSample, open_image

WIDTH, MARGIN = 1280, 44
COLUMNS, THUMB, GAP, TEXT_WIDTH = 5, 164, 22, 266
BLACK, GRAY, PALE = "#1a1a1a", "#666666", "#e2e2e2"
FRAME, CHECK = "#2f6fde", "#1f9d48"
BARS = ["#b9bec6", "#2f6fde", "#f0932b", "#1f9d48", "#8e44ad", "#d6336c"]
FLOOR = "#44484f"


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


def choose_pair(details: dict[str, list[dict]]) -> tuple[int, str]:
    """(index of the pair to draw, the rule by which it was chosen).

    details: {model label: what --details writes of each pair}. Of the pairs for which a model finds
    a correct image among those drawn (of all pairs, if there is none), the pair of median gain: AO
    of the last model minus AO of the first. A single model has the pair of its median AO.
    """
    labels = list(details)
    first, last = details[labels[0]], details[labels[-1]]
    if len(last) == 1:
        return 0, ""
    candidates = []
    for i in range(len(last)):
        for records in details.values():
            shown = records[i]["query_ranking"][:COLUMNS]
            shown = shown + records[i]["paraphrase_ranking"][:COLUMNS]
            if set(shown) & set(records[i]["images"]):
                candidates.append(i)
                break
    which = f"{len(candidates)} of {len(last)} pairs with a correct image among those shown"
    if not candidates:
        candidates = list(range(len(last)))
        which = f"{len(last)} pairs"
    if len(labels) == 1:
        gains = [last[i]["ao"] for i in candidates]
        rule = f"The pair of median AO of {which}."
    else:
        gains = [last[i]["ao"] - first[i]["ao"] for i in candidates]
        rule = (f"The pair of median gain (AO of {labels[-1]} minus AO of {labels[0]}) of {which}.")
    order = np.argsort(gains, kind="stable")
    return candidates[order[len(order) // 2]], rule


def draw_pair(path, gallery: dict, details: dict[str, list[dict]], k: int):
    """Writes the PNG of one pair. gallery: {image name: item}, see open_image."""
    index, rule = choose_pair(details)
    block = 2 * (THUMB + GAP) + 84
    card = Card(MARGIN + len(details) * block + 260)
    y = MARGIN - 8
    any_correct = False
    for label, records in details.items():
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
                    image = open_image(gallery[name])
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
    note = f"{rule} Gallery of {len(gallery):,} images.".strip()
    card.text(MARGIN, y, note, 22, fill=GRAY, width=WIDTH - 2 * MARGIN, lines=3)
    lines = len(wrap(note, ImageFont.load_default(size=22), WIDTH - 2 * MARGIN, 3))
    card.save(path, int(y + 29 * lines + MARGIN - 14))


def draw_summary(path, reports: dict[str, dict]):
    """Writes the PNG of bars. reports: {model label: report}, see eval_paraphrase.py's JSON."""
    first = next(iter(reports.values()))
    titles = ["Same first image, %", f"AO@{first['k']}, %"]
    kinds = list(first.get("kinds", first.get("files", {})))
    top, height = 150, 330
    card = Card(top + height + 260)
    card.text(MARGIN, MARGIN - 8, "Query and paraphrase: how much do their results agree?", 34)
    panel_width = (WIDTH - 2 * MARGIN - 60) // 2
    for panel, (title, metric) in enumerate(zip(titles, ("ao1", "ao"))):
        left = MARGIN + panel * (panel_width + 60)
        card.text(left, top - 56, title, 28)
        for percent in (0, 25, 50, 75, 100):
            y = top + height * (1 - percent / 100)
            card.draw.line((left + 46, y, left + panel_width, y), fill=PALE, width=2)
            card.text(left + 38, y, str(percent), 22, fill=GRAY, anchor="rm")
        group_width = (panel_width - 56) / max(1, len(kinds))
        bar_width = min(56, 0.8 * group_width / len(reports))
        for group, kind in enumerate(kinds or [""]):
            center = left + 52 + (group + 0.5) * group_width
            x = center - bar_width * len(reports) / 2
            for number, report in enumerate(reports.values()):
                part = report
                if kind:
                    part = report.get("kinds", report.get("files", {})).get(kind, {})
                if metric in part:
                    draw_bar(card, x, bar_width, top, height, part, metric, BARS[number % 6])
                x += bar_width
            card.text(center, top + height + 12, kind, 24, width=int(group_width), anchor="ma",
                      lines=2)
    # The legend: a color per model, and the marks.
    x, y = MARGIN, top + height + 84
    entries = [(label, BARS[number % 6]) for number, label in enumerate(reports)]
    for label, color in [*entries, ("unrelated queries (chance)", FLOOR)]:
        width = 46 + ImageFont.load_default(size=26).getlength(label[:60])
        if x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + 44
        card.draw.rectangle((x, y + 4, x + 26, y + 28), fill=color)
        card.text(x + 38, y, label, 26, width=700)
        x += width + 40
    note = f"Lines: 95 % bootstrap intervals. Gallery of {first['gallery']:,} images."
    card.text(MARGIN, y + 50, note, 22, fill=GRAY)
    card.save(path, int(y + 50 + 29 + MARGIN - 14))


def draw_bar(card: Card, x, width, top, height, part: dict, metric: str, color: str):
    """A bar of height part[metric] with its interval and, at its foot, that of unrelated pairs."""
    def level(value):
        return top + height * (1 - value)

    base = level(0)
    card.draw.rectangle((x + 2, level(part[metric]), x + width - 2, base), fill=color)
    if f"{metric}_random" in part:
        floor = min(level(part[f"{metric}_random"]), base - 3)
        card.draw.rectangle((x + 2, floor, x + width - 2, base), fill=FLOOR)
    low, high = part[f"{metric}_ci"]
    middle = x + width / 2
    card.draw.line((middle, level(low), middle, level(high)), fill=BLACK, width=3)
    for end in (low, high):
        card.draw.line((middle - 7, level(end), middle + 7, level(end)), fill=BLACK, width=3)
