import io
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_lab.config.schema import FilterConfig
from qlora_lab.data import preview
from qlora_lab.data.prepare import prepare_data
from tests.helpers import composed


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(tokenizer: PreTrainedTokenizerBase, folder: Path, stream: io.StringIO, **settings: Any) -> str:
    rows = [{"question": f"Q{n}?", "answer": "long " * 5 if n == 0 else f"A{n}"} for n in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = composed(
        "model=tiny_random", "data=file", "data.source.path=rows.jsonl", "data.source.template=question_answer",
        "evaluation.rows=4",
    )  # fmt: skip
    for name, value in settings.items():
        setattr(config.data, name, value)
    data = prepare_data(
        config.data,
        config.evaluation,
        prompt_format="chatml",
        tokenizer=tokenizer,
        seed=0,
        cache_dir=folder,
        data_dir=folder,
    )
    preview.show(config, data, tokenizer, stream)
    return stream.getvalue()


def test_scored_tokens_are_marked_and_rows_counted(chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    text = shown(chat_tokenizer, tmp_path, io.StringIO(), filter=FilterConfig(max_target_characters=10))
    blocks = text.split("--- row ")[1:]
    assert len(blocks) == 3
    for block in blocks:
        question = block.split("<|im_start|>user\n")[1].split("?")[0]
        assert f"<|im_start|>assistant\n[[A{question[1:]}<|im_end|>]]" in block
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert {"records read 20", "training rows 15", "rows held out as held_out 4", "rows removed: length 1"} <= set(
        lines
    )
    assert "length (target of 24 characters): 'Q0?'" in text


def test_everything_scored_is_marked_in_colour_on_a_terminal(
    chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    text = shown(chat_tokenizer, tmp_path, Terminal(), loss_on="everything")
    begin, end = preview.TERMINAL_MARKS
    assert text.count(f"<|im_start|>{begin}user\n") == 3  # the first token has nothing to be predicted from
    assert text.count(f"<|im_end|>{end}\n") == 3
