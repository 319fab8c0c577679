"""A server whose model leaves neurons out, and requests that want it exact."""

from pathlib import Path

import openai
import pytest
from serving import Serving

import isotherm
from isotherm.program.ops import Trim
from isotherm.quality.choice import Choice, LayerTrims

PROMPT = "the rain in"


def test_each_request_says_for_itself(tiny: Path, tmp_path: Path) -> None:
    """In one batch with lossy ones, by each of OpenAI's endpoints; those that are silent are lossy."""
    choice = tmp_path / "choice.npz"
    Choice("kl=9", "cats", (LayerTrims(gate=Trim(None, 1.0)),) * 2, None).save(choice)
    with isotherm.load(tiny, cache_bytes=0, quality=str(choice)) as model:
        lossy, exact = (model.generate(PROMPT, max_tokens=16, exact=exact).text for exact in (False, True))
        raw_lossy, raw_exact = (
            model.generate(PROMPT, raw=True, max_tokens=16, exact=exact).text for exact in (False, True)
        )
    assert lossy != exact
    assert raw_lossy != raw_exact
    with Serving([str(tiny), "--threads", "2", "--quality", str(choice)], tmp_path) as server:
        server.wait_healthy()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            for wanted, answer, raw in ((True, exact, raw_exact), (False, lossy, raw_lossy), (None, lossy, raw_lossy)):
                more = {} if wanted is None else {"extra_body": {"exact": wanted}}
                messages = [{"role": "user", "content": PROMPT}]
                chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=16, **more)
                assert chat.choices[0].message.content == answer
                said = client.responses.create(model="tiny", input=PROMPT, max_output_tokens=16, store=False, **more)
                assert said.output_text == answer
                two = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=16, n=2, **more)
                assert [one.text for one in two.choices] == [raw] * 2
            with pytest.raises(openai.BadRequestError, match="exact"):
                client.completions.create(model="tiny", prompt=PROMPT, extra_body={"exact": "maybe"})
