"""The tokenizers, one paper a file. `base` holds what the closed-form ones share."""
