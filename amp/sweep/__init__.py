"""Tables of trained rows over several seeds: running (config, runs) and showing (summary, plot)."""
