"""Robot data: readers, writers, action-space presets, chunks, splits, mixtures and the memory-mapped cache."""
