"""Runs `amp generate_knowledge` from a clone. See amp/commands/generate_knowledge.py."""

from amp.errors import exit_on_error

with exit_on_error():
    from amp.commands.generate_knowledge import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
