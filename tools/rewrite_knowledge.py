"""Runs `amp rewrite_knowledge` from a clone. See amp/commands/rewrite_knowledge.py."""

from amp.errors import exit_on_error

with exit_on_error():
    from amp.commands.rewrite_knowledge import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
