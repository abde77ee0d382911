"""The plot assets/curve.png: name AO@10 against R@10, a line a way to use the language model.

    python -m benchmark.curve                # what stands after -- goes to every training

A line's points are trainings of 1/8, 1/4, 1/2 and all of the seconds that align's own run takes:
separate ones, each with its whole schedule, as one that is cut short has learned at rates meant for
longer. Steps a second come from the ablation's runs, which are made first where they are missing.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from benchmark.ablation import (ROWS, average, columns, complete, split_argv, steps_within,
                                training_seconds)
from data import UserError, check_ranges, flag, parse_config, replacing, run

SHARES = (1 / 8, 1 / 4, 1 / 2, 1)  # of align's time
# Okabe and Ito's palette: told apart by colour-blind readers as well.
COLOURS = {"scratch": "#000000", "finetune": "#D55E00", "frozen": "#009E73", "align": "#0072B2",
           "geometry": "#CC79A7"}


@dataclass
class CurveConfig:  # of benchmark.ablation's flags those that matter here
    rows: list[str] = flag(list(ROWS), "align and others")
    seeds: list[str] = flag(["0"], "of the trainings; a point is their mean")
    data: str = flag("emoji", "a folder in $PARACLIP_DATA, or its whole path: train/, test/, val/")
    split: str = flag("test", "to measure on, val for choices", choices=("test", "val"))
    out: str = flag("runs/ablation", "folder of the run folders")
    jobs: int = flag(1, "trainings at once, each on a core of its own", at_least=1)
    figure: str = flag("assets/curve.png", "file of the plot")
    sts, triplets = "", ()  # none

    def __post_init__(self):
        check_ranges(self)
        if not {"align"} <= set(self.rows) <= set(ROWS):
            raise UserError(f"--rows {' '.join(self.rows)}: expected align, whose time is the "
                            f"others' measure, and some of {' '.join(ROWS)}")


def draw(path, lines: dict[str, list[tuple]], labels: tuple[str, str], seconds: float):
    """lines: {row: its points (x, y) from the shortest training to the longest}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for row, points in lines.items():
        x, y = zip(*points)
        axes.plot(x, y, color=COLOURS[row], linewidth=1.5)
        sizes = [8 + 40 * share for share in SHARES]  # longer trainings have larger dots
        axes.scatter(x, y, sizes, color=COLOURS[row], linewidths=0)
        axes.annotate(row, points[-1], (7, 0), textcoords="offset points", va="center",
                      color=COLOURS[row])
    axes.set(xlabel=f"{labels[0]}, x100", ylabel=f"{labels[1]}, x100")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    times = ", ".join(f"{share * seconds:.0f}" for share in SHARES)
    axes.set_title(f"dots from small to large: {times} seconds of training", fontsize=9, loc="left")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=160)


def main(argv=None):
    own, extra = split_argv(argv)
    cfg = parse_config(CurveConfig, own)
    try:
        import matplotlib  # noqa: F401  now, not after hours of training
    except ImportError:
        raise UserError("the plot needs matplotlib: pip install matplotlib") from None
    Path(cfg.figure).parent.mkdir(parents=True, exist_ok=True)
    base = complete(cfg, extra, {})
    seconds = training_seconds(base["align"])
    lines = {row: [] for row in cfg.rows}
    for share in SHARES:
        steps = {row: steps_within(share * seconds, base[row]) for row in cfg.rows}
        if share == 1:
            del steps["align"]  # that is its own run
        for row, runs in complete(cfg, extra, steps).items():
            means = average([columns(cfg, run) for run in runs])
            y = next(iter(means))  # the headline's AO@10
            lines[row].append((means["R@10"]["mean"], means[y]["mean"]))
    draw(cfg.figure, lines, ("R@10", y), seconds)
    print(f"{cfg.figure}: {seconds:.0f} s and shares of it")
    print(json.dumps({"seconds": [share * seconds for share in SHARES], "lines": lines}))


if __name__ == "__main__":
    run(main)
