"""The cluster file: schema, loading, keys, launching."""
