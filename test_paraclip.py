"""Tests of paraclip: the method first, then each file from common/ to eval_paraphrase.py. CPU only,
no hub.

Each test compares with something independent: numbers worked by hand, a library's model with the
same weights, a slow twin, one process against several, an uninterrupted run against a killed one.
`pytest` also runs the tests in demo/ and experiments/. FUZZ_SEED and FUZZ_CASES set the damage that
the fuzz tests do.
"""

import atexit
import contextlib
import dataclasses
import functools
import gzip
import io
import json
import math
import multiprocessing
import os
import pickle
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
import time
from argparse import Namespace
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import pytest
import scipy.stats
import tokenizers
import torch
import torchvision
import transformers
from filelock import FileLock
from PIL import Image, ImageOps
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn import functional as F

import data
import eval_paraphrase as ev
import paraclip
from common import distributed, records, run_folder
from common.cli import UserError, check_ranges, flag, note, parse_config, run
from common.distributed import rank_and_world_size
from common.files import atomic_write, cache_folder
from common.tar import list_any, list_plain
from data import BadSample, Batch, Sample, ShardIndex, collate
from demo import edits
from paraclip import Config, Contrastive, ParaCLIP, ViT, contrastive_loss, load_model

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
    note.cache_clear()
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
    """The bytes with bits flipped, a byte changed, the end cut, or parts swapped or removed."""
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
    run(lambda: program.main([str(argument) for argument in argv]))


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


def build(lm: str, seed=0, **fields) -> ParaCLIP:
    """A tiny model with random weights."""
    torch.manual_seed(seed)
    return ParaCLIP(Config(**TINY | {"lm": lm} | fields))


def make_batch(model: ParaCLIP, n: int, accum: int = 1, start: int = 0, objective=None) -> Batch:
    """The batch of n random images, each with two sentences, as the loader gives it."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (64, 3, 16, 16), generator=generator, dtype=torch.uint8)
    samples = []
    for i in range(start, start + n):
        captions = [sentence(i), sentence(i + 50)]
        samples.append(Sample(images[i], captions[0], captions, epoch=0, number=i, fault=""))
    objective = objective or Contrastive(None, model, None, model.tokenize)
    return collate(samples, accum, model.tokenize, objective)


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
        run(lambda: function(*args))
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


def torchrun(world_size: int, restarts: int, function, *args):
    """Calls a function on every rank as the command torchrun does, but forks this process."""
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=world_size,
                          max_restarts=restarts, monitor_interval=0.1, start_method="fork",
                          rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="test")
    elastic_launch(config, function)(*args)


def on_ranks(world_size: int, folder: Path, function, *args, status: int = 0) -> list[str]:
    """Calls function(rank, world_size, *args) in a process a rank; returns what each printed."""
    children = []
    for rank in range(world_size):
        children.append(start_child(folder / f"rank{rank}.txt", function, rank, world_size,
                                    *args))
    return [finish_child(child, status) for child in children]


NARROW = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


def save_hugging_face_model(folder: Path, kind: str, lm: str, model="Model", processor=None,
                            text={}, vision={}, **options):
    """A CLIP, Siglip or the like of two narrow layers with the words of `lm`, and large weights.
    Returns the model."""
    def make(kind, part, *args, **options):
        return getattr(transformers, f"{kind}{part}")(*args, **options)

    # Without a maximum length, as some are.
    tokenizer = transformers.BertTokenizerFast(
        f"{lm}/vocab.txt", model_input_names=["input_ids", "attention_mask"])
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=12,
                eos_token_id=tokenizer.sep_token_id, **NARROW) | text
    vision = dict(image_size=32, patch_size=16, **NARROW) | vision
    side = {"height": 32, "width": 32}
    torch.manual_seed(len(kind))
    vision_key = "image_config" if kind == "Flava" else "vision_config"
    config = make(kind, "Config", text_config=text, **{vision_key: vision}, **options)
    model = make(kind, model, config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    processor = processor or kind
    pixels = make(processor, "ImageProcessor", size=side, crop_size=side)
    make(processor, "Processor", pixels, tokenizer).save_pretrained(folder)
    return model.eval()


# ---- the method ----------------------------------------------------------------------------------
# Read these first: towers, loss, gradients, optimizer, training. What stands below them goes file
# by file.
IMAGES = torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8)
SHORT, LONG = "a red dog", "a " * 60 + "cat on the left of a blue circle"


def randomize_blocks(model: torch.nn.Module):
    """Moves all weights of the blocks, which start as the identity."""
    for module in model.modules():
        if isinstance(module, paraclip.Block):
            for p in module.parameters():
                p.data += 0.1 * torch.randn_like(p)


@torch.no_grad()
def test_vit_equals_pytorchs_transformer():
    torch.manual_seed(0)
    vit = ViT(image_size=32, patch_size=8, stem="patch", width=48, depth=3, heads=4)
    randomize_blocks(vit)
    images = torch.rand(5, 3, 32, 32)
    patches = F.unfold((images - vit.mean) / vit.std, 8, stride=8).transpose(1, 2)
    x = patches @ vit.patch_embed.weight.flatten(1).T + vit.patch_embed.bias
    x = torch.cat([vit.cls_token.expand(5, -1, -1), x], dim=1) + vit.pos_embed
    for block in vit.blocks:
        layer = torch.nn.TransformerEncoderLayer(
            48, nhead=4, dim_feedforward=192, dropout=0.0, activation="gelu",
            layer_norm_eps=1e-6, batch_first=True, norm_first=True)
        # The order in which PyTorch's layer defines them: attention, perceptron, norms.
        modules = torch.nn.ModuleList([block.qkv, block.proj, block.fc1, block.fc2,
                                       block.norm1, block.norm2])
        for p, ours in zip(layer.parameters(), modules.parameters(), strict=True):
            p.copy_(ours)
        x = layer(x)
    difference = (vit(images) - F.layer_norm(x[:, 0], (48,), eps=1e-6)).abs().max().item()
    assert difference < 1e-5, "ViT is no longer a pre-norm transformer on patches: adapt this twin"


def steps_on_one_batch(model: ParaCLIP, steps: int, batch=None, **fields) -> list[float]:
    """Trains on one batch, by default of eight random pairs, and returns the losses."""
    optimizers = paraclip.make_optimizers(model, Config(**TINY | fields))
    objective = Contrastive(None, model, None, model.tokenize)
    losses = []
    for _ in range(steps):
        loss, _ = paraclip.forward_backward(model, objective, batch or make_batch(model, 8))
        paraclip.optimizer_step(model, optimizers, 1.0)
        losses.append(loss.item())
    return losses


def pretrained_state(lm: str) -> dict:
    return transformers.BertModel.from_pretrained(lm, add_pooling_layer=False).state_dict()


@pytest.mark.parametrize("text, changes", [
    ("frozen", False), ("align", False), ("finetune", True), ("scratch", True)])
def test_pretrained_weights_change_if_trained(lm, text, changes):
    model = build(lm, text=text)
    assert same(model.text_tower.lm.state_dict(), pretrained_state(lm)) == (text != "scratch")
    trained = paraclip.trained_weights(model)
    assert any(name.startswith("text_tower.lm.") for name in trained) == changes
    assert not model.train().text_tower.lm.training
    steps_on_one_batch(model, 3, text=text, lr=0.1, weight_decay=0.5)
    assert same(model.text_tower.lm.state_dict(), pretrained_state(lm)) != changes


@pytest.mark.parametrize("text", ["frozen", "align", "finetune"])
def test_muon_trains_the_matrices_inside_the_towers(lm, text):
    model = build(lm, text=text)
    adamw, muon = paraclip.make_optimizers(model, Config(**TINY | dict(text=text)))
    by_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    by_adamw = {id(p) for group in adamw.param_groups for p in group["params"]}
    names = {id(p): name for name, p in paraclip.trained_weights(model).items()}
    # Each weight has one optimizer.
    assert not by_muon & by_adamw and by_muon | by_adamw == set(names)
    expected = {name for name, p in paraclip.trained_weights(model).items()
                if p.ndim in (2, 4) and "embeddings" not in name and "_proj." not in name}
    # The text projection is all that learns on the text side of --text frozen.
    if text == "frozen":
        expected.add("text_proj.weight")
    assert {names[key] for key in by_muon} == expected


def test_optimizers_of_another_version_do_not_fit(lm):
    cfg = Config(**TINY | dict(text="frozen"))
    model = build(lm, text="frozen")
    optimizers = paraclip.make_optimizers(model, cfg)
    checkpoint = paraclip.checkpoint_state(cfg, model, optimizers)
    # As if AdamW had trained one of Muon's weights.
    adamw, muon = checkpoint["optimizers"]
    adamw["param_groups"].append(muon["param_groups"].pop())
    with pytest.raises(UserError, match="another version: its optimizer does not fit"):
        paraclip.restore(model, checkpoint, optimizers)


ENCODERS = ["albert", "bert", "deberta-v2", "distilbert", "modernbert", "mpnet", "roberta"]
DECODERS = ["clip_text_model", "gpt2", "llama", "opt", "qwen3"]
# Every size under each name that one of these families has for it.
SIZES = dict(
    hidden_size=32, n_embd=32, dim=32, embedding_size=32,
    # OPT's states may be narrower than its layers.
    word_embed_proj_dim=16,
    num_hidden_layers=2, n_layer=2, n_layers=2, num_attention_heads=2, n_head=2, n_heads=2,
    num_key_value_heads=2, head_dim=16, intermediate_size=48, hidden_dim=48, ffn_dim=48,
    max_position_embeddings=128, bos_token_id=0, pad_token_id=1, eos_token_id=2)


def write_lm(folder: Path, kind: str, **config) -> str:
    """A tiny language model with random weights, and a tokenizer of whole words. A decoder's
    tokenizer has no padding token, and puts no end token after a caption."""
    words = ["<s>", "<pad>", "<|endoftext|>", "<unk>", "feline", *WORDS, *"0123456789"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    template, options = "<s> $A <|endoftext|>", {"pad_token": "<pad>"}
    if kind in DECODERS:
        template, options = "<s> $A", {}
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("<|endoftext|>", 2)])
    # Some tokenizers give no mask unless they are asked for it.
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|endoftext|>",
        unk_token="<unk>", model_input_names=["input_ids"], **options).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = SIZES | dict(vocab_size=len(words)) | config
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **sizes))
    # Random weights of the usual size hardly look at other tokens.
    for p in model.parameters():
        if p.ndim > 1:
            p.data *= 5
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session", params=ENCODERS + DECODERS)
def any_lm(request, tmp_path_factory) -> str:
    return write_lm(tmp_path_factory.mktemp("lm"), request.param)


def test_padding_leaks_into_no_language_model_and_it_trains(any_lm):
    model, trained = build(any_lm), build(any_lm, text="frozen")
    assert model.text_tower.lm_hash == trained.text_tower.lm_hash
    before, _, after = steps_on_one_batch(trained, 3, text="frozen", lr=1e-4)
    assert after < before
    randomize_blocks(model)
    with torch.no_grad():
        alone = model.encode_text([SHORT])[0]
        assert torch.allclose(model.encode_text([LONG, SHORT])[1], alone, atol=1e-5)
        to_bf16(model)
        assert torch.allclose(model.encode_text([LONG, SHORT])[1], alone, atol=0.02)


def test_contrastive_loss_worked_by_hand():
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # Scores x 2: [[2, 0], [1.2, 1.6]]; rows: log(1 + e^-2), log(1 + e^-0.4); columns:
    # log(1 + e^-0.8), log(1 + e^-1.6).
    expected = sum(math.log(1 + math.exp(-x)) for x in (2, 0.4, 0.8, 1.6)) / 4
    result = contrastive_loss(images, texts, torch.tensor(2.0))
    assert isinstance(result, tuple), "a loss function returns (loss, accuracy)"
    loss, accuracy = result
    assert loss.item() == pytest.approx(expected, rel=1e-6) and accuracy == 1


class SigLIP(Contrastive):
    """The loss of arXiv 2303.15343, with the bias fixed where it starts there."""

    def loss(self, image_features, text_features, logit_scale, targets):
        all_text_features = paraclip.all_gather_with_grad(text_features)
        logits = logit_scale * image_features @ all_text_features.T - 10
        rank, _ = rank_and_world_size()
        matches = torch.arange(len(logits)) + rank * len(logits)
        signs = 2 * F.one_hot(matches, logits.shape[1]) - 1
        loss = -F.logsigmoid(signs * logits).sum(1).mean()
        return loss, (logits.argmax(1) == matches).float().mean()


class NoTemperature(Contrastive):
    def loss(self, image_features, text_features, logit_scale, targets):
        return -(image_features * text_features).sum(1).mean(), torch.zeros(())


class Sentences(list):
    """An index of 64 samples with the captions of make_batch."""
    captions = list.__getitem__


SENTENCES = Sentences([sentence(i), sentence(i + 50)] for i in range(64))
CASES = [dict(text="align"), dict(text="finetune", accum=2), dict(objective=SigLIP, accum=2),
         dict(objective=NoTemperature), dict(objective=NoTemperature, accum=2)]


def gradients(lm, rank: int, world_size: int, objective=Contrastive, config=Config, **fields):
    """Loss and gradients of this rank's part of a batch of 16, with exact arithmetic or nearly."""
    cfg = config(**TINY | dict(lm=lm) | fields)
    model, parallel, _ = paraclip.build(cfg, torch.device("cpu"))
    randomize_blocks(model)
    objective = objective(cfg, model, SENTENCES, model.tokenize)
    start, size = rank * 16 // world_size, 16 // world_size
    batch = make_batch(model, size, cfg.accum, start, objective)
    loss, _ = paraclip.forward_backward(parallel, objective, batch)
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def write_gradients(rank: int, world_size: int, lm: str, folder: Path, cases: list[dict]):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                                         world_size=world_size)
    results = []
    for case in cases:
        loss, grads = gradients(lm, rank, world_size, **case)
        torch.distributed.all_reduce(loss)
        results.append((loss / world_size, grads))
    # The last rank's rows lie at an offset.
    if rank == world_size - 1:
        torch.save(results, folder / "gradients.pt")
    torch.distributed.destroy_process_group()


def check_gradients_on_ranks(world_size: int, lm: str, folder: Path, cases: list[dict]):
    """On several processes, with micro-batches: are they those of one process on the whole?"""
    on_ranks(world_size, folder, write_gradients, lm, folder, cases)
    results = torch.load(folder / "gradients.pt")
    for case, (loss, grads) in zip(cases, results, strict=True):
        expected_loss, expected = gradients(lm, 0, 1, **case | {"accum": 1})
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
        assert grads.keys() == expected.keys() and "logit_scale" in grads
        largest = max(g.norm() for g in expected.values())
        for name in grads:
            # A key's bias has no gradient in exact arithmetic.
            scale = max(expected[name].norm(), 1e-3 * largest)
            assert (grads[name] - expected[name]).norm() < 1e-5 * scale, (case, name)


def test_gradients_on_many_processes_equal_one(lm, tmp_path):
    check_gradients_on_ranks(4, lm, tmp_path, CASES)


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (12, 4)])
def test_muons_step_against_its_formula(shape):
    torch.manual_seed(0)
    p = torch.randn(shape, requires_grad=True)
    muon = paraclip.Muon([dict(params=[p], lr=0.1, weight_decay=0.5)], torch.float32)
    momentum = torch.zeros(len(p), 48 // len(p))
    for _ in range(2):
        before = p.detach().clone()
        p.grad = torch.randn_like(p)
        gradient = p.grad.flatten(1).clone()
        muon.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        nesterov = 0.9 * momentum + 0.1 * gradient
        step = 0.1 * 0.2 * 12 ** 0.5 * paraclip.orthogonalize(nesterov)
        expected = (1 - 0.1 * 0.5) * before - step.view_as(p)
        assert torch.allclose(p, expected, atol=1e-5)


@pytest.fixture(scope="session")
def memorized(lm, tmp_path_factory) -> Path:
    """A run folder beside its shards: 16 pairs, learnt by heart."""
    root = tmp_path_factory.mktemp("memorized")
    folder = write_shards(root / "shards", [16])
    return train(lm, folder, root / "run", steps=60, lr=7.5e-4, crop=1.0)


@torch.no_grad()
def test_pairs_are_learnt_by_heart(memorized):
    model, index = load_model(memorized), ShardIndex(str(memorized.parent / "shards"))
    images = [model.preprocess(decode(index.image(i))) for i in range(16)]
    captions = [index.captions(i)[0] for i in range(16)]
    scores = model.encode_image(images) @ model.encode_text(captions).T
    assert scores.argmax(0).tolist() == scores.argmax(1).tolist() == list(range(16))


def overlap_of_cat_and_feline(lm: str, text: str) -> float:
    """AO@10 of two queries, after training on images of four colours and their captions."""
    numbers = torch.arange(64) % 4
    captions = [["a dog", "a cat", "a square", "a circle"][number] for number in numbers]
    colours = torch.tensor([[255, 0, 0], [0, 0, 255], [0, 255, 0], [255, 255, 255]])
    noise = torch.randint(-60, 60, (64, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    images = (colours[numbers].view(64, 3, 1, 1) + noise).clamp(0, 255).byte()
    model = build(lm, text=text)
    batch = Batch([(images, [model.tokenize(captions)])], None, {})
    steps_on_one_batch(model, 30, batch, text=text, lr=7.5e-4)
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


def test_killed_run_resumes_to_same_bits(lm, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    # A checkpoint after every step, so that a signal may meet its writing.
    args = flags(**TINY | dict(data=write_list_shards(tmp_path / "s", 79), lm=lm, steps=14,
                               workers=2, accum=2, save_every=1))
    call(paraclip, *args, "--out", whole)
    args += ["--out", str(out)]
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)):
        began = time.time_ns()
        child = start_child(tmp_path / "output.txt", paraclip.main, args)
        model = out / "model.pt"
        wait_until(child, lambda: model.exists() and model.stat().st_mtime_ns > began)
        os.killpg(child.pid, number)  # its workers, too
        finish_child(child, status)
    assert read_weights(out)["step"] < 14
    call(paraclip, *args)
    assert same(read_weights(out)["model"], read_weights(whole)["model"])
    assert [row["loss"] for row in read_log(out)] == [row["loss"] for row in read_log(whole)]


# ---- common/ -------------------------------------------------------------------------------------
@dataclasses.dataclass
class Flags:
    data: str = flag("emoji", "shards")
    recipe: str = flag("", "preset", choices=("emoji", "cc12m"))
    lr: float = flag(0.5, "rate", low=0, high=100)
    steps: int = flag(7, "steps", low=0)


@pytest.mark.parametrize("line, expected", [
    ("", {}),
    ("--data cc12m --lr 2", dict(data="cc12m", steps=1000, lr=2.0)),
    ("--recipe cc12m", dict(recipe="cc12m", steps=1000, lr=1.0)),
    ("--recipe emoji --data cc12m", dict(recipe="emoji", data="cc12m"))])
def test_flags_win_over_recipe_and_defaults(line, expected):
    recipes = {"cc12m": dict(steps=1000, lr=1.0)}
    assert parse_config(Flags, line.split(), recipes) == Flags(**expected)


@pytest.mark.parametrize("name, value", [
    ("lr", -0.1), ("lr", 100.1), ("lr", math.nan), ("steps", -1), ("steps", math.inf),
    ("recipe", "x")])
def test_values_out_of_range_are_refused(name, value):
    check_ranges(Flags(lr=100, steps=0))
    with pytest.raises(UserError, match=f"--{name} {value}: expected"):
        check_ranges(Flags(**{name: value}))
    with pytest.raises(UserError, match="--lr 101.0: expected 0 to 100"):
        parse_config(Flags, ["--lr", "101"])
    with pytest.raises(UserError, match="--crop 2: expected 0 to 1"):
        Config(crop=2)
    with pytest.raises(UserError, match="--text : expected scratch, finetune, frozen, align"):
        Config(text="")


def test_a_terminal_without_unicode_gets_an_escape(monkeypatch):
    latin = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stdout", latin)
    run(lambda: print("\u2581a"))
    assert latin.buffer.getvalue() == b"\\u2581a\n"


@pytest.mark.parametrize("error, status, line", [
    (UserError("no such\n thing"), 2, "no such thing"),
    (OSError("disk full"), 2, "disk full"),
    (MemoryError(), 2, "out of memory"),
    (RuntimeError("can't allocate memory"), 2, "can't allocate memory"),
    (RuntimeError("DataLoader worker (pid 7)"), 2, "DataLoader worker (pid 7)"),
    (RuntimeError("Original Traceback\nRuntimeError: unable to allocate shared memory(shm)"), 2,
     "/dev/shm is too small for loader workers: in Docker give --ipc=host; --workers 0 needs none"),
    (KeyboardInterrupt(), 130, "interrupted")])
def test_users_causes_end_in_one_line(capsys, error, status, line):
    def program():
        raise error

    with pytest.raises(SystemExit) as stop:
        run(program)
    assert (stop.value.code, capsys.readouterr().err) == (status, f"error: {line}\n")


@pytest.mark.parametrize("program", [
    ["data.py"], ["paraclip.py"], ["eval_paraphrase.py"], ["-m", "demo.edits"],
    ["-m", "experiments.geometry"]])
def test_missing_packages_are_said_in_one_line(program):
    # -S: without the folder that packages are installed in.
    command = [sys.executable, "-S", *program]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == ("error: the package torch is missing: activate the virtual environment, "
                           "or run pip install -r requirements.txt\n")


@pytest.mark.parametrize("program", ["data.py", "paraclip.py", "eval_paraphrase.py"])
def test_ctrl_c_during_imports_prints_no_traceback(tmp_path, program):
    (tmp_path / "torch.py").write_text("print('importing', flush=True)\nwhile True: pass")
    process = subprocess.Popen(
        [sys.executable, HERE / program], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (output, process.returncode) == ("", -signal.SIGINT)


def test_a_closed_stdout_is_no_error(monkeypatch):
    # What Python sets where stdout is closed.
    monkeypatch.setattr(sys, "stdout", None)
    run(lambda: print("report"))


def test_atomic_write_goes_through_a_link(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    with atomic_write(link) as file:
        file.write(b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_atomic_write_refuses_what_is_no_file(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(UserError, match="x cannot be written: it is not a regular file"):
        with atomic_write(tmp_path / "x"):
            pass
    assert not (tmp_path / "x").is_file()


def test_a_full_disk_keeps_the_former_file(tmp_path, monkeypatch):
    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    (tmp_path / "x.json").write_bytes(b"former")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left on device.*x.json"):
        with atomic_write(tmp_path / "x.json") as file:
            file.write(b"new")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"former"]


# ---- data.py: shards and their index -------------------------------------------------------------
JPEG = image_bytes(7)
GOOD = [(sentence(i), image_bytes(i)) for i in range(12)]


def index_of(folder: Path, members: dict[str, bytes]) -> ShardIndex:
    """The index of a shard with these members."""
    return ShardIndex(str(write_tar(folder / "0.tar", list(members.items()))))


def samples_of(index: ShardIndex) -> list[tuple[str, bytes]]:
    """Caption and image of each sample."""
    return [(index.captions(i)[0], index.image(i)) for i in range(len(index))]


def test_find_shards_understands_every_spelling(tmp_path):
    folder = write_shards(tmp_path, [1, 1, 1])
    shards = [f"{tmp_path}/0000{i}.tar" for i in range(3)]
    for name in (folder, f"{folder}/*.tar", f"{folder}/**/*.tar", f"{folder}/{{00000..00002}}.tar"):
        assert data.find_shards(name) == shards
    joined = f"{folder}/00002.tar::{folder}/{{00000..00001}}.tar"
    assert data.find_shards(joined) == [shards[2], shards[0], shards[1]]
    # A shard that is named twice would be its own negative.
    assert data.find_shards(f"{folder}::{folder}/../{tmp_path.name}/00001.tar") == shards
    (tmp_path / "latest.tar").symlink_to(shards[2])
    assert data.find_shards(folder) == shards


def test_a_link_that_moves_within_a_range_makes_another_index(tmp_path):
    real = write_tar(tmp_path / "real.tar", sample(0))
    link = tmp_path / "0.tar"
    link.symlink_to(real)
    both = f"{tmp_path}/{{0..1}}.tar"
    assert samples_of(ShardIndex(both)) == GOOD[:1]
    link.rename(tmp_path / "1.tar")
    assert samples_of(ShardIndex(both)) == GOOD[:1]


def test_a_name_like_a_compressed_files_beginning(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("BZh1.jpg", JPEG), ("BZh1.txt", b"c")])
    assert len(ShardIndex(str(path))) == 1


def test_compressed_shards_beside_others_are_told(tmp_path, capfd):
    folder = write_shards(tmp_path, [1])
    (tmp_path / "00001.tar.gz").touch()
    assert data.find_shards(folder) == [f"{tmp_path}/00000.tar"]
    assert f"only .tar files are read, not {tmp_path}/00001.tar.gz" in capfd.readouterr().err


@pytest.mark.parametrize("name, value", [
    ("MAX_BYTES", {"jpg": 9999, "txt": 99}), ("MAX_CAPTION", 1)])
def test_other_limits_make_another_index(tmp_path, monkeypatch, name, value):
    path = write_shards(tmp_path, [1])
    first = ShardIndex(path).table
    monkeypatch.setattr(data, name, value)
    assert ShardIndex(path).table != first


@pytest.mark.parametrize("members", [
    {"k.JPG": JPEG, "k.txt": b"c"},
    {"k.txt": b"\xef\xbb\xbf c\n", "k.png": JPEG},
    {"k.webp": JPEG, "k.cls": b"3", "k.json": b'{"caption": "c"}'},
    {"x/k.v2.jpg": JPEG, "x/k.v2.txt": b"c"},
    {"k.jpg": JPEG, "k.txt": b"\n", "k.json": b'{"caption": "c"}'},
    {"k.jpg": JPEG, "k.txt": b"['c', 'd']", "k.json": b'{"caption": ["c", "d"]}'},
    {"k.gif": JPEG, "k.metadata.json": b"{}", "k.txt": b"c"},
    {"k.jpg": JPEG, "k.seg.png": JPEG, "k.txt": b"c"},
    {"k.seg.png": JPEG, "k.jpg": JPEG, "k.txt": b"c"},
    {"k.jpg": JPEG, "k.txt": b"c", "._k.jpg": b"x", "._k.txt": b"x"},
    {"k.jpg": JPEG, "other.cls": b"", "k.txt": b"c"}],
    ids=["capital letters", "caption first", "json", "dots and folders", "empty text",
         "list", "member between", "another image", "another image first", "macOS", "apart"])
def test_image_and_caption_share_a_key(tmp_path, members):
    index = index_of(tmp_path, members)
    assert samples_of(index) == [("c", JPEG)] and index.skipped == {}


A, B, C = [image_bytes(i) for i in range(3)]


@pytest.mark.parametrize("members, samples, skipped", [
    # The first 2.jpg has lost its caption.
    ([("1.jpg", A), ("1.txt", b"A"), ("2.jpg", B), ("1.jpg", B), ("1.txt", b"B"), ("2.jpg", C),
      ("2.txt", b"C")], [("A", A), ("B", B), ("C", C)], {"no caption": 1}),
    ([("1.jpg", A), ("2.jpg", B), ("1.txt", b"A"), ("2.txt", b"B")], [("A", A), ("B", B)], {}),
    ([("1.jpg", A), ("2.jpg", B), ("1.txt", b"A"), ("3.txt", b"C"), ("1.jpg", C), ("3.jpg", C),
      ("1.txt", b"C"), ("2.txt", b"B")], [("B", B), ("C", C)], {"no caption": 2, "no image": 2}),
    ([("1.jpg", A), ("1.jpg", B), ("1.txt", b"B"), ("2.jpg", C), ("2.txt", b"C")], [("C", C)],
     {"duplicate key": 1}),
    ([("v.1.jpg", A), ("v.1.json", b'{"caption": "A"}'), ("v.2.jpg", B), ("v.2.json", b"{}"),
      ("v.1.png", C), ("v.1.txt", b"C")], [("A", A), ("C", C)], {"no caption in .json": 1})],
    ids=["joined", "apart", "apart and joined", "neighbours", "dots"])
def test_no_image_takes_anothers_caption(tmp_path, members, samples, skipped):
    index = ShardIndex(str(write_tar(tmp_path / "0.tar", members)))
    assert samples_of(index) == samples and index.skipped == skipped


def test_a_shard_that_changes_is_not_read_at_old_places(tmp_path):
    index = index_of(tmp_path, {"1.jpg": A, "1.txt": b"a"})
    other = write_tar(tmp_path / "other", [("1.txt", b"longer text"), ("1.jpg", A)])
    # This changes its ctime.
    os.chmod(index.shards[0], 0o400)
    assert index.captions(0) == ["a"]
    # A file system's clock may advance by some milliseconds at a time only.
    time.sleep(0.05)
    os.replace(other, index.shards[0])
    for read in (index.captions, index.image):
        with pytest.raises(BadSample, match="shard changed since it was indexed"):
            read(0)
    os.unlink(index.shards[0])
    with pytest.raises(BadSample, match="unreadable shard"):
        index.image(0)


def test_captions_come_from_any_field(tmp_path):
    record = b'{"caption": ["a", "b"], "recaption": "c", "key": "1"}'
    path = index_of(tmp_path, {"1.jpg": A, "1.txt": b"text", "1.json": record}).shards[0]
    assert ShardIndex(path).captions(0) == ["text"]
    cfg = parse_config(Config, ["--data", path, "--caption-key", "recaption", "caption"])
    assert paraclip.open_index(cfg).captions(0) == ["c", "a", "b"]
    with pytest.raises(UserError, match="a field TEXT; fields seen: caption, key, recaption"):
        ShardIndex(path, caption_keys=["caption", "TEXT"])


@pytest.mark.parametrize("name, content, captions", [
    ("k.json", b'{"caption": ["x", " ", "", null, 3, "two  words"]}', ["x", "two words"]),
    ("k.json", b'{"caption": "half an emoji \\ud83d"}', ["half an emoji ?"]),
    ("k.json", b'{"caption": ["%s", "y"]}' % (b"x" * 20_000), ["x" * 10_000, "y"]),
    ("k.txt", b"caf\xe9", ["caf\ufffd"]),
    ("k.txt", "caf\u00e9".encode("utf-16"), ["caf\u00e9"])],
    ids=["several", "surrogate", "long", "no UTF-8", "UTF-16"])
def test_captions_are_cleaned_and_cut(tmp_path, name, content, captions):
    assert index_of(tmp_path, {"k.jpg": JPEG, name: content}).captions(0) == captions


@pytest.mark.parametrize("members, reason", [
    ({"a.jpg": JPEG}, "no caption"),
    ({"a.jpg": JPEG, "a.json": b" " * (2 << 20)}, "empty or too large member, or a link"),
    ({"a.jpg": b"", "a.txt": b"a"}, "empty or too large member, or a link"),
    ({"a.txt": b"a", "a.json": b"{}"}, "no image"),
    ({"a.jpg": JPEG, "a.txt": b" \n\t "}, "empty caption"),
    ({"a.jpg": JPEG, "a.json": b'{"caption": ["", " "]}'}, "empty caption"),
    ({"a.jpg": JPEG, "a.json": b'{"text": "a"}'}, "no caption in .json"),
    ({"a.jpg": JPEG, "a.json": b'["caption"]'}, "broken .json"),
    ({"a.jpg": JPEG, "a.json": b"[" * 99_999}, "broken .json"),
    # So img2dataset writes a missing caption, and an empty list of them.
    ({"a.jpg": JPEG, "a.txt": b"", "a.json": b'{"caption": null}'}, "empty caption"),
    ({"a.jpg": JPEG, "a.txt": b"[]", "a.json": b'{"caption": []}'}, "empty caption"),
    ({"a.jpg": JPEG, "a.txt": b"['a', 'b']"}, "a list in Python's notation"),
    ({"a.jpg": JPEG, "a.json": b'{"caption": "[\'a\', \'b\']"}'}, "a list in Python's notation")])
def test_a_bad_sample_is_counted(tmp_path, members, reason):
    path = write_tar(tmp_path / "0.tar", sample(0) + [*members.items()] + sample(1))
    index = ShardIndex(str(path))
    assert index.skipped == {reason: 1} and index.examples == {reason: "a in 0.tar"}
    assert samples_of(index) == GOOD[:2]


NEGATIVE = tarfile.TarInfo("b.jpg")
NEGATIVE.size = -512


@pytest.mark.parametrize("kept_bytes, end, reason", [
    (0, b"", "broken or truncated shard"),
    (100, b"", "broken or truncated shard"),
    (600, b"", "broken or truncated shard"),
    (0, b"?" * 2048, "broken or truncated shard"),
    # It leads to the member itself: a reader may go round for ever.
    (0, NEGATIVE.tobuf(tarfile.GNU_FORMAT), "broken or truncated shard"),
    (0, bytes(1024) + b"more", "a second archive in the shard")],
    ids=["no end", "cut header", "cut image", "garbage", "negative size", "second archive"])
def test_a_broken_shard_gives_its_beginning(tmp_path, kept_bytes, end, reason):
    """The shard goes on for so many bytes after its first sample, and then with `end`."""
    path = write_tar(tmp_path / "1.tar", sample(0) + sample(1))
    whole = path.read_bytes()
    path.write_bytes(whole[:whole.index(b"00001.jpg") + kept_bytes] + end)
    write_tar(tmp_path / "2.tar", sample(9))
    index = ShardIndex(str(tmp_path))
    assert index.skipped == {reason: 1}
    assert samples_of(index) == [GOOD[0], GOOD[9]]


def with_checksum(header: bytes) -> bytes:
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_common_archives_are_read_without_tarfile(tmp_path, format):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for i, name in enumerate(["x", "x/1.jpg", "x/1.txt", "x/2.jpg"]):
            info = tarfile.TarInfo(name)
            info.type = tarfile.REGTYPE if i else tarfile.DIRTYPE
            info.mtime, info.size = 1e9 + i // 2 * 0.5, i and 511 + i
            # Ids above 2 million are in base 256.
            info.uid = 3_000_000 if format == tarfile.GNU_FORMAT else 1000
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    with tarfile.open(path) as tar, open(path, "rb") as file:
        expected = [(member.name, member.offset_data, member.size) for member in tar][1:]
        assert list_plain(file) == expected == list(list_any(file))


HEADER = tarfile.TarInfo("1.jpg")
HEADER.size = 600
HEADER = HEADER.tobuf(tarfile.USTAR_FORMAT)


def dated(entries: bytes) -> bytes:
    """An extended header with these entries, and the header of a file of 600 bytes."""
    info = tarfile.TarInfo("dates")
    info.type, info.size = b"x", len(entries)
    return info.tobuf(tarfile.USTAR_FORMAT) + entries + bytes(-len(entries) % 512) + HEADER


@pytest.mark.parametrize("header", [
    HEADER[:148] + b"000001" + HEADER[154:],
    with_checksum(HEADER[:156] + b"1" + HEADER[157:]),
    with_checksum(HEADER[:156] + b"5" + HEADER[157:]),
    with_checksum(HEADER[:345] + b"folder" + HEADER[351:]),
    with_checksum(HEADER[:124] + b"-" + HEADER[125:]),
    with_checksum(HEADER[:135] + b"0" + HEADER[136:]),
    with_checksum(HEADER[:337] + b"0 1" + HEADER[340:]),
    with_checksum(HEADER[:6] + b"g" + HEADER[7:]),
    dated(b"11 path=2.j\n"), dated(b"17 mtime=1\n"), dated(b"11 mtime=1\n" * 50), dated(b""),
    dated(b"11 mtime=1\n")[:1024] + with_checksum(HEADER[:156] + b"x" + HEADER[157:])],
    ids=["checksum", "link", "folder", "long name", "negative", "long size",
         "no number", "two names",
         "path", "length", "many dates", "no dates", "two dates"])
def test_unusual_headers_are_left_to_tarfile(tmp_path, header):
    path = tmp_path / "0.tar"
    path.write_bytes(header + bytes(1024 + 1024))
    with open(path, "rb") as file, pytest.raises(ValueError):
        list_plain(file)


def test_names_in_gnu_tars_backups_are_their_own(tmp_path):
    info = tarfile.TarInfo("1.jpg")
    header = info.tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "0.tar"
    path.write_bytes(with_checksum(header[:345] + b"14711223355\0" + header[357:]) + bytes(1024))
    with open(path, "rb") as file:
        assert list_plain(file) == [("1.jpg", 512, 0)]


def test_a_sparse_member_ends_no_shard(tmp_path):
    path = write_tar(tmp_path / "0.tar", sample(0))
    member = tarfile.TarInfo("sparse.jpg")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                          "GNU.sparse.realsize": "50000"}
    # A map of one piece: its offset and its bytes.
    content = b"1\n0\n5\n".ljust(512, b"\0") + b"hello".ljust(512, b"\0")
    member.size = len(content)
    path.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + content + path.read_bytes())
    assert samples_of(ShardIndex(str(path))) == GOOD[:1]


def test_an_absent_shard_is_counted(tmp_path):
    folder = write_shards(tmp_path, [2])
    os.mkdir(f"{folder}/00001.tar")
    Path(folder, "00003.tar").write_bytes(gzip.compress(b"x"))
    index = ShardIndex(f"{folder}/{{00000..00003}}.tar")
    assert len(index) == 2
    assert index.skipped == {"unreadable shard": 1, "missing shard": 1,
                             "compressed shard, to be unpacked first": 1}


def test_a_passing_fault_is_not_remembered(tmp_path, monkeypatch):
    def failing_open(path, *args, real_open=open, **kwargs):
        if str(path).endswith("00000.tar"):
            raise OSError(5, "Input/output error")
        return real_open(path, *args, **kwargs)

    folder = write_shards(tmp_path, [5, 3])
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", failing_open)
        index = ShardIndex(folder)
    assert len(index) == 3 and len(ShardIndex(folder, workers=2)) == 8
    # Who still uses the former index has its own table.
    assert index.captions(0) == [sentence(5)] and len(index) == 3


def test_the_ranks_of_a_run_build_one_index_whatever_is_unreadable(tmp_path, monkeypatch):
    folder = write_shards(tmp_path, [5])
    os.mkdir(f"{folder}/00001.tar")
    monkeypatch.setenv("RANK", "0")
    index = ShardIndex(folder)
    assert index.skipped == {"unreadable shard": 1}
    monkeypatch.setattr(data, "build_index", None)
    assert ShardIndex(folder).table == index.table
    # It may be one of an earlier run, whose torchrun had the same number.
    os.utime(index.table.parent, (0, 0))
    with pytest.raises(TypeError):
        ShardIndex(folder)


def test_an_interrupted_index_is_begun_anew(tmp_path, monkeypatch):
    def interrupt_after_one(results, *args, **kwargs):
        yield next(iter(results))
        raise KeyboardInterrupt

    folder = write_shards(tmp_path, [2, 3])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "tqdm", interrupt_after_one)
        ShardIndex(folder)
    assert len(ShardIndex(folder)) == 5


def test_an_index_is_sent_to_workers_without_its_table(tmp_path):
    index = ShardIndex(write_shards(tmp_path, [90]))
    assert len(pickle.dumps(index)) < 90 * data.ROW.itemsize


def test_the_fingerprint_is_that_of_content(tmp_path):
    dog = {"k.jpg": JPEG, "k.txt": b"a dog"}
    other_caption, other_table = dog | {"k.txt": b"a cat"}, dict(reversed(dog.items()))
    prints = []
    for number, members in enumerate([dog, dog, other_caption, other_table]):
        prints.append(index_of(tmp_path / str(number), members).fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_the_index_follows_a_replaced_shard(tmp_path):
    former = index_of(tmp_path, {"k.jpg": JPEG, "k.txt": b"dog"})
    assert samples_of(former) == [("dog", JPEG)]
    status = os.stat(former.shards[0])
    # Of the same size and time of modification.
    latter = index_of(tmp_path / "latter", {"k.jpg": JPEG, "k.txt": b"cat"}).shards[0]
    os.utime(latter, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(latter, former.shards[0])
    # The former index is kept, as another node may use it, until it is old.
    index = ShardIndex(former.shards[0])
    assert former.table.exists() and index.table.exists()
    os.utime(former.table.parent, (0, 0))
    os.chmod(former.shards[0], 0o600)
    ShardIndex(former.shards[0])
    assert not former.table.exists()
    assert samples_of(index) == [("cat", JPEG)] and index.fingerprint != former.fingerprint


def test_a_set_without_samples_is_refused(tmp_path):
    (tmp_path / "list.csv").write_text("url,caption")
    with pytest.raises(UserError, match="no .tar file at .*{'.csv': 1}"):
        ShardIndex(str(tmp_path))
    with pytest.raises(UserError, match=r"'no caption': 1.*'jpg': 1"):
        index_of(tmp_path, {"a.jpg": JPEG})


# ---- data.py: images -----------------------------------------------------------------------------
def decoded(content: bytes) -> np.ndarray:
    return data.decode_image(content).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind_and_mode", [
    "JPEG RGB", "JPEG L", "JPEG CMYK", "PNG RGBA", "PNG P", "PNG 1", "WEBP RGB", "GIF P",
    "AVIF RGB"])
def test_decoding_agrees_with_pillow(kind_and_mode):
    kind, mode = kind_and_mode.split()
    content = image_bytes(3, kind=kind, mode=mode)
    assert np.array_equal(decoded(content), decode(content).convert("RGB"))


# To be turned by 90 degrees clockwise.
EXIF = Image.Exif()
EXIF[0x0112] = 6
STORED = np.asarray(decode(image_bytes(1, (30, 10))))
CLEAR = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
GREY = Image.fromarray(np.full((4, 4), 32768, np.uint16))
# Nearly black; only black would be transparent.
DARK = Image.fromarray(np.full((4, 4), 200, np.uint16))
DARK.info["transparency"] = 0
# The orientation above, and the resolution as a text where a fraction is due.
BAD_EXIF = b"Exif\0\0II*\0" + struct.pack("<IHHHI4sHHI4sI", 8, 2, 274, 3, 1, b"\6\0\0\0",
                                            282, 2, 3, b"72\0\0", 0)


@pytest.mark.parametrize("content, expected", [
    (image_bytes(1, (30, 10), exif=EXIF), np.rot90(STORED, k=-1)),
    (image_bytes(1, (30, 10), exif=BAD_EXIF), np.rot90(STORED, k=-1)),
    (image_bytes(1, (30, 10), dpi=(72, 72), exif=b"Exif\0\0garbage"), STORED),
    (encode(CLEAR), np.full((4, 4, 3), 255, np.uint8)),
    (encode(GREY), np.full((4, 4, 3), 128, np.uint8)),
    (encode(DARK), np.zeros((4, 4, 3), np.uint8))],
    ids=["EXIF", "malformed EXIF", "no EXIF at all", "transparent", "16 bits",
         "16 bits with a transparent shade"])
def test_images_are_seen_as_viewers_show_them(content, expected):
    assert np.array_equal(decoded(content), expected)
    # A library's user hands Pillow's own image to `preprocess`.
    direct = data.center_crop(decode(content), 4)
    assert torch.equal(direct, data.center_crop(Image.fromarray(expected), 4))


def test_grey_of_16_bits_may_begin_with_its_high_byte():
    image = Image.frombytes("I;16B", (4, 4), np.full((4, 4), 32768, ">u2").tobytes())
    assert np.array_equal(data.to_rgb(image), np.full((4, 4, 3), 128))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_pillow_turns_them(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = image_bytes(1, (30, 10), "PNG", exif=exif)
    assert np.array_equal(decoded(content), ImageOps.exif_transpose(decode(content)))


def jpeg_of_size(side: int) -> bytes:
    """A JPEG whose header states another size."""
    place = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:place] + struct.pack(">HH", side, side) + JPEG[place + 4:]


@pytest.mark.parametrize("content, reason", [
    (JPEG[:-30], "broken image"),
    (b"<html>", "broken image"),
    # Pillow would read this one too, as it would EPS, by running Ghostscript.
    (encode(Image.new("RGB", (4, 4)), "TIFF"), "broken image"),
    (jpeg_of_size(30_000), "too many pixels"),
    (jpeg_of_size(9_000), "too many pixels")])
def test_bad_images_are_refused(content, reason):
    with pytest.raises(BadSample, match=reason):
        data.decode_image(content)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000)])
def test_a_long_side_is_cut_before_resizing(size, monkeypatch):
    def watched_resize(image, *args):
        assert max(image.size) <= 50
        return image.resize((16, 16))

    monkeypatch.setattr(data.TF, "resize", watched_resize)
    data.center_crop(Image.new("RGB", size), 16)


def test_random_crop_has_torchvisions_distribution(monkeypatch):
    def record(crop, *args, **kwargs):
        top, left = crop[0, :, 0, 0].tolist()
        ours.append((top, left, crop.shape[2], crop.shape[3]))
        return crop

    # Each pixel holds its row and its column.
    image = torch.from_numpy(np.indices((150, 200)))
    ours, theirs = [], []
    monkeypatch.setattr(torch.nn.functional, "interpolate", record)
    torch.manual_seed(0)
    transform = torchvision.transforms.v2.RandomResizedCrop(8, scale=(0.3, 1))
    for seed in range(4000):
        data.random_crop(image, 8, 0.3, random.Random(seed))
        box = transform.make_params([image])
        theirs.append([box[name] for name in ("top", "left", "height", "width")])
    # torchvision draws again where a box does not fit; here it is cut off.
    ours = [box for box in ours if box[2] < 150 and box[3] < 200]
    assert len(ours) > 2400
    for our_side, their_side in zip(np.array(ours).T, np.array(theirs).T):
        assert scipy.stats.ks_2samp(our_side, their_side).statistic < 0.04


def test_random_crop_shrinks_with_a_filter():
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(64).expand(3, 128, 128)
    crop = data.random_crop(stripes, 16, 0.5, random.Random(0))
    assert 100 < crop.min() <= crop.max() < 155


# ---- data.py: order and loader -------------------------------------------------------------------
def test_epochs_are_permutations_and_seeds_mix_other_samples(monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 1000)
    order = list(data.epoch_order(5003, 10, seed=0, epoch=0))
    assert sorted(order) == list(range(5003))
    for seed, epoch in [(1, 0), (0, 1)]:
        other = list(data.epoch_order(5003, 10, seed, epoch))
        assert len(set(order[:1000]) & set(other[:1000])) < 400


def test_blocks_and_windows_are_shuffled_independently():
    # One permutation applied twice would leave two samples in their place on average.
    orders = np.array([list(data.epoch_order(50, 1, seed, 1)) for seed in range(400)])
    stay = (orders == range(50)).sum(axis=1)
    assert 0.8 < stay.mean() < 1.2


def as_letters(captions: list[str]) -> dict:
    """A tokenizer whose tokens are all characters but hyphens."""
    rows = [torch.tensor([ord(letter) for letter in caption if letter != "-"])
            for caption in captions]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"ids": ids, "attention_mask": ids > 0}


class OneCaption:
    """The default objective."""
    def captions(self, samples):
        return [sample.caption for sample in samples]

    def targets(self, samples):
        return None


def training_loader(index, start=0, steps=8, rank=0, world_size=1, tokenize=as_letters,
                    objective=OneCaption(), **options):
    cfg = Namespace(batch_size=8, accum=1, seed=0, image_size=8, crop=1.0, flip=False,
                    augment=False, workers=0)
    vars(cfg).update(options)
    return data.training_loader(index, cfg, start, steps, rank, world_size, tokenize, objective)


def captions_of(token_batches: list[dict]) -> list[str]:
    return ["".join(map(chr, row[row > 0])) for tokens in token_batches for row in tokens["ids"]]


def images_of(batch: data.Batch) -> dict:
    """{caption: image}"""
    pairs = {}
    for images, token_batches in batch.micro_batches:
        pairs.update(zip(captions_of(token_batches), images, strict=True))
    return pairs


def load(index, world_size=1, start=0, steps=8, **options) -> list[dict]:
    """{caption: image} of each global batch."""
    batches = [{} for _ in range(start, steps)]
    for rank in range(world_size):
        loader = training_loader(index, start, steps, rank, world_size, **options)
        for batch, part in zip(batches, loader, strict=True):
            batch.update(images_of(part))
    return batches


def test_an_epoch_sees_each_sample_once_with_its_caption(tmp_path):
    index = ShardIndex(write_shards(tmp_path, [1, 30, 1]))
    seen = []
    for batch in load(index, steps=4):
        for caption, image in batch.items():
            number = int(caption.split()[-1])
            original = data.decode_image(image_bytes(number)).float().mean((1, 2))
            torch.testing.assert_close(image.float().mean((1, 2)), original, atol=45, rtol=0)
            seen.append(number)
    assert sorted(seen) == list(range(32))


@pytest.mark.parametrize("options", [
    dict(workers=3, accum=2),
    dict(world_size=2, accum=4),
    dict(world_size=4, workers=1),
    dict(start=5)], ids=["workers", "ranks", "both", "resumed"])
def test_batches_are_those_of_one_process(tmp_path, monkeypatch, options):
    monkeypatch.setattr(data, "MIN_GROUP", 1)
    # Fewer shards than readers, and the second epoch begins after step 4.
    index = ShardIndex(write_shards(tmp_path, [1, 30, 3]))
    alone = load(index)[options.get("start", 0):]
    for batch, expected in zip(load(index, **options), alone, strict=True):
        assert same(batch, expected)


def make_sample(number: int, *captions: str) -> data.Sample:
    """Its image holds its number."""
    image = torch.full((1,), number)
    return data.Sample(image, captions[0], list(captions), epoch=0, number=number, fault="")


def test_captions_of_as_many_tokens_are_grouped(monkeypatch):
    monkeypatch.setattr(data, "MIN_GROUP", 2)
    # The longer in letters, the fewer tokens.
    captions = [length * "x" + (12 - 2 * length) * "-" for length in range(5)[1:]]
    samples = [make_sample(0, caption) for caption in 16 * captions]
    batch = data.collate(samples, 1, as_letters, OneCaption())
    (_, token_batches), = batch.micro_batches
    assert [tokens["ids"].shape[1] for tokens in token_batches] == [1, 2, 3, 4]


def test_an_objective_sees_the_order_of_the_images():
    class AllCaptions:
        def captions(self, samples):
            return [caption for sample in samples for caption in sample.captions]

        def targets(self, samples):
            return torch.tensor([sample.number for sample in samples])

    samples = [make_sample(0, "long", "l"), make_sample(1, "s", "short"),
               make_sample(2, "longest", "2"), make_sample(3, "me", "3")]
    batch = data.collate(samples, 2, as_letters, AllCaptions())
    images, captions = [], []
    for some_images, token_batches in batch.micro_batches:
        images += some_images.flatten().tolist()
        captions += captions_of(token_batches)
    assert images == batch.targets.tolist() == [1, 3, 0, 2]
    assert captions == ["s", "short", "me", "3", "long", "l", "longest", "2"]


@pytest.fixture
def three_captions(tmp_path) -> ShardIndex:
    """40 samples of three captions each."""
    members = {}
    for i in range(40):
        members |= {f"{i}.jpg": image_bytes(i), f"{i}.json": b'{"caption": ["a", "b", "c"]}'}
    return index_of(tmp_path, members)


def test_a_caption_is_drawn_anew_each_epoch(three_captions):
    samples = data.TrainingSet(three_captions, 8, 0.5, flip=False, seed=0)
    first, second, again = [[samples[epoch, i].caption for i in range(40)] for epoch in (0, 1, 0)]
    assert first == again != second
    assert min(Counter(first).values()) > 5


def test_flip_mirrors_half_of_the_images_and_changes_nothing_else(three_captions):
    plain, flipping = [data.TrainingSet(three_captions, 8, 0.5, flip, 0) for flip in (0, 1)]
    mirrored = 0
    for i in range(40):
        assert plain[0, i].caption == flipping[0, i].caption
        image, other = plain[0, i].image, flipping[0, i].image
        if not torch.equal(image, other):
            # Columns in reverse, by numpy.
            assert np.array_equal(image.numpy()[:, :, ::-1], other.numpy())
            mirrored += 1
    assert 10 <= mirrored <= 30


def test_augment_changes_the_image_and_nothing_else(three_captions):
    plain, changing = [data.TrainingSet(three_captions, 8, 0.5, False, 0, augment)
                       for augment in (False, True)]
    for i in range(40):
        assert plain[0, i].caption == changing[0, i].caption
        image = changing[0, i].image
        assert torch.equal(image, changing[0, i].image)
        assert not torch.equal(image, plain[0, i].image) and image.dtype == torch.uint8
    # The flag reaches the loader's images.
    first, second = [next(iter(training_loader(three_captions, augment=augment)))
                     for augment in (False, True)]
    assert not torch.equal(first.micro_batches[0][0], second.micro_batches[0][0])


def test_half_of_the_images_are_blotted_out_by_a_grey_rectangle():
    rng, blotted = random.Random(0), 0
    for _ in range(200):
        # Red, so that the mean of one channel is not that of all.
        image = torch.randint(200, (3, 20, 20), dtype=torch.uint8)
        image[0] += 50
        other = data.blot_out(image, rng)
        rows, columns = np.nonzero((image != other).any(0).numpy())
        if len(rows):
            part = other[:, rows.min():rows.max() + 1, columns.min():columns.max() + 1]
            assert (part == int(image.float().mean())).all()
            assert all(4 <= side <= 10 for side in part.shape[1:])
            blotted += 1
    assert 70 <= blotted <= 130


def test_brightness_contrast_and_saturation_change_by_a_third_at_most():
    # Two colours in equal parts: brightness moves their mean, contrast their distance from it.
    image = torch.tensor([100, 120], dtype=torch.uint8).repeat(3, 4, 2)
    coloured = torch.tensor([100, 120, 140], dtype=torch.uint8)[:, None, None].repeat(1, 4, 4)
    rng, means, distances, spreads = random.Random(0), [], [], []
    for _ in range(100):
        changed = data.change_colours(image, rng).float()
        means.append(changed.mean() / 110)
        distances.append((changed[..., 1] - changed[..., 0]).mean() / 20)
        changed = data.change_colours(coloured, rng).float()
        spreads.append((changed[2] - changed[0]).mean() / 40)
    # Pixels are rounded.
    assert 0.67 < min(means) < 0.76 and 1.24 < max(means) < 1.32
    # Two factors act on a distance of greys, brightness and contrast: 0.49 .. 1.69 together. A
    # third one, saturation, acts on a distance of colours: 0.34 .. 2.2.
    assert 0.45 < min(distances) < 0.65 and 1.4 < max(distances) < 1.75
    assert 0.3 < min(spreads) < 0.5 and 1.75 < max(spreads) < 2.25


def test_bad_images_are_replaced_and_counted(tmp_path):
    folder = write_shards(tmp_path, [9])
    write_tar(tmp_path / "1.tar", broken_sample(10) + broken_sample(11))
    index = ShardIndex(folder)
    options = dict(steps=1, batch_size=11, crop=0.5)
    batch, = training_loader(index, **options)
    # Pinning would count twice what stands in a Counter.
    assert type(batch.replaced) is dict and batch.replaced == {"broken image": 2}
    assert images_of(batch).keys() == {sentence(i) for i in range(9)}
    # The same replacements every time.
    assert same(images_of(batch), load(index, workers=1, **options)[0])
    replacement = data.TrainingSet(index, 8, 0.5, False, seed=0)[0, 10]
    assert replacement.fault == "broken image"
    assert replacement.captions == index.captions(replacement.number)


def test_the_inspection_reports_a_set(tmp_path, monkeypatch, capsys):
    path = write_tar(tmp_path / "0.tar", sample(0) + broken_sample(1) + [("b\udce9.jpg", JPEG)])
    with tarfile.open(path) as tar:
        byte = tar.getmember("00001.jpg").offset_data
    call(data, tmp_path, "--workers", 0)
    *lines, report = capsys.readouterr().out.splitlines()
    assert lines.pop(1).startswith(f"index: 0.0 MB in {cache_folder()}/")
    assert lines == [
        "1 samples in 1 shards; 2 were decoded",
        "captions a sample: 1.0; images: 20 x 18 (median), 20 x 18 (smallest), 100.0% JPEG",
        # A name that is no UTF-8.
        "left out: 1 x no caption, such as b\\udce9 in 0.tar",
        f"left out: 1 x broken image, such as byte {byte} of {path}"]
    report = json.loads(report)
    assert report.pop("images_per_s") > 0
    assert report == {"shards": 1, "samples": 1, "decoded": 2, "keys": {"jpg": 3, "txt": 2},
                      "skipped": {"no caption": 1, "broken image": 1}}
    monkeypatch.setattr(data, "MOST_DECODED", 1)
    assert last_json(capsys, data, tmp_path, "--workers", 0)["decoded"] == 1


def read_all(shards: str):
    for batch in training_loader(ShardIndex(shards), workers=2):
        pass


def test_an_error_in_workers_ends_at_once(tmp_path):
    members = []
    for i in range(8):
        members += broken_sample(i)
    path = write_tar(tmp_path / "0.tar", members)
    # Workers that are left to themselves take 600 seconds, and finish_child waits for 60.
    child = start_child(tmp_path / "output", read_all, str(path))
    output = finish_child(child, status=2)
    # On one core torch warns of two workers.
    assert output.splitlines()[-1] == \
        "error: 100 samples in a row cannot be read, the first: broken image"
    assert "Traceback" not in output


def test_workers_outlive_signals_for_minutes(tmp_path):
    def signal_own_process(captions):
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        seconds_left, _ = signal.getitimer(signal.ITIMER_REAL)
        return as_letters(captions) | {"seconds_left": torch.tensor(seconds_left)}

    index = ShardIndex(write_shards(tmp_path, [8]))
    loader = training_loader(index, tokenize=signal_own_process, steps=1, workers=1)
    batch, = loader
    [(_, token_batches)] = batch.micro_batches
    assert token_batches[0]["seconds_left"] > 500


FUZZ = pytest.mark.parametrize("seed", range(FUZZ_SEED, FUZZ_SEED + FUZZ_CASES))


@FUZZ
def test_plain_headers_are_read_as_tarfile_reads_them(tmp_path, seed):
    rng, path = random.Random(seed), tmp_path / "0.tar"
    formats = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
    content, blocks = b"", []
    for i in range(rng.randrange(1, 6)):
        info = tarfile.TarInfo(f"{i}.jpg")
        info.size, info.mtime = rng.randrange(1500), rng.choice([1e9, 1e9 + 0.5])
        header = info.tobuf(rng.choice(formats))
        blocks += range(len(content), len(content) + len(header), 512)
        content += header + bytes(-(-info.size // 512) * 512)
    content += bytes(1024)
    for _ in range(rng.randrange(3)):
        # A field of a header, or all of it, filled with what might stand there.
        start, field = rng.choice(blocks), rng.choice([(0, 99), (124, 12), (156, 1), (257, 8),
                                                       (345, 9), (0, 40), (148, 8)])
        junk = rng.choices(b"00017 x\0\0-_5DSgLK=\n\xff", k=rng.randint(1, field[1]))
        at = start + field[0] + rng.randrange(field[1] - len(junk) + 1)
        header = (content[:at] + bytes(junk) + content[at + len(junk):])[start:start + 512]
        if rng.random() < 0.8:
            header = with_checksum(header)
        content = content[:start] + header + content[start + 512:]
    if rng.random() < 0.2:
        content = damage(content, rng)
    path.write_bytes(content)
    with open(path, "rb") as file, contextlib.suppress(ValueError):
        # What is unusual raises a ValueError.
        plain = list_plain(file)
        try:
            # tarfile takes the date in GNU tar's backups for a folder.
            for ours, slow in zip(plain, list_any(file), strict=True):
                assert ours[1:] == slow[1:] and slow[0].endswith(ours[0])
        except ValueError:
            raise AssertionError("tarfile refuses it")


@FUZZ
def test_damaged_shards_are_survived(tmp_path, seed):
    captions, images = dict(GOOD), [image for _, image in GOOD]
    rng = random.Random(seed)
    path = Path(write_shards(tmp_path, [4, 4, 4])) / f"0000{rng.randrange(3)}.tar"
    path.write_bytes(damage(path.read_bytes(), rng))
    samples = samples_of(ShardIndex(str(tmp_path)))
    assert len(samples) >= 8
    for caption, image in samples:
        # If neither is damaged itself they belong together.
        if caption in captions and image in images:
            assert captions[caption] == image
        with contextlib.suppress(BadSample):
            data.decode_image(image)


# ---- demo/ ---------------------------------------------------------------------------------------
# Ten captions, each with the edits that were made of it by hand.
EDITS_BY_HAND = """
A brown dog lies to the left of two white bowls .
= letter case: A BROWN DOG LIES TO THE LEFT OF TWO WHITE BOWLS .
= final period: A brown dog lies to the left of two white bowls
= article: The brown dog lies to the left of two white bowls .
= typing error: A borwn dog lies to the left of two white bowls .
! colour: A black dog lies to the left of two white bowls .
! number: A brown dog lies to the left of four white bowls .
! noun: A brown cat lies to the left of two white bowls .
! side: A brown dog lies to the right of two white bowls .
! negation: No brown dog lies to the left of two white bowls .
A bench with a red cushion, above it two red lamps
= letter case: A BENCH WITH A RED CUSHION, ABOVE IT TWO RED LAMPS
= final period: A bench with a red cushion, above it two red lamps.
= article: The bench with a red cushion, above it two red lamps
= a photo of: a photo of a bench with a red cushion, above it two red lamps
= typing error: A bench with a red cuhsion, above it two red lamps
! colour: A bench with a blue cushion, above it two blue lamps
! number: A bench with a red cushion, above it four red lamps
! side: A bench with a red cushion, below it two red lamps
! negation: No bench with a red cushion, above it two red lamps
A WOMAN IN AN ORANGE COAT
= letter case: a woman in an orange coat
= final period: A WOMAN IN AN ORANGE COAT.
= article: THE WOMAN IN AN ORANGE COAT
= a photo of: A PHOTO OF A WOMAN IN AN ORANGE COAT
= typing error: A WOMAN IN AN ORNAGE COAT
! person: A MAN IN AN ORANGE COAT
! negation: NO WOMAN IN AN ORANGE COAT
Two men are riding horses that are on the beach
= letter case: TWO MEN ARE RIDING HORSES THAT ARE ON THE BEACH
= final period: Two men are riding horses that are on the beach.
= typing error: Two men are riidng horses that are on the beach
! number: Four men are riding horses that are on the beach
! noun: Two men are riding cows that are on the beach
! person: Two women are riding horses that are on the beach
! negation: Two men are not riding horses that are on the beach
Man with a hot dog and a cat's toy
= letter case: MAN WITH A HOT DOG AND A CAT'S TOY
= final period: Man with a hot dog and a cat's toy.
= article: Man with the hot dog and a cat's toy
! noun: Man with a sandwich and a cat's toy
! person: Woman with a hot dog and a cat's toy
The man who is here holds his surfboard.
= letter case: THE MAN WHO IS HERE HOLDS HIS SURFBOARD.
= final period: The man who is here holds his surfboard
= typing error: The man who is here holds his surbfoard.
! noun: The man who is here holds his skateboard.
! negation: No man who is here holds his surfboard.
A black and white photo of buses
= letter case: A BLACK AND WHITE PHOTO OF BUSES
= final period: A black and white photo of buses.
= article: The black and white photo of buses
= typing error: A balck and white photo of buses
! noun: A black and white photo of trains
! negation: No black and white photo of buses
There is no boy on the swing.
= letter case: THERE IS NO BOY ON THE SWING.
= final period: There is no boy on the swing
= typing error: Tehre is no boy on the swing.
! person: There is no girl on the swing.
A couple of boys and girls on a two-way street!
= letter case: A COUPLE OF BOYS AND GIRLS ON A TWO-WAY STREET!
= article: A couple of boys and girls on the two-way street!
= typing error: A copule of boys and girls on a two-way street!
Grüne buffalo
= letter case: GRÜNE BUFFALO
= final period: Grüne buffalo.
= typing error: Grüne bufaflo
"""


def pairs_by_hand() -> list[dict]:
    pairs, caption = [], ""
    for line in EDITS_BY_HAND.strip().splitlines():
        if line[:2] not in ("= ", "! "):
            caption = line
            continue
        kind, text = line[2:].split(": ")
        pairs.append({"query": caption, "paraphrase": text, "kind": kind})
        if line[0] == "!":
            pairs[-1]["same"] = False
    return pairs


def edit_pairs(path, text, capsys) -> list[dict]:
    path.write_text(text)
    edits.main([str(path)])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_edits_of_ten_captions_are_those_made_by_hand(tmp_path, capsys):
    by_hand = pairs_by_hand()
    captions = list(dict.fromkeys(pair["query"] for pair in by_hand))
    text = "\n".join(captions)
    assert len(captions) == 10
    assert edit_pairs(tmp_path / "lines.txt", text, capsys) == by_hand
    # A caption's pairs depend on nothing else in the file.
    backwards = edit_pairs(tmp_path / "lines.txt", "\n\n".join(captions[::-1] * 2), capsys)
    assert sorted(map(str, backwards)) == sorted(map(str, by_hand))


@pytest.mark.parametrize("text", [
    '{"images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],\n'
    ' "annotations": [{"image_id": 8, "caption": " Ash\\n"}, {"image_id": 7, "caption": "Elm"},'
    ' {"image_id": 8, "caption": "Ash"}]}',
    '{"caption": "Ash", "image": "b.jpg"}\n{"captions": ["Elm"], "file_name": "a.jpg"}\n'])
def test_edits_name_the_image_of_their_caption(tmp_path, capsys, text):
    pairs = edit_pairs(tmp_path / "captions.json", text, capsys)
    assert [(pair["query"], pair["paraphrase"], pair["image"]) for pair in pairs] == [
        ("Ash", "ASH", "b.jpg"), ("Ash", "Ash.", "b.jpg"),
        ("Elm", "ELM", "a.jpg"), ("Elm", "Elm.", "a.jpg")]


def test_files_without_captions_make_no_pairs(tmp_path):
    (tmp_path / "captions.json").write_text(". .\n")
    with pytest.raises(UserError, match="captions.json.*is no caption in it"):
        edits.main([str(tmp_path / "captions.json")])


# ---- paraclip.py: towers -------------------------------------------------------------------------
def test_positions_against_a_plain_loop():
    vit = ViT(image_size=24, patch_size=8, stem="patch", width=8, depth=0, heads=1)
    expected = [[0.0] * 8]  # the class token
    for row in range(3):
        for column in range(3):
            position = []
            for place in (column, row):
                # A width of 8 has two frequencies.
                position += [math.sin(place), math.sin(0.01 * place)]
                position += [math.cos(place), math.cos(0.01 * place)]
            expected.append(position)
    assert torch.allclose(vit.pos_embed, torch.tensor([expected]), atol=1e-6)


def test_linear_weights_start_as_lecun_says():
    torch.manual_seed(0)
    layer = paraclip.LeCunLinear(256, 2048)
    assert layer.weight.std().item() == pytest.approx(1 / 16, rel=0.01)
    assert not layer.bias.any()


@pytest.mark.parametrize("images", [
    pytest.param(IMAGES.float(), id="up to 255"),
    pytest.param(IMAGES / 255 - 0.5, id="normalised"),
    pytest.param(IMAGES[:, :, :8], id="not square")])
def test_unfit_images_are_refused(lm, images):
    with pytest.raises(ValueError, match="images"):
        build(lm).encode_image(images)


@pytest.mark.parametrize("text", ["a dog", ["a dog", 1], [1], [], None])
def test_unfit_texts_are_refused(lm, text):
    with pytest.raises(ValueError, match="text: expected a list"):
        build(lm).encode_text(text)


def test_float_images_give_uint8_features(lm):
    model = build(lm)
    randomize_blocks(model)
    assert torch.equal(model.encode_image(IMAGES / 255), model.encode_image(IMAGES))


@torch.no_grad()
def test_lists_of_any_length_are_encoded_in_order(lm, monkeypatch):
    monkeypatch.setattr(paraclip, "ENCODE_BATCH", 2)
    model = build(lm)
    randomize_blocks(model)
    captions = [LONG, "a cat", SHORT, "a red circle on the left", "a dog"]
    one_by_one = torch.cat([model.encode_text([caption]) for caption in captions])
    assert torch.allclose(model.encode_text(captions), one_by_one, atol=1e-6)
    images = list(torch.randint(0, 255, (5, 3, 16, 16), dtype=torch.uint8))
    one_by_one = torch.cat([model.encode_image(image[None]) for image in images])
    assert torch.allclose(model.encode_image(images), one_by_one, atol=1e-6)


def copy_lm(lm: str, folder: Path, name: str, value) -> str:
    """A copy of a language model with another value in its config.json."""
    shutil.copytree(lm, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    return str(folder)


@pytest.mark.parametrize("text", ["scratch", "finetune"])
def test_weights_are_fp32_whatever_the_config(lm, tmp_path, text):
    model = build(copy_lm(lm, tmp_path / "lm", "dtype", "float16"), text=text)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_half_a_surrogate_is_encoded(lm):
    assert build(lm).encode_text(["a dog \ud83d"]).isfinite().all()


@torch.no_grad()
def test_towers_export_with_any_batch_size(lm):
    """For a server that takes one query at a time, and a job that takes thousands of images."""
    model = build(lm, depth=1)
    randomize_blocks(model)
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("T", min=2, max=77)
    images, tokens = torch.rand(2, 3, 16, 16), model.tokenize([SHORT, LONG])
    image_tower = torch.export.export(
        model.image_tower, (images,), dynamic_shapes={"images": {0: batch}}).module()
    text_tower = torch.export.export(model.text_tower, (tokens,), dynamic_shapes={
        "tokens": {name: {0: batch, 1: length} for name in tokens}}).module()
    for size in (1, 5):
        images, tokens = torch.rand(size, 3, 16, 16), model.tokenize([SHORT] * size)
        assert torch.allclose(image_tower(images), model.image_tower(images), atol=1e-5)
        assert torch.allclose(text_tower(tokens), model.text_tower(tokens), atol=1e-5)


# ---- paraclip.py: language models ----------------------------------------------------------------
def to_bf16(model: ParaCLIP):
    """What paraclip.build makes of a frozen language model on a GPU."""
    model.bf16 = True
    model.text_tower.lm.bfloat16()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "clip_text_model"])
def test_decoders_look_at_earlier_words_only(tmp_path, kind):
    model = build(write_lm(tmp_path, kind))
    # The first two tokens are the start token and "a".
    dog = model.text_tower.lm_states(model.tokenize(["a dog"]))[0, :2]
    cat = model.text_tower.lm_states(model.tokenize(["a cat"]))[0, :2]
    assert torch.allclose(dog, cat, atol=1e-6)


def test_a_tokenizer_pads_with_any_token_and_gives_nothing_more(lm):
    tower = build(lm).text_tower
    tokenizer = tower.tokenizer
    tokenizer.pad_token = tokenizer.eos_token = None
    paraclip.prepare_tokenizer(tokenizer, tower.lm)
    assert tokenizer.pad_token == tokenizer.unk_token

    class WithShapes(type(tokenizer)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs) | {"input_shape_ids": [0]}

    tokenizer.__class__ = WithShapes
    with pytest.raises(ValueError, match="also gives input_shape_ids, which"):
        paraclip.prepare_tokenizer(tokenizer, tower.lm)


def test_language_model_without_tokenizer_is_refused(lm, tmp_path):
    transformers.BertModel.from_pretrained(lm).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is its tokenizer there"):
        build(str(tmp_path))


@pytest.mark.parametrize("kind, positions, length", [
    ("bert", 128, 77), ("bert", 20, 20)])
def test_cut_captions_keep_the_end_token(tmp_path, kind, positions, length):
    model = build(write_lm(tmp_path, kind, max_position_embeddings=positions))
    ids = model.tokenize(["a " * 100])["input_ids"]
    assert ids.shape == (1, length)
    assert ids[0, -1] == model.text_tower.tokenizer("a")["input_ids"][-1]


@pytest.mark.parametrize("with_weights", [True, False])
def test_hash_follows_what_changes_features(lm, with_weights):
    tower = build(lm).text_tower

    def hash_now():
        return paraclip.hash_lm(tower.lm, tower.tokenizer, with_weights)

    hashes = {hash_now()}
    tower.lm.config.hidden_act = "relu"
    hashes.add(hash_now())
    tower.tokenizer.add_tokens("feline")
    hashes.add(hash_now())
    tower.lm.embeddings.word_embeddings.weight.data[3, 0] += 1e-3
    hashes.add(hash_now())
    assert len(hashes) == 3 + with_weights


@pytest.mark.parametrize("text", ["frozen", "finetune"])
def test_swapped_words_of_a_tokenizer_change_the_hash(lm, tmp_path, text):
    file = shutil.copytree(lm, tmp_path / "lm") / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    words["dog"], words["cat"] = words["cat"], words["dog"]
    file.write_text(json.dumps(tokenizer))
    assert build(str(file.parent), text=text).text_tower.lm_hash != build(
        lm, text=text).text_tower.lm_hash


def test_a_model_loads_with_a_moved_language_model(memorized, lm, tmp_path):
    """Of the checkpoint it needs neither the optimizer nor the log."""
    checkpoint = read_weights(memorized)
    checkpoint = {key: checkpoint[key] for key in ("model", "config", "lm")}
    checkpoint["config"]["lm"] = "gone"
    torch.save(checkpoint, tmp_path / "small.pt")
    with pytest.raises(UserError, match="language model 'gone' .* there is no such folder"):
        load_model(tmp_path / "small.pt")
    model = load_model(tmp_path / "small.pt", lm=lm)
    assert torch.equal(model.encode_text([SHORT]), load_model(memorized).encode_text([SHORT]))


TINY_TEXT = SIZES | dict(vocab_size=48)
TINY_VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                   num_attention_heads=2, image_size=32, patch_size=16)
PARTS = {
    # Several modalities: a language model of its own, whose width the outer configuration lacks.
    "llava": dict(text_config=TINY_TEXT | {"model_type": "llama"},
                  vision_config=TINY_VISION | {"model_type": "clip_vision_model"}),
    # An encoder and a decoder.
    "t5": dict(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2),
    # Two towers.
    "clip": dict(text_config=TINY_TEXT, vision_config=TINY_VISION, projection_dim=24),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", PARTS)
def test_the_text_part_alone_has_the_whole_models_states(tmp_path, kind):
    model = build(write_lm(tmp_path, kind, **PARTS[kind]), text="frozen")
    tokens = model.tokenize([SHORT])
    whole = transformers.AutoModel.from_pretrained(tmp_path)
    if kind == "clip":
        states = whole(**tokens, pixel_values=torch.zeros(1, 3, 32, 32)).text_model_output[0]
    elif kind == "llava":
        states = whole(**tokens).last_hidden_state
    else:
        output = whole(**tokens, decoder_input_ids=tokens["input_ids"])
        states = output.encoder_last_hidden_state
    assert torch.allclose(model.text_tower.lm_states(tokens), states, atol=1e-6)
    assert model.text_tower.width == states.shape[-1] == 32
    # Nothing else is kept.
    count = sum(p.numel() for p in model.text_tower.lm.parameters())
    assert count < sum(p.numel() for p in whole.parameters())


def test_only_the_text_parts_weights_must_be_there(tmp_path):
    """Of T5, many publish the encoder alone."""
    lm = write_lm(tmp_path, "t5", **PARTS["t5"])
    whole = transformers.AutoModel.from_pretrained(lm)
    transformers.T5EncoderModel.from_pretrained(lm).save_pretrained(lm)
    weights = build(lm).text_tower.lm.state_dict()
    assert same(weights, whole.encoder.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(UserError, match="lack encoder.block.2"):
        build(lm)


class Leaking(torch.nn.Module):
    """Token states with a fault that shows beside some captions only."""

    def __init__(self, shows):
        super().__init__()
        self.embeddings, self.shows = torch.nn.Embedding(99, 8), shows
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask):
        states = self.embeddings(input_ids).cumsum(dim=1)
        if self.shows(*input_ids.shape):
            states = states + 0.01 * states.roll(1, dims=0)
        return Namespace(last_hidden_state=states)


@pytest.mark.parametrize("shows", [
    pytest.param(lambda B, T: B == 2 and T == 4, id="of one length"),
    pytest.param(lambda B, T: B == 2 and 4 < T < 20, id="a little longer"),
    pytest.param(lambda B, T: B == 2 and T > 20, id="full length")])
def test_states_that_depend_on_neighbours_are_refused(lm, shows):
    tokenizer = build(lm).text_tower.tokenizer
    with pytest.raises(ValueError, match="beside it"):
        paraclip.check_lm(Leaking(shows), tokenizer, tolerance=1e-3)
    paraclip.check_lm(Leaking(lambda B, T: False), tokenizer, tolerance=1e-3)


def test_a_model_that_fails_in_bf16_alone_is_refused(tmp_path, monkeypatch):
    # Its positions are fp32, and so are their sums with bf16 states.
    sizes = dict(d_model=32, num_layers=2, attention_heads=2, ffn_dim=48)
    cfg = Config(**TINY | dict(lm=write_lm(tmp_path, "xglm", **sizes), precision="bf16"))
    # Only on a GPU are a frozen model's weights cast.
    monkeypatch.setattr(distributed, "ON_GPU", True)
    with pytest.raises(UserError, match="in bf16: .*--precision fp32"):
        paraclip.build(cfg, torch.device("cpu"))


def test_weights_without_gradient_are_frozen_and_counted(tmp_path):
    # Longformer has projections for global attention, which captions do not use.
    lm = write_lm(tmp_path, "longformer", attention_window=4)
    tower = build(lm, text="finetune").text_tower
    frozen = [name for name, p in tower.lm.named_parameters() if not p.requires_grad]
    assert frozen and all("_global." in name for name in frozen)
    count = len(list(tower.lm.parameters()))
    assert f"; {count - len(frozen)} of its {count} tensors are trained" in tower.describe()


def test_weights_that_only_some_captions_use_cannot_be_trained(tmp_path):
    sizes = dict(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
                 num_sparse_encoder_layers=2, num_experts=8)
    lm = write_lm(tmp_path, "switch_transformers", **sizes)
    build(lm, text="frozen")
    with pytest.raises(UserError, match="depends on the caption"):
        build(lm, text="finetune")


def write_pooling(folder: str, config: dict, *further: str):
    """What sentence-transformers saves beside a language model."""
    kinds = ["Transformer", "Pooling", *further]
    modules = [{"path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
               for i, kind in enumerate(kinds)]
    (Path(folder) / "1_Pooling").mkdir(exist_ok=True)
    (Path(folder) / "1_Pooling/config.json").write_text(json.dumps(config))
    (Path(folder) / "modules.json").write_text(json.dumps(modules))


@torch.no_grad()
@pytest.mark.parametrize("config, text, pool, pick", [
    (None, "align", "mean", lambda states: states.mean(dim=0)),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True},
     "frozen", "first", lambda states: states[0]),
    ({"pooling_mode": "lasttoken", "include_prompt": True}, "frozen", "last",
     lambda states: states[-1]),
    ({"pooling_mode": "max"}, "align", "max", lambda states: states.amax(dim=0))])
def test_the_models_own_pooling_is_read_and_leaves_out_padding(lm, tmp_path, config, text, pool,
                                                               pick):
    folder = shutil.copytree(lm, tmp_path / "lm")
    if config:
        write_pooling(folder, config, "Normalize")
    cfg = Config(**TINY | dict(lm=str(folder), pool="model", text=text))
    assert cfg.pool == pool
    model = ParaCLIP(cfg)
    states = model.text_tower.lm(**model.tokenize([SHORT])).last_hidden_state[0]
    states = model.text_tower.norm(states)  # alignment layers start as the identity
    expected = F.normalize(model.text_proj(pick(states)), dim=-1)
    assert torch.allclose(model.encode_text([LONG, SHORT])[1], expected, atol=1e-6)


@pytest.mark.parametrize("config, further, cause", [
    ({"pooling_mode_weightedmean_tokens": True}, [], "weightedmean"),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, [], "cls[+]mean"),
    ({"pooling_mode": "mean"}, ["Dense", "Normalize"], "the layers .'Dense'.")])
def test_a_pooling_that_is_not_ours_is_refused(lm, tmp_path, config, further, cause):
    folder = shutil.copytree(lm, tmp_path / "lm")
    write_pooling(folder, config, *further)
    with pytest.raises(UserError, match=cause):
        Config(**TINY | dict(lm=str(folder), pool="model"))


def test_the_pooling_of_a_model_that_is_not_here_is_not_guessed():
    # Of a model of the hub, offline, transformers reports an absent file as one that there is not.
    with pytest.raises(UserError, match="modules.json of BAAI/bge-small-en is not there, or not"):
        Config(**TINY | dict(lm="BAAI/bge-small-en", pool="model"))


def test_a_run_begins_with_what_it_trains_on(lm, tmp_path, capsys):
    folder = write_shards(tmp_path / "s", [40])
    write_tar(Path(folder) / "x.tar", [("a.jpg", JPEG)])
    train(lm, folder, tmp_path / "run", steps=2, warmup=3)
    output = capsys.readouterr()
    assert "'a dog' is [CLS] a dog [SEP], pooled by masked_max; 0 of its" in output.out
    assert "40 samples, left out: {'no caption': 1}" in output.out
    assert "--warmup 3 exceeds the 2 steps: --lr is never reached" in output.err


# ---- paraclip.py: what a GPU does differently, on a CPU ------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("text, precision, atol", [
    ("finetune", "fp32", 1e-6), ("align", "fp32", 1e-6), ("align", "bf16", 0.02)])
def test_gpu_paths_give_the_same_features(lm, monkeypatch, text, precision, atol):
    features = []
    for on_gpu in (False, True):
        monkeypatch.setattr(distributed, "ON_GPU", on_gpu)
        cfg = Config(**TINY | dict(lm=lm, text=text, precision=precision))
        model, _, _ = paraclip.build(cfg, torch.device("cpu"))
        randomize_blocks(model)
        features.append(torch.cat([model.encode_image(IMAGES), model.encode_text([LONG, SHORT])]))
    assert torch.allclose(*features, atol=atol)
    assert features[0].dtype == torch.float32
    assert torch.allclose(features[0].norm(dim=1), torch.ones(4), atol=1e-6)
    is_cast = text == "align" and precision == "bf16"
    assert (next(model.text_tower.lm.parameters()).dtype == torch.bfloat16) == is_cast


# ---- paraclip.py: optimizers ---------------------------------------------------------------------
@pytest.mark.parametrize("decay, quarter, last", [
    ("linear", 0.75, 1 / 8), ("cosine", 0.5 + 0.5 ** 1.5, 0.038)])
def test_schedule_warms_up_and_falls(decay, quarter, last):
    rates = [paraclip.schedule(step, 10, 2, decay) for step in range(1, 11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[4:7:2] == pytest.approx([quarter, 0.5]) and rates[-1] == pytest.approx(last, 0.01)


@pytest.mark.parametrize("value, expected", [(-1.0, 0.0), (2.0, 2.0), (9.0, math.log(100))])
def test_temperature_stays_in_clips_range(lm, value, expected):
    model = build(lm)
    model.logit_scale.data.fill_(value)
    model.logit_scale.grad = torch.zeros(())
    paraclip.optimizer_step(model, [], 1.0)
    assert model.logit_scale.item() == pytest.approx(expected)


def test_gradients_are_clipped_to_norm_one(lm):
    model = build(lm)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert paraclip.optimizer_step(model, [], 1.0) > 1
    squares = sum(p.grad.square().sum().item() for p in model.parameters())
    assert squares ** 0.5 == pytest.approx(1, rel=1e-3)


LAYER = "text_tower.lm.encoder.layer.0.output.dense."


@pytest.mark.parametrize("name, muon_rate, adamw_rate, decay", [
    ("logit_scale", 1, 1, 0), ("image_tower.norm.weight", 1, 1, 0),
    ("image_tower.cls_token", 1, 1, 0), ("image_tower.blocks.0.fc1.weight", 40, 1, 0.3),
    ("image_tower.patch_embed.0.weight", 40, 1, 0.3), ("text_proj.weight", 1, 1, 0.3),
    (LAYER + "weight", 4, 0.1, 0), (LAYER + "bias", 0.1, 0.1, 0),
    # Without decay, words that training never meets keep their vectors.
    ("text_tower.lm.embeddings.word_embeddings.weight", 0.1, 0.1, 0)])
def test_learning_rate_and_decay_of_each_weight(lm, name, muon_rate, adamw_rate, decay):
    model = build(lm, text="finetune")
    p = model.get_parameter(name)
    for optimizer, rate in (("muon", muon_rate), ("adamw", adamw_rate)):
        cfg = Config(text="finetune", optimizer=optimizer, lr=1.0, lm_lr=0.1, weight_decay=0.3)
        groups = []
        for torch_optimizer in paraclip.make_optimizers(model, cfg):
            groups += torch_optimizer.param_groups
        group, = [group for group in groups if any(p is q for q in group["params"])]
        assert (group["peak_lr"], group["weight_decay"]) == pytest.approx((rate, decay))


def test_only_alignment_layers_have_their_weight_decay(lm):
    model = build(lm, text="align")
    cfg = Config(text="align", weight_decay=0.3, align_weight_decay=10)
    decays = {}
    for optimizer in paraclip.make_optimizers(model, cfg):
        for group in optimizer.param_groups:
            decays[id(group["params"][0])] = group["weight_decay"]
    raised = {name for name, p in model.named_parameters() if decays.get(id(p)) == 3}
    assert raised == {f"text_tower.align.0.{layer}.weight"
                      for layer in ("qkv", "proj", "fc1", "fc2")}
    assert decays[id(model.text_proj.weight)] == 0.3
    assert decays[id(model.image_tower.blocks[0].fc1.weight)] == 0.3


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_orthogonalize_keeps_singular_vectors_alone(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    scales = u.T @ paraclip.orthogonalize(x) @ v.T
    assert torch.allclose(scales, scales.diag().diag(), atol=1e-4)
    assert 0.6 < scales.diag().min() and scales.diag().max() < 1.3


# ---- paraclip.py: training -----------------------------------------------------------------------
def step_that_calls(action, at: int):
    """A paraclip.optimizer_step that first calls action(model) in its `at`-th step."""
    real, steps = paraclip.optimizer_step, 0

    def optimizer_step(model, *args):
        nonlocal steps
        steps += 1
        if steps == at:
            action(model)
        return real(model, *args)
    return optimizer_step


def interrupt(monkeypatch, lm: str, folder: str, out: Path, at: int, **fields):
    """Starts a run that meets SIGTERM in step `at`."""
    def send_signal(model):
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(paraclip, "optimizer_step", step_that_calls(send_signal, at))
        with pytest.raises(SystemExit):
            train(lm, folder, out, **fields)
    assert read_weights(out)["step"] == at


def write_list_shards(folder: Path, count: int) -> str:
    """A shard whose samples have four captions each."""
    members = []
    for i in range(count):
        captions = [sentence(i + 100 * number) for number in range(4)]
        text = json.dumps({"caption": captions}).encode()
        members += [sample(i)[0], (f"{i:05d}.json", text)]
    write_tar(folder / "00000.tar", members)
    return str(folder)


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in open(out / "log.jsonl")]


def test_settings_of_speed_change_no_result(lm, tmp_path, monkeypatch):
    # Inductor needs a C++ compiler.
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(
        torch.nn.Module.compile, backend="eager"))
    folder = write_list_shards(tmp_path / "s", 40)
    expected = read_weights(train(lm, folder, tmp_path / "plain"))["model"]
    settings = dict(cache_lm=False, accum=4, workers=2, compile=True)
    weights = read_weights(train(lm, folder, tmp_path / "fast", **settings))["model"]
    assert weights.keys() == expected.keys()
    for name in weights:
        assert torch.allclose(weights[name], expected[name], atol=2e-4), name


def test_kept_states_reach_workers_of_a_forkserver(lm, tmp_path):
    """A forkserver, Python 3.14's default, takes some 250 file descriptors: not one a caption."""
    folder = write_shards(tmp_path / "s", [440])
    expected = train(lm, folder, tmp_path / "expected")
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        run = train(lm, folder, tmp_path / "run", workers=1)
    finally:
        multiprocessing.set_start_method(None, force=True)
    assert same(read_weights(run)["model"], read_weights(expected)["model"])


def test_states_are_kept_for_captions_of_the_data_alone():
    with pytest.raises(UserError, match="captions only, and 'a dog .' is not one .*--no-cache-lm"):
        paraclip.look_up_states({"a dog": slice(0, 1)}, torch.zeros(1, 2), ["a dog", "a dog ."])


def test_a_kill_between_two_files_keeps_both(lm, tmp_path, monkeypatch):
    def kill_before_second_file(path, real_write=atomic_write):
        written.append(path.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        return real_write(path)

    written, shards = [], write_shards(tmp_path / "s", [40])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder, "atomic_write", kill_before_second_file)
        train(lm, shards, tmp_path / "run", keep_every=2)
    assert set(written) == {"config.json", "model.pt", "model-00000002.pt"}
    out = train(lm, shards, tmp_path / "run", keep_every=2, save_every=1)
    steps = {path.name: torch.load(path)["step"] for path in out.glob("model*")}
    assert steps == {"model-00000002.pt": 2, "model-00000004.pt": 4, "model.pt": 4}


def test_a_resumed_log_has_each_step_once(lm, tmp_path, monkeypatch):
    folder, out = write_shards(tmp_path / "s", [40]), tmp_path / "run"
    whole = train(lm, folder, tmp_path / "whole", steps=24)
    interrupt(monkeypatch, lm, folder, out, at=11, steps=24)
    (out / ".model.pt.paraclip-tmp").touch()  # what a kill in mid-write leaves
    with open(out / "log.jsonl", "ab") as log:
        log.write(b'{"step": 20, "lo')  # newer than the checkpoint, and cut by the kill
    train(lm, folder, out, steps=24)
    rows = read_log(out)
    assert [row["step"] for row in rows] == [10, 20, 24]
    assert [row["loss"] for row in rows] == [row["loss"] for row in read_log(whole)]
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    assert {"epoch", "accuracy", "logit_scale", "lr", "grad_norm", "images_per_s",
            "data_wait"} <= rows[0].keys()
    assert not list(out.glob(".*"))


def test_the_log_says_what_share_of_the_time_the_loader_takes(lm, tmp_path, monkeypatch):
    def slow(function):
        def call_late(*args, **options):
            time.sleep(0.1)
            return function(*args, **options)
        return call_late

    monkeypatch.setattr(data, "collate", slow(data.collate))
    monkeypatch.setattr(paraclip, "optimizer_step", slow(paraclip.optimizer_step))
    row, = read_log(train(lm, write_shards(tmp_path / "s", [40]), tmp_path / "run", steps=10))
    assert 0.3 < row["data_wait"] < 0.7


def test_a_failed_training_leaves_no_workers_behind(lm, tmp_path, monkeypatch):
    others = multiprocessing.active_children()
    monkeypatch.setattr(paraclip, "optimizer_step", step_that_calls(fail, at=2))
    with pytest.raises(UserError, match="this rank has failed") as caught:
        train(lm, write_shards(tmp_path / "s", [40]), tmp_path / "run", workers=2)
    # The error, which is still held here, holds the frames of the training.
    workers = [child for child in multiprocessing.active_children() if child not in others]
    for worker in workers:
        worker.join(timeout=5)
    assert caught.tb and not any(worker.is_alive() for worker in workers)


class FullDisk(io.FileIO):
    """A file of which only the first bytes are written."""

    def write(self, content):
        super().write(content[:9])
        raise OSError(28, "No space left on device")


def test_a_full_disk_costs_rows_of_the_log_alone(lm, tmp_path, monkeypatch, capsys):
    opened = Counter()

    def open_file(path, mode):
        opened[path.name] += 1
        is_full = path.name == "log.jsonl" and opened[path.name] in (2, 3)
        return FullDisk(path, mode) if is_full else open(path, mode)

    monkeypatch.setattr(run_folder, "open", open_file, raising=False)
    folder, out = write_shards(tmp_path / "s", [40]), tmp_path / "run"
    interrupt(monkeypatch, lm, folder, out, at=35, steps=50)
    train(lm, folder, out, steps=50)
    assert [row["step"] for row in read_log(out)] == [10, 40, 50]
    notes = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert len(notes) == 1 and f"note: the log of {out} lacks rows or lines" in notes[0]


# ---- paraclip.py: many ranks ---------------------------------------------------------------------
def fail(model):
    raise UserError("this rank has failed")


def train_and_fail_once(args: list):
    """Rank 1 fails in its third step. torchrun ends both ranks and starts them again."""
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        paraclip.optimizer_step = step_that_calls(fail, at=3)
    elif os.environ["RANK"] == "1":
        # Rank 0 must not take the address that the failed rank has left.
        time.sleep(0.5)
    run(lambda: paraclip.main(args))


def test_restarted_processes_follow_one(lm, tmp_path):
    args = flags(**TINY | dict(data=write_list_shards(tmp_path / "s", 79), lm=lm, steps=8,
                               save_every=1))
    call(paraclip, *args, "--out", tmp_path / "one")
    args += ["--out", str(tmp_path / "two")]
    child = start_child(tmp_path / "output.txt", torchrun, 2, 1, train_and_fail_once, args)
    output = finish_child(child)
    assert "error: this rank has failed" in output and "steps 3 to 8 on 2" in output
    one, two = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
    for name, weight in one["model"].items():
        assert torch.allclose(weight, two["model"][name], atol=2e-4), name


def train_as_rank(rank: int, world_size: int, port: int, args: list, args_of_rank_1: list,
                  action=lambda model: None):
    """action: called by rank 1 in its second step."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                      MASTER_ADDR="localhost", MASTER_PORT=str(port))
    if rank == 1:
        args = args + args_of_rank_1
        paraclip.optimizer_step = step_that_calls(action, at=2)
    paraclip.main(args)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def test_ranks_with_other_flags_are_refused(lm, tmp_path):
    args = flags(**TINY, data=write_shards(tmp_path / "s", [40]), lm=lm, out=tmp_path / "run")
    other = flags(seed=5, precision="bf16")
    for output in on_ranks(2, tmp_path, train_as_rank, free_port(), args, other, status=2):
        assert "rank 1 differs from rank 0: seed 0 -> 5, precision 'fp32' -> 'bf16';" in output


def test_peers_of_a_failing_rank_say_one_line(lm, tmp_path):
    args = flags(**TINY, data=write_shards(tmp_path / "s", [40]), lm=lm, out=tmp_path / "run")
    outputs = on_ranks(2, tmp_path, train_as_rank, free_port(), args, [], fail, status=2)
    last_lines = [output.splitlines()[-1] for output in outputs]
    assert last_lines == ["rank 0: error: another rank ended; see its message",
                          "rank 1: error: this rank has failed"]
    assert "Traceback" not in outputs[0]


@pytest.mark.parametrize("name", ["RANK", "SLURM_STEP_NUM_TASKS"])
def test_ranks_that_torchrun_has_not_started_are_refused(monkeypatch, name):
    monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match="torchrun"):
        distributed.setup_distributed()


def stop_and_save_slowly(lm: str, folder: str, out: Path):
    """On each of two ranks: a signal in the first step, and a checkpoint that takes a while."""
    save = torch.save
    paraclip.optimizer_step = step_that_calls(
        lambda model: os.kill(os.getpid(), signal.SIGUSR1), at=1)
    torch.save = lambda *args: (time.sleep(0.5), save(*args))
    with pytest.raises(SystemExit):
        train(lm, folder, out)
    assert (out / "model.pt").exists()


def test_all_ranks_wait_for_the_checkpoint(lm, tmp_path):
    """torchrun kills the other ranks thirty seconds after the first one has ended."""
    folder = write_shards(tmp_path / "s", [40])
    torchrun(2, 0, stop_and_save_slowly, lm, folder, tmp_path / "run")


# ---- run folders: failures and mistakes ----------------------------------------------------------
@pytest.fixture
def saved_run(lm, tmp_path, monkeypatch) -> Namespace:
    """A run of four steps that was stopped after two; `args` resume it."""
    folder, out = write_shards(tmp_path / "s", [40]), tmp_path / "run"
    interrupt(monkeypatch, lm, folder, out, at=2)
    args = flags(**TINY, data=folder, lm=lm, out=out)
    return Namespace(folder=folder, out=out, args=args, content=(out / "model.pt").read_bytes())


@pytest.mark.parametrize("save_every, message", [(1, "a weight is not"), (100, "the loss (nan)")])
def test_what_is_not_finite_stops(saved_run, monkeypatch, capsys, save_every, message):
    def spoil(model):
        model.text_proj.weight.data[0, 0] = torch.inf

    monkeypatch.setattr(paraclip, "optimizer_step", step_that_calls(spoil, at=1))
    args = [*saved_run.args, "--save-every", save_every]
    assert message in error_line(capsys, paraclip, *args)
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


def train_with_a_hanging_worker(args: list):
    def hang(self, key):
        while True:
            print("hangs", flush=True)
            time.sleep(0.01)

    data.TrainingSet.__getitem__ = hang
    paraclip.main(args)


def test_a_second_ctrl_c_ends_a_hanging_training(lm, tmp_path):
    args = flags(**TINY | dict(data=write_shards(tmp_path / "s", [40]), lm=lm,
                               out=tmp_path / "run", workers=1))
    output = tmp_path / "output.txt"
    child = start_child(output, train_with_a_hanging_worker, args)
    wait_until(child, lambda: output.exists() and "hangs" in output.read_text())
    # The first Ctrl-C, whatever signal came before it, only asks for a checkpoint.
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(child.pid, number)
        time.sleep(0.1)
    assert child.is_alive()
    os.killpg(child.pid, signal.SIGINT)
    assert "Traceback" not in finish_child(child, status=130)
    # The worker has ended, too.
    text = output.read_text()
    time.sleep(0.1)
    assert output.read_text() == text


def test_a_checkpoint_without_optimizers_is_not_resumed(saved_run, capsys):
    checkpoint = torch.load(saved_run.out / "model.pt", weights_only=True)
    del checkpoint["optimizers"]
    torch.save(checkpoint, saved_run.out / "model.pt")
    assert "lacking: ['optimizers']" in error_line(capsys, paraclip, *saved_run.args)
    assert load_model(saved_run.out)


def test_a_language_model_may_move_but_not_change(saved_run, lm, tmp_path, capsys):
    moved = shutil.copytree(lm, tmp_path / "moved")
    call(paraclip, *saved_run.args, "--lm", moved)
    assert read_weights(saved_run.out)["step"] == 4
    (saved_run.out / "model.pt").write_bytes(saved_run.content)
    other = write_lm(tmp_path / "other", "gpt2")
    line = error_line(capsys, paraclip, *saved_run.args, "--lm", other)
    assert "the language model is not" in line


def test_a_finished_run_says_how_to_train_on(lm, tmp_path, capsys):
    fields = TINY | dict(data=write_shards(tmp_path / "s", [40]), lm=lm, out=tmp_path / "run")
    call(paraclip, *flags(**fields))
    call(paraclip, *flags(**fields))
    assert "is finished: 4 steps; to train again, give another --out" in capsys.readouterr().out
    line = error_line(capsys, paraclip, *flags(**fields | {"steps": 50}))
    assert "steps 4 -> 50; give another --out" in line


def test_other_data_of_equal_sizes_are_refused(saved_run, capsys):
    members = []
    for i in range(40):
        members += [sample(i)[0], (f"{i:05d}.txt", sentence(i).encode()[::-1])]
    write_tar(Path(saved_run.folder) / "00000.tar", members)
    assert "other data" in error_line(capsys, paraclip, *saved_run.args)


@pytest.mark.parametrize("key, name, value, complaint", [
    ("config", "width", 64, "its weights do not fit"),
    ("lm", "sha256", "of another one", "the language model is not")])
def test_changed_checkpoint_is_refused(memorized, tmp_path, key, name, value, complaint):
    checkpoint = read_weights(memorized)
    checkpoint[key][name] = value
    torch.save(checkpoint, tmp_path / "changed.pt")
    with pytest.raises(UserError, match=complaint):
        load_model(tmp_path / "changed.pt")


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
    for seed in range(FUZZ_SEED, FUZZ_SEED + FUZZ_CASES):
        rng, run = random.Random(seed), tmp_path / f"run{seed}"
        shutil.copytree(good, run)
        file = run / rng.choice(["model.pt", "model.pt", "log.jsonl", "config.json"])
        damaged = damage(file.read_bytes(), rng)
        file.write_bytes(damaged)
        try:
            train(lm, folder, run, steps=1)
            assert same(read_weights(run)["model"], read_weights(good)["model"]), seed
        except UserError:
            assert file.name != "log.jsonl" and file.read_bytes() == damaged, seed


@pytest.mark.parametrize("name, content", [
    ("config.json", '{"model_type": "bert"}'), ("config.json", '{"seed": 0, "lr": 0.1}'),
    ("log.jsonl", "another program's"), ("model.pt", "another program's")])
def test_foreign_folders_are_refused_and_unchanged(lm, tmp_path, capsys, name, content):
    out = tmp_path / "theirs"
    out.mkdir()
    (out / name).write_text(content)
    args = flags(**TINY, data=write_shards(tmp_path / "s", [20]), lm=lm, out=out)
    assert "theirs" in error_line(capsys, paraclip, *args)
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text() == content


def test_running_training_locks_its_folder(saved_run, capsys):
    with FileLock(saved_run.out / "run.lock"):
        assert "another process is training" in error_line(capsys, paraclip, *saved_run.args)


def test_run_is_read_after_it_is_locked(lm, tmp_path, monkeypatch):
    folder, out = write_shards(tmp_path / "s", [40]), tmp_path / "run"
    claim = run_folder.claim

    def claim_late(*args):
        # Meanwhile another command trains in the folder.
        monkeypatch.setattr(run_folder, "claim", claim)
        train(lm, folder, out, lr=0.002)
        return claim(*args)

    monkeypatch.setattr(run_folder, "claim", claim_late)
    with pytest.raises(UserError, match="other settings"):
        train(lm, folder, out, lr=0.001)


@pytest.mark.parametrize("args, message", [
    ("--crop 2", "--crop 2"), ("--lm no/lm", "'no/lm' cannot be used: there is no such folder"),
    ("--batch-size 64", "exceeds"), ("--steps 0 --epochs 0.01", "less than one step"),
    ("--accum 3", "multiple"), ("--image-size 15", "--image-size"), ("--heads 3", "--heads"),
    ("--width 34", "--width 34"), ("--patch-size 1", "--patch-size"), ("--steps 1", "--no-cache"),
    ("--data nowhere", "nowhere")])
def test_mistakes_in_training_are_told(lm, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paraclip, "STATES_BYTES", 1000)
    fields = TINY | dict(data=write_shards(Path("s"), [20]), out="run", lm=lm)
    assert message in error_line(capsys, paraclip, *flags(**fields), *args.split())


@pytest.mark.parametrize("data, name", [
    ("emoji", "emoji"), ("a/laion/{00..41}.tar", "laion"), ("a/mine/*.tar", "mine"),
    ("a/mine", "mine"), ("a/mine.v2/00000.tar", "00000")])
def test_run_folders_are_named_by_their_data(data, name):
    assert paraclip.run_name(data) == name


# ---- docs ----------------------------------------------------------------------------------------
def test_the_documented_search_runs(memorized):
    page = (HERE / "docs/formats.md").read_text()
    block = page.split("## From Python")[1].split("```python\n")[1].split("```")[0]
    block = block.replace("runs/emoji-align", str(memorized))
    block = block.replace("shards/emoji/test", str(memorized.parent / "shards"))
    names = {}
    exec(block, names)
    assert names["best"].shape == (2, 5)


# ---- evaluation: galleries -----------------------------------------------------------------------
def test_a_gallery_is_a_sorted_folder(tmp_path):
    folder = write_images(tmp_path / "f", "z/a.PNG", "b.jpg", "z/.y.jpg", "ant/sub/c.jpeg",
                          ".hidden/a.png", "notes.txt", "phone.HEIC", "scan.tif")
    os.symlink(write_images(tmp_path / "far", "a.bmp"), f"{folder}/dog")
    os.symlink(folder, f"{folder}/ant/loop")
    assert ev.list_gallery(folder).names == [
        "ant/sub/c.jpeg", "b.jpg", "dog/a.bmp", "phone.HEIC", "scan.tif", "z/a.PNG"]


def test_scans_are_read_and_drawings_in_postscript_are_not(tmp_path):
    Image.new("RGB", (5, 4), "red").save(tmp_path / "scan.tif", compression="tiff_lzw")
    Image.new("F", (5, 4), 0.5).save(tmp_path / "float.tif")
    # Pillow would start Ghostscript for it.
    Image.new("RGB", (5, 4), "red").save(tmp_path / "drawing.jpg", "EPS")
    images = ev.list_gallery(tmp_path).images
    assert ev.open_image(images["scan.tif"]).getpixel((2, 2)) == (255, 0, 0)
    # From 0 to 1, to 255 or to 65535: nobody knows.
    with pytest.raises(BadSample, match="floating-point"):
        ev.open_image(images["float.tif"])
    with pytest.raises(BadSample, match="broken image"):
        ev.open_image(images["drawing.jpg"])


def test_equal_keys_of_two_shards_are_counted(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", sample(0) + sample(1))
    write_tar(tmp_path / "1.tar", [("00001.jpg", image_bytes(9))] + sample(2))
    gallery = ev.list_gallery(str(tmp_path))
    assert gallery.names == ["00000", "00001", "00002"]
    assert gallery.images["00001"]() == image_bytes(1)
    assert "{'duplicate key': 1}" in capsys.readouterr().err


def test_an_unclear_gallery_is_refused(tmp_path):
    with pytest.raises(UserError, match="no image in it"):
        ev.list_gallery(str(tmp_path))
    write_tar(tmp_path / "0.tar", sample(0))
    write_images(tmp_path, "a.jpg")
    with pytest.raises(UserError, match="1 images in .tar shards and 1 image files"):
        ev.list_gallery(str(tmp_path))


@pytest.mark.parametrize("name, found", [
    ("b/1.png", "b/1.png"), ("2.png", "b/2.png"), ("1.png", None), ("val/b/2.png", "b/2.png"),
    # An accent of its own, as some file systems store it, and a folder that is another one.
    ("cafe\u0301.png", "caf\u00e9.png"), ("c/2.png", None)])
def test_images_are_found_by_every_unambiguous_name(name, found):
    gallery = ev.Gallery(dict.fromkeys(["a/1.png", "b/1.png", "b/2.png", "caf\u00e9.png"]), "x/val")
    assert gallery.find(name) == found
    # A part of it knows the same names, also those that would be unique in the part.
    part = gallery.only(["a/1.png", "val/b/2.png", "caf\u00e9.png"])
    assert part.names == ["a/1.png", "b/2.png", "caf\u00e9.png"] and part.find(name) == found


def test_one_image_never_ends_an_evaluation(tmp_path):
    def preprocess(image):
        if image.size == (1, 1):
            raise MemoryError("odd")
        return torch.ones(image.width)

    sizes = {"odd": 1, "good": 2, "other shape": 3}
    gallery = {name: functools.partial(np.zeros, (size, size, 3), np.uint8)
               for name, size in sizes.items()}
    gallery["gone"] = (tmp_path / "gone.jpg").read_bytes
    names, images, failed = ev.collate_images(list(gallery.items()), preprocess)
    assert names == ["good"] and images.tolist() == [[1, 1]]
    assert failed[0] == ("odd", "odd") and failed[1][0] == "other shape"
    assert "gone.jpg" in failed[2][1]


# ---- evaluation: metrics -------------------------------------------------------------------------
@pytest.mark.parametrize("a, b, ao, js", [
    pytest.param([1, 2, 3, 4], [1, 2, 3, 4], 1, 1, id="equal"),
    pytest.param([1, 2, 3], [1, 4, 5], (1 + 1 / 2 + 1 / 3) / 3, 1 / 5, id="agree at the top"),
    pytest.param([1, 2, 3], [4, 5, 1], (0 + 0 + 1 / 3) / 3, 1 / 5, id="agree at the bottom"),
])
def test_ao_and_js_by_hand(a, b, ao, js):
    # Of longer lists only the first k items count.
    assert ev.average_overlap(a + [9], b + [9], len(a)) == pytest.approx(ao, abs=1e-15)
    assert ev.jaccard(a + [9], b + [9], len(a)) == pytest.approx(js, abs=1e-15)


def test_equal_lists_have_exactly_ao_1():
    lists = np.arange(1000).reshape(1, -1)
    assert [ev.average_overlap(lists, lists, k)[0] for k in (1, 7, 49, 1000)] == [1, 1, 1, 1]


def test_lists_shorter_than_k_are_refused():
    with pytest.raises(ValueError, match="k = 4"):
        ev.jaccard([1, 2, 3, 4], [1, 2, 3], 4)


def vectors(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and a gallery of vectors that tie, or nearly."""
    torch.manual_seed(0)
    if kind == "nearly equal":
        return torch.randn(23, 4), torch.randn(4) + 1e-7 * torch.randn(57, 4).double()
    if kind == "copies":
        return torch.randn(41, 512), torch.randn(30, 512)[torch.randint(30, (301,))]
    # So many that candidates are looked for: some alone, some equal, some closer than fp32 tells.
    gallery = torch.randn(9001, 64).double()
    gallery[3000:3100] = gallery[0]
    gallery[6000:8950:3] = gallery[1] + 1e-7 * torch.randn(984, 64)
    # Three that are equal, not in the order of the blocks; 8960 is the first one behind them.
    gallery[[70, 500, 7]] = gallery[2].clone()
    return gallery[[0, 1, 2, 8960]] + 0.01, gallery


@pytest.mark.parametrize("kind", ["nearly equal", "copies", "large"])
def test_rankings_equal_a_stable_sort(kind):
    queries, gallery = vectors(kind)
    # Sums of integers are exact in any order.
    q = (F.normalize(queries.double(), dim=-1) * 2**24).round().long()
    g = (F.normalize(gallery.double(), dim=-1) * 2**24).round().long()
    scores = ((q @ g.T).double() / 2**24).round()
    expected = scores.argsort(dim=1, descending=True, stable=True)
    for k in (1, 50):
        assert ev.rankings(queries, gallery, k, 5000).tolist() == expected[:, :k].tolist()


def test_rankings_do_not_depend_on_torchs_default():
    queries, gallery = vectors("large")
    expected = ev.rankings(queries, gallery, 10)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert ev.rankings(queries, gallery, 10).tolist() == expected.tolist()
    finally:
        torch.set_default_dtype(torch.float32)


def test_candidates_mostly_suffice(monkeypatch):
    monkeypatch.setattr(ev, "rank_exactly", None)
    torch.manual_seed(0)
    assert ev.rankings(torch.randn(5, 64), torch.randn(9000, 64), 10).shape == (5, 10)


def test_recall_from_images_finds_any_text():
    texts, images = torch.eye(4)[[0, 0, 1, 2]], torch.eye(4)[[1, 0, 3]]
    # Text 3 shows image 2, which is no text's nearest. Texts 0 and 2 are of one group.
    found = ev.image_to_text("abcd", texts, images, [[1], [1], [0], [2]], np.array([7, 5, 7, 9]))
    # In the order in which the texts first name the images: 1, 0, 2.
    assert found["i2t@1"].values.tolist() == [1, 1, 0]
    assert found["i2t@1"].groups.tolist() == [7, 7, 9]


def test_a_text_that_stands_twice_is_one_candidate():
    # Text a is nearer to image 1 than its own text b.
    texts, images = torch.tensor([[1, 0.1], [0, 1.0]]).repeat(6, 1), torch.eye(2)[[0, 0]]
    found = ev.image_to_text("ab" * 6, texts, images, [[0], [1]] * 6, np.arange(12))
    assert found["i2t@1"].values.tolist() == [1, 0] and found["i2t@5"].values.tolist() == [1, 1]


def test_spearman_shares_the_ranks_of_ties():
    # Ranks 1, 2.5, 2.5 and 1, 2, 3: covariance 1.5, variances 1.5 and 2.
    assert ev.spearman([1, 2, 2], [4, 5, 60]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))


def test_equal_features_have_exactly_similarity_1():
    features = torch.randn(300, 96)
    assert set(ev.similarity(features, 3 * features)) == {1}


def test_contrast_by_hand():
    # The second pair ties in all but the last bit of a sum.
    assert ev.contrast([0.8, 0.1 + 0.2, 0.1], [0.5, 0.3, 0.3]).tolist() == [1, 0.5, 0]


def test_interval_is_as_wide_as_normal():
    values = np.random.default_rng(0).random(400)
    low, high = ev.bootstrap_ci(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.06)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.1 * (high - low))


def test_interval_of_all_or_none_is_exact():
    def interval(value, groups, of_differences=False):
        scores = {("ao",): ev.Scores(np.full(len(groups), value), np.array(groups))}
        return ev.estimate(scores, 0, of_differences)["ao",].interval

    exact = scipy.stats.binomtest(20, 20).proportion_ci(0.95, "exact")
    assert interval(1.0, range(20)) == pytest.approx((exact.low, 1))
    assert interval(0.0, range(20)) == pytest.approx((0, 1 - exact.low))
    assert interval(0.0, range(20), of_differences=True) == (0, 0)
    assert interval(1.0, [3, 3]) is None


def test_interval_of_equal_values_is_exact():
    # Their mean is rounded, and must still lie in its interval.
    values = np.full(7, 0.1)
    assert values.mean() != 0.1 and ev.bootstrap_ci(values) == (values.mean(), values.mean())


def make_pairs(queries, images, groups=(None,) * 50) -> list:
    return [ev.Pair(query, "p" + query, tuple(names), group=group)
            for query, names, group in zip(queries, images, groups)]


def test_unrelated_pairs_share_nothing():
    queries = [f"{i // 3}" for i in range(42)]
    pairs = make_pairs(queries, [[f"a{i % 7}"] for i in range(42)])
    groups = np.arange(42) % 5
    partners = ev.unrelated(pairs, groups, 0)
    for i, j in enumerate(partners):
        assert queries[i] != queries[j] and i % 7 != j % 7 and groups[i] != groups[j]
    assert len(set(partners)) > 21
    # Where all pairs have one query, none is unrelated to another.
    assert ev.unrelated(make_pairs("aaa", [[], [], []]), np.zeros(3), 0).tolist() == [-1] * 3


@pytest.mark.parametrize("pairs, groups", [
    pytest.param(make_pairs("abc", [["1", "2"], ["2", "1"], ["1"]]), [0, 0, 1], id="images"),
    pytest.param(make_pairs("abc", [["1"], ["1"], ["2"]], [7, 8, "7"]), [0, 1, 0], id="group"),
    pytest.param(make_pairs("aab", [[], [], []]), [0, 0, 1], id="query"),
    pytest.param(make_pairs("abca", [["1"], ["2"], ["2"], ["2"]]), [0, 0, 0, 0], id="either"),
    pytest.param(make_pairs("aa", [["1"], ["2"]], [1, 2]), [0, 1], id="queries of two groups"),
])
def test_pairs_are_grouped_by(pairs, groups):
    assert ev.group_numbers(pairs).tolist() == groups


VECTORS = torch.tensor([[1, 0], [3, 4], [4, 3], [3, -4], [-4, 3], [0, 1], [1, 1.0]])
# The feature of a text is the vector whose number it is.
BY_NUMBER = Namespace(encode_text=lambda texts: VECTORS[[int(text) for text in texts]])


@pytest.mark.parametrize("p1, p2, negative, image, text_only, image_text", [
    pytest.param(2, 1, 4, 6, 1, 1, id="both closer"),
    pytest.param(0, 1, 3, 0, 0, 0, id="negative as close to caption 1"),
    pytest.param(1, 0, 3, 0, 0, 0, id="negative as close to caption 2"),
    pytest.param(2, 1, 4, 5, 1, 0, id="negative as close to the image as caption 1"),
    pytest.param(1, 2, 4, 5, 1, 0, id="negative as close to the image as caption 2"),
])
def test_a_tie_of_triplets_is_a_miss(tmp_path, p1, p2, negative, image, text_only, image_text):
    (tmp_path / "f").write_text(json.dumps({
        "caption": f"{p1}", "caption2": f"{p2}", "negative_caption": f"{negative}",
        "filename": "x"}))
    cfg = ev.EvalConfig(triplets=[str(tmp_path / "f")])
    gallery = ev.Gallery({"x": None})
    images = ev.EncodedGallery(gallery, ["x"], VECTORS[[image]])
    results = ev.Triplets(cfg, gallery).measure(BY_NUMBER, images, cfg)
    assert results["triplets", "f", "text_only"].values == [text_only]
    assert results["triplets", "f", "image_text"].values == [image_text]


def test_class_prompts_are_averaged(tmp_path):
    (tmp_path / "z.json").write_text('{"classnames": ["2", "3"], "labels": {"x": 1}}')
    # Whatever the class, the second prompt is the text 5.
    (tmp_path / "prompts").write_text("{}\n5" + " " * 9 + "{}")
    model = Namespace(encode_text=lambda texts: BY_NUMBER.encode_text([t[0] for t in texts]))
    cfg = ev.EvalConfig(zeroshot=str(tmp_path / "z.json"), images="x",
                        templates=str(tmp_path / "prompts"))
    # Class 0 would be nearer by the first prompt alone, or if longer features weighed more.
    gallery = ev.Gallery({"x": None})
    images = ev.EncodedGallery(gallery, ["x"], torch.tensor([[0.9, 0.3]]))
    results = ev.ZeroShot(cfg, gallery).measure(model, images, cfg)
    # Of two classes, the correct one is always among the first five.
    assert results["zeroshot", "top1"].values == [1] and ("zeroshot", "top5") not in results


# ---- evaluation: opposites -----------------------------------------------------------------------
def words_in_common(texts: list[str]):
    """Features of texts whose dot product counts the words in common."""
    vocabulary = sorted({word for text in OPPOSITES.values() for word in text})
    return torch.tensor([[float(word in OPPOSITES[text]) for word in vocabulary] for text in texts])


# Texts and their words: b says the same as a in other words, c the opposite in nearly the same.
OPPOSITES = {"a": ["x", "y", "z"], "b": ["z", "v", "w"], "c": ["x", "y", "u"]}
LISTENERS = {
    "words in common": (words_in_common, [0, 0.5]),
    "deaf": (lambda texts: torch.ones(len(texts), 9), [0.5, 0.5]),
    "hears all": (lambda texts: torch.eye(9)[[4 * (text == "c") for text in texts]], [1, 1]),
}


@pytest.mark.parametrize("encode_text, expected", LISTENERS.values(), ids=LISTENERS)
def test_contrast_of_models_built_for_it(tmp_path, encode_text, expected):
    # b, a: the text in common need not be the query. The last pair shares no text with another.
    pairs = [("a", "b", True), ("c", "a", False), ("b", "c", False)]
    lines = [{"query": query, "paraphrase": paraphrase, "same": same, "kind": f"kind {i}"}
             for i, (query, paraphrase, same) in enumerate(pairs)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    width = encode_text(["a"]).shape[1]
    gallery = ev.Gallery(dict.fromkeys("0123456789"[:width]))
    cfg = ev.EvalConfig(pairs=[str(tmp_path / "pairs.jsonl")], k=1)
    task = ev.Pairs(cfg, gallery)
    features = torch.eye(width) + torch.eye(width).roll(1, 1) / 2
    images = ev.EncodedGallery(gallery, gallery.names, features)
    results = task.measure(Namespace(encode_text=encode_text), images, cfg)
    assert results["contrast",].values.tolist() == expected
    # Pairs that change the meaning are no part of AO.
    assert results["pairs",] == len(results["ao",].values) == 1
    assert len(results["ao_changed",].values) == 2
    assert results["changed", "kind 1", "pairs"] == 1
    assert results["changed", "kind 1", "contrast_pairs"] == 1
    report = ev.to_json(ev.estimate(results, 0))
    assert report["contrast_pairs"] == 2 and report["kinds"].keys() == {"kind 0"}


def test_contrast_equals_a_loop():
    rng = random.Random(0)
    pairs = [ev.Pair(rng.choice("abcdef"), rng.choice("ghijkl"), same=rng.random() < 0.5)
             for _ in range(40)]
    expected = []
    for i, kept in enumerate(pairs):
        for j, changed in enumerate(pairs):
            shared = {kept.query, kept.paraphrase} & {changed.query, changed.paraphrase}
            if kept.same and not changed.same and shared:
                expected.append([i, j])
    assert ev.comparisons(pairs).tolist() == expected


# ---- evaluation: files ---------------------------------------------------------------------------
PAIR = {"query": "q", "paraphrase": "p"}
COCO = ('{"images": [{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "b"}], '
        '"annotations": [{"image_id": 1, "caption": "x"}]}')
KARPATHY = ('{"images": [{"filename": "a", "split": "test", "sentences": [{"raw": "x"}]}, '
            '{"filename": "b", "split": "train", "sentences": [{"raw": "y"}]}]}')
DETAILS = ('{"query": "a", "query_ranking": ["1"], "paraphrase": "b", '
           '"paraphrase_ranking": ["2"]}')
SUGAR = '{"caption": "q\\ud83d", "caption2": "p", "negative_caption": "n", "filename": "1"}'
SUGAR_PAIR = ev.Pair("q?", "p", ("1",), negative="n")
captions_of_test = functools.partial(records.read_captions, split="test")
CLASSES = '{"classnames": ["x", "y"], "labels": {"a": 1}}'
QP = ev.Pair("q", "p")
GOOD_FILES = {
    "array": (ev.read_pairs, '[{"query": "q ", "paraphrase": "p\\n"}]', [QP]),
    "one line": (ev.read_pairs, json.dumps(PAIR), [QP]),
    "null": (ev.read_pairs, '{"query": "q", "paraphrase": "p", "same": null, "kind": null}', [QP]),
    "lines": (ev.read_pairs, f"\ufeff{json.dumps(PAIR)}\r\n\n{json.dumps(PAIR)}", [QP] * 2),
    "pairs in csv": (ev.read_pairs, 'kind,Query,paraphrase,same,group\nx,q,"p, ""r""\ns",False,\n',
                     [ev.Pair("q", 'p, "r"\ns', kind="x", same=False)]),
    "sugarcrepe": (ev.read_pairs, f"[{SUGAR}]", [SUGAR_PAIR]),
    "numbered": (ev.read_pairs, f'{{"0": {SUGAR}, "1": {SUGAR}}}', [SUGAR_PAIR] * 2),
    "lists": (ev.read_lists, '{"text": " a", "ranking": ["2", "1"]}\n', {"a": ["2", "1"]}),
    "details": (ev.read_lists, DETAILS, {"a": ["1"], "b": ["2"]}),
    "coco": (captions_of_test, COCO, [("x", "a")]),
    "karpathy": (captions_of_test, KARPATHY, [("x", "a")]),
    "datasets": (captions_of_test, '{"file_name": "a", "text": "x"}\n{"captions": ["y", "z"]}',
                 [("x", "a"), ("y", None), ("z", None)]),
    "captions of splits": (captions_of_test, "image,caption,split\na,x,test\nb,y,train\n",
                           [("x", "a")]),
    "kaggle": (captions_of_test, 'image,caption\na#1,"x, y"\na#1,z\n',
               [("x, y", "a#1"), ("z", "a#1")]),
    "flickr": (captions_of_test, "a.jpg#0\tx\na.jpg#1\ty\n", [("x", "a.jpg"), ("y", "a.jpg")]),
    "spaces and empty rows": (ev.read_pairs, 'query, paraphrase, image\nq, "p", 1\n,,\n',
                              [QP._replace(images=("1",))]),
    "csv": (ev.read_sts, 'a,"b, c",1\nd,e,2.5\n', [("a", "b, c", 1.0), ("d", "e", 2.5)]),
    "sick": (ev.read_sts, "pair_ID\tlabel\tsentence_A\tsentence_B\trelatedness_score\n"
             "7\t1\ta\tb\t4.5\n", [("a", "b", 4.5)]),
    "stray quotes": (ev.read_sts, 'id\tScore\tsentence1\tsentence2\n7\t3\ta\t"b\n8\t1\t"c\td\n',
                     [("a", '"b', 3.0), ('"c', "d", 1.0)]),
    "quotes over lines": (ev.read_sts, 'sentence1\tsentence2\tscore\na\t"b\t1\nc\td"\t2\n',
                          [("a", '"b', 1.0), ("c", 'd"', 2.0)]),
    "quoted cells": (ev.read_sts, 'score\tsentence1\tsentence2\n3\ta\t"b\nc"\n',
                     [("a", "b\nc", 3.0)]),
    "templates": (ev.read_templates, "a {}\n\nof {} b\n", ["a {}", "of {} b"]),
    "classes": (ev.read_labels, CLASSES, (["x", "y"], {"a": 1})),
    "synset words": (ev.read_classnames, "n01440764 tench, Tinca tinca\nmy dog, his\n",
                     ["tench", "my dog, his"]),
}
BAD_FILES = {
    "broken line": (ev.read_pairs, json.dumps(PAIR) + "\n\n{", "line 3: expected JSON"),
    "comma without quotes": (captions_of_test, "image,caption\na,b\na,A man, a dog",
                             "row 2.*quotes"),
    "comma in a bare table": (ev.read_pairs, "A dog, running,A hound\n", "row 1.*quotes"),
    "comma in a bare caption": (captions_of_test, "a.jpg,A man, a dog\n", "row 1.*quotes"),
    "stray quotes in csv": (ev.read_pairs, 'query,paraphrase\n"a "b" c",d', "CSV.*line 2"),
    "a number among rows": (ev.read_pairs, '[["q", "p"], 5]', "row 2"),
    "no paraphrase": (ev.read_pairs, '{"query": "q"}', "record 1: expected query and paraphrase"),
    "image no text": (ev.read_pairs, json.dumps(PAIR | {"images": [7]}), "7 is no text"),
    "same no bool": (ev.read_pairs, json.dumps(PAIR | {"same": "no"}), "same .true or false."),
    "group no name": (ev.read_pairs, json.dumps(PAIR | {"group": [1]}), "the group is"),
    "empty": (ev.read_pairs, "\n", "empty"),
    "not UTF-8": (ev.read_pairs, b"\xff\xfe{\0", "UTF-8"),
    "two lists": (ev.read_lists, DETAILS + DETAILS.replace("1", "3").join("\n\n"),
                  "record 2.*several models"),
    "caption no text": (captions_of_test, COCO.replace('"x"', "null"), "None is no text"),
    "a list in a cell": (captions_of_test, "image,caption\na.jpg,\"['x', 'y']\"\n",
                         "list in Python's notation"),
    "unknown image": (captions_of_test, COCO.replace('image_id": 1', 'image_id": 7'), "7"),
    "no captions": (captions_of_test, KARPATHY.replace("test", "val"),
                    "no caption of the split test in it"),
    "score not finite": (ev.read_sts, "a,b,1\nc,d,nan", "record 2.*finite score"),
    "no score": (ev.read_sts, "sentence1,sentence2,score\n", "is empty"),
    "no place for the name": (ev.read_templates, "a {}\n\nno place\n", "no place"),
    "label too high": (ev.read_labels, CLASSES.replace("1", "2"), "the label of 'a' is 2"),
    "label true": (ev.read_labels, CLASSES.replace("1", "true"), "the label of 'a' is True"),
}


@pytest.mark.parametrize("reader, text, expected", GOOD_FILES.values(), ids=GOOD_FILES)
def test_evaluation_files_are_read(tmp_path, reader, text, expected):
    (tmp_path / "file").write_bytes(text.encode())
    assert reader(tmp_path / "file") == expected


@pytest.mark.parametrize("reader, text, complaint", BAD_FILES.values(), ids=BAD_FILES)
def test_evaluation_files_are_refused(tmp_path, reader, text, complaint):
    file = tmp_path / "file"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"{file}.*{complaint}"):
        reader(file)


@pytest.mark.parametrize("reader, text, expected", GOOD_FILES.values(), ids=GOOD_FILES)
def test_damaged_files_are_read_or_refused(tmp_path, reader, text, expected):
    rng, file = random.Random(FUZZ_SEED), tmp_path / "file"
    values = re.findall(r'"[^"]*"|\d+|,', text) or ["a"]
    junk = ["null", "-1", "[]", "{}", "NaN", '"\\ud800"', "[" * 9000, '""']
    for _ in range(FUZZ_CASES):
        replaced = text.replace(rng.choice(values), rng.choice(junk))
        file.write_bytes(rng.choice([replaced.encode(), damage(text.encode(), rng)]))
        with contextlib.suppress(UserError):
            reader(file)


def test_fields_that_are_not_read_are_named(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("query,paraphrase,label\nq,p,false\n")
    (tmp_path / "b.csv").write_text("original,rewrite\nq,p\n")
    ev.read_pairs(tmp_path / "a.csv")
    assert len(ev.read_pairs(tmp_path / "b.csv")) == 2
    notes = capsys.readouterr().err
    assert "a.csv: fields that are not read: label" in notes
    assert "b.csv: its first row names no known field, so it is read as data" in notes
    (tmp_path / "c.json").write_text(KARPATHY)
    captions_of_test(tmp_path / "c.json")
    assert "c.json: only the captions of the split test are read" in capsys.readouterr().err


def test_texts_of_as_many_tokens_share_a_batch():
    batches = []

    class Model:
        def count_tokens(self, texts):
            return [text.count(" ") for text in texts]

        def encode_text(self, texts):
            batches.append(sorted(texts))
            return torch.tensor([[len(text), 1.0] for text in texts])

    # Those of fewer letters have more tokens.
    texts = ["a b", "tall", "c d", "wide"]
    features = ev.embed_texts(Model(), texts, ev.EvalConfig(batch_size=2))
    assert batches == [["tall", "wide"], ["a b", "c d"]]
    assert features[:, 0].tolist() == [3, 4, 3, 4]


def test_a_trec_run_becomes_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Not in the order of the ranks, which 10 and 2 would have as text.
    lines = ["t1 Q0 b.jpg 10 0.5 me", "t2 Q0 c.jpg 1 0.9 me", "t1 Q0 a.jpg 2 0.7 me"]
    (tmp_path / "run.trec").write_text("\n".join(lines) + "\n")
    page = (HERE / "docs/formats.md").read_text()
    snippet, = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
                if "run.trec" in block]
    exec(snippet, {"texts": {"t1": "a dog", "t2": "a cat"}})
    assert ev.read_lists("engine.jsonl") == {"a dog": ["a.jpg", "b.jpg"], "a cat": ["c.jpg"]}


def test_classes_come_from_folders(tmp_path):
    folder = write_images(tmp_path / "f", "10/a.PNG", "9/a.png", "9/.y.jpg", "stray.png",
                          ".hidden/a.png")
    _, names, labels, names_from = ev.read_classes(folder)
    # As numbers, where all folders are.
    assert (names, names_from) == (["9", "10"], "its folders")
    assert labels == {"9/a.png": 0, "10/a.PNG": 1}
    write_images(tmp_path / "f", "fire_truck/b.png")
    assert ev.read_classes(folder)[1] == ["10", "9", "fire truck"]
    (tmp_path / "f/empty").mkdir()
    with pytest.raises(UserError, match="'empty'"):
        ev.read_classes(folder)
    write_images(tmp_path / "splits", "train/cat/a.png", "test/cat/a.png")
    with pytest.raises(UserError, match="lies deeper: give the folder of one split"):
        ev.read_classes(str(tmp_path / "splits"))


@pytest.mark.parametrize("name_of", ["n{:08}", "{}"], ids=["WordNet", "numbers"])
def test_imagenet_has_torchvisions_names(tmp_path, name_of):
    for i in range(1000):
        (tmp_path / "val" / name_of.format(i)).mkdir(parents=True)
        (tmp_path / "val" / name_of.format(i) / "x.JPEG").touch()
    _, names, labels, names_from = ev.read_classes(f"imagenet:{tmp_path}")
    assert (names[0], names[-1], names_from) == ("tench", "toilet tissue", "torchvision")
    assert labels[f"{name_of.format(7)}/x.JPEG"] == 7


def test_a_folder_may_be_called_imagenet(tmp_path, monkeypatch):
    write_images(tmp_path / "imagenet", "cat/a.png", "val/b.png")
    monkeypatch.chdir(tmp_path)
    _, names, _, names_from = ev.read_classes("imagenet")
    assert (names, names_from) == (["cat", "val"], "its folders")


@pytest.mark.parametrize("folders, names, complaint", [
    (["n01440764", "n02084071"], "", "not ImageNet's 1000 and whose names are no words"),
    (["a", "b"], "crane\n", "expected 2 class names"), (["n01440764", "b"], "x\ny", ""),
    (["n01440764", "n02084071"], "n01440764\tx, z\nn02084071\ty\n", ""),
    (["n01440764", "n02084071"], "n02084071 y\nn01440764 x\n", "do not ascend")])
def test_class_names_must_be_words_and_different(tmp_path, folders, names, complaint):
    write_images(tmp_path / "f", *[f"{name}/a.png" for name in folders])
    cfg = ev.EvalConfig(zeroshot=str(tmp_path / "f"))
    if names:
        (tmp_path / "names.txt").write_text(names)
        cfg.classnames = str(tmp_path / "names.txt")
    with pytest.raises(UserError, match=complaint) if complaint else contextlib.nullcontext():
        assert ev.ZeroShot(cfg, None).classnames == ["x", "y"]


def test_a_class_folder_whose_name_is_no_utf_8(tmp_path):
    write_images(tmp_path, os.fsdecode(b"caf\xe9/a.png"))
    assert ev.read_classes(str(tmp_path))[1] == ["caf?"]


def test_classes_that_share_a_name_are_noted(tmp_path, capsys):
    write_images(tmp_path / "f", *[f"{name}/a.png" for name in ("Crane", "dog", "crane")])
    ev.ZeroShot(ev.EvalConfig(zeroshot=str(tmp_path / "f")), None)
    assert "2 classes share a name, such as 'Crane'" in capsys.readouterr().err


def test_vectors_of_a_similar_name_are_not_taken(tmp_path):
    folder = write_images(tmp_path / "f", "sub/1.png", "2.png")
    np.savez(tmp_path / "x.npz", names=["sub/1.png", "1.png", "2.png"], images=np.eye(3),
             texts=["a "], text_features=np.ones((1, 3)))
    model, gallery = ev.Vectors(str(tmp_path / "x.npz")), ev.list_gallery(folder)
    assert gallery.names == ["2.png", "sub/1.png"]
    assert model.encode_gallery(gallery)[1].tolist() == [[0, 0, 1], [1, 0, 0]]
    # White space around a text does not matter.
    assert len(model.encode_text(["a", "a "])) == 2


def test_vectors_may_lack_an_image_that_nobody_can_read(tmp_path, capsys):
    folder = write_images(tmp_path / "f", "1.png", "2.png")
    (tmp_path / "f/broken.png").write_bytes(b"broken")
    arrays = dict(names=["1.png", "2.png"], images=np.eye(2), texts=["a"])
    np.savez(tmp_path / "x.npz", **arrays, text_features=np.ones((1, 2)))
    model, gallery = ev.Vectors(str(tmp_path / "x.npz")), ev.list_gallery(folder)
    assert ev.embed_images(model, gallery, ev.EvalConfig()).names == ["1.png", "2.png"]
    assert "skipped 1 of 3 images: broken.png: " in capsys.readouterr().err
    write_images(tmp_path / "f", "3.png")
    with pytest.raises(UserError, match="no vectors for . of 4 images, such as '3.png'"):
        ev.embed_images(model, ev.list_gallery(folder), ev.EvalConfig())


def test_a_mistyped_folder_is_called_that(tmp_path):
    with pytest.raises(UserError, match="photoz: there is no such folder"):
        ev.list_gallery(str(tmp_path / "photoz"))


def test_classes_in_shards_of_clip_benchmark(tmp_path):
    members = [member for i in (2, 0, 1) for member in sample(i) + [(f"{i:05d}.cls", b"%d\n" % i)]]
    write_tar(tmp_path / "test/0.tar", members)
    (tmp_path / "classnames.txt").write_text("ant\nbee\n")
    with pytest.raises(UserError, match="00002.cls is 2, and classnames.txt has 2 names"):
        ev.read_classes(str(tmp_path))
    (tmp_path / "classnames.txt").write_text("ant\nbee\ncow\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}.\n")
    task = ev.ZeroShot(ev.EvalConfig(zeroshot=str(tmp_path)), None)
    assert task.labels == {"00000": 0, "00001": 1, "00002": 2} and task.templates == ["a {}."]
    assert task.classnames == ["ant", "bee", "cow"] and task.gallery.names[0] == "00002"
    # Of two shards with the same keys, the gallery would have one's image and the labels another's.
    write_tar(tmp_path / "test/1.tar", sample(0) + [("00000.cls", b"1\n")])
    with pytest.raises(UserError, match="00000.cls is in two shards"):
        ev.read_classes(str(tmp_path))


def test_cifar_is_torchvisions_test_set(tmp_path, monkeypatch):
    pixels = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
    dataset = Namespace(classes=["x", "y"], targets=[1, 0], data=pixels)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", lambda root, train: dataset)
    gallery, names, labels, names_from = ev.read_classes(f"cifar100:{tmp_path}")
    assert (names, names_from, labels) == (["x", "y"], "torchvision", {"test/0": 1, "test/1": 0})
    assert np.array_equal(ev.open_image(gallery.images["test/1"]), pixels[1])


# ---- evaluation: the whole program ---------------------------------------------------------------
MODEL_FILE = """
import torch
class Good:
    def preprocess(self, image): return torch.tensor(list(image.resize((4, 4)).tobytes())).float()
    def encode_image(self, batch): return batch[:, :3]
    def encode_text(self, texts): return [[len(t), t.count("a"), t.count("d")] for t in texts]
class TextOnly:
    encode_text = Good.encode_text
class OneBuffer(Good):
    buffer = torch.empty(99, 3)
    def encode_text(self, texts):
        rows = self.buffer[:len(texts)]
        rows[:] = torch.tensor(Good.encode_text(self, texts))
        return rows
class OneImage(Good):
    image = torch.empty(48)
    def preprocess(self, image): return self.image.copy_(Good.preprocess(self, image))
class Prompts(Good):
    def encode_text(self, texts):
        for i, text in enumerate(texts): texts[i] = "ddddddd " + text
        return Good.encode_text(self, texts)
class RandomCrop(Good):
    lefts = iter((3, 8, 0, 5, 2, 7, 1))
    def preprocess(self, image):
        left = next(self.lefts)
        return Good.preprocess(self, image.crop((left, 0, left + 30, 40)))
class OneFeature(Good):
    def encode_image(self, batch): return torch.ones(len(batch), 3)
class Dropout(Good):
    def encode_image(self, batch): return batch[:, :3] + 99 * torch.rand(len(batch), 3)
class BatchNorm(Good):
    norm = torch.nn.BatchNorm1d(3)
    def encode_image(self, batch): return self.norm(torch.cat([batch, 2 * batch])[:, :3])[::2]
class Unmasked(Good):
    def encode_text(self, texts):
        return [[len(t), max(map(len, texts)), t.count("d")] for t in texts]
class Complex(Good):
    def encode_text(self, texts): return torch.ones(len(texts), 3) * 1j
class Sparse(Good):
    def encode_text(self, texts): return torch.ones(len(texts), 3).to_sparse()
class Zero(Good):
    def encode_text(self, texts): return [[1e-20 * len(t), 0, 0] for t in texts]
class OtherWidth(Good):
    def encode_text(self, texts): return [[len(t), 1, t.count("a"), t.count("g")] for t in texts]
class AnySize(Good):
    def preprocess(self, image): return torch.zeros(image.size)
class NaN(Good):
    def encode_text(self, texts): return [[float("nan")] * 3 for t in texts]
class Fewer(Good):
    def encode_text(self, texts): return Good.encode_text(self, texts)[:4]
class NoVectors(Good):
    def encode_text(self, texts): return {"features": texts}
number = 1
"""
PAIRS = "--pairs triplets.json --images images --workers 0".split()
# The same images without the one that cannot be read.
READABLE = "--pairs triplets.json --images readable --workers 0".split()
ALL = ("--pairs triplets.json --triplets triplets.json --captions captions.json --sts sts.csv "
       "--templates templates.txt --images images --zeroshot classes --k 5 --workers 0").split()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, lm) -> Path:
    """A folder with models, and a small file of every kind that is measured on."""
    root = tmp_path_factory.mktemp("inputs")
    save_hugging_face_model(root / "clip", "CLIP", lm)
    save_hugging_face_model(root / "siglip", "Siglip", lm)
    (root / "lm").symlink_to(lm)
    (root / "mine.py").write_text(MODEL_FILE)
    names = [f"{i:02}.png" for i in range(14)]
    files = [f"images/{'sub/' * (i % 2)}{name}" for i, name in enumerate(names)]
    files += ["classes/big_cat/1.png", "classes/big_cat/2.png", "classes/dog/1.png"]
    write_images(root, *files)
    for seed, file in enumerate(files):
        (root / file).write_bytes(image_bytes(seed, (48, 40), "PNG"))
    shutil.copytree(root / "images", root / "readable")
    (root / "images/broken.jpg").write_bytes(b"\xff\xd8 no image")

    names.append("lost.png")
    triplets = [{"caption": sentence(i), "caption2": sentence(20 + i), "filename": name,
                 "negative_caption": sentence(40 + i)} for i, name in enumerate(names)]
    # More words than the models have positions, and several correct images.
    triplets[0]["caption"] = "red dog " * 9
    triplets[1]["images"] = names[1:4]
    (root / "triplets.json").write_text(json.dumps(triplets))
    images = [{"id": i, "file_name": name} for i, name in enumerate(names[5:])]
    captions = [{"image_id": i % 10, "caption": sentence(i)} for i in range(27)]
    (root / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    sts = [f"{sentence(i)},{sentence(20 + i)},{i % 6}" for i in range(12)]
    (root / "sts.csv").write_text("\n".join(sts))
    (root / "templates.txt").write_text("{}\nthe {}\n")
    return root


@pytest.fixture
def cd(inputs, monkeypatch):
    monkeypatch.chdir(inputs)


def evaluate(capsys, *argv) -> list[dict]:
    return last_json(capsys, ev, *argv)


def test_all_tasks_in_one_call(cd, capsys):
    report, = evaluate(capsys, "clip", *ALL)
    assert (report["k"], report["gallery"], report["pairs"]) == (5, 14, 15)
    assert report["recall_pairs"] == report["triplets"]["triplets.json"]["image_text_n"] == 14
    assert report["captions"] == {"images": 9, "captions": 25, "missing": 1}
    assert (report["zeroshot"]["classes"], report["zeroshot"]["images"]) == (2, 3)


def test_titles_name_no_k_that_differs():
    columns = [ev.Column(str(k), {("k",): k, ("ao",): 0.5}) for k in (8, 7)]
    for shown, title in ((columns, "AO@k"), (columns[1:], "AO@7")):
        (_, rows), = ev.table_of(shown)[1]
        assert title in [row[0] for row in rows]


def test_files_are_written_though_nobody_reads_the_print(cd, capsys, tmp_path, monkeypatch):
    def broken(columns):
        raise BrokenPipeError("Broken pipe")

    monkeypatch.setattr(ev, "print_table", broken)
    path = tmp_path / "report.json"
    assert "Broken pipe" in error_line(capsys, ev, "siglip", *READABLE, "--json", path)
    assert json.loads(path.read_text())[0]["pairs"] == 15


def test_an_image_with_two_names_is_not_missing(cd, capsys, tmp_path):
    rows = ["image,caption", "00.png,a dog", "images/00.png,a cat", "no.png,a cow"]
    (tmp_path / "c.csv").write_text("\n".join(rows))
    report, = evaluate(capsys, "siglip", "--captions", tmp_path / "c.csv", "--images", "images",
                       "--workers", 0)
    assert report["captions"] == {"images": 1, "captions": 2, "missing": 1}


@torch.no_grad()
def test_overlap_equals_the_librarys(cd, capsys):
    report, = evaluate(capsys, "siglip", *READABLE, "--k", 5, "--batch-size", 3)
    model = transformers.AutoModel.from_pretrained("siglip").eval()
    processor = transformers.AutoProcessor.from_pretrained("siglip")
    options = dict(max_length=12, truncation=True, padding="max_length",
                   return_attention_mask=False, return_tensors="pt")

    images = []
    for read in ev.list_gallery("readable").images.values():
        pixels = processor.image_processor(ev.open_image(read), return_tensors="pt")
        images.append(model.get_image_features(**pixels).pooler_output[0].double())
    images = F.normalize(torch.stack(images), dim=-1)
    overlaps = []
    for item in json.loads(Path("triplets.json").read_text()):
        ranked = []
        for text in (item["caption"], item["caption2"]):
            feature = model.get_text_features(**processor.tokenizer(text, **options))
            scores = images @ feature.pooler_output[0].double()
            ranked.append(scores.argsort(descending=True).tolist())
        for d in range(1, 6):
            overlaps.append(len(set(ranked[0][:d]) & set(ranked[1][:d])) / d)
    assert report["ao"] == pytest.approx(np.mean(overlaps))


def test_siglip_reads_lower_case(inputs):
    model = ev.HuggingFaceCLIP(str(inputs / "siglip"), "fp32").eval()
    tokenizer, read = model.tokenizer, []
    model.tokenizer = lambda texts, **options: read.extend(texts) or tokenizer(texts, **options)
    model.encode_text(["A Dog"])
    assert read == ["a dog"]


def own_cosine(model, inputs: dict) -> torch.Tensor:
    """The cosine of one text and one image by the library's own head."""
    kind = type(model).__name__
    if kind == "BlipForImageTextRetrieval":
        return model(**inputs, use_itm_head=False).itm_score
    if kind == "FlavaForPreTraining":
        output = model(**inputs, input_ids_masked=inputs["input_ids"], return_loss=False)
        return output.contrastive_logits_per_text / model.flava.logit_scale.exp()
    output = model(**inputs)
    return F.normalize(output.text_embeds, dim=-1) @ F.normalize(output.image_embeds, dim=-1).T


ROBERTA = dict(model_type="roberta", pad_token_id=0, type_vocab_size=1)
TWO_TOWERS = {
    "clip": dict(kind="CLIP"),
    "aimv2": dict(kind="Aimv2"),
    "blip": dict(kind="Blip", model="ForImageTextRetrieval"),
    "flava": dict(kind="Flava", model="ForPreTraining", hidden_size=32, projection_dim=16,
                  multimodal_config=NARROW),
    # Its first position is 1, behind that of padding.
    "roberta": dict(kind="VisionTextDualEncoder", text=ROBERTA, vision=dict(model_type="vit")),
}


@pytest.mark.parametrize("options", TWO_TOWERS.values(), ids=TWO_TOWERS)
@torch.no_grad()
def test_cosines_are_the_librarys_whatever_its_files_say(lm, tmp_path, options):
    model = save_hugging_face_model(tmp_path, lm=lm, processor="CLIP", **options)
    file = tmp_path / "tokenizer_config.json"
    misleading = {"padding_side": "left", "model_input_names": ["input_ids"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | misleading))
    ours = ev.open_model(str(tmp_path), ev.EvalConfig(device="cpu"))
    texts, image = ["a dog", "red cat " * 12, "a red square left of a cat"], decode(image_bytes(0))
    pixels = ours.preprocess(image)
    cosines = ours.encode_text(texts) @ ours.encode_image(ev.default_collate([pixels])).T

    if options["kind"] == "Aimv2":
        model.set_attn_implementation("eager")
    for text, cosine in zip(texts, cosines):
        tokens = ours.tokenizer(text, truncation=True, max_length=ours.max_length,
                                return_attention_mask=True, return_tensors="pt")
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")} | pixels
        torch.testing.assert_close(cosine[None], own_cosine(model, inputs), atol=1e-5, rtol=0)


def test_features_need_no_logit_scale(inputs, tmp_path):
    model = transformers.CLIPModel.from_pretrained(inputs / "clip")
    weights = model.state_dict()
    del weights["logit_scale"]
    shutil.copytree(inputs / "clip", tmp_path / "x")
    model.save_pretrained(tmp_path / "x", state_dict=weights)
    features = [ev.open_model(str(folder), ev.EvalConfig(device="cpu")).encode_text(["a dog"])
                for folder in (inputs / "clip", tmp_path / "x")]
    torch.testing.assert_close(*features, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def exported(inputs) -> dict:
    """The features of clip, also in vectors.npz."""
    model = ev.open_model(str(inputs / "clip"), ev.EvalConfig(device="cpu"))
    cfg = ev.EvalConfig(workers=0)
    images = ev.embed_images(model, ev.list_gallery(str(inputs / "readable")), cfg)
    texts = set()
    for item in json.loads((inputs / "triplets.json").read_text()):
        texts |= {item["caption"], item["caption2"], item["negative_caption"]}
    texts = sorted(texts)
    arrays = dict(names=np.array(images.names), images=images.features.numpy(),
                  texts=np.array(texts),
                  text_features=ev.embed_texts(model, texts, cfg).numpy())
    np.savez(inputs / "vectors.npz", **arrays)
    return arrays


def text_to_image(report: dict) -> dict:
    """What a report of pairs has in common with one of ranked lists."""
    common = {name: value for name, value in report.items() if not isinstance(value, dict)}
    for name in ("recall", "paraphrase_recall"):
        common[name] = report[name]["t2i@10"]
    return common | {"model": ""}


def test_vectors_give_their_models_numbers(exported, cd, capsys):
    clip, vectors = evaluate(capsys, "clip", "vectors.npz", *READABLE)
    assert text_to_image(vectors) == text_to_image(clip)


def test_details_give_their_models_numbers(cd, capsys, tmp_path):
    clip, = evaluate(capsys, "clip", *READABLE, "--details", tmp_path / "d.jsonl")
    lists, = evaluate(capsys, tmp_path / "d.jsonl", *READABLE)
    assert text_to_image(lists) == text_to_image(clip)


def test_details_hold_each_pairs_scores(cd, capsys, tmp_path):
    report, _ = evaluate(capsys, "clip", "siglip", *PAIRS, "--details", tmp_path / "d.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    # Each pair, and after it the one that its negative caption makes.
    assert [line["model"] for line in lines] == ["clip"] * 30 + ["siglip"] * 30
    assert np.mean([line["ao"] for line in lines[:30:2]]) == pytest.approx(report["ao"])
    assert np.mean([line["ao"] for line in lines[1:30:2]]) == pytest.approx(report["ao_changed"])
    assert lines[2]["images"] == ["02.png", "sub/01.png", "sub/03.png"]


def write_lists(path: Path, lists: dict):
    lines = [json.dumps({"text": text, "ranking": names}) for text, names in lists.items()]
    path.write_text("\n".join(lines))


def test_lists_leave_out_other_tasks(exported, cd, capsys, tmp_path):
    names = exported["names"].tolist()
    write_lists(tmp_path / "x.jsonl", {text: names[:5] for text in exported["texts"].tolist()})
    call(ev, tmp_path / "x.jsonl", *READABLE, "--k", 5, "--sts", "sts.csv")
    output = capsys.readouterr()
    report, = json.loads(output.out.splitlines()[-1])
    assert "sts" not in report and "--sts is left out" in output.err
    # Lists of five cannot tell recall@10.
    assert report["recall"].keys() == {"t2i@1", "t2i@5"}


def test_prompts_are_named_where_lists_come_first(exported, cd, capsys, tmp_path):
    write_lists(tmp_path / "x.jsonl", {text: exported["names"].tolist() for text in
                                       exported["texts"].tolist()})
    argv = [*READABLE, "--zeroshot", "classes", "--templates", "templates.txt"]
    lines = table_of(capsys, tmp_path / "x.jsonl", "clip", *argv)
    # What is said of class names and prompts does not need the first model.
    assert "zeroshot templates: 2 from templates.txt" in lines


def test_no_column_for_an_empty_difference(cd, capsys, monkeypatch):
    def nothing_in_common(task, model, images, cfg):
        return {(f"{model.is_siglip}",): ev.Scores(np.ones(2), np.arange(2))}
    monkeypatch.setattr(ev.STS, "measure", nothing_in_common)
    clip, siglip = evaluate(capsys, "clip", "siglip", "--sts", "sts.csv")
    assert "diff" not in siglip


@pytest.mark.parametrize("ranking, complaint", [
    pytest.param(None, "no list for 1 of", id="text without list"),
    pytest.param(range(9), "at least 10 images in every list, but that of 'short' has 9",
                 id="short"),
    pytest.param([*range(9), 99], "images of the gallery, none of them twice", id="unknown image"),
    pytest.param([*range(9), 0], "images of the gallery, none of them twice", id="image twice"),
])
def test_lists_that_do_not_fit(exported, cd, capsys, tmp_path, ranking, complaint):
    names = exported["names"].tolist()
    lists = {text: names for text in exported["texts"].tolist()}
    text, _ = lists.popitem()
    if ranking is not None:
        lists[text] = [names[i] if i < 14 else "nowhere.png" for i in ranking]
    write_lists(tmp_path / "x.jsonl", lists)
    message = error_line(capsys, ev, tmp_path / "x.jsonl", *READABLE)
    # The list that does not fit is named, and not just any.
    assert complaint.replace("'short'", repr(text)) in message and repr(text) in message


@pytest.mark.parametrize("changes, complaint", [
    (dict(names=None), "names is not"),
    (dict(images=np.ones((14, 3), np.float32)), "(45,) and (45, 512)"),
    (dict(names=np.array([b"a"] * 14)), "there are |S1"),
    (dict(texts=np.array([f"{i}" for i in range(45)])), "no vectors"),
    (dict(names=np.array(["a.png"] * 14)), "'a.png' has two different"),
    (dict(names=np.array([], "U9"), images=np.ones((0, 512), np.float32)), "there are <U")])
def test_vectors_that_do_not_fit(exported, cd, capsys, tmp_path, changes, complaint):
    arrays = {name: array for name, array in (exported | changes).items() if array is not None}
    np.savez(tmp_path / "x.npz", **arrays)
    assert complaint in error_line(capsys, ev, tmp_path / "x.npz", *READABLE)


def test_fresh_loader_workers_find_the_users_class(cd):
    model = ev.open_model("mine.py:Good", ev.EvalConfig(device="cpu"))
    # As on macOS, and from Python 3.14 on on Linux, too, a worker has no copy of this process's
    # modules.
    with ProcessPoolExecutor(1, mp_context=FORKSERVER) as pool:
        pixels = pool.submit(model.preprocess, Image.new("RGB", (9, 9))).result()
    assert len(pixels) == 4 * 4 * 3


def test_labels_of_no_image_are_refused(cd, capsys, tmp_path):
    (tmp_path / "labels.json").write_text('{"classnames": ["dog"], "labels": {"nowhere.png": 0}}')
    message = error_line(capsys, ev, "clip", *READABLE, "--zeroshot", tmp_path / "labels.json")
    assert "none of its images is there and readable" in message


def test_a_users_file_replaces_no_module(cd, capsys, tmp_path):
    (tmp_path / "data.py").write_text(MODEL_FILE)
    message = error_line(capsys, ev, f"{tmp_path}/data.py:Good", *PAIRS)
    assert "another module has its name" in message and sys.modules["data"] is data


INSERT = "import sys, pathlib\nsys.path.insert(0, str(pathlib.Path(__file__).parent / '{}'))"


@pytest.mark.parametrize("begin, place", [
    ("", "."), (INSERT.format("."), "."), (INSERT.format("src"), "src")])
def test_helpers_of_two_models_may_have_one_name(cd, capsys, tmp_path, begin, place):
    for folder, sign in (("first", 1), ("second", -1)):
        (tmp_path / folder / place).mkdir(parents=True)
        (tmp_path / folder / place / "helper.py").write_text(f"sign = {sign}")
        (tmp_path / folder / "own.py").write_text(begin + MODEL_FILE + """
from helper import sign
class Signed(Good):
    def encode_image(self, batch): return sign * batch[:, :3]
""")
    path = sys.path[:]
    first, second = evaluate(capsys, tmp_path / "first/own.py:Signed",
                             tmp_path / "second/own.py:Signed", *READABLE)
    assert first["paraphrase_recall"] != second["paraphrase_recall"]
    assert sys.path == path and "helper" not in sys.modules


def test_a_users_file_is_run_once_for_all_its_models(cd, capsys, tmp_path):
    (tmp_path / "own.py").write_text(
        f"open({str(tmp_path / 'runs')!r}, 'a').write('x')" + MODEL_FILE)
    evaluate(capsys, tmp_path / "own.py:Good", tmp_path / "own.py:OneBuffer", *READABLE)
    assert (tmp_path / "runs").read_text() == "x"


def test_installed_modules_are_not_forgotten(cd, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages/installed.py").touch()
    # A file that has an installed module's name, but is none.
    (tmp_path / "xmlrpc.txt").touch()
    begin = INSERT.format("site-packages") + "\nimport installed, xmlrpc.client"
    (tmp_path / "own.py").write_text(begin + MODEL_FILE)
    monkeypatch.delitem(sys.modules, "xmlrpc.client", raising=False)
    evaluate(capsys, tmp_path / "own.py:Good", *READABLE)
    assert sys.modules.keys() >= {"installed", "xmlrpc.client"} and "own" not in sys.modules
    del sys.modules["installed"]


def test_preprocess_may_have_weights(cd, capsys, tmp_path):
    (tmp_path / "own.py").write_text(MODEL_FILE + """
class Weighted(Good):
    weight = torch.nn.Parameter(torch.ones(1))
    def preprocess(self, image): return self.weight * Good.preprocess(self, image)
""")
    good, weighted = evaluate(capsys, "mine.py:Good", tmp_path / "own.py:Weighted", *READABLE)
    assert weighted["ao"] == good["ao"]


@pytest.mark.parametrize("name, complaint", [
    ("TextOnly", "the model has no preprocess()"),
    ("OtherWidth", "image features have 3 numbers, text features 4"),
    ("AnySize", "the same shape for every image"),
    ("NaN", "for 3 inputs, the shape is [3, 3]"),
    ("Zero", "not all of them 0"),
    ("Complex", "a vector of finite numbers"),
    ("Sparse", "as a tensor, array or list"),
    ("Fewer", "for 45 inputs, the shape is [4, 3]"),
    ("NoVectors", "as a tensor, array or list"),
    ("Dropout", "the unit vector of the same image moves"),
    ("BatchNorm", "the unit vector of the same image moves"),
    ("RandomCrop", "the unit vector of the same image moves"),
    ("OneFeature", "two different images the same features"),
    ("Unmasked", "the unit vector of the same text moves"),
    ("number", "no function or class 'number'"),
])
def test_a_class_that_does_not_fit(cd, capsys, name, complaint):
    assert complaint in error_line(capsys, ev, f"mine.py:{name}", *PAIRS)


def test_texts_need_no_image_tower(cd, capsys):
    report, = evaluate(capsys, "mine.py:TextOnly", "--sts", "sts.csv", "--triplets",
                       "triplets.json")
    assert report["sts"]["n"] == 12 and "image_text" not in report["triplets"]["triplets.json"]


@pytest.mark.parametrize("name", ["OneBuffer", "OneImage"])
def test_what_a_model_keeps_in_one_buffer_is_copied(cd, capsys, name):
    argv = [*READABLE, "--batch-size", 4]
    good, buffer = evaluate(capsys, "mine.py:Good", f"mine.py:{name}", *argv)
    assert 0 < good["ao"] < 1
    assert buffer["ao"] == good["ao"] and buffer["diff"]["ao_ci"] == [0, 0]


def test_a_model_may_write_its_prompts_into_the_list(cd, capsys):
    report, = evaluate(capsys, "mine.py:Prompts", *PAIRS)
    assert report["pairs"] == 15


def without_vision(folder: Path):
    model = transformers.CLIPModel.from_pretrained("clip")
    weights = {key: value for key, value in model.state_dict().items() if "vision" not in key}
    model.save_pretrained(folder, state_dict=weights)


def without_tokenizer(folder: Path):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def with_foreign_code(folder: Path):
    code = {"AutoConfig": "code.C", "AutoModel": "code.M"}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": code}))
    (folder / "code.py").write_text("open('ran', 'w')")


def with_large_vocabulary(folder: Path):
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"[SEP]"', '"[NEW]"', 1).replace(
        '"vocab":{', '"vocab":{"[SEP]":99,').replace('"vocab": {', '"vocab": {"[SEP]": 99,'))


def of_sentence_transformers(folder: Path):
    (folder / "config.json").unlink()
    (folder / "modules.json").write_text("[]")


def of_open_clip(folder: Path):
    (folder / "config.json").rename(folder / "open_clip_config.json")


def with_sentencepiece(folder: Path):
    without_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    (folder / "spiece.model").touch()


def without_image_vector(folder: Path):
    save_hugging_face_model(folder, "Siglip", "lm", vision=dict(vision_use_head=False))


def with_one_tower(folder: Path):
    transformers.BertModel.from_pretrained("lm").save_pretrained(folder)


@pytest.mark.parametrize("change, complaint", [
    (without_vision, "weights are missing"),
    (without_tokenizer, "tokenizer"), (with_foreign_code, "x: expected a checkpoint"),
    (with_large_vocabulary, "its tokenizer has"),
    (of_sentence_transformers, "sentence_transformer_model.py reads this folder"),
    (of_open_clip, "open_clip_model.py reads this folder"),
    (with_sentencepiece, "needs the package sentencepiece"),
    (without_image_vector, "SiglipModel has no single vector"),
    (with_one_tower, "FILE.py:NAME for any other model (AttributeError: 'BertModel'")])
def test_hugging_face_models_are_refused(cd, capsys, monkeypatch, tmp_path, change, complaint):
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    change(shutil.copytree("clip", tmp_path / "x"))
    assert complaint in error_line(capsys, ev, tmp_path / "x", *READABLE)
    assert not Path("ran").exists()


def test_a_pair_counts_once_in_each_subset(cd, capsys, tmp_path):
    items = json.loads(Path("triplets.json").read_text())
    for item in items:
        item["kind"] = "x"
    # Two pairs stand in both files, one twice in a file.
    (tmp_path / "a.json").write_text(json.dumps(items[:8] + items[:1]))
    (tmp_path / "b.json").write_text(json.dumps(items[6:]))
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    report, = evaluate(capsys, "clip", *PAIRS[2:], "--pairs", *files)
    assert (report["pairs"], report["kinds"]["x"]["pairs"]) == (15, 15)
    assert [report["files"][name]["pairs"] for name in ("a.json", "b.json")] == [8, 9]
    # Each negative caption is a pair that changes the meaning.
    assert report["contrast_pairs"] == report["changed"]["x"]["contrast_pairs"] == 15


def test_pairs_of_one_group_resample_together(cd, capsys, tmp_path):
    items = json.loads(Path("triplets.json").read_text())
    for i, item in enumerate(items):
        item["group"] = i // 8
    (tmp_path / "two.json").write_text(json.dumps(items))
    (tmp_path / "one.json").write_text(json.dumps([item | {"group": 0} for item in items]))
    argv = ["clip", *PAIRS[2:], "--pairs"]
    report, = evaluate(capsys, *argv, tmp_path / "two.json")
    evaluate(capsys, *argv, tmp_path / "two.json", "--details", tmp_path / "d.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    ao = [line["ao"] for line in lines if line["same"]]
    groups = [np.mean(ao[:8]), np.mean(ao[8:])]
    # Of two groups, some resample holds each alone.
    assert report["ao_ci"] == pytest.approx(sorted(groups)) and report["groups"] == 2
    # A single group has no interval, in any metric or direction.
    report, = evaluate(capsys, *argv, tmp_path / "one.json")
    assert "_ci" not in json.dumps(report) and report["groups"] == 1


@pytest.fixture
def benchmark(tmp_path) -> Path:
    """Two kinds of pairs; "a" stands first, "Z" first in the alphabet."""
    names = [f"{i:02}" for i in range(8)]
    members = [(f"{name}.jpg", image_bytes(i)) for i, name in enumerate(names)]
    write_tar(tmp_path / "bench/val/0.tar", members)
    pairs = []
    for i, name in enumerate(names):
        pairs.append({"query": sentence(i), "paraphrase": sentence(i + 20), "image": name,
                      "kind": "a" if i < 3 else "Z"})
    (tmp_path / "bench/val/pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return tmp_path / "bench"


def test_the_top_level_is_all_pairs(cd, capsys, benchmark):
    split = ["--split", "val", "--workers", 0]
    report, = evaluate(capsys, "clip", "--benchmark", benchmark, *split)
    assert (report["pairs"], report["split"]) == (8, "val")
    # In the order of the file.
    assert [part["pairs"] for part in report["kinds"].values()] == [3, 5]
    parts = [part["ao"] * part["pairs"] for part in report["kinds"].values()]
    assert report["ao"] == pytest.approx(sum(parts) / 8)
    lines = table_of(capsys, "clip", "--benchmark", benchmark, *split)
    assert lines.index("kinds a") < lines.index("kinds Z") < lines.index("all pairs")


def test_benchmark_may_have_classes_and_captions(cd, capsys, benchmark):
    (benchmark / "val/zeroshot.json").write_text(
        '{"classnames": ["dog", "cat"], "labels": {"00": 1, "03": 0, "lost": 1}}')
    (benchmark / "val/captions.json").write_text(COCO.replace('"a"', '"02"'))
    report, = evaluate(capsys, "clip", "--benchmark", benchmark, "--split", "val", "--workers", 0)
    assert report["zeroshot"]["images"] == 2 and report["recall"]["t2i@1"] == 1
    assert "query_recall" in report


def test_what_is_left_out_is_said(cd, capsys):
    call(ev, "clip", *PAIRS)
    errors = capsys.readouterr().err
    assert "1 of 15 named images are missing or ambiguous, such as lost.png" in errors
    assert "skipped 1 of 15 images: broken.jpg: " in errors


def test_models_on_other_images_are_uncompared(cd, capsys, tmp_path):
    # Lists name all images, also the one that clip cannot read.
    items = json.loads(Path("triplets.json").read_text())
    names = ev.list_gallery("images").names
    write_lists(tmp_path / "x.jsonl", {
        item[field]: names for item in items
        for field in ("caption", "caption2", "negative_caption")})
    call(ev, "clip", tmp_path / "x.jsonl", *PAIRS)
    output = capsys.readouterr()
    assert "have different images of the gallery" in output.err
    assert "diff" not in json.loads(output.out.splitlines()[-1])[1]


def table_of(capsys, *argv) -> list[str]:
    """The lines that a call prints, without the JSON."""
    capsys.readouterr()
    call(ev, *argv)
    return capsys.readouterr().out.splitlines()[:-1]


def test_tables_fit_100_columns(cd, capsys):
    lines = table_of(capsys, "clip", "siglip", "mine.py:Good", *ALL)
    assert max(len(line) for line in lines) <= 100
    # Five columns make two blocks.
    assert sum(line.startswith("AO@5 minus unrelated") for line in lines) == 2


def test_a_difference_beyond_its_interval_is_marked():
    estimates = {"+10.0 ±7.5≠": ev.Estimate(0.1, (0.05, 0.2), 50),
                 "+10.0 ±10.0 ": ev.Estimate(0.1, (0, 0.2), 50),
                 "-10.0 ±7.5≠": ev.Estimate(-0.1, (-0.2, -0.05), 50),
                 "-10.0 ±7.5*": ev.Estimate(-0.1, (-0.2, -0.05), 9)}
    column = ev.Column("x", estimates, is_difference=True)
    assert [column.cell(name) for name in estimates] == list(estimates)
    few = {1: ev.Estimate(0.5, None, 1), 9: ev.Estimate(0.5, (0.4, 0.6), 9)}
    assert [ev.Column("x", few).cell(name) for name in few] == ["50.0*", "50.0 ±10.0*"]


def test_any_model_may_be_the_baseline(cd, capsys):
    clip, siglip = evaluate(capsys, "clip", "siglip", *PAIRS, "--baseline", "siglip")
    assert clip["diff"]["ao"] == pytest.approx(clip["ao"] - siglip["ao"]) and "diff" not in siglip


def test_a_failure_costs_no_other_models_numbers(cd, capsys):
    argv = ["mine.py:Good", "mine.py:NaN", "nowhere", "siglip", *PAIRS]
    with pytest.raises(SystemExit):
        call(ev, *argv, "--details", "d.jsonl")
    output = capsys.readouterr()
    reports = json.loads(output.out.splitlines()[-1])
    assert [report["model"] for report in reports] == ["mine.py:Good", "siglip"]
    assert "error: mine.py:NaN: " in output.err and "nowhere: expected" in output.err
    assert len(Path("d.jsonl").read_text().splitlines()) == 2 * 30


@pytest.mark.parametrize("output", [
    "./triplets.json", "link.json", "mine.py", "images/new.png", "clip/model.safetensors",
    "images/sub/01.png"])
def test_no_output_overwrites_an_input(cd, capsys, output):
    if not os.path.lexists("link.json"):
        os.symlink("triplets.json", "link.json")
    before = Path("triplets.json").read_bytes()
    message = error_line(capsys, ev, "clip", "mine.py:Good", *PAIRS, "--json", output)
    assert "another flag names" in message and Path("triplets.json").read_bytes() == before


@pytest.mark.parametrize("models, labels", [
    (["runs/x/a-0/model.pt", "runs/x/b-0"], ["a-0", "b-0"]),
    (["a/model-00020.pt", "b/model-00020.pt"], ["a/model-00020.pt", "b/model-00020.pt"]),
], ids=["run folders", "same file name"])
def test_labels_are_short_and_different(models, labels):
    assert ev.short_names(models) == labels


@pytest.mark.parametrize("flag", ["json", "details", "figure", "report"])
def test_outputs_onto_no_plain_file(cd, capsys, tmp_path, flag):
    os.mkfifo(tmp_path / "pipe")
    message = error_line(capsys, ev, "clip", *PAIRS, f"--{flag}", tmp_path / "pipe")
    assert "no regular file" in message


def test_a_full_disk_costs_no_table(cd, capsys, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device", path)
    monkeypatch.setattr(ev, "atomic_write", full)
    with pytest.raises(SystemExit):
        call(ev, "clip", *PAIRS, "--json", "x.json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[0]["pairs"] == 15


def test_half_a_surrogate_in_a_query(cd, capsys):
    # As it arrives from a shell, where the bytes are no UTF-8.
    argv = ["clip", "--images", "readable", "--workers", 0, "--paraphrase", "a cat", "--query"]
    broken = evaluate(capsys, *argv, "a dog \udce9")
    assert broken == evaluate(capsys, *argv, "a dog ?")
    # Nor do spaces make another text of it, which vectors or lists would lack.
    (_, pair), = ev.given_pairs(ev.EvalConfig(query=["a dog "], paraphrase=[" a cat"]))
    assert pair == ev.Pair("a dog", "a cat")


def test_files_hold_what_is_printed(cd, capsys, tmp_path):
    files = dict(json=tmp_path / "x.json", figure=tmp_path / "x.png", report=tmp_path / "x.html")
    reports = evaluate(capsys, "clip", "siglip", *PAIRS, *flags(**files))
    assert json.loads(files["json"].read_text()) == reports
    assert Image.open(files["figure"]).width == 1280
    page = files["report"].read_text()
    assert page.count("<article") == 30 and f"{100 * reports[1]['ao']:.1f} ±" in page


@pytest.mark.parametrize("arguments, complaint", [
    ("", "run `python paraclip.py` first"),
    ("none.py:f --sts sts.csv", "no such file"),
    ("mine.py --sts sts.csv", "FILE.py:NAME"),
    ("clip --captions captions.json --images classes", "none of the 10 named"),
    ("clip --pairs triplets.json", "--pairs needs --images"),
    ("clip --sts sts.csv --figure x.png", "show pairs: give --pairs"),
    ("clip --benchmark nowhere", "there is no folder"),
    ("clip --images images --query dog", "belong together"),
    ("clip --images images", "say what for"),
    ("clip --sts sts.csv --benchmark emoji", "leave out --sts"),
    ("clip --sts sts.csv --templates templates.txt", "belong to --zeroshot"),
    ("clip --images images --query= --paraphrase=", "a text each"),
    ("clip --pairs triplets.json --images images --json triplets.json", "another flag"),
    ("clip --pairs triplets.json --images images --json no/x", "its folder is missing"),
    ("clip --pairs triplets.json --images images --figure x.jpg", "ends in .png"),
    ("clip clip --sts sts.csv", "give each model once"),
    ("clip siglip --sts sts.csv --labels one", "2 models are called ['one']"),
    ("clip --sts sts.csv --device nothing", "--device nothing"),
    ("clip --sts sts.csv --baseline other", "expected one of ['clip']"),
    ("sts.csv --sts sts.csv", "expected a checkpoint, a run folder, FILE.npz, FILE.jsonl"),
    ("clip --pairs triplets.json --images images --json x --details ./x", "another flag"),
])
def test_mistakes_end_in_one_line(cd, capsys, arguments, complaint):
    assert complaint in error_line(capsys, ev, *arguments.split())
