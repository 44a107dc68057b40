"""When preconditioners are recomputed, and where."""
