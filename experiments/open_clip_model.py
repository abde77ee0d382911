"""An open_clip model for eval_paraphrase.py; needs `pip install open_clip_torch`:

    OPEN_CLIP_MODEL=ViT-B-32-quickgelu OPEN_CLIP_PRETRAINED=laion400m_e32 \\
        python eval_paraphrase.py experiments/open_clip_model.py:OpenCLIP --pairs ... --images ...

OPEN_CLIP_MODEL is what open_clip.create_model_and_transforms takes: a name (ViT-B-32),
hf-hub:USER/NAME, or local-dir:FOLDER. OPEN_CLIP_PRETRAINED is a tag (laion400m_e32) or the path of
a checkpoint of your own; hf-hub: and local-dir: bring their weights along and need none. Take
the name with the activation of the weights (laion400m's is QuickGELU): open_clip only warns.
"""

import os

import open_clip
import torch

from common.cli import UserError


class OpenCLIP:
    def __init__(self):
        name, pretrained = os.environ.get("OPEN_CLIP_MODEL"), os.environ.get("OPEN_CLIP_PRETRAINED")
        if not name:
            raise UserError("OPEN_CLIP_MODEL is not set: expected a model of open_clip")
        if not pretrained and not name.startswith(("hf-hub:", "local-dir:")):
            raise UserError(f"OPEN_CLIP_PRETRAINED is not set: {name} would have random weights; "
                            f"its tags: {open_clip.list_pretrained_tags_by_model(name)}")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, device=self.device)
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)

    def encode_image(self, images):
        return self.model.encode_image(images.to(self.device), normalize=True)

    def encode_text(self, texts):
        return self.model.encode_text(self.tokenizer(texts).to(self.device), normalize=True)
