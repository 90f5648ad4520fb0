"""Shared test helpers: data, models, processes, command lines and naive reference equations."""
