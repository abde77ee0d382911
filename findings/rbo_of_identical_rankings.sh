# The package rbo gives two identical top-10 lists 0.65 of 1, and a different default to no p at all.
#
# Guess: rank-biased overlap of a ranking with itself is 1, whatever p and the length of the list.
# Seen: with p = 0.9 it is 0.65 for ten results and 0.10 for one, since the method sums only what it
#     sees of an infinite ranking; 1.0 comes from rbo_ext, or without p, which means no bias at all.
# Versions: rbo 0.1.3, numpy 2.4.6.
# Why it matters: the similarity of a query's and its paraphrase's results is the number that a
#     robust text tower is judged by. Its ceiling here is the length of the list, not the model.
source "$(dirname "$0")/lib.sh"
install rbo==0.1.3 numpy==2.4.6
observe <<'PY'
from rbo import RankingSimilarity

images = list("abcdefghij")
seen = []
for length in (1, 5, 10):
    ranking = RankingSimilarity(images[:length], images[:length])
    seen.append([ranking.rbo(p=0.9), ranking.rbo_ext(p=0.9), ranking.rbo()])
    print(f"{length} identical results: rbo(p=0.9) {seen[-1][0]:.3f}, "
          f"rbo_ext(p=0.9) {seen[-1][1]:.3f}, rbo() {seen[-1][2]:.3f}")
expected = [[1 - 0.9**length, 1, 1] for length in (1, 5, 10)]
if any(abs(a - b) > 1e-6 for got, want in zip(seen, expected) for a, b in zip(got, want)):
    raise SystemExit("changed: rbo(p=0.9) of n identical results was 1 - 0.9 ** n, the others 1")
PY
