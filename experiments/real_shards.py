"""Shards that img2dataset itself has written, read by data.ShardIndex.

    pip install img2dataset
    python -m experiments.real_shards [OUT]

A server on this machine offers images of several formats, and what else a list of URLs has: dead
links, texts called .jpg, tiny images, images without a caption. img2dataset fetches them in several
settings. The samples of each are counted against its statistics and against what was served; every
image must decode, and have the captions of its URL. The first difference ends the run in an error.
What was served and written is kept if a new folder OUT is given.
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
# All settings but one: img2dataset decodes what it has fetched, and keeps tiny images.
LEFT_OUT = ["dead link", "no image"]


class Source(NamedTuple):
    url: str
    text: str  # its caption, or ""
    captions: list[str]  # the same one and another, or none
    colour: tuple  # of the whole image, by which it is known again
    fault: str


class Setting(NamedTuple):
    flags: dict  # of img2dataset
    left_out: list[str] = LEFT_OUT  # the faults of sources that img2dataset leaves out
    caption_keys: list[str] = []  # of ShardIndex
    captions: int = 1  # how many are expected of an image


SETTINGS = {
    "keep_ratio": Setting(dict(resize_mode="keep_ratio")),
    "border, png": Setting(dict(resize_mode="border", encode_format="png", encode_quality=6)),
    "center_crop, webp, min_image_size": Setting(
        dict(resize_mode="center_crop", encode_format="webp", min_image_size=32),
        left_out=[*LEFT_OUT, "tiny"]),
    "no, skip_reencode": Setting(dict(resize_mode="no", skip_reencode=True)),
    "disable_all_reencoding": Setting(dict(disable_all_reencoding=True), left_out=["dead link"]),
    "list of captions": Setting(dict(caption_col="captions"), captions=2),
    "--caption-key captions text": Setting(
        dict(caption_col=None, save_additional_columns=["captions", "text"]),
        caption_keys=["captions", "text"], captions=3),
}


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def write_sources(address: str) -> list[Source]:
    """Writes what is served, into the current folder."""
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


def download(folder: str, flags: dict):
    # The server's queue holds five requests, and other programs may make it slow.
    flags = dict(url_list="list.jsonl", input_format="jsonl", caption_col="text", timeout=600,
                 output_format="webdataset", output_folder=folder, thread_count=4,
                 number_sample_per_shard=64) | flags
    words = [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run([sys.executable, "-m", "img2dataset.main", *words],
                          capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"img2dataset failed: {done.stderr.splitlines()[-1]}")


def check(folder: str, sources: list[Source], setting: Setting) -> dict:
    """The counts of a setting's shards. Raises UserError if they hold anything but what was
    served."""
    fetched = [source for source in sources if source.fault not in setting.left_out]
    unseen = {source.text: source for source in fetched if source.text}
    expected = {"successes": len(fetched), "usable": len(unseen),
                "skipped": {"empty caption": len(fetched) - len(unseen)}}
    statistics = [json.loads(file.read_text()) for file in Path(folder).glob("*_stats.json")]
    index = ShardIndex(folder, caption_keys=setting.caption_keys)
    counts = {"successes": sum(shard["successes"] for shard in statistics),
              "usable": len(index), "skipped": index.skipped}
    if counts != expected:
        raise UserError(f"{folder}: {counts}, expected {expected}")

    for number in range(len(index)):
        captions = index.captions(number)
        source = unseen.pop(captions[0], None)
        if source is None or captions != [*source.captions, source.text][:setting.captions]:
            raise UserError(f"{folder}: the captions of sample {number} are {captions}: expected "
                            "those of one URL, and no other sample with the same")
        try:
            image = decode_image(index.image(number))  # (3, H, W)
            centre = image[:, image.shape[1] // 2, image.shape[2] // 2]
            # JPEG and WEBP change a colour by less.
            is_right = math.dist(centre.tolist(), source.colour) < 10
        except BadSample:
            is_right = source.fault == "no image"
        if not is_right:
            raise UserError(f"{folder}: sample {number} has not the image of {source}")
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
        for number, (name, setting) in enumerate(SETTINGS.items()):
            download(f"shards{number}", setting.flags)
            results[name] = check(f"shards{number}", sources, setting)
            print(f"{name}: {results[name]}", flush=True)
    print(json.dumps({"img2dataset": version, "settings": results}))


if __name__ == "__main__":
    run(main)
