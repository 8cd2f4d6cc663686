"""Faults in numbers: real processes that are killed, stopped, cut off and slowed down. `python -m tests.faults --help`."""
