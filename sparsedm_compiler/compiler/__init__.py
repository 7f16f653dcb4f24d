"""The public compiler calls and what carries them out; start reading at ``compiler.api``."""
