"""umbel: federated LoRA fine-tuning of language models, with the aggregation right."""

__version__ = "0.1.0"
