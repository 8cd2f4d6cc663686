"""What `python -m ggmq` finds in the folder above a checkout that is called ggmq: this folder, not the package in it."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

sys.exit(f"ggmq: {HERE} is a checkout, and the package ggmq is a folder in it. Run the command `ggmq` of the environment "
         f"where it is installed (such as {HERE}/.venv/bin/ggmq), or `cd {HERE}` first.")  # fmt: skip
