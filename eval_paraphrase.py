"""How alike are the pictures that a model finds for a query and for its paraphrase?

The two numbers of "Adapting Dual-encoder Vision-language Models for Paraphrased Retrieval" (arXiv 2405.03190), AO@k and
JS@k, with retrieval, zero-shot and text-only measurements beside them, for our models and any Hugging Face CLIP:

    python eval_paraphrase.py                                  # runs/emoji-align on the emoji benchmark
    python eval_paraphrase.py runs/*/model.pt openai/clip-vit-base-patch32 --pairs pairs.jsonl --images coco/val2017
    python eval_paraphrase.py MODEL --captions captions_val2017.json --images coco/val2017
    python eval_paraphrase.py MODEL --zeroshot imagenet:ROOT --cache cache
    python eval_paraphrase.py MODEL --sts sts-dev.csv --triplets replace_att.json swap_obj.json --images coco/val2017
    python eval_paraphrase.py MODEL OTHER --images DIR --query "a dog" --paraphrase "a hound" --figure dogs.png

MODEL is a checkpoint, a run folder, or the name or folder of a Hugging Face model with an image and a text tower. What
is measured follows from what is given. A table for people comes first; the last line is the same as one JSON list.

As a library: every metric below returns one value a query, whose mean is the number to report and whose bootstrap
gives its interval:

    ranked = rankings(text_features, image_features, k=10)
    print(recall_at_k(ranked, correct, 10).mean(), bootstrap_ci(recall_at_k(ranked, correct, 10)))
"""

import hashlib
import json
import sys
import textwrap
import unicodedata
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

import data
from data import UserError, replacing, run
from paraclip import load_model, parse_config


def option(default, help, **more):
    value = {"default_factory": list} if default == [] else {"default": default}
    return field(**value, metadata={"help": help, **more})


@dataclass
class EvalConfig:
    models: list[str] = option([], "checkpoints, run folders, Hugging Face names or folders (runs/emoji-align)",
                               positional=True)
    # what is measured; with none of these, the emoji benchmark
    pairs: str = option("", "JSON (lines) of query, paraphrase and perhaps image: rank similarity over --images")
    query: str = option("", "one's own words in place of --pairs, with --paraphrase")
    paraphrase: str = option("", "the same in other words")
    captions: str = option("", "COCO captions JSON: recall in both directions over --images")
    zeroshot: str = option("", "folder of class folders, or cifar10:ROOT, cifar100:ROOT, imagenet:ROOT")
    triplets: list[str] = option([], "SugarCrepe++ files: text-only accuracy, with --images image-text accuracy, too")
    sts: str = option("", "CSV or TSV of sentence1, sentence2, score: Spearman correlation of the text tower")
    split: str = option("test", "part of the emoji benchmark: test, or val to make choices on", choices=("test", "val"))
    # with what
    images: str = option("", "folder of pictures; every one below it is in the gallery of --pairs")
    classnames: str = option("", "names of the classes of --zeroshot, one a line, in the order of the sorted folders")
    templates: str = option("", "prompts for --zeroshot, one a line, with {} for the class name")
    k: int = option(10, "length of the compared lists")
    seed: int = option(0, "of the bootstrap and of the choice of unrelated pairs")
    # how
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where the towers run")
    precision: str = option("fp32", "of the towers; similarities are exact", choices=("fp32", "bf16"))
    batch_size: int = option(64, "pictures or texts at once")
    workers: int = option(2, "processes that decode pictures")
    cache: str = option("", "folder that keeps image features, so that the next question is answered in seconds")
    # what is written
    json: str = option("", "file for the JSON list that also ends the output")
    figure: str = option("", "PNG of one pair's top pictures under every model")


# ---- metrics -------------------------------------------------------------------------------------------------------
# Q queries, N gallery items, E feature size, k list length. A metric returns one value a query: the mean is the number
# to report, the values are what bootstrap_ci resamples.
def average_overlap(a, b, k: int | None = None) -> np.ndarray:
    """AO@k of ranked lists: the overlap of their first d items, averaged over all depths d.

    AO@k = (1/k) sum over d = 1..k of |a[:d] and b[:d]| / d, in [0, 1]: 1 for the same order, 0 for disjoint lists. An
    agreement at the top counts in every depth below it, so AO weighs early ranks most; it is rank-biased overlap's
    relative without a free parameter. Lists hold no item twice and no ties: rankings() has broken them.

    a, b: (..., K) indices, best first, K >= k (default K). Returns (...) float64; ValueError if a list is too short.
    Example: [1, 2, 3, 4] and [2, 1, 3, 5] overlap by 0/1, 2/2, 3/3, 3/4, so AO@4 = 0.6875.
    """
    same = same_items(a, b, k)
    return np.mean([same[..., :d, :d].sum((-2, -1)) / d for d in range(1, same.shape[-1] + 1)], axis=0)


def jaccard(a, b, k: int | None = None) -> np.ndarray:
    """JS@k of ranked lists: |a[:k] and b[:k]| / |a[:k] or b[:k]|, in [0, 1], blind to the order inside the lists.

    Arguments and errors as in average_overlap.
    Example: [1, 2, 3, 4] and [2, 1, 3, 5] share 3 of 5 items, so JS@4 = 0.6.
    """
    same = same_items(a, b, k)
    shared = same.sum((-2, -1))
    return shared / (2 * same.shape[-1] - shared)


def same_items(a, b, k: int | None) -> np.ndarray:
    a, b = np.asarray(a), np.asarray(b)
    k = a.shape[-1] if k is None else k
    if not 0 < k <= min(a.shape[-1], b.shape[-1]):
        raise ValueError(f"lists of {a.shape[-1]} and {b.shape[-1]} items cannot be compared at k = {k}")
    return a[..., :k, None] == b[..., None, :k]  # (..., k, k): does place i of a hold what place j of b holds


GRID = 2.0**24  # similarities are multiples of 1 / GRID, the spacing of fp32 just below 1
SLOTS = 2**27  # largest gallery: similarity (25 bits) and index (27 bits) share one fp64 of 53


def unit_grid(features) -> torch.Tensor:
    """Features (N, E), L2-normalised and rounded to multiples of 1 / GRID, as fp64.

    A product of two such numbers is a multiple of 2^-48 and, for unit vectors, no partial sum of a dot product leaves
    fp64's 53 bits: similarities are exact, hence the same for any chunk size, thread count, kernel and device, and
    equal features tie exactly. In fp32 the same pair of rows may score differently in another place of the matrix.
    """
    features = torch.as_tensor(features, dtype=torch.float64, device="cpu")
    return torch.round(normalize(features, dim=-1) * GRID) / GRID


def rankings(query_features, gallery_features, k: int, chunk: int = 2048) -> torch.Tensor:
    """The k most similar gallery items of every query, best first.

    Cosine similarity rounded to 1 / GRID; ties go to the lower gallery index. The Q x N matrix never exists: chunk x
    chunk blocks are scored and merged into the best so far, so memory is Q * (E + k) + chunk * (E + chunk) numbers.

    query_features (Q, E), gallery_features (N, E). Returns (Q, min(k, N)) int64 indices.
    Example: query (1, 0) and gallery (0, 1), (1, 0), (2, 0) with k = 2 gives [1, 2], the tie in order of index.
    """
    queries, n = unit_grid(query_features), len(gallery_features)
    if n > SLOTS:
        raise ValueError(f"a gallery of {n} items, at most {SLOTS} can be ranked")
    best = torch.full((len(queries), min(k, n)), -torch.inf, dtype=torch.float64)
    for start in range(0, n, chunk):
        gallery = unit_grid(gallery_features[start:start + chunk])
        index = torch.arange(start, start + len(gallery), dtype=torch.float64)
        for first in range(0, len(queries), chunk):
            rows = slice(first, first + chunk)
            # One number orders by similarity, then by lower index. torch.topk alone leaves the order of ties open.
            keys = (queries[rows] @ gallery.T).mul_(GRID).round_().mul_(SLOTS).sub_(index)  # (chunk, chunk)
            keys = torch.cat([best[rows], keys.topk(min(k, len(gallery))).values], dim=1)
            best[rows] = keys.topk(best.shape[1]).values
    return -best.long() % SLOTS


def similarity(a, b) -> np.ndarray:
    """Row by row cosine of two feature matrices (N, E), exact as in rankings. Returns (N,) float64."""
    return np.round((unit_grid(a) * unit_grid(b)).sum(-1).numpy() * GRID) / GRID


def recall_at_k(ranked, correct, k: int) -> np.ndarray:
    """Recall@k in CLIP's convention: 1 if any correct item is among the first k, else 0.

    Textbook recall would be the share of the correct items that was found; here one of a picture's captions is enough.

    ranked: (Q, K) indices, best first, K >= k or K = the whole gallery. correct: for each query the collection of its
    right indices. Returns (Q,) float64. Ties were broken by rankings().
    Example: ranked [[3, 1], [0, 2]], correct [{1}, {1, 2}]: recall@1 = [0, 0], recall@2 = [1, 1].
    """
    rows = np.asarray(ranked)[:, :k].tolist()
    return np.array([not set(right).isdisjoint(row) for row, right in zip(rows, correct, strict=True)], dtype=float)


def zero_shot_accuracy(image_features, labels, class_features) -> tuple[np.ndarray, np.ndarray]:
    """(top-1, top-5) of classifying each picture by its most similar class feature; ties go to the lower class index.

    image_features (N, E), labels (N,) class indices, class_features (C, E), see class_embeddings. Returns two (N,)
    float64 arrays of 0 and 1.
    Example: pictures (1, 0), (0, 1) labelled 0, 0 and classes (1, 0), (0, 1): top-1 = [1, 0], top-5 = [1, 1].
    """
    hits = rankings(image_features, class_features, 5).numpy() == np.asarray(labels)[:, None]  # (N, min(5, C))
    return hits[:, 0].astype(float), hits.any(axis=1).astype(float)


def spearman(a, b) -> float:
    """Spearman's rank correlation in [-1, 1]: Pearson's of the ranks, tied values sharing their mean rank.

    a, b: (N,) numbers, N >= 2. Returns a float; ValueError if one of them is constant, where it is undefined.
    Example: [1, 2, 2, 4] and [1, 3, 2, 4]: ranks [1, 2.5, 2.5, 4] and [1, 3, 2, 4], correlation 0.9487.
    """
    ranks = []
    for values in (a, b):
        _, place, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
        if len(counts) < 2:
            raise ValueError("rank correlation needs at least two different values")
        ranks.append((counts.cumsum() - (counts - 1) / 2)[place])
    return float(np.corrcoef(*ranks)[0, 1])


def bootstrap_ci(values, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron 1979): (low, high).

    values: (N,) numbers, one a query; queries are drawn N at a time with replacement. Given differences of two models
    on the same queries it is the paired bootstrap. One value or equal values: an interval of no width. ValueError for
    none. Memory is bounded whatever N.
    Example: [0, 1] gives (0.0, 1.0), [1, 1, 1] gives (1.0, 1.0).
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"bootstrap_ci needs one value a query, got shape {values.shape}")
    if values.min() == values.max():
        return float(values[0]), float(values[0])
    rng, means = np.random.default_rng(seed), []
    while len(means) < resamples:
        draws = min(resamples - len(means), 2**22 // len(values) + 1)
        means.extend(values[rng.integers(len(values), size=(draws, len(values)))].mean(axis=1))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# ---- models --------------------------------------------------------------------------------------------------------
# Whatever the origin, a model has preprocess(PIL picture), encode_image(batch of those), encode_text(list of str), and
# an identity, which changes whenever its image features may.
SKIPS_NAMED = 20  # unreadable pictures that are named one by one


class HuggingFaceCLIP(torch.nn.Module):
    """Any model of transformers with get_image_features, get_text_features and a processor: CLIP, SigLIP, ALIGN, ..."""

    def __init__(self, name: str, precision: str):
        super().__init__()
        self.bf16 = precision == "bf16"
        try:  # False, not unset: unset would ask on the terminal whether to run the code of the repository
            self.model = AutoModel.from_pretrained(name, trust_remote_code=False).float()  # some are stored in fp16
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # whatever a broken folder, an unknown type or an absent network makes them raise
            reason = " ".join(str(error).split())[:150]
            raise UserError(f"{name}: no checkpoint or run folder of that name here, and as a Hugging Face model it "
                            f"cannot be loaded ({type(error).__name__}: {reason})") from None
        config = self.model.config
        for part, owner in {"get_image_features": self.model, "get_text_features": self.model,
                            "image_processor": processor, "tokenizer": processor}.items():
            if not hasattr(owner, part):
                raise UserError(f"{name}: a {config.model_type} model without {part}, expected a CLIP-like one")
        positions = getattr(getattr(config, "text_config", config), "max_position_embeddings", 512)
        self.tokenizer, self.length = processor.tokenizer, min(processor.tokenizer.model_max_length, positions)
        # SigLIP was trained on captions padded to full length, the padding not masked.
        siglip = config.model_type.startswith("siglip")
        self.padding = dict(padding="max_length", return_attention_mask=False) if siglip else dict(padding=True)
        # A partial pickles with the processor alone; a bound method would send the model to every loader worker.
        self.preprocess = partial(hf_preprocess, processor.image_processor)
        files = sorted(Path(name).glob("*")) if Path(name).is_dir() else []
        self.identity = [name, getattr(config, "_commit_hash", None), [data.stamp(file) for file in files],
                         processor.image_processor.to_json_string()]

    def encode_image(self, batch):
        return self.features(self.model.get_image_features, batch)

    def encode_text(self, texts):
        return self.features(self.model.get_text_features, self.tokenizer(
            texts, truncation=True, max_length=self.length, return_tensors="pt", **self.padding))

    def features(self, encode, inputs):
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        with torch.autocast(self.model.device.type, torch.bfloat16, self.bf16):
            return unit_features(encode(**inputs))


def hf_preprocess(image_processor, image):
    return {name: values[0] for name, values in image_processor(images=image, return_tensors="pt").items()}


def unit_features(output):
    features = output if torch.is_tensor(output) else output.pooler_output  # transformers 5 returns the whole output
    if features.ndim == 3:  # FLAVA projects every token; its contrastive loss takes the first
        features = features[:, 0]
    return normalize(features.float(), dim=-1)


def is_ours(name: str) -> bool:
    """True for a checkpoint or run folder of paraclip.py, False for a Hugging Face folder or name, else UserError."""
    path = Path(name)
    config, checkpoint = path / "config.json", path / "model.pt" if path.is_dir() else path
    # Our run folders hold a config.json as well, but only a Hugging Face one states a model_type.
    if config.is_file() and '"model_type"' in config.read_text(encoding="utf-8"):
        return False
    if not checkpoint.is_file() and (path.exists() or path.suffix == ".pt" or Path(path.parts[0]).exists()):
        raise UserError(f"{name}: neither a checkpoint, nor a run folder with model.pt, nor a Hugging Face model")
    return checkpoint.is_file()


def open_model(name: str, device: str, precision: str):
    if is_ours(name):
        model = load_model(name, device, precision)
        model.identity = data.stamp(Path(name) / "model.pt" if Path(name).is_dir() else Path(name))
        return model
    return HuggingFaceCLIP(name, precision).to(device).eval()


@torch.inference_mode()
def embed(encode, batch) -> torch.Tensor:
    """Features (B, E) of one batch, fp32 on the CPU, where rankings are made whatever the device of the towers."""
    features = encode(batch).float().cpu()
    if not features.isfinite().all():
        raise UserError("the model gives features that are not finite numbers")
    return features


def embed_texts(model, texts: list[str], cfg: EvalConfig) -> torch.Tensor:
    """Text features (len(texts), E)."""
    # Each text once: a query that equals its paraphrase must get the very same feature, whatever its batch neighbours.
    unique = sorted(set(texts), key=lambda text: (len(text), text))  # alike lengths together: little padding
    batches = [unique[start:start + cfg.batch_size] for start in range(0, len(unique), cfg.batch_size)]
    batches = tqdm(batches, "texts", leave=False, disable=None)
    features = torch.cat([embed(model.encode_text, batch) for batch in batches])
    row = {text: i for i, text in enumerate(unique)}
    return features[[row[text] for text in texts]]


def embed_pictures(model, gallery: dict, cfg: EvalConfig) -> tuple[list[str], torch.Tensor]:
    """(names of the readable pictures, their features (N, E)), from --cache where they are known."""
    names, kept, features, skipped, cached = list(gallery), [], [], [], None
    if cfg.cache:
        stamps = [model.identity, cfg.precision, [[name, data.stamp(item)] for name, item in gallery.items()]]
        cached = Path(cfg.cache) / f"{hashlib.sha256(json.dumps(stamps).encode()).hexdigest()}.pt"
    if cached and cached.is_file():
        kept, features, skipped = torch.load(cached, weights_only=True)
    else:
        loader = data.picture_loader(gallery, model.preprocess, cfg.batch_size, cfg.workers)
        for good, batch, bad in tqdm(loader, "pictures", leave=False, disable=None):
            kept, skipped = kept + good, skipped + bad
            if good:
                features.append(embed(model.encode_image, batch))
        features = torch.cat(features) if kept else None
        if cached:
            cached.parent.mkdir(parents=True, exist_ok=True)
            with replacing(cached) as file:
                torch.save((kept, features, skipped), file)
    for index, reason in skipped[:SKIPS_NAMED]:
        print(f"skipped {names[index]}: {reason}", file=sys.stderr)
    if skipped:
        print(f"skipped {len(skipped)} of {len(names)} pictures", file=sys.stderr)
    if not kept:
        raise UserError(f"none of the {len(names)} pictures can be read, such as {names[0]}: {skipped[0][1]}")
    return [names[index] for index in kept], features


# ---- measurements --------------------------------------------------------------------------------------------------
# A measurement returns {path in the JSON, such as "zeroshot/top1": the values of all queries (an array), or a count}.
RECALL_AT = (1, 5, 10)
KINDS = ("name", "order", "template")  # of emoji paraphrases, the headline first
TEMPLATES = ["{}", "a picture of a {}", "a photo of a {}"]


def unrelated(pairs: list[dict], seed: int) -> np.ndarray:
    """For each pair the index of another one, which shares neither a text nor the picture with it where possible.

    A derangement, the same for every model. Lists of unrelated queries show what a similarity is worth: a model that
    returns the same pictures for everything would reach 1 here, too.
    """
    rng, n = np.random.default_rng(seed), len(pairs)
    order, partner = rng.permutation(n), np.empty(n, dtype=int)
    partner[order] = np.roll(order, 1)  # one cycle through all pairs: nobody is its own partner
    about = [{pair["query"], pair["paraphrase"], pair.get("image") or i} for i, pair in enumerate(pairs)]
    for i in range(n):
        for j in rng.integers(n, size=50) if about[i] & about[partner[i]] else ():
            if not about[i] & about[partner[j]] and not about[j] & about[partner[i]]:
                partner[i], partner[j] = partner[j], partner[i]
                break
    return partner


def retrieval(path, ranked, text_features, picture_features, picture):
    """Recall both ways: does a text find its picture, does such a picture find one of its texts?

    ranked: the pictures of each text, best first; picture: for each text the row of its own one in picture_features.
    """
    texts = {}
    for text, row in enumerate(picture):
        texts.setdefault(row, []).append(text)
    back = rankings(picture_features[list(texts)], text_features, max(RECALL_AT))
    return {**{f"{path}/t2i@{k}": recall_at_k(ranked, [[row] for row in picture], k) for k in RECALL_AT},
            **{f"{path}/i2t@{k}": recall_at_k(back, texts.values(), k) for k in RECALL_AT}}


def measure_pairs(pairs, features, lists, pictures, rows, cfg):
    """Rank similarity of queries and paraphrases, and recall of the pictures that the pairs name.

    features (2, P, E) and lists (2, P, >= k) of both sides, pictures (N, E), rows {picture's name: its row}.
    """
    k = min(cfg.k, len(pictures))
    found = {"pairs": len(pairs), "ao": average_overlap(*lists, k), "js": jaccard(*lists, k)}
    if len(pairs) > 1:
        other = lists[1][unrelated(pairs, cfg.seed)]
        found |= {"ao_random": average_overlap(lists[0], other, k), "js_random": jaccard(lists[0], other, k)}
    named = [i for i, pair in enumerate(pairs) if pair.get("image") in rows]
    if named:
        own = [rows[pairs[i]["image"]] for i in named]
        # "recall" is that of --captions where both are asked for
        for path, side in (("query_recall" if cfg.captions else "recall", 0), ("paraphrase_recall", 1)):
            found |= retrieval(path, lists[side][named], features[side][named], pictures, own)
        found["recall_pairs"] = len(named)
    return found


def measure_captions(model, captions, pictures, rows, cfg):
    """Recall of captions among the pictures that have any, as is the custom."""
    names = sorted(captions.keys() & rows.keys(), key=rows.get)  # in the order of the gallery, which breaks ties
    if not names:
        raise UserError(f"{cfg.images}: holds no readable picture of {cfg.captions}")
    picture, texts = zip(*[(i, text) for i, name in enumerate(names) for text in captions[name]])
    features, pictures = embed_texts(model, texts, cfg), pictures[[rows[name] for name in names]]
    ranked = rankings(features, pictures, max(RECALL_AT))
    return {"captions/images": len(names), "captions/missing": len(captions) - len(names),
            "captions/captions": len(texts), **retrieval("recall", ranked, features, pictures, picture)}


def class_embeddings(model, names: list[str], templates: list[str], cfg: EvalConfig) -> torch.Tensor:
    """(C, E): each class's prompts embedded, normalised, averaged over the templates (CLIP paper, section 3.1.4)."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    return normalize(embed_texts(model, prompts, cfg).view(len(names), len(templates), -1).mean(1), dim=-1)


def measure_triplets(path, model, triplets, pictures, rows, cfg):
    """SugarCrepe++: two captions closer to each other than to the negative, and closer to the picture than it is."""
    captions = [triplet[key] for key in ("caption", "caption2", "negative_caption") for triplet in triplets]
    p1, p2, negative = embed_texts(model, captions, cfg).chunk(3)
    close = similarity(p1, p2)
    right = (close > similarity(p1, negative)) & (close > similarity(p2, negative))  # a tie is a miss
    found = {f"{path}/n": len(triplets), f"{path}/text_only": right.astype(float)}
    seen = [i for i, triplet in enumerate(triplets) if triplet.get("filename") in rows]
    if seen:
        picture = pictures[[rows[triplets[i]["filename"]] for i in seen]]
        far = similarity(picture, negative[seen])
        right = (similarity(picture, p1[seen]) > far) & (similarity(picture, p2[seen]) > far)
        found |= {f"{path}/image_text_n": len(seen), f"{path}/image_text": right.astype(float)}
    return found


def measure(model, inputs, cfg):
    """({path: values or count} of everything measured on one model, what the figure needs of it)."""
    found, shown, rows, pictures = {}, {}, {}, None
    if "gallery" in inputs:
        names, pictures = embed_pictures(model, inputs["gallery"], cfg)
        rows = data.rows_by_name(names)
        found = {"k": min(cfg.k, len(names)), "gallery": len(names)}
    if "pairs" in inputs:
        pairs = inputs["pairs"]
        features = embed_texts(model, [pair[side] for side in ("query", "paraphrase") for pair in pairs], cfg)
        lists = rankings(features, pictures, max(cfg.k, *RECALL_AT)).view(2, len(pairs), -1)
        features = features.view(2, len(pairs), -1)
        for kind in inputs["kinds"]:
            chosen = [i for i, pair in enumerate(pairs) if kind in ("all", pair.get("kind"))]
            part = measure_pairs([pairs[i] for i in chosen], features[:, chosen], lists[:, chosen], pictures, rows, cfg)
            if not shown:  # the first kind is the headline
                found |= part
                shown = {"pairs": [pairs[i] for i in chosen], "lists": lists[:, chosen], "names": names,
                         "ao": part["ao"], "js": part["js"]}
            if kind != "all":
                found |= {f"kinds/{kind}/{path}": values for path, values in part.items()}
    if "split" in inputs:
        found["split"] = inputs["split"]
    if "captions" in inputs:
        found |= measure_captions(model, inputs["captions"], pictures, rows, cfg)
    if "sts" in inputs:
        first, second, scores = zip(*inputs["sts"])
        a, b = embed_texts(model, [*first, *second], cfg).chunk(2)
        found |= {"sts/spearman": spearman(similarity(a, b), scores), "sts/n": len(scores)}
    for file, triplets in inputs.get("triplets", {}).items():
        found |= measure_triplets(f"triplets/{file}", model, triplets, pictures, rows, cfg)
    if "zeroshot" in inputs:
        gallery, classes, labels = inputs["zeroshot"]
        if gallery is not inputs.get("gallery"):
            names, pictures = embed_pictures(model, gallery, cfg)
        labelled = [i for i, name in enumerate(names) if name in labels]
        prompts = class_embeddings(model, classes, inputs["templates"], cfg)
        top1, top5 = zero_shot_accuracy(pictures[labelled], [labels[names[i]] for i in labelled], prompts)
        found |= {"zeroshot/top1": top1, "zeroshot/top5": top5, "zeroshot/classes": len(classes),
                  "zeroshot/images": len(labelled)}
    return found, shown


# ---- what to measure on --------------------------------------------------------------------------------------------
def check(cfg: EvalConfig):
    """UserError for settings that cannot be meant, before anything is read."""
    for wrong, complaint in (
        (min(cfg.k, cfg.batch_size) < 1, f"--k {cfg.k}, --batch-size {cfg.batch_size}: expected at least 1"),
        (bool(cfg.query) != bool(cfg.paraphrase), "--query and --paraphrase belong together"),
        (cfg.query and cfg.pairs, "--query and --paraphrase stand in place of --pairs: give one or the other"),
        ((cfg.pairs or cfg.captions) and not cfg.images, "--pairs and --captions need --images DIR to search in"),
        (cfg.images and not (cfg.pairs or cfg.query or cfg.captions or cfg.triplets),
         "--images says where to search; say what for by --pairs, --query, --captions or --triplets"),
        ((cfg.classnames or cfg.templates) and not cfg.zeroshot, "--classnames and --templates belong to --zeroshot"),
        (cfg.figure and not (cfg.pairs or cfg.query) and (cfg.captions or cfg.zeroshot or cfg.triplets or cfg.sts),
         "--figure draws a pair: give --pairs, or --query and --paraphrase"),
        *((not Path(file).absolute().parent.is_dir(), f"{file}: its folder does not exist")
          for file in (cfg.json, cfg.figure)),
    ):
        if wrong:
            raise UserError(complaint)
    try:
        torch.empty(0, device=cfg.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {cfg.device}: {str(error).splitlines()[0]}") from None


def read_inputs(cfg: EvalConfig) -> dict:
    """All that is measured on, read before the first model is opened: {"gallery": ..., "pairs": ..., ...}."""
    inputs = {}
    if cfg.pairs or cfg.query:
        own_words = [{"query": cfg.query, "paraphrase": cfg.paraphrase}]
        inputs |= {"pairs": data.read_pairs(cfg.pairs) if cfg.pairs else own_words, "kinds": ["all"]}
    if cfg.captions:
        inputs["captions"] = data.read_captions(cfg.captions)
    if cfg.zeroshot:
        inputs["zeroshot"] = data.read_zeroshot(cfg.zeroshot, cfg.classnames)
        inputs["templates"] = data.read_templates(cfg.templates) if cfg.templates else TEMPLATES
    if cfg.sts:
        inputs["sts"] = data.read_sts(cfg.sts)
    if cfg.triplets:
        inputs["triplets"] = {Path(file).name: data.read_triplets(file) for file in cfg.triplets}
    if cfg.images:
        inputs["gallery"] = gallery = data.list_pictures(cfg.images)
        if "pairs" not in inputs:  # captions and triplets concern the pictures that they name, no others
            triplets = [triplet for file in inputs.get("triplets", {}).values() for triplet in file]
            wanted = {*inputs.get("captions", ()), *(triplet.get("filename") for triplet in triplets)}
            rows, names = data.rows_by_name(gallery), list(gallery)
            inputs["gallery"] = {names[i]: gallery[names[i]] for i in sorted({rows[name] for name in wanted & {*rows}})}
            if not inputs["gallery"]:
                raise UserError(f"{cfg.images}: holds none of the {len(wanted)} pictures that are named")
    elif cfg.query or not inputs:
        inputs["gallery"], pairs, names, labels = data.read_emoji(data.emoji_folder() / cfg.split)
        if not cfg.query:
            inputs |= {"pairs": pairs, "kinds": KINDS, "split": cfg.split,
                       "zeroshot": (inputs["gallery"], names, labels), "templates": TEMPLATES}
    return inputs


# ---- report --------------------------------------------------------------------------------------------------------
def score(found: dict, seed: int) -> dict:
    """Every array of values becomes (mean, its interval)."""
    return {path: (float(values.mean()), bootstrap_ci(values, seed=seed)) if isinstance(values, np.ndarray) else values
            for path, values in found.items()}


def nest(scores: dict) -> dict:
    """The JSON object: paths become dicts; an interval is NAME_ci beside its mean, all of a recall's in recall_ci."""
    report = {}
    for path, value in scores.items():
        *above, name = path.split("/")
        by_recall = above and above[-1].endswith("recall")
        places = [path.split("/"), [*above[:-1], f"{above[-1]}_ci", name] if by_recall else [*above, f"{name}_ci"]]
        for (*steps, last), leaf in zip(places, value if isinstance(value, tuple) else [value]):
            reduce(lambda place, step: place.setdefault(step, {}), steps, report)[last] = leaf
    return report


def print_table(title, columns, results, under="", bare=()):
    """Prints columns {heading: path below under} of results [(label, scores)], without those that nobody has.

    Means x100, ± half the width of the 95 % interval except where bare, a part of the path, asks for less.
    """
    lines = []
    for label, scores in results:
        cells = []
        for path in columns.values():
            value = scores.get(under + path, "")
            if isinstance(value, tuple):
                mean, (low, high) = value
                value = f"{100 * mean:.1f}" + f" ±{50 * (high - low):.1f}" * (not any(part in path for part in bare))
            cells.append(f"{100 * value:.1f}" if isinstance(value, float) else str(value))
        lines += [[label, *cells]] if any(cells) else []
    used = [column for column in zip(["model", *columns], *lines) if any(column[1:])]
    used = [[text.rjust(max(map(len, column))) if i else text.ljust(max(map(len, column))) for text in column]
            for i, column in enumerate(used)]
    if lines:
        print(f"\n{title}", *map("  ".join, zip(*used)), sep="\n")


def print_report(results):
    first = results[0][1]
    k, where = first.get("k"), f"gallery of {first.get('gallery')} pictures"
    if "split" in first:
        where = f"emoji benchmark, {first['split']} split, {where}"
    own = "query_recall" if "captions/images" in first else "recall"
    for kind in KINDS if "split" in first else [""]:
        print_table(f"Paraphrases{kind and ' by ' + kind} ({where}; R@k of queries, pR@k of paraphrases)",
                    {"pairs": "pairs", f"AO@{k}": "ao", f"JS@{k}": "js", "unrelated AO": "ao_random", "JS": "js_random",
                     **{f"R@{at}": f"{own}/t2i@{at}" for at in RECALL_AT},
                     **{f"pR@{at}": f"paraphrase_recall/t2i@{at}" for at in RECALL_AT}},
                    results, f"kinds/{kind}/" if kind else "", bare=("random", "recall"))
    if "captions/images" in first:
        print_table("Captions", {"pictures": "captions/images", "captions": "captions/captions", **{
            f"{way}@{at}": f"recall/{way}@{at}" for way in ("t2i", "i2t") for at in RECALL_AT}}, results)
    print_table("Zero-shot", {"classes": "zeroshot/classes", "pictures": "zeroshot/images", "top-1": "zeroshot/top1",
                              "top-5": "zeroshot/top5"}, results)
    print_table("Sentence similarity", {"pairs": "sts/n", "Spearman": "sts/spearman"}, results)
    for file in dict.fromkeys(path.split("/")[1] for path in first if path.startswith("triplets/")):
        print_table(f"Triplets: {file}", {"items": "n", "text only": "text_only", "with picture": "image_text_n",
                                          "image-text": "image_text"}, results, f"triplets/{file}/")


# ---- figure --------------------------------------------------------------------------------------------------------
# What the paper's first figure shows: both lists of one pair, a picture that is in both framed alike.
THUMB, GAP, MARGIN, TEXT_WIDTH, SCORE_WIDTH = 118, 20, 28, 250, 110  # pixels
FRAMES = ["#e6194b", "#3477eb", "#2ca02c", "#ff8c00", "#8e44ad", "#00a6a6", "#e754c4", "#8c564b", "#d4b106", "#5a6b7b"]


def draw_text(draw, place, text, size, fill="#111", width=0, lines=1):
    """Text wrapped to about width pixels (0: not at all) and cut after some lines."""
    font = ImageFont.load_default(size=size)
    missing = font.getmask("\uffff")

    def drawable(char):  # the letter without its accent, or a question mark, where Pillow's own font has no glyph
        for char in (char, unicodedata.normalize("NFKD", char)[0]):
            mask = font.getmask(char)
            if char == " " or (mask.size, bytes(mask)) != (missing.size, bytes(missing)):
                return char
        return "?"

    text = "".join(drawable(char) for char in " ".join(text.split()))
    if width:
        columns = int(width * len(text) / font.getlength(text))
        text = textwrap.fill(text, max(columns, 2), max_lines=lines, placeholder="…")
    draw.multiline_text(place, text, fill=fill, font=font, spacing=size * 0.3)


def draw_star(draw, x, y, radius=11):
    turn = np.arange(10) * np.pi / 5
    length = np.where(np.arange(10) % 2, 0.42, 1) * radius
    draw.ellipse((x - radius - 3, y - radius - 3, x + radius + 3, y + radius + 3), fill="white")
    draw.polygon([*zip(x + length * np.sin(turn), y - length * np.cos(turn))], fill="#e0a100")


def draw_figure(path, gallery, shown, index, note, k):
    """Writes the PNG: for each model of shown, [(label, what measure() returned)], two rows of min(10, k) pictures."""
    pair, columns = shown[0][1]["pairs"][index], min(10, k)
    step, block = THUMB + GAP, 2 * (THUMB + GAP) + 50
    width = 2 * MARGIN + TEXT_WIDTH + columns * step + SCORE_WIDTH
    canvas = Image.new("RGB", (width, 2 * MARGIN + len(shown) * block), "white")
    draw = ImageDraw.Draw(canvas)
    for top, (model, part) in zip(range(MARGIN, canvas.height, block), shown):
        draw_text(draw, (MARGIN, top - 8), model, 20)
        rows = [[part["names"][i] for i in ranked[:columns]] for ranked in part["lists"][:, index].tolist()]
        shared = [name for name in rows[0] if name in rows[1]]
        for y, title, names in zip((top + 36, top + 36 + step), ("query", "paraphrase"), rows):
            draw_text(draw, (MARGIN, y), title, 13, "#888")
            draw_text(draw, (MARGIN, y + 20), pair[title], 17, width=TEXT_WIDTH - 30, lines=4)
            for x, name in zip(range(MARGIN + TEXT_WIDTH, width, step), names):
                if name in shared:
                    box = (x - 8, y - 8, x + THUMB + 7, y + THUMB + 7)
                    draw.rounded_rectangle(box, 8, outline=FRAMES[shared.index(name)], width=5)
                canvas.paste(ImageOps.fit(data.open_picture(gallery[name]), (THUMB, THUMB)), (x, y))
                if name == pair.get("image"):
                    draw_star(draw, x + THUMB - 15, y + 15)
        for y, title, values in ((top + 72, "AO", part["ao"]), (top + 72 + step, "JS", part["js"])):
            draw_text(draw, (width - MARGIN - SCORE_WIDTH + 12, y), f"{title}@{k}", 14, "#888")
            draw_text(draw, (width - MARGIN - SCORE_WIDTH + 12, y + 18), f"{100 * values[index]:.0f}", 32)
    draw_text(draw, (MARGIN, canvas.height - MARGIN - 4), note, 13, "#888")
    with replacing(path) as file:
        canvas.save(file, "PNG")


def choose_pair(shown: list) -> tuple[int, str]:
    """(index, why): the pair that tells the first model from the last one, or a median pair of a single model."""
    first, last = shown[0][1]["ao"], shown[-1][1]["ao"]
    if len(first) == 1:
        return 0, ""
    if len(shown) > 1:
        return int(np.argmax(np.abs(first - last))), \
            f"Of {len(first)} pairs the one whose AO differs most between the first and the last model. "
    return int(np.argsort(first, kind="stable")[len(first) // 2]), f"Of {len(first)} pairs the one of median AO. "


# ---- main ----------------------------------------------------------------------------------------------------------
def evaluate(cfg: EvalConfig):
    """Measures every model, prints the tables and the JSON line, writes what --json and --figure ask for."""
    models = cfg.models or ["runs/emoji-align"]
    if not cfg.models and not Path(models[0]).exists():
        raise UserError(f"no model given, and there is no {models[0]} yet: run `python paraclip.py` first")
    check(cfg)
    for name in models:
        is_ours(name)  # a misspelt name stops here, not when the models before it are done
    inputs = read_inputs(cfg)
    results, reports, shown, first = [], [], [], None
    for name in models:
        model = open_model(name, cfg.device, cfg.precision)
        found, figure = measure(model, inputs, cfg)
        del model  # the next one may need the memory
        first, scores = first or found, score(found, cfg.seed)
        results.append((name, scores))
        reports.append({"model": name, **nest(scores)})
        shown.append((name, figure))
        if found is not first:
            # Query by query: the paired bootstrap, far sharper than a comparison of two intervals.
            change = {path: values - first[path] for path, values in found.items()
                      if isinstance(values, np.ndarray) and values.shape == first[path].shape}
            results.append((f"  minus {models[0]}", score(change, cfg.seed)))
            reports[-1]["diff"] = nest(results[-1][1])
    print_report(results)
    print("\n" + json.dumps(reports))
    if cfg.json:
        with replacing(cfg.json) as file:
            file.write(json.dumps(reports, indent=1).encode() + b"\n")
    if cfg.figure:
        index, why = choose_pair(shown)
        note = f"{why}Gallery of {first['gallery']} pictures. Frames of one colour: a picture in both rows." + (
            " Star: the picture that the query describes." if shown[0][1]["pairs"][index].get("image") else "")
        draw_figure(cfg.figure, inputs["gallery"], shown, index, note, first["k"])


def main(argv=None):
    try:
        evaluate(parse_config(EvalConfig, argv))
    except OSError as error:  # a file that is not there or cannot be read or written
        raise UserError(" ".join(str(error).split())) from None


if __name__ == "__main__":
    run(main)
