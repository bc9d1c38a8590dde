"""`python -m qcc.compiler.cli` is `qcc`."""

import sys

from qcc.compiler.cli import main

sys.exit(main())
