"""A plot of rank similarity over training time, a line for each way to use the language model.

    python -m experiments.curve --data flickr8k        # what stands after -- goes to every training

The y axis is the headline's AO@10 minus AO@10 of unrelated queries: an untrained model, which finds
nearly the same images for any query, is at 0. The points of a line are separate trainings of 1/8,
1/4, 1/2 and all of the seconds that align takes in the ablation, each with its whole schedule.
"""

import json
from dataclasses import dataclass

from data import UserError, atomic_write, flag, parse_config, run
from experiments.ablation import (AblationConfig, average, columns, complete, measurements,
                                  read_report, split_argv, steps_within, training_seconds)

SHARES = (1 / 8, 1 / 4, 1 / 2, 1)
# Okabe and Ito's palette, which colour-blind readers can tell apart as well.
COLOURS = ("#000000", "#D55E00", "#009E73", "#0072B2", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass
class CurveConfig(AblationConfig):
    figure: str = flag("assets/curve.png", "file of the plot")

    def __post_init__(self):
        super().__post_init__()
        if "align" not in self.rows:
            raise UserError("--rows needs align, whose training time is the measure")
        if self.equal_time or self.where_lost or self.json:
            raise UserError("--equal-time, --where-lost and --json are flags of the ablation: they "
                            "have no effect on the curve")


def draw(path: str, lines: dict[str, list[tuple]], kind: str):
    """lines: {row: its points (seconds, AO minus AO of unrelated queries, x100)}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for colour, (row, points) in zip(COLOURS, lines.items()):
        seconds, similarity = zip(*points)
        axes.plot(seconds, similarity, color=colour, linewidth=1.5, marker="o")
        axes.annotate(row, points[-1], (7, 0), textcoords="offset points", va="center",
                      color=colour)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="seconds of training", ylabel=f"{kind}, minus that of unrelated queries")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=160)


def main(argv=None):
    own_flags, extra = split_argv(argv)
    cfg = parse_config(CurveConfig, own_flags)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        # Said now, and not after hours of training.
        raise UserError("the plot needs matplotlib: pip install matplotlib") from None
    measured = measurements(cfg)
    base = complete(cfg, measured, extra, {})
    seconds = training_seconds(base["align"])
    lines = {row: [] for row in cfg.rows}
    for share in SHARES:
        steps = {row: steps_within(share * seconds, base[row]) for row in cfg.rows}
        if share == 1:
            # With all of the seconds, that is the run that they were measured of.
            del steps["align"]
        for row, runs in complete(cfg, measured, extra, steps).items():
            means = average([columns(path, read_report(path, measured)) for path in runs])
            headline = next(iter(means))
            similarity = means[headline]["mean"] - means["AO@10 unrelated"]["mean"]
            lines[row].append((training_seconds(runs), similarity))
    draw(cfg.figure, lines, headline)
    print(cfg.figure)
    print(json.dumps(lines))


if __name__ == "__main__":
    run(main)
