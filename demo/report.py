"""The page of eval_paraphrase.py: numbers, and what every query and its paraphrase find.

One HTML file that needs nothing else, not even a network. Above, all results and a bar for each
kind of pair and model; below, pair by pair, the images that the two texts find with each model.
"""

import base64
import io
import itertools
import json
from html import escape

import numpy as np

from common.files import atomic_write
from data import BadSample

# Of each list at most this many images are shown, whatever k is.
SHOWN = 10
# Longest side of a thumbnail, in pixels.
THUMB = 128
# Browsers open larger pages slowly, and mail does not take them.
MAX_BYTES = 20_000_000

STYLE = """
:root { color-scheme: light dark; --page: #f3f4f6; --card: #fff; --ink: #1b1d21; --soft: #5a606b;
  --line: #d5d9e0; --both: #1d5fd1; --good: #18793c; --bad: #a83a12; --bar: #6f9be8 }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1f2228; --ink: #e9ebef;
  --soft: #a4abb8; --line: #3a3f49; --both: #78a9ff; --good: #5fd08a; --bad: #ff9a70;
  --bar: #3f6fc4 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: var(--page); color: var(--ink);
  font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.2; margin: .5rem 0 }
h2 { font-size: 1.15rem; margin: 1.6rem 0 .5rem }
p { margin: .4rem 0; max-width: 46rem }
.soft { color: var(--soft) }
:focus-visible { outline: 3px solid var(--both); outline-offset: 2px }
.wide { overflow-x: auto }
table { border-collapse: collapse }
caption { text-align: left }
th, td { padding: .15rem .6rem .15rem 0; text-align: left; font-weight: normal }
.numbers td, .numbers thead th { text-align: right; white-space: pre; vertical-align: bottom;
  font-variant-numeric: tabular-nums }
.numbers th[scope=rowgroup], .bars th[scope=rowgroup] { font-weight: 600; padding-top: .6rem }
.bars { width: 100%; max-width: 46rem }
.bars td:last-child { white-space: nowrap; text-align: right; padding-right: 0 }
.bar { width: 55% }
.bar div { position: relative; height: 1.1rem; background: var(--card);
  border: 1px solid var(--line) }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--bar) }
.lower i { background: repeating-linear-gradient(45deg, var(--bar) 0 3px, var(--card) 3px 6px) }
.bar u { position: absolute; top: 45%; height: 2px; background: var(--ink) }
.bar s, s.sample { position: absolute; top: -3px; bottom: -3px; width: 0;
  border-left: 3px dotted var(--bad) }
s.sample { position: static; margin: 0 .6rem 0 .3rem }
summary { cursor: pointer; padding: .4rem 0 }
form { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .5rem 1rem;
  align-items: end; padding: .6rem 0; background: var(--page);
  border-bottom: 1px solid var(--line) }
label { max-width: 100%; font-size: .85rem; color: var(--soft) }
select, input { display: block; max-width: 100%; font: inherit; padding: .3rem .4rem;
  color: var(--ink); background: var(--card); border: 1px solid var(--soft); border-radius: .3rem }
article { margin: 1rem 0; padding: .9rem 1rem 1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem;
  content-visibility: auto; contain-intrinsic-size: auto 22rem }
article[hidden] { display: none }
.two { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .2rem 2.5rem }
h3 { font-size: 1.05rem; margin: .1rem 0 .4rem }
h3 small, .tag { display: block; font-size: .85rem; font-weight: normal; color: var(--soft) }
.tag { margin: 0 0 .5rem }
h4 { margin: .8rem 0 .4rem; font-size: .95rem; font-weight: normal; color: var(--soft) }
h4 b { color: var(--ink) }
.changed .tag { color: var(--bad); font-weight: 600 }
ol { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: .6rem;
  margin: 0; padding: 0; list-style: none }
li { position: relative; aspect-ratio: 1 }
img { width: 100%; height: 100%; object-fit: contain; border-radius: .3rem; font-size: .7rem;
  overflow: hidden; background: var(--page); outline: 1px solid var(--line) }
.both img { outline: 4px solid var(--both) }
.right::after { content: "✓"; position: absolute; top: .2rem; right: .2rem; width: 1.5rem;
  line-height: 1.5rem; text-align: center; font-weight: 700; color: #fff; background: #18793c;
  border: 1px solid #fff; border-radius: 50% }
.legend > span { margin-right: 1.2rem }
.legend .both::before { content: ""; display: inline-block; width: 1em; height: 1em;
  margin-right: .4em; vertical-align: -.12em; border: 4px solid var(--both);
  border-radius: .2rem }
.legend b { color: var(--good); margin-right: .4em }
@media (max-width: 45rem) {
  .two { grid-template-columns: minmax(0, 1fr); gap: .7rem }
  ol { gap: .5rem }
  .both img { outline-width: 3px }
  ol::before { content: attr(aria-label); grid-column: 1 / -1; font-size: .85rem;
    color: var(--soft) }
  form { position: static }
  article { padding: .7rem }
}
"""

SCRIPT = """
for (const img of document.images) {
  img.title = img.alt;
  // An image that could not be read has no thumbnail, and shows its text.
  if (THUMBS[img.dataset.i]) img.src = "data:image/webp;base64," + THUMBS[img.dataset.i];
}
const form = document.forms[0], list = document.getElementById("pairs");
const pairs = [...list.children];
for (const pair of pairs) {
  pair.scores = JSON.parse(pair.dataset.scores);
  pair.words = pair.querySelector("h3").textContent.toLowerCase();
}
function update() {
  // A model, or a model and the one that is subtracted from it.
  const [model, other] = form.by.value.split(",");
  const score = pair => pair.scores[model] - (other ? pair.scores[other] : 0);
  const sign = form.order.value === "worst" ? 1 : -1;
  pairs.sort((a, b) => sign * (score(a) - score(b)));
  list.append(...pairs);
  const words = form.words.value.toLowerCase().split(/\\s+/);
  for (const pair of pairs) {
    const fits = form.kind.value === "" || form.kind.value === pair.dataset.kind;
    pair.hidden = !fits || !words.every(word => pair.words.includes(word));
  }
  const shown = pairs.filter(pair => !pair.hidden).length;
  document.getElementById("count").textContent = shown + " of " + pairs.length + " pairs";
}
form.addEventListener("input", update);
form.addEventListener("submit", event => event.preventDefault());
update();
"""


def write_report(path, headers, table, reports, images, details, k, open_image, most_pairs):
    """Writes the page, with at most `most_pairs` pairs, and fewer if it would exceed MAX_BYTES.

    headers: of the columns of the table. table: (lines above it, [(section title, [(row title, a
    cell for each column)])]). reports: a dict for each model, as in the JSON. details: {model
    label: what --details writes of each pair}, of the same models. images: {name:
    what open_image opens as a Pillow image}.
    """
    results = bars_html(dict(zip(details, reports)), k), table_html(headers, *table)
    thumbs = {}
    count = most_pairs
    while True:
        chosen = choose_pairs(details, count)
        page = page_html(results, details, chosen, k, count < most_pairs,
                         lambda name: thumbnail(name, images, open_image, thumbs))
        # Names of files may hold bytes that are no text.
        content = page.encode("utf-8", "replace")
        if len(content) <= MAX_BYTES or count == 1:
            break
        count = max(1, len(chosen) // 2)
    with atomic_write(path) as file:
        file.write(content)


def thumbnail(name, images, open_image, thumbs: dict) -> str:
    """A small WebP in base 64; "" for an image that cannot be read, which lists may name."""
    if name not in thumbs:
        try:
            image = open_image(images[name])
            image.thumbnail((THUMB, THUMB))
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=60)
            thumbs[name] = base64.b64encode(buffer.getvalue()).decode()
        except (BadSample, OSError):
            thumbs[name] = ""
    return thumbs[name]


def group_of(record: dict) -> str:
    """What pairs are filtered by: their kind, and whether they keep the meaning."""
    kind = record["kind"] or "pairs"
    return kind if record["same"] else f"{kind}, meaning changed"


def scores_of(records: list[dict]) -> list[float]:
    """AO of pairs that keep the meaning, 1 - AO of the others: the higher, the better."""
    return [record["ao"] if record["same"] else 1 - record["ao"] for record in records]


def choose_pairs(details: dict, count: int) -> list[int]:
    """The indices of `count` pairs, evenly from the worst to the best ones of every group by their
    mean score, then the worst of the first model first."""
    scores = np.array([scores_of(records) for records in details.values()])
    records = next(iter(details.values()))
    mean = scores.mean(0)
    order = sorted(range(len(records)), key=lambda i: (group_of(records[i]), mean[i]))
    places = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return sorted((order[place] for place in places), key=lambda i: scores[0, i])


def table_html(headers, lines, sections) -> str:
    """The table of the terminal."""
    parts = [f"<p>{escape(line)}</p>" for line in lines]
    cells = "".join(f'<th scope="col">{escape(header)}</th>' for header in headers)
    parts.append(f'<table class="numbers"><thead><tr><td></td>{cells}</tr></thead>')
    for section, rows in sections:
        parts.append(f'<tbody><tr><th scope="rowgroup">{escape(section)}</th></tr>')
        for row_title, cells in rows:
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            parts.append(f'<tr><th scope="row">{escape(row_title)}</th>{cells}</tr>')
        parts.append("</tbody>")
    return "".join(parts) + "</table>"


def bars_html(reports: dict[str, dict], k: int) -> str:
    """A bar of AO for every kind and model, then of contrast and recall, with their intervals and
    what is reached by chance."""
    parts = [f'<table class="bars"><caption class="soft">AO@{k}</caption>']
    first, rows, changed = next(iter(reports.values())), [], ", meaning changed: lower is better"
    for section, suffix in (("kinds", ""), ("files", ""), ("changed", changed)):
        for name in first.get(section, {}):
            results = {label: report[section][name] for label, report in reports.items()}
            rows.append((name + suffix, "ao", results))
    recalls = {label: report.get("recall", {}) | {
        f"{name}_ci": interval for name, interval in report.get("recall_ci", {}).items()}
        for label, report in reports.items()}
    rows += [("all that keep the meaning", "ao", reports), (f"all{changed}", "ao_changed", reports),
             ("contrast: how often a pair agrees more than one whose meaning changed", "contrast",
              reports), ("R@10: a right image is among the first ten", "t2i@10", recalls)]
    for title, key, results in rows:
        # Files and kinds may hold only pairs of one sort, and short lists have no R@10.
        results = {label: report for label, report in results.items() if key in report}
        if not results:
            continue
        parts.append(f'<tbody class="{"lower" if title.endswith(changed) else ""}">')
        if len(reports) > 1:
            parts.append(f'<tr><th scope="rowgroup" colspan="3">{escape(title)}</th></tr>')
        for label, report in results.items():
            value = report[key]
            chance = 0.5 if key == "contrast" else report.get(f"{key}_random")
            low, high = report.get(f"{key}_ci", (value, value))
            mark = "" if chance is None else f'<s style="left:{100 * chance:.1f}%"></s>'
            parts.append(
                f'<tr><th scope="row">{escape(label if len(reports) > 1 else title)}</th>'
                f'<td class="bar"><div><i style="width:{100 * value:.1f}%"></i>'
                f'<u style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></u>'
                f'{mark}</div></td><td>{100 * value:.1f}</td></tr>')
        parts.append("</tbody>")
    return "".join(parts) + "</table>"


def list_html(record: dict, side: str, other: str, k: int, number_of: dict, titles: dict) -> str:
    """The images that one of the two texts finds, best first.

    number_of: the place of each image's thumbnail. titles: what is known to be on an image.
    """
    items, others = [], record[f"{other}_ranking"][:k]
    for rank, name in enumerate(record[f"{side}_ranking"][:min(k, SHOWN)], 1):
        marks, says = [], f"{rank}: {titles.get(name, name)}"
        if name in others:
            marks.append("both")
            says += f", number {others.index(name) + 1} of the {other}"
        # The other text of a pair whose meaning changed describes another image.
        if name in record["images"] and (record["same"] or side == "query"):
            marks.append("right")
            says += ", correct"
        items.append(f'<li class="{" ".join(marks)}"><img data-i="{number_of[name]}" '
                     f'alt="{escape(says)}"></li>')
    return f'<ol aria-label="found by the {side}">{"".join(items)}</ol>'


def pair_html(records: dict[str, dict], k: int, number_of: dict, titles: dict) -> str:
    """One pair, with the two lists of each model."""
    first = next(iter(records.values()))
    scores = [round(score, 6) for score in scores_of(records.values())]
    tag = escape(first["kind"])
    if not first["same"]:
        tag = f"{escape(group_of(first))}: the lists should differ"
    parts = [f'<article class="{"" if first["same"] else "changed"}" '
             f'data-kind="{escape(group_of(first))}" data-scores="{scores}">'
             f'<p class="tag">{tag}</p><h3 class="two">']
    for side in ("query", "paraphrase"):
        what = side if side == "query" or first["same"] else "text of another meaning"
        parts.append(f'<span><small>{what}</small><bdi>{escape(first[side])}</bdi></span>')
    parts.append("</h3>")
    for label, record in records.items():
        shared = len(set(record["query_ranking"][:k]) & set(record["paraphrase_ranking"][:k]))
        parts.append(f'<h4>{escape(label)}: <b>AO@{k} {100 * record["ao"]:.0f}</b>, '
                     f'{shared} of {k} images in both lists</h4><div class="two">'
                     + list_html(record, "query", "paraphrase", k, number_of, titles)
                     + list_html(record, "paraphrase", "query", k, number_of, titles) + "</div>")
    return "".join(parts) + "</article>"


def options(values: dict[str, str]) -> str:
    return "".join(f'<option value="{escape(value)}">{escape(text)}</option>'
                   for value, text in values.items())


def page_html(results, details, chosen, k, is_cut, thumbnail) -> str:
    bars, table = results
    labels, pairs = list(details), []
    records = details[labels[0]]
    number_of, thumbs, titles = {}, [], {}
    for record in records:
        for name in record["images"] if record["same"] else ():
            # Who does not see the image learns from it a text that describes it.
            titles.setdefault(name, f"{name}, “{record['query']}”")
    for i, label in itertools.product(chosen, labels):
        record = details[label][i]
        for name in record["query_ranking"][:SHOWN] + record["paraphrase_ranking"][:SHOWN]:
            if name not in number_of:
                number_of[name] = len(thumbs)
                thumbs.append(thumbnail(name))
    for i in chosen:
        pair = {label: details[label][i] for label in labels}
        pairs.append(pair_html(pair, k, number_of, titles))

    sorts = {f"{m}": f"AO of {label}" for m, label in enumerate(labels)}
    for (a, first), (b, second) in itertools.combinations(enumerate(labels), 2):
        sorts[f"{b},{a}"] = f"AO of {second} minus {first}"
    kinds = {"": "all"} | {group_of(record): group_of(record) for record in records}
    note = f"All {len(records):,} pairs are shown."
    if len(chosen) < len(records):
        note = (f"{len(chosen):,} of {len(records):,} pairs are shown, spread evenly from the "
                f"worst to the best of each kind; {len(records) - len(chosen):,} are left out")
        note += (f": with more of them, this page would exceed {MAX_BYTES // 10**6} MB." if is_cut
                 else " (--report-pairs shows more).")
    more = f" The first {SHOWN} of {k} images are shown." if k > SHOWN else ""
    if not all(record["same"] for record in records):
        more += " Where the meaning changed, a high AO counts as the worse one."
    correct = any(record["images"] for record in records)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>Queries and paraphrases</title><style>{STYLE}</style></head><body>
<header><h1>What queries and their paraphrases find</h1>
<p>Two texts that mean the same should find the same images. AO@{k} says how far the two lists of
{k} images agree: 100 if they are equal, 0 if they share nothing; the first ranks weigh most.</p>
</header><main>
<section aria-labelledby="results"><h2 id="results">How far the lists agree</h2>
{bars}
<p class="soft"><s class="sample"></s> what a model reaches without understanding: AO@{k} of
unrelated texts, and a contrast of 50. The thin line is the 95 % interval.</p>
<details><summary>All numbers</summary><div class="wide" tabindex="0" role="region"
 aria-label="All numbers">{table}</div></details></section>
<section aria-labelledby="shown"><h2 id="shown">What the texts find</h2>
<p class="soft">{note}{more}</p>
<p class="legend"><span class="both">in both lists</span>
{'<span><b>✓</b>correct image</span>' if correct else ""}</p>
<form><label>Sort by<select name="by">{options(sorts)}</select></label>
<label>Order<select name="order"><option value="worst">worst first</option>
<option value="best">best first</option></select></label>
<label>Kind<select name="kind">{options(kinds)}</select></label>
<label>Words in the texts<input name="words" type="search"></label>
<output id="count" class="soft"></output></form>
<div id="pairs">{"".join(pairs)}</div></section></main>
<script>const THUMBS = {json.dumps(thumbs)};{SCRIPT}</script></body></html>
"""
