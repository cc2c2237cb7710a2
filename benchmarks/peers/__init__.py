"""Other ways to train the same federation, measured beside ours."""
