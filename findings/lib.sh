# Sourced by every finding: `install` makes a virtual environment in a temporary folder, and
# `observe` runs the Python program on its standard input there. The folder goes when the script ends.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
# Nothing but the packages may come over the network, and only the finding's own lines are printed.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error TQDM_DISABLE=1

install() { # PACKAGE==VERSION ...
    python3 -m venv venv
    venv/bin/pip install -qq --no-compile --disable-pip-version-check "$@"
}

observe() {
    cat > observe.py
    venv/bin/python observe.py
}
