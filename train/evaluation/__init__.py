"""Trained models: scores, generated text, inspections and reports."""
