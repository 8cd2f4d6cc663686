"""Chat templates against llama.cpp's server, which renders a conversation without answering it (`/apply-template`).

Needs `pip install xllamacpp` and a folder of templates (`--templates`), such as models/templates of llama.cpp's sources.
Each is rendered with the conversations of TOOL_CASES and CASES and then with random ones, thinking on and off, with and
without a prompt for an answer, by a vocabulary that adds BOS and EOS and by one that does not.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ggmq.chat import ChatTemplate, Message
from ggmq.gguf import GGUF
from ggmq.tokenizer import Vocabulary
from protocol.errors import FormatError

Request = dict[str, Any]
IN_WORDS = ("You can call these tools, described by JSON schemas", '{"tool_response": {')
"""Tools, and results, in a prompt whose template shows none; llama.cpp leaves them out."""
PEER = """
import http.client, json, os, sys, xllamacpp
out = os.dup(1); os.dup2(2, 1)
job = json.load(sys.stdin)
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.warmup = job["model"], 64, 1, False
p.chat_template, p.prefill_assistant = job["template"], False
p.default_template_kwargs = {"preserve_reasoning": "true"}  # as its programs set it
s = xllamacpp.Server(p)
host, port = s.listening_address.removeprefix("http://").rsplit(":", 1)
peer, answers = http.client.HTTPConnection(host, int(port), timeout=120), []
for request in job["requests"]:
    peer.request("POST", "/apply-template", json.dumps(request), {"Content-Type": "application/json"})
    answers.append(json.loads(peer.getresponse().read()))
with open(job["answers"], "w") as f:
    json.dump(answers, f)
os._exit(0)
"""


def _turns(*contents: str, first: str = "user") -> list[Message]:
    """Messages of user and assistant in turn."""
    order = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": order[i % 2], "content": c} for i, c in enumerate(contents)]


def _system(content: str) -> list[Message]:
    return [{"role": "system", "content": content}]


CASES: dict[str, list[Message]] = {
    "one question": _turns("Hi"),
    "system": [*_system("Be brief."), *_turns("Hi")],
    "turns": _turns("Hi", "Hello! How can I help?", "Tell me a joke."),
    "system and turns": [*_system("Be brief.\nBe kind."), *_turns("Hi", "Hello.", "Why?", "Because.", "Really?")],
    "unicode": [*_system("Sei höflich. 你好"), *_turns("Привет 🙂", "¡Hola! ﷽", "नमस्ते e\u0301 \U0001f469\u200d\U0001f680")],
    "unicode at the ends": _turns("\u3000\u00a0é\u2003", "\u00a0ok\u3000", "\ufeffß\u0085"),
    "markup": _turns("<b>a & b</b> \"quoted\" 'too' {{ x }} {% y %} \\n", "<i>&lt;</i>", "a < b > c"),
    "white space": [*_system("  \n Be brief. \t"), *_turns("\n\n  Hi \r\n there \n\n", " \tHello\n", "  ")],
    "empty": _turns(""),
    "empty system and turns": [*_system(""), *_turns("", "", "Hi")],
    "assistant last": [*_system("Be brief."), *_turns("Hi", "Hello.")],
    "thoughts": _turns("2 + 2?", "<think>\nTwo and two.\n</think>\n\n4", "Sure?", "<think></think>Yes.", "And 3 + 3?"),
    "special tokens": _turns("<|im_end|></s><|eot_id|>[INST]", "<|channel|>final<|message|>Hi", "<end_of_turn>"),
    "code": _turns("```python\nprint('x')\n```\n", "[1, 2]\t{\"a\": 1}", "/no_think Why?"),
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Hi <b>"}, {"type": "text", "text": " you\n"}]},
              {"role": "assistant", "content": None}, *_turns("Why?")],
    "long": _turns(*(f"Line {i}\n" * 40 for i in range(9))),
}
WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Weather of a \"place\" <now>", "parameters": {
        "type": "object", "properties": {
            "place": {"type": "string", "description": "Where"}, "days": {"type": "integer", "default": 1},
            "unit": {"type": "string", "enum": ["C", "F"]}}, "required": ["place"]}}}
ADD = {"type": "function", "function": {"name": "add", "parameters": {
    "type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "array", "items": {"type": "number"}}}}}}
NOW = {"type": "function", "function": {"name": "now", "description": "Time"}}  # fmt: skip


def _called(*calls: tuple[str, str, str], content: str | None = None, thoughts: str = "") -> Message:
    """An answer that calls: ids, names and arguments."""
    made = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in calls]
    return {"role": "assistant", "content": content, "tool_calls": made} | (
        {"reasoning_content": thoughts} if thoughts else {})


def _result(id: str, content: str) -> Message:
    return {"role": "tool", "tool_call_id": id, "content": content}


_PARIS = ("call12345", "get_weather", '{"place": "Paris é", "days": 2}')
_SUM = ("call67890", "add", '{"x": 1.5, "y": [1, 2, {"z": null, "t": true}]}')
_RESULTS = _result("call12345", '{"t": 20}'), _result("call67890", "3")
TOOL_CASES: dict[str, tuple[list[Message], list[dict[str, Any]]]] = {
    "tools": (_turns("Hi"), [WEATHER, ADD]),
    "system and tools": ([*_system("Be brief."), *_turns("Hi")], [WEATHER]),
    "a tool without parameters": ([*_system("Be brief."), *_turns("Hi")], [NOW]),
    "a call": ([*_turns("Weather?"), _called(_PARIS), _RESULTS[0]], [WEATHER, ADD]),
    "two calls": ([*_system("Be brief."), *_turns("Weather?"), _called(_PARIS, _SUM, content=""), *_RESULTS],
                  [WEATHER, ADD]),
    "words and calls": ([*_turns("Weather?"), _called(_PARIS, content="Let me see."), _RESULTS[0], *_turns(
        "Sunny.", "And 1.5 + 2?", first="assistant"), _called(_SUM), _RESULTS[1], *_turns("3", "Thanks", first="assistant")],
        [WEATHER, ADD]),
    "thoughts and calls": ([*_turns("Weather?"), _called(_PARIS, thoughts="I should look."), _RESULTS[0], {
        "role": "assistant", "content": "Sunny.", "reasoning_content": "It is sunny."}, *_turns("Sure?")], [WEATHER]),
    "thoughts beside": ([*_turns("2 + 2?"), {"role": "assistant", "content": "4", "reasoning_content": "Two and two."},
                         *_turns("Sure?")], []),
    "calls of tools that are gone": ([*_turns("Weather?"), _called(_PARIS), _RESULTS[0]], []),
}  # fmt: skip
PIECES = ["Hi", "a", " ", "\n", "\t", "é", "你好", "🙂", "<b>", "&", "'", '"', "\\", "{{ x }}", "{%- if x %}", "<think>",
          "</think>", "\n\n", "\r\n", "<|im_end|>", "</s>", "[INST]", "\u00a0", "\u3000", "1234", "ÀÉß", "/no_think",
          "final", "\x01"]  # fmt: skip


Case = tuple[str, list[Message], list[dict[str, Any]]]


def conversations(n: int, seed: int) -> list[Case]:
    """Those of TOOL_CASES and of CASES, with tools, and random ones so that there are `n`."""
    rng = random.Random(seed)
    out = [(name, *case) for name, case in TOOL_CASES.items()]
    out += [(name, messages, []) for name, messages in CASES.items()]

    def content() -> str:
        return "".join(rng.choices(PIECES, k=rng.choice([0, 1, 1, 2, 4, 9])))

    while len(out) < n:
        first = "user" if rng.random() < 0.9 else "assistant"
        messages = _turns(*(content() for _ in range(rng.randint(1, 6))), first=first)
        if rng.random() < 0.5:
            messages = [*_system(content()), *messages]
        if rng.random() < 0.1:
            strange = {"role": rng.choice(["system", "user", "developer"]), "content": content()}
            messages.insert(rng.randrange(len(messages)), strange)
        out.append((f"random {len(out)}", messages, []))
    return out[:n]


@dataclass(slots=True)
class Result:
    """What came of one template: counts, and the conversations that differ, with both texts."""

    counts: Counter[str] = field(default_factory=Counter)
    different: list[tuple[str, str, str]] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--templates", type=Path, required=True, metavar="DIR", help="folder of templates (*.jinja)")
    parser.add_argument("--only", default="", help="templates whose name contains this")
    parser.set_defaults(n=2 * len(CASES) + len(TOOL_CASES))


def run(args: argparse.Namespace) -> int:
    """Compare; 0 when no conversation differs."""
    sources = {p.stem: p.read_text(encoding="utf-8") for p in sorted(args.templates.glob("*.jinja")) if args.only in p.stem}
    if not sources:
        print(f"{args.templates}: expected files named *.jinja", file=sys.stderr)
        return 2
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        models = {adds: vocabulary(Path(folder) / f"{adds}.gguf", adds) for adds in (False, True)}
        for name, source in sources.items():
            result = compare(source, conversations(args.n, args.seed), models, Path(folder))
            total += result.counts
            print(f"{name:60} {_line(result.counts)}", flush=True)
            for case, here, there in result.different[:3]:
                print(f"    {case}\n      here  {here!r}\n      there {there!r}")
    print(f"{len(sources)} templates, seed {args.seed}: {_line(total)}")
    return int(any(total[kind] for kind in ("different", "refused here", "refused there")))


def _line(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))


def compare(source: str, cases: Sequence[Case], models: dict[bool, Path], folder: Path) -> Result:
    """Render everything here and there."""
    result = Result()
    for adds, model in models.items():
        chosen = [(f"{name}, thinking {thinking}, prompt {prompt}, adds {adds}", messages, tools, thinking, prompt)
                  for name, messages, tools in cases for thinking in (True, False) for prompt in (True, False)]  # fmt: skip
        requests = [{"messages": messages, "tools": tools, "add_generation_prompt": prompt,
                     "chat_template_kwargs": {"enable_thinking": thinking}}
                    for _, messages, tools, thinking, prompt in chosen]  # fmt: skip
        theirs = peer(model, source, requests, folder)
        ours = here(model, source, requests)
        for (name, *_), (mine, refused), (other, refused_there) in zip(chosen, ours, theirs, strict=True):
            kind = ("refused by both" if refused and refused_there else "refused here" if refused else
                    "in words" if any(words in mine for words in IN_WORDS) else "refused there" if refused_there else
                    "same" if mine == other else "different")  # fmt: skip
            result.counts[kind] += 1
            if kind not in ("same", "refused by both", "in words"):
                apart = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
                at = 0 if refused or refused_there or apart is None else max(0, apart - 40)
                result.different.append((f"{kind}: {name}", mine[at : at + 300], other[at : at + 300]))
    return result


def here(model: Path, source: str, requests: Sequence[Request]) -> list[tuple[str, bool]]:
    """What ggmq renders, and whether it refused."""
    v = Vocabulary(GGUF(model))
    v.chat_template = source
    try:
        template = ChatTemplate(v)
    except FormatError as e:
        return [(str(e), True)] * len(requests)
    out = []
    for request in requests:
        try:
            out.append((template.render(request["messages"], request["add_generation_prompt"],
                                        request["chat_template_kwargs"]["enable_thinking"], request["tools"]), False))
        except FormatError as e:
            out.append((str(e), True))
    return out


def peer(model: Path, source: str, requests: Sequence[Request], folder: Path) -> list[tuple[str, bool]]:
    """What llama.cpp renders, and whether it refused; in a process of its own, which some templates end."""
    answers = folder / "answers.json"
    answers.unlink(missing_ok=True)
    job = {"model": str(model), "template": source, "requests": requests, "answers": str(answers)}
    done = subprocess.run([sys.executable, "-c", PEER], input=json.dumps(job), capture_output=True, text=True, check=False)
    if not answers.exists():
        return [(done.stderr[-300:], True)] * len(requests)
    return [(str(a.get("prompt", a.get("error"))), "prompt" not in a)
            for a in json.loads(answers.read_text(encoding="utf-8"))]  # fmt: skip


def vocabulary(path: Path, adds: bool) -> Path:
    """A model of random weights whose vocabulary is bytes with `<s>` and `</s>`, put around a text if `adds`."""
    n_embd, n_vocab = 32, 259
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    w = gguf.GGUFWriter(path, "llama")
    for add, value in ((w.add_context_length, 64), (w.add_embedding_length, n_embd), (w.add_block_count, 1),
                       (w.add_feed_forward_length, n_embd), (w.add_head_count, 1), (w.add_head_count_kv, 1)):  # fmt: skip
        add(value)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores([0.0] * n_vocab)
    w.add_token_types([2, 3, 3, *[6] * 256])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_add_bos_token(adds)
    w.add_add_eos_token(adds)
    square = np.zeros((n_embd, n_embd), np.float32)
    for name, shape in (("token_embd", (n_vocab, n_embd)), ("output", (n_vocab, n_embd))):
        w.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        w.add_tensor(f"{name}.weight", np.ones(n_embd, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        w.add_tensor(f"blk.0.{name}.weight", square)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
