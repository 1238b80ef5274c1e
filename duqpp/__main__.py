"""`python -m duqpp` is the `duqpp` command."""

import sys

from duqpp.cli import main

sys.exit(main())
