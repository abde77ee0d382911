"""Rank similarity of a query and its paraphrase, plus retrieval, zero-shot and text-only metrics.

AO@k and JS@k of "Adapting Dual-encoder Vision-language Models for Paraphrased Retrieval"
(arXiv 2405.03190), for any model or search engine:

    python eval_paraphrase.py                       # runs/emoji-align on the emoji benchmark
    python eval_paraphrase.py MODEL... --pairs pairs.jsonl --images coco/val2017
    python eval_paraphrase.py MODEL --captions captions.json --images coco/val2017
    python eval_paraphrase.py MODEL --zeroshot imagenet:ROOT --sts sts-dev.csv
    python eval_paraphrase.py MODEL... --images DIR --query "a dog" --paraphrase "a hound"

MODEL is one of
    runs/NAME or FILE.pt    a run folder or checkpoint of paraclip.py
    NAME or FOLDER          a Hugging Face model with two towers
    FILE.py:NAME            a function or class of yours, called without arguments, that gives an
                            object with preprocess(RGB Pillow image) -> a tensor, or a dict of
                            tensors, of one shape; encode_image(batch of these) and
                            encode_text(list of str) -> (B, E). It chooses its own device
    FILE.npz                precomputed features: names, images, texts, text_features
    FILE.jsonl              ranked lists of any engine: {"text", "ranking"} a line
Prints a table; the last line is the same results as JSON. All formats: docs/formats.md.
"""

import signal

import common  # noqa: F401, it names missing packages

if __name__ == "__main__":
    # The imports take seconds. Until run() is called, Ctrl-C ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import copy
import functools
import importlib
import itertools
import json
import math
import os
import re
import sys
import tarfile
import textwrap
import traceback
import unicodedata
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import networkx
import numpy as np
import torch
import torchvision
import transformers
from PIL import Image
from torch.nn.functional import normalize
from torch.utils.data import default_collate
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from common.cli import UserError, expecting, flag, note, parse_config, run
from common.distributed import usable_cores
from common.files import atomic_write, data_folder
from common.records import (checked_text, checked_texts, fix_surrogates, read_captions, read_lines,
                            read_records, read_text)
from data import (FORMATS, IMAGE_TYPES, cut_long_side, decode_image, find_shards, make_loader,
                  read_range, scan_shard)
from paraclip import load_model


DEFAULT_MODEL = "runs/emoji-align"


@dataclass
class EvalConfig:
    models: list[str] = flag([], f"what to evaluate (default: {DEFAULT_MODEL})", positional=True)
    # What is measured, by default the benchmark.
    pairs: list[str] = flag([], "files with query, paraphrase and optionally image(s)")
    query: list[str] = flag([], "a query of your own, in place of --pairs")
    paraphrase: list[str] = flag([], "its paraphrase")
    captions: str = flag("", "captions of images, such as COCO's: recall in both directions")
    triplets: list[str] = flag([], "SugarCrepe++ files; with --images also their image part")
    sts: str = flag("", "a file with sentence1, sentence2, score")
    zeroshot: str = flag("", "a folder per class, cifar10:ROOT, cifar100:ROOT, imagenet:ROOT, or a "
                             "JSON file of classnames and labels of --images")
    benchmark: str = flag("", "a benchmark's name in $PARACLIP_DATA, or its absolute path "
                              "(default: emoji)")
    split: str = flag("test", "of the benchmark, and of --captions that name one: val is for "
                             "choosing, test for reports", choices=("test", "val"))
    # How it is measured.
    images: str = flag("", "what to search in: folder of images, or .tar shards: folder, file, "
                         "glob, {00..99}, cc12m")
    classnames: str = flag("", "class names, one per line, in the order of the sorted folders")
    templates: str = flag("", "prompts, one per line, with {} for the class name")
    k: int = flag(10, "length of the compared lists", low=1)
    seed: int = flag(0, "seed of the bootstrap and of the unrelated pairs", low=0)
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where the towers run")
    precision: str = flag("fp32", "number format of the towers", choices=("fp32", "bf16"))
    batch_size: int = flag(64, "images or texts at once", low=1)
    workers: int = flag(min(8, usable_cores()), "processes that decode images", low=0)
    # What is written.
    labels: list[str] = flag([], "names of the models in tables and figures")
    baseline: str = flag("", "the label that the others are compared with (default: the first)")
    json: str = flag("", "file for the JSON that ends the output")
    details: str = flag("", "JSON lines file: lists and scores of each pair and model")
    figure: str = flag("", "PNG of the images that three of the pairs find")
    report: str = flag("", "HTML page of all results, and of the images that the pairs find")
    report_pairs: int = flag(200, "pairs that the page shows", low=1)


def check_flags(cfg: EvalConfig):
    """Raises UserError for flags that contradict each other, and for outputs that cannot be
    written or would overwrite an input: now rather than after an hour of measuring."""
    if bool(cfg.query) != bool(cfg.paraphrase):
        raise UserError("--query and --paraphrase belong together")
    if cfg.query and cfg.pairs:
        raise UserError("give --query and --paraphrase, or --pairs, not both")
    try:
        torch.zeros(1, device=cfg.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {cfg.device}: {str(error).splitlines()[0]}") from None

    read = [cfg.captions, cfg.sts, cfg.zeroshot.rpartition(":")[2], cfg.classnames, cfg.templates,
            cfg.images, *cfg.pairs, *cfg.triplets]
    for name in cfg.models:
        # In a run folder only the checkpoint is read: measurements may be written beside it.
        checkpoint = Path(name, "model.pt")
        read.append(checkpoint if checkpoint.is_file() else re.sub(r"(\.py):\w+$", r"\1", name))
    taken = {Path(path).resolve() for path in read if path}
    for path, ending in ((cfg.json, ""), (cfg.details, ""), (cfg.figure, ".png"),
                         (cfg.report, ".html")):
        if not path:
            continue
        # Links are followed, as they would be when the file is written.
        target = Path(path).resolve()
        if target.exists() and not target.is_file() or not target.parent.is_dir():
            raise UserError(f"{path} cannot be written: it is no regular file, or its folder is "
                            "missing")
        if taken & {target, *target.parents}:
            raise UserError(f"{path} cannot be written: it is, or lies in, what another flag names")
        if not path.endswith(ending):
            raise UserError(f"{path}: expected a name that ends in {ending}")
        taken.add(target)


# ---- metrics -------------------------------------------------------------------------------------
# Q queries, N gallery images, E feature size, k list length. Most metrics return one value per
# query or comparison; the number to report is their mean, with the interval of bootstrap_ci.
def average_overlap(a, b, k: int | None = None) -> np.ndarray:
    """AO@k of ranked lists: the overlap of their first d items, averaged over all depths d.

    AO@k = (1/k) sum over d = 1..k of |a[:d] and b[:d]| / d, in [0, 1]: early ranks weigh most.
    a, b: (..., K) items, best first, none twice, K >= k; k defaults to K. rankings() has broken
    ties. Returns (...) float64; ValueError if a list is too short.
    Example: [1, 2, 3, 4] and [2, 1, 3, 5] overlap by 0/1, 2/2, 3/3, 3/4, so AO@4 = 0.6875.
    """
    shared = count_shared(a, b, k)
    depths = np.arange(1, shared.shape[-1] + 1)
    return (shared / depths).mean(-1)


def jaccard(a, b, k: int | None = None) -> np.ndarray:
    """JS@k of lists as above: |a[:k] and b[:k]| / |a[:k] or b[:k]|, in [0, 1]; order is ignored.

    Example: [1, 2, 3, 4] and [2, 1, 3, 5] share 3 of 5 items, so JS@4 = 0.6.
    """
    shared = count_shared(a, b, k)
    k = shared.shape[-1]
    return shared[..., -1] / (2 * k - shared[..., -1])


def count_shared(a, b, k: int | None) -> np.ndarray:
    """(..., k): how many items a[:d] and b[:d] share, for the depths d = 1..k."""
    a, b = np.asarray(a), np.asarray(b)
    if k is None:
        k = a.shape[-1]
    if not 1 <= k <= min(a.shape[-1], b.shape[-1]):
        raise ValueError(f"lists of {a.shape[-1]} and {b.shape[-1]} items, but k = {k}")
    new = []
    for i in range(k):
        # Going one item deeper adds a match if a[i] is among b's first i + 1 items, and another if
        # b[i] is among a's first i. Comparing all k x k items at once would be shorter, and take k
        # times the memory.
        a_in_b = (b[..., :i + 1] == a[..., i:i + 1]).sum(-1)
        b_in_a = (a[..., :i] == b[..., i:i + 1]).sum(-1)
        new.append(a_in_b + b_in_a)
    return np.stack(new, axis=-1).cumsum(-1)


def contrast(kept, changed) -> np.ndarray:
    """Contrast of AO@k: whether a pair that keeps the meaning agrees more than one that changes it.

    kept, changed: (C,) AO@k of the two pairs of each comparison, see comparisons(). 1 where kept is
    larger, 0 where changed is, 1/2 for a tie: the mean, in [0, 1], is 0.5 for a model that returns
    the same images for everything. Returns (C,) float64.
    Example: kept [0.8, 0.4, 0.1], changed [0.5, 0.4, 0.3] give [1, 0.5, 0].
    """
    # Rounded, since sums of the same fractions in another order differ in their last bits.
    difference = np.round(np.asarray(kept) - np.asarray(changed), 9)
    return (np.sign(difference) + 1) / 2


# Similarities are rounded to multiples of this, the spacing of fp32 just below 1.
STEP = 2.0**-24


def round_to_step(x: torch.Tensor) -> torch.Tensor:
    """x, rounded to multiples of STEP in place."""
    return x.div_(STEP).round_().mul_(STEP)


def unit_features(features) -> torch.Tensor:
    """Features (N, E), L2-normalised and rounded to multiples of STEP, which fp32 holds exactly.

    Products of such numbers are multiples of 2^-48, and sums of them up to 1 fit into fp64's 53
    bits. So fp64 dot products are exact: images with equal features tie, wherever they stand.
    """
    features = torch.as_tensor(features, device="cpu")
    # A model's own code may have changed torch's default dtype or device.
    units = torch.empty(features.shape, dtype=torch.float32, device="cpu")
    # In parts: fp64 all at once would take several times the memory of the features.
    for part, unit in zip(features.split(4096), units.split(4096)):
        unit.copy_(round_to_step(normalize(part.double(), dim=-1)))
    return units


def rankings(query_features, gallery_features, k: int, scores_at_once: int = 2**26) -> torch.Tensor:
    """The k most similar gallery images of every query, best first.

    Cosine similarity in fp64, rounded to STEP; ties go to the lower gallery index.
    query_features (Q, E), gallery_features (N, E). Returns (Q, min(k, N)) indices, int64.
    Example: query (1, 0) and gallery (0, 1), (1, 0), (2, 0) with k = 2 give [1, 2].
    """
    queries, gallery = unit_features(query_features), unit_features(gallery_features)
    # Lower settings would let fp32 products be computed in TF32 or bf16.
    torch.set_float32_matmul_precision("highest")
    parts = queries.split(max(1, scores_at_once // len(gallery)))
    return torch.cat([rank_by_candidates(part, gallery, min(k, len(gallery))) for part in parts])


def rank_by_candidates(queries, gallery, k: int) -> torch.Tensor:
    """rankings() of unit features: fp32 finds candidates, fp64 ranks them."""
    n, width = gallery.shape
    # Some more than k, so that the k-th is clearly above what is left out.
    count, group_size = k + 22, 64
    # A small gallery gains nothing.
    if n < 2 * group_size * count:
        return rank_exactly(queries, gallery, k)
    scores = queries @ gallery.T  # (Q, N)
    stride = n // group_size
    # Image i is in group i % stride, or in the remainder. Only the remainder and the `count` groups
    # with the highest maxima can hold the best `count` images.
    maxima = scores[:, :group_size * stride].view(len(queries), group_size, stride).amax(1)
    best_groups = maxima.topk(count).indices
    places = stride * torch.arange(group_size, device="cpu")
    members = (best_groups[:, None] + places[:, None]).flatten(1)
    remainder = torch.arange(group_size * stride, n, device="cpu").expand(len(queries), -1)
    members = torch.cat([members, remainder], dim=1)
    best = scores.gather(1, members).topk(count)
    # In the gallery's order, which a stable sort keeps among equals.
    candidates = members.gather(1, best.indices).sort(dim=1).values  # (Q, count)
    # In parts, since the candidates' features take far more memory than the scores.
    exact = torch.cat([(gallery[rows].double() @ part.double()[..., None])[..., 0]
                       for rows, part in zip(candidates.split(512), queries.split(512))])
    exact = round_to_step(exact).sort(dim=1, descending=True, stable=True)
    ranked = candidates.gather(1, exact.indices[:, :k])
    # A product of unit vectors in fp32 is off by at most E x 2^-24. Where an image that is no
    # candidate could therefore be among the first k, all are ranked in fp64.
    unsure = exact.values[:, k - 1] <= best.values[:, -1] + (width + 1) * STEP
    if unsure.any():
        ranked[unsure] = rank_exactly(queries[unsure], gallery, k)
    return ranked


def rank_exactly(queries, gallery, k: int) -> torch.Tensor:
    """rankings() of unit features, in fp64."""
    n = len(gallery)
    # torch.topk promises no order among equal values, and a stable sort of the whole gallery takes
    # far longer. So ties are broken by a penalty that grows with the index, and that is smaller
    # than STEP, the smallest difference of two similarities.
    penalty = torch.arange(n, dtype=torch.float64, device="cpu") * (STEP / n)
    ranked = []
    for part in queries.double().split(max(1, 2**24 // n)):
        scores = torch.cat([part @ images.double().T for images in gallery.split(4096)], dim=1)
        ranked.append((round_to_step(scores) - penalty).topk(k).indices)
    return torch.cat(ranked)


def similarity(a, b) -> np.ndarray:
    """Cosine of two feature matrices (N, E), row by row, in [-1, 1], rounded to STEP: (N,) float64.

    Rounded once, after the product, so that equal features have exactly 1.
    """
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    cosine = (normalize(a, dim=-1) * normalize(b, dim=-1)).sum(-1)
    return round_to_step(cosine).numpy()


def recall_at_k(ranked, correct, k: int) -> np.ndarray:
    """Recall@k in CLIP's convention: 1 if any correct item is among the first k, else 0; NaN for a
    query without correct items.

    ranked: (Q, K) indices, best first; correct: for each query the indices of its correct items.
    Returns (Q,) float64.
    Example: ranked [[3, 1], [0, 2]], correct [{1}, {1, 2}]: recall@1 = [0, 0], recall@2 = [1, 1].
    """
    first = np.asarray(ranked)[:, :k].tolist()
    return np.array([float(not set(items).isdisjoint(right)) if right else math.nan
                     for items, right in zip(first, correct, strict=True)])


def spearman(a, b) -> float:
    """Spearman's rank correlation of two sequences, in [-1, 1]; equal values share a mean rank.

    NaN if all values of one sequence are equal. Example: [1, 2, 2] and [4, 5, 6] give 0.866.
    """
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        last_rank = np.cumsum(counts)
        ranks.append((last_rank - (counts - 1) / 2)[inverse])
    return float(np.corrcoef(ranks)[0, 1])


def bootstrap_ci(values, groups=None, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval (Efron 1979) of the mean of values (N,), one per query.

    Each of 2000 resamples draws, with replacement, as many groups as there are, each with all its
    values (the cluster bootstrap of Davison and Hinkley 1997, 3.8), since queries of
    one group, such as several of one image, are not independent. groups (N,): the group of each
    value; without it each value is a group of its own. Applied to the differences of two models on
    the same queries, this is the paired bootstrap. Example: [0, 1] gives (0, 1).
    """
    values = np.asarray(values, dtype=float)
    # Without this, rounding could put the mean of equal values just outside of its interval.
    if np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    if groups is None:
        groups = np.arange(len(values))
    _, group = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(group, weights=values), np.bincount(group)
    rng = np.random.default_rng(seed)
    means = []
    # 20 resamples at a time: 2000 x 25,000 captions at once would take 400 MB.
    for _ in range(100):
        drawn = rng.integers(len(sums), size=(20, len(sums)))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


# ---- models --------------------------------------------------------------------------------------
class HuggingFaceCLIP(torch.nn.Module):
    """Any model of transformers that has a vector for an image and one for a text: CLIP, SigLIP,
    ALIGN, BLIP and others. docs/models.md lists what was tried."""

    def __init__(self, name: str, precision: str):
        super().__init__()
        self.bf16 = precision == "bf16"
        # If trust_remote_code were unset, transformers would ask whether to run foreign code.
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        model_class, options = transformers.AutoModel, {}
        is_blip_retrieval = "BlipForImageTextRetrieval" in (config.architectures or [])
        if is_blip_retrieval:
            model_class = transformers.BlipForImageTextRetrieval
        if config.model_type == "aimv2":
            # Its default implementation of attention loses the causal mask (transformers 5.24).
            options["attn_implementation"] = "eager"
        self.model, loading = model_class.from_pretrained(
            name, output_loading_info=True, trust_remote_code=False, **options)
        # transformers only warns of missing weights, and fills them with random numbers.
        missing = set(loading["missing_keys"]) - {"logit_scale", "logit_bias"}
        if missing:
            raise ValueError(f"weights are missing, such as {min(missing)}")
        # Some checkpoints are stored in fp16.
        self.model.float()
        if is_blip_retrieval:
            self.image_tower, self.text_tower = self.blip_image, self.blip_text
        else:
            self.image_tower = self.model.get_image_features
            self.text_tower = self.model.get_text_features

        processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
        # Unlike a bound method, a partial reaches loader workers without the model.
        self.preprocess = functools.partial(processor.image_processor, return_tensors="pt")
        self.tokenizer = processor.tokenizer
        text_config = getattr(config, "text_config", config)
        if max(self.tokenizer.get_vocab().values()) >= getattr(text_config, "vocab_size", math.inf):
            raise ValueError("its tokenizer has ids beyond its text tower's vocabulary of "
                             f"{text_config.vocab_size}")
        positions = getattr(text_config, "max_position_embeddings", math.inf)
        for module_name, module in self.model.named_modules():
            # RoBERTa and its kind count positions from padding_idx + 1. padding_idx may be 0, which
            # is not the same as None.
            padding = getattr(module, "padding_idx", None)
            if module_name.endswith("position_embeddings") and padding is not None:
                positions = module.num_embeddings - padding - 1
        self.max_length = min(self.tokenizer.model_max_length, positions)
        self.is_siglip = text_config.model_type.startswith("siglip")

    def blip_image(self, **inputs):
        return self.model.vision_proj(self.model.vision_model(**inputs).last_hidden_state[:, 0])

    def blip_text(self, **inputs):
        return self.model.text_proj(self.model.text_encoder(**inputs).last_hidden_state[:, 0])

    def encode_image(self, batch):
        # Each image was preprocessed as a batch of one: (B, 1, 3, H, W).
        inputs = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
        return self.features(self.image_tower, inputs)

    def encode_text(self, texts):
        padding = {"padding": True, "return_attention_mask": True}
        if self.is_siglip:
            # SigLIP (arXiv 2303.15343) was trained on texts padded to full length, unmasked, and
            # SigLIP 2 (arXiv 2502.14786) on lower case; transformers does neither by default.
            texts = [text.lower() for text in texts]
            padding = {"padding": "max_length", "return_attention_mask": False}
        # Some checkpoints' files say that padding is on the left. A text's features would then
        # depend on its neighbours in the batch.
        self.tokenizer.padding_side = "right"
        tokens = self.tokenizer(texts, truncation=True, max_length=self.max_length,
                                return_tensors="pt", **padding)
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
        return self.features(self.text_tower, inputs)

    def count_tokens(self, texts):
        return [len(ids) for ids in self.tokenizer(texts)["input_ids"]]

    def features(self, tower, inputs):
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        with torch.autocast(self.model.device.type, torch.bfloat16, self.bf16):
            output = tower(**inputs)
        # BLIP's towers above return the features themselves, others an object that holds them.
        features = getattr(output, "pooler_output", output)
        if not isinstance(features, torch.Tensor):
            raise ValueError(f"{type(self.model).__name__} has no single vector for each input")
        if features.ndim == 3:
            # FLAVA has a state for each token, and was trained on the first.
            features = features[:, 0]
        return normalize(features.float(), dim=-1)


class Vectors:
    """Precomputed features in place of a model: FILE.npz.

    names (N,) and images (N, E): image names and features; texts (T,) and text_features (T, E).
    """

    def __init__(self, path: str):
        self.path = path
        with expecting(path, "arrays names (N,) and texts (T,) of str, images (N, E) and "
                             "text_features (T, E) of float"):
            # Pickles would run whatever code they hold.
            with np.load(path, allow_pickle=False) as file:
                names, texts = file["names"], file["texts"]
                images, text_features = file["images"], file["text_features"]
            for keys, features in ((names, images), (texts, text_features)):
                if (keys.dtype.kind, features.dtype.kind) != ("U", "f") or not len(keys):
                    raise ValueError(f"there are {keys.dtype} and {features.dtype}")
                if keys.ndim != 1 or features.shape != (len(keys), images.shape[1]):
                    raise ValueError(f"the shapes are {keys.shape} and {features.shape}")
            self.images = features_by_key(names, images)
            exact = features_by_key(texts, text_features)
            # Pairs are read without white space around their texts.
            self.texts = {text.strip(): row for text, row in exact.items()} | exact

    def encode_text(self, texts):
        return np.stack(look_up(self.path, self.texts, texts, "vectors", "texts"))

    def encode_gallery(self, gallery) -> tuple[list[str], np.ndarray]:
        """(names, features) of the images. Those that cannot be read may lack a vector and are
        skipped. Raises UserError if another one lacks it."""
        # Exact names win: 1.jpg must not take the place of sub/1.jpg. Vectors of other images, all
        # of them under None here, are not used.
        known = {gallery.find(name): features for name, features in self.images.items()}
        known |= self.images
        failed = []
        for name, read in gallery.images.items():
            if name not in known:
                # Opened only to see whether it can be.
                _, _, faults = collate_images([(name, read)], lambda image: 0)
                # It can be, so its vector is missing, and look_up() says so.
                if not faults:
                    break
                failed += faults
        note_skipped(gallery, failed)
        unreadable = dict(failed)
        names = [name for name in gallery.names if name not in unreadable]
        return names, np.stack(look_up(self.path, known, names, "vectors", "images"))


def look_up(path: str, found: dict, keys: list[str], kind: str, what: str) -> list:
    """found[key] of all keys. Raises UserError if one is missing: it must not count as a search
    that failed, since the file would then be measured on less than the models."""
    missing = [key for key in keys if key not in found]
    if missing:
        raise UserError(f"{path}: no {kind} for {len(missing)} of {len(keys)} {what}, such as "
                        f"{missing[0]!r}")
    return [found[key] for key in keys]


def features_by_key(keys, features) -> dict[str, np.ndarray]:
    found = {}
    for key, row in zip(keys.tolist(), features.astype(np.float32)):
        if not np.array_equal(found.setdefault(key, row), row):
            raise ValueError(f"{key!r} has two different vectors")
    return found


class RankedLists:
    """The lists that a search engine returns, in place of a model: FILE.jsonl, see read_lists."""

    def __init__(self, path: str):
        self.path, self.lists = path, read_lists(path)

    def search(self, texts: list[str], images, k: int, depth: int) -> np.ndarray:
        """(Q, K) rows of images; K is the length of the shortest list, or depth if that is less.

        Raises UserError if K < k, or if a list does not fit the texts and the gallery.
        """
        lists = look_up(self.path, self.lists, texts, "list", "texts")
        length = min(depth, *map(len, lists))
        ranked = []
        for text, names in zip(texts, lists):
            if len(names) < k:
                raise UserError(f"{self.path}: expected at least {k} images in every list, but "
                                f"that of {text!r} has {len(names)}")
            rows = [images.row(name) for name in names[:length]]
            if None in rows or len(set(rows)) < length:
                raise UserError(f"{self.path}: expected images of the gallery, none of them twice, "
                                f"in the list of {text!r}: {names[:length]}")
            ranked.append(rows)
        return np.array(ranked)


# {file in a folder that transformers cannot load: advice}
HINTS = {"modules.json": "experiments/sentence_transformer_model.py reads this folder",
         "open_clip_config.json": "experiments/open_clip_model.py reads this folder",
         "spiece.model": "its tokenizer needs the package sentencepiece"}


# How far rounding may move a unit vector when its batch changes.
TOLERANCES = {"fp32": 1e-3, "bf16": 2e-2}


def open_model(name: str, cfg: EvalConfig, with_images: bool = True):
    """The model, vectors or lists that a command-line argument names.

    with_images: whether images will be encoded, too. Raises UserError.
    """
    path, _, function = name.rpartition(":")
    if name.endswith(".jsonl"):
        return RankedLists(name)
    if name.endswith(".npz"):
        return Vectors(name)
    if path.endswith(".py"):
        module = import_file(Path(path))
        if not callable(getattr(module, function, None)):
            raise UserError(f"{path} has no function or class {function!r}")
        model = getattr(module, function)()
        # It chooses its own precision, so the wider tolerance.
        check_model(name, model, with_images, TOLERANCES["bf16"])
        return model
    # torch.save writes zip files.
    if zipfile.is_zipfile(name) or Path(name, "model.pt").is_file():
        model = load_model(name, cfg.device, cfg.precision)
        check_model(name, model, with_images, TOLERANCES[cfg.precision])
        return model
    # Otherwise it prints pages of warnings.
    transformers.utils.logging.set_verbosity_error()
    hint = "".join(f"; {advice}" for file, advice in HINTS.items() if Path(name, file).exists())
    with expecting(name, "a checkpoint, a run folder, FILE.npz, FILE.jsonl, a Hugging Face model "
                         "that has a vector for an image and one for a text, or FILE.py:NAME for "
                         f"any other model{hint}"):
        model = HuggingFaceCLIP(name, cfg.precision).to(cfg.device).eval()
        check_model(name, model, with_images, TOLERANCES[cfg.precision])
    return model


def folder_of(name: str) -> Path | None:
    """The folder of a model FILE.py:NAME; None for every other model."""
    file = name.rpartition(":")[0]
    return Path(file).resolve().parent if file.endswith(".py") else None


@contextlib.contextmanager
def own_modules(folder: Path):
    """Afterwards forgets what models of this folder imported from it: helpers of the next models
    may have the same names."""
    path, modules = sys.path[:], set(sys.modules)
    try:
        yield
    finally:
        # FILE.py may have put its folder, or one inside, on sys.path itself. Installed packages
        # stay, even if the environment lies in the folder.
        added = {entry: Path(entry).resolve() for entry in set(sys.path) - set(path)
                 if Path(entry).resolve().is_relative_to(folder) and "site-packages" not in entry}
        sys.path[:] = [entry for entry in sys.path if entry not in added]
        imported = set(sys.modules) - modules
        packages = {module.partition(".")[0] for module in imported}
        own = {package for package in packages if origin(package) in added.values()}
        for module in imported:
            if module.partition(".")[0] in own:
                del sys.modules[module]


def origin(package: str) -> Path | None:
    """The folder that a package or single module was imported from."""
    module = sys.modules.get(package)
    places = [*getattr(module, "__path__", []), getattr(module, "__file__", None)]
    return Path(places[0]).resolve().parent if places[0] else None


def import_file(path: Path):
    """The module in this file."""
    if not path.is_file() or "." in path.stem:
        raise UserError(f"{path}: no such file, or a name with two dots, which no module has")
    # By its name: a spawned loader worker inherits sys.path, and imports it again to unpickle
    # preprocess().
    sys.path.append(str(path.resolve().parent))
    module = importlib.import_module(path.stem)
    if Path(getattr(module, "__file__", None) or "").resolve() != path.resolve():
        raise UserError(f"{path}: another module has its name: give the file another one")
    return module


@torch.inference_mode()
def check_model(name: str, model, with_images: bool, tolerance: float):
    """Encodes two images and three texts, alone and beside each other. Raises UserError if methods
    are missing, or if features have no common shape or depend on what is encoded beside them."""
    needed = ["encode_text", "preprocess", "encode_image"] if with_images else ["encode_text"]
    for method in needed:
        if not callable(getattr(model, method, None)):
            raise UserError(f"{name}: the model has no {method}(); expected preprocess(image), "
                            "encode_image(batch), encode_text(list of str)")
    # Features that move with padding do so in a batch with a longer text.
    texts = ["a dog", "a cat", "a red car on the left of a dog"]
    # A list of its own in every call, since a model may write its prompts into it.
    text_features = encode(model.encode_text, texts[:], len(texts), name)
    if torch.equal(text_features[0], text_features[1]):
        raise UserError(f"{name}: it gives 'a dog' and 'a cat' the same features: is its tokenizer "
                        "missing?")
    # Beside a longer text, and beside one of the same length.
    compared = [("text", text_features[0], encode(model.encode_text, texts[:1], 1, name)),
                ("text", text_features[0], encode(model.encode_text, texts[:2], 2, name))]
    if with_images:
        # Two sizes, since a preprocess() that crops nothing fits images of one size only. Noise,
        # since a random crop of one colour would be that colour. One is darker, so that the mean
        # of the batch is not that of either.
        pixels = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
        wide, tall = Image.fromarray(pixels[:48]), Image.fromarray(pixels[8:, 24:] // 4)
        # A copy, since a model may fill one buffer again and again.
        images = [copy.deepcopy(model.preprocess(image)) for image in (wide, tall, wide)]
        with expecting(name, "preprocess(image) to return a tensor, or a dict of tensors, of the "
                             "same shape for every image"):
            batches = default_collate(images[:2]), default_collate(images[2:])
        both, alone = [encode(model.encode_image, batch, size, name)
                       for batch, size in zip(batches, (2, 1))]
        if both.shape[1] != text_features.shape[1]:
            raise UserError(f"{name}: image features have {both.shape[1]} numbers, text "
                            f"features {text_features.shape[1]}: expected the same number")
        if torch.equal(both[0], both[1]):
            raise UserError(f"{name}: it gives two different images the same features")
        compared.append(("image", both[0], alone))
    for what, together, apart in compared:
        moved = (normalize(together[None], dim=-1) - normalize(apart[:1], dim=-1)).norm().item()
        if moved > tolerance:
            raise UserError(
                f"{name}: the unit vector of the same {what} moves by {moved:.2g} with what is "
                "encoded beside it, or with each call. Call .eval() on the model, let preprocess() "
                "draw nothing at random, pad texts on the right or to full length as in its "
                "training, and pass the attention_mask")


@torch.inference_mode()
def encode(encoder, batch, size: int, name: str = "the model") -> torch.Tensor:
    """Features (size, E) of a batch of this size, on the CPU, where rankings are made.

    name: the model's, for errors.
    """
    features = encoder(batch)
    with expecting(name, "encode_image and encode_text to return a vector of finite numbers, not "
                         "all of them 0, for each input, as a tensor, array or list (B, E)"):
        features = torch.as_tensor(features)
        if features.is_complex():
            raise ValueError("they are complex")
        # A copy, since an encoder may fill one buffer again and again.
        features = features.to("cpu", torch.float32, copy=True)
        # NaN, or a vector without length, would raise no error: it would rank somehow and give
        # plausible numbers.
        if features.ndim != 2 or len(features) != size or not features.isfinite().all() \
                or not (features.norm(dim=-1) > 1e-12).all():
            raise ValueError(f"for {size} inputs, the shape is {list(features.shape)}")
    return features


def embed_texts(model, texts: list[str], cfg: EvalConfig) -> torch.Tensor:
    """Features (len(texts), E). Equal texts are encoded once and get the same feature."""
    # Texts of similar length together need little padding.
    unique = sorted(set(texts))
    lengths = model.count_tokens(unique) if hasattr(model, "count_tokens") else map(len, unique)
    unique = [text for _, text in sorted(zip(lengths, unique))]
    features = []
    starts = range(0, len(unique), cfg.batch_size)
    for start in tqdm(starts, "texts", leave=False, disable=None):
        batch = unique[start:start + cfg.batch_size]
        features.append(encode(model.encode_text, batch, len(batch)))
    row = {text: i for i, text in enumerate(unique)}
    return torch.cat(features)[[row[text] for text in texts]]


# ---- galleries: the images of an evaluation ------------------------------------------------------
class Gallery:
    """The images that are searched, in an order that also breaks ties between equally similar ones.

    images: {name: function without arguments that returns an image file's bytes, or pixels as a
    uint8 array (H, W, 3)}. A name is a path below `folder`, or the key in a shard.
    """

    def __init__(self, images: dict, folder: str = ""):
        self.images, self.names, self.folder = images, list(images), Path(folder).resolve().name
        # An image in a subfolder goes by its file name, too, unless two images share that.
        file_names = {name: plain(Path(name).name) for name in images}
        uses = Counter(file_names.values())
        self.known = {file_names[name]: name for name in images if uses[file_names[name]] == 1}
        self.known |= {plain(name): name for name in images}

    def find(self, name: str) -> str | None:
        """The gallery's own name of an image; None if none, or more than one, has the name."""
        if name in self.images:
            return name
        # COCO's and others' files name the folder as well.
        return self.known.get(plain(name)) or self.known.get(
            plain(name).removeprefix(f"{self.folder}/"))

    def only(self, names) -> "Gallery":
        wanted = {self.find(name) for name in names}
        part = Gallery({name: read for name, read in self.images.items() if name in wanted})
        # A name that several images share stays ambiguous when one of them is left.
        part.known, part.folder = self.known, self.folder
        return part


def plain(name: str) -> str:
    """One form of names: file systems compose letters and accents differently."""
    return unicodedata.normalize("NFC", name)


# What cameras, phones and scanners write besides.
GALLERY_TYPES = (*IMAGE_TYPES, "heic", "heif", "jfif", "tif", "tiff")
GALLERY_FORMATS = (*FORMATS, "TIFF")
with contextlib.suppress(ImportError):
    # A plugin of Pillow, which reads phones' images.
    import pillow_heif
    pillow_heif.register_heif_opener()
    GALLERY_FORMATS += ("HEIF",)


def list_gallery(source: str) -> Gallery:
    """The gallery of a folder: the images in its .tar shards by key, in storage order; or else
    every image file below it that is not hidden, named and sorted by its path in the folder.

    source: the folder, or shards as for --data of paraclip.py. Raises UserError if it has no image.
    """
    folder = Path(source)
    if folder.is_dir():
        shards = sorted(folder.glob("*.tar"))
    elif re.search(r"[*?{]|\.tar|^cc12m$", source):
        shards = find_shards(source)
    else:
        raise UserError(f"{source}: there is no such folder")
    from_shards, skipped = {}, Counter()
    for shard in shards:
        members, shard_skipped, _ = scan_shard(shard)
        skipped += shard_skipped
        for key, extension, offset, size in members:
            if extension not in IMAGE_TYPES:
                continue
            if key in from_shards:
                skipped["duplicate key"] += 1
            else:
                from_shards[key] = functools.partial(read_range, str(shard), offset, size)
    if skipped:
        note(f"{source}: left out of the gallery: {dict(skipped)}")

    files, visited = {}, set()
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        # Through links a folder may hold itself.
        if os.path.realpath(parent) in visited:
            subfolders.clear()
            continue
        visited.add(os.path.realpath(parent))
        subfolders[:] = [name for name in sorted(subfolders) if not name.startswith(".")]
        for name in names:
            extension = name.rpartition(".")[2].lower()
            if not name.startswith(".") and extension in GALLERY_TYPES:
                path = Path(parent, name)
                files[path.relative_to(folder).as_posix()] = path.read_bytes

    if from_shards and files:
        raise UserError(f"{folder} holds {len(from_shards)} images in .tar shards and {len(files)} "
                        "image files beside them: give a folder with one or the other")
    if not from_shards and not files:
        raise UserError(f"{folder}: no image in it or below, and no shard in it")
    return Gallery(from_shards or dict(sorted(files.items())), source)


def open_image(read) -> Image.Image:
    """The RGB Pillow image of a gallery's item. Raises BadSample or OSError."""
    content = read()
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    return cut_long_side(to_pil_image(decode_image(content, GALLERY_FORMATS)))


# preprocess() may have weights, and a tensor with a gradient's history cannot be copied.
@torch.no_grad()
def collate_images(items: list, preprocess):
    """(names, batch of preprocess(image), or None if all failed, [(name, reason it failed)]).

    items: [(name, function that reads it)].
    """
    names, images, failed = [], [], []
    for name, read in items:
        try:
            image = preprocess(open_image(read))
            # It raises an error if the image's shape differs from the first's.
            default_collate([*images[:1], image])
        # One image, whatever it or a model's preprocessing raises, never ends an evaluation.
        except Exception as error:
            failed.append((name, str(error).partition("\n")[0] or type(error).__name__))
        else:
            names.append(name)
            # A copy, since a model may fill one buffer again and again.
            images.append(copy.deepcopy(image))
    return names, default_collate(images) if images else None, failed


@dataclass
class EncodedGallery:
    """The images of a gallery that a model can read, in the gallery's order."""
    gallery: Gallery
    names: list[str]
    features: torch.Tensor | None  # (N, E); None for ranked lists

    def __post_init__(self):
        self.rows = {name: row for row, name in enumerate(self.names)}

    def row(self, name: str) -> int | None:
        return self.rows.get(self.gallery.find(name))


def embed_images(model, gallery: Gallery, cfg: EvalConfig) -> EncodedGallery:
    if isinstance(model, RankedLists):
        return EncodedGallery(gallery, gallery.names, None)
    if isinstance(model, Vectors):
        names, features = model.encode_gallery(gallery)
        # Nothing is encoded here, but the features are checked as a model's are.
        features = encode(lambda batch: batch, features, len(names), model.path)
        return EncodedGallery(gallery, names, features)
    readable, features, skipped = [], [], []
    loader = make_loader(
        list(gallery.images.items()), cfg.workers, batch_size=cfg.batch_size,
        collate_fn=functools.partial(collate_images, preprocess=model.preprocess))
    for batch_names, batch, failed in tqdm(loader, "images", leave=False, disable=None):
        readable += batch_names
        skipped += failed
        if batch_names:
            features.append(encode(model.encode_image, batch, len(batch_names)))
    note_skipped(gallery, skipped)
    if not readable:
        raise UserError(f"none of the {len(gallery.names)} images can be read")
    return EncodedGallery(gallery, readable, torch.cat(features))


def note_skipped(gallery: Gallery, failed: list[tuple[str, str]]):
    """Says which images are skipped. failed: [(name, reason)]."""
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed[:20])
        note(f"skipped {len(failed)} of {len(gallery.names)} images: {reasons}")


# ---- readers of evaluation files -----------------------------------------------------------------
# What read_records() takes of each kind of file, JSON or a table: {field: the names that files have
# for it}. Inside of expecting(), any error becomes a UserError that says what was expected.
PAIR_FIELDS = {"query": ["query", "caption"], "paraphrase": ["paraphrase", "caption2"],
               "images": ["images", "image", "filename", "file_name"], "kind": ["kind"],
               "negative": ["negative_caption"], "same": ["same"], "group": ["group"]}
# The last six, which --details also writes, are not used: named so that no note is printed of them.
LIST_FIELDS = {name: [name] for name in (
    "text", "ranking", "query", "query_ranking", "paraphrase", "paraphrase_ranking",
    "model", "kind", "same", "ao", "js", "images")}
STS_FIELDS = {"sentence1": ["sentence1", "sentence_a"], "sentence2": ["sentence2", "sentence_b"],
              "score": ["score", "similarity_score", "relatedness_score", "label"]}


class Pair(NamedTuple):
    """Two texts. images: the correct ones of the first; negative: a text that means another thing;
    same: whether the two mean the same; pairs of one group are not independent."""
    query: str
    paraphrase: str
    images: tuple = ()
    kind: str = ""
    negative: str = ""
    same: bool = True
    group: str | int | None = None


def read_pairs(path) -> list[Pair]:
    """The pairs of a file, or of a SugarCrepe++ file (arXiv 2406.11171), which calls the texts
    caption, caption2 and negative_caption."""
    pairs = []
    for place, record in read_records(path, PAIR_FIELDS, bare_columns=2):
        with expecting(place, "query and paraphrase (SugarCrepe++: caption, caption2, "
                              "negative_caption) and, where known, image or images (a list), kind, "
                              "same (true or false) and group"):
            same = {"true": True, "": True, "none": True,
                    "false": False}[str(record.get("same", "")).lower()]
            group, images = record.get("group"), record.get("images") or []
            if group == "":
                group = None  # an empty cell of a table
            if not isinstance(group, str | int | None):
                raise ValueError(f"the group is {group!r}")
            pairs.append(Pair(
                checked_text(record["query"]).strip(), checked_text(record["paraphrase"]).strip(),
                tuple(checked_texts(images)), fix_surrogates(record.get("kind") or ""),
                fix_surrogates(record.get("negative") or "").strip(), same, group))
    return pairs


def read_lists(path) -> dict[str, list[str]]:
    """{text: [image names, best first]} of ranked lists.

    A line is {"text", "ranking"}, or what --details writes: {"query", "query_ranking",
    "paraphrase", "paraphrase_ranking"}.
    """
    lists = {}
    for place, record in read_records(path, LIST_FIELDS):
        with expecting(place, '{"text": ..., "ranking": [image names, best first]}'):
            entries = [("query", "query_ranking"), ("paraphrase", "paraphrase_ranking")]
            if "text" in record:
                entries = [("text", "ranking")]
            for text_field, ranking_field in entries:
                text = checked_text(record[text_field]).strip()
                ranking = checked_texts(record[ranking_field])
                # The details of several models hold each text once per model. Without this check
                # the first model's list would be taken silently.
                if lists.setdefault(text, ranking) != ranking:
                    raise ValueError(f"{text!r} has another list further up: if the file holds "
                                     "several models, keep the lines of one")
    return lists


def read_captions_of_images(path, split: str = "") -> dict[str, list[str]]:
    """{image name: [captions]} of a file, see read_captions()."""
    captions = {}
    for caption, image in read_captions(path, split):
        if not image:
            raise UserError(f"{path}: expected an image's name for the caption {caption!r}")
        captions.setdefault(image, []).append(caption)
    return captions


def read_sts(path) -> list[tuple[str, str, float]]:
    """[(sentence1, sentence2, score)]."""
    rows = []
    for place, record in read_records(path, STS_FIELDS, bare_columns=3):
        with expecting(place, "sentence1, sentence2 and a finite score"):
            score = float(record["score"])
            if not math.isfinite(score):
                raise ValueError(f"the score is {score}")
            rows.append((checked_text(record["sentence1"]).strip(),
                         checked_text(record["sentence2"]).strip(), score))
    return rows


def read_classnames(path) -> list[str]:
    """A class name per line; the first one of lines such as "n01440764 tench, Tinca tinca". Raises
    UserError if their WordNet ids do not ascend, as those of folders do."""
    lines = read_lines(path)
    ids = [line.split()[0] for line in lines if re.match(r"n\d{8}\s", line)]
    if ids != sorted(ids):
        raise UserError(f"{path}: the WordNet ids of its lines do not ascend, as those of the "
                        "folders do: sort its lines")
    return [re.sub(r"^n\d{8}\s+([^,]*).*", r"\1", line) for line in lines]


def read_templates(path) -> list[str]:
    """Prompts, one per line, each with {} (CLIP_benchmark: {c}) where the class name goes."""
    templates = [line.replace("{c}", "{}") for line in read_lines(path)]
    for template in templates:
        if "{}" not in template:
            raise UserError(f"{path}: expected {{}} for the class name in {template!r}")
    return templates


def read_labels(path) -> tuple[list[str], dict[str, int]]:
    """(class names, {image name: class index}) of a JSON file with classnames and labels."""
    with expecting(path, '{"classnames": [names], "labels": {image name: index of its class}}'):
        record = json.loads(read_text(path))
        names, labels = checked_texts(record["classnames"]), record["labels"]
        for name, label in labels.items():
            # True and False are numbers to Python.
            if type(label) is not int or not 0 <= label < len(names):
                raise ValueError(f"the label of {name!r} is {label!r}")
        if not labels:
            raise ValueError("there is no label")
    return names, labels


# What CLIP_benchmark writes beside the shards of a classification set.
CLASS_NAMES, PROMPTS = "classnames.txt", "zeroshot_classification_templates.txt"


def read_classes(source: str) -> tuple[Gallery, list[str], dict[str, int], str | None]:
    """(gallery, class names, {image name: class index}, source of the names, or None if they are
    not words, so that --classnames must be given) of a test set.

    source is a folder with a folder per class, or with shards as CLIP_benchmark has them (KEY.cls),
    imagenet:ROOT (its folders in val), or cifar10:ROOT or cifar100:ROOT (torchvision's). Names are
    torchvision's for CIFAR and for ImageNet's 1000 folders, otherwise those of the folders, with
    spaces for underscores. Raises UserError.
    """
    kind, colon, root = source.partition(":")
    if colon and kind in ("cifar10", "cifar100"):
        with expecting(root, f"{kind} as torchvision lays it out"):
            dataset = getattr(torchvision.datasets, kind.upper())(root, train=False)
        images = {f"test/{i}": functools.partial(np.asarray, pixels)
                  for i, pixels in enumerate(dataset.data)}
        labels = dict(zip(images, dataset.targets))
        return Gallery(images), dataset.classes, labels, "torchvision"

    if Path(source, CLASS_NAMES).is_file():
        gallery, labels = list_gallery(f"{source}/test"), {}
        classnames = read_lines(Path(source, CLASS_NAMES))
        for shard in Path(source, "test").glob("*.tar"):
            with expecting(shard, "KEY.cls, the number of its class, beside each image"):
                with tarfile.open(shard) as tar:
                    for member in tar:
                        key, _, extension = member.name.rpartition(".")
                        if extension == "cls" and key in gallery.images:
                            if key in labels:
                                raise ValueError(f"{member.name} is in two shards")
                            labels[key] = int(tar.extractfile(member).read())
                            if not 0 <= labels[key] < len(classnames):
                                raise ValueError(f"{member.name} is {labels[key]}, and "
                                                 f"{CLASS_NAMES} has {len(classnames)} names")
        return gallery, classnames, labels, CLASS_NAMES

    is_imagenet = bool(colon) and kind == "imagenet"
    folder = Path(root).expanduser() / "val" if is_imagenet else Path(source)
    gallery = list_gallery(str(folder))
    folders = [path.name for path in folder.iterdir()
               if path.is_dir() and not path.name.startswith(".")]
    # ImageNet-V2's folders are 0 ... 999, which as text would stand in another order.
    numbered = all(name.isdecimal() for name in folders)
    folders.sort(key=int if numbered else None)
    class_of, labels = {name: i for i, name in enumerate(folders)}, {}
    for name in gallery.names:
        parts = name.split("/")
        if len(parts) > 2:
            raise UserError(f"{folder}: expected a folder of images for each class, but {name} "
                            "lies deeper: give the folder of one split")
        # Images that lie beside the class folders belong to no class.
        if len(parts) == 2:
            labels[name] = class_of[parts[0]]
    if not folders:
        raise UserError(f"{folder}: it has no folder per class, and no {CLASS_NAMES} beside "
                        "test/*.tar")
    empty = set(range(len(folders))) - set(labels.values())
    if empty:
        raise UserError(f"{folder}: expected a folder of images for each class; "
                        f"{[folders[i] for i in empty][:3]} have none")
    wordnet = all(re.fullmatch(r"n\d{8}", name) for name in folders)
    if len(folders) == 1000 and (wordnet or is_imagenet and numbered):
        # Torchvision's names are in the order of the sorted WordNet ids.
        categories = list(torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"])
        # A dog, and not the garment, which is another class.
        categories[categories.index("Cardigan")] = "Cardigan Welsh corgi"
        return gallery, categories, labels, "torchvision"
    names = [fix_surrogates(name).replace("_", " ") for name in folders]
    return gallery, names, labels, None if wordnet or is_imagenet else "its folders"


# ---- measurements --------------------------------------------------------------------------------
class Scores(NamedTuple):
    """A metric's values, and for each value its group: intervals resample groups."""
    values: np.ndarray  # (N,) float
    groups: np.ndarray  # (N,) int


class Task:
    """What one flag measures. To add one, write a subclass, list it in TASKS by its flag, and in
    NEED_IMAGES if it cannot do without --images; give EvalConfig the flag, and check_flags() the
    file that it reads.

    A subclass reads its files in __init__(cfg, gallery), where gallery is that of --images or None,
    and has measure(model, encoded, cfg), which returns {name: Scores, a number or a text}. A name
    is a tuple that no other task has, the path of keys in the JSON: ("ao",) or ("recall", "t2i@1").
    Scores and other floats are printed x100; a text is the same for all models.
    """
    # The images that it is measured on, which it may replace by its own; measure() gets their
    # features as `encoded`, an EncodedGallery, or None.
    gallery: Gallery | None = None
    # The images of --images that its files name. Without --pairs only these are encoded.
    names: set[str] = set()


RECALL_AT = (1, 5, 10)
TEMPLATES = ["{}", "a picture of a {}", "a photo of a {}"]


def compare_lists(first, second, k: int) -> dict[str, np.ndarray]:
    """Every metric of two lists (Q, K), K >= k: (Q,) values in [0, 1] each. Unrelated pairs get all
    of them, too, as NAME_random. Add yours here, the titles of both to TITLES, and its name to
    SHOWN_OF_SUBSETS if the table should show it of kinds and files."""
    return {
        "ao1": average_overlap(first, second, 1),
        "ao": average_overlap(first, second, k),
        "js": jaccard(first, second, k),
    }


def group_numbers(pairs: list[Pair]) -> np.ndarray:
    """A number for each pair, the same for those that are not independent of each other: those of
    the same "group" or, where there is none, of the same correct images or the same query, directly
    or by way of other pairs."""
    graph = networkx.Graph()
    for i, pair in enumerate(pairs):
        if pair.group is not None:
            # A table has texts where JSON has numbers.
            keys = [("group", str(pair.group))]
        else:
            keys = [("query", pair.query)]
            if pair.images:
                keys.append(("images", *sorted(pair.images)))
        graph.add_edges_from((i, key) for key in keys)
    groups = np.empty(len(pairs), int)
    for number, component in enumerate(networkx.connected_components(graph)):
        groups[[i for i in component if isinstance(i, int)]] = number
    return groups


def unrelated(pairs: list[Pair], groups: np.ndarray, seed: int) -> np.ndarray:
    """For each pair the index of another one that shares no text, image or group with it; -1 if
    none is found.

    AO of a query and an unrelated paraphrase is what a model reaches that ignores the texts: one
    that returns the same images for every text would reach 1.
    """
    contents = [{pair.query, pair.paraphrase, *pair.images, int(group)}
                for pair, group in zip(pairs, groups)]
    order = np.random.default_rng(seed).permutation(len(pairs))
    partners = np.full(len(pairs), -1)
    for position, i in enumerate(order):
        # The nearest one before it in a random order: in the file's, neighbours are often of one
        # image.
        for step in range(1, min(len(pairs), 50)):
            partner = order[position - step]
            if contents[i].isdisjoint(contents[partner]):
                partners[i] = partner
                break
    return partners


def comparisons(pairs: list[Pair]) -> np.ndarray:
    """(C, 2): indices of a pair that keeps and one that changes the meaning of the same text."""
    kept, changed = {}, {}
    for i, pair in enumerate(pairs):
        for text in (pair.query, pair.paraphrase):
            (kept if pair.same else changed).setdefault(text, set()).add(i)
    found = set()
    for text in kept.keys() & changed.keys():
        found.update(itertools.product(kept[text], changed[text]))
    return np.array(sorted(found), dtype=int).reshape(-1, 2)


def image_to_text(texts, text_features, image_features, correct, groups) -> dict:
    """{"i2t@1": Scores, ...} of the images that are correct for some text: whether one of their
    texts is found. For the bootstrap, an image belongs to the group of its first text.

    correct: rows of each text's images. A text that occurs several times with the same images
    counts once.
    """
    different = {}
    for i, text in enumerate(texts):
        different.setdefault((text, *correct[i]), i)
    kept = list(different.values())
    texts_of = {}
    for position, i in enumerate(kept):
        for row in correct[i]:
            texts_of.setdefault(row, []).append(position)
    ranked = rankings(image_features[list(texts_of)], text_features[kept], max(RECALL_AT))
    image_groups = groups[kept][[positions[0] for positions in texts_of.values()]]
    return {f"i2t@{k}": Scores(recall_at_k(ranked, texts_of.values(), k), image_groups)
            for k in RECALL_AT}


def given_pairs(cfg: EvalConfig):
    """Yields (file, pair) of --pairs, or the pair of --query and --paraphrase."""
    if cfg.query:
        with expecting("--query and --paraphrase", "a text each"):
            # Several words arrive as several arguments where the quotes were left out.
            query, paraphrase = " ".join(cfg.query).strip(), " ".join(cfg.paraphrase).strip()
            yield "", Pair(checked_text(query), checked_text(paraphrase))
    for path, file in zip(cfg.pairs, short_names(cfg.pairs)):
        for pair in read_pairs(path):
            yield file, pair


class Pairs(Task):
    """Rank similarity of queries and paraphrases, recall of their correct images, and contrast with
    pairs that change the meaning.

    Everything is computed once for all pairs, and reported for each kind, for all, and for each of
    several files.
    """

    def __init__(self, cfg, gallery):
        self.gallery, self.names, self.pairs = gallery, set(), []
        # subsets: {keys in the JSON, such as ("kinds", "order"), or () for all pairs: [indices of
        # pairs]}.
        subsets, index = {(): []}, {}
        for file, pair in given_pairs(cfg):
            self.names.update(pair.images)
            images = {gallery.find(name) or name for name in pair.images}
            pair = pair._replace(images=tuple(sorted(images)))
            parts = [pair]
            if pair.negative:
                parts.append(pair._replace(paraphrase=pair.negative, same=False))
            for part in parts:
                # A pair that is in two files, or twice in one, counts once in each subset.
                content = part.query, part.paraphrase, part.images, part.same
                i = index.setdefault(content, len(index))
                if i == len(self.pairs):
                    self.pairs.append(part)
                subsets[()].append(i)
                if part.kind:
                    section = "kinds" if part.same else "changed"
                    subsets.setdefault((section, part.kind), []).append(i)
                if len(cfg.pairs) > 1:
                    subsets.setdefault(("files", file), []).append(i)
        sections = ["kinds", "all", "files", "changed"]  # in the order of the table
        order = sorted(subsets, key=lambda keys: sections.index(keys[0] if keys else "all"))
        self.subsets = {keys: np.unique(subsets[keys]) for keys in order}
        self.same = np.array([pair.same for pair in self.pairs])
        self.groups = group_numbers(self.pairs)

    def measure(self, model, encoded, cfg):
        self.k = min(cfg.k, len(encoded.names))
        depth = min(max(cfg.k, *RECALL_AT), len(encoded.names))
        queries = [pair.query for pair in self.pairs]
        paraphrases = [pair.paraphrase for pair in self.pairs]
        features, cutoffs = None, RECALL_AT
        if isinstance(model, RankedLists):
            ranked = model.search(queries + paraphrases, encoded, self.k, depth)
            # A shorter list does not tell recall at k.
            cutoffs = [k for k in RECALL_AT if k <= ranked.shape[1]]
        else:
            features = embed_texts(model, queries + paraphrases, cfg)
            ranked = rankings(features, encoded.features, depth).numpy()
            features = features.view(2, len(self.pairs), -1)
        ranked = ranked.reshape(2, len(self.pairs), -1)
        correct = [[encoded.rows[name] for name in pair.images if name in encoded.rows]
                   for pair in self.pairs]
        # Pairs that change the meaning do not count in recall.
        correct_if_same = [rows if pair.same else [] for rows, pair in zip(correct, self.pairs)]

        # {name: (P,) values of all P pairs}, NaN where a metric says nothing of a pair.
        values = {(name,): value for name, value in compare_lists(*ranked, self.k).items()}
        values |= self.chance(ranked, cfg.seed)
        values[("ao_minus_random",)] = values[("ao",)] - values[("ao_random",)]
        # "recall" is that of the captions if there are any; that of the queries is then
        # "query_recall".
        keys = ["query_recall" if cfg.captions else "recall", "paraphrase_recall"]
        for side, key in enumerate(keys):
            for k in cutoffs:
                values[key, f"t2i@{k}"] = recall_at_k(ranked[side], correct_if_same, k)

        results = {("split",): cfg.split} if cfg.benchmark else {}
        results |= self.slices(values, encoded)
        if self.names:
            known = [i for i, rows in enumerate(correct_if_same) if rows]
            results[("recall_pairs",)] = len(known)
            if features is not None and known:
                for side, key in enumerate(keys):
                    texts = [(queries, paraphrases)[side][i] for i in known]
                    found = image_to_text(texts, features[side, known], encoded.features,
                                          [correct[i] for i in known], self.groups[known])
                    results |= {(key, name): scores for name, scores in found.items()}

        # What --details writes of each pair, and figures show.
        self.details = [{
            "query": pair.query, "paraphrase": pair.paraphrase, "kind": pair.kind,
            "same": pair.same, "ao": float(values[("ao",)][i]), "js": float(values[("js",)][i]),
            "query_ranking": [encoded.names[row] for row in ranked[0, i]],
            "paraphrase_ranking": [encoded.names[row] for row in ranked[1, i]],
            "images": [encoded.names[row] for row in correct[i]],
        } for i, pair in enumerate(self.pairs)]
        return results

    def chance(self, ranked, seed: int) -> dict:
        """Values of unrelated pairs: the query of each with the paraphrase of another."""
        kept = np.flatnonzero(self.same)
        partners = unrelated([self.pairs[i] for i in kept], self.groups[kept], seed)
        queries, others = kept[partners >= 0], kept[partners[partners >= 0]]
        values = {}
        for name, value in compare_lists(ranked[0, queries], ranked[1, others], self.k).items():
            values[(f"{name}_random",)] = np.full(len(self.pairs), np.nan)
            values[(f"{name}_random",)][queries] = value
        return values

    def slices(self, values: dict, encoded) -> dict:
        """The results of each subset of the pairs."""
        results = {}
        ao = values[("ao",)]
        compared = comparisons(self.pairs)
        contrasts = contrast(*ao[compared.T])
        for keys, chosen in self.subsets.items():
            # Here, and not before the loop, since the table has its rows in this order.
            if keys == ():
                results |= {("k",): self.k, ("gallery",): len(encoded.names)}
            shown = chosen if keys[:1] == ("changed",) else chosen[self.same[chosen]]
            results[(*keys, "pairs")] = len(shown)
            results[(*keys, "groups")] = len(set(self.groups[shown]))
            for name, value in values.items():
                measured = shown[~np.isnan(value[shown])]
                if len(measured):
                    results[(*keys, *name)] = Scores(value[measured], self.groups[measured])
            # A comparison belongs to the subsets of its changed pair, which it says something of.
            inside = np.isin(compared[:, 1], chosen)
            if inside.any():
                results[(*keys, "contrast_pairs")] = int(inside.sum())
                # The two are of one text, and most often of one group.
                groups = self.groups[compared[inside, 0]]
                results[(*keys, "contrast")] = Scores(contrasts[inside], groups)
        if not self.same.all():
            results[("ao_changed",)] = Scores(ao[~self.same], self.groups[~self.same])
        return results


class Captions(Task):
    """Recall of captions among the images that have any."""

    def __init__(self, cfg, gallery):
        self.gallery, self.captions = gallery, read_captions_of_images(cfg.captions, cfg.split)
        self.names = set(self.captions)

    def measure(self, model, encoded, cfg):
        captions = {}
        for name, texts in self.captions.items():
            if encoded.row(name) is not None:
                captions.setdefault(encoded.row(name), []).extend(texts)
        if not captions:
            raise UserError(f"{cfg.captions}: none of its images is there and readable")
        # In the gallery's order, so that ties are broken as in the other tasks. Images without
        # captions, which --pairs may search in, would only make recall lower.
        rows = sorted(captions)
        texts = [text for row in rows for text in captions[row]]
        correct = [[i] for i, row in enumerate(rows) for _ in captions[row]]
        groups = np.array(correct)[:, 0]
        text_features, image_features = embed_texts(model, texts, cfg), encoded.features[rows]
        ranked = rankings(text_features, image_features, max(RECALL_AT))
        missing = [name for name in self.captions if encoded.row(name) is None]
        results = {("captions", "images"): len(rows), ("captions", "captions"): len(texts),
                   ("captions", "missing"): len(missing)}
        for k in RECALL_AT:
            results["recall", f"t2i@{k}"] = Scores(recall_at_k(ranked, correct, k), groups)
        found = image_to_text(texts, text_features, image_features, correct, groups)
        return results | {("recall", name): scores for name, scores in found.items()}


class Triplets(Task):
    """SugarCrepe++: are two captions P1, P2, and their image I, closer to each other than to a
    negative N?

    text_only: sim(P1, P2) > sim(P1, N) and sim(P1, P2) > sim(P2, N)
    image_text: sim(I, P1) > sim(I, N) and sim(I, P2) > sim(I, N)
    """

    def __init__(self, cfg, gallery):
        self.gallery, self.files = gallery, {}
        for path, file in zip(cfg.triplets, short_names(cfg.triplets)):
            self.files[file] = read_pairs(path)
            for triplet in self.files[file]:
                if not triplet.negative:
                    raise UserError(f"{path}: expected SugarCrepe++ JSON with a negative_caption, "
                                    f"also of {triplet.query!r}")
        triplets = itertools.chain(*self.files.values())
        self.names = {name for triplet in triplets for name in triplet.images}

    def measure(self, model, encoded, cfg):
        results = {}
        for file, triplets in self.files.items():
            texts = [getattr(triplet, field) for field in ("query", "paraphrase", "negative")
                     for triplet in triplets]
            p1, p2, negative = embed_texts(model, texts, cfg).chunk(3)
            p1_p2 = similarity(p1, p2)
            text_only = (p1_p2 > similarity(p1, negative)) & (p1_p2 > similarity(p2, negative))
            groups = group_numbers(triplets)
            results["triplets", file, "n"] = len(triplets)
            results["triplets", file, "text_only"] = Scores(text_only.astype(float), groups)
            rows = [encoded.row(triplet.images[0]) if encoded and triplet.images else None
                    for triplet in triplets]
            known = [i for i, row in enumerate(rows) if row is not None]
            if known:
                image = encoded.features[[rows[i] for i in known]]
                image_n = similarity(image, negative[known])
                image_text = ((similarity(image, p1[known]) > image_n)
                              & (similarity(image, p2[known]) > image_n))
                scores = Scores(image_text.astype(float), groups[known])
                results["triplets", file, "image_text_n"] = len(known)
                results["triplets", file, "image_text"] = scores
        return results


class STS(Task):
    """Spearman's rank correlation of cosine similarity and human score (arXiv 1708.00055)."""

    def __init__(self, cfg, gallery):
        self.rows = read_sts(cfg.sts)

    def measure(self, model, encoded, cfg):
        sentences1, sentences2, scores = zip(*self.rows)
        a, b = embed_texts(model, [*sentences1, *sentences2], cfg).chunk(2)
        correlation = spearman(similarity(a, b), scores)
        if math.isnan(correlation):
            raise UserError(f"{cfg.sts}: equal scores or similarities have no rank correlation")
        return {("sts", "n"): len(self.rows), ("sts", "spearman"): correlation}


class ZeroShot(Task):
    """Accuracy of the class whose prompts, averaged, are most similar (arXiv 2103.00020, 3.1.4)."""

    def __init__(self, cfg, gallery):
        if cfg.zeroshot.endswith(".json"):
            self.classnames, self.labels = read_labels(cfg.zeroshot)
            self.gallery, self.names, names_from = gallery, set(self.labels), "its JSON file"
        else:
            self.gallery, self.classnames, self.labels, names_from = read_classes(cfg.zeroshot)
        # Names and prompts move ImageNet's accuracy by several points, so the output says where
        # they are from.
        if cfg.classnames:
            names, names_from = read_classnames(cfg.classnames), cfg.classnames
            if len(names) != len(self.classnames):
                raise UserError(f"{cfg.classnames}: expected {len(self.classnames)} class names, "
                                f"one per line, but it has {len(names)}")
            self.classnames = names
        if not names_from:
            raise UserError(f"{cfg.zeroshot}: {len(self.classnames)} folders, which are not "
                            "ImageNet's 1000 and whose names are no words: give --classnames")
        # Most tokenizers ignore letter case. Of OpenAI's names of ImageNet, which published numbers
        # use, two occur twice.
        uses = Counter(name.lower() for name in self.classnames)
        repeated = [name for name in self.classnames if uses[name.lower()] > 1]
        if repeated:
            note(f"{names_from}: {len(repeated)} classes share a name, such as {repeated[0]!r}: "
                 "images of all but the first with that name count as wrong")
        self.templates, templates_from = TEMPLATES, "eval_paraphrase.py"
        if cfg.templates or Path(cfg.zeroshot, PROMPTS).is_file():
            templates_from = cfg.templates or PROMPTS
            self.templates = read_templates(cfg.templates or Path(cfg.zeroshot, PROMPTS))
        self.sources = {("zeroshot", "classnames"): f"from {names_from}",
                        ("zeroshot", "templates"): f"{len(self.templates)} from {templates_from}"}

    def measure(self, model, encoded, cfg):
        known = [name for name in self.labels if encoded.row(name) is not None]
        if not known:
            raise UserError(f"{cfg.zeroshot}: none of its images is there and readable")
        prompts = [template.replace("{}", name) for name in self.classnames
                   for template in self.templates]
        # Each prompt is normalised before the mean, so that none weighs more by its length.
        features = normalize(embed_texts(model, prompts, cfg), dim=-1)
        class_features = features.view(len(self.classnames), len(self.templates), -1).mean(1)
        rows = [encoded.row(name) for name in known]
        ranked = rankings(encoded.features[rows], class_features, 5)
        correct, groups = [[self.labels[name]] for name in known], np.arange(len(known))
        results = {("zeroshot", "classes"): len(self.classnames), **self.sources,
                   ("zeroshot", "images"): len(known),
                   ("zeroshot", "top1"): Scores(recall_at_k(ranked, correct, 1), groups)}
        # Among five classes, the correct one is always one of the first five.
        if len(self.classnames) > 5:
            results["zeroshot", "top5"] = Scores(recall_at_k(ranked, correct, 5), groups)
        return results


# By their flags.
TASKS = {"pairs": Pairs, "query": Pairs, "captions": Captions, "triplets": Triplets, "sts": STS,
         "zeroshot": ZeroShot}
# What cannot do without --images.
NEED_IMAGES = ("pairs", "query", "captions")


# ---- what to measure on --------------------------------------------------------------------------
def short_names(paths: list[str]) -> list[str]:
    """The last parts of each path, as many as tell all of them apart. model.pt stands for its run
    folder."""
    parts = []
    for path in paths:
        is_run = Path(path).name == "model.pt" and Path(path).parent.name
        parts.append(Path(path).parent.parts if is_run else Path(path).parts)
    for n in range(1, 100):
        names = [str(Path(*part[-n:])) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def choose_benchmark(cfg: EvalConfig):
    """Sets the flags that measure a split of the benchmark, if nothing else is to be measured.

    A split is a folder of shards with pairs.jsonl, and optionally zeroshot.json and captions.json.
    """
    given = [name for name in TASKS if getattr(cfg, name)]
    if (cfg.classnames or cfg.templates) and not cfg.zeroshot:
        raise UserError("--classnames and --templates belong to --zeroshot")
    if given and cfg.benchmark:
        raise UserError(f"--benchmark is measured by itself: leave out --{given[0]}")
    if given:
        return
    if cfg.images:
        raise UserError("--images says where to search; say what for, with one of --"
                        f"{', --'.join(NEED_IMAGES)}, or --zeroshot FILE.json")
    cfg.benchmark = cfg.benchmark or "emoji"
    if cfg.benchmark == "emoji":
        # Imported here: only this benchmark needs what draws it.
        from demo.emoji_scenes import emoji_folder
        folder = Path(emoji_folder(), cfg.split)
    else:
        folder = data_folder(cfg.benchmark) / cfg.split
    if not folder.is_dir():
        raise UserError(f"--benchmark {cfg.benchmark}: there is no folder {folder}")
    cfg.images, cfg.pairs = str(folder), [str(folder / "pairs.jsonl")]
    for name in ("zeroshot", "captions"):
        if (folder / f"{name}.json").exists():
            setattr(cfg, name, str(folder / f"{name}.json"))


def choose_tasks(cfg: EvalConfig) -> dict[str, Task]:
    """{flag: what it measures}; pairs are searched in all images, and without pairs only the images
    that files name are encoded. Raises UserError."""
    for name in (*NEED_IMAGES, "zeroshot"):
        value = getattr(cfg, name)
        if value and not cfg.images and (name in NEED_IMAGES or value.endswith(".json")):
            raise UserError(f"--{name} needs --images DIR to search in")
    gallery = list_gallery(cfg.images) if cfg.images else None
    tasks = {name: task(cfg, gallery) for name, task in TASKS.items() if getattr(cfg, name)}
    has_pairs = bool(cfg.pairs or cfg.query)
    if not has_pairs and (cfg.details or cfg.figure or cfg.report):
        raise UserError("--details, --figure and --report show pairs: give --pairs, or --query")
    named = set().union(*[task.names for task in tasks.values()])
    missing = sorted(name for name in named if gallery and gallery.find(name) is None)
    if missing:
        note(f"{cfg.images}: {len(missing)} of {len(named)} named images are missing or ambiguous, "
             f"such as {missing[0]}")
    if gallery and not has_pairs:
        # 500 labelled images of a folder of 100,000 are no reason to encode all of them.
        part = gallery.only(named) if named else None
        if part and not part.names:
            raise UserError(f"{cfg.images}: none of the {len(named)} named images is there")
        for task in tasks.values():
            if task.gallery is gallery:
                task.gallery = part
    return tasks


# ---- report --------------------------------------------------------------------------------------
class Estimate(NamedTuple):
    """The mean of a metric's values, its 95 % interval (None if there is only one group), and the
    number of independent groups."""
    mean: float
    interval: tuple[float, float] | None
    groups: int


def estimate(results: dict, seed: int, of_differences: bool = False) -> dict:
    """Results with an Estimate in place of each Scores."""
    estimates = {}
    for name, value in results.items():
        if isinstance(value, Scores):
            mean, groups = float(value.values.mean()), len(set(value.groups.tolist()))
            interval = None
            if groups > 1:
                interval = bootstrap_ci(value.values, value.groups, seed)
                # If all groups have 1, or all 0, the bootstrap's interval has no width. This is the
                # exact one of a binomial rate (Clopper and Pearson 1934).
                # For AO and JS, too, whose values also lie in [0, 1].
                in_unit_range = not of_differences and name[-1] != "ao_minus_random"
                if in_unit_range and mean in (0, 1) and interval == (mean, mean):
                    width = 1 - 0.025 ** (1 / groups)
                    interval = (0, width) if mean == 0 else (1 - width, 1)
            value = Estimate(mean, interval, groups)
        estimates[name] = value
    return estimates


def to_json(estimates: dict) -> dict:
    """Nested dicts: ("kinds", "order", "ao") becomes kinds.order.ao, its interval ...ao_ci.

    The intervals of recall are kept together: ("recall", "t2i@1") in recall_ci.t2i@1.
    """
    report = {}

    def put(path, value):
        place = report
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value

    for name, value in estimates.items():
        if not isinstance(value, Estimate):
            put(name, value)
            continue
        put(name, value.mean)
        *path, key = name
        if value.interval and "@" in key:
            put((*path[:-1], f"{path[-1]}_ci", key), list(value.interval))
        elif value.interval:
            put((*path, f"{key}_ci"), list(value.interval))
    return report


# Titles of the table's rows; other keys are their own titles.
TITLES = {
    "ao1": "same first image",
    "ao": "AO@{k}",
    "js": "JS@{k}",
    "ao1_random": "same first image, unrelated pairs",
    "ao_random": "AO@{k}, unrelated pairs",
    "js_random": "JS@{k}, unrelated pairs",
    "ao_minus_random": "AO@{k} minus unrelated",
    "ao_changed": "AO@{k}, meaning changed",
    "changed": "meaning changed:",
    "contrast": "contrast: same above changed",
    "contrast_pairs": "comparisons of contrast",
    "recall_pairs": "pairs with an image",
}
# What the table shows of each kind and file; the JSON has all.
SHOWN_OF_SUBSETS = ("pairs", "ao1", "ao", "ao_minus_random", "js", "contrast")
# Estimates from fewer independent groups are marked: their bootstrap intervals are too narrow.
FEW = 30


class Column(NamedTuple):
    """A column of the table: a model's results, or its differences to the baseline."""
    header: str
    estimates: dict
    is_difference: bool = False

    def cell(self, name) -> str:
        value = self.estimates.get(name, "")
        if not isinstance(value, Estimate):
            return f"{100 * value:.1f} " if isinstance(value, float) else f"{value} "
        text = f"{100 * value.mean:{'+' if self.is_difference else ''}.1f}"
        mark = "*" if value.groups < FEW else " "
        if value.interval:
            low, high = value.interval
            text += f" ±{50 * (high - low):.1f}"
            if self.is_difference and mark == " " and (low > 0 or high < 0):
                mark = "≠"
        return text + mark


def row_title(keys, k: int | str) -> str:
    titles = [TITLES.get(key, key.replace("_", " ")).replace("{k}", str(k)) for key in keys]
    return " ".join(titles)


def table_of(columns: list[Column]) -> tuple[list[str], list]:
    """(lines above the table, [(section title, [(row title, a cell for each column)])])."""
    # {section: the rows of any column}; ranked lists have fewer.
    sections, texts = {}, {}
    # Of a gallery with fewer than k images, each model's k is the number that it can read.
    ks = {column.estimates[("k",)] for column in columns if ("k",) in column.estimates}
    k = ks.pop() if len(ks) == 1 else "k"
    for column in columns:
        for name, value in column.estimates.items():
            # Strings, the same for all models, are printed above the table.
            if isinstance(value, str):
                texts[name] = value
            elif name[0] not in ("kinds", "files", "changed") or name[2] in SHOWN_OF_SUBSETS:
                sections.setdefault(name[:-1], {})[name] = None
    table = []
    for section, names in sections.items():
        title = row_title(section, k)
        if section == () and len(sections) > 1:
            title = "all pairs"
        rows = [(row_title(name[-1:], k), [column.cell(name) for column in columns])
                for name in names]
        table.append((title, rows))
    lines = [f"{row_title(name, k)}: {text}" for name, text in texts.items()]
    lines.append(f"Means x100, ± half a 95 % interval. *: fewer than {FEW} independent images, "
                 "groups or queries.")
    lines.append("≠: a difference whose interval does not contain 0.")
    return lines, table


def print_table(columns: list[Column]):
    """A row per metric, a column per model. Four columns side by side fit into 100 characters."""
    lines, table = table_of(columns)
    print("\n".join(lines))
    for start in range(0, len(columns), 4):
        block = columns[start:start + 4]
        print()
        # Long headers take several lines.
        headers = [textwrap.wrap(column.header, 14) for column in block]
        for cells in itertools.zip_longest(*headers, fillvalue=""):
            print(" " * 36 + "".join(cell.rjust(16) for cell in cells))
        for section, rows in table:
            print(f"\n{section}".rstrip())
            for title, cells in rows:
                cells = "".join(cell.rjust(16) for cell in cells[start:start + 4])
                print(f"{title:36}{cells}".rstrip())
    print()


# ---- main ----------------------------------------------------------------------------------------
def measure_model(name: str, model, tasks: dict[str, Task], cfg: EvalConfig):
    """(results, {gallery: names of its images that the model can read}, details of pairs)."""
    images = {None: None}  # {gallery: EncodedGallery}; tasks on texts alone have the gallery None
    results, details = {}, []
    for flag_name, task in tasks.items():
        if isinstance(model, RankedLists) and not isinstance(task, Pairs):
            note(f"{name}: --{flag_name} is left out, since ranked lists have no features")
            continue
        if task.gallery not in images:
            images[task.gallery] = embed_images(model, task.gallery, cfg)
        results |= task.measure(model, images[task.gallery], cfg)
        if isinstance(task, Pairs):
            details = [{"model": name, **record} for record in task.details]
    if not results:
        raise UserError(f"{name}: nothing to measure")
    names = {gallery: encoded.names for gallery, encoded in images.items() if encoded}
    return results, names, details


def differences(results: dict, base: dict, seed: int) -> dict:
    """Estimates of the differences, query by query: their intervals are far narrower than the
    models' own, since a query that is hard for one is hard for both."""
    scores = {}
    for name, value in results.items():
        # Lists may be shorter than a model's, so that they lack some of its metrics.
        if isinstance(value, Scores) and name in base:
            scores[name] = Scores(value.values - base[name].values, value.groups)
    return estimate(scores, seed, of_differences=True)


def main(argv=None):
    """Measures every model, prints a table and JSON, then writes the files that are asked for."""
    cfg = parse_config(EvalConfig, argv)
    if not cfg.models and not Path(DEFAULT_MODEL).exists():
        raise UserError(f"no model given, and no {DEFAULT_MODEL} yet: run `python paraclip.py` "
                        "first")
    models = cfg.models = cfg.models or [DEFAULT_MODEL]
    choose_benchmark(cfg)
    check_flags(cfg)
    labels = cfg.labels or short_names(models)
    if len(labels) != len(models) or len(set(labels)) < len(labels):
        raise UserError(f"{len(models)} models are called {labels}: give each model once, or a "
                        "different name for each with --labels")
    baseline = cfg.baseline or labels[0]
    if baseline not in labels:
        raise UserError(f"--baseline {baseline}: expected one of {labels}")
    tasks = choose_tasks(cfg)
    # On CUDA, convolutions would otherwise round fp32 to TF32.
    torch.backends.cudnn.allow_tf32 = False

    measured, failures = {}, []
    # Models of one folder that follow each other share its modules: some must not be run twice,
    # such as those that register an operator.
    for folder, group in itertools.groupby(zip(models, labels), lambda pair: folder_of(pair[0])):
        with own_modules(folder) if folder else contextlib.nullcontext():
            for name, label in group:
                try:
                    model = open_model(name, cfg, any(task.gallery for task in tasks.values()))
                    measured[label] = measure_model(name, model, tasks, cfg)
                except Exception as error:
                    # One model does not cost the others' numbers.
                    if len(models) == 1:
                        raise
                    if not isinstance(error, (UserError, OSError)):
                        traceback.print_exc()
                    failures.append(f"{name}: {error}".replace(f"{name}: {name}", name))
                # The next model may need the memory.
                model = None

    reports, columns, details = [], [], {}
    for name, label in zip(models, labels):
        if label not in measured:
            continue
        results, image_names, details[label] = measured[label]
        found = estimate(results, cfg.seed)
        reports.append({"model": name, **to_json(found)})
        columns.append(Column(label, found))
        if label == baseline or baseline not in measured:
            continue
        base, base_names, _ = measured[baseline]
        if any(base_names.get(gallery, names) != names for gallery, names in image_names.items()):
            note(f"{label} and {baseline} have different images of the gallery, so their "
                 "difference is left out")
        elif found := differences(results, base, cfg.seed):
            reports[-1]["diff"] = to_json(found)
            columns.append(Column(f"minus {baseline}", found, is_difference=True))

    if reports:
        # Printed first, so that a file that cannot be written does not cost the results. The files
        # are written even if nobody reads the output to its end, as with `| head`.
        try:
            print_table(columns)
            print(json.dumps(reports), flush=True)
        finally:
            write_files(cfg, tasks, reports, columns, details)
    if failures:
        raise UserError("; ".join(failures))


def write_files(cfg: EvalConfig, tasks: dict, reports: list[dict], columns: list[Column],
                details: dict):
    """The files that flags name. details: {label: the rows of --details}."""
    lines = map(json.dumps, itertools.chain(*details.values()))
    for path, text in ((cfg.json, json.dumps(reports, indent=1)),
                       (cfg.details, "\n".join(lines))):
        if path:
            with atomic_write(path) as file:
                file.write(f"{text}\n".encode())
    pairs = tasks.get("pairs", tasks.get("query"))
    if cfg.figure:
        from demo.figure import draw_pairs
        draw_pairs(cfg.figure, pairs.gallery.images, reports[0]["gallery"], details,
                   reports[0]["k"], open_image)
    if cfg.report:
        from demo.report import write_report
        write_report(cfg.report, [column.header for column in columns], table_of(columns), reports,
                     pairs.gallery.images, details, reports[0]["k"], open_image, cfg.report_pairs)


if __name__ == "__main__":
    run(main)
