"""The Python API: what `import ggmq` gives. docs/python.md is its manual."""
