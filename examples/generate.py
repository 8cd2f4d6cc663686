"""Go on with a text, whole and while it is made: `python examples/generate.py [MODEL.gguf]`."""

import sys

import ggmq

with ggmq.load(*sys.argv[1:2], workers=2) as model:
    result = model.generate("Once upon a time", max_tokens=40, temperature=0)
    print(result, f"({result.usage.n_made} tokens, {result.finish_reason})")

    with model.generate("The dog", max_tokens=30, seed=1, stream=True) as stream:
        for piece in stream:
            print(piece, end="", flush=True)
    print(f"\n{model.layers}")
