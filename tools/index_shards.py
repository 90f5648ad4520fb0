"""Runs `amp index_shards` from a clone. See amp/commands/index_shards.py."""

from amp.errors import exit_on_error

with exit_on_error():
    from amp.commands.index_shards import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
