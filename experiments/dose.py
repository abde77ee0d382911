"""One training for every dose of the alignment layers, from the frozen states to the aligned ones.

    python -m experiments.dose --data shards/flickr8k/train --out runs/dose   # flags of paraclip.py
    DOSE=0.5 DOSE_RUN=runs/dose \\
        python eval_paraphrase.py experiments/dose.py:at_dose --benchmark flickr8k

The residual branches of the alignment layers are scaled by a dose between 0 and 1: at 0 the text
tower pools the frozen language model's states, at 1 it is --text align. In training each caption
draws its dose, so that one projection serves them all. A resumed run draws other doses than an
uninterrupted one. Tables: docs/experiments.md.
"""

import os

import torch

import paraclip
from common.cli import UserError, run
from paraclip import Config, Contrastive, load_model


class Dose(Contrastive):
    """The contrastive loss; each caption with a dose of its own, drawn evenly from [0, 1]."""

    def __init__(self, cfg, model, index, tokenize):
        if cfg.text != "align" or cfg.accum > 1:
            raise UserError("expected --text align, whose layers have doses, and no --accum, whose "
                            "second pass would draw others")
        set_dose(model, lambda B: torch.rand(B, 1, 1, device=model.logit_scale.device))


def set_dose(model, dose):
    """Scales the branches of all alignment layers. dose: the number of captions -> (B, 1, 1)."""
    tower = model.text_tower

    def draw(block, inputs):
        tower.dose = dose(len(inputs[0]))

    tower.align[0].register_forward_pre_hook(draw)
    for block in tower.align:
        for branch in (block.proj, block.fc2):
            branch.register_forward_hook(lambda layer, inputs, output: tower.dose * output)


def at_dose():
    """The model of $DOSE_RUN at the dose $DOSE, for eval_paraphrase.py."""
    model, dose = load_model(os.environ["DOSE_RUN"]), float(os.environ["DOSE"])
    set_dose(model, lambda B: torch.full((B, 1, 1), dose))
    return model


if __name__ == "__main__":
    run(lambda: paraclip.main(None, Config, Dose))
