# img2dataset writes a list of captions into KEY.txt as Python prints it, brackets and quotes too.
#
# Guess: of a column that holds several captions of each image, one caption, or one a line, lands in
#     the text file of the shard.
# Seen: the text file holds ['a dog', "a dog's ball"], with Python's choice of quotes, so that it is
#     not JSON either. The list itself is only in KEY.json.
# Versions: img2dataset 1.47.0; images are fetched from this machine alone.
# Why it matters: training reads KEY.txt and runs on captions such as "['a cat']": brackets are in
#     each of them, the usual 77 tokens cut the later captions off, and no step complains.
source "$(dirname "$0")/lib.sh"
install img2dataset==1.47.0
observe <<'PY'
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import cv2
import numpy as np
import pandas as pd
from img2dataset import download

captions = [["a dog", "a dog's ball"], ["a cat"]]


def main():
    cv2.imwrite("image.png", np.zeros((64, 64, 3), np.uint8))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory="."))
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/image.png"
    pd.DataFrame({"url": [address] * 2, "captions": captions}).to_parquet("list.parquet")
    download(
        url_list="list.parquet", input_format="parquet", caption_col="captions",
        output_format="webdataset", output_folder="shards", processes_count=1, thread_count=1,
    )
    with tarfile.open("shards/00000.tar") as shard:
        texts = [member for member in shard.getmembers() if member.name.endswith(".txt")]
        seen = [shard.extractfile(member).read().decode() for member in texts]
    print("captions:", captions)
    print("text files:", *seen, sep="\n")
    if seen != [str(texts) for texts in captions]:
        raise SystemExit("changed: each text file held the list as Python prints it")


# The download starts processes, which import this file again.
if __name__ == "__main__":
    main()
PY
