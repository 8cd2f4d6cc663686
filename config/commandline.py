"""A command line whose words are taken as they are written: nothing is guessed from the beginning of an option."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, NoReturn

from config.terminal import print_line, safe_line

_LIKE = 0.6
"""How alike two names must be for one to be proposed for the other, as difflib counts."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """An option of another program that people bring along.

    Attributes:
        story: what holds here instead, and what to do.
        value: whether a value follows: "none", "one", or "maybe" (a word that is no option is one).
        taken: whether the option may be there: it changes nothing here, and a note says so, if there is a story.
        neutral: values with which an option changes nothing, so that it may be there, and nothing needs saying.
    """

    story: str
    value: str = "none"
    taken: bool = False
    neutral: tuple[str, ...] = ()


class Parser(argparse.ArgumentParser):
    """A parser that takes an option only by one of its own names, alone or as `NAME=VALUE`, never by a beginning of it and
    never with others or a value joined to it. The word after an option that takes a value is that value, whatever it begins
    with, unless it is an option itself. Refusals are one safe line, with exit code 2.

    Attributes:
        foreign: options of other programs by name, each told about instead of being called unknown.
        stray: what to do with a word that is no option where none is expected.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **{**more, "allow_abbrev": False})
        self.foreign: Mapping[str, Foreign] = {}
        self.stray = "leave it out"

    def error(self, message: str) -> NoReturn:
        self._refuse(f"{message}; `{self.prog} --help` lists what there is")

    def _refuse(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {safe_line(message)}\n")

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:  # type: ignore[override]
        (file or sys.stderr).write(message)  # argparse would keep silent when it cannot be written

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        return super().parse_known_args(self._exact(list(sys.argv[1:] if args is None else args)), namespace)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """What argparse would take for an option by its beginning: nothing."""
        return []

    def _exact(self, words: list[str]) -> list[str]:
        """The words with each value joined to its option, so that argparse has nothing left to guess.

        What follows a command is left to the command's own parser. Errors: ends the process for a word that looks like an
        option and is none.
        """
        commands = next((a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)), None)
        out: list[str] = []
        while words:
            word = words.pop(0)
            name, equals, _ = word.partition("=")
            action = self._option_string_actions.get(word)
            if word == "--":
                return [*out, word, *words]
            if word == "-" or not word.startswith("-"):
                if commands is None:
                    if all(a.option_strings and a.nargs != "?" for a in self._actions):
                        self._refuse(f"{word!r} belongs to no option; {self.stray}")
                    out.append(word)
                    continue
                if word not in commands:
                    self._unknown(f"argument COMMAND: invalid choice: {word!r}", _perhaps(word, commands))
                return [*out, word, *words]
            if action is not None and action.nargs is None and words and not self._is_option(words[0]):
                out.append(f"{word}={words.pop(0)}")
            elif action is not None or (equals and name in self._option_string_actions):
                out.append(word)
            elif name in self.foreign:
                self._skip(name, self.foreign[name], word, words)
            elif commands is not None:
                self._refuse(f"{name}: expected a COMMAND first, as in `{self.prog} {next(iter(commands))} {name}`")
            else:
                self._unknown(f"no option {name}", self._like(name))
        return out

    def _is_option(self, word: str) -> bool:
        return (word.partition("=")[0] if word.startswith("--") else word) in self._option_string_actions

    def _skip(self, name: str, foreign: Foreign, word: str, words: list[str]) -> None:
        """Leave out an option that changes nothing here, with its value; end with its story when it would."""
        value = word.partition("=")[2] if "=" in word else None
        if value is None and words:
            follows = not self._is_option(words[0]) and words[0] not in self.foreign
            if (foreign.value == "one" and follows) or (foreign.value == "maybe" and not words[0].startswith("-")):
                value = words.pop(0)
        if value is not None and any(_same(value, n) for n in foreign.neutral):
            return
        if not foreign.taken:
            self._refuse(f"{name}: {foreign.story}")
        if foreign.story:
            print_line(f"note    {name}: {foreign.story}", file=sys.stderr)

    def _unknown(self, what: str, like: str) -> NoReturn:
        if like:
            self._refuse(f"{what}; did you mean {like}?")
        self.error(what)

    def _like(self, name: str) -> str:
        """The option that is most like a word; empty when none is."""
        short = self._option_string_actions.get(name[:2])
        if short is not None and short.nargs is None and name[2:3].isdigit():
            return f"{name[:2]} {name[2:]}"
        shown = [o for o, a in self._option_string_actions.items() if a.help != argparse.SUPPRESS]
        return _perhaps(name, [o for o in shown if o[:2] == "--"] if name[:2] == "--" else shown)


def _perhaps(word: str, names: Iterable[str]) -> str:
    names = list(names)
    begun = [n for n in names if n.startswith(word)] if len(word) > 3 else []
    return next(iter(begun or difflib.get_close_matches(word.replace("_", "-"), names, 1, _LIKE)), "")


def _same(value: str, neutral: str) -> bool:
    """Whether two values are one: as words, or as numbers."""
    try:
        return math.isclose(float(value), float(neutral))
    except ValueError:
        return value.lower() == neutral
