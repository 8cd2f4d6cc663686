"""The main host: GGUF files, tokenizers, architectures, sampling, the token loop, the command line."""

__version__ = "0.1.0"
