"""`python -m fixup_init` is `fixup-init`."""

import sys

from fixup_init.cli import main

sys.exit(main())
