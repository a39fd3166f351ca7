"""Training-data attribution for LoRA-tuned large language models."""

__version__ = "0.1.0"
