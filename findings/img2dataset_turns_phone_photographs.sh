# img2dataset lays photographs on their side: it drops the orientation that a camera wrote.
#
# Guess: a photograph that every viewer shows upright is upright in the shards.
# Seen: cameras store a portrait as the sensor saw it, and its turn in the EXIF field Orientation.
#     img2dataset reads the pixels without the field, encodes them anew without it, and the portrait
#     is a landscape on its side. With disable_all_reencoding the original bytes, and the field, stay.
# Versions: img2dataset 1.47.0, Pillow 13.0.0; the image is fetched from this machine alone.
# Why it matters: captions such as "a man standing" then belong to people who lie, and a model that
#     was trained on them sees upright photographs in its evaluation. No count or log shows it.
source "$(dirname "$0")/lib.sh"
install img2dataset==1.47.0 pillow==13.0.0
observe <<'PY'
import io
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pandas as pd
from img2dataset import download
from PIL import Image, ImageOps


def main():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (64, 48)).save("photo.jpg", exif=exif)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory="."))
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/photo.jpg"
    pd.DataFrame({"url": [address]}).to_parquet("list.parquet")
    seen = {}
    for keep in (False, True):
        download(
            url_list="list.parquet", input_format="parquet", output_format="webdataset",
            output_folder=f"shards{keep}", processes_count=1, thread_count=1,
            resize_mode="no", disable_all_reencoding=keep,
        )
        with tarfile.open(f"shards{keep}/00000.tar") as shard:
            name, = (name for name in shard.getnames() if name.endswith(".jpg"))
            image = Image.open(io.BytesIO(shard.extractfile(name).read()))
        seen[keep] = ImageOps.exif_transpose(image).size
    upright = ImageOps.exif_transpose(Image.open("photo.jpg")).size
    print("width and height as viewers show it:", upright)
    print("in the shard:", seen[False])
    print("in the shard with disable_all_reencoding:", seen[True])
    if (upright, seen[False], seen[True]) != ((48, 64), (64, 48), (48, 64)):
        raise SystemExit("changed: only the encoded image lay on its side")


# The download starts processes, which import this file again.
if __name__ == "__main__":
    main()
PY
