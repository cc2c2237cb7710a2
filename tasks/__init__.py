"""One thin Prefect task per stage of a round; the work is done in `fl_components`."""
