"""The same adapter for engines that do not have this package: merged checkpoint, stock LoRA, GGUF, GGUF LoRA."""
