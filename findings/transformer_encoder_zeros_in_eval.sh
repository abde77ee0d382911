# nn.TransformerEncoder puts zeros at padded positions in evaluation, other values in training.
#
# Guess: without dropout, train() and eval() give the same states.
# Seen: they agree on real tokens. At padded positions the states are ordinary non-zero vectors in
#     training, and exact zeros in evaluation without gradients, where a fast path drops the padding
#     and fills up with zeros afterwards.
# Versions: torch 2.14.1.
# Why it matters: a text tower that takes the maximum over all positions and relies on the padding
#     staying low learns with one input of its projection and is measured with another.
source "$(dirname "$0")/lib.sh"
install torch==2.14.1
observe <<'PY'
import torch
from torch import nn

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32, dropout=0, batch_first=True)
encoder = nn.TransformerEncoder(layer, num_layers=2)
tokens = torch.randn(2, 8, 16)
padding = torch.zeros(2, 8, dtype=torch.bool)
padding[0, 3:] = True
with torch.no_grad():
    training = encoder.train()(tokens, src_key_padding_mask=padding)
    evaluation = encoder.eval()(tokens, src_key_padding_mask=padding)
real = (training - evaluation)[~padding].abs().max().item()
largest = [states[padding].abs().max().item() for states in (training, evaluation)]
pooled = torch.cosine_similarity(training.amax(1), evaluation.amax(1))[0].item()
print(f"real tokens differ by {real:.0e}")
print(f"largest value at padded positions: train {largest[0]:.2f}, eval {largest[1]:.2f}")
print(f"cosine of the maxima over all positions: {pooled:.3f}")
if not (real < 1e-5 and largest[0] > 0.1 and largest[1] == 0 and pooled < 0.95):
    raise SystemExit("changed: only evaluation had zeros at the padded positions")
PY
