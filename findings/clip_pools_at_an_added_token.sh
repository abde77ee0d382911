# A token added to CLIP's vocabulary becomes the position that the caption's feature is taken from.
#
# Guess: the feature is the state of the end-of-text token, and a new token is a word like any other.
# Seen: in the configuration that the first CLIP checkpoints carry (eos_token_id 2), transformers
#     takes the state at the largest token number. A new token is larger than end-of-text, so that
#     the causal tower never reads what follows: "<new> dog" and "<new> cat" get one feature.
# Versions: transformers 5.24.0, torch 2.14.1; random weights.
# Why it matters: learned words and prompts are added in this way. Training runs, the loss falls
#     less, and captions that differ only after the new word become exactly equal.
source "$(dirname "$0")/lib.sh"
install transformers==5.24.0 torch==2.14.1
observe <<'PY'
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

start, end, dog, cat, photo = 98, 99, 10, 11, 12
equal = {}
for eos_token_id in (2, end):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, projection_dim=16, bos_token_id=start, eos_token_id=eos_token_id,
    )
    model = CLIPTextModelWithProjection(config).eval()
    model.resize_token_embeddings(101)
    for name, word in {"a known word": photo, "the new token": 100}.items():
        captions = torch.tensor([[start, word, animal, end] for animal in (dog, cat)])
        with torch.no_grad():
            features = model(captions).text_embeds
        equal[eos_token_id, name] = torch.equal(features[0], features[1])
        print(f"eos_token_id {eos_token_id}: after {name}, dog and cat have "
              f"{'one feature' if equal[eos_token_id, name] else 'different features'}")
if list(equal.values()) != [False, True, False, False]:
    raise SystemExit("changed: dog and cat were equal after the new token with eos_token_id 2 only")
PY
