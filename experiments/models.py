"""Which models of transformers work, tried with tiny random weights: the tables of docs/models.md.

    python -m experiments.models --half language         # a line for each type, then the table
    python -m experiments.models --half towers           # two-tower models, see two_towers.py

A type is one of transformers' names for an architecture, such as "bert". Its model is made from its
own configuration with every size shrunk, saved beside a tokenizer of whole words, and loaded as any
other. No hub, no GPU, a few minutes.
"""

import contextlib
import inspect
import re
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from tqdm import tqdm
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

import paraclip
from common.cli import UserError, flag, parse_config, run
from experiments.two_towers import print_two_towers

CAPTIONS = ["a dog", "two cats on a red mat in the garden", "dog"]
MOST_WEIGHTS = 30_000_000


@dataclass
class ModelsConfig:
    half: str = flag("language", "which table", choices=("language", "towers"))
    types: list[str] = flag([], "only these types")


class TooLarge(ValueError):
    """A configuration whose sizes have names that SIZES does not know."""


# ---- tiny models ---------------------------------------------------------------------------------
# Every size of a configuration by its name; the first pattern that fits counts.
SIZES = [
    (r"vocab_size|vocab_size_.*|.*_vocab_size|vocab_size$", 64),
    (r".*max_position_embeddings|n_positions|max_seq_len|max_target_positions|seq_length", 128),
    (r"image_size", 32), (r"patch_size", 16),
    (r".*(num|n)_(.*_)?layers?|.*_layers|n_layer|num_blocks|depth", 2),
    (r".*num_(.*_)?heads|.*_heads|n_heads?", 2),
    (r"(.*_)?head_dim|.*_head_size|kv_channels", 16),
    (r"rotary_dim", 8), (r"d_head|attention_head_dim", 16),
    (r"(q|kv)_lora_rank|qk_nope_head_dim|v_head_dim", 16), (r"qk_rope_head_dim", 16),
    (r"n_group|topk_group|n_shared_experts", 1),
    (r"(num|n)_(.*_)?experts|num_local_experts", 4), (r".*(experts_per_tok|top_k)", 2),
    (r".*(intermediate|inner|ffn|mlp).*(size|dim)|.*hidden_dim|d_ff|ffn_.*|n_inner|mlp_dim", 48),
    (r"hidden_size|hidden_sizes|.*_hidden_size|d_model|n_embd|dim|width|emb_dim|embed_dim"
     r"|embedding_size|word_embed_proj_dim|d_embed|projection_dim|.*_embed_dim"
     r"|out_hidden_size", 32),
]


# What the sizes above do not fit together in.
FITTING = {
    "bamba": dict(mamba_n_heads=2, mamba_d_head=32),
    "falcon_h1": dict(mamba_n_heads=2, mamba_d_head=32, mamba_d_ssm=64),
    "granitemoehybrid": dict(mamba_n_heads=2, mamba_d_head=32),
    "mamba2": dict(num_heads=2, head_dim=32),
    "reformer": dict(axial_pos_embds_dim=[16, 16], axial_pos_shape=[8, 16]),
}


def tiny(values: dict) -> dict:
    """A configuration's values with every size shrunk."""
    shrunk = {}
    for name, value in values.items():
        if name == "per_layer_config" and value:
            # One configuration for each layer that differs from the others.
            value = {1: tiny(list(value.values())[-1])}
        elif isinstance(value, dict):
            value = tiny(value)
        elif name == "mrope_section" and value:
            # They share half of a head's dimensions.
            value = [2, 3, 3]
        elif name == "vocab_size" and value is None:
            value = 64
        elif str(name).endswith("_token_id") and value is not None:
            value = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}.get(name, 3)
        elif isinstance(value, (list, tuple)) and len(value) == values.get("num_hidden_layers"):
            # One value a layer: the first and the last, which differ where there are two kinds.
            value = [value[0], value[-1]]
        elif type(value) is int and value > 0:
            for pattern, size in SIZES:
                if re.fullmatch(pattern, str(name)):
                    value = min(value, size)
                    break
        shrunk[name] = value
    return shrunk


def tiny_model(kind: str) -> transformers.PreTrainedModel:
    """Raises whatever transformers raises if the type cannot be made small this way."""
    config_class = transformers.CONFIG_MAPPING[kind]
    values = config_class().to_dict()
    config = config_class.from_dict(tiny(values) | FITTING.get(kind, {}))
    with torch.device("meta"):
        count = sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters())
    if count > MOST_WEIGHTS:
        raise TooLarge(f"{count:,} weights")
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config)
    for p in model.parameters():
        # Random weights of the usual size hardly look at other tokens.
        if p.ndim > 1:
            p.data *= 5
    return model.eval()


def write_tokenizer(folder: Path):
    """Whole words between <s> and </s>; its padding token is number 1, as in most families."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "cat", "and"]
    words += sorted(set(" ".join(CAPTIONS).split()))
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>").save_pretrained(folder)


# ---- language models -----------------------------------------------------------------------------
def reads_text(kind: str) -> bool:
    """Does the type's model take token ids?"""
    try:
        model_class = transformers.MODEL_MAPPING[transformers.CONFIG_MAPPING[kind]]
        model_class = model_class[0] if isinstance(model_class, tuple) else model_class
        return "input_ids" in inspect.signature(model_class.forward).parameters
    # Some need packages that are not there.
    except (ImportError, ValueError):
        return False


def reason(error: Exception) -> str:
    """One line, which begins after the model's name."""
    line = " ".join(str(error).rpartition("cannot be used: ")[2].split())
    return line if len(line) < 120 else line[:120] + " ..."


@torch.no_grad()
def states_of_whole(model, tokens: dict):
    """What the library's whole model says of one caption, (1, T, W), or None if it says nothing
    without an image or a sound."""
    if model.config.is_encoder_decoder:
        tokens = tokens | {"decoder_input_ids": tokens["input_ids"]}
    # The side of images is 32 in all of them.
    for inputs in (tokens, tokens | {"pixel_values": torch.zeros(1, 3, 32, 32)}):
        with contextlib.suppress(Exception):
            output = model(**inputs)
            for name in ("encoder_last_hidden_state", "last_hidden_state"):
                if output.get(name) is not None:
                    return output[name]
            return output.text_model_output.last_hidden_state
    return None


def try_language_model(kind: str) -> tuple[str, str]:
    """-> (verdict, reason)."""
    try:
        whole = tiny_model(kind)
    except Exception as error:
        return "not built", reason(error)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        try:
            whole.save_pretrained(folder)
            tower = paraclip.TextTower(folder, "frozen", 1, "mean")
        except UserError as error:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            alone = states_of_whole(whole, paraclip.tokenize(tokenizer, CAPTIONS[:1]))
            return "refused" if alone is not None else "not run", reason(error)
        # What save_pretrained does not manage is no fault of the model's.
        except Exception as error:
            return "not built", reason(error)
        verdict = compare(whole, tower)
        for p in tower.lm.parameters():
            p.data = p.data.bfloat16()
        try:
            with torch.autocast("cpu", torch.bfloat16):
                paraclip.check_lm(tower.lm, tower.tokenizer, tolerance=0.05)
        except Exception as error:
            verdict += f"; frozen in bf16 refused: {reason(error)}"
        try:
            tower = paraclip.TextTower(folder, "finetune", 1, "mean")
            if not all(p.requires_grad for p in tower.lm.parameters()):
                verdict += "; finetune freezes unused weights"
        except UserError as error:
            verdict += f"; finetune refused: {reason(error)}"
    return "works", verdict


@torch.no_grad()
def compare(whole, tower: paraclip.TextTower) -> str:
    """How far the states of single captions are from the library's own."""
    part = "whole" if type(tower.lm) is type(whole) else "text part"
    largest = 0.0
    for caption in CAPTIONS:
        tokens = paraclip.tokenize(tower.tokenizer, [caption])
        expected = states_of_whole(whole, tokens)
        states = tower.lm_states(tokens)
        if expected is None or expected.shape != states.shape:
            return f"{part}, not compared: the library's model gives no states of text alone"
        largest = max(largest, (states - expected).abs().max().item())
    return f"{part}, {'equal to' if largest < 1e-4 else 'differs from'} the library's"


def language_half(cfg: ModelsConfig) -> dict[str, tuple[str, str]]:
    kinds = cfg.types or [kind for kind in MODEL_MAPPING_NAMES if reads_text(kind)]
    results = {}
    for kind in tqdm(kinds, disable=None):
        results[kind] = try_language_model(kind)
        print(kind, *results[kind], sep="\t", flush=True)
    return results


# ---- two towers ----------------------------------------------------------------------------------

# ---- report --------------------------------------------------------------------------------------
MEANING = {
    "works": "works", "refused": "refused",
    "not run": "transformers' own small model fails on a caption, too: it needs more than text, or "
               "the sizes do not fit",
    "not built": "its configuration does not take the small sizes, or needs another package"}


def table(results: dict[str, tuple[str, str]]) -> str:
    """Markdown, a row for all types of one verdict and reason. What failed to be tried has one."""
    groups = defaultdict(list)
    for kind, (verdict, why) in results.items():
        # The numbers of a reason differ from type to type.
        why = re.sub(r"[\d.]+%", "X %", why) if verdict in ("works", "refused") else ""
        groups[verdict, why].append(kind)
    lines = ["| verdict | types | which | reason |", "|---|---|---|---|"]
    order = list(MEANING)
    for (verdict, why), kinds in sorted(
            groups.items(), key=lambda group: (order.index(group[0][0]), -len(group[1]))):
        lines.append(f"| {verdict} | {len(kinds)} | {', '.join(sorted(kinds))} | "
                     f"{why or MEANING[verdict]} |")
    return "\n".join(lines)


def main(argv=None):
    cfg = parse_config(ModelsConfig, argv)
    if cfg.half == "towers":
        print_two_towers(cfg.types)
        return
    results = language_half(cfg)
    print(f"\ntransformers {transformers.__version__}, torch {torch.__version__}, "
          f"Python {sys.version.split()[0]}\n")
    print(table(results))


if __name__ == "__main__":
    run(main)
