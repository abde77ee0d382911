"""The two-tower half of docs/models.md, see experiments/models.py: tiny random checkpoints of every
family with their own tokenizers, read by eval_paraphrase.py, compared with the library's forward().
"""

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn.functional import normalize

import eval_paraphrase as ev
from common.cli import UserError

TEXTS = ["a dog", "A red circle to the left of a cat", "a cat",
         # More tokens than there are positions.
         "a small blue dog above a big green square to the right of a cat " * 3]
POSITIONS = 24
SIZE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
VISION = dict(image_size=32, patch_size=16, **SIZE)
FIXED = {"height": 32, "width": 32}


def train_tokenizer(kind: str):
    """A tokenizer of this class with a vocabulary of its own, learnt from TEXTS."""
    tokenizer = getattr(transformers, f"{kind}Tokenizer")()
    return tokenizer.train_new_from_iterator(TEXTS * 9, 350, show_progress=False)


def image_processor(kind: str, **options):
    return getattr(transformers, f"{kind}ImageProcessor")(size=FIXED, crop_size=FIXED, **options)


def text_size(tokenizer, **options) -> dict:
    """What every text config needs to know of its tokenizer."""
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id")
               if getattr(tokenizer, name) is not None}
    end = tokenizer.eos_token_id
    if end is None:
        end = tokenizer.sep_token_id
    if end is not None:
        special["eos_token_id"] = end
    return dict(vocab_size=len(tokenizer), max_position_embeddings=POSITIONS, **special,
                **SIZE) | options


def two_towers(kind, tokenizer="CLIP", images="CLIP", text={}, vision={}, model="Model",
               processor=None, **options):
    """A model made of a text_config and a vision_config, and its processor."""
    tokenizer = train_tokenizer(tokenizer)
    config = getattr(transformers, f"{kind}Config")(
        text_config=text_size(tokenizer, **text), vision_config=VISION | vision, **options)
    processor = getattr(transformers, f"{processor or kind}Processor")
    return (getattr(transformers, f"{kind}{model}")(config),
            processor(image_processor(images), tokenizer))


def naflex():
    tokenizer = train_tokenizer("Siglip2")
    config = transformers.Siglip2Config(
        text_config=text_size(tokenizer, projection_size=32),
        vision_config=dict(patch_size=8, num_patches=16, **SIZE))
    images = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    return transformers.Siglip2Model(config), transformers.Siglip2Processor(images, tokenizer)


def flava():
    tokenizer = train_tokenizer("Bert")
    config = transformers.FlavaConfig(
        text_config=text_size(tokenizer), image_config=VISION, multimodal_config=SIZE,
        projection_dim=16, hidden_size=32)
    images = image_processor("Flava")
    return transformers.FlavaForPreTraining(config), transformers.FlavaProcessor(images, tokenizer)


def dual_encoder(text_kind, tokenizer=None, images="ViT", **options):
    """A vision-text-dual-encoder over any text model and any image model."""
    tokenizer = train_tokenizer(tokenizer or text_kind)
    make_text = getattr(transformers, f"{text_kind}Config")
    size = text_size(tokenizer, type_vocab_size=1) | options
    if images in ("CLIP", "Siglip"):
        vision = getattr(transformers, f"{images}VisionConfig")(**VISION)
    else:
        vision = getattr(transformers, f"{images}Config")(**VISION)
    config = transformers.VisionTextDualEncoderConfig(
        text_config=make_text(**size).to_dict(), vision_config=vision.to_dict(),
        projection_dim=16)
    processor = transformers.VisionTextDualEncoderProcessor(image_processor("ViT"), tokenizer)
    return transformers.VisionTextDualEncoderModel(config), processor


SMALL_CONVNET = dict(width_coefficient=.2, depth_coefficient=.1, hidden_dim=32, image_size=32)
# Their positions begin behind that of padding, 1.
BEHIND_PADDING = dict(max_position_embeddings=POSITIONS + 2)
READ = {
    "clip": lambda: two_towers("CLIP", projection_dim=16),
    "metaclip_2": lambda: two_towers("MetaClip2", "XLMRoberta", processor="CLIP",
                                     projection_dim=16),
    "groupvit": lambda: two_towers(
        "GroupViT", processor="CLIP", projection_dim=16, projection_intermediate_dim=32,
        vision=dict(depths=[1, 1, 1], num_group_tokens=[4, 2, 0], num_output_groups=[4, 2, 2],
                    num_hidden_layers=3)),
    "clipseg (ForImageSegmentation)": lambda: two_towers(
        "CLIPSeg", images="ViT", model="ForImageSegmentation", projection_dim=16,
        extract_layers=[0, 1], reduce_dim=8, decoder_num_attention_heads=2,
        decoder_intermediate_size=16),
    "owlvit (ForObjectDetection)": lambda: two_towers(
        "OwlViT", images="OwlViT", model="ForObjectDetection", projection_dim=32),
    "owlv2 (ForObjectDetection)": lambda: two_towers(
        "Owlv2", images="Owlv2", model="ForObjectDetection", projection_dim=32),
    "altclip": lambda: two_towers(
        "AltCLIP", "XLMRoberta", text=dict(project_dim=16, **BEHIND_PADDING), projection_dim=16),
    "chinese_clip": lambda: two_towers("ChineseCLIP", "Bert", "ChineseCLIP", projection_dim=16),
    "align": lambda: two_towers("Align", "Bert", "EfficientNet", vision=SMALL_CONVNET,
                                projection_dim=64),
    "blip (BlipModel)": lambda: two_towers("Blip", "Bert", "Blip", projection_dim=16),
    "blip (BlipForImageTextRetrieval)": lambda: two_towers(
        "Blip", "Bert", "Blip", model="ForImageTextRetrieval", image_text_hidden_size=16),
    "siglip": lambda: two_towers("Siglip", "T5", "Siglip", text=dict(projection_size=32)),
    "siglip2 (fixed)": lambda: two_towers("Siglip", "Siglip2", "Siglip",
                                          text=dict(projection_size=32)),
    "siglip2 (NaFlex)": naflex,
    "tipsv2": lambda: two_towers("Tipsv2", "Tipsv2", "Tipsv2",
                                 vision=dict(num_register_tokens=1)),
    "aimv2": lambda: two_towers("Aimv2", processor="CLIP", projection_dim=16),
    "flava": flava,
    "vision-text-dual-encoder: bert, ViT": lambda: dual_encoder("Bert"),
    "vision-text-dual-encoder: roberta, SigLIP": lambda: dual_encoder(
        "Roberta", images="Siglip", max_position_embeddings=POSITIONS + 1),
    "vision-text-dual-encoder: xlm-roberta, CLIP": lambda: dual_encoder(
        "XLMRoberta", images="CLIP", **BEHIND_PADDING),
    "vision-text-dual-encoder: mpnet, DINOv2": lambda: dual_encoder(
        "MPNet", images="Dinov2", **BEHIND_PADDING),
    "vision-text-dual-encoder: albert": lambda: dual_encoder("Albert", embedding_size=16),
    "vision-text-dual-encoder: clip": lambda: dual_encoder("CLIPText", "CLIP"),
}


def blip_2(text_kind, tokenizer):
    tokenizer = train_tokenizer(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    text = getattr(transformers, f"{text_kind}Config")(
        # The processor adds a token for the image.
        **text_size(tokenizer, vocab_size=len(tokenizer) + 1, word_embed_proj_dim=32, ffn_dim=32,
                    d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2,
                    decoder_start_token_id=0))
    config = transformers.Blip2Config(
        text_config=text.to_dict(), vision_config=VISION, num_query_tokens=4, image_token_index=3,
        qformer_config=SIZE)
    processor = transformers.Blip2Processor(image_processor("Blip"), tokenizer)
    return transformers.Blip2Model(config), processor


def xclip():
    sizes = {f"mit_{name}": size for name, size in SIZE.items()}
    return two_towers("XCLIP", vision=sizes | dict(num_frames=2), projection_dim=16,
                      prompt_num_attention_heads=2, processor="CLIP")


def colpali():
    tokenizer = train_tokenizer("Gemma")
    text = dict(vocab_size=len(tokenizer) + 8, num_key_value_heads=1, head_dim=16,
                model_type="gemma", **SIZE)
    vlm = dict(model_type="paligemma", text_config=text, projection_dim=32,
               vision_config=dict(model_type="siglip_vision_model", **VISION))
    config = transformers.ColPaliConfig(vlm_config=vlm, embedding_dim=16)
    images = image_processor("Siglip")
    images.image_seq_length = 4
    return (transformers.ColPaliForRetrieval(config),
            transformers.ColPaliProcessor(images, tokenizer))


def one_tower():
    """What embeds images and texts by one language model, as Qwen's do."""
    tokenizer = train_tokenizer("GPT2")
    text = dict(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=16, **SIZE)
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32,
        num_position_embeddings=16, deepstack_visual_indexes=[0]))
    images = transformers.Qwen2VLImageProcessor()
    video = transformers.Qwen3VLVideoProcessor()
    return (transformers.Qwen3VLModel(config),
            transformers.Qwen3VLProcessor(images, tokenizer, video, chat_template="-"))


def canine():
    config = transformers.VisionTextDualEncoderConfig(
        text_config=transformers.CanineConfig(num_hash_buckets=64, **SIZE).to_dict(),
        vision_config=transformers.ViTConfig(**VISION).to_dict(), projection_dim=16)
    processor = transformers.VisionTextDualEncoderProcessor(
        image_processor("ViT"), transformers.CanineTokenizer())
    return transformers.VisionTextDualEncoderModel(config), processor


def modernvbert():
    tokenizer = train_tokenizer("GPT2")
    config = transformers.ModernVBertConfig(
        text_config=transformers.ModernBertConfig(
            vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=0, eos_token_id=0,
            cls_token_id=0, sep_token_id=0, **SIZE),
        vision_config=transformers.SiglipVisionConfig(**VISION), image_token_id=5)
    processor = transformers.VisionTextDualEncoderProcessor(image_processor("Siglip"), tokenizer)
    return transformers.ModernVBertModel(config), processor


REFUSED = {
    "vision-text-dual-encoder: distilbert": lambda: dual_encoder(
        "DistilBert", dim=32, hidden_dim=64, n_layers=2, n_heads=2),
    "vision-text-dual-encoder: xlm": lambda: dual_encoder(
        "XLM", "Bert", emb_dim=32, n_layers=2, n_heads=2),
    "vision-text-dual-encoder: canine": canine,
    "blip-2 over opt": lambda: blip_2("OPT", "GPT2"),
    "blip-2 over t5": lambda: blip_2("T5", "T5"),
    "xclip": xclip,
    "colpali": colpali,
    "qwen3_vl (one tower)": one_tower,
    "modernvbert (one tower)": modernvbert,
    "siglip without its head": lambda: two_towers(
        "Siglip", "T5", "Siglip", text=dict(projection_size=32),
        vision=dict(vision_use_head=False)),
}


def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
            for size in ((40, 60), (33, 32), (90, 50), (64, 64), (30, 100))]


def own_cosine(model, processor, text: str, image: Image.Image) -> float:
    """The cosine of one text and one image by the library's own forward(): nothing is padded, save
    for SigLIP, which was trained so."""
    processor.tokenizer.padding_side = "right"
    options = {}
    if model.config.text_config.model_type.startswith("siglip"):
        options = dict(padding="max_length", return_attention_mask=False)
        text = text.lower()
    inputs = processor.tokenizer([text], truncation=True, max_length=POSITIONS,
                                 return_tensors="pt", **options)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    inputs |= processor.image_processor(image, return_tensors="pt")
    if hasattr(model, "vision_proj"):
        # BLIP for retrieval.
        return model(**inputs, use_itm_head=False).itm_score.item()
    if hasattr(model, "flava"):
        output = model(**inputs, input_ids_masked=inputs["input_ids"], return_loss=False)
        return (output.contrastive_logits_per_text / model.flava.logit_scale.exp()).item()
    # Some are published as detectors, which hold the model.
    output = model.base_model(**inputs)
    text_features = normalize(output.text_embeds, dim=-1)
    return (text_features @ normalize(output.image_embeds, dim=-1).T).item()


def our_cosines(folder: str) -> torch.Tensor:
    """(T, I): what the evaluation makes of the saved model, all texts in one batch."""
    model = ev.open_model(folder, ev.EvalConfig(device="cpu"))
    batch = ev.default_collate([model.preprocess(image) for image in images()])
    image_features = ev.encode(model.encode_image, batch, len(images()))
    return ev.embed_texts(model, TEXTS, ev.EvalConfig()) @ image_features.T


@torch.no_grad()
def largest_differences(make, folder: str) -> tuple[float, float]:
    """Of all cosines from the library's: of files as saved, and of files that say other things."""
    torch.manual_seed(0)
    model, processor = make()
    for parameter in model.parameters():
        # Random weights of the usual size make all features alike.
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    if model.config.model_type == "aimv2":
        # By default it loses the causal mask of a text without padding.
        model.set_attn_implementation("eager")
    rows = []
    for text in TEXTS:
        rows.append([own_cosine(model, processor, text, image) for image in images()])
    own = torch.tensor(rows)

    as_saved = (our_cosines(folder) - own).abs().max().item()
    file = Path(folder, "tokenizer_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | OTHER_FILES))
    return as_saved, (our_cosines(folder) - own).abs().max().item()


# What real checkpoints say that is not what their models need.
OTHER_FILES = {"padding_side": "left", "model_input_names": ["input_ids"],
               "model_max_length": int(1e30)}


def print_two_towers(names: list[str]):
    """Prints the table of docs/models.md: all models, or those whose names begin with one of
    `names`."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n")
    print("| model | largest difference | with other files |\n|---|---|---|")
    for name, make in READ.items():
        if name.startswith(tuple(names) or ""):
            with tempfile.TemporaryDirectory() as folder:
                saved, other = largest_differences(make, folder)
            print(f"| {name} | {saved:.0e} | {other:.0e} |", flush=True)
    print("\n| refused | why |\n|---|---|")
    for name, make in REFUSED.items():
        if not name.startswith(tuple(names) or ""):
            continue
        with tempfile.TemporaryDirectory() as folder:
            for part in make():
                part.save_pretrained(folder)
            try:
                our_cosines(folder)
                reason = "NOT REFUSED"
            except UserError as error:
                reason = str(error).removeprefix(f"{folder}: ")
                # In brackets behind the general sentence, where that is what is said.
                if found := re.search(r"\((\w+Error: .*)\)$", reason):
                    reason = found.group(1)
        print(f"| {name} | {reason} |", flush=True)
