"""Many answers at once on one event loop, and one that is cancelled: `python examples/many.py [MODEL.gguf]`."""

import asyncio
import sys

import ggmq


async def main(model: ggmq.Model) -> None:
    animals = ["dog", "cat", "bird", "frog", "fish", "bear", "duck", "cow"]
    made = await asyncio.gather(*(model.agenerate(f"The {a} was", max_tokens=12, temperature=0) for a in animals))
    for animal, result in zip(animals, made, strict=True):
        print(f"The {animal} was{result}")

    try:
        async with asyncio.timeout(0.05):
            await model.agenerate("Once", ignore_eos=True)
    except TimeoutError:
        print("too late: cancelled, and its slot is free")


with ggmq.load(*sys.argv[1:2], parallel=8) as model:
    asyncio.run(main(model))
