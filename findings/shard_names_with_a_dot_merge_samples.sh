# webdataset takes a sample's key up to the first dot, so that files named by a number merge.
#
# Guess: a file's extension is what follows the last dot; 0.5_dog.txt and 0.5_dog.cls are one sample,
#     0.7_cat.txt and 0.7_cat.cls another.
# Seen: the key is "0" for all four, and they are one sample with the fields "5_dog.txt",
#     "5_dog.cls", "7_cat.txt" and "7_cat.cls". Asking for "txt" finds nothing in it.
# Versions: webdataset 1.0.2.
# Why it matters: images named by a score, a time or a version ("photo.v2.jpg") are valid tar members
#     and look right in a listing. Loaders that skip samples without a caption lose them in silence.
source "$(dirname "$0")/lib.sh"
install webdataset==1.0.2
observe <<'PY'
import io
import tarfile

import webdataset

with tarfile.open("shard.tar", "w") as shard:
    for name in ("0.5_dog.txt", "0.5_dog.cls", "0.7_cat.txt", "0.7_cat.cls", "plain.txt"):
        member = tarfile.TarInfo(name)
        member.size = 1
        shard.addfile(member, io.BytesIO(b"1"))
samples = list(webdataset.WebDataset("shard.tar", shardshuffle=False))
fields = [[name for name in sample if not name.startswith("__")] for sample in samples]
for sample, names in zip(samples, fields):
    print(f"key {sample['__key__']!r}: {names}")
if fields != [["5_dog.txt", "5_dog.cls", "7_cat.txt", "7_cat.cls"], ["txt"]]:
    raise SystemExit("changed: the two samples with a dot in their names became one")
PY
