"""How the models of a family write their answers, and how a family is told by its template.

Source: the templates themselves; llama.cpp's chat.cpp and parsers/ for signs by which it tells some of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ggmq.answers.calls import JsonCalls, NamedCalls, Syntax, TaggedCalls
from ggmq.answers.constraints import Forced
from ggmq.answers.pythonic import GemmaCalls, PythonCalls


@dataclass(frozen=True)
class Layout:
    """Attributes:
    name: of the family.
    thoughts: markers around thoughts. calls: how calls are written. bare: calls that begin with no marker.
    noise: markers around content, which are dropped. prompt_opens: an end of the prompt that is part of the answer.
    channels: an answer is messages in channels. calls_end_thoughts: a call may come where thoughts have not ended.
    forced: how a call is written where a model has no choice.
    """

    name: str
    thoughts: tuple[tuple[str, str], ...] = ()
    calls: tuple[Syntax, ...] = ()
    bare: JsonCalls | None = None
    noise: tuple[str, ...] = ()
    prompt_opens: str = ""
    channels: bool = False
    calls_end_thoughts: bool = False
    forced: Forced | None = None

    def begun(self, prompt_tail: str, thinking: bool) -> tuple[str, str] | None:
        """The markers around thoughts that a prompt has begun. `thinking`: it ends somewhere within them."""
        tail = prompt_tail.rstrip()
        ends = next((pair for pair in self.thoughts if tail.endswith(pair[0])), None)
        return ends or (self.thoughts[0] if thinking and self.thoughts else None)

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


_DSML = "｜DSML｜"


def _json_call(name: str = "name", arguments: str = "arguments", before: str = "", after: str = "", **around: str) -> Forced:
    """A call in JSON, alone or in a list."""
    return Forced(f'{before}{{"{name}": "', f'", "{arguments}": ', "}" + after, **around)  # type: ignore[arg-type]


def _json_list(begin: str, end: str = "]", **keys: str) -> Forced:
    return _json_call(**keys, begin=begin, between=", ", end=end, trigger=begin.rstrip("["))


def _tagged(opener: str, function: str, closer: str, tags: tuple[str, str, str], named: str = ">\n") -> Forced:
    return Forced(f"{opener}\n{function}", named, closer, between="\n", trigger=opener, arguments="tags", tags=tags)


THINK = (("<think>", "</think>"),)
ANALYSIS = (("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),)
HERMES = JsonCalls(("<tool_call>",), ("</tool_call>",))
_HERMES_FORM = _json_call(before="<tool_call>\n", after="\n</tool_call>", between="\n", trigger="<tool_call>")
_WORDS = JsonCalls(('{"tool_calls"',), wrapped=True, known_only=True)
_WORDS_FORM = _json_list('{"tool_calls": [', "]}")
GENERIC = Layout("generic", calls=(_WORDS,), bare=_WORDS, forced=_WORDS_FORM)
_PLAIN = JsonCalls((), known_only=True)
_SECTION, _SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_FENCED = Forced(f"{_CALL}function{_SEP}", "\n```json\n", f"\n```{_CALL_END}", _SECTION, "\n", _SECTION_END, _SECTION)
_FAMILIES: tuple[tuple[tuple[str, ...], Layout], ...] = (
    (("<|channel|>",), Layout("channels", channels=True, forced=Forced(
        "<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "", trigger="<|channel|>commentary to="))),
    ((">>>all",), Layout("functionary", noise=(">>>all\n",), prompt_opens=">>>",
                         calls=(NamedCalls((">>>",), ("\n",), known_only=True),),
                         forced=Forced("", "\n", "", between=">>>"))),
    (("<|tool_calls_section_begin|>",), Layout("kimi", calls=(NamedCalls(
        ("<|tool_call_begin|>",), ("<|tool_call_argument_begin|>",), ("<|tool_call_end|>",),
        noise=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"), ids_have_names=True),),
        forced=Forced("<|tool_call_begin|>functions.", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
                      "<|tool_calls_section_begin|>", "", "<|tool_calls_section_end|>", "<|tool_calls_section_begin|>",
                      numbered=True))),
    (("dsml_token", "DSML"), Layout("dsml", calls_end_thoughts=True, calls=(TaggedCalls(
        (f"<{_DSML}function_calls>", f"<{_DSML}tool_calls>"), (f'<{_DSML}invoke name="', ('">',)),
        (f'<{_DSML}parameter name="', ('" string="true">', '" string="false">', '">')), ("", f"</{_DSML}parameter>"),
        f"</{_DSML}invoke>", (f"</{_DSML}function_calls>", f"</{_DSML}tool_calls>")),),
        forced=Forced(f'<{_DSML}invoke name="', '">\n', f"</{_DSML}invoke>\n", f"<{_DSML}function_calls>\n",
                      "", f"</{_DSML}function_calls>", f"<{_DSML}function_calls>", "tags",
                      (f'<{_DSML}parameter name="', '" string="%">', f"</{_DSML}parameter>\n")))),
    ((_SECTION,), Layout("deepseek", calls=(NamedCalls(
        (_CALL,), (_SEP,), (_CALL_END,), kinds=("function",), noise=(_SECTION, _SECTION_END), skips=("```json",)),),
        forced=Forced(_CALL, _SEP, _CALL_END, _SECTION, "", _SECTION_END, _SECTION))),
    (("[TOOL_CALLS]",), Layout("mistral", thoughts=(("[THINK]", "[/THINK]"),), calls=(NamedCalls(
        ("[TOOL_CALLS]",), ("[ARGS]", "{"), id_marker="[CALL_ID]", lists=True),), forced=_json_list("[TOOL_CALLS]["))),
    (("<|START_ACTION|>",), Layout(
        "command", thoughts=(("<|START_THINKING|>", "<|END_THINKING|>"),),
        noise=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
        calls=(JsonCalls(("<|START_ACTION|>",), ("<|END_ACTION|>",)),),
        forced=_json_list("<|START_ACTION|>[", "]<|END_ACTION|>", name="tool_name", arguments="parameters"))),
    (("<minimax:tool_call>",), Layout("minimax", calls=(TaggedCalls(
        ("<minimax:tool_call>",), ('<invoke name="', ('">',)), ('<parameter name="', ('">',)), ("", "</parameter>"),
        "</invoke>", ("</minimax:tool_call>",)),),
        forced=_tagged("<minimax:tool_call>", '<invoke name="', "</invoke>\n</minimax:tool_call>",
                       ('<parameter name="', '">', "</parameter>\n"), '">\n'))),
    (("<seed:tool_call>",), Layout("seed", thoughts=(("<seed:think>", "</seed:think>"),), calls=(TaggedCalls(
        ("<seed:tool_call>",), ("<function=", (">",)), ("<parameter=", (">",)), ("", "</parameter>"),
        "</function>", ("</seed:tool_call>",), trims=True),),
        forced=_tagged("<seed:tool_call>", "<function=", "</function>\n</seed:tool_call>",
                       ("<parameter=", ">", "</parameter>\n")))),
    (("<tool_call>", "<arg_key>"), Layout("glm", calls_end_thoughts=True, calls=(TaggedCalls(
        ("<tool_call>",), ("", ("\n", "<arg_key>", "</tool_call>")), ("<arg_key>", ("</arg_key>",)),
        ("<arg_value>", "</arg_value>"), "", ("</tool_call>",)),),
        forced=Forced("<tool_call>", "\n", "</tool_call>", between="\n", trigger="<tool_call>", arguments="tags",
                      tags=("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n")))),
    (("<tool_call>", "<function=", "<parameter="), Layout("qwen3-coder", calls_end_thoughts=True, calls=(TaggedCalls(
        ("<tool_call>", "<function="), ("<function=", (">",)), ("<parameter=", (">",)), ("", "</parameter>"),
        "</function>", ("</tool_call>",), trims=True),),
        forced=_tagged("<tool_call>", "<function=", "</function>\n</tool_call>",
                       ("<parameter=", ">\n", "\n</parameter>\n")))),
    (('<function name="', '<param name="'), Layout("minicpm", calls=(TaggedCalls(
        ('<function name="',), ('<function name="', ('">',)), ('<param name="', ('">',)), ("", "</param>"),
        "</function>"),), forced=Forced('<function name="', '">', "</function>", between="\n", trigger='<function name="',
                                        arguments="tags", tags=('<param name="', '">', "</param>")))),
    (("<|tool_call>call:",), Layout("gemma4", thoughts=(("<|channel>thought", "<channel|>"),), calls=(GemmaCalls(
        ("<|tool_call>call:",), ("<tool_call|>",)),),
        forced=Forced("<|tool_call>call:", "{", "}<tool_call|>", trigger="<|tool_call>call:", arguments="words",
                      tags=(":", ",", '<|"|>')))),
    (("<|tool_list_start|>",), (_LFM := Layout("lfm2", calls=(
        PythonCalls(("<|tool_call_start|>",), ("<|tool_call_end|>",)),),
        forced=Forced("", "(", ")", "<|tool_call_start|>[", ", ", "]<|tool_call_end|>", "<|tool_call_start|>", "words")))),
    (("List of tools: [",), _LFM),
    (("<|tools_prefix|>",), Layout("apertus", calls=(
        JsonCalls(("<|tools_prefix|>",), ("<|tools_suffix|>",), keyed=True),),
        forced=Forced('{"', '": ', "}", "<|tools_prefix|>[", ", ", "]<|tools_suffix|>", "<|tools_prefix|>"))),
    (("<|role_sep|>", "<|message_sep|>"), Layout("gigachat", calls=(
        JsonCalls(("<|function_call|>", "<|message_sep|>\n\nfunction call<|role_sep|>\n")),))),
    (("<tool_calls>[",), Layout("apriel", calls=(JsonCalls(("<tool_calls>",), ("</tool_calls>",)),),
                                noise=("[BEGIN FINAL RESPONSE]", "[END FINAL RESPONSE]"),
                                forced=_json_list("<tool_calls>[", "]</tool_calls>"))),
    (("<|tool_call|>", "<|/tool_call|>"), Layout("phi", calls=(JsonCalls(("<|tool_call|>",), ("<|/tool_call|>",)),),
                                                 forced=_json_list("<|tool_call|>[", "]<|/tool_call|>"))),
    (("<|tool_call|>",), Layout("granite", calls=(JsonCalls(("<|tool_call|>",), ("<|/tool_call|>",)), HERMES),
                                forced=_json_list("<|tool_call|>["))),
    (("<|tool|>", "<|/tool|>"), Layout("phi", calls=(JsonCalls(("<|tool_call|>",), ("<|/tool_call|>",)), _WORDS),
                                       bare=_WORDS, forced=_WORDS_FORM)),
    (("<tool_call>",), Layout("hermes", calls=(HERMES,), forced=_HERMES_FORM)),
    (("<tool_calls>",), Layout("tool_calls", calls=(JsonCalls(("<tool_calls>",), ("</tool_calls>",)),),
                               forced=_json_call(begin="<tool_calls>\n", between="\n", end="\n</tool_calls>",
                                                 trigger="<tool_calls>"))),
    (("<TOOLCALL>",), Layout("nemotron", calls=(JsonCalls(("<TOOLCALL>",), ("</TOOLCALL>",)),),
                             forced=_json_list("<TOOLCALL>[", "]</TOOLCALL>"))),
    (("functools[",), Layout("functools", calls=(JsonCalls(("functools[",)),), forced=_json_list("functools["))),
    (("<function=",), Layout("function tag", calls=(NamedCalls(
        ("<function=",), (">",), ("</function>",), known_only=True),), bare=_PLAIN,
        forced=Forced("<function=", ">", "</function>", between="\n", trigger="<function="))),
    (("tool_code",), Layout("tool_code", calls=(PythonCalls(("```tool_code\n",), ("```",)),), bare=_WORDS, forced=Forced(
        "", "(", ")", "```tool_code\n", "\n", "\n```", "```tool_code\n", "words"))),
)  # fmt: skip
_MENTIONS_TOOLS = re.compile(r"\btools\b")


def find_layout(source: str) -> Layout:
    """The family that a template is of. One that mentions no tools gets them in words, and calls come as it was told."""
    layout = next((layout for signs, layout in _FAMILIES if all(sign in source for sign in signs)), None)
    if layout is None:
        arguments = "parameters" if '"parameters"' in source else "arguments"
        json = Layout("json", bare=_PLAIN, forced=_json_call(arguments=arguments, between="; "))
        layout = json if _MENTIONS_TOOLS.search(source) else GENERIC
    layout = replace(layout, forced=_form(layout, source))
    thoughts = layout.thoughts
    if not thoughts and not layout.channels:
        thoughts = THINK if "<think>" in source or "</think>" in source else ()
    noise = layout.noise + (("<response>", "</response>") if "<response></response>" in source else ())
    calls, bare = layout.calls, layout.bare
    if layout is not GENERIC and not layout.channels and not _MENTIONS_TOOLS.search(source):
        calls, bare, layout = (*calls, _WORDS), _WORDS, replace(layout, forced=_WORDS_FORM)
    return replace(layout, thoughts=thoughts, calls=calls, bare=bare, noise=noise)


def _form(layout: Layout, source: str) -> Forced | None:
    """How calls are written by those of a family that were shown another form of it."""
    form = layout.forced
    if layout.name == "mistral" and "[ARGS]" in source:
        return Forced("[TOOL_CALLS]", "[ARGS]", "", trigger="[TOOL_CALLS]")
    if layout.name == "dsml" and form and "function_calls" not in source:
        return replace(form, begin=f"<{_DSML}tool_calls>\n", end=f"</{_DSML}tool_calls>", trigger=f"<{_DSML}tool_calls>")
    return _FENCED if layout.name == "deepseek" and "```json" in source else form
