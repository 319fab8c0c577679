"""`isotherm run`: what reaches the model, what comes out where."""

import sys
from collections.abc import Callable

import pytest
from fake_model import FakeModel, contents, loads_strictly

from isotherm.cli import main
from isotherm.cli.run import join_prompt
from isotherm.errors import OptionError
from isotherm.types import LoadOptions, SamplingParams

Capture = pytest.CaptureFixture[str]


def test_answer_goes_to_stdout_with_a_line_end(fake: FakeModel, capsys: Capture) -> None:
    assert main(["run", "some-model", "Hi"]) == 0
    assert capsys.readouterr() == ("Hello there\n", "")
    assert fake.asked[0].prompt == "Hi"
    assert fake.asked[0].sampling == SamplingParams()
    assert fake.is_closed


def test_flags_reach_loader_and_sampler(fake: FakeModel) -> None:
    flags = (
        "--ctx 99 --kv q8_0 --threads 3 --backend reference --cache-gib 0 --offline -n 7 --temperature 0.5 --top-k 4"
    )
    more = "--top-p 0.9 --min-p 0.1 --repeat-penalty 1.1 --presence-penalty 0.2 --frequency-penalty 0.3"
    rest = "--penalty-tokens 8 --seed 18446744073709551615 --stop . --stop ! --raw"
    assert main(["run", "m", "Hi", *flags.split(), *more.split(), *rest.split()]) == 0
    del fake.load_arguments["reporter"]
    options = LoadOptions(99, 3, "reference", cache_bytes=0, offline=True, kv="q8_0")
    assert fake.load_arguments == {"name": "m", "options": options}
    asked = fake.asked[0]
    assert (asked.max_tokens, asked.stop, asked.raw) == (7, (".", "!"), True)
    assert asked.sampling == SamplingParams(0.5, 4, 0.9, 0.1, 1.1, 0.2, 0.3, 8, seed=2**64 - 1)


def test_environment_reaches_the_model(fake: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOTHERM_CTX", "64")
    monkeypatch.setenv("ISOTHERM_TEMPERATURE", "0.75")
    monkeypatch.setenv("ISOTHERM_OFFLINE", "1")
    assert main(["run", "m", "Hi", "--no-offline"]) == 0
    assert fake.load_arguments["options"].context_tokens == 64
    assert fake.load_arguments["options"].offline is False
    assert fake.asked[0].sampling.temperature == 0.75


@pytest.mark.parametrize(
    ("prompt", "piped", "raw", "joined"),
    [
        ("Hi", None, False, "Hi"),
        ("Hi", "", False, "Hi"),
        ("Hi", "a text\n", False, "Hi\n\na text"),
        (None, "a text\r\n", False, "a text"),
        (None, "  code\n", False, "  code"),
        (None, "a text\n", True, "a text\n"),
        ("Hi", "\n", False, "Hi"),
    ],
)
def test_stdin_joins_the_prompt(prompt: str | None, piped: str | None, raw: bool, joined: str) -> None:
    assert join_prompt(prompt, piped, raw=raw) == joined


@pytest.mark.parametrize(("prompt", "piped"), [(None, None), (None, ""), (None, "\n\n"), ("", None)])
def test_no_prompt_points_to_chat(prompt: str | None, piped: str | None) -> None:
    with pytest.raises(OptionError, match="isotherm chat"):
        join_prompt(prompt, piped, raw=False)


def test_piped_text_reaches_the_model(fake: FakeModel, pipe_in: Callable[[bytes], None]) -> None:
    pipe_in("Grüße\n".encode())
    assert main(["run", "m", "Translate:"]) == 0
    assert fake.asked[0].prompt == "Translate:\n\nGrüße"


def test_stdin_that_is_no_text_is_a_usage_error(
    fake: FakeModel, pipe_in: Callable[[bytes], None], capsys: Capture
) -> None:
    pipe_in(b"abc\xff")
    assert main(["run", "m"]) == 2
    assert capsys.readouterr() == ("", "error: stdin is not UTF-8 (byte 3); convert it first\n")
    assert not fake.load_arguments, "refused before the model is loaded"


def test_system_message_comes_first(fake: FakeModel) -> None:
    assert main(["run", "m", "Hi", "--system", "Be brief."]) == 0
    assert contents(fake.asked[0].prompt) == [("system", "Be brief."), ("user", "Hi")]


def test_raw_and_system_exclude_each_other(fake: FakeModel, capsys: Capture) -> None:
    assert main(["run", "m", "Hi", "--raw", "--system", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: --system needs the chat template")


def test_json_is_one_object_with_text_and_facts(fake: FakeModel, capsys: Capture) -> None:
    fake.answers = (("Grün", "\n", "e"),)
    assert main(["run", "m", "Hi", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert loads_strictly(captured.out) == {
        "model": "fake",
        "text": "Grün\ne",
        "finish_reason": "stop",
        "num_prompt_tokens": 10,
        "num_cached_tokens": 4,
        "num_tokens": 3,
        "load_s": 0.25,
        "prefill_s": 0.5,
        "decode_s": 0.25,
        "prefill_tokens_per_s": 12.0,  # 6 of the 10 were not cached
        "decode_tokens_per_s": 8.0,  # the first of the 3 came out of the prefill
    }


def test_verbose_block_goes_to_stderr(fake: FakeModel, capsys: Capture) -> None:
    assert main(["run", "m", "Hi", "--verbose"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hello there\n"
    assert captured.err.splitlines() == [
        "total duration:       1.00 s",
        "load duration:        250.0 ms",
        "prompt eval count:    10 token(s) (4 cached)",
        "prompt eval duration: 500.0 ms",
        "prompt eval rate:     12.00 tokens/s",
        "eval count:           2 token(s)",
        "eval duration:        250.0 ms",
        "eval rate:            4.00 tokens/s",
    ]


def test_full_context_is_told(fake: FakeModel, capsys: Capture) -> None:
    fake.finish_reason, fake.context_tokens = "length", 12
    assert main(["run", "m", "Hi"]) == 0
    assert capsys.readouterr().err == (
        "the answer was cut: the context of 12 tokens is full; a larger --ctx makes room\n"
    )


def test_own_limit_is_not_told(fake: FakeModel, capsys: Capture) -> None:
    fake.finish_reason = "length"
    assert main(["run", "m", "Hi", "-n", "2"]) == 0
    assert capsys.readouterr().err == ""


def test_empty_answer_is_a_line(fake: FakeModel, capsys: Capture) -> None:
    fake.answers = ((),)
    assert main(["run", "m", "Hi", "--verbose"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "\n"
    assert "eval rate:            -" in captured.err


def test_terminal_gets_no_control_characters(fake: FakeModel, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.answers = (("a\x1b]52;c;ZXZpbA==\x07b\x9bc\td\ne",),)
    assert main(["run", "m", "Hi"]) == 0
    assert "\x1b" in capsys.readouterr().out, "a file gets the answer as it is"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["run", "m", "Hi"]) == 0
    assert capsys.readouterr().out == "a\ufffd]52;c;ZXZpbA==\ufffdb\ufffdc\td\ne\n"


def test_ctrl_c_ends_with_130_and_closes_everything(fake: FakeModel, capsys: Capture) -> None:
    fake.answers = (("Hel", KeyboardInterrupt()),)
    assert main(["run", "m", "Hi"]) == 130
    assert capsys.readouterr() == ("Hel", "")
    assert fake.closed_streams == 1
    assert fake.is_closed
