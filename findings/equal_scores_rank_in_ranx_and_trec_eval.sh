# Two evaluators of one run with equal scores give ranks from 1 to 100 for the same document.
#
# Guess: equal scores share a rank, or the order of the run decides, in every evaluator alike.
# Seen: pytrec_eval, the measures of TREC, orders equal scores by name, the last name first, so that
#     the relevant document's name alone decides. ranx ignores names; of 100 equal scores the
#     reciprocal rank follows from the document's place in the run, but not in that order.
# Versions: ranx 0.3.21, pytrec-eval-terrier 0.5.11, numba 0.68.1, numpy 2.4.6.
# Why it matters: a collapsed or coarsely rounded model has equal scores everywhere, and gets a fine
#     MRR from one tool, a poor one from the other, and another one when files are renamed.
source "$(dirname "$0")/lib.sh"
install ranx==0.3.21 pytrec-eval-terrier==0.5.11 numba==0.68.1 numpy==2.4.6
observe <<'PY'
import pytrec_eval
from ranx import Qrels, Run, evaluate

trec, ranx = {}, {}
for name in ("aaa", "zzz"):
    for place in (0, 50, 99):
        documents = [f"d{i:02d}" for i in range(100)]
        documents[place] = name
        qrels, run = {"q": {name: 1}}, {"q": dict.fromkeys(documents, 1.0)}
        result = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(run)
        trec[name, place] = round(1 / result["q"]["recip_rank"])
        ranx[name, place] = round(1 / evaluate(Qrels(qrels), Run(run), "mrr"))
        print(f"relevant document {name} at place {place} of the run: rank {trec[name, place]} "
              f"in pytrec_eval, {ranx[name, place]} in ranx")
by_place = [ranx["aaa", place] for place in (0, 50, 99)]
if list(trec.values()) != [100] * 3 + [1] * 3:
    raise SystemExit("changed: pytrec_eval ordered equal scores by name, the last first")
if by_place != [ranx["zzz", place] for place in (0, 50, 99)] or by_place == sorted(by_place):
    raise SystemExit("changed: ranx's rank followed from the place, out of order")
PY
