"""Knowledge of captions from an open language model or from rules; nothing of this is needed to train or evaluate."""
