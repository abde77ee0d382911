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
    FILE.py:NAME            a function or class of yours that returns a model: an object with
                            preprocess(image), encode_image(batch), encode_text(list of str)
    FILE.npz                precomputed features: names, images, texts, text_features
    FILE.jsonl              ranked lists of any engine: {"text", "ranking"} a line
Prints a table; the last line is the same results as JSON. All formats: docs/formats.md.
"""

import contextlib
import csv
import dataclasses
import functools
import importlib.util
import json
import math
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.nn.functional import normalize
from torch.utils.data import default_collate
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor, logging

import data
from data import UserError, fix_surrogates, flag
from paraclip import load_model


@dataclass
class EvalConfig:
    models: list[str] = flag([], "what to evaluate (default: runs/emoji-align)", positional=True)
    # What is measured. With none of these, the benchmark.
    pairs: list[str] = flag([], "JSON or JSON lines with query, paraphrase and optionally image(s)")
    query: list[str] = flag([], "a query of your own, in place of --pairs")
    paraphrase: list[str] = flag([], "its paraphrase")
    captions: str = flag("", "COCO captions JSON: recall in both directions")
    triplets: list[str] = flag([], "SugarCrepe++ files; with --images also their image part")
    sts: str = flag("", "CSV or TSV with sentence1, sentence2, score")
    zeroshot: str = flag("", "a folder per class, cifar10:ROOT, cifar100:ROOT, imagenet:ROOT, or a "
                             "JSON file of classnames and labels of --images")
    benchmark: str = flag("emoji", "its name in $PARACLIP_DATA, or its path")
    split: str = flag("test", "val is for choices, test for reports", choices=("test", "val"))
    # How it is measured.
    images: str = flag("", "folder of images or shards to search in")
    classnames: str = flag("", "class names, one per line, in the order of the sorted folders")
    templates: str = flag("", "prompts, one per line, with {} for the class name")
    k: int = flag(10, "length of the compared lists", at_least=1)
    seed: int = flag(0, "seed of the bootstrap and of the unrelated pairs", at_least=0)
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where the towers run")
    precision: str = flag("fp32", "of the towers", choices=("fp32", "bf16"))
    batch_size: int = flag(64, "images or texts at once", at_least=1)
    workers: int = flag(min(8, data.usable_cores()), "processes that decode images", at_least=0)
    # What is written.
    labels: list[str] = flag([], "names of the models in tables and figures")
    markdown: bool = flag(False, "print the table as Markdown")
    json: str = flag("", "file for the JSON that ends the output")
    details: str = flag("", "JSON lines file: lists and scores of each pair and model")
    figure: str = flag("", "PNG of the images that one pair finds")
    summary: str = flag("", "PNG of AO as bars, by kind and model")


def check_flags(cfg: EvalConfig):
    """Raises UserError for flags that contradict each other or would have no effect."""
    data.check_ranges(cfg)
    given = [task.flag for task in TASKS if getattr(cfg, task.flag)]
    measures_pairs = bool(cfg.pairs or cfg.query or not given)
    if bool(cfg.query) != bool(cfg.paraphrase):
        raise UserError("--query and --paraphrase belong together")
    if cfg.query and not ("".join(cfg.query).strip() and "".join(cfg.paraphrase).strip()):
        raise UserError("--query and --paraphrase must not be empty")
    if cfg.query and cfg.pairs:
        raise UserError("give --query and --paraphrase, or --pairs, not both")
    for task in TASKS:
        if task.flag in given and task.needs_images and not cfg.images:
            raise UserError(f"--{task.flag} needs --images DIR to search in")
    searching = [task.flag for task in TASKS if task.gallery == "images"]
    if cfg.images and not set(given) & set(searching) and not cfg.zeroshot.endswith(".json"):
        raise UserError(f"--images needs what to search for: one of --{', --'.join(searching)}")
    if (cfg.classnames or cfg.templates) and not cfg.zeroshot:
        raise UserError("--classnames and --templates belong to --zeroshot")
    if given and (cfg.benchmark != "emoji" or cfg.split != "test"):
        raise UserError(f"--benchmark and --split have no effect beside --{given[0]}: a benchmark "
                        "is measured alone")
    if not measures_pairs:
        for name in ("details", "figure", "summary"):
            if getattr(cfg, name):
                raise UserError(f"--{name} shows pairs: give --pairs, or --query and --paraphrase")
        if cfg.k != 10:
            raise UserError("--k is the length of the lists of --pairs, which is not given")

    outputs = [path for path in (cfg.json, cfg.details, cfg.figure, cfg.summary) if path]
    inputs = [*cfg.models, *cfg.pairs, *cfg.triplets, cfg.captions, cfg.sts]
    for path in outputs:
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"{path} cannot be written: it is not a regular file")
        if not Path(path).absolute().parent.is_dir():
            raise UserError(f"{path} cannot be written: its folder does not exist")
        if outputs.count(path) > 1 or path in inputs:
            raise UserError(f"{path} cannot be written: another flag names the same file")
    for path in (cfg.figure, cfg.summary):
        if path and not path.lower().endswith(".png"):
            raise UserError(f"{path}: figures are PNG files, expected a name that ends in .png")
    try:
        torch.zeros(1, device=cfg.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {cfg.device}: {str(error).splitlines()[0]}") from None


# ---- metrics -------------------------------------------------------------------------------------
# Q queries, N gallery images, E feature size, k list length. A metric returns one value per query;
# the number to report is their mean, with the interval of bootstrap_ci.
def average_overlap(a, b, k: int | None = None) -> np.ndarray:
    """AO@k of ranked lists: the overlap of their first d items, averaged over all depths d.

    AO@k = (1/k) sum over d = 1..k of |a[:d] and b[:d]| / d, in [0, 1]: early ranks weigh most.
    a, b: (..., K) items, best first, none twice, K >= k (default K); rankings() has broken ties.
    Returns (...) float64; ValueError if a list is too short.
    Example: [1, 2, 3, 4] and [2, 1, 3, 5] overlap by 0/1, 2/2, 3/3, 3/4, so AO@4 = 0.6875.
    """
    a, b, shape = first_items(a, b, k)
    k = a.shape[1]
    overlaps = []
    # (chunk, k, k) at a time
    chunk = 2**22 // k**2 + 1
    for start in range(0, len(a), chunk):
        same = a[start:start + chunk, :, None] == b[start:start + chunk, None, :]
        # How many items a[:i] and b[:j] share, for all i and j. Where i = j = d, it is the overlap.
        shared = same.cumsum(axis=1).cumsum(axis=2)
        overlaps.append(np.diagonal(shared, axis1=1, axis2=2) / np.arange(1, k + 1))
    return np.concatenate(overlaps).mean(axis=1).reshape(shape)


def jaccard(a, b, k: int | None = None) -> np.ndarray:
    """JS@k of lists as above: |a[:k] and b[:k]| / |a[:k] or b[:k]|, in [0, 1]; order is ignored.

    Example: [1, 2, 3, 4] and [2, 1, 3, 5] share 3 of 5 items, so JS@4 = 0.6.
    """
    a, b, shape = first_items(a, b, k)
    values = []
    for list_a, list_b in zip(a.tolist(), b.tolist()):
        values.append(len(set(list_a) & set(list_b)) / len(set(list_a) | set(list_b)))
    return np.reshape(values, shape)


def first_items(a, b, k: int | None) -> tuple[np.ndarray, np.ndarray, tuple]:
    """The first k items of lists (..., K) as two arrays (Q, k), and the shape (...)."""
    a, b = np.asarray(a), np.asarray(b)
    if k is None:
        k = a.shape[-1]
    if not 1 <= k <= min(a.shape[-1], b.shape[-1]):
        raise ValueError(f"lists of {a.shape[-1]} and {b.shape[-1]} items, but k = {k}")
    a, b = np.broadcast_arrays(a[..., :k], b[..., :k])
    return a.reshape(-1, k), b.reshape(-1, k), a.shape[:-1]


STEP = 2.0**-24  # similarities are multiples of this, the spacing of fp32 just below 1


def unit_features(features) -> torch.Tensor:
    """Features (N, E), L2-normalised and rounded to multiples of STEP, as fp64 on the CPU.

    Products of such numbers are multiples of 2^-48, and sums of them up to 1 fit into fp64's 53
    bits. So dot products are exact: images with equal features tie, wherever they stand.
    """
    features = torch.as_tensor(features, dtype=torch.float64, device="cpu")
    return normalize(features, dim=-1).div_(STEP).round_().mul_(STEP)


def rankings(query_features, gallery_features, k: int, chunk: int = 128) -> torch.Tensor:
    """The k most similar gallery images of every query, best first.

    Cosine similarity in fp64, rounded to STEP; ties go to the lower gallery index. At most
    chunk x N similarities exist at a time.
    query_features (Q, E), gallery_features (N, E). Returns (Q, min(k, N)) int64 indices.
    Example: query (1, 0) and gallery (0, 1), (1, 0), (2, 0) with k = 2 give [1, 2].
    """
    queries, gallery = unit_features(query_features), unit_features(gallery_features)
    n = len(gallery)
    # Breaks ties: a penalty that grows with the index, and is smaller than the smallest difference
    # of two similarities, STEP.
    penalty = torch.arange(n, dtype=torch.float64) * (STEP / n)
    ranked = []
    for part in queries.split(chunk):
        scores = (part @ gallery.T).div_(STEP).round_().mul_(STEP)
        ranked.append(scores.sub_(penalty).topk(min(k, n)).indices)
    return torch.cat(ranked)


def similarity(a, b) -> np.ndarray:
    """Cosine of two feature matrices (N, E), row by row, rounded as in rankings: (N,) float64."""
    cosine = (unit_features(a) * unit_features(b)).sum(-1)
    return (cosine.div_(STEP).round_().mul_(STEP)).numpy()


def recall_at_k(ranked, correct, k: int) -> np.ndarray:
    """Recall@k in CLIP's convention: 1 if any correct item is among the first k, else 0.

    ranked: (Q, K) indices, best first; correct: for each query the indices of its correct items.
    (Textbook recall is the share of the correct items that is found.) Returns (Q,) float64.
    Example: ranked [[3, 1], [0, 2]], correct [{1}, {1, 2}]: recall@1 = [0, 0], recall@2 = [1, 1].
    """
    return (precision_at_k(ranked, correct, k) > 0).astype(float)


def precision_at_k(ranked, correct, k: int) -> np.ndarray:
    """Precision@k: the share of the first k items that is correct, in [0, 1]; see above.

    Example: ranked [[3, 1], [0, 2]], correct [{1}, {0, 2}]: precision@2 = [0.5, 1].
    """
    values = []
    for items, correct_items in zip(np.asarray(ranked)[:, :k].tolist(), correct, strict=True):
        values.append(len(set(items) & set(correct_items)) / len(items))
    return np.array(values)


def spearman(a, b) -> float:
    """Spearman's rank correlation of two sequences, in [-1, 1]; equal values share a mean rank.

    NaN if all values of one sequence are equal. Example: [1, 2, 2] and [4, 5, 6] give 0.866.
    """
    def mean_ranks(values):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        last_rank = np.cumsum(counts)
        return (last_rank - (counts - 1) / 2)[inverse]

    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(mean_ranks(a), mean_ranks(b))[0, 1])


def bootstrap_ci(values, groups=None, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval (Efron 1979) of the mean of values (N,), one per query.

    groups (N,): queries of the same group, such as several of one image, are not independent.
    2000 times as many groups as there are get drawn with replacement, each with all its values
    (the cluster bootstrap of Davison and Hinkley 1997, 3.8). Without groups each value is drawn by
    itself. Applied to the differences of two models on the same queries, it is the paired
    bootstrap. Example: [0, 1] gives (0, 1).
    """
    values = np.asarray(values, dtype=float)
    # The mean of equal values may be rounded.
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    if groups is None:
        groups = np.arange(len(values))
    _, group = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(group, weights=values), np.bincount(group)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(100):  # 20 resamples at a time
        drawn = rng.integers(len(sums), size=(20, len(sums)))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


# ---- models --------------------------------------------------------------------------------------
# A model has preprocess(Pillow image), encode_image(batch of those), encode_text(list of str).
@contextlib.contextmanager
def hugging_face_errors(name: str):
    """Makes one line of whatever transformers raises for a broken folder or without a network."""
    # Otherwise it prints pages of warnings.
    logging.set_verbosity_error()
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{name}: neither a checkpoint, nor a run folder with model.pt, nor a "
                        f"suitable Hugging Face model ({type(error).__name__}: {reason})") from None


class HuggingFaceCLIP(torch.nn.Module):
    """Any model of transformers with an image and a text tower: CLIP, SigLIP, ALIGN."""

    def __init__(self, name: str, precision: str):
        super().__init__()
        self.bf16 = precision == "bf16"
        with hugging_face_errors(name):
            # If trust_remote_code were unset, transformers would ask whether to run foreign code.
            self.model, loading = AutoModel.from_pretrained(
                name, output_loading_info=True, trust_remote_code=False)
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
            self.encoders = (self.model.get_image_features, self.model.get_text_features)
            # Unlike a bound method, a partial reaches loader workers without the model.
            self.preprocess = functools.partial(processor.image_processor, return_tensors="pt")
            self.tokenizer = processor.tokenizer
            config = getattr(self.model.config, "text_config", self.model.config)
            self.max_length = min(self.tokenizer.model_max_length, config.max_position_embeddings)
            # Missing weights would be random numbers.
            if loading["missing_keys"]:
                raise ValueError(f"weights are missing, such as {min(loading['missing_keys'])}")
            # A tokenizer without its files may load with a handful of tokens, all words alike.
            if not 0.5 <= len(self.tokenizer) / config.vocab_size <= 1.01:
                raise ValueError(f"tokenizer of {len(self.tokenizer)} tokens for a text tower of "
                                 f"{config.vocab_size}")
        # Some checkpoints are stored in fp16.
        self.model.float()
        self.is_siglip = config.model_type.startswith("siglip")

    def encode_image(self, batch):
        # Each image was preprocessed as a batch of one: (B, 1, 3, H, W).
        return self.features(0, {name: tensor.flatten(0, 1) for name, tensor in batch.items()})

    def encode_text(self, texts):
        padding = {"padding": True}
        if self.is_siglip:
            # SigLIP was trained on texts padded to full length, unmasked, SigLIP 2 on lower case.
            texts = [text.lower() for text in texts]
            padding = {"padding": "max_length", "return_attention_mask": False}
        return self.features(1, self.tokenizer(
            texts, truncation=True, max_length=self.max_length, return_tensors="pt", **padding))

    def features(self, tower, inputs):
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        with torch.autocast(self.model.device.type, torch.bfloat16, self.bf16):
            output = self.encoders[tower](**inputs)
        # transformers 4 returns the features themselves, 5 an object that holds them.
        return normalize(getattr(output, "pooler_output", output).float(), dim=-1)


class Vectors:
    """Precomputed features in place of a model: FILE.npz.

    names (N,) and images (N, E): image names and features; texts (T,) and text_features (T, E).
    """

    def __init__(self, path: str):
        self.path = path
        expected = ("arrays names (N,) and texts (T,) of type str, images (N, E) and text_features "
                    "(T, E) of type float")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        except OSError:
            raise
        except Exception as error:
            # A damaged archive raises anything.
            raise UserError(f"{path}: expected {expected} ({error})") from None
        for name, kind, ndim in (("names", "U", 1), ("images", "f", 2), ("texts", "U", 1),
                                 ("text_features", "f", 2)):
            require(name in arrays, path, f"{expected}; {name} is missing")
            array = arrays[name]
            require(array.dtype.kind == kind and array.ndim == ndim, path,
                    f"{expected}; {name} is {array.dtype} {array.shape}")
        shapes = {name: array.shape for name, array in arrays.items()}
        require(shapes["names"][0] == shapes["images"][0]
                and shapes["texts"][0] == shapes["text_features"][0]
                and shapes["images"][1] == shapes["text_features"][1], path,
                f"{expected}; they are {shapes}")
        self.image_rows = rows_by_name(arrays["names"].tolist())
        self.text_rows = {text: row for row, text in enumerate(arrays["texts"].tolist())}
        self.image_features = torch.from_numpy(arrays["images"])
        self.text_features = torch.from_numpy(arrays["text_features"])

    def encode_text(self, texts):
        return self.text_features[self.look_up(texts, self.text_rows, "texts")]

    def encode_image(self, names):
        return self.image_features[self.look_up(names, self.image_rows, "images")]

    def look_up(self, keys, rows, what):
        unknown = [key for key in keys if key not in rows]
        if unknown:
            raise UserError(f"{self.path}: no vectors for {len(unknown)} of {len(keys)} {what}, "
                            f"such as {unknown[0]!r}")
        return [rows[key] for key in keys]


class RankedLists:
    """The lists that a search engine returns, in place of a model: FILE.jsonl, see read_lists."""

    def __init__(self, path: str):
        self.path, self.lists = path, read_lists(path)

    def search(self, texts: list[str], images, k: int, depth: int) -> np.ndarray:
        """(Q, K) rows of images, k <= K <= depth, where K is the length of the shortest list."""
        missing = sorted({text for text in texts if text not in self.lists})
        if missing:
            raise UserError(f"{self.path}: no list for {len(missing)} of {len(set(texts))} texts, "
                            f"such as {missing[0]!r}")
        shortest = min(texts, key=lambda text: len(self.lists[text]))
        length = len(self.lists[shortest])
        if length < k:
            raise UserError(f"{self.path}: the list of {shortest!r} has {length} images, fewer "
                            f"than {k}: write longer lists, or lower --k")
        ranked = []
        for text in texts:
            names = self.lists[text][:min(length, depth)]
            for name in names:
                if name not in images.rows:
                    raise UserError(f"{self.path}: the list of {text!r} names {name!r}, which is "
                                    f"not among the gallery's {len(images.names)} images")
            rows = [images.rows[name] for name in names]
            if len(set(rows)) < len(rows):
                raise UserError(f"{self.path}: the list of {text!r} names an image twice")
            ranked.append(rows)
        return np.array(ranked)


def open_model(name: str, cfg: EvalConfig):
    """The model, vectors or lists that a command-line argument names."""
    if name.endswith(".jsonl"):
        return RankedLists(name)
    if name.endswith(".npz"):
        return Vectors(name)
    if name.endswith(".py"):
        raise UserError(f"{name}: give the function or class that returns the model: {name}:NAME")
    if ".py:" in name:
        model = model_from_file(name)
    elif is_checkpoint(name):
        model = load_model(name, cfg.device, cfg.precision)
    else:
        model = HuggingFaceCLIP(name, cfg.precision).to(cfg.device).eval()
    check_model(name, model)
    return model


def is_checkpoint(name: str) -> bool:
    return Path(name).is_file() or Path(name, "model.pt").is_file()


def model_from_file(name: str):
    """Calls the function or class NAME of FILE.py, which returns a model."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    # Where loader workers are started afresh they look for what they unpickle here.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise UserError(f"{path} has no function or class {function!r}")
    return getattr(module, function)()


@torch.inference_mode()
def check_model(name: str, model):
    """Encodes two images and three texts. Raises UserError if the features do not fit."""
    for method in ("preprocess", "encode_image", "encode_text"):
        if not callable(getattr(model, method, None)):
            raise UserError(f"{name}: the model has no {method}(); expected an object with "
                            "preprocess(image), encode_image(batch), encode_text(list of str)")
    images = [model.preprocess(Image.new("RGB", size, "gray")) for size in ((64, 48), (40, 56))]
    try:
        batch = default_collate(images)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{name}: preprocess(image) must return a tensor, or a dict of tensors, of "
                        f"the same shape for every image ({str(error).splitlines()[0]})") from None
    image_shape = list(torch.as_tensor(model.encode_image(batch)).shape)
    text_shape = list(torch.as_tensor(model.encode_text(["a dog", "two", "a red car"])).shape)
    if len(image_shape) != 2 or len(text_shape) != 2 or image_shape[1] != text_shape[1] \
            or (image_shape[0], text_shape[0]) != (2, 3):
        raise UserError(f"{name}: encode_image of 2 images gave shape {image_shape}, encode_text "
                        f"of 3 texts {text_shape}; expected [2, E] and [3, E] with the same E")


@torch.inference_mode()
def encode(encoder, batch) -> torch.Tensor:
    """Features (B, E) of a batch, on the CPU, where rankings are made."""
    features = torch.as_tensor(encoder(batch)).float().cpu()
    if features.ndim != 2 or not features.isfinite().all():
        raise UserError("the model does not return a vector of finite numbers for each input")
    return features


def embed_texts(model, texts: list[str], cfg: EvalConfig) -> torch.Tensor:
    """Features (len(texts), E). Equal texts are encoded once and get the same feature."""
    if isinstance(model, Vectors):
        return encode(model.encode_text, texts)
    # Texts of similar length together need little padding.
    unique = sorted(set(texts), key=lambda text: (len(text), text))
    features = []
    for start in tqdm(range(0, len(unique), cfg.batch_size), "texts", leave=False, disable=None):
        features.append(encode(model.encode_text, unique[start:start + cfg.batch_size]))
    features = torch.cat(features)
    row = {text: i for i, text in enumerate(unique)}
    return features[[row[text] for text in texts]]


@dataclass
class Images:
    """The readable images of a gallery, in its order, which is that of ties."""
    names: list[str]
    rows: dict[str, int]  # by name, or by file name alone
    features: torch.Tensor | None  # (N, E); None for ranked lists


def embed_images(model, gallery: dict, cfg: EvalConfig) -> Images:
    names = list(gallery)
    if isinstance(model, RankedLists):
        return Images(names, rows_by_name(names), None)
    if isinstance(model, Vectors):
        return Images(names, rows_by_name(names), encode(model.encode_image, names))
    readable, features, skipped = [], [], []
    loader = data.image_loader(gallery, model.preprocess, cfg.batch_size, cfg.workers)
    for indices, batch, failed in tqdm(loader, "images", leave=False, disable=None):
        readable += indices
        skipped += failed
        if indices:
            features.append(encode(model.encode_image, batch))
    if skipped:
        reasons = "; ".join(f"{names[index]}: {reason}" for index, reason in skipped[:20])
        print(f"skipped {len(skipped)} of {len(names)} images: {reasons}", file=sys.stderr)
    if not readable:
        raise UserError(f"none of the {len(names)} images can be read, such as {names[0]}: "
                        f"{skipped[0][1]}")
    # A file name that two images share stays ambiguous even if one of them cannot be read.
    row = {names[index]: row for row, index in enumerate(readable)}
    rows = {name: row[names[i]] for name, i in rows_by_name(names).items() if names[i] in row}
    return Images(list(row), rows, torch.cat(features))


def rows_by_name(names: list[str]) -> dict[str, int]:
    """{name: row}; an image in a subfolder also by its file name, unless two images share that."""
    file_names = [name.rpartition("/")[2] for name in names]
    uses = Counter(file_names)
    rows = {}
    for row, file_name in enumerate(file_names):
        if uses[file_name] == 1:
            rows[file_name] = row
    for row, name in enumerate(names):
        rows[name] = row
    return rows


# ---- readers of evaluation files -----------------------------------------------------------------
# Each returns what is in a file, or raises UserError with the file, the place and what it expected.
def read_text(path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected text in UTF-8 ({error})") from None


def parse_json(text: str, place: str, expected: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: expected {expected} ({error})") from None


def require(condition: bool, place: str, expected: str):
    if not condition:
        raise UserError(f"{place}: expected {expected}")


def is_text(value) -> bool:
    return isinstance(value, str) and value.strip() != ""


def is_list_of_texts(value) -> bool:
    return isinstance(value, list) and all(is_text(item) for item in value)


def read_records(path, expected: str) -> list[tuple[str, dict]]:
    """[(place, object)] of a JSON array or of JSON lines."""
    text = read_text(path)
    records = []
    if text.lstrip().startswith("["):
        for number, record in enumerate(parse_json(text, path, expected), 1):
            records.append((f"{path}, item {number}", record))
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                place = f"{path}, line {number}"
                records.append((place, parse_json(line, place, expected)))
    for place, record in records:
        require(isinstance(record, dict), place, expected)
    require(len(records) > 0, path, f"{expected}, but it is empty")
    return records


def read_image_names(record: dict, place: str) -> list[str]:
    """The correct images of a pair or triplet: "images", else "image", else "filename"."""
    name = record.get("image") or record.get("filename")
    names = record.get("images", [name] if name else [])
    require(is_list_of_texts(names), place, "image to be a name, images a list of names")
    return [fix_surrogates(name) for name in names]


def read_pairs(path) -> list[dict]:
    """[{query, paraphrase, images, kind, group}] of a pairs file, or of a SugarCrepe++ file.

    kind is "" and group None where the file has none.
    """
    expected = "JSON (lines) with query and paraphrase (SugarCrepe++: caption and caption2)"
    pairs = []
    for place, record in read_records(path, expected):
        query = record.get("query", record.get("caption"))
        paraphrase = record.get("paraphrase", record.get("caption2"))
        kind, group = record.get("kind", ""), record.get("group")
        require(is_text(query) and is_text(paraphrase), place, expected)
        require(isinstance(kind, str), place, "kind to be a text")
        require(group is None or isinstance(group, (str, int)), place, "group to be text or number")
        pairs.append({"query": fix_surrogates(query), "paraphrase": fix_surrogates(paraphrase),
                      "images": read_image_names(record, place), "kind": fix_surrogates(kind),
                      "group": group})
    return pairs


def read_triplets(path) -> list[dict]:
    """[{caption, caption2, negative_caption, images}] of a SugarCrepe++ file."""
    expected = "SugarCrepe++ JSON with caption, caption2 and negative_caption"
    triplets = []
    for place, record in read_records(path, expected):
        triplet = {"images": read_image_names(record, place)}
        for field in ("caption", "caption2", "negative_caption"):
            require(is_text(record.get(field)), place, expected)
            triplet[field] = fix_surrogates(record[field])
        triplets.append(triplet)
    return triplets


def read_lists(path) -> dict[str, list[str]]:
    """{text: [image names, best first]} of ranked lists.

    A line is {"text", "ranking"}, or what --details writes: {"query", "query_ranking",
    "paraphrase", "paraphrase_ranking"}.
    """
    expected = 'JSON lines of {"text": ..., "ranking": [image names, best first]}'
    lists = {}
    for place, record in read_records(path, expected):
        if "text" in record:
            entries = [(record["text"], record.get("ranking"))]
        else:
            entries = [(record.get("query"), record.get("query_ranking")),
                       (record.get("paraphrase"), record.get("paraphrase_ranking"))]
        for text, ranking in entries:
            require(is_text(text) and is_list_of_texts(ranking), place, expected)
            text = fix_surrogates(text)
            if text in lists and lists[text] != ranking:
                raise UserError(f"{place}: {text!r} has another list further up; if the file holds "
                                "several models, keep the lines of one")
            lists[text] = ranking
    return lists


def read_captions(path) -> dict[str, list[str]]:
    """{file name: [captions]} of a COCO captions file, without images that have none."""
    expected = "COCO JSON with images [{id, file_name}] and annotations [{image_id, caption}]"
    coco = parse_json(read_text(path), path, expected)
    require(isinstance(coco, dict), path, expected)

    def id_text_pairs(field, id_key, text_key):
        require(isinstance(coco.get(field), list), path, expected)
        for number, record in enumerate(coco[field], 1):
            place = f"{path}, item {number} of {field}"
            require(isinstance(record, dict) and isinstance(record.get(id_key), (int, str))
                    and is_text(record.get(text_key)), place, expected)
            yield place, record[id_key], fix_surrogates(record[text_key])

    names, captions = {}, {}
    for _, image_id, name in id_text_pairs("images", "id", "file_name"):
        names[image_id] = name
    for place, image_id, caption in id_text_pairs("annotations", "image_id", "caption"):
        require(image_id in names, place, f"an image with id {image_id}")
        captions.setdefault(names[image_id], []).append(caption)
    require(len(captions) > 0, path, f"{expected}, but it has no captions")
    return captions


def read_sts(path) -> list[tuple[str, str, float]]:
    """[(sentence1, sentence2, score)] of CSV or TSV: columns of these names, else the first."""
    expected = "sentence1, sentence2 and a finite score"
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    options = {}
    if lines and "\t" in lines[0]:
        # Tab-separated sets, such as GLUE's, hold stray quote characters that quote nothing.
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    header, columns, rows = ["sentence1", "sentence2", "score"], [0, 1, 2], []
    reader = csv.reader(lines, **options)
    try:
        for cells in reader:
            names = [cell.strip().lower() for cell in cells]
            if not rows and set(header) <= set(names):
                columns = [names.index(name) for name in header]
                continue
            require(len(cells) > max(columns), f"{path}, row {reader.line_num}", expected)
            sentence1, sentence2, score = (cells[column].strip() for column in columns)
            require(sentence1 != "" and sentence2 != "" and math.isfinite(float(score)),
                    f"{path}, row {reader.line_num}", expected)
            rows.append((fix_surrogates(sentence1), fix_surrogates(sentence2), float(score)))
    except UserError:
        raise
    # csv.Error, or ValueError of float().
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}, row {reader.line_num}: expected {expected} ({error})") from None
    require(len(rows) > 0, path, f"{expected}, but it is empty")
    return rows


def read_lines(path) -> list[str]:
    """The lines of a file that are not blank."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def read_templates(path) -> list[str]:
    """Prompts, one per line, each with {} where the class name goes."""
    templates = read_lines(path)
    require(len(templates) > 0, path, "a prompt per line, but it is empty")
    for template in templates:
        require("{}" in template, path, f"{{}} for the class name in {template!r}")
    return templates


def read_labels(path) -> tuple[list[str], dict[str, int]]:
    """(class names, {image name: class index}) of a JSON file with classnames and labels."""
    expected = 'JSON of {"classnames": [names], "labels": {image name: index of its class}}'
    record = parse_json(read_text(path), path, expected)
    require(isinstance(record, dict) and is_list_of_texts(record.get("classnames"))
            and isinstance(record.get("labels"), dict), path, expected)
    names, labels = record["classnames"], record["labels"]
    require(len(labels) > 0, path, expected)
    for name, label in labels.items():
        require(isinstance(label, int) and 0 <= label < len(names), path,
                f"an index below {len(names)} as label of {name!r}, not {label!r}")
    return [fix_surrogates(name) for name in names], labels


def read_class_folders(source: str) -> tuple[dict, list[str], dict[str, int]]:
    """(gallery, class names, {image name: class index}) of a folder with a folder per class.

    source is a folder, imagenet:ROOT (the folders of ROOT/val), or cifar10:ROOT or cifar100:ROOT
    (torchvision's test sets). Class names are torchvision's for imagenet: and cifar:, else those
    of the folders, with spaces for underscores.
    """
    kind, _, root = source.partition(":")
    if kind in ("cifar10", "cifar100"):
        try:
            dataset = getattr(torchvision.datasets, kind.upper())(root, train=False)
        except RuntimeError as error:
            raise UserError(f"{root}: no {kind.upper()} there ({error})") from None
        gallery = {f"test/{i}": pixels for i, pixels in enumerate(dataset.data)}
        labels = dict(zip(gallery, dataset.targets))
        classnames = dataset.classes
    else:
        folder = Path(root).expanduser() / "val" if kind == "imagenet" else source
        gallery, labels = {}, {}
        for name, item in data.list_gallery(folder).items():
            if "/" in name:
                gallery[name] = item
        classnames = sorted({name.split("/")[0] for name in gallery})
        index = {name: i for i, name in enumerate(classnames)}
        for name in gallery:
            labels[name] = index[name.split("/")[0]]
        # ImageNet's folders are named by their WordNet ids, whose order torchvision's names follow.
        if kind == "imagenet" and len(classnames) == 1000:
            classnames = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    if not labels:
        raise UserError(f"{source}: expected a folder of images for each class")
    return gallery, [name.replace("_", " ") for name in classnames], labels


# ---- measurements --------------------------------------------------------------------------------
class Scores(NamedTuple):
    """A metric's values, and for each value its group: intervals resample groups."""
    values: np.ndarray  # (N,) float
    groups: np.ndarray  # (N,) int


TASKS = []


def task(cls):
    """Decorator: adds a task, which is what one flag asks for."""
    TASKS.append(cls)
    return cls


class Task:
    """What a flag measures: __init__ reads its files, measure() gives numbers.

    To add one, write a class like those below and a flag of the same name in EvalConfig.
    """
    flag = ""
    needs_images = False  # must --images be given?
    needs_features = True  # or do ranked lists suffice?
    gallery = "images"  # those of --images; "zeroshot": images of its own; "": none

    def __init__(self, cfg: EvalConfig):
        raise NotImplementedError

    def image_names(self) -> list[str]:
        """The images of --images that the files name."""
        return []

    def measure(self, model, images: Images | None, cfg: EvalConfig) -> dict:
        """{name: Scores, or a count or a text}. A name is a tuple: the path of keys in the JSON."""
        raise NotImplementedError


RECALL_AT = (1, 5, 10)
TEMPLATES = ["{}", "a picture of a {}", "a photo of a {}"]


def compare_lists(first, second, k: int) -> dict[str, np.ndarray]:
    """Every metric of two lists (Q, K): add yours here, and its row title to LABELS."""
    return {
        "ao1": average_overlap(first, second, 1),
        "ao": average_overlap(first, second, k),
        "js": jaccard(first, second, k),
    }


def group_numbers(keys) -> np.ndarray:
    """0, 1, 2, ... for keys in the order in which they first occur."""
    numbers = {}
    for key in keys:
        numbers.setdefault(key, len(numbers))
    return np.array([numbers[key] for key in keys])


def group_of(pair: dict):
    """What pairs share that are not independent: their group, else correct images, else query."""
    if pair["group"] is not None:
        return ("group", pair["group"])
    return tuple(sorted(pair["images"])) or pair["query"]


def unrelated(pairs: list[dict], seed: int) -> np.ndarray:
    """For each pair the index of another one that shares no text or image with it, if possible.

    AO of a query and an unrelated paraphrase is what a model reaches without any understanding:
    one that returns the same images for every text would reach 1.
    """
    contents = [{pair["query"], pair["paraphrase"], *pair["images"]} for pair in pairs]
    order = np.random.default_rng(seed).permutation(len(pairs))
    partners = np.zeros(len(pairs), dtype=int)
    for position, i in enumerate(order):
        # The nearest one before it in this order that will do.
        for step in range(1, min(len(pairs), 50)):
            partners[i] = order[position - step]
            if contents[i].isdisjoint(contents[partners[i]]):
                break
    return partners


def retrieval(key: str, ranked, text_features, image_features, correct, groups) -> dict:
    """Recall in both directions and, where a text has several correct images, precision.

    ranked (Q, K): images found by each text; correct: rows of its correct images. Without
    features (ranked lists), only from text to image, as deep as the lists reach.
    """
    results = {}
    for k in RECALL_AT:
        if k <= ranked.shape[1] or image_features is not None:
            results[key, f"t2i@{k}"] = Scores(recall_at_k(ranked, correct, k), groups)
    if image_features is not None:
        texts_of = {}
        for text, rows in enumerate(correct):
            for row in rows:
                texts_of.setdefault(row, []).append(text)
        found_texts = rankings(image_features[list(texts_of)], text_features, max(RECALL_AT))
        for k in RECALL_AT:
            recall = recall_at_k(found_texts, texts_of.values(), k)
            results[key, f"i2t@{k}"] = Scores(recall, np.arange(len(recall)))
    if any(len(rows) > 1 for rows in correct):
        precision = Scores(precision_at_k(ranked, correct, 10), groups)
        results[key.replace("recall", "precision"), "t2i@10"] = precision
    return results


@task
class Pairs(Task):
    """Rank similarity of queries and paraphrases, and recall of their correct images.

    Reported for all pairs together, and by kind and by file where there are several. Of a
    benchmark the headline is not all pairs but one kind, that of the first pair.
    """
    flag = "pairs"
    needs_images = True
    needs_features = False

    def __init__(self, cfg: EvalConfig):
        self.pairs, self.subsets = [], {}
        for path, name in zip(cfg.pairs, short_names(cfg.pairs)):
            file_pairs = read_pairs(path)
            if len(cfg.pairs) > 1:
                start = len(self.pairs)
                self.subsets["files", name] = list(range(start, start + len(file_pairs)))
            self.pairs += file_pairs
        self.headline = ""
        self.prepare(cfg)

    def prepare(self, cfg: EvalConfig):
        kinds = {}
        for i, pair in enumerate(self.pairs):
            kinds.setdefault(pair["kind"], []).append(i)
        self.chosen = list(range(len(self.pairs)))
        if any(kinds):
            for kind in sorted(kinds):
                self.subsets["kinds", kind] = kinds[kind]
            if cfg.benchmark:
                self.headline = self.pairs[0]["kind"]
                self.chosen = kinds[self.headline]
        if len(cfg.pairs) > 1:
            # A pair that stands in several files counts once in the whole.
            first = {}
            for i, pair in enumerate(self.pairs):
                first.setdefault((pair["query"], pair["paraphrase"], *pair["images"]), i)
            self.chosen = list(first.values())
        self.groups = group_numbers([group_of(pair) for pair in self.pairs])
        # Beside --captions, "recall" is that of the captions.
        self.query_key = "query_recall" if cfg.captions else "recall"

    def image_names(self):
        return [name for pair in self.pairs for name in pair["images"]]

    def measure(self, model, images, cfg):
        self.k = min(cfg.k, len(images.names))
        queries = [pair["query"] for pair in self.pairs]
        paraphrases = [pair["paraphrase"] for pair in self.pairs]
        depth = min(max(cfg.k, *RECALL_AT), len(images.names))
        if isinstance(model, RankedLists):
            ranked = model.search(queries + paraphrases, images, self.k, depth)
            features = None
        else:
            features = embed_texts(model, queries + paraphrases, cfg)
            ranked = rankings(features, images.features, depth).numpy()
            features = features.view(2, len(self.pairs), -1)
        ranked = ranked.reshape(2, len(self.pairs), -1)
        self.correct = []
        for pair in self.pairs:
            rows = [images.rows[name] for name in pair["images"] if name in images.rows]
            self.correct.append(rows)
        self.details = self.describe(ranked, images)

        results = {}
        if cfg.benchmark:
            results["split",] = cfg.split
        if self.headline:
            results["headline",] = self.headline
        results["k",], results["gallery",] = self.k, len(images.names)
        results |= self.measure_subset(self.chosen, ranked, features, images, cfg)
        for prefix, chosen in self.subsets.items():
            part = self.measure_subset(chosen, ranked, features, images, cfg)
            results |= {prefix + name: value for name, value in part.items()}
        return results

    def measure_subset(self, chosen, ranked, features, images, cfg):
        """The results of the pairs of these indices. ranked (2, P, K), features (2, P, E)."""
        first, second = ranked[:, chosen]
        groups = self.groups[chosen]
        results = {("pairs",): len(chosen)}
        values = compare_lists(first, second, self.k)
        for name, value in values.items():
            results[name,] = Scores(value, groups)
        if len(chosen) > 1:
            partners = unrelated([self.pairs[i] for i in chosen], cfg.seed)
            chance = compare_lists(first, second[partners], self.k)
            for name, value in chance.items():
                results[f"{name}_random",] = Scores(value, groups)
            results["ao_minus_random",] = Scores(values["ao"] - chance["ao"], groups)
        if not any(self.pairs[i]["images"] for i in chosen):
            return results
        known = [i for i in chosen if self.correct[i]]
        results["recall_pairs",] = len(known)
        if known:
            correct = [self.correct[i] for i in known]
            for side, key in enumerate((self.query_key, "paraphrase_recall")):
                text_features = None if features is None else features[side, known]
                results |= retrieval(key, ranked[side, known], text_features, images.features,
                                     correct, self.groups[known])
        return results

    def describe(self, ranked, images) -> list[dict]:
        """What --details writes of each pair, and figures show."""
        ao = average_overlap(ranked[0], ranked[1], self.k).tolist()
        js = jaccard(ranked[0], ranked[1], self.k).tolist()
        details = []
        for i, pair in enumerate(self.pairs):
            details.append({
                "query": pair["query"], "paraphrase": pair["paraphrase"], "kind": pair["kind"],
                "ao": ao[i], "js": js[i],
                "query_ranking": [images.names[row] for row in ranked[0, i]],
                "paraphrase_ranking": [images.names[row] for row in ranked[1, i]],
                "images": [images.names[row] for row in self.correct[i]]})
        return details


@task
class Query(Pairs):
    """The one pair of --query and --paraphrase."""
    flag = "query"

    def __init__(self, cfg: EvalConfig):
        self.pairs = [{"query": " ".join(cfg.query), "paraphrase": " ".join(cfg.paraphrase),
                       "images": [], "kind": "", "group": None}]
        self.subsets, self.headline = {}, ""
        self.prepare(cfg)


@task
class Captions(Task):
    """Recall of captions among the images that have any."""
    flag = "captions"
    needs_images = True

    def __init__(self, cfg: EvalConfig):
        self.path, self.captions = cfg.captions, read_captions(cfg.captions)

    def image_names(self):
        return list(self.captions)

    def measure(self, model, images, cfg):
        known = sorted((images.rows[name], name) for name in self.captions if name in images.rows)
        if not known:
            raise UserError(f"{self.path}: none of its images is there and readable")
        texts, image_of_text = [], []
        for i, (row, name) in enumerate(known):
            texts += self.captions[name]
            image_of_text += [i] * len(self.captions[name])
        text_features = embed_texts(model, texts, cfg)
        image_features = images.features[[row for row, name in known]]
        ranked = rankings(text_features, image_features, max(RECALL_AT)).numpy()
        return {
            ("captions", "images"): len(known),
            ("captions", "missing"): len(self.captions) - len(known),
            ("captions", "captions"): len(texts),
            **retrieval("recall", ranked, text_features, image_features,
                        [[i] for i in image_of_text], np.array(image_of_text)),
        }


@task
class Triplets(Task):
    """SugarCrepe++: are two captions, and their image, closer to each other than to a negative?

    text_only: sim(P1, P2) > sim(P1, N) and sim(P1, P2) > sim(P2, N)
    image_text: sim(I, P1) > sim(I, N) and sim(I, P2) > sim(I, N); a tie is a miss.
    """
    flag = "triplets"

    def __init__(self, cfg: EvalConfig):
        self.files = {}
        for path, name in zip(cfg.triplets, short_names(cfg.triplets)):
            self.files[name] = read_triplets(path)

    def image_names(self):
        return [name for file in self.files.values() for triplet in file
                for name in triplet["images"]]

    def measure(self, model, images, cfg):
        results = {}
        for file, triplets in self.files.items():
            texts = [triplet["caption"] for triplet in triplets]
            texts += [triplet["caption2"] for triplet in triplets]
            texts += [triplet["negative_caption"] for triplet in triplets]
            p1, p2, negative = embed_texts(model, texts, cfg).chunk(3)
            p1_p2 = similarity(p1, p2)
            text_only = (p1_p2 > similarity(p1, negative)) & (p1_p2 > similarity(p2, negative))
            groups = group_numbers([tuple(triplet["images"]) or triplet["caption"]
                                    for triplet in triplets])
            results["triplets", file, "n"] = len(triplets)
            results["triplets", file, "text_only"] = Scores(text_only.astype(float), groups)
            known, rows = [], []
            for i, triplet in enumerate(triplets):
                there = [name for name in triplet["images"] if images and name in images.rows]
                if there:
                    known.append(i)
                    rows.append(images.rows[there[0]])
            if known:
                image = images.features[rows]
                image_n = similarity(image, negative[known])
                image_text = ((similarity(image, p1[known]) > image_n)
                              & (similarity(image, p2[known]) > image_n))
                results["triplets", file, "image_text_n"] = len(known)
                results["triplets", file, "image_text"] = Scores(image_text.astype(float),
                                                                 groups[known])
        return results


@task
class STS(Task):
    """Spearman's rank correlation of cosine similarity and human score."""
    flag = "sts"
    gallery = ""

    def __init__(self, cfg: EvalConfig):
        self.path, self.rows = cfg.sts, read_sts(cfg.sts)

    def measure(self, model, images, cfg):
        sentences1, sentences2, scores = zip(*self.rows)
        a, b = embed_texts(model, [*sentences1, *sentences2], cfg).chunk(2)
        correlation = spearman(similarity(a, b), scores)
        if math.isnan(correlation):
            raise UserError(f"{self.path}: equal scores or similarities have no rank correlation")
        return {("sts", "n"): len(self.rows), ("sts", "spearman"): correlation}


@task
class ZeroShot(Task):
    """Accuracy of the class whose prompts, averaged, are most similar (CLIP paper, 3.1.4)."""
    flag = "zeroshot"
    gallery = "zeroshot"

    def __init__(self, cfg: EvalConfig):
        if cfg.zeroshot.endswith(".json"):
            if not cfg.images:
                raise UserError("--zeroshot FILE.json needs --images DIR, the images it labels")
            self.classnames, self.labels = read_labels(cfg.zeroshot)
            self.names_from, self.gallery = "its JSON file", "images"
        else:
            self.items, self.classnames, self.labels = read_class_folders(cfg.zeroshot)
            is_folder = cfg.zeroshot.partition(":")[0] not in ("imagenet", "cifar10", "cifar100")
            self.names_from = "its folders" if is_folder else "torchvision"
        if cfg.classnames:
            names = read_lines(cfg.classnames)
            if len(names) != len(self.classnames):
                raise UserError(f"{cfg.classnames}: expected {len(self.classnames)} class names, "
                                f"one per line, but it has {len(names)}")
            self.classnames, self.names_from = names, cfg.classnames
        self.templates, self.templates_from = TEMPLATES, "eval_paraphrase.py"
        if cfg.templates:
            self.templates, self.templates_from = read_templates(cfg.templates), cfg.templates

    def image_names(self):
        return list(self.labels) if self.gallery == "images" else []

    def measure(self, model, images, cfg):
        known = [name for name in self.labels if name in images.rows]
        if not known:
            return {}
        prompts = []
        for name in self.classnames:
            prompts += [template.replace("{}", name) for template in self.templates]
        features = normalize(embed_texts(model, prompts, cfg), dim=-1)
        class_features = features.view(len(self.classnames), len(self.templates), -1).mean(1)
        ranked = rankings(images.features[[images.rows[name] for name in known]],
                          class_features, 5)
        correct = [[self.labels[name]] for name in known]
        groups = np.arange(len(known))
        return {
            ("zeroshot", "classes"): len(self.classnames),
            ("zeroshot", "classnames"): f"from {self.names_from}",
            ("zeroshot", "templates"): f"{len(self.templates)} from {self.templates_from}",
            ("zeroshot", "images"): len(known),
            ("zeroshot", "top1"): Scores(recall_at_k(ranked, correct, 1), groups),
            ("zeroshot", "top5"): Scores(recall_at_k(ranked, correct, 5), groups),
        }


# ---- what to measure on --------------------------------------------------------------------------
def short_names(paths: list[str]) -> list[str]:
    """The paths' file names, or the whole paths of those that share a file name."""
    names = [Path(path).name for path in paths]
    return [path if names.count(name) > 1 else name for path, name in zip(paths, names)]


def choose_benchmark(cfg: EvalConfig):
    """Sets the flags that measure a split of the benchmark, if nothing else is to be measured.

    A split is a folder of shards with pairs.jsonl, and optionally zeroshot.json and captions.json.
    """
    if any(getattr(cfg, cls.flag) for cls in TASKS):
        cfg.benchmark = ""
        return
    if cfg.benchmark == "emoji":
        from demo.emoji_scenes import emoji_folder
        folder = Path(emoji_folder(), cfg.split)
    else:
        folder = data.data_folder(cfg.benchmark) / cfg.split
    if not folder.is_dir():
        raise UserError(f"--benchmark {cfg.benchmark}: there is no folder {folder}")
    cfg.images, cfg.pairs = str(folder), [str(folder / "pairs.jsonl")]
    if (folder / "zeroshot.json").exists():
        cfg.zeroshot = str(folder / "zeroshot.json")
    if (folder / "captions.json").exists():
        cfg.captions = str(folder / "captions.json")


def read_tasks(cfg: EvalConfig) -> tuple[list[Task], dict]:
    """(tasks, {gallery: {image name: item}}). All files are read before a model is opened."""
    tasks = [cls(cfg) for cls in TASKS if getattr(cfg, cls.flag)]
    galleries = {}
    for cls in tasks:
        if cls.gallery == "zeroshot":
            galleries["zeroshot"] = cls.items
    if cfg.images:
        galleries["images"] = read_gallery(cfg, tasks)
    return tasks, galleries


def read_gallery(cfg: EvalConfig, tasks: list[Task]) -> dict:
    """The images of --images. Pairs are searched in all, other tasks in those that they name."""
    gallery = data.list_gallery(cfg.images)
    named = set()
    for each in tasks:
        named.update(each.image_names())
    if not (cfg.pairs or cfg.query):
        every, gallery = gallery, {}
        for name, item in every.items():
            if name in named or name.rpartition("/")[2] in named:
                gallery[name] = item
        if not gallery:
            raise UserError(f"{cfg.images}: none of the {len(named)} named images is there")
    missing = named - rows_by_name(list(gallery)).keys()
    if missing:
        print(f"note: {cfg.images}: {len(missing)} of {len(named)} named images are not there, "
              f"such as {min(missing)}", file=sys.stderr)
    return gallery


# ---- report --------------------------------------------------------------------------------------
class Estimate(NamedTuple):
    """The mean of a metric's values, its 95 % interval, and the independent groups behind it."""
    mean: float
    low: float
    high: float
    groups: int


def estimate(results: dict, seed: int) -> dict:
    """results, see Task.measure, with an Estimate in place of Scores."""
    estimates = {}
    for name, value in results.items():
        if isinstance(value, Scores):
            low, high = bootstrap_ci(value.values, value.groups, seed)
            groups = len(np.unique(value.groups))
            value = Estimate(float(value.values.mean()), low, high, groups)
        estimates[name] = value
    return estimates


def differences(results: dict, base: dict) -> dict:
    """Scores of the differences to another model, query by query, where both have a metric."""
    scores = {}
    for name, value in results.items():
        if isinstance(value, Scores) and name in base:
            scores[name] = Scores(value.values - base[name].values, value.groups)
    return scores


def to_json(estimates: dict) -> dict:
    """Nested dicts: ("kinds", "order", "ao") becomes kinds.order.ao, its interval ...ao_ci.

    The intervals of recall and precision stand together: ("recall", "t2i@1") in recall_ci.t2i@1.
    """
    report = {}
    for name, value in estimates.items():
        if isinstance(value, Estimate):
            *path, key = name
            put(report, name, value.mean)
            if "@" in key:
                put(report, (*path[:-1], f"{path[-1]}_ci", key), [value.low, value.high])
            else:
                put(report, (*path, f"{key}_ci"), [value.low, value.high])
        else:
            put(report, name, value)
    return report


def put(report: dict, path, value):
    """report[path[0]][path[1]]... = value."""
    for key in path[:-1]:
        report = report.setdefault(key, {})
    report[path[-1]] = value


LABELS = {
    "ao1": "same first image", "ao": "AO@{k}", "js": "JS@{k}",
    "ao1_random": "same first image, unrelated pairs", "ao_random": "AO@{k}, unrelated pairs",
    "js_random": "JS@{k}, unrelated pairs", "ao_minus_random": "AO@{k} minus unrelated",
    "recall_pairs": "pairs with an image", "zeroshot": "zero-shot", "sts": "STS", "n": "number",
    "top1": "top-1", "top5": "top-5", "text_only": "text only", "image_text": "image and text",
    "image_text_n": "number with an image", "query_recall": "query recall",
    "paraphrase_recall": "paraphrase recall", "paraphrase_precision": "paraphrase precision",
    "query_precision": "query precision", "spearman": "Spearman",
}
# What the table shows of each kind and file; the JSON has all.
SHOWN_OF_PARTS = ("pairs", "ao1", "ao", "ao_minus_random", "js", "t2i@10")
FEW = 30  # estimates from fewer independent groups are marked


class Column(NamedTuple):
    """A column of the table: a model's results, or its differences to the first model."""
    header: str
    estimates: dict
    is_difference: bool


def section_of(name: tuple) -> tuple:
    """Rows of one section stand together: the headline's, a kind's, a file's, a task's."""
    if name[0] in ("kinds", "files"):
        return name[:2]
    return name[:-1][:1]


def row_title(name: tuple, k: int) -> str:
    """("kinds", "order", "ao") -> "order: AO@10", ("recall", "t2i@1") -> "recall t2i@1"."""
    keys = [LABELS.get(key, key).replace("{k}", str(k)) for key in name]
    if name[0] in ("kinds", "files"):
        return f"{name[1] or 'no kind'}: {' '.join(keys[2:])}"
    return " ".join(keys)


def cell(value, is_difference: bool) -> str:
    """A count as it is, a mean as 100 x, followed by half its interval."""
    if value is None:
        return ""
    if isinstance(value, Estimate):
        sign = "+" if is_difference else ""
        mark = "*" if value.groups < FEW else " "
        return f"{100 * value.mean:{sign}.1f} ±{50 * (value.high - value.low):.1f}{mark}"
    if isinstance(value, float):
        return f"{100 * value:.1f}"
    return str(value)


def table_rows(columns: list[Column], k: int) -> list[tuple[str, list[str]]]:
    """[(title, a cell per column)], with an empty row between sections."""
    names = {}
    for column in columns:
        names.update(column.estimates)
    rows, section = [], None
    for name, value in names.items():
        if isinstance(value, str) or name == ("k",):
            continue
        if name[0] in ("kinds", "files") and name[-1] not in SHOWN_OF_PARTS:
            continue
        # The headline of a benchmark is one of its kinds, which need not be shown twice.
        if name[:2] == ("kinds", columns[0].estimates.get(("headline",))):
            continue
        if rows and section_of(name) != section:
            rows.append(("", [""] * len(columns)))
        section = section_of(name)
        cells = [cell(column.estimates.get(name), column.is_difference) for column in columns]
        rows.append((row_title(name, k), cells))
    return rows


def print_table(columns: list[Column], k: int, markdown: bool):
    """A row per metric, a column per model. Columns that do not fit into 100 characters follow in
    further blocks."""
    facts = []
    for name, value in columns[0].estimates.items():
        if isinstance(value, str):
            facts.append(f"{row_title(name, k)}: {value}")
    if facts:
        print("; ".join(facts))
    print("Means x100, ± half a 95 % interval. *: fewer than "
          f"{FEW} independent images, groups or queries.\n")
    rows = table_rows(columns, k)
    if markdown:
        print("| |", " | ".join(column.header for column in columns), "|")
        print("|---|" + "---:|" * len(columns))
        for title, cells in rows:
            if title:
                print(f"| {title} |", " | ".join(cells), "|")
        print()
        return
    # Long headers are wrapped, and stand at the bottom of the lines that they need.
    wrapped = [textwrap.wrap(column.header, 16) for column in columns]
    height = max(len(lines) for lines in wrapped)
    for i in range(height):
        cells = [([""] * (height - len(lines)) + lines)[i] for lines in wrapped]
        rows.insert(i, ("", cells))
    title_width = max(len(title) for title, _ in rows)
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(columns))]
    start = 0
    while start < len(columns):
        # As many columns as fit, at least one.
        end, line_width = start, title_width
        while end < len(columns) and (end == start or line_width + 2 + widths[end] <= 100):
            line_width += 2 + widths[end]
            end += 1
        for title, cells in rows:
            line = title.ljust(title_width)
            for i in range(start, end):
                line += "  " + cells[i].rjust(widths[i])
            print(line.rstrip())
        print()
        start = end


def model_labels(models: list[str], labels: list[str]) -> list[str]:
    """--labels, or for each model the last parts of its path, as many as tell it from the rest."""
    if labels:
        if len(labels) != len(models):
            raise UserError(f"--labels: {len(labels)} names for {len(models)} models")
        if len(set(labels)) != len(labels):
            raise UserError("--labels: expected a different name for each model")
        return labels
    paths = []
    for name in models:
        path = Path(name)
        if path.name == "model.pt" and len(path.parts) > 1:
            path = path.parent
        paths.append(path.parts)
    for n in range(1, 100):
        labels = ["/".join(parts[-n:]) for parts in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label} ({i})" for i, label in enumerate(labels, 1)]


# ---- main ----------------------------------------------------------------------------------------
def main(argv=None):
    """Measures every model, prints a table and JSON, then writes the files that are asked for."""
    cfg = data.parse_config(EvalConfig, argv)
    check_flags(cfg)
    models = cfg.models or ["runs/emoji-align"]
    if not cfg.models and not Path(models[0]).exists():
        raise UserError(f"no model given, and no {models[0]} yet: run `python paraclip.py` first")
    labels = model_labels(models, cfg.labels)
    # What can be known to be missing or broken is refused now, not when other models are measured.
    files = {name: open_model(name, cfg) for name in models if name.endswith((".jsonl", ".npz"))}
    for name in models:
        if name not in files and ".py:" not in name and not is_checkpoint(name):
            with hugging_face_errors(name):
                AutoConfig.from_pretrained(name, trust_remote_code=False)
    choose_benchmark(cfg)
    tasks, galleries = read_tasks(cfg)
    pairs = next((each for each in tasks if isinstance(each, Pairs)), None)
    for name in models:
        if cfg.precision != "fp32" and (name in files or ".py:" in name):
            print(f"note: {name}: --precision has no effect on it", file=sys.stderr)
    # On CUDA, convolutions would otherwise round fp32 to TF32.
    torch.backends.cudnn.allow_tf32 = False

    reports, columns, details = [], [], {}
    base, base_images = {}, {}
    for name, label in zip(models, labels):
        model = files.get(name) or open_model(name, cfg)
        images = {}
        for gallery, items in galleries.items():
            images[gallery] = embed_images(model, items, cfg)
        results, left_out = {}, []
        for each in tasks:
            if isinstance(model, RankedLists) and each.needs_features:
                left_out.append(each.flag)
            else:
                results |= each.measure(model, images.get(each.gallery), cfg)
        # The next model may need the memory.
        del model
        if left_out:
            print(f"note: {name}: left out, since ranked lists have no features: "
                  f"{', '.join(left_out)}", file=sys.stderr)
        if not results:
            raise UserError(f"{name}: nothing to measure")
        if pairs:
            details[label] = [{"model": name, **record} for record in pairs.details]
        estimates = estimate(results, cfg.seed)
        reports.append({"model": name, **to_json(estimates)})
        columns.append(Column(label, estimates, False))
        names = {gallery: part.names for gallery, part in images.items()}
        if len(reports) == 1:
            base, base_images = results, names
        elif names == base_images:
            difference = estimate(differences(results, base), cfg.seed)
            reports[-1]["diff"] = to_json(difference)
            columns.append(Column(f"minus {labels[0]}", difference, True))
        else:
            print(f"note: {name} and {models[0]} can read different images, so their difference is "
                  "left out", file=sys.stderr)

    # Printed first, so that a file that cannot be written does not cost the results.
    print_table(columns, reports[0].get("k", cfg.k), cfg.markdown)
    print(json.dumps(reports), flush=True)
    if cfg.json:
        with data.atomic_write(cfg.json) as file:
            file.write(json.dumps(reports, indent=1).encode() + b"\n")
    if cfg.details:
        with data.atomic_write(cfg.details) as file:
            for records in details.values():
                for record in records:
                    file.write(json.dumps(record).encode() + b"\n")
    if cfg.figure:
        from demo.figure import draw_pair
        headline = {}
        for label, records in details.items():
            headline[label] = [records[i] for i in pairs.chosen]
        draw_pair(cfg.figure, galleries["images"], headline, pairs.k)
    if cfg.summary:
        from demo.figure import draw_summary
        draw_summary(cfg.summary, dict(zip(labels, reports)))


if __name__ == "__main__":
    data.run(main)
