"""Trained adapters in use: many on one base, answered in batches, behind OpenAI's protocol."""
