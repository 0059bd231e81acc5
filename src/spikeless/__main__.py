"""``python -m spikeless`` is the ``spikeless`` command."""

from spikeless.cli import main

main()
