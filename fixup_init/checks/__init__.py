"""Checks that a user runs on their own model: is its signal stable, and how much does one update change it?"""

from fixup_init.checks.stable import UnstableError as UnstableError
from fixup_init.checks.stable import assert_stable as assert_stable
from fixup_init.checks.update_size import Size as Size
from fixup_init.checks.update_size import UpdateSize as UpdateSize
from fixup_init.checks.update_size import update_size as update_size
