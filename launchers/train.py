"""Runs `amp train` from a clone. See amp/commands/train.py."""

from amp.errors import exit_on_error

with exit_on_error():
    from amp.commands.train import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    main()
