"""Have a model call a Python function, and answer in JSON of a schema: `python examples/tools.py [MODEL.gguf]`."""

import json
import sys

import ggmq


def weather(city: str) -> str:
    return {"Rome": "sunny", "Oslo": "snow"}[city]


TOOL = {"type": "function", "function": {
    "name": "weather", "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
}}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"coat": {"type": "boolean"}, "city": {"enum": ["Rome", "Oslo"]}},
          "required": ["coat", "city"], "additionalProperties": False}  # fmt: skip

with ggmq.load(*sys.argv[1:2]) as model:
    messages = [{"role": "user", "content": "Do I need a coat in Oslo?"}]
    asked = model.chat(messages, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, seed=1)
    messages.append(asked.message)
    for call in asked.tool_calls:
        said = weather(**call.parsed)
        print(f"{call.name}({call.parsed['city']}) is {said}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": said})
    answer = model.chat(messages, json_schema=SCHEMA, seed=1)
    print(json.loads(answer.text))
