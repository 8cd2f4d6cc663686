"""The page at `/`: its files, and what it does in a real browser."""
