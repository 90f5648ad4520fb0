"""`amp compare` as a script of the clone; its text and options are in amp/commands/compare.py."""

from amp.commands.compare import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    main()
