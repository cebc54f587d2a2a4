"""The server, asked by OpenAI's own client, and by others that are less polite."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from qlora_lab.config.command import shipped
from qlora_lab.data.prompts import find_prompt_format
from qlora_lab.data.rows import USER, Turn
from qlora_lab.evaluation.generate import Generation, generate_batch
from qlora_lab.evaluation.prompt_sets import Prompt, encode_prompts, turn_ends
from qlora_lab.judging.endpoint import Endpoint
from qlora_lab.judging.settings import load_judge
from qlora_lab.serving.app import Limits
from qlora_lab.serving.scheduler import Scheduler
from qlora_lab.serving.shared_base import SharedBase
from tests.serving.adapters import shared_base
from tests.serving.server import WAIT_S, Served, served

TOKEN = "a secret of a test, 24 letters"


@pytest.fixture(scope="module")
def server(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = Limits(max_waiting=100, max_body_bytes=20_000, max_new_tokens=400)
    with served(shared_base(tmp_path_factory.mktemp("server"), adapters), limits) as found:
        yield found


def client_of(server: Served, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0, timeout=WAIT_S)


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with client_of(server) as opened:
        yield opened


def expected(
    shared: SharedBase, adapter: str | None, said: str, tokens: int, history: tuple[Turn, ...] = (), stop: str = "zz"
) -> Generation:
    """What evaluation writes, on another copy of the model."""
    prompt_format = find_prompt_format("plain", shared.tokenizer)
    ids = encode_prompts([Prompt("", "", said, history)], prompt_format, shared.tokenizer)
    shared.switch(adapter)
    stops = turn_ends("plain", shared.tokenizer, [stop])
    return generate_batch(
        shared.model, shared.tokenizer, ids, max_new_tokens=tokens, device=torch.device("cpu"), stops=stops
    )[0]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def test_the_models_are_the_base_and_its_adapters(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny_random", "a", "b", "c", "d"]
    assert client.models.retrieve("b").owned_by == "qlora_lab"
    with pytest.raises(openai.NotFoundError, match="model must be one of tiny_random, a, b, c, d; got 'e'"):
        client.models.retrieve("e")


@pytest.mark.parametrize("model", ["a", "b", "tiny_random"])
def test_a_chat_is_answered_as_evaluation_answers(client: openai.OpenAI, shared: SharedBase, model: str) -> None:
    adapter = None if model == "tiny_random" else model
    history = (Turn("system", "be kind"), Turn(USER, "hello"), Turn("assistant", "hi"))
    messages: Any = [{"role": role, "content": text} for role, text in (*history, (USER, "what is it?"))]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=12, temperature=0)
    wanted = expected(shared, adapter, "what is it?", 12, history)
    assert answer.choices[0].message.content == wanted.text
    assert (answer.model, answer.object) == (model, "chat.completion")
    assert answer.choices[0].finish_reason == {"length": "length", "eos": "stop", "turn": "stop"}[wanted.stop_reason]
    assert answer.usage.completion_tokens == 12 and answer.usage.prompt_tokens > 30
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    pieces = list(
        client.chat.completions.create(
            model=model,
            messages=messages,
            max_completion_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1]) == wanted.text
    assert [piece.choices[0].finish_reason for piece in pieces[-3:-1]][-1] == answer.choices[0].finish_reason
    assert pieces[-1].choices == [] and pieces[-1].usage == answer.usage


def test_a_text_is_continued_and_a_stop_ends_it(client: openai.OpenAI) -> None:
    free = client.completions.create(model="c", prompt="some text", max_tokens=20, temperature=0).choices[0]
    assert free.finish_reason == "length" and len(free.text) > 3
    stop = free.text[2:4]
    cut = client.completions.create(model="c", prompt="some text", max_tokens=20, temperature=0, stop=stop).choices[0]
    assert (cut.text, cut.finish_reason) == (free.text[: free.text.index(stop)], "stop")
    streamed = client.completions.create(
        model="c", prompt="some text", max_tokens=20, temperature=0, stop=[stop, "never"], stream=True
    )
    assert "".join(piece.choices[0].text for piece in streamed) == cut.text
    ids = [byte + 3 for byte in b"some text"]  # as the tokenizer of bytes numbers them
    by_number = client.completions.create(model="c", prompt=ids, max_tokens=20, temperature=0).choices[0]
    assert by_number.text == free.text


def test_a_seed_gives_the_same_answer_again(client: openai.OpenAI) -> None:
    def drawn(**how: Any) -> str:
        return client.completions.create(model="a", prompt="x", max_tokens=16, **how).choices[0].text

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn(seed=1, temperature=0.01) == drawn(temperature=0)
    assert drawn(seed=3, top_p=1e-6) == drawn(temperature=0)


def test_fifty_clients_at_a_time_get_what_each_gets_alone(
    server: Served, client: openai.OpenAI, shared: SharedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, before, work = [], len(server.jobs), Scheduler.work

    def counted(self: Scheduler) -> bool:
        wait_until(lambda: len(server.jobs) == before + 50)
        rows.append(self.running)
        return work(self)

    monkeypatch.setattr(Scheduler, "work", counted)
    models = ["a", "b", "c", "d", "tiny_random"]
    asked = [(models[number % 5], f"question {number % 10}", 5 + number % 7) for number in range(50)]

    def ask(model: str, said: str, tokens: int) -> str:
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": said}], max_tokens=tokens, temperature=0
        )
        return str(answer.choices[0].message.content)

    with ThreadPoolExecutor(50) as clients:
        answers = list(clients.map(lambda one: ask(*one), asked))
    for (model, said, tokens), answer in list(zip(asked, answers, strict=True))[::5]:
        assert answer == expected(shared, None if model == "tiny_random" else model, said, tokens).text
    assert len(set(answers)) > 5 and max(rows) > 20


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds up the model after the first token of an answer, until it is set."""
    opened, work = threading.Event(), Scheduler.work
    monkeypatch.setattr(Scheduler, "work", lambda self: (self.running and opened.wait(WAIT_S), work(self))[1])
    yield opened
    opened.set()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_row_along(server: Served, gate: threading.Event, stream: bool) -> None:
    before = len(server.jobs)
    body = {"model": "tiny_random", "prompt": "abc", "max_tokens": 400, "temperature": 0, "stream": stream}
    if stream:
        with httpx.stream("POST", f"{server.address}/v1/completions", json=body, timeout=WAIT_S) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.address}/v1/completions", json=body, timeout=httpx.Timeout(WAIT_S, read=0.1))
    wait_until(lambda: len(server.jobs) > before and server.jobs[-1].cancelled)
    gate.set()
    wait_until(lambda: server.engine.running == server.engine.waiting == 0)
    assert len(server.jobs[-1].writing.token_ids) < 5


def raw(server: Served, content: bytes | str, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
    response = httpx.post(f"{server.address}{path}", content=content, headers=headers, timeout=WAIT_S)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.status_code, response.json()["error"]


def chat_body(**changes: Any) -> str:
    body = {"model": "a", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    return json.dumps({key: value for key, value in {**body, **changes}.items() if value != "left out"})


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ('{"model": "a", ', 400, "the body is no JSON"),
        ("[]", 400, "input should be an object"),
        (chat_body(messages="left out"), 400, "messages: field required"),
        (chat_body(model="e"), 404, "model must be one of tiny_random, a, b, c, d; got 'e'"),
        (chat_body(temperature=3), 400, "temperature: input should be less than or equal to 2"),
        (chat_body(max_tokens=0), 400, "max_tokens: input should be greater than or equal to 1"),
        (chat_body(max_tokens=401), 400, "max_tokens must be at most 400 here; got 401"),
        (chat_body(n=2), 400, "n: input should be less than or equal to 1"),
        (chat_body(tools=[]), 400, "tools: is not known here; leave it out"),
        (chat_body(stop=["1", "2", "3", "4", "5"]), 400, "stop must be at most 4 texts"),
        (chat_body(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "messages.0.content"),
        (chat_body(messages=[{"role": "assistant", "content": "x"}]), 400, "and end with a user's; got assistant"),
        (chat_body(messages=[{"role": "user", "content": " "}]), 400, "the last message must not be empty"),
        (chat_body(messages=[{"role": "user", "content": "x" * 600}]), 400, "have at most 512 together; shorten"),
        (chat_body(messages=[{"role": "user", "content": "x" * 20_000}]), 413, "at most 20,000 bytes"),
        (b"\xff\xfe", 400, "the body is no JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_requests_are_refused_in_a_sentence(server: Served, body: str, status: int, said: str) -> None:
    found, error = raw(server, body)
    assert found == status and said in error["message"] and error["type"] == "invalid_request_error"


def test_clients_can_tell_what_was_refused(server: Served, client: openai.OpenAI) -> None:
    assert raw(server, chat_body(messages=[{"role": "user", "content": "x" * 600}]))[1]["code"] == (
        "context_length_exceeded"
    )
    assert raw(server, chat_body(model="e"))[1] | {"message": ""} == {
        "message": "",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    with pytest.raises(openai.BadRequestError, match="a request has one prompt here; got 2"):
        client.completions.create(model="a", prompt=["x", "y"], max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="each from 0 to 383"):
        client.completions.create(model="a", prompt=[5, 384], max_tokens=1)
    assert (
        httpx.get(f"{server.address}/v1/nothing", timeout=WAIT_S).json()["error"]["message"]
        == "GET /v1/nothing: not found"
    )


def test_only_this_machines_own_pages_are_answered(server: Served) -> None:
    assert raw(server, chat_body(), host="evil.example")[0] == 403
    assert raw(server, chat_body(), **{"sec-fetch-site": "cross-site"})[0] == 403


def test_a_full_queue_refuses_and_a_stopping_server_says_so(shared: SharedBase, gate: threading.Event) -> None:
    with served(shared, Limits(max_waiting=1), max_rows=1) as server, client_of(server) as client:
        ask: dict[str, Any] = {"model": "tiny_random", "prompt": "abc", "max_tokens": 400, "temperature": 0}
        ended: list[bool] = []
        first = client.completions.create(**ask, stream=True)
        next(iter(first))

        def ask_again() -> None:
            with pytest.raises(openai.InternalServerError, match="the server stopped"):
                client.completions.create(**ask)
            ended.append(True)

        second = threading.Thread(target=ask_again)
        second.start()
        wait_until(lambda: server.engine.waiting == 1)
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting"):
            client.completions.create(**ask)
        server.engine.stop()
        gate.set()
        with pytest.raises(openai.APIError, match="the server stopped before the answer was whole"):
            list(first)
        second.join()
        assert ended
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            client.completions.create(**ask)


def test_a_token_is_asked_for_where_there_is_one(shared: SharedBase) -> None:
    with served(shared, token=TOKEN) as server:
        with client_of(server, "wrong") as client, pytest.raises(openai.AuthenticationError, match="wants its token"):
            client.models.list()
        with client_of(server, TOKEN) as client:
            assert client.models.retrieve("a").id == "a"
        assert raw(server, chat_body())[0] == 401
        assert httpx.get(server.address, timeout=WAIT_S).status_code == 200, "the page itself holds no secret"


def test_the_judge_asks_this_server(server: Served, shared: SharedBase) -> None:
    changes = [f"base_url={server.address}/v1", "model=a", "max_tokens=9"]
    judge = load_judge("local_server", changes, shipped("conf") / "evaluation" / "judge")
    endpoint = Endpoint(judge, threading.Event())
    (response,) = endpoint.ask([[{"role": "system", "content": "You judge."}, {"role": "user", "content": "1 or 2?"}]])
    wanted = expected(shared, "a", "1 or 2?", 9, (Turn("system", "You judge."),))
    assert (response.text, response.model, response.cost) == (wanted.text, "a", 0.0)
