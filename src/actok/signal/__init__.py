"""Closed-form maths: statistics, normalisation, rotations, DCT, B-splines, BPE. No tokenizer, no files, no torch."""
