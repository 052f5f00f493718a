"""Simulators behind one small interface, each an optional extra."""
