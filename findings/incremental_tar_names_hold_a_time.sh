# GNU tar's incremental archives, read by Python's tarfile and so by webdataset, have names that
# begin with a time.
#
# Guess: an archive that `tar --listed-incremental` wrote holds the names that `tar --list` shows.
# Seen: tarfile takes the field where such archives keep a member's time of access for the first
#     part of a long name, and puts it before the name. 1.txt and 1.cls, read at different times,
#     are two samples of webdataset, each with a single field, and no error is raised.
# Versions: Python 3.11, GNU tar 1.34, webdataset 1.0.2.
# Why it matters: data sets are backed up with this option, and such an archive may be trained on as
#     it is. Captions part from their images, and loaders that skip samples without one go on.
source "$(dirname "$0")/lib.sh"
install webdataset==1.0.2
mkdir set
echo a > set/1.txt
echo 7 > set/1.cls
touch -a -d "2020-01-01 UTC" set/1.txt
touch -a -d "2021-01-01 UTC" set/1.cls
tar --version | head -n 1
tar --create --listed-incremental=snapshot --file=shard.tar -C set .
observe <<'PY'
import subprocess

import webdataset

listed = subprocess.run(["tar", "--list", "--file=shard.tar"], capture_output=True, text=True)
print("tar lists:", listed.stdout.split())
samples = [(sample["__key__"], [name for name in sample if not name.startswith("__")])
           for sample in webdataset.WebDataset("shard.tar", shardshuffle=False)]
print("webdataset:", samples)
fields = sorted(names for _, names in samples)
if "./1.txt" not in listed.stdout or fields != [["cls"], ["txt"]]:
    raise SystemExit("changed: one sample of an incremental archive was read as two")
PY
