"""What answers may take of the memory, and that a step that fails takes only its own answers along."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from qlora_lab.serving import batch as batch_module
from qlora_lab.serving.app import Limits
from qlora_lab.serving.asking import Asking
from qlora_lab.serving.batch import Batch, cache_bytes_per_token
from qlora_lab.serving.scheduler import Piece, Scheduler
from qlora_lab.serving.shared_base import SharedBase
from tests.serving.adapters import shared_base
from tests.serving.server import WAIT_S, Served, served
from tests.serving.test_batch import PROMPTS, finish, job


def test_answers_wait_for_room_in_the_cache(shared: SharedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    places, step = [], Batch.step
    monkeypatch.setattr(Batch, "step", lambda self, tokens: (step(self, tokens), places.append(self._mask.numel()))[0])
    most = 3 * (max(map(len, PROMPTS)) + 6)
    scheduler = Scheduler(shared, max_cache_tokens=most)
    jobs = [job(shared, number, None, [], max_tokens=6) for number in (3, 0, 2, 1, 4)]
    for one in jobs:
        scheduler.submit(one)
    scheduler.work()
    assert (scheduler.running, scheduler.waiting) == (3, 2), "each may become as long as the longest"
    finish(scheduler)
    assert [one.writing.finish_reason for one in jobs] == ["length"] * 5
    assert max(places) <= most


def test_what_a_token_takes_is_what_the_batch_keeps_of_it(shared: SharedBase) -> None:
    batch = Batch(shared)
    batch.join([PROMPTS[0], PROMPTS[1]], [None, "a"])
    batch.step([5, 6])
    assert batch.cache_bytes == cache_bytes_per_token(shared) * 2 * (len(PROMPTS[1]) + 1)
    assert cache_bytes_per_token(shared) == 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, their size, float32


@pytest.fixture(scope="module")
def server(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = Limits(max_new_tokens=400, max_cache_tokens=100)
    with served(shared_base(tmp_path_factory.mktemp("server"), adapters), limits) as found:
        yield found


def ask(server: Served, **changes: Any) -> httpx.Response:
    body = {"model": "a", "prompt": "abc", "max_tokens": 4, "temperature": 0, **changes}
    return httpx.post(f"{server.address}/v1/completions", json=body, timeout=WAIT_S)


def test_an_answer_that_no_cache_could_hold_is_refused(server: Served) -> None:
    refused = ask(server, max_tokens=120).json()["error"]
    assert refused["code"] == "context_length_exceeded" and refused["message"] == (
        "the prompt has 3 tokens and max_tokens is 120, but prompt and answer have at most 100 together by the "
        "server's cache_budget_mb (512 by its model); shorten the prompt or lower max_tokens"
    )
    assert ask(server, max_tokens=None).json()["usage"]["total_tokens"] <= 100


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nGPU 0 ..."),
            "the model ran out of memory",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "ask for less, or again later"),
        (ValueError("a bug"), "the model failed (ValueError: a bug)"),
    ],
    ids=["GPU", "host", "bug"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_step_that_fails_is_told_and_the_server_goes_on(
    server: Served, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str, stream: bool
) -> None:
    before = ask(server).json()["choices"][0]["text"]
    step = Batch.step

    def failing(self: Batch, tokens: Any) -> Any:
        step(self, tokens)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "step", failing)
        failed = ask(server, stream=stream)
    if stream:
        assert said in failed.text and '"code": "step_failed"' in failed.text and "[DONE]" not in failed.text
    else:
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
        assert said in failed.json()["error"]["message"]
    assert ask(server).json()["choices"][0]["text"] == before and server.engine.error is None


def test_what_nobody_thought_of_is_told_in_the_same_shape(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr(Asking, "completion", broken)
    answer = ask(server)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the server failed (ValueError: a bug)"


def test_a_prompt_that_cannot_be_read_leaves_the_answers_under_way(
    shared: SharedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, first = (job(shared, 0, "a", [], max_tokens=9) for _ in range(2))
    scheduler = Scheduler(shared)
    scheduler.submit(alone)
    finish(scheduler)
    pieces: list[Piece] = []
    second = job(shared, 1, "b", pieces, max_tokens=9)
    scheduler.submit(first)
    scheduler.work()
    scheduler.submit(second)

    def failing(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "_forward", failing)
        with pytest.raises(torch.OutOfMemoryError):
            scheduler.work()
    assert scheduler.give_up("no room") == 1
    assert second.failure == "no room" and pieces == [Piece("", last=True)]
    finish(scheduler)
    assert first.failure is None and first.writing.text == alone.writing.text


def test_a_batch_that_broke_in_the_middle_starts_anew(shared: SharedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers have the new rows already, and others not: no row of it can go on."""
    scheduler = Scheduler(shared)
    pieces: list[Piece] = []
    jobs = [job(shared, number, None, pieces, max_tokens=9) for number in (0, 3, 1)]
    scheduler.submit(jobs[0])
    scheduler.work()
    widened, calls = batch_module._widened, itertools.count(1)

    def until_full(states: torch.Tensor, places: int) -> torch.Tensor:
        if next(calls) > 4:  # those of the first layer
            raise MemoryError
        return widened(states, places)

    scheduler.submit(jobs[1])
    with monkeypatch.context() as patch:
        patch.setattr(batch_module, "_widened", until_full)
        with pytest.raises(MemoryError):
            scheduler.work()
    assert scheduler.give_up("it broke") == 2 and scheduler.jobs == []
    assert [one.failure for one in jobs] == ["it broke", "it broke", None] and pieces[-1] == Piece("", last=True)
    scheduler.submit(jobs[2])
    finish(scheduler)
    assert jobs[2].writing.finish_reason == "length"
