"""The embedded default data, and the drawing of what queries find."""

import common  # noqa: F401, it names missing packages
