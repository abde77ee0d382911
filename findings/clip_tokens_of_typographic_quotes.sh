# CLIP's tokenizers in open_clip and transformers split typographic quotes and "&amp;" differently.
#
# Guess: one vocabulary and one list of merges give one sequence of tokens.
# Seen: open_clip first repairs the text with ftfy and resolves HTML entities, so that the curly
#     apostrophe becomes a plain one and "&amp;" becomes "&"; transformers takes them as they are. Of
#     a caption with a curly apostrophe the token "'s" becomes three other tokens.
# Versions: open_clip_torch 3.3.0 (whose own merges both tokenizers use here), transformers 5.24.0,
#     tokenizers 0.23.3, ftfy 6.3.1.
# Why it matters: web captions are full of both. A model trained through one library meets tokens
#     through the other that it never saw, and rankings of a paraphrase change for a quote.
source "$(dirname "$0")/lib.sh"
install open_clip_torch==3.3.0 transformers==5.24.0 tokenizers==0.23.3 ftfy==6.3.1 torch==2.14.1 \
    torchvision==0.29.1
observe <<'PY'
import json
import os

from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTokenizer

open_clip = SimpleTokenizer()
special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
os.mkdir("clip")
with open("clip/vocab.json", "w") as file:
    json.dump({special.get(token, token): i for token, i in open_clip.encoder.items()}, file)
with open("clip/merges.txt", "w") as file:
    print("#version: 0.2", *map(" ".join, open_clip.bpe_ranks), sep="\n", file=file)
transformers = CLIPTokenizer.from_pretrained("clip")
equal = []
for text in ("a dog's life", "a dog’s life", "salt & pepper", "salt &amp; pepper"):
    ours, theirs = open_clip.encode(text), transformers(text)["input_ids"][1:-1]
    equal.append(ours == theirs)
    print(text, "| open_clip:", *map(open_clip.decoder.get, ours), end=" | ")
    print("transformers:", *map(open_clip.decoder.get, theirs))
if equal != [True, False, True, False]:
    raise SystemExit("changed: only the curly apostrophe and the HTML entity gave other tokens")
PY
