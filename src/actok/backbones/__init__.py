"""Adapters of foundation models from transformers: one thin layer below teachers (`actok.alignment`) and policies."""
