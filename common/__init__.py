"""What all programs share and no reader comes for: flags, files, records, ranks, run folders."""

import importlib.util
import sys

# The programs import this before all else, so that what they lack is said in one line.
if sys.version_info < (3, 11):
    sys.exit("error: this is Python %d.%d: expected 3.11 or newer" % sys.version_info[:2])
for package in ("torch", "torchvision", "transformers", "PIL", "tqdm", "filelock", "networkx"):
    if importlib.util.find_spec(package) is None:
        sys.exit(f"error: the package {package} is missing: activate the virtual environment, or "
                 "run pip install -r requirements.txt")
