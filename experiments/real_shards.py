"""Shards that img2dataset itself has written, read by data.ShardIndex.

    pip install img2dataset
    python -m experiments.real_shards [OUT]

A server on this machine offers images of several formats, and what else a list of URLs has: dead
links, texts called .jpg, tiny images, images without a caption. img2dataset fetches them in several
settings. The samples of each are counted against its statistics and against what was served; every
image must be the one of its caption's URL. The first difference ends the run in an error. A new
folder OUT keeps what was served and what was written.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from PIL import Image

from common.cli import UserError, run
from data import BadSample, ShardIndex, decode_image

KINDS = ["RGB.jpg", "L.jpg", "CMYK.jpg", "RGB.png", "L.png", "RGBA.png", "RGB.webp", "RGBA.webp",
         "RGB.gif"]
# Thirteen of these and nine kinds, so that every kind meets every fault.
FAULTS = ["dead link", "no image", "tiny", "no caption"] + 9 * [""]
# The server's queue holds five requests, and other programs may make it slow.
COMMAND = """-m img2dataset.main --url_list list.jsonl --input_format jsonl --caption_col text
    --output_format webdataset --number_sample_per_shard 64 --thread_count 4 --timeout 600"""


class Source(NamedTuple):
    url: str
    text: str  # its caption, or ""
    captions: list[str]  # the same one and another, or none
    colour: tuple  # of the whole image, which tells it from others
    fault: str


class Setting(NamedTuple):
    flags: str  # of img2dataset
    left_out: list[str] = ["dead link", "no image"]  # the faults that it finds by itself
    caption_keys: list[str] = []  # of ShardIndex
    several: bool = False  # does it give all captions of an image?


SETTINGS = [
    Setting("--resize_mode keep_ratio"),
    Setting("--resize_mode border --encode_format png --encode_quality 6"),
    Setting("--resize_mode center_crop --encode_format webp --min_image_size 32",
            left_out=["dead link", "no image", "tiny"]),
    Setting("--resize_mode no --skip_reencode True"),
    Setting("--disable_all_reencoding True", left_out=["dead link"]),
    Setting("--caption_col captions", several=True),
    Setting('--save_additional_columns ["captions"]', caption_keys=["captions"], several=True)]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def write_sources(address: str) -> list[Source]:
    """Writes what is served, and the list of it, into the current folder."""
    sources = []
    for number in range(300):
        mode, extension = KINDS[number % len(KINDS)].split(".")
        fault = FAULTS[number % len(FAULTS)]
        size = (8, 9) if fault == "tiny" else (40 + number, 340 - number)
        colour = number % 7 * 40, number // 7 % 7 * 40, number // 49 * 40
        image = Image.new("RGB", size, colour).convert(mode)
        colour = image.convert("RGB").getpixel((0, 0))
        if mode == "RGBA":
            # Half transparent, on white.
            image.putalpha(128)
            colour = tuple((value + 255) / 2 for value in colour)
        file = Path(f"{number}.{extension}")
        if fault == "no image":
            file.write_text("This image has moved.")
        elif fault != "dead link":
            image.save(file)
        text = "" if fault == "no caption" else f"{number} \"dogs\", a cat's ball, 犬 🐶"
        captions = [text, "the other one"] if text else []
        sources.append(Source(f"{address}/{file}", text, captions, colour, fault))
    lines = [json.dumps(source._asdict()) for source in sources]
    Path("list.jsonl").write_text("\n".join(lines))
    return sources


def check(folder: str, sources: list[Source], setting: Setting) -> dict:
    """The counts of a setting's shards. Raises UserError if they hold anything but what was
    served."""
    fetched = [source for source in sources if source.fault not in setting.left_out]
    unseen = {source.text: source for source in fetched if source.text}
    expected = {"successes": len(fetched), "usable": len(unseen),
                "skipped": {"empty caption": len(fetched) - len(unseen)},
                "decoded": sum(source.fault != "no image" for source in unseen.values())}
    statistics = [json.loads(file.read_text()) for file in Path(folder).glob("*_stats.json")]
    index = ShardIndex(folder, caption_keys=setting.caption_keys)
    counts = {"successes": sum(shard["successes"] for shard in statistics),
              "usable": len(index), "skipped": index.skipped, "decoded": 0}
    for number in range(len(index)):
        captions = index.captions(number)
        source = unseen.pop(captions[0], None)
        if source is None or captions != (source.captions if setting.several else [source.text]):
            raise UserError(f"{folder}: sample {number} has captions that no URL has, or that an "
                            f"earlier sample had: {captions}")
        try:
            image = decode_image(index.image(number))  # (3, H, W)
        except BadSample:
            continue
        counts["decoded"] += 1
        centre = image[:, image.shape[1] // 2, image.shape[2] // 2].tolist()
        # JPEG and WEBP change a colour by less.
        if math.dist(centre, source.colour) > 10:
            raise UserError(f"{folder}: sample {number} has the colour {centre}: expected {source}")
    if counts != expected:
        raise UserError(f"{folder}: {counts}, expected {expected}")
    return counts


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", nargs="?", help="new folder, which is kept")
    out = parser.parse_args(argv).out
    try:
        version = importlib.metadata.version("img2dataset")
    except ImportError:
        raise UserError("the package img2dataset is missing: pip install img2dataset") from None
    if out:
        os.makedirs(out)
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(out or temporary):
        # Nothing is kept elsewhere, goes to a proxy, or looks for updates.
        os.environ.update(PARACLIP_CACHE="cache", no_proxy="127.0.0.1",
                          NO_ALBUMENTATIONS_UPDATE="1")
        server = ThreadingHTTPServer(("127.0.0.1", 0), QuietHandler)
        Thread(target=server.serve_forever, daemon=True).start()
        sources = write_sources(f"http://127.0.0.1:{server.server_port}")
        results = {}
        for number, setting in enumerate(SETTINGS):
            folder = f"shards{number}"
            words = [*COMMAND.split(), "--output_folder", folder, *setting.flags.split()]
            done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"img2dataset failed: {done.stderr.splitlines()[-1]}")
            results[setting.flags] = check(folder, sources, setting)
            print(setting.flags, results[setting.flags], sep="\t", flush=True)
    print(json.dumps({"img2dataset": version, "settings": results}))


if __name__ == "__main__":
    run(main)
