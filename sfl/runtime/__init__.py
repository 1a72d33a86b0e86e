"""The ways to run it: server, client, simulation."""
