"""`ggmq serve`: HTTP in front of services; Starlette is imported here and below only."""
