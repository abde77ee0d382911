# webdataset's shardshuffle shuffles once: every epoch visits the shards in the same order.
#
# Guess: shardshuffle=100 gives a new order of the shards in each epoch, as shuffle=True of PyTorch.
# Seen: all epochs of one data set have one order, in this process and in a DataLoader's workers.
#     With detshuffle=True the order changes with the epoch, unless workers start anew each epoch:
#     then their count of epochs starts anew too, and the order stands still again.
# Versions: webdataset 1.0.2, torch 2.14.1, numpy 2.4.6.
# Why it matters: with large shards the order of shards is most of the shuffling. The same captions
#     meet as negatives of each other in every epoch, and nothing fails.
source "$(dirname "$0")/lib.sh"
install webdataset==1.0.2 torch==2.14.1 numpy==2.4.6
observe <<'PY'
import io
import tarfile

from torch.utils.data import DataLoader
from webdataset import WebDataset

for number in range(8):
    with tarfile.open(f"{number}.tar", "w") as shard:
        shard.addfile(tarfile.TarInfo(f"{number}.txt"), io.BytesIO())


def orders(detshuffle, **loader):
    epochs = WebDataset("{0..7}.tar", shardshuffle=100, detshuffle=detshuffle)
    if loader:
        epochs = DataLoader(epochs, batch_size=None, num_workers=1, **loader)
    return ["".join(sample["__key__"] for sample in epochs) for epoch in range(4)]


seen = {
    "shardshuffle": orders(False),
    "shardshuffle, workers kept": orders(False, persistent_workers=True),
    "shardshuffle, new workers": orders(False, persistent_workers=False),
    "detshuffle, workers kept": orders(True, persistent_workers=True),
    "detshuffle, new workers": orders(True, persistent_workers=False),
}
for name, epochs in seen.items():
    print(f"{name}:", *epochs)
if [len(set(epochs)) for epochs in seen.values()] != [1, 1, 1, 4, 1]:
    raise SystemExit("changed: only detshuffle with kept workers had a new order each epoch")
PY
