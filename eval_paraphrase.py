"""How alike are the pictures that a model finds for a query and for its paraphrase?

AO@k and JS@k of "Adapting Dual-encoder Vision-language Models for Paraphrased Retrieval"
(arXiv 2405.03190), with retrieval, zero-shot and text-only measurements beside them:

    python eval_paraphrase.py                   # runs/emoji-align on the emoji benchmark
    python eval_paraphrase.py MODEL... --pairs pairs.jsonl --images coco/val2017
    python eval_paraphrase.py MODEL --captions captions.json --images coco/val2017
    python eval_paraphrase.py MODEL --zeroshot imagenet:ROOT --sts sts-dev.csv
    python eval_paraphrase.py MODEL OTHER --images DIR --query "a dog" --paraphrase "a hound"

MODEL is a checkpoint, a run folder, or the name or folder of a Hugging Face model with two
towers. Below the tables, the last line is the same as a JSON list.
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor, logging

import data
from data import UserError, flag
from paraclip import load_model


@dataclass
class EvalConfig:
    models: list[str] = flag([], "what to evaluate (default: runs/emoji-align)", positional=True)
    # what is measured; with none of these, the benchmark
    pairs: str = flag("", "JSON (lines) of query, paraphrase, perhaps image or images")
    query: str = flag("", "one's own words in place of --pairs, with --paraphrase")
    paraphrase: str = flag("", "the same in other words")
    captions: str = flag("", "COCO captions JSON: recall in both directions")
    zeroshot: str = flag("", "class folders, cifar10:ROOT, cifar100:ROOT, imagenet:ROOT")
    triplets: list[str] = flag([], "SugarCrepe++ files, with or without --images")
    sts: str = flag("", "CSV or TSV of sentence1, sentence2, score")
    benchmark: str = flag("emoji", "its name in $PARACLIP_DATA, or its whole path")
    split: str = flag("test", "test, or val for choices", choices=("test", "val"))
    images: str = flag("", "folder of pictures or shards to search in")
    classnames: str = flag("", "class names, one a line, in the folders' order")
    templates: str = flag("", "prompts, one a line, with {} for the class name")
    k: int = flag(10, "length of the compared lists", at_least=1)
    seed: int = flag(0, "of the bootstrap and of unrelated pairs", at_least=0)
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where the towers run")
    precision: str = flag("fp32", "of the towers", choices=("fp32", "bf16"))
    batch_size: int = flag(64, "pictures or texts at once", at_least=1)
    workers: int = flag(2, "decoding processes", at_least=0)
    json: str = flag("", "file for the list that ends the output")
    figure: str = flag("", "PNG of what one pair finds")

    def __post_init__(self):
        data.check_ranges(self)
        words, other = self.query or self.paraphrase, self.captions or self.triplets
        for complaint, wrong in {
            "--query and --paraphrase belong together, neither empty, in place of --pairs":
                words and (self.pairs or not self.query.strip() or not self.paraphrase.strip()),
            "--pairs, --query and --captions need --images DIR to search in":
                (self.pairs or words or self.captions) and not self.images,
            "--images needs --pairs, --query, --captions or --triplets: what to search for":
                self.images and not (self.pairs or words or other),
            "--classnames and --templates belong to --zeroshot":
                (self.classnames or self.templates) and not self.zeroshot,
            "--figure draws a pair: give --pairs, or --query and --paraphrase": self.figure
                and not (self.pairs or words) and (other or self.zeroshot or self.sts),
        }.items():
            if wrong:
                raise UserError(complaint)
        for path in map(Path, filter(None, (self.json, self.figure))):
            if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
                raise UserError(f"{path}: expected a file in a folder that can be written")
        try:
            torch.zeros(1, device=self.device).item()
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {self.device}: {str(error).splitlines()[0]}") from None


# ---- metrics -------------------------------------------------------------------------------------
# Q queries, N gallery items, E feature size, k list length. A metric returns one value a query;
# their mean is the number to report, and bootstrap_ci gives its interval.
def average_overlap(a, b, k: int | None = None) -> np.ndarray:
    """AO@k of ranked lists: the overlap of their first d items, averaged over all depths d.

    AO@k = (1/k) sum over d = 1..k of |a[:d] and b[:d]| / d, in [0, 1]: early ranks weigh most.
    a, b: (..., K) indices, best first, no item twice, K >= k (default K); ties were broken by
    rankings(). Returns (...) float64; ValueError if a list is too short.
    Example: [1, 2, 3, 4] and [2, 1, 3, 5] overlap by 0/1, 2/2, 3/3, 3/4, so AO@4 = 0.6875.
    """
    same = same_items(a, b, k)
    depths = range(1, same.shape[-1] + 1)
    return np.mean([same[..., :d, :d].sum((-2, -1)) / d for d in depths], axis=0)


def jaccard(a, b, k: int | None = None) -> np.ndarray:
    """JS@k of lists as above: |a[:k] and b[:k]| / |a[:k] or b[:k]|, in [0, 1], whatever the order.

    Example: [1, 2, 3, 4] and [2, 1, 3, 5] share 3 of 5 items, so JS@4 = 0.6.
    """
    same = same_items(a, b, k)
    shared = same.sum((-2, -1))
    return shared / (2 * same.shape[-1] - shared)


def same_items(a, b, k: int | None) -> np.ndarray:
    """(..., k, k): does place i of a hold the item that place j of b holds?"""
    a, b = np.asarray(a), np.asarray(b)
    k = a.shape[-1] if k is None else k
    if not 0 < k <= min(a.shape[-1], b.shape[-1]):
        raise ValueError(f"lists of {a.shape[-1]} and {b.shape[-1]} items and k = {k}")
    return a[..., :k, None] == b[..., None, :k]


GRID = 2.0**24  # similarities are multiples of 1 / GRID, the spacing of fp32 just below 1
SLOTS = 2**27  # a larger gallery than memory holds


def unit_grid(features) -> torch.Tensor:
    """Features (N, E), L2-normalised and rounded to multiples of 1 / GRID, as fp64.

    A product of two such numbers is a multiple of 2^-48, and no partial sum of a dot product of
    unit vectors leaves fp64's 53 bits: similarities are exact, the same for any chunk size, thread
    count and device. In fp32 they depend on the place in the matrix.
    """
    features = torch.as_tensor(features, dtype=torch.float64, device="cpu")
    return torch.round(normalize(features, dim=-1) * GRID) / GRID


def rankings(query_features, gallery_features, k: int, chunk: int = 2048) -> torch.Tensor:
    """The k most similar gallery items of every query, best first.

    Cosine similarity rounded to 1 / GRID; ties go to the lower gallery index. The Q x N matrix
    never exists: blocks of chunk x chunk are scored and merged into the best so far.
    query_features (Q, E), gallery_features (N, E). Returns (Q, min(k, N)) int64 indices.
    Example: query (1, 0) and gallery (0, 1), (1, 0), (2, 0) with k = 2 give [1, 2].
    """
    queries, n = unit_grid(query_features), len(gallery_features)
    # torch.topk leaves the order of ties open. So similarity and index are packed into one number:
    #     packed = similarity * GRID * SLOTS - index
    # Were SLOTS 100, items 7 and 3 of 5 grid steps and item 9 of 6 would be 493, 497 and 591: in
    # order 9, 3, 7. What is subtracted from a multiple of SLOTS is the index: -497 % 100 = 3.
    # No packed number is above GRID * SLOTS = 2^51: fp64 is exact.
    best = torch.full((len(queries), min(k, n)), -torch.inf, dtype=torch.float64)
    for start in range(0, n, chunk):
        gallery = unit_grid(gallery_features[start:start + chunk])
        index = torch.arange(start, start + len(gallery), dtype=torch.float64)
        for first in range(0, len(queries), chunk):
            rows = slice(first, first + chunk)
            steps = (queries[rows] @ gallery.T).mul_(GRID).round_()  # (chunk, chunk)
            packed = steps.mul_(SLOTS).sub_(index).topk(min(k, len(gallery))).values
            best[rows] = torch.cat([best[rows], packed], dim=1).topk(best.shape[1]).values
    return -best.long() % SLOTS


def similarity(a, b) -> np.ndarray:
    """Cosine of two feature matrices (N, E), row by row, exact as in rankings: (N,) float64."""
    return np.round((unit_grid(a) * unit_grid(b)).sum(-1).numpy() * GRID) / GRID


def recall_at_k(ranked, correct, k: int) -> np.ndarray:
    """Recall@k in CLIP's convention: 1 if any correct item is among the first k, else 0.

    ranked: (Q, K) indices, best first, ties broken by rankings(); correct: for each query its
    right indices. Textbook recall would be their share that was found. Returns (Q,) float64.
    Example: ranked [[3, 1], [0, 2]], correct [{1}, {1, 2}]: recall@1 = [0, 0], recall@2 = [1, 1].
    """
    return (precision_at_k(ranked, correct, k) > 0).astype(float)


def precision_at_k(ranked, correct, k: int) -> np.ndarray:
    """Precision@k: the share of the first k items that are correct, in [0, 1]; see above.

    Example: ranked [[3, 1], [0, 2]], correct [{1}, {0, 2}]: precision@2 = [0.5, 1].
    """
    rows = zip(np.asarray(ranked)[:, :k].tolist(), correct, strict=True)
    return np.array([len(set(right).intersection(row)) / len(row) for row, right in rows])


def bootstrap_ci(values, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval (Efron 1979) of the mean of values (N,), one a query.

    2000 times N of them are drawn with replacement; of differences of two models on the same
    queries this is the paired bootstrap. ValueError for no value. Example: [0, 1] gives (0, 1).
    """
    values = np.asarray(values, dtype=float)
    if np.ptp(values) == 0:  # scipy refuses a single value and rounds the mean of equal ones
        return float(values[0]), float(values[0])
    low, high = stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=seed,
                                batch=2**22 // len(values) + 1).confidence_interval
    return float(low), float(high)


# ---- models --------------------------------------------------------------------------------------
# A model has preprocess(picture of Pillow), encode_image(batch of those), encode_text(list of str).
@contextlib.contextmanager
def refusing(name: str):
    """What a broken folder or no network makes transformers raise, in one line."""
    logging.set_verbosity_error()  # no pages of warnings
    try:
        yield dict(trust_remote_code=False)  # if unset, it would ask whether to run foreign code
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{name}: neither a checkpoint, nor a run folder with model.pt, nor a "
                        f"fit Hugging Face model ({type(error).__name__}: {reason})") from None


class HuggingFaceCLIP(torch.nn.Module):
    """Any model of transformers with an image and a text tower: CLIP, SigLIP, ALIGN."""

    def __init__(self, name: str, precision: str):
        super().__init__()
        self.bf16 = precision == "bf16"
        with refusing(name) as safely:
            self.model, loading = AutoModel.from_pretrained(
                name, output_loading_info=True, **safely)
            self.towers = self.model.get_image_features, self.model.get_text_features
            processor = AutoProcessor.from_pretrained(name, **safely)
            # Unlike a bound method a partial pickles without the model.
            self.preprocess = partial(processor.image_processor, return_tensors="pt")
            self.tokenizer, config = processor.tokenizer, self.model.config
            config = getattr(config, "text_config", config)
            self.length = min(self.tokenizer.model_max_length, config.max_position_embeddings)
            if loading["missing_keys"]:  # random numbers would stand in
                raise ValueError(f"weights are missing, such as {min(loading['missing_keys'])}")
            # Without its files it may load with a handful of tokens, all words alike.
            tokens, places = len(self.tokenizer), config.vocab_size
            if not 0.5 <= tokens / places <= 1.01:
                raise ValueError(f"tokenizer of {tokens} tokens for a tower of {places}")
        self.model.float()  # some are stored in fp16
        self.padding = {"padding": True}
        if config.model_type.startswith("siglip"):  # trained on full length, unmasked
            self.padding = {"padding": "max_length", "return_attention_mask": False}

    def encode_image(self, batch):  # of one picture each: (B, 1, 3, H, W)
        return self.features(0, {name: tensor.flatten(0, 1) for name, tensor in batch.items()})

    def encode_text(self, texts):
        return self.features(1, self.tokenizer(
            texts, truncation=True, max_length=self.length, return_tensors="pt", **self.padding))

    def features(self, tower, inputs):
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        with torch.autocast(self.model.device.type, torch.bfloat16, self.bf16):
            output = self.towers[tower](**inputs)  # since transformers 5 all of its output
        return normalize(getattr(output, "pooler_output", output).float(), dim=-1)


@torch.inference_mode()
def embed(encode, batch) -> torch.Tensor:
    features = encode(batch).float().cpu()  # (B, E), there rankings are made
    if features.ndim != 2 or not features.isfinite().all():
        raise UserError("the model does not give a vector of finite numbers for each input")
    return features


def embed_texts(model, texts: list[str], cfg: EvalConfig) -> torch.Tensor:
    """Features (len(texts), E); equal texts are embedded once and get the same feature."""
    texts = [data.well_formed(text) for text in texts]
    # Alike lengths together need little padding.
    unique = sorted(set(texts), key=lambda text: (len(text), text))
    starts = tqdm(range(0, len(unique), cfg.batch_size), "texts", leave=False, disable=None)
    features = torch.cat([embed(model.encode_text, unique[start:start + cfg.batch_size])
                          for start in starts])
    row = {text: i for i, text in enumerate(unique)}
    return features[[row[text] for text in texts]]


def embed_pictures(model, gallery: dict, cfg: EvalConfig) -> tuple[dict[str, int], torch.Tensor]:
    """({name, with or without its folder: row}, features (N, E)) of the readable pictures."""
    names, kept, features, skipped = list(gallery), [], [], []
    loader = data.picture_loader(gallery, model.preprocess, cfg.batch_size, cfg.workers)
    for good, batch, bad in tqdm(loader, "pictures", leave=False, disable=None):
        kept, skipped = kept + good, skipped + bad
        if good:
            features.append(embed(model.encode_image, batch))
    if skipped:
        listed = "; ".join(f"{names[index]}: {reason}" for index, reason in skipped[:20])
        print(f"skipped {len(skipped)} of {len(names)} pictures: {listed}", file=sys.stderr)
    if not kept:
        raise UserError(f"none of the {len(names)} pictures can be read, such as {names[0]}")
    # a short name that two pictures share stays unclear even if one is left out
    place = {index: row for row, index in enumerate(kept)}
    rows = {name: place[i] for name, i in data.rows_by_name(names).items() if i in place}
    return rows, torch.cat(features)


# ---- measurements --------------------------------------------------------------------------------
# A measurement returns a part of the JSON report in which arrays of values, one a query, stand for
# their mean and its interval. pictures are (rows by name, image features), see embed_pictures.
RECALL_AT = (1, 5, 10)
TEMPLATES = ["{}", "a picture of a {}", "a photo of a {}"]


def images_of(record: dict) -> list[str]:
    """The pictures that a pair or a triplet names. All are right."""
    image = record.get("image") or record.get("filename")
    return record.get("images") or ([image] if image else [])


def unrelated(pairs: list[dict], seed: int) -> np.ndarray:
    """For each pair the index of another that shares no text or picture with it, if possible.

    A model that returns the same pictures for everything would reach 1 here, too.
    """
    order, partner = np.random.default_rng(seed).permutation(len(pairs)), {}
    about = [{pair["query"], pair["paraphrase"], *images_of(pair)} for pair in pairs]
    for place, i in enumerate(order):
        for step in range(1, min(len(pairs), 50)):  # the nearest in this order that will do
            partner[i] = order[place - step]
            if about[i].isdisjoint(about[partner[i]]):
                break
    return np.array([partner[i] for i in range(len(pairs))])


def retrieval(prefix: str, ranked, text_features, image_features, correct) -> dict:
    """Recall both ways and, where a text has several right pictures, precision as well.

    ranked (Q, K): the pictures of each text; correct: its right rows of image_features.
    """
    if not correct:
        return {}
    texts = {}  # {row of a picture: its texts}
    for text, rows in enumerate(correct):
        for row in rows:
            texts.setdefault(row, []).append(text)
    back = rankings(image_features[list(texts)], text_features, max(RECALL_AT))
    recall = {f"t2i@{k}": recall_at_k(ranked, correct, k) for k in RECALL_AT}
    recall |= {f"i2t@{k}": recall_at_k(back, texts.values(), k) for k in RECALL_AT}
    found = {f"{prefix}recall": recall}
    if max(map(len, correct)) > 1:
        found[f"{prefix}precision"] = {"t2i@10": precision_at_k(ranked, correct, 10)}
    return found


def measure_pairs(pairs, split, model, pictures, cfg) -> dict:
    """Rank similarity of queries and paraphrases, and recall of the pictures that they name.

    The same for each kind of pair. The headline of a benchmark (split) is one kind, the first by
    its name, of a user's file all pairs. "shown" is what the figure needs.
    """
    (rows, image_features), k = pictures, min(cfg.k, len(pictures[1]))
    texts = [pair[side] for side in ("query", "paraphrase") for pair in pairs]
    features = embed_texts(model, texts, cfg)  # (2P, E)
    ranked = rankings(features, image_features, max(k, *RECALL_AT))  # (2P, K)
    features, ranked = (part.view(2, len(pairs), -1) for part in (features, ranked))
    correct = [[rows[name] for name in images_of(pair) if name in rows] for pair in pairs]

    def measured(chosen):
        first, second = ranked[:, chosen]
        found = {"pairs": len(chosen), "ao": average_overlap(first, second, k),
                 "js": jaccard(first, second, k)}
        if len(chosen) > 1:
            other = second[unrelated([pairs[i] for i in chosen], cfg.seed)]
            found["ao_random"] = average_overlap(first, other, k)
            found["js_random"] = jaccard(first, other, k)
        known = [i for i in chosen if correct[i]]
        own = [correct[i] for i in known]
        if any(images_of(pairs[i]) for i in chosen):
            found["recall_pairs"] = len(known)
        prefixes = ["query_" if cfg.captions else "", "paraphrase_"]  # "recall": captions'
        for prefix, lists, texts in zip(prefixes, ranked[:, known], features[:, known]):
            found |= retrieval(prefix, lists, texts, image_features, own)
        return found

    groups = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(str(pair.get("kind", "")), []).append(i)
    chosen = groups[min(groups)] if split else list(range(len(pairs)))
    found = {"split": split} if split else {}
    found |= {"k": k, "gallery": len(image_features), **measured(chosen)}
    if any(groups):
        found["kinds"] = {kind: measured(groups[kind]) for kind in sorted(groups)}
    shown = {"pairs": [pairs[i] for i in chosen], "correct": [correct[i] for i in chosen],
             "rows": rows, "ranked": ranked[:, chosen], "ao": found["ao"], "js": found["js"]}
    return {**found, "shown": shown}


def measure_captions(captions, model, pictures, cfg) -> dict:
    """Recall of captions among the pictures that have any, as is the custom."""
    found = sorted((pictures[0][name], name) for name in captions if name in pictures[0])
    if not found:
        raise UserError(f"{cfg.captions}: none of its pictures is there and readable")
    texts = [text for _, name in found for text in captions[name]]
    correct = [[i] for i, (_, name) in enumerate(found) for _ in captions[name]]
    features, own = embed_texts(model, texts, cfg), pictures[1][[row for row, _ in found]]
    ranked = rankings(features, own, max(RECALL_AT))
    counts = {"images": len(found), "missing": len(captions) - len(found), "captions": len(texts)}
    return {"captions": counts, **retrieval("", ranked, features, own, correct)}


def measure_sts(rows, model, pictures, cfg) -> dict:
    """Spearman's rank correlation in [-1, 1] of cosine and score; ties share a mean rank."""
    first, second, scores = zip(*rows)
    a, b = embed_texts(model, [*first, *second], cfg).chunk(2)
    if np.ptp(scores) == 0 or np.ptp(similarity(a, b)) == 0:
        raise UserError(f"{cfg.sts}: equal scores or similarities have no rank correlation")
    found = stats.spearmanr(similarity(a, b), scores).statistic
    return {"sts": {"n": len(rows), "spearman": float(found)}}


def measure_triplets(files, model, pictures, cfg) -> dict:
    """SugarCrepe++: are two captions, and the picture, nearer to each other than a negative?"""
    found = {}
    for file, triplets in files.items():
        texts = [triplet[field] for field in ("caption", "caption2", "negative_caption")
                 for triplet in triplets]
        p1, p2, negative = embed_texts(model, texts, cfg).chunk(3)
        near = similarity(p1, p2)  # below, a tie is a miss
        right = (near > similarity(p1, negative)) & (near > similarity(p2, negative))
        found[file] = {"n": len(triplets), "text_only": right.astype(float)}
        own = {i: pictures[0][name] for i, triplet in enumerate(triplets)
               for name in images_of(triplet) if name in pictures[0]}
        if own:
            seen, picture = list(own), pictures[1][list(own.values())]
            far = similarity(picture, negative[seen])
            right = (similarity(picture, p1[seen]) > far) & (similarity(picture, p2[seen]) > far)
            found[file] |= {"image_text_n": len(seen), "image_text": right.astype(float)}
    return {"triplets": found}


def measure_zeroshot(names, labels, templates, model, pictures, cfg) -> dict:
    """Accuracy of the most similar class, a mean over its prompts (CLIP paper, 3.1.4)."""
    correct = {pictures[0][name]: [labels[name]] for name in labels if name in pictures[0]}
    if not correct:
        return {}
    prompts = [template.replace("{}", name) for name in names for template in templates]
    prompts = embed_texts(model, prompts, cfg).view(len(names), len(templates), -1)
    ranked = rankings(pictures[1][list(correct)], prompts.mean(1), 5)  # of classes
    top1, top5 = (recall_at_k(ranked, correct.values(), k) for k in (1, 5))
    counts = {"classes": len(names), "images": len(correct)}
    return {"zeroshot": {**counts, "top1": top1, "top5": top5}}


# ---- what to measure on --------------------------------------------------------------------------
def read_tasks(cfg: EvalConfig) -> list[tuple[dict, partial]]:
    """[(gallery, measurement on it)]; all files are read here, before a model is opened."""
    gallery, split, labels, labelled, classes = {}, "", {}, {}, []
    pairs = data.read_pairs(cfg.pairs) if cfg.pairs else []
    if cfg.query:
        pairs = [{"query": cfg.query, "paraphrase": cfg.paraphrase}]
    captions = data.read_captions(cfg.captions) if cfg.captions else {}
    triplets, names = {}, [Path(file).name for file in cfg.triplets]
    for file, name in zip(cfg.triplets, names):  # two folders may hold the same name
        triplets[file if names.count(name) > 1 else name] = data.read_triplets(file)
    sts = data.read_sts(cfg.sts) if cfg.sts else []
    if cfg.zeroshot:
        labelled, classes, labels = data.read_zeroshot(cfg.zeroshot, cfg.classnames)
    templates = data.read_templates(cfg.templates) if cfg.templates else TEMPLATES
    if not (cfg.images or triplets or sts or labels):
        from benchmark import read_benchmark  # here: other measurements do without that folder
        split = cfg.split
        gallery, pairs, classes, labels = read_benchmark(cfg.benchmark, split)
        labelled = gallery
    if cfg.images:
        gallery, named = data.list_pictures(cfg.images), set(captions)
        named.update(*map(images_of, chain(pairs, *triplets.values())))
        if not pairs:  # captions and triplets concern the pictures that they name, no others
            gallery = {name: item for name, item in gallery.items()
                       if name in named or Path(name).name in named}
        if not gallery:
            raise UserError(f"{cfg.images}: none of the {len(named)} named pictures is there")
        missing = named - data.rows_by_name(list(gallery)).keys()
        if missing:
            print(f"note: {cfg.images}: {len(missing)} of {len(named)} named pictures are not "
                  f"there, such as {min(missing)}", file=sys.stderr)
    tasks = [(pairs, gallery, partial(measure_pairs, pairs, split)),
             (captions, gallery, partial(measure_captions, captions)),
             (sts, {}, partial(measure_sts, sts)),
             (triplets, gallery, partial(measure_triplets, triplets)),
             (labels, labelled, partial(measure_zeroshot, classes, labels, templates))]
    return [(gallery, task) for given, gallery, task in tasks if given]


# ---- report --------------------------------------------------------------------------------------
def summarise(values: dict, seed: int, base: dict | None = None) -> dict:
    """A measurement's report: each array of values becomes their mean, NAME_ci its interval.

    With base, the values of another model, it tells of the differences and nothing else.
    """
    report = {}
    for name, value in values.items():
        if isinstance(value, dict):
            report[name] = part = summarise(value, seed, base and base[name])
            if "t2i@10" in value:  # of recall and precision the intervals stand together
                report[f"{name}_ci"] = {at: part.pop(f"{at}_ci") for at in value}
        elif isinstance(value, np.ndarray):
            value = value - base[name] if base else value
            report[name], report[f"{name}_ci"] = float(value.mean()), bootstrap_ci(value, seed)
        elif not base:
            report[name] = value
    return {name: value for name, value in report.items() if value != {}}


def print_tables(results: list[tuple[str, dict]], title: str = "all"):
    """Prints [(label, report)] as rows, and below them the dicts inside in the same way."""
    first = results[0][1]
    inner = [name for name, value in first.items()
             if isinstance(value, dict) and "t2i@10" not in value]
    columns = [name for name in first if name not in ("model", *inner) and name[-3:] != "_ci"]
    lines = [[title, *columns]]
    for label, report in results:
        cells = [cell(report.get(name, ""), report.get(f"{name}_ci")) for name in columns]
        if any(cells):
            lines.append([label, *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for label, *cells in lines if columns else ():
        print(label.ljust(widths[0]), *map(str.rjust, cells, widths[1:]), sep="  ")
    print(end="\n" if columns else "")
    for name in inner:
        print_tables([(label, report.get(name, {})) for label, report in results], name)


def cell(value, interval) -> str:
    if isinstance(value, dict):  # a recall
        return " ".join(cell(part, None) for part in value.values())
    shown = f"{100 * value:.1f}" if isinstance(value, float) else str(value)
    return shown + (f" ±{50 * (interval[1] - interval[0]):.1f}" if interval else "")


# ---- main ----------------------------------------------------------------------------------------
def main(argv=None):
    """Measures every model, writes what is asked for, prints tables and JSON."""
    cfg = data.parse_config(EvalConfig, argv)
    models = cfg.models or ["runs/emoji-align"]
    if not cfg.models and not Path(models[0]).exists():
        raise UserError(f"no model given, and no {models[0]} yet: run `python paraclip.py` first")
    ours = {name for name in models if Path(name).is_file() or Path(name, "model.pt").is_file()}
    for name in set(models) - ours:
        with refusing(name) as safely:  # now, not when the models before it are done
            AutoConfig.from_pretrained(name, **safely)
    tasks = read_tasks(cfg)
    torch.backends.cudnn.allow_tf32 = False  # on CUDA convolutions would round fp32 to TF32
    reports, results, shown = [], [], []
    for name in models:
        if name in ours:
            model = load_model(name, cfg.device, cfg.precision)
        else:
            model = HuggingFaceCLIP(name, cfg.precision).to(cfg.device).eval()
        values, embedded = {}, {}
        for gallery, task in tasks:
            if id(gallery) not in embedded:
                embedded[id(gallery)] = embed_pictures(model, gallery, cfg) if gallery else ({}, [])
            values |= task(model, embedded[id(gallery)], cfg)
        del model  # the next one may need the memory
        seen = [rows for rows, _ in embedded.values()]
        shown.append((name, values.pop("shown", None)))
        reports.append({"model": name, **summarise(values, cfg.seed)})
        results.append((name, reports[-1]))
        if len(reports) == 1:
            base, base_seen = values, seen
        elif seen == base_seen:
            # query by query, which is sharper than a look at two intervals
            reports[-1]["diff"] = summarise(values, cfg.seed, base)
            results.append((f"  minus {models[0]}", reports[-1]["diff"]))
        else:
            print(f"note: {name} and {models[0]} can read different pictures, so their "
                  "difference is left out", file=sys.stderr)
    if cfg.json:  # files come before the output, whose reader may have gone
        with data.replacing(cfg.json) as file:
            file.write(json.dumps(reports, indent=1).encode() + b"\n")
    if cfg.figure:
        from benchmark.figure import draw_figure
        draw_figure(cfg.figure, tasks[0][0], shown, base["k"])
    print("Means x100, ± half a 95 % interval. Recall: t2i@1, @5, @10, i2t@1, @5, @10.\n")
    print_tables(results)
    print(json.dumps(reports))


if __name__ == "__main__":
    data.run(main)
