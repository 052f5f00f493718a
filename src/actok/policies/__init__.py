"""From codes to language-model ids, blocks and samples: what a policy needs to know of tokens, and of no tokenizer."""
