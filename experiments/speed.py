"""What a training step takes: loader, towers and whole step, against the machine's best rate.

    python -m experiments.speed                        # any flags that paraclip.py takes
    torchrun --nproc_per_node 8 -m experiments.speed --data cc12m --compile
    python -m experiments.speed --recipe cc12m --precision bf16 --memory

Nothing is written; the last line of the output is JSON. A time is the mean of many calls, with the
GPU idle before the first and after the last; of several ranks the slowest counts.

FLOPs are those of useful work: matrix products and convolutions of both towers, forward and
backward, on real tokens; not padding, the second forward pass of --accum, the loss, the optimizer.
`mfu` is their rate divided by that of a large matrix product in the same precision, measured here;
`of_data_sheet` is divided by the maker's number instead, where the card is known.

--memory measures no time. It counts the peak memory of one rank of 1, 2, 4 and 8, for --accum 1 to
8, and needs neither a GPU nor the data: see `count_memory`.
"""

import contextlib
import dataclasses
import json
import math
import resource
import sys
import time
import weakref
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from common import distributed
from common.cli import UserError, flag, parse_config, run
from common.distributed import all_gather_object, setup_distributed
from data import Batch, training_loader
from paraclip import (RECIPES, Config, Contrastive, build, forward_backward, keep_lm_states,
                      make_optimizers, open_index, optimizer_step)


@dataclass
class SpeedConfig(Config):
    steps: int = flag(30, "steps that are timed, or 4 x --workers if that is more", low=1)
    profile: bool = flag(False, "also print the ten operations that take longest in a step")
    memory: bool = flag(False, "count memory by ranks and --accum, measure no time")


# Dense bf16 FLOP/s in the data sheets of SXM cards, by the name they give; PCIe cards have less.
DATA_SHEET = {"NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12,
              "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
FLOP_SAMPLES = 32  # captions on which FLOPs are counted
COUNTS = (1, 2, 4, 8)  # of ranks and of --accum in --memory
CAPTION_TOKENS = 32  # of every caption in --memory; CC12M's have about 25 and are padded


# ---- times and FLOPs -----------------------------------------------------------------------------
def wait_for_gpu():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work, calls: int) -> float:
    """Mean seconds of a call. A GPU is waited for at both ends only, not after each call."""
    wait_for_gpu()
    began = time.perf_counter()
    for _ in range(calls):
        work()
    wait_for_gpu()
    return (time.perf_counter() - began) / calls


def timed_for_a_second(work) -> float:
    # The first call prepares what later calls use.
    work()
    return timed(work, max(3, math.ceil(1 / timed(work, 1))))


def product_rate(device: torch.device, bf16: bool) -> float:
    """FLOP/s of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * side ** 3 / timed_for_a_second(lambda: a @ a)


def without_padding(tokens: dict) -> list[list[dict]]:
    """A token batch -> a token batch of one caption for each, in a list of its own."""
    lengths = tokens["attention_mask"].sum(1).int().tolist()
    captions = []
    for i, length in enumerate(lengths):
        captions.append([{name: part[i:i + 1, :length] for name, part in tokens.items()}])
    return captions


def pair_flops(model, micro_batches) -> tuple[float, float]:
    """Useful operations of a pair in a step, by (image tower, text tower), counted by PyTorch on
    one image and FLOP_SAMPLES captions. What a frozen language model is spared does not count."""
    captions = []
    for _, token_batches in micro_batches:
        for tokens in token_batches:
            captions += without_padding(tokens)
    # A batch is sorted by length: evenly spaced captions are of all lengths.
    stride = math.ceil(len(captions) / FLOP_SAMPLES)
    captions = captions[stride // 2::stride]

    def count(encode, inputs) -> float:
        counter = FlopCounterMode(display=False)
        # PyTorch can count neither in a compiled tower nor in the CPU's fused attention.
        with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), counter:
            for x in inputs:
                encode(x).sum().backward()
        model.zero_grad()
        return counter.get_total_flops() / len(inputs)

    image = micro_batches[0][0][:1]
    return count(model.encode_image, [image]), count(model.encode_text, captions)


# ---- the measurement -----------------------------------------------------------------------------
def measure(cfg: SpeedConfig) -> dict:
    """The report on one configuration. Captions are this rank's, times the slowest rank's."""
    index = open_index(cfg)
    rank, ranks, device = setup_distributed()
    if cfg.batch_size % (ranks * cfg.accum) or cfg.batch_size > len(index):
        raise UserError(f"--batch-size {cfg.batch_size} must be a multiple of ranks x --accum = "
                        f"{ranks} x {cfg.accum}, and at most the {len(index)} samples of the set")
    model, parallel, optimizers = build(cfg, device)
    # More steps than are ever taken.
    tokenize = model.tokenize
    if cfg.cache_lm and model.text_tower.frozen:
        tokenize = keep_lm_states(model, index)
    objective = Contrastive(cfg, model, index, tokenize)
    batches = iter(training_loader(index, cfg, 0, 1 << 40, rank, ranks, tokenize, objective,
                                   distributed.ON_GPU))
    batch = next(batches)
    waited = []

    def step():
        nonlocal batch
        loss, _ = forward_backward(parallel, objective, batch)
        optimizer_step(model, optimizers, 0.1)
        loss.item()
        began = time.perf_counter()
        batch = next(batches)
        waited.append(time.perf_counter() - began)

    def image_tower():
        for images, _ in batch.micro_batches:
            model.encode_image(images).sum().backward()
        model.zero_grad()

    def text_tower():
        for _, text in batch.micro_batches:
            model.encode_text(text).sum().backward()
        model.zero_grad()

    # The step comes first: under ranks a tower is to be compiled within DistributedDataParallel.
    timed(step, 3)
    # Workers run ahead and deliver in bursts. So take what they have ready, then time many batches.
    timed(lambda: next(batches), 1 + 3 * cfg.workers)
    loader = timed(lambda: next(batches), max(8, 4 * cfg.workers))
    # The queue is empty now, and stays so if the loader is slower than the step.
    timed(step, 2 + cfg.workers)
    waited.clear()
    whole_step = timed(step, max(cfg.steps, 4 * cfg.workers))
    data_wait = sum(waited) / len(waited) / whole_step
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        memory = torch.cuda.max_memory_allocated()
    else:
        name = f"{torch.get_num_threads()} CPU threads"
        # Of the whole process. Linux counts KiB, macOS bytes.
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if sys.platform != "darwin":
            memory *= 1024
    if cfg.profile:
        with torch.profiler.profile() as profiler:
            timed(step, 3)
        print(profiler.key_averages().table(f"self_{device.type}_time_total", row_limit=10))

    image, text = pair_flops(model, batch.micro_batches)
    product = min(all_gather_object(product_rate(device, model.bf16)))
    local_batch = cfg.batch_size / ranks
    rows = {}
    for row, seconds, flops in [("loader", loader, 0),
                                ("image_tower", timed_for_a_second(image_tower), image),
                                ("text_tower", timed_for_a_second(text_tower), text),
                                ("whole_step", whole_step, image + text)]:
        seconds = max(all_gather_object(seconds))
        rows[row] = {"ms": 1e3 * seconds, "images_per_s": cfg.batch_size / seconds}
        if flops:
            # The rate of one rank.
            rate = flops * local_batch / seconds
            rows[row].update(tflops=rate / 1e12, mfu=rate / product)
            if model.bf16 and name in DATA_SHEET:
                rows[row]["of_data_sheet"] = rate / DATA_SHEET[name]
    masks = []
    for _, token_batches in batch.micro_batches:
        masks += [tokens["attention_mask"] for tokens in token_batches]
    tokens = sum(mask.sum().item() for mask in masks)
    places = sum(mask.numel() for mask in masks)
    return {"device": name, "ranks": ranks, "torch": torch.__version__, "rows": rows,
            "product_tflops": product / 1e12, "pair_gflops": (image + text) / 1e9,
            "tokens": tokens / local_batch, "padding": 1 - tokens / places,
            "data_wait": max(all_gather_object(data_wait)),
            "peak_memory_gb": max(all_gather_object(memory)) / 1e9,
            "config": dataclasses.asdict(cfg)}


def print_report(report: dict):
    print(f"{'':12}  images/s         ms   TFLOP/s a rank    MFU   of data sheet")
    for name, row in report["rows"].items():
        line = f"{name:12}{row['images_per_s']:10.0f}{row['ms']:11.1f}"
        if "mfu" in row:
            line += f"{row['tflops']:17.3f}{row['mfu']:7.1%}"
        if "of_data_sheet" in row:
            line += f"{row['of_data_sheet']:16.1%}"
        print(line)
    print("{ranks} x {device}: a large product {product_tflops:.3f} TFLOP/s, peak memory "
          "{peak_memory_gb:.2f} GB, {data_wait:.1%} of a step waits for data, {pair_gflops:.3f} "
          "GFLOP a pair, {tokens:.1f} tokens a caption".format(**report))


# ---- memory --------------------------------------------------------------------------------------
# The model and its attention choose what suits a GPU, also where there is none.
AS_ON_GPU = mock.patch.object(distributed, "ON_GPU", True)


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of tensors: `alive` now, and their `peak`. What is made while it is active
    counts by itself; what was there before has to be added."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.known = WeakIdKeyDictionary()  # storages; views share one

    def add(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known[storage] = True
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.forget, storage.nbytes())

    def forget(self, size: int):
        self.alive -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                self.add(output)
        return outputs


def make_fake(model: nn.Module, mode: FakeTensorMode):
    """Replaces the weights of a model by fake ones: shapes and dtypes without content."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = mode.from_tensor(p.detach())
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)


@AS_ON_GPU
def fake_model(cfg: SpeedConfig, mode: FakeTensorMode):
    """The model of a configuration, as on a GPU, in fake tensors."""
    model, _, _ = build(cfg, torch.device("cpu"))
    make_fake(model, mode)
    # Of several ranks with --accum, DistributedDataParallel's is called.
    model.no_sync = contextlib.nullcontext
    return model


@AS_ON_GPU
def count_memory(cfg: SpeedConfig, model, mode: FakeTensorMode, ranks: int, accum: int) -> dict:
    """Peak memory of one rank in a step, as {ranks, accum, weights_gb, rest_gb, peak_gb}.

    The step itself runs (backward, update), in PyTorch's fake tensors, which know their size and
    have no content, and with a fake process group for the other ranks. Counted are all tensors that
    are alive: weights, gradients, optimizer states (with the weights, what is left after a step:
    rest_gb), images, tokens, activations, and the features of all ranks. Not counted: the buckets
    of DistributedDataParallel before gradients live in them, NCCL's buffers, the CUDA context,
    the work space inside of a kernel, the next batch, and what PyTorch's allocator loses by
    fragmentation.
    """
    size = cfg.batch_size // (ranks * accum)
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    optimizers = make_optimizers(model, cfg)
    objective = Contrastive(cfg, model, None, None)
    counter = MemoryCounter()
    with mode:
        micro_batches = []
        for _ in range(accum):
            images = torch.zeros(size, *model.image_shape, dtype=torch.uint8)
            ids = torch.zeros(size, CAPTION_TOKENS, dtype=torch.int64)
            tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            micro_batches.append((images, [tokens]))
            for tensor in (images, *tokens.values()):
                counter.add(tensor)
        batch_bytes = counter.alive
        for tensor in (*model.parameters(), *model.buffers()):
            counter.add(tensor)
        weight_bytes = counter.alive - batch_bytes
        # The second step finds the optimizers' states, which the first makes.
        with counter:
            for _ in range(2):
                forward_backward(model, objective, Batch(micro_batches, None, {}))
                optimizer_step(model, optimizers, 0.1)
    if ranks > 1:
        dist.destroy_process_group()
    return {"ranks": ranks, "accum": accum, "weights_gb": weight_bytes / 1e9,
            "rest_gb": (counter.alive - batch_bytes) / 1e9, "peak_gb": counter.peak / 1e9}


def memory_table(cfg: SpeedConfig) -> list[dict]:
    mode = FakeTensorMode()
    model = fake_model(cfg, mode)
    rows = []
    print("peak memory of one rank, GB\n--accum " + "".join(f"{accum:8}" for accum in COUNTS))
    for ranks in COUNTS:
        peaks = ""
        for accum in COUNTS:
            if cfg.batch_size % (ranks * accum) == 0:
                rows.append(count_memory(cfg, model, mode, ranks, accum))
                peaks += f"{rows[-1]['peak_gb']:8.1f}"
        print(f"{ranks} ranks {peaks}", flush=True)
    print("of it weights {weights_gb:.2f}, with optimizer states {rest_gb:.2f}".format(**rows[0]))
    return rows


def main(argv=None):
    cfg = parse_config(SpeedConfig, argv, RECIPES)
    if cfg.memory:
        print(json.dumps(memory_table(cfg)))
        return
    report = measure(cfg)
    print_report(report)
    print(json.dumps(report))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
