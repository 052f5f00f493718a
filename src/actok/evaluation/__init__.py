"""Codec metrics, latency, decode-and-replay in simulation, recording of demonstrations."""
