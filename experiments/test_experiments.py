"""Tests of the experiments, with a tiny model and a handful of images."""

import csv
import json
import multiprocessing
import os
import string
import tarfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval_paraphrase
import paraclip
from common.cli import UserError, parse_config
from experiments import ablation, curve, flickr8k, invariance, speed, where_lost
from test_paraclip import TINY, flags, lm, private_cache  # noqa: F401

TINY = TINY | dict(stem="patch", warmup=1, steps=3)


@pytest.fixture(autouse=True)
def machine(private_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PARACLIP_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(speed, "timed_for_a_second", lambda work: speed.timed(work, 1))


# ---- Flickr8k ------------------------------------------------------------------------------------
ANIMALS = ["dog", "cat", "horse", "bird", "duck", "sheep"]
# Images 0 to 39: 30 to 34 are the official dev set, 35 to 39 the official test set.
CAPTIONS = {f"{i}.jpg": [f"A {ANIMALS[i % 6]} in park {i} , photo {n} ." for n in range(5)]
            for i in range(40)}


def sick_row(a, b, image, original=None, relation="entails", score=4.8):
    original = original or CAPTIONS[f"{image}.jpg"][0].lower().replace(" .", "")
    return dict(sentence_A=a, sentence_B=b, entailment_AB=f"A_{relation}_B",
                entailment_BA=f"B_{relation}_A", relatedness_score=score,
                sentence_A_original=original, sentence_B_original=original,
                sentence_A_dataset="FLICKR", sentence_B_dataset="FLICKR")


SICK = [
    sick_row("A dog is leaping", "A dog is jumping", 0),
    sick_row("A duck is being eaten by a cat", "A cat is eating a duck", 36),
    sick_row("A cat is asleep", "The cat is asleep", 31),
    sick_row("A horse runs to a lake", "A horse runs to a river", 38),
    sick_row("A dog is small", "A dog is big", 1, relation="contradicts"),
    sick_row("A dog is small", "A dog is little", 1, score=4.4),
    sick_row("There is no dog", "There is no hound", 1),
    sick_row("A man is slicing", "A man is cutting", 0, original="a video of a man"),
    sick_row("Nobody is near a cat", "A cat is near", 37, relation="contradicts"),
    sick_row("A dog sees a cat", "A cat sees the dog", 38, relation="neutral"),
    sick_row("A dog sees a cat", "Cats see a dog", 38, relation="neutral"),
    sick_row("A dog is in", "The dog is in", 38),
    # These contradict each other in one direction only.
    sick_row("A cow is small", "A cow is big", 38) | {"entailment_AB": "A_contradicts_B"},
    # No image is common to the captions that they were made from.
    sick_row("A fox is small", "A fox is big", 38, relation="contradicts")
    | {"sentence_B_original": CAPTIONS["39.jpg"][0]},
]


@pytest.fixture()
def official(tmp_path):
    """Flickr8k's and SICK's files. Image 2 has the bytes of image 35, and 4 is missing."""
    folder = tmp_path / "official"
    (folder / "Images").mkdir(parents=True)
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 18, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"Images/{i}.jpg")
    (folder / "Images/2.jpg").write_bytes((folder / "Images/35.jpg").read_bytes())
    (folder / "Images/4.jpg").unlink()
    lines = []
    for name, texts in CAPTIONS.items():
        lines += [f"{name}#{n}\t{text}\r\n" for n, text in enumerate(texts)]
    (folder / "Flickr8k.token.txt").write_text("".join(lines), newline="")
    for split, numbers in (("dev", range(30, 35)), ("test", range(35, 40))):
        names = "\n".join(f"{i}.jpg" for i in numbers)
        (folder / f"Flickr_8k.{split}Images.txt").write_text(names)
    with open(folder / "SICK.txt", "w", newline="") as file:
        writer = csv.DictWriter(file, list(SICK[0]), delimiter="\t", quoting=csv.QUOTE_NONE)
        writer.writeheader()
        writer.writerows(SICK)
    return folder


@pytest.fixture()
def benchmark(official, tmp_path):
    """The folder with train/, val/ and test/."""
    flickr8k.main([str(official), f"{official}/SICK.txt", "--out", f"{tmp_path}/tiny"])
    return tmp_path / "tiny"


def images_in(folder) -> set[str]:
    names = set()
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            names |= {name[:-4] for name in tar.getnames() if name.endswith(".jpg")}
    return names


def read_pairs(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("first, second, kind", [
    ("A black dog is leaping", "A black dog is jumping", "words"),
    ("A dog is on a paved road", "A dog is on a road", "words"),
    ("The dog is catching a ball", "A ball is being caught by the dog", "order"),
    ("A road covered by snow", "A snowy road", "order"),
    ("A dog in a park", "The dog in the park .", "article"),
    ("A dog runs", "A dog is running", "article"),
    ("A dog runs .", "a dog runs", "")])
def test_kind_of_a_pair(first, second, kind):
    assert flickr8k.kind_of(first, second) == flickr8k.kind_of(second, first) == kind


def test_held_out_images_are_not_trained_on(benchmark):
    # SICK has 0, 1, 31, 36 and 38. 2 has the bytes of a test image, 4 is not there.
    assert images_in(benchmark / "test") == {"0", "1", "31", *map(str, range(35, 40))}
    assert images_in(benchmark / "val") == {"30", "32", "33", "34"}
    assert images_in(benchmark / "train") == {str(i) for i in range(30)} - {"0", "1", "2", "4"}


def test_images_of_sts_sentences_are_not_trained_on(official, tmp_path):
    file = tmp_path / "sts.csv"
    file.write_text(f'"{CAPTIONS["7.jpg"][2]}",a dog,3.0\n')
    flickr8k.main([str(official), f"{official}/SICK.txt", "--sts", str(file),
                   "--out", f"{tmp_path}/tiny"])
    assert "7" in images_in(tmp_path / "tiny/test")
    assert "7" not in images_in(tmp_path / "tiny/train")


def test_pairs_are_those_that_people_judged_equal(benchmark):
    pairs = [pair for pair in read_pairs(benchmark / "test") if "same" not in pair]
    pairs = [(pair["query"], pair["image"], pair["kind"]) for pair in pairs]
    assert pairs == [("A dog is leaping", "0", "words"),
                     ("A horse runs to a lake", "38", "words"),
                     ("A duck is being eaten by a cat", "36", "order"),
                     ("A cat is asleep", "31", "article"),
                     ("A dog is in", "38", "article")]


def test_opposites_are_those_that_people_judged_so_and_come_last(benchmark):
    pairs = read_pairs(benchmark / "test")
    assert pairs[5:] == [
        {"query": "Nobody is near a cat", "paraphrase": "A cat is near", "group": "37",
         "kind": "opposite: negation", "same": False},
        {"query": "A dog is small", "paraphrase": "A dog is big", "group": "1",
         "kind": "opposite: words", "same": False},
        {"query": "A dog sees a cat", "paraphrase": "A cat sees the dog", "group": "38",
         "kind": "opposite: roles", "same": False}]


def test_val_pairs_come_from_captions_alone():
    captions = {"x.jpg": ["A black dog leaps .", "A black dog jumps .", "a hat", "a cap", "a bag"]}
    pairs = flickr8k.val_pairs(captions)
    same = {pair["kind"]: pair["paraphrase"] for pair in pairs if "same" not in pair}
    assert same == {"words": "A black dog jumps .", "article": "The black dog leaps ."}
    # Once, although two pairs have this query.
    assert pairs[2:] == [
        {"query": "A black dog leaps .", "paraphrase": "No black dog leaps .", "group": "x",
         "kind": "opposite: negation", "same": False},
        {"query": "A black dog leaps .", "paraphrase": "A white dog leaps .", "group": "x",
         "kind": "opposite: words", "same": False}]


@pytest.mark.parametrize("caption, other", [
    ("A man and two dogs", "A woman and two dogs"),
    ("The woman", "The man"),
    ("Four cats , many men", "two cats , many men"),
    ("A manly catfish and firemen", "A manly catfish and firemen")])
def test_one_word_is_exchanged_for_one_that_excludes_it(caption, other):
    assert flickr8k.with_other_word(caption) == other


def test_recall_is_over_official_test_images(benchmark):
    coco = eval_paraphrase.read_captions_of_images(benchmark / "test/captions.json")
    assert sorted(coco) == ["35", "36", "37", "38", "39"] and len(coco["35"]) == 5


def test_the_same_bytes_on_every_run(official, benchmark, tmp_path):
    flickr8k.main([str(official), f"{official}/SICK.txt", "--out", f"{tmp_path}/again"])
    for path in benchmark.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(benchmark)).read_bytes()


# ---- AO, contrast and LGIP's invariance error ----------------------------------------------------
def test_a_model_that_hears_nothing_has_no_contrast():
    images = {f"{i}.jpg": np.eye(12)[i] for i in range(12)}
    texts = dict.fromkeys(["a dog", "a hound", "no dog", "no hound"], np.arange(12.0))
    pairs = [{"query": "a dog", "paraphrase": "a hound", "image": "0.jpg"},
             {"query": "a dog", "paraphrase": "no dog", "same": False},
             {"query": "no hound", "paraphrase": "a hound", "same": False}]
    deaf = invariance.measure(pairs, images, texts)
    assert deaf == {"ao": 1, "contrast": 0.5, "invariance_error": 0}
    # One that tells one of the two opposites from the paraphrase.
    half = invariance.measure(pairs, images, texts | {"no dog": -np.arange(12.0)})
    assert half["contrast"] == 0.75
    with pytest.raises(UserError, match="share a sentence"):
        invariance.measure(pairs[:1], images, texts)
    # Both find images 0 and 1 first, in another order; their cosines with image 0 are 0.6 and 0.8.
    e = np.eye(12)
    near = {"a dog": 3 * e[0] + 4 * e[1], "a hound": 4 * e[0] + 3 * e[1]}
    found = invariance.measure(pairs, images, texts | near)
    assert (found["ao"], found["invariance_error"]) == pytest.approx((0.9, 0.2))
    assert invariance.words_in_common({"query": "a red dog", "paraphrase": "A dog."}) == 2 / 3


def test_invariance_of_a_run(benchmark, lm, tmp_path, capsys):
    paraclip.main(flags(data=benchmark / "train", out=tmp_path / "run", **TINY | dict(lm=lm)))
    model = paraclip.load_model(tmp_path / "run")
    with open(benchmark / "test/pairs.jsonl", "a") as file:
        file.write('{"query": "A cat is awake", "paraphrase": "A cat is asleep", "same": false}\n')
    pairs = read_pairs(benchmark / "test")
    texts = [pair[side] for pair in pairs for side in ("query", "paraphrase")]
    images, features = invariance.encode(model, benchmark / "test", texts, batch_size=3)
    assert images.keys() == images_in(benchmark / "test")
    np.savez(tmp_path / "vectors.npz", names=list(images), images=list(images.values()),
             texts=list(features), text_features=list(features.values()))
    capsys.readouterr()
    invariance.main([str(benchmark / "test"), str(tmp_path / "run"), f"{tmp_path}/vectors.npz"])
    run, vectors = json.loads(capsys.readouterr().out.splitlines()[-1]).values()
    assert run == pytest.approx(vectors, abs=1e-5)


# ---- ablation ------------------------------------------------------------------------------------
@pytest.fixture()
def programs(monkeypatch):
    """paraclip.py and eval_paraphrase.py run in this process; the latter's calls are listed."""
    measured = []

    def run_program(name, *argv):
        argv = [str(argument) for argument in argv]
        if name == "paraclip.py":
            paraclip.main(argv)
        else:
            measured.append(argv)
            eval_paraphrase.main([*argv, "--workers", "0"])

    def complete(cfg, measured, extra, steps):
        runs = {row: [] for row in cfg.rows}
        for row in cfg.rows:
            for seed in cfg.seeds:
                run = ablation.train_and_measure(cfg, measured, extra, row, seed, 0)
                runs[row].append(run)
        return runs

    monkeypatch.setattr(ablation, "run_program", run_program)
    # In the calling thread, as only the main thread can catch signals.
    monkeypatch.setattr(ablation, "complete", complete)
    return measured


def test_ablation_on_tiny_photographs(benchmark, lm, programs, tmp_path, capsys):
    sts = tmp_path / "dev.csv"
    sts.write_text("a dog,a cat,1\na dog,a hound,5\na cat,a kitten,4\n")
    classes = tmp_path / "classes"
    for name in ("dog", "cat"):
        (classes / name).mkdir(parents=True)
        Image.new("RGB", (20, 20), (len(name) * 9, 0, 0)).save(classes / name / "1.jpg")
    argv = [*flags(data=benchmark, out=tmp_path / "runs", sts=sts, zeroshot=classes), "--rows",
            "align", "--seeds", "0", "1", "--"]
    argv += flags(**TINY | dict(lm=lm))
    ablation.main(["--where-lost", *argv])
    printed = capsys.readouterr().out
    tables = json.loads(printed.splitlines()[-1])

    # The table has the mean over seeds of what eval_paraphrase.py has reported.
    assert len(programs) == 2 * 3
    values = []
    for seed in (0, 1):
        report = next((tmp_path / f"runs/align-{seed}").glob("test-*.json"))
        values.append(100 * json.loads(report.read_text())[0]["kinds"]["order"]["ao"])
    cell = tables["results"]["align"]["AO@10 order"]
    assert (cell["mean"], cell["sd"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert f"| {np.mean(values):.1f}" in printed
    assert "the language model alone" in tables["searching captions"]
    # Two classes have no top-5.
    assert tables["results"]["align"]["zero-shot top-1"]["mean"] in (0, 25, 50, 75, 100)
    assert "zero-shot top-5" not in tables["results, details"]["align"]

    # The curve's points are made of the same columns.
    measured = ablation.measurements(ablation.AblationConfig(data=str(benchmark), sts=str(sts)))
    point = curve.point_of([tmp_path / "runs/align-0", tmp_path / "runs/align-1"], measured)
    row = {column: cell["mean"] for column, cell in tables["results"]["align"].items()}
    headline = next(iter(row))
    assert point[f"{headline}, minus that of unrelated"] == pytest.approx(
        row[headline] - row["AO@10 unrelated"])
    assert (point["R@10"], point["seconds"]) == pytest.approx((row["R@10"], row["training, s"]))

    # What is finished is measured again only where the content of a file has changed.
    ablation.main(argv)
    assert len(programs) == 6
    sts.write_text("a dog,a cat,5\na dog,a hound,1\na cat,a kitten,4\n")
    ablation.main(argv)
    assert len(programs) == 8 and all("--sts" in call for call in programs[6:])
    with open(benchmark / "test/pairs.jsonl", "a") as file:
        file.write(json.dumps(read_pairs(benchmark / "test")[0]) + "\n")
    ablation.main(argv)
    assert len(programs) == 10 and all("--benchmark" in call for call in programs[8:])
    Image.new("RGB", (20, 20), (0, 90, 0)).save(classes / "cat/2.jpg")
    ablation.main(argv)
    assert len(programs) == 12 and all("--zeroshot" in call for call in programs[10:])


def test_a_row_has_settings_of_its_own(benchmark, monkeypatch, tmp_path):
    settings = {"tiny": {"all": ["--steps", "7"], "scratch": ["--lr", "0.5"]}}
    monkeypatch.setattr(ablation, "SETTINGS", settings)
    monkeypatch.setattr(ablation, "reports_of", lambda run, measured: [])
    calls = []
    monkeypatch.setattr(ablation, "run_program", lambda name, *argv: calls.append(argv))
    cfg = ablation.AblationConfig(data=str(benchmark), rows=["scratch", "align"], seeds=["0"])
    ablation.complete(cfg, {}, ["--width", "8"], {})
    assert calls[0][-8:] == ("--text", "scratch", "--steps", "7", "--lr", "0.5", "--width", "8")
    assert calls[1][-6:] == ("--text", "align", "--steps", "7", "--width", "8")


def test_a_row_with_another_pooling(benchmark, monkeypatch):
    monkeypatch.setattr(ablation, "SETTINGS", {"tiny": {"frozen": ["--steps", "7"]}})
    monkeypatch.setattr(ablation, "reports_of", lambda run, measured: [])
    calls = []
    monkeypatch.setattr(ablation, "run_program", lambda name, *argv: calls.append(argv))
    cfg = ablation.AblationConfig(data=str(benchmark), rows=["frozen", "frozen:max"], seeds=["0"])
    folders = ablation.complete(cfg, {}, [], {})
    # The last --pool counts, and each pooling has its run folder.
    assert calls[1][-6:] == ("--pool", "mean", "--steps", "7", "--pool", "max")
    assert [runs[0].name for runs in folders.values()] == ["frozen-0", "frozen-max-0"]
    with pytest.raises(UserError, match="frozen:mode: expected some of"):
        ablation.AblationConfig(rows=["frozen:mode"])


def test_pairs_without_kinds_make_a_table_too(benchmark, lm, programs, capsys, tmp_path):
    # A single pair, even, which has no unrelated one.
    (benchmark / "test/pairs.jsonl").write_text('{"query": "a dog", "paraphrase": "a hound"}\n')
    argv = [*flags(data=benchmark, out=tmp_path / "runs"), "--rows", "frozen", "--seeds", "0"]
    ablation.main([*argv, "--", *flags(**TINY | dict(lm=lm))])
    tables = json.loads(capsys.readouterr().out.splitlines()[-1])
    main_columns, detail_columns = [list(table["frozen"]) for table in tables.values()]
    assert main_columns[:2] == ["AO@10 all pairs", "AO@1 all pairs"]
    assert "JS@10 all pairs" in detail_columns
    with pytest.raises(UserError, match="expected each of them once"):
        ablation.main([*argv, "0", "1", "0"])
    with pytest.raises(UserError, match="--seed=5 after --"):
        ablation.main([*argv, "--", "--seed=5"])


def test_the_first_failure_ends_the_ablation(monkeypatch):
    begun = []

    def train_and_measure(cfg, measured, extra, row, seed, steps):
        begun.append((row, seed))
        if row == "align":
            raise UserError("diverged")
        time.sleep(0.2)

    monkeypatch.setattr(ablation, "train_and_measure", train_and_measure)
    cfg = ablation.AblationConfig(rows=["scratch", "align"], seeds=list("012345"))
    with pytest.raises(UserError, match="diverged"):
        ablation.complete(cfg, {}, [], {})
    # One more may have begun before the failure was noticed.
    assert begun[:2] == [("scratch", "0"), ("align", "0")] and len(begun) <= 3


def test_an_unfit_figure_is_refused_before_training(tmp_path):
    for name in (tmp_path / "curve.svg", tmp_path / "nowhere/curve.png"):
        with pytest.raises(UserError, match="expected a .png file in a folder"):
            curve.CurveConfig(figure=str(name))


def test_retrained_weights_are_measured_again(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"one")
    before = ablation.reports_of(tmp_path, {"test": []})
    (tmp_path / "model.pt").write_bytes(b"two")
    assert ablation.reports_of(tmp_path, {"test": []}) != before


class Letters:
    """A text tower that counts letters."""

    def encode_text(self, texts):
        counts = [[text.lower().count(letter) + 0.1 for letter in string.ascii_lowercase]
                  for text in texts]
        return torch.tensor(counts)


def test_caption_search_matches_plain_numpy(benchmark):
    index = data.ShardIndex(str(benchmark / "test"))
    pair = read_pairs(benchmark / "test")[2]
    texts = [index.captions(i)[0] for i in range(len(index))]
    unit = torch.nn.functional.normalize(
        Letters().encode_text([*texts, pair["query"], pair["paraphrase"]]).double(), dim=1)
    ranked = np.argsort(-(unit[-2:] @ unit[:-2].T).numpy(), axis=1, kind="stable")[:, :10]
    overlap = eval_paraphrase.average_overlap(*ranked)
    found = where_lost.overlap_by_kind(Letters(), benchmark / "test")
    assert found["AO@10 order, captions"] == pytest.approx(100 * overlap)


def test_contrast_of_a_caption_search(benchmark):
    with open(benchmark / "test/pairs.jsonl", "a") as file:
        for query, changed in (("A dog is in", "A cat is near"), ("A cat is asleep", "A dog")):
            file.write(json.dumps({"query": query, "paraphrase": changed, "same": False}) + "\n")
    pairs = read_pairs(benchmark / "test")
    texts = [pair[side] for pair in pairs for side in ("query", "paraphrase")]
    index = data.ShardIndex(str(benchmark / "test"))
    captions = {name: index.captions(i)[0]
                for i, name in enumerate(sorted(images_in(benchmark / "test")))}
    images, texts = [{name: Letters().encode_text([text])[0].numpy()
                      for name, text in named.items()}
                     for named in (captions, dict(zip(texts, texts)))]
    expected = invariance.measure(pairs, images, texts)
    found = where_lost.overlap_by_kind(Letters(), benchmark / "test")
    assert found["contrast, captions"] == pytest.approx(100 * expected["contrast"])


# ---- speed ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, passes", [("align", 1), ("finetune", 3)])
def test_flops_are_those_counted_by_hand(lm, text, passes):
    model = paraclip.ParaCLIP(paraclip.Config(**TINY, lm=lm, text=text))
    # 3 and 9 tokens in rows of 9.
    tokens = model.tokenize(["a", "a red dog left of the cat"])
    micro_batches = [(torch.zeros(2, 3, 16, 16), [tokens])] * 2

    # Forward, of T tokens: qkv. Of those whose state is passed on: proj, fc1 and fc2, scores, and
    # what they weigh.
    def block(T, passed_on, width=4):
        return (2 * T * 3 + 2 * passed_on * (1 + 2 * width)) * 32 ** 2 + 4 * passed_on * T * 32

    projection = 3 * 2 * 32 * 16

    def caption(T):
        align = 3 * block(T, T) if text == "align" else 0
        return passes * 2 * block(T, T, width=2) + align + projection

    patches = 2 * 2 * 4 * 3 * 8 ** 2 * 32  # twice: nothing asks for the gradient of an image
    # The last block of the ViT passes on the class token alone.
    image = patches + 3 * (block(5, 5) + block(5, 1)) + projection
    assert speed.pair_flops(model, micro_batches) == (image, (caption(3) + caption(9)) / 2)


def measure_rank(rank: int, argv: list[str], port: int, queue):
    os.environ |= dict(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2",
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    queue.put(speed.measure(parse_config(speed.SpeedConfig, argv)))


def test_speed_of_the_slower_rank_counts(benchmark, lm):
    argv = flags(**TINY | dict(lm=lm, data=benchmark / "train"))
    # A fork spares each process its imports.
    fork = multiprocessing.get_context("fork")
    queue, port = fork.Queue(), 20000 + os.getpid() % 10000
    for rank in (0, 1):
        fork.Process(target=measure_rank, args=(rank, argv, port, queue), daemon=True).start()
    report, other_report = queue.get(timeout=100), queue.get(timeout=100)
    step = report["rows"]["whole_step"]
    assert step["ms"] == other_report["rows"]["whole_step"]["ms"]
    assert step["images_per_s"] == pytest.approx(16 / (step["ms"] / 1000))
    rate = 1e9 * report["pair_gflops"] * step["images_per_s"] / 2
    assert step["mfu"] == pytest.approx(rate / 1e12 / report["product_tflops"])


def test_memory_counter_follows_live_tensors():
    counter = speed.MemoryCounter()
    with counter:
        a = torch.zeros(1000)
        b = a + 1
        view = b[:10]
        del a, b
        assert counter.alive == 4000
        del view
    assert (counter.alive, counter.peak) == (0, 8000)


def test_memory_falls_with_ranks_and_accum(lm, monkeypatch):
    real, lengths = torch.nn.functional.scaled_dot_product_attention, set()

    def fused(q, k, v, **options):
        lengths.add(k.shape[-2])
        return real(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    cfg = speed.SpeedConfig(**TINY | dict(lm=lm, batch_size=256, optimizer="adamw", depth=1))
    mode = speed.FakeTensorMode()
    model = speed.fake_model(cfg, mode)
    peaks = [speed.count_memory(cfg, model, mode, ranks, accum)["peak_gb"]
             for ranks, accum in ((1, 1), (2, 1), (1, 2), (2, 2))]
    assert peaks[0] > 1.8 * peaks[1] and peaks[0] > 1.8 * peaks[2] > 1.8 ** 2 * peaks[3]
    # As on a GPU, the image tower's attention is fused: four patches and the class token.
    assert 5 in lengths
