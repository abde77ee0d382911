"""What the default run and the README's numbers need and the method does not."""

import json

import data


def read_benchmark(name, split: str):
    """(gallery, pairs, class names, {picture: class index}) of a benchmark's split, val or test.

    name: a folder in $PARACLIP_DATA, or its whole path; emoji is drawn the first time. The split
    is a folder of shards with pairs.jsonl, each pair with a "kind", and zeroshot.json.
    """
    if name == "emoji":
        data.find_shards(name)
    folder = data.data_folder(name) / split
    gallery = data.list_pictures(folder)
    pairs = data.read_records(folder / "pairs.jsonl", ["query", "paraphrase", "kind"])
    with data.reading(folder / "zeroshot.json", "classnames: [names], labels: {key: i}") as lines:
        zeroshot = json.loads("\n".join(lines))
        names = [data.well_formed(name) for name in zeroshot["classnames"]]
        labels = {key: range(len(names))[i] for key, i in zeroshot["labels"].items()}
    return gallery, pairs, names, {key: i for key, i in labels.items() if key in gallery}
