"""Names of templates, procedural task families and kinds of data files, so that a plan can refuse others.

What they mean is in qlora_lab.data, whose imports are slow; its tests compare.
"""

TEMPLATES = (
    "input_output",
    "input_target",
    "inputs_targets",
    "question_answer",
    "longform",
    "prompt_completion",
    "alpaca",
    "alpaca_chat",
    "dolly",
    "instruction_instances",
    "unnatural_instances",
    "chosen_dialogue",
    "hh_last_turn",
    "conversation_text",
    "conversation_first_turn",
    "conversation_reply",
    "messages_every_reply",
    "messages_last_reply",
    "oasst_best_path",
    "oasst_best_replies",
    "natural_instructions",
    *(f"glue_{task}" for task in ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")),
    "chip2",
    "asdiv",
    "passage",
    "procedural",
)
PROCEDURAL_FAMILIES = ("add_numbers", "sort_words", "largest_number", "reverse_list", "nth_word", "count_words")
# Different tasks that can be drawn of the only family that has not millions (add_numbers has 8,100).
SMALLEST_FAMILY, ITS_TASKS = "add_numbers", 8000
FILE_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
