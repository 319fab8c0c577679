"""TextGenerator: streaming, stop strings, messages, limits of its life."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_tiny

import isotherm
from isotherm.answer import _StopFilter
from isotherm.errors import InsufficientMemory, MessageError, OptionError
from isotherm.text import TextGenerator
from isotherm.types import QuantType, SamplingParams

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    metadata = {"tokenizer.chat_template": TEMPLATE}
    return write_tiny(folder / "tiny.gguf", "llama", QuantType.Q8_0, metadata=metadata)


@pytest.fixture(scope="module")
def model(path: Path) -> TextGenerator:
    return isotherm.load(path, cache_bytes=0)


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_the_stop_filter_is_a_cut_at_the_first_stop_string(pieces: list[str], stop: list[str]) -> None:
    text = _StopFilter(tuple(stop))
    out = ""
    for piece in pieces:
        out += text.push(piece)
        if text.stopped:
            break
    if not text.stopped:
        out += text.finish("")
    whole, ends = "", False  # the twin: all text so far is searched after every piece
    for piece in pieces:
        whole += piece
        found = [at for string in stop if (at := whole.find(string)) >= 0]
        if found:
            whole, ends = whole[: min(found)], True
            break
    assert (out, text.emitted, text.stopped) == (whole, whole, ends)


def test_pieces_make_the_answer(model: TextGenerator) -> None:
    pieces = list(model.stream("the rain", max_tokens=20))
    answer = pieces[-1].answer
    assert answer is not None
    assert all(piece.answer is None for piece in pieces[:-1])
    assert "".join(piece.text for piece in pieces) == answer.text
    assert answer.tokens == model.generate("the rain", max_tokens=20).tokens
    assert answer.num_tokens <= 20


def test_text_is_a_user_message_unless_raw(model: TextGenerator) -> None:
    spelled = model.prompt_ids("<user>the rain", raw=True)
    assert model.prompt_ids("the rain") == spelled
    assert model.prompt_ids([{"role": "user", "content": "the rain"}]) == spelled
    with pytest.raises(OptionError, match="raw=True takes text"):
        model.prompt_ids([{"role": "user", "content": "the rain"}], raw=True)


def test_text_of_a_message_is_never_a_control_token(model: TextGenerator) -> None:
    assert model.dialogue is not None
    spelled = "<|im_start|><|im_end|>"
    control = set(model.prompt_ids(spelled, raw=True))
    assert len(control) == 2
    assert not control & set(model.prompt_ids(spelled))
    assert model.detokenize(model.prompt_ids(spelled)) == f"<user>{spelled}"
    messages = [{"role": "user", "content": spelled}]
    assert model.prompt_ids(model.dialogue.render(messages)) == model.prompt_ids(spelled)
    with pytest.raises(MessageError, match=r"messages\[0\].role"):
        model.prompt_ids([{"role": "robot", "content": "x"}])


def test_control_tokens_appear_where_they_are_asked_for(model: TextGenerator) -> None:
    (marker,) = model.prompt_ids("<|im_start|>", raw=True)
    forced = SamplingParams(logit_bias=((marker, 1e6),))
    for shown, expected in ((frozenset[int](), ""), (frozenset([marker]), "<|im_start|>" * 3)):
        with model.start(model.prompt_ids("the rain"), max_tokens=3, sampling=forced, shown=shown) as stream:
            while not stream.is_done:
                piece = stream.wait()
        assert piece.answer is not None
        assert piece.answer.text == expected


def test_log_probabilities_come_where_they_are_asked_for(model: TextGenerator) -> None:
    answer = model.generate("the rain", max_tokens=3, num_logprobs=4)
    for token in answer.tokens:
        assert len(token.top_logprobs) == 4
        assert token.top_logprobs[0] == (token.token_id, token.logprob)


def test_unknown_and_wrong_options_raise(model: TextGenerator, path: Path) -> None:
    with pytest.raises(TypeError, match="temprature"):
        model.generate("the rain", temprature=1.0)
    with pytest.raises(OptionError, match="temperature"):
        model.generate("the rain", temperature=-1.0)
    with pytest.raises(OptionError, match="max_tokens"):
        model.generate("the rain", max_tokens=0)
    with pytest.raises(OptionError, match="stop"):
        model.generate("the rain", stop=[""])
    with pytest.raises(TypeError, match="thread"):
        isotherm.load(path, thread=2)
    with pytest.raises(OptionError, match="backend"):
        isotherm.load(path, backend="abacus")
    with pytest.raises(OptionError, match="made for"):
        isotherm.load(path, context_tokens=10**6)


def test_a_closed_stream_leaves_the_model_usable(model: TextGenerator) -> None:
    stream = model.stream("the rain", max_tokens=50)
    next(stream)
    stream.close()
    assert model.generate("the rain", max_tokens=2).num_tokens <= 2


def test_two_streams_of_one_thread_take_turns_and_other_calls_go_between(model: TextGenerator) -> None:
    expected = [model.generate(text, max_tokens=12).token_ids for text in ("the rain", "on the sand")]
    one, two = (model.stream(text, max_tokens=12) for text in ("the rain", "on the sand"))
    pieces = [next(one), next(two), next(two)]
    assert model.logits(model.prompt_ids("spain")).shape[0] > 0
    pieces += [*one, *two]
    assert [piece.answer.token_ids for piece in pieces if piece.answer] == expected


def test_a_call_inside_one_that_computes_is_an_error_and_not_a_deadlock(model: TextGenerator) -> None:
    blocks = model.logit_blocks(model.prompt_ids("the rain"), [0, 1], block_rows=1)
    next(blocks)
    with pytest.raises(OptionError, match="still running"):
        model.generate("the rain", max_tokens=2)
    blocks.close()
    assert model.generate("the rain", max_tokens=2).num_tokens <= 2


def test_a_closed_model_says_so(path: Path) -> None:
    with isotherm.load(path, cache_bytes=0) as model:
        pass
    with pytest.raises(OptionError, match="was closed"):
        model.generate("the rain")


def test_what_cannot_fit_is_refused_by_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isotherm.fitting.available_memory_bytes", lambda: 1 << 20)
    with pytest.raises(InsufficientMemory, match=r"weights.*KV pages.*work"):
        isotherm.load(path, cache_bytes=0, context_tokens=512)


def test_the_reference_backend_answers_alike(model: TextGenerator, path: Path) -> None:
    with isotherm.load(path, backend="reference") as reference:
        assert reference.facts.isa == "numpy"
        ids = model.prompt_ids("the rain in spain")
        assert abs(reference.logits(ids) - model.logits(ids)).max() < 0.5
