# A fully masked caption gets T times the gradient when its mask is -1e9 instead of -inf.
#
# Guess: scaled_dot_product_attention and the same attention written out give one gradient; where
#     all T positions of a row are masked with -1e9, the row attends to all of them evenly.
# Seen: the outputs agree, but on a CPU the fused backward pass gives T times the gradient: it
#     rebuilds the weights from a float32 logarithm in which log T vanishes beside 1e9, so that each
#     weight is 1 and not 1 / T. A boolean mask and -inf give zero output and zero gradient.
# Versions: torch 2.14.1, float32.
# Why it matters: -1e9 is the usual mask of hand-written text towers. One empty caption in a batch
#     then counts T times in the gradient of the projections, and the loss shows nothing.
source "$(dirname "$0")/lib.sh"
install torch==2.14.1
observe <<'PY'
import torch
from torch.nn.functional import scaled_dot_product_attention

ratios = []
for T in (4, 16, 64):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, T, 8).unbind()
    value.requires_grad_()
    mask = torch.full((T, T), -1e9)
    fused = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    written_out = (query @ key.mT / 8**0.5 + mask).softmax(-1) @ value
    [fused_gradient] = torch.autograd.grad(fused.sum(), value)
    [gradient] = torch.autograd.grad(written_out.sum(), value)
    ratios.append((fused_gradient.norm() / gradient.norm()).item())
    print(f"T = {T}: outputs differ by {(fused - written_out).abs().max().item():.0e}, "
          f"gradient of the values is {ratios[-1]:.2f} times the true one")
if [round(ratio) for ratio in ratios] != [4, 16, 64]:
    raise SystemExit("changed: the gradient was T times the true one")
PY
