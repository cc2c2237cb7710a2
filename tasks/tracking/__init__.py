"""What MLflow shows: one run per training, a step per round, and the registered model.

MLflow is a view. The store is the truth: what is logged is read back from committed rounds, in order, behind a cursor
that the store keeps. So each round is logged exactly once whatever is killed, and MLflow may be down for an hour.

- `Tracker` writes one run's view in the background, while the run is trained;
- `catch_up` writes what finished runs still lack (MLflow was down, or the process was killed at the end);
- `load_start_parameters` reads a registered model's parameters, for `model.start_from: models:/...`.

Nothing here imports mlflow before it is needed, which takes 2 to 4 s.
"""
