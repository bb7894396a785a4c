"""GGUF files, seen as model directories: the header, names and forms of tensors, config and tokenizer."""
