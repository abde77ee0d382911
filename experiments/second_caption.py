"""A second positive for each image: another caption of the same image.

    python -m experiments.second_caption --data shards/flickr8k/train --text finetune

Captions of one image are paraphrases of a kind, so they can teach a text tower what a pretrained
language model knows already (ParaCLIP, arXiv 2402.15120, and LaCLIP, arXiv 2305.20088, train on
generated ones). All flags are paraclip.py's.
"""

import random

import paraclip
from common.cli import UserError, run
from paraclip import Config, Contrastive, contrastive_loss


class SecondCaption(Contrastive):
    """The mean of three contrastive losses: image against first caption, image against second
    caption, first against second."""

    def __init__(self, cfg, model, index, tokenize):
        self.seed = cfg.seed

    def captions(self, samples) -> list[str]:
        captions = []
        for sample in samples:
            others = [other for other in sample.captions if other != sample.caption]
            if not others:
                raise UserError(f"'{sample.caption}' is the only caption of its image: expected "
                                "two or more")
            rng = random.Random(f"second {self.seed} {sample.epoch} {sample.number}")
            captions += [sample.caption, rng.choice(others)]
        return captions

    def loss(self, image_features, text_features, logit_scale, targets):
        first, second = text_features[::2], text_features[1::2]  # (B, E) each
        loss, accuracy = contrastive_loss(image_features, first, logit_scale)
        image_second, _ = contrastive_loss(image_features, second, logit_scale)
        first_second, _ = contrastive_loss(first, second, logit_scale)
        return (loss + image_second + first_second) / 3, accuracy


if __name__ == "__main__":
    run(lambda: paraclip.main(None, Config, SecondCaption))
