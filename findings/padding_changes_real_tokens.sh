# In ConvBERT, Nystromformer and FNet the padding changes the states of real tokens.
#
# Guess: with an attention mask the states of the real tokens do not depend on how much padding
#     follows, as in BERT, whose inputs and outputs these models share.
# Seen: BERT's mean state stays the same to the fourth digit; the others' move. ConvBERT and
#     Nystromformer convolve over the padded positions; FNet accepts the mask and ignores it.
# Versions: transformers 5.24.0, torch 2.14.1; random weights.
# Why it matters: with such a language model as text tower the feature of a caption depends on the
#     longest caption of its batch, and so do scores, on the batch size and the order of the data.
source "$(dirname "$0")/lib.sh"
install transformers==5.24.0 torch==2.14.1
observe <<'PY'
import torch
from transformers import AutoConfig, AutoModel

settings = {
    "bert": {},
    "convbert": {"embedding_size": 32},
    "nystromformer": {},
    "fnet": {},
}
caption = torch.arange(10, 18)
changed = []
for name, extra in settings.items():
    config = AutoConfig.for_model(
        name, vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, **extra,
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    features = []
    for length in (8, 16, 64):
        ids = torch.full((1, length), config.pad_token_id)
        ids[0, :8] = caption
        mask = torch.zeros_like(ids)
        mask[0, :8] = 1
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        features.append(states[0, :8].mean(0))
    alike = [torch.cosine_similarity(features[0], other, dim=0).item() for other in features[1:]]
    changed.append(min(alike) < 0.9999)
    print(f"{name}: cosine to no padding {alike[0]:.4f} with 8, {alike[1]:.4f} with 56 padded tokens")
if changed != [False, True, True, True]:
    raise SystemExit("changed: all but BERT moved with the padding")
PY
