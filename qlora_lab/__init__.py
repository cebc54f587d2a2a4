"""A research platform for QLoRA fine-tuning studies."""

__version__ = "0.1.0"
