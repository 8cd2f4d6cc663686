"""`python -m ggmq`."""

import sys

from ggmq.cli import main

sys.exit(main())
