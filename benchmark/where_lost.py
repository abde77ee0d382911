"""Where rank similarity is lost: in the text tower, or on the way to pictures?

Let a text tower search the captions of the gallery's pictures, and the image tower is out of the
game: what AO misses then, the text tower has lost. The language model by itself tells how much
there was to lose. `python -m benchmark.ablation --where-lost` prints both.
"""

from pathlib import Path

import numpy as np

import data
import eval_paraphrase as evaluation
from benchmark import read_benchmark
from paraclip import ParaCLIP, load_model

SETTINGS = evaluation.EvalConfig(batch_size=256)


def text_columns(report: dict) -> dict[str, float]:
    """{column: value x100} of what a report holds about texts alone."""
    found = {"STS": 100 * report["sts"]["spearman"]} if "sts" in report else {}
    if "triplets" in report:
        shares = [np.mean(part["text_only"]) for part in report["triplets"].values()]
        found["SugarCrepe++"] = 100 * np.mean(shares)
    return found


def search_captions(model: ParaCLIP, folder: Path) -> dict[str, float]:
    """{column: AO@10 x100} by kind of pair, where the gallery is the captions of its pictures.

    folder: a benchmark's split. Features are those of model.encode_text.
    """
    index, pairs = data.ShardIndex(str(folder)), read_benchmark(folder.parent, folder.name)[1]
    captions = [index.caption(i) for i in range(len(index))]
    texts = [pair[side] for side in ("query", "paraphrase") for pair in pairs]
    features = evaluation.embed_texts(model, captions + texts, SETTINGS)
    gallery, queries = features[:len(captions)], features[len(captions):]
    first, second = evaluation.rankings(queries, gallery, 10).chunk(2)
    overlaps = {}
    for pair, overlap in zip(pairs, evaluation.average_overlap(first, second)):
        overlaps.setdefault(pair["kind"], []).append(overlap)
    return {f"AO@10 {kind}, captions": 100 * np.mean(overlaps[kind]) for kind in sorted(overlaps)}


def where_lost(runs: dict[str, list[Path]], folder: Path, sts: str, triplets: list[str]) -> dict:
    """{row: [columns of each run]}; the bare language model has a row if a run kept it frozen."""
    found, frozen = {}, None
    for row, folders in runs.items():
        models = [load_model(run) for run in folders]
        found[row] = [search_captions(model, folder) for model in models]
        frozen = models[0] if models[0].text_tower.frozen else frozen
    if frozen:
        frozen.encode_text = frozen.encode_lm  # its text tower is now the language model alone
        report = {}
        if sts:
            report |= evaluation.measure_sts(data.read_sts(sts), frozen, None, SETTINGS)
        if triplets:
            files = {file: data.read_triplets(file) for file in triplets}
            report |= evaluation.measure_triplets(files, frozen, ({}, []), SETTINGS)
        found["the bare language model"] = [search_captions(frozen, folder) | text_columns(report)]
    return found
