# open_clip and transformers crop some photographs one pixel apart, 640 x 427 among them.
#
# Guess: "resize the shorter edge to 224, then cut the centre" names one and the same window.
# Seen: 640 x 427 shrinks to 335 x 224, and half of the margin of 111 columns is 55.5. open_clip
#     (torchvision's CenterCrop) cuts from column 56 on, transformers from column 55 on. All pixels
#     agree once one crop is moved by one column; 640 x 480, with an even margin, agrees at once.
# Versions: open_clip_torch 3.3.0, transformers 5.24.0, Pillow 13.0.0, torchvision 0.29.1.
# Why it matters: 640 x 427 is frequent in COCO and Flickr30k. Features of the same weights differ
#     between the libraries on these images only, which looks like noise of the arithmetic.
source "$(dirname "$0")/lib.sh"
install open_clip_torch==3.3.0 transformers==5.24.0 torch==2.14.1 torchvision==0.29.1 pillow==13.0.0
observe <<'PY'
import numpy as np
from PIL import Image
from open_clip.transform import image_transform
from transformers import CLIPImageProcessor

open_clip = image_transform(224, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
transformers = CLIPImageProcessor(do_normalize=False)
seen = []
for width, height in ((640, 480), (640, 427)):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    a = open_clip(image)
    b = transformers(image, return_tensors="pt")["pixel_values"][0]
    apart = (a - b).abs().max().item()
    # Column x of open_clip's crop against column x + 1 of transformers'.
    moved = (a[:, :, :-1] - b[:, :, 1:]).abs().max().item()
    seen.append((apart < 0.01, moved < 0.01))
    print(f"{width} x {height}: largest difference {apart:.3f}, moved by one column {moved:.3f}")
if seen != [(True, False), (False, True)]:
    raise SystemExit("changed: 640 x 480 was cropped alike and 640 x 427 one column apart")
PY
