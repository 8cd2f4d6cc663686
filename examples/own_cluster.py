"""A cluster of one's own with two models on it: `python examples/own_cluster.py [MODEL.gguf [MODEL.gguf]]`."""

import sys

import ggmq

with ggmq.local_cluster(workers=2) as cluster:
    for device in cluster.devices:
        print(device.name, device.state)
    first, second = (cluster.load(*path, parallel=1) for path in (sys.argv[1:2], sys.argv[2:3]))
    for model in (first, second):
        print(model.generate("Lily saw a", max_tokens=10, temperature=0), model.layers)
