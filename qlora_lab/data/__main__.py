"""python -m qlora_lab.data COMMAND ...: what the data sets of conf/data/ are, and what is made of them."""

import sys
from importlib import import_module

# Each command is the function `main` of its module, which takes the words after the command's name.
COMMANDS = {
    "list": "qlora_lab.data.listing",
    "preview": "qlora_lab.data.preview",
}


def main(words: list[str]) -> None:
    if not words or words[0] not in COMMANDS:
        given = f"; got '{words[0]}'" if words else ""
        sys.exit(f"error: python -m qlora_lab.data takes a command: {', '.join(COMMANDS)}{given}")
    import_module(COMMANDS[words[0]]).main(words[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
