"""``python -m mulligan``."""

from mulligan.cli import main

main()
