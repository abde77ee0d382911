"""Where the numbers of README.md and docs/ come from."""

import common  # noqa: F401, it names missing packages
