"""The official OpenAI client for Python against the proxy. Prints what it has checked, and last, as
JSON, the tokens that the answers say and how many answers it has left."""

import asyncio
import json
import os

import openai
import pydantic

URL, KEY, FEW = os.environ["PROXY_URL"], os.environ["PROXY_KEY"], os.environ["FEW_KEY"]
SIX, POOR = os.environ["SIX_KEY"], os.environ["POOR_KEY"]
TEXT = "A growth of pigment cells, often round, with an even colour."
QUESTION = [{"role": "user", "content": "What is a naevus?"}]
TOOL = {"type": "function", "function": {"name": "measure", "parameters": {"type": "object", "properties": {"unit": {"type": "string"}}}}}
WITH_USAGE = {"include_usage": True}
client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
seen = {"tokens": 0, "left": 0}


def count(answer):
    seen["tokens"] += answer.usage.prompt_tokens + answer.usage.completion_tokens
    return answer


def ask(model="text", **more):
    return client.chat.completions.create(model=model, messages=QUESTION, **more)


def raised(kind, work):
    try:
        work()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def joined(chunks):
    text = ""
    for chunk in chunks:
        if chunk.usage:
            count(chunk)
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    return text


def plain():
    assert count(ask(seed=7, user="somebody")).choices[0].message.content == TEXT
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 3_000_000}}
    content = [{"type": "text", "text": "What is this?"}, picture]
    count(client.chat.completions.create(model="text", messages=[{"role": "user", "content": content}]))
    raw = client.chat.completions.with_raw_response.create(model="text", messages=QUESTION)
    assert raw.headers["x-request-id"] and count(raw.parse()).choices[0].finish_reason == "stop"


def streaming():
    chunks = list(ask(stream=True, stream_options=WITH_USAGE))
    assert chunks[-1].usage.completion_tokens > 0 and joined(chunks) == TEXT
    unasked = list(ask(stream=True))
    assert all(chunk.usage is None for chunk in unasked) and joined(unasked) == TEXT
    # It took as much as the same one before, and is in the ledger as well.
    seen["tokens"] += chunks[-1].usage.total_tokens


def tools():
    call = count(ask("tools", tools=[TOOL], tool_choice="auto")).choices[0].message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("measure", {"unit": "mm"})
    name = arguments = ""
    for chunk in ask("calls-a-tool", tools=[TOOL], stream=True):
        for call in [call for choice in chunk.choices for call in choice.delta.tool_calls or []]:
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert (name, json.loads(arguments)) == ("measure", {"unit": "mm"}), (name, arguments)


class Lesion(pydantic.BaseModel):
    name: str
    round: bool


def json_mode():
    answer = count(ask("json", response_format={"type": "json_object"}))
    assert json.loads(answer.choices[0].message.content)["round"] is True
    parsed = client.chat.completions.parse(model="json", messages=QUESTION, response_format=Lesion)
    assert count(parsed).choices[0].message.parsed == Lesion(name="naevus", round=True)


def models():
    assert {"text", "json", "tools"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("text").object == "model"
    few = openai.OpenAI(base_url=URL, api_key=FEW, max_retries=0)
    assert [model.id for model in few.models.list()] == ["text"]


def errors():
    error = raised(openai.NotFoundError, lambda: ask("unknown"))
    assert (error.code, error.type) == ("model_not_found", "invalid_request_error"), error
    error = raised(openai.BadRequestError, lambda: ask("refuses"))
    assert "too long" in error.message and error.code == "odd"
    raised(openai.BadRequestError, lambda: client.chat.completions.create(model="text", messages=QUESTION, stream="yes"))
    stranger = openai.OpenAI(base_url=URL, api_key="sk-nobody", max_retries=0)
    raised(openai.AuthenticationError, lambda: stranger.models.list())
    error = raised(openai.RateLimitError, lambda: ask("limited"))
    assert error.response.headers["retry-after"] == "60"
    error = raised(openai.InternalServerError, lambda: ask("down"))
    assert (error.status_code, error.code) == (502, "llm_unavailable")
    error = raised(openai.InternalServerError, lambda: ask("denies"))
    assert error.code == "llm_refused" and "upstream-secret" not in str(error.body)
    assert count(ask("stands-in")).choices[0].message.content == TEXT
    few = openai.OpenAI(base_url=URL, api_key=FEW, max_retries=0)
    for _ in range(2):
        few.chat.completions.create(model="text", messages=QUESTION)
    error = raised(openai.RateLimitError, lambda: few.chat.completions.create(model="text", messages=QUESTION))
    assert 1 <= int(error.response.headers["retry-after"]) <= 30
    assert error.response.headers["x-ratelimit-remaining-requests"] == "0"


def recording(key):
    """A client that asks again by itself, and the statuses that it meets."""
    met = []
    record = openai.DefaultHttpxClient(event_hooks={"response": [lambda answer: met.append(answer.status_code)]})
    return openai.OpenAI(base_url=URL, api_key=key, max_retries=2, http_client=record), met


def asked_again():
    patient, met = recording(KEY)
    answer = count(patient.chat.completions.create(model="comes-back", messages=QUESTION))
    assert (answer.choices[0].message.content, met) == (TEXT, [503, 200]), met
    # The limit of the key gives a request back in ten seconds: who does not wait as told gets no answer.
    patient, met = recording(SIX)
    while 429 not in met:
        met.clear()
        answer = patient.chat.completions.create(model="text", messages=QUESTION)
        assert answer.choices[0].message.content == TEXT
    assert met[-2:] == [429, 200], met
    # A budget that is used up is so for a month.
    patient, met = recording(POOR)
    patient.chat.completions.create(model="text", messages=QUESTION)
    error = raised(openai.RateLimitError, lambda: patient.chat.completions.create(model="text", messages=QUESTION))
    assert (error.code, error.response.headers["x-should-retry"]) == ("insufficient_quota", "false"), error
    assert met == [200, 429], met


def timeouts_and_broken_streams():
    raised(openai.APITimeoutError, lambda: ask("stalls", timeout=1))
    seen["left"] += 1
    error = raised(openai.APIError, lambda: joined(ask("breaks-off", stream=True)))
    assert error.code == "llm_unavailable", error
    error = raised(openai.APIError, lambda: joined(ask("stalls-midway", stream=True)))
    assert error.code == "llm_timeout", error


def cancelled():
    with ask("stalls-midway", stream=True) as stream:
        next(iter(stream))
    seen["left"] += 1


async def concurrent():
    several = openai.AsyncOpenAI(base_url=URL, api_key=KEY)

    async def one():
        text = ""
        stream = await several.chat.completions.create(model="text", messages=QUESTION, stream=True, stream_options=WITH_USAGE)
        async for chunk in stream:
            if chunk.usage:
                count(chunk)
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
        return text

    assert set(await asyncio.gather(*(one() for _ in range(20)))) == {TEXT}


for check in (plain, streaming, tools, json_mode, models, errors, asked_again, timeouts_and_broken_streams, cancelled):
    check()
    print(f"python {openai.__version__}: {check.__name__}")
asyncio.run(concurrent())
print(f"python {openai.__version__}: 20 concurrent streams")
print(json.dumps(seen))
