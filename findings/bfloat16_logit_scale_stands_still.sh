# A logit_scale kept in bfloat16 never moves at CLIP's own learning rate.
#
# Guess: Adam moves a parameter whose gradient is always 1 by about the learning rate a step, so by
#     1.0 in 2,000 steps of 5e-4.
# Seen: in float32 it moves by 1.0. In bfloat16 numbers near CLIP's initial log(1 / 0.07) are 1/64
#     apart; each step is rounded away, and the parameter is the same after 2,000 steps.
# Versions: torch 2.14.1, torch.optim.AdamW.
# Why it matters: a dual encoder trained wholly in bfloat16 keeps its initial temperature in silence,
#     as if it were frozen. Small weights of the towers do move, so that the loss still falls.
source "$(dirname "$0")/lib.sh"
install torch==2.14.1
observe <<'PY'
import math

import torch

moved = {}
for dtype in (torch.float32, torch.bfloat16):
    logit_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07), dtype=dtype))
    start = logit_scale.item()
    optimizer = torch.optim.AdamW([logit_scale], lr=5e-4, weight_decay=0)
    for step in range(2000):
        logit_scale.grad = torch.tensor(-1.0, dtype=dtype)
        optimizer.step()
    moved[dtype] = logit_scale.item() - start
    print(f"{dtype}: from {start:.4f} to {logit_scale.item():.4f}")
if not (abs(moved[torch.float32] - 1) < 0.01 and moved[torch.bfloat16] == 0):
    raise SystemExit("changed: float32 moved by 1.0 and bfloat16 not at all")
PY
