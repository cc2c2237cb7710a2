"""What runs when: Prefect flows that call the tasks."""
