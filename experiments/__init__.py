"""Where the numbers of README.md and docs/ come from."""
