# datasets' webdataset loader refuses a field that only the fifth sample has, and drops the sixth's.
#
# Guess: a field that some samples lack is None there, and is kept where it exists.
# Seen: the columns are those of the first five samples of the first shard. Where one of these five
#     differs from the others, the loader fails; a field that the sixth sample adds is gone from the
#     data set without a word.
# Versions: datasets 5.2.0, pyarrow 26.0.1.
# Why it matters: optional fields (a second caption, a label, a paraphrase) disappear from the whole
#     data set, depending on the order within the shard; webdataset itself shows them all.
source "$(dirname "$0")/lib.sh"
install datasets==5.2.0 pyarrow==26.0.1 pandas==3.0.6
observe <<'PY'
import io
import tarfile

import datasets

datasets.disable_progress_bars()
columns = {}
for labelled in (5, 6):
    with tarfile.open(f"{labelled}.tar", "w") as shard:
        for i in range(1, 8):
            for extension in ("txt", "cls") if i == labelled else ("txt",):
                member = tarfile.TarInfo(f"{i}.{extension}")
                member.size = 1
                shard.addfile(member, io.BytesIO(b"1"))
    try:
        rows = datasets.load_dataset(
            "webdataset", data_files=f"{labelled}.tar", split="train", cache_dir="cache"
        )
        columns[labelled] = [name for name in rows.column_names if not name.startswith("__")]
    except ValueError as error:
        columns[labelled] = f"ValueError: {error}"
    print(f"label in sample {labelled} of 7: {columns[labelled]}")
if not columns[5].startswith("ValueError: ") or columns[6] != ["txt"]:
    raise SystemExit("changed: a label in the fifth sample failed, in the sixth it was dropped")
PY
