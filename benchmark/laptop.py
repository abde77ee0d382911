"""What makes the default run short on a laptop, and the method does without.

The ViT's convolutions, the optimizer Muon, and the memory of a frozen language model's token
states, which a small data set's captions fit in. paraclip.py imports what its settings ask for.
"""

import contextlib
import ctypes
import functools
import itertools

import torch
from torch import nn
from tqdm import tqdm


# ---- image tower ---------------------------------------------------------------------------------
def conv_stem(patch_size: int, width: int):
    """Convolutions that halve the picture until a patch is one place (arXiv 2106.14881): a short
    training learns several times as much with them as with one large convolution."""
    layers, channels = [], 3
    for halvings in reversed(range(patch_size.bit_length() - 1)):
        layers += [nn.Conv2d(channels, max(16, width >> halvings), 3, 2, 1), nn.GELU()]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")
        channels = layers[-2].out_channels
    return nn.Sequential(*layers[:-1])


# ---- optimizer -----------------------------------------------------------------------------------
@torch.no_grad()
def orthogonalize(matrices):
    """(n, rows, columns) -> the same directions, all singular values near 1: five Newton-Schulz
    steps of a quintic. torch.optim.Muon takes them in bf16, which a CPU may have to emulate."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are orthogonalised matrices (kellerjordan.github.io/posts/muon).

    A weight moves by 0.2 lr, about as with AdamW (arXiv 2502.16982). dtype: the machine's fast one.
    """

    def __init__(self, groups, dtype):
        super().__init__(groups, dict(momentum=0.95))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}  # matrices of one shape are multiplied together
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                step = p.grad.lerp(momentum, group["momentum"]).flatten(1)  # Nesterov's
                wide = step.shape[0] <= step.shape[1]
                alike.setdefault((wide, step.shape), []).append((p, step if wide else step.mT))
            for (wide, shape), pairs in alike.items():
                weights, steps = zip(*pairs)
                steps = orthogonalize(torch.stack(steps).to(self.dtype)).float()
                for p, step in zip(weights, steps if wide else steps.mT):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(step.reshape(p.shape), alpha=-0.2 * max(shape) ** 0.5 * group["lr"])


# ---- memory --------------------------------------------------------------------------------------
def keep_memory():
    """Lets glibc keep freed memory: given back, it would be mapped and zeroed anew each step."""
    with contextlib.suppress(AttributeError, OSError):  # other C libraries have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, the largest that it takes


STATES_BYTES = 2 << 30  # remembered if they fit in this


@torch.no_grad()
def remember_states(model, index):
    """What takes the place of `tokenize` where all captions' frozen token states fit in memory.

    Neither a caption nor a frozen language model changes: the states are computed once, and before
    training, so that a continued run computes the same bits. None if they may change or are many.
    """
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    budget = STATES_BYTES // (model.text_tower.width * dtype.itemsize)  # tokens
    if not model.text_tower.frozen or 4 * len(index) > budget:  # 4: no caption has fewer
        return None
    captions = sorted({index.caption(i) for i in range(len(index))}, key=lambda c: (len(c), c))
    parts = []
    for i in tqdm(range(0, len(captions), 256), "frozen token states", disable=None, leave=False):
        tokens, = model.token_batches(captions[i:i + 256])
        with model.autocast():
            states = model.text_tower.lm_states(tokens).to(dtype)  # (256, T, W)
        parts += [row[mask.bool()].cpu() for row, mask in zip(states, tokens["attention_mask"])]
        budget -= sum(map(len, parts[i:]))
        if budget < 0:
            return None
    lengths = [len(part) for part in parts]
    spans = dict(zip(captions, zip(itertools.accumulate(lengths, initial=0), lengths)))
    return functools.partial(recall_states, torch.cat(parts), spans)  # workers share one tensor


def recall_states(states, spans: dict, captions: list[str]) -> dict:
    """Captions -> token batch that holds `states` (B, T, W) in place of input_ids."""
    rows = [states.narrow(0, *spans[caption]) for caption in captions]
    mask = [torch.ones(len(row)) for row in rows]
    states, mask = (nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (rows, mask))
    return {"states": states, "attention_mask": mask}
