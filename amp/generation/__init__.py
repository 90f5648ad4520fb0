"""Generates knowledge of captions with an open language model or with rules. Not needed to train or evaluate."""
