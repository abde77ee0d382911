"""An open_clip model for eval_paraphrase.py; needs `pip install open_clip_torch`:

    OPEN_CLIP_MODEL=ViT-B-32 OPEN_CLIP_PRETRAINED=laion400m_e32 \\
        python eval_paraphrase.py experiments/open_clip_model.py:OpenCLIP --pairs ... --images ...

OPEN_CLIP_MODEL is what open_clip.create_model_and_transforms takes: a name (ViT-B-32),
hf-hub:USER/NAME, or local-dir:FOLDER. OPEN_CLIP_PRETRAINED is a tag (laion400m_e32) or the path of
a checkpoint of your own; hf-hub: and local-dir: bring their weights along and need none.
"""

import os

import open_clip
import torch


class OpenCLIP:
    def __init__(self):
        name = os.environ["OPEN_CLIP_MODEL"]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(
            name, pretrained=os.environ.get("OPEN_CLIP_PRETRAINED"), device=self.device)
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)

    def encode_image(self, images):
        return self.model.encode_image(images.to(self.device), normalize=True)

    def encode_text(self, texts):
        return self.model.encode_text(self.tokenizer(texts).to(self.device), normalize=True)
