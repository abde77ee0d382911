"""Which models of transformers work, tried with tiny random weights: the tables of docs/models.md.

    python -m experiments.models --half towers          # the table of two-tower models
"""

from dataclasses import dataclass

from common.cli import flag, parse_config, run
from experiments.two_towers import print_two_towers


@dataclass
class ModelsConfig:
    half: str = flag("towers", "which table", choices=("towers",))
    types: list[str] = flag([], "only models whose names begin so")


def main(argv=None):
    cfg = parse_config(ModelsConfig, argv)
    print_two_towers(cfg.types)


if __name__ == "__main__":
    run(main)
