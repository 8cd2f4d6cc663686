"""JSON schemas of the kinds that people write: objects in objects, enums, arrays, references, numbers with ranges."""

from __future__ import annotations

import random
from typing import Any

WORDS = ("name", "age", "city", "tags", "items", "score", "owner", "kind", "size", "note")


def schema(seed: int) -> dict[str, Any]:
    """A schema of an object. The same seed, the same schema."""
    rng = random.Random(seed)
    definitions = {name: _leaf(rng) if rng.random() < 0.5 else _object(rng, 1, []) for name in ("Thing", "Other")}
    made = _object(rng, 3, [f"#/$defs/{name}" for name in definitions])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "$defs": definitions}


def _object(rng: random.Random, depth: int, refs: list[str]) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(1, 4))
    out: dict[str, Any] = {"type": "object", "properties": {n: _any(rng, depth - 1, refs) for n in names}}
    out["required"] = rng.sample(names, rng.randint(1, len(names)))
    out["additionalProperties"] = False
    return out


def _any(rng: random.Random, depth: int, refs: list[str]) -> dict[str, Any]:
    kinds = ["leaf", "leaf", "ref"] + (["object", "array", "union"] if depth > 0 else [])
    kind = rng.choice(kinds if refs else [k for k in kinds if k != "ref"])
    if kind == "object":
        return _object(rng, depth, refs)
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": _any(rng, depth - 1, refs), "minItems": low, "maxItems": low + rng.randint(0, 2)}
    if kind == "union":
        return {"anyOf": [{"type": "null"}, _any(rng, depth - 1, refs)]}
    return {"$ref": rng.choice(refs)} if kind == "ref" else _leaf(rng)


def _leaf(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    return rng.choice([
        {"type": "string", "maxLength": rng.randint(1, 12)}, {"type": "string", "pattern": "^[a-z]{2,6}$"},
        {"type": "string", "format": rng.choice(["date", "time", "ipv4", "uuid"])}, {"type": "boolean"}, {"type": "null"},
        {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 100)},
        {"type": "integer", "exclusiveMinimum": low, "maximum": low + 7},
        {"type": "number", "minimum": 0, "maximum": rng.randint(1, 9)},
        {"enum": rng.sample(["red", "green", "a b", "\u00fc", 1, 2.5, True, None], rng.randint(1, 4))},
        {"const": rng.choice(["x", 3, False])}, {"type": ["string", "null"], "maxLength": 5},
    ])  # fmt: skip
