# F.normalize turns a zero vector into NaN in float16, into zeros in float32 and bfloat16.
#
# Guess: the eps of F.normalize and F.cosine_similarity keeps a zero vector finite.
# Seen: the eps of both, 1e-12 and 1e-8, is itself 0 in float16, so that zeros are divided by zero.
# Versions: torch 2.14.1.
# Why it matters: one empty feature (a caption of padding alone, a dead projection) makes a column of
#     the scores NaN; the loss of the whole batch follows, and a ranking puts NaN first.
source "$(dirname "$0")/lib.sh"
install torch==2.14.1
observe <<'PY'
import torch
from torch.nn.functional import cosine_similarity, normalize

seen = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=dtype)
    unit = normalize(features)
    best = (unit @ unit.T)[1].argmax().item()
    cosine = cosine_similarity(features[:1], features[1:]).item()
    seen[dtype] = [unit[0].isnan().any().item(), cosine != cosine, best]
    print(f"{dtype}: normalized {unit[0].tolist()}, cosine to (3, 4) {cosine}, "
          f"(3, 4) finds vector {best} first")
finite, nan = [False, False, 1], [True, True, 0]
if list(seen.values()) != [finite, finite, nan]:
    raise SystemExit("changed: float16 alone gave NaN and found the zero vector first")
PY
