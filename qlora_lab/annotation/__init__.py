"""People compare two anonymous answers side by side; see `python -m qlora_lab.annotate`."""
