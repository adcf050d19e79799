"""Starting a server, what runs inside it, and the client that asks it."""
