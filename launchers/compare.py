"""`amp compare` as a script of the clone; its text and options are in amp/commands/compare.py."""

from amp.errors import exit_on_error

with exit_on_error():
    from amp.commands.compare import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    main()
