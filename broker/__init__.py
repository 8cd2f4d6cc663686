"""The bus on the main host: who is connected, what is where, which request waits for which reply."""
