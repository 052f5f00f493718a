"""How docs/results is made, stage by stage: closed-form pages, training, benchmark, pages of learned tokenizers."""
