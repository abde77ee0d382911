"""The figure of eval_paraphrase.py --figure: the pictures that models find for one pair of queries.

Each model has two rows, query and paraphrase. A picture that is in both rows has a frame of the
same colour in both; a filled dot marks the pictures that are right.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data import open_picture, replacing

THUMB, GAP, MARGIN, TEXT_WIDTH, SCORE_WIDTH = 118, 20, 28, 250, 110  # pixels
COLUMNS = 10  # pictures a row at most
FRAMES = ["#e6194b", "#3477eb", "#2ca02c", "#ff8c00", "#8e44ad",
          "#00a6a6", "#e754c4", "#8c564b", "#d4b106", "#5a6b7b"]


def choose_pair(shown: list[tuple[str, dict]]) -> tuple[int, str]:
    """(index of the pair to draw, the rule by which it was chosen).

    Of the pairs for which query and paraphrase both make the last model find a right picture first,
    the one on which the first model's AO is lowest relative to the last's. A model that is alone
    has its pair of median AO. If no pair is found, or none names a picture, all are candidates.
    """
    (label, first), (last_label, last) = shown[0], shown[-1]
    pairs = len(last["pairs"])
    if pairs == 1:
        return 0, ""
    tops = last["ranked"][:, :, 0].T.tolist()  # (P, 2)
    found = [i for i, right in enumerate(last["correct"]) if set(tops[i]) <= set(right)]
    candidates = np.array(found or range(pairs))
    rule = f"Of {pairs} pairs "
    if found:
        rule += (f"the {len(found)} for which {last_label} finds the right picture first, by query "
                 "and by paraphrase; of these ")
    if len(shown) == 1:
        order = candidates[np.argsort(last["ao"][candidates], kind="stable")]
        return int(order[len(order) // 2]), rule + "the one of median AO."
    lead = (first["ao"] - last["ao"])[candidates]
    rule += f"the one on which the AO of {label} is lowest relative to that of {last_label}."
    return int(candidates[lead.argmin()]), rule


def wrap(text: str, font, width: int, most: int) -> str:
    """The text in lines of at most `width` pixels, cut after `most` of them."""
    lines = [""]
    for word in text.split():
        word = word[:100]
        while len(word) > 2 and font.getlength(word) > width:
            word = word[:-2] + "…"
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines[:most]) + (" …" if len(lines) > most else "")


def draw_figure(path, gallery: dict, shown: list[tuple[str, dict]], k: int):
    """Writes the PNG.

    gallery: {name: item}, see data.py. shown: [(model, what measure_pairs says of it)]: pairs,
    ranked (2, P, K) rows of the gallery's readable pictures, rows {name: row}, for each pair the
    correct rows, its ao and js.
    """
    index, rule = choose_pair(shown)
    pair, columns = shown[0][1]["pairs"][index], min(COLUMNS, k)
    step, block = THUMB + GAP, 2 * (THUMB + GAP) + 50
    width = 2 * MARGIN + TEXT_WIDTH + columns * step + SCORE_WIDTH
    canvas = Image.new("RGB", (width, 2 * MARGIN + len(shown) * block + 60), "white")
    draw = ImageDraw.Draw(canvas)

    def write(x, y, text, size, fill="#111", room=width, lines=1):
        font = ImageFont.load_default(size=size)  # shows a box for a letter that it lacks
        text = wrap(text, font, room, lines)
        draw.multiline_text((x, y), text, fill=fill, font=font, spacing=size * 0.3)

    def draw_row(y, part, ranked, shared):
        names = [name for name in gallery if name in part["rows"]]  # by row
        for column, row in enumerate(ranked):
            x = MARGIN + TEXT_WIDTH + column * step
            if row in shared:
                box = (x - 8, y - 8, x + THUMB + 7, y + THUMB + 7)
                draw.rounded_rectangle(box, 8, outline=FRAMES[shared.index(row)], width=5)
            picture = open_picture(gallery[names[row]])
            canvas.paste(ImageOps.fit(picture, (THUMB, THUMB)), (x, y))
            if row in part["correct"][index]:
                dot = (x + THUMB - 24, y + 4, x + THUMB - 4, y + 24)
                draw.ellipse(dot, fill="#e0a100", outline="white", width=3)

    for number, (model, part) in enumerate(shown):
        top = MARGIN + number * block
        write(MARGIN, top - 8, model, 20)
        ranked = [row[:columns] for row in part["ranked"][:, index].tolist()]
        shared = [row for row in ranked[0] if row in ranked[1]]
        for side, title, measure in ((0, "query", "ao"), (1, "paraphrase", "js")):
            y = top + 36 + side * step
            write(MARGIN, y, title, 13, "#888")
            write(MARGIN, y + 20, pair[title], 17, room=TEXT_WIDTH - 30, lines=4)
            draw_row(y, part, ranked[side], shared)
            x = width - MARGIN - SCORE_WIDTH + 12
            write(x, y + 36, f"{measure.upper()}@{k}", 14, "#888")
            write(x, y + 54, f"{100 * part[measure][index]:.0f}", 32)

    legend = "Frames of one colour: a picture in both rows. "
    if any(part["correct"][index] for _, part in shown):
        legend += "Dot: a right picture. "
    note = f"{rule} Gallery of {len(gallery)} pictures. {legend}"
    write(MARGIN, canvas.height - MARGIN - 60, note, 13, "#888", width - 2 * MARGIN, lines=4)
    with replacing(path) as file:
        canvas.save(file, "PNG")
