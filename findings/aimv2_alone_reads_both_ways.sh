# The text tower of AIMv2 reads a caption forwards beside a longer one, and both ways when alone.
#
# Guess: with an attention mask a caption's feature does not depend on its neighbours in the batch.
# Seen: AIMv2's text tower is causal. Under sdpa, the default, a mask without padding is dropped,
#     since the attention is expected to be causal by itself; that of AIMv2 is not, so the first
#     token then sees the last. With a padded mask, or under eager attention, it is causal.
# Versions: transformers 5.24.0, torch 2.14.1; random weights.
# Why it matters: a caption encoded alone (a query) gets another feature than in a batch (a test
#     set), and results depend on the batch size and on which captions are sorted together.
source "$(dirname "$0")/lib.sh"
install transformers==5.24.0 torch==2.14.1
observe <<'PY'
import torch
from transformers import Aimv2TextConfig, Aimv2TextModel

config = Aimv2TextConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=64, max_position_embeddings=64, eos_token_id=2,
)
caption = torch.tensor([[11, 12, 13, 14, 15, 2]])
longer = torch.arange(20, 43).tolist() + [2]
batch = torch.tensor([caption[0].tolist() + [0] * 18, longer])
similarity = {}
for attention in ("eager", "sdpa"):
    torch.manual_seed(0)
    model = Aimv2TextModel._from_config(config, attn_implementation=attention).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    with torch.no_grad():
        alone = model(caption, attention_mask=torch.ones_like(caption)).pooler_output
        beside = model(batch, attention_mask=(batch != 0).long()).pooler_output[:1]
    similarity[attention] = torch.cosine_similarity(alone, beside).item()
    print(f"{attention}: cosine of the caption alone and in a batch {similarity[attention]:.4f}")
if not (similarity["eager"] > 0.9999 and similarity["sdpa"] < 0.99):
    raise SystemExit("changed: the feature depended on the neighbour under sdpa only")
PY
