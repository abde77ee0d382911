# Among equal scores faiss and torch.topk put different images first, faiss another one for each k.
#
# Guess: of images with the same score the one added first comes first, and the best image does not
#     depend on how many are asked for.
# Seen: faiss's IndexFlatIP returns the first k images in reverse, so that the best of them is image
#     k - 1; IndexFlatL2 returns the same images in order. torch.topk's first image is neither.
# Versions: faiss-cpu 1.15.1, torch 2.14.1 (CPU), numpy 2.4.6.
# Why it matters: equal scores are not rare: copies of one image in a gallery, rounded features, a
#     collapsed model. "Same first image" and R@1 then depend on the tool and on k.
source "$(dirname "$0")/lib.sh"
install faiss-cpu==1.15.1 torch==2.14.1 numpy==2.4.6
observe <<'PY'
import faiss
import numpy as np
import torch

features = np.zeros((40, 8), dtype=np.float32)
features[:, 0] = 1
product, distance = faiss.IndexFlatIP(8), faiss.IndexFlatL2(8)
product.add(features)
distance.add(features)
scores = torch.from_numpy(features @ features[0])
first = []
for k in (1, 3, 5):
    results = [index.search(features[:1], k)[1][0].tolist() for index in (product, distance)]
    results.append(torch.topk(scores, k).indices.tolist())
    first.append([images[0] for images in results])
    print(f"k = {k}: IndexFlatIP {results[0]}, IndexFlatL2 {results[1]}, topk {results[2]}")
if [row[:2] for row in first] != [[0, 0], [2, 0], [4, 0]] or any(row[2] == 0 for row in first):
    raise SystemExit("changed: IndexFlatIP began with k - 1, IndexFlatL2 with 0, topk with neither")
PY
