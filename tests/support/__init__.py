"""What tests share: data, models, processes, command lines, and naive reference equations."""
