"""A round's life on the server: the federation that a run needs in memory, and the stages of a round."""
