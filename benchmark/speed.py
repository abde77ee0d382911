"""What a training step takes: loader, towers and whole step, against the machine's best rate.

    python -m benchmark.speed                          # any flags that paraclip.py takes
    torchrun --nproc_per_node 8 -m benchmark.speed --data cc12m --compile

Nothing is written; the last line of the output is JSON. A time is the mean of many calls, the GPU
idle before the first and after the last; of several ranks the slowest counts.

FLOPs are those of useful work: matrix products and convolutions of both towers, forward and
backward, on real tokens; not padding, the second forward pass of --accum, the loss, the optimizer.
`mfu` is their rate as a share of a large matrix product's in the same precision, measured here,
`of_data_sheet` as a share of the maker's number, where the card is known.
"""

import dataclasses
import json
import math
import resource
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data import ShardIndex, UserError, flag, parse_config, run
from paraclip import (RECIPES, Config, backward, build, everywhere, open_batches,
                      setup_distributed, update)


@dataclass
class SpeedConfig(Config):
    steps: int = flag(30, "steps that are timed, or 4 x --workers if that is more", at_least=1)
    profile: bool = flag(False, "also print the ten operations that take longest in a step")


# Dense bf16 FLOP/s in the data sheets of SXM cards, by the name they give; PCIe's have less.
DATA_SHEET = {"NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12,
              "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}


# ---- times and FLOPs -----------------------------------------------------------------------------
def timed(work, calls: int) -> float:
    """Mean seconds of a call. A GPU is waited for at both ends only, not after each call."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    wait()
    began = time.perf_counter()
    for _ in range(calls):
        work()
    wait()
    return (time.perf_counter() - began) / calls


def timed_for_a_second(work) -> float:
    work()  # the first call prepares what later ones find
    return timed(work, max(3, math.ceil(1 / timed(work, 1))))


def product_rate(device: torch.device, bf16: bool) -> float:
    """FLOP/s of a large matrix product. Its matrices are freed with this function."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * side ** 3 / timed_for_a_second(lambda: a @ a)


def one_by_one(tokens: dict) -> list[dict]:
    """A token batch -> its captions as batches of one, without padding."""
    lengths = tokens["attention_mask"].sum(1).int().tolist()
    return [{name: part[i:i + 1, :length] for name, part in tokens.items()}
            for i, length in enumerate(lengths)]


def pair_flops(model, micro_batches, most: int = 32) -> tuple[float, float]:
    """Useful operations of a pair in a step, by (image tower, text tower); the top says which.

    Counted by PyTorch on at most `most` captions and a picture, so another tower may take the place
    of ours. What a frozen language model is spared does not count.
    """
    captions = [one for _, groups in micro_batches for part in groups for one in one_by_one(part)]
    stride = math.ceil(len(captions) / most)
    captions = captions[stride // 2::stride]  # of all lengths, by which a batch is sorted

    def count(encode, inputs) -> float:
        counter = FlopCounterMode(display=False)
        # PyTorch can count neither in a compiled tower nor in the CPU's fused attention.
        with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), counter:
            for one in inputs:
                encode(one).sum().backward()
        model.zero_grad()
        return counter.get_total_flops() / len(inputs)

    picture = micro_batches[0][0][:1]
    return count(model.encode_image, [picture]), count(model.encode_text, captions)


# ---- the measurement -----------------------------------------------------------------------------
def measure(cfg: SpeedConfig) -> dict:
    """The report on one configuration. Captions are this rank's, times the slowest one's."""
    index = ShardIndex(cfg.data, cfg.workers)
    _, ranks, device = setup_distributed()
    if cfg.batch_size % (ranks * cfg.accum) or cfg.batch_size > len(index):
        raise UserError(f"--batch-size {cfg.batch_size} must be a multiple of ranks x --accum = "
                        f"{ranks} x {cfg.accum}, and at most the {len(index)} samples of the set")
    model, parallel, optimizers = build(cfg, device)
    batches = open_batches(cfg, index, model, 0, 1 << 40)  # epochs without end
    micro_batches, waited = next(batches)[0], []

    def step():  # as in training: the next batch is fetched while a GPU works on this one
        nonlocal micro_batches
        loss, _ = backward(parallel, cfg, micro_batches)
        update(model, optimizers, share=0.1)
        waiting = time.perf_counter()
        micro_batches, _ = next(batches)
        waited.append(time.perf_counter() - waiting)
        loss.item()

    def tower(encode, part):
        for micro_batch in micro_batches:
            encode(micro_batch[part]).sum().backward()
        model.zero_grad()

    # The step comes first: under ranks a tower is to be compiled within DistributedDataParallel.
    timed(step, 3)
    # Workers run ahead and deliver in bursts. So take what they have ready, then time many batches.
    timed(lambda: next(batches), 1 + 3 * cfg.workers)
    loader = timed(lambda: next(batches), max(8, 4 * cfg.workers))
    # The queue is empty now, and stays so if the loader is slower than the step.
    timed(step, 2 + cfg.workers)
    waited.clear()
    whole = timed(step, max(cfg.steps, 4 * cfg.workers))
    data_wait = sum(waited) / len(waited) / whole
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        memory = torch.cuda.max_memory_allocated()
    else:  # of the process; macOS counts bytes, Linux KiB
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory *= 1 if sys.platform == "darwin" else 1024
        name = f"{torch.get_num_threads()} CPU threads"
    if cfg.profile:
        with torch.profiler.profile() as profiler:
            timed(step, 3)
        print(profiler.key_averages().table(f"self_{device.type}_time_total", row_limit=10))
    batches.close()  # its workers would take time from what follows
    image, text = pair_flops(model, micro_batches)
    measured = {
        "loader": (loader, 0), "whole_step": (whole, image + text),
        "image_tower": (timed_for_a_second(lambda: tower(model.encode_image, 0)), image),
        "text_tower": (timed_for_a_second(lambda: tower(model.encode_text, 1)), text)}
    product = min(everywhere(product_rate(device, model.bf16)))
    rows, local = {}, cfg.batch_size / ranks
    for row, (mean, flops) in measured.items():
        mean = max(everywhere(mean))
        rows[row] = {"ms": 1e3 * mean, "images_per_s": cfg.batch_size / mean}
        if flops:
            rate = flops * local / mean  # of one rank
            rows[row] |= {"tflops": rate / 1e12, "mfu": rate / product}
            if model.bf16 and name in DATA_SHEET:
                rows[row]["of_data_sheet"] = rate / DATA_SHEET[name]
    masks = [tokens["attention_mask"] for _, groups in micro_batches for tokens in groups]
    tokens = sum(mask.sum().item() for mask in masks)
    return {"device": name, "ranks": ranks, "torch": torch.__version__, "rows": rows,
            "product_tflops": product / 1e12, "pair_gflops": (image + text) / 1e9,
            "tokens": tokens / local, "padding": 1 - tokens / sum(map(torch.numel, masks)),
            "data_wait": max(everywhere(data_wait)),
            "peak_memory_gb": max(everywhere(memory)) / 1e9, "config": dataclasses.asdict(cfg)}


def main(argv=None):
    report = measure(parse_config(SpeedConfig, argv, RECIPES))
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
    print(json.dumps(report))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
