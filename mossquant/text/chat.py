# SPDX-License-Identifier: Apache-2.0
"""A conversation as a prompt: the chat template that a model declares, applied as `transformers` 5 applies it.

A template is a program of whoever made the model. It runs in Jinja's sandbox, sees nothing but JSON, and its text is of
bounded size.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, FailFast, Field

from mossquant.errors import InputError, printable
from mossquant.files.json import validated
from mossquant.text.declared import DeclaredText

_LARGEST = 1 << 24
"""Most characters of a conversation as text."""


class Message(BaseModel):
    """One turn; a template may know more keys than these two."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    role: str
    content: str


_Messages = Annotated[list[Message], Field(min_length=1, max_length=1 << 16), FailFast()]


def render_chat(declared: DeclaredText, messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt that a conversation makes, up to where the model's answer begins; special tokens are spelled.

    Args:
        declared: has the template, and what it calls tokens.
        messages: the turns, each with a role and a content, and what else the template knows.

    Raises:
        InputError: the model declares no template, this is no conversation, or the template cannot write it.
    """
    if declared.chat_template is None:
        raise InputError("this model declares no chat template; give a prompt without --chat")
    try:
        advice = 'Give a list of {"role": …, "content": …}, both texts.'
        turns: list[Message] = validated(messages, _Messages, where="this", noun="a conversation", advice=advice)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"this is not a conversation in JSON ({str(error)[:120]}); give a list of messages") from None
    values = [{key: value for key, value in turn.model_dump().items() if value is not None} for turn in turns]
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    variables = {"tools": None, "documents": None, "add_generation_prompt": True, **_token_names(declared)}
    text = ""
    try:
        for piece in environment.from_string(declared.chat_template).generate(messages=values, **variables):
            text += piece
            if len(text) > _LARGEST:
                _refuse("it does not end")
        if not text:
            _refuse("it writes nothing")
        text.encode()  # half of a surrogate pair is no text
    except Exception as error:  # a program of others may raise whatever there is
        what = printable(str(error))[:200] or type(error).__name__
        raise InputError(f"the model's chat template cannot write this conversation ({what}); give another") from None
    return text


def _token_names(declared: DeclaredText) -> dict[str, str]:
    """What a template calls tokens; where the model says nothing, those that begin and end a text."""
    spelled = {token: spelling for spelling, token in declared.special_tokens.items()}
    ids = {"bos_token": declared.beginning_of_text, "eos_token": next(iter(declared.end_of_text), None)}
    return declared.token_names or {name: spelled[token] for name, token in ids.items() if token in spelled}


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; here it is the text inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes what HTML would read."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
