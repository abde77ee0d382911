"""AO and contrast beside LGIP's invariance error, on the same pairs and models.

    python -m experiments.invariance SPLIT MODEL...

SPLIT is a folder of shards with pairs.jsonl, such as shards/emoji/test. A MODEL is a run folder, or
FILE.npz with names (N,) and images (N, E), texts (T,) and text_features (T, E).

LGIP (arXiv 2511.13494) compares cosines themselves: its error is smaller for a model whose cosines
all lie close together, whatever that model ranks first. AO and contrast see ranks alone.
"""

import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from common.cli import UserError, flag, parse_config, run
from paraclip import load_model


def average_overlap(first, second) -> float:
    """AO@k of two lists of k."""
    depths = range(1, len(first) + 1)
    return float(np.mean([len({*first[:d]} & {*second[:d]}) / d for d in depths]))


def measure(pairs: list[dict], images: dict, texts: dict, k: int = 10) -> dict[str, float]:
    """ao and invariance_error of the pairs that keep the meaning, and contrast.

    images and texts: {name or text: vector (E,)}. ao in [0, 1]. invariance_error: the mean over
    pairs with an image of |cosine(image, query) - cosine(image, paraphrase)|, in [0, 2], less is
    better.
    """
    names = list(images)
    gallery = normalize(torch.from_numpy(np.stack(list(images.values()))).double(), dim=-1)
    kept, changed, errors = [], [], []
    for pair in pairs:
        sides = [texts[pair["query"]], texts[pair["paraphrase"]]]
        sides = normalize(torch.from_numpy(np.stack(sides)).double(), dim=-1)
        cosines = sides @ gallery.T  # (2, N)
        ranked = cosines.argsort(dim=1, descending=True, stable=True)[:, :k].tolist()
        same = pair.get("same", True)
        (kept if same else changed).append((pair, average_overlap(*ranked)))
        if same and "image" in pair:
            query, paraphrase = cosines[:, names.index(pair["image"])].tolist()
            errors.append(abs(query - paraphrase))

    if not errors:
        raise UserError("expected pairs with an image")
    results = {"ao": np.mean([ao for _, ao in kept]), "contrast": contrast(kept, changed),
               "invariance_error": np.mean(errors)}
    return {name: float(value) for name, value in results.items()}


def contrast(kept: list[tuple], changed: list[tuple]) -> float:
    """Of all (pair, score) that keep the meaning with all that change it and share a sentence with
    them, how often the first have the larger score, in [0, 1]; a tie is half."""
    changed_with = {}
    for i, (pair, _) in enumerate(changed):
        for text in (pair["query"], pair["paraphrase"]):
            changed_with.setdefault(text, set()).add(i)
    wins = []
    for pair, ao in kept:
        neighbours = (changed_with.get(pair[side], set()) for side in ("query", "paraphrase"))
        for i in set().union(*neighbours):
            difference = round(ao - changed[i][1], 9)
            wins.append((np.sign(difference) + 1) / 2)
    if not wins:
        raise UserError('expected pairs with "same": false, which share a sentence with a pair '
                        "without it")
    return float(np.mean(wins))


def words_in_common(pair: dict) -> float:
    """The Jaccard similarity of two texts' sets of words, in [0, 1]."""
    query, paraphrase = (set(re.findall(r"\w+", pair[side].lower()))
                         for side in ("query", "paraphrase"))
    return len(query & paraphrase) / max(1, len(query | paraphrase))


def read_vectors(path: str) -> tuple[dict, dict]:
    with np.load(path, allow_pickle=False) as file:
        return (dict(zip(file["names"].tolist(), file["images"])),
                dict(zip(file["texts"].tolist(), file["text_features"])))


@torch.inference_mode()
def encode(model, split: Path, texts: list[str], batch_size: int = 100) -> tuple[dict, dict]:
    """{image key: vector}, {text: vector}. model: an object with preprocess, encode_image and
    encode_text."""
    pictures, image_vectors, text_vectors = {}, {}, {}
    for shard in sorted(split.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    picture = Image.open(tar.extractfile(member)).convert("RGB")
                    pictures[member.name.removesuffix(".jpg")] = model.preprocess(picture)
    keys = list(pictures)
    for start in range(0, len(keys), batch_size):
        batch = keys[start:start + batch_size]
        features = model.encode_image(torch.stack([pictures[key] for key in batch]))
        image_vectors |= zip(batch, features.float().cpu().numpy())
    for start in range(0, len(texts), batch_size):
        batch = texts[start:start + batch_size]
        text_vectors |= zip(batch, model.encode_text(batch).float().cpu().numpy())
    return image_vectors, text_vectors


@dataclass
class InvarianceConfig:
    split: str = flag("", "folder of shards with pairs.jsonl", positional=True)
    models: list[str] = flag([], "run folders or FILE.npz", positional=True)


def main(argv=None):
    cfg = parse_config(InvarianceConfig, argv)
    split = Path(cfg.split)
    lines = (split / "pairs.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    texts = list(dict.fromkeys(pair[side] for pair in pairs for side in ("query", "paraphrase")))
    results = {}
    print("| | AO@10 | contrast | invariance error |\n|---|---|---|---|")
    for name in cfg.models:
        if name.endswith(".npz"):
            images, text_vectors = read_vectors(name)
        else:
            images, text_vectors = encode(load_model(name), split, texts)
        results[name] = measure(pairs, images, text_vectors)
        ao, of_opposites, error = results[name].values()
        print(f"| {name} | {100 * ao:.1f} | {100 * of_opposites:.1f} | {error:.3f} |", flush=True)
    # What needs no understanding: the share of words takes the place of AO.
    kept = [(pair, words_in_common(pair)) for pair in pairs if pair.get("same", True)]
    changed = [(pair, words_in_common(pair)) for pair in pairs if not pair.get("same", True)]
    ao, of_opposites = np.mean([score for _, score in kept]), contrast(kept, changed)
    print(f"| words in common, no model | {100 * ao:.1f} | {100 * of_opposites:.1f} | |")
    print(json.dumps(results))


if __name__ == "__main__":
    run(main)
