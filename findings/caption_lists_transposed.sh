# DataLoader turns "five captions of each image" round: captions[0] holds one caption of each image.
#
# Guess: of a batch of samples (image, list of captions), captions[i] are the captions of image i.
# Seen: the default collation keeps the list and batches inside it, so that captions[j] is the j-th
#     caption of every image. With as many images as captions nothing else tells: 5 x 5 either way.
# Versions: torch 2.14.1, torch.utils.data.DataLoader.
# Why it matters: COCO and Flickr30k, as torchvision reads them, give such samples. Pairs of caption
#     and image taken by position are then wrong for all but the diagonal, and training runs on.
source "$(dirname "$0")/lib.sh"
install torch==2.14.1
observe <<'PY'
from torch.utils.data import DataLoader

samples = [(image, [f"image {image}, caption {j}" for j in range(5)]) for image in range(5)]
[(images, captions)] = DataLoader(samples, batch_size=5)
print("images:", images.tolist())
print("captions[1]:", captions[1])
if list(captions[1]) != [f"image {image}, caption 1" for image in range(5)]:
    raise SystemExit("changed: captions[1] was the second caption of every image")
PY
