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

The file goes from metrics to models, readers of files, what is measured, report and main().
"""

import contextlib
import csv
import functools
import importlib.util
import itertools
import json
import math
import os
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
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.utils import logging as transformers_logging

from common.cli import UserError, check_ranges, flag, parse_config, run
from common.distributed import usable_cores
from common.files import atomic_write, data_folder
from data import IMAGE_TYPES, fix_surrogates, make_loader, open_image, scan_shard
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
    benchmark: str = flag("emoji", "its name in $PARACLIP_DATA, or its absolute path")
    split: str = flag("test", "val is for choices, test for reports", choices=("test", "val"))
    # How it is measured.
    images: str = flag("", "folder of images or shards to search in")
    classnames: str = flag("", "class names, one per line, in the order of the sorted folders")
    templates: str = flag("", "prompts, one per line, with {} for the class name")
    k: int = flag(10, "length of the compared lists", low=1)
    seed: int = flag(0, "seed of the bootstrap and of the unrelated pairs", low=0)
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where the towers run")
    precision: str = flag("fp32", "of the towers", choices=("fp32", "bf16"))
    batch_size: int = flag(64, "images or texts at once", low=1)
    workers: int = flag(min(8, usable_cores()), "processes that decode images", low=0)
    # What is written.
    labels: list[str] = flag([], "names of the models in tables and figures")
    markdown: bool = flag(False, "print the table as Markdown")
    json: str = flag("", "file for the JSON that ends the output")
    details: str = flag("", "JSON lines file: lists and scores of each pair and model")
    figure: str = flag("", "PNG of the images that one pair finds")
    summary: str = flag("", "PNG of AO as bars, by kind and model")


def require(condition, message: str):
    """Raises UserError, which ends the program in one line on stderr, if the condition fails."""
    if not condition:
        raise UserError(message)


def check_flags(cfg: EvalConfig):
    """Raises UserError for flags that contradict each other or would have no effect.

    A flag without effect is not harmless: whoever gives it expects other numbers than those without
    it.
    """
    check_ranges(cfg)
    given = [task.flag for task in TASKS if getattr(cfg, task.flag)]
    searching = [task.flag for task in TASKS if task.gallery == "images"]
    require(bool(cfg.query) == bool(cfg.paraphrase), "--query and --paraphrase belong together")
    require(not (cfg.query and cfg.pairs), "give --query and --paraphrase, or --pairs, not both")
    require(not cfg.images or set(given) & set(searching) or cfg.zeroshot.endswith(".json"),
            f"--images needs what to search for: one of --{', --'.join(searching)}, or --zeroshot "
            "with a JSON file")
    require(cfg.zeroshot or not (cfg.classnames or cfg.templates),
            "--classnames and --templates belong to --zeroshot")
    for name in ("pairs", "triplets"):
        paths = getattr(cfg, name)
        for path in paths:
            require(paths.count(path) == 1, f"--{name}: {path} is given twice")
    if given:
        require(cfg.benchmark == "emoji" and cfg.split == "test", "--benchmark and --split have no "
                f"effect beside --{given[0]}: a benchmark is measured alone")
    if given and not cfg.pairs and not cfg.query:
        for name in ("details", "figure", "summary"):
            require(not getattr(cfg, name), f"--{name} shows pairs: give --pairs, or --query")
        require(cfg.k == 10, "--k is the length of the lists of --pairs, which is not given")

    # Outputs are refused now rather than after an hour of measuring.
    outputs = [cfg.json, cfg.details, cfg.figure, cfg.summary]
    outputs = [path for path in outputs if path]
    inputs = [*cfg.models, *cfg.pairs, *cfg.triplets, cfg.captions, cfg.sts, cfg.zeroshot,
              cfg.classnames, cfg.templates]
    for path in outputs:
        # The finished file is moved into place, which would replace a pipe or a device.
        require(Path(path).is_file() or not Path(path).exists(),
                f"{path} cannot be written: it is not a regular file")
        require(Path(path).absolute().parent.is_dir(),
                f"{path} cannot be written: its folder does not exist")
        require(outputs.count(path) == 1 and path not in inputs,
                f"{path} cannot be written: another flag names the same file")
    for path in (cfg.figure, cfg.summary):
        require(not path or path.endswith(".png"), f"{path}: figures are .png files")
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


# Similarities are rounded to multiples of this, the spacing of fp32 just below 1.
STEP = 2.0**-24


def round_to_step(x: torch.Tensor) -> torch.Tensor:
    """x, rounded to multiples of STEP in place."""
    return x.div_(STEP).round_().mul_(STEP)


def unit_features(features) -> torch.Tensor:
    """Features (N, E), L2-normalised and rounded to multiples of STEP, as fp64 on the CPU.

    Products of such numbers are multiples of 2^-48, and sums of them up to 1 fit into fp64's 53
    bits. So dot products are exact: images with equal features tie, wherever they stand.
    """
    features = torch.as_tensor(features, dtype=torch.float64, device="cpu")
    return round_to_step(normalize(features, dim=-1))


def rankings(query_features, gallery_features, k: int, chunk: int = 128) -> torch.Tensor:
    """The k most similar gallery images of every query, best first.

    Cosine similarity in fp64, rounded to STEP; ties go to the lower gallery index. At most
    chunk x N similarities exist at a time.
    query_features (Q, E), gallery_features (N, E). Returns (Q, min(k, N)) indices, int64.
    Example: query (1, 0) and gallery (0, 1), (1, 0), (2, 0) with k = 2 give [1, 2].
    """
    queries, gallery = unit_features(query_features), unit_features(gallery_features)
    n = len(gallery)
    # torch.topk promises no order among equal values, and a stable sort of the whole gallery takes
    # far longer. So ties are broken by a penalty that grows with the index, and that is smaller
    # than STEP, the smallest difference of two similarities.
    penalty = torch.arange(n, dtype=torch.float64) * (STEP / n)
    ranked = []
    for part in queries.split(chunk):
        scores = round_to_step(part @ gallery.T) - penalty
        ranked.append(scores.topk(min(k, n)).indices)
    return torch.cat(ranked)


def similarity(a, b) -> np.ndarray:
    """Cosine of two feature matrices (N, E), row by row, rounded as in rankings: (N,) float64."""
    cosine = (unit_features(a) * unit_features(b)).sum(-1)
    return round_to_step(cosine).numpy()


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
    first = np.asarray(ranked)[:, :k].tolist()
    for items, correct_items in zip(first, correct, strict=True):
        hits = set(items) & set(correct_items)
        values.append(len(hits) / len(items))
    return np.array(values)


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

    There are 2000 resamples. Each draws, with replacement, as many groups as there are, a group
    with all its values (the cluster bootstrap of Davison and Hinkley 1997, 3.8), since queries of
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
# A model has preprocess(Pillow image), encode_image(batch of those), encode_text(list of str).
@contextlib.contextmanager
def hugging_face_errors(name: str):
    """Makes one line of whatever transformers raises for a broken folder or without a network."""
    # Otherwise it prints pages of warnings.
    transformers_logging.set_verbosity_error()
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
            for tower in ("get_image_features", "get_text_features"):
                require(hasattr(self.model, tower), f"the model has no {tower}()")
            # Unlike a bound method, a partial reaches loader workers without the model.
            self.preprocess = functools.partial(processor.image_processor, return_tensors="pt")
            self.tokenizer = processor.tokenizer
            text_config = getattr(self.model.config, "text_config", self.model.config)
            self.max_length = min(self.tokenizer.model_max_length,
                                  text_config.max_position_embeddings)
            # transformers only warns of missing weights, and fills them with random numbers.
            require(not loading["missing_keys"],
                    f"weights are missing, such as {min(loading['missing_keys'], default='')}")
            # A tokenizer without its files may load with a handful of tokens, all words alike.
            require(0.5 <= len(self.tokenizer) / text_config.vocab_size <= 1.01,
                    f"tokenizer of {len(self.tokenizer)} tokens for {text_config.vocab_size}")
        # Some checkpoints are stored in fp16.
        self.model.float()
        self.is_siglip = text_config.model_type.startswith("siglip")

    def encode_image(self, batch):
        # Each image was preprocessed as a batch of one: (B, 1, 3, H, W).
        inputs = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
        return self.features(self.model.get_image_features, inputs)

    def encode_text(self, texts):
        padding = {"padding": True}
        if self.is_siglip:
            # SigLIP (arXiv 2303.15343) was trained on texts padded to full length, unmasked, and
            # SigLIP 2 (arXiv 2502.14786) on lower case; transformers does neither by default.
            texts = [text.lower() for text in texts]
            padding = {"padding": "max_length", "return_attention_mask": False}
        inputs = self.tokenizer(texts, truncation=True, max_length=self.max_length,
                                return_tensors="pt", **padding)
        return self.features(self.model.get_text_features, inputs)

    def features(self, tower, inputs):
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        with torch.autocast(self.model.device.type, torch.bfloat16, self.bf16):
            output = tower(**inputs)
        # transformers 4 returns the features themselves, 5 an object that holds them.
        return normalize(getattr(output, "pooler_output", output).float(), dim=-1)


class Vectors:
    """Precomputed features in place of a model: FILE.npz.

    names (N,) and images (N, E): image names and features; texts (T,) and text_features (T, E).
    """

    def __init__(self, path: str):
        self.path = path
        expected = (f"{path}: expected arrays names (N,) and texts (T,) of type str, images (N, E) "
                    "and text_features (T, E) of type float")
        try:
            # Pickles would run whatever code they hold.
            with np.load(path, allow_pickle=False) as file:
                names, images = file["names"], file["images"]
                texts, text_features = file["texts"], file["text_features"]
        except OSError:
            raise
        # A damaged archive raises anything.
        except Exception as error:
            raise UserError(f"{expected} ({error})") from None
        arrays = (names, texts, images, text_features)
        require([array.dtype.kind for array in arrays] == ["U", "U", "f", "f"]
                and [array.ndim for array in arrays] == [1, 1, 2, 2]
                and len(names) == len(images) and len(texts) == len(text_features)
                and images.shape[1] == text_features.shape[1],
                f"{expected}; they are {[(str(array.dtype), array.shape) for array in arrays]}")
        require(len(names) and len(texts), f"{path}: it has no images, or no texts")
        for keys in (names, texts):
            # Which of the two features was meant cannot be known.
            unique, counts = np.unique(keys, return_counts=True)
            require(len(unique) == len(keys),
                    f"{path}: {str(unique[counts.argmax()])!r} stands there more than once")
        self.image_rows = rows_by_name(names.tolist())
        self.text_rows = {text: row for row, text in enumerate(texts.tolist())}
        self.image_features = torch.from_numpy(images)
        self.text_features = torch.from_numpy(text_features)

    def encode_text(self, texts):
        return self.text_features[self.look_up(texts, self.text_rows, "texts")]

    def encode_image(self, names):
        return self.image_features[self.look_up(names, self.image_rows, "images")]

    def look_up(self, keys, rows, what):
        missing = [key for key in keys if key not in rows]
        require(not missing, f"{self.path}: no vectors for {len(missing)} of {len(keys)} {what}, "
                             f"such as {missing[:1]}")
        return [rows[key] for key in keys]


class RankedLists:
    """The lists that a search engine returns, in place of a model: FILE.jsonl, see read_lists."""

    def __init__(self, path: str):
        self.path, self.lists = path, read_lists(path)

    def search(self, texts: list[str], images, k: int, depth: int) -> np.ndarray:
        """(Q, K) rows of images; K is the length of the shortest list, or depth if that is less.

        Raises UserError if K < k, or if a list does not fit the texts and the gallery.
        """
        # A text without a list, or a name that is not in the gallery, must not count as a miss:
        # the engine would get a score for another question than the models.
        missing = [text for text in texts if text not in self.lists]
        require(not missing, f"{self.path}: no list for {len(missing)} of {len(texts)} texts, such "
                             f"as {missing[:1]}")
        shortest = min(texts, key=lambda text: len(self.lists[text]))
        length = min(depth, len(self.lists[shortest]))
        require(length >= k, f"{self.path}: expected at least {k} images in every list, that of "
                             f"{shortest!r} has {length}")
        ranked = []
        for text in texts:
            names = self.lists[text][:length]
            rows = [images.rows.get(name) for name in names]
            require(None not in rows and len(set(rows)) == length, f"{self.path}: expected "
                    f"different images, all of the gallery, in the list of {text!r}: {names}")
            ranked.append(rows)
        return np.array(ranked)


def open_model(name: str, cfg: EvalConfig):
    """The model, vectors or lists that a command-line argument names."""
    if name.endswith(".jsonl"):
        return RankedLists(name)
    if name.endswith(".npz"):
        return Vectors(name)
    if is_model_file(name):
        path, _, function = name.rpartition(":")
        module = import_file(path)
        require(callable(getattr(module, function, None)),
                f"{path} has no function or class {function!r}")
        model = getattr(module, function)()
    elif is_checkpoint(name):
        model = load_model(name, cfg.device, cfg.precision)
    else:
        model = HuggingFaceCLIP(name, cfg.precision).to(cfg.device).eval()
    check_model(name, model)
    return model


def is_model_file(name: str) -> bool:
    """Whether it is FILE.py:NAME. Raises UserError if there is no such file, or no NAME."""
    require(not name.endswith(".py"),
            f"{name}: give the function or class that returns the model: {name}:NAME")
    path, _, _ = name.rpartition(":")
    require(not path.endswith(".py") or Path(path).is_file(), f"{path}: no such file")
    return path.endswith(".py")


def import_file(path: str):
    """The module in this file."""
    # A loader worker unpickles preprocess() by its module's name. A forked worker finds the module
    # in sys.modules, one that is started afresh on the path, which it inherits.
    name = Path(path).stem
    require("." not in name, f"{path}: a module's name has no dot: give the file another name")
    sys.path.append(str(Path(path).resolve().parent))
    # Python remembers which files a folder has.
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(name)
    require(spec and spec.origin and Path(spec.origin).resolve() == Path(path).resolve(),
            f"{path}: there is another module {name!r}: give the file another name")
    return importlib.import_module(name)


def is_checkpoint(name: str) -> bool:
    return Path(name).is_file() or Path(name, "model.pt").is_file()


@torch.inference_mode()
def check_model(name: str, model):
    """Encodes two images and three texts. Raises UserError if the features do not fit."""
    for method in ("preprocess", "encode_image", "encode_text"):
        require(callable(getattr(model, method, None)), f"{name}: the model has no {method}(); "
                "expected preprocess(image), encode_image(batch), encode_text(list of str)")
    # Two sizes, since a preprocess() that crops nothing fits images of one size only.
    wide, tall = Image.new("RGB", (64, 48), "gray"), Image.new("RGB", (40, 56), "gray")
    images = [model.preprocess(wide), model.preprocess(tall)]
    texts = ["a dog", "two", "a red car"]
    try:
        batch = default_collate(images)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{name}: preprocess(image) must return a tensor, or a dict of tensors, of "
                        f"the same shape for every image ({str(error).splitlines()[0]})") from None
    image_features, text_features = model.encode_image(batch), model.encode_text(texts)
    try:
        image_features = torch.as_tensor(image_features)
        text_features = torch.as_tensor(text_features)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{name}: encode_image and encode_text must return features (B, E) as a "
                        f"tensor, array or list ({str(error).splitlines()[0]})") from None
    image_shape, text_shape = list(image_features.shape), list(text_features.shape)
    width = image_shape[-1:]
    require(image_shape == [2, *width] and text_shape == [3, *width],
            f"{name}: encode_image of 2 images gave shape {image_shape}, encode_text of 3 texts "
            f"{text_shape}; expected [2, E] and [3, E] with the same E")


@torch.inference_mode()
def encode(encoder, batch, size: int) -> torch.Tensor:
    """Features (size, E) of a batch of this size, on the CPU, where rankings are made."""
    features = torch.as_tensor(encoder(batch)).float().cpu()
    # NaN would not raise anywhere: it would rank in some order and give plausible numbers.
    require(features.ndim == 2 and len(features) == size and features.isfinite().all(),
            f"the model does not return a vector of finite numbers for each of {size} inputs, but "
            f"features of shape {list(features.shape)}, or NaN or infinity among them")
    return features


def embed_texts(model, texts: list[str], cfg: EvalConfig) -> torch.Tensor:
    """Features (len(texts), E). Equal texts are encoded once and get the same feature."""
    # Texts of similar length together need little padding.
    unique = sorted(set(texts), key=lambda text: (len(text), text))
    features = []
    starts = range(0, len(unique), cfg.batch_size)
    for start in tqdm(starts, "texts", leave=False, disable=None):
        batch = unique[start:start + cfg.batch_size]
        features.append(encode(model.encode_text, batch, len(batch)))
    row = {text: i for i, text in enumerate(unique)}
    return torch.cat(features)[[row[text] for text in texts]]


@dataclass
class Images:
    """The readable images of a gallery, in its order: of equally similar ones the first is ranked
    higher."""
    names: list[str]
    rows: dict[str, int]  # by name, or by file name alone
    features: torch.Tensor | None  # (N, E); None for ranked lists


def embed_images(model, gallery: dict, cfg: EvalConfig) -> Images:
    names = list(gallery)
    if isinstance(model, (RankedLists, Vectors)):
        features = None
        if isinstance(model, Vectors):
            features = encode(model.encode_image, names, len(names))
        return Images(names, rows_by_name(names), features)
    readable, features, skipped = [], [], []
    loader = image_loader(gallery, model.preprocess, cfg.batch_size, cfg.workers)
    for indices, batch, failed in tqdm(loader, "images", leave=False, disable=None):
        readable += indices
        skipped += [f"{names[index]}: {reason}" for index, reason in failed]
        if indices:
            features.append(encode(model.encode_image, batch, len(indices)))
    if skipped:
        print(f"skipped {len(skipped)} of {len(names)} images: {'; '.join(skipped[:20])}",
              file=sys.stderr)
    require(readable, f"none of the {len(names)} images can be read")
    # A file name that two images share stays ambiguous even if one of them cannot be read.
    row_of = {index: row for row, index in enumerate(readable)}
    rows = {}
    for name, index in rows_by_name(names).items():
        if index in row_of:
            rows[name] = row_of[index]
    return Images([names[index] for index in readable], rows, torch.cat(features))


def rows_by_name(names: list[str]) -> dict[str, int]:
    """{name: row}; an image in a subfolder also by its file name, unless two images share that."""
    rows = {name: row for row, name in enumerate(names)}
    uses = Counter(Path(name).name for name in names)
    for row, name in enumerate(names):
        if uses[Path(name).name] == 1:
            rows.setdefault(Path(name).name, row)
    return rows


# ---- galleries: the images of an evaluation ------------------------------------------------------
# A gallery is a dict {name: item} in ranking order. An item is the path of an image file, a (tar,
# offset, bytes) range of a shard, or a uint8 array (H, W, 3) that is in memory already.
def list_gallery(folder) -> dict:
    """The gallery of a folder: the images in its .tar shards by key, in storage order; or else
    every image file below it that is not hidden, named and sorted by its path in the folder."""
    folder = Path(folder)
    from_shards, skipped = {}, Counter()
    for shard in sorted(folder.glob("*.tar")):
        members, shard_skipped, _ = scan_shard(shard)
        skipped += shard_skipped
        for key, extension, offset, size in members:
            if extension not in IMAGE_TYPES:
                continue
            if key in from_shards:
                skipped["duplicate key"] += 1
            else:
                from_shards[key] = (str(shard), offset, size)
    if skipped:
        print(f"{folder}: left out of the gallery: {dict(skipped)}", file=sys.stderr)

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
            if not name.startswith(".") and extension in (*IMAGE_TYPES, "bmp"):
                path = Path(parent, name)
                files[path.relative_to(folder).as_posix()] = path

    if from_shards and files:
        raise UserError(f"{folder} holds {len(from_shards)} images in .tar shards and {len(files)} "
                        "image files beside them: give a folder with one or the other")
    if not from_shards and not files:
        raise UserError(f"{folder}: no such folder, or no image in it or below")
    return from_shards or dict(sorted(files.items()))


def collate_images(items: list, preprocess):
    indices, images, failed = [], [], []
    for i, item in items:
        try:
            images.append(preprocess(open_image(item)))
            indices.append(i)
        except Exception as error:
            # One image, whatever it or a model's preprocessing raises, never ends an evaluation.
            failed.append((i, str(error) or type(error).__name__))
    return indices, default_collate(images) if images else None, failed


def image_loader(gallery: dict, preprocess, batch_size: int, workers: int) -> DataLoader:
    """Iterates over a gallery: (indices, batch of preprocess(image), or None if all failed,
    [(index, reason it failed)])."""
    return make_loader(list(enumerate(gallery.values())), workers, batch_size=batch_size,
                       collate_fn=functools.partial(collate_images, preprocess=preprocess))


# ---- readers of evaluation files -----------------------------------------------------------------
# A reader checks every field that is used, since a wrong type deep in a measurement would end in a
# traceback, or worse in a number. A complaint names the file, the place and what was expected.
def read_text(path) -> str:
    try:
        # Spreadsheets begin their files with a byte order mark.
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected text in UTF-8 ({error})") from None


def parse_json(text: str, complaint: str):
    try:
        return json.loads(text)
    # Thousands of open brackets raise the latter.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{complaint} ({error})") from None


def checked_text(value, complaint: str) -> str:
    require(isinstance(value, str) and value.strip(), complaint)
    return fix_surrogates(value)


def checked_texts(values, complaint: str) -> list[str]:
    require(isinstance(values, list), complaint)
    return [checked_text(value, complaint) for value in values]


def read_records(path, expected: str) -> list[tuple[str, dict]]:
    """[(complaint, object)] of a JSON array or of JSON lines."""
    text = read_text(path)
    records = []
    if text.lstrip().startswith("["):
        for number, record in enumerate(parse_json(text, f"{path}: expected {expected}"), 1):
            records.append((f"{path}, item {number}: expected {expected}", record))
    else:
        for number, line in enumerate(text.split("\n"), 1):
            complaint = f"{path}, line {number}: expected {expected}"
            if line.strip():
                records.append((complaint, parse_json(line, complaint)))
    for complaint, record in records:
        require(isinstance(record, dict), complaint)
    require(records, f"{path} is empty: expected {expected}")
    return records


def read_pairs(path) -> list[dict]:
    """[{query, paraphrase, negative, images, kind, group}] of a pairs file, or of a SugarCrepe++
    file (arXiv 2406.11171), which calls the first three caption, caption2 and negative_caption.

    images are the correct ones. negative and kind are "" and group None where the file has none.
    """
    expected = ("JSON (lines) with query and paraphrase (SugarCrepe++: caption, caption2 and "
                "negative_caption) and, where known, images (a list) or image, kind and group")
    pairs = []
    for complaint, record in read_records(path, expected):
        query = record.get("query", record.get("caption"))
        paraphrase = record.get("paraphrase", record.get("caption2"))
        negative, kind = record.get("negative_caption", ""), record.get("kind", "")
        image = record.get("image") or record.get("filename")
        images = record.get("images", [image] if image else [])
        group = record.get("group")
        require(isinstance(negative, str) and isinstance(kind, str), complaint)
        require(group is None or isinstance(group, (str, int)), complaint)
        pairs.append({
            "query": checked_text(query, complaint),
            "paraphrase": checked_text(paraphrase, complaint),
            "negative": fix_surrogates(negative),
            "images": checked_texts(images, complaint),
            "kind": fix_surrogates(kind),
            "group": group,
        })
    return pairs


def read_lists(path) -> dict[str, list[str]]:
    """{text: [image names, best first]} of ranked lists.

    A line is {"text", "ranking"}, or what --details writes: {"query", "query_ranking",
    "paraphrase", "paraphrase_ranking"}.
    """
    expected = 'JSON lines of {"text": ..., "ranking": [image names, best first]}'
    lists = {}
    for complaint, record in read_records(path, expected):
        entries = [("text", "ranking")]
        if "text" not in record:
            entries = [("query", "query_ranking"), ("paraphrase", "paraphrase_ranking")]
        for text_field, ranking_field in entries:
            text = checked_text(record.get(text_field), complaint)
            ranking = checked_texts(record.get(ranking_field), complaint)
            # The details of several models hold each text once per model. Without this check the
            # first model's list would be taken silently.
            lists.setdefault(text, ranking)
            require(lists[text] == ranking, f"{complaint}; {text!r} has another list further up: "
                    "if the file holds several models, keep the lines of one")
    return lists


def read_captions(path) -> dict[str, list[str]]:
    """{file name: [captions]} of a COCO captions file, without images that have none."""
    expected = "COCO JSON with images [{id, file_name}] and annotations [{image_id, caption}]"
    complaint = f"{path}: expected {expected}"
    coco = parse_json(read_text(path), complaint)
    require(isinstance(coco, dict), complaint)
    names, captions = {}, {}
    for field in ("images", "annotations"):
        require(isinstance(coco.get(field), list), complaint)
        for number, record in enumerate(coco[field], 1):
            complaint = f"{path}, item {number} of {field}: expected {expected}"
            require(isinstance(record, dict), complaint)
            if field == "images":
                require("id" in record, complaint)
                names[str(record["id"])] = checked_text(record.get("file_name"), complaint)
            else:
                image_id = str(record.get("image_id"))
                require(image_id in names, f"{complaint}; there is no image with id {image_id}")
                caption = checked_text(record.get("caption"), complaint)
                captions.setdefault(names[image_id], []).append(caption)
    require(captions, f"{path} has no captions: expected {expected}")
    return captions


def read_sts(path) -> list[tuple[str, str, float]]:
    """[(sentence1, sentence2, score)] of CSV or TSV: the columns of these names, if there is a
    header with them, else the first three."""
    lines, rows = read_lines(path), []
    header, columns = ["sentence1", "sentence2", "score"], [0, 1, 2]
    options = {}
    if "\t" in lines[0]:
        # Tab-separated sets, such as GLUE's, hold stray quote characters that quote nothing.
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(lines, **options)
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            names = [cell.lower() for cell in cells]
            if not rows and set(header) <= set(names):
                columns = [names.index(name) for name in header]
                continue
            if len(cells) <= max(columns):
                raise ValueError(f"{len(cells)} columns")
            sentence1, sentence2, score = [cells[column] for column in columns]
            if sentence1 == "" or sentence2 == "" or not math.isfinite(float(score)):
                raise ValueError("an empty sentence, or no finite number")
            rows.append((fix_surrogates(sentence1), fix_surrogates(sentence2), float(score)))
    # The ValueErrors above, that of float(), and what csv finds.
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}, row {reader.line_num}: expected sentence1, sentence2 and a "
                        f"finite score ({error})") from None
    require(rows, f"{path}: expected rows of sentence1, sentence2 and a finite score")
    return rows


def read_lines(path) -> list[str]:
    """The lines of a file that are not blank, of which there must be some."""
    text = read_text(path)
    # Not tabs: in a table they stand for empty cells.
    lines = [line.strip(" \r") for line in text.split("\n") if line.strip()]
    require(lines, f"{path} is empty")
    return lines


def read_templates(path) -> list[str]:
    """Prompts, one per line, each with {} where the class name goes."""
    templates = read_lines(path)
    for template in templates:
        require("{}" in template, f"{path}: expected {{}} for the class name in {template!r}")
    return templates


def read_labels(path) -> tuple[list[str], dict[str, int]]:
    """(class names, {image name: class index}) of a JSON file with classnames and labels."""
    complaint = (f"{path}: expected JSON of " '{"classnames": [names], "labels": '
                 "{image name: index of its class}}")
    record = parse_json(read_text(path), complaint)
    require(isinstance(record, dict) and isinstance(record.get("labels"), dict), complaint)
    names, labels = checked_texts(record.get("classnames"), complaint), record["labels"]
    require(labels, complaint)
    for name, label in labels.items():
        require(isinstance(label, int) and 0 <= label < len(names),
                f"{complaint}; the label of {name!r} is {label!r}")
    return names, labels


def read_class_folders(source: str) -> tuple[dict, list[str], dict[str, int], str]:
    """(gallery, class names, {image name: class index}, where the names are from) of a folder with
    a folder per class.

    source is a folder, imagenet:ROOT (the folders of ROOT/val), or cifar10:ROOT or cifar100:ROOT
    (torchvision's test sets). Class names are torchvision's for cifar10:, cifar100: and an
    imagenet: of all 1000 folders, otherwise those of the folders, with spaces for underscores.
    """
    kind, colon, root = source.partition(":")
    # A folder may have the name of a data set.
    if not colon:
        kind = "folder"
    names_from = "its folders"
    if kind in ("cifar10", "cifar100"):
        try:
            dataset = getattr(torchvision.datasets, kind.upper())(root, train=False)
        except RuntimeError as error:
            raise UserError(f"{root}: no {kind.upper()} there ({error})") from None
        gallery = {f"test/{i}": pixels for i, pixels in enumerate(dataset.data)}
        labels = dict(zip(gallery, dataset.targets))
        classnames, names_from = dataset.classes, "torchvision"
    else:
        folder = Path(root).expanduser() / "val" if kind == "imagenet" else source
        gallery = list_gallery(folder)
        # Images that lie beside the class folders belong to no class.
        gallery = {name: item for name, item in gallery.items() if "/" in name}
        classnames = sorted({name.split("/")[0] for name in gallery})
        index = {name: i for i, name in enumerate(classnames)}
        labels = {name: index[name.split("/")[0]] for name in gallery}
        # ImageNet's folders are named by their WordNet ids, whose order torchvision's names follow.
        if kind == "imagenet" and len(classnames) == 1000:
            classnames = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
            names_from = "torchvision"
    require(labels, f"{source}: expected a folder of images for each class")
    return gallery, [name.replace("_", " ") for name in classnames], labels, names_from


# ---- measurements --------------------------------------------------------------------------------
# A task is what one flag measures: a class with
#   flag            the flag's name in EvalConfig
#   gallery         the images that it is measured on: those of --images, its own, or "" for none
#   __init__(cfg)   reads the flag's files, and sets names: the images of --images that they name
#   measure(model, images, cfg)   gives {name: Scores, a number or a text}. A name is a tuple, the
#                   path of keys in the JSON; images is the Images of its gallery, None without one
# To add a task, write such a class, list it in TASKS and give EvalConfig its flag.
class Scores(NamedTuple):
    """A metric's values, and for each value its group: intervals resample groups."""
    values: np.ndarray  # (N,) float
    groups: np.ndarray  # (N,) int


RECALL_AT = (1, 5, 10)
TEMPLATES = ["{}", "a picture of a {}", "a photo of a {}"]


def compare_lists(first, second, k: int) -> dict[str, np.ndarray]:
    """Every metric of two lists (Q, K): add yours here, and its row title to LABELS."""
    return {
        "ao1": average_overlap(first, second, 1),
        "ao": average_overlap(first, second, k),
        "js": jaccard(first, second, k),
    }


def group_numbers(pairs: list[dict]) -> np.ndarray:
    """A number for each pair, the same for those that are not independent of each other: those of
    the same "group" or, where there is none, of the same correct images, or else query."""
    numbers, groups = {}, []
    for pair in pairs:
        key = tuple(sorted(pair["images"])) or pair["query"]
        if pair["group"] is not None:
            key = ("group", pair["group"])
        groups.append(numbers.setdefault(key, len(numbers)))
    return np.array(groups)


def unrelated(pairs: list[dict], seed: int) -> np.ndarray:
    """For each pair the index of another one that shares no text or image with it, if possible.

    AO of a query and an unrelated paraphrase is what a model reaches without any understanding:
    one that returns the same images for every text would reach 1.
    """
    contents = [{pair["query"], pair["paraphrase"], *pair["images"]} for pair in pairs]
    order = np.random.default_rng(seed).permutation(len(pairs))
    partners = np.zeros(len(pairs), dtype=int)
    for position, i in enumerate(order):
        # The nearest one before it in a random order that will do. The file's own order would not
        # serve: neighbours there are often of one image.
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
    # A model ranks the whole gallery, however small. A list that ends before k ranks does not tell
    # what stands at k.
    depths = [k for k in RECALL_AT if k <= ranked.shape[1] or image_features is not None]
    for k in depths:
        results[key, f"t2i@{k}"] = Scores(recall_at_k(ranked, correct, k), groups)
    if image_features is not None:
        texts_of = {}
        for text, rows in enumerate(correct):
            for row in rows:
                texts_of.setdefault(row, []).append(text)
        ranked_texts = rankings(image_features[list(texts_of)], text_features, max(RECALL_AT))
        for k in RECALL_AT:
            recall = recall_at_k(ranked_texts, texts_of.values(), k)
            results[key, f"i2t@{k}"] = Scores(recall, np.arange(len(recall)))
    # With several correct images a hit among ten says little: most models always have one.
    if 10 in depths and any(len(rows) > 1 for rows in correct):
        precision = Scores(precision_at_k(ranked, correct, 10), groups)
        results[key.replace("recall", "precision"), "t2i@10"] = precision
    return results


class Pairs:
    """Rank similarity of queries and paraphrases, and recall of their correct images.

    Reported for all pairs together, by kind where pairs have one, and by file where there are
    several. A benchmark with kinds has a headline in place of all pairs: those of one kind, that of
    the first pair.
    """
    flag, gallery = "pairs", "images"

    def __init__(self, cfg: EvalConfig):
        require(cfg.images, f"--{self.flag} needs --images DIR to search in")
        self.pairs = self.read(cfg)
        self.names = [name for pair in self.pairs for name in pair["images"]]
        self.groups = group_numbers(self.pairs)
        # Beside --captions, "recall" is that of the captions.
        self.query_key = "query_recall" if cfg.captions else "recall"
        # What is reported: the indices of pairs, by the path of keys in the JSON.
        self.subsets = {(): list(range(len(self.pairs)))}
        self.headline = ""
        kinds = sorted({pair["kind"] for pair in self.pairs} - {""})
        for kind in kinds:
            self.subsets["kinds", kind] = [
                i for i, pair in enumerate(self.pairs) if pair["kind"] == kind]
        if kinds and cfg.benchmark:
            self.headline = self.pairs[0]["kind"]
            require(self.headline, f"{cfg.pairs[0]}: the first pair has no kind, but others have "
                    "one: expected the kind of the headline in the first pair")
            self.subsets[()] = self.subsets["kinds", self.headline]
        if len(cfg.pairs) > 1:
            for i, pair in enumerate(self.pairs):
                path = ("files", pair["file"])
                self.subsets.setdefault(path, []).append(i)
            # A pair that stands in several files counts once in the whole.
            first = {}
            for i, pair in enumerate(self.pairs):
                content = (pair["query"], pair["paraphrase"], *pair["images"])
                first.setdefault(content, i)
            self.subsets[()] = list(first.values())

    def read(self, cfg: EvalConfig) -> list[dict]:
        pairs = []
        for path, file in zip(cfg.pairs, short_names(cfg.pairs)):
            pairs += [pair | {"file": file} for pair in read_pairs(path)]
        return pairs

    def measure(self, model, images, cfg):
        self.k = min(cfg.k, len(images.names))
        texts = [pair["query"] for pair in self.pairs]
        texts += [pair["paraphrase"] for pair in self.pairs]
        depth = min(max(cfg.k, *RECALL_AT), len(images.names))
        if isinstance(model, RankedLists):
            ranked = model.search(texts, images, self.k, depth)
            features = None
        else:
            features = embed_texts(model, texts, cfg)
            ranked = rankings(features, images.features, depth).numpy()
            features = features.view(2, len(self.pairs), -1)
        ranked = ranked.reshape(2, len(self.pairs), -1)

        # What --details writes of each pair, and figures show.
        self.correct, self.details = [], []
        ao = average_overlap(ranked[0], ranked[1], self.k).tolist()
        js = jaccard(ranked[0], ranked[1], self.k).tolist()
        for i, pair in enumerate(self.pairs):
            rows = [images.rows[name] for name in pair["images"] if name in images.rows]
            self.correct.append(rows)
            self.details.append({
                "query": pair["query"], "paraphrase": pair["paraphrase"], "kind": pair["kind"],
                "ao": ao[i], "js": js[i],
                "query_ranking": [images.names[row] for row in ranked[0, i]],
                "paraphrase_ranking": [images.names[row] for row in ranked[1, i]],
                "images": [images.names[row] for row in rows]})

        results = {}
        if cfg.benchmark:
            results["split",] = cfg.split
        if self.headline:
            results["headline",] = self.headline
        results["k",], results["gallery",] = self.k, len(images.names)
        for path, chosen in self.subsets.items():
            subset = self.measure_subset(chosen, ranked, features, images, cfg)
            results |= {path + name: value for name, value in subset.items()}
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
        # This asks whether images are named, not whether they are there: if the gallery lacks all
        # of them, the report says that recall is that of 0 pairs.
        if any(self.pairs[i]["images"] for i in chosen):
            known = [i for i in chosen if self.correct[i]]
            results["recall_pairs",] = len(known)
            if known:
                correct = [self.correct[i] for i in known]
                for side, key in enumerate((self.query_key, "paraphrase_recall")):
                    text_features = None if features is None else features[side, known]
                    results |= retrieval(key, ranked[side, known], text_features, images.features,
                                         correct, self.groups[known])
        return results


class Query(Pairs):
    """The one pair of --query and --paraphrase."""
    flag = "query"

    def read(self, cfg):
        # Several words arrive as several arguments where the quotes were left out.
        query = fix_surrogates(" ".join(cfg.query))
        paraphrase = fix_surrogates(" ".join(cfg.paraphrase))
        require(query.strip() and paraphrase.strip(), "--query and --paraphrase must not be empty")
        pair = {"query": query, "paraphrase": paraphrase, "images": [], "kind": "", "group": None}
        return [pair]


class Captions:
    """Recall of captions among the images that have any."""
    flag, gallery = "captions", "images"

    def __init__(self, cfg: EvalConfig):
        require(cfg.images, "--captions needs --images DIR to search in")
        self.path, self.captions = cfg.captions, read_captions(cfg.captions)
        self.names = list(self.captions)

    def measure(self, model, images, cfg):
        known = [name for name in self.names if name in images.rows]
        require(known, f"{self.path}: none of its images is there and readable")
        # In the gallery's order, so that ties are broken as in the other tasks.
        known.sort(key=lambda name: images.rows[name])
        texts, image_of_text = [], []
        for i, name in enumerate(known):
            texts += self.captions[name]
            image_of_text += [i] * len(self.captions[name])
        text_features = embed_texts(model, texts, cfg)
        # Images without captions, which --pairs may search in, would only make recall lower.
        image_features = images.features[[images.rows[name] for name in known]]
        ranked = rankings(text_features, image_features, max(RECALL_AT)).numpy()
        correct = [[i] for i in image_of_text]
        return {
            ("captions", "images"): len(known),
            ("captions", "missing"): len(self.names) - len(known),
            ("captions", "captions"): len(texts),
            **retrieval("recall", ranked, text_features, image_features, correct,
                        np.array(image_of_text)),
        }


class Triplets:
    """SugarCrepe++: are two captions, and their image, closer to each other than to a negative?

    text_only: sim(P1, P2) > sim(P1, N) and sim(P1, P2) > sim(P2, N)
    image_text: sim(I, P1) > sim(I, N) and sim(I, P2) > sim(I, N)
    Both are 1 or 0 for each triplet; a tie counts as 0.
    """
    flag, gallery = "triplets", "images"

    def __init__(self, cfg: EvalConfig):
        self.files, self.names = {}, []
        for path, file in zip(cfg.triplets, short_names(cfg.triplets)):
            self.files[file] = read_pairs(path)
            for triplet in self.files[file]:
                require(triplet["negative"].strip(), f"{path}: expected SugarCrepe++ JSON with a "
                        f"negative_caption, also of {triplet['query']!r}")
                self.names += triplet["images"]

    def measure(self, model, images, cfg):
        results = {}
        for file, triplets in self.files.items():
            texts = []
            for field in ("query", "paraphrase", "negative"):
                texts += [triplet[field] for triplet in triplets]
            p1, p2, negative = embed_texts(model, texts, cfg).chunk(3)
            p1_p2 = similarity(p1, p2)
            text_only = (p1_p2 > similarity(p1, negative)) & (p1_p2 > similarity(p2, negative))
            groups = group_numbers(triplets)
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
                scores = Scores(image_text.astype(float), groups[known])
                results["triplets", file, "image_text_n"] = len(known)
                results["triplets", file, "image_text"] = scores
        return results


class STS:
    """Spearman's rank correlation of cosine similarity and human score (arXiv 1708.00055)."""
    flag, gallery = "sts", ""

    def __init__(self, cfg: EvalConfig):
        self.path, self.rows, self.names = cfg.sts, read_sts(cfg.sts), []

    def measure(self, model, images, cfg):
        sentences1, sentences2, scores = zip(*self.rows)
        a, b = embed_texts(model, [*sentences1, *sentences2], cfg).chunk(2)
        correlation = spearman(similarity(a, b), scores)
        require(not math.isnan(correlation),
                f"{self.path}: equal scores or similarities have no rank correlation")
        return {("sts", "n"): len(self.rows), ("sts", "spearman"): correlation}


class ZeroShot:
    """Accuracy of the class whose prompts, averaged, are most similar (arXiv 2103.00020, 3.1.4)."""
    flag, gallery = "zeroshot", "zeroshot"

    def __init__(self, cfg: EvalConfig):
        self.names = []
        if cfg.zeroshot.endswith(".json"):
            require(cfg.images, "--zeroshot FILE.json needs --images DIR, the images it labels")
            self.classnames, self.labels = read_labels(cfg.zeroshot)
            self.names_from, self.gallery = "its JSON file", "images"
            self.names = list(self.labels)
        else:
            self.items, self.classnames, self.labels, self.names_from = read_class_folders(
                cfg.zeroshot)
            require(cfg.classnames or self.names_from == "torchvision"
                    or not cfg.zeroshot.startswith("imagenet:"),
                    f"{cfg.zeroshot}: {len(self.classnames)} of ImageNet's 1000 folders, whose "
                    "names are no words: give --classnames")
        # Names and prompts move ImageNet's accuracy by several points. So the output says whose
        # they are, and others' numbers can be compared only if theirs are the same.
        if cfg.classnames:
            names = read_lines(cfg.classnames)
            require(len(names) == len(self.classnames), f"{cfg.classnames}: expected "
                    f"{len(self.classnames)} class names, one per line, but it has {len(names)}")
            self.classnames, self.names_from = names, cfg.classnames
        self.templates, self.templates_from = TEMPLATES, "eval_paraphrase.py"
        if cfg.templates:
            self.templates, self.templates_from = read_templates(cfg.templates), cfg.templates

    def measure(self, model, images, cfg):
        known = [name for name in self.labels if name in images.rows]
        require(known, f"{cfg.zeroshot}: none of its images is there and readable")
        prompts = []
        for name in self.classnames:
            prompts += [template.replace("{}", name) for template in self.templates]
        # Each prompt is normalised before the mean, so that none weighs more by its length.
        features = normalize(embed_texts(model, prompts, cfg), dim=-1)
        features = features.view(len(self.classnames), len(self.templates), -1)
        class_features = features.mean(1)
        image_features = images.features[[images.rows[name] for name in known]]
        ranked = rankings(image_features, class_features, 5)
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


TASKS = [Pairs, Query, Captions, Triplets, STS, ZeroShot]


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
    for task in TASKS:
        if getattr(cfg, task.flag):
            cfg.benchmark = ""
            return
    if cfg.benchmark == "emoji":
        # Here, since other data do not need the program that draws these.
        from demo.emoji_scenes import emoji_folder
        folder = Path(emoji_folder(), cfg.split)
    else:
        folder = data_folder(cfg.benchmark) / cfg.split
    require(folder.is_dir(), f"--benchmark {cfg.benchmark}: there is no folder {folder}")
    cfg.images, cfg.pairs = str(folder), [str(folder / "pairs.jsonl")]
    for name in ("zeroshot", "captions"):
        if (folder / f"{name}.json").exists():
            setattr(cfg, name, str(folder / f"{name}.json"))


def read_gallery(cfg: EvalConfig, tasks: list) -> dict:
    """The images of --images. Pairs are searched in all, other tasks in those that they name."""
    gallery = list_gallery(cfg.images)
    named = {name for task in tasks for name in task.names}
    if not (cfg.pairs or cfg.query):
        # 500 labelled images of a folder of 100,000 are no reason to encode all of them.
        gallery = {name: item for name, item in gallery.items()
                   if name in named or Path(name).name in named}
        require(gallery, f"{cfg.images}: none of the {len(named)} named images is there")
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
    """Results with an Estimate in place of each Scores."""
    estimates = {}
    for name, value in results.items():
        if isinstance(value, Scores):
            low, high = bootstrap_ci(value.values, value.groups, seed)
            groups = len(np.unique(value.groups))
            value = Estimate(float(value.values.mean()), low, high, groups)
        estimates[name] = value
    return estimates


def to_json(estimates: dict) -> dict:
    """Nested dicts: ("kinds", "order", "ao") becomes kinds.order.ao, its interval ...ao_ci.

    The intervals of recall and precision stand together: ("recall", "t2i@1") in recall_ci.t2i@1.
    """
    report = {}
    for name, value in estimates.items():
        *path, key = name
        entries = {name: value}
        if isinstance(value, Estimate):
            interval = (*path, f"{key}_ci")
            if "@" in key:
                interval = (*path[:-1], f"{path[-1]}_ci", key)
            entries = {name: value.mean, interval: [value.low, value.high]}
        for keys, entry in entries.items():
            place = report
            for key in keys[:-1]:
                place = place.setdefault(key, {})
            place[keys[-1]] = entry
    return report


# Titles of the table's rows; other keys are their own titles.
LABELS = {
    "ao1": "same first image",
    "ao": "AO@k",
    "js": "JS@k",
    "ao1_random": "same first image, unrelated pairs",
    "ao_random": "AO@k, unrelated pairs",
    "js_random": "JS@k, unrelated pairs",
    "ao_minus_random": "AO@k minus unrelated",
    "recall_pairs": "pairs with an image",
}
# What the table shows of each kind and file; the JSON has all.
SHOWN_OF_SUBSETS = ("pairs", "ao1", "ao", "ao_minus_random", "js")
# Estimates from fewer independent groups are marked: their bootstrap intervals are too narrow.
FEW = 30


class Column(NamedTuple):
    """A column of the table: a model's results, or its differences to the first model."""
    header: str
    estimates: dict
    sign: str  # "+" for differences, which show it


def row_title(keys) -> str:
    titles = [LABELS.get(key, key.replace("_", " ")) for key in keys]
    return " ".join(titles)


def table_rows(columns: list[Column]) -> list[tuple[str, list[str]]]:
    """[(title, a cell per column)], with an empty row and a heading before each section."""
    # The rows of all columns, as a model of ranked lists has fewer.
    estimates_by_name = {}
    for column in columns:
        estimates_by_name.update(column.estimates)
    rows, section = [], ()
    for name, value in estimates_by_name.items():
        # The texts stand above the table, see print_table().
        if isinstance(value, str):
            continue
        if name[0] in ("kinds", "files") and name[2] not in SHOWN_OF_SUBSETS:
            continue
        if name[:-1] != section:
            section = name[:-1]
            rows.append(("", [""] * len(columns)))
            rows.append((row_title(section), [""] * len(columns)))
        cells = []
        for column in columns:
            cell_value = column.estimates.get(name, "")
            if isinstance(cell_value, Estimate):
                # A mean as 100 x, followed by half its interval.
                mark = "*" if cell_value.groups < FEW else " "
                half = (cell_value.high - cell_value.low) / 2
                cells.append(f"{100 * cell_value.mean:{column.sign}.1f} ±{100 * half:.1f}{mark}")
            elif isinstance(cell_value, float):
                cells.append(f"{100 * cell_value:.1f} ")
            else:
                cells.append(f"{cell_value} ")
        rows.append((row_title(name[-1:]), cells))
    return rows


def print_table(columns: list[Column], markdown: bool):
    """A row per metric, a column per model. Four columns side by side fit into 100 characters."""
    # What was measured on, in words: the same for all models, but ranked lists lack some of it.
    texts = {}
    for column in columns:
        for name, value in column.estimates.items():
            if isinstance(value, str):
                texts[name] = value
    for name, text in texts.items():
        print(f"{row_title(name)}: {text}")
    print("Means x100, ± half a 95 % interval. *: fewer than "
          f"{FEW} independent images, groups or queries.\n")
    rows = table_rows(columns)
    if markdown:
        print("| |", " | ".join(column.header for column in columns), "|")
        print("|---|" + "---:|" * len(columns))
        for title, cells in rows:
            print(f"| {title} |", " | ".join(cells), "|")
        print()
        return
    for start in range(0, len(columns), 4):
        block = slice(start, start + 4)
        # Long headers take several lines.
        headers = [textwrap.wrap(column.header, 14) for column in columns[block]]
        for cells in itertools.zip_longest(*headers, fillvalue=""):
            print(" " * 36 + "".join(cell.rjust(16) for cell in cells))
        for title, cells in rows:
            line = title.ljust(36) + "".join(cell.rjust(16) for cell in cells[block])
            print(line.rstrip())
        print()


# ---- main ----------------------------------------------------------------------------------------
def main(argv=None):
    """Measures every model, prints a table and JSON, then writes the files that are asked for."""
    cfg = parse_config(EvalConfig, argv)
    check_flags(cfg)
    models = cfg.models or ["runs/emoji-align"]
    require(cfg.models or Path(models[0]).exists(),
            f"no model given, and no {models[0]} yet: run `python paraclip.py` first")
    labels = cfg.labels or short_names(models)
    require(len(labels) == len(models), f"--labels: {len(labels)} names for {len(models)} models")
    for label in labels:
        require(labels.count(label) == 1, f"{label}: two models have this name: give each model "
                "once, or a different name for each with --labels")

    # Vectors, lists, and names of files and of Hugging Face models are checked now, not when other
    # models have been measured.
    files = {}
    for name in models:
        if name.endswith((".jsonl", ".npz")):
            files[name] = open_model(name, cfg)
        elif not is_model_file(name) and not is_checkpoint(name):
            with hugging_face_errors(name):
                AutoConfig.from_pretrained(name, trust_remote_code=False)
        for flag_name in ("precision", "device"):
            is_given = getattr(cfg, flag_name) != getattr(EvalConfig(), flag_name)
            if is_given and (name in files or is_model_file(name)):
                print(f"note: {name}: --{flag_name} has no effect on it", file=sys.stderr)
    choose_benchmark(cfg)
    tasks = [task(cfg) for task in TASKS if getattr(cfg, task.flag)]
    galleries = {task.gallery: task.items for task in tasks if task.gallery == "zeroshot"}
    if cfg.images:
        galleries["images"] = read_gallery(cfg, tasks)
    # On CUDA, convolutions would otherwise round fp32 to TF32.
    torch.backends.cudnn.allow_tf32 = False

    reports, columns, details = [], [], {}
    for name, label in zip(models, labels):
        model = files.get(name) or open_model(name, cfg)
        images, image_names, results = {}, {}, {}
        for gallery, items in galleries.items():
            images[gallery] = embed_images(model, items, cfg)
            image_names[gallery] = images[gallery].names
        for task in tasks:
            if isinstance(model, RankedLists) and not isinstance(task, Pairs):
                print(f"note: {name}: --{task.flag} is left out, since ranked lists have no "
                      "features", file=sys.stderr)
                continue
            results |= task.measure(model, images.get(task.gallery), cfg)
            if isinstance(task, Pairs):
                pairs = task
                details[label] = [{"model": name, **record} for record in task.details]
        require(results, f"{name}: nothing to measure")
        # The next model may need the memory.
        del model
        estimates = estimate(results, cfg.seed)
        reports.append({"model": name, **to_json(estimates)})
        columns.append(Column(label, estimates, ""))
        if len(reports) == 1:
            base, base_names = results, image_names
        elif image_names == base_names:
            # Query by query: this interval is far narrower than the models' own, since a query that
            # is hard for one is hard for both.
            scores = {}
            for key, value in results.items():
                if isinstance(value, Scores) and key in base:
                    scores[key] = Scores(value.values - base[key].values, value.groups)
            # Two models may have no metric in common, as where one of them is a file of lists.
            if scores:
                difference = estimate(scores, cfg.seed)
                reports[-1]["diff"] = to_json(difference)
                columns.append(Column(f"minus {labels[0]}", difference, "+"))
        else:
            print(f"note: {name} and {models[0]} can read different images, so their difference is "
                  "left out", file=sys.stderr)

    # Printed first, so that a file that cannot be written does not cost the results.
    print_table(columns, cfg.markdown)
    print(json.dumps(reports), flush=True)
    if cfg.json:
        with atomic_write(cfg.json) as file:
            file.write(json.dumps(reports, indent=1).encode() + b"\n")
    if cfg.details:
        with atomic_write(cfg.details) as file:
            for record in itertools.chain(*details.values()):
                file.write(json.dumps(record).encode() + b"\n")
    if cfg.figure:
        from demo.figure import draw_pair
        headline = {}
        for label, records in details.items():
            headline[label] = [records[i] for i in pairs.subsets[()]]
        draw_pair(cfg.figure, galleries["images"], headline, pairs.k)
    if cfg.summary:
        from demo.figure import draw_summary
        draw_summary(cfg.summary, dict(zip(labels, reports)))


if __name__ == "__main__":
    run(main)
