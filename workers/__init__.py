"""A device process: buffers, plans and kernels behind the bus."""
