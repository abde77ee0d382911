"""Where is rank similarity lost: in the text tower, or on the way to the images?

A text tower searches the captions of a gallery's images instead of the images, so the image tower
plays no part: what AO misses now, the text tower has lost. The language model by itself tells how
much there was to lose. `python -m experiments.ablation --where-lost` prints both.
"""

from pathlib import Path

import data
from torch.nn.functional import normalize

import eval_paraphrase as evaluation
from paraclip import load_model, masked_mean

EMBED_CONFIG = evaluation.EvalConfig(batch_size=256)


def text_columns(report: dict) -> dict[str, float]:
    """{column: value x100} of what a report of eval_paraphrase.py holds about texts alone."""
    found = {}
    if "sts" in report:
        found["STS"] = 100 * report["sts"]["spearman"]
    if "triplets" in report:
        shares = [file["text_only"] for file in report["triplets"].values()]
        found["SugarCrepe++"] = 100 * sum(shares) / len(shares)
    return found


def overlap_by_kind(model, split: Path) -> dict[str, float]:
    """{column: AO@10 x100} for each kind of pair, and contrast x100 if some pairs change the
    meaning; the gallery is one caption of each image.

    split: folder of a benchmark's split. Features are those of model.encode_text.
    """
    index = data.ShardIndex(str(split))
    captions = [index.captions(i)[0] for i in range(len(index))]
    pairs = evaluation.read_pairs(split / "pairs.jsonl")
    gallery = evaluation.embed_texts(model, captions, EMBED_CONFIG)
    ranked = {}
    for side in ("query", "paraphrase"):
        texts = [getattr(pair, side) for pair in pairs]
        queries = evaluation.embed_texts(model, texts, EMBED_CONFIG)
        ranked[side] = evaluation.rankings(queries, gallery, 10)
    overlaps = evaluation.average_overlap(ranked["query"], ranked["paraphrase"])
    found = {}
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        of_kind = [pair.kind == kind for pair in pairs]
        found[f"AO@10 {kind or 'all pairs'}, captions"] = 100 * overlaps[of_kind].mean()
    compared = evaluation.comparisons(pairs)
    if len(compared):
        found["contrast, captions"] = 100 * evaluation.contrast(*overlaps[compared.T]).mean()
    return found


def search_captions(run: Path, split: Path) -> dict[str, float]:
    """`overlap_by_kind` of a run's text tower."""
    return overlap_by_kind(load_model(run), split)


def without_training(run: Path, split: Path, sts: str, triplets: list[str]) -> dict[str, float]:
    """`overlap_by_kind` and the results on texts of a run's frozen language model alone, without
    alignment layers and projection."""
    model = load_model(run)

    def encode_lm(captions):
        tokens = model.tokenize(captions)
        states = model.text_tower.lm_states(tokens)
        return normalize(masked_mean(states, tokens["attention_mask"]), dim=-1)

    # All that follows asks for encode_text, and now gets the language model's own features.
    model.encode_text = encode_lm
    found = overlap_by_kind(model, split)
    cfg = evaluation.EvalConfig(sts=sts, triplets=triplets)
    results = {}
    if sts:
        results.update(evaluation.STS(cfg, None).measure(model, None, cfg))
    if triplets:
        results.update(evaluation.Triplets(cfg, None).measure(model, None, cfg))
    found.update(text_columns(evaluation.to_json(evaluation.estimate(results, cfg.seed))))
    return found
