"""The form that an answer must have: JSON, JSON of a schema, a grammar or a regular expression, whichever field says it."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

import msgspec

from ggmq.grammar import Grammar
from ggmq.server.errors import bad
from ggmq.server.models import ServedModel
from ggmq.server.schema import ResponseFormat, Sampling
from ggmq.texts import Kind


class Form(NamedTuple):
    """A form, what it is given by, and the field that says so."""

    kind: Kind | Literal["text"] = "text"
    source: Any = None
    path: str = ""

    async def compiled(self, model: ServedModel) -> Grammar | None:
        """What an answer must be; None for anything. Errors: ApiError 400 for a form that is none."""
        if (kind := self.kind) == "text":
            return None
        return await model.aside(lambda: model.texts.form(kind, self.source, self.path))


def form_of(body: Sampling, said: ResponseFormat | None = None) -> Form:
    """What a body says of the answer's form. Errors: ApiError 400 when it says it twice."""
    forms = [f for f in (_of_format(said), *_of_fields(body)) if f.kind != "text"]
    if len(forms) > 1:
        raise bad(forms[1].path, f"the form of the answer is given by {forms[0].path} already")
    return forms[0] if forms else Form()


def _of_format(f: ResponseFormat | None) -> Form:
    path = "response_format"
    if f is None or f.type == "text":
        return Form()
    if f.type == "json_object":
        return Form("json_object", None, path) if f.schema is None else Form("json_schema", f.schema, f"{path}.schema")
    if f.type == "json_schema":
        if f.json_schema is not None and f.json_schema.schema is not None:
            return Form("json_schema", f.json_schema.schema, f"{path}.json_schema.schema")
        if f.schema is not None:
            return Form("json_schema", f.schema, f"{path}.schema")
        raise bad(f"{path}.json_schema.schema", "expected a schema")
    if f.type == "regex":
        if (regex := f.regex if f.regex is not None else f.pattern) is None:
            raise bad(f"{path}.regex", "expected a regular expression")
        return Form("regex", regex, f"{path}.regex")
    if f.grammar is None:
        raise bad(f"{path}.grammar", "expected a grammar")
    return Form("grammar", f.grammar, f"{path}.grammar")


def _of_fields(body: Sampling) -> list[Form]:
    s = body.structured_outputs
    return [
        Form("grammar" if body.grammar else "text", body.grammar, "grammar"),
        _schema(body.json_schema, "json_schema"), _schema(body.guided_json, "guided_json"),
        Form("text" if body.guided_regex is None else "regex", body.guided_regex, "guided_regex"),
        Form("text" if body.guided_grammar is None else "grammar", body.guided_grammar, "guided_grammar"),
        _choice(body.guided_choice, "guided_choice"),
        *([] if s is None else [
            _schema(s.json, "structured_outputs.json"),
            Form("json_object" if s.json_object else "text", None, "structured_outputs.json_object"),
            Form("text" if s.regex is None else "regex", s.regex, "structured_outputs.regex"),
            _choice(s.choice, "structured_outputs.choice"),
            Form("text" if s.grammar is None else "grammar", s.grammar, "structured_outputs.grammar"),
        ]),
    ]  # fmt: skip


def _schema(schema: Any, path: str) -> Form:
    if schema is None:
        return Form()
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except (msgspec.DecodeError, RecursionError):
            raise bad(path, "expected a JSON schema") from None
    return Form("json_schema", schema, path)


def _choice(texts: list[str] | None, path: str) -> Form:
    if texts is None:
        return Form()
    if not texts:
        raise bad(path, "expected at least one text")
    return Form("regex", "|".join(map(re.escape, texts)), path)


