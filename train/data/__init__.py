"""Text as training data: documents, tokenizers, separators and windows."""
