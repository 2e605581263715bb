"""A template that somebody else wrote is held to its limits."""

from datetime import UTC, datetime

import pytest

from finery_dataprep import chat_template
from finery_dataprep.chat_template import ChatTemplate, RefusedByTemplate, TemplateError

NOW = datetime(2026, 1, 2, tzinfo=UTC)
MESSAGES = [{"role": "user", "content": "<é>"}]


def render(source):
    return ChatTemplate(source, special_tokens={"bos_token": "<s>"}, now=NOW).render(MESSAGES, tools=(), add_generation_prompt=False)


def test_the_usual_helpers_are_there():
    assert render("{{ bos_token }}{{ messages | tojson }}") == '<s>[{"role": "user", "content": "<é>"}]'
    assert render("{{ strftime_now('%d %b %Y') }}") == "02 Jan 2026"
    assert render("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}") == "1"
    assert render("{% generation %}kept{% endgeneration %}") == "kept"
    with pytest.raises(RefusedByTemplate, match="not like this"):
        render("{{ raise_exception('not like this') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ strftime_now.__self__.year }}",
    ],
)
def test_the_sandbox_gives_nothing_away(source):
    with pytest.raises(RefusedByTemplate):
        render(source)


def test_an_endless_template_is_stopped(monkeypatch):
    monkeypatch.setattr(chat_template, "RENDER_LIMIT_S", 0.2)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match="took more than 0.2 s") as caught:
        render(loop)
    assert caught.value.code == "chat_template_limit"


def test_a_template_cannot_write_without_end(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1000)
    with pytest.raises(TemplateError, match="more than 1000 characters"):
        render("{% for a in range(99999) %}xx{% endfor %}")


def test_a_template_that_does_not_compile_is_named_so():
    with pytest.raises(TemplateError, match="does not compile") as caught:
        render("{% for %}")
    assert caught.value.code == "invalid_chat_template"
