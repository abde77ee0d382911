"""paraclip.py with a second positive for each image: another caption of the same image.

    python -m experiments.second_caption --data shards/flickr8k/train --text finetune

Captions of one image are paraphrases of a kind, so they can teach a text tower what a pretrained
language model knows already (ParaCLIP, arXiv 2402.15120, and LaCLIP, arXiv 2305.20088, train on
generated ones). The loss is the mean of three contrastive losses: image against first caption,
image against second caption, first against second caption. All else is paraclip.py's: its flags
(except --accum), its run folder, how it resumes. With --geometry, its term is the mean of those of
the first and of the second captions.
"""

import random

import data
import paraclip
from data import UserError, parse_config, run

# The originals of what main() replaces in data.py and paraclip.py.
collate_one_caption = data.collate
contrastive_loss = paraclip.contrastive_loss
geometry_loss = paraclip.geometry_loss
open_plain_index = paraclip.open_index


def second_captions(samples: list) -> list[str]:
    """For each sample of data.TrainingSet another caption of its image, drawn at random."""
    # Seeded by the first captions: the same on every run, another draw in every epoch.
    rng = random.Random(repr([caption for _, caption, _, _ in samples]))
    drawn = []
    for _, caption, captions_of_image, _ in samples:
        others = [other for other in captions_of_image if other != caption]
        if not others:
            raise UserError(f"'{caption}' is the only caption of its image: expected two or more")
        drawn.append(rng.choice(others))
    return drawn


def collate_two_captions(samples: list, accum: int, tokenize, with_all_captions: bool):
    """As data.collate, for one micro-batch of b images, but its token batches have 2b rows: the
    first captions, then the second ones."""
    # Sorted as data.collate sorts, whose own stable sort then changes nothing: the second captions
    # must be in the order of its images.
    samples = sorted(samples, key=lambda sample: len(sample[1]))
    batch = collate_one_caption(samples, accum, tokenize, with_all_captions)
    [(images, token_batches)], all_captions, replaced = batch
    # Not sorted by their own lengths, so these batches have more padding.
    token_batches = token_batches + data.tokenize_groups(second_captions(samples), tokenize)
    return [(images, token_batches)], all_captions, replaced


def loss_of_two_captions(image_features, text_features, logit_scale):
    """image_features (B, E), text_features (2B, E) -> the mean of the three losses, and how often
    an image's first caption scores highest."""
    first, second = text_features.chunk(2)
    loss, accuracy = contrastive_loss(image_features, first, logit_scale)
    image_second, _ = contrastive_loss(image_features, second, logit_scale)
    first_second, _ = contrastive_loss(first, second, logit_scale)
    return (loss + image_second + first_second) / 3, accuracy


def geometry_loss_of_two_captions(image_features, text_features, lm_features):
    """image_features (B, E), text_features (2B, E), lm_features (B, W) -> the mean of the terms."""
    first, second = text_features.chunk(2)
    return (geometry_loss(image_features, first, lm_features)
            + geometry_loss(image_features, second, lm_features)) / 2


def open_marked_index(cfg):
    """The index, with a fingerprint of its own: paraclip.py refuses to resume such a run with one
    caption, and this program one that was begun with one."""
    index = open_plain_index(cfg)
    index.fingerprint += ", second captions"
    return index


def main(argv=None):
    cfg = parse_config(paraclip.Config, argv, paraclip.RECIPES)
    if cfg.accum > 1:
        raise UserError("a second caption is trained without --accum")
    data.collate = collate_two_captions
    paraclip.contrastive_loss = loss_of_two_captions
    paraclip.geometry_loss = geometry_loss_of_two_captions
    paraclip.open_index = open_marked_index
    paraclip.main(argv)


if __name__ == "__main__":
    run(main)
