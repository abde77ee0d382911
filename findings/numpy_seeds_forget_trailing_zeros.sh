# NumPy's generators of the seeds (7, 3) and (7, 3, 0) give the same numbers.
#
# Guess: a seed made of several numbers, such as (seed, epoch) and (seed, epoch, worker), gives a
#     stream of its own for each tuple, since NumPy recommends tuples for independent streams.
# Seen: zeros at the end do not count as long as the tuple has four numbers or fewer: (7, 3),
#     (7, 3, 0) and (7, 3, 0, 0) are one stream, and so are 0, (0,) and (0, 0). With a fifth number
#     they count.
# Versions: NumPy 2.4.6.
# Why it matters: shards shuffled by (seed, epoch) and samples drawn by (seed, epoch, worker) share
#     their random numbers on worker 0, and on that worker alone. Put a number that is not zero last,
#     or let SeedSequence.spawn() make the streams.
source "$(dirname "$0")/lib.sh"
install numpy==2.4.6
observe <<'PY'
import numpy as np

first = {seed: int(np.random.default_rng(seed).integers(2**60))
         for seed in [(7, 3), (7, 3, 0), (7, 3, 0, 0), (7, 3, 0, 0, 0), (7, 3, 1)]}
for seed, number in first.items():
    print(f"seed {seed}: first number {number}")
same = [number == first[7, 3] for number in first.values()]
if same != [True, True, True, False, False]:
    raise SystemExit("changed: two or three numbers and trailing zeros gave one stream")
PY
