"""Tokenized corpora on disk: written by `mc tokenize`, read on demand in training."""
