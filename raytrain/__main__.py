"""`python -m raytrain` is the command line."""

import sys

from raytrain.cli import main

sys.exit(main())
