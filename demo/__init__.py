"""The embedded default data, and the drawing of what queries find."""
