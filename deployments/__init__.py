"""How fedrounds is run: the command line, the Python interface, and the servers that stand around a run."""
