"""The embedded default data, and the drawing of what queries find."""

import common  # noqa: F401, it says in one line which packages are missing
