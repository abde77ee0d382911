# sentence-transformers pads SigLIP's captions to the longest one, which changes their features.
#
# Guess: a SigLIP folder opened by SentenceTransformer gives the features of the same folder in
#     transformers, whatever is encoded beside a caption.
# Seen: SigLIP takes its feature from the last position and was trained with every caption padded to
#     full length. sentence-transformers pads to the longest caption of a batch, or not at all for one
#     alone: three different features of one caption.
# Versions: sentence-transformers 6.2.0, transformers 5.24.0, torch 2.14.1; random weights.
# Why it matters: the model works, but worse than published, and its scores depend on the batch size;
#     a query encoded alone is compared with texts that were encoded otherwise.
source "$(dirname "$0")/lib.sh"
install sentence-transformers==6.2.0 transformers==5.24.0 torch==2.14.1 torchvision==0.29.1 \
    pillow==13.0.0
observe <<'PY'
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor,
)

words = {word: i for i, word in enumerate("<pad> <unk> a dog runs".split())}
backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", model_max_length=64,
    model_input_names=["input_ids"],
)
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
torch.manual_seed(0)
siglip = SiglipModel(
    SiglipConfig(
        text_config=dict(sizes, vocab_size=8, projection_size=32, pad_token_id=0),
        vision_config=dict(sizes, image_size=16, patch_size=8),
    )
).eval()
siglip.save_pretrained("siglip")
images = SiglipImageProcessor(size={"height": 16, "width": 16})
SiglipProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained("siglip")

padded = tokenizer("a dog", padding="max_length", return_tensors="pt")
with torch.no_grad():
    full = siglip.get_text_features(**padded).pooler_output[0]
model = SentenceTransformer("siglip", device="cpu")
alone = model.encode(["a dog"], convert_to_tensor=True)[0]
beside = model.encode(["a dog", "a dog runs " * 8], convert_to_tensor=True)[0]
to_full = torch.cosine_similarity(alone, full, dim=0).item()
to_beside = torch.cosine_similarity(alone, beside, dim=0).item()
print(f"cosine of the caption encoded alone: {to_full:.2f} to transformers with full padding, "
      f"{to_beside:.2f} to the same call with a longer neighbour")
if not (to_full < 0.9 and to_beside < 0.9):
    raise SystemExit("changed: both cosines were far below 1")
PY
