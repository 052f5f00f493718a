"""Suites over datasets and tokenizers: results.json first, tables and the HTML report from it."""
