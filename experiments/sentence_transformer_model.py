"""A sentence-transformers model with images and texts, such as clip-ViT-B-32:

    SENTENCE_TRANSFORMER=clip-ViT-B-32 \\
        python eval_paraphrase.py experiments/sentence_transformer_model.py:Model --pairs ...

SENTENCE_TRANSFORMER is a name or a folder.
"""

import os

from sentence_transformers import SentenceTransformer

from common.cli import UserError


class Model:
    def __init__(self):
        name = os.environ.get("SENTENCE_TRANSFORMER")
        if not name:
            raise UserError("SENTENCE_TRANSFORMER is not set: expected a name or a folder")
        self.model = SentenceTransformer(name)
        self.padding = {}
        config = getattr(self.model[0], "config", None)
        if getattr(config, "model_type", "").startswith("siglip"):
            # As it was trained. Padded to the longest text, features would change with a text's
            # neighbours.
            self.padding = {"text": {"padding": "max_length", "return_attention_mask": False,
                                     "max_length": config.text_config.max_position_embeddings}}

    def preprocess(self, image):
        return self.model.preprocess([image])["pixel_values"][0]

    def encode_image(self, pixels):
        features = self.model({"pixel_values": pixels.to(self.model.device), "modality": "image"})
        return features["sentence_embedding"]

    def encode_text(self, texts):
        # As dicts, since a plain text that is the name of a file would be opened as an image.
        texts = [{"text": text.lower() if self.padding else text} for text in texts]
        return self.model.encode(texts, show_progress_bar=False, processing_kwargs=self.padding)
