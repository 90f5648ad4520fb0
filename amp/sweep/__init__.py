"""Tables of trained rows over several seeds: what is run (config, plan, run, progress), what is shown (summary, table,
plot)."""
