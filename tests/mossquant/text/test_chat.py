# SPDX-License-Identifier: Apache-2.0
"""Chat templates: the same text as transformers makes, and one line for what they cannot write."""

from datetime import datetime
from typing import Any

import pytest

from mossquant.errors import InputError
from mossquant.text.chat import render_chat
from mossquant.text.declared import DeclaredText

TURNS = [
    {"role": "system", "content": "Be brief. <ü> & 'so'"},
    {"role": "user", "content": "2 < 3?\n"},
    {"role": "assistant", "content": "Yes", "reasoning": None, "sources": [1, 2.5, {"a": None}]},
    {"role": "user", "content": "  And 漢字?  "},
]
TEMPLATES = {
    "ChatML": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "lines": """\
{{- bos_token }}
{%- set ns = namespace(first=true) %}
{%- if not tools and documents is none %}
    {% for message in messages %}
        {% if message.role == 'system' %}
            {% continue %}
        {% endif %}
    [{{ message.role }}] {{ message.content | trim }}{{ eos_token if loop.last }}
        {% set ns.first = false %}
    {% endfor %}
{%- endif %}
{{ ns.first }}{{ pad_token }}
""",
    "filters": "{{ messages | tojson }}\n{{ messages[2].sources | tojson(indent=2) }}{{ 'reasoning' in messages[2] }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
    "clock": "{{ strftime_now('%Y-%m') }}",
    "macro": "{% macro turn(m) %}<{{ m.role }}>{{ m.content.split('\n')[0] }}{% endmacro %}{{ dict(a=1).a }}"
    "{% for m in messages[::-1] %}{{ turn(m) }}{% endfor %}",
}
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    declared = DeclaredText(chat_template=TEMPLATES[name], token_names=NAMES)
    # Its tokenizers leave out what is None before they render.
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in TURNS]
    options: dict[str, Any] = {"chat_template": TEMPLATES[name], "add_generation_prompt": True, **NAMES}
    assert render_chat(declared, TURNS) == render_jinja_template([turns], **options)[0][0]


def test_tokens_that_begin_and_end_a_text_have_names_without_any() -> None:
    template = "{{ bos_token }}|{{ eos_token }}"
    declared = DeclaredText(
        chat_template=template, end_of_text=(3, 4), beginning_of_text=5, special_tokens={"<e>": 3, "<b>": 5}
    )
    assert render_chat(declared, TURNS) == "<b>|<e>"
    assert render_chat(DeclaredText(chat_template=template), TURNS) == "|"
    assert datetime.now().strftime("%Y") in render_chat(DeclaredText(chat_template=TEMPLATES["clock"]), TURNS)


@pytest.mark.parametrize(
    ("template", "turns", "match"),
    [
        (None, TURNS, "declares no chat template; give a prompt without --chat"),
        ("", [], "this is not a conversation: .*at least 1 item"),
        ("", {"role": "user"}, "this is not a conversation: "),
        ("", [{"role": "user"}], r"0\.content: field required"),
        ("", [{"role": 1, "content": ["a"]}], r"0\.role: .*; 0\.content: "),
        ("", [{"role": "user", "content": "\udcff"}], "this is not a conversation"),
        ("", [{"role": "user", "content": "a", "more": object()}], "not a conversation in JSON"),
        ("{{ raise_exception('roles must\n alternate') }}", TURNS, r"\(roles must\\n alternate\); give another"),
        ("{{ '\\ud800' }}", TURNS, "surrogates not allowed"),
        ("{# nothing #}", TURNS, "it writes nothing"),
        ("{% for %}", TURNS, "cannot write this conversation"),
        ("{{ 1 / 0 }}", TURNS, "division by zero"),
        ("{{ messages[0].nothing.more }}", TURNS, "has no attribute 'nothing'"),
        ("{{ messages.append(1) }}", TURNS, "unsafe"),
        ("{{ ''.__class__.__mro__ }}", TURNS, "unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", TURNS, "recursion"),
        ("{% for i in range(99999) %}" * 2 + "x" * 999 + "{% endfor %}" * 2, TURNS, "does not end"),
    ],
)  # fmt: skip
def test_what_cannot_be_written(template: str | None, turns: Any, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        render_chat(DeclaredText(chat_template=template), turns)
    assert str(caught.value).isprintable()
