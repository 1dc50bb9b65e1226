"""GGUF files: metadata, tensors, names, configuration and tokenizer."""
