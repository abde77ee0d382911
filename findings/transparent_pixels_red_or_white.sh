# Transparent pixels show their hidden colour to open_clip and are white to transformers.
#
# Guess: both preprocessings of one CLIP treat an image with an alpha channel alike.
# Seen: open_clip drops the alpha channel, so that a fully transparent red pixel is pure red;
#     transformers' processor lays the image on white, and the same pixel is white.
# Versions: open_clip_torch 3.3.0, transformers 5.24.0, Pillow 13.0.0, torchvision 0.29.1.
# Why it matters: logos, icons and cut-out products are RGBA files whose hidden pixels hold black or
#     leftovers. A model trained through one library is measured on another image in the other.
source "$(dirname "$0")/lib.sh"
install open_clip_torch==3.3.0 transformers==5.24.0 torch==2.14.1 torchvision==0.29.1 pillow==13.0.0
observe <<'PY'
from PIL import Image
from open_clip.transform import image_transform
from transformers import CLIPImageProcessor

open_clip = image_transform(8, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
transformers = CLIPImageProcessor(
    size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_normalize=False
)
seen = []
for alpha in (255, 128, 0):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, alpha))
    ours = open_clip(image)[:, 4, 4].tolist()
    theirs = transformers(image, return_tensors="pt")["pixel_values"][0, :, 4, 4].tolist()
    seen.append([[round(value, 1) for value in rgb] for rgb in (ours, theirs)])
    print(f"red with alpha {alpha}: open_clip {seen[-1][0]}, transformers {seen[-1][1]}")
red, pink, white = [1.0, 0.0, 0.0], [1.0, 0.5, 0.5], [1.0, 1.0, 1.0]
if seen != [[red, red], [red, pink], [red, white]]:
    raise SystemExit("changed: open_clip showed red throughout, transformers red, pink and white")
PY
