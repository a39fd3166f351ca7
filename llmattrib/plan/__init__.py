"""What a run needs, from its config alone: sizes, FLOPs, memory, storage, hours. See run.py."""
