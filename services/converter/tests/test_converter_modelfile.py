"""Ollama Modelfiles: templates that say what the models' own do, and the rules by which `ollama create` reads them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from finery_common.errors import InvalidArgumentError, UnimplementedError
from finery_converter.chat_rendering import (
    CLOCK,
    PLAIN_CONVERSATIONS,
    SEVERAL_CALLS,
    SYSTEM_CONVERSATIONS,
    TOOL_CONVERSATIONS,
    WEATHER,
    ChatTemplate,
)
from finery_converter.gotemplate import GoTemplate, Struct, TemplateError, ollama_values
from finery_converter.modelfile import adds_bos, make_modelfile, parse_modelfile, stop_tokens
from finery_converter.ollama_template import OllamaTemplate, ollama_template

HERE = Path(__file__).parent
# The system message goes into the last user's message, as Mistral's 7B has it.
MISTRAL = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system, rest = messages[0]['content'], messages[1:] %}
{%- else %}{% set system, rest = '', messages %}{% endif %}{% for message in rest %}{% if message['role'] == 'user' %}
{%- if loop.last and system %}{{ '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}{% else %}
{{- '[INST] ' + message['content'] + '[/INST]' }}{% endif %}{% elif message['role'] == 'assistant' %}
{{- ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('no') }}{% endif %}{% endfor %}"""
# It begins anew with every user, and the system message goes into the first one.
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set rest, system = messages[1:], messages[0]['content'] %}{% else %}
{%- set rest, system = messages, false %}{% endif %}{% for message in rest %}{% if loop.index0 == 0 and system %}
{%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}
{%- set content = message['content'] %}{% endif %}
{%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content + ' [/INST]' }}{% else %}
{{- ' ' + content + ' ' + eos_token }}{% endif %}{% endfor %}"""
OF_TRL = {
    "llama3": ("equal", "refused"),
    "llama3_1": ("equal", "equal_json"),
    "qwen2_5": ("equal", "equal_json"),
    "qwen3": ("equal", "equal_json"),
    "gemma": ("refused", "refused"),
    "gemma3": ("equal", "refused"),
    "phi3": ("equal", "refused"),
    "cohere2": ("equal", "refused"),
    "deepseekv3": ("equal", "refused"),
    "glm4moe": ("equal", "left_out"),
}


def _chat(source: str) -> ChatTemplate:
    return ChatTemplate(source=source, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


def _of_trl(name: str) -> str:
    package = find_spec("trl")
    assert package is not None
    assert package.origin is not None
    return (Path(package.origin).parent / "chat_templates" / f"{name}.jinja").read_text()


@pytest.fixture(scope="module")
def derived() -> dict[str, tuple[ChatTemplate, OllamaTemplate]]:
    chats = {name: _chat(_of_trl(name)) for name in OF_TRL} | {"mistral": _chat(MISTRAL), "llama2": _chat(LLAMA2)}
    return {name: (chat, ollama_template(chat, adds_bos=True)) for name, chat in chats.items()}


def _conversations(template: OllamaTemplate) -> list[tuple[Any, Any]]:
    plain = [*PLAIN_CONVERSATIONS, *(SYSTEM_CONVERSATIONS if template.system == "equal" else ())]
    return [*[(messages, ()) for messages in plain], *(TOOL_CONVERSATIONS if template.tools.startswith("equal") else ())]


@pytest.mark.parametrize("name", OF_TRL)
def test_a_family_is_proven_as_far_as_its_template_goes(derived, name):
    _, template = derived[name]
    assert (template.system, template.tools) == OF_TRL[name]
    assert (".Tools" in template.text) == template.tools.startswith("equal")


@pytest.mark.parametrize("name", [*OF_TRL, "mistral", "llama2"])
def test_both_templates_say_the_same_and_the_token_that_the_runtime_adds_is_left_to_it(derived, name):
    chat, template = derived[name]
    for messages, tools in _conversations(template):
        said = GoTemplate(template.text).execute(ollama_values(messages, tools=tools, system=template.default_system))
        wanted = chat.render(messages, tools=tools).removeprefix("<s>")
        assert _without_json_spelling(said) == _without_json_spelling(wanted) if tools else said == wanted


def _without_json_spelling(text: str) -> str:
    """Objects in it written anew, by a way of its own: the longest piece that is JSON, from each brace on."""
    for start in range(len(text)):
        if text[start] == "{":
            for end in range(len(text), start + 1, -1):
                if text[end - 1] == "}":
                    try:
                        value = json.loads(text[start:end])
                    except ValueError:
                        continue
                    return text[:start] + repr(sorted(_flat(value))) + _without_json_spelling(text[end:])
    return text


def _flat(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [line for key, item in value.items() for line in _flat(item, f"{path}.{key}")]
    return [f"{path}={value!r}"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="Debian: golang-go")
def test_gos_own_templates_say_what_the_interpreter_says(derived, tmp_path):
    cases, said = [], []
    for _, template in derived.values():
        several = [(SEVERAL_CALLS, [WEATHER, CLOCK])] if template.tools == "equal_json" else []
        for messages, tools in [*_conversations(template), *several]:
            values = ollama_values(messages, tools=tools, system=template.default_system)
            said.append(GoTemplate(template.text).execute(values))
            cases.append(
                {"Template": template.text, **{key: values[key] for key in ("System", "Messages")}, "Tools": _as_json(values["Tools"])}
            )
    environment = {**os.environ, "GOCACHE": str(tmp_path), "GOFLAGS": "-mod=mod"}
    done = subprocess.run(
        ["go", "run", str(HERE / "go_templates.go")],
        input=json.dumps(cases, ensure_ascii=False),
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    for one, other in zip(json.loads(done.stdout), said, strict=True):
        assert one == other


def _as_json(value: Any) -> Any:
    if isinstance(value, Struct):
        return {key: _as_json(item) for key, item in value.json.items()}
    return [_as_json(item) for item in value] if isinstance(value, list) else value


def test_smollm2s_modelfile_is_what_ollama_reads(base_model_dir):
    made = make_modelfile(base_model_dir, ["model.q4_k_m.gguf"], adds_bos=False)
    read = parse_modelfile(made.text)
    assert read[0] == ("model", "./model.q4_k_m.gguf")
    assert dict(read)["template"] == made.template.text
    assert dict(read)["system"] == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert [value for name, value in read if name == "stop"] == ["<|im_end|>"]
    assert dict(read)["num_ctx"] == "8192"
    # Without a token of the runtime's, and with the default system message only where there is none.
    chat = ChatTemplate.read(base_model_dir)
    for messages in (*PLAIN_CONVERSATIONS, *SYSTEM_CONVERSATIONS):
        values = ollama_values(messages, system=dict(read)["system"])
        assert GoTemplate(dict(read)["template"]).execute(values) == chat.render(messages)


def test_an_adapters_modelfile_names_both_files_and_the_length_that_was_asked_for(base_model_dir):
    made = make_modelfile(base_model_dir, ["base.gguf"], adds_bos=False, adapter="adapter.gguf", num_ctx=2048)
    assert parse_modelfile(made.text)[:2] == [("model", "./base.gguf"), ("adapter", "./adapter.gguf")]
    assert ("num_ctx", "2048") in parse_modelfile(made.text)


def test_several_files_have_no_modelfile(base_model_dir):
    with pytest.raises(UnimplementedError, match="one GGUF file, and there are 2"):
        make_modelfile(base_model_dir, ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"], adds_bos=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("{{ message['content'] | upper }}", "leaves out contents"),
        ("{{ message['content'] }}{{ message['content'] }}", "repeats them"),
        ("{{ message['content'] | replace('ü', 'ue') }}", "it says 'ue"),
        ("{{ message['content'] }}{{ loop.length }}", "it says"),
        ("{{ message['content'] }}{{ strftime_now('%Y') }}", "current date"),
    ],
)
def test_a_template_that_no_form_of_ours_says_has_no_modelfile_and_a_reason(change, reason):
    source = "{% for message in messages %}<{{ message['role'] }}>" + change + "</s>{% endfor %}<assistant>"
    with pytest.raises(UnimplementedError, match=f"(?s){reason}") as caught:
        ollama_template(_chat(source), adds_bos=True)
    assert caught.value.code == "ollama_template_unequal"


def test_text_that_a_modelfile_can_not_hold_is_refused(base_model_dir, tmp_path):
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(base_model_dir / name, tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for message in messages %}<{{ message['role'] }}>\n\u200b{{ message['content'] }}</s>{% endfor %}<assistant>"
    )
    with pytest.raises(UnimplementedError, match="drops characters that are not printed"):
        make_modelfile(tmp_path, ["model.gguf"], adds_bos=False)


def test_answers_end_with_every_token_that_the_configurations_name_and_the_templates_own(base_model_dir, tmp_path):
    shutil.copy(base_model_dir / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert stop_tokens(tmp_path, ends="\n<|im_start|>user") == ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]


def test_who_adds_the_first_token_is_read_from_the_file_or_known_by_the_vocabulary():
    assert adds_bos({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.model": "gpt2"})
    assert not adds_bos({"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.model": "llama"})
    assert adds_bos({"tokenizer.ggml.model": "llama"})
    assert adds_bos({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"})
    assert not adds_bos({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"})


def test_a_modelfile_is_read_by_ollamas_rules():
    text = '# a comment\nfrom ./m.gguf\nTEMPLATE """a "b"\n  c"""\nPARAMETER stop "<x> "\nPARAMETER temperature 0.5\nSYSTEM  Be brief. \n'
    assert parse_modelfile(text) == [
        ("model", "./m.gguf"),
        ("template", 'a "b"\n  c'),
        ("stop", "<x> "),
        ("temperature", "0.5"),
        ("system", "Be brief."),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("SYSTEM hello\n", "no FROM line"),
        ("FROM x\nSTOP y\n", "line 2: 'stop' is no command"),
        ("FROM x\nPARAMETER stopp y\n", "line 2: 'stopp' is no parameter"),
        ("FROM x\nPARAMETER num_ctx many\n", "wants a number"),
        ('FROM x\nTEMPLATE """a\n', "quotes are not closed"),
        ("FROM\n", "white space are wanted"),
    ],
)
def test_what_ollama_refuses_is_refused(text, reason):
    with pytest.raises(InvalidArgumentError, match=reason):
        parse_modelfile(text)


@pytest.mark.parametrize(
    "source",
    ["{{ if .A }}", "{{ end }}", "{{ printf .A }}", "{{ .A | len }}", "{{ range .A }}{{ else if .B }}{{ end }}", "{{ $x }}", "{{ .B }}"],
)
def test_what_the_interpreter_does_not_know_it_refuses(source):
    with pytest.raises(TemplateError):
        GoTemplate(source).execute({"A": [1]})


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("a {{- .A }} b {{ .A -}} \n c", "a1 b 1c"),
        ("{{/* no */}}x{{ if and .A (not .N) }}y{{ else }}z{{ end }}", "xy"),
        ("{{ range $i, $x := .L }}{{ if $i }}, {{ end }}{{ $x }}{{ else }}none{{ end }}", "p, q"),
        ("{{ range .E }}x{{ else }}none{{ end }}", "none"),
        ("{{ $s := 1 }}{{ range .L }}{{ $s = 2 }}{{ end }}{{ $s }}{{ if true }}{{ $s := 3 }}{{ end }}{{ $s }}", "22"),
        ("{{ with .L }}{{ len . }}{{ index . 1 }}{{ $.A }}{{ end }}", "2q1"),
        ('{{ eq .A 2 1 }}{{ ne .A 1 }}{{ "a\\n" }}{{ `b\\n` }}{{ json .L }}', 'truefalsea\nb\\n["p","q"]'),
    ],
)
def test_the_interpreter_has_gos_rules_of_white_space_truth_and_scope(source, text):
    assert GoTemplate(source).execute({"A": 1, "N": "", "L": ["p", "q"], "E": []}) == text
