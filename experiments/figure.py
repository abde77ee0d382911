"""The README's figure: what two models find for a query and for its paraphrase.

    python -m experiments.figure runs/ablation-emoji/scratch-0 runs/ablation-emoji/align-0 \\
        --labels "same architecture, from scratch" "frozen language model + alignment" \\
        --only "a bicycle" --figure assets/figure.png

Draws a gallery in which every query has six correct images: each emoji that has a synonym stands
alone in six scenes, with other sizes, places and backgrounds. Then it runs eval_paraphrase.py on
it, with the flags given. The figure shows the pair of median gain, or, with --only "a bicycle", the
pair of this query.
"""

import io
import json
import random
import sys
import tempfile
from pathlib import Path

import eval_paraphrase
from common.cli import run
from common.files import atomic_write
from demo.emoji_scenes import (caption_of, draw_glyphs, draw_scene, emoji_names, rephrase)

SCENES_PER_EMOJI = 6


def write_gallery(folder: Path, only: str = ""):
    """Writes images/*.png and pairs.jsonl: a query by name and one by synonym for each emoji, or
    for the emoji of the query `only`."""
    (folder / "images").mkdir(parents=True)
    rng = random.Random(0)
    emoji_list = emoji_names()
    glyphs = draw_glyphs([emoji.char for emoji in emoji_list])
    pairs = []
    for number, (emoji, glyph) in enumerate(zip(emoji_list, glyphs)):
        paraphrases = rephrase([emoji], "single", "{}", "{0}", rng)
        if "synonym" not in paraphrases:
            continue
        names = [f"{number:04d}-{scene}.png" for scene in range(SCENES_PER_EMOJI)]
        for name in names:
            image = draw_scene([glyph], "single", rng)
            png = io.BytesIO()
            image.save(png, "PNG")
            with atomic_write(folder / "images" / name) as file:
                file.write(png.getvalue())
        pairs.append({"query": caption_of("{}", "{0}", [emoji.name]),
                      "paraphrase": paraphrases["synonym"], "images": names, "kind": "synonym"})
    lines = [json.dumps(pair) + "\n" for pair in pairs if only in ("", pair["query"])]
    (folder / "pairs.jsonl").write_text("".join(lines))


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    only = ""
    if "--only" in argv:
        place = argv.index("--only")
        only = argv[place + 1]
        del argv[place:place + 2]
    with tempfile.TemporaryDirectory() as folder:
        write_gallery(Path(folder, "gallery"), only)
        eval_paraphrase.main([*argv, "--pairs", f"{folder}/gallery/pairs.jsonl",
                              "--images", f"{folder}/gallery/images"])


if __name__ == "__main__":
    run(main)
