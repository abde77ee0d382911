"""Tests of the default run and of laptop.py, speed.py, ablation.py, where_lost.py and curve.py.

With a tiny model and few scenes.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import string
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import normalize

import data
import eval_paraphrase
import paraclip
from benchmark import ablation, curve, emoji_scenes, laptop, read_benchmark, speed

TINY = dict(image_size=16, patch_size=8, stem="patch", width=32, depth=2, heads=2, embed_dim=16,
            batch_size=16, precision="fp32", warmup=1, steps=3)
FORK = multiprocessing.get_context("fork")  # spares each process its imports
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folder with a few emoji scenes and, beside them, a tiny BERT that reads letters."""
    root, letters = tmp_path_factory.mktemp("tiny"), string.ascii_lowercase
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    (root / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2,
                                     num_attention_heads=2, intermediate_size=128)
    transformers.BertModel(config).save_pretrained(root)
    transformers.BertTokenizerFast(str(root / "vocab.txt")).save_pretrained(root)
    emoji_scenes.write_emoji(root, train=48, gallery=24)
    return root


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    monkeypatch.setenv("PARACLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(speed, "timed_for_a_second", lambda work: speed.timed(work, 1))
    torch.set_num_threads(1)


def flags(**fields) -> list[str]:
    return [part for k, v in fields.items() for part in (f"--{k.replace('_', '-')}", str(v))]


# ---- the default run: what paraclip.py and eval_paraphrase.py do without flags -------------------
def test_the_default_run_and_its_evaluation(root, tmp_path, monkeypatch, capsys):
    def evaluate(*argv):
        eval_paraphrase.main([*argv, "--workers", "0"])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARACLIP_DATA", "data")
    shutil.copytree(root, "data/emoji")
    paraclip.main(flags(**TINY | dict(lm=root)))
    report, = evaluate()
    one, two = evaluate("runs/emoji-align", "runs/emoji-align/model.pt")
    assert report == one and two["diff"]["kinds"]["template"]["ao_ci"] == [0, 0]
    gallery, pairs, names, labels = read_benchmark(os.path.abspath("data/emoji"), "test")
    assert (report["split"], report["k"], report["gallery"]) == ("test", 10, 24) == (
        "test", 10, len(gallery))
    kinds = Counter(pair["kind"] for pair in pairs)
    assert {kind: part["pairs"] for kind, part in report["kinds"].items()} == kinds
    assert report.items() >= report["kinds"]["name"].items()  # the headline

    model = paraclip.load_model("runs/emoji-align")
    pictures = [model.preprocess(data.open_picture(item)) for item in gallery.values()]
    prompts = [form.format(name) for name in names for form in eval_paraphrase.TEMPLATES]
    queries = [pair["query"] for pair in pairs if pair["kind"] == "name"]
    right = [list(gallery).index(pair["image"]) for pair in pairs if pair["kind"] == "name"]
    with torch.no_grad():
        images = model.encode_image(torch.stack(pictures))
        classes = normalize(model.encode_text(prompts).view(len(names), 3, -1).mean(1), dim=-1)
        ranked = (model.encode_text(queries) @ images.T).argsort(dim=1, descending=True)
    best = (images @ classes.T).topk(5).indices.tolist()
    place = {name: row for row, name in enumerate(gallery)}
    hits = [label in best[place[name]] for name, label in labels.items()]
    assert report["zeroshot"]["top5"] == pytest.approx(np.mean(hits))
    hits = [i in row[:5] for i, row in zip(right, ranked.tolist())]
    assert report["recall"]["t2i@5"] == pytest.approx(np.mean(hits))

    # of a shard that breaks off, and of a label that cannot be
    shard = tmp_path / "data/emoji/val/00000.tar"
    shard.write_bytes(shard.read_bytes()[:-20_000])
    reports = evaluate("--split", "val")
    assert 0 < reports[0]["gallery"] < 24 and reports[0]["split"] == "val"
    zeroshot = tmp_path / "data/emoji/val/zeroshot.json"
    zeroshot.write_text('{"classnames": ["x"], "labels": {"000000000": 1}}')
    with pytest.raises(data.UserError, match="zeroshot.json"):
        evaluate("--split", "val")


def test_remembered_states_are_those_of_the_language_model(root, monkeypatch):
    def build(text):
        return paraclip.ParaCLIP(paraclip.Config(**TINY, lm=str(root), text=text))

    model, index = build("align"), data.ShardIndex(str(root / "train"))
    recall = laptop.remember_states(model, index)
    captions = [index.caption(i) for i in (7, 3, 7, 21)]
    tokens = recall(captions)
    assert "input_ids" not in tokens and tokens["attention_mask"].sum(1).tolist() == [
        len(model.text_tower.tokenizer(caption)["input_ids"]) for caption in captions]
    with torch.no_grad():
        for encode in (model.encode_text, model.encode_lm):
            assert torch.allclose(encode(tokens), encode(captions), atol=1e-6)
    monkeypatch.setattr(laptop, "STATES_BYTES", 48 * 6 * 32 * 4)  # what most, not all, would take
    assert laptop.remember_states(model, index) is None
    assert laptop.remember_states(build("finetune"), index) is None  # they would change


# ---- speed ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, passes", [("align", 1), ("finetune", 3)])
def test_useful_operations_are_those_counted_by_hand(root, text, passes):
    model = paraclip.ParaCLIP(paraclip.Config(**TINY, lm=str(root), text=text))
    tokens = model.tokenize(["x", "abcdefg"])  # 3 and 9 tokens in rows of 9
    micro_batches = [(torch.zeros(2, 3, 16, 16), [tokens])] * 2

    def block(T):  # forward: the weights of qkv, proj, fc1, fc2; scores and what they weigh
        return 2 * T * 12 * 32 ** 2 + 4 * T * T * 32

    projection = 3 * 2 * 32 * 16

    def caption(T):
        return passes * 2 * block(T) + (3 * block(T) if text == "align" else 0) + projection

    patches = 2 * 2 * 4 * 3 * 8 ** 2 * 32  # twice: nobody asks for the gradient of a picture
    image = patches + 3 * 2 * block(1 + 4) + projection
    assert speed.pair_flops(model, micro_batches) == (image, (caption(3) + caption(9)) / 2)


def rank_of_two(rank: int, argv: list[str], port: int, queue):
    os.environ |= dict(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2",
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    queue.put(speed.measure(data.parse_config(speed.SpeedConfig, argv)))


def test_speed_of_one_process_and_of_two(root, capsys):
    argv = flags(**TINY | dict(lm=root, data=root / "train"))
    speed.main([*argv, "--accum", "2"])
    queue, port = FORK.Queue(), 20000 + os.getpid() % 10000
    for rank in (0, 1):
        FORK.Process(target=rank_of_two, args=(rank, argv, port, queue), daemon=True).start()
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    one, other = queue.get(timeout=300), queue.get(timeout=300)
    times, others = ([row["ms"] for row in part["rows"].values()] for part in (one, other))
    assert times == others  # the slowest rank's
    for report, ranks in ((alone, 1), (one, 2)):
        assert 0 < report["data_wait"] < 1 and 0 < report["padding"] < 0.9 and report["tokens"] > 3
        for row in report["rows"].values():
            assert row["images_per_s"] == pytest.approx(16 / (row["ms"] / 1000))
        step = report["rows"]["whole_step"]
        rate = 1e9 * report["pair_gflops"] * step["images_per_s"] / ranks
        assert step["tflops"] == pytest.approx(rate / 1e12)
        assert step["mfu"] == pytest.approx(rate / 1e12 / report["product_tflops"])


# ---- ablation ------------------------------------------------------------------------------------
def test_ablation_trains_what_is_missing_and_averages(root, tmp_path, monkeypatch, capsys):
    measured = []

    def program(name, *argv):
        argv = [str(part) for part in argv]
        if name == "paraclip.py":
            return paraclip.main(argv)
        measured.append(argv[0])
        return eval_paraphrase.main([*argv, "--workers", "0"])

    monkeypatch.setattr(ablation, "python", program)
    here = contextlib.nullcontext(SimpleNamespace(map=map))  # threads could not catch signals
    monkeypatch.setattr(ablation, "ThreadPoolExecutor", lambda jobs, initializer: here)
    out, file = tmp_path / "runs", tmp_path / "tables.json"
    argv = [*flags(data=root, out=out, json=file), "--rows", "frozen", "align", "--seeds", "0"]
    extra = ["--", *flags(**TINY | dict(lm=root))]
    ablation.main([*argv, *extra])
    ablation.main([*argv, "1", "--equal-time", "--where-lost", *extra])
    shown, tables = capsys.readouterr().out, json.loads(file.read_text())
    assert json.loads(shown.splitlines()[-1]) == tables
    assert len(measured) == len(set(measured)) == 6  # frozen and its twin of equal time, align
    os.utime(out / "align-0/model.pt", (2 ** 31, 2 ** 31))  # as if trained since
    ablation.main([*argv, *extra])
    assert measured[6:] == [str(out / "align-0")]

    reports = [out / f"align-{seed}/test.json" for seed in (0, 1)]
    values = [100 * json.loads(report.read_text())[0]["ao"] for report in reports]
    mean, sd = np.mean(values), np.std(values, ddof=1)
    found = tables["equal steps"]["align"]["AO@10 name"]
    assert (found["mean"], found["sd"]) == pytest.approx((mean, sd))
    assert f"| {mean:.1f} ±{sd:.1f} |" in shown

    model, index = paraclip.load_model(out / "align-0"), data.ShardIndex(str(root / "test"))
    pairs = [json.loads(line) for line in open(root / "test/pairs.jsonl") if '"name"' in line]
    texts = [[index.caption(i) for i in range(24)]]
    texts += [[pair[side] for pair in pairs] for side in ("query", "paraphrase")]
    captions, *sides = (model.encode_lm(part).numpy() for part in texts)
    ranked = [np.argsort(-side @ captions.T)[:, :10] for side in sides]
    overlap = 100 * eval_paraphrase.average_overlap(*ranked).mean()
    lost = tables["searching captions"]["the bare language model"]["AO@10 name, captions"]
    assert lost["mean"] == pytest.approx(overlap, abs=1)


def test_equal_time_is_counted_from_logs(tmp_path):
    log = [{"step": 10 * i, "images_per_s": rate} for i, rate in enumerate((10, 60, 20), 8)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    (tmp_path / "config.json").write_text('{"batch_size": 4}')
    assert ablation.training_seconds([tmp_path]) == 20  # 100 steps, 5 a second
    assert str(ablation.steps_within(7.9, [tmp_path])) == "40"  # as a flag


def test_mistakes_are_told(monkeypatch, tmp_path):
    with pytest.raises(data.UserError, match="python nothing.py --x` ended in status 2"):
        ablation.python("nothing.py", "--x")
    with pytest.raises(data.UserError, match="--jobs 9999"):
        ablation.main(["--jobs", "9999"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(data.UserError, match="pip install matplotlib"):
        curve.main(["--figure", str(tmp_path / "x.png")])
