"""``python -m int8_ops``: see ``int8_ops.cli``."""

import sys

from .cli import main

sys.exit(main())
