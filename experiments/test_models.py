"""Tests of the example models against the libraries themselves, with tiny random models."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_paraphrase as ev
from common.cli import UserError
from test_paraclip import lm, save_hugging_face_model  # noqa: F401

HERE = Path(__file__).parent
TEXTS = ["a dog", "A red circle left of a cat", "e"]


def some_images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
            for size in ((40, 60), (33, 32), (90, 50))]


def features_through_us(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the evaluation gets from a model: features of some_images() and of TEXTS."""
    model = ev.open_model(name, ev.EvalConfig(device="cpu"))
    batch = ev.default_collate([model.preprocess(image) for image in some_images()])
    image_features = ev.encode(model.encode_image, batch, len(some_images()))
    return image_features, ev.embed_texts(model, TEXTS, ev.EvalConfig())


def save_open_clip(open_clip, folder: Path):
    config = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 2,
                                              "width": 32, "head_width": 16},
              "text_cfg": {"context_length": 16, "vocab_size": 49408, "layers": 2, "width": 32,
                           "heads": 2}}
    torch.manual_seed(0)
    model = open_clip.model.CLIP(16, open_clip.CLIPVisionCfg(**config["vision_cfg"]),
                                 open_clip.CLIPTextCfg(**config["text_cfg"]))
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic",
                  "resize_mode": "shortest"}
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))


def test_open_clip_features_are_its_own(tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    save_open_clip(open_clip, tmp_path)
    monkeypatch.setenv("OPEN_CLIP_MODEL", f"local-dir:{tmp_path}")
    images, texts = features_through_us(f"{HERE}/open_clip_model.py:OpenCLIP")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    model.eval()
    with torch.no_grad():
        # One image at a time; texts are padded to 16 positions.
        own = torch.cat([model.encode_image(preprocess(image)[None]) for image in some_images()])
        tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(TEXTS)
        own_texts = model.encode_text(tokens)
    normalize = torch.nn.functional.normalize
    torch.testing.assert_close(images, normalize(own, dim=-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(texts, normalize(own_texts, dim=-1), atol=1e-6, rtol=0)


def test_sentence_transformer_features_are_its_own(lm, tmp_path, monkeypatch):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    save_hugging_face_model(tmp_path / "clip", "CLIP", lm)
    monkeypatch.setenv("SENTENCE_TRANSFORMER", str(tmp_path / "clip"))
    images, texts = features_through_us(f"{HERE}/sentence_transformer_model.py:Model")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "clip"))
    own = torch.from_numpy(np.concatenate([model.encode([image]) for image in some_images()]))
    torch.testing.assert_close(images, own, atol=1e-5, rtol=0)
    own_texts = torch.from_numpy(np.concatenate([model.encode([text]) for text in TEXTS]))
    torch.testing.assert_close(texts, own_texts, atol=1e-5, rtol=0)


def test_sentence_transformers_siglip_is_padded_and_opens_no_file(lm, tmp_path, monkeypatch):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = save_hugging_face_model(tmp_path / "siglip", "Siglip", lm)
    monkeypatch.setenv("SENTENCE_TRANSFORMER", str(tmp_path / "siglip"))
    monkeypatch.chdir(tmp_path)
    some_images()[0].save("cat.png")
    texts = ["a dog", "cat.png", "A red circle left of a cat"]
    ours = ev.open_model(f"{HERE}/sentence_transformer_model.py:Model", ev.EvalConfig(device="cpu"))
    tokenizer = sentence_transformers.SentenceTransformer(str(tmp_path / "siglip")).tokenizer
    for text, feature in zip(texts, ours.encode_text(texts)):
        tokens = tokenizer([text.lower()], padding="max_length", max_length=12, return_tensors="pt")
        with torch.no_grad():
            own = model.get_text_features(tokens["input_ids"]).pooler_output[0]
        torch.testing.assert_close(torch.from_numpy(feature), own, atol=1e-5, rtol=0)


def test_open_clip_without_weights_is_refused(monkeypatch):
    pytest.importorskip("open_clip")
    monkeypatch.setenv("OPEN_CLIP_MODEL", "ViT-B-32-quickgelu")
    monkeypatch.delenv("OPEN_CLIP_PRETRAINED", raising=False)
    with pytest.raises(UserError, match="random weights.*laion400m_e32"):
        ev.open_model(f"{HERE}/open_clip_model.py:OpenCLIP", ev.EvalConfig(device="cpu"))


def test_documented_line_writes_imagenet_files(tmp_path, monkeypatch):
    pytest.importorskip("open_clip")
    monkeypatch.chdir(tmp_path)
    page = (HERE.parent / "docs/formats.md").read_text()
    exec(re.search(r"```python\n(import open_clip.*?)```", page, re.S).group(1))
    templates = ev.read_templates("templates.txt")
    assert len(ev.read_lines("classnames.txt")) == 1000 and len(templates) == 80
    assert templates[0] == "a bad photo of a {}."
