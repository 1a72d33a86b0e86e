"""Both ends of each exchange between client and server, facing each other."""
