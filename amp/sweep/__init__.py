"""Tables of trained rows over several seeds: what is run (config, runs) and what is shown (summary, plot)."""
