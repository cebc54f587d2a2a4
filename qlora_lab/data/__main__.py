"""python -m qlora_lab.data COMMAND ...: preview shows a few rows as the model will see them."""

import sys

from qlora_lab.data import preview

COMMANDS = {"preview": preview.main}

if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name not in COMMANDS:
        sys.exit(f"usage: python -m qlora_lab.data {'|'.join(COMMANDS)} data=... model=...")
    del sys.argv[1]
    COMMANDS[name]()
