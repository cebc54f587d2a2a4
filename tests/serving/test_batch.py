"""Rows that join and leave between steps get what each gets alone, whatever it shares the batch with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPTNeoXConfig,
    MistralConfig,
    MptConfig,
    OPTConfig,
    PreTrainedConfig,
)

from qlora_lab.evaluation.generate import Stops, generate_batch
from qlora_lab.evaluation.run_model import RunModel
from qlora_lab.serving.batch import Batch
from qlora_lab.serving.scheduler import Job, Piece, Scheduler
from qlora_lab.serving.shared_base import SharedBase
from qlora_lab.serving.writing import Choice, Writing
from tests.serving.adapters import shared_base, tiny_base
from tests.tiny_models import LLAMA

GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(3, 60, (length,), generator=GENERATOR).tolist() for length in (3, 11, 1, 17, 6)]
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS: dict[str, PreTrainedConfig] = {
    "mistral, window of 4": MistralConfig(**LLAMA, sliding_window=4),
    "gemma2, window of 4": Gemma2Config(**LLAMA, head_dim=8, sliding_window=4),
    "opt": OPTConfig(**SMALL, word_embed_proj_dim=32, ffn_dim=48, max_position_embeddings=64),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=48),
    "bloom": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "mpt": MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=64),
}


class Told:
    """A batch that writes random tokens, beside the whole texts that these rows have so far."""

    def __init__(self, shared: SharedBase) -> None:
        self.shared, self.batch = shared, Batch(shared)
        self.rows: list[tuple[list[int], str | None]] = []
        self.generator = torch.Generator().manual_seed(4)

    @torch.no_grad()
    def check(self, logits: Tensor, rows: list[tuple[list[int], str | None]]) -> None:
        for row, (ids, adapter) in zip(logits, rows, strict=True):
            self.shared.switch(adapter)
            alone = self.shared.model(torch.tensor([ids])).logits[0, -1]
            torch.testing.assert_close(row, alone, rtol=1e-3, atol=1e-3)  # sums in another order

    def join(self, numbers: list[int], adapters: list[str | None]) -> None:
        new = [(list(PROMPTS[number]), adapter) for number, adapter in zip(numbers, adapters, strict=True)]
        self.check(self.batch.join([ids for ids, _ in new], adapters), new)
        self.rows += new

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            tokens = torch.randint(3, 60, (len(self.rows),), generator=self.generator).tolist()
            for (ids, _), token in zip(self.rows, tokens, strict=True):
                ids.append(token)
            self.check(self.batch.step(tokens), self.rows)

    def keep(self, places: list[int]) -> None:
        self.batch.keep(places)
        self.rows = [self.rows[place] for place in places]


def life(told: Told, a: str | None, b: str | None, c: str | None) -> None:
    """Let short and long rows join and leave, and the batch be empty once."""
    told.join([0, 1], [a, None])
    told.step(2)
    told.join([2], [b])  # shorter than what is there
    told.step()
    told.join([3, 4], [a, c])  # longer
    told.step(2)
    told.keep([0, 2, 4])  # without the longest ones: padding goes
    told.step(2)
    told.keep([])
    told.join([1], [c])
    told.step()


def test_logits_of_rows_with_adapters_of_their_own(shared: SharedBase) -> None:
    life(Told(shared), "a", "b", "c")


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS.keys())
def test_logits_of_models_with_windows_and_other_positions(config: PreTrainedConfig, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config.initializer_range = 0.3
    model = AutoModelForCausalLM.from_config(config).eval()
    told = Told(SharedBase(RunModel(model, None, "x", tiny_base(), None), tmp_path))  # type: ignore[arg-type]
    life(told, None, None, None)


def job(shared: SharedBase, number: int, adapter: str | None, pieces: list[Piece], **how: Any) -> Job:
    tokens, stops = how.pop("max_tokens", 8), how.pop("stops", Stops())
    writing = Writing(shared.tokenizer, Choice(**how), stops, tokens)
    return Job(list(PROMPTS[number]), adapter, writing, pieces.append)


def finish(scheduler: Scheduler) -> None:
    while scheduler.work():
        pass


@pytest.mark.parametrize("max_rows", [1, 2, 5])
def test_jobs_are_answered_as_evaluation_answers(shared: SharedBase, max_rows: int) -> None:
    scheduler = Scheduler(shared, max_rows=max_rows, max_prefill_tokens=20)
    pieces: list[list[Piece]] = [[] for _ in PROMPTS]
    adapters = ["a", None, "b", "c", "a"]
    jobs = []
    for number, adapter in enumerate(adapters):
        jobs.append(job(shared, number, adapter, pieces[number], max_tokens=5 + number))
        scheduler.submit(jobs[-1])
        scheduler.work()
    finish(scheduler)
    for number, adapter in enumerate(adapters):
        shared.switch(adapter)
        expected = generate_batch(
            shared.model, shared.tokenizer, [PROMPTS[number]], max_new_tokens=5 + number, device=torch.device("cpu")
        )[0]
        assert "".join(piece.text for piece in pieces[number]) == expected.text == jobs[number].writing.text
        assert jobs[number].writing.finish_reason == {"eos": "stop", "length": "length"}[expected.stop_reason]
        assert [piece.last for piece in pieces[number]] == [False] * (len(pieces[number]) - 1) + [True]


def test_a_seed_draws_the_same_whatever_shares_the_batch(shared: SharedBase) -> None:
    def drawn(*others: int, seed: int = 5) -> str:
        scheduler = Scheduler(shared)
        for other in others:
            scheduler.submit(job(shared, other, "b", [], temperature=0.7, max_tokens=4))
        mine = job(shared, 1, "a", [], temperature=1.5, top_p=0.9, seed=seed, max_tokens=12)
        scheduler.submit(mine)
        finish(scheduler)
        return mine.writing.text

    assert drawn() == drawn(0, 3) != drawn(seed=6)


def test_a_cancelled_job_leaves_the_batch_and_the_queue(shared: SharedBase) -> None:
    scheduler = Scheduler(shared, max_rows=1)
    pieces: list[Piece] = []
    jobs = [job(shared, number, None, pieces, max_tokens=50) for number in (0, 1, 2)]
    for one in jobs:
        scheduler.submit(one)
    scheduler.work()
    jobs[0].cancelled = jobs[1].cancelled = True
    scheduler.work()
    assert (scheduler.jobs, scheduler.running) == ([jobs[2]], 1)
    finish(scheduler)
    assert [len(one.writing.token_ids) for one in jobs] == [1, 0, 50]


def test_jobs_wait_for_adapters_that_do_not_fit_beside_those_at_work(adapters: dict[str, Path], tmp_path: Path) -> None:
    sizes = {name: one.ready_bytes for name, one in shared_base(tmp_path, adapters).pool.registered.items()}
    shared = shared_base(tmp_path, adapters, budget_bytes=sizes["a"] + sizes["b"])
    scheduler = Scheduler(shared)
    jobs = [job(shared, number, name, [], max_tokens=3) for number, name in enumerate(["a", "b", "c", None])]
    for one in jobs:
        scheduler.submit(one)
    scheduler.work()
    assert (scheduler.running, scheduler.waiting) == (2, 2)
    finish(scheduler)
    assert [one.writing.finish_reason for one in jobs] == ["length"] * 4
    assert "c" in shared.pool.ready_names and shared.pool.ready_bytes <= shared.pool.budget_bytes
