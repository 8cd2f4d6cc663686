"""Find the text that is most like a question, by embeddings: `python examples/similarity.py [MODEL.gguf]`."""

import sys

import ggmq

TEXTS = ["Tom and Lily went to the zoo.", "The big red ball was lost.", "Mom made a cake with an apple."]

with ggmq.load(*sys.argv[1:2]) as model:
    known = model.embed(TEXTS)
    question = model.embed("Tom and Lily went to the park.")
    for score, text in sorted(zip((known @ question).tolist(), TEXTS, strict=True), reverse=True):
        print(f"{score:.3f}  {text}")
