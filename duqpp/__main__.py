"""`python -m duqpp` is the `duqpp` command."""

import sys

from duqpp.cli.main import main

sys.exit(main())
