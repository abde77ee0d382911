"""Prints every shape from pixels and tokens to logits_per_image, for four emoji scenes and an
untrained model with the default settings.

    python -m demo.shapes
"""

import functools
import re

import torch

from common.cli import run
from data import ShardIndex, TrainingSet
from demo.emoji_scenes import emoji_folder


def show(name: str, kind: str, tensor):
    print(f"{name:28}{kind:14}{tuple(tensor.shape)}")


def show_output(name: str, module, inputs, output):
    """A forward hook. It is called when a module ends, so that parts stand above their whole."""
    # A language model returns an object in which the states of its last layer have this name.
    show(name, type(module).__name__, getattr(output, "last_hidden_state", output))


@torch.no_grad()
def main():
    # Here, since demo/ lies below paraclip.py; a program may look at all of the house from outside.
    from paraclip import Config, ParaCLIP

    cfg = Config(precision="fp32")
    model = ParaCLIP(cfg)
    for name, module in model.named_modules():
        # Not what is inside the language model, nor inside the second and later blocks.
        if name and not re.search(r"\.lm\.|\.blocks\.[1-9]\d*\.", name):
            module.register_forward_hook(functools.partial(show_output, name))

    scenes = TrainingSet(ShardIndex(str(emoji_folder() / "train")), cfg.image_size, cfg.crop,
                         cfg.flip, cfg.seed)
    samples = [scenes[0, i] for i in range(4)]
    images = torch.stack([sample.image for sample in samples])
    tokens = model.tokenize([sample.caption for sample in samples])
    for sample in samples:
        print(sample.caption)
    show("images", "", images)
    image_features = model.encode_image(images)
    show("image_features", "unit length", image_features)
    for name, tensor in tokens.items():
        show(name, "", tensor)
    text_features = model.encode_text([tokens])
    show("text_features", "unit length", text_features)
    show("logits_per_image", "", model.logit_scale.exp() * image_features @ text_features.T)


if __name__ == "__main__":
    run(main)
