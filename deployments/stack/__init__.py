"""The servers beside a run: an embedded Prefect API, an MLflow UI, a worker, and the deployments they execute.

connection.py   the client's side: use the configured Prefect server, or start the home's own and keep it alive
server.py       the home's own Prefect server process
replay.py       requests that met a locked SQLite database are answered by the server, not retried by the client
files.py        the files by which clients and server find each other
up.py           `fedrounds up`: server, MLflow UI and worker until Ctrl-C
deploy.py       `fedrounds deploy`: registers a scheduled training
"""
