"""Adapters over packed weights: what peft must know of them, where adapters start, and merging them again."""
