"""A distributed fine-tuning launcher: one recipe, any Ray cluster, DeepSpeed ZeRO, an exact order of data."""

__version__ = "0.1.0"
