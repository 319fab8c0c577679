"""Chat templates: the renderings llama.cpp expects, plain Jinja as oracle, and templates that attack."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hostile_templates import HOSTILE
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from isotherm.errors import TemplateError
from isotherm.tokenization.chat import ChatTemplate, chat_template_for
from isotherm.types import TokenizerSpec

# A loaded machine is slower, but no attack may take its time from a clock.
_MAX_ATTACK_S = 6.0

Messages = list[dict[str, Any]]

CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter <b>",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Stadt"},
                "days": {"type": "integer", "enum": [1, 2]},
                "more": {"type": "object", "properties": {"list": {"type": "array", "items": {"type": "string"}}}},
            },
            "required": ["city"],
        },
    },
}
CONVERSATIONS: list[Messages] = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi there"},
        {"role": "user", "content": " Who? "},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": '{"t": 3}'},
        {"role": "assistant", "content": "<think>x</think>Cold"},
        {"role": "user", "content": "ok"},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
]


class GenerationTag(Extension):
    """As a call block, the way `transformers` has it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

    def _body(self, caller: Any) -> Any:
        return caller()


def plain_environment() -> jinja2.Environment:
    """Jinja as `transformers` sets it up, without limits."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
    )

    def tojson(x: Any, **options: Any) -> str:
        return json.dumps(x, **{"ensure_ascii": False, **options})

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def test_all_templates_render_as_in_plain_jinja(llama_models: Path) -> None:
    environment = plain_environment()
    num_rendered = 0
    for path in sorted((llama_models / "templates").glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        template, oracle = ChatTemplate(source, "<s>", "</s>"), environment.from_string(source)
        for messages in CONVERSATIONS:
            for tools, prompt, thinking in ((None, True, True), ([TOOL], True, False), ([TOOL], False, True)):
                given = {"messages": messages, "tools": tools, "add_generation_prompt": prompt}
                variables = {"enable_thinking": thinking}
                names = {"documents": None, "bos_token": "<s>", "eos_token": "</s>"}
                try:
                    expected = oracle.render(**given, **variables, **names)
                except Exception:  # this template has no room for that conversation
                    with pytest.raises(TemplateError):
                        template.render(messages, add_generation_prompt=prompt, tools=tools, variables=variables)
                    continue
                got = template.render(messages, add_generation_prompt=prompt, tools=tools, variables=variables)
                assert got == expected, path.name
                num_rendered += 1
    assert num_rendered > 600


def cases_of(source: str) -> Iterator[dict[str, str]]:
    """Fields of each test case in C++: `/* .field= */ "text" "text",`, text also as U8C("…"), else one word."""
    literal = r'"(?:[^"\\]|\\.)*"'
    field = rf"/\* \.(\w+)=? \*/\s*((?:(?:U8C\()?{literal}\)?\s*)+|\S+)"
    fields: dict[str, str] = {}
    for name, value in [*re.findall(field, source), ("name", "")]:
        if name == "name" and "name" in fields:
            yield fields
            fields = {}
        text = "".join(part[1:-1] for part in re.findall(literal, value)) if '"' in value else value
        fields[name] = text.encode("latin-1", "backslashreplace").decode("unicode_escape")


def test_renderings_that_llama_cpp_expects(llama_models: Path, chat_cases: str) -> None:
    question = {"role": "user", "content": "Hello"}
    rest = [
        {"role": "assistant", "content": "Hi there"},
        {"role": "user", "content": "Who are you"},
        {"role": "assistant", "content": "   I am an assistant   "},
        {"role": "user", "content": "Another question"},
    ]
    messages = [{"role": "system", "content": "You are a helpful assistant"}, question, *rest]
    # where a template has no system role llama.cpp puts that message into the first question; we leave it to the caller
    folded = [{"role": "user", "content": "You are a helpful assistant\nHello"}, *rest]
    num_equal = 0
    for case in cases_of(chat_cases):
        if case.get("supported_with_jinja") == "false," or case.get("extra_conversation"):
            continue
        source = case["template_str"]
        if source.startswith("models/"):
            source = (llama_models / source.removeprefix("models/")).read_text(encoding="utf-8")
        template = ChatTemplate(source, case.get("bos_token", ""), case.get("eos_token", ""))
        expected = case.get("expected_output_jinja") or case["expected_output"]
        try:
            text = template.render(messages)
        except TemplateError:
            text = ""
        if text != expected:
            assert template.render(folded) == expected, case["name"]
        num_equal += text == expected
    assert num_equal > 20


@pytest.fixture(scope="module")
def attacks() -> dict[str, tuple[str, float]]:
    program = Path(__file__).with_name("hostile_templates.py")
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=600)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {name: (outcome, time_s) for name, outcome, time_s in lines}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_attack_ends_in_a_template_error(attacks: dict[str, tuple[str, float]], name: str) -> None:
    assert name in attacks, "the renderer died before, or of, this template"
    outcome, time_s = attacks[name]
    assert outcome == "TemplateError"
    assert time_s < _MAX_ATTACK_S


def nests_too_deep(source: str) -> bool:
    try:
        ChatTemplate(source, "", "").render([])
    except TemplateError as error:
        if "nests more than 100 deep in line 1: refused" not in str(error):
            raise
        return True
    return False


@pytest.mark.parametrize(
    ("before", "start", "end", "after", "num_allowed"),
    [
        ("{% if 0 %}", "{% elif 0 %}", "", "{% endif %}", 97),
        ("", "{% if 0 %}" + "{% elif 0 %}" * 3, "{% endif %}", "", 19),
        ("", "{% set a %}", "{% endset %}", "", 99),
        ("{{ ", "not ", "", "1 }}", 98),
        ("{% if 0 %}{{ a", ".x", "", "}}{% endif %}", 97),
        ("{{ ", "1 if 0 else ", "", "2 }}", 98),
    ],
)
def test_nesting_has_the_same_limit_on_each_python(
    before: str, start: str, end: str, after: str, num_allowed: int
) -> None:
    sources = [before + start * num + end * num + after for num in (num_allowed, num_allowed + 1)]
    assert [nests_too_deep(source) for source in sources] == [False, True]


@pytest.mark.parametrize("deep", ["a" + ".x" * 95, "-" * 95 + "a", "a" + " and a" * 95, "a" + "[a]" * 90])
def test_compiling_takes_no_time_either(deep: str) -> None:
    source = ("{% if 0 %}{{ " + deep + " }}{% endif %}") * (32 * 1024 // (len(deep) + 32))
    start_s = time.process_time()
    assert ChatTemplate(source, "", "").render([]) == ""
    assert time.process_time() - start_s < _MAX_ATTACK_S


def test_a_long_chat_is_no_attack(llama_models: Path) -> None:
    messages = [{"role": role, "content": "wörds " * 200} for _ in range(200) for role in ("user", "assistant")]
    messages.append({"role": "user", "content": "x " * 500_000})
    for name in ("Qwen-Qwen3-0.6B", "meta-llama-Llama-3.1-8B-Instruct", "mistralai-Mistral-Nemo-Instruct-2407"):
        source = (llama_models / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
        text = ChatTemplate(source, "<s>", "</s>").render(messages, tools=[TOOL] * 20)
        assert len(text) > 1_400_000


def test_variables_and_special_tokens_reach_the_template() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ eos_token }}{{ x }}{{ tools }}{{ add_generation_prompt }}", "<s>", "</s>"
    )
    assert template.render([], variables={"x": 1, "messages": "ignored"}) == "<s></s>1NoneTrue"
    assert template.render([], add_generation_prompt=False) == "<s></s>NoneFalse"


def test_what_the_template_raises_is_said() -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", "", "").render([])
    with pytest.raises(TemplateError, match=r"failed: .*unknown tag"):
        ChatTemplate("{% nonsense %}", "", "").render([])
    with pytest.raises(TemplateError, match="refused"):
        ChatTemplate("{% include 'x' %}", "", "").render([])


def test_the_date_is_that_of_today() -> None:
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d %-d') }}", "", "")
    days = {datetime.now().strftime("%Y-%m-%d %-d"), template.render([]), datetime.now().strftime("%Y-%m-%d %-d")}
    assert len(days) <= 2  # it may be midnight


def test_threads_share_a_template() -> None:
    source = "{% for m in messages %}{% for i in range(20) %}{{ m.content ~ i }}{% endfor %}{% endfor %}"
    template = ChatTemplate(source, "", "")
    chats = [[{"role": "user", "content": str(n)}] * 20 for n in range(40)]
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(template.render, chats))
    assert texts == ["".join(f"{n}{i}" for i in range(20)) * 20 for n in range(40)]


def test_a_base_model_has_no_template() -> None:
    spec = TokenizerSpec("gpt2", "gpt-2", ("a", "b"), (1, 1), (), (), 0, 1, None, None, False, False, False, None)
    assert chat_template_for(spec) is None
    template = chat_template_for(replace(spec, chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"))
    assert template is not None
    assert template.render([{"role": "user", "content": "x"}]) == "axb"
    unnamed = chat_template_for(replace(spec, bos_id=None, chat_template="[{{ bos_token }}]"))
    assert unnamed is not None
    assert unnamed.render([]) == "[]"
