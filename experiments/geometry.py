"""A term beyond the paper: both towers keep the neighbourhoods of the frozen language model.

    python -m experiments.geometry --weight 2       # and any flag of paraclip.py
    torchrun --nproc_per_node 8 -m experiments.geometry --recipe cc12m --data 'mine/*.tar'

Alignment layers find more images than a plain frozen model, and forget while they train which words
mean the same. This term reminds both towers: images whose captions mean about the same, all
captions of an image taken together, should end up close. Tables: docs/experiments.md.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from tqdm import tqdm

import paraclip
from common.cli import UserError, flag, run
from common.distributed import rank_and_world_size
from data import BadSample
from paraclip import Config, Contrastive, all_gather_with_grad, masked_mean, run_name

TAU = 0.1  # temperature of the neighbourhoods
TARGET_BYTES = 2 << 30  # memory for the targets, on each rank


@dataclass
class GeometryConfig(Config):
    weight: float = flag(2.0, "weight of geometry_loss beside the contrastive loss", low=0)
    text_term: bool = flag(True, "ask texts for their neighbourhoods among each other, too")

    def __post_init__(self):
        if self.text in ("scratch", "finetune"):
            raise UserError(f"--text {self.text} trains the language model: expected --text align "
                            "or frozen, whose neighbourhoods stay")
        self.out = self.out or f"runs/{run_name(self.data)}-geometry"
        super().__post_init__()


class Geometry(Contrastive):
    """The contrastive loss plus --weight times geometry_loss."""

    def __init__(self, cfg, model, index, tokenize):
        self.weight, self.text_term = cfg.weight, cfg.text_term
        self.centroids = caption_centroids(model, index, tokenize)

    def targets(self, samples):
        return self.centroids[[sample.number for sample in samples]]  # (B, W)

    def loss(self, image_features, text_features, logit_scale, targets):
        loss, accuracy = super().loss(image_features, text_features, logit_scale, targets)
        lm_features = targets.to(image_features.device)
        term = geometry_loss(image_features, text_features, lm_features, self.text_term)
        return loss + self.weight * term, accuracy


@torch.no_grad()
def caption_centroids(model, index, tokenize) -> torch.Tensor:
    """For each sample the mean, over all captions of its image, of the language model's own
    features, which are the normalised means of its token states: (len(index), W), unit vectors.

    Computed once before training. Raises UserError if they need more than TARGET_BYTES.
    """
    width, device = model.text_tower.width, model.logit_scale.device
    size = 4 * len(index) * width
    if size > TARGET_BYTES:
        raise UserError(f"the targets of {len(index):,} samples need {size / 2**30:.0f} GiB, and "
                        f"{TARGET_BYTES >> 30} are allowed: train on fewer samples")
    sums = torch.zeros(len(index), width)
    for first in tqdm(range(0, len(index), 64), "targets", disable=None, leave=False):
        captions, numbers = [], []
        for number in range(first, min(first + 64, len(index))):
            try:
                new = index.captions(number)
            except BadSample as reason:
                raise UserError(f"sample {number} gets no target: {reason}") from None
            captions += new
            numbers += [number] * len(new)
        tokens = {name: tensor.to(device) for name, tensor in tokenize(captions).items()}
        with model.autocast():
            states = model.text_tower.lm_states(tokens)
        features = F.normalize(masked_mean(states.float(), tokens["attention_mask"]), dim=-1)
        sums.index_add_(0, torch.tensor(numbers), features.cpu())
    return F.normalize(sums, dim=-1)


def geometry_loss(image_features, text_features, lm_features, text_term: bool = True):
    """Asks both towers for the neighbourhoods of the frozen language model.

    lm_features (B, W) are constants, see caption_centroids; the others, (B, E), are trained. Each
    row of a similarity matrix, without its diagonal, is a softmax over neighbours at temperature
    TAU. The loss is half of KL(lm-lm || image-text) + half of KL(lm-lm || text-image) (compare
    CWCL, arXiv 2309.14580) and, with text_term, + KL(lm-lm || text-text) (relational distillation,
    compare arXiv 2506.16895), each the mean over rows. Over ranks it is exact as contrastive_loss
    is.
    """
    target = neighbour_log_probabilities(lm_features, lm_features)

    def divergence(queries, keys):
        predicted = neighbour_log_probabilities(queries, keys)
        return F.kl_div(predicted, target, reduction="batchmean", log_target=True)

    image_text = divergence(image_features, text_features)
    text_image = divergence(text_features, image_features)
    loss = (image_text + text_image) / 2
    if text_term:
        loss = loss + divergence(text_features, text_features)
    return loss


def neighbour_log_probabilities(queries, keys):
    """Log softmax of each query over all ranks' keys except the one of the same pair: (B, N)."""
    scores = queries @ all_gather_with_grad(keys).T / TAU
    B = len(queries)
    rank, _ = rank_and_world_size()
    rows = torch.arange(B, device=scores.device)
    same_pair = torch.zeros_like(scores, dtype=torch.bool)
    same_pair[rows, rows + rank * B] = True
    return scores.masked_fill(same_pair, -1e9).log_softmax(1)


if __name__ == "__main__":
    run(lambda: paraclip.main(None, GeometryConfig, Geometry))
