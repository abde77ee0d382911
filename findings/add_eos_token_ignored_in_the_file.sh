# transformers ignores add_eos_token in tokenizer_config.json, and obeys it as an argument.
#
# Guess: a setting means the same in tokenizer_config.json and as an argument of from_pretrained.
# Seen: with a tokenizer.json beside it, "add_eos_token": true of the file has no effect and gives no
#     warning; from_pretrained(..., add_eos_token=True) of the same folder adds the token.
# Versions: transformers 5.24.0, tokenizers 0.23.3.
# Why it matters: text towers made of decoder language models take a caption's feature from the end
#     token. Without it the feature is that of the last word, and no error tells.
source "$(dirname "$0")/lib.sh"
install transformers==5.24.0 tokenizers==0.23.3
observe <<'PY'
import json
import os

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

words = {word: i for i, word in enumerate("<unk> </s> a dog".split())}
backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
os.mkdir("language_model")
backend.save("language_model/tokenizer.json")
with open("language_model/tokenizer_config.json", "w") as file:
    json.dump(
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>",
            "add_eos_token": True,
        },
        file,
    )
seen = []
for name, arguments in {"the file": {}, "the argument": {"add_eos_token": True}}.items():
    tokenizer = AutoTokenizer.from_pretrained("language_model", **arguments)
    seen.append(tokenizer.convert_ids_to_tokens(tokenizer("a dog")["input_ids"]))
    print(f"add_eos_token from {name}: {seen[-1]}")
if seen != [["a", "dog"], ["a", "dog", "</s>"]]:
    raise SystemExit("changed: the file's setting was ignored, the argument obeyed")
PY
