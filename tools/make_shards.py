"""Runs `amp make_shards` from a clone. See amp/commands/make_shards.py."""

from amp.errors import exit_on_error

with exit_on_error():
    from amp.commands.make_shards import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
