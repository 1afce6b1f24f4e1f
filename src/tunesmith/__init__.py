"""Tunesmith: from a bare Linux server to your own fine-tuned model behind an OpenAI-compatible API."""

__version__ = "0.1.0"
