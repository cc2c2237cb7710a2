"""The domain of federated learning: torch and numpy; knows neither Prefect nor MLflow."""
