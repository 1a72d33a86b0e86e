"""How messages travel over TCP and TLS, and who is let in."""
