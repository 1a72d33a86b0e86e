"""Messages over TCP and TLS, and which connections a server admits."""
