"""A configuration as the text of config.yaml, without a YAML library: a worker that only writes it needs none.

Every YAML reader reads the same values back; OmegaConf's dumper and its import take a quarter of a second.
"""

import json
import math
import re
from typing import Any

# Text that no reader of YAML takes for anything else; all other text is quoted, as in JSON.
PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})
INDENT = "  "


def config_text(values: dict[str, Any], indent: str = "") -> str:
    """Return nested mappings, lists and plain values as YAML.

    Example:
        >>> print(config_text({"quant": {"format": "nf4", "block_size": 64}, "tags": ["yes", None]}), end="")
        quant:
          format: nf4
          block_size: 64
        tags: ["yes", null]
    """
    lines = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{_scalar(key)}:\n{config_text(value, indent + INDENT)}")
        else:
            lines.append(f"{indent}{_scalar(key)}: {_flow(value)}\n")
    return "".join(lines)


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        is_plain = PLAIN.fullmatch(value) is not None and value.lower() not in WORDS
        return value if is_plain else _quoted(value)
    if isinstance(value, float):
        return _number(value)
    if value is None or isinstance(value, bool | int):
        return json.dumps(value)
    raise TypeError(f"a configuration holds text, numbers, true, false and null; got {type(value).__name__}")


def _quoted(value: str) -> str:
    """Quote a text as JSON does, and what YAML does not print in YAML's own way."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in text)


def _number(value: float) -> str:
    """Write a float so that YAML 1.1 takes it for one: with a dot before its exponent."""
    if math.isnan(value):
        return ".nan"
    if math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    digits, exponent, power = repr(value).partition("e")
    return f"{digits if '.' in digits else digits + '.0'}{exponent}{power}"
