"""Endurance: sessions, workers that come and go, pauses, kills and crowds, in numbers. `python -m tests.soak --help`."""
