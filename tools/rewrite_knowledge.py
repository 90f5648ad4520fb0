"""`amp rewrite_knowledge` as a script of the clone; its text and options are in amp/commands/rewrite_knowledge.py."""

from amp.commands.rewrite_knowledge import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
