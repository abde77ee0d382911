# open_clip shrinks palette images (GIF, many PNG) by leaving out pixels; transformers does not.
#
# Guess: both preprocessings of one CLIP turn an image into RGB and then shrink it with bicubic
#     smoothing, so a palette image and its RGB copy give the same input of the model.
# Seen: open_clip's transform shrinks first and turns into RGB afterwards. Pillow cannot smooth the
#     indices of a palette and takes the nearest pixel without a word. A fine chessboard becomes
#     plain black; transformers' processor makes it grey, and so does open_clip for the RGB copy.
# Versions: open_clip_torch 3.3.0, transformers 5.24.0, Pillow 13.0.0, torchvision 0.29.1.
# Why it matters: the same weights see another image in each library. Scores of data sets with GIF
#     or palette PNG files differ by library, and change when the files are stored anew as RGB.
source "$(dirname "$0")/lib.sh"
install open_clip_torch==3.3.0 transformers==5.24.0 torch==2.14.1 torchvision==0.29.1 pillow==13.0.0
observe <<'PY'
import numpy as np
from PIL import Image
from open_clip.transform import image_transform
from transformers import CLIPImageProcessor

open_clip = image_transform(8, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
transformers = CLIPImageProcessor(
    size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_normalize=False
)
row, column = np.mgrid[:64, :64]
chessboard = Image.fromarray(((row + column) % 2 * 255).astype(np.uint8)).convert("RGB")
brightness = {}
for name, image in {"RGB": chessboard, "palette": chessboard.quantize(2)}.items():
    brightness["open_clip", name] = open_clip(image)
    brightness["transformers", name] = transformers(image, return_tensors="pt")["pixel_values"]
brightness = {key: round(pixels.mean().item(), 1) for key, pixels in brightness.items()}
for (library, name), mean in brightness.items():
    print(f"{library}, {name} chessboard: mean brightness {mean}")
if list(brightness.values()) != [0.5, 0.5, 0.0, 0.5]:
    raise SystemExit("changed: only open_clip's palette chessboard was black, the others grey")
PY
