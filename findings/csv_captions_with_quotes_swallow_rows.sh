# open_clip's list of images and captions loses rows where a caption begins with a quote.
#
# Guess: a tab-separated file has one pair of image and caption in each line.
# Seen: a caption that begins with a quote and does not end with one takes in all lines up to the
#     next quote, tabs and file names included: five lines become three samples. Quotes around a whole
#     caption vanish, and the caption "None" is trained on as the text "nan".
# Versions: open_clip_torch 3.3.0 (its open_clip_train.data.CsvDataset), pandas 3.0.6.
# Why it matters: Conceptual Captions and its like are such lists, unquoted. The lost images are
#     never counted, and one caption is a list of other images' captions.
source "$(dirname "$0")/lib.sh"
install open_clip_torch==3.3.0 pandas==3.0.6 torch==2.14.1 torchvision==0.29.1
observe <<'PY'
from open_clip_train.data import CsvDataset
from PIL import Image

captions = ['"a house', "a cat", 'the "end"', "None", '"stop"']
with open("pairs.tsv", "w") as file:
    print("filepath\ttitle", file=file)
    for i, caption in enumerate(captions):
        Image.new("RGB", (8, 8)).save(f"{i}.png")
        print(f"{i}.png\t{caption}", file=file)
samples = CsvDataset("pairs.tsv", lambda image: image, "filepath", "title", tokenizer=lambda t: t)
seen = [samples[i][1] for i in range(len(samples))]
print("captions in the file:", captions)
print("captions of the samples:", seen)
if seen != ['a house\n1.png\ta cat\n2.png\tthe end"', "nan", "stop"]:
    raise SystemExit("changed: the first caption swallowed two lines and None became nan")
PY
