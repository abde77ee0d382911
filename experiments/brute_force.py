"""Every number of eval_paraphrase.py once more, by loops over the definitions.

    python -m experiments.brute_force --cases 200

Each case draws a gallery, features with ties, pairs of several kinds, files and groups, some of
which change the meaning, captions, classes and rated sentences; measures them by
eval_paraphrase.py; and recomputes its JSON from the files, without any of its code. Ends in an
error that names the first number that differs by more than 1e-9. (Intervals and unrelated pairs
are drawn at random, and not recomputed.)
"""

import contextlib
import io
import json
import math
import random
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import scipy.stats
from PIL import Image

import eval_paraphrase
from common.cli import UserError, flag, parse_config, run

WORDS = "a red blue dog cat on under big small box ball tree".split()


@dataclass
class BruteForceConfig:
    cases: int = flag(50, "sets of random data", low=1)
    seed: int = flag(0, "seed of the first case", low=0)


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 3)))


def write_case(folder: Path, rng: random.Random) -> dict:
    """Writes the files of a case. Returns what is in them, with features by name and by text."""
    names = [f"{i:02}.png" for i in range(rng.randint(4, 30))]
    (folder / "images").mkdir()
    for name in names:
        Image.new("RGB", (2, 2)).save(folder / "images" / name)
    files = {}
    for file in ("a.jsonl", "b.jsonl")[:rng.randint(1, 2)]:
        pairs = []
        for _ in range(rng.randint(3, 25)):
            pair = {"query": sentence(rng), "paraphrase": sentence(rng),
                    "kind": rng.choice("xyz"), "same": rng.random() < 0.7}
            if rng.random() < 0.8:
                pair["images"] = rng.sample(names, rng.randint(1, 2))
            if rng.random() < 0.3:
                pair["group"] = rng.randint(0, 3)
            pairs.append(pair)
        pairs += rng.choices(pairs, k=2)
        files[file] = pairs
        (folder / file).write_text("\n".join(map(json.dumps, pairs)))
    captions = [(rng.choice(names), sentence(rng)) for _ in range(rng.randint(3, 20))]
    rows = [f"{name},{text}" for name, text in captions]
    (folder / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    classes = list(dict.fromkeys(sentence(rng) for _ in range(rng.randint(2, 9))))
    labels = {name: rng.randrange(len(classes)) for name in rng.sample(names, 3)}
    (folder / "labels.json").write_text(json.dumps({"classnames": classes, "labels": labels}))
    (folder / "prompts.txt").write_text("{}\nthe {}\n")
    rated = [(sentence(rng), sentence(rng), rng.randint(0, 5)) for _ in range(9)]
    (folder / "sts.tsv").write_text("\n".join("\t".join(map(str, row)) for row in rated))

    texts = [text for pairs in files.values() for pair in pairs
             for text in (pair["query"], pair["paraphrase"])]
    texts += [text for _, text in captions] + classes + [f"the {name}" for name in classes]
    texts += [text for row in rated for text in row[:2]]
    texts = sorted(set(texts))
    # Few different vectors of few numbers, so that many similarities tie.
    kinds = np.random.default_rng(rng.random().as_integer_ratio()[0]).integers(0, 4, (12, 3)) + 0.5
    features = {key: kinds[rng.randrange(12)] for key in [*names, *texts]}
    np.savez(folder / "model.npz", names=names, images=[features[name] for name in names],
             texts=texts, text_features=[features[text] for text in texts])
    return dict(names=names, files=files, captions=captions, classes=classes, labels=labels,
                rated=rated, features=features)


# ---- the definitions -----------------------------------------------------------------------------
def cosine(a, b) -> float:
    value = float(np.dot(a, b)) / math.sqrt(float(np.dot(a, a)) * float(np.dot(b, b)))
    # So that what is equal but for rounding ties.
    return round(value * 2**24) / 2**24


def steps(vector) -> list[int]:
    """A unit vector in steps of 2^-24: whole numbers, whose products and sums are exact."""
    norm = math.sqrt(sum(float(x) ** 2 for x in vector))
    return [round(float(x) / norm * 2**24) for x in vector]


def ranked(query, items: list, features: dict) -> list:
    """The items, most similar first; equal ones in their order."""
    unit = steps(features[query])

    def similarity(item) -> int:
        dot = sum(a * b for a, b in zip(unit, steps(features[item])))
        return round(Fraction(dot, 2**24))
    return sorted(items, key=lambda item: -similarity(item))


def overlap(first: list, second: list, k: int) -> float:
    return sum(len(set(first[:d]) & set(second[:d])) / d for d in range(1, k + 1)) / k


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def expected_of_pairs(pairs: list[dict], changed: list[dict], case: dict, k: int) -> dict:
    """What is reported of pairs that keep the meaning, beside pairs that change it."""
    names, features = case["names"], case["features"]
    lists = {text: ranked(text, names, features) for pair in pairs + changed
             for text in (pair["query"], pair["paraphrase"])}

    def ao(pair):
        return overlap(lists[pair["query"]], lists[pair["paraphrase"]], k)

    found = {"pairs": len(pairs)}
    if pairs:
        both = [(set(lists[pair["query"]][:k]), set(lists[pair["paraphrase"]][:k]))
                for pair in pairs]
        found["ao"] = mean(ao(pair) for pair in pairs)
        found["js"] = mean(len(a & b) / len(a | b) for a, b in both)
        found["ao1"] = mean(lists[pair["query"]][0] == lists[pair["paraphrase"]][0]
                            for pair in pairs)
    compared = []
    for kept in pairs:
        for other in changed:
            texts = {kept["query"], kept["paraphrase"]} & {other["query"], other["paraphrase"]}
            if texts:
                difference = round(ao(kept) - ao(other), 9)
                compared.append(1 if difference > 0 else 0.5 if difference == 0 else 0)
    if compared:
        found |= {"contrast": mean(compared), "contrast_pairs": len(compared)}
    asked = [pair for pair in pairs if pair.get("images")]
    for key, side in (("query_recall", "query"), ("paraphrase_recall", "paraphrase")):
        for depth in (1, 5, 10):
            if asked:
                found[f"{key}.t2i@{depth}"] = mean(
                    bool(set(lists[pair[side]][:depth]) & set(pair["images"])) for pair in asked)
    return found


def once(pairs: list[dict]) -> list[dict]:
    """Pairs without those of the same texts, images and meaning as one before."""
    seen = {}
    for pair in pairs:
        content = pair["query"], pair["paraphrase"], *sorted(pair.get("images", [])), pair["same"]
        seen.setdefault(content, pair)
    return list(seen.values())


def expected(case: dict, k: int) -> dict:
    """{path of keys: value} of the JSON."""
    names, features, files = case["names"], case["features"], case["files"]
    k = min(k, len(names))
    everything = [pair for pairs in files.values() for pair in pairs]
    same = once([pair for pair in everything if pair["same"]])
    changed = once([pair for pair in everything if not pair["same"]])
    found = expected_of_pairs(same, changed, case, k)
    for kind in {pair["kind"] for pair in everything if pair["same"]}:
        # A pair of two kinds is in both.
        part = once([pair for pair in everything if pair["same"] and pair["kind"] == kind])
        of_kind = expected_of_pairs(part, [], case, k)
        found |= {f"kinds.{kind}.{name}": value for name, value in of_kind.items()}
    for kind in {pair["kind"] for pair in everything if not pair["same"]}:
        part = once([pair for pair in everything if not pair["same"] and pair["kind"] == kind])
        of_kind = expected_of_pairs(same, part, case, k)
        agreement = expected_of_pairs(part, [], case, k)
        for name in ("contrast", "contrast_pairs"):
            if name in of_kind:
                found[f"changed.{kind}.{name}"] = of_kind[name]
        for name in ("pairs", "ao", "js", "ao1"):
            found[f"changed.{kind}.{name}"] = agreement[name]
    if changed:
        found["ao_changed"] = expected_of_pairs(changed, [], case, k)["ao"]

    captions = case["captions"]
    shown = [name for name in names if name in {name for name, _ in captions}]
    texts = [(name, text) for owner in shown for name, text in captions if name == owner]
    numbered = {i: features[text] for i, (_, text) in enumerate(texts)}
    for depth in (1, 5, 10):
        found[f"recall.t2i@{depth}"] = mean(
            name in ranked(text, shown, features)[:depth] for name, text in texts)
        found[f"recall.i2t@{depth}"] = mean(
            any(texts[i][0] == name
                for i in ranked(name, list(numbered), features | numbered)[:depth])
            for name in shown)

    classes, right = case["classes"], {1: [], 5: []}
    for name, label in case["labels"].items():
        centres = {}
        for i, label_name in enumerate(classes):
            prompts = [features[label_name], features[f"the {label_name}"]]
            centres[i] = sum(prompt / np.linalg.norm(prompt) for prompt in prompts)
        order = ranked(name, list(centres), features | centres)
        for depth in right:
            right[depth].append(label in order[:depth])
    found["zeroshot.top1"] = mean(right[1])
    if len(classes) > 5:
        found["zeroshot.top5"] = mean(right[5])
    similarities = [cosine(features[a], features[b]) for a, b, _ in case["rated"]]
    scores = [score for _, _, score in case["rated"]]
    found["sts.spearman"] = scipy.stats.spearmanr(similarities, scores)[0]
    return found


def look_up(report: dict, path: str):
    for key in path.split("."):
        report = report.get(key, {})
    return report


def main(argv=None):
    cfg = parse_config(BruteForceConfig, argv)
    compared = 0
    for number in range(cfg.seed, cfg.seed + cfg.cases):
        rng = random.Random(number)
        with tempfile.TemporaryDirectory() as folder:
            case, k = write_case(Path(folder), rng), rng.choice([1, 3, 10])
            with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as output:
                eval_paraphrase.main([
                    "model.npz", "--pairs", *case["files"], "--images", "images", "--captions",
                    "captions.csv", "--zeroshot", "labels.json", "--templates", "prompts.txt",
                    "--sts", "sts.tsv", "--k", str(k), "--workers", "0"])
        report, = json.loads(output.getvalue().splitlines()[-1])
        for path, value in expected(case, k).items():
            measured = look_up(report, path)
            if measured == {} or not math.isclose(measured, value, abs_tol=1e-9):
                raise UserError(f"case {number}: {path} is {measured}, expected {value}")
            compared += 1
    print(f"{compared} numbers of {cfg.cases} cases are equal")


if __name__ == "__main__":
    run(main)
