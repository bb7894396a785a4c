"""Keys and values in few bits while a text grows: a transformers cache, its layers, and their packed buffers."""

from arrondi.runtime.kv.cache import QuantizedCache, calibrate_cache, calibrate_clips, kv_cache

__all__ = ["QuantizedCache", "calibrate_cache", "calibrate_clips", "kv_cache"]
