"""Tests of paraclip in the order of its files: data, model, training, evaluation. CPU only, no hub.

Each test compares with something independent: numbers worked by hand, a library's model with the
same weights, a slow twin, one process against several, an uninterrupted run against a killed one.
`pytest` also runs the tests in demo/ and experiments/. FUZZ_SEED and FUZZ_CASES set the damage that
the fuzz tests do.
"""

import atexit
import contextlib
import dataclasses
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import pytest
import tokenizers
import torch
import torchvision
import transformers
from filelock import FileLock
from PIL import Image
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn import functional as F

import data
import eval_paraphrase as ev
import paraclip
from data import BadSample, ShardIndex, UserError, flag
from paraclip import Config, ParaCLIP, ViT, contrastive_loss, load_model

HERE = Path(__file__).parent
FUZZ_SEED = int(os.environ.get("FUZZ_SEED", 0))
FUZZ_CASES = int(os.environ.get("FUZZ_CASES", 40))
WORDS = "a red blue green circle square dog cat on the left of right above below small big ."
WORDS = WORDS.split()
# A run of a second: every size as small as it goes.
TINY = dict(image_size=16, patch_size=8, width=32, depth=2, heads=2, embed_dim=16, batch_size=16,
            precision="fp32", warmup=2, steps=4, workers=0, save_every=100)
pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding and encoding"),
              pytest.mark.filterwarnings("ignore:This DataLoader will create")]


# ---- helpers -------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARACLIP_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def lm(tmp_path_factory) -> str:
    """Folder of a tiny BERT with random weights and a tokenizer that knows WORDS."""
    folder = tmp_path_factory.mktemp("lm")
    words = [*WORDS, "[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, pad_token_id=words.index("[PAD]"))
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def encode(image: Image.Image, kind="PNG", **options) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def image_bytes(seed: int, size=(20, 18), kind="JPEG", mode="RGB", **options) -> bytes:
    """An image file of nine smooth colours that depend on the seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (3, 3, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    return encode(image.convert(mode), kind, **options)


def decode(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def write_images(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image_bytes(0))
    return str(folder)


def sentence(seed: int) -> str:
    """A caption of up to nine words that ends in the seed."""
    rng = random.Random(seed)
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 9))) + f" {seed}"


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(i: int) -> list[tuple[str, bytes]]:
    """The tar members of sample i: image_bytes(i) and sentence(i)."""
    return [(f"{i:05d}.jpg", image_bytes(i)), (f"{i:05d}.txt", sentence(i).encode())]


def broken_sample(i: int) -> list[tuple[str, bytes]]:
    return [(f"{i:05d}.jpg", b"junk"), (f"{i:05d}.txt", b"junk")]


def write_shards(folder: Path, counts: list[int]) -> str:
    """A folder of shards with these many samples each, numbered through."""
    first = 0
    for number, count in enumerate(counts):
        members = []
        for i in range(first, first + count):
            members += sample(i)
        write_tar(folder / f"{number:05d}.tar", members)
        first += count
    return str(folder)


def damage(content: bytes, rng: random.Random) -> bytes:
    """The bytes with bits flipped, a byte changed, the end cut, two parts swapped, or one removed."""
    a, b, c = sorted(rng.randrange(len(content) + 1) for _ in range(3))
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(byte ^ (1 << rng.randrange(8) if rng.random() < 0.002 else 0)
                     for byte in content)
    if kind == 1:
        return content[:a] + bytes([rng.randrange(256)]) + content[a + 1:]
    if kind == 2:
        return content[:a]
    if kind == 3:
        return b""
    if kind == 4:
        return content[:a] + content[b:c] + content[a:b] + content[c:]
    return content[:a] + content[b:]


def flags(**fields) -> list[str]:
    """Config fields as command-line flags."""
    argv = []
    for name, value in fields.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    return argv


def call(program, *argv):
    """A program's main() in this process, with the error handling that its users get."""
    data.run(lambda: program.main([str(argument) for argument in argv]))


def error_line(capsys, program, *argv) -> str:
    """The one line on stderr that a user's mistake gives, with exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(program, *argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def last_json(capsys, program, *argv):
    """The JSON document on the last line of a program's output."""
    capsys.readouterr()
    call(program, *argv)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def start(*argv, nproc: int = 1, restarts: int = 0, **env) -> subprocess.Popen:
    """A program in its own process, or under torchrun in `nproc` processes."""
    launcher = []
    if nproc > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={nproc}", "--standalone",
                    f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), **env}
    return subprocess.Popen([sys.executable, *launcher, *map(str, argv)], text=True, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """Waits for a process, checks its exit status and returns its output."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output
    return output


def wait_for(process: subprocess.Popen, path: Path, newer_than: int = 0):
    """Waits until the file is there and newer, or the process has ended."""
    while process.poll() is None:
        if path.exists() and path.stat().st_mtime_ns > newer_than:
            return
        time.sleep(0.002)


def build(lm: str, seed=0, **fields) -> ParaCLIP:
    """A tiny model with random weights."""
    torch.manual_seed(seed)
    return ParaCLIP(Config(**TINY | {"lm": lm} | fields))


def make_batch(model: ParaCLIP, n: int, accum: int = 1, start: int = 0):
    """Micro-batches of random images and sentences, as the loader gives them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (64, 3, 16, 16), generator=generator, dtype=torch.uint8)
    size = n // accum
    micro_batches = []
    for first in range(start, start + n, size):
        captions = [sentence(i) for i in range(first, first + size)]
        micro_batches.append((images[first:first + size], [model.tokenize(captions)]))
    return micro_batches


def train(lm: str, folder: str, out: Path, **fields) -> Path:
    """The run folder of a tiny model trained for a few steps on shards."""
    paraclip.train(Config(**TINY | dict(data=folder, lm=lm, out=str(out)) | fields))
    return out


def read_weights(run: Path) -> dict:
    """The checkpoint of a run folder."""
    return torch.load(run / "model.pt", weights_only=True)


def same(x: dict, y: dict) -> bool:
    """Are two dicts of tensors equal to the bit?"""
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


# ---- child processes -----------------------------------------------------------------------------
# Children are forked from a server that has imported this module: 0.03 s a start instead of 4 s.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload([__name__])


def start_child(output: Path, function, *args, **env):
    """Calls a function in a process of its own; what it prints goes to the file `output`."""
    env = {**os.environ, **{name: str(value) for name, value in env.items()}}
    child = FORKSERVER.Process(target=child_main, args=(output, env, function, args))
    child.output = output
    child.start()
    return child


def child_main(output: Path, env: dict, function, args):
    # A session of its own, so that a test can send a signal to the child and its children.
    os.setsid()
    os.environ.update(env)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    # Else its loader's workers would come from a server of its own.
    multiprocessing.set_start_method("fork", force=True)
    try:
        data.run(lambda: function(*args))
    finally:
        # multiprocessing would not call what is registered for the exit of a program.
        atexit._run_exitfuncs()


def finish_child(child, status: int = 0) -> str:
    """Waits for a child, checks its exit status and returns what it has printed."""
    child.join(60)
    if child.exitcode is None:
        os.killpg(child.pid, signal.SIGKILL)
    assert child.exitcode == status, child.output.read_text()
    return child.output.read_text()


def wait_until(child, condition):
    """Waits until condition() is true, or the child has ended."""
    while child.is_alive() and not condition():
        time.sleep(0.002)


def torchrun(ranks: int, restarts: int, function, *args):
    """Calls a function on every rank as the command torchrun does, but forks this process."""
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=ranks, max_restarts=restarts,
                          monitor_interval=0.1, start_method="fork", rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", run_id="test")
    elastic_launch(config, function)(*args)


def save_hugging_face_model(folder: Path, kind: str, lm: str):
    """A CLIP or Siglip of two narrow layers with the words of `lm`, and large weights."""
    def make(part, *args, **options):
        return getattr(transformers, f"{kind}{part}")(*args, **options)

    # Without a maximum length, as some are.
    tokenizer = transformers.BertTokenizerFast(
        f"{lm}/vocab.txt", model_input_names=["input_ids", "attention_mask"])
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=12,
                eos_token_id=tokenizer.sep_token_id, **size)
    vision, side = dict(image_size=32, patch_size=16, **size), {"height": 32, "width": 32}
    torch.manual_seed(len(kind))
    model = make("Model", make("Config", text_config=text, vision_config=vision))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    pixels = make("ImageProcessor", size=side, crop_size=side)
    make("Processor", pixels, tokenizer).save_pretrained(folder)


# ---- what all programs share ---------------------------------------------------------------------
@dataclasses.dataclass
class Flags:
    data: str = flag("emoji", "shards")
    recipe: str = flag("", "preset", choices=("emoji", "cc12m"))
    lr: float = flag(0.5, "rate", above=0, at_most=100)
    steps: int = flag(7, "100 % of it", at_least=0)
    compile: bool = flag(False, "faster")
    pairs: list = flag([], "files")


FLAG_RECIPES = {"cc12m": {"steps": 1000, "lr": 1.0}}


@pytest.mark.parametrize("line, expected", [
    ("", {}),
    ("--data cc12m", dict(data="cc12m", steps=1000, lr=1.0)),
    ("--data cc12m --lr 2", dict(data="cc12m", steps=1000, lr=2.0)),
    ("--recipe cc12m --data x", dict(recipe="cc12m", data="x", steps=1000, lr=1.0)),
    ("--recipe emoji --data cc12m", dict(recipe="emoji", data="cc12m")),
    ("--compile --pairs a b", dict(compile=True, pairs=["a", "b"]))])
def test_flags_win_over_recipe_and_defaults(line, expected):
    assert data.parse_config(Flags, line.split(), FLAG_RECIPES) == Flags(**expected)


@pytest.mark.parametrize("line", ["--step 3", "--steps x", "--recipe other", "--unknown", "stray"])
def test_unknown_flags_are_refused(line):
    with pytest.raises(UserError, match="see --help"):
        data.parse_config(Flags, line.split())


@pytest.mark.parametrize("fields, message", [
    (dict(lr=0.0), "--lr 0.0: expected above 0, at most 100"),
    (dict(lr=100.1), "--lr 100.1"), (dict(lr=math.nan), "--lr nan"), (dict(lr="1"), "--lr 1"),
    (dict(steps=-1), "--steps -1: expected at least 0"), (dict(steps=1.5), "--steps 1.5"),
    (dict(recipe="x"), "--recipe x: expected one of emoji, cc12m")])
def test_values_out_of_range_are_refused(fields, message):
    data.check_ranges(Flags(lr=1, steps=0))
    with pytest.raises(UserError, match=message):
        data.check_ranges(Flags(**fields))


def test_help_shows_limits_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        data.parse_config(Flags, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "rate (above 0, at most 100, default: 0.5)" in text and "100 % of it" in text


@pytest.mark.parametrize("error, status, line", [
    (UserError("no such\n thing"), 2, "error: no such thing\n"),
    (OSError(28, "No space left on device", "x.json"), 2,
     "error: [Errno 28] No space left on device: 'x.json'\n"),
    (ImportError("no module"), 2, "error: no module\n"),
    (MemoryError(), 2, "error: out of memory\n"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2,
     "error: DefaultCPUAllocator: can't allocate memory\n"),
    (torch.OutOfMemoryError("CUDA out of memory."), 2, "error: CUDA out of memory.\n"),
    (KeyboardInterrupt(), 130, "error: interrupted\n")])
def test_users_causes_end_in_one_line(capsys, error, status, line):
    def program():
        raise error

    with pytest.raises(SystemExit) as stop:
        data.run(program)
    assert (stop.value.code, capsys.readouterr().err) == (status, line)


@pytest.mark.parametrize("bug", [RuntimeError("shapes differ"), KeyError("a bug")])
def test_a_bug_stays_a_traceback(bug):
    def program():
        raise bug

    with pytest.raises(type(bug)):
        data.run(program)


def test_a_closed_stdout_is_no_error(tmp_path):
    folder = write_shards(tmp_path / "s", [3])
    command = f"{sys.executable} {data.__file__} {folder} --workers 0 >&-"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_output_to_a_full_disk_is_told(capsys, monkeypatch):
    class FullDisk(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", FullDisk())
    assert "No space left" in error_line(capsys, Namespace(main=print))


WORKER_ERROR = """
import data, sys, torch
from argparse import Namespace
cfg = Namespace(batch_size=4, accum=1, seed=0, image_size=8, crop=1.0, workers=2)
def program():
    index = data.ShardIndex(sys.argv[1])
    for batch in data.training_loader(index, cfg, 0, 9, 0, 1, list):
        pass
data.run(program)
"""


def test_an_error_in_workers_ends_at_once(tmp_path):
    members = []
    for i in range(9):
        members += broken_sample(i)
    path = write_tar(tmp_path / "0.tar", members)
    began = time.time()
    output = finish(start("-c", WORKER_ERROR, path), status=2)
    # Importing torch takes most of this. Workers that are left to themselves take 600 seconds.
    assert time.time() - began < 60
    assert output == "error: 100 samples in a row cannot be read, the first: broken image\n"


def test_a_killed_worker_is_told(tmp_path, capsys):
    def kill_own_process(captions):
        os.kill(os.getpid(), signal.SIGBUS)

    index = ShardIndex(write_shards(tmp_path / "s", [8]))
    program = Namespace(main=lambda argv: load(index, workers=1, tokenize=kill_own_process))
    assert "error: DataLoader worker (pid" in error_line(capsys, program)


def test_workers_outlive_signals_for_minutes(tmp_path):
    def signal_own_process(captions):
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        return {"seconds_left": torch.tensor(signal.alarm(0))}

    index = ShardIndex(write_shards(tmp_path / "s", [8]))
    loader = data.training_loader(index, loader_config(workers=1), 0, 1, 0, 1, signal_own_process)
    (((_, token_batches),), _), = loader
    assert token_batches[0]["seconds_left"] > 500


def test_atomic_write_goes_through_a_link(tmp_path):
    os.symlink(tmp_path / "target", tmp_path / "link")
    with data.atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["folder", "fifo", "link to a device"])
def test_atomic_write_refuses_what_is_no_file(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(UserError, match="x cannot be written: it is not a regular file"):
        with data.atomic_write(path):
            pass
    assert not path.is_file()


def test_a_full_disk_keeps_the_former_file(tmp_path, monkeypatch):
    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.json"
    path.write_bytes(b"former")
    # A user's own file, which an unfinished file must not replace.
    (tmp_path / "x.json.tmp").write_bytes(b"mine")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left on device.*x.json"):
        with data.atomic_write(path) as file:
            file.write(b"new")
    contents = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    assert contents == {"x.json": b"former", "x.json.tmp": b"mine"}


def test_without_home_the_cache_is_temporary(tmp_path, monkeypatch):
    monkeypatch.delenv("PARACLIP_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(data.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert data.cache_folder() == f"{tmp_path}/paraclip-{os.getuid()}"
    assert not (tmp_path / "~").exists()


# ---- shards and their index ----------------------------------------------------------------------
def test_find_shards_understands_every_spelling(tmp_path):
    folder = Path(write_shards(tmp_path / "s", [1, 1, 1]))
    shards = [folder / f"0000{i}.tar" for i in range(3)]
    for name in (str(folder), f"{folder}/*.tar", f"{folder}/{{00000..00002}}.tar"):
        assert data.find_shards(name) == shards
    joined = f"{folder}/00002.tar::{folder}/{{00000..00001}}.tar"
    assert data.find_shards(joined) == [shards[2], shards[0], shards[1]]


def test_a_file_name_is_no_glob(tmp_path):
    path = write_tar(tmp_path / "y[2].tar", sample(0))
    assert data.find_shards(str(path)) == [path]


def test_cc12m_lies_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PARACLIP_DATA", str(tmp_path))
    with pytest.raises(UserError, match="img2dataset.*pixparse/cc12m-wds"):
        data.find_shards("cc12m")
    path = write_tar(tmp_path / "cc12m" / "cc12m-train-0000.tar", sample(0))
    assert data.find_shards("cc12m") == [path]


@pytest.mark.parametrize("name", ["nowhere", "00000.tar::", "*.tar"])
def test_a_set_without_shards_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no .tar file at"):
        data.find_shards(name)


JPEG = image_bytes(7)


@pytest.mark.parametrize("members", [
    [("k.JPG", JPEG), ("k.txt", b"c")], [("k.txt", b"c"), ("k.jpeg", JPEG)],
    [("k.png", JPEG), ("k.txt", b"\xef\xbb\xbf c\n")], [("k.webp", JPEG), ("k.cls", b"3"),
                                                         ("k.json", b'{"caption": "c", "x": 1}')],
    [("k.jpg", JPEG), ("k.json", b'{"caption": "of json"}'), ("k.txt", b"c")],
    [("../../k.jpg", JPEG), ("../../k.txt", b"c")], [("k.v2.jpg", JPEG), ("k.v2.txt", b"c")],
    [("k.jpg", JPEG), ("k.txt", b" \t\nc "), ("x/k.txt", b"of x/k"), ("x/k.jpg", b"of x/k")]])
def test_image_and_caption_share_a_key(tmp_path, members):
    index = ShardIndex(str(write_tar(tmp_path / "0.tar", members)))
    pairs = [(index.image(i), index.captions(i)) for i in range(len(index))]
    assert (JPEG, ["c"]) in pairs and not index.skipped
    assert len(pairs) == 1 or pairs[1] == (b"of x/k", ["of x/k"])


@pytest.mark.parametrize("content, captions", [
    (b'{"caption": "one"}', ["one"]),
    (b'{"caption": ["one", " ", "", null, 3, "two  words"]}', ["one", "two words"]),
    (b'{"caption": "half an emoji \\ud83d"}', ["half an emoji ?"]),
    (json.dumps({"caption": ["x" * 20_000, "y"]}).encode(), ["x" * 10_000, "y"])])
def test_captions_of_a_json(tmp_path, content, captions):
    path = write_tar(tmp_path / "0.tar", [("a.jpg", JPEG), ("a.json", content)])
    assert ShardIndex(str(path)).captions(0) == captions


@pytest.mark.parametrize("content, captions", [
    (b"caf\xe9", ["caf\ufffd"]), ("\U0001f355".encode() * 2_000_000, ["\U0001f355" * 10_000])])
def test_caption_of_a_txt(tmp_path, content, captions):
    path = write_tar(tmp_path / "0.tar", [("a.jpg", JPEG), ("a.txt", content)])
    assert ShardIndex(str(path)).captions(0) == captions


@pytest.mark.parametrize("members, reasons", [
    ([("a.jpg", JPEG)], ["no caption"]),
    ([("a.jpg", JPEG), ("a.json", b" " * (2 << 20))], ["no caption"]),
    ([("a.txt", b"a")], ["no image"]),
    ([("a.jpg", b""), ("a.txt", b"a")], ["no image"]),
    ([("00000.png", JPEG)], ["duplicate key"]),
    ([("a.jpg", JPEG), ("a.txt", b" \n\t ")], ["empty or broken caption"]),
    ([("a.jpg", JPEG), ("a.json", b'{"caption": null}')], ["empty or broken caption"]),
    ([("a.jpg", JPEG), ("a.json", b'{"caption": ["", " "]}')], ["empty or broken caption"]),
    ([("a.jpg", JPEG), ("a.json", b'["caption"]')], ["empty or broken caption"]),
    ([("a.jpg", JPEG), ("a.json", b'{"caption')], ["empty or broken caption"]),
    ([("a.jpg", JPEG), ("a.json", b"[" * 99_999)], ["empty or broken caption"])])
def test_a_bad_sample_is_counted(tmp_path, members, reasons):
    path = write_tar(tmp_path / "0.tar", sample(0) + members + sample(1))
    index = ShardIndex(str(path))
    assert index.skipped == Counter(reasons)
    assert [index.image(i) for i in range(len(index))] == [image_bytes(0), image_bytes(1)]


def test_a_link_is_not_followed(tmp_path):
    path = write_tar(tmp_path / "0.tar", sample(0) + [("a.txt", b"a")])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname, link.size = tarfile.SYMTYPE, "/etc/passwd", 600
        tar.addfile(link)
    assert ShardIndex(str(path)).skipped == {"no image": 1}


def tar_header(size: int, pax_headers: dict = {}) -> bytes:
    """The header of a member with this size, perhaps after a pax header."""
    member = tarfile.TarInfo("b.jpg")
    member.size = size
    header = member.tobuf(tarfile.GNU_FORMAT)
    if pax_headers:
        pax = tarfile.TarInfo("b.jpg")
        pax.pax_headers = pax_headers
        header = pax.tobuf(tarfile.PAX_FORMAT)[:1024] + header
    return header


WHOLE = b"whole shard"


@pytest.mark.parametrize("keep, then, usable, reason", [
    (0, b"", 0, "broken or truncated shard"),
    (0, b"this is no tar" * 100, 0, "broken or truncated shard"),
    ("header", b"", 1, "broken or truncated shard"),
    ("image", b"", 1, "broken or truncated shard"),
    ("sample", b"", 1, "broken or truncated shard"),
    ("sample", b"?" * 2048, 1, "broken or truncated shard"),
    # Sizes that lead to the member itself: a reader may go round for ever.
    ("sample", tar_header(-512) + bytes(1024), 1, "broken or truncated shard"),
    ("sample", tar_header(-1536, {"GNU.sparse.size": "99"}) + bytes(1024), 1,
     "broken or truncated shard"),
    # Here tarfile raises a ValueError.
    ("sample", tar_header(9, {"GNU.sparse.map": "x"}) + bytes(1024), 1,
     "broken or truncated shard"),
    ("all", WHOLE, 4, "a second archive in the shard")])
def test_a_broken_shard_gives_its_beginning(tmp_path, keep, then, usable, reason):
    members = []
    for i in range(4):
        members += sample(i)
    whole = write_tar(tmp_path / "s" / "1.tar", members).read_bytes()
    second_sample = whole.index(b"00001.jpg")
    ends = {0: 0, "header": second_sample + 100, "image": second_sample + 600,
            "sample": second_sample, "all": len(whole)}
    content = whole[:ends[keep]] + (whole if then is WHOLE else then)
    (tmp_path / "s" / "1.tar").write_bytes(content)
    write_tar(tmp_path / "s" / "2.tar", sample(9))
    index = ShardIndex(str(tmp_path / "s"))
    assert index.skipped == {reason: 1} and len(index) == usable + 1
    assert index.captions(usable) == [sentence(9)]


def test_a_sparse_member_ends_no_shard(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        sparse = tarfile.TarInfo("sparse.jpg")
        sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                              "GNU.sparse.realsize": "50000"}
        # A map of one piece: its offset and its bytes.
        content = b"1\n0\n5\n".ljust(512, b"\0") + b"hello"
        sparse.size = len(content)
        tar.addfile(sparse, io.BytesIO(content))
        for name, content in [("sparse.txt", b"of it")] + sample(0):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    index = ShardIndex(str(path))
    assert len(index) == 1 and index.skipped == {"no image": 1}


@pytest.mark.parametrize("kind", ["missing", "unreadable"])
def test_an_absent_shard_is_counted(tmp_path, kind):
    folder = write_shards(tmp_path / "s", [2])
    if kind == "unreadable":
        os.mkdir(f"{folder}/00001.tar")
    index = ShardIndex(f"{folder}/{{00000..00001}}.tar")
    assert len(index) == 2 and index.skipped == {f"{kind} shard": 1}


def test_a_passing_fault_is_not_remembered(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "s", [5, 3])
    real_open = open

    def failing_open(path, *args, **kwargs):
        if str(path).endswith("00000.tar"):
            raise OSError(5, "Input/output error")
        return real_open(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", failing_open)
        index = ShardIndex(folder)
    assert len(index) == 3 and len(ShardIndex(folder, workers=2)) == 8
    # Who still uses the former index has its own table.
    assert index.captions(0) == [sentence(5)]


@pytest.mark.parametrize("kind", ["truncated", "removed"])
def test_a_shard_lost_later_is_a_bad_sample(tmp_path, kind):
    index = ShardIndex(write_shards(tmp_path / "s", [3]))
    path = Path(index.shards[0])
    if kind == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:800])
    data.open_shard.cache_clear()
    with pytest.raises(BadSample, match="unreadable shard"):
        index.image(0)


def test_a_sample_takes_at_most_24_bytes(tmp_path):
    index = ShardIndex(write_shards(tmp_path / "s", [5, 3]))
    assert os.path.getsize(index.rows_file) <= 24 * 8


def test_the_fingerprint_ignores_the_folder(tmp_path):
    folder = write_shards(tmp_path / "s", [5, 3])
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert ShardIndex(folder).fingerprint == ShardIndex(str(copy)).fingerprint


def test_the_fingerprint_knows_the_captions(tmp_path):
    path = Path(write_shards(tmp_path / "s", [3])) / "00000.tar"
    before = ShardIndex(str(path)).fingerprint
    changed = sentence(1).replace(sentence(1)[0], "X").encode()
    path.write_bytes(path.read_bytes().replace(sentence(1).encode(), changed))
    assert ShardIndex(str(path)).fingerprint != before


def test_the_index_follows_a_replaced_shard(tmp_path):
    path = Path(write_shards(tmp_path / "s", [3])) / "00000.tar"
    status = os.stat(path)
    assert len(ShardIndex(str(path))) == 3
    # Of the same size and time of modification, but one caption is blank.
    caption = sentence(0).encode()
    replacement = tmp_path / "replacement"
    replacement.write_bytes(path.read_bytes().replace(caption, b" " * len(caption)))
    os.utime(replacement, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(replacement, path)
    assert len(ShardIndex(str(path))) == 2


@pytest.mark.parametrize("former, latter", [
    (r"\[5, 3\]", "[3, 5]"), (".*", "{}"), (".*", "[1]"), (".*", "{")])
def test_changed_facts_of_an_index_are_noticed(tmp_path, former, latter):
    folder = write_shards(tmp_path / "s", [5, 3])
    ShardIndex(folder)
    file, = (tmp_path / "cache").glob("*.json")
    file.write_text(re.sub(former, latter, file.read_text(), count=1))
    assert list(ShardIndex(folder).starts) == [0, 5, 8]


def test_one_of_several_processes_builds_the_index(tmp_path, monkeypatch):
    builds = []
    build_index = data.build_index

    def slow_build(*args):
        builds.append(args)
        time.sleep(0.2)
        return build_index(*args)

    monkeypatch.setattr(data, "build_index", slow_build)
    folder = write_shards(tmp_path / "s", [5])
    threads = [threading.Thread(target=ShardIndex, args=[folder]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


def test_an_unusable_set_names_its_members(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.jpg", JPEG), ("a.cls", b"1"), ("b.npy", b"1")])
    with pytest.raises(UserError, match=r"'no caption': 1.*'jpg': 1, 'cls': 1, 'npy': 1"):
        ShardIndex(str(path))


# ---- images --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, mode", [
    ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1"),
    ("WEBP", "RGB"), ("GIF", "P"), ("BMP", "RGB")])
def test_decoding_agrees_with_pillow(kind, mode):
    content = image_bytes(3, kind=kind, mode=mode)
    expected = np.asarray(decode(content).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(data.decode_image(content).numpy(), expected)


def turned_image() -> tuple[bytes, np.ndarray]:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    stored = decode(image_bytes(1, (30, 10)))
    return image_bytes(1, (30, 10), exif=exif), np.rot90(np.asarray(stored), k=-1)


@pytest.mark.parametrize("content, expected", [
    pytest.param(*turned_image(), id="turned by EXIF"),
    pytest.param(encode(Image.new("RGBA", (4, 4), (200, 0, 0, 0))),
                 np.full((4, 4, 3), 255), id="transparent"),
    pytest.param(encode(Image.fromarray(np.full((4, 4), 32768, np.uint16))),
                 np.full((4, 4, 3), 128), id="16-bit grey")])
def test_images_are_seen_as_viewers_show_them(content, expected):
    assert np.array_equal(data.decode_image(content).numpy().transpose(1, 2, 0), expected)
    # A library's user hands Pillow's own image to `preprocess`.
    direct = data.center_crop(decode(content), 4)
    assert torch.equal(direct, data.center_crop(Image.fromarray(np.uint8(expected)), 4))


def jpeg_of_size(side: int) -> bytes:
    """A JPEG whose header states another size."""
    place = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:place] + struct.pack(">HH", side, side) + JPEG[place + 4:]


def jpeg_of_scans(extra: int) -> bytes:
    """A progressive JPEG, its last scan repeated `extra` times."""
    content = image_bytes(0, progressive=True)
    scan = content[content.rindex(b"\xff\xda"):-2]
    return content[:-2] + extra * scan + content[-2:]


@pytest.mark.parametrize("content, reason", [
    (JPEG[:-30], "broken image"), (b"<html>", "broken image"), (b"", "broken image"),
    # Pillow would read this one too, as it would EPS, by running Ghostscript.
    (encode(Image.new("RGB", (4, 4)), "TIFF"), "broken image"),
    # Here Pillow raises a ValueError.
    (image_bytes(0, kind="PNG").replace(b"\rIHDR", b"\nIHDR"), "broken image"),
    (jpeg_of_size(30_000), "too many pixels"), (jpeg_of_size(9_000), "too many pixels"),
    (jpeg_of_scans(100), "too many scans"),
    # Decoders skip what stands between two segments.
    (jpeg_of_scans(100).replace(b"\xff\xda", b"junk\xff\xff\xda"), "too many scans")])
def test_bad_images_are_refused(content, reason):
    with pytest.raises(BadSample, match=reason):
        data.decode_image(content)


@pytest.mark.parametrize("content", [
    pytest.param(jpeg_of_scans(0), id="usual scans"),
    # A phone appends a film, in which any bytes may stand.
    pytest.param(JPEG + b"\0\0" + b"\xff\xda\0\0" * 100, id="data after the end"),
    pytest.param(JPEG[:2] + b"\xff\xfe\x00\xca" + b"\xff\xda" * 100 + JPEG[2:],
                 id="in a comment")])
def test_scans_are_counted_in_the_image_alone(content):
    assert data.decode_image(content).shape == (3, 18, 20)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000)])
def test_a_long_side_is_cut_before_resizing(size, monkeypatch):
    resize = data.TF.resize
    sizes = []

    def watched_resize(image, *args):
        sizes.append(image.size)
        return resize(image, *args)

    monkeypatch.setattr(data.TF, "resize", watched_resize)
    assert data.center_crop(Image.new("RGB", size), 16).shape == (3, 16, 16)
    assert max(sizes[0]) <= 50


def test_open_image_cuts_a_long_side(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(Image.new("RGB", (20_000, 2))))
    assert data.open_image(tmp_path / "a.png").size == (64, 2)


def crop_boxes(monkeypatch, draws: int, size: tuple[int, int], min_area: float) -> np.ndarray:
    """(draws, 4): top, left, height and width of random_crop's boxes."""
    height, width = size
    image = torch.zeros(3, height, width)
    image[0], image[1] = torch.arange(height)[:, None], torch.arange(width)
    boxes = []

    def record(crop, *args, **kwargs):
        boxes.append((crop[0, 0, 0, 0], crop[0, 1, 0, 0], crop.shape[2], crop.shape[3]))
        return crop

    monkeypatch.setattr(torch.nn.functional, "interpolate", record)
    for seed in range(draws):
        data.random_crop(image, 8, min_area, random.Random(seed))
    return np.array(boxes)


@pytest.mark.parametrize("size", [(200, 200), (150, 200)])
def test_random_crop_has_torchvisions_distribution(monkeypatch, size):
    boxes = crop_boxes(monkeypatch, 6000, size, 0.3)
    # torchvision draws again where a box does not fit; here it is cut off.
    fits = (boxes[:, 2] < size[0]) & (boxes[:, 3] < size[1])
    assert fits.mean() > 0.6
    torch.manual_seed(0)
    transform = torchvision.transforms.v2.RandomResizedCrop(8, scale=(0.3, 1))
    expected = []
    for _ in range(4000):
        box = transform.make_params([torch.zeros(3, *size)])
        expected.append((box["top"], box["left"], box["height"], box["width"]))
    for ours, theirs in zip(boxes[fits].T, np.array(expected).T):
        # The largest difference of the two cumulative distributions (Kolmogorov and Smirnov).
        values = np.arange(201)
        difference = ((ours <= values[:, None]).mean(1) - (theirs <= values[:, None]).mean(1))
        assert abs(difference).max() < 0.035


def test_random_crop_shrinks_with_a_filter():
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(64).expand(3, 128, 128)
    for seed in range(9):
        crop = data.random_crop(stripes, 16, 0.5, random.Random(seed))
        assert 100 < crop.min() <= crop.max() < 155


# ---- order and loader ----------------------------------------------------------------------------
def test_an_epoch_is_a_permutation(monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 1000)
    assert sorted(data.epoch_order(5003, 10, seed=0, epoch=0)) == list(range(5003))


@pytest.mark.parametrize("seed, epoch", [(1, 0), (0, 1)])
def test_every_seed_and_epoch_mixes_other_samples(monkeypatch, seed, epoch):
    monkeypatch.setattr(data, "WINDOW", 1000)
    first_window = list(data.epoch_order(5003, 10, 0, 0))[:1000]
    other_window = list(data.epoch_order(5003, 10, seed, epoch))[:1000]
    assert len(set(first_window) & set(other_window)) < 400


def test_windows_are_whole_blocks_mixed(monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 1000)
    window = np.array(list(data.epoch_order(5003, 10, 0, 0))[:1000])
    assert len(set(window // 10)) <= 101
    assert np.abs(np.diff(window)).mean() > 1000


def as_letters(captions: list[str]) -> dict:
    """A tokenizer whose tokens are letters."""
    rows = [torch.tensor([ord(letter) for letter in caption]) for caption in captions]
    return {"ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}


def loader_config(**options) -> Namespace:
    defaults = dict(batch_size=8, accum=1, seed=0, image_size=8, crop=1.0, workers=0)
    return Namespace(**defaults | options)


def load(index, start=0, steps=8, ranks=1, tokenize=as_letters, **options) -> list:
    """[({caption: image}, {reason: replaced})] of the global batches."""
    cfg = loader_config(**options)
    batches = [({}, Counter()) for _ in range(start, steps)]
    for rank in range(ranks):
        loader = data.training_loader(index, cfg, start, steps, rank, ranks, tokenize)
        for (pairs, counts), (micro_batches, replaced) in zip(batches, loader, strict=True):
            # Pinning would count twice what stands in a Counter.
            assert type(replaced) is dict
            counts.update(replaced)
            assert len(micro_batches) == cfg.accum
            for images, token_batches in micro_batches:
                rows = [row for tokens in token_batches for row in tokens["ids"]]
                assert len(images) == len(rows) == cfg.batch_size // ranks // cfg.accum
                for image, row in zip(images, rows):
                    pairs["".join(map(chr, row[row > 0]))] = image
    return batches


LOADERS = pytest.mark.parametrize("options", [
    dict(ranks=1, workers=3, accum=2), dict(ranks=2, workers=0, accum=4),
    dict(ranks=4, workers=2, accum=1)])


@LOADERS
def test_an_epoch_sees_each_sample_once(tmp_path, monkeypatch, options):
    monkeypatch.setattr(data, "MIN_GROUP", 1)
    # Fewer shards than readers.
    index = ShardIndex(write_shards(tmp_path / "s", [1, 30, 3]))
    captions = [caption for pairs, _ in load(index, steps=4, **options) for caption in pairs]
    assert len(captions) == len(set(captions)) == 32
    assert set(captions) <= {sentence(i) for i in range(34)}


@LOADERS
def test_batches_are_those_of_one_process(tmp_path, options):
    index = ShardIndex(write_shards(tmp_path / "s", [1, 30, 3]))
    for (pairs, _), (alone, _) in zip(load(index, **options), load(index), strict=True):
        assert same(pairs, alone)


def test_a_resumed_run_sees_the_rest(tmp_path):
    index = ShardIndex(write_shards(tmp_path / "s", [34]))
    for (pairs, _), (rest, _) in zip(load(index)[5:], load(index, start=5), strict=True):
        assert same(pairs, rest)


def test_a_caption_comes_with_its_image(tmp_path):
    index = ShardIndex(write_shards(tmp_path / "s", [8]))
    for caption, image in load(index, steps=1)[0][0].items():
        original = data.decode_image(image_bytes(int(caption.split()[-1])))
        difference = image.float().mean((1, 2)) - original.float().mean((1, 2))
        assert difference.abs().max() < 45


def test_captions_of_equal_length_are_grouped(monkeypatch):
    monkeypatch.setattr(data, "MIN_GROUP", 2)
    samples = [(torch.zeros(3, 2, 2), "x" * (i % 8 + 1), "") for i in range(64)]
    (micro_batch,), _ = data.collate(samples, 1, as_letters)
    assert [tokens["ids"].shape for tokens in micro_batch[1]] == [(16, 2), (16, 4), (16, 6),
                                                                  (16, 8)]


def several_captions(folder: Path, texts: list) -> ShardIndex:
    members = []
    for i in range(40):
        members += [(f"{i}.jpg", image_bytes(i)),
                    (f"{i}.json", json.dumps({"caption": texts}).encode())]
    return ShardIndex(str(write_tar(folder / "0.tar", members)))


def test_a_caption_is_drawn_anew_each_epoch(tmp_path):
    samples = data.TrainingSet(several_captions(tmp_path, ["a", "b", "c"]), 8, 0.5, seed=0)
    epochs = [[samples[epoch, i][1] for i in range(40)] for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]
    assert min(Counter(epochs[0]).values()) > 5


def test_drawing_a_caption_changes_no_crop(tmp_path):
    several = data.TrainingSet(several_captions(tmp_path / "3", ["a", "b", "c"]), 8, 0.5, seed=0)
    alone = data.TrainingSet(several_captions(tmp_path / "1", ["a"]), 8, 0.5, seed=0)
    for i in range(9):
        assert torch.equal(several[0, i][0], alone[0, i][0])


def mixed_shard(path: Path) -> Path:
    """Twelve samples, three of them with broken images."""
    members = []
    for i in range(12):
        members += broken_sample(i) if i % 4 == 0 else sample(i)
    return write_tar(path, members)


def test_bad_images_are_replaced_and_counted(tmp_path):
    index = ShardIndex(str(mixed_shard(tmp_path / "0.tar")))
    (pairs, replaced), = load(index, steps=1, batch_size=12)
    assert replaced == {"broken image": 3}
    assert pairs.keys() == {sentence(i) for i in range(12) if i % 4}


def test_replacements_are_the_same_each_time(tmp_path):
    index = ShardIndex(str(mixed_shard(tmp_path / "0.tar")))
    runs = [load(index, batch_size=6, workers=workers, crop=0.5) for workers in (0, 2)]
    for (pairs, _), (again, _) in zip(*runs, strict=True):
        assert same(pairs, again)


@pytest.mark.parametrize("machines, covered", [(1, True), (2, False)])
def test_blocks_are_prefetched_before_reading(tmp_path, monkeypatch, machines, covered):
    monkeypatch.setattr(data, "BLOCK_BYTES", 4 * len(image_bytes(0)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 // machines))
    ranges = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, begin, size, advice: ranges.append(
        (begin, begin + size)))
    index = ShardIndex(write_shards(tmp_path / "s", [32]))
    content = Path(index.shards[0]).read_bytes()
    for batch in data.batch_order(index, 8, 0, 0, 4, rank=0, ranks=2):
        for _, i in batch:
            begin = content.index(index.image(i))
            inside = [low <= begin and begin + len(index.image(i)) <= high for low, high in ranges]
            assert any(inside) == covered


def test_the_inspection_reports_a_set(tmp_path, capsys):
    mixed_shard(tmp_path / "0.tar")
    write_tar(tmp_path / "1.tar", [("b.jpg", JPEG)])
    report = last_json(capsys, data, tmp_path, "--workers", 0)
    assert report.pop("images_per_s") > 0
    assert report == {"shards": 2, "samples": 9, "keys": {"jpg": 13, "txt": 12},
                      "skipped": {"no caption": 1, "broken image": 3}}


# ---- galleries -----------------------------------------------------------------------------------
def test_a_gallery_is_a_sorted_folder(tmp_path):
    folder = write_images(tmp_path / "f", "z/a.PNG", "b.jpg", "z/.y.jpg", "ant/sub/c.jpeg",
                          ".hidden/a.png", "notes.txt")
    os.symlink(write_images(tmp_path / "far", "a.bmp"), f"{folder}/dog")
    os.symlink(folder, f"{folder}/ant/loop")
    assert list(data.list_gallery(folder)) == ["ant/sub/c.jpeg", "b.jpg", "dog/a.bmp", "z/a.PNG"]


def test_a_gallery_needs_no_captions(tmp_path):
    write_tar(tmp_path / "0.tar", [("b.jpg", JPEG), ("a.png", image_bytes(2)), ("a.txt", b"a")])
    gallery = data.list_gallery(tmp_path)
    assert list(gallery) == ["b", "a"]
    expected = np.asarray(decode(image_bytes(2)))
    assert np.array_equal(np.asarray(data.open_image(gallery["a"])), expected)


def test_a_gallery_follows_a_replaced_shard(tmp_path):
    for seed in (1, 2):
        write_tar(tmp_path / "new", [("a.png", image_bytes(seed, kind="PNG"))])
        os.replace(tmp_path / "new", tmp_path / "0.tar")
        image = data.open_image(data.list_gallery(tmp_path)["a"])
        assert np.array_equal(image, decode(image_bytes(seed, kind="PNG")))


def test_equal_keys_of_two_shards_are_counted(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [("a.jpg", JPEG), ("b.jpg", JPEG)])
    write_tar(tmp_path / "1.tar", [("b.jpg", image_bytes(1)), ("c.jpg", JPEG)])
    gallery = data.list_gallery(tmp_path)
    assert list(gallery) == ["a", "b", "c"] and gallery["b"][0].endswith("0.tar")
    assert "{'duplicate key': 1}" in capsys.readouterr().err


@pytest.mark.parametrize("content, message", [
    (["0.tar", "a.jpg"], "1 images in .tar shards and 1 image files"), ([], "no image in it")])
def test_an_unclear_gallery_is_refused(tmp_path, content, message):
    if "0.tar" in content:
        write_tar(tmp_path / "0.tar", [("a.jpg", JPEG)])
        write_images(tmp_path, "a.jpg")
    with pytest.raises(UserError, match=message):
        data.list_gallery(tmp_path)


@pytest.mark.parametrize("error", [ValueError("odd"), MemoryError("odd"), OverflowError("odd")])
def test_one_image_never_ends_an_evaluation(tmp_path, error):
    def preprocess(image):
        if image.size == (1, 1):
            raise error
        return torch.ones(3)

    gallery = {"good": np.zeros((2, 2, 3), np.uint8), "odd": np.zeros((1, 1, 3), np.uint8),
               "gone": tmp_path / "gone.jpg"}
    (indices, images, failed), = data.image_loader(gallery, preprocess, 8, workers=0)
    assert indices == [0] and torch.equal(images, torch.ones(1, 3))
    assert failed[0] == (1, "odd") and failed[1][0] == 2 and "gone.jpg" in failed[1][1]


# ---- fuzz ----------------------------------------------------------------------------------------
FUZZ = pytest.mark.parametrize("seed", range(FUZZ_SEED, FUZZ_SEED + FUZZ_CASES))


@FUZZ
def test_damaged_shards_give_no_wrong_pair(tmp_path, seed):
    originals = {sentence(i): image_bytes(i) for i in range(12)}
    rng = random.Random(seed)
    path = Path(write_shards(tmp_path / "s", [4, 4, 4])) / f"0000{rng.randrange(3)}.tar"
    path.write_bytes(damage(path.read_bytes(), rng))
    index = ShardIndex(str(tmp_path / "s"))
    assert len(index) >= 8
    for i in range(len(index)):
        caption, image = index.captions(i)[0], index.image(i)
        # If neither is damaged itself they belong together.
        if caption in originals and image in originals.values():
            assert originals[caption] == image
        with contextlib.suppress(BadSample):
            data.decode_image(image)


@FUZZ
def test_a_damaged_index_is_built_anew(tmp_path, seed):
    rng = random.Random(seed)
    folder = write_shards(tmp_path / "s", [4, 4])
    index = ShardIndex(folder)
    before = [(index.captions(i), index.image(i)) for i in range(len(index))]
    cached = sorted((tmp_path / "cache").iterdir())
    for file in rng.sample(cached, rng.randint(1, len(cached))):
        if rng.random() < 0.2:
            file.unlink()
        else:
            file.write_bytes(damage(file.read_bytes(), rng))
    again = ShardIndex(folder)
    assert [(again.captions(i), again.image(i)) for i in range(len(again))] == before
    assert (again.fingerprint, again.skipped) == (index.fingerprint, index.skipped)


@FUZZ
def test_damaged_galleries_and_shapes_are_survived(tmp_path, seed):
    rng = random.Random(seed)
    members = []
    for i in range(6):
        long, short = rng.choice([1, 7, 300, 9000]), rng.randint(1, 9)
        size = rng.choice([(long, short), (short, long)])
        kind, mode = rng.choice([("JPEG", "L"), ("PNG", "P"), ("WEBP", "RGB"), ("PNG", "RGBA")])
        content = image_bytes(i, size, kind, mode)
        members.append((f"{i}.jpg", damage(content, rng) if rng.random() < 0.4 else content))
    path = write_tar(tmp_path / "1.tar", members)
    path.write_bytes(damage(path.read_bytes(), rng))
    write_tar(tmp_path / "2.tar", [("good.jpg", JPEG)])
    gallery = data.list_gallery(tmp_path)
    loader = data.image_loader(gallery, lambda image: data.center_crop(image, 16), 4, workers=0)
    rows = []
    for indices, images, failed in loader:
        rows += indices + [row for row, reason in failed if reason]
        assert images is None or images.shape == (len(indices), 3, 16, 16)
    assert sorted(rows) == list(range(len(gallery))) and "good" in gallery


# ---- model: image tower --------------------------------------------------------------------------
def test_vit_equals_pytorchs_transformer():
    torch.manual_seed(0)
    vit = ViT(image_size=32, patch_size=8, stem="patch", width=48, depth=3, heads=4)
    images = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        patches = F.unfold((images - vit.mean) / vit.std, 8, stride=8).transpose(1, 2)
        x = patches @ vit.patch_embed.weight.flatten(1).T + vit.patch_embed.bias
        x = torch.cat([vit.cls_token.expand(5, -1, -1), x], 1) + vit.pos_embed
        for block in vit.blocks:
            layer = torch.nn.TransformerEncoderLayer(
                48, nhead=4, dim_feedforward=192, dropout=0.0, activation="gelu",
                layer_norm_eps=1e-6, batch_first=True, norm_first=True)
            parts = torch.nn.ModuleList([block.qkv, block.proj, block.fc1, block.fc2,
                                         block.norm1, block.norm2])
            for p, twin in zip(parts.parameters(), layer.parameters(), strict=True):
                p += 0.1 * torch.randn_like(p)  # no zero bias, no norm of one
                twin.copy_(p)
            x = layer(x)
        expected = F.layer_norm(x[:, 0], (48,), eps=1e-6)
        assert torch.allclose(vit(images), expected, atol=1e-5)


def test_linear_weights_start_as_lecun_says():
    torch.manual_seed(0)
    layer = paraclip.LeCunLinear(256, 2048)
    deviations = layer.weight.detach() * 256 ** 0.5
    assert deviations.std().item() == pytest.approx(1, abs=0.01)
    # 4.55 % of a normal law lie beyond two deviations: nothing is cut there.
    assert (deviations.abs() > 2).float().mean().item() == pytest.approx(0.0455, abs=0.002)
    assert not layer.bias.any()


def test_blocks_start_as_the_identity():
    x = torch.randn(2, 5, 32)
    assert torch.equal(paraclip.Block(32, 2)(x), x)


@pytest.mark.parametrize("patch_size, width", [(2, 128), (8, 128), (16, 8)])
def test_conv_stem_makes_one_token_a_patch(patch_size, width):
    stem = paraclip.conv_stem(patch_size, width)
    assert stem(torch.rand(1, 3, 64, 64)).shape == (1, width, 64 // patch_size, 64 // patch_size)


IMAGES = torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8)


@pytest.mark.parametrize("bad", [
    pytest.param(IMAGES.int(), id="int32"),
    pytest.param(IMAGES.float(), id="up to 255"),
    pytest.param(IMAGES / 255 - 0.5, id="normalised"),
    pytest.param(IMAGES[:, :, :8], id="not square"),
    pytest.param(IMAGES[:, :1], id="grey"),
    pytest.param(IMAGES[0], id="no batch")])
def test_unfit_images_are_refused(lm, bad):
    with pytest.raises(ValueError, match="images"):
        build(lm).encode_image(bad)


def test_float_images_give_uint8_features(lm):
    model = build(lm)
    expected = model.encode_image(IMAGES)
    assert torch.equal(model.encode_image(IMAGES / 255), expected)
    assert torch.allclose(model.encode_image(IMAGES.double() / 255), expected, atol=1e-6)


def test_features_are_unit_fp32_under_bf16(lm):
    model, captions = build(lm, precision="bf16"), ["a dog", "a red cat"]
    for features in (model.encode_image(IMAGES), model.encode_text(captions),
                     model.encode_lm(captions)):
        assert features.dtype == torch.float32
        assert torch.allclose(features.norm(dim=1), torch.ones(2), atol=1e-6)


# ---- model: text tower ---------------------------------------------------------------------------
def steps_on_one_batch(model: ParaCLIP, steps: int, batch=None, **fields) -> list[float]:
    """Trains on one batch, by default of eight random pairs, and returns the losses."""
    cfg = Config(**TINY | fields)
    optimizers = paraclip.make_optimizers(model, cfg)
    micro_batches = batch or make_batch(model, 8)
    losses = []
    for _ in range(steps):
        loss, _ = paraclip.backward(model, cfg, micro_batches)
        paraclip.update(model, optimizers, 1.0)
        losses.append(loss.item())
    return losses


def pretrained_state(lm: str) -> dict:
    return transformers.BertModel.from_pretrained(lm, add_pooling_layer=False).state_dict()


@pytest.mark.parametrize("text, changes", [("frozen", False), ("align", False),
                                           ("finetune", True)])
def test_only_finetune_changes_pretrained_weights(lm, text, changes):
    model = build(lm, text=text)
    assert same(model.text_tower.lm.state_dict(), pretrained_state(lm))
    steps_on_one_batch(model, 3, text=text, lr=0.1, weight_decay=0.5)
    assert same(model.text_tower.lm.state_dict(), pretrained_state(lm)) != changes


@pytest.mark.parametrize("text", ["scratch", "finetune", "frozen", "align"])
def test_language_model_has_no_dropout(lm, text):
    model = build(lm, text=text).train()
    assert not any(module.training for module in model.text_tower.lm.modules())


@pytest.mark.parametrize("text, frozen", [("finetune", False), ("align", True)])
def test_optimizers_hold_all_but_frozen_weights(lm, text, frozen):
    model = build(lm, text=text)
    optimizers = paraclip.make_optimizers(model, Config(text=text))
    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    left_out = {id(p) for p in model.text_tower.lm.parameters()} if frozen else set()
    assert sorted(held) == sorted({id(p) for p in model.parameters()} - left_out)


def test_scratch_starts_from_random_weights(lm):
    state = build(lm, text="scratch").text_tower.lm.state_dict()
    assert state.keys() == pretrained_state(lm).keys() and not same(state, pretrained_state(lm))


@pytest.mark.parametrize("text", ["scratch", "finetune", "frozen"])
def test_weights_are_fp32_whatever_the_config(lm, tmp_path, text):
    folder = Path(shutil.copytree(lm, tmp_path / "lm"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    model = build(str(folder), text=text)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


SHORT, LONG = "a red dog", "a " * 60 + "cat on the left of a blue circle"


def randomize_alignment(model: ParaCLIP):
    # It starts as the identity.
    for p in model.text_tower.align.parameters():
        p.data += 0.1 * torch.randn_like(p)


@torch.no_grad()
@pytest.mark.parametrize("text", ["scratch", "finetune", "frozen", "align"])
def test_padding_changes_no_feature(lm, text):
    model = build(lm, text=text)
    randomize_alignment(model)
    alone = model.encode_text(SHORT)
    assert torch.allclose(model.encode_text([LONG, SHORT])[1], alone[0], atol=1e-6)
    assert not torch.allclose(model.encode_text("a red cat"), alone, atol=1e-3)


@torch.no_grad()
def test_token_batches_are_joined_in_order(lm):
    model = build(lm)
    batches = [model.tokenize([LONG]), model.tokenize([SHORT, "a cat"])]
    expected = model.encode_text([LONG, SHORT, "a cat"])
    assert torch.allclose(model.encode_text(batches), expected, atol=1e-6)


def test_truncation_keeps_the_end_token(lm):
    model = build(lm)
    ids = model.tokenize(["a " * 100])["input_ids"]
    assert ids.shape[1] == 77 and ids[0, -1] == model.text_tower.tokenizer.sep_token_id


@torch.no_grad()
def test_captions_are_pooled_by_maximum(lm):
    model = build(lm, text="frozen")
    states = model.text_tower.lm(**model.tokenize([SHORT])).last_hidden_state[0]
    expected = F.normalize(model.text_proj(states.amax(0)), dim=-1)
    assert torch.allclose(model.encode_text([LONG, SHORT])[1], expected, atol=1e-6)


@torch.no_grad()
def test_encode_lm_pools_by_mean(lm):
    model = build(lm)
    states = model.text_tower.lm(**model.tokenize([SHORT])).last_hidden_state[0]
    expected = F.normalize(states.mean(0), dim=-1)
    assert torch.allclose(model.encode_lm([LONG, SHORT])[1], expected, atol=1e-6)


@pytest.mark.parametrize("text", [[], ()])
def test_no_caption_is_refused(lm, text):
    with pytest.raises(ValueError):
        build(lm).encode_text(text)


def test_half_a_surrogate_is_encoded(lm):
    assert build(lm).encode_text("a dog \ud83d").isfinite().all()


# ---- model: kinds of language models -------------------------------------------------------------
ENCODERS = ["albert", "bert", "big_bird", "camembert", "data2vec-text", "deberta-v2", "distilbert",
            "electra", "ernie", "eurobert", "ibert", "layoutlm", "megatron-bert", "mobilebert",
            "modernbert", "mpnet", "nomic_bert", "roberta", "roformer", "squeezebert",
            "xlm-roberta"]
DECODERS = ["clip_text_model", "gemma", "gpt2", "llama", "mistral", "opt", "qwen2", "qwen3"]
# Every size under each name that one of these families has for it.
SIZES = dict(
    hidden_size=32, n_embd=32, dim=32, embedding_size=32, word_embed_proj_dim=32,
    num_hidden_layers=2, n_layer=2, n_layers=2, num_attention_heads=2, n_head=2, n_heads=2,
    num_key_value_heads=2, head_dim=16, intermediate_size=48, hidden_dim=48, ffn_dim=48,
    max_position_embeddings=128, bos_token_id=0, pad_token_id=1, eos_token_id=2)


def write_lm(folder: Path, kind: str, **config) -> str:
    """A tiny language model of any kind, with random weights, and a tokenizer of whole words.
    A decoder's tokenizer has neither padding nor an end token after a caption."""
    words = ["<s>", "<pad>", "<|endoftext|>", "<unk>", "feline", *WORDS, *"0123456789"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    is_decoder = kind in DECODERS
    template = "<s> $A" if is_decoder else "<s> $A <|endoftext|>"
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("<|endoftext|>", 2)])
    padding = {} if is_decoder else {"pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|endoftext|>", unk_token="<unk>",
        **padding).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=len(words), **SIZES | config)
    model = transformers.AutoModel.from_config(config)
    # Random weights of the usual size hardly look at other tokens.
    for p in model.parameters():
        if p.ndim > 1:
            p.data *= 5
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def any_lm(tmp_path_factory):
    """kind -> folder of a tiny language model of that kind, written once."""
    root = tmp_path_factory.mktemp("lms")

    def folder_of(kind):
        if not (root / kind).exists():
            write_lm(root / kind, kind)
        return str(root / kind)
    return folder_of


def to_bf16(model: ParaCLIP):
    """What paraclip.build makes of a frozen language model on a GPU."""
    model.bf16 = True
    model.text_tower.lm.bfloat16()


@torch.no_grad()
@pytest.mark.parametrize("kind", ENCODERS + DECODERS)
def test_padding_leaks_into_no_language_model(any_lm, kind):
    model = build(any_lm(kind))
    randomize_alignment(model)
    alone = model.encode_text(SHORT)[0]
    assert torch.allclose(model.encode_text([LONG, SHORT])[1], alone, atol=1e-5)
    to_bf16(model)
    assert torch.allclose(model.encode_text([LONG, SHORT])[1], alone, atol=0.02)


@pytest.mark.parametrize("kind", ENCODERS + DECODERS)
def test_alignment_trains_on_every_language_model(any_lm, kind):
    for text in ("frozen", "align"):
        model = build(any_lm(kind), text=text)
        before, _, after = steps_on_one_batch(model, 3, text=text, lr=1e-3)
        assert after < before
    to_bf16(model)
    before, _, after = steps_on_one_batch(model, 3, text=text, lr=1e-3)
    assert after < before


@torch.no_grad()
@pytest.mark.parametrize("kind, is_causal", [("bert", False), ("gpt2", True), ("qwen3", True),
                                             ("clip_text_model", True)])
def test_decoders_look_at_earlier_words_only(any_lm, kind, is_causal):
    model = build(any_lm(kind))
    dog, cat = (model.text_tower.lm_states(model.tokenize([caption]))[0]
                for caption in ("a dog", "a cat"))
    assert torch.allclose(dog[:2], cat[:2], atol=1e-6) == is_causal


@pytest.mark.parametrize("kind, text", [("modernbert", "frozen"), ("gpt2", "align"),
                                        ("clip_text_model", "align")])
def test_any_language_model_resumes_and_reloads(any_lm, tmp_path, monkeypatch, kind, text):
    folder = write_shards(tmp_path / "s", [40])
    whole = train(any_lm(kind), folder, tmp_path / "whole", text=text)
    resumed = tmp_path / "resumed"
    interrupt(monkeypatch, any_lm(kind), folder, resumed, at=2, text=text)
    train(any_lm(kind), folder, resumed, text=text)
    assert same(paraclip.trained_weights(load_model(resumed)), read_weights(whole)["model"])


@pytest.mark.parametrize("kind", ["fnet", "convbert"])
def test_language_models_that_see_padding_are_refused(tmp_path, kind):
    """FNet takes no mask; ConvBERT's convolutions reach into the padding."""
    with pytest.raises(UserError, match="padding"):
        build(write_lm(tmp_path, kind))


@torch.no_grad()
@pytest.mark.parametrize("kind, multiple", [("bert", 1), ("gpt2", 1), ("gpt2", 8)])
def test_few_positions_shorten_captions(tmp_path, monkeypatch, kind, multiple):
    monkeypatch.setattr(paraclip, "PAD_TO_MULTIPLE", multiple)
    model = build(write_lm(tmp_path, kind, max_position_embeddings=20))
    assert model.tokenize(["a " * 100])["input_ids"].shape[1] == 20
    assert model.encode_text("a " * 100).isfinite().all()


def test_language_model_without_tokenizer_is_refused(lm, tmp_path):
    transformers.BertModel.from_pretrained(lm).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="language model '.*bare'"):
        build(str(tmp_path / "bare"))


def test_language_model_without_a_layer_is_refused(lm, tmp_path):
    folder = shutil.copytree(lm, tmp_path / "lm")
    model = transformers.BertModel.from_pretrained(lm)
    state = {k: v for k, v in model.state_dict().items() if "layer.1.output" not in k}
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(UserError, match="lack"):
        build(str(folder))


@pytest.mark.parametrize("kind, name, value", [
    ("bert", "hidden_act", "relu"), ("distilbert", "activation", "relu"),
    ("modernbert", "hidden_activation", "relu"), ("bert", "layer_norm_eps", 1e-3)])
def test_hash_follows_settings_that_change_features(any_lm, kind, name, value):
    tower = build(any_lm(kind)).text_tower
    setattr(tower.lm.config, name, value)
    assert paraclip.lm_hash(tower.lm, tower.tokenizer) != tower.sha256


def test_hash_survives_saving_again(any_lm, tmp_path):
    tower = build(any_lm("modernbert")).text_tower
    tower.lm.save_pretrained(tmp_path)
    tower.tokenizer.save_pretrained(tmp_path)
    assert build(str(tmp_path)).text_tower.sha256 == tower.sha256


# ---- what a GPU does differently, on a CPU -------------------------------------------------------
def encode_both(model: ParaCLIP) -> torch.Tensor:
    captions = [LONG, SHORT]
    return torch.cat([model.encode_image(IMAGES), model.encode_text(captions)]).detach()


@pytest.mark.parametrize("precision, atol", [("fp32", 1e-6), ("bf16", 0.01)])
@pytest.mark.parametrize("name, value", [("FUSED_ATTENTION", True), ("LAYERNORM_IN_BF16", True),
                                         ("PAD_TO_MULTIPLE", 8)])
def test_gpu_paths_give_the_same_features(lm, monkeypatch, name, value, precision, atol):
    features = []
    for setting in (getattr(paraclip, name), value):
        monkeypatch.setattr(paraclip, name, setting)
        model = build(lm, text="finetune", precision=precision)
        for p in model.image_tower.blocks.parameters():  # which start as the identity
            p.data += 0.1 * torch.randn_like(p)
        features.append(encode_both(model))
    assert torch.allclose(*features, atol=atol)


@pytest.mark.parametrize("precision, atol", [("fp32", 0), ("bf16", 0.01)])
def test_casting_the_frozen_lm_keeps_features(lm, monkeypatch, precision, atol):
    features = []
    for cast in (False, True):
        monkeypatch.setattr(paraclip, "CAST_FROZEN_LM", cast)
        cfg = Config(**TINY | dict(lm=lm, precision=precision))
        model, _, _ = paraclip.build(cfg, torch.device("cpu"))
        features.append(encode_both(model))
    assert torch.allclose(*features, atol=atol, rtol=0)


def test_only_frozen_weights_are_cast(lm, monkeypatch):
    monkeypatch.setattr(paraclip, "CAST_FROZEN_LM", True)
    dtypes = {}
    for text in ("frozen", "finetune"):
        cfg = Config(**TINY | dict(lm=lm, text=text, precision="bf16"))
        model, _, _ = paraclip.build(cfg, torch.device("cpu"))
        dtypes[text] = {p.dtype for p in model.text_tower.lm.parameters()}
    assert dtypes == {"frozen": {torch.bfloat16}, "finetune": {torch.float32}}


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_pinned_batches_train_the_same_run(lm, tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "s", [40])
    expected = read_weights(train(lm, folder, tmp_path / "pageable"))["model"]
    monkeypatch.setattr(paraclip, "PIN_MEMORY", True)
    assert same(read_weights(train(lm, folder, tmp_path / "pinned"))["model"], expected)


# ---- loss and gradients --------------------------------------------------------------------------
def test_contrastive_loss_worked_by_hand():
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # Scores x 2: [[2, 0], [1.2, 1.6]]; rows: log(1 + e^-2), log(1 + e^-0.4); columns:
    # log(1 + e^-0.8), log(1 + e^-1.6).
    expected = sum(math.log(1 + math.exp(-x)) for x in (2, 0.4, 0.8, 1.6)) / 4
    loss, accuracy = contrastive_loss(images, texts, torch.tensor(2.0))
    assert loss.item() == pytest.approx(expected, rel=1e-6) and accuracy == 1


def test_geometry_loss_against_a_loop():
    torch.manual_seed(0)
    image, text, lm = (F.normalize(torch.randn(5, width), dim=1) for width in (3, 3, 4))

    def softmax_over_others(queries, keys, i):
        scores = [queries[i] @ keys[j] / paraclip.GEOMETRY_TAU for j in range(5) if j != i]
        return torch.stack(scores).softmax(0)

    expected = 0.0
    for i in range(5):
        target = softmax_over_others(lm, lm, i)
        for weight, queries, keys in ((1, text, text), (0.5, image, text), (0.5, text, image)):
            divergence = target * (target / softmax_over_others(queries, keys, i)).log()
            expected += weight * divergence.sum().item() / 5
    assert paraclip.geometry_loss(image, text, lm).item() == pytest.approx(expected, rel=1e-4)


CASES = [dict(text="align"), dict(text="align", accum=2), dict(text="finetune", accum=2),
         dict(text="finetune"), dict(text="align", geometry=0.7, accum=2)]


def gradients(lm, rank: int, ranks: int, **case):
    """Loss and gradients of this rank's part of a batch of 16."""
    cfg = Config(**TINY | dict(lm=lm) | case)
    model, parallel, _ = paraclip.build(cfg, torch.device("cpu"))
    micro_batches = make_batch(model, 16 // ranks, cfg.accum, start=rank * 16 // ranks)
    loss, _ = paraclip.backward(parallel, cfg, micro_batches)
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def join_group(rank: int, ranks: int, folder: Path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                                         world_size=ranks)


def write_gradients(rank: int, ranks: int, lm: str, folder: Path):
    join_group(rank, ranks, folder)
    results = []
    for case in CASES:
        loss, grads = gradients(lm, rank, ranks, **case)
        torch.distributed.all_reduce(loss)
        results.append((loss / ranks, grads))
    # The last rank's rows lie at an offset.
    if rank == ranks - 1:
        torch.save(results, folder / "gradients.pt")
    torch.distributed.destroy_process_group()


def on_ranks(ranks: int, folder: Path, function, *args, status: int = 0) -> list[str]:
    """Calls function(rank, ranks, *args) in a process a rank, and returns what each has printed."""
    children = []
    for rank in range(ranks):
        children.append(start_child(folder / f"rank{rank}.txt", function, rank, ranks, *args))
    return [finish_child(child, status) for child in children]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_on_many_processes_equal_one(lm, tmp_path, ranks):
    on_ranks(ranks, tmp_path, write_gradients, lm, tmp_path)
    results = torch.load(tmp_path / "gradients.pt")
    for case, (loss, grads) in zip(CASES, results, strict=True):
        expected_loss, expected = gradients(lm, 0, 1, **case | {"accum": 1})
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
        assert grads.keys() == expected.keys() and "logit_scale" in grads
        largest = max(g.norm() for g in expected.values())
        for name in grads:
            # A key's bias has no gradient in exact arithmetic.
            scale = max(expected[name].norm(), 1e-3 * largest)
            assert (grads[name] - expected[name]).norm() < 1e-5 * scale, (case, name)


def gather_backward(rank: int, ranks: int, folder: Path):
    join_group(rank, ranks, folder)
    x = torch.randn(2, 3, requires_grad=True)
    grad = torch.full((2 * ranks, 3), float(rank + 1))
    paraclip.Gather.apply(x).backward(grad)
    assert (grad == rank + 1).all()
    assert (x.grad == sum(range(1, ranks + 1))).all()


def test_gathers_backward_leaves_its_argument_alone(tmp_path):
    on_ranks(2, tmp_path, gather_backward, tmp_path)


# ---- optimizers ----------------------------------------------------------------------------------
def test_schedule_warms_up_and_falls():
    rates = [paraclip.schedule(step, steps=10, warmup=2) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.5) and rates[-1] < 0.05


LAYER = "text_tower.lm.encoder.layer.0.output.dense."


@pytest.mark.parametrize("name, muon_rate, adamw_rate, decay", [
    ("logit_scale", 1, 1, 0), ("image_tower.norm.weight", 1, 1, 0),
    ("image_tower.cls_token", 1, 1, 0), ("image_tower.pos_embed", 1, 1, 0),
    ("image_tower.blocks.0.fc1.weight", 10, 1, 0.3),
    ("image_tower.patch_embed.0.weight", 10, 1, 0.3), ("text_proj.weight", 1, 1, 0.3),
    (LAYER + "weight", 1, 0.1, 0), (LAYER + "bias", 0.1, 0.1, 0)])
def test_learning_rate_and_decay_of_each_weight(lm, name, muon_rate, adamw_rate, decay):
    model = build(lm, text="finetune", stem="conv")
    for optimizer, rate in (("muon", muon_rate), ("adamw", adamw_rate)):
        cfg = Config(text="finetune", optimizer=optimizer, lr=1.0, lm_lr=0.1, weight_decay=0.3)
        p = model.get_parameter(name)
        groups = [g for o in paraclip.make_optimizers(model, cfg) for g in o.param_groups]
        group, = (g for g in groups if any(p is q for q in g["params"]))
        assert (group["peak_lr"], group["weight_decay"]) == pytest.approx((rate, decay))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_finetuning_keeps_words_it_never_meets(lm, optimizer):
    model = build(lm, text="finetune")
    row = model.text_tower.tokenizer.convert_tokens_to_ids("square")
    embeddings = model.text_tower.lm.embeddings.word_embeddings.weight
    before = embeddings[row].clone()
    batch = [(IMAGES, [model.tokenize(["a red dog", "a blue cat"])])]
    steps_on_one_batch(model, 3, batch, text="finetune", optimizer=optimizer, lr=0.1,
                       weight_decay=0.5)
    assert torch.equal(embeddings[row], before)


def test_muon_against_the_singular_value_decomposition():
    torch.manual_seed(0)
    for shape in ((6, 10), (10, 6), (4, 3, 2, 2)):
        p = torch.randn(shape, requires_grad=True)
        muon = paraclip.Muon([dict(params=[p], lr=0.1, weight_decay=0.5)], torch.float32)
        momentum = torch.zeros(shape)
        for _ in range(2):
            p.grad = torch.randn(shape)
            momentum = 0.95 * momentum + 0.05 * p.grad
            before = p.detach().clone()
            muon.step()
        nesterov = (0.05 * p.grad + 0.95 * momentum).flatten(1)
        u, _, v = torch.linalg.svd(nesterov, full_matrices=False)
        update = ((1 - 0.1 * 0.5) * before - p.detach()).flatten(1)
        update /= 0.1 * 0.2 * max(update.shape) ** 0.5
        singular_values = torch.linalg.svdvals(update)
        # Newton-Schulz stops near 1.
        assert 0.6 < singular_values.min() and singular_values.max() < 1.3
        assert torch.linalg.norm(u.T @ update @ v.T - torch.diag(singular_values)) < 0.7
        cosine = (u @ v * update).sum() / singular_values.norm() / len(singular_values) ** 0.5
        assert cosine > 0.95


@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 256), (32, 16, 3, 3)])
def test_muons_update_is_as_large_as_adamws(shape):
    torch.manual_seed(0)
    sizes = []
    for make in (lambda p: paraclip.Muon([dict(params=[p], lr=0.1, weight_decay=0)], torch.float32),
                 lambda p: torch.optim.AdamW([p], lr=0.1, weight_decay=0, betas=(0.9, 0.98))):
        p = torch.zeros(shape, requires_grad=True)
        optimizer = make(p)
        for _ in range(60):
            before = p.detach().clone()
            p.grad = torch.randn(shape)
            optimizer.step()
        sizes.append((p - before).square().mean().sqrt().item() / 0.1)
    assert sizes[0] == pytest.approx(0.2, rel=0.25) and sizes[1] == pytest.approx(0.23, rel=0.1)


# ---- training ------------------------------------------------------------------------------------
def interrupt(monkeypatch, lm: str, folder: str, out: Path, at: int, **fields):
    """Starts a run that meets SIGTERM in step `at`."""
    real, steps = paraclip.update, []

    def update(*args):
        steps.append(args)
        if len(steps) == at:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(paraclip, "update", update)
        with pytest.raises(SystemExit) as stop:
            train(lm, folder, out, **fields)
    assert stop.value.code == 128 + signal.SIGTERM and read_weights(out)["step"] == at


def write_list_shards(folder: Path, count: int) -> str:
    """Shards in which every other sample has four captions."""
    members = []
    for i in range(count):
        captions = [sentence(i + 100 * number) for number in range(4)]
        text = json.dumps({"caption": captions}).encode()
        members += [sample(i)[0], (f"{i:05d}.json", text)] if i % 2 else sample(i)
    write_tar(folder / "00000.tar", members)
    return str(folder)


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in open(out / "log.jsonl")]


@pytest.fixture(scope="session")
def memorized(lm, tmp_path_factory) -> Path:
    """A run folder beside its shards: 16 pairs, learnt by heart."""
    root = tmp_path_factory.mktemp("memorized")
    return train(lm, write_shards(root / "shards", [16]), root / "run", steps=60, lr=3e-3, crop=1.0)


@torch.no_grad()
def count_matches(run: Path) -> int:
    """Of 16 pairs, how many images and captions find each other?"""
    model, index = load_model(run), ShardIndex(str(run.parent / "shards"))
    images = torch.stack([model.preprocess(decode(index.image(i))) for i in range(16)])
    captions = [index.captions(i)[0] for i in range(16)]
    scores = model.encode_image(images) @ model.encode_text(captions).T
    pairs = torch.arange(16)
    return int(((scores.argmax(0) == pairs) & (scores.argmax(1) == pairs)).sum())


def test_pairs_are_learnt_by_heart(memorized):
    assert count_matches(memorized) == 16


def test_compiled_scratch_run_learns_by_heart(lm, tmp_path, monkeypatch):
    real = torch.nn.Module.compile
    # The graph is captured, but no C++ compiler is asked for.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: real(
        module, backend="aot_eager", **options))
    folder = write_shards(tmp_path / "shards", [16])
    out = train(lm, folder, tmp_path / "run", text="scratch", compile=True, steps=60, lr=3e-3,
                crop=1.0)
    assert count_matches(out) == 16


def test_checkpoint_holds_trained_weights_alone(lm, memorized):
    checkpoint = read_weights(memorized)
    model = load_model(memorized)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert same(trained, checkpoint["model"]) and not model.training
    assert not any(name.startswith("text_tower.lm.") for name in checkpoint["model"])
    assert checkpoint["step"] == 60 and checkpoint["lm"]["name"] == lm


def test_log_has_the_promised_keys(memorized):
    row = read_log(memorized)[-1]
    assert row["step"] == 60 and row.keys() >= {"epoch", "loss", "accuracy", "logit_scale", "lr",
                                                "images_per_s", "data_wait", "seconds"}


def test_progress_is_told_without_a_terminal(lm, tmp_path, capsys):
    train(lm, write_shards(tmp_path / "s", [40]), tmp_path / "run", steps=20)
    output = capsys.readouterr().out
    assert re.search(r"step 10 of 20: loss [\d.]+, .* images/s, .* left", output)
    assert "step 20 of 20" in output


def test_seconds_grow_over_a_resume(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(paraclip.Log, "ROW_EVERY", 1)
    folder, out = write_shards(tmp_path / "s", [40]), tmp_path / "run"
    interrupt(monkeypatch, lm, folder, out, at=5, steps=6)
    train(lm, folder, out, steps=6)
    seconds = [row["seconds"] for row in read_log(out)]
    assert len(seconds) == 6 and seconds == sorted(set(seconds))


def test_keep_every_keeps_checkpoints(lm, tmp_path):
    out = train(lm, write_shards(tmp_path / "s", [40]), tmp_path / "run", keep_every=2, save_every=1)
    assert sorted(path.name for path in out.glob("model*")) == [
        "model-00000002.pt", "model-00000004.pt", "model.pt"]
    kept, last = load_model(out / "model-00000002.pt"), load_model(out)
    assert not torch.equal(kept.text_proj.weight, last.text_proj.weight)


@torch.no_grad()
@pytest.mark.parametrize("precision, atol", [("fp32", 1e-6), ("bf16", 0.01)])
def test_kept_states_equal_computed_ones(lm, tmp_path, precision, atol):
    index = ShardIndex(write_list_shards(tmp_path, 20))
    captions = [caption for i in range(20) for caption in index.captions(i)]
    assert len(captions) == 10 + 4 * 10
    model = build(lm, precision=precision)
    look_up = paraclip.cache_lm_states(model, index)
    for i in range(0, 50, 10):
        batch = captions[i:i + 10]
        kept = model.encode_text([look_up(batch)])
        assert torch.allclose(kept, model.encode_text(batch), atol=atol)


def test_too_many_states_are_refused(lm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paraclip, "CACHE_BYTES", 1000)
    args = flags(**TINY, data=write_shards(tmp_path / "s", [20]), lm=lm, out=tmp_path / "run")
    assert "--no-cache-lm" in error_line(capsys, paraclip, *args)


def overlap_of_cat_and_feline(lm: str, text: str) -> float:
    """AO@10 of two queries, after training on images of four colours and their captions."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.arange(64) % 4
    captions = [["a dog", "a cat", "a square", "a circle"][number] for number in numbers]
    colours = torch.tensor([[255, 0, 0], [0, 0, 255], [0, 255, 0], [255, 255, 255]])
    noise = torch.randint(-60, 60, (64, 3, 16, 16), generator=generator)
    images = (colours[numbers].view(64, 3, 1, 1) + noise).clamp(0, 255).byte()
    model = build(lm, text=text)
    steps_on_one_batch(model, 30, [(images, [model.tokenize(captions)])], text=text, lr=3e-3)
    with torch.no_grad():
        queries = model.encode_text(["a cat", "a feline"])
        cat, feline = ev.rankings(queries, model.encode_image(images), k=10)
    return float(ev.average_overlap(cat, feline))


def test_alignment_ranks_an_unseen_synonym_alike(tmp_path):
    """No caption has "feline", which the language model takes for "cat"."""
    lm = write_lm(tmp_path, "bert")
    model = transformers.BertModel.from_pretrained(lm)
    vocabulary = transformers.AutoTokenizer.from_pretrained(lm).get_vocab()
    embeddings = model.embeddings.word_embeddings.weight.data
    embeddings[vocabulary["feline"]] = embeddings[vocabulary["cat"]]
    model.save_pretrained(lm)
    assert overlap_of_cat_and_feline(lm, "align") > 0.9
    assert overlap_of_cat_and_feline(lm, "scratch") < 0.5


# ---- training: killed, stopped, on many ranks ----------------------------------------------------
def test_killed_run_resumes_to_same_bits(lm, tmp_path):
    """With workers, list captions, and a checkpoint after every step: kills meet its writing."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    args = flags(**TINY | dict(data=write_list_shards(tmp_path / "s", 79), lm=lm, steps=40,
                               workers=2, accum=2, save_every=1))
    call(paraclip, *args, "--out", whole)
    args, rng, newest = [*args, "--out", out], random.Random(0), 0
    for killer in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        child = start_child(tmp_path / "output.txt", run_training, *args)
        model = out / "model.pt"
        wait_until(child, lambda: model.exists() and model.stat().st_mtime_ns > newest)
        time.sleep(rng.random() * 0.1)
        os.kill(child.pid, killer)
        finish_child(child, -killer if killer == signal.SIGKILL else 128 + killer)
        newest = model.stat().st_mtime_ns
    assert read_weights(out)["step"] < 40
    (out / ".model.pt.paraclip-tmp").touch()  # what a kill in mid-write leaves
    with open(out / "log.jsonl", "ab") as log:
        log.write(b'{"step": 39, "lo')  # newer than the checkpoint, and cut by the kill
    call(paraclip, *args)
    assert same(read_weights(out)["model"], read_weights(whole)["model"])
    assert [row["loss"] for row in read_log(out)] == [row["loss"] for row in read_log(whole)]
    assert not list(out.glob(".*"))


def run_training(*argv):
    call(paraclip, *argv)


def train_slowly(*argv):
    """A training whose every step takes a second."""
    real = paraclip.backward

    def backward(*args):
        time.sleep(1)
        return real(*args)

    paraclip.backward = backward
    call(paraclip, *argv)


def test_sigterm_in_a_slow_step_saves(lm, tmp_path):
    out = tmp_path / "run"
    args = flags(**TINY | dict(data=write_shards(tmp_path / "s", [40]), lm=lm, out=out, workers=2))
    child = start_child(tmp_path / "output.txt", train_slowly, *args)
    wait_until(child, (out / "log.jsonl").exists)
    time.sleep(0.5)
    os.killpg(child.pid, signal.SIGTERM)  # its workers, too
    finish_child(child, 128 + signal.SIGTERM)
    assert read_weights(out)["step"] < 4


def test_two_processes_follow_one(lm, tmp_path, monkeypatch):
    """Under torchrun, which starts both again when one is killed. The recipe is cc12m's."""
    write_list_shards(tmp_path / "cc12m", 79)
    monkeypatch.setenv("PARACLIP_DATA", str(tmp_path))
    fields = TINY | dict(lm=lm, steps=30, workers=1, save_every=1, optimizer="muon")
    args = ["--data", "cc12m", *flags(**fields)]
    call(paraclip, *args, "--out", tmp_path / "one")
    child = start_child(tmp_path / "output.txt", torchrun, 2, 1, run_training, *args,
                        "--out", tmp_path / "two")
    wait_until(child, (tmp_path / "two" / "model.pt").exists)
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output = finish_child(child)
    assert len(set(re.findall("steps ([0-9]+) to 30", output))) == 2  # from 1, and from later
    one, two = (read_weights(tmp_path / name) for name in ("one", "two"))
    for name, weight in one["model"].items():
        assert torch.allclose(weight, two["model"][name], atol=2e-4), name
    recipe = paraclip.RECIPES["cc12m"]["weight_decay"]
    assert two["config"]["weight_decay"] == recipe != Config().weight_decay


def fail_on_rank_1(*argv):
    def update(*args):
        raise UserError("this rank has failed")

    if os.environ["RANK"] == "1":
        paraclip.update = update
    call(paraclip, *argv)


def test_one_ranks_error_ends_all(lm, tmp_path):
    args = flags(**TINY, data=write_shards(tmp_path / "s", [40]), lm=lm, out=tmp_path / "run")
    child = start_child(tmp_path / "output.txt", torchrun, 2, 0, fail_on_rank_1, *args)
    assert "error: this rank has failed" in finish_child(child, 1)
    assert not (tmp_path / "run" / "model.pt").exists()


def train_as_rank(rank: int, ranks: int, port: int, args: list, args_of_rank_1: list):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                      MASTER_ADDR="localhost", MASTER_PORT=str(port))
    call(paraclip, *args, *(args_of_rank_1 if rank == 1 else []))


@pytest.mark.parametrize("field, value, other", [
    ("seed", 0, 5), ("lr", 0.001, 0.5), ("geometry", 0.0, 1.0), ("precision", "fp32", "bf16"),
    ("crop", 0.8, 0.5)])
def test_ranks_with_other_flags_are_refused(lm, tmp_path, field, value, other):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    args = flags(**TINY, data=write_shards(tmp_path / "s", [40]), lm=lm, out=tmp_path / "run")
    outputs = on_ranks(2, tmp_path, train_as_rank, port, args, flags(**{field: other}), status=2)
    for output in outputs:
        line, = (line for line in output.splitlines() if "error: " in line)
        assert field in line and repr(value) in line and repr(other) in line


# ---- training: failures and mistakes -------------------------------------------------------------
@pytest.fixture
def saved_run(lm, tmp_path, monkeypatch) -> Namespace:
    """A run of four steps that was stopped after two; `args` resume it."""
    folder, out = write_shards(tmp_path / "s", [40]), tmp_path / "run"
    interrupt(monkeypatch, lm, folder, out, at=2)
    args = flags(**TINY, data=folder, lm=lm, out=out)
    return Namespace(folder=folder, out=out, args=args, content=(out / "model.pt").read_bytes())


def test_loss_that_is_not_finite_stops(saved_run, monkeypatch, capsys):
    def loss(*features):
        loss, accuracy = contrastive_loss(*features)
        return loss * math.nan, accuracy

    monkeypatch.setattr(paraclip, "contrastive_loss", loss)
    assert "nan" in error_line(capsys, paraclip, *saved_run.args)
    assert (saved_run.out / "model.pt").read_bytes() == saved_run.content


def test_weight_that_is_not_finite_stops(saved_run, monkeypatch, capsys):
    real = paraclip.update

    def update(model, *args):
        norm = real(model, *args)  # of before the step, and finite, as is the loss
        model.text_proj.weight.data[0, 0] = torch.inf
        return norm

    monkeypatch.setattr(paraclip, "update", update)
    assert "at step 3" in error_line(capsys, paraclip, *saved_run.args, "--save-every", 1)
    assert (saved_run.out / "model.pt").read_bytes() == saved_run.content


def test_full_disk_leaves_the_former_checkpoint(saved_run, capsys):
    # A limit on the size of files: only a checkpoint exceeds it.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert "model.pt" in error_line(capsys, paraclip, *saved_run.args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (saved_run.out / "model.pt").read_bytes() == saved_run.content
    assert not list(saved_run.out.glob(".*"))


def test_finished_run_says_so(memorized, capsys):
    config = read_weights(memorized)["config"]
    paraclip.train(Config(**config))
    assert "is finished" in capsys.readouterr().out


def test_other_settings_are_refused(saved_run, capsys):
    assert "lr 0.001 -> 0.5" in error_line(capsys, paraclip, *saved_run.args, "--lr", 0.5)


def test_other_data_of_equal_sizes_are_refused(saved_run, capsys):
    members = []
    for i in range(40):
        members += [sample(i)[0], (f"{i:05d}.txt", sentence(i).encode()[::-1])]
    write_tar(Path(saved_run.folder) / "00000.tar", members)
    assert "other data" in error_line(capsys, paraclip, *saved_run.args)


@pytest.mark.parametrize("begun, resumed", [("fp32", "bf16"), ("bf16", "fp32")])
def test_run_resumes_in_its_own_precision(lm, tmp_path, monkeypatch, begun, resumed):
    folder, out = write_shards(tmp_path / "s", [40]), tmp_path / "run"
    whole = train(lm, folder, tmp_path / "whole", precision=begun)
    # The machine on which it is begun chooses one, the machine on which it resumes another.
    monkeypatch.setattr(paraclip, "has_fast_bf16", lambda: begun == "bf16")
    interrupt(monkeypatch, lm, folder, out, at=2, precision="")
    monkeypatch.setattr(paraclip, "has_fast_bf16", lambda: resumed == "bf16")
    train(lm, folder, out, precision="")
    assert same(read_weights(out)["model"], read_weights(whole)["model"])
    assert read_weights(out)["config"]["precision"] == begun
    with pytest.raises(UserError, match=f"precision '{begun}' -> '{resumed}'"):
        train(lm, folder, out, precision=resumed)


def test_checkpoint_of_a_changed_lm_is_refused(lm, tmp_path):
    folder = Path(shutil.copytree(lm, tmp_path / "lm"))
    out = train(str(folder), write_shards(tmp_path / "s", [16]), tmp_path / "run", steps=1)
    model = transformers.BertModel.from_pretrained(folder)
    model.embeddings.word_embeddings.weight.data[3] += 1e-3
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="another version of the language model"):
        load_model(out)
    shutil.copytree(lm, folder, dirs_exist_ok=True)
    load_model(out)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"square"', '"SQUARE"'))
    with pytest.raises(UserError, match="another version of the language model"):
        load_model(out)


@pytest.mark.parametrize("change", [dict(width=64), dict(lr=math.nan), dict(colour="red")])
def test_checkpoint_with_another_config_is_refused(memorized, tmp_path, change):
    checkpoint = read_weights(memorized)
    torch.save(checkpoint | {"config": checkpoint["config"] | change}, tmp_path / "changed.pt")
    with pytest.raises(UserError):
        load_model(tmp_path / "changed.pt")


@pytest.mark.parametrize("key", ["step", "data", "model", "lm", "optimizers", "rng"])
def test_incomplete_checkpoint_is_refused(memorized, tmp_path, key):
    checkpoint = read_weights(memorized)
    del checkpoint[key]
    torch.save(checkpoint, tmp_path / "incomplete.pt")
    with pytest.raises(UserError, match="not a paraclip checkpoint"):
        load_model(tmp_path / "incomplete.pt")


def test_flipped_bit_in_a_weight_is_found(memorized, tmp_path):
    content = bytearray((memorized / "model.pt").read_bytes())
    weight = read_weights(memorized)["model"]["text_proj.weight"].numpy().tobytes()
    content[content.index(weight)] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_model(tmp_path / "flipped.pt")


def test_damaged_run_folder_is_resumed_or_refused(lm, tmp_path):
    folder = write_shards(tmp_path / "s", [16])
    good = train(lm, folder, tmp_path / "good", steps=1)
    expected = read_weights(good)["model"]
    for seed in range(FUZZ_SEED, FUZZ_SEED + FUZZ_CASES):
        rng, run = random.Random(seed), tmp_path / f"run{seed}"
        shutil.copytree(good, run)
        file = run / rng.choice(["model.pt", "model.pt", "log.jsonl", "config.json"])
        damaged = damage(file.read_bytes(), rng)
        file.write_bytes(damaged)
        try:
            weights = load_model(run).state_dict()
            assert all(torch.equal(weights[name], p) for name, p in expected.items()), seed
            train(lm, folder, run, steps=1)
        except UserError:
            assert file.name != "log.jsonl" and file.read_bytes() == damaged, seed


def test_missing_checkpoint_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such"):
        load_model("nowhere")


# ---- run folders ---------------------------------------------------------------------------------
def read_folder(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name, content", [
    ("config.json", '{"model_type": "bert"}'), ("config.json", '["text"]'),
    ("config.json", "{}"), ("config.json", '{"seed": 0, "lr": 0.1}'), ("log.jsonl", "{}"), ("notes.txt", "mine"),
    ("model.pt", "another program's"), (".hidden", "mine")])
def test_foreign_folders_are_refused_and_unchanged(lm, tmp_path, capsys, name, content):
    out = tmp_path / "theirs"
    out.mkdir()
    (out / name).write_text(content)
    (out / "log.jsonl").write_text("a log")
    before = read_folder(out)
    args = flags(**TINY, data=write_shards(tmp_path / "s", [20]), lm=lm, out=out)
    assert "theirs" in error_line(capsys, paraclip, *args)
    assert read_folder(out) == before


@pytest.mark.parametrize("leftovers", [
    [], ["run.lock"], ["run.lock", ".config.json.paraclip-tmp"],
    ["run.lock", "config.json", "log.jsonl", ".model.pt.paraclip-tmp"]])
def test_what_a_killed_start_leaves_is_taken(lm, tmp_path, leftovers):
    out = tmp_path / "run"
    out.mkdir()
    for name in leftovers:
        (out / name).touch()
    if "config.json" in leftovers:
        (out / "config.json").write_text(json.dumps(vars(Config())))
    train(lm, write_shards(tmp_path / "s", [20]), out, steps=1)
    assert read_weights(out)["step"] == 1


def test_running_training_locks_its_folder(saved_run, capsys):
    with FileLock(saved_run.out / "run.lock"):
        assert "another process is training" in error_line(capsys, paraclip, *saved_run.args)


@pytest.mark.parametrize("offset", [0, 0.3, 0.7])
def test_of_two_commands_one_is_refused(lm, tmp_path, offset):
    out = tmp_path / "run"
    args = flags(**TINY | dict(data=write_shards(tmp_path / "s", [40]), lm=lm, out=out, steps=20))
    children = []
    for rate in (0.001, 0.002):
        children.append(start_child(tmp_path / f"{rate}.txt", run_training, *args, "--lr", rate))
        time.sleep(offset)
    for child in children:
        child.join(60)
    assert sorted(child.exitcode for child in children) == [0, 2]
    winner = 0.001 if children[0].exitcode == 0 else 0.002
    checkpoint = read_weights(out)
    assert checkpoint["step"] == 20 and checkpoint["config"]["lr"] == winner
    assert [row["step"] for row in read_log(out)] == [10, 20]


@pytest.mark.parametrize("args, message", [
    ("--no-such-flag", "--no-such-flag"), ("--text thaw", "--text"), ("--lr 1e+38", "--lr"),
    ("--crop 2", "--crop 2"), ("--steps -5", "--steps"), ("--batch-size 1", "--batch-size"),
    ("--lm no/such-model", "no/such-model"), ("--batch-size 64", "usable samples"),
    ("--epochs 0.01", "less than one step"), ("--accum 3", "multiple"),
    ("--image-size 15", "multiple"), ("--heads 3", "--heads"), ("--patch-size 1", "--patch-size"),
    ("--data nowhere", "nowhere"), ("--text scratch --geometry 1", "--geometry")])
def test_mistakes_in_training_are_told(lm, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    fields = TINY | dict(data=write_shards(Path("s"), [20]), out="run", lm=lm, steps=0)
    assert message in error_line(capsys, paraclip, *flags(**fields), *args.split())
    assert not Path("run/model.pt").exists()


def test_full_gpu_suggests_micro_batches(saved_run, monkeypatch, capsys):
    def backward(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    monkeypatch.setattr(paraclip, "backward", backward)
    assert "Try --accum 2" in error_line(capsys, paraclip, *saved_run.args)


# ---- README --------------------------------------------------------------------------------------
def test_readmes_python_block_runs(memorized, capsys):
    block = (HERE / "README.md").read_text().split("```python\n")[1].split("```")[0]
    block = block.replace("runs/emoji-align", str(memorized))
    exec(block.replace("shards/emoji/test", str(memorized.parent / "shards")), {})
    assert re.search(r"\d", capsys.readouterr().out)


# ---- evaluation: metrics -------------------------------------------------------------------------
@pytest.mark.parametrize("a, b, ao, js", [
    ([1, 2, 3, 4], [1, 2, 3, 4], 1, 1),
    ([1, 2, 3, 4], [5, 6, 7, 8], 0, 0),
    ([1, 2, 3, 4], [2, 1, 3, 5], (0 + 2 / 2 + 3 / 3 + 3 / 4) / 4, 3 / 5),
    pytest.param([1, 2, 3], [1, 4, 5], (1 + 1 / 2 + 1 / 3) / 3, 1 / 5, id="agree at the top"),
    pytest.param([1, 2, 3], [4, 5, 1], (0 + 0 + 1 / 3) / 3, 1 / 5, id="agree at the bottom"),
])
def test_ao_and_js_by_hand(a, b, ao, js):
    # Of longer lists only the first k items count.
    assert ev.average_overlap(a + [9], b + [9], len(a)) == pytest.approx(ao, abs=1e-15)
    assert ev.jaccard(a + [9], b + [9], len(a)) == pytest.approx(js, abs=1e-15)


def test_ao_follows_its_definition():
    rng = np.random.default_rng(0)
    a, b = (np.array([rng.permutation(40)[:30] for _ in range(50)]) for _ in range(2))
    for list_a, list_b, value in zip(a, b, ev.average_overlap(a, b, 25)):
        overlaps = [len({*list_a[:d]} & {*list_b[:d]}) / d for d in range(1, 26)]
        assert value == pytest.approx(np.mean(overlaps), abs=1e-15)


def test_equal_lists_have_exactly_ao_1():
    lists = np.arange(1000).reshape(1, -1)
    assert [ev.average_overlap(lists, lists, k)[0] for k in (1, 7, 49, 1000)] == [1, 1, 1, 1]


def test_lists_shorter_than_k_are_refused():
    with pytest.raises(ValueError, match="k = 4"):
        ev.jaccard([1, 2, 3, 4], [1, 2, 3], 4)


@pytest.mark.parametrize("kind", ["few vectors", "copies of fp32 vectors", "nearly equal vectors"])
def test_rankings_equal_a_stable_sort(kind):
    # In fp32 a copy may score differently at another place of the matrix: it would not tie.
    torch.manual_seed(0)
    if kind == "few vectors":
        queries, gallery = torch.randint(2, (23, 4)) - 0.5, torch.randint(2, (57, 4)) - 0.5
    elif kind == "nearly equal vectors":
        queries, gallery = torch.randn(23, 4), torch.randn(4) + 1e-7 * torch.randn(57, 4).double()
    else:
        vectors = F.normalize(torch.randn(71, 512), dim=-1)
        queries, gallery = vectors[30:], vectors[torch.randint(30, (301,))]
    unit_queries, unit_gallery = (
        (F.normalize(x.double(), dim=-1) * 2**24).round() / 2**24 for x in (queries, gallery))
    for chunk, k in ((3, 1), (13, 50), (2048, 20)):
        ranked = ev.rankings(queries, gallery, k, chunk).tolist()
        for row, query in zip(ranked, unit_queries):
            # fsum does not round.
            scores = [round(math.fsum((query * item).tolist()) * 2**24) for item in unit_gallery]
            assert row == sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def test_recall_and_precision_equal_a_loop():
    rng = np.random.default_rng(1)
    ranked = np.array([rng.permutation(9) for _ in range(20)])
    correct = [rng.permutation(9)[:1 + i % 3].tolist() for i in range(20)]
    for k in (1, 5, 9):
        counts = [sum(item in items for item in row[:k]) for row, items in zip(ranked, correct)]
        assert ev.recall_at_k(ranked, correct, k).tolist() == [count > 0 for count in counts]
        assert ev.precision_at_k(ranked, correct, k).tolist() == [count / k for count in counts]


def test_recall_from_images_finds_any_text():
    texts = torch.eye(4)[[0, 0, 1, 2]]
    images = torch.eye(4)[[1, 0, 3]]
    correct = [[1], [1], [0], [2]]  # text 3 shows image 2, which is no text's nearest
    results = ev.retrieval("recall", ev.rankings(texts, images, 3).numpy(), texts, images, correct,
                           np.arange(4))
    # In the order in which the texts first name the images: 1, 0, 2.
    assert results["recall", "i2t@1"].values.tolist() == [1, 1, 0]


def test_spearman_equals_scipy_with_ties():
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(0).integers(0, 9, (2, 60))
    assert ev.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_interval_is_as_wide_as_normal():
    values = np.random.default_rng(0).random(400)
    low, high = ev.bootstrap_ci(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.06)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.1 * (high - low))


def test_interval_of_equal_values_is_exact():
    assert ev.bootstrap_ci([0.1] * 7) == (0.1, 0.1)


def test_interval_stays_within_the_values():
    groups = np.repeat(np.arange(20), np.arange(20) % 5 + 1)
    values = np.where(groups == 3, 0.9, 1.0)
    assert 0.9 <= ev.bootstrap_ci(values, groups)[0] < ev.bootstrap_ci(values, groups)[1] <= 1


def test_interval_covers_clustered_data():
    # Every image has a level of its own, of mean 0.4, around which its one to five pairs scatter.
    rng = np.random.default_rng(0)
    covered = {"groups": 0, "pairs": 0}
    for seed in range(60):
        groups = np.repeat(np.arange(60), rng.integers(1, 6, 60))
        values = rng.beta(2, 3, 60)[groups] + rng.normal(0, 0.08, len(groups))
        for name, given in (("groups", groups), ("pairs", None)):
            low, high = ev.bootstrap_ci(values, given, seed)
            covered[name] += low <= 0.4 <= high
    assert covered["groups"] >= 54 > 48 >= covered["pairs"]


def as_pairs(n: int, **fields) -> list[dict]:
    return [{"query": f"q{i}", "paraphrase": f"p{i}", "images": [], "kind": "", "group": None,
             **{name: value(i) for name, value in fields.items()}} for i in range(n)]


def test_unrelated_pairs_share_nothing():
    pairs = as_pairs(42, query=lambda i: f"q{i // 3}", images=lambda i: [f"{i % 7}", f"x{i % 5}"])
    contents = [{pair["query"], *pair["images"]} for pair in pairs]
    partners = ev.unrelated(pairs, 0)
    assert all(contents[i].isdisjoint(contents[j]) for i, j in enumerate(partners))
    assert len(set(partners)) > 21


def test_a_pair_is_never_unrelated_to_itself():
    pairs = as_pairs(5, query=lambda i: "q", paraphrase=lambda i: "p")
    assert all(i != j for i, j in enumerate(ev.unrelated(pairs, 0)))


@pytest.mark.parametrize("pairs, groups", [
    (as_pairs(3, images=lambda i: [f"{i // 2}"]), [0, 0, 1]),
    (as_pairs(3, images=lambda i: [f"{i}"], group=lambda i: i % 2), [0, 1, 0]),
    (as_pairs(3, images=lambda i: ["ab", "ba"][i % 2]), [0, 0, 0]),
    (as_pairs(3, query=lambda i: f"q{i // 2}"), [0, 0, 1]),
], ids=["image", "group", "images in any order", "query"])
def test_pairs_are_grouped_by(pairs, groups):
    assert ev.group_numbers([ev.group_of(pair) for pair in pairs]).tolist() == groups


VECTORS = torch.tensor([[1, 0], [3, 4], [4, 3], [3, -4], [-4, 3], [0, 1], [1, 1.0]])
BY_NUMBER = Namespace(encode_text=lambda texts: VECTORS[[int(text) for text in texts]])


@pytest.mark.parametrize("p1, p2, negative, image, text_only, image_text", [
    pytest.param(2, 1, 4, 6, 1, 1, id="both closer"),
    pytest.param(0, 1, 3, 0, 0, 0, id="negative as close to caption 1"),
    pytest.param(1, 0, 3, 0, 0, 0, id="negative as close to caption 2"),
    pytest.param(2, 1, 4, 5, 1, 0, id="negative as close to the image as caption 1"),
    pytest.param(1, 2, 4, 5, 1, 0, id="negative as close to the image as caption 2"),
])
def test_a_tie_of_triplets_is_a_miss(p1, p2, negative, image, text_only, image_text):
    task = ev.Triplets.__new__(ev.Triplets)
    task.files = {"f": [{"caption": str(p1), "caption2": str(p2),
                         "negative_caption": str(negative), "images": ["x"]}]}
    images = ev.Images(["x"], {"x": 0}, VECTORS[[image]])
    results = task.measure(BY_NUMBER, images, ev.EvalConfig())
    assert results["triplets", "f", "text_only"].values == [text_only]
    assert results["triplets", "f", "image_text"].values == [image_text]


def test_class_prompts_are_averaged():
    task = ev.ZeroShot.__new__(ev.ZeroShot)
    task.classnames, task.labels, task.templates = ["2", "3"], {"x": 1}, ["{}", "5"]
    task.names_from = task.templates_from = "here"
    # By the first prompt alone class 0 would be nearer.
    images = ev.Images(["x"], {"x": 0}, torch.tensor([[10, -0.7]]))
    assert task.measure(BY_NUMBER, images, ev.EvalConfig())["zeroshot", "top1"].values == [1]


# ---- evaluation: files ---------------------------------------------------------------------------
PAIR = {"query": "q", "paraphrase": "p"}
READ_PAIR = PAIR | {"images": [], "kind": "", "group": None}
COCO = '{"images": [{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "b"}], ' \
       '"annotations": [{"image_id": 1, "caption": %s}]}'


@pytest.mark.parametrize("reader, text, expected", [
    (ev.read_pairs, json.dumps([PAIR]), [READ_PAIR]),
    (ev.read_pairs, "\ufeff" + json.dumps(PAIR) + "\r\n\n" + json.dumps(PAIR), [READ_PAIR] * 2),
    (ev.read_pairs, '{"caption": "q\\ud83d", "caption2": "p", "filename": "1"}',
     [READ_PAIR | {"query": "q?", "images": ["1"]}]),
    (ev.read_triplets, '[{"caption": "a", "caption2": "b", "negative_caption": "c"}]',
     [{"images": [], "caption": "a", "caption2": "b", "negative_caption": "c"}]),
    (ev.read_lists, '{"text": "a", "ranking": ["2", "1"]}\n', {"a": ["2", "1"]}),
    (ev.read_lists, '{"query": "a", "query_ranking": ["1"], "paraphrase": "b", '
                    '"paraphrase_ranking": ["2"]}', {"a": ["1"], "b": ["2"]}),
    (ev.read_captions, COCO % '"x"', {"a": ["x"]}),
    (ev.read_sts, 'a,"b, c",1\nd,e,2.5\n', [("a", "b, c", 1.0), ("d", "e", 2.5)]),
    (ev.read_sts, 'id\tScore\tsentence1\tsentence2\n7\t3\ta\t"b\n', [("a", '"b', 3.0)]),
    (ev.read_templates, "a {}\n\nof {} b\n", ["a {}", "of {} b"]),
    (ev.read_labels, '{"classnames": ["x", "y"], "labels": {"a": 1}}', (["x", "y"], {"a": 1})),
])
def test_evaluation_files_are_read(tmp_path, reader, text, expected):
    file = tmp_path / "file"
    file.write_bytes(text.encode())
    assert reader(file) == expected


@pytest.mark.parametrize("reader, text, complaint", [
    (ev.read_pairs, json.dumps(PAIR) + "\n\n{", "line 3.*query and paraphrase"),
    (ev.read_pairs, '{"query": "q"}', "line 1.*query and paraphrase"),
    (ev.read_pairs, '{"query": "q", "paraphrase": " "}', "line 1.*query and paraphrase"),
    (ev.read_pairs, json.dumps(PAIR | {"images": "a"}), "images a list"),
    (ev.read_pairs, json.dumps(PAIR | {"kind": 1}), "kind to be a text"),
    (ev.read_pairs, "[" * 99_999, "recursion"),
    (ev.read_pairs, "\n", "empty"),
    (ev.read_pairs, b"\xff\xfe{\0", "UTF-8"),
    (ev.read_triplets, '{"caption": "a", "caption2": "b"}', "negative_caption"),
    (ev.read_lists, '{"text": "a", "ranking": "1"}', "line 1.*best first"),
    (ev.read_lists, '{"text": "a", "ranking": ["1"]}\n{"text": "a", "ranking": ["2"]}',
     "line 2.*several models"),
    (ev.read_captions, COCO % "null", "item 1 of annotations.*COCO"),
    (ev.read_captions, (COCO % '"x"').replace('image_id": 1', 'image_id": 7'), "image with id 7"),
    (ev.read_captions, '{"images": [], "annotations": []}', "no captions"),
    (ev.read_sts, "a,b,1\nc,d,nan", "row 2.*finite score"),
    (ev.read_sts, "a,b", "row 1.*finite score"),
    (ev.read_templates, "a {}\n\nno place\n", "no place"),
    (ev.read_labels, '{"classnames": ["x"], "labels": {"a": 1}}', "below 1"),
])
def test_evaluation_files_are_refused(tmp_path, reader, text, complaint):
    file = tmp_path / "file"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"{file}.*{complaint}"):
        reader(file)


def test_classes_come_from_folders(tmp_path):
    folder = write_images(tmp_path / "f", "z/a.PNG", "fire_truck/a.png", "ant/b.png", "z/.y.jpg",
                          "ant/sub/c.jpeg", "stray.png", ".hidden/a.png", "empty/a.txt")
    gallery, names, labels = ev.read_class_folders(folder)
    assert names == ["ant", "fire truck", "z"]
    assert labels == {"ant/b.png": 0, "ant/sub/c.jpeg": 0, "fire_truck/a.png": 1, "z/a.PNG": 2}


def test_imagenet_has_torchvisions_names(tmp_path):
    root = write_images(tmp_path, *(f"val/n{i:08}/x.JPEG" for i in range(1000)))
    _, names, labels = ev.read_class_folders(f"imagenet:{root}")
    assert (names[0], names[-1], len(labels)) == ("tench", "toilet tissue", 1000)


def test_cifar_is_torchvisions_test_set(tmp_path, monkeypatch):
    pixels = np.zeros((2, 32, 32, 3), np.uint8)
    monkeypatch.setattr(ev.torchvision.datasets, "CIFAR100", lambda root, train: Namespace(
        classes=["x", "y_z"], targets=[1, 0], data=pixels))
    gallery, names, labels = ev.read_class_folders(f"cifar100:{tmp_path}")
    assert names == ["x", "y z"] and labels == {"test/0": 1, "test/1": 0}


def test_file_names_must_be_unambiguous():
    rows = ev.rows_by_name(["a/1.png", "b/1.png", "b/2.png"])
    assert rows == {"a/1.png": 0, "b/1.png": 1, "b/2.png": 2, "2.png": 2}


# ---- evaluation: the whole program ---------------------------------------------------------------
MODEL_FILE = """
import torch
class Good:
    def preprocess(self, image): return torch.tensor(list(image.resize((4, 4)).tobytes())).float()
    def encode_image(self, batch): return batch[:, :3]
    def encode_text(self, texts): return [[len(t), t.count("a"), t.count("e")] for t in texts]
class NoText:
    preprocess = encode_image = Good.preprocess
class OtherWidth(Good):
    def encode_text(self, texts): return [[len(t)] for t in texts]
class OneForAll(Good):
    def encode_text(self, texts): return [[1, 2, 3]]
class AnySize(Good):
    def preprocess(self, image): return torch.zeros(image.size)
class NaN(Good):
    def encode_text(self, texts): return [[float("nan")] * 3 for t in texts]
number = 1
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, lm) -> Path:
    """A folder with models, and a small file of every kind that is measured on."""
    root = tmp_path_factory.mktemp("inputs")
    save_hugging_face_model(root / "clip", "CLIP", lm)
    save_hugging_face_model(root / "siglip", "Siglip", lm)
    (root / "mine.py").write_text(MODEL_FILE)
    names = [f"{i:02}.png" for i in range(14)]
    files = [f"images/{'sub/' * (i % 2)}{name}" for i, name in enumerate(names)]
    files += [f"classes/{name}/{i}.png" for name in ("big_cat", "dog") for i in (1, 2)]
    write_images(root, *files)
    for seed, name in enumerate(files):
        (root / name).write_bytes(image_bytes(seed, (48, 40), "PNG"))
    (root / "images/broken.jpg").write_bytes(b"\xff\xd8 no image")
    names.append("lost.png")
    triplets = [{"caption": sentence(i), "caption2": sentence(20 + i), "filename": name,
                 "negative_caption": sentence(40 + i)} for i, name in enumerate(names)]
    # More words than the models have positions, and several correct images.
    triplets[0]["caption"] = "red dog " * 9
    triplets[1]["images"] = names[1:4]
    coco = {"images": [{"id": i, "file_name": name} for i, name in enumerate(names[5:])],
            "annotations": [{"image_id": i % 10, "caption": sentence(i)} for i in range(27)]}
    sts = [f"{sentence(i)},{sentence(20 + i)},{i % 6}" for i in range(12)]
    for name, text in (("triplets.json", json.dumps(triplets)), ("sts.csv", "\n".join(sts)),
                       ("captions.json", json.dumps(coco)), ("templates.txt", "{}\nthe {}\n"),
                       ("equal.csv", "a dog,a cat,1\na dog,a square,1\n")):
        (root / name).write_text(text)
    return root


@pytest.fixture
def cd(inputs, monkeypatch):
    monkeypatch.chdir(inputs)


PAIRS = "--pairs triplets.json --images images --workers 0".split()
ALL = ("--pairs triplets.json --triplets triplets.json --captions captions.json --sts sts.csv "
       "--templates templates.txt --images images --zeroshot classes --k 5 --workers 0").split()


def evaluate(capsys, *argv) -> list[dict]:
    return last_json(capsys, ev, *argv)


def test_all_tasks_in_one_call(cd, capsys):
    clip, siglip = evaluate(capsys, "clip", "siglip", *ALL)
    assert (clip["k"], clip["gallery"], clip["pairs"], clip["recall_pairs"]) == (5, 14, 15, 14)
    assert clip["triplets"]["triplets.json"]["image_text_n"] == 14
    assert clip["captions"] == {"images": 9, "captions": 25, "missing": 1}
    assert (clip["zeroshot"]["classes"], clip["zeroshot"]["images"]) == (2, 4)
    assert siglip["diff"]["ao"] == pytest.approx(siglip["ao"] - clip["ao"], abs=1e-12)
    assert siglip["diff"].keys().isdisjoint({"k", "pairs", "captions", "sts"})


def test_intervals_hold_their_means(cd, capsys):
    report, = evaluate(capsys, "clip", *PAIRS)
    for name in ("ao1", "ao", "js", "ao_random", "js_random"):
        low, high = report[f"{name}_ci"]
        assert 0 <= low <= report[name] <= high <= 1
    assert report["ao_minus_random"] == pytest.approx(report["ao"] - report["ao_random"])


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_numbers_equal_the_librarys(inputs, cd, capsys, kind):
    report, = evaluate(capsys, kind, *ALL, "--batch-size", 3)
    model = transformers.AutoModel.from_pretrained(kind).eval()
    processor = transformers.AutoProcessor.from_pretrained(kind)
    # One text at a time: no padding for CLIP, padding to all 12 positions for SigLIP.
    fill = dict(padding="max_length", return_attention_mask=False) if kind == "siglip" else {}

    def of_text(text):
        return F.normalize(model.get_text_features(**processor.tokenizer(
            text, max_length=12, truncation=True, return_tensors="pt", **fill)
            ).pooler_output[0].detach().double(), dim=-1)

    def of_image(file):
        pixels = processor.image_processor(Image.open(file), return_tensors="pt")
        output = model.get_image_features(**pixels).pooler_output[0].detach()
        return F.normalize(output.double(), dim=-1)

    files = sorted(inputs.glob("images/**/*.png"), key=lambda file: file.relative_to(inputs).parts)
    images = torch.stack([of_image(file) for file in files])
    overlaps, hits = [], []
    for item in json.loads(Path("triplets.json").read_text()):
        a, b = ([files[i].name for i in (images @ of_text(item[field])).argsort(descending=True)]
                for field in ("caption", "caption2"))
        overlaps += [len({*a[:d]} & {*b[:d]}) / d for d in range(1, 6)]
        if item["filename"] != "lost.png":
            hits.append(not {*b[:5]}.isdisjoint(item.get("images", [item["filename"]])))
    assert report["ao"] == pytest.approx(np.mean(overlaps))
    assert report["paraphrase_recall"]["t2i@5"] == pytest.approx(np.mean(hits))
    classes = [F.normalize(of_text(name) + of_text(f"the {name}"), dim=-1)
               for name in ("big cat", "dog")]
    nearest = [int((torch.stack(classes) @ of_image(file)).argmax())
               for file in sorted(inputs.glob("classes/*/*.png"))]
    assert report["zeroshot"]["top1"] == np.mean(np.array(nearest) == [0, 0, 1, 1])


def test_siglip_reads_lower_case(inputs):
    model = ev.HuggingFaceCLIP(str(inputs / "siglip"), "fp32").eval()
    texts = []
    tokenizer = model.tokenizer
    model.tokenizer = lambda batch, **options: texts.extend(batch) or tokenizer(batch, **options)
    with torch.no_grad():
        model.encode_text(["A Dog"])
    assert texts == ["a dog"]


@pytest.fixture(scope="module")
def exported(inputs) -> dict:
    """What clip finds, as vectors and as ranked lists."""
    model = ev.open_model(str(inputs / "clip"), ev.EvalConfig(device="cpu"))
    names = sorted(str(path.relative_to(inputs / "images"))
                   for path in inputs.glob("images/**/*.png"))
    texts = sorted({item[field] for item in json.loads((inputs / "triplets.json").read_text())
                    for field in ("caption", "caption2")})
    with torch.no_grad():
        images = torch.cat([ev.encode(model.encode_image, ev.default_collate([model.preprocess(
            Image.open(inputs / "images" / name).convert("RGB"))])) for name in names])
        vectors = ev.encode(model.encode_text, texts)
    arrays = dict(names=np.array(names), images=images.numpy(), texts=np.array(texts),
                  text_features=vectors.numpy())
    np.savez(inputs / "vectors.npz", **arrays)
    shutil.copytree(inputs / "images", inputs / "readable",
                    ignore=shutil.ignore_patterns("broken.jpg"))
    return arrays


READABLE = "--pairs triplets.json --images readable --workers 0".split()


def without_features(report: dict) -> dict:
    """A report of pairs as ranked lists can give it."""
    for key in ("recall", "recall_ci", "paraphrase_recall", "paraphrase_recall_ci"):
        report[key] = {at: value for at, value in report[key].items() if at.startswith("t2i")}
    return {key: value for key, value in report.items() if key not in ("model", "diff")}


def test_vectors_give_their_models_numbers(exported, cd, capsys):
    clip, vectors = evaluate(capsys, "clip", "vectors.npz", *READABLE)
    assert vectors["diff"]["ao_ci"] == [0, 0]
    assert without_features(vectors) == without_features(clip)


def test_details_give_their_models_numbers(exported, cd, capsys, tmp_path):
    clip, = evaluate(capsys, "clip", *READABLE, "--details", tmp_path / "d.jsonl")
    clip_again, lists = evaluate(capsys, "clip", tmp_path / "d.jsonl", *READABLE)
    assert lists["diff"]["ao_ci"] == [0, 0]
    assert without_features(lists) == without_features(clip)


def test_details_hold_each_pairs_scores(cd, capsys, tmp_path):
    report, _ = evaluate(capsys, "clip", "siglip", *PAIRS, "--details", tmp_path / "d.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert [line["model"] for line in lines] == ["clip"] * 15 + ["siglip"] * 15
    assert np.mean([line["ao"] for line in lines[:15]]) == pytest.approx(report["ao"])
    assert lines[1]["images"] == ["sub/01.png", "02.png", "sub/03.png"]


def test_lists_leave_out_other_tasks(exported, cd, capsys, tmp_path):
    evaluate(capsys, "clip", *READABLE, "--details", tmp_path / "d.jsonl")
    report, = evaluate(capsys, tmp_path / "d.jsonl", *READABLE, "--sts", "sts.csv")
    assert "sts" not in report and report["pairs"] == 15
    call(ev, tmp_path / "d.jsonl", *READABLE, "--sts", "sts.csv")
    assert "have no features: sts" in capsys.readouterr().err


@pytest.mark.parametrize("change, complaint", [
    (lambda lists: lists.popitem(), "no list for 1 of"),
    (lambda lists: lists.update({t: names[:9] for t, names in lists.items()}), "has 9 images"),
    (lambda lists: lists[min(lists)].__setitem__(0, "nowhere.png"), "'nowhere.png', which is not"),
    (lambda lists: lists[min(lists)].__setitem__(0, lists[min(lists)][1]), "names an image twice"),
], ids=["text without list", "too short", "unknown image", "image twice"])
def test_lists_that_do_not_fit(exported, cd, capsys, tmp_path, change, complaint):
    names = exported["names"].tolist()
    lists = {text: list(names) for text in exported["texts"].tolist()}
    change(lists)
    (tmp_path / "x.jsonl").write_text("\n".join(
        json.dumps({"text": text, "ranking": ranking}) for text, ranking in lists.items()))
    assert complaint in error_line(capsys, ev, tmp_path / "x.jsonl", *READABLE)


def test_shorter_lists_give_less_recall(exported, cd, capsys, tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join(
        json.dumps({"text": text, "ranking": exported["names"][:5].tolist()})
        for text in exported["texts"].tolist()))
    report, = evaluate(capsys, tmp_path / "x.jsonl", *READABLE, "--k", 5)
    assert report["recall"].keys() == {"t2i@1", "t2i@5"}


@pytest.mark.parametrize("change, complaint", [
    (dict(names=None), "names is missing"), (dict(texts=np.array(["a"])), "they are {"),
    (dict(images=np.ones((14, 3), np.float32)), "'images': (14, 3)"),
    (dict(names=np.array([b"a"])), "names is"),
    (dict(texts=np.array([str(i) for i in range(30)])), "no vectors for 30 of 30 texts")])
def test_vectors_that_do_not_fit(exported, cd, capsys, tmp_path, change, complaint):
    arrays = {name: value for name, value in {**exported, **change}.items() if value is not None}
    np.savez(tmp_path / "x.npz", **arrays)
    assert complaint in error_line(capsys, ev, tmp_path / "x.npz", *READABLE)


def test_a_class_of_the_users(cd, capsys):
    report, = evaluate(capsys, "mine.py:Good", *ALL)
    assert report["gallery"] == 14 and report["sts"]["n"] == 12


@pytest.mark.parametrize("name, complaint", [
    ("NoText", "the model has no encode_text()"),
    ("OtherWidth", "encode_text of 3 texts [3, 1]; expected [2, E] and [3, E]"),
    ("OneForAll", "encode_text of 3 texts [1, 3]"), ("AnySize", "the same shape for every image"),
    ("NaN", "finite numbers"), ("number", "no function or class 'number'"),
    ("Absent", "no function or class 'Absent'")])
def test_a_class_that_does_not_fit(cd, capsys, name, complaint):
    assert complaint in error_line(capsys, ev, f"mine.py:{name}", *PAIRS)


@pytest.mark.parametrize("damage_model, complaint", [
    ("weights", "weights are missing"), ("tokenizer", "tokenizer"), ("nan", "finite numbers"),
    ("remote", "x: neither a checkpoint"), ("text model", "x: neither a checkpoint")])
def test_hugging_face_models_are_refused(inputs, lm, cd, capsys, monkeypatch, tmp_path,
                                         damage_model, complaint):
    folder = shutil.copytree(lm if damage_model == "text model" else "clip", tmp_path / "x")
    if damage_model in ("weights", "nan"):
        model = transformers.CLIPModel.from_pretrained("clip")
        weights = {key: value for key, value in model.state_dict().items()
                   if damage_model == "nan" or "vision" not in key}
        weights["text_projection.weight"].fill_(math.nan)
        model.save_pretrained(folder, state_dict=weights)
    if damage_model == "tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    if damage_model == "remote":
        monkeypatch.setattr("builtins.input", lambda *question: "y")
        code = {"AutoConfig": "code.C", "AutoModel": "code.M"}
        (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": code}))
        (folder / "code.py").write_text("open('ran', 'w')")
    assert complaint in error_line(capsys, ev, folder, "--sts", "sts.csv")
    assert not Path("ran").exists()


def test_several_pair_files_are_reported(cd, capsys, tmp_path):
    items = json.loads(Path("triplets.json").read_text())
    # Two pairs stand in both files: the whole counts them once.
    (tmp_path / "a.json").write_text(json.dumps(items[:8]))
    (tmp_path / "b.json").write_text(json.dumps(items[6:]))
    report, = evaluate(capsys, "clip", "--pairs", tmp_path / "a.json", tmp_path / "b.json",
                       *PAIRS[2:])
    assert report["pairs"] == 15
    assert {file: part["pairs"] for file, part in report["files"].items()} == {
        "a.json": 8, "b.json": 9}


def test_pairs_of_one_image_resample_together(cd, capsys, tmp_path):
    items = json.loads(Path("triplets.json").read_text())
    copies = [item | {"group": i} for i, item in enumerate(items)] * 4
    (tmp_path / "copies.json").write_text(json.dumps(copies))
    (tmp_path / "once.json").write_text(json.dumps(copies[:15]))
    once, = evaluate(capsys, "clip", "--pairs", tmp_path / "once.json", *PAIRS[2:])
    four, = evaluate(capsys, "clip", "--pairs", tmp_path / "copies.json", *PAIRS[2:])
    assert four["ao_ci"] == pytest.approx(once["ao_ci"], abs=1e-12)


def make_benchmark(inputs, folder: Path) -> Path:
    """A benchmark of two kinds of pairs; "a" stands first, "Z" first in the alphabet."""
    split = folder / "val"
    names = [f"{i:02}" for i in range(8)]
    write_tar(split / "0.tar", [(f"{name}.jpg", image_bytes(i)) for i, name in enumerate(names)])
    (split / "pairs.jsonl").write_text("\n".join(json.dumps(
        {"query": sentence(i), "paraphrase": sentence(i + 20), "image": name,
         "kind": "a" if i < 3 else "Z"}) for i, name in enumerate(names)))
    return folder


def test_benchmarks_headline_is_the_first_kind(inputs, cd, capsys, tmp_path):
    folder = make_benchmark(inputs, tmp_path / "bench")
    report, = evaluate(capsys, "clip", "--benchmark", folder, "--split", "val", "--workers", 0)
    assert (report["headline"], report["pairs"], report["split"]) == ("a", 3, "val")
    assert report["ao"] == report["kinds"]["a"]["ao"] and report["kinds"]["Z"]["pairs"] == 5
    assert "zeroshot" not in report and "captions" not in report


def test_benchmark_may_have_classes_and_captions(inputs, cd, capsys, tmp_path):
    split = make_benchmark(inputs, tmp_path / "bench") / "val"
    (split / "zeroshot.json").write_text(json.dumps({"classnames": ["dog", "cat"],
                                                     "labels": {"00": 1, "03": 0, "lost": 1}}))
    (split / "captions.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "02"}],
        "annotations": [{"image_id": 1, "caption": "a dog"}]}))
    report, = evaluate(capsys, "clip", "--benchmark", split.parent, "--split", "val",
                       "--workers", 0)
    assert report["zeroshot"]["images"] == 2 and report["recall"]["t2i@1"] == 1
    assert "query_recall" in report


def test_what_is_left_out_is_said(cd, capsys):
    call(ev, "clip", *PAIRS)
    errors = capsys.readouterr().err
    assert "1 of 15 named images are not there, such as lost.png" in errors
    assert "skipped 1 of 15 images: broken.jpg: " in errors


def test_models_on_other_images_are_uncompared(cd, capsys, monkeypatch):
    embed, calls = ev.embed_images, []

    def without_the_first(model, gallery, cfg):
        calls.append(model)
        return embed(model, dict(list(gallery.items())[len(calls) - 1:]), cfg)
    monkeypatch.setattr(ev, "embed_images", without_the_first)
    call(ev, "clip", "siglip", *PAIRS)
    output = capsys.readouterr()
    assert "siglip and clip can read different images" in output.err
    assert "diff" not in json.loads(output.out.splitlines()[-1])[1]


def table_of(capsys, *argv) -> list[str]:
    """The lines that a call prints, without the JSON."""
    capsys.readouterr()
    call(ev, *argv)
    return capsys.readouterr().out.splitlines()[:-1]


def test_tables_fit_100_columns(cd, capsys):
    lines = table_of(capsys, "clip", "siglip", "clip", "siglip", "clip", *ALL)
    assert max(len(line) for line in lines) <= 100
    assert sum(line.startswith("AO@5 minus unrelated") for line in lines) > 1


def test_few_observations_are_marked(cd, capsys):
    row, = [line for line in table_of(capsys, "clip", *PAIRS) if line.startswith("AO@10  ")]
    assert re.fullmatch(r"AO@10 +\d+\.\d ±\d+\.\d\*", row)


def test_markdown_has_equal_columns(cd, capsys):
    lines = table_of(capsys, "clip", "siglip", *ALL, "--markdown")
    rows = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in rows} == {5} and rows[1] == "|---|---:|---:|---:|"


@pytest.mark.parametrize("models, labels", [
    (["runs/x/a-0/model.pt", "runs/x/b-0"], ["a-0", "b-0"]),
    (["a/model-00020.pt", "b/model-00020.pt"], ["a/model-00020.pt", "b/model-00020.pt"]),
    (["openai/clip", "m.py:f"], ["clip", "m.py:f"]), (["a", "a"], ["a (1)", "a (2)"])])
def test_labels_are_short_and_different(models, labels):
    assert ev.model_labels(models, []) == labels


@pytest.mark.parametrize("flag, ending", [
    ("json", ".json"), ("details", ".jsonl"), ("figure", ".png"), ("summary", ".png")])
def test_outputs_onto_no_plain_file(cd, capsys, tmp_path, monkeypatch, flag, ending):
    monkeypatch.setattr(ev, "open_model", lambda name, cfg: pytest.fail("measured first"))
    os.mkfifo(tmp_path / f"pipe{ending}")
    message = error_line(capsys, ev, "clip", *PAIRS, f"--{flag}", tmp_path / f"pipe{ending}")
    assert "not a regular file" in message and (tmp_path / f"pipe{ending}").is_fifo()


def test_a_full_disk_costs_no_table(cd, capsys, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def full(path):
        raise OSError(28, "No space left on device", str(path))
        yield
    monkeypatch.setattr(data, "atomic_write", full)
    with pytest.raises(SystemExit):
        call(ev, "clip", *PAIRS, "--json", tmp_path / "x.json")
    output = capsys.readouterr()
    assert json.loads(output.out.splitlines()[-1])[0]["pairs"] == 15
    assert "No space left" in output.err


def test_files_hold_what_is_printed(cd, capsys, tmp_path):
    files = dict(json=tmp_path / "x.json", figure=tmp_path / "x.png", summary=tmp_path / "y.png")
    reports = evaluate(capsys, "clip", "siglip", *PAIRS, *flags(**files))
    assert json.loads(files["json"].read_text()) == reports
    assert Image.open(files["figure"]).width == Image.open(files["summary"]).width == 1280


@pytest.mark.parametrize("arguments, complaint", [
    ("", "run `python paraclip.py` first"), ("nowhere.pt --sts sts.csv", "nowhere.pt"),
    ("lists.jsonl --sts sts.csv", "lists.jsonl"), ("none.py:f --sts sts.csv", "no such file"),
    ("clip --captions captions.json --images classes", "none of the 10 named"),
    ("clip --pairs triplets.json", "--pairs needs --images"),
    ("clip --images images", "what to search for"),
    ("clip --sts equal.csv", "equal.csv: equal scores"),
    ("clip --sts sts.csv --k 0", "--k 0"), ("clip --sts sts.csv --k 5", "--k is"),
    ("clip --sts sts.csv --figure x.png", "--figure shows pairs"),
    ("clip --sts sts.csv --split val", "--benchmark and --split have no effect"),
    ("clip --sts sts.csv --benchmark x", "--benchmark and --split have no effect"),
    ("clip --benchmark nowhere", "there is no folder"),
    ("clip --sts sts.csv --templates templates.txt", "belong to --zeroshot"),
    ("clip --zeroshot classes --classnames sts.csv", "expected 2 class names"),
    ("clip --images images --query dog", "belong together"),
    ("clip --images images --query= --paraphrase=", "must not be empty"),
    ("clip --pairs triplets.json --images images --figure x.jpg", "ends in .png"),
    ("clip --pairs triplets.json --images images --json triplets.json", "another flag"),
    ("clip --pairs triplets.json --images images --json no/x", "its folder does not exist"),
    ("clip clip --sts sts.csv --labels one", "1 names for 2 models"),
    ("clip clip --sts sts.csv --labels a a", "a different name"),
    ("mine.py --sts sts.csv", "mine.py:NAME"),
    ("clip --sts sts.csv --device nothing", "--device nothing")])
def test_mistakes_end_in_one_line(cd, capsys, arguments, complaint):
    assert complaint in error_line(capsys, ev, *arguments.split())


def test_damaged_files_give_numbers_or_one_line(exported, inputs, tmp_path, monkeypatch, capsys):
    model = ev.open_model(str(inputs / "clip"), ev.EvalConfig(device="cpu"))
    monkeypatch.setattr(ev, "HuggingFaceCLIP", lambda name, precision: model)
    monkeypatch.setattr(ev, "bootstrap_ci", lambda values, *rest: (min(values), max(values)))
    root = shutil.copytree(inputs, tmp_path / "copy")
    monkeypatch.chdir(root)
    call(ev, "clip", *READABLE, "--details", "lists.jsonl")
    files = {name: Path(name).read_bytes() for name in (
        "triplets.json", "captions.json", "sts.csv", "templates.txt", "lists.jsonl", "vectors.npz")}
    os.mkfifo("pipe")
    Path("readable.png").mkdir()
    rng, ended = random.Random(FUZZ_SEED), Counter()
    for _ in range(2 * FUZZ_CASES):
        name = rng.choice(list(files))
        parts = re.findall(rb'"[^"]*"|\d+|,', files[name]) or [b"0"]
        junk = rng.choice([b"null", b"-1", b"[]", b"{}", b"NaN", b'"\\ud800"', b"[" * 9000, b'""'])
        Path(name).write_bytes(rng.choice([
            damage(files[name], rng), files[name].replace(rng.choice(parts), junk)]))
        target = rng.choice([*["out"] * 9, "pipe", "readable", "no/folder", "\udc80", ""])
        argv = ["clip", *ALL, rng.choice(["--json", "--details"]), target]
        if name in ("lists.jsonl", "vectors.npz"):
            argv = [name, *READABLE]
        try:
            call(ev, *argv)
            ended[0] += 1
        except SystemExit as stop:
            lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
            assert len(lines) == 1, (name, lines)
            ended[stop.code] += 1
        Path(name).write_bytes(files[name])
    assert set(ended) == {0, 2} and min(ended.values()) > 5
