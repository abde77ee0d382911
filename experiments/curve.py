"""A plot of rank similarity and recall over training time, a line for each row of the ablation.

    python -m experiments.curve --data flickr8k        # what stands after -- goes to every training

On the left the headline's AO@10 minus AO@10 of unrelated queries: an untrained model, which finds
nearly the same images for any query, is at 0. On the right R@10: rank similarity alone would favour
a model that finds little. The points of a line are separate trainings of 1/8, 1/4, 1/2 and all of
the seconds that align takes in the ablation, each with a schedule of its own. (A training that is
shorter than --warmup ends before its learning rate has reached the peak.)
"""

import json
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError, flag, parse_config, run
from common.files import atomic_write
from experiments.ablation import (AblationConfig, average, columns, complete, measurements,
                                  read_report, split_argv, steps_within, training_seconds)

SHARES = (1 / 8, 1 / 4, 1 / 2, 1)
# Okabe and Ito's palette, which colour-blind readers can tell apart as well.
COLOURS = ("#000000", "#D55E00", "#009E73", "#0072B2", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")


@dataclass
class CurveConfig(AblationConfig):
    figure: str = flag("assets/curve.png", "file of the plot")

    def __post_init__(self):
        super().__post_init__()
        if not self.figure.endswith(".png") or not Path(self.figure).absolute().parent.is_dir():
            raise UserError(f"--figure {self.figure}: expected a .png file in a folder that exists")
        if "align" not in self.rows:
            raise UserError("--rows needs align, whose training time is the measure")
        if len(self.rows) > len(COLOURS):
            raise UserError(f"--rows: expected at most {len(COLOURS)}, a colour for each")
        if self.equal_time or self.where_lost or self.json:
            raise UserError("--equal-time, --where-lost and --json are flags of the ablation: they "
                            "have no effect on the curve")


def point_of(runs: list[Path], measured: dict) -> dict[str, float]:
    """{what is drawn: value x100, "seconds": of training}, means over these runs of one length."""
    means = average([columns(run, read_report(run, measured)) for run in runs])
    # The headline's AO@10 is the first column.
    headline = next(iter(means))
    if "AO@10 unrelated" not in means:
        raise UserError("the benchmark has a single pair: the plot needs unrelated ones")
    similarity = means[headline]["mean"] - means["AO@10 unrelated"]["mean"]
    point = {"seconds": training_seconds(runs), f"{headline}, minus that of unrelated": similarity}
    # A benchmark whose pairs name no images has no recall.
    if "R@10" in means:
        point["R@10"] = means["R@10"]["mean"]
    return point


def draw(path: str, lines: dict[str, list[dict]]):
    """lines: {row: its points, the shortest training first}. A panel for each value of a point."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    first_point = next(iter(lines.values()))[0]
    values = [name for name in first_point if name != "seconds"]
    figure = Figure(figsize=(8, 4), layout="constrained")
    for axes, value in zip(figure.subplots(1, len(values), squeeze=False)[0], values):
        for colour, (row, points) in zip(COLOURS[:len(lines)], lines.items(), strict=True):
            seconds = [point["seconds"] for point in points]
            axes.plot(seconds, [point[value] for point in points], color=colour, linewidth=1.5,
                      marker="o", label=row)
        axes.set_xscale("log")
        axes.set_xticks([20, 50, 100, 200, 500, 1000, 2000])
        axes.xaxis.set_major_formatter("{x:g}")
        # Otherwise the ticks in between are labelled as powers of ten, over the labels above.
        axes.xaxis.set_minor_formatter(NullFormatter())
        longest = max(point["seconds"] for points in lines.values() for point in points)
        shortest = min(point["seconds"] for points in lines.values() for point in points)
        axes.set_xlim(shortest / 1.2, longest * 1.2)
        axes.set(xlabel="seconds of training", ylabel=value)
        axes.spines[["top", "right"]].set_visible(False)
    # All panels have the same lines.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(lines),
                  frameon=False)
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
            # That training exists already: it is the one whose seconds were measured.
            del steps["align"]
        for row, runs in complete(cfg, measured, extra, steps).items():
            lines[row].append(point_of(runs, measured))
    draw(cfg.figure, lines)
    print(cfg.figure)
    print(json.dumps(lines))


if __name__ == "__main__":
    run(main)
