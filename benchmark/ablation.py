"""The README's table: each way to use the language model x seeds, trained, measured, averaged.

    python -m benchmark.ablation                                 # what is missing, then the table
    python -m benchmark.ablation --equal-time --sts stsb-en-dev.csv --triplets replace_att.json
    python -m benchmark.ablation --split val --rows align geometry --seeds 0 -- --steps 900

What stands after -- goes to every training. A run lies in OUT/ROW-SEED; one that was stopped is
continued, a finished one is not trained again, nor measured again with the same files. Tables are
Markdown, shares x100, ± the standard deviation over seeds; the output's last line is JSON.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import data
from benchmark.where_lost import text_columns, where_lost
from data import UserError, flag

ROWS = {text: ["--text", text] for text in ("scratch", "finetune", "frozen", "align")}
ROWS["geometry"] = ["--text", "align", "--geometry", "2"]


@dataclass
class AblationConfig:
    rows: list[str] = flag(list(ROWS), "some of them")
    seeds: list[str] = flag(["0", "1", "2"], "of the trainings")
    data: str = flag("emoji", "a folder in $PARACLIP_DATA, or its whole path: train/, test/, val/")
    split: str = flag("test", "to measure on, val for choices", choices=("test", "val"))
    sts: str = flag("", "file for eval_paraphrase.py")
    triplets: list[str] = flag([], "files for eval_paraphrase.py")
    out: str = flag("runs/ablation", "folder of the run folders")
    equal_time: bool = flag(False, "also train each row for as long as align's steps take")
    where_lost: bool = flag(False, "also let the text towers search captions instead of pictures")
    jobs: int = flag(1, "trainings at once, each on a core of its own", at_least=1)
    json: str = flag("", "file for the JSON that also ends the output")

    def __post_init__(self):
        data.check_ranges(self)
        if not set(self.rows) <= set(ROWS):
            raise UserError(f"--rows {' '.join(self.rows)}: expected some of {' '.join(ROWS)}")
        if self.equal_time and "align" not in self.rows:
            raise UserError("--equal-time needs align among --rows: the others get its time")


# ---- train and measure ---------------------------------------------------------------------------
def python(program: str, *argv):
    """Runs a program of this repository; of its output stderr is shown. UserError if it fails."""
    command = " ".join(map(str, ["python", program, *argv]))
    print(f"$ {command}\n", end="", file=sys.stderr, flush=True)
    argv = [sys.executable, Path(__file__).parents[1] / program, *argv]
    if status := subprocess.run(argv, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"`{command}` ended in status {status}")


def measurements(cfg: AblationConfig) -> dict[str, list[str]]:
    """{name of a JSON file in each run folder: flags of eval_paraphrase.py}."""
    found = {cfg.split: ["--benchmark", cfg.data, "--split", cfg.split]}
    texts = ["--sts", cfg.sts] if cfg.sts else []
    texts += ["--triplets", *cfg.triplets] if cfg.triplets else []
    if texts:
        stems = [Path(file).stem for file in (cfg.sts, *cfg.triplets) if file]
        found["-".join(["texts", *stems])] = texts
    return found


def train_and_measure(cfg: AblationConfig, extra: list[str], row: str, seed: str, steps: int):
    """The run folder, finished and with its measurements. steps: 0 for what `extra` says."""
    run = Path(cfg.out, f"{row}-{seed}-{steps}" if steps else f"{row}-{seed}")
    shards = cfg.data if cfg.data == "emoji" else data.data_folder(cfg.data) / "train"
    python("paraclip.py", "--data", shards, *ROWS[row], "--seed", seed, "--out", run, *extra,
           *(["--steps", str(steps)] if steps else []))
    for name, flags in measurements(cfg).items():
        file, trained = run / f"{name}.json", (run / "model.pt").stat().st_mtime
        if not file.exists() or file.stat().st_mtime < trained:
            python("eval_paraphrase.py", run, *flags, "--json", file)
    return run


def complete(cfg: AblationConfig, extra: list[str], steps: dict) -> dict[str, list[Path]]:
    """{row: its run folders, a seed each}; steps: {row: how many} where not what `extra` says."""
    cores = sorted(getattr(os, "sched_getaffinity", lambda process: [0])(0))
    if cfg.jobs > len(cores):
        raise UserError(f"--jobs {cfg.jobs}: only {len(cores)} cores can be assigned here")

    def pin():  # what a thread starts inherits its affinity
        if cfg.jobs > 1:
            os.environ["OMP_NUM_THREADS"] = "1"
            os.sched_setaffinity(0, {cores.pop()})

    todo = [(row, seed, steps.get(row, 0)) for seed in cfg.seeds for row in cfg.rows]
    # A thread even for one job: Ctrl-C ends the map; trainings, which get it too, save and stop.
    with ThreadPoolExecutor(cfg.jobs, initializer=pin) as pool:
        done = list(pool.map(lambda run: train_and_measure(cfg, extra, *run), todo))
    return {row: done[i::len(cfg.rows)] for i, row in enumerate(cfg.rows)}


# ---- read and average ----------------------------------------------------------------------------
def steps_and_rate(run: Path) -> tuple[int, float]:
    """(steps, steps a second) of a finished run: the median, as other work may disturb a part."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    batch_size = json.loads((run / "config.json").read_text())["batch_size"]
    return log[-1]["step"], statistics.median(line["images_per_s"] for line in log) / batch_size


def training_seconds(runs: list[Path]) -> float:
    """Mean over the runs, without what comes before the first step."""
    return statistics.fmean(steps / rate for steps, rate in map(steps_and_rate, runs))


def steps_within(seconds: float, runs: list[Path]) -> int:
    """Steps that fit into these seconds, to the nearest ten, at the rate of these runs."""
    rate = statistics.median(steps_and_rate(run)[1] for run in runs)
    return 10 * max(1, round(seconds * rate / 10))


def columns(cfg: AblationConfig, run: Path) -> dict[str, float]:
    """{column: value} of a run, for both tables."""
    report = {}
    for name in measurements(cfg):
        report |= json.loads((run / f"{name}.json").read_text())[0]
    kinds = report["kinds"]
    weights = torch.load(run / "model.pt", map_location="cpu", weights_only=True)["model"]
    found = {f"AO@10 {kind}": 100 * kinds[kind]["ao"] for kind in kinds}
    for side, part in {"": "", " paraphrased": "paraphrase_"}.items():
        if f"{part}precision" in report:  # several pictures of a query are right
            found[f"P@10{side}"] = 100 * report[f"{part}precision"]["t2i@10"]
        found[f"R@10{side}"] = 100 * report[f"{part}recall"]["t2i@10"]
    found |= {"zero-shot top-1": 100 * report["zeroshot"]["top1"], **text_columns(report),
              "AO@10 unrelated": 100 * report["ao_random"], "training, s": training_seconds([run]),
              "weights trained": sum(weight.numel() for weight in weights.values())}
    found |= {f"JS@10 {kind}": 100 * kinds[kind]["js"] for kind in kinds}
    return found | {"JS@10 unrelated": 100 * report["js_random"],
                    "R@1": 100 * report["recall"]["t2i@1"],
                    "zero-shot top-5": 100 * report["zeroshot"]["top5"],
                    "steps": steps_and_rate(run)[0]}


def average(found: list[dict[str, float]]) -> dict[str, dict]:
    """{column: {mean, sd, values}} over seeds; sd is the sample's, 0 of a single run."""
    table = {}
    for column in found[0]:
        values = [float(part[column]) for part in found]
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        table[column] = {"mean": statistics.fmean(values), "sd": sd, "values": values}
    return table


def print_table(title: str, table: dict[str, dict], names: list[str]):
    def cell(name, mean, sd, values):
        digits = 0 if name in ("training, s", "weights trained", "steps") else 1
        return f"{mean:,.{digits}f}" + (f" ±{sd:,.{digits}f}" if sd else "")

    print(f"\n| {title} | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}")
    for row, found in table.items():
        cells = [cell(name, **found[name]) if name in found else "" for name in names]
        print(f"| {' | '.join([row, *cells])} |")


def split_argv(argv) -> tuple[list[str], list[str]]:
    """What stands before --, and what after it."""
    argv = sys.argv[1:] if argv is None else list(argv)
    own = argv.index("--") if "--" in argv else len(argv)
    return argv[:own], argv[own + 1:]


def main(argv=None):
    own, extra = split_argv(argv)
    cfg = data.parse_config(AblationConfig, own)
    base = complete(cfg, extra, {})
    runs = {"equal steps": base}
    if cfg.equal_time:
        seconds = training_seconds(base["align"])
        steps = {row: steps_within(seconds, base[row]) for row in base if row != "align"}
        runs["equal time"] = complete(cfg, extra, steps)
    found = {title: {row: [columns(cfg, run) for run in folders] for row, folders in part.items()}
             for title, part in runs.items()}
    if cfg.where_lost:
        folder = data.data_folder(cfg.data) / cfg.split
        found["searching captions"] = where_lost(base, folder, cfg.sts, cfg.triplets)
    tables = {title: {row: average(part[row]) for row in part} for title, part in found.items()}
    if cfg.json:
        with data.replacing(cfg.json) as file:
            file.write(json.dumps(tables, indent=1).encode() + b"\n")
    for title, table in tables.items():
        names = list(max(table.values(), key=len))
        second = [name for name in names if name.startswith("JS")
                  or name in ("R@1", "zero-shot top-5", "steps")]
        print_table(title, table, [name for name in names if name not in second])
        if second:
            print_table(title, table, second)
    if cfg.jobs > 1:
        print(f"\nSeconds are of {cfg.jobs} trainings at once, on a core each.")
    print(json.dumps(tables))


if __name__ == "__main__":
    data.run(main)
