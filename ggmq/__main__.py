"""`python -m ggmq`."""

import sys
from pathlib import Path

if not sys.flags.safe_path:  # the current folder comes first, and what lies there is none of ours
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ggmq.cli import main

sys.exit(main())
