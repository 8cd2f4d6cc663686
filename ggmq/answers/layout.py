"""How the models of a family write their answers, and how a family is told by its template."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ggmq.answers.calls import JsonCalls, NamedCalls, Syntax, TaggedCalls
from ggmq.answers.pythonic import GemmaCalls, PythonCalls


@dataclass(frozen=True)
class Layout:
    """Attributes:
    name: of the family.
    thoughts: markers around thoughts. calls: how calls are written. bare: calls that begin with no marker.
    noise: markers around content, which are dropped. prompt_opens: an end of the prompt that is part of the answer.
    channels: an answer is messages in channels. calls_end_thoughts: a call may come where thoughts have not ended.
    """

    name: str
    thoughts: tuple[tuple[str, str], ...] = ()
    calls: tuple[Syntax, ...] = ()
    bare: JsonCalls | None = None
    noise: tuple[str, ...] = ()
    prompt_opens: str = ""
    channels: bool = False
    calls_end_thoughts: bool = False

    @property
    def markers(self) -> frozenset[str]:
        """Texts of which some are control tokens, which are hidden unless a reader is to see them."""
        if self.channels:
            return frozenset(("<|channel|>", "<|constrain|>", "<|message|>", "<|start|>", "<|end|>"))
        out = {text for pair in self.thoughts for text in pair} | set(self.noise)
        for syntax in self.calls:
            out |= {*syntax.openers, *syntax.noise, *getattr(syntax, "close", ())}
            if isinstance(syntax, NamedCalls):
                out |= {*syntax.name_ends, syntax.id_marker}
            if isinstance(syntax, TaggedCalls):
                out |= {syntax.function[0], *syntax.function[1], syntax.key[0], *syntax.key[1], *syntax.value, syntax.end}
            if isinstance(syntax, GemmaCalls):
                out.add('<|"|>')
        if self.bare and not self.bare.wrapped:
            out.add("<|python_tag|>")
        return frozenset(out - {""})


THINK = (("<think>", "</think>"),)
HERMES = JsonCalls(("<tool_call>",), ("</tool_call>",))
_WORDS = JsonCalls(('{"tool_calls"',), wrapped=True, known_only=True)
GENERIC = Layout("generic", calls=(_WORDS,), bare=_WORDS)
_PLAIN = JsonCalls((), known_only=True)

_DSML = "｜DSML｜"
_FAMILIES: tuple[tuple[tuple[str, ...], Layout], ...] = (
    (("<|channel|>",), Layout("channels", channels=True)),
    ((">>>all",), Layout("functionary", noise=(">>>all\n",), prompt_opens=">>>",
                         calls=(NamedCalls((">>>",), ("\n",), known_only=True),))),
    (("<|tool_calls_section_begin|>",), Layout("kimi", calls=(NamedCalls(
        ("<|tool_call_begin|>",), ("<|tool_call_argument_begin|>",), ("<|tool_call_end|>",),
        noise=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"), ids_have_names=True),))),
    (("dsml_token", "DSML"), Layout("dsml", calls_end_thoughts=True, calls=(TaggedCalls(
        (f"<{_DSML}function_calls>", f"<{_DSML}tool_calls>"), (f'<{_DSML}invoke name="', ('">',)),
        (f'<{_DSML}parameter name="', ('" string="true">', '" string="false">', '">')), ("", f"</{_DSML}parameter>"),
        f"</{_DSML}invoke>", (f"</{_DSML}function_calls>", f"</{_DSML}tool_calls>")),))),
    (("<｜tool▁calls▁begin｜>",), Layout("deepseek", calls=(NamedCalls(
        ("<｜tool▁call▁begin｜>",), ("<｜tool▁sep｜>",), ("<｜tool▁call▁end｜>",), kinds=("function",),
        noise=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"), skips=("```json",)),))),
    (("[TOOL_CALLS]",), Layout("mistral", thoughts=(("[THINK]", "[/THINK]"),), calls=(NamedCalls(
        ("[TOOL_CALLS]",), ("[ARGS]", "{"), id_marker="[CALL_ID]", lists=True),))),
    (("<|START_ACTION|>",), Layout(
        "command", thoughts=(("<|START_THINKING|>", "<|END_THINKING|>"),),
        noise=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
        calls=(JsonCalls(("<|START_ACTION|>",), ("<|END_ACTION|>",)),))),
    (("<minimax:tool_call>",), Layout("minimax", calls=(TaggedCalls(
        ("<minimax:tool_call>",), ('<invoke name="', ('">',)), ('<parameter name="', ('">',)), ("", "</parameter>"),
        "</invoke>", ("</minimax:tool_call>",)),))),
    (("<seed:tool_call>",), Layout("seed", thoughts=(("<seed:think>", "</seed:think>"),), calls=(TaggedCalls(
        ("<seed:tool_call>",), ("<function=", (">",)), ("<parameter=", (">",)), ("", "</parameter>"),
        "</function>", ("</seed:tool_call>",), trims=True),))),
    (("<tool_call>", "<arg_key>"), Layout("glm", calls_end_thoughts=True, calls=(TaggedCalls(
        ("<tool_call>",), ("", ("\n", "<arg_key>", "</tool_call>")), ("<arg_key>", ("</arg_key>",)),
        ("<arg_value>", "</arg_value>"), "", ("</tool_call>",)),))),
    (("<tool_call>", "<function=", "<parameter="), Layout("qwen3-coder", calls_end_thoughts=True, calls=(TaggedCalls(
        ("<tool_call>", "<function="), ("<function=", (">",)), ("<parameter=", (">",)), ("", "</parameter>"),
        "</function>", ("</tool_call>",), trims=True),))),
    (("<function name=\"", "<param name=\""), Layout("minicpm", calls=(TaggedCalls(
        ('<function name="',), ('<function name="', ('">',)), ('<param name="', ('">',)), ("", "</param>"),
        "</function>"),))),
    (("<|tool_call>call:",), Layout("gemma4", thoughts=(("<|channel>thought", "<channel|>"),), calls=(GemmaCalls(
        ("<|tool_call>call:",), ("<tool_call|>",)),))),
    (("<|tool_list_start|>",), Layout("lfm2", calls=(PythonCalls(("<|tool_call_start|>",), ("<|tool_call_end|>",)),))),
    (("List of tools: [",), Layout("lfm2", calls=(PythonCalls(("<|tool_call_start|>",), ("<|tool_call_end|>",)),))),
    (("<|tools_prefix|>",), Layout("apertus", calls=(
        JsonCalls(("<|tools_prefix|>",), ("<|tools_suffix|>",), keyed=True),))),
    (("<|role_sep|>", "<|message_sep|>"), Layout("gigachat", calls=(
        JsonCalls(("<|function_call|>", "<|message_sep|>\n\nfunction call<|role_sep|>\n")),))),
    (("<tool_calls>[",), Layout("apriel", calls=(JsonCalls(("<tool_calls>",), ("</tool_calls>",)),),
                                noise=("[BEGIN FINAL RESPONSE]", "[END FINAL RESPONSE]"))),
    (("<|tool_call|>",), Layout("tool_call token", calls=(
        JsonCalls(("<|tool_call|>",), ("<|/tool_call|>",)), HERMES))),
    (("<tool_call>",), Layout("hermes", calls=(HERMES,))),
    (("<tool_calls>",), Layout("tool_calls", calls=(JsonCalls(("<tool_calls>",), ("</tool_calls>",)),))),
    (("<TOOLCALL>",), Layout("nemotron", calls=(JsonCalls(("<TOOLCALL>",), ("</TOOLCALL>",)),))),
    (("functools[",), Layout("functools", calls=(JsonCalls(("functools[",)),))),
    (("<function=",), Layout("function tag", calls=(NamedCalls(
        ("<function=",), (">",), ("</function>",), known_only=True),), bare=_PLAIN)),
    (("tool_code",), Layout("tool_code", calls=(PythonCalls(("```tool_code\n",), ("```",)),), bare=GENERIC.bare)),
)  # fmt: skip
_MENTIONS_TOOLS = re.compile(r"\btools\b")


def find_layout(source: str) -> Layout:
    """The family that a template is of. One that mentions no tools gets them in words, and calls come as it was told."""
    layout = next((layout for signs, layout in _FAMILIES if all(sign in source for sign in signs)), None)
    if layout is None:
        layout = Layout("json", bare=_PLAIN) if _MENTIONS_TOOLS.search(source) else GENERIC
    thoughts = layout.thoughts
    if not thoughts and not layout.channels:
        thoughts = THINK if "<think>" in source or "</think>" in source else ()
    noise = layout.noise + (("<response>", "</response>") if "<response></response>" in source else ())
    calls, bare = layout.calls, layout.bare
    if layout is not GENERIC and not layout.channels and not _MENTIONS_TOOLS.search(source):
        calls, bare = (*calls, _WORDS), _WORDS
    return replace(layout, thoughts=thoughts, calls=calls, bare=bare, noise=noise)
