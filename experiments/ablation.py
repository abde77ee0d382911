"""A table from one command: each way to use the language model, trained, measured, averaged.

    python -m experiments.ablation                            # the emoji scenes
    python -m experiments.ablation --data flickr8k --sts stsb-dev.csv --equal-time --jobs 2
    python -m experiments.ablation --split val --rows align --seeds 0 -- --steps 900
    python -m experiments.ablation --rows frozen:mean frozen:max align:mean align:max

What stands after -- is passed to every training. A run lies in OUT/ROW-SEED. The same command again
resumes what was interrupted, skips what is finished, and prints the tables: Markdown, values x100,
mean ± standard deviation over seeds. The last line of the output is the same as JSON.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from common.cli import UserError, flag, parse_config, run
from common.distributed import usable_cores
from common.files import atomic_write, data_folder
from demo.emoji_scenes import emoji_folder
from experiments.where_lost import search_captions, text_columns, without_training
from paraclip import POOLS

# What makes a row: the program, and its flags.
ROWS = {
    "scratch": ["paraclip.py", "--text", "scratch"],
    "finetune": ["paraclip.py", "--text", "finetune"],
    "frozen": ["paraclip.py", "--text", "frozen", "--pool", "mean"],
    "align": ["paraclip.py", "--text", "align"],
    # Alignment layers that weight decay holds near the frozen states.
    "held": ["paraclip.py", "--text", "align", "--pool", "mean", "--align-weight-decay", "10"],
    "geometry": ["experiments/geometry.py", "--text", "align", "--weight", "2"],
    "soft": ["experiments/geometry.py", "--text", "frozen", "--pool", "mean", "--weight", "1",
             "--no-text-term"],
    # For data with several captions for each image.
    "scratch-second": ["experiments/second_caption.py", "--text", "scratch"],
    "finetune-second": ["experiments/second_caption.py", "--text", "finetune"],
    "frozen-second": ["experiments/second_caption.py", "--text", "frozen", "--pool",
                      "mean"],
    "align-second": ["experiments/second_caption.py", "--text", "align"],
}
DEFAULT_ROWS = ["scratch", "finetune", "frozen", "align", "geometry"]
# What stands after -- must not change what makes a row, a seed and a run folder.
OWN_FLAGS = ["--data", "--seed", "--out", "--text"]
# Further flags, by the name of the data set: those of all rows, then those of single rows. All were
# chosen on the val split (docs/notebook.md): what all rows share, and for each row its number of
# steps. Rates were tried for scratch and finetune, so that these baselines do not lose by a badly
# chosen one; finetune kept the default's. The rows with a second caption, whose steps take longer,
# were tried with one number of steps only. Muon's rate was ten times --lr then and is 40 times now:
# scratch has a quarter of the --lr that was chosen.
SETTINGS = {
    "emoji": {},
    "flickr8k": {
        "all": ["--image-size", "96", "--crop", "0.4", "--flip", "--weight-decay", "0.3"],
        "scratch": ["--steps", "400", "--lr", "1.25e-4"],
        "finetune": ["--steps", "400"],
        "frozen": ["--steps", "330"],
        "align": ["--steps", "600"],
        "geometry": ["--steps", "400"],
        "scratch-second": ["--steps", "200", "--lr", "1.25e-4"],
        "finetune-second": ["--steps", "200"],
        "frozen-second": ["--steps", "330"],
        "align-second": ["--steps", "400"],
    },
}


@dataclass
class AblationConfig:
    rows: list[str] = flag([], f"rows of the table, of {', '.join(ROWS)}; ROW:POOL for another "
                               f"--pool than its own (default: {' '.join(DEFAULT_ROWS)})")
    seeds: list[str] = flag([], "seeds of the trainings (default: 0 1 2)")
    data: str = flag("emoji", "name of a folder in $PARACLIP_DATA, or its absolute path, with "
                              "train/, val/, test/")
    split: str = flag("test", "what is measured on; val is for choices", choices=("test", "val"))
    sts: str = flag("", "file for eval_paraphrase.py")
    triplets: list[str] = flag([], "files for eval_paraphrase.py")
    zeroshot: str = flag("", "a folder per class, for eval_paraphrase.py")
    out: str = flag("", "folder of the run folders (default: runs/ablation-<data>)")
    equal_time: bool = flag(False, "also train each row for as long as align takes")
    where_lost: bool = flag(False, "also let the text towers search captions instead of images")
    jobs: int = flag(1, "trainings at once, each with one thread on a core of its own", low=1)
    json: str = flag("", "file for the JSON that also ends the output")

    def __post_init__(self):
        self.rows = self.rows or DEFAULT_ROWS
        self.seeds = self.seeds or ["0", "1", "2"]
        self.out = self.out or f"runs/ablation-{Path(self.data).name}"
        for row in self.rows:
            name, colon, pool = row.partition(":")
            if name not in ROWS or colon and pool not in POOLS:
                raise UserError(f"--rows {row}: expected some of {' '.join(ROWS)}, alone or with "
                                f"one of {' '.join(':' + pool for pool in POOLS)}")
        for name in ("rows", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"--{name} {' '.join(values)}: expected each of them once")
        if self.zeroshot and self.data == "emoji":
            raise UserError("--zeroshot: the emoji benchmark has classes of its own")
        if self.equal_time and "align" not in self.rows:
            raise UserError("--equal-time needs align among --rows, whose time the others get")

    def folder(self) -> Path:
        """The folder of the benchmark. The emoji scenes are drawn the first time."""
        return emoji_folder() if self.data == "emoji" else data_folder(self.data)


# ---- train and measure ---------------------------------------------------------------------------
def run_program(program: str, *argv):
    """Runs a program of this repository. Its errors are shown, its standard output is not.

    program: its path from the root of the repository. Raises UserError if it fails.
    """
    argv = [str(argument) for argument in argv]
    printed = " ".join(["python", program, *argv])
    # In one piece, as several jobs print.
    sys.stderr.write(f"$ {printed}\n")
    root = Path(__file__).parents[1]
    # For programs in experiments/, which import from the root.
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    status = subprocess.run([sys.executable, str(root / program), *argv], env=environment,
                            stdout=subprocess.DEVNULL).returncode
    if status:
        raise UserError(f"`{printed}` ended in status {status}")


def content_hash(paths: list[Path]) -> str:
    """A hash of the content of these files, and of all files in these folders. Paths and names do
    not enter it, so that a set may move."""
    digest = hashlib.sha256()
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if not file.is_dir():
                with open(file, "rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def measurements(cfg: AblationConfig) -> dict[str, list[str]]:
    """{name: flags of eval_paraphrase.py}. Each name holds a hash of the files that are measured
    on, so that a kept measurement is used again for the same content only."""
    folder = cfg.folder() / cfg.split
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; $PARACLIP_DATA is where data sets lie")
    chosen = {f"{cfg.split}-{content_hash([folder])}":
              ["--benchmark", cfg.data, "--split", cfg.split]}
    if cfg.sts:
        chosen[f"sts-{content_hash([Path(cfg.sts)])}"] = ["--sts", cfg.sts]
    if cfg.zeroshot:
        folder = Path(cfg.zeroshot)
        if not folder.is_dir():
            raise UserError(f"--zeroshot {folder}: no such folder")
        chosen[f"zeroshot-{content_hash([folder])}"] = ["--zeroshot", cfg.zeroshot]
    if cfg.triplets:
        files = [Path(file) for file in cfg.triplets]
        chosen[f"triplets-{content_hash(files)}"] = ["--triplets", *cfg.triplets]
    return chosen


def reports_of(run: Path, measured: dict[str, list[str]]) -> list[Path]:
    """The JSON files of a finished run's measurements. Their names also hold a hash of the trained
    weights, so that a run that was trained again is measured again."""
    model = content_hash([run / "model.pt"])
    return [run / f"{name}-{model}.json" for name in measured]


def train_and_measure(cfg: AblationConfig, measured: dict, extra: list[str], row: str, seed: str,
                      steps: int) -> Path:
    """The run folder, trained and measured. steps: 0 for what the other flags say."""
    name, _, pool = row.partition(":")
    parts = [name, pool, seed, str(steps) if steps else ""]
    run = Path(cfg.out, "-".join(filter(None, parts)))
    settings = SETTINGS.get(Path(cfg.data).name, {})
    program, *training_flags = ROWS[name]
    training_flags += [*settings.get("all", []), *settings.get(name, []), *extra]
    if pool:
        training_flags += ["--pool", pool]
    if steps:
        training_flags += ["--steps", steps]
    shards = "emoji" if cfg.data == "emoji" else cfg.folder() / "train"
    run_program(program, "--data", shards, "--seed", seed, "--out", run, *training_flags)
    for report, measuring_flags in zip(reports_of(run, measured), measured.values()):
        if not report.exists():
            run_program("eval_paraphrase.py", run, *measuring_flags, "--json", report)
    return run


def complete(cfg: AblationConfig, measured: dict, extra: list[str],
             steps: dict[str, int]) -> dict[str, list[Path]]:
    """Trains and measures what is not finished yet. Returns {row: its run folders, one per seed}.

    steps: {row: number of steps}; a row that is not in it has the number that the flags say.
    """
    cores = []
    if cfg.jobs > 1:
        if not hasattr(os, "sched_setaffinity"):
            raise UserError(f"--jobs {cfg.jobs} needs Linux, where a program can be given a core")
        if cfg.jobs > usable_cores():
            raise UserError(f"--jobs {cfg.jobs}: there are only {usable_cores()} cores")
        cores = sorted(os.sched_getaffinity(0))
        os.environ["OMP_NUM_THREADS"] = "1"

    def take_core():
        # On Linux this is the calling thread's affinity: the programs that it starts inherit it,
        # and this process keeps all of its cores.
        if cores:
            os.sched_setaffinity(0, {cores.pop()})

    with ThreadPoolExecutor(cfg.jobs, initializer=take_core) as pool:
        futures = {(row, seed): pool.submit(train_and_measure, cfg, measured, extra, row, seed,
                                            steps.get(row, 0))
                   for seed in cfg.seeds for row in cfg.rows}
        try:
            # The first failure ends the ablation, whichever row it is in.
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            # Without this the jobs that have not begun would still be done.
            pool.shutdown(cancel_futures=True)
            raise
        return {row: [futures[row, seed].result() for seed in cfg.seeds] for row in cfg.rows}


# ---- read and average ----------------------------------------------------------------------------
def steps_and_rate(run: Path) -> tuple[int, float]:
    """(steps, steps a second) of a finished run; the median, as other work may disturb a part."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    batch_size = json.loads((run / "config.json").read_text())["batch_size"]
    return log[-1]["step"], statistics.median(row["images_per_s"] for row in log) / batch_size


def training_seconds(runs: list[Path]) -> float:
    """Seconds that a training takes from its first step to its last, the mean over the runs."""
    seconds = []
    for run in runs:
        steps, rate = steps_and_rate(run)
        seconds.append(steps / rate)
    return statistics.fmean(seconds)


def steps_within(seconds: float, runs: list[Path]) -> int:
    """Steps that fit into these seconds, to the nearest ten, at the rate of these runs."""
    rate = statistics.median(steps_and_rate(run)[1] for run in runs)
    return 10 * max(1, round(seconds * rate / 10))


def read_report(run: Path, measured: dict) -> dict:
    report = {}
    for path in reports_of(run, measured):
        report.update(json.loads(path.read_text())[0])
    return report


def kinds_of(report: dict) -> list[tuple[str, dict]]:
    """[(kind of pair, its results)] in the benchmark's order; one entry, if pairs have no kinds."""
    return list(report.get("kinds", {"all pairs": report}).items())


def columns(run: Path, report: dict) -> dict[str, float]:
    """{column: value} of a run for the main table; what was not measured is absent."""
    found = {}
    for kind, values in kinds_of(report):
        found[f"AO@10 {kind}"] = 100 * values["ao"]
        found[f"AO@1 {kind}"] = 100 * values["ao1"]
    # Of the first kind. A single pair has no unrelated one.
    first = kinds_of(report)[0][1]
    if "ao_random" in first:
        found["AO@10 unrelated"] = 100 * first["ao_random"]
    # Few benchmarks have pairs that change the meaning.
    if "contrast" in report:
        found["AO@10 opposites"] = 100 * report["ao_changed"]
        found["contrast"] = 100 * report["contrast"]
    # Where a benchmark has captions, "recall" is theirs; otherwise it is that of the queries, and
    # there is no "query_recall".
    if "recall" in report:
        found["R@10"] = 100 * report["recall"]["t2i@10"]
    if "query_recall" in report:
        found["R@10 query"] = 100 * report["query_recall"]["t2i@10"]
    if "paraphrase_recall" in report:
        found["R@10 paraphrase"] = 100 * report["paraphrase_recall"]["t2i@10"]
    if "zeroshot" in report:
        found["zero-shot top-1"] = 100 * report["zeroshot"]["top1"]
    found.update(text_columns(report))
    found["training, s"] = training_seconds([run])
    weights = torch.load(run / "model.pt", map_location="cpu", weights_only=True)["model"]
    found["weights trained"] = sum(weight.numel() for weight in weights.values())
    return found


def details(run: Path, report: dict) -> dict[str, float]:
    """{column: value} of a run for the second table."""
    found = {}
    for kind, values in kinds_of(report):
        # Pairs that are not independent of each other have no interval.
        if "ao_ci" in values:
            low, high = values["ao_ci"]
            found[f"AO@10 {kind}, half interval"] = 100 * (high - low) / 2
        found[f"JS@10 {kind}"] = 100 * values["js"]
    first = kinds_of(report)[0][1]
    if "js_random" in first:
        found["JS@10 unrelated"] = 100 * first["js_random"]
    for name in ("t2i@1", "t2i@5", "i2t@10"):
        if name in report.get("recall", {}):
            found[name] = 100 * report["recall"][name]
    # A few classes have no top-5.
    if "top5" in report.get("zeroshot", {}):
        found["zero-shot top-5"] = 100 * report["zeroshot"]["top5"]
    found["steps"] = steps_and_rate(run)[0]
    return found


def average(runs: list[dict[str, float]]) -> dict[str, dict]:
    """{column: {mean, sd, values}} over seeds; sd is that of a sample, 0 for a single run."""
    averages = {}
    for column in runs[0]:
        values = [float(run[column]) for run in runs]
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        averages[column] = {"mean": statistics.fmean(values), "sd": sd, "values": values}
    return averages


def print_table(title: str, table: dict[str, dict]):
    """table: {row: {column: {mean, sd}}}. A row may lack columns."""
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    print(f"\n| {title} | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}")
    for row, values in table.items():
        cells = [row]
        for name in names:
            digits = 0 if name in ("training, s", "weights trained", "steps") else 1
            cell = f"{values[name]['mean']:,.{digits}f}" if name in values else ""
            if name in values and values[name]["sd"]:
                cell += f" ±{values[name]['sd']:,.{digits}f}"
            cells.append(cell)
        print(f"| {' | '.join(cells)} |")


def split_argv(argv) -> tuple[list[str], list[str]]:
    """The flags before --, and those after it."""
    argv = sys.argv[1:] if argv is None else list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    for word in argv[end + 1:]:
        if word.partition("=")[0] in OWN_FLAGS:
            raise UserError(f"{word} after --: this program sets it itself")
    return argv[:end], argv[end + 1:]


def main(argv=None):
    own_flags, extra = split_argv(argv)
    cfg = parse_config(AblationConfig, own_flags)
    measured = measurements(cfg)
    runs = {"results": complete(cfg, measured, extra, {})}
    if cfg.equal_time:
        base = runs["results"]
        seconds = training_seconds(base["align"])
        steps = {row: steps_within(seconds, base[row]) for row in cfg.rows if row != "align"}
        runs["equal time"] = complete(cfg, measured, extra, steps)

    tables = {}
    for title, folders in runs.items():
        tables[title], tables[f"{title}, details"] = {}, {}
        for row in cfg.rows:
            reports = [(run, read_report(run, measured)) for run in folders[row]]
            tables[title][row] = average([columns(run, report) for run, report in reports])
            tables[f"{title}, details"][row] = average(
                [details(run, report) for run, report in reports])
    if cfg.where_lost:
        split = cfg.folder() / cfg.split
        table = {row: average([search_captions(run, split) for run in folders])
                 for row, folders in runs["results"].items()}
        # Rows whose language model keeps its pretrained weights.
        frozen_rows = [row for row in cfg.rows
                       if {"frozen", "align"} & set(ROWS[row.partition(":")[0]])]
        if frozen_rows:
            run = runs["results"][frozen_rows[0]][0]
            found = without_training(run, split, cfg.sts, cfg.triplets)
            table["the language model alone"] = average([found])
        tables["searching captions"] = table

    for title, table in tables.items():
        print_table(title, table)
    if cfg.jobs > 1:
        print(f"\nSeconds are those of {cfg.jobs} trainings at once, on a core each.")
    if cfg.json:
        with atomic_write(cfg.json) as file:
            file.write(json.dumps(tables, indent=1).encode() + b"\n")
    print(json.dumps(tables))


if __name__ == "__main__":
    run(main)
