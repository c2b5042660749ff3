"""``python -m fxprune``: the command line of ``hwprune``."""

import sys

from fxprune.cli import main

sys.exit(main())
