"""Tokenization as semantic interface learning: teachers, their features, and the objectives that train a codec on them.

Source: X-Tokenizer (arXiv 2606.14752). Objectives act on a `CodecOutput` and a `FeatureBatch`, at training time only: a
tokenizer encodes, decodes and loads without a teacher, and any learned tokenizer can be trained with them.
"""
